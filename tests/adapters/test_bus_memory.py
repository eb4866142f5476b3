"""What the in-memory twins offer beyond their ports."""

import asyncio
import re
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.adapters.clock import SystemClock
from relay.adapters.memory import ManualClock, MemoryBus, matches
from relay.adapters.topology import ARCHIVIST, LOG, METER
from relay.core.errors import Unavailable, Unroutable
from relay.ports import Clock
from tests.adapters.traffic import message, positions, preview, take

WORDS = st.sampled_from(["chat", "message", "user"])


def by_regular_expression(pattern: str, routing_key: str) -> bool:
    """The broker's rule, said another way: each word followed by a dot."""
    pieces = {"*": r"[^.]+\.", "#": r"([^.]+\.)*"}
    expression = "".join(pieces.get(word, re.escape(word) + r"\.") for word in pattern.split("."))
    return re.fullmatch(expression, routing_key + ".") is not None


@given(st.lists(WORDS | st.sampled_from("*#"), min_size=1, max_size=6), st.lists(WORDS, min_size=1, max_size=6))
@example(["#"], ["chat"])
@example(["chat", "#"], ["chat"])
@example(["#", "#"], ["chat"])
@example(["*"], ["chat", "user"])
def test_patterns_match_as_on_a_topic_exchange(pattern: list[str], words: list[str]) -> None:
    assert matches(".".join(pattern), ".".join(words)) == by_regular_expression(".".join(pattern), ".".join(words))


async def test_what_was_published_is_remembered_and_what_nobody_took_is_not() -> None:
    bus = MemoryBus()
    bus.unbind(LOG)
    bus.unbind(ARCHIVIST)
    await bus.publish([message(1), preview(2)])
    bus.unbind(METER)
    with pytest.raises(Unroutable):
        await bus.publish([message(3)])
    bus.down = True
    with pytest.raises(Unavailable):
        await bus.publish([message(4)])
    assert [event.position for event in bus.published] == [1, 2]


async def test_the_log_and_the_record_keep_the_newest_and_the_queues_all() -> None:
    bus = MemoryBus(keep=3)
    await bus.publish([message(number) for number in range(10)])
    assert [event.position for event in bus.published] == [7, 8, 9]
    assert await bus.depth(LOG) == 3
    assert await bus.depth(METER) == 10


async def test_a_bus_that_comes_back_has_what_it_held() -> None:
    bus = MemoryBus()
    await bus.publish([message(1)])
    bus.down = True
    bus.down = False
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        assert positions(await take(deliveries)) == [1]


async def test_a_consumer_of_a_full_queue_lets_others_run() -> None:
    bus = MemoryBus()
    await bus.publish([message(number) for number in range(100)])
    others = 0

    async def count_turns() -> None:
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        for _ in range(100):
            await (await anext(deliveries)).ack()
    counting.cancel()
    assert others >= 100


# --- clocks --------------------------------------------------------------------------------------------------------


async def test_a_manual_clock_wakes_those_whose_time_has_come_in_order() -> None:
    clock = ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        for name, seconds in (("late", 9.0), ("second", 5.0), ("first", 2.5), ("at once", 0.0)):
            group.create_task(sleeper(name, seconds))
        await clock.until_asleep(3)
        while not woken:
            await asyncio.sleep(0)
        assert woken == [("at once", 0.0)]
        clock.advance(2.4)
        clock.advance(2.6)
        while len(woken) < 3:
            await asyncio.sleep(0)
        assert woken[1:] == [("first", 5.0), ("second", 5.0)]
        assert clock.now() == datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=5)
        clock.advance(4)
    assert woken[3:] == [("late", 9.0)]


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = ManualClock()
    sleeping = asyncio.create_task(clock.sleep(1))
    await clock.until_asleep()
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    other = asyncio.create_task(clock.sleep(5))
    await clock.until_asleep(1)
    clock.advance(1)
    assert not other.done()
    clock.advance(4)
    await other


async def test_a_step_of_the_wall_clock_wakes_nobody() -> None:
    clock = ManualClock()
    before = clock.now()
    sleeping = asyncio.create_task(clock.sleep(60))
    await clock.until_asleep()
    clock.step(-3600)
    assert clock.now() == before - timedelta(hours=1)
    assert clock.monotonic() == 0
    clock.step(7200)
    await asyncio.sleep(0)
    assert not sleeping.done()
    clock.advance(60)
    await sleeping


async def test_the_system_clock_tells_the_time_in_utc() -> None:
    clock: Clock = SystemClock()
    started = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() - started >= 0.009
    assert abs(clock.now() - datetime.now(UTC)) < timedelta(seconds=5)
    assert clock.now().tzinfo is UTC
