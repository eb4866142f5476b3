"""Several workers and the chats between them: shares, heirs, and workers that stood still."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.coder import CoderSettings, CoderUpstream
from relay.adapters.coder_accounts import open_accounts
from relay.adapters.memory_claims import MemoryClaims
from relay.core.claims import Peer
from relay.core.errors import Unavailable
from relay.core.events import ChatRef, Event
from relay.programs import follow
from relay.programs.discovery import Sighting
from relay.programs.worker import Worker
from tests.programs.test_follow import spoken
from tests.programs.test_worker import LONG, chats_of
from tests.programs.world import FOLLOW, WORKER, World, counted, until, while_running

ENDLESS = "[text n=3000 ms=20] a very long answer"


class SteppedClock(SystemClock):
    """A monotonic clock that can be set forward, as it has gone on when a frozen process wakes."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead


class HeldUp:
    """An adapter whose calls wait while it is held, as those of a process that is frozen do."""

    def __init__(self, adapter: Any, *, hold: tuple[str, ...], calls: int | None = None) -> None:
        self._adapter = adapter
        self._hold = hold
        self._left = calls  # how many are held; None: all
        self._free = asyncio.Event()
        self._free.set()
        self.asked = 0  # calls of those that may be held

    def hold(self) -> None:
        self._free.clear()

    def let_go(self) -> None:
        self._free.set()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._adapter, name)
        if name not in self._hold:
            return attribute

        async def call(*args: Any, **named: Any) -> Any:
            self.asked += 1
            if self._left is None:
                await self._free.wait()
            elif self._left > 0 and not self._free.is_set():
                self._left -= 1
                await self._free.wait()
            return await attribute(*args, **named)

        return call


class LateAdoption:
    """Claims whose answer to an adoption that has been made comes late."""

    def __init__(self, claims: MemoryClaims) -> None:
        self._claims = claims
        self.adopted = asyncio.Event()
        self.answered = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._claims, name)

    async def adopt(self, worker: str, *, limit: int) -> Any:
        adopted = await self._claims.adopt(worker, limit=limit)
        self.adopted.set()
        await self.answered.wait()
        return adopted


class Deaf:
    """An upstream whose watch socket loses two frames of three."""

    def __init__(self, upstream: CoderUpstream, chance: Random) -> None:
        self._upstream = upstream
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._upstream, name)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[str]]:
        async with self._upstream.watch() as frames:

            async def some() -> AsyncIterator[str]:
                async for frame in frames:
                    if self._chance.random() < 1 / 3:
                        yield frame

            yield some()


def a_worker(world: World, name: str, **changed: Any) -> Worker:
    """With other adapters or settings than those of the world."""
    return Worker(
        name,
        upstream=changed.pop("upstream", world.upstream),
        bus=changed.pop("bus", world.bus),
        claims=changed.pop("claims"),
        clock=changed.pop("clock", SystemClock()),
        settings=WORKER.model_copy(update=changed),
        follow=FOLLOW,
    )


@asynccontextmanager
async def working(world: World, name: str, **changed: Any) -> AsyncIterator[Worker]:
    """Such a worker, while the block runs."""
    worker = a_worker(world, name, **changed)
    async with while_running(worker.run()):
        yield worker


def standstill() -> Callable[[], bool]:
    """Whether a worker has lost its chats since, as on a machine that is too busy to renew leases of a second."""
    before = counted("relay_leases_lost_total")
    return lambda: counted("relay_leases_lost_total") > before


def of_heirs(world: World, chat: UUID) -> list[Event]:
    return [event for event in world.bus.published if event.chat.chat_id == chat and event.session > 1]


@pytest.fixture
def claims() -> MemoryClaims:
    return MemoryClaims(SystemClock())


# --- shares --------------------------------------------------------------------------------------------------------


async def test_three_workers_share_and_a_fourth_gets_its_part(world: World, claims: MemoryClaims) -> None:
    stood_still = standstill()
    async with (
        working(world, "a", claims=claims, lease_seconds=1.5) as a,
        working(world, "b", claims=claims, lease_seconds=1.5) as b,
    ):
        await until(lambda: len(a.state.peers) == len(b.state.peers) == 2)
        chats = set(await chats_of(world, 18, ENDLESS))

        def spread(*workers: Worker) -> Callable[[], bool]:
            return lambda: set().union(*(w.state.followed for w in workers)) == chats

        await until(spread(a, b))
        given = counted("relay_chats_moved_total", how="given")
        async with working(world, "c", claims=claims, lease_seconds=1.5) as c:
            # Shares are even to within what is too little to move chats for: two, of the six that each should have.
            await until(
                lambda: max(len(w.state.followed) for w in (a, b, c)) <= 8 and spread(a, b, c)(),
                lambda: "\n".join(str(w.status()) for w in (a, b, c)),
            )
            held = [w.state.followed for w in (a, b, c)]
            assert sum(map(len, held)) == len(set().union(*held)) == 18 or stood_still()
            assert counted("relay_chats_moved_total", how="given") > given or stood_still()
        # It stops: the others have its chats at once, not after its lease.
        await until(spread(a, b))
        told_again = stood_still()
    facts = [e.id for e in world.bus.published if e.event in ("message", "turn", "history", "lifecycle")]
    assert len(facts) == len(set(facts)) or told_again  # a machine that lets leases run out makes heirs tell again


async def test_chats_that_wait_for_the_broker_stay_where_they_are(world: World, claims: MemoryClaims) -> None:
    stood_still = standstill()
    async with working(world, "a", claims=claims, lease_seconds=1.5) as a:
        chats = set(await chats_of(world, 8, ENDLESS))
        await until(lambda: a.state.followed == chats and len(world.bus.published) > 100)
        world.bus.down = True
        await asyncio.sleep(1.3)  # each has had something to say for a second by then
        given = counted("relay_chats_moved_total", how="given")
        async with working(world, "b", claims=claims, lease_seconds=1.5) as b:
            await until(lambda: len(a.state.peers) == 2)
            await asyncio.sleep(3.5)  # shares are looked at once a lease
            assert counted("relay_chats_moved_total", how="given") == given or stood_still()
            world.bus.down = False
            await until(lambda: len(b.state.followed) >= 3)
    assert stood_still() or not [event for event in world.bus.published if event.event == "history"]


async def test_chats_that_are_given_up_as_the_broker_goes_away_are_stated_once(
    world: World, claims: MemoryClaims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave when it is back: an heir cannot know whether what was on its way has arrived."""
    stood_still = standstill()
    monkeypatch.setattr(follow, "_HELD_UP_SECONDS", 3600.0)  # as if it had gone this moment
    monkeypatch.setattr(follow, "_FINISH_SECONDS", 0.2)
    async with working(world, "a", claims=claims, lease_seconds=1.5) as a:
        chats = set(await chats_of(world, 8, ENDLESS))
        await until(lambda: a.state.followed == chats and len(world.bus.published) > 100)
        given = counted("relay_chats_moved_total", how="given")
        world.bus.down = True
        async with working(world, "b", claims=claims, lease_seconds=1.5) as b:
            await until(lambda: counted("relay_chats_moved_total", how="given") > given)
            await asyncio.sleep(1.0)
            assert a.state.followed == chats or stood_still()
            world.bus.down = False
            await until(lambda: len(b.state.followed) >= 3)
    assert stood_still() or not [event for event in world.bus.published if event.event == "history"]


async def test_a_worker_alone_takes_what_another_has_no_room_for(world: World, claims: MemoryClaims) -> None:
    async with (
        working(world, "small", claims=claims, max_streams=1) as small,
        working(world, "large", claims=claims) as large,
    ):
        await until(lambda: len(small.state.peers) == len(large.state.peers) == 2)
        chats = set(await chats_of(world, 6, ENDLESS))
        await until(lambda: small.state.followed | large.state.followed == chats)
        assert len(small.state.followed) <= 1


async def test_all_workers_together_keep_below_the_limit_of_the_server(world: World, claims: MemoryClaims) -> None:
    async with (
        working(world, "a", claims=claims, max_streams_per_server=4) as a,
        working(world, "b", claims=claims, max_streams_per_server=4) as b,
    ):
        await until(lambda: len(a.state.peers) == len(b.state.peers) == 2)
        await chats_of(world, 8, ENDLESS)
        await until(lambda: len(a.state.followed) == len(b.state.followed) == 2)
        await until(lambda: a.status()["waiting"] or b.status()["waiting"])
        assert len(world.simulator.streams()) <= 4


# --- heirs ---------------------------------------------------------------------------------------------------------


async def test_a_worker_that_stops_leaves_its_chats_to_others_which_see_it_by_themselves(
    world: World, claims: MemoryClaims
) -> None:
    chats = set(await chats_of(world, 4, ENDLESS))
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(working(world, "old", claims=claims, lease_seconds=600.0))
        await until(lambda: old.state.followed == chats)
        world.simulator.faults.add("answer", status=503, path="*/watch")
        world.simulator.faults.add("answer", status=503, path="/api/experimental/chats")
        async with working(world, "heir", claims=claims, lease_seconds=600.0) as heir:
            await until(lambda: heir.state.peers)
            assert not heir.state.followed
            await stack.aclose()
            await until(lambda: heir.state.followed == chats)
            assert heir.discovery.state.sweeps == 0
    # A clean handover: nothing had to be told again.
    assert [event for chat in chats for event in world.told(chat, "chat.history.")] == []


async def test_a_worker_whose_lease_ran_out_begins_anew_under_another_name(world: World, claims: MemoryClaims) -> None:
    (chat,) = await chats_of(world, 1, ENDLESS)
    slow = HeldUp(claims, hold=("renew",))
    async with working(world, "a", claims=slow, lease_seconds=1.0) as worker:
        await until(lambda: worker.state.followed == {chat} and world.bus.published)
        first = worker.status()["worker"]
        lost = counted("relay_leases_lost_total")
        slow.hold()
        await until(lambda: not worker.state.followed)
        assert counted("relay_leases_lost_total") > lost
        slow.let_go()
        await until(lambda: worker.state.followed == {chat} and worker.status()["worker"] != first)
        before = world.bus.published[0].session
        await until(lambda: max(event.session for event in world.bus.published) > before)


async def test_a_chat_that_is_found_while_it_is_adopted_is_not_stated_anew(world: World, claims: MemoryClaims) -> None:
    """Claimed under two sessions at once, it would look as if somebody had died in the first."""
    (chat,) = await chats_of(world, 1, ENDLESS)
    async with working(world, "a", claims=claims):
        await spoken(world, chat)
    unlisted = world.simulator.faults.add("answer", status=503, path="/api/experimental/chats")
    unwatched = world.simulator.faults.add("answer", status=503, path="/api/experimental/chats/watch")
    late = LateAdoption(claims)
    async with working(world, "heir", claims=late) as heir:
        await late.adopted.wait()
        swept = heir.discovery.state.sweeps
        for fault in (unlisted, unwatched):
            world.simulator.faults.remove(fault.id)
        await until(lambda: heir.discovery.state.sweeps > swept + 1)
        late.answered.set()
        await until(lambda: heir.state.followed == {chat} and of_heirs(world, chat))
        told = len(of_heirs(world, chat))
        await until(lambda: len(of_heirs(world, chat)) > told + 10)
    assert not [event for event in world.bus.published if event.event == "history"]


async def test_who_stood_still_past_its_lease_says_no_stale_word(world: World, claims: MemoryClaims) -> None:
    """As after SIGSTOP and SIGCONT: whatever it was about to do comes late, and nobody has told it anything."""
    (chat,) = await chats_of(world, 1, ENDLESS)
    clock, bus = SteppedClock(), HeldUp(world.bus, hold=("publish",))
    store = HeldUp(claims, hold=("renew", "enlist"))
    async with working(world, "frozen", claims=store, clock=clock, bus=bus, lease_seconds=3.0) as frozen:
        await until(lambda: frozen.state.followed == {chat})
        await spoken(world, chat)
        store.hold()
        clock.ahead, asked = 3600.0, bus.asked  # it wakes
        await claims.resign(str(frozen.status()["worker"]))  # as if its lease had ended there, too
        async with working(world, "heir", claims=claims) as heir:
            await until(lambda: heir.state.followed == {chat} and of_heirs(world, chat))
            await until(lambda: not frozen.state.followed)
            assert bus.asked == asked
            store.let_go()
            await until(lambda: len(heir.state.peers) == 2)
            told = len(of_heirs(world, chat))
            await until(lambda: len(of_heirs(world, chat)) > told)
    # An heir that adopts the chat while it is about to claim it gives it back, and takes one number more.
    assert len({event.session for event in world.bus.published if event.session}) == 2
    assert world.in_order(chat)


async def test_who_is_stopped_while_it_learns_that_its_lease_is_lost_stops(world: World, claims: MemoryClaims) -> None:
    """As after SIGSTOP, SIGCONT and SIGTERM: a group that ends with an error forgets that it was cancelled as well."""
    (chat,) = await chats_of(world, 1, ENDLESS)
    clock, store, bus = SteppedClock(), HeldUp(claims, hold=("save",)), HeldUp(world.bus, hold=("publish",))
    worker = a_worker(world, "a", claims=store, clock=clock, bus=bus, lease_seconds=1.5)
    running = asyncio.create_task(worker.run())
    try:
        await until(lambda: worker.state.followed == {chat})
        (renewing,) = [task for task in asyncio.all_tasks() if task.get_name() == "renew"]
        for adapter in (store, bus):
            adapter.hold()
            asked = adapter.asked
            await until(lambda: adapter.asked > asked)  # noqa: B023
        clock.ahead = 3600.0
        await until(renewing.done)
        running.cancel()
        await asyncio.sleep(0.05)
        assert not running.done(), "nothing was on its way"
        store.let_go()
        await asyncio.wait([running], timeout=5.0)
        assert running.cancelled()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_stop_waits_for_a_store_that_takes_no_chat_back_no_longer_than_the_lease(
    world: World, claims: MemoryClaims
) -> None:
    """After it they are free anyway."""
    chats = [await world.ref(chat) for chat in await chats_of(world, 2, ENDLESS)]
    await claims.enlist(Peer("gone", None, 0.0, 2), chats[0].deployment, lease_seconds=600.0)
    assert all([await claims.claim(chat, "gone") for chat in chats])
    await claims.resign("gone")
    store = HeldUp(claims, hold=("release",))
    # One connects. The other is adopted, and waits for its turn.
    worker = a_worker(world, "a", claims=store, lease_seconds=3.0, dials_per_second=0.01)
    running = asyncio.create_task(worker.run())
    try:
        await until(lambda: worker.state.followed and worker.status()["streams"] == 2)
        store.hold()
        running.cancel()
        await until(running.done)
        assert store.asked == 2
    finally:
        store.let_go()
        running.cancel()
        await asyncio.wait([running])


async def test_a_slow_database_loses_no_lease_needlessly(world: World, claims: MemoryClaims) -> None:
    """One renewal hangs for ever: the next one is in time."""
    (chat,) = await chats_of(world, 1, ENDLESS)
    slow = HeldUp(claims, hold=("renew",), calls=1)
    async with working(world, "a", claims=slow, lease_seconds=1.5) as worker:
        await until(lambda: worker.state.followed == {chat})
        first = worker.status()["worker"]
        renewed = slow.asked
        slow.hold()
        await until(lambda: slow.asked >= renewed + 6)
        assert worker.status()["worker"] == first
        assert worker.state.followed == {chat}
    assert {event.session for event in world.bus.published if event.session} == {1}


class Forgetful:
    """A store that does what it is asked and whose answer is lost, each of some calls once."""

    def __init__(self, claims: MemoryClaims, *calls: str) -> None:
        self._claims = claims
        self.calls = set(calls)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._claims, name)
        if name not in self.calls:
            return attribute

        async def call(*args: Any, **named: Any) -> Any:
            answer = await attribute(*args, **named)
            if name in self.calls and answer != []:
                self.calls.remove(name)
                raise Unavailable("the answer was lost")
            return answer

        return call


@pytest.mark.parametrize("call", ["claim", "adopt"])
async def test_a_chat_that_is_held_without_knowing_is_followed_all_the_same(
    world: World, claims: MemoryClaims, call: str
) -> None:
    (chat,) = await chats_of(world, 1, ENDLESS)
    if call == "adopt":
        ref = await world.ref(chat)
        await claims.enlist(Peer("dead", None, 0.0, 1), ref.deployment, lease_seconds=600.0)
        assert await claims.claim(ref, "dead")
        world.simulator.faults.add("answer", status=503, path="*/watch")
        world.simulator.faults.add("answer", status=503, path="/api/experimental/chats")
    store = Forgetful(claims, call)
    async with working(world, "a", claims=store, lease_seconds=1.0) as worker:
        await until(lambda: worker.state.peers)
        await claims.resign("dead")
        await until(lambda: worker.state.followed == {chat})
        assert not store.calls


@pytest.mark.parametrize("over", [False, True], ids=["the lease lasts", "the lease ends"])
async def test_a_chat_that_waits_for_another_worker_is_followed_when_the_database_is_back(
    world: World, claims: MemoryClaims, over: bool
) -> None:
    (chat,) = await chats_of(world, 1, ENDLESS)
    sighting = Sighting(await world.ref(chat))
    world.simulator.faults.add("answer", status=503, path="*/watch")
    world.simulator.faults.add("answer", status=503, path="/api/experimental/chats")
    renewing = HeldUp(claims, hold=("renew",))
    store = HeldUp(renewing, hold=("records_of",))
    async with working(world, "a", claims=store, lease_seconds=1.0 if over else 600.0) as worker:
        await until(lambda: worker.state.peers)
        lease = worker.status()["worker"]
        if over:
            renewing.hold()
            store.hold()
        else:
            claims.down = True
        worker._deferred.put(sighting, 0.0)
        await until(lambda: store.asked and (worker.status()["worker"] != lease) is over)
        renewing.let_go()
        store.let_go()
        claims.down = False
        await until(lambda: worker.state.followed == {chat})


async def test_chats_of_an_account_that_is_accepted_late_are_adopted_as_the_others_are(
    world: World, claims: MemoryClaims, tmp_path: Path
) -> None:
    (chat,) = await chats_of(world, 1, ENDLESS)
    ref, users = await world.ref(chat), world.simulator.users
    await claims.enlist(Peer("dead", None, 0.0, 1), ref.deployment, lease_seconds=600.0)
    assert await claims.claim(ref, "dead")
    world.simulator.faults.add("answer", status=503, path="*/watch")
    world.simulator.faults.add("answer", status=503, path="/api/experimental/chats")
    file = tmp_path / "token"
    file.write_text(users["ann"].token[::-1])
    accounts = [{"name": "ann", "token_file": str(file)}, {"name": "bob", "token": users["bob"].token}]
    settings = {"url": world.simulator.url, "accounts": accounts, "refused_seconds": 0.2}
    async with (
        open_accounts(CoderSettings.model_validate(settings)) as upstream,
        working(world, "a", claims=claims, upstream=upstream, lease_seconds=1.0) as worker,
    ):

        def known_to_read() -> set[UUID]:
            return {owner for peer in worker.state.peers for owner in peer.accounts or ()}

        await until(lambda: known_to_read() == {users["bob"].id})
        await claims.resign("dead")
        file.write_text(users["ann"].token)
        await until(lambda: worker.state.followed == {chat})
        await until(lambda: known_to_read() == {users["ann"].id, users["bob"].id})


# --- many chats ----------------------------------------------------------------------------------------------------


async def test_without_watch_events_every_running_chat_is_followed_within_a_sweep(
    world: World, claims: MemoryClaims
) -> None:
    """Watch drops what it likes; the sweep closes the gap."""
    chance = Random(7)
    async with working(world, "a", claims=claims, upstream=Deaf(world.upstream, chance), sweep_seconds=0.5) as worker:
        await until(lambda: worker.discovery.state.watching)
        for _ in range(4):
            chats = set(await chats_of(world, 4, LONG))
            sweeps = worker.discovery.state.sweeps
            await until(lambda c=chats: c <= worker.state.followed)  # type: ignore[misc]
            assert worker.discovery.state.sweeps <= sweeps + 2
    assert chance.random() != Random(7).random()  # some were dropped


async def test_thousands_of_known_chats_cost_no_task_each(world: World, claims: MemoryClaims) -> None:
    async with working(world, "a", claims=claims, max_streams=3, sweep_seconds=3600.0) as worker:
        await until(lambda: worker.discovery.state.sweeps == 1)
        before = len(asyncio.all_tasks())
        for number in range(50_000):
            chat = ChatRef(world.upstream.deployment, UUID(int=number + 1), UUID(int=1), UUID(int=number + 1))
            worker.discovery._found(Sighting(chat, "x", at_rest=True))
        assert len(asyncio.all_tasks()) <= before + 3
        assert worker.status()["waiting"] == 50_000
        (chat_id,) = await chats_of(world, 1, ENDLESS)
        await until(lambda: chat_id in worker.state.followed)  # what goes on has not to wait for what rests
        assert int(str(worker.status()["waiting"])) > 40_000
        assert len(asyncio.all_tasks()) < before + 30
