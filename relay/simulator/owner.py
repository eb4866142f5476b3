"""A chat owner who acts through the HTTP API, as people do. Scenarios and generated chats are written with it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import aiohttp

from relay.simulator.gate import CHATS
from relay.simulator.state import User

IDLE = ("waiting", "error")
# Such answers pass: the owner tries again, as people do.
PASSING = (429, 502, 503, 504)
PATIENCE_SECONDS = 60.0
LOOKS_FOR_AN_ANSWER = 20


Result = TypeVar("Result")


class OwnerRefused(RuntimeError):
    """The server refused what the owner did."""


class Owner:
    """One user. Waits by polling, `speed` times as often as a patient person would."""

    def __init__(self, session: aiohttp.ClientSession, url: str, user: User, model_id: UUID, speed: float) -> None:
        self.user = user
        self._session = session
        self._url = url + CHATS
        self._headers = {"Coder-Session-Token": user.token}
        self._model_id = model_id
        self._pause = 0.15 / speed

    async def create(self, text: str) -> UUID:
        """A new chat with a first prompt."""
        body = {"content": [{"type": "text", "text": text}], "model_config_id": str(self._model_id)}
        return UUID((await self._call("POST", "", body))["id"])

    async def send(self, chat: UUID, text: str) -> dict[str, Any]:
        """Post a prompt; the answer says whether it was queued."""
        answer: dict[str, Any] = await self._call("POST", f"/{chat}/messages", _content(text))
        return answer

    async def edit(self, chat: UUID, message_id: int, text: str) -> None:
        await self._call("PATCH", f"/{chat}/messages/{message_id}", _content(text))

    async def interrupt(self, chat: UUID) -> None:
        await self._call("POST", f"/{chat}/interrupt")

    async def delete_queued(self, chat: UUID, queue_id: int) -> None:
        await self._call("DELETE", f"/{chat}/queue/{queue_id}")

    async def promote(self, chat: UUID, queue_id: int) -> None:
        await self._call("POST", f"/{chat}/queue/{queue_id}/promote")

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
        """Watch the stream until it has shown so many parts, or nothing runs, or the stream ends."""
        async with self.stream(chat) as events:
            async for event in events:
                if event["type"] == "message_part":
                    parts -= 1
                if parts <= 0 or event.get("status", {}).get("status") in IDLE:
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
        url = f"{self._url}/{chat}/stream?after_id={after_id}"
        async with await self._patiently(
            lambda: self._session.ws_connect(url, headers=self._headers, max_msg_size=0)
        ) as socket:

            async def events() -> AsyncIterator[dict[str, Any]]:
                async for frame in socket:
                    for event in json.loads(frame.data)["data"]:
                        yield event

            yield events()

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async def once() -> str:
            url = self._url + path
            async with self._session.request(method, url, json=body, headers=self._headers) as response:
                text = await response.text()
                if response.status in PASSING:
                    response.raise_for_status()
                if response.status >= 400:
                    raise OwnerRefused(f"{method} {path}: {response.status} {text.strip()}")
                return text

        text = await self._patiently(once)
        return json.loads(text) if text else {}

    async def _patiently(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Do the work, again and again while the server is away or answers that it will be back."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while True:
            try:
                return await work()
            except aiohttp.ClientResponseError as exc:
                if exc.status not in PASSING or asyncio.get_running_loop().time() > deadline:
                    raise OwnerRefused(str(exc)) from exc
            except aiohttp.ClientConnectionError as exc:
                if asyncio.get_running_loop().time() > deadline:
                    raise OwnerRefused(str(exc)) from exc
            await asyncio.sleep(self._pause)


def _content(text: str) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}]}
