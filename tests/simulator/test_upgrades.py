"""Servers since 2.35 that stop, die and start again, and servers of any age that become another one meanwhile."""

import asyncio

import aiohttp
import pytest

from relay.simulator.dialect import DIALECTS
from tests.simulator.conftest import Start
from tests.simulator.episodes import finished, idle, part_seqs, resumed, stories, story
from tests.simulator.listener import Client, Json, listen


@pytest.fixture
async def client(start: Start) -> Client:
    return await start(dialect="d3", titles=False)


# Restarts


async def test_a_polite_restart_goes_on_as_the_second_attempt(client: Client) -> None:
    chat = await client.owner().create("[text n=50 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await client.simulator.restart(polite=True)
        await seen.until_ended()
    assert (seen.code, seen.reason) == (1000, "")
    assert client.simulator.database.chats[chat].status == "running"
    async with client.stream(chat, after_id=3) as again:
        await again.until(idle)
    assert stories(again)[:2] == ["running", "preview_reset"]
    assert {part[:2] for part in part_seqs(again)} == {(1, 2)}


async def test_after_a_kill_nobody_gets_the_chat_before_the_lease_has_run_out(client: Client) -> None:
    chat = await client.owner().create("[text n=20 ms=1000] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await client.simulator.restart(recovery_ms=20_000)
        await seen.until_ended()
    assert seen.code is None
    row = client.simulator.database.chats[chat]
    assert not client.simulator.needs_run(row)
    client.simulator.poll(chat)
    async with client.stream(chat) as again:
        await again.until(lambda s: s.frames)
        assert story(again.frames[0]) == ["user", "running", "preview_reset"]
        assert not again.parts
        await again.until(lambda s: s.parts)
    assert part_seqs(again)[0] == (1, 2, 1)


async def test_tools_of_a_stored_step_run_again_after_a_restart(client: Client) -> None:
    chat = await client.owner().create("[slowtool n=2 ms=2 toolms=50000] slow")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: "assistant" in s.story and s.story[-2:] == ["preview_reset", "preview_reset"])
        await client.simulator.restart(polite=True)
    async with client.stream(chat, after_id=4) as again:
        await again.until(idle)
    assert [word for word in stories(again) if word != "preview_reset"] == [
        "running", "p4.2", "tool", "p8.1", "assistant", "waiting"
    ]  # fmt: skip


# A server that is upgraded under its clients


async def test_the_dialect_changes_and_chats_keep_ids_and_messages(start: Start) -> None:
    client = await start(dialect="d2")
    chat = await finished(client, "[text n=1] one", "[text n=1] two")
    await client.owner().edit(chat, 5, "[text n=1] better")
    client.simulator.poll(chat)
    await client.owner().wait_idle(chat)
    before = await client.owner().messages(chat)
    await client.simulator.restart(keep_data=True, dialect="d3ga")
    assert (await client.call("GET", "", base="/api/experimental/chats")).status == 404
    assert [(m["id"], m["content"]) for m in await client.owner().messages(chat)] == [
        (m["id"], m["content"]) for m in before
    ]
    async with resumed(client, chat, "after_id=8") as seen:
        assert story(seen.frames[0])[0] == "history_reset"


async def test_a_chat_that_runs_is_taken_over_by_a_server_that_counts_changes(start: Start) -> None:
    client = await start(dialect="d0")
    edited = await finished(client, "[text n=1] one", "[text n=1] two")
    await client.owner().edit(edited, 5, "[text n=1] better")
    chat = await client.owner().create("[text n=30 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await client.simulator.restart(polite=True, dialect="d3")
    async with client.stream(chat) as again:
        await again.until(idle)
    assert again.messages[-1]["content"][0]["text"].startswith("the relay follows")
    async with resumed(client, edited, "after_id=7") as seen:
        assert seen.message_ids[:3] == [3, 4, 7]
        assert seen.story[0] == "history_reset"


async def test_a_chat_that_is_interrupted_is_taken_over_by_an_older_server(start: Start) -> None:
    client = await start(dialect="d3")
    chat = await client.owner().create("[text n=30 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await client.call("POST", f"/{chat}/interrupt")
        await client.simulator.restart(dialect="d1e", recovery_ms=100)
    await client.owner().wait_idle(chat)
    await client.owner().send(chat, "[text n=2 ms=2] on")
    await client.owner().wait_idle(chat)
    await client.simulator.restart(dialect="d3ga")
    page = (await client.call("GET", f"/{chat}/messages")).json
    assert page["messages"][0]["content"][0]["text"] == "the relay "
    async with resumed(client, chat, "") as again:  # what the older server stored is told too
        assert again.message_ids == [message["id"] for message in reversed(page["messages"])]


async def test_a_chat_that_was_about_to_run_on_an_older_server_runs_here(start: Start) -> None:
    client = await start(dialect="d3")
    chat = await client.owner().create("[text n=30 ms=400] long")
    async with client.stream(chat) as seen:
        await seen.until(lambda s: s.parts)
        await client.call("POST", f"/{chat}/interrupt")
        await client.simulator.restart(dialect="d1e")
        assert client.simulator.database.chats[chat].status == "pending"
        await client.simulator.restart(dialect="d3", recovery_ms=100)
    await client.owner().wait_idle(chat)
    assert len(await client.owner().messages(chat)) == 2


async def test_the_control_endpoint_changes_the_dialect(client: Client) -> None:
    async def control(method: str, path: str, body: Json = None) -> Json:
        return (await client.call(method, path, body, who="", base="/_simulator")).json

    refused = await client.call("POST", "/restart", {"dialect": "d9"}, who="", base="/_simulator")
    assert refused.status == 400
    assert "dialect must be one of: d0, d0b, d1, d1e, d2, d3, d3ga" in refused.json["error"]
    async with client.watch() as watch:
        assert await control("POST", "/restart", {"dialect": "d3ga", "polite": True}) == {"struck": 1}
        await watch.until_ended()
    async with asyncio.timeout(5):
        while client.simulator.config.dialect != "d3ga":
            await asyncio.sleep(0.01)
        while True:
            try:
                state = await control("GET", "/state")
                break
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)
    assert state["dialect"] == "d3ga"
    with pytest.raises(ValueError, match="unknown dialect 'd9'"):
        await client.simulator.restart(dialect="d9")


@pytest.mark.parametrize(
    ("old", "new", "path", "answers"),
    [
        pytest.param("d3", "d3ga", "/api/v2/chats", {200, 404}, id="a path that half of the servers know"),
        pytest.param("d0b", "d1", "/api/experimental/chats", {200}, id="one path, two shapes"),
    ],
)
async def test_a_rolling_upgrade_has_two_ages_behind_one_address(
    start: Start, old: str, new: str, path: str, answers: set[int]
) -> None:
    client = await start(dialect=old)
    chat = await finished(client, "[text n=1] one")
    rolled = await client.call("POST", "/roll", {"dialect": new}, who="", base="/_simulator")
    assert (rolled.status, client.simulator.fired("roll")) == (200, 1)
    told = [await client.call("GET", "", base=path) for _ in range(20)]
    assert {answer.status for answer in told} == answers
    opened = set()
    prefixes = {DIALECTS[name].features.prefixes[0] for name in (old, new)}
    for prefix in [*prefixes] * 20:
        url = f"{client.simulator.url}{prefix}/{chat}/stream"
        try:
            async with listen(client.session, url, client.simulator.users["ann"].token) as seen:
                await seen.until(lambda s: s.frames)
        except aiohttp.WSServerHandshakeError:
            continue
        assert seen.message_ids == [3, 4]
        opened.add((seen.frames[0][0], "history_version" in seen.frames[0]))
    assert opened == ({("[", True), ("[", False)} if new == "d3ga" else {("[", False), ("{", False)})
    client.simulator.roll(None)
    assert {(await client.call("GET", "")).status for _ in range(10)} == {200}


async def test_only_ages_that_run_turns_alike_can_share_rows(client: Client) -> None:
    with pytest.raises(ValueError, match="d1e cannot run the turns of d3"):
        client.simulator.roll("d1e")
    refused = await client.call("POST", "/roll", {"dialect": "d1e"}, who="", base="/_simulator")
    assert (refused.status, refused.json["error"]) == (
        400, "d1e cannot run the turns of d3; restart with it instead"
    )  # fmt: skip
