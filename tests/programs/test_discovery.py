"""What discovery finds, through a worker: chats that vanished, archived ones, very many."""

import asyncio
import gc
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web

from relay.adapters.clock import SystemClock
from relay.adapters.coder import CoderSettings, CoderUpstream, open_upstream
from relay.adapters.coder_accounts import CoderAccounts, open_accounts
from relay.adapters.memory_claims import MemoryClaims
from relay.core.claims import Peer
from relay.ports import Added, Claims, Upstream
from relay.programs.discovery import Discovery, DiscoverySettings, Sighting
from relay.programs.follow import GONE, row_digest
from tests.adapters.scripted_server import upstream_of
from tests.extent import as_many
from tests.programs.test_worker import TALK, archive, chats_of, idle
from tests.programs.world import World, counted, until, upstream_settings, while_running

MANY = as_many(quick=10_000, long=50_000)
OFTEN: dict[str, Any] = {"archived_sweep_every": 1}


async def followed_once(world: World, number: int) -> list[UUID]:
    """Chats that a worker has followed to their end and let go."""
    chats = await chats_of(world, number)
    async with world.worker() as (worker, _):
        await idle(world, chats)
        await world.until_equal(*chats)
        await until(lambda: not worker.state.followed)
    return chats


async def sweeps(worker: Any, number: int) -> None:
    """Wait for so many more whole sweeps."""
    before = worker.discovery.state.sweeps
    await until(lambda: worker.discovery.state.sweeps >= before + number)


class Found:
    """How often each chat was told of, by a discovery without a worker."""

    def __init__(self, upstream: Upstream, claims: Claims, added: Added | None = None, **settings: Any) -> None:
        self.times: Counter[UUID] = Counter()
        self.discovery = Discovery(
            upstream=upstream,
            claims=claims,
            added=added,
            clock=SystemClock(),
            settings=DiscoverySettings(**{"sweep_seconds": 0.1, **settings}),
            found=lambda sighting: self.times.update([sighting.chat.chat_id]),
            report=lambda ok, reason: None,
        )


# --- chats that vanished ---------------------------------------------------------------------------------------------


async def test_a_chat_that_was_deleted_while_nobody_followed_it_is_told_as_gone_once(world: World) -> None:
    purged, kept = await followed_once(world, 2)
    world.simulator.database.delete_chat(world.simulator.database.chats[purged])
    async with world.worker("one", **OFTEN) as (one, _), world.worker("two", **OFTEN) as (two, _):
        await until(lambda: world.told(purged, "chat.lifecycle.gone."))
        await sweeps(one, 3)
        await sweeps(two, 3)
        await until(lambda: not one.state.followed | two.state.followed)
    assert len(world.told(purged, "chat.lifecycle.gone.")) == 1
    assert world.told(kept, "chat.lifecycle.gone.") == []


async def test_a_sweep_asks_for_some_of_the_missing_and_the_next_ones_go_on(world: World) -> None:
    purged = await followed_once(world, 5)
    for chat in purged:
        world.simulator.database.delete_chat(world.simulator.database.chats[chat])
    asked = counted("relay_source_http_requests_total", endpoint="chat", code="404")
    async with world.worker(missing_at_once=2, **OFTEN) as (worker, _):
        await until(lambda: all(world.told(chat, "chat.lifecycle.gone.") for chat in purged))
        assert worker.discovery.state.sweeps >= 2
        await sweeps(worker, 5)
        before = counted("relay_source_http_requests_total", endpoint="chat", code="404")
        await sweeps(worker, 3)
    assert counted("relay_source_http_requests_total", endpoint="chat", code="404") == before > asked


async def test_a_chat_added_by_hand_is_set_down_as_gone_when_that_was_told(world: World) -> None:
    """Until then the worker that is about to tell it may stop: the others have to look as well."""
    (chat,) = await followed_once(world, 1)
    ref = await world.ref(chat)
    await world.store.add(ref.deployment, chat)
    claim = await world.claim(ref)
    assert claim is not None
    world.simulator.database.delete_chat(world.simulator.database.chats[chat])
    found = Found(world.upstream, world.store, added=world.store)
    async with while_running(found.discovery.sweep()):
        await until(lambda: found.times[chat] >= 3)
        assert [each.gone_at for each in await world.store.added(ref.deployment)] == [None]
        await world.store.release(claim, None, seen=GONE, clean=True)
        await sweeps(found, 2)
        told = found.times[chat]
        await sweeps(found, 2)
    assert found.times[chat] == told
    assert [each.gone_at is None for each in await world.store.added(ref.deployment)] == [False]


async def test_with_another_users_token_no_chat_is_taken_for_gone(world: World) -> None:
    (chat,) = await followed_once(world, 1)
    bob = CoderSettings.model_validate({"url": world.simulator.url, "token": world.simulator.users["bob"].token})
    async with open_upstream(bob) as upstream, world.worker(upstream=upstream, **OFTEN) as (worker, _):
        await sweeps(worker, 3)
    assert world.told(chat, "chat.lifecycle.gone.") == []


async def test_a_known_chat_that_no_list_has_but_the_server_is_looked_at_when_it_changes(world: World) -> None:
    """With an administrator's token: chats of other users are in none of its lists."""
    (chat,) = await followed_once(world, 1)
    admin = CoderSettings.model_validate({"url": world.simulator.url, "token": world.simulator.users["admin"].token})
    async with open_upstream(admin) as upstream, world.worker(upstream=upstream, **OFTEN) as (worker, _):
        await sweeps(worker, 2)
        assert world.told(chat, "chat.lifecycle.gone.") == []
        await world.owner.send(chat, TALK)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)


# --- what the cost reports tell once ---------------------------------------------------------------------------------


@asynccontextmanager
async def an_administrator(world: World) -> AsyncIterator[CoderAccounts]:
    """Finds the chats of ann in the cost reports."""
    async with open_accounts(upstream_settings(world.simulator, "admin", administrator=True)) as upstream:
        yield upstream


async def test_what_was_read_while_the_database_was_away_is_told_when_it_is_back(world: World) -> None:
    chats = await chats_of(world, 3)
    await idle(world, chats)
    claims = MemoryClaims(SystemClock())
    claims.down = True
    failed = counted("relay_discovery_sweeps_total", outcome="failed")
    async with an_administrator(world) as upstream:
        found = Found(upstream, claims)
        async with while_running(found.discovery.sweep()):
            await until(lambda: counted("relay_discovery_sweeps_total", outcome="failed") >= failed + 2)
            claims.down = False
            await until(lambda: found.times.keys() == set(chats))


async def test_a_chat_is_told_of_until_somebody_has_claimed_it(world: World) -> None:
    """The worker that is to claim it may stop before it does."""
    chats = claimed, left = await chats_of(world, 2)
    await idle(world, chats)
    claims = MemoryClaims(SystemClock())
    async with an_administrator(world) as upstream:
        found = Found(upstream, claims)
        async with while_running(found.discovery.sweep()):
            await until(lambda: all(found.times[chat] >= 3 for chat in chats))
            await claims.enlist(Peer("other", None, 0.0, 1), upstream.deployment, lease_seconds=600.0)
            assert await claims.claim(await world.ref(claimed), "other")
            await sweeps(found, 2)
            told = found.times.copy()
            await until(lambda: found.times[left] >= told[left] + 3)
    assert found.times[claimed] == told[claimed]


# --- what other workers know ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [GONE, ""], ids=["taken for gone", "refused"])
async def test_a_chat_that_another_worker_set_back_is_told_of_though_its_row_is_the_same(
    world: World, seen: str
) -> None:
    (chat,) = await followed_once(world, 1)
    found = Found(world.upstream, world.store, archived_sweep_every=2)
    async with while_running(found.discovery.sweep()):
        await until(lambda: chat in found.discovery._seen)
        told = found.times[chat]
        claim = await world.claim(await world.ref(chat))
        assert claim is not None
        await world.store.release(claim, None, seen=seen, clean=True)
        await until(lambda: found.times[chat] > told)


# --- archived chats --------------------------------------------------------------------------------------------------


async def test_chats_archived_before_the_relay_came_are_followed_unless_that_is_switched_off(world: World) -> None:
    old, known = await chats_of(world, 2)
    await idle(world, [old, known])
    await archive(world, old, archived=True)
    async with world.worker(follow_archived=False, **OFTEN) as (worker, _):
        await world.until_equal(known)
        await sweeps(worker, 2)
        assert world.told(old) == []
        await archive(world, known, archived=True)  # one that it knows
        await until(lambda: world.told(known, "chat.lifecycle.archived."))
        assert world.told(old) == []
        await archive(world, old, archived=False)
        await world.until_equal(old)
    late = await chats_of(world, 1)
    await idle(world, late)
    await archive(world, late[0], archived=True)
    async with world.worker(**OFTEN):
        await world.until_equal(*late)


async def test_the_chats_of_subagents_are_found(world: World) -> None:
    root = await world.owner.create("[agent n=2 ms=5] delegate")
    await world.owner.wait_idle(root)
    (child,) = world.simulator.database.children(world.simulator.database.chats[root])
    async with world.worker():
        await world.until_equal(root, child.id)
    assert world.told(child.id, "chat.lifecycle.created.")


# --- once, with the names of what changed ----------------------------------------------------------------------------


async def test_each_change_of_a_chat_is_told_once_with_the_fields_that_changed(world: World) -> None:
    (chat,) = await chats_of(world, 1)
    row = world.simulator.database.chats[chat]
    async with world.worker(**OFTEN) as (worker, _):
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        row.title = "a better title"
        await until(lambda: world.told(chat, "chat.lifecycle.updated."))
        await archive(world, chat, archived=True)
        await until(lambda: world.told(chat, "chat.lifecycle.archived."))
        await archive(world, chat, archived=False)
        await until(lambda: world.told(chat, "chat.lifecycle.unarchived."))
        world.simulator.database.delete_chat(row)
        await until(lambda: world.told(chat, "chat.lifecycle.gone."))
        await sweeps(worker, 3)
    told = [(e["key"].split(".")[2], e["data"]["changed"]) for e in world.told(chat, "chat.lifecycle.")]
    assert [event for event, _ in told] == ["created", "updated", "archived", "unarchived", "gone"]
    assert [changed for _, changed in told[1:]] == [["title"], ["archived"], ["archived"], []]


# --- very many -------------------------------------------------------------------------------------------------------


ROW = (
    '{"id":"%s","owner_id":"%s","root_chat_id":"%s","last_model_config_id":"%s","title":"Chat %d","status":"waiting",'
    '"last_turn_summary":null,"summary":null,"diff_status":{"chat_id":"%s","pull_request_title":"","additions":0},'
    '"created_at":"2026-08-01T09:00:00.123456Z","updated_at":"2026-08-01T09:00:07.%06dZ","archived":false,'
    '"shared":false,"pin_order":0,"mcp_server_ids":[],"labels":{},"has_unread":true,"client_type":"api","children":[]}'
)


def list_of(chats: int) -> bytes:
    """Of a server of 2.37; made in no time, so that what is measured is the relay."""
    owner = UUID(int=7)
    ids = (UUID(int=number + 1000) for number in range(chats))
    return ("[" + ",".join(ROW % (i, owner, i, owner, n, i, n) for n, i in enumerate(ids)) + "]\n").encode()


@asynccontextmanager
async def a_server_with(chats: int) -> AsyncIterator[CoderUpstream]:
    whole = list_of(chats)

    async def handler(request: web.Request) -> web.StreamResponse:
        body = b"[]" if "q" in request.query else whole
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        for place in range(0, len(body), 2**16):
            await response.write(body[place : place + 2**16])
        return response

    async def me(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/users/me"):
            return web.json_response({"id": str(UUID(int=7)), "username": "ann", "roles": []})
        return await handler(request)

    async with upstream_of(me, timeout_seconds=60) as (upstream, _):
        yield upstream


async def remember(world: World, upstream: CoderUpstream) -> None:
    """Put all chats into the store as worked off, all at once."""
    rows = [
        (upstream.deployment, UUID(str(row["id"])).hex, UUID(str(row["owner_id"])).hex, row_digest(row))
        async for row in upstream.list_chats(archived=False)
    ]
    with sqlite3.connect(world.directory / "relay.db") as connection:
        connection.executemany(
            "INSERT INTO claims (deployment, chat_id, owner_id, root_chat_id, session, seen, clean)"
            " VALUES (?, ?, ?, ?2, 1, ?4, 1)",
            rows,
        )


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Ticks:
    """The longest that this thread computed without letting the loop go round, however loaded the machine is; and the
    most memory that the process had."""

    def __init__(self) -> None:
        self.longest = 0.0
        self.fattest = 0

    async def run(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            self.longest = max(self.longest, now - last)
            self.fattest = max(self.fattest, resident())
            last = time.thread_time()


@pytest.mark.timeout(240)
async def test_tens_of_thousands_of_chats_that_are_known_cost_little_and_hold_up_nobody(world: World) -> None:
    found: list[Sighting] = []
    ticks = Ticks()
    async with a_server_with(MANY) as upstream:
        await remember(world, upstream)
        discovery = Discovery(
            upstream=upstream,
            claims=world.store,
            clock=SystemClock(),
            settings=DiscoverySettings(sweep_seconds=3600.0),
            found=found.append,
            report=lambda ok, reason: None,
        )
        gc.collect()
        gc.freeze()  # what the tests before have left would be looked through again and again
        before = resident()
        try:
            async with while_running(ticks.run()), while_running(discovery.sweep()):
                deadline = time.monotonic() + 150
                while discovery.state.sweeps == 0:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)
        finally:
            gc.unfreeze()
    assert found == []
    assert counted("relay_chats_known") == MANY
    assert ticks.fattest - before < 60e6  # the text of the list alone has 31 million characters
    assert ticks.longest < 0.05
