"""Connecting no faster than allowed, and who goes first."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from relay.adapters.memory import ManualClock
from relay.programs.dials import Dials
from tests.programs.world import until, while_running


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def dials(clock: ManualClock) -> AsyncIterator[Dials]:
    dials = Dials(clock, per_second=2)
    async with while_running(dials.run()):
        yield dials


async def test_five_thousand_chats_connect_at_the_rate_that_is_set(dials: Dials, clock: ManualClock) -> None:
    passed: list[float] = []

    async def dial() -> None:
        await dials.wait()
        passed.append(clock.monotonic())

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(dial())
        for second in range(1, 4):
            expected = 2 * second
            await until(lambda n=expected: len(passed) == n)  # type: ignore[misc]
            await clock.until_asleep()
            clock.advance(0.5)
            await until(lambda n=expected + 1: len(passed) == n)  # type: ignore[misc]
            await clock.until_asleep()
            clock.advance(0.5)
    assert passed == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


async def test_urgent_ones_go_first_and_one_that_was_given_up_costs_nothing(dials: Dials, clock: ManualClock) -> None:
    order: list[str] = []

    async def dial(name: str, *, urgent: bool = False) -> None:
        await dials.wait(urgent=urgent)
        order.append(name)

    await asyncio.gather(dial("first"), dial("second"))
    async with asyncio.TaskGroup() as group:
        group.create_task(dial("third"))
        given_up = group.create_task(dial("given up"))
        group.create_task(dial("fourth"))
        await clock.until_asleep()
        given_up.cancel()
        group.create_task(dial("urgent", urgent=True))
        for number in (3, 4, 5):
            await clock.until_asleep()
            clock.advance(0.5)
            await until(lambda n=number: len(order) == n)  # type: ignore[misc]
    assert order == ["first", "second", "urgent", "third", "fourth"]
