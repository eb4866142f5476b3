"""The relay against every age of server: workers that die, sockets that break, a server replaced by a newer one.

Nothing is lost, nothing is told as two facts, one `history.replaced` per edit.
"""

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.coder import open_upstream
from relay.adapters.database import DatabaseSettings
from relay.adapters.memory import MemoryBus
from relay.adapters.store import open_store
from relay.programs.follow import Ended
from relay.programs.worker import Worker
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import Owner
from relay.simulator.scenarios import run_scenarios
from tests.programs.world import FOLLOW, WORKER, World, counted, until, upstream_settings, while_running

SPEED = 5.0  # slow enough for lives to end while chats talk
SEED = 4
COMMON = ("d0", "d1e", "d2", "d3ga")  # of the others each differs little from one of these
TALK = ("tools", "retry", "error", "interrupt", "queue", "edit", "two tools", "client tool")


class Mortal:
    """An adapter as a process has it that can be killed: from then on nothing that it was asked for happens."""

    def __init__(self, adapter: object, dead: asyncio.Event) -> None:
        self._adapter = adapter
        self._dead = dead

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **named: Any) -> Any:
            if self._dead.is_set():
                raise asyncio.CancelledError
            return await getattr(self._adapter, name)(*args, **named)

        return call


@asynccontextmanager
async def world_of(dialect: str, empty_database: Path, directory: Path) -> AsyncIterator[World]:
    shutil.copy(empty_database, directory / "relay.db")
    database = DatabaseSettings(url=f"sqlite:///{directory}/relay.db", operation_timeout_seconds=5.0)
    config = SimulatorConfig(seed=SEED, speed=SPEED, rate_limit=0, poll_ms=200, recovery_ms=2000, dialect=dialect)
    async with (
        Simulator(config) as simulator,
        open_store(database, SystemClock(), migrate=False) as store,
        open_upstream(upstream_settings(simulator)) as upstream,
        aiohttp.ClientSession() as session,
    ):

        def prefix() -> str:
            return DIALECTS[simulator.config.dialect].features.prefixes[0]

        model_id = simulator.model_configs[0].id
        owner = Owner(session, simulator.url, simulator.users["ann"], model_id, SPEED, prefix=prefix)
        yield World(simulator, MemoryBus(), store, database, upstream, owner, directory)


@asynccontextmanager
async def both_accounts(world: World) -> AsyncIterator[dict[str, Any]]:
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(open_upstream(upstream_settings(world.simulator, name)))
            for name in ("ann", "bob")
        }


@asynccontextmanager
async def mortal_workers(world: World, accounts: dict[str, Any], life: int) -> AsyncIterator[None]:
    """Workers of both owners that are killed, not stopped, at the end of the block."""
    dead = asyncio.Event()
    async with AsyncExitStack() as stack:
        for name, upstream in accounts.items():
            worker = Worker(
                f"{name}-{life}",
                upstream=upstream,
                bus=Mortal(world.bus, dead),
                claims=Mortal(world.store, dead),
                clock=SystemClock(),
                settings=WORKER.model_copy(update={"lease_seconds": 10.0}),
                follow=FOLLOW,
            )
            await stack.enter_async_context(while_running(worker.run()))
        yield
        dead.set()
    await world.write("UPDATE workers SET lease_until = 0")  # the time passes in no time


async def lives(world: World, accounts: dict[str, Any], chance: random.Random, over: asyncio.Event) -> None:
    """Workers live and die until all is said, and one more lives on until consumers know all of it."""
    for life in range(1000):
        async with mortal_workers(world, accounts, life):
            if over.is_set():
                await everything_arrived(world, accounts)
                return
            spoken = len(world.bus.published)
            await until(lambda said=spoken: over.is_set() or len(world.bus.published) > said)  # type: ignore[misc]
            await asyncio.sleep(chance.uniform(0.1, 1.2))  # the moment of the kill is the point


async def everything_arrived(world: World, accounts: dict[str, Any]) -> None:
    for upstream in accounts.values():
        theirs = World(**{**world.__dict__, "upstream": upstream})
        rows = [row async for row in upstream.list_chats(archived=False)]
        await theirs.until_equal(*(UUID(str(row["id"])) for row in rows))


def edits_told(world: World) -> Counter[tuple[str, ...]]:
    """How often each edit was told, by chat and the ids that went."""
    told: Counter[tuple[str, ...]] = Counter()
    for event in {event.id: event for event in world.bus.published if event.event == "history"}.values():
        data = dict(event.data)
        gone = data["removed_ids"]
        if data["reason"] != "restart" and isinstance(gone, list):
            told[str(event.chat.chat_id), *map(str, gone)] += 1
    return told


@pytest.mark.parametrize(
    "dialect",
    [name if name in COMMON else pytest.param(name, marks=pytest.mark.long) for name in sorted(DIALECTS)],
)
async def test_workers_that_die_and_sockets_that_break(dialect: str, empty_database: Path, tmp_path: Path) -> None:
    async with world_of(dialect, empty_database, tmp_path) as world, both_accounts(world) as accounts:
        over = asyncio.Event()
        world.simulator.faults.add("cut_every", frames=7)
        async with asyncio.TaskGroup() as group:
            group.create_task(lives(world, accounts, random.Random(SEED), over))
            await run_scenarios(world.simulator, named=TALK, generated=0, seed=SEED, speed=SPEED)
            over.set()
        assert world.simulator.fired("cut_every") > 0
        assert max(edits_told(world).values(), default=0) <= 1
        assert max(event.session for event in world.bus.published) > 1, "nobody died"


@pytest.mark.parametrize(
    ("before", "after", "polite"),
    [
        ("d0", "d1e", True),
        ("d1", "d3ga", False),
        pytest.param("d1e", "d2", False, marks=pytest.mark.long),
        ("d2", "d3ga", True),
        pytest.param("d3", "d3ga", False, marks=pytest.mark.long),
    ],
)
async def test_a_server_that_is_upgraded_in_the_middle(
    before: str, after: str, polite: bool, empty_database: Path, tmp_path: Path
) -> None:
    async with world_of(before, empty_database, tmp_path) as world, both_accounts(world) as accounts:
        over = asyncio.Event()

        async def upgrade() -> None:
            await until(lambda: len(world.bus.published) > 60)
            await world.simulator.restart(dialect=after, polite=polite, down_seconds=0.2)

        async with asyncio.TaskGroup() as group:
            upgraded = group.create_task(upgrade())
            group.create_task(lives(world, accounts, random.Random(SEED), over))
            await run_scenarios(world.simulator, named=TALK, generated=0, seed=SEED, speed=SPEED)
            await upgraded
            over.set()
        assert not [event for event in world.bus.published if (event.event, event.detail) == ("lifecycle", "gone")]
        assert max(edits_told(world).values(), default=0) <= 1


@pytest.mark.parametrize(("one", "other"), [("d0b", "d1e"), ("d2", "d3ga")])
async def test_two_ages_behind_one_address(one: str, other: str, empty_database: Path, tmp_path: Path) -> None:
    """A rolling upgrade: whom a request finds is chance, until it is over."""
    async with world_of(one, empty_database, tmp_path) as world, both_accounts(world) as accounts:
        over = asyncio.Event()
        world.simulator.faults.add("cut_every", frames=9)
        world.simulator.roll(other)
        async with asyncio.TaskGroup() as group:
            group.create_task(lives(world, accounts, random.Random(SEED), over))
            await run_scenarios(world.simulator, named=TALK, generated=0, seed=SEED, speed=SPEED)
            world.simulator.roll(None)
            await world.simulator.restart(dialect=other)
            over.set()
        assert not [event for event in world.bus.published if (event.event, event.detail) == ("lifecycle", "gone")]
        assert max(edits_told(world).values(), default=0) <= 1


@pytest.mark.parametrize(("dialect", "replayed"), [("d2", True), ("d3ga", False)])
async def test_a_chat_that_was_edited_is_told_whole_only_by_servers_without_revisions(
    dialect: str, replayed: bool, empty_database: Path, tmp_path: Path
) -> None:
    async with world_of(dialect, empty_database, tmp_path) as world:
        owner = world.owner
        chat = await owner.create("[text n=5 ms=5] first")
        await owner.wait_idle(chat)
        await owner.edit(chat, (await owner.prompts(chat))[0], "[text n=5 ms=5] better")
        await owner.wait_idle(chat)
        replays = []
        for _ in range(2):
            before = counted("relay_replays_filtered_total")
            follower = await world.follower(chat)
            assert (await follower.run()).why is Ended.IDLE
            replays.append(counted("relay_replays_filtered_total") - before)
            commit = follower.tail.commit()
            await world.store.release(follower.claim, commit, seen="", clean=True)
        assert (replays[1] > 0) is replayed
        await world.until_equal(chat)
