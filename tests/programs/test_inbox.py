"""A queue worked off: effect first, then the ack; poison is put aside; faults outside are waited for."""

from collections import Counter
from datetime import datetime

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.memory import MemoryBus
from relay.core.errors import BadEvent, Unavailable
from relay.core.events import Event
from relay.programs.inbox import Inbox
from tests.programs.test_meter import said
from tests.programs.world import until, while_running

QUEUE = "relay.meter"


class HastyClock:
    """Pauses take no time, however long: an outage of an hour fits into a test."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self.slept = 0.0

    def now(self) -> datetime:
        return self._clock.now()

    def monotonic(self) -> float:
        return self._clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        self.slept += seconds
        await self._clock.sleep(0.001)


class Handled:
    """Takes events in; refuses some, or all for a while."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.tries: Counter[int] = Counter()
        self.away = False
        self.poison: set[int] = set()

    async def __call__(self, event: Event) -> None:
        self.tries[event.position] += 1
        if self.away:
            raise Unavailable("the database is away")
        if event.position in self.poison:
            raise BadEvent("poison")
        self.done.append(event.position)


def quiet(ok: bool, reason: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("prefetch", [1, 50])
async def test_an_outage_of_hours_dead_letters_nothing_and_keeps_the_order(prefetch: int) -> None:
    bus, clock, handled = MemoryBus(), HastyClock(), Handled()
    handled.away = True
    await bus.publish([said(number) for number in range(1, 9)])
    inbox = Inbox("meter", QUEUE, bus=bus, clock=clock, prefetch=prefetch)
    async with while_running(inbox.work_off(handled, quiet)):
        await until(lambda: clock.slept > 3600)
        handled.away = False
        await until(lambda: len(handled.done) == 8)
    assert handled.done == list(range(1, 9))
    assert await bus.depth("relay.meter.dead") == 0
    assert handled.tries[1] > 20  # more often than the queue would give it back


async def test_poison_is_put_aside_and_what_follows_is_handled() -> None:
    bus, handled = MemoryBus(), Handled()
    handled.poison = {1, 3}
    await bus.publish([said(number) for number in (1, 2, 3, 4)])
    bus._queues[QUEUE].fresh[1] = bus._queues[QUEUE].fresh[1].__class__(b"not JSON", "chat.message.x.y.z")
    async with while_running(Inbox("meter", QUEUE, bus=bus, clock=HastyClock(), prefetch=5).work_off(handled, quiet)):
        await until(lambda: handled.done == [4])
    assert await bus.depth("relay.meter.dead") == 3
    assert max(handled.tries.values()) == 1


async def test_what_was_not_acked_comes_again_when_the_broker_is_back() -> None:
    bus, handled, reported = MemoryBus(), Handled(), list[tuple[bool, str]]()
    inbox = Inbox("meter", QUEUE, bus=bus, clock=HastyClock(), prefetch=5)
    async with while_running(inbox.work_off(handled, lambda ok, reason: reported.append((ok, reason)))):
        await bus.publish([said(1)])
        await until(lambda: handled.done == [1])
        bus.down = True
        await until(lambda: reported[-1][0] is False)
        assert reported[-1][1] == "the broker is down"
        bus.down = False
        await bus.publish([said(2)])
        await until(lambda: handled.done == [1, 2])
        assert reported[-1][0]


async def test_a_queue_that_was_deleted_is_declared_again() -> None:
    bus, handled = MemoryBus(), Handled()
    async with while_running(Inbox("meter", QUEUE, bus=bus, clock=HastyClock(), prefetch=5).work_off(handled, quiet)):
        await bus.publish([said(1)])
        await until(lambda: handled.done == [1])
        bus.delete(QUEUE)
        await until(lambda: QUEUE in bus._queues and bus._queues[QUEUE].consumers)
        await bus.publish([said(2)])
        await until(lambda: handled.done == [1, 2])
