"""What `Charges` promises, kept by both databases."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import cast
from uuid import UUID

import pytest
from sqlalchemy import update

from relay.adapters.database import Database, DatabaseSettings
from relay.adapters.migrations.tables import alerts
from relay.adapters.store import SqlStore, open_store
from relay.core.errors import BadEvent, CorruptState
from relay.core.events import ChatRef, Data, Event, Origin
from relay.ports import Charge, Clock, Raised, Spend, Store
from tests.adapters.test_claims import ALICE, BOB, CHAT, CHILD, ELSEWHERE, OTHER, SITE

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
async def store(database_settings: DatabaseSettings, clock: Clock) -> AsyncIterator[SqlStore]:
    async with open_store(database_settings, clock) as opened:
        yield opened


# --- charges -------------------------------------------------------------------------------------------------------


def charge(message_id: int, *, chat: ChatRef = CHAT, at: datetime = NOON, cost: int | None = 100) -> Charge:
    return Charge(chat, message_id, at, "model", 1, 2, 3, 4, 5, cost)


async def spent(store: Store, start: datetime, end: datetime, owner_id: UUID | None = None) -> Spend:
    return await store.spend(SITE, owner_id=owner_id, start=start, end=end)


async def test_the_second_copy_of_a_charge_changes_nothing(store: Store) -> None:
    assert await store.charge(charge(1, cost=100)) is True
    assert await store.charge(charge(1, cost=100)) is False
    assert await store.charge(charge(1, cost=999, at=NOON + timedelta(hours=1))) is False
    assert await spent(store, NOON, NOON + timedelta(days=1)) == Spend(100, 1, 0, [1])


async def test_of_many_meters_at_once_one_stores_the_charge(store: Store) -> None:
    answers = await asyncio.gather(*(store.charge(charge(1)) for _ in range(20)))
    assert sorted(answers) == [False] * 19 + [True]


async def test_a_period_has_its_start_and_not_its_end(store: Store) -> None:
    end, microsecond = NOON + timedelta(hours=1), timedelta(microseconds=1)
    for number, at in enumerate((NOON - microsecond, NOON, end - microsecond, end), start=1):
        await store.charge(charge(number, at=at))
    assert await spent(store, NOON, end) == Spend(200, 2, 0, [3, 2])


async def test_a_time_counts_whatever_zone_it_is_told_in(store: Store) -> None:
    karachi = datetime.fromisoformat("2026-03-01T01:30:00+05:00")
    await store.charge(charge(1, at=karachi))
    day = datetime(2026, 2, 28, tzinfo=UTC)
    assert (await spent(store, day, day + timedelta(days=1))).charges == 1


async def test_spend_is_of_one_owner_or_of_all_of_the_deployment(store: Store) -> None:
    for each in (charge(1), charge(2, chat=CHILD), charge(3, chat=OTHER, cost=7), charge(4, chat=ELSEWHERE)):
        await store.charge(each)
    end = NOON + timedelta(seconds=1)
    assert (await spent(store, NOON, end, ALICE)).cost_micros == 200
    assert (await spent(store, NOON, end, BOB)).cost_micros == 7
    assert (await spent(store, NOON, end)).cost_micros == 207
    assert await spent(store, NOON, end, UUID(int=99)) == Spend(0, 0, 0, [])
    assert await store.spend_by_owner(SITE) == {ALICE: Spend(200, 2, 0, [2, 1]), BOB: Spend(7, 1, 0, [3])}


async def test_unpriced_charges_are_counted_and_add_nothing(store: Store) -> None:
    for each in (charge(1, cost=None), charge(2, cost=5), charge(3, cost=None)):
        await store.charge(each)
    assert await spent(store, NOON, NOON + timedelta(seconds=1)) == Spend(5, 3, 2, [3, 2, 1])


async def test_spend_names_the_ten_newest_messages(store: Store) -> None:
    for number in range(1, 13):
        await store.charge(charge(number, at=NOON - timedelta(hours=number)))
    newest = list(range(1, 11))
    assert (await spent(store, NOON - timedelta(days=1), NOON)).last_message_ids == newest
    assert (await store.spend_by_owner(SITE))[ALICE].last_message_ids == newest


async def test_sums_beyond_any_budget_are_exact(store: Store) -> None:
    for number in (1, 2, 3):
        await store.charge(charge(number, cost=2**61 + 1))
    assert (await spent(store, NOON, NOON + timedelta(seconds=1))).cost_micros == 3 * (2**61 + 1)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(charge(2**63), id="an id of more than 64 bits"),
        pytest.param(charge(1, cost=-1), id="a negative cost"),
        pytest.param(charge(1, at=NOON.replace(tzinfo=None)), id="a time without a zone"),
        pytest.param(charge(1, at=datetime.fromisoformat("0001-01-01T00:00:00+05:00")), id="a time before all time"),
        pytest.param(charge(1, chat=ChatRef("https://x/\x00", ALICE, ALICE, ALICE)), id="a NUL in the deployment"),
        pytest.param(charge(1, chat=ChatRef("x" * 5000, ALICE, ALICE, ALICE)), id="a deployment longer than a key"),
    ],
)
async def test_a_charge_that_no_database_can_hold_is_a_bad_event(store: Store, bad: Charge) -> None:
    with pytest.raises(BadEvent):
        await store.charge(bad)


async def test_a_model_may_have_any_name(store: Store) -> None:
    odd = Charge(CHAT, 1, NOON, 'm\x00"\\\ud83d', 1, 2, 3, 4, 5, 6)
    assert await store.charge(odd)


# --- alerts --------------------------------------------------------------------------------------------------------


def alert(number: int) -> Event:
    data = {"policy": "night\x00ly \ud83d", "percent": number}
    return Event(
        id=str(UUID(int=number)),
        family="usage",
        event="threshold",
        detail="user",
        chat=CHAT,
        content=cast(Data, data),
        time="2026-03-01T12:00:00Z",
        origin=Origin.LIVE,
        session=0,
        position=number,
        subject=str(ALICE),
    )


async def test_an_alert_fires_once_and_waits_until_it_was_published(store: Store) -> None:
    assert await store.raise_alert("k\x00", alert(80)) is Raised.NEW
    assert await store.raise_alert("k\x00", alert(81)) is Raised.WAITING
    assert await store.unpublished_alerts() == [("k\x00", alert(80))]
    await store.alert_published("k\x00")
    await store.alert_published("k\x00")
    assert await store.unpublished_alerts() == []
    assert await store.raise_alert("k\x00", alert(80)) is Raised.PUBLISHED


async def test_alerts_wait_oldest_first(store: Store, clock: Clock) -> None:
    for key in ("b", "a", "c"):
        await store.raise_alert(key, alert(1))
        await clock.sleep(1)
    assert [key for key, _ in await store.unpublished_alerts()] == ["b", "a", "c"]


async def test_of_many_meters_at_once_one_raises_the_alert(store: Store) -> None:
    answers = await asyncio.gather(*(store.raise_alert("key", alert(n)) for n in range(20)))
    assert Counter(answers) == {Raised.NEW: 1, Raised.WAITING: 19}


async def test_an_alert_that_cannot_be_read_stops_the_relay(store: Store, behind: Database) -> None:
    await store.raise_alert("key", alert(1))
    async with behind.writing() as connection:
        await connection.execute(update(alerts).values(body=b"{}"))
    with pytest.raises(CorruptState):
        await store.unpublished_alerts()


async def test_a_charge_can_be_read_again(store: SqlStore) -> None:
    assert await store.charged(CHAT, 1) is None
    await store.charge(charge(1, cost=100))
    await store.charge(charge(1, cost=999))
    assert await store.charged(CHAT, 1) == charge(1, cost=100)
