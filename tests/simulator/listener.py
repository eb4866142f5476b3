"""A socket client of the tests: keeps every frame it got, and waits for facts."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import aiohttp

from relay.simulator import Simulator
from relay.simulator.dialect import DIALECTS, Features
from relay.simulator.owner import Owner

DEADLINE_SECONDS = 10.0

Json = Any


@dataclass
class Listener:
    """One open socket: frames, their events, those among them that are no parts, and how many parts came since.

    `ended` is set when it is over; `code` None then means without a close frame.
    """

    frames: list[str] = field(default_factory=list)
    events: list[Json] = field(default_factory=list)
    durable: list[Json] = field(default_factory=list)
    parts_since: int = 0
    code: int | None = None
    reason: str = ""
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, frame: str) -> None:
        """Keep a frame and its events."""
        self.frames.append(frame)
        for event in events_of(frame):
            self.events.append(event)
            if event.get("type") == "message_part":
                self.parts_since += 1
            else:
                self.durable.append(event)
                self.parts_since = 0

    @property
    def story(self) -> list[str]:
        """What happened without parts: `pending`, `user`, `tool`, `queue 2`, `retry 1`, `error: …`."""
        return [told for event in self.durable if (told := tell(event))]

    @property
    def last(self) -> str:
        """The end of the story so far."""
        return tell(self.durable[-1]) if self.durable else ""

    @property
    def messages(self) -> list[Json]:
        return [event["message"] for event in self.events if event["type"] == "message"]

    @property
    def parts(self) -> list[Json]:
        """Role and part of every part event."""
        return [event["message_part"] for event in self.events if event["type"] == "message_part"]

    @property
    def message_ids(self) -> list[int]:
        return [message["id"] for message in self.messages]

    @property
    def text(self) -> str:
        """All text parts, joined."""
        return "".join(part["part"]["text"] for part in self.parts)

    async def until(self, fact: Callable[["Listener"], object]) -> None:
        """Wait until the fact is true of what was received so far."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not fact(self):
                if self.ended:
                    raise AssertionError(f"the socket ended first ({self.code} {self.reason}): {self.story}")
                self.changed.clear()
                await self.changed.wait()

    async def until_ended(self) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not self.ended:
                self.changed.clear()
                await self.changed.wait()


def events_of(frame: str) -> list[Json]:
    """The events of a frame, in an envelope or bare; none of what is neither."""
    try:
        value = json.loads(frame)
    except ValueError:
        return []
    if isinstance(value, dict) and "kind" not in value:
        value = value.get("data")
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else []


def tell(event: Json) -> str:
    """One event in a word or two; parts are nothing."""
    match event.get("type"):
        case "message":
            return str(event["message"]["role"])
        case "status":
            return str(event["status"]["status"])
        case "queue_update":
            return f"queue {len(event.get('queued_messages', []))}"
        case "retry":
            return f"retry {event['retry']['attempt']}"
        case "error":
            return f"error: {event['error']['message']}"
        case "history_reset" | "preview_reset" | "action_required" as kind:
            return str(kind)
        case _:
            return ""


@dataclass
class Client:
    """What the tests act with: owners by name, raw requests, sockets."""

    simulator: Simulator
    session: aiohttp.ClientSession

    @property
    def features(self) -> Features:
        """Of the server as it is now."""
        return DIALECTS[self.simulator.config.dialect].features

    @property
    def chats(self) -> str:
        """Path of the chats, as the server has it now."""
        return self.features.prefixes[0]

    def owner(self, name: str = "ann") -> Owner:
        simulator = self.simulator
        model_id = simulator.model_configs[0].id
        user, speed = simulator.users[name], simulator.config.speed
        return Owner(self.session, simulator.url, user, model_id, speed, prefix=lambda: self.chats)

    async def call(
        self, method: str, path: str, body: Json = None, *, who: str = "ann", base: str | None = None
    ) -> "Answer":
        headers = {"Coder-Session-Token": self.simulator.users[who].token} if who else {}
        url = self.simulator.url + (self.chats if base is None else base) + path
        async with self.session.request(method, url, json=body, headers=headers) as response:
            return Answer(response.status, await response.text(), dict(response.headers))

    @asynccontextmanager
    async def stream(self, chat: UUID, after_id: int | None = None, *, who: str = "ann") -> AsyncIterator[Listener]:
        query = "" if after_id is None else f"?after_id={after_id}"
        async with self.socket(f"/{chat}/stream{query}", who=who) as listener:
            yield listener

    @asynccontextmanager
    async def speaker(self, chat: UUID) -> AsyncIterator[Listener]:
        """A stream whose client has said something, which the protocol forbids."""
        url = f"{self.simulator.url}{self.chats}/{chat}/stream"
        async with listen(self.session, url, self.simulator.users["ann"].token, says="hello") as listener:
            yield listener

    @asynccontextmanager
    async def watch(self, who: str = "ann") -> AsyncIterator[Listener]:
        async with self.socket("/watch", who=who) as listener:
            if not self.features.raw_frames:  # others do not greet
                await listener.until(lambda seen: seen.frames)
            yield listener

    @asynccontextmanager
    async def socket(self, path: str, *, who: str = "ann") -> AsyncIterator[Listener]:
        token = self.simulator.users[who].token
        async with listen(self.session, self.simulator.url + self.chats + path, token) as listener:
            yield listener


@asynccontextmanager
async def listen(session: aiohttp.ClientSession, url: str, token: str, *, says: str = "") -> AsyncIterator[Listener]:
    """Open a socket, say something on it, and keep what comes."""
    headers = {"Coder-Session-Token": token}
    async with session.ws_connect(url, headers=headers, max_msg_size=0) as socket:
        listener = Listener()
        if says:
            await socket.send_str(says)
        task = asyncio.create_task(_receive(socket, listener))
        try:
            yield listener
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@dataclass
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self) -> Json:
        return json.loads(self.text)


async def _receive(socket: aiohttp.ClientWebSocketResponse, listener: Listener) -> None:
    while True:
        message = await socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            listener.take(message.data)
        elif message.type in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG):
            continue
        else:
            listener.code = message.data if message.type is aiohttp.WSMsgType.CLOSE else None
            listener.reason = str(message.extra or "")
            listener.ended = True
        listener.changed.set()
        if listener.ended:
            return
