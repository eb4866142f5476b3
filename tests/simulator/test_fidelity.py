"""Fidelity: the calls of every recording of a real server are played against the simulator, at the recorded points of
progress, and what comes out has the same shape and order: ids, times, titles and chunking aside."""

import asyncio
import contextlib
import json
import re
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from relay.simulator.stream import NO_SKEW
from tests.simulator.conftest import Start
from tests.simulator.listener import DEADLINE_SECONDS, Answer, Client, Listener
from tests.simulator.recording import (
    CHATS,
    D0,
    Line,
    Names,
    Rest,
    Socket,
    collapse,
    load,
    part_kind,
    shape,
)  # fmt: skip

Json = Any

PNG = b"\x89PNG\r\n\x1a\n" + bytes(59)

# Sockets whose opening the recordings do not show, with the path they must have had.
REFUSED_SOCKETS = {"bad-after": "/stream?after_id=x"}

# Recordings of which something cannot be demanded, and why.
TIES_IN_ANY_ORDER = {
    "edit_tools_grown": "rows of one step come in an order that differs from query to query, refreshes skip some",
}
# Recordings with deeds in the middle of a step: slow enough that they come in time on a busy machine.
IN_MID_STEP = {
    "interrupt_mid_stream", "edit_while_running", "queue_and_promote", "reconnect_mid_turn", "reconnect_between_steps",
}  # fmt: skip
PRELUDE = {
    "archive_and_watch": "lists chats of other recordings too",
    "usage_limits": "goes on with a chat of another recording",
    "rest_surface": "sums up what was spent before it",
}


@dataclass
class Connection:
    """One recorded connection and its counterpart here."""

    chat_id: str
    listener: Listener
    durable: list[Json] = field(default_factory=list)
    parts_since: int = 0
    frames: list[list[Json]] = field(default_factory=list)


class Play:
    """Plays one recording against a simulator."""

    def __init__(self, client: Client, lines: list[Line], stack: AsyncExitStack, ties_sorted: bool) -> None:
        self.client = client
        self.ties_sorted = ties_sorted
        self.lines = lines
        self.stack = stack
        self.uuids: dict[str, str] = {}
        self.queue_ids: dict[str, str] = {}
        self.recorded, self.played = Names(), Names()
        self.connections: dict[str, Connection] = {}
        self.watches: dict[str, Connection] = {}
        self.closers: dict[str, AsyncExitStack] = {}
        for line in lines:
            for message in _messages_of(line):
                self.recorded.learn(message)

    async def run(self) -> None:
        for line in self.lines:
            if isinstance(line, Rest):
                await self.progress()
                await self.rest(line)
            elif line.kind == "frame":
                self.expect(line)
            else:
                await self.progress()
                await self.socket(line)
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
        async with asyncio.timeout(DEADLINE_SECONDS):
            for connection in [*self.connections.values(), *self.watches.values()]:
                while not self.is_level(connection):
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
            self.client.simulator.poll()

    # Deeds

    async def socket(self, line: Socket) -> None:
        match line.kind:
            case "open":
                await self.open(line)
            case "closed-by-us":
                await self.closers.pop(line.name).aclose()
                (self.watches if line.is_watch else self.connections)[line.name].listener.ended = False
            case "closed":
                await self.talk(line)
            case "failed":
                await self.refused(line)

    async def open(self, line: Socket) -> None:
        who = line.name.removeprefix("watch:") if line.is_watch else _user_in(line.name, "ann")
        chat_id = "" if line.is_watch else line.path.split("/")[4]
        if chat_id:
            row = self.client.simulator.database.chats[UUID(self.uuids[chat_id])]
            owner = self.client.simulator.database.users[row.owner_id]
            who = _user_in(line.name, owner.username)
        closer = self.closers[line.name] = AsyncExitStack()
        self.stack.push_async_callback(closer.aclose)
        path = self.translated(line.path, chat_id).removeprefix(CHATS)
        listener = await closer.enter_async_context(self.client.socket(path, who=who))
        (self.watches if line.is_watch else self.connections)[line.name] = Connection(chat_id, listener)

    async def talk(self, line: Socket) -> None:
        """The one socket that the server closed: its client had sent something."""
        assert line.name == "talker", line
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
        headers = {"Coder-Session-Token": self.token(_user_in(line.name, "ann"))}
        with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
            await self.client.session.ws_connect(self.client.simulator.url + CHATS + path, headers=headers)
        assert refusal.value.status == status

    async def rest(self, line: Rest) -> None:
        if line.path.startswith("/files"):
            await self.file(line)
            return
        request = json.loads(self.translated(json.dumps(line.request), "")) if line.request is not None else None
        parts = line.path.split("/")
        path = self.translated(line.path, parts[4] if len(parts) > 4 else "")
        answer = await self.call(line.method, path, request, line.who)
        assert answer.status == line.status, (line, answer)
        if line.status >= 400:
            self.compare_refusal(line, answer)
        elif line.body:
            self.learn(line.answer, answer.json)
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
            assert answer.json.get(key) == expected.get(key), line

    def compare_page(self, expected: Json, got: Json) -> None:
        assert list(got) == list(expected)
        assert got["has_more"] == expected["has_more"]
        assert [q["content"] for q in got["queued_messages"]] == [q["content"] for q in expected["queued_messages"]]
        assert [self.played.message(m) for m in got["messages"]] == [
            self.recorded.message(m) for m in expected["messages"]
        ]

    def compare_answer(self, line: Rest, got: Json) -> None:
        assert shape(got) == shape(line.answer), line
        if isinstance(got, dict):
            for key in ("status", "last_error", "archived", "queued"):
                assert got.get(key) == line.answer.get(key), (key, line, got)

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
        if "queued_message" in expected:
            self.queue_ids[str(expected["queued_message"]["id"])] = str(got["queued_message"]["id"])
        elif "owner_id" in expected:
            self.uuids[expected["id"]] = got["id"]
            self.uuids[expected["last_model_config_id"]] = got["last_model_config_id"]

    def translated(self, text: str, chat_id: str) -> str:
        """Recorded ids as those of this play; message ids by their rank in the chat."""
        text = re.sub(r"/queue/(\d+)", lambda m: f"/queue/{self.queue_ids.get(m[1], m[1])}", text)
        text = re.sub(
            r"(/messages/|after_id=|before_id=)(\d+)", lambda m: m[1] + str(self.message_id(chat_id, int(m[2]))), text
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

    def token(self, who: str) -> str:
        user = self.client.simulator.users.get(who)
        return user.token if user else "nope-" + "x" * 22

    async def call(self, method: str, path: str, body: Json, who: str) -> Answer:
        headers = {"Coder-Session-Token": self.token(who)}
        url = self.client.simulator.url + path
        async with self.client.session.request(method, url, json=body, headers=headers) as response:
            return Answer(response.status, await response.text(), dict(response.headers))


def status_of(event: Json) -> str:
    return str(event["status"]["status"]) if event.get("type") == "status" else ""


def _user_in(name: str, default: str) -> str:
    return name.rpartition("-as-")[2] if "-as-" in name else default


def _messages_of(line: Line) -> list[Json]:
    if isinstance(line, Rest):
        return _messages_in(line.answer) if line.status < 300 and line.body else []
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
def users_of_recordings() -> dict[str, str]:
    """Ids of the recorded users by name."""
    users: dict[str, str] = {}
    for path in D0.glob("*.jsonl"):
        for text in path.read_text().splitlines():
            if f'"rest": "POST {CHATS}"' in text and '"status": 201' in text:
                record = json.loads(text)
                users[json.loads(record["body"])["owner_id"]] = record["as_"]
    return users


def with_ties_sorted(events: list[Json]) -> list[Json]:
    """Blocks of messages with rows of one time by id, and with those put back that a refresh skipped."""
    known = {event["message"]["id"]: event for event in events if event["type"] == "message"}
    result: list[Json] = []
    block: list[Json] = []
    for event in [*events, {"type": "end"}]:
        if event["type"] == "message":
            block.append(event)
            continue
        times = {(e["message"]["created_at"], e["chat_id"]) for e in block}
        whole = [e for e in known.values() if (e["message"]["created_at"], e["chat_id"]) in times]
        result += sorted(whole, key=lambda e: (_nanoseconds(e["message"]["created_at"]), e["message"]["id"]))
        block = []
        result.append(event)
    return result[:-1]


def _nanoseconds(text: str) -> tuple[str, str]:
    head, _, fraction = text.rstrip("Z").partition(".")
    return head, fraction.ljust(9, "0")


def durable(names: Names, events: list[Json], ties_sorted: bool) -> list[Json]:
    path_a = [event for event in events if event["type"] != "message_part"]
    return [names.durable(event) for event in (with_ties_sorted(path_a) if ties_sorted else path_a)]


def compare_stream(play: Play, name: str) -> None:
    connection = play.connections[name]
    theirs = [event for frame in connection.frames for event in frame]
    ours = connection.listener.events
    for event in ours:
        if event["type"] == "message":
            play.played.learn(event["message"])
    expected = durable(play.recorded, theirs, play.ties_sorted)
    got = durable(play.played, ours, play.ties_sorted)
    statuses = [event["status"]["status"] for event in theirs if event["type"] == "status"]
    # Closed in the middle of a turn: a little more may have come here.
    in_mid_turn = statuses[-1] in ("running", "pending")
    assert got[: len(expected)] == expected, name
    assert in_mid_turn or len(got) == len(expected), name
    # The snapshot, parts in their place: status, parts, messages, queue.
    first = json.loads(connection.listener.frames[0])["data"]
    if not play.ties_sorted:
        assert collapse([e["type"] for e in first]) == collapse([e["type"] for e in connection.frames[0]]), name
    # Path B in its own order.
    mine, recorded = collapse([part_kind(event) for event in ours]), collapse([part_kind(event) for event in theirs])
    assert mine[: len(recorded)] == recorded, name
    assert in_mid_turn or len(mine) == len(recorded), name


def compare_watch(play: Play, name: str) -> None:
    connection = play.watches[name]
    theirs = [event for frame in connection.frames for event in frame]
    ours = connection.listener.events

    def told(events: list[Json], chat_id: str, titles: bool) -> list[Json]:
        return [
            (event["kind"], event["chat"]["status"], event["chat"]["archived"], shape(event["chat"]))
            for event in events
            if event["chat"]["id"] == chat_id and (event["kind"] == "title_change") == titles
        ]

    for chat_id in {event["chat"]["id"] for event in theirs}:
        here = play.uuids.get(chat_id) or play.uuids.setdefault(chat_id, _unnamed(play, ours))
        for titles in (False, True):  # a title may come at any time
            assert told(ours, here, titles) == told(theirs, chat_id, titles), (name, chat_id)


def _unnamed(play: Play, events: list[Json]) -> str:
    """The chat that no call named: a sub-agent's."""
    return next(str(e["chat"]["id"]) for e in events if e["chat"]["id"] not in play.uuids.values())


@pytest.mark.parametrize("path", sorted(D0.glob("*.jsonl")), ids=lambda path: path.stem)
async def test_a_recording_played_against_the_simulator(path: Path, start: Start) -> None:
    speed = 3.0 if path.stem in IN_MID_STEP else 10.0
    client = await start(speed=speed, skew=NO_SKEW, poll_ms=3_600_000.0)
    lines = load(path)
    async with AsyncExitStack() as stack:
        play = Play(client, lines, stack, path.stem in TIES_IN_ANY_ORDER)
        for theirs, who in users_of_recordings().items():
            play.uuids[theirs] = str(client.simulator.users[who].id)
        for line in lines:
            if isinstance(line, Rest) and isinstance(line.request, dict) and line.request.get("model_config_id"):
                play.uuids[line.request["model_config_id"]] = str(client.simulator.model_configs[0].id)
        if path.stem in PRELUDE:
            await prelude(play, lines)
        await play.run()
        for name in play.connections:
            compare_stream(play, name)
        for name in play.watches:
            compare_watch(play, name)


async def prelude(play: Play, lines: list[Line]) -> None:
    """A chat that was there before the recording began, under the id by which its calls name it."""
    owner = play.client.owner()
    chat = await owner.create("[text n=3 ms=5] private")
    play.client.simulator.poll()
    await owner.wait_idle(chat)
    for line in lines:
        if isinstance(line, Rest):
            for named in re.findall(CHATS + r"/([0-9a-f-]{36})", line.path):
                play.uuids.setdefault(named, str(chat))


def test_no_recording_is_left_out() -> None:
    assert len(list(D0.glob("*.jsonl"))) == 25
