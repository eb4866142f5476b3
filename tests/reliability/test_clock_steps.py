"""A wall clock that is set an hour forward or back, at any moment: no id, no order and no budget period changes."""

import random
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.store import open_store
from relay.core.events import Event
from relay.programs.meter import Meter, MeterSettings
from relay.programs.worker import Worker
from tests.core import recorded_follower
from tests.core.captures import Followed, followed, recordings
from tests.core.recorded_follower import RecordedFollower
from tests.programs.test_meter import DAILY, OWN, said, unended
from tests.programs.world import FOLLOW, WORKER, World, until, while_running

HOUR = timedelta(hours=1)
TALK = "[steps k=2 n=40 ms=20 toolms=100] look through all of them"


class SteppedClock(SystemClock):
    """Every now and then somebody sets it; time itself goes on as it does."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._off = timedelta()
        self.steps = 0

    def now(self) -> datetime:
        if self._chance.random() < 0.2:
            self._off = self._chance.choice((-HOUR, timedelta(), HOUR))
            self.steps += 1
        return super().now() + self._off


def timeless(events: list[Event]) -> list[tuple[object, ...]]:
    return [(e.id, e.session, e.position, e.routing_key, e.origin, e.data) for e in events]


@pytest.fixture(scope="module")
def some() -> list[Followed]:
    return [one for path in recordings()[::7] for one in followed(path)]


def test_no_event_of_a_recorded_chat_hangs_on_the_clock(some: list[Followed], monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(29)
    told = [timeless(one.life.events) for one in some]
    times = [[event.time for event in one.life.events] for one in some]
    monkeypatch.setattr(
        recorded_follower,
        "clock",
        lambda moment: (
            datetime(2026, 11, 24, tzinfo=UTC) + timedelta(seconds=min(moment, 1e6)) + chance.randint(-1, 1) * HOUR
        ),
    )
    changed = 0
    for one, before, when in zip(some, told, times, strict=True):
        follower = RecordedFollower(one.chat)
        for connection in one.chat.primary():
            follower.live_through(connection)
        assert timeless(follower.life.events) == before
        changed += sum(event.time != time for event, time in zip(follower.life.events, when, strict=True))
    assert changed > 100, "the clock was not looked at"


async def test_a_worker_whose_clock_is_set_loses_and_doubles_nothing(world: World) -> None:
    """The database's too: it is SQLite, and asks this process for the time. Claims end early, or late; that is all."""
    clock = SteppedClock(7)
    async with open_store(world.database, clock, migrate=False) as store:
        worker = Worker(
            "one",
            upstream=world.upstream,
            bus=world.bus,
            claims=store,
            clock=clock,
            settings=WORKER.model_copy(update={"lease_seconds": 1.0}),
            follow=FOLLOW,
        )
        async with while_running(worker.run()):
            chats = [await world.owner.create(TALK) for _ in range(3)]
            for _ in range(2):
                for chat in chats:
                    await world.owner.wait_idle(chat)
                    await world.owner.send(chat, TALK)
            for chat in chats:
                await world.owner.wait_idle(chat)
            await world.until_equal(*chats)
    assert clock.steps > 10
    for chat in chats:
        assert world.in_order(chat)
        facts = Counter((e.event, e.detail, str(e.id)) for e in world.bus.published if e.chat.chat_id == chat)
        told = [fact for fact in facts if fact[0] == "message"]
        assert len(told) == len((await world.upstream.messages(chat, down_to=0)).messages)


def charges_around_midnight() -> Iterator[Event]:
    """3000 micros each, of a limit of 10 000 a day: by turns just before and just after midnight, some twice."""
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    for number in range(1, 11):
        side = -1 if number % 2 else 1
        yield said(number, at=midnight + side * timedelta(minutes=number))


async def test_each_limit_fires_once_in_each_period_whatever_the_clock_says(world: World) -> None:
    clock = SteppedClock(3)
    events = list(charges_around_midnight())
    chance = random.Random(5)
    told = [event for event in events for _ in range(chance.randint(1, 3))]
    chance.shuffle(told)
    for part in (told[: len(told) // 2], told[len(told) // 2 :]):
        await world.bus.publish(part)
        meter = Meter(  # and between the two it is started anew
            bus=world.bus,
            charges=world.store,
            upstream=None,
            clock=clock,
            settings=MeterSettings(prices=OWN, policies=[DAILY]),
        )
        heard: list[bool] = []
        async with while_running(meter.run(lambda ok, _, heard=heard: heard.append(ok))):  # type: ignore[misc]
            await until(lambda heard=heard: heard and not world.bus._queues["relay.meter"] and not unended(world))  # type: ignore[misc]
    fired = [cast(Any, event.data) for event in world.bus.published if event.event in ("threshold", "exceeded")]
    levels = Counter((each["period"]["start"], each["percent"]) for each in fired)
    assert levels == {
        (day, level): 1 for day in ("2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z") for level in (50, 80, 95, 100)
    }
    assert world.rows("SELECT count(*) FROM charges") == [(10,)]
