"""A chat owner who acts through the HTTP API, as people do. Scenarios and generated chats are written with it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import aiohttp

from relay.simulator.dialect import EXPERIMENTAL
from relay.simulator.state import User

IDLE = ("waiting", "error")
BLOCKED = "requires_action"
CLIENT_TOOL = "lab_tool"
# Such answers pass: the owner tries again, as people do.
PASSING = (429, 502, 503, 504)
NO_ROUTE = "Route not found."  # one of two ages behind the address has the chats elsewhere
PATIENCE_SECONDS = 60.0
RELOAD_SECONDS = 3.0  # without a word on a stream
LOOKS_FOR_AN_ANSWER = 20


Result = TypeVar("Result")


class OwnerRefused(RuntimeError):
    """The server refused what the owner did."""


class Owner:
    """One user. Waits by polling, `speed` times as often as a patient person would."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        user: User,
        model_id: UUID,
        speed: float,
        *,
        prefix: Callable[[], str] = lambda: EXPERIMENTAL,
    ) -> None:
        """`prefix`: where the chats are below the URL; asked each time, for a server may move them."""
        self.user = user
        self._session = session
        self._base = url
        self._prefix = prefix
        self._organization_id = ""
        self._headers = {"Coder-Session-Token": user.token}
        self._model_id = model_id
        self._pause = 0.15 / speed

    @property
    def _url(self) -> str:
        return self._base + self._prefix()

    async def create(self, text: str) -> UUID:
        """A new chat with a first prompt. The owner offers a tool of their own, as far as the server knows such."""
        if not self._organization_id:
            me = await self._get(self._base + "/api/v2/users/me")
            self._organization_id = str(me["organization_ids"][0])
        body = {
            **_content(text),
            "model_config_id": str(self._model_id),
            "organization_id": self._organization_id,
            "unsafe_dynamic_tools": [{"name": CLIENT_TOOL, "input_schema": {"type": "object"}}],
        }
        return UUID((await self._call("POST", "", body))["id"])

    async def send(self, chat: UUID, text: str) -> dict[str, Any]:
        """Post a prompt; the answer says whether it was queued."""
        answer: dict[str, Any] = await self._call("POST", f"/{chat}/messages", _content(text))
        return answer

    async def edit(self, chat: UUID, message_id: int, text: str) -> None:
        await self._call("PATCH", f"/{chat}/messages/{message_id}", _content(text))

    async def interrupt(self, chat: UUID) -> None:
        """Nothing to interrupt is no error: the chat was faster."""
        await self._call("POST", f"/{chat}/interrupt", forgiving=(409,))

    async def delete_queued(self, chat: UUID, queue_id: int) -> None:
        await self._call("DELETE", f"/{chat}/queue/{queue_id}", forgiving=(409,))

    async def promote(self, chat: UUID, queue_id: int) -> None:
        """A prompt that left the queue meanwhile is no error."""
        await self._call("POST", f"/{chat}/queue/{queue_id}/promote", forgiving=(409, 500))

    async def answer_calls(self, chat: UUID) -> bool:
        """Wait until the chat asks for the owner's tool and give the results; False: its turn ended without asking."""
        status = await self.wait_blocked(chat)
        if status != BLOCKED:
            return False
        results = [{"tool_call_id": call, "output": {"ok": True}} for call in await self._open_calls(chat)]
        await self._call("POST", f"/{chat}/tool-results", {"results": results}, forgiving=(409,))
        return True

    async def wait_blocked(self, chat: UUID) -> str:
        """Until the chat asks for the owner's tool, or its turn has ended; which of it, as its status."""
        while True:
            status = str((await self._call("GET", f"/{chat}"))["status"])
            if status in (*IDLE, BLOCKED):
                return status
            await asyncio.sleep(self._pause)

    async def _open_calls(self, chat: UUID) -> list[str]:
        """Ids of the calls that have no result, oldest first."""
        parts = [part for message in await self.messages(chat) for part in message.get("content", [])]
        answered = {part["tool_call_id"] for part in parts if part["type"] == "tool-result"}
        calls = [part["tool_call_id"] for part in parts if part["type"] == "tool-call"]
        return [call for call in calls if call not in answered]

    async def messages(self, chat: UUID) -> list[dict[str, Any]]:
        """All messages, oldest first."""
        messages: list[dict[str, Any]] = []
        more = True
        while more:
            before = f"&before_id={messages[-1]['id']}" if messages else ""
            page = await self._call("GET", f"/{chat}/messages?limit=200{before}")
            messages += page["messages"]
            more = page["has_more"]
        return messages[::-1]

    async def queue(self, chat: UUID) -> list[int]:
        """Ids of the queued prompts, oldest first."""
        page = await self._call("GET", f"/{chat}/messages?limit=1")
        return [queued["id"] for queued in page["queued_messages"]]

    async def prompts(self, chat: UUID) -> list[int]:
        """Ids of the user messages, oldest first."""
        return [message["id"] for message in await self.messages(chat) if message["role"] == "user"]

    async def wait_idle(self, chat: UUID) -> None:
        """Until the chat waits or failed, and its queue is empty."""
        while True:
            row = await self._call("GET", f"/{chat}")
            if row["status"] in IDLE:
                page = await self._call("GET", f"/{chat}/messages?limit=1")
                if not page["queued_messages"]:
                    return
            await asyncio.sleep(self._pause)

    async def wait_parts(self, chat: UUID, parts: int) -> None:
        """Watch the stream until it has shown so many parts, or nothing runs, or the stream ends.

        One that says nothing for a while is opened again, as a person would reload the page.
        """
        while True:
            try:
                async with self.stream(chat) as events:
                    await _see(events, parts)
                    return
            except TimeoutError:
                if (await self._call("GET", f"/{chat}"))["status"] in IDLE:
                    return

    async def wait_answer(self, chat: UUID) -> None:
        """Until the last message is not the owner's, or it is clear that there will be none."""
        for _ in range(LOOKS_FOR_AN_ANSWER):
            page = await self._call("GET", f"/{chat}/messages?limit=1")
            if page["messages"] and page["messages"][0]["role"] != "user":
                return
            await asyncio.sleep(self._pause)

    @asynccontextmanager
    async def stream(self, chat: UUID, after_id: int = 0) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """The chat's events, snapshot first."""

        async def connect() -> aiohttp.ClientWebSocketResponse:
            url = f"{self._url}/{chat}/stream?after_id={after_id}"
            try:
                return await self._session.ws_connect(url, headers=self._headers, max_msg_size=0)
            except aiohttp.WSServerHandshakeError as exc:
                if exc.status == 404:  # is it the chat that is gone, or the path for a while?
                    await self._request("GET", f"{self._url}/{chat}", None, ())
                raise

        async with await self._patiently(connect) as socket:

            async def events() -> AsyncIterator[dict[str, Any]]:
                async for frame in socket:
                    value = json.loads(frame.data)
                    for event in value if isinstance(value, list) else value["data"]:
                        yield event

            yield events()

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, forgiving: tuple[int, ...] = ()
    ) -> Any:
        async def once() -> str:
            return await self._request(method, self._url + path, body, forgiving)

        text = await self._patiently(once)
        return json.loads(text) if text else {}

    async def _get(self, url: str) -> Any:
        return json.loads(await self._patiently(lambda: self._request("GET", url, None, ())))

    async def _request(self, method: str, url: str, body: dict[str, Any] | None, forgiving: tuple[int, ...]) -> str:
        async with self._session.request(method, url, json=body, headers=self._headers) as response:
            text = await response.text()
            if response.status in PASSING or (response.status == 404 and NO_ROUTE in text):
                response.raise_for_status()
            if response.status >= 400 and response.status not in forgiving:
                raise OwnerRefused(f"{method} {url}: {response.status} {text.strip()}")
            return text

    async def _patiently(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do the work, again and again while the server is away or answers that it will be back."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while True:
            try:
                return await work()
            except aiohttp.ClientResponseError as exc:
                if exc.status not in (*PASSING, 404) or asyncio.get_running_loop().time() > deadline:
                    raise OwnerRefused(str(exc)) from exc
            except aiohttp.ClientConnectionError as exc:
                if asyncio.get_running_loop().time() > deadline:
                    raise OwnerRefused(str(exc)) from exc
            await asyncio.sleep(self._pause)


async def _see(events: AsyncIterator[dict[str, Any]], parts: int) -> None:
    """Until so many parts have come, or nothing runs. TimeoutError: nothing came for a while."""
    now = asyncio.get_running_loop().time
    async with asyncio.timeout(RELOAD_SECONDS) as silence:
        async for event in events:
            silence.reschedule(now() + RELOAD_SECONDS)
            if event["type"] == "message_part":
                parts -= 1
            if parts <= 0 or event.get("status", {}).get("status") in IDLE:
                return


def _content(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}
