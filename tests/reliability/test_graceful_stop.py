"""A worker that is asked to stop, at any moment: it ends in time, its claims are free, and what it saved is what the
broker confirmed."""

import asyncio
import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

import pytest

from relay.adapters.clock import SystemClock
from relay.core.errors import Unavailable
from relay.core.events import Event
from relay.programs.worker import Worker
from tests.core.laws import data_of
from tests.programs.world import FOLLOW, WORKER, World, until
from tests.reliability.confirmed import SlowBus

STOPS = int(os.environ.get("RELAY_TEST_STOPS", "12"))
GRACE = 15.0  # seconds; Kubernetes gives 30
TALKS = (
    "[steps k=3 n=30 ms=5 toolms=20] look through all of them",
    "[text n=200 ms=5] a long answer",
    "[text n=3 ms=3] a short one",
)


def messages_of(events: Sequence[Event]) -> set[tuple[UUID, int]]:
    return {(e.chat.chat_id, data_of(e)["message"]["id"]) for e in events if e.event == "message"}


async def stopped(worker: Worker, task: asyncio.Task[None]) -> float:
    began = time.monotonic()
    task.cancel()
    await asyncio.wait([task], timeout=GRACE)
    assert task.done(), "it does not end"
    assert task.cancelled() or isinstance(task.exception(), Unavailable), task.exception()
    assert not worker.state.followed
    return time.monotonic() - began


def worker_of(world: World, bus: SlowBus, name: str) -> Worker:
    return Worker(
        name,
        upstream=world.upstream,
        bus=bus,
        claims=world.store,
        clock=SystemClock(),
        settings=WORKER,
        follow=FOLLOW,
    )


async def test_whenever_it_is_stopped_what_is_saved_is_what_was_confirmed(world: World) -> None:
    chance = random.Random(21)
    bus = SlowBus(world.bus, chance, seconds=0.03)
    chats = [await world.owner.create(talk) for talk in TALKS]
    in_hand = 0
    for number in range(STOPS):
        for chat, talk in zip(chats, TALKS, strict=True):
            if number % 2 == 0 and await idle(world, chat):
                await world.owner.send(chat, talk)
        worker = worker_of(world, bus, f"worker {number}")
        task = asyncio.create_task(worker.run())
        await until(lambda: worker.state.followed)  # noqa: B023
        if number % 2:
            await asyncio.sleep(chance.uniform(0, 0.08))  # the moment is the point
        else:
            await in_full_flow(bus)
        in_hand += bool(bus.unconfirmed)
        await stopped(worker, task)
        assert bus.on_their_way == 0
        assert (
            world.rows("SELECT chat_id FROM claims WHERE worker IS NOT NULL")
            == world.rows("SELECT * FROM workers")
            == []
        )
        known = {(UUID(str(chat)), key) for chat, key in world.rows("SELECT chat_id, message_id FROM known_messages")}
        assert known == messages_of(world.bus.published), f"stop {number}"
    assert in_hand >= STOPS / 4, "it was never stopped in the middle of anything"
    async with world.worker():
        for chat in chats:
            await world.owner.wait_idle(chat)
        await world.until_equal(*chats)
    # What was in hand may have gone out twice, as it was. No later session tells it again.
    told: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for event in world.bus.published:
        if event.event in ("message", "turn"):
            told[event.id].add((event.session, event.position))
    assert [places for places in told.values() if len(places) > 1] == []


async def in_full_flow(bus: SlowBus) -> None:
    """Return while a message is stored, and its confirm on its way."""
    async with asyncio.timeout(20):
        while not bus.unconfirmed:
            await asyncio.sleep(0.001)


async def idle(world: World, chat: UUID) -> bool:
    return bool((await world.upstream.chat(chat))["status"] in ("waiting", "completed"))


@pytest.mark.parametrize("what", ["broker", "database"])
async def test_a_stop_while_something_is_away_is_in_time_and_costs_no_event(world: World, what: str) -> None:
    bus = SlowBus(world.bus, random.Random(1))
    chats = [await world.owner.create(talk) for talk in TALKS]
    worker = worker_of(world, bus, "first")
    task = asyncio.create_task(worker.run())
    await until(lambda: len(messages_of(world.bus.published)) >= 2)
    if what == "broker":
        world.bus.down = True
        await asyncio.sleep(0.1)
        assert await stopped(worker, task) < GRACE
        assert world.saved() == {key for _, key in messages_of(world.bus.published)}
        world.bus.down = False
    else:
        async with world.database_away():
            await asyncio.sleep(0.1)
            assert await stopped(worker, task) < GRACE
        assert world.saved() <= {key for _, key in messages_of(world.bus.published)}
        await world.write("UPDATE workers SET lease_until = 0")  # the heir's patience is no part of this test
    async with world.worker("heir"):
        for chat in chats:
            await world.owner.wait_idle(chat)
        await world.until_equal(*chats)
