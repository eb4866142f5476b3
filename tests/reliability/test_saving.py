"""Saving goes on beside publishing: never ahead of it, never far behind, and whoever ends hears how it ended."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.memory import MemoryBus
from relay.core.errors import LostClaim, Unavailable
from relay.core.events import Event
from relay.core.resume import Commit
from relay.core.tail import Batch, ChatTail
from relay.ports import Claim, Claims, Clock, Upstream
from relay.programs import saving
from relay.programs.follow import Follower, FollowSettings
from tests.programs.world import World, until, while_running
from tests.reliability.hot_server import HotServer
from tests.reliability.test_back_pressure import assert_nothing_is_missing, claimed, messages_of

PATIENT = FollowSettings(
    settle_seconds=60, linger_seconds=60, first_delay_seconds=0.001, longest_delay_seconds=0.001, buffer_frames=32
)


class SlowStore:
    """The store of a world that answers a save when it is let to."""

    def __init__(self, world: World, *, free: int = 0) -> None:
        self._store = world.store
        self.free = free  # saves that are answered at once
        self.open = asyncio.Event()
        self.asked = 0
        self.waiting = 0
        self.saved = 0
        self.over = False  # the claims are another worker's

    async def save(self, claim: Claim, commit: Commit) -> None:
        self.asked += 1
        self.waiting += 1
        try:
            if self.asked > self.free:
                await self.open.wait()
        finally:
            self.waiting -= 1
        if self.over:
            raise LostClaim("session is over")
        await self._store.save(claim, commit)
        self.saved += 1


class CountingBus(MemoryBus):
    """A broker that confirms so many batches that a resume point has to follow, and no such one after them."""

    def __init__(self, most: float = math.inf) -> None:
        super().__init__()
        self.most = most
        self.durable = 0  # such batches
        self.refused = 0
        self.after: dict[int, Callable[[], None]] = {}  # to be done once so many are confirmed

    async def publish(self, events: Sequence[Event]) -> None:
        durable = any(not event.transient for event in events)
        if durable and self.durable >= self.most:
            self.refused += 1
            await asyncio.sleep(0)
            raise Unavailable("no confirm")
        await super().publish(events)
        if durable:
            self.durable += 1
            self.after.get(self.durable, lambda: None)()


class Hourglass(SystemClock):
    """Two seconds pass when it is turned."""

    passed = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.passed

    def turn(self) -> None:
        self.passed += 2.0


def following(
    server: HotServer, bus: MemoryBus, store: SlowStore, claim: Claim, clock: Clock | None = None
) -> Follower:
    upstream, claims = cast(Upstream, server), cast(Claims, store)
    return Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=clock or SystemClock(), settings=PATIENT)


async def test_what_is_confirmed_runs_ahead_of_the_store_for_a_second_and_no_further(world: World) -> None:
    server, bus, store, clock = HotServer(steps=300), CountingBus(), SlowStore(world), Hourglass()
    follower = following(server, bus, store, await claimed(world, 1), clock)
    bus.after[3] = clock.turn
    async with while_running(follower.run()):
        await until(lambda: bus.durable == 3)
        await asyncio.sleep(0.3)
        assert (bus.durable, store.asked) == (3, 1)
        assert len(messages_of(bus)) < server.steps
        store.open.set()
        await until(lambda: len(messages_of(bus)) == server.steps + 1)
        await until(lambda: world.saved() == messages_of(bus) and follower.clean)
    assert_nothing_is_missing(server, list(bus.published))


async def test_a_chat_that_talks_all_the_time_is_saved_at_intervals(world: World) -> None:
    server, bus, store = HotServer(steps=300), CountingBus(), SlowStore(world)
    store.open.set()
    follower = following(server, bus, store, await claimed(world, 1))
    began = time.monotonic()
    async with while_running(follower.run()):
        await until(lambda: len(messages_of(bus)) == server.steps + 1)
        await until(lambda: world.saved() == messages_of(bus) and follower.clean)
        assert store.asked - 2 <= (time.monotonic() - began) / saving._REST_SECONDS  # the first rest may be short
        assert bus.durable > store.asked + 3


@pytest.mark.parametrize("now", [70000.0, 70000.001, 70000.5, 70000.999])
def test_all_chats_rest_until_the_same_moment(now: float) -> None:
    assert now + saving._rest_seconds(now) == pytest.approx(70001.0)


async def test_what_waits_for_its_turn_is_saved_when_its_follower_is_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_REST_SECONDS", 1e9)
    monkeypatch.setattr(saving, "_BEHIND_SECONDS", 3600.0)
    server, bus, store = HotServer(steps=300), CountingBus(), SlowStore(world)
    store.open.set()
    follower = following(server, bus, store, await claimed(world, 1))
    async with while_running(follower.run()):
        await until(lambda: any(event.detail == "waiting" for event in bus.published))
        assert (store.asked, follower.clean) == (1, False)
    assert follower.clean
    assert world.saved() == messages_of(bus)
    assert store.saved == 2


async def test_what_is_in_hand_is_not_saved_and_what_is_confirmed_is(world: World) -> None:
    server, bus, store = HotServer(steps=300), CountingBus(3), SlowStore(world)
    follower = following(server, bus, store, await claimed(world, 1))
    async with while_running(follower.run()):
        await until(lambda: store.asked == 1 and bus.refused > 10)
        store.open.set()
        await until(lambda: store.saved == 2)
        assert world.saved() == messages_of(bus)
        assert not follower.clean
        bus.most = math.inf
        await until(lambda: len(messages_of(bus)) == server.steps + 1)
        await until(lambda: world.saved() == messages_of(bus) and follower.clean)
    assert_nothing_is_missing(server, list(bus.published))


async def in_the_middle_of_a_save(server: HotServer, follower: Follower, store: SlowStore) -> None:
    """Return when all was said, nothing else is on its way, and the last thing is being saved."""
    store.open.set()
    await until(lambda: follower.tail.settling and follower.clean)
    store.open.clear()
    asked = store.asked
    server.title = "renamed"
    follower.look()
    await until(lambda: store.asked > asked)
    assert not follower.clean


async def test_who_waits_for_frames_hears_that_the_claim_is_lost(world: World) -> None:
    server, bus, store = HotServer(steps=3), MemoryBus(), SlowStore(world)
    follower = following(server, bus, store, await claimed(world, 1))
    task = asyncio.create_task(follower.run())
    await in_the_middle_of_a_save(server, follower, store)
    store.over = True
    store.open.set()
    with pytest.raises(LostClaim):
        await asyncio.wait_for(task, 10)  # not after the minute for which it would be silent


async def test_who_is_stopped_in_the_middle_of_a_save_saves_again(world: World) -> None:
    server, bus, store = HotServer(steps=3), MemoryBus(), SlowStore(world)
    follower = following(server, bus, store, await claimed(world, 1))
    async with while_running(follower.run()):
        await in_the_middle_of_a_save(server, follower, store)
    assert store.waiting == 0, "a save outlives its follower"
    assert not follower.clean, "whoever comes next would not know that something was on its way"
    saved = store.saved
    store.open.set()
    await follower.finish()
    assert store.saved == saved + 1
    assert follower.clean


async def test_a_save_comes_to_its_end_when_its_follower_is_stopped_with_events_in_hand(world: World) -> None:
    """They cannot go out, the broker is away, and nothing else can be saved before them."""
    server, bus, store = HotServer(steps=300), CountingBus(3), SlowStore(world, free=1)
    follower = following(server, bus, store, await claimed(world, 1))
    async with while_running(follower.run()):
        await until(lambda: store.waiting and bus.refused > 5)
        assert world.saved() < messages_of(bus)
        asyncio.get_running_loop().call_later(0.2, store.open.set)
    assert world.saved() == messages_of(bus)
    await follower.finish()
    assert world.saved() == messages_of(bus)
    assert not follower.clean


async def test_a_store_that_does_not_answer_holds_up_no_end(world: World) -> None:
    server, bus, store = HotServer(steps=3), MemoryBus(), SlowStore(world)
    follower = following(server, bus, store, await claimed(world, 1))
    async with while_running(follower.run()):
        await in_the_middle_of_a_save(server, follower, store)
    assert store.waiting == 0
    await follower.finish()
    assert store.waiting == 0, "a save outlives its follower"
    assert not follower.clean


async def test_who_is_cancelled_twice_leaves_no_save_behind(world: World) -> None:
    server, bus, store = HotServer(steps=3), MemoryBus(), SlowStore(world)
    follower = following(server, bus, store, await claimed(world, 1))
    task = asyncio.create_task(follower.run())
    await in_the_middle_of_a_save(server, follower, store)
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0.05)
    await asyncio.wait([task], timeout=1)
    assert task.cancelled()
    assert store.waiting == 0


async def test_nothing_is_saved_of_a_tail_that_failed_before_it_was_heard(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, bus, store = HotServer(steps=30), CountingBus(), SlowStore(world)
    follower = following(server, bus, store, await claimed(world, 1))
    out = ChatTail.out

    def out_until_it_fails(tail: ChatTail) -> Batch:
        batch = out(tail)
        if store.waiting and any(event.event == "message" for event in batch.events):
            raise ZeroDivisionError
        return batch

    monkeypatch.setattr(ChatTail, "out", out_until_it_fails)
    with pytest.raises(ZeroDivisionError):
        await follower.run()
    assert not follower.clean
    store.open.set()
    await follower.finish()
    assert world.saved() <= messages_of(bus)
