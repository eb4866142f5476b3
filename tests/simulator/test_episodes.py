"""The rules of servers since 2.35, each as a client sees it: syncs, episodes, resets, versions."""

import asyncio
from dataclasses import replace

import aiohttp
import pytest

from relay.simulator.outlet import Patience
from relay.simulator.state import Part
from relay.simulator.stream import NO_SKEW
from tests.simulator.conftest import Start
from tests.simulator.episodes import asking, finished, idle, part_seqs, resumed, send, stories, story
from tests.simulator.listener import Client, events_of, tell
from tests.simulator.recording import collapse


@pytest.fixture
async def client(start: Start) -> Client:
    return await start(dialect="d3", titles=False)


# One turn


async def test_a_text_turn(client: Client) -> None:
    chat = await client.owner().create("[text n=5 ms=2] hello")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    assert story(seen.frames[0]) == ["user", "running", "preview_reset"]
    assert stories(seen)[3:] == ["p1.1", "assistant", "preview_reset", "waiting"]
    assert seen.text == "the relay follows every chat "
    assert part_seqs(seen) == [(1, 1, seq) for seq in range(1, 6)]


async def test_versions_count_every_change(client: Client) -> None:
    """The second turn: created 1, claimed 2, begun 3, stored 4, waiting 5, let go 6, sent 7."""
    chat = await finished(client, "[text n=1] one")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
        await client.owner().send(chat, "[text n=1] two")
        await seen.until(lambda s: idle(s) and s.parts)
    assert part_seqs(seen) == [(7, 1, 1)]


async def test_tools_run_as_an_episode_of_their_own(client: Client) -> None:
    chat = await client.owner().create("[tools2 n=2 ms=2] two")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    told = [word for word in stories(seen) if word != "preview_reset"]
    assert told == ["user", "running", "p1.1", "assistant", "p4.1", "tool", "p6.1", "assistant", "waiting"]
    roles = {(part["history_version"], part["role"]) for part in seen.parts}
    assert roles == {(1, "assistant"), (4, "tool"), (6, "assistant")}
    assert sum(tell(event) == "tool" for event in seen.events) == 2  # one for each call


async def test_an_episode_takes_a_mebibyte(client: Client) -> None:
    chat = await client.owner().create("[big size=1500000 ms=0] much")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    shown = sum(len(part["part"]["text"]) for part in seen.parts)
    assert 900_000 < shown <= 1 << 20
    assert [part["seq"] for part in seen.parts] == list(range(1, len(seen.parts) + 1))
    assert len(seen.messages[-1]["content"][0]["text"]) == 1_500_000


async def test_complete_calls_follow_the_output_or_their_fragments(start: Start) -> None:
    for dialect, names in (("d2", ["list", "read"]), ("d3", ["list", "read", "list", "read"])):
        client = await start(dialect=dialect)
        chat = await client.owner().create("[tools2 n=1 ms=2] two")
        async with client.stream(chat) as seen:
            await seen.until(idle)
        calls = [part["part"] for part in seen.parts if part["part"]["type"] == "tool-call"]
        assert collapse([call["tool_name"].partition("_")[0] for call in calls]) == names, dialect


# First syncs


async def test_after_id_filters_the_first_sync_of_a_chat_never_edited(client: Client) -> None:
    chat = await finished(client, "[text n=1] one")
    async with resumed(client, chat, "after_id=3") as seen:
        assert story(seen.frames[0]) == ["assistant", "waiting", "preview_reset"]
    async with resumed(client, chat, "after_id=4") as seen:
        assert story(seen.frames[0]) == ["waiting", "preview_reset"]


async def test_after_id_is_for_the_first_sync_only(client: Client) -> None:
    chat = await finished(client, "[text n=1] one")
    async with client.stream(chat, after_id=1000) as seen:
        await seen.until(lambda s: s.frames)
        await client.owner().send(chat, "[text n=1] two")
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert seen.message_ids == [5, 6]


async def test_a_chat_ever_edited_tells_everything_on_every_connect(client: Client) -> None:
    chat = await finished(client, "[text n=1] one", "[text n=1] two")
    await client.owner().edit(chat, 5, "[text n=1] better")
    client.simulator.poll(chat)
    await client.owner().wait_idle(chat)
    for query in ("", "after_id=0", "after_id=8", "after_id=8&after_revision=1000"):
        async with resumed(client, chat, query) as seen:
            assert story(seen.frames[0])[0] == "history_reset", query
            assert seen.message_ids == [3, 4, 7, 8], query


async def test_a_queue_that_ever_was_is_told(client: Client) -> None:
    chat = await client.owner().create("[text n=200 ms=100] busy")
    client.simulator.poll(chat)
    queued = await send(client, chat, "[text n=1] later")
    assert (await client.call("DELETE", f"/{chat}/queue/{queued['queued_message']['id']}")).status == 204
    async with resumed(client, chat, "after_id=3") as seen:
        assert story(seen.frames[0]) == ["queue 0", "running", "preview_reset"]


async def test_a_joiner_gets_the_current_episode_from_its_first_part(client: Client) -> None:
    chat = await client.owner().create("[text n=100 ms=100] long")
    async with client.stream(chat) as first:
        await first.until(lambda s: len(s.parts) >= 10)
        async with resumed(client, chat, "after_id=3") as seen:
            await seen.until(lambda s: len(s.parts) >= 12)
        await first.until(lambda s: len(s.parts) >= 12)
    assert part_seqs(seen)[:12] == part_seqs(first)[:12] == [(1, 1, seq) for seq in range(1, 13)]


async def test_a_first_sync_and_a_reset_span_frames_of_256_events(client: Client) -> None:
    chat = await finished(client, "[text n=1] one")
    database = client.simulator.database
    row = database.chats[chat]
    for number in range(300):
        message = database.insert(row, "user", (Part("text", text=str(number)),), database.clock.now())
        message.revision = row.snapshot_version
    async with resumed(client, chat, "") as seen:
        await seen.until(lambda s: "preview_reset" in s.story)
        assert [len(events_of(frame)) for frame in seen.frames] == [256, 302 + 2 - 256]
        await client.owner().edit(chat, 304, "[text n=1] last")
        await seen.until(lambda s: len(s.frames) == 4)
    assert [len(events_of(frame)) for frame in seen.frames[2:]] == [256, 1 + 302 + 2 - 256]
    assert "history_reset" not in story(seen.frames[3])


@pytest.mark.parametrize(
    ("dialect", "ids"),
    [
        pytest.param("d2", [3, 4, 6, 5, 7], id="2.35 orders by time"),
        pytest.param("d3", [3, 4, 5, 6, 7], id="2.37 orders by id"),
    ],
)
async def test_rows_of_one_transaction_tie(start: Start, dialect: str, ids: list[int]) -> None:
    client = await start(dialect=dialect, tied_rows="turned")
    chat = await finished(client, "[tools2 n=1] two")
    async with resumed(client, chat, "") as seen:
        assert seen.message_ids == ids


# Edits


async def test_an_edit_of_an_idle_chat_is_one_frame(client: Client) -> None:
    chat = await finished(client, "[text n=1] one", "[text n=1] two")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
        await client.owner().edit(chat, 5, "[text n=1] better")
        await seen.until(lambda s: len(s.frames) > 1)
    assert story(seen.frames[1]) == ["history_reset", "user", "assistant", "user", "running", "preview_reset"]
    assert [event["message"]["id"] for event in events_of(seen.frames[1]) if event["type"] == "message"] == [3, 4, 7]


async def test_an_edit_while_it_runs_says_no_status(client: Client) -> None:
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.parts) >= 3)
        await client.owner().edit(chat, 3, "[text n=2 ms=2] short")
        await seen.until(idle)
    told = stories(seen)
    after = told[told.index("history_reset") :]
    assert after == ["history_reset", "user", "preview_reset", "p4.1", "assistant", "preview_reset", "waiting"]
    assert seen.message_ids == [3, 4, 5]  # the answer that was cut off is not stored


async def test_an_edit_empties_the_queue(client: Client) -> None:
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await send(client, chat, "[text n=1] later")
        await client.owner().edit(chat, 3, "[text n=2 ms=2] short")
        await seen.until(idle)
    assert "queue 0" in stories(seen)[stories(seen).index("history_reset") :]
    assert [message["role"] for message in seen.messages[-2:]] == ["user", "assistant"]
    assert len(seen.message_ids) == 3  # nothing that was queued became a message


# Interrupts


async def test_an_interrupt_stores_what_was_shown_part_by_part(client: Client) -> None:
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.parts) >= 3)
        answer = await client.call("POST", f"/{chat}/interrupt")
        await seen.until(idle)
    assert (answer.status, answer.json["status"]) == (200, "interrupting")
    assert "interrupting" in stories(seen)
    assert story(seen.frames[-1]) == ["assistant", "waiting", "preview_reset"]
    stored = seen.messages[-1]
    assert [part["text"] for part in stored["content"]] == [part["part"]["text"] for part in seen.parts]
    assert "usage" not in stored


async def test_an_interrupt_with_a_queue_never_waits(client: Client) -> None:
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await send(client, chat, "[text n=2 ms=2] next")
        await client.call("POST", f"/{chat}/interrupt")
        await seen.until(lambda s: "waiting" in s.story)
    frames = [story(frame) for frame in seen.frames]
    assert ["assistant", "user", "queue 0", "running", "preview_reset"] in frames
    assert seen.story.count("waiting") == 1


async def test_a_prompt_that_cuts_in_is_queued_first(client: Client) -> None:
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        answer = await send(client, chat, "[text n=2 ms=2] now", busy_behavior="interrupt")
        await seen.until(idle)
    assert answer["queued"] is True
    assert ["queue 1", "interrupting"] in [story(frame) for frame in seen.frames]


async def test_interrupted_tools_get_results(client: Client) -> None:
    chat = await client.owner().create("[slowtool n=1 ms=2 toolms=600000] slow")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: "assistant" in s.story and s.story[-2:] == ["preview_reset", "preview_reset"])
        await client.call("POST", f"/{chat}/interrupt")
        await seen.until(idle)
    assert story(seen.frames[-1]) == ["tool", "waiting", "preview_reset"]
    result = seen.messages[-1]["content"][0]
    assert (result["result"], result["is_error"]) == ("Tool execution interrupted by user", True)


async def test_only_what_runs_can_be_interrupted_or_kept_from_the_archive(client: Client) -> None:
    chat = await finished(client, "[text n=1] one")
    idle_answer = await client.call("POST", f"/{chat}/interrupt")
    assert (idle_answer.status, idle_answer.json["message"]) == (409, "Chat is not in an interruptible state.")
    assert idle_answer.json["detail"].endswith("Interrupt not allowed from state W")
    busy = await client.owner().create("[text n=500 ms=400] long")
    refused = await client.call("PATCH", f"/{busy}", {"archived": True})
    assert (refused.status, refused.json["detail"].endswith("from state R0")) == (409, True)
    assert (await client.call("PATCH", f"/{chat}", {"archived": True})).status == 204


# Queue


async def test_between_two_turns_there_is_no_status(client: Client) -> None:
    chat = await client.owner().create("[text n=60 ms=300] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await send(client, chat, "[text n=2 ms=2] next")
        await seen.until(idle)
    told = stories(seen)
    after = told[told.index("assistant") + 1 : -1]
    assert [word for word in after if word != "preview_reset"] == ["user", "queue 0", "p6.1", "assistant"]


async def test_a_promoted_prompt_comes_next_out_of_turn(client: Client) -> None:
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        ids = [(await send(client, chat, f"[text n=1 ms=2] {n}"))["queued_message"]["id"] for n in range(2)]
        answer = await client.call("POST", f"/{chat}/queue/{ids[1]}/promote")
        await seen.until(lambda s: "waiting" in s.story)
    assert (answer.status, answer.json) == (202, {"message": "Queued message promotion accepted."})
    frames = [story(frame) for frame in seen.frames]
    assert ["queue 2", "interrupting"] in frames  # its place in the list is what it was
    assert ["assistant", "user", "queue 1", "running", "preview_reset"] in frames
    prompts = [message["content"][0]["text"] for message in seen.messages if message["role"] == "user"]
    assert prompts[1:] == ["[text n=1 ms=2] 1", "[text n=1 ms=2] 0"]


async def test_a_prompt_to_a_failed_chat_with_a_queue_lets_the_first_one_go(client: Client) -> None:
    chat = await client.owner().create("[fail n=60 ms=300] fails")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await send(client, chat, "[text n=1 ms=2] first")
        await seen.until(idle)
        assert stories(seen)[-2:] == ["error", "error: OpenAI Compatible returned an unexpected error."]
        assert (await send(client, chat, "[text n=1 ms=2] second"))["queued"] is True
        await seen.until(lambda s: "waiting" in s.story)
    prompts = [message["content"][0]["text"] for message in seen.messages if message["role"] == "user"]
    assert prompts[1:] == ["[text n=1 ms=2] first", "[text n=1 ms=2] second"]


# Errors and retries


async def test_a_terminal_error_is_one_frame_and_told_to_whoever_joins(client: Client) -> None:
    chat = await client.owner().create("[fail n=3 ms=2] fails")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    last = ["error", "error: OpenAI Compatible returned an unexpected error."]
    assert story(seen.frames[-1]) == last
    async with resumed(client, chat, "after_id=3") as again:
        assert story(again.frames[0]) == [*last, "preview_reset"]
    assert seen.message_ids == [3]  # the partial answer is lost


async def test_the_failed_attempt_is_the_current_one_until_the_next_begins(start: Start) -> None:
    client = await start(dialect="d3", speed=2.0)
    chat = await client.owner().create("[retrymid n=10 ms=30] flaky")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: "retry 1" in s.story)
        async with resumed(client, chat, "after_id=3") as joined:
            await joined.until(lambda s: len(s.parts) > 6)
            async with resumed(client, chat, "after_id=3") as later:
                assert story(later.frames[0]) == ["running", "preview_reset"]
            await joined.until(idle)
        await seen.until(idle)
    assert story(joined.frames[0]) == ["running", "retry 1", "preview_reset"]
    told = stories(joined)[3:]
    assert told == ["p1.1", "preview_reset", "p1.2", "assistant", "preview_reset", "waiting"]
    assert part_seqs(joined)[:5] == [(1, 1, seq) for seq in range(1, 6)]
    assert seen.story.count("retry 1") == 1


async def test_a_retry_is_told_once(start: Start) -> None:
    client = await start(dialect="d3", speed=2.0)
    chat = await client.owner().create("[retry fails=1 n=2] flaky")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: "retry 1" in s.story)
        await send(client, chat, "[text n=1] later")
        await seen.until(lambda s: "queue 1" in s.story)
        assert "p1.2" not in stories(seen)  # the retry was still to come
        await seen.until(lambda s: "waiting" in s.story)
    assert seen.story.count("retry 1") == 1


# Actions


async def test_a_client_tool_waits_for_its_client(client: Client) -> None:
    async with client.watch() as watch:
        chat = await asking(client)
        async with client.stream(chat) as seen:
            await seen.until(lambda s: s.last == "action_required")
            async with resumed(client, chat, "") as joined:
                last = ["requires_action", "action_required", "preview_reset"]
                assert story(joined.frames[0]) == ["user", "assistant", *last]
            call = seen.durable[-1]["action_required"]["tool_calls"][0]
            assert (call["tool_name"], call["args"]) == ("lab_tool", '{"x": 1, "why": "dynamic tool call"}')
            result = {"tool_call_id": call["tool_call_id"], "output": {"ok": True}, "is_error": False}
            assert (await client.call("POST", f"/{chat}/tool-results", {"results": [result]})).status == 204
            await seen.until(lambda s: "waiting" in s.story)
        await watch.until(lambda s: s.events[-1]["kind"] == "summary_change" and len(s.events) >= 6)
    assert ["tool", "running", "preview_reset"] in [story(frame) for frame in seen.frames]
    assert [part["history_version"] for part in seen.parts[-3:]] == [6, 6, 6]
    told = [(event["kind"], event["chat"]["status"]) for event in watch.events]
    assert ("action_required", "requires_action") in told
    assert ("status_change", "requires_action") not in told


async def test_an_interrupt_while_it_waits_for_its_client_makes_it_run_on(client: Client) -> None:
    chat = await asking(client)
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.last == "action_required")
        assert (await client.call("POST", f"/{chat}/interrupt")).json["status"] == "running"
        await seen.until(lambda s: "waiting" in s.story)
    assert ["tool", "running", "preview_reset"] in [story(frame) for frame in seen.frames]
    assert seen.messages[-2]["content"][0]["result"] == "Tool execution interrupted by user"
    assert seen.messages[-1]["role"] == "assistant"


async def test_a_compaction_is_no_turn(client: Client) -> None:
    chat = await finished(client, "[text n=1] one")
    async with client.stream(chat, after_id=4) as seen:
        await seen.until(lambda s: s.frames)
        answer = await client.call("POST", f"/{chat}/compact", {})
        assert (answer.status, answer.json["status"]) == (200, "running")
        assert (await client.call("POST", f"/{chat}/compact", {})).status == 409
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert ["assistant", "tool", "preview_reset"] in [story(frame) for frame in seen.frames]
    assert [part["part"]["type"] for part in seen.parts] == ["tool-call", "tool-result"]
    assert seen.message_ids == [6, 7]  # the request itself is hidden
    assert not any("usage" in message for message in seen.messages)


# Resuming by revision


async def test_statuses_and_pages_tell_the_history_version(start: Start) -> None:
    client = await start(dialect="d3ga")
    chat = await finished(client, "[text n=1] one")
    async with resumed(client, chat, "") as seen:
        status = next(event["status"] for event in seen.events if event["type"] == "status")
    assert status == {"status": "waiting", "history_version": 4}
    assert (await client.call("GET", f"/{chat}/messages")).json["history_version"] == 4


async def test_a_current_revision_resumes_without_a_word_on_the_preview(start: Start) -> None:
    client = await start(dialect="d3ga")
    chat = await client.owner().create("[text n=100 ms=100] long")
    async with client.stream(chat) as first:
        await first.until(lambda s: len(s.parts) >= 3)
        async with resumed(client, chat, "after_id=3&after_revision=1") as seen:
            await seen.until(lambda s: len(s.parts) >= 3)
    assert stories(seen) == ["running", "p1.1"]
    assert part_seqs(seen)[:3] == [(1, 1, 1), (1, 1, 2), (1, 1, 3)]


async def test_an_older_revision_gets_what_is_newer(start: Start) -> None:
    client = await start(dialect="d3ga")
    chat = await finished(client, "[text n=1] one", "[text n=1] two")  # versions 1, 4, 7, 10
    async with resumed(client, chat, "after_revision=4") as seen:
        assert seen.message_ids == [5, 6]
        assert story(seen.frames[0])[-2:] == ["waiting", "preview_reset"]
    async with resumed(client, chat, "after_id=5&after_revision=4") as seen:
        assert seen.message_ids == [6]


async def test_a_revision_that_knows_the_edit_needs_no_reset(start: Start) -> None:
    client = await start(dialect="d3ga")
    chat = await finished(client, "[text n=1] one", "[text n=1] two")
    await client.owner().edit(chat, 5, "[text n=1] better")
    client.simulator.poll(chat)
    await client.owner().wait_idle(chat)
    page = (await client.call("GET", f"/{chat}/messages")).json
    async with resumed(client, chat, f"after_id=8&after_revision={page['history_version']}") as seen:
        assert story(seen.frames[0]) == ["waiting"]
    async with resumed(client, chat, "after_id=6&after_revision=10") as seen:  # as it was before the edit
        assert story(seen.frames[0])[0] == "history_reset"
        assert seen.message_ids == [3, 4, 7, 8]


async def test_the_newest_servers_have_the_new_path_only(start: Start) -> None:
    client = await start(dialect="d3ga")
    assert (await client.call("GET", "", base="/api/v2/chats")).status == 200
    assert (await client.call("GET", "", base="/api/experimental/chats")).status == 404


# Ends of sockets


async def test_a_client_that_speaks_is_closed(client: Client) -> None:
    chat = await finished(client, "[text n=1] one")
    async with client.speaker(chat) as seen:
        await seen.until_ended()
    assert (seen.code, seen.reason) == (1008, "unexpected data message")


async def test_a_client_that_answers_no_ping_is_closed(start: Start) -> None:
    client = await start(dialect="d3", patience=Patience(ping_seconds=0.05))
    chat = await finished(client, "[text n=1] one")
    url = f"{client.simulator.url}{client.chats}/{chat}/stream"
    headers = {"Coder-Session-Token": client.simulator.users["ann"].token}
    async with client.session.ws_connect(url, headers=headers, autoping=False) as socket, asyncio.timeout(5):
        while (message := await socket.receive()).type is not aiohttp.WSMsgType.CLOSE:
            pass
    assert (message.data, message.extra) == (1001, "liveness probe failed")


# Faults


async def test_cuts_and_closes(client: Client) -> None:
    client.simulator.faults.add("cut_every", frames=3, times=1)
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until_ended()
    assert (len(seen.frames), seen.code) == (3, None)
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await client.simulator.close(1012, "service restart", chat)
        await seen.until_ended()
    assert (seen.code, seen.reason) == (1012, "service restart")


async def test_lost_parts_leave_a_gap(client: Client) -> None:
    client.simulator.faults.add("lose_parts", rate=0.6)
    chat = await client.owner().create("[text n=400 ms=5] much")
    async with client.stream(chat) as seen:
        await seen.until(idle)
    seqs = [part["seq"] for part in seen.parts]
    assert seqs == sorted(seqs)
    assert 0 < len(seqs) < 400
    assert client.simulator.fired("lost_parts") == 400 - len(seqs)


async def test_frames_twice(client: Client) -> None:
    client.simulator.faults.add("duplicate_frames", rate=1.0)
    chat = await client.owner().create("[text n=1] hello")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert seen.frames[::2] == seen.frames[1::2]


async def test_parts_again(client: Client) -> None:
    chat = await client.owner().create("[text n=100 ms=300] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: len(s.parts) >= 3)
        assert client.simulator.replay_parts(chat) == 1
        await seen.until(lambda s: part_seqs(s).count((1, 1, 1)) == 2)


async def test_silence_and_zombies(client: Client) -> None:
    for strike in (client.simulator.silence, client.simulator.zombie):
        chat = await client.owner().create("[text n=40 ms=200] hello")
        async with client.stream(chat) as seen:
            await seen.until(lambda s: s.parts)
            assert strike(chat) == 1
            had = len(seen.frames)
            await client.owner().wait_idle(chat)
            async with resumed(client, chat, "") as witness:  # whatever came by now, the other one had to get too
                assert witness.message_ids == [seen.message_ids[0], seen.message_ids[0] + 1]
            assert len(seen.frames) <= had + 1  # one may have been under way
            assert "waiting" not in seen.story


async def test_a_prompt_left_unanswered(client: Client) -> None:
    client.simulator.leave_unanswered()
    chat = await client.owner().create("[text n=5] hello")
    async with client.stream(chat) as seen:
        await seen.until(idle)
        assert [word for word in stories(seen) if word != "preview_reset"] == ["user", "running", "waiting"]
        await client.owner().send(chat, "[text n=1] again")
        await seen.until(lambda s: s.story.count("waiting") == 2)
    assert seen.messages[-1]["role"] == "assistant"


async def test_hints_that_come_together_are_one_sync(start: Start) -> None:
    slow = replace(NO_SKEW, notify_ms=(500.0, 500.0))
    client = await start(dialect="d3", skew=slow, speed=1.0)
    chat = await client.owner().create("[text n=500 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        for number in range(3):
            await send(client, chat, f"[text n=1] {number}")
        await seen.until(lambda s: s.last.startswith("queue"))
    assert [word for word in stories(seen) if "queue" in word] == ["queue 3"]
