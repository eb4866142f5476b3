"""A recording served again: frames as they were, ends as they were, REST as it was at that moment."""

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from relay.simulator.replay import NotARecording, Recording, Replay, decoded, state_at
from relay.simulator.server import SimulatorConfig
from tests.simulator.listener import listen
from tests.simulator.recording import CHATS, D0

D0B = D0.parent / "d0b"
EVERY_RECORDING = [*sorted(D0.glob("*.jsonl")), *sorted(D0B.glob("*.jsonl"))]


def served(name: str, speed: float = 50.0) -> Replay:
    return Replay(Recording(D0 / f"{name}.jsonl"), SimulatorConfig(speed=speed))


def open_socket(replay: Replay, session: aiohttp.ClientSession, path: str) -> Any:
    return listen(session, replay.url + CHATS + path, replay.users["ann"].token)


@pytest.mark.parametrize("path", EVERY_RECORDING, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_fold_of_a_recording_ends_in_what_rest_said_last(path: Path) -> None:
    recording = Recording(path)
    last: dict[str, tuple[int, Any]] = {}
    for number, line in enumerate(recording.lines):
        rest = line.get("rest", "")
        if rest.startswith("GET") and "/messages?limit=200" in rest and line["status"] == 200:
            last[rest.split("/")[4]] = (number, decoded(line["body"]))
    for chat_id, (number, answer) in last.items():
        if not any(connection.opened_at < number for connection in recording.streams.get(chat_id, [])):
            continue  # nobody had listened
        state = state_at(recording, chat_id, number)
        messages = [state.messages[i] for i in sorted(state.messages, reverse=True)]
        assert (messages, state.queue) == (answer["messages"], answer["queued_messages"]), chat_id


async def test_frames_are_played_as_they_were() -> None:
    async with served("text_turn") as replay, aiohttp.ClientSession() as session:
        (chat_id, [connection]) = next(iter(replay.recording.streams.items()))
        recorded = [raw for _, _, raw in connection.frames]
        async with (
            open_socket(replay, session, "/watch") as watch,
            open_socket(replay, session, f"/{chat_id}/stream") as seen,
        ):
            await seen.until(lambda s: len(s.frames) == len(recorded))
            await watch.until(lambda s: len(s.frames) == 6)
            assert not seen.ended  # its client closed it: for the server it stays open
        assert seen.frames == recorded
        async with session.get(f"{replay.url}{CHATS}/{chat_id}/messages?limit=200") as response:
            truth = replay.recording.answers("GET", f"{CHATS}/{chat_id}/messages?limit=200")[-1]
            assert await response.text() == truth["body"]
        async with session.get(f"{replay.url}{CHATS}/{chat_id}/messages?limit=2") as response:
            page = await response.json()
            assert ([m["id"] for m in page["messages"]], page["has_more"]) == ([6, 5], True)


async def test_rest_follows_the_play() -> None:
    async with served("text_turn", speed=1.0) as replay, aiohttp.ClientSession() as session:
        chat_id = next(iter(replay.recording.streams))

        async def read(path: str) -> Any:
            async with session.get(f"{replay.url}{CHATS}{path}") as response:
                assert response.status == 200
                return await response.json()

        assert [(c["id"], c["status"]) for c in await read("")] == [(chat_id, "pending")]
        assert (await read(f"/{chat_id}/messages"))["messages"] == []
        async with open_socket(replay, session, f"/{chat_id}/stream") as seen:
            await seen.until(lambda s: "running" in s.story)
            assert (await read(f"/{chat_id}"))["status"] == "running"
            assert [m["id"] for m in (await read(f"/{chat_id}/messages"))["messages"]] == [3]


async def test_a_client_that_came_back_is_cut_and_the_next_connection_is_played() -> None:
    async with served("reconnect_mid_turn") as replay, aiohttp.ClientSession() as session:
        chat_id, connections = next(iter(replay.recording.streams.items()))
        for connection in connections:
            async with open_socket(replay, session, f"/{chat_id}/stream") as seen:
                recorded = [raw for _, _, raw in connection.frames]
                if connection is connections[-1]:
                    await seen.until(lambda s, recorded=recorded: len(s.frames) == len(recorded))
                else:
                    await seen.until_ended()
                    assert seen.code is None
            assert seen.frames == recorded
        async with open_socket(replay, session, f"/{chat_id}/stream?after_id=68") as late:
            await late.until(lambda s: s.frames)
        assert (late.story, late.message_ids) == (["waiting", "user", "assistant"], [69, 70])


async def test_a_recorded_close_is_a_close(tmp_path: Path) -> None:
    chat_id = "5f0c2f5e-8a1d-4c57-9e55-6b8d0f2a7c31"
    frame = json.dumps(
        {"type": "data", "data": [{"type": "status", "chat_id": chat_id, "status": {"status": "waiting"}}]}
    )
    lines = [
        {"t": 0.0, "conn": "s1", "kind": "open", "path": f"{CHATS}/{chat_id}/stream"},
        {"t": 0.1, "conn": "s1", "kind": "frame", "raw": frame + "\n"},
        {"t": 0.2, "conn": "s1", "kind": "closed", "code": 1000, "reason": "Connection closed"},
    ]
    path = tmp_path / "closed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    async with (
        Replay(Recording(path), SimulatorConfig(speed=10)) as replay,
        aiohttp.ClientSession() as session,
        open_socket(replay, session, f"/{chat_id}/stream") as seen,
    ):
        await seen.until_ended()
    assert (seen.story, seen.code, seen.reason) == (["waiting"], 1000, "Connection closed")


async def test_other_calls_are_answered_in_recorded_order_and_the_last_one_again() -> None:
    async with served("usage_limits") as replay, aiohttp.ClientSession() as session:
        limits = []
        for _ in range(3):
            async with session.get(f"{replay.url}{CHATS}/usage-limits/status") as response:
                limits.append((await response.json())["is_limited"])
        assert limits == [True, False, False]
        async with session.get(f"{replay.url}{CHATS}/nothing/here") as response:
            assert (response.status, await response.json()) == (404, {"message": "Route not found."})
        async with session.get(f"{replay.url}/api/v2/users/me") as response:
            assert (await response.json())["username"] == "ann"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("hello", "line 1: not JSON", id="no JSON"),
        pytest.param('{"t": 1}', "line 1: neither a call", id="other JSON"),
        pytest.param("", "holds neither calls nor streams", id="empty"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(NotARecording, match=error):
        Recording(path)
