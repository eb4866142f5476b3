"""What `Claims` and `Charges` promise, kept by both databases."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import cast
from uuid import UUID

import pytest
from sqlalchemy import delete, update

from relay.adapters.database import Database, DatabaseSettings
from relay.adapters.migrations.tables import alerts, claims, known_messages
from relay.adapters.store import SqlStore, open_store
from relay.core.errors import BadEvent, CorruptState, LostClaim
from relay.core.events import ChatRef, Data, Event, Origin
from relay.core.resume import Commit, QueueEntry, ResumePoint
from relay.ports import Charge, ChatRecord, Claim, Clock, Spend, Store

SITE = "https://coder.example"
ALICE, BOB = UUID(int=1), UUID(int=2)
CHAT = ChatRef(SITE, UUID(int=10), ALICE, UUID(int=10))
CHILD = ChatRef(SITE, UUID(int=11), ALICE, UUID(int=10))
OTHER = ChatRef(SITE, UUID(int=12), BOB, UUID(int=12))
ELSEWHERE = ChatRef("https://other.example", UUID(int=10), ALICE, UUID(int=10))
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
LONG = 3600.0


@pytest.fixture
async def store(database_settings: DatabaseSettings, clock: Clock) -> AsyncIterator[SqlStore]:
    async with open_store(database_settings, clock) as opened:
        yield opened


async def claimed(store: Store, worker: str = "a", chat: ChatRef = CHAT, lease_seconds: float = LONG) -> Claim:
    claim = await store.claim(chat, worker, lease_seconds=lease_seconds)
    assert claim is not None
    return claim


def first_save(*ids: int) -> Commit:
    return Commit(ResumePoint(known=frozenset(ids), after=max(ids)), added=frozenset(ids), removed=frozenset())


# --- claims --------------------------------------------------------------------------------------------------------


async def test_a_chat_nobody_followed_begins_clean_and_empty(store: Store) -> None:
    assert await claimed(store) == Claim(CHAT, "a", 1, ResumePoint(clean=True))


async def test_the_next_claim_goes_on_where_the_last_save_was(store: Store) -> None:
    point = ResumePoint(
        known=frozenset({3, 5, 2**63 - 1}),
        after=4,
        turn=3,
        open=3,
        error={"message": "no \x00 and no \ud83d alone", "retryable": True},
        status="error",
        status_key=(3, "error", 1),
        status_counts={"error": 1},
        queue=(QueueEntry(7, "digest"),),
        left=("x", "y"),
        retry=("2026-03-01T00:00:00Z", 2),
        lifecycle={"title": "digest"},
        archived=True,
    )
    first = await claimed(store)
    await store.save(first, Commit(point, added=point.known, removed=frozenset()))
    await store.release(first, None, seen=None, clean=True)
    assert await claimed(store, "b") == Claim(CHAT, "b", 2, point)


async def test_a_save_takes_removed_ids_away(store: Store) -> None:
    claim = await claimed(store)
    await store.save(claim, first_save(1, 2, 3))
    after = Commit(ResumePoint(known=frozenset({1, 4})), added=frozenset({4}), removed=frozenset({2, 3}))
    await store.save(claim, after)
    await store.save(claim, after)  # the answer to the first may have been lost
    assert (await claimed(store)).resume.known == {1, 4}


async def test_a_save_writes_the_difference_only(store: Store, behind: Database) -> None:
    claim = await claimed(store)
    await store.save(claim, first_save(1, 2))
    async with behind.writing() as connection:
        await connection.execute(delete(known_messages).where(known_messages.c.message_id == 1))
    await store.save(claim, Commit(ResumePoint(known=frozenset({1, 2, 3})), frozenset({3}), frozenset()))
    assert (await claimed(store)).resume.known == {2, 3}  # 1 would be back if the whole set were written


async def test_ten_thousand_messages_are_saved_at_once(store: Store) -> None:
    claim = await claimed(store)
    await store.save(claim, first_save(*range(1, 10_001)))
    assert len((await claimed(store)).resume.known) == 10_000


@pytest.mark.parametrize(
    ("saves", "stops", "clean"),
    [
        pytest.param(False, None, False, id="died before its first save: it may have published"),
        pytest.param(True, None, False, id="died later"),
        pytest.param(True, False, False, id="stopped with something unconfirmed"),
        pytest.param(True, True, True, id="stopped with everything confirmed"),
        pytest.param(False, True, True, id="stopped before there was anything"),
    ],
)
async def test_the_next_claim_tells_how_the_last_follower_ended(
    store: Store, saves: bool, stops: bool | None, clean: bool
) -> None:
    claim = await claimed(store)
    if saves:
        await store.save(claim, first_save(1))
    if stops is not None:
        await store.release(claim, None, seen=None, clean=stops)
    expected = ResumePoint(known=frozenset({1}), after=1, clean=clean) if saves else ResumePoint(clean=clean)
    assert (await claimed(store)).resume == expected


async def test_a_live_claim_keeps_others_out_until_its_lease_ends(store: Store) -> None:
    await claimed(store, "a")
    assert await store.claim(CHAT, "b", lease_seconds=LONG) is None
    await claimed(store, "a", lease_seconds=0)
    assert (await claimed(store, "b")).session == 3


@pytest.mark.parametrize("known", [False, True], ids=["nobody followed it before", "it was followed before"])
async def test_of_many_workers_at_once_one_gets_the_chat(store: Store, known: bool) -> None:
    for round_ in range(1, 6):
        chat = ChatRef(SITE, UUID(int=100 + round_), ALICE, ALICE)
        if known:
            await store.release(await claimed(store, chat=chat), None, seen=None, clean=True)
        answers = await asyncio.gather(*(store.claim(chat, f"w{n}", lease_seconds=LONG) for n in range(10)))
        assert [claim.session for claim in answers if claim] == [2 if known else 1]


async def test_claims_of_other_chats_and_deployments_are_apart(store: Store) -> None:
    for chat in (CHAT, CHILD, ELSEWHERE):
        await store.save(await claimed(store, chat=chat), first_save(chat.chat_id.int))
    assert (await claimed(store, chat=ELSEWHERE)).session == 2
    assert (await claimed(store, chat=CHILD)).resume.known == {11}
    assert [record.chat for record in await store.records(SITE)] == [CHAT, CHILD]


@pytest.mark.parametrize("thief", ["a", "b"], ids=["the same worker after a restart", "another worker"])
async def test_a_lost_claim_writes_nothing(store: Store, thief: str) -> None:
    old = await claimed(store, "a", lease_seconds=0)
    await store.save(old, first_save(1))
    new = await claimed(store, thief)
    with pytest.raises(LostClaim, match="session 1"):
        await store.save(old, first_save(1, 2))
    await store.release(old, first_save(1, 2), seen="late", clean=True)
    assert await store.records(SITE) == [ChatRecord(CHAT, "", thief, clean=False)]
    await store.save(new, first_save(3))
    assert (await claimed(store, thief)).resume == ResumePoint(known=frozenset({1, 3}), after=3, clean=False)


async def test_a_lease_that_ran_out_may_still_save_while_nobody_took_the_chat(store: Store) -> None:
    claim = await claimed(store, lease_seconds=-1)
    await store.save(claim, first_save(1))  # the session is the fence, not the lease
    assert (await claimed(store, "b")).resume.known == {1}


async def test_a_released_claim_is_over(store: Store) -> None:
    claim = await claimed(store)
    await store.release(claim, first_save(1), seen="digest", clean=True)
    with pytest.raises(LostClaim):
        await store.save(claim, first_save(2))
    assert await store.records(SITE) == [ChatRecord(CHAT, "digest", None, clean=True)]
    assert (await claimed(store, "b")).resume == ResumePoint(known=frozenset({1}), after=1, clean=True)


async def test_release_without_a_digest_leaves_the_stored_one(store: Store) -> None:
    await store.release(await claimed(store), None, seen="digest", clean=True)
    await store.release(await claimed(store), None, seen=None, clean=False)
    assert await store.records(SITE) == [ChatRecord(CHAT, "digest", None, clean=False)]


async def test_renew_extends_what_is_live_and_revives_nothing(store: Store) -> None:
    await claimed(store, "a", CHAT)
    await claimed(store, "a", CHILD, lease_seconds=0)
    await claimed(store, "b", OTHER)
    assert await store.renew("a", lease_seconds=0) == {CHAT.chat_id}
    assert await store.renew("a", lease_seconds=LONG) == frozenset()
    assert [record.worker for record in await store.records(SITE)] == [None, None, "b"]


async def test_a_lease_lasts_as_many_seconds_as_it_says(store: Store, behind: Database) -> None:
    await claimed(store, lease_seconds=90)
    async with behind.reading() as connection:
        left = (await connection.execute(claims.select().add_columns(behind.now().label("now")))).one()
    assert timedelta(seconds=80) < left.lease_until - left.now <= timedelta(seconds=90)


@pytest.mark.parametrize("resume", [b"not json", b"[]", b"\xff", b'{"queue": [3]}', b"[" * 100_000])
async def test_a_resume_point_that_cannot_be_read_stops_the_relay(
    store: Store, behind: Database, resume: bytes
) -> None:
    await claimed(store)
    async with behind.writing() as connection:
        await connection.execute(update(claims).values(resume=resume))
    with pytest.raises(CorruptState):
        await store.claim(CHAT, "a", lease_seconds=LONG)


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
        id=UUID(int=number),
        family="usage",
        event="threshold",
        detail="user",
        chat=CHAT,
        data=cast(Data, data),
        time="2026-03-01T12:00:00Z",
        origin=Origin.LIVE,
        session=0,
        position=number,
        subject=str(ALICE),
    )


async def test_an_alert_fires_once_and_waits_until_it_was_published(store: Store) -> None:
    assert await store.raise_alert("k\x00", alert(80)) is True
    assert await store.raise_alert("k\x00", alert(81)) is False
    assert await store.unpublished_alerts() == [("k\x00", alert(80))]
    await store.alert_published("k\x00")
    await store.alert_published("k\x00")
    assert await store.unpublished_alerts() == []
    assert await store.raise_alert("k\x00", alert(80)) is False


async def test_alerts_wait_oldest_first(store: Store, clock: Clock) -> None:
    for key in ("b", "a", "c"):
        await store.raise_alert(key, alert(1))
        await clock.sleep(1)
    assert [key for key, _ in await store.unpublished_alerts()] == ["b", "a", "c"]


async def test_of_many_meters_at_once_one_raises_the_alert(store: Store) -> None:
    answers = await asyncio.gather(*(store.raise_alert("key", alert(n)) for n in range(20)))
    assert answers.count(True) == 1


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
