"""Laws of claims, whatever the sequence, whichever the store: one live owner at most, no word from a stale one."""

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from relay.adapters.database import Database, DatabaseSettings
from relay.adapters.memory_claims import MemoryClaims
from relay.adapters.store import open_store
from relay.core.claims import Peer
from relay.core.errors import LostClaim
from relay.core.events import ChatRef
from relay.core.resume import Commit, ResumePoint
from relay.ports import ChatRecord, Claim, Claims, Clock
from tests.adapters.test_claims import place  # noqa: F401  # a fixture
from tests.extent import as_many

PassTime = Callable[[float], Awaitable[None]]
examples = settings(
    max_examples=as_many(quick=10, long=30), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_numbers = itertools.count()


@pytest.fixture
async def store_and_time(
    place: DatabaseSettings | None,  # noqa: F811
    clock: Clock,
) -> AsyncIterator[tuple[Claims, PassTime]]:
    """A store and how to let time pass for it. One store serves all examples."""
    if place is None:
        yield MemoryClaims(clock), clock.sleep
        return
    async with open_store(place, clock) as store, Database(place, clock) as behind:

        async def leases_end_sooner(seconds: float) -> None:
            # PostgreSQL's clock is not ours to set: to a lease it is the same.
            async with behind.writing() as connection:
                sooner = text("UPDATE workers SET lease_until = lease_until - make_interval(secs => :seconds)")
                await connection.execute(sooner, {"seconds": seconds})

        yield store, clock.sleep if place.sqlite else leases_end_sooner


@dataclass
class Row:
    """What the row of one chat should be."""

    chat: ChatRef
    session: int = 0
    worker: str | None = None
    clean: bool = True
    seen: str = ""
    wanted: bool = False
    point: ResumePoint = field(default_factory=ResumePoint)

    def holds(self, claim: Claim) -> bool:
        return (self.session, self.worker) == (claim.session, claim.worker)

    def store(self, commit: Commit) -> None:
        self.point = commit.onto(self.point.known)

    def take(self, worker: str) -> Claim:
        claim = Claim(self.chat, worker, self.session + 1, msgspec.structs.replace(self.point, clean=self.clean))
        self.session, self.worker, self.clean, self.wanted = claim.session, worker, False, True
        return claim


class Model:
    """Chats, and workers with the time at which their leases end."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.now = 0.0
        self.site = f"https://{number}.example"
        self.rows = {n: Row(ChatRef(self.site, UUID(int=n), UUID(int=1), UUID(int=n))) for n in (1, 2)}
        self.names = {name: f"{name}-{number}-0" for name in "abc"}
        self.leases: dict[str, float] = {}
        self.made: list[Claim] = []

    def live(self, worker: str | None) -> bool:
        return worker is not None and self.leases.get(worker, 0.0) > self.now

    def orphans(self) -> dict[UUID, Row]:
        return {r.chat.chat_id: r for r in self.rows.values() if r.wanted and not self.live(r.worker)}

    def records(self) -> list[ChatRecord]:
        return [
            ChatRecord(row.chat, row.seen, row.worker if self.live(row.worker) else None, row.clean)
            for row in self.rows.values()
            if row.session > 0
        ]


WORKERS, CHATS = st.sampled_from("abc"), st.integers(1, 2)
LEASES = st.sampled_from([100.0, 200.0])
OF_CLAIM = st.integers(0, 9)  # which of the claims made so far, from the newest; taken modulo
SETS = st.frozensets(st.integers(1, 8), max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enlist"), WORKERS, LEASES),
        st.tuples(st.just("renew"), WORKERS, LEASES),
        st.tuples(st.just("resign"), WORKERS),
        st.tuples(st.just("time"), st.sampled_from([50.0, 100.0])),
        st.tuples(st.just("claim"), WORKERS, CHATS),
        st.tuples(st.just("claim"), WORKERS, CHATS),
        st.tuples(st.just("adopt"), WORKERS, st.integers(1, 2)),
        st.tuples(st.just("save"), OF_CLAIM, SETS, SETS),
        st.tuples(st.just("release"), OF_CLAIM, SETS | st.none(), st.sampled_from([None, "x", "y"]), st.booleans()),
    ),
    min_size=8,
    max_size=20,
)


async def step(  # noqa: PLR0912  # a branch per call
    store: Claims, pass_time: PassTime, model: Model, number: int, what: tuple[object, ...]
) -> None:
    match what:
        case ("enlist", str(name), float(lease)):
            if not model.live(model.names[name]):  # it begins anew, under another id
                worker = model.names[name] = f"{model.names[name].rpartition('-')[0]}-{number}"
                await store.enlist(Peer(worker, None, 0.0, 1), model.site, lease_seconds=lease)
                model.leases[worker] = model.now + lease
        case ("renew", str(name), float(lease)):
            worker = model.names[name]
            told = Peer(worker, None, float(number), number)
            peers = await store.renew(told, lease_seconds=lease)
            assert (peers is not None) is model.live(worker)
            if peers is not None:
                model.leases[worker] = model.now + lease
                assert [peer.worker for peer in peers] == sorted(filter(model.live, model.leases))
                assert told in peers
        case ("resign", str(name)):
            worker = model.names[name]
            await store.resign(worker)
            if model.leases.pop(worker, None) is not None:
                for row in model.rows.values():
                    row.worker = None if row.worker == worker else row.worker
        case ("time", float(seconds)):
            await pass_time(seconds)
            model.now += seconds
        case ("claim", str(name), int(chat)):
            worker, row = model.names[name], model.rows[chat]
            if not model.live(worker):
                with pytest.raises(LostClaim):
                    await store.claim(row.chat, worker)
            elif model.live(row.worker) and row.worker != worker:
                assert await store.claim(row.chat, worker) is None
            else:
                claim = row.take(worker)
                assert await store.claim(row.chat, worker) == claim
                model.made.append(claim)
        case ("adopt", str(name), int(limit)):
            orphans = model.orphans() if model.live(model.names[name]) else {}
            adopted = await store.adopt(model.names[name], limit=limit)
            assert len(adopted) == min(limit, len(orphans))
            for claim in adopted:
                assert claim == orphans[claim.chat.chat_id].take(model.names[name])
            model.made += adopted
        case ("save", int(which), frozenset() as added, frozenset() as removed) if model.made:
            claim, commit = model.made[-1 - which % len(model.made)], Commit(ResumePoint(after=number), added, removed)
            row = model.rows[claim.chat.chat_id.int]
            commit = msgspec.structs.replace(commit, removed=removed - added)
            if row.holds(claim):
                await store.save(claim, commit)
                row.store(commit)
            else:
                with pytest.raises(LostClaim):
                    await store.save(claim, commit)
        case ("release", int(which), added, seen, bool(clean)) if model.made:
            assert isinstance(added, frozenset | None)
            assert isinstance(seen, str | None)
            claim = model.made[-1 - which % len(model.made)]
            row = model.rows[claim.chat.chat_id.int]
            last = None if added is None else Commit(ResumePoint(after=number), added, frozenset())
            await store.release(claim, last, seen=seen, clean=clean)
            if row.holds(claim):
                row.worker, row.clean = None, clean
                if seen is not None:
                    row.seen, row.wanted = seen, False
                if last is not None:
                    row.store(last)


@examples
@given(STEPS)
async def test_rivals_for_chats_never_write_over_each_other(
    store_and_time: tuple[Claims, PassTime], steps: list[tuple[object, ...]]
) -> None:
    store, pass_time = store_and_time
    model = Model()
    beginning = [("enlist", name, 200.0) for name in "ab"]
    for number, what in enumerate([*beginning, *steps], start=1):
        await step(store, pass_time, model, number, what)
        assert await store.records(model.site) == model.records()
        worker = model.names["abc"[number % 3]]
        assert await store.orphans(worker) == (len(model.orphans()) if model.live(worker) else 0)
    for chat in (1, 2):
        sessions = [claim.session for claim in model.made if claim.chat.chat_id.int == chat]
        assert sessions == list(range(1, len(sessions) + 1))
