"""Fidelity: the calls of every recording of a real server are played against the simulator, at the recorded points of
progress, and what comes out has the same shape and order: ids, times, titles and chunking aside. Of the servers since
2.35 only the answers are compared here; what their streams tell is compared in test_fidelity_episodes.py."""

import asyncio
import re
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relay.simulator.stream import NO_SKEW
from tests.simulator.conftest import Start
from tests.simulator.listener import DEADLINE_SECONDS, Client
from tests.simulator.play import Play, at_rest, users_of_recordings
from tests.simulator.recording import (
    CAPTURES,
    CHATS,
    Line,
    Names,
    Rest,
    collapse,
    events_of,
    load,
    part_kind,
    settled,
    shape,
)  # fmt: skip

Json = Any

# Recordings of which something cannot be demanded, and why.
TIES_IN_ANY_ORDER = {
    "edit_tools_grown": "rows of one step come in an order that differs from query to query, refreshes skip some",
}
# Recordings with deeds in the middle of a step: slow enough that they come in time on a busy machine.
IN_MID_STEP = {
    "interrupt_mid_stream", "edit_while_running", "queue_and_promote", "reconnect_mid_turn", "reconnect_between_steps",
    "control_states", "error_with_queue", "server_kill", "server_restart",
}  # fmt: skip
PRELUDE = {
    "archive_and_watch": "lists chats of other recordings too",
    "list_filters": "the same",
    "usage_limits": "goes on with a chat of another recording",
    "rest_surface": "sums up what was spent before it",
}


# Runs that began before the one they replace had ended, and were struck by its end: without an answer.
RUNS_IN_VAIN = {("d0b", "edit_while_running"), ("d0b", "queue_and_promote"), ("d1", "queue_and_promote")}
# The model of the later recordings could not give titles: what asks it for one was refused.
NO_STRUCTURED_OUTPUT = ("/title/regenerate", "/title/propose")
LEFT_OUT = {
    ("d0b", "error_with_queue"): "a socket joined between a failed row and its announcement",
    ("d1", "long_history"): "one of its turns is cut off by a late notification of its own prompt",
    ("*", "compaction"): "servers of that age compact by themselves, which the simulator does not",
    ("*", "liveness_raw"): "pings on the wire for half a minute; test_stream.py has the closing frame",
}
# Recordings that show the REST side.
ANSWERS = (
    "access", "child_verbs", "edit_full_refresh", "list_filters", "misc_endpoints", "not_owner", "part_relay",
    "rest_surface", "sharing", "unread2", "usage_limits", "watch_title",
)  # fmt: skip


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


def durable(names: Names, events: list[Json], play: Play) -> list[Json]:
    path_a = [event for event in events if event["type"] != "message_part"]
    told = [names.durable(event) for event in (with_ties_sorted(path_a) if play.ties_sorted else path_a)]
    return settled(told) if play.client.features.double_statuses else told


def compare_stream(play: Play, name: str) -> None:
    connection = play.connections[name]
    theirs = [event for frame in connection.frames for event in frame]
    ours = connection.listener.events
    for event in ours:
        if event["type"] == "message":
            play.played.learn(event["message"])
    expected = durable(play.recorded, theirs, play)
    got = durable(play.played, ours, play)
    statuses = [event["status"]["status"] for event in theirs if event["type"] == "status"]
    # Closed in the middle of a turn: a little more may have come here.
    in_mid_turn = statuses[-1] in ("running", "pending")
    assert got[: len(expected)] == expected, name
    assert in_mid_turn or len(got) == len(expected), name
    # The snapshot, parts in their place: status, parts, messages, queue.
    first = events_of(connection.listener.frames[0])
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

    def told(events: list[Json], chat_id: str, at_any_time: bool) -> list[Json]:
        return [
            (event["kind"], status(event, at_any_time), event["chat"]["archived"], shape(event["chat"]), list(event))
            for event in events
            if event["chat"]["id"] == chat_id and (event["kind"] in ("title_change", "summary_change")) == at_any_time
        ]

    def status(event: Json, at_any_time: bool) -> Json:
        return at_rest(event["chat"]["status"]) if at_any_time else event["chat"]["status"]

    for chat_id in {event["chat"]["id"] for event in theirs}:
        here = play.uuids.get(chat_id) or play.uuids.setdefault(chat_id, _unnamed(play, ours))
        for at_any_time in (False, True):
            assert told(ours, here, at_any_time) == told(theirs, chat_id, at_any_time), (name, chat_id)


def _unnamed(play: Play, events: list[Json]) -> str:
    """The chat that no call named: a sub-agent's."""
    return next(str(e["chat"]["id"]) for e in events if e["chat"]["id"] not in play.uuids.values())


def recordings(*folders: str) -> list[Any]:
    """All recordings of these folders that are played, as test parameters."""
    return [
        pytest.param(path, id=f"{folder}/{path.stem}")
        for folder in folders
        for path in sorted((CAPTURES / folder).glob("*.jsonl"))
        if (folder, path.stem) not in LEFT_OUT and ("*", path.stem) not in LEFT_OUT
    ]


async def begin(client: Client, path: Path, stack: AsyncExitStack, **how: Any) -> Play:
    """A play with the names that the recording takes for known."""
    lines = load(path)
    play = Play(client, lines, stack, **how)
    for theirs, who in users_of_recordings(path.parent).items():
        play.uuids[theirs] = str(client.simulator.users[who].id)
    for line in lines:
        if isinstance(line, Rest) and isinstance(line.request, dict):
            if line.request.get("model_config_id"):
                play.uuids[line.request["model_config_id"]] = str(client.simulator.model_configs[0].id)
            if line.request.get("organization_id"):
                play.uuids[line.request["organization_id"]] = str(client.simulator.organization_id)
            for reader in line.request.get("user_roles", {}):
                play.uuids[reader] = str(client.simulator.users["bob"].id)
    if path.stem in PRELUDE:
        await prelude(play, lines)
    return play


@pytest.mark.parametrize("path", recordings("d0", "d0b", "d1", "d1e"))
async def test_a_recording_played_against_the_simulator(path: Path, start: Start) -> None:
    folder = path.parent.name
    speed = 3.0 if path.stem in IN_MID_STEP else 10.0
    skew = replace(NO_SKEW, vain=1.0) if (folder, path.stem) in RUNS_IN_VAIN else NO_SKEW
    # Only the seed's driver had a model that gave titles.
    client = await start(dialect=folder, speed=speed, skew=skew, poll_ms=3_600_000.0, titles=folder == "d0")
    async with AsyncExitStack() as stack:
        ties_sorted = path.stem in TIES_IN_ANY_ORDER
        play = await begin(client, path, stack, ties_sorted=ties_sorted, left_out=NO_STRUCTURED_OUTPUT)
        await play.run()
        for name in play.connections:
            compare_stream(play, name)
        for name in play.watches:
            compare_watch(play, name)


@pytest.mark.parametrize("stem", ANSWERS)
@pytest.mark.parametrize("folder", ["d2", "d3"])
async def test_the_answers_of_a_recording(folder: str, stem: str, start: Start) -> None:
    client = await start(dialect=folder, speed=10.0, skew=NO_SKEW, poll_ms=3_600_000.0, titles=False)
    async with AsyncExitStack() as stack:
        play = await begin(
            client, CAPTURES / folder / f"{stem}.jsonl", stack, answers_only=True, left_out=NO_STRUCTURED_OUTPUT
        )
        await play.run()


async def prelude(play: Play, lines: list[Line]) -> None:
    """Chats that were there before the recording began, one under the id by which its calls name it."""
    owner = play.client.owner()
    texts = ("[text n=3 ms=5] private", "[fail] failed", "[agent n=3 ms=5] delegate", *["[text n=3 ms=5] more"] * 4)
    only_one = not any(isinstance(line, Rest) and "source:" in line.path for line in lines)
    for text in texts[:1] if only_one else texts:
        chat = await owner.create(text)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not play.client.simulator.is_idle():
                play.client.simulator.poll()
                await asyncio.sleep(0.005)
    if not only_one:
        if any(isinstance(line, Rest) and line.path.endswith("label=a:b") and line.answer for line in lines):
            failed = next(c for c in play.client.simulator.database.chats.values() if c.status == "error")
            await play.client.call("PATCH", f"/{failed.id}", {"labels": {"a": "b"}})
        delegating = next(chat for chat in play.client.simulator.database.chats.values() if chat.parent_id is not None)
        await play.client.call("PATCH", f"/{delegating.parent_id}", {"archived": True})
        await play.client.call("PATCH", f"/{chat}", {"archived": True})
    for line in lines:
        if isinstance(line, Rest):
            for named in re.findall(CHATS + r"(?:/|\?after_id=)((?!0000)[0-9a-f-]{36})", line.path):
                play.uuids.setdefault(named, str(chat))


def test_no_recording_is_left_out() -> None:
    """But for those that are named, with the reason."""
    there = {(path.parent.name, path.stem) for path in CAPTURES.glob("*/*.jsonl")}
    assert sum(folder == "d0" for folder, _ in there) == 25
    assert all(name in {stem for _, stem in there} for _, name in LEFT_OUT)
