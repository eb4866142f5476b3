"""The stream's rules, each as a client sees it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from relay.simulator.outlet import Patience
from relay.simulator.stream import Skew
from tests.simulator.conftest import Start
from tests.simulator.listener import Client, Json, Listener


def idle(seen: Listener) -> bool:
    return seen.last in ("waiting", "error") and len(seen.frames) > 1


async def finished_chat(client: Client, *texts: str) -> UUID:
    owner = client.owner()
    chat = await owner.create(texts[0])
    client.simulator.poll(chat)
    await owner.wait_idle(chat)
    for text in texts[1:]:
        await owner.send(chat, text)
        client.simulator.poll(chat)
        await owner.wait_idle(chat)
    return chat


def kinds(frame: str) -> list[str]:
    return [event["type"] for event in json.loads(frame)["data"]]


async def test_a_text_turn(client: Client) -> None:
    chat = await client.owner().create("[text n=5 ms=2] hello")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert seen.story == ["pending", "user", "running", "assistant", "waiting"]
    assert seen.text == "the relay follows every chat "
    assert seen.message_ids == [3, 4]  # two hidden rows came before


async def test_frames_end_in_a_newline_and_parts_have_every_key(client: Client) -> None:
    chat = await client.owner().create("[text n=1] <hello> & \u2028")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert all(frame.endswith("}\n") for frame in seen.frames)
    assert '"text":"[text n=1] \\u003chello\\u003e \\u0026"' in seen.frames[0]
    part = seen.parts[0]["part"]
    assert list(part) == [
        "type", "text", "url", "media_type", "file_id", "file_name", "start_line", "end_line", "content",
    ]  # fmt: skip
    assert part["file_id"] is None


async def test_a_tool_turn_stores_a_message_per_call_in_call_order(client: Client) -> None:
    chat = await client.owner().create("[tools2 n=3 ms=2] two")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert seen.story == ["pending", "user", "running", "assistant", "tool", "tool", "assistant", "waiting"]
    results = [part["part"] for part in seen.parts if part["role"] == "tool"]
    assert [p["tool_name"] for p in results] == ["list_templates", "read_template"]
    assert list(results[0]["result"]) == ["count", "page", "templates", "total_count", "total_pages"]
    stored = [message for message in seen.messages if message["role"] == "tool"]
    assert list(stored[0]["content"][0]["result"]) == ["page", "count", "templates", "total_count", "total_pages"]
    assert stored[0]["created_at"] == stored[1]["created_at"]


async def test_the_snapshot_is_status_parts_messages_queue(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=5000 ms=20] busy")
    await owner.wait_parts(chat, 5)
    await owner.send(chat, "later")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
    order = [kind for i, kind in enumerate(kinds(seen.frames[0])) if i == 0 or kinds(seen.frames[0])[i - 1] != kind]
    assert order == ["status", "message_part", "message", "queue_update"]


async def test_a_reconnect_in_mid_step_replays_the_step_from_its_start(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=100 ms=200] long")
    await owner.wait_parts(chat, 10)
    async with client.stream(chat, after_id=3) as seen:
        await seen.until(idle)
    assert seen.text.startswith("the relay follows every chat and writes ")
    assert len(seen.text.split()) == 100
    assert seen.story == ["running", "assistant", "waiting"]


async def test_a_snapshot_of_a_long_history_comes_in_frames_of_256(client: Client) -> None:
    chat = await finished_chat(client, "[text n=1] first")
    row = client.simulator.database.chats[chat]
    for _ in range(300):
        client.simulator.database.insert(row, "user", row.messages[-1].content, row.created_at)
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.message_ids) == 302)
    assert [len(kinds(frame)) for frame in seen.frames] == [256, 47]
    assert kinds(seen.frames[1]) == ["message"] * 47  # no live event in a snapshot frame


@pytest.mark.parametrize(
    ("after_id", "ids"),
    [
        pytest.param(None, [3, 4], id="absent: everything"),
        pytest.param(0, [3, 4], id="zero: everything"),
        pytest.param(-5, [3, 4], id="negative: everything"),
        pytest.param(3, [4], id="in the middle"),
        pytest.param(4, [], id="the last"),
        pytest.param(9_223_372_036_854_775_807, [], id="above any"),
    ],
)
async def test_after_id_filters_the_snapshot(client: Client, after_id: int | None, ids: list[int]) -> None:
    chat = await finished_chat(client, "[text n=1] hello")
    async with client.stream(chat, after_id) as seen:
        await seen.until(lambda s: s.frames)
    assert seen.message_ids == ids


async def test_after_id_above_any_id_silences_messages_until_an_edit(client: Client) -> None:
    owner = client.owner()
    chat = await finished_chat(client, "[text n=1] hello")
    async with client.stream(chat, after_id=1000) as seen:
        await owner.send(chat, "[text n=1] again")
        await seen.until(idle)
        assert seen.story == ["waiting", "pending", "running", "waiting"]
        await owner.edit(chat, 5, "[text n=1] better")
        await seen.until(lambda s: s.message_ids[-1:] == [8])
    assert seen.message_ids == [3, 4, 7, 8]


async def test_an_edit_sends_the_history_again_then_an_empty_queue(client: Client) -> None:
    owner = client.owner()
    chat = await finished_chat(client, "[text n=1] one", "[text n=1] two")
    async with client.stream(chat, after_id=6) as seen:
        await owner.edit(chat, 5, "[text n=1] two again")
        await seen.until(lambda s: s.last == "waiting" and len(s.story) > 1)
    assert seen.message_ids == [3, 4, 7, 8]
    assert seen.story[1:] == [
        "user", "assistant", "user", "queue 0", "pending", "running", "assistant", "waiting",
    ]  # fmt: skip
    queue = next(event for event in seen.events if event["type"] == "queue_update")
    assert list(queue) == ["type", "chat_id"]


async def test_an_edit_aborts_a_run_empties_the_queue_and_says_pending_twice(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=5000 ms=20] busy")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.text)
        await owner.send(chat, "later")
        await owner.edit(chat, 3, "[text n=1] instead")
        await seen.until(idle)
    assert seen.story == [
        "pending", "user", "running", "queue 1",
        "user", "queue 0", "pending", "pending", "running", "assistant", "waiting",
    ]  # fmt: skip
    assert [message["id"] for message in await owner.messages(chat)] == seen.message_ids[1:]


async def test_turned_rows_bring_the_tool_before_its_assistant_and_spoil_the_refresh(start: Start) -> None:
    client = await start(tied_rows="turned")
    chat = await finished_chat(client, "[tool n=1] one", "[text n=1] two")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
        assert seen.message_ids == [3, 5, 4, 6, 7, 8]
        await client.owner().edit(chat, 7, "[text n=1] two again")
        await seen.until(lambda s: 10 in s.message_ids)
    # 4 lives on and is not sent again: its row comes after 5, and its id is not above it.
    assert seen.message_ids[6:] == [3, 5, 6, 9, 10]


async def test_after_turned_rows_at_the_end_the_higher_id_comes_twice(start: Start) -> None:
    client = await start(tied_rows="turned")
    owner = client.owner()
    chat = await owner.create("[slowtool n=50 ms=500] work")
    async with client.stream(chat) as first:
        await first.until(lambda s: 5 in s.message_ids)
        async with client.stream(chat) as seen:
            await seen.until(lambda s: s.frames)
            assert seen.message_ids == [3, 5, 4]
            await seen.until(idle)
    assert seen.message_ids == [3, 5, 4, 5, 6]


async def test_an_interrupt_says_waiting_twice_around_the_partial_message(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=5000 ms=40] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.text) > 50)
        await owner.interrupt(chat)
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert seen.story == ["pending", "user", "running", "waiting", "assistant", "waiting"]
    message = seen.messages[-1]
    assert message["content"][0]["text"] == seen.text
    assert "usage" not in message


async def test_an_interrupted_call_without_arguments_gets_a_result(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[agent ms=2000] delegate")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: any("args_delta" in json.dumps(e) for e in s.events))
        await owner.interrupt(chat)
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assistant, tool = (message["content"] for message in seen.messages[1:])
    assert "args" not in assistant[-1]
    assert tool[0]["result"] == {"error": "tool call was interrupted before it produced a result"}
    assert tool[0]["is_error"] is True


async def test_an_interrupted_tool_announces_its_cancellation(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[tool toolms=600000] wait")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: any('"args":' in frame for frame in s.frames))
        await owner.interrupt(chat)
        await seen.until(lambda s: s.story.count("waiting") == 2)
    results = [part["part"]["result"] for part in seen.parts if part["role"] == "tool"]
    assert results == [{"error": "context canceled"}]
    assert seen.story[3:] == ["waiting", "assistant", "tool", "waiting"]


async def test_nothing_is_saved_when_nothing_was_received(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text wait=600000] slow to begin")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: "running" in s.story)
        await owner.interrupt(chat)
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert seen.story == ["pending", "user", "running", "waiting", "waiting"]


async def test_a_pending_chat_cannot_be_interrupted(start: Start) -> None:
    client = await start(poll_ms=3_600_000)
    owner = client.owner()
    chat = await owner.create("[text n=1] hello")
    async with client.stream(chat) as seen:
        answer = await client.call("POST", f"/{chat}/interrupt")
        await seen.until(lambda s: len(s.story) == 3)
    assert answer.json["status"] == "pending"
    assert seen.story == ["pending", "user", "pending"]


async def test_a_prompt_that_overtakes_an_interrupt_loses_the_partial_step(start: Start) -> None:
    client = await start(speed=1.0)
    owner = client.owner()
    chat = await owner.create("[text n=500 ms=5] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.text) > 50)
        daemon = client.simulator._life.daemon
        row = client.simulator.database.chats[chat]
        daemon.interrupt(row)
        daemon.send(row, row.owner_id, row.messages[-1].content, None)  # before the run has had a turn
        await seen.until(lambda s: s.story.count("running") == 2)
    assert seen.story[3:] == ["waiting", "user", "pending", "pending", "running"]


async def test_a_queue_is_worked_off_without_waiting_in_between(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=5000 ms=20] busy")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.text)
        queued = [(await owner.send(chat, f"[text n=1] queued {i}"))["queued_message"]["id"] for i in range(3)]
        await owner.delete_queued(chat, queued[1])
        await owner.promote(chat, queued[2])
        await seen.until(idle)
    assert seen.story == [
        "pending", "user", "running", "queue 1", "queue 2", "queue 3", "queue 2",
        "queue 1", "user", "pending", "pending",  # promoted: said twice, the aborted run's part is lost
        "running", "assistant", "user", "queue 0", "pending",  # worked off
        "running", "assistant", "waiting",
    ]  # fmt: skip


async def test_a_terminal_error_leaves_the_queue_a_dead_end(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[fail n=20 ms=1000] boom")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.text)
        await owner.send(chat, "[text n=1] later")
        await seen.until(lambda s: s.last == "error")
        assert seen.story[-2:] == ["error: stream response: unauthorized: invalid api key", "error"]
        assert (await owner.send(chat, "[text n=1] another"))["queued"] is True
        row = (await client.call("GET", f"/{chat}")).json
        assert row["last_error"] == "stream response: unauthorized: invalid api key"
        await owner.interrupt(chat)
        await seen.until(lambda s: s.last == "waiting")
    assert (await client.call("GET", f"/{chat}")).json["last_error"] is None


async def test_a_retry_voids_the_parts_before_it(start: Start) -> None:
    client = await start(speed=4.0)
    owner = client.owner()
    chat = await owner.create("[retrymid n=10 ms=5] flaky")
    async with client.stream(chat) as first:
        await first.until(lambda s: "retry 1" in s.story)
        async with client.stream(chat) as late:
            await late.until(idle)
    assert kinds(late.frames[0]) == ["status", "message"]  # the buffer was cleared
    assert len(late.text.split()) == 10
    retry = next(event["retry"] for event in first.events if event["type"] == "retry")
    assert retry["delay_ms"] == 1000
    assert list(retry) == ["attempt", "delay_ms", "error", "retrying_at"]


async def test_the_25th_failure_ends_the_turn(start: Start) -> None:
    client = await start(speed=100_000.0)
    chat = await client.owner().create("[retry fails=99] down for good")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.last == "error")
    assert seen.story[3:-2] == [f"retry {attempt}" for attempt in range(1, 25)]
    delays = [event["retry"]["delay_ms"] for event in seen.events if event["type"] == "retry"]
    assert delays == [1000, 2000, 4000, 8000, 16000, 32000, *[60000] * 18]
    assert seen.story[-2].startswith("error: stream response: max retry attempts (25) exceeded: service unavailable")


async def test_a_long_error_text_is_never_announced(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[fail n=1 size=8000] boom")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.last == "error")
        assert seen.story == ["pending", "user", "running", "error"]
    assert len((await client.call("GET", f"/{chat}")).json["last_error"]) == len("stream response: ") + 8000


async def test_a_turn_may_produce_no_message(client: Client) -> None:
    chat = await client.owner().create("[empty] say nothing")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert seen.story == ["pending", "user", "running", "waiting"]


async def test_arguments_that_never_become_json_leave_no_call(client: Client) -> None:
    chat = await client.owner().create("[badargs n=2 ms=1] try")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert any("args_delta" in frame for frame in seen.frames)
    assert seen.story == ["pending", "user", "running", "assistant", "waiting"]
    assert [part["type"] for part in seen.messages[-1]["content"]] == ["text"]


async def test_parts_of_the_next_step_overtake_messages(start: Start) -> None:
    client = await start(skew=Skew(notify_ms=(0.1, 0.1), overtake=1.0, overtake_ms=20_000, lag=0, burst_loss=0))
    chat = await client.owner().create("[tool n=50 ms=20] work")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    order = [e["message_part"]["role"] if e["type"] == "message_part" else tell_role(e) for e in seen.events]
    result = order.index("tool")
    assert order[result + 1] == "assistant"  # a part of step 2
    assert order.index("M assistant") > result + 1


def tell_role(event: Json) -> str:
    return f"M {event['message']['role']}" if event["type"] == "message" else str(event["type"])


async def test_parts_lag_behind_their_message(start: Start) -> None:
    # A second by the clock, as much as a busy machine may take for the answer.
    client = await start(skew=Skew(notify_ms=(0.0, 0.0), overtake=0, lag=1.0, lag_ms=50_000, burst_loss=0))
    owner = client.owner()
    chat = await owner.create("[text n=1 ms=1] hello")
    await owner.wait_idle(chat)
    async with client.stream(chat) as seen:  # before the parts are made: those of a snapshot are not late
        await seen.until(lambda s: s.frames)
        for _ in range(5):  # a machine that stands still for longer than the lag makes it unseen; not each time
            before = len(seen.events)
            await owner.send(chat, "[text n=3 ms=1] once more")
            await seen.until(lambda s, n=before: "message_part" in map(tell_role, s.events[n:]))  # type: ignore[misc]
            roles = [tell_role(event) for event in seen.events[before:]]
            if "M assistant" in roles[: roles.index("message_part")]:
                return
            await owner.wait_idle(chat)
    raise AssertionError(roles)


async def test_a_burst_loses_parts_in_runs_and_without_a_word(start: Start) -> None:
    client = await start(skew=Skew(burst_loss=0.2))
    chat = await client.owner().create("[text n=3000 ms=0] fast")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    words = len(seen.text.split())
    assert 1500 < words < 3000
    assert client.simulator.fired("lost_parts") == 3000 - words
    assert len(seen.messages[-1]["content"][0]["text"].split()) == 3000
    assert not any("error" in told for told in seen.story)


async def test_nothing_is_lost_at_model_speed(start: Start) -> None:
    client = await start(skew=Skew())
    chat = await client.owner().create("[text n=100 ms=15] steady")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert len(seen.text.split()) == 100


async def test_a_client_that_talks_is_closed(client: Client) -> None:
    chat = await finished_chat(client, "[text n=1] hello")
    url = f"{client.simulator.url}/api/experimental/chats/{chat}/stream"
    headers = {"Coder-Session-Token": client.simulator.users["ann"].token}
    async with client.session.ws_connect(url, headers=headers) as socket:
        await socket.receive()
        await socket.send_str("ping")
        closed = await socket.receive()
        assert (closed.data, closed.extra) == (1002, "Clients cannot send messages for one-way WebSockets")


async def test_clients_that_do_not_pong_are_closed(start: Start) -> None:
    client = await start(patience=Patience(ping_seconds=0.05))
    chat = await finished_chat(client, "[text n=1] hello")
    url = f"{client.simulator.url}/api/experimental/chats/{chat}/stream"
    headers = {"Coder-Session-Token": client.simulator.users["ann"].token}

    async def received() -> tuple[list[str], object, object]:
        async with client.session.ws_connect(url, headers=headers, autoping=False) as socket, asyncio.timeout(5):
            messages = [await socket.receive() for _ in range(3)]
            return [message.type.name for message in messages], messages[-1].data, messages[-1].extra

    for end in await asyncio.gather(*[received() for _ in range(10)]):
        assert end == (["TEXT", "PING", "CLOSE"], 1001, "Ping failed")


async def test_a_close_waits_for_its_answer(start: Start) -> None:
    client = await start(patience=Patience(ping_seconds=0.05))
    chat = await finished_chat(client, "[text n=1] hello")
    async with raw_stream(client, chat) as reader, asyncio.timeout(5):
        received = b""
        while b"Ping failed" not in received:
            received += await reader.read(65536)
        # The connection is not torn down behind the close frame, or the frame could be lost on its way.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)


@contextlib.asynccontextmanager
async def raw_stream(client: Client, chat: UUID) -> AsyncIterator[asyncio.StreamReader]:
    """A WebSocket client that does nothing by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.simulator.port, limit=1024)
    writer.write(
        f"GET /api/experimental/chats/{chat}/stream HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"Coder-Session-Token: {client.simulator.users['ann'].token}\r\n\r\n".encode()
    )
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_reader_that_stands_still_is_cut_inside_a_frame(start: Start) -> None:
    client = await start(patience=Patience(write_seconds=0.2))
    simulator, owner = client.simulator, client.owner()
    chat = await owner.create("[big size=30000000] far more than the network holds")
    await owner.wait_idle(chat)
    async with raw_stream(client, chat) as reader, asyncio.timeout(10):
        while not simulator.fired("write_deadline"):
            await asyncio.sleep(0.01)
        received = 0
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                received += len(piece)
    assert received < 30_000_000


async def test_a_client_that_pongs_stays(start: Start) -> None:
    # Four pings. A pong may take as long as one of them, on a busy machine as well.
    client = await start(patience=Patience(ping_seconds=0.5))
    owner = client.owner()
    chat = await finished_chat(client, "[text n=1] hello")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
        await owner.send(chat, "[text n=100 ms=1000] two seconds")
        await seen.until(idle)
        assert not seen.ended


async def test_events_of_other_chats_never_appear(client: Client) -> None:
    chat = await client.owner().create("[agent n=2 ms=1] delegate")
    async with client.stream(chat) as seen:
        await seen.until(idle)
        async with asyncio.timeout(5):
            while not client.simulator.is_idle():
                await asyncio.sleep(0.01)
    assert {event["chat_id"] for event in seen.events} == {str(chat)}
