"""What differs between server ages and is in no recording, or only by chance: places, cursors, client tools, flaws."""

from typing import Any
from uuid import UUID

import pytest

from relay.simulator.dialect import DIALECTS
from relay.simulator.stream import NO_SKEW, Skew
from tests.simulator.conftest import Start
from tests.simulator.listener import Client, Listener

OLD_WITH_ACTIONS = ["d1", "d1e"]
PREFIXES = {"/api/experimental/chats", "/api/v2/chats"}
Json = Any


async def idle_chat(client: Client, text: str = "[text n=3 ms=1] hello") -> UUID:
    chat = await client.owner().create(text)
    await client.owner().wait_idle(chat)
    return chat


def is_blocked(seen: Listener) -> bool:
    return [event["type"] for event in seen.durable].count("action_required") > 0 and seen.story[-2:].count(
        "requires_action"
    ) > 0


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_chats_are_below_the_prefixes_of_the_dialect_and_nowhere_else(start: Start, dialect: str) -> None:
    client = await start(dialect=dialect)
    here = set(client.features.prefixes)
    for prefix in here:
        assert (await client.call("GET", "", base=prefix)).status == 200
    for prefix in PREFIXES - here:
        refused = await client.call("GET", "?limit=1", base=prefix)
        assert (refused.status, refused.json) == (404, {"message": "Route not found."})


async def test_since_general_availability_models_are_below_the_organization(start: Start) -> None:
    client = await start(dialect="d3ga")
    path = f"/organizations/{client.simulator.organization_id}/chats/models"
    models = (await client.call("GET", path, base="/api/v2")).json
    assert list(models) == ["models", "providers", "unsupported_providers"]
    assert models["models"][0]["id"] == str(client.simulator.model_configs[0].id)
    elsewhere = f"/organizations/{UUID(int=1)}/chats/models"
    assert (await client.call("GET", elsewhere, base="/api/v2")).status == 404
    assert (await client.call("GET", "/models")).json["message"] == 'Invalid UUID "models".'


async def test_pages_tell_the_history_version_and_the_search_knows_statuses(start: Start) -> None:
    client = await start(dialect="d3ga")
    chat = await idle_chat(client)
    before = (await client.call("GET", f"/{chat}/messages")).json
    assert list(before) == ["messages", "queued_messages", "has_more", "history_version"]
    await client.owner().send(chat, "[text n=3 ms=1] more")
    await client.owner().wait_idle(chat)
    assert (await client.call("GET", f"/{chat}/messages")).json["history_version"] > before["history_version"]
    await client.call("PATCH", f"/{chat}", {"archived": True})
    assert (await client.call("GET", "")).json == []
    for query, found in (("archived:any", 1), ("archived:any+status:waiting", 1), ("archived:any+status:error", 0)):
        assert len((await client.call("GET", f"?q={query}")).json) == found, query


@pytest.mark.parametrize("dialect", ["d0b", "d1", "d3"])
async def test_after_a_message_pages_ascend_where_servers_know_that(start: Start, dialect: str) -> None:
    client = await start(dialect=dialect)
    chat = await idle_chat(client)
    for number in range(2):
        await client.owner().send(chat, f"[text n=2 ms=1] {number}")
        await client.owner().wait_idle(chat)
    ids = [message["id"] for message in await client.owner().messages(chat)]
    page = (await client.call("GET", f"/{chat}/messages?after_id={ids[0]}&limit=2")).json
    ascends = client.features.ascending_pages
    assert [message["id"] for message in page["messages"]] == (ids[1:3] if ascends else ids[::-1][:2])
    assert page["has_more"]
    crossed = await client.call("GET", f"/{chat}/messages?after_id={ids[2]}&before_id={ids[2]}")
    assert crossed.status == (400 if ascends else 200)


@pytest.mark.parametrize("dialect", OLD_WITH_ACTIONS)
async def test_a_turn_waits_for_a_clients_tool_and_goes_on_with_its_result(start: Start, dialect: str) -> None:
    client = await start(dialect=dialect)
    chat = await client.owner().create("[dyn n=3 ms=1] a number please")
    async with client.stream(chat) as seen, client.watch() as watched:
        await seen.until(is_blocked)
        call = next(e for e in seen.durable if e["type"] == "action_required")["action_required"]["tool_calls"][0]
        assert (call["tool_name"], call["args"]) == ("lab_tool", '{"x": 1, "why": "dynamic tool call"}')
        await watched.until(lambda w: w.events and w.events[-1]["kind"] in ("action_required", "summary_change"))
        told = next(event for event in watched.events if event["kind"] == "action_required")
        assert told["tool_calls"] == [call]
        async with client.stream(chat) as late:  # which is told the status alone
            await late.until(lambda s: s.frames)
            assert {event["type"] for event in late.events} <= {"status", "message", "message_part"}
        assert await client.owner().answer_calls(chat)
        await seen.until(lambda s: s.messages[-1]["role"] == "assistant" and s.last == "waiting")
    history = await client.owner().messages(chat)
    assert [message["role"] for message in history] == ["user", "assistant", "tool", "assistant"]
    assert history[2]["content"][0]["result"] == {"ok": True}
    late_results = {"results": [{"tool_call_id": call["tool_call_id"], "output": {}}]}
    refused = await client.call("POST", f"/{chat}/tool-results", late_results)
    assert (refused.status, refused.json["message"]) == (409, "Chat is not waiting for tool results.")


@pytest.mark.parametrize("dialect", OLD_WITH_ACTIONS)
async def test_an_interrupt_answers_a_clients_calls_where_no_stream_sees_it(start: Start, dialect: str) -> None:
    client = await start(dialect=dialect)
    chat = await client.owner().create("[dyn n=3 ms=1] a number please")
    async with client.stream(chat) as seen:
        await seen.until(is_blocked)
        await client.owner().interrupt(chat)
        await seen.until(lambda s: s.story[-2:] == ["waiting", "waiting"])
        by_rest = await client.owner().messages(chat)
        assert [message["role"] for message in by_rest] == ["user", "assistant", "tool"]
        assert by_rest[-1]["content"][0]["result"] == "Tool execution interrupted by user"
        assert by_rest[-1]["id"] not in seen.message_ids


async def test_a_prompt_that_interrupts_a_clients_call_is_stuck_in_the_queue(start: Start) -> None:
    client = await start(dialect="d1e")
    chat = await client.owner().create("[dyn n=3 ms=1] a number please")
    async with client.stream(chat) as seen:
        await seen.until(is_blocked)
        body = {"content": [{"type": "text", "text": "never mind"}], "busy_behavior": "interrupt"}
        assert (await client.call("POST", f"/{chat}/messages", body)).json["queued"]
        await seen.until(lambda s: s.story[-3:] == ["queue 1", "waiting", "waiting"])
    client.simulator.poll()
    assert client.simulator.is_idle()
    assert len(await client.owner().queue(chat)) == 1
    # Nobody answers the call.
    assert [message["role"] for message in await client.owner().messages(chat)] == ["user", "assistant"]


async def test_the_second_copy_of_a_status_may_come_when_it_is_past(start: Start) -> None:
    client = await start(dialect="d1", skew=Skew(notify_ms=(0.1, 0.1), overtake=0, lag=1.0, lag_ms=5000, burst_loss=0))
    chat = await client.owner().create("[text n=3 ms=1] short")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.story.count("waiting") == 2)
    statuses = [told for told in seen.story if told in ("pending", "running", "waiting")]
    assert statuses == ["pending", "running", "waiting", "running", "waiting"]


@pytest.mark.parametrize(
    ("dialect", "keys"),
    [
        ("d0", ["message"]),
        ("d0b", ["message", "kind", "provider", "retryable", "status_code"]),
        ("d1", ["message", "detail", "kind", "provider", "retryable", "status_code"]),
    ],
)
async def test_an_error_says_more_with_age(start: Start, dialect: str, keys: list[str]) -> None:
    client = await start(dialect=dialect, poll_ms=1e9)
    chat = await client.owner().create("[fail n=2] no")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.frames)
        client.simulator.poll(chat)  # now: who comes later is not told the error
        await seen.until(lambda s: s.last == "error")
    assert [list(event["error"]) for event in seen.events if event["type"] == "error"] == [keys]
    assert isinstance((await client.call("GET", f"/{chat}")).json["last_error"], str)


@pytest.mark.parametrize(("vain", "answered"), [(1.0, False), (0.0, True)])
async def test_a_run_that_takes_over_may_be_in_vain(start: Start, vain: float, answered: bool) -> None:
    skew = Skew(notify_ms=(0.1, 0.1), overtake=0, lag=0, burst_loss=0, snapshot_gap_ms=0, vain=vain)
    client = await start(dialect="d1", skew=skew)
    owner = client.owner()
    chat = await owner.create("[text n=1000 ms=20] long")
    await owner.wait_parts(chat, 3)
    async with client.stream(chat) as seen:
        await owner.edit(chat, (await owner.prompts(chat))[0], "[text n=3 ms=1] short")
        await seen.until(lambda s: s.story[-2:] == ["waiting", "waiting"] and "queue 0" in s.story)
        await owner.wait_idle(chat)
    roles = [message["role"] for message in await owner.messages(chat)]
    assert roles == (["user", "assistant"] if answered else ["user"])


@pytest.mark.parametrize(("dialect", "drained"), [("d1", False), ("d1e", True)])
async def test_a_polite_stop_waits_for_runs_in_one_age_alone(start: Start, dialect: str, drained: bool) -> None:
    client = await start(dialect=dialect)
    chat = await client.owner().create("[text n=30 ms=20] on the way out")
    await client.owner().wait_parts(chat, 3)
    async with client.stream(chat) as seen:
        await client.simulator.restart(polite=True)
        await seen.until_ended()
    row = client.simulator.database.chats[chat]
    assert [message.role for message in row.history()] == ["user", "assistant"][: 2 if drained else 1]
    assert "assistant" not in seen.story


async def test_the_cost_of_a_chat_is_that_of_its_whole_tree(start: Start) -> None:
    client = await start(dialect="d3")
    chat = await idle_chat(client, "[agent n=3 ms=1] delegate")
    child = (await client.call("GET", f"/{chat}")).json["children"][0]["id"]
    await client.owner().wait_idle(UUID(child))
    ours, childs = [(await client.call("GET", f"/{one}/cost")).json for one in (chat, child)]
    assert ours["request_count"] == 3
    assert {**childs, "chat_id": str(chat)} == ours
    assert ours["total_cost_micros"] > 0


async def test_days_of_retention_are_set_by_the_admin_and_read_by_all(start: Start) -> None:
    client = await start(dialect="d1")
    for path, name in (("retention-days", "retention_days"), ("auto-archive-days", "auto_archive_days")):
        assert (await client.call("PUT", f"/config/{path}", {name: 3})).status == 403
        assert (await client.call("PUT", f"/config/{path}", {name: 3}, who="admin")).status == 204
        assert (await client.call("GET", f"/config/{path}")).json == {name: 3}


async def test_a_reader_is_named_by_a_user_id(start: Start) -> None:
    client = await start(dialect="d1e")
    chat = await idle_chat(client)
    refused = await client.call("PATCH", f"/{chat}/acl", {"user_roles": {"bob": "read"}})
    assert (refused.status, refused.json["message"]) == (400, "Invalid user ID.")
    bob = str(client.simulator.users["bob"].id)
    for role, seen in (("read", 200), ("", 404)):
        await client.call("PATCH", f"/{chat}/acl", {"user_roles": {bob: role}})
        assert (await client.call("GET", f"/{chat}", who="bob")).status == seen
        assert (await client.call("POST", f"/{chat}/interrupt", who="bob")).status == 404


async def test_pinned_chats_come_first_in_lists(start: Start) -> None:
    client = await start(dialect="d1", skew=NO_SKEW)
    chats = [str(await idle_chat(client)) for _ in range(3)]
    await client.call("PATCH", f"/{chats[0]}", {"pin_order": 1})
    listed = (await client.call("GET", "")).json
    assert [chat["id"] for chat in listed] == [chats[0], chats[2], chats[1]]
    assert listed[0]["pin_order"] == 1
