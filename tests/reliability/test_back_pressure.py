"""A broker or a database that is away for an hour while chats go on at full speed: a bound on everything that waits,
sockets unread behind it, and nothing durable lost when it is back."""

import asyncio
import gc
import tracemalloc
from collections.abc import Sequence
from typing import cast

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.memory import ManualClock, MemoryBus
from relay.core.errors import Unavailable
from relay.core.events import Event
from relay.ports import Bus, Claim, Claims, Upstream
from relay.programs import saving
from relay.programs.follow import Follower, FollowSettings
from tests.core.laws import assert_honest_previews, data_of
from tests.e2e.consumer import Consumer, fold
from tests.programs.world import World, until, while_running
from tests.reliability.hot_server import HotServer, chat_ref

SETTINGS = FollowSettings(buffer_frames=32, shed_frames=16, settle_seconds=0.5, linger_seconds=5.0)
HOUR = 3600.0


async def hours_pass(clock: ManualClock, hours: float, *, step: float = 20.0) -> None:
    """Whoever sleeps wakes in between, tries again, and has its turn."""
    for _ in range(int(hours * HOUR / step)):
        clock.advance(step)
        for _ in range(5):
            await asyncio.sleep(0)


def following(world: World, server: HotServer, claim: Claim, clock: ManualClock, bus: Bus) -> Follower:
    upstream, claims = cast(Upstream, server), cast(Claims, world.store)
    return Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=clock, settings=SETTINGS)


async def claimed(world: World, number: int) -> Claim:
    claim = await world.claim(chat_ref(number), "one", lease_seconds=1e6)
    assert claim is not None
    return claim


def assert_nothing_is_missing(server: HotServer, events: list[Event]) -> None:
    consumer = Consumer()
    for event in events:
        consumer.take(event.routing_key, event.encode())
    for chat in server.chats:
        assert fold(consumer.of(str(chat))) == {int(str(each["id"])): each for each in server.history(chat)}
        mine = [event for event in events if event.chat.chat_id == chat and event.family == "chat"]
        places = [(event.session, event.position) for event in mine]
        assert places == sorted(set(places))
        assert_honest_previews(mine, shed=True)


async def test_while_the_broker_is_away_buffers_fill_up_and_sockets_are_not_read(world: World) -> None:
    server, clock, bus = HotServer(3, steps=300), ManualClock(), HalfDeafBus(2)  # gone in the middle of the flood
    claims = [await claimed(world, number) for number in (1, 2, 3)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(following(world, server, claim, clock, bus).run()) for claim in claims]
        await full_up(server, bus, clock)
        full = server.taken
        await until(lambda: world.saved() == messages_of(bus))
        assert 3 * SETTINGS.buffer_frames <= full <= 3 * (2 * SETTINGS.buffer_frames + 4)  # in hand, and waiting
        tracemalloc.start()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await hours_pass(clock, 1)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert server.taken == full, "a socket was read that nobody has room for"
        assert after - before < 100_000, "something grows while the broker is away"
        assert world.saved() == messages_of(bus), "a cursor moved on without a confirm"
        bus.last = 10**6
        while not all(task.done() for task in tasks):
            await hours_pass(clock, 0.1, step=5.0)
            await asyncio.sleep(0.001)
    assert server.taken > 50 * SETTINGS.buffer_frames / 3, "it was no flood"
    assert_nothing_is_missing(server, list(bus.published))
    assert len(world.saved()) == 301


async def full_up(server: HotServer, bus: "HalfDeafBus", clock: ManualClock) -> None:
    """Return when the broker has refused something, and nothing was read for a while."""
    quiet = 0
    while not bus.refused or quiet < 20:
        taken = server.taken
        await hours_pass(clock, 0.01)
        await asyncio.sleep(0.005)  # SQLite answers from a thread of its own
        quiet = quiet + 1 if server.taken == taken else 0


async def test_one_large_frame_is_as_good_as_many(world: World) -> None:
    """The bound is on size, too: a few frames of 100 KB fill a buffer for thousands."""
    server, clock, bus = HotServer(steps=400, parts=1, size=100_000), ManualClock(), HalfDeafBus(2)
    claim = await claimed(world, 1)
    settings = SETTINGS.model_copy(update={"buffer_frames": 10_000, "buffer_characters": 1_000_000})
    upstream, claims = cast(Upstream, server), cast(Claims, world.store)
    follower = Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=clock, settings=settings)
    async with while_running(follower.run()):
        await full_up(server, bus, clock)
        full = server.characters
        assert 1_000_000 <= full <= 2 * (1_000_000 + 2 * 100_000)  # in hand, and waiting
        await hours_pass(clock, 0.5)
        assert server.characters == full
        bus.last = 10**6
        while len(messages_of(bus)) < 20:
            await hours_pass(clock, 0.01, step=5.0)
            await asyncio.sleep(0.001)


async def test_while_the_database_is_away_no_more_goes_out_than_can_be_saved(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker takes everything: it is the resume point that cannot follow."""
    monkeypatch.setattr(saving, "_BEHIND_SECONDS", 0.0)  # within a second all would be told
    server, bus = HotServer(steps=500), MemoryBus()
    claim = await claimed(world, 1)
    settings = SETTINGS.model_copy(update={"first_delay_seconds": 0.01, "longest_delay_seconds": 0.05})
    upstream, claims = cast(Upstream, server), cast(Claims, world.store)
    follower = Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=SystemClock(), settings=settings)
    async with while_running(follower.run()):
        await until(lambda: server.taken > 10)
        async with world.database_away():
            before = server.taken
            await standing_still(server)
            full, told = server.taken, len(bus.published)
            assert SETTINGS.buffer_frames <= full <= before + 4 * SETTINGS.buffer_frames
            assert len(messages_of(bus)) < server.steps, "it was over before the database went"
            await standing_still(server)
            assert (server.taken, len(bus.published)) == (full, told)
        assert world.saved() <= messages_of(bus)
        await until(lambda: len(messages_of(bus)) == server.steps + 1)
        await until(lambda: world.saved() == messages_of(bus))
    assert_nothing_is_missing(server, list(bus.published))


@pytest.mark.parametrize("last", [0, 1, 7, 40])
async def test_a_message_that_the_broker_does_not_confirm_is_not_saved(world: World, last: int) -> None:
    """It took all before it, and says nothing to this one."""
    server = HotServer(steps=60)
    bus = HalfDeafBus(last)
    claim = await claimed(world, 1)
    settings = SETTINGS.model_copy(update={"first_delay_seconds": 0.001, "longest_delay_seconds": 0.001})
    upstream, claims = cast(Upstream, server), cast(Claims, world.store)
    follower = Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=SystemClock(), settings=settings)
    async with while_running(follower.run()):
        await until(lambda: bus.refused > 20)
        assert messages_of(bus) <= set(range(1, last + 1))
        assert world.saved() <= messages_of(bus)
        assert not follower.clean, "whoever comes next would not know that something was on its way"
        bus.last = 10**6
        await until(lambda: len(messages_of(bus)) == server.steps + 1)
        await until(lambda: world.saved() == messages_of(bus) and follower.clean)
    assert_nothing_is_missing(server, list(bus.published))


async def test_a_frame_that_cannot_be_read_costs_nothing_that_waited_before_it(world: World) -> None:
    """They are taken together: a broker was away meanwhile."""
    server, bus = HotServer(steps=60, unreadable_after=20), HalfDeafBus(1)
    claim = await claimed(world, 1)
    settings = SETTINGS.model_copy(update={"first_delay_seconds": 0.001, "longest_delay_seconds": 0.001})
    upstream, claims = cast(Upstream, server), cast(Claims, world.store)
    follower = Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=SystemClock(), settings=settings)
    async with while_running(follower.run()):
        await until(lambda: bus.refused and server.taken > 20)
        bus.last = 10**6
        await until(lambda: len(messages_of(bus)) == server.steps + 1)
        await until(lambda: world.saved() == messages_of(bus) and follower.clean)
    assert [event.routing_key for event in bus.published if event.event == "error"] != []
    assert_nothing_is_missing(server, list(bus.published))


class HalfDeafBus(MemoryBus):
    """A broker that confirms messages up to one, and none above it."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.refused = 0

    async def publish(self, events: Sequence[Event]) -> None:
        if any(event.event == "message" and data_of(event)["message"]["id"] > self.last for event in events):
            self.refused += 1
            await asyncio.sleep(0)
            raise Unavailable("no confirm")
        await super().publish(events)


async def standing_still(server: HotServer) -> None:
    """Return when nothing was read for a second, in which thousands of frames could have been."""
    taken = -1
    while taken != (taken := server.taken):
        await asyncio.sleep(1)


def messages_of(bus: MemoryBus) -> set[int]:
    return {data_of(event)["message"]["id"] for event in bus.published if event.event == "message"}
