"""Faults on demand: each does what it says, and says how often it did."""

import asyncio
import time
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from relay.simulator.faults import BadFault
from relay.simulator.outlet import Patience
from tests.simulator.conftest import Start
from tests.simulator.listener import Answer, Client, Listener


def idle(seen: Listener) -> bool:
    return seen.last in ("waiting", "error") and len(seen.frames) > 1


async def control(client: Client, method: str, path: str, body: Any = None) -> Answer:
    return await client.call(method, path, body, who="", base="/_simulator")


async def fired(client: Client, name: str) -> int:
    counters: dict[str, int] = (await control(client, "GET", "/faults")).json["fired"]
    return counters.get(name, 0)


async def test_cut_every_n_frames_without_a_close_frame(client: Client) -> None:
    client.simulator.faults.add("cut_every", frames=3)
    chat = await client.owner().create("[text n=50 ms=20] long")
    async with client.stream(chat) as seen:
        await seen.until_ended()
    assert (len(seen.frames), seen.code) == (3, None)
    assert await fired(client, "cut_every") == 1


async def test_cut_inside_a_frame(client: Client) -> None:
    await control(client, "POST", "/faults", {"kind": "cut_every", "frames": 2, "inside": True, "times": 1})
    chat = await client.owner().create("[text n=50 ms=20] long")
    async with client.stream(chat) as seen:
        await seen.until_ended()
    assert (len(seen.frames), seen.code) == (1, None)
    async with client.stream(chat) as again:  # used up
        await again.until(idle)
    assert await fired(client, "cut_every") == 1


async def test_half_a_frame_is_on_the_wire(client: Client) -> None:
    client.simulator.faults.add("cut_every", frames=1, inside=True)
    chat = await client.owner().create("[text n=1] hello")
    simulator = client.simulator
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    writer.write(
        f"GET /api/experimental/chats/{chat}/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Coder-Session-Token: {simulator.users['ann'].token}\r\n\r\n".encode()
    )
    raw = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    frame = raw.partition(b"\r\n\r\n")[2]
    assert frame[:2] == b"\x81\x7e"  # a text frame with a length of two bytes
    assert 0 < len(frame) - 4 < int.from_bytes(frame[2:4])
    assert frame[4:].startswith(b'{"type":"data","data":[{"type":"status"')


async def test_a_cut_strikes_what_is_open_now(client: Client) -> None:
    owner = client.owner()
    one, two = await owner.create("[text n=5000 ms=40] one"), await owner.create("[text n=5000 ms=40] two")
    async with client.stream(one) as first, client.stream(two) as second:
        await first.until(lambda s: s.frames)
        await second.until(lambda s: s.frames)
        assert (await control(client, "POST", "/cut", {"chat": str(one)})).json == {"struck": 1}
        await first.until_ended()
        assert not second.ended
    assert await fired(client, "cut") == 1


async def test_a_zombie_says_dropped_messages_and_then_nothing(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=50 ms=500] long")
    async with client.stream(chat) as seen, client.stream(chat) as healthy:
        await seen.until(lambda s: s.text)
        assert client.simulator.zombie(chat) == 2
        await seen.until(lambda s: s.last == "error: dropped messages")
        heard = len(seen.frames)
        async with client.stream(chat) as other:
            await other.until(idle)
        assert len(seen.frames) == heard
        assert not seen.ended
        assert healthy.last == "error: dropped messages"


async def test_silence_keeps_the_socket_open(start: Start) -> None:
    client = await start(patience=Patience(ping_seconds=0.05))
    owner = client.owner()
    chat = await owner.create("[text n=50 ms=500] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.text)
        assert (await control(client, "POST", "/silence", {"chat": str(chat)})).json == {"struck": 1}
        heard = len(seen.frames)
        await owner.wait_idle(chat)
        assert len(seen.frames) == heard
        assert not seen.ended
    assert await fired(client, "silence") > 0


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
async def test_answers_of_a_path_for_some_times(client: Client, status: int) -> None:
    made = await control(
        client, "POST", "/faults",
        {"kind": "answer", "status": status, "path": "*/models", "times": 2, "retry_after": 7},
    )  # fmt: skip
    assert made.status == 201
    answers = [await client.call("GET", "/models") for _ in range(3)]
    assert [answer.status for answer in answers] == [status, status, 200]
    assert answers[0].headers["Retry-After"] == "7"
    assert answers[0].json["message"]
    assert await fired(client, "answer") == 2


async def test_an_answer_refuses_the_handshake_too(client: Client) -> None:
    chat = await client.owner().create("[text n=1] hello")
    client.simulator.faults.add("answer", status=429, path="*/stream", method="GET")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        async with client.stream(chat):
            pass
    assert refused.value.status == 429


async def test_a_page_instead_of_json(client: Client) -> None:
    client.simulator.faults.add("answer", html=True)
    answer = await client.call("GET", "")
    assert (answer.status, answer.headers["Content-Type"].split(";")[0]) == (200, "text/html")


async def test_a_fault_for_a_while(client: Client) -> None:
    fault = client.simulator.faults.add("answer", seconds=0.05)
    assert (await client.call("GET", "")).status == 503
    async with asyncio.timeout(5):
        while (await client.call("GET", "")).status == 503:
            await asyncio.sleep(0.01)
    assert fault.fired >= 1


async def test_slow_answers(client: Client) -> None:
    client.simulator.faults.add("slow", delay=0.1, path="*/models")
    began = time.monotonic()
    assert (await client.call("GET", "/models")).status == 200
    assert time.monotonic() - began >= 0.1


async def test_lost_parts_at_a_rate(client: Client) -> None:
    client.simulator.faults.add("lose_parts", rate=0.3)
    chat = await client.owner().create("[text n=400 ms=5] much")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    words = len(seen.text.split())
    assert 150 < words < 390
    assert await fired(client, "lost_parts") == 400 - words


async def test_duplicate_frames(client: Client) -> None:
    client.simulator.faults.add("duplicate_frames", rate=1.0)
    chat = await client.owner().create("[text n=1] hello")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert seen.frames[::2] == seen.frames[1::2]


async def test_lost_watch_events(client: Client) -> None:
    client.simulator.faults.add("lose_watch", rate=1.0, times=1)
    async with client.watch() as seen:
        await client.owner().create("[text n=1] hello")
        await seen.until(lambda s: s.events)
    assert seen.events[0]["kind"] != "created"
    assert await fired(client, "lose_watch") == 1


@pytest.mark.parametrize(("code", "reason"), [(1000, "Connection closed"), (1001, "Ping failed"), (1011, "oh no")])
async def test_all_sockets_closed_with_a_code(client: Client, code: int, reason: str) -> None:
    chat = await client.owner().create("[text n=5000 ms=40] long")
    async with client.stream(chat) as seen, client.watch() as watch:
        await seen.until(lambda s: s.frames)
        answer = await control(client, "POST", "/close", {"code": code, "reason": reason})
        await seen.until_ended()
        await watch.until_ended()
    assert answer.json == {"struck": 2}
    assert [(s.code, s.reason) for s in (seen, watch)] == [(code, reason)] * 2


async def test_a_raw_frame(client: Client) -> None:
    chat = await client.owner().create("[text n=5000 ms=40] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
        assert (await control(client, "POST", "/inject", {"raw": "{ not json", "chat": str(chat)})).json == {
            "struck": 1
        }
        await seen.until(lambda s: "{ not json" in s.frames)
        await seen.until(lambda s: s.frames[-1] != "{ not json")  # the stream goes on
    assert await fired(client, "inject") == 1


async def test_parts_again_as_a_relay_sends_them(client: Client) -> None:
    chat = await client.owner().create("[text n=100 ms=300] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.parts) >= 3)
        assert client.simulator.replay_parts(chat) == 1
        await seen.until(idle)
    assert seen.text.count("the relay follows ") > 100 // 27 + 1


async def test_a_prompt_left_unanswered(client: Client) -> None:
    await control(client, "POST", "/unanswered", {})
    chat = await client.owner().create("[text n=5] hello")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert seen.story == ["pending", "user", "running", "waiting"]
    assert await fired(client, "unanswered") == 1


async def test_a_polite_restart_closes_with_1000_and_runs_the_step_again(client: Client) -> None:
    simulator, port = client.simulator, client.simulator.port
    chat = await client.owner().create("[text n=50 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.text)
        await simulator.restart(polite=True)
        await seen.until_ended()
    assert (seen.code, seen.reason, simulator.port) == (1000, "Connection closed", port)
    assert seen.last == "running"  # no event announced it
    async with client.stream(chat) as again:
        await again.until(idle)
    assert again.story == ["pending", "user", "running", "assistant", "waiting"]


@pytest.mark.parametrize(
    ("dialect", "stream", "watch"),
    [
        pytest.param("d0", (1000, "Connection closed"), (1000, "Connection closed"), id="the seed"),
        pytest.param("d0b", (1000, "Connection closed"), (None, ""), id="2.32 drops the watch socket"),
        pytest.param("d1", (1000, ""), (1000, ""), id="2.33"),
        pytest.param("d1e", (1000, ""), (1000, ""), id="2.34"),
        pytest.param("d2", (1000, ""), (1000, ""), id="2.35"),
    ],
)
async def test_how_a_server_that_stops_closes_sockets(
    start: Start, dialect: str, stream: tuple[int, str], watch: tuple[int | None, str]
) -> None:
    client = await start(dialect=dialect)
    chat = await client.owner().create("[text n=1] hello")
    await client.owner().wait_idle(chat)
    async with client.stream(chat) as seen, client.watch() as watched:
        await seen.until(lambda s: s.frames)
        await client.simulator.restart(polite=True)
        await seen.until_ended()
        await watched.until_ended()
    assert (seen.code, seen.reason) == stream
    assert (watched.code, watched.reason) == watch


async def test_a_killed_server_leaves_chats_running_until_they_are_recovered(client: Client) -> None:
    chat = await client.owner().create("[text n=20 ms=1000] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.text)
        await client.simulator.restart(recovery_ms=20_000)
        await seen.until_ended()
    assert seen.code is None
    async with client.stream(chat) as again:
        await again.until(lambda s: s.frames)
        assert (await client.call("GET", f"/{chat}")).json["status"] == "running"
        await again.until(idle)
    # Recovery itself is silent: the next thing is the second start.
    assert again.story == ["running", "user", "running", "assistant", "waiting"]
    assert client.simulator.fired("restart") == 1


async def test_steps_stored_before_a_crash_are_kept(client: Client) -> None:
    chat = await client.owner().create("[tool n=40 ms=500] work")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: "tool" in s.story and s.parts[-1]["part"]["text"] == "follows ")
        await client.simulator.restart(recovery_ms=20_000)
    async with client.stream(chat) as again:
        await again.until(idle)
    assert again.story == ["running", "user", "assistant", "tool", "running", "assistant", "waiting"]


async def test_a_restart_without_data(client: Client) -> None:
    chat = await client.owner().create("[text n=1] hello")
    await client.owner().wait_idle(chat)
    await client.simulator.restart(keep_data=False)
    assert (await client.call("GET", f"/{chat}")).status == 404
    new = await client.owner().create("[text n=1] hello")
    await client.owner().wait_idle(new)
    assert new != chat
    assert [message["id"] for message in await client.owner().messages(new)] == [3, 4]


@pytest.mark.parametrize("polite", [True, False])
async def test_a_server_that_is_down_answers_nothing_and_comes_back(client: Client, polite: bool) -> None:
    await client.call("GET", "")  # leaves a connection open
    answer = await control(client, "POST", "/restart", {"down_seconds": 0.3, "polite": polite})
    assert answer.status == 200
    statuses: list[int] = []
    async with asyncio.timeout(10):
        while 0 not in statuses or statuses[-1] != 200:
            try:
                statuses.append((await client.call("GET", "")).status)
            except aiohttp.ClientError:
                statuses.append(0)
            await asyncio.sleep(0.01)
    first = statuses.index(0)
    back = statuses.index(200, first)
    assert back - first >= 5  # down for a while, without an answer in between


async def test_rules_are_listed_and_taken_away(client: Client) -> None:
    made = (await control(client, "POST", "/faults", {"kind": "slow", "delay": 0, "chat": str(UUID(int=5))})).json
    listed = (await control(client, "GET", "/faults")).json["rules"]
    assert listed == [made]
    assert made["chat"] == str(UUID(int=5))
    assert (await control(client, "DELETE", f"/faults/{made['id']}")).json == {"removed": True}
    assert (await control(client, "DELETE", f"/faults/{made['id']}")).status == 404
    client.simulator.faults.add("answer")
    assert (await control(client, "DELETE", "/faults")).json["rules"] == []


async def test_the_state_names_users_chats_and_sockets(client: Client) -> None:
    chat = await client.owner().create("[text n=1] hello")
    async with client.watch():
        state = (await control(client, "GET", "/state")).json
    assert state["users"]["ann"]["token"] == client.simulator.users["ann"].token
    assert [row["id"] for row in state["chats"]] == [str(chat)]
    assert (state["open_watches"], state["open_streams"]) == (1, 0)


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        pytest.param("/faults", {}, "a fault needs 'kind'", id="no kind"),
        pytest.param("/faults", {"kind": "fire"}, "unknown fault 'fire'; there are: answer, slow", id="unknown"),
        pytest.param("/faults", {"kind": "slow"}, "fault 'slow' needs 'delay'", id="parameter missing"),
        pytest.param("/faults", {"kind": "slow", "delay": 1, "x": 1}, "unknown parameter 'x'", id="parameter unknown"),
        pytest.param("/faults", {"kind": "answer", "status": 9}, "status must be from 100 to 599", id="status"),
        pytest.param("/faults", {"kind": "lose_parts", "rate": 2}, "rate must be from 0 to 1", id="rate"),
        pytest.param("/faults", {"kind": "lose_parts", "rate": "x"}, "rate must be a number", id="no number"),
        pytest.param("/close", {"code": 5}, "close needs 'code'", id="code"),
        pytest.param("/cut", {"chat": "x"}, "chat: invalid UUID length: 1", id="chat"),
        pytest.param("/settings", {}, "no such control call", id="method"),
    ],
)
async def test_bad_control_calls_say_why(client: Client, path: str, body: Any, error: str) -> None:
    answer = await control(client, "POST", path, body)
    assert answer.status in (400, 404)
    assert error in answer.json["error"]


async def test_the_same_in_python(client: Client) -> None:
    with pytest.raises(BadFault, match="unknown fault"):
        client.simulator.faults.add("fire")


async def test_rows_turned_round_by_a_setting(client: Client) -> None:
    settings = await control(client, "PATCH", "/settings", {"tied_rows": "turned", "overtake": 0.5})
    assert (settings.json["tied_rows"], settings.json["overtake"], client.simulator.skew.overtake) == (
        "turned",
        0.5,
        0.5,
    )
    assert "there are tied_rows" in (await control(client, "PATCH", "/settings", {"speed": 1})).json["error"]
    chat = await client.owner().create("[tool n=1] work")
    await client.owner().wait_idle(chat)
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
    assert seen.message_ids == [3, 5, 4, 6]


async def test_a_stopping_server_answers_nothing_more(client: Client) -> None:
    chat = await client.owner().create("[text n=5000 ms=40] long")
    url = f"{client.simulator.url}/api/experimental/chats/{chat}/stream"
    headers = {"Coder-Session-Token": client.simulator.users["ann"].token}
    # A client that never answers the close handshake keeps the server stopping for a second.
    async with client.session.ws_connect(url, headers=headers):
        await client.call("GET", "")  # leaves a connection open
        restart = asyncio.create_task(client.simulator.restart(polite=True))
        await asyncio.sleep(0)
        with pytest.raises(aiohttp.ClientError):
            await client.call("GET", "/model-configs")
        assert not restart.done()
        await restart
    assert (await client.call("GET", "")).status == 200
