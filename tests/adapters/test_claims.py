"""What `Claims` promises, kept by both databases and by the twin in memory."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import delete, select, update

from relay.adapters.database import Database, DatabaseSettings
from relay.adapters.memory_claims import MemoryClaims
from relay.adapters.migrations.tables import claims, known_messages, workers
from relay.adapters.store import SqlStore, open_store
from relay.core.claims import Peer
from relay.core.errors import CorruptState, LostClaim
from relay.core.events import ChatRef
from relay.core.resume import Commit, QueueEntry, ResumePoint
from relay.ports import ChatRecord, Claim, Claims, Clock

SITE = "https://coder.example"
ALICE, BOB = UUID(int=1), UUID(int=2)
CHAT = ChatRef(SITE, UUID(int=10), ALICE, UUID(int=10))
CHILD = ChatRef(SITE, UUID(int=11), ALICE, UUID(int=10))
OTHER = ChatRef(SITE, UUID(int=12), BOB, UUID(int=12))
ELSEWHERE = ChatRef("https://other.example", UUID(int=10), ALICE, UUID(int=10))
LONG = 3600.0


@pytest.fixture(params=["sqlite", "postgres", "memory"])
def place(request: pytest.FixtureRequest) -> DatabaseSettings | None:
    """Where claims are kept; None: in memory."""
    return None if request.param == "memory" else request.getfixturevalue(f"{request.param}_settings")


@pytest.fixture
async def store(place: DatabaseSettings | None, clock: Clock) -> AsyncIterator[Claims]:
    """Every test that takes it runs against all three."""
    if place is None:
        yield MemoryClaims(clock)
        return
    async with open_store(place, clock) as opened:
        yield opened


@pytest.fixture
async def sql_store(database_settings: DatabaseSettings, clock: Clock) -> AsyncIterator[SqlStore]:
    async with open_store(database_settings, clock) as opened:
        yield opened


async def working(
    store: Claims, worker: str, *, lease_seconds: float = LONG, accounts: Iterable[UUID] | None = None
) -> None:
    """See that the worker has a lease of so many seconds from now."""
    peer = Peer(worker, None if accounts is None else frozenset(accounts), 0.0, 1)
    if await store.renew(peer, lease_seconds=lease_seconds) is None:
        await store.enlist(peer, SITE, lease_seconds=lease_seconds)


async def claimed(store: Claims, worker: str = "a", chat: ChatRef = CHAT) -> Claim:
    """A claim of a worker, which is enlisted if it was not."""
    await working(store, worker)
    claim = await store.claim(chat, worker)
    assert claim is not None
    return claim


def first_save(*ids: int) -> Commit:
    return Commit(ResumePoint(known=frozenset(ids), after=max(ids)), added=frozenset(ids), removed=frozenset())


# --- resume points -------------------------------------------------------------------------------------------------


async def test_a_chat_nobody_followed_begins_clean_and_empty(store: Claims) -> None:
    assert await claimed(store) == Claim(CHAT, "a", 1, ResumePoint(clean=True))


async def test_the_next_claim_goes_on_where_the_last_save_was(store: Claims) -> None:
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


async def test_a_save_takes_removed_ids_away(store: Claims) -> None:
    claim = await claimed(store)
    await store.save(claim, first_save(1, 2, 3))
    after = Commit(ResumePoint(known=frozenset({1, 4})), added=frozenset({4}), removed=frozenset({2, 3}))
    await store.save(claim, after)
    await store.save(claim, after)  # the answer to the first may have been lost
    assert (await claimed(store)).resume.known == {1, 4}


async def test_an_id_that_is_both_removed_and_added_is_there(store: Claims) -> None:
    claim = await claimed(store)
    await store.save(claim, first_save(1, 2))
    await store.save(claim, Commit(ResumePoint(known=frozenset({1, 2})), frozenset({2}), frozenset({2})))
    assert (await claimed(store)).resume.known == {1, 2}


async def test_a_save_writes_the_difference_only(sql_store: SqlStore, behind: Database) -> None:
    claim = await claimed(sql_store)
    await sql_store.save(claim, first_save(1, 2))
    async with behind.writing() as connection:
        await connection.execute(delete(known_messages).where(known_messages.c.message_id == 1))
    await sql_store.save(claim, Commit(ResumePoint(known=frozenset({1, 2, 3})), frozenset({3}), frozenset()))
    assert (await claimed(sql_store)).resume.known == {2, 3}  # 1 would be back if the whole set were written


async def test_ten_thousand_messages_are_saved_at_once(store: Claims) -> None:
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
    store: Claims, saves: bool, stops: bool | None, clean: bool
) -> None:
    claim = await claimed(store)
    if saves:
        await store.save(claim, first_save(1))
    if stops is not None:
        await store.release(claim, None, seen=None, clean=stops)
    expected = ResumePoint(known=frozenset({1}), after=1, clean=clean) if saves else ResumePoint(clean=clean)
    assert (await claimed(store)).resume == expected


@pytest.mark.parametrize("resume", [b"not json", b"[]", b"\xff", b'{"queue": [3]}', b"[" * 100_000])
async def test_a_resume_point_that_cannot_be_read_stops_the_relay(
    sql_store: SqlStore, behind: Database, resume: bytes
) -> None:
    await claimed(sql_store)
    async with behind.writing() as connection:
        await connection.execute(update(claims).values(resume=resume))
    with pytest.raises(CorruptState):
        await sql_store.claim(CHAT, "a")


async def test_claims_of_other_chats_and_deployments_are_apart(store: Claims) -> None:
    for chat in (CHAT, CHILD, ELSEWHERE):
        await store.save(await claimed(store, chat=chat), first_save(chat.chat_id.int))
    assert (await claimed(store, chat=ELSEWHERE)).session == 2
    assert (await claimed(store, chat=CHILD)).resume.known == {11}
    assert [record.chat for record in await store.records(SITE)] == [CHAT, CHILD]


async def test_records_come_in_pages_and_by_name(store: Claims) -> None:
    for chat in (CHAT, CHILD, OTHER, ELSEWHERE):
        await claimed(store, chat=chat)
    first = await store.records(SITE, limit=2)
    rest = await store.records(SITE, after=first[-1].chat.chat_id, limit=2)
    assert [[record.chat for record in page] for page in (first, rest)] == [[CHAT, CHILD], [OTHER]]
    named = await store.records_of(SITE, [OTHER.chat_id, UUID(int=99), CHAT.chat_id])
    assert [record.chat for record in named] == [CHAT, OTHER]


# --- leases --------------------------------------------------------------------------------------------------------


async def test_a_live_lease_keeps_others_out_until_it_ends(store: Claims) -> None:
    await claimed(store, "a")
    await working(store, "b")
    assert await store.claim(CHAT, "b") is None
    await working(store, "a", lease_seconds=0)
    assert (await claimed(store, "b")).session == 2


async def test_renewing_one_lease_keeps_all_claims_of_the_worker(store: Claims) -> None:
    await working(store, "a", lease_seconds=5)
    for chat in (CHAT, CHILD):
        assert await store.claim(chat, "a") is not None
    await working(store, "a")
    assert [record.worker for record in await store.records(SITE)] == ["a", "a"]


async def test_a_lease_that_ran_out_is_not_revived(store: Claims) -> None:
    await working(store, "a")
    old = await claimed(store, "a")
    assert await store.renew(Peer("a", None, 1.0, 1), lease_seconds=0) is not None
    assert await store.renew(Peer("a", None, 1.0, 1), lease_seconds=LONG) is None
    assert [record.worker for record in await store.records(SITE)] == [None]
    with pytest.raises(LostClaim):
        await store.claim(CHILD, "a")
    assert await store.adopt("a", limit=9) == []
    assert await store.orphans("a") == 0
    await working(store, "a2")  # the same worker under another id is another worker
    assert (await claimed(store, "a2")).session == old.session + 1


async def test_a_worker_can_ask_what_it_holds(store: Claims) -> None:
    for worker, chat in (("a", CHAT), ("a", CHILD), ("b", OTHER)):
        await claimed(store, worker, chat)
    await store.release(await claimed(store, "a", CHILD), None, seen="digest", clean=True)
    assert await store.holdings("a") == [CHAT]
    await working(store, "a", lease_seconds=0)
    assert await store.holdings("a") == []


async def test_a_worker_that_never_enlisted_claims_nothing(store: Claims) -> None:
    with pytest.raises(LostClaim, match="nobody"):
        await store.claim(CHAT, "nobody")
    assert await store.renew(Peer("nobody", None, 0.0, 0), lease_seconds=LONG) is None


async def test_a_worker_that_resigns_gives_all_up_at_once(store: Claims) -> None:
    held = await claimed(store, "a", CHAT)
    await claimed(store, "a", CHILD)
    await store.resign("a")
    with pytest.raises(LostClaim):
        await store.save(held, first_save(1))
    await store.resign("a")
    assert [record.worker for record in await store.records(SITE)] == [None, None]
    assert (await claimed(store, "b")).resume.clean is False


async def test_workers_of_a_deployment_know_each_other(store: Claims) -> None:
    a, b = Peer("a", frozenset({ALICE}), 1.0, 5), Peer("b", None, 2.0, 6)
    await store.enlist(a, SITE, lease_seconds=LONG)
    await store.enlist(b, SITE, lease_seconds=LONG)
    await store.enlist(Peer("c", None, 3.0, 7), ELSEWHERE.deployment, lease_seconds=LONG)
    await store.enlist(Peer("d", None, 3.0, 7), SITE, lease_seconds=0)
    busier = replace(b, load=9.5, free=0)
    assert await store.renew(busier, lease_seconds=LONG) == [a, busier]
    await store.resign("b")
    assert await store.renew(a, lease_seconds=LONG) == [a]


async def test_rows_of_dead_workers_are_cleaned_up(sql_store: SqlStore, behind: Database) -> None:
    for number in range(5):
        await sql_store.enlist(Peer(f"w{number}", None, 0.0, 1), SITE, lease_seconds=0)
    await working(sql_store, "a")
    async with behind.reading() as connection:
        assert (await connection.execute(select(workers.c.worker))).scalars().all() == ["a"]


async def test_a_lease_lasts_as_many_seconds_as_it_says(sql_store: SqlStore, behind: Database) -> None:
    await working(sql_store, "a", lease_seconds=90)
    async with behind.reading() as connection:
        left = (await connection.execute(workers.select().add_columns(behind.now().label("now")))).one()
    assert timedelta(seconds=80) < left.lease_until - left.now <= timedelta(seconds=90)


# --- who holds what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["nobody followed it before", "it was followed before"])
async def test_of_many_workers_at_once_one_gets_the_chat(store: Claims, known: bool) -> None:
    for number in range(10):
        await working(store, f"w{number}")
    for round_ in range(1, 6):
        chat = ChatRef(SITE, UUID(int=100 + round_), ALICE, ALICE)
        if known:
            await store.release(await claimed(store, chat=chat), None, seen=None, clean=True)
        answers = await asyncio.gather(*(store.claim(chat, f"w{n}") for n in range(10)))
        assert [claim.session for claim in answers if claim] == [2 if known else 1]


async def test_many_chats_are_claimed_at_once(store: Claims) -> None:
    await working(store, "a")
    chats = [ChatRef(SITE, UUID(int=1000 + number), ALICE, ALICE) for number in range(120)]
    await store.save(await claimed(store, chat=chats[7]), first_save(5))
    answers = await asyncio.gather(*(store.claim(chat, "a") for chat in chats))
    assert [(claim.chat, claim.session) for claim in answers if claim] == [
        (chat, 2 if chat == chats[7] else 1) for chat in chats
    ]
    assert [claim.resume.known for claim in answers if claim and claim.resume.known] == [{5}]


@pytest.mark.parametrize("thief", ["a", "b"], ids=["the same worker", "another worker"])
async def test_a_lost_claim_writes_nothing(store: Claims, thief: str) -> None:
    old = await claimed(store, "a")
    await store.save(old, first_save(1))
    if thief == "b":
        await store.resign("a")
    new = await claimed(store, thief)
    with pytest.raises(LostClaim, match="session 1"):
        await store.save(old, first_save(1, 2))
    await store.release(old, first_save(1, 2), seen="late", clean=True)
    assert await store.records(SITE) == [ChatRecord(CHAT, "", thief, clean=False)]
    await store.save(new, first_save(3))
    assert (await claimed(store, thief)).resume == ResumePoint(known=frozenset({1, 3}), after=3, clean=False)


async def test_after_the_lease_the_last_save_counts_while_nobody_took_the_chat(store: Claims) -> None:
    claim = await claimed(store)
    await working(store, "a", lease_seconds=0)
    await store.save(claim, first_save(1))  # the session is the fence, not the lease
    assert (await claimed(store, "b")).resume.known == {1}


async def test_a_released_claim_is_over(store: Claims) -> None:
    claim = await claimed(store)
    await store.release(claim, first_save(1), seen="digest", clean=True)
    with pytest.raises(LostClaim):
        await store.save(claim, first_save(2))
    assert await store.records(SITE) == [ChatRecord(CHAT, "digest", None, clean=True)]
    assert (await claimed(store, "b")).resume == ResumePoint(known=frozenset({1}), after=1, clean=True)


async def test_release_without_a_digest_leaves_the_stored_one(store: Claims) -> None:
    await store.release(await claimed(store), None, seen="digest", clean=True)
    await store.release(await claimed(store), None, seen=None, clean=False)
    assert await store.records(SITE) == [ChatRecord(CHAT, "digest", None, clean=False)]


async def test_many_claims_are_saved_and_released_at_once_each_with_its_own_result(store: Claims) -> None:
    chats = [ChatRef(SITE, UUID(int=1000 + number), ALICE, ALICE) for number in range(30)]
    held = [await claimed(store, chat=chat) for chat in chats]
    lost = [await claimed(store, chat=chat) for chat in chats[::3]]  # every third was claimed anew

    async def save(claim: Claim) -> bool:
        try:
            await store.save(claim, first_save(claim.chat.chat_id.int))
            await store.release(claim, None, seen="digest", clean=True)
        except LostClaim:
            return False
        return True

    assert await asyncio.gather(*map(save, held)) == [number % 3 != 0 for number in range(30)]
    assert await asyncio.gather(*map(save, lost)) == [True] * 10
    for chat in chats:
        assert (await claimed(store, chat=chat)).resume.known == {chat.chat_id.int}


# --- orphans -------------------------------------------------------------------------------------------------------


async def test_the_chats_of_a_dead_worker_are_adopted(store: Claims) -> None:
    await store.save(await claimed(store, "a", CHAT), first_save(1))
    await claimed(store, "a", CHILD)
    await claimed(store, "b", OTHER)
    await working(store, "b")
    assert await store.orphans("b") == 0
    assert await store.adopt("b", limit=9) == []
    await working(store, "a", lease_seconds=0)
    assert await store.orphans("b") == 2
    (one,) = await store.adopt("b", limit=1)
    (other,) = await store.adopt("b", limit=9)
    by_chat = {claim.chat: claim for claim in (one, other)}
    assert by_chat == {
        CHAT: Claim(CHAT, "b", 2, ResumePoint(known=frozenset({1}), after=1, clean=False)),
        CHILD: Claim(CHILD, "b", 2, ResumePoint(clean=False)),
    }
    assert await store.orphans("b") == 0


async def test_only_what_was_let_go_in_the_middle_of_things_is_adopted(store: Claims) -> None:
    await working(store, "b")
    await store.release(await claimed(store, "a", CHAT), None, seen="digest", clean=True)
    assert await store.orphans("b") == 0
    await store.release(await claimed(store, "a", CHAT), None, seen=None, clean=True)
    assert await store.orphans("b") == 1
    (claim,) = await store.adopt("b", limit=9)
    assert (claim.session, claim.resume.clean) == (3, True)


async def test_a_worker_adopts_only_chats_that_it_can_read(store: Claims) -> None:
    await working(store, "bobs", accounts=[BOB])
    await working(store, "both", accounts=[ALICE, BOB])
    for chat in (CHAT, OTHER, ELSEWHERE):
        await claimed(store, "a", chat)
    await store.resign("a")
    assert [await store.orphans(worker) for worker in ("bobs", "both")] == [1, 2]
    assert [claim.chat for claim in await store.adopt("bobs", limit=9)] == [OTHER]
    assert [claim.chat for claim in await store.adopt("both", limit=9)] == [CHAT]


async def test_a_worker_tells_with_each_renewal_whose_chats_it_can_read(store: Claims) -> None:
    """Its tokens may be accepted, or refused, at any time."""
    await working(store, "b", accounts=[BOB])
    await claimed(store, "a", CHAT)
    await store.resign("a")
    assert await store.orphans("b") == 0
    both = Peer("b", frozenset({ALICE, BOB}), 0.0, 1)
    assert await store.renew(both, lease_seconds=LONG) == [both]
    assert await store.orphans("b") == 1
    assert [claim.chat for claim in await store.adopt("b", limit=9)] == [CHAT]


async def test_who_leaves_during_a_look_has_no_orphans(store: Claims) -> None:
    await claimed(store, "a")
    await working(store, "b")
    look = asyncio.create_task(store.orphans("b"))
    await asyncio.sleep(0)  # it waits for a connection
    await store.resign("b")
    assert await look == 0


async def test_of_many_workers_at_once_each_orphan_goes_to_one(store: Claims) -> None:
    chats = [ChatRef(SITE, UUID(int=1000 + number), ALICE, ALICE) for number in range(40)]
    await asyncio.gather(*[claimed(store, "a", chat) for chat in chats[:1]])
    for chat in chats:
        await claimed(store, "a", chat)
    heirs = [f"w{number}" for number in range(4)]
    for heir in heirs:
        await working(store, heir)
    await store.resign("a")

    async def adopt(worker: str) -> list[Claim]:
        mine: list[Claim] = []
        while await store.orphans(worker):
            mine += await store.adopt(worker, limit=3)
        return mine

    adopted = [claim for each in await asyncio.gather(*map(adopt, heirs)) for claim in each]
    assert sorted(claim.chat.chat_id for claim in adopted) == [chat.chat_id for chat in chats]
