"""Fidelity of the servers since 2.35: the calls of their recordings are played against the simulator, at the recorded
points of progress. What the streams tell has the same shape, order and part coordinates: ids, times, chunking aside."""

import asyncio
import json
import re
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from relay.simulator.stream import NO_SKEW
from tests.simulator.conftest import Start
from tests.simulator.listener import DEADLINE_SECONDS, Client, Listener, events_of
from tests.simulator.recording import CHATS, collapse, shape

Json = Any

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
# Recording folders and the dialect that stands for them. The second is of a server between two dialects: as the first
# in all that its streams tell, with a few answers of the third.
DIALECT_OF = {"d2": "d2", "d2b": "d2", "d3": "d3"}

# Recordings without a stream, or whose streams tell nothing that others do not.
OF_ANSWERS_ONLY = {
    "list_filters", "misc_endpoints", "not_owner", "part_relay", "rest_surface", "sharing", "usage_limits",
}  # fmt: skip
NOT_PLAYED = {
    "access": "most of it are refusals; its one turn is that of text_turn",
    "liveness_raw": "shows pings on the wire and takes 30 seconds; test_episodes.py has the closing frame",
}
# Deeds in the middle of a step: slow enough that they come in time on a busy machine.
IN_MID_STEP = {
    "control_states", "edit_while_running", "error_with_queue", "interrupt_mid_stream", "queue_and_promote",
    "reconnect_between_steps", "reconnect_mid_turn",
}  # fmt: skip
NOT_OF_THE_STREAM = ("created_at", "completed_at")

# Of the server between two dialects: it has what the dialect that stands for it has not.
NOT_OF_THE_DIALECT = {("d2b", "compaction")}

RECORDINGS = [
    path
    for folder in DIALECT_OF
    for path in sorted((CAPTURES / folder).glob("*.jsonl"))
    if path.stem not in OF_ANSWERS_ONLY | NOT_PLAYED.keys() and (folder, path.stem) not in NOT_OF_THE_DIALECT
]


@dataclass
class Connection:
    """One recorded connection and its counterpart here."""

    chat_id: str
    listener: Listener
    closer: AsyncExitStack
    theirs: list[Json] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)


class Play:
    """Plays one recording against a simulator."""

    def __init__(self, client: Client, path: Path, stack: AsyncExitStack) -> None:
        self.client = client
        self.stack = stack
        self.records = _causes_first([json.loads(line) for line in path.read_text().splitlines()])
        self.uuids: dict[str, str] = {}
        self.queue_ids: dict[str, str] = {}
        self.call_ids: dict[str, str] = {}
        self.connections: dict[str, Connection] = {}
        self.watches: dict[str, Connection] = {}
        self.theirs, self.ours = Ranks(), Ranks()

    async def run(self) -> None:
        for i, record in enumerate(self.records):
            match record:
                case {"rest": _}:
                    await self.progress()
                    await self.rest(record)
                case {"signal": signal}:
                    await self.progress()
                    await self.client.simulator.restart(polite=signal == "TERM")
                case {"kind": "open"}:
                    await self.progress()
                    await self.open(record, self.records[i + 1 :])
                case {"kind": "frame", "conn": name}:
                    connection = self.connections.get(name) or self.watches[name]
                    connection.frames.append(record["raw"])
                    connection.theirs += events_of(record["raw"])
                    self.theirs.learn(connection.theirs)
                case {"kind": "closed-by-us", "conn": name}:
                    await self.progress()
                    if name in self.watches:
                        await self.watched(self.watches[name])
                    await (self.connections.get(name) or self.watches[name]).closer.aclose()
                case {"child": chat_id}:
                    await self.progress()
                    children = [c for c in self.client.simulator.database.chats.values() if c.parent_id is not None]
                    self.uuids[chat_id] = str(children[-1].id)
                    await self.quiet(chat_id)
                case {"kind": "closed", "conn": "talker"}:
                    await self.talk(record)
                case {"kind": "closed", "conn": name}:
                    await self.closed(record, (self.connections.get(name) or self.watches[name]).listener)
        await self.progress()

    async def progress(self) -> None:
        """What was recorded so far must have happened here too, before the next deed."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            for connection in self.connections.values():
                listener = connection.listener
                while not listener.ended and _progress(listener.events) < _progress(connection.theirs):
                    listener.changed.clear()
                    await listener.changed.wait()

    async def watched(self, watch: Connection) -> None:
        """All that the watch socket told there must have come here too."""
        await watch.listener.until(lambda seen: len(_watched(seen.events)) >= len(_watched(watch.theirs)))

    async def open(self, record: Json, following: list[Json]) -> None:
        name: str = record["conn"]
        is_watch = name.startswith("watch:")
        who = name.removeprefix("watch:") if is_watch else "admin" if "admin" in name else "ann"
        chat_id = "" if is_watch else record["path"].split("/")[4]
        if chat_id:
            await self.like_then(chat_id, next(r for r in following if r.get("conn") == name and r["kind"] == "frame"))
        closer = AsyncExitStack()
        self.stack.push_async_callback(closer.aclose)
        path = self.translated(record["path"], chat_id).removeprefix(CHATS)
        listener = await closer.enter_async_context(self.client.socket(path, who=who))
        (self.watches if is_watch else self.connections)[name] = Connection(chat_id, listener, closer)

    async def like_then(self, chat_id: str, first: Json) -> None:
        """Wait until the chat is in the state that the first frame tells: this server may be slower than that one."""
        chat = self.client.simulator.database.chats[UUID(self.uuids[chat_id])]
        wanted = next(event["status"]["status"] for event in events_of(first["raw"]) if event["type"] == "status")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while chat.status != wanted:
                await asyncio.sleep(0.002)

    async def closed(self, record: Json, listener: Listener) -> None:
        await listener.until_ended()
        assert (listener.code, listener.reason) == (record.get("code"), record.get("reason") or "")

    async def talk(self, record: Json) -> None:
        """The one socket whose client says something."""
        async with self.client.speaker(next(reversed(self.client.simulator.database.chats))) as listener:
            await self.closed(record, listener)

    async def quiet(self, chat_id: str) -> None:
        """Wait for the end of the runs of a chat and its sub-agents."""
        database = self.client.simulator.database
        chat = database.chats[UUID(self.uuids[chat_id])]
        async with asyncio.timeout(DEADLINE_SECONDS):
            while any(one.status != "waiting" for one in [chat, *database.children(chat)]):
                await asyncio.sleep(0.002)

    async def rest(self, record: Json) -> None:
        method, path = record["rest"].split(" ")
        chat_id = path.split("/")[4].partition("?")[0] if path.count("/") > 3 else ""
        request = record.get("request")
        if method == "PATCH" and record["status"] == 204:
            await self.quiet(chat_id)  # as it was there, where nobody had the chat's stream open
        body = json.loads(self.translated(json.dumps(request), chat_id)) if request is not None else None
        path = self.translated(path, chat_id).removeprefix(CHATS)
        answer = await self.client.call(method, path, body, who=record.get("as_") or "ann")
        assert answer.status == record["status"], (record, answer)
        if not record.get("body"):
            assert answer.text == ""
            return
        theirs, ours = json.loads(record["body"]), answer.json
        if answer.status >= 400:
            expected = {key: self.translated(theirs[key], "") for key in ("message", "detail") if key in theirs}
            assert {key: ours[key] for key in ("message", "detail") if key in ours} == expected, record
        elif isinstance(theirs, dict):
            self.compare_answer(theirs, ours)

    def compare_answer(self, theirs: Json, ours: Json) -> None:
        self.theirs.learn_answer(theirs)
        self.ours.learn_answer(ours)
        for connection in self.connections.values():
            self.ours.learn(connection.listener.events)
        if "owner_id" in theirs:
            self.uuids[theirs["id"]] = ours["id"]
            if theirs["status"] != "running":  # a run may end here between two deeds
                assert ours["status"] == theirs["status"]
            assert ours.get("last_error") == theirs.get("last_error")
        if "queued_message" in theirs:
            self.queue_ids[str(theirs["queued_message"]["id"])] = str(ours["queued_message"]["id"])
        if "has_more" in theirs:
            assert [self.ours.message(m) for m in ours["messages"]] == [
                self.theirs.message(m) for m in theirs["messages"]
            ]
            assert shape(ours.get("queued_messages")) == shape(theirs.get("queued_messages"))

    # Names

    def translated(self, text: str, chat_id: str) -> str:
        """Recorded ids as those of this play; message ids by their rank in the chat."""
        text = re.sub(r"/queue/(\d+)", lambda m: f"/queue/{self.queue_ids.get(m[1], m[1])}", text)
        text = re.sub(
            r"(/messages/|after_id=|before_id=)(\d+)", lambda m: m[1] + str(self.message_id(chat_id, int(m[2]))), text
        )
        for connection in self.connections.values():
            for theirs, ours in zip(_call_ids(connection.theirs), _call_ids(connection.listener.events), strict=False):
                text = text.replace(theirs, ours)
        for theirs, ours in self.uuids.items():
            text = text.replace(theirs, ours)
        return text

    def message_id(self, chat_id: str, message_id: int) -> int:
        if message_id not in self.theirs.ids.get(chat_id, set()):
            return message_id
        chat = self.client.simulator.database.chats[UUID(self.uuids[chat_id])]
        return [message.id for message in chat.messages if message.visible][self.theirs.rank(chat_id, message_id)]


class Ranks:
    """Names messages by their rank among the ids of their chat."""

    def __init__(self) -> None:
        self.ids: dict[str, set[int]] = {}

    def learn(self, events: Iterable[Json]) -> None:
        for event in events:
            if event.get("type") == "message":
                self._learn(event["message"])

    def learn_answer(self, answer: Json) -> None:
        messages = answer.get("messages") or []
        if isinstance(answer.get("message"), dict):
            messages = [*messages, answer["message"]]
        for message in messages:
            self._learn(message)

    def _learn(self, message: Json) -> None:
        self.ids.setdefault(message["chat_id"], set()).add(message["id"])

    def rank(self, chat_id: str, message_id: int) -> int:
        return sorted(self.ids[chat_id]).index(message_id)

    def message(self, message: Json) -> Json:
        """Everything of a message but ids and times. An interrupted answer is as long as it came."""
        content = [plain_part(part) for part in message["content"]]
        if message["role"] == "assistant" and "usage" not in message:
            content = [*collapse([part | {"text": "as far as it came"} for part in content]), len(content) > 1]
        rank = self.rank(message["chat_id"], message["id"])
        return (rank, message["role"], list(message), content, message.get("usage"))


def plain_part(part: Json) -> Json:
    """A part without what differs from play to play."""
    plain = json.loads(re.sub(r"call_[0-9a-f]{12}|[0-9a-f]{8}-[0-9a-f-]{27}", "ID", json.dumps(part)))
    return {key: "T" if key in NOT_OF_THE_STREAM else value for key, value in plain.items()}


def durable(ranks: Ranks, events: list[Json]) -> list[Json]:
    """What the stream tells of the rows, in order, but for preview resets: how many changes one sync sees is chance."""
    told: list[Json] = []
    time = ""
    for event in events:
        match event["type"]:
            case "message":
                # Rows of one transaction have one time.
                told.append(("message", event["message"]["created_at"] == time, *ranks.message(event["message"])))
                time = event["message"]["created_at"]
            case "queue_update":
                queue = event.get("queued_messages", [])
                told.append(("queue", list(event), [[list(q), *map(plain_part, q["content"])] for q in queue]))
            case "retry":
                retry = {key: value for key, value in event["retry"].items() if key != "retrying_at"}
                told.append(("retry", list(event["retry"]), retry))
            case "action_required":
                calls = event["action_required"]["tool_calls"]
                told.append(("action", [call | {"tool_call_id": ""} for call in calls]))
            case "message_part" | "preview_reset":
                pass
            case kind:
                told.append((kind, {key: value for key, value in event.items() if key != "chat_id"}))
    return told


def preview(ranks: Ranks, events: list[Json]) -> list[Json]:
    """What the stream tells of the live text and what bounds it: messages, resets, runs of parts by coordinates."""
    told: list[Json] = []
    for event in events:
        match event["type"]:
            case "message":
                told.append(("message", ranks.rank(event["chat_id"], event["message"]["id"])))
            case "preview_reset" | "history_reset" as kind:
                told.append(kind)
            case "message_part":
                part = event["message_part"]
                kind = (part["part"]["type"], list(part["part"]), part["role"], list(part))
                told.append((*kind, part["history_version"], part["generation_attempt"]))
    return collapse(told)


def _progress(events: list[Json]) -> tuple[int, int]:
    """How far a stream has come: events of rows, and parts after the last of them."""
    rows = [i for i, event in enumerate(events) if event["type"] not in ("message_part", "preview_reset")]
    parts = sum(event["type"] == "message_part" for event in events[rows[-1] if rows else 0 :])
    return len(rows), parts


def _call_ids(events: list[Json]) -> list[str]:
    calls = [part for event in events if event["type"] == "message" for part in event["message"]["content"]]
    return list(dict.fromkeys(part["tool_call_id"] for part in calls if part["type"] == "tool-call"))


def _causes_first(records: list[Json]) -> list[Json]:
    """Answers stand where they were read, at times after the frames of their call: move those calls up."""
    ordered: list[Json] = []
    for record in records:
        place = len(ordered)
        if "rest" in record and not record["rest"].startswith("GET") and record["status"] < 300:
            made = _made(record)
            place = next((i for i, frame in enumerate(ordered) if made & _named(frame)), place)
        ordered.insert(place, record)
    return ordered


def _made(record: Json) -> set[Json]:
    """Ids of what the call made."""
    answer = json.loads(record["body"]) if record.get("body") else {}
    things = [answer.get("message"), answer.get("queued_message"), *(answer.get("messages") or [])]
    ids = {("queued" if thing is things[1] else "message", thing["id"]) for thing in things if isinstance(thing, dict)}
    return ids | ({("chat", answer["id"])} if record["status"] == 201 and "owner_id" in answer else set())


def _named(record: Json) -> set[Json]:
    """Ids of what a frame shows."""
    ids: set[Json] = set()
    for event in events_of(record["raw"]) if record.get("kind") == "frame" else []:
        ids |= {("chat", event["chat"]["id"])} if "kind" in event else set()
        ids |= {("message", event["message"]["id"])} if event.get("type") == "message" else set()
        ids |= {("queued", queued["id"]) for queued in event.get("queued_messages", [])}
    return ids


def compare_stream(play: Play, name: str) -> None:
    connection = play.connections[name]
    theirs, ours = connection.theirs, connection.listener.events
    play.ours.learn(ours)
    statuses = [event["status"]["status"] for event in theirs if event["type"] == "status"]
    # Closed in the middle of a turn: a little more may have come here.
    in_mid_turn = statuses[-1] == "running"
    for told in (durable, preview):
        expected, got = told(play.theirs, theirs), told(play.ours, ours)
        assert got[: len(expected)] == expected, (name, told.__name__)
        assert in_mid_turn or len(got) == len(expected), (name, told.__name__)
    assert opening(connection.listener.frames) == opening(connection.frames), name
    seqs: dict[tuple[int, int], int] = {}
    for part in connection.listener.parts:
        key = (part["history_version"], part["generation_attempt"])
        assert part["seq"] == seqs.get(key, 0) + 1, name
        seqs[key] = part["seq"]


def opening(frames: list[str]) -> list[str]:
    """Kinds of the events of the first sync, which a preview reset ends."""
    kinds = [event["type"] for frame in frames for event in events_of(frame)]
    return collapse(kinds[: kinds.index("preview_reset")])


def compare_watch(play: Play, name: str) -> None:
    theirs, ours = play.watches[name].theirs, play.watches[name].listener.events
    for chat_id in dict.fromkeys(event["chat"]["id"] for event in theirs):
        here = play.uuids.get(chat_id) or play.uuids.setdefault(chat_id, _unnamed(play, ours))
        assert told_of(here, ours) == told_of(chat_id, theirs), (name, chat_id)


def told_of(chat_id: str, events: list[Json]) -> list[Json]:
    return [
        (event["kind"], event["chat"]["status"], event["chat"]["archived"], event["chat"]["last_turn_summary"])
        for event in _watched(events)
        if event["chat"]["id"] == chat_id
    ]


def _watched(events: list[Json]) -> list[Json]:
    """A summary of the whole chat came between the two ages that one dialect stands for."""
    return [event for event in events if event["kind"] != "chat_summary_change"]


def _unnamed(play: Play, events: list[Json]) -> str:
    """The chat that no call named: a sub-agent's."""
    return next(str(e["chat"]["id"]) for e in events if e["chat"]["id"] not in play.uuids.values())


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
async def test_a_recording_played_against_the_simulator(path: Path, start: Start) -> None:
    speed = 3.0 if path.stem in IN_MID_STEP else 10.0
    client = await start(dialect=DIALECT_OF[path.parent.name], speed=speed, skew=NO_SKEW, poll_ms=1000.0, titles=False)
    async with AsyncExitStack() as stack:
        play = Play(client, path, stack)
        _name_what_was_there(play)
        await play.run()
        for name in play.connections:
            compare_stream(play, name)
        for name in play.watches:
            compare_watch(play, name)


def _name_what_was_there(play: Play) -> None:
    """The organization and the model config of the recording are those of the simulator."""
    for record in play.records:
        request = record.get("request")
        if isinstance(request, dict) and "organization_id" in request:
            play.uuids[request["organization_id"]] = str(play.client.simulator.organization_id)
            play.uuids[request["model_config_id"]] = str(play.client.simulator.model_configs[0].id)


def test_no_recording_is_left_out() -> None:
    there = {path.stem for folder in DIALECT_OF for path in (CAPTURES / folder).glob("*.jsonl")}
    assert there == {path.stem for path in RECORDINGS} | OF_ANSWERS_ONLY | NOT_PLAYED.keys()
