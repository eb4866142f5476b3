"""Serve one recording: every stream connect plays the next recorded connection of its chat, as it was and as it ended.

What a client reads by REST follows the play: chats and messages are as they were at the frame that was sent last, and
at the end the recorded answers themselves are given. The text of frames and bodies is never changed, so recordings of
any dialect can be served.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from aiohttp import web

from relay.simulator.calls import answer_json
from relay.simulator.faults import Faults
from relay.simulator.gate import token_of
from relay.simulator.outlet import Outlet
from relay.simulator.server import SimulatorConfig, seeded_users
from relay.simulator.state import User
from relay.simulator.wire import JsonObject, go_json

_CHATS = re.compile(r"/api/(?:experimental|v2)/chats(?:/(.*))?$")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class NotARecording(ValueError):
    """The file is no recording; the text says which line is not."""


@dataclass
class Connection:
    """One recorded socket. Frames come with the number of their line and the seconds since the socket was opened."""

    name: str
    path: str
    opened_at: int
    frames: list[tuple[int, float, str]] = field(default_factory=list)
    end: str = "open"
    end_seconds: float = 0.0
    code: int = 1000
    reason: str = ""


class Recording:
    """A recording, read and put in order.

    Raises:
        NotARecording: A line is not JSON or not of a known kind.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.lines = [_record(path, number, text) for number, text in enumerate(path.read_text().splitlines(), 1)]
        self.streams: dict[str, list[Connection]] = {}
        self.watches: dict[str, list[Connection]] = {}
        self.created_at: dict[str, int] = {}
        self.owners: dict[str, str] = {}
        opened: dict[str, tuple[Connection, float]] = {}
        for number, line in enumerate(self.lines):
            self._note_chats(number, line)
            if line.get("kind") == "open" and "path" in line:
                connection = Connection(line["conn"], line["path"], number)
                opened[line["conn"]] = (connection, line["t"])
                if line["conn"].startswith("watch:"):
                    self.watches.setdefault(line["conn"].removeprefix("watch:"), []).append(connection)
                elif match := _UUID.search(line["path"]):
                    self.streams.setdefault(match[0], []).append(connection)
            elif line.get("conn") in opened:
                connection, since = opened[line["conn"]]
                seconds = line["t"] - since
                if line["kind"] == "frame":
                    connection.frames.append((number, seconds, line["raw"]))
                else:
                    connection.end, connection.end_seconds = line["kind"], seconds
                    connection.code, connection.reason = line.get("code") or 1000, line.get("reason") or ""
        if not self.streams and not any("rest" in line for line in self.lines):
            raise NotARecording(f"{path}: holds neither calls nor streams")
        first = next((frames[0][2] for c in self.streams.values() for frames in [c[0].frames] if frames), "{")
        self.is_enveloped = first.startswith("{")

    def _note_chats(self, number: int, line: JsonObject) -> None:
        if line.get("status") in (200, 201) and "rest" in line:
            body = decoded(line.get("body"))
            for chat in body if isinstance(body, list) else [body]:
                if isinstance(chat, dict) and "owner_id" in chat:
                    self.created_at.setdefault(chat["id"], number + 1)
                    self.owners.setdefault(chat["owner_id"], line.get("as_") or "ann")
        elif line.get("kind") == "open" and (match := _UUID.search(line.get("path", ""))):
            self.created_at.setdefault(match[0], number)

    def answers(self, method: str, path: str) -> list[JsonObject]:
        """The recorded answers of one call, in order."""
        return [line for line in self.lines if line.get("rest") == f"{method} {path}"]


def _record(path: Path, number: int, text: str) -> JsonObject:
    try:
        line = json.loads(text)
    except ValueError as exc:
        raise NotARecording(f"{path}, line {number}: not JSON ({exc})") from exc
    if not isinstance(line, dict) or not ("rest" in line or "kind" in line or "note" in line):
        raise NotARecording(f"{path}, line {number}: neither a call ('rest'), a socket ('kind') nor a 'note'")
    return line


def decoded(body: Any) -> Any:
    """A recorded body, which is the text as it was."""
    try:
        return json.loads(body) if body else None
    except ValueError:
        return None


@dataclass
class ChatState:
    """One chat as it was after some line of the recording."""

    chat: JsonObject = field(default_factory=dict)
    messages: dict[int, JsonObject] = field(default_factory=dict)
    queue: list[JsonObject] = field(default_factory=list)


def state_at(recording: Recording, chat_id: str, end: int) -> ChatState:
    """Fold all lines before number `end` that tell of the chat."""
    state = ChatState()
    for line in recording.lines[:end]:
        if line.get("kind") == "frame":
            for event in _events(line["raw"]):
                _apply_event(state, chat_id, event)
        elif "rest" in line and line["status"] in (200, 201, 204):
            _apply_call(state, chat_id, line)
    return state


def _events(raw: str) -> Iterator[JsonObject]:
    frame = decoded(raw)
    data = frame.get("data") if isinstance(frame, dict) and "data" in frame else frame
    for event in data if isinstance(data, list) else [data]:
        if isinstance(event, dict):
            yield event


def _apply_event(state: ChatState, chat_id: str, event: JsonObject) -> None:
    if event.get("kind") and event.get("chat", {}).get("id") == chat_id:
        told = event["chat"]
        if event["kind"] != "title_change":
            state.chat["status"] = told["status"]
        state.chat["title"] = told["title"]
        if event["kind"] in ("deleted", "created"):
            state.chat["archived"] = event["kind"] == "deleted"
    if event.get("chat_id") != chat_id:
        return
    match event.get("type"):
        case "message":
            state.messages[event["message"]["id"]] = event["message"]
        case "status":
            state.chat["status"] = event["status"]["status"]
        case "queue_update":
            state.queue = event.get("queued_messages", [])
        case "history_reset":
            state.messages.clear()


def _apply_call(state: ChatState, chat_id: str, line: JsonObject) -> None:
    method, _, path = line["rest"].partition(" ")
    body = decoded(line.get("body"))
    for chat in body if isinstance(body, list) else [body]:
        if isinstance(chat, dict) and chat.get("id") == chat_id and "owner_id" in chat:
            state.chat = {**state.chat, **chat}
    if chat_id not in path:
        return
    request = line.get("request")
    if method == "PATCH" and isinstance(request, dict) and isinstance(request.get("archived"), bool):
        state.chat["archived"] = request["archived"]
    if not isinstance(body, dict):
        return
    if "has_more" in body:
        if "before_id" not in path and not body["has_more"] and "after_id" not in path:
            state.messages.clear()
            state.queue = body["queued_messages"]
        state.messages |= {message["id"]: message for message in body["messages"]}
    edited = re.search(r"/messages/(\d+)$", path)
    made = body.get("message") if "role" not in body else body
    if isinstance(made, dict) and made.get("chat_id") == chat_id:
        if edited and method == "PATCH":
            state.messages = {i: m for i, m in state.messages.items() if i < int(edited[1])}
            state.queue = []
        state.messages[made["id"]] = made
    if isinstance(body.get("queued_message"), dict):
        state.queue = [*state.queue, body["queued_message"]]


class Replay:
    """A server that plays a recording. Use as `async with Replay(recording, config) as replay:`.

    Any token is taken; that of a user of the recording lists this user's chats, any other one those of the first.
    """

    def __init__(self, recording: Recording, config: SimulatorConfig) -> None:
        self.recording = recording
        self.config = config
        self.port = config.port
        self.users = seeded_users(config.seed)
        self._faults = Faults.silent()
        self._next_stream: dict[str, int] = {}
        self._next_watch: dict[str, int] = {}
        self._next_answer: dict[str, int] = {}
        self._position = dict(recording.created_at)
        self._outlets: set[Outlet] = set()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{self.config.host}:{self.port}"

    async def __aenter__(self) -> Self:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.config.host, self.port, reuse_address=True).start()
        self.port = int(self._runner.addresses[0][1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*[outlet.close(1000, "Connection closed") for outlet in list(self._outlets)])
        if self._runner is not None:
            await self._runner.cleanup()

    # Calls

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        match = _CHATS.match(request.path)
        segments = (match[1] or "").strip("/").split("/") if match else []
        match segments:
            case ["watch"]:
                return await self._watch(request)
            case [chat_id, "stream"] if chat_id in self._position:
                return await self._stream(request, chat_id)
            case [""] if request.method == "GET":
                return self._list(request)
            case [chat_id] if request.method == "GET" and chat_id in self._position:
                return self._recorded_truth(request, chat_id) or answer_json(self._state(chat_id).chat)
            case [chat_id, "messages"] if request.method == "GET" and chat_id in self._position:
                return self._recorded_truth(request, chat_id) or self._messages(request, chat_id)
        recorded = self.recording.answers(request.method, request.path_qs)
        if recorded:
            number = self._next_answer.get(f"{request.method} {request.path_qs}", 0)
            self._next_answer[f"{request.method} {request.path_qs}"] = number + 1
            return _as_recorded(recorded[min(number, len(recorded) - 1)])
        return self._unrecorded(request)

    def _unrecorded(self, request: web.Request) -> web.Response:
        name, owner_id = self._caller(request)
        if request.path in ("/api/v2/users/me", f"/api/v2/users/{name}", f"/api/v2/users/{owner_id}"):
            return answer_json({"id": owner_id, "username": name, "name": "", "roles": [], "status": "active"})
        if request.path == "/api/v2/buildinfo":
            return answer_json({"external_url": "https://github.com/coder/coder", "version": "v0.0.0-devel"})
        return answer_json({"message": "Route not found."}, 404)

    def _caller(self, request: web.Request) -> tuple[str, str]:
        """User name and id."""
        by_token = {user.token: user.username for user in self.users.values()}
        name = by_token.get(token_of(request))
        for owner_id, owner in self.recording.owners.items():
            if name in (owner, None):
                return owner, owner_id
        user: User = self.users[name or "ann"]
        return user.username, str(user.id)

    def _state(self, chat_id: str) -> ChatState:
        state = state_at(self.recording, chat_id, self._position[chat_id])
        if not state.chat.get("owner_id"):
            state.chat = {"id": chat_id, "owner_id": next(iter(self.recording.owners), str(UUID(int=0)))} | state.chat
        return state

    def _list(self, request: web.Request) -> web.Response:
        _, owner_id = self._caller(request)
        archived = "archived:t" in request.query.get("q", "") or "archived:1" in request.query.get("q", "")
        chats = [self._state(chat_id).chat for chat_id in self._position]
        mine = [c for c in chats if c["owner_id"] == owner_id and bool(c.get("archived")) == archived]
        mine.sort(key=lambda chat: (chat.get("updated_at", ""), chat["id"]), reverse=True)
        after, limit = request.query.get("after_id"), int(request.query.get("limit") or 50)
        if after:
            ids = [chat["id"] for chat in mine]
            mine = mine[ids.index(after) + 1 :] if after in ids else []
        offset = int(request.query.get("offset") or 0)
        return answer_json(mine[offset : offset + (limit or 50)])

    def _messages(self, request: web.Request, chat_id: str) -> web.Response:
        state = self._state(chat_id)
        before, limit = int(request.query.get("before_id") or 0), int(request.query.get("limit") or 50)
        rows = [state.messages[i] for i in sorted(state.messages, reverse=True) if not before or i < before]
        queue = [] if before else state.queue
        return answer_json({"messages": rows[:limit], "queued_messages": queue, "has_more": len(rows) > limit})

    def _recorded_truth(self, request: web.Request, chat_id: str) -> web.Response | None:
        """The last recorded answer itself, once the chat has been played to its end."""
        if self._position[chat_id] < len(self.recording.lines):
            return None
        recorded = self.recording.answers("GET", request.path_qs)
        return _as_recorded(recorded[-1]) if recorded else None

    # Sockets

    async def _stream(self, request: web.Request, chat_id: str) -> web.StreamResponse:
        connections = self.recording.streams.get(chat_id, [])
        number = self._next_stream.get(chat_id, 0)
        self._next_stream[chat_id] = number + 1
        if number >= len(connections):
            self._position[chat_id] = len(self.recording.lines)
            after_id = int(request.query.get("after_id") or 0)
            return await self._serve(request, UUID(chat_id), Snapshot(self._snapshot(chat_id, after_id)))
        connection = connections[number]
        is_last = number + 1 == len(connections)
        self._reach(chat_id, connection.opened_at)
        play = Played(connection, self.config.speed, is_last, lambda line: self._reach(chat_id, line))
        if is_last:
            play.at_end = len(self.recording.lines)
        return await self._serve(request, UUID(chat_id), play)

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        name, _ = self._caller(request)
        connections = self.recording.watches.get(name, [])
        number = self._next_watch.get(name, 0)
        self._next_watch[name] = number + 1
        if number >= len(connections):
            return await self._serve(request, None, Snapshot('{"type":"ping","data":null}\n'))
        is_last = number + 1 == len(connections)
        return await self._serve(request, None, Played(connections[number], self.config.speed, is_last))

    async def _serve(
        self, request: web.Request, chat_id: UUID | None, producer: "Played | Snapshot"
    ) -> web.StreamResponse:
        outlet = Outlet(chat_id, self._faults, self.config.patience)
        self._outlets.add(outlet)
        try:
            return await outlet.serve(request, producer.run)
        finally:
            self._outlets.discard(outlet)

    def _reach(self, chat_id: str, line: int) -> None:
        self._position[chat_id] = max(self._position[chat_id], line)

    def _snapshot(self, chat_id: str, after_id: int) -> str:
        """What a server would send to a client that comes when all is over."""
        state = self._state(chat_id)
        status = {"type": "status", "chat_id": chat_id, "status": {"status": state.chat.get("status", "waiting")}}
        messages = [
            {"type": "message", "chat_id": chat_id, "message": state.messages[i]}
            for i in sorted(state.messages)
            if i > after_id
        ]
        queue = {"type": "queue_update", "chat_id": chat_id, "queued_messages": state.queue}
        events = [status, *messages, *([queue] if state.queue else [])]
        return go_json({"type": "data", "data": events} if self.recording.is_enveloped else events) + "\n"


def _as_recorded(line: JsonObject) -> web.Response:
    return web.Response(
        status=line["status"],
        body=(line.get("body") or "").encode(),
        headers={"Content-Type": "application/json; charset=utf-8"},
    )


@dataclass
class Snapshot:
    """One frame, then nothing, with the socket open."""

    frame: str

    async def run(self, outlet: Outlet) -> None:
        await outlet.send_frame(self.frame)
        await asyncio.Event().wait()


class Played:
    """Plays one recorded connection, in recorded time over speed, and ends it as it ended.

    Where the recording client closed and came back, the socket is cut; where it closed for good, it stays open.
    """

    def __init__(self, connection: Connection, speed: float, is_last: bool, reach: Any = None) -> None:
        self.at_end = 0
        self._connection = connection
        self._speed = speed
        self._is_last = is_last
        self._reach = reach or (lambda _line: None)

    async def run(self, outlet: Outlet) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for number, seconds, raw in self._connection.frames:
            await asyncio.sleep(began + seconds / self._speed - loop.time())
            self._reach(number + 1)
            await outlet.send_frame(raw)
        self._reach(self.at_end)
        if self._connection.end == "closed" or not self._is_last:
            await asyncio.sleep(began + self._connection.end_seconds / self._speed - loop.time())
        if self._connection.end == "closed":
            await outlet.close(self._connection.code, self._connection.reason)
        elif self._connection.end == "failed" or not self._is_last:
            outlet.cut()
        else:
            await asyncio.Event().wait()
