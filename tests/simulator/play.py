"""Plays a recording of a real server against a simulator: its calls, at the recorded points of progress."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from relay.simulator.state import Chat
from tests.simulator.listener import DEADLINE_SECONDS, Answer, Client, Listener
from tests.simulator.recording import CHATS, Line, Names, Note, Rest, Socket, same_names, shape, shapes_of

Json = Any

# A summary comes a little after the end of a turn.
IDLE_ATTEMPTS = 10
PNG = b"\x89PNG\r\n\x1a\n" + bytes(59)

# Sockets whose opening the recordings do not show, with the path they must have had.
REFUSED_SOCKETS = {"bad-after": "/stream?after_id=x"}


@dataclass
class Connection:
    """One recorded connection and its counterpart here."""

    chat_id: str
    listener: Listener
    durable: list[Json] = field(default_factory=list)
    parts_since: int = 0
    frames: list[list[Json]] = field(default_factory=list)


class Play:
    """Plays one recording against a simulator.

    Args:
        ties_sorted: Rows of one time come in any order, and refreshes skip some: messages are no measure of progress.
        answers_only: What sockets tell is not looked at; answers to GET are waited for instead.
        left_out: Ends of paths whose answers the simulator has not.
    """

    def __init__(
        self,
        client: Client,
        lines: list[Line],
        stack: AsyncExitStack,
        *,
        ties_sorted: bool = False,
        answers_only: bool = False,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.client = client
        self.ties_sorted = ties_sorted
        self.answers_only = answers_only
        self.left_out = left_out
        self.lines = lines
        self.stack = stack
        self.uuids: dict[str, str] = {}
        self.queue_ids: dict[str, str] = {}
        self.recorded, self.played = Names(), Names()
        self.connections: dict[str, Connection] = {}
        self.watches: dict[str, Connection] = {}
        self.closers: dict[str, AsyncExitStack] = {}
        self.listed: set[str] = set()
        for line in lines:
            for message in _messages_of(line):
                self.recorded.learn(message)
            if isinstance(line, Rest) and line.is_list_of_chats and line.status == 200:
                self.listed |= shapes_of(line.answer)

    async def run(self) -> None:
        for number, line in enumerate(self.lines):
            if isinstance(line, Note):
                await self.progress()
                await self.note(line)
            elif isinstance(line, Rest):
                await self.progress()
                await self.rest(line)
            elif line.kind == "frame":
                self.expect(line)
            else:
                await self.progress()
                await self.socket(line, number)
        await self.progress()

    # Progress: what was recorded so far must have happened here too, before the next deed.

    def expect(self, line: Socket) -> None:
        connection = (self.watches if line.is_watch else self.connections)[line.name]
        connection.frames.append(line.events)
        for event in line.events:
            if line.is_watch or event["type"] != "message_part":
                connection.durable.append(event)
                connection.parts_since = 0
            else:
                connection.parts_since += 1

    async def progress(self) -> None:
        if self.answers_only:
            return
        deadline = asyncio.get_running_loop().time() + DEADLINE_SECONDS
        for connection in [*self.connections.values(), *self.watches.values()]:
            while not self.is_level(connection):
                if asyncio.get_running_loop().time() > deadline:
                    theirs = Listener(durable=connection.durable, parts_since=connection.parts_since)
                    raise AssertionError(f"{told_by(connection.listener)} is not as far as {told_by(theirs)}")
                self.start_runs(connection)
                connection.listener.changed.clear()
                with contextlib.suppress(TimeoutError):  # a poll may have started other chats than this one
                    await asyncio.wait_for(connection.listener.changed.wait(), 0.05)

    def is_level(self, connection: Connection) -> bool:
        """Whether the listener has seen what its model had: all of path A, and as many parts after it."""
        ours = sum(map(self.counts, connection.listener.durable))
        theirs = sum(map(self.counts, connection.durable))
        if ours != theirs or self.ties_sorted:
            return ours >= theirs
        return connection.listener.parts_since >= connection.parts_since

    def counts(self, event: Json) -> bool:
        """Where refreshes skip rows by chance, messages are no measure of progress."""
        return not (self.ties_sorted and event.get("type") == "message")

    def start_runs(self, connection: Connection) -> None:
        """Poll when the model's chat had begun a run that has not begun here; never earlier."""
        theirs, ours = connection.durable, connection.listener.durable
        if connection.chat_id:
            wanted = sum(status_of(event) == "running" for event in theirs)
            begun = sum(status_of(event) == "running" for event in ours)
        else:
            wanted, begun = (sum(event["kind"] == "status_change" for event in events) for events in (theirs, ours))
        if wanted > begun:
            # Where the model's run had not said a word before the next deed, ours must not either.
            is_mute = connection.parts_since == 0 and status_of(theirs[-1]) == "running"
            self.client.simulator.hold_models(is_mute and self.client.features.double_statuses)
            self.client.simulator.poll()

    # Deeds

    async def note(self, line: Note) -> None:
        """What the recording's driver saw in the list at this point, the chat it goes on with, or a server's end."""
        if line.values["note"] == "restart begins":
            await self.client.simulator.restart(polite=line.values["signal"] == "TERM")
        if "child" in line.values:
            await self.eventually(lambda: self.find_child(line.values["child"]))
        if "has_unread" in line.values:
            await self.eventually(lambda: self.check_unread(line.values["has_unread"]))

    async def find_child(self, recorded: str) -> None:
        children = [chat for chat in self.client.simulator.database.chats.values() if chat.parent_id]
        assert children
        self.uuids[recorded] = str(children[-1].id)

    async def check_unread(self, expected: list[bool]) -> None:
        listed = await self.call("GET", CHATS, None, "ann")
        assert [chat["has_unread"] for chat in listed.json if chat["id"] == self.last_chat()] == expected

    async def socket(self, line: Socket, number: int) -> None:
        match line.kind:
            case "open":
                await self.open(line, number)
            case "closed-by-us":
                await self.closers.pop(line.name).aclose()
                (self.watches if line.is_watch else self.connections)[line.name].listener.ended = False
            case "closed" if line.name == "talker":
                await self.talk(line)
            case "closed":
                await self.ended(line)
            case "failed":
                await self.refused(line)

    async def open(self, line: Socket, number: int) -> None:
        who = line.name.removeprefix("watch:") if line.is_watch else self.user_in(line.name, "ann")
        chat_id = "" if line.is_watch else line.path.split("/")[4]
        if chat_id:
            row = self.client.simulator.database.chats[UUID(self.uuids[chat_id])]
            owner = self.client.simulator.database.users[row.owner_id]
            who = self.user_in(line.name, owner.username)
        closer = self.closers[line.name] = AsyncExitStack()
        self.stack.push_async_callback(closer.aclose)
        path = self.translated(line.path, chat_id).removeprefix(CHATS)
        first = self.first_frame(line, number)
        async with self.as_recorded(chat_id, first):
            listener = await closer.enter_async_context(self.client.socket(path, who=who))
            if first and chat_id:
                await listener.until(lambda seen: seen.frames)
        (self.watches if line.is_watch else self.connections)[line.name] = Connection(chat_id, listener)

    def first_frame(self, line: Socket, number: int) -> list[Json]:
        """The first events of the socket opened there."""
        for later in self.lines[number + 1 :]:
            if isinstance(later, Socket) and later.name == line.name:
                return later.events if later.kind == "frame" else []
        return []

    @asynccontextmanager
    async def as_recorded(self, chat_id: str, snapshot: list[Json]) -> AsyncIterator[None]:
        """Bring the chat where it was when the recorded socket was opened, and let no model time pass meanwhile."""
        status = next(map(status_of, snapshot), "")
        simulator = self.client.simulator
        if not status or self.answers_only or not self.client.features.double_statuses:
            yield  # the seed begins no run before somebody has had the time to look
            return
        chat = simulator.database.chats[UUID(self.uuids[chat_id])]
        parts = sum(event["type"] in ("message_part", "retry") for event in snapshot)
        simulator.hold_models(status == "running" and parts == 0 and chat.status == "pending")
        if status not in ("pending", chat.status):
            simulator.poll(chat.id)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (chat.status == status and self.has_parts(chat, parts)):
                await asyncio.sleep(0.0005)
        simulator.hold_models(True)
        yield
        simulator.hold_models(False)

    def has_parts(self, chat: Chat, parts: int) -> bool:
        """About as many parts of a running step as were recorded; of one that is over there are any or none."""
        live = len(self.client.simulator.buffered(chat.id))
        # The last part may be followed by the end of the step at once.
        return live >= min(parts, max(1, parts - 1)) if chat.status == "running" else bool(live) == bool(parts)

    async def ended(self, line: Socket) -> None:
        """A socket that a stopping server closed. Its name may be used again."""
        sockets = self.watches if line.is_watch else self.connections
        connection = sockets[f"{line.name} until {line.at}"] = sockets.pop(line.name)
        await connection.listener.until_ended()
        assert (connection.listener.code, connection.listener.reason) == (line.code, line.reason), line
        await self.closers.pop(line.name).aclose()

    async def talk(self, line: Socket) -> None:
        """The one socket that the server closed because its client had said something."""
        url = f"{self.client.simulator.url}{CHATS}/{self.last_chat()}/stream"
        headers = {"Coder-Session-Token": self.client.simulator.users["ann"].token}
        async with self.client.session.ws_connect(url, headers=headers) as socket:
            await socket.send_str("hello")
            while (message := await socket.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
            assert (message.data, message.extra) == (line.code, line.reason)

    async def refused(self, line: Socket) -> None:
        status = int(re.findall(r"HTTP (\d+)", line.error)[0])
        path = f"/{self.last_chat()}{REFUSED_SOCKETS.get(line.name, '/stream')}"
        headers = {"Coder-Session-Token": self.token(self.user_in(line.name, "ann"))}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            await self.client.session.ws_connect(self.client.simulator.url + CHATS + path, headers=headers)
        assert refusal.value.status == status

    async def rest(self, line: Rest) -> None:
        if line.path.endswith(self.left_out or ("/-",)):
            return
        if line.path.startswith("/files"):
            await self.file(line)
            return
        request = json.loads(self.translated(json.dumps(line.request), "")) if line.request is not None else None
        parts = line.path.split("/")
        path = self.translated(line.path, parts[4] if len(parts) > 4 else "")

        async def once() -> None:
            answer = await self.call(line.method, path, request, line.who)
            self.client.simulator.hold_models(False)
            self.compare(line, answer)

        await self.unseen(line)
        # Nobody saw when it happened, only that it had happened.
        await (self.eventually(once) if line.method == "GET" else once())

    async def unseen(self, line: Rest) -> None:
        """Wait for what the answer to a prompt or a verb tells of, and no socket shows."""
        chat_id = line.path.split("/")[4][:36] if line.method != "GET" and line.path.count("/") > 3 else ""
        is_over = '"queued":false' in line.body or "not allowed from state W" in line.body
        if chat_id not in self.uuids or (line.status >= 300 and not is_over):
            return
        simulator = self.client.simulator
        chat = simulator.database.chats[UUID(self.uuids[chat_id])]
        async with asyncio.timeout(DEADLINE_SECONDS):
            while '"last_turn_summary":"' in line.body and not chat.last_turn_summary:
                await asyncio.sleep(0.005)
            if not self.answers_only and any(c.chat_id == chat_id for c in self.connections.values()):
                return
            simulator.poll(chat.id)
            while chat.is_busy and (is_over or not simulator.buffered(chat.id)):
                await asyncio.sleep(0.005)
                simulator.poll(chat.id)

    async def eventually(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Once more and once more until it does not fail, and for good when nothing has changed for a while."""
        deadline = asyncio.get_running_loop().time() + DEADLINE_SECONDS
        idle = 0
        while True:
            try:
                return await attempt()
            except AssertionError:
                idle = idle + 1 if self.client.simulator.is_idle() else 0
                if asyncio.get_running_loop().time() > deadline or idle > IDLE_ATTEMPTS:
                    raise
            self.client.simulator.poll()
            await asyncio.sleep(0.01)

    def compare(self, line: Rest, answer: Answer) -> None:
        assert answer.status == line.status, (line, answer)
        if line.status >= 400:
            if line.body.startswith("{"):
                self.compare_refusal(line, answer)
        elif line.body:
            self.learn(line.answer, answer.json)
            for connection in self.connections.values():
                for event in connection.listener.events:
                    if event["type"] == "message":
                        self.played.learn(event["message"])
            if "messages" in line.answer and "has_more" in line.answer:
                self.compare_page(line.answer, answer.json)
            else:
                self.compare_answer(line, answer.json)
        else:
            assert answer.text == ""

    def compare_refusal(self, line: Rest, answer: Answer) -> None:
        expected = line.answer
        assert shape(answer.json) == shape(expected)
        for key in ("message", "detail", "validations"):
            assert same_names(answer.json.get(key)) == same_names(expected.get(key)), line

    def compare_page(self, expected: Json, got: Json) -> None:
        assert list(got) == list(expected)
        assert got["has_more"] == expected["has_more"]
        assert [q["content"] for q in got["queued_messages"]] == [q["content"] for q in expected["queued_messages"]]
        ours = [self.played.message(m) for m in got["messages"]]
        theirs = [self.recorded.message(m) for m in expected["messages"]]
        assert ours == theirs, next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), len(ours))

    def compare_answer(self, line: Rest, got: Json) -> None:
        if line.is_list_of_chats:  # of those that there were
            assert bool(got) == bool(line.answer), line
            assert shapes_of(got) <= self.listed, line
            assert any("parent_chat_id" in chat for chat in got) <= any("parent_chat_id" in c for c in line.answer), (
                line
            )
            return
        assert shape(got) == shape(line.answer), line
        if isinstance(got, dict):
            for key in ("status", "last_error", "archived", "queued"):
                assert at_rest(got.get(key)) == at_rest(line.answer.get(key)), (key, line, got)

    async def file(self, line: Rest) -> None:
        """Three calls that the recording names in short."""
        query = f"?organization={self.client.simulator.organization_id}"
        headers = {"Coder-Session-Token": self.token("ann")}
        url = self.client.simulator.url + CHATS + "/files"
        if line.method == "GET":
            async with self.client.session.get(f"{url}/{self.uuids['file']}", headers=headers) as response:
                assert (response.status, len(await response.read())) == (line.status, len(PNG))
            return
        media = "image/svg+xml" if line.path.endswith("svg") else "image/png"
        headers |= {"Content-Type": media, "Content-Disposition": "attachment; filename=dot.png"}
        async with self.client.session.post(url + query, data=PNG, headers=headers) as response:
            assert response.status == line.status
            body = await response.json()
            assert shape(body) == shape(line.answer)
            if response.status == 201:
                self.uuids["file"] = body["id"]
            else:
                assert body == line.answer

    # Names

    def learn(self, expected: Json, got: Json) -> None:
        """Which thing here is which there."""
        if not isinstance(expected, dict):
            return
        for message in _messages_in(got):
            self.played.learn(message)
        if "queued_message" in expected and "queued_message" in got:
            self.queue_ids[str(expected["queued_message"]["id"])] = str(got["queued_message"]["id"])
        elif "owner_id" in expected:
            for name in ("id", "last_model_config_id", "organization_id"):
                if name in expected:
                    self.uuids[expected[name]] = got[name]

    def translated(self, text: str, chat_id: str) -> str:
        """Recorded ids as those of this play; message ids by their rank in the chat."""
        text = re.sub(r"/queue/(\d+)", lambda m: f"/queue/{self.queue_ids.get(m[1], m[1])}", text)
        text = re.sub(
            r"(/messages/|after_id=|before_id=)(\d+)\b(?!-)",
            lambda m: m[1] + str(self.message_id(chat_id, int(m[2]))),
            text,
        )
        for theirs, ours in self.uuids.items():
            text = text.replace(theirs, ours)
        return text

    def message_id(self, chat_id: str, message_id: int) -> int:
        if message_id not in self.recorded.messages.get(chat_id, set()):
            return message_id
        chat = self.client.simulator.database.chats[UUID(self.uuids[chat_id])]
        return [message.id for message in chat.messages if message.visible][self.recorded.rank(chat_id, message_id)]

    def last_chat(self) -> str:
        return str(list(self.client.simulator.database.chats)[-1])

    def user_in(self, socket: str, default: str) -> str:
        """The user whom a socket's name names; anybody else is nobody."""
        named = re.search(r"(?:^|-)as-(\w+)$", socket)
        return named[1] if named and named[1] != "owner" else default

    def token(self, who: str) -> str:
        user = self.client.simulator.users.get(who)
        return user.token if user else "nope-" + "x" * 22

    async def call(self, method: str, path: str, body: Json, who: str) -> Answer:
        headers = {"Coder-Session-Token": self.token(who)}
        url = self.client.simulator.url + path
        async with self.client.session.request(method, url, json=body, headers=headers) as response:
            return Answer(response.status, await response.text(), dict(response.headers))


def told_by(listener: Listener) -> str:
    """What a socket has told so far, in short."""
    watched = [f"{event['kind']} {event['chat']['status']}" for event in listener.durable if "kind" in event]
    return f"{watched or listener.story} and {listener.parts_since} parts"


def at_rest(value: Json) -> Json:
    """A value of an answer; whether a worker has taken a chat up already is a matter of a millisecond."""
    return "at work" if value in ("pending", "running") else value


def status_of(event: Json) -> str:
    return str(event["status"]["status"]) if event.get("type") == "status" else ""


def _messages_of(line: Line) -> list[Json]:
    if isinstance(line, Note):
        return []
    if isinstance(line, Rest):
        return _messages_in(line.answer) if line.status < 300 and line.body.startswith("{") else []
    if line.kind != "frame" or line.is_watch:
        return []
    return [event["message"] for event in line.events if event["type"] == "message"]


def _messages_in(answer: Json) -> list[Json]:
    if not isinstance(answer, dict):
        return []
    if "role" in answer:
        return [answer]
    if "message" in answer and isinstance(answer["message"], dict):
        return [answer["message"]]
    return list(answer["messages"]) if "has_more" in answer else []


@cache
def users_of_recordings(folder: Path) -> dict[str, str]:
    """Ids of the recorded users by name."""
    users: dict[str, str] = {}
    for path in folder.glob("*.jsonl"):
        for text in path.read_text().splitlines():
            if f'"rest": "POST {CHATS}"' in text and '"status": 201' in text:
                record = json.loads(text)
                users[json.loads(record["body"])["owner_id"]] = record["as_"]
    return users
