"""Keep a follower on each chat that has something going on, together with other workers.

A chat that discovery does not speak of needs no socket: its resume point makes the next connect cheap. Who of several
workers follows a chat is decided in `relay.core.claims` and made true by the store. One busy chat does not starve
others: its follower has one publish of bounded size on its way, as each has, and what it weighs counts against its
worker, which leaves other chats to the others.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge
from pydantic import PositiveFloat, PositiveInt

from relay.core.backoff import backoff
from relay.core.claims import Activity, Peer, chosen, share, to_adopt, to_give_up
from relay.core.errors import LostClaim, Unauthorized, Unavailable
from relay.core.events import ChatRef
from relay.ports import Account, Added, Bus, Claim, Claims, Clock, Upstream
from relay.programs.chance import Chance
from relay.programs.dials import Dials
from relay.programs.discovery import Discovery, DiscoverySettings, Sighting
from relay.programs.follow import Ended, Followed, Follower, FollowSettings
from relay.programs.gate import Gate
from relay.programs.lease import Lease, LeasedOutlet
from relay.programs.sightings import Deferred, Sightings

log = structlog.get_logger(__name__)

LEASES = Gauge("relay_leases_held", "Chats that this worker has claimed.")
LOST = Counter("relay_leases_lost_total", "Claims that this worker lost. A rise: it stalls, or the database does.")
WORKERS = Gauge("relay_workers_live", "Workers of the deployment whose leases are live, as this one knows. 0: none is.")
LOAD = Gauge("relay_worker_load", "Weights of the chats that this worker follows: events a second, at least 1 each.")
SHARE = Gauge("relay_worker_share", "The load that each of the workers would have if all had the same.")
WAITING = Gauge(
    "relay_chats_waiting", "Chats to follow that wait for a free stream. For long: more workers, or streams."
)
MOVED = Counter(
    "relay_chats_moved_total",
    "Chats that went from worker to worker. adopted: taken over; given: left to others with less to do.",
    ["how"],
)
for _how in ("adopted", "given"):
    MOVED.labels(_how)

_RENEWALS = 3  # in the time of one lease
_CLAIMS_AT_ONCE = 50
_SELDOM_LEASES = 2  # between looks for chats that are held and not followed, and at whose chats can be read
_GIVING_PAUSE = 3  # renewals until what others have taken is known here


class WorkerSettings(DiscoverySettings, frozen=True, extra="forbid"):
    """How chats are found and shared. A dead worker's chats move after the lease."""

    name: str = ""  # of this worker; empty: host name and process id
    lease_seconds: PositiveFloat = 6.0
    look_seconds: PositiveFloat = 1.0  # between looks for chats that lost their follower
    max_streams: PositiveInt = 500
    max_streams_per_server: PositiveInt | None = None  # of all workers; each may have an equal part
    dials_per_second: PositiveFloat = 50.0
    unauthorized_seconds: PositiveFloat = 30.0  # wait after the token was refused
    defer_seconds: PositiveFloat = 1.0  # until a chat is taken that another worker should have


class _LeaseOver(Exception):
    """All claims are lost."""


@dataclass(slots=True, eq=False)
class _Running:
    activity: Activity
    task: asyncio.Task[None] | None = None
    follower: Follower | None = None


@dataclass(slots=True)
class WorkerState:
    """What a worker does at this moment, for `/status` and for whoever waits for it."""

    followed: set[UUID] = field(default_factory=set)
    peers: Sequence[Peer] = ()  # all live workers of the deployment


class Worker:
    """The chats that an upstream can read. `run` does not end by itself."""

    def __init__(
        self,
        name: str,
        *,
        upstream: Upstream,
        bus: Bus,
        claims: Claims,
        clock: Clock,
        settings: WorkerSettings,
        follow: FollowSettings,
        report: Callable[[bool, str], None] = lambda ok, reason: None,
        added: Added | None = None,
    ) -> None:
        self._name = name
        self._upstream = upstream
        self._bus = bus
        self._claims = claims
        self._clock = clock
        self._settings = settings
        self._follow_settings = follow
        self._pressure = follow.pressure(clock)
        self._report = report
        self._running: dict[UUID, _Running] = {}
        self._waiting = Sightings()
        self._deferred = Deferred(settings.defer_seconds)
        self._changed = asyncio.Event()  # there may be a chat and a free stream for it
        self._gate = Gate()
        self._dials = Dials(clock, per_second=settings.dials_per_second)
        self.state = WorkerState()
        self._lease = Lease("", clock, seconds=0, asked=clock.monotonic())
        self._me = Peer("", frozenset(), 0.0, 0)
        self._group: asyncio.TaskGroup | None = None  # of the followers, while they may run
        self.discovery = Discovery(
            upstream=upstream,
            claims=claims,
            added=added,
            clock=clock,
            settings=settings,
            found=self._wake,
            report=report,
        )

    def status(self) -> dict[str, object]:
        """For `/status`, from any thread: what the loop may change at the same time is copied at one go."""
        load = self._load()
        return {
            "name": self._name,
            "worker": self._me.worker,
            "lease_seconds_left": round(self._lease.left, 1),
            "workers": [peer.worker for peer in self.state.peers],
            "load": round(load, 1),
            "share": round(share(self._companions(load)), 1),
            "streams": len(self._running),
            "max_streams": self._most_streams(),
            "waiting": len(self._waiting),
            "following": sorted(map(str, tuple(self.state.followed))),
            "sweeps": self.discovery.state.sweeps,
            "watching": self.discovery.state.watching,
        }

    async def run(self) -> None:
        """Follow until cancelled. A refused token is told and tried again: it may be replaced."""
        while True:
            wait = 0.0
            try:
                await self._enlist()
                await self._to_its_end(self._work())
            except* Unauthorized as refused:
                reason = str(refused.exceptions[0])
                log.warning("token_refused", reason=reason)
                self._report(False, reason)
                wait = self._settings.unauthorized_seconds
            except* _LeaseOver:
                log.warning("lease_lost", worker=self._me.worker)
            await self._clock.sleep(wait)

    @staticmethod
    async def _to_its_end(work: Coroutine[None, None, None]) -> None:
        """Wait for it as a task of its own: a group that ends with an error forgets that it was cancelled as well."""
        task = asyncio.create_task(work, name="work")
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            while not task.done():
                with suppress(asyncio.CancelledError):  # nobody leaves it behind
                    await asyncio.wait([task])
            try:
                task.result()
            except* (asyncio.CancelledError, _LeaseOver, Unauthorized):
                pass
            raise
        task.result()

    async def _work(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for name, work in (
                    ("renew", self._renew_for_ever()),
                    ("dials", self._dials.run()),
                    ("start lively", self._start_lively()),
                    ("start at rest", self._start_at_rest()),
                    ("adopt", self._adopt_for_ever()),
                    ("sweep", self.discovery.sweep()),
                    ("watch", self.discovery.watch()),
                ):
                    group.create_task(work, name=name)
        finally:
            self._group = None
            self._tell_peers(())
            await self._resign()

    # --- the lease ----------------------------------------------------------------------------------------------------

    async def _enlist(self) -> None:
        """Begin a lease under a new id."""
        for delay in backoff(chance=Chance()):
            try:
                accounts = await self._upstream.accounts()
                # Never an id of before: what was claimed under it is lost.
                worker = f"{self._name}-{secrets.token_hex(4)}"
                self._me = Peer(worker, _readable(accounts), 0.0, self._settings.max_streams)
                asked = self._clock.monotonic()
                await self._claims.enlist(
                    self._me, self._upstream.deployment, lease_seconds=self._settings.lease_seconds
                )
            except Unavailable as exc:
                log.warning("enlisting_failed", reason=str(exc))
                await self._clock.sleep(max(delay, exc.retry_after_seconds or 0.0))
            else:
                self._lease = Lease(worker, self._clock, seconds=self._settings.lease_seconds, asked=asked)
                log.info("enlisted", worker=worker)
                return

    async def _resign(self) -> None:
        """Give up at once whatever is still claimed, so that others need not wait for the lease to end."""
        if self._lease.over:
            return
        seconds = self._lease.left  # by then it is over anyway
        self._lease.end()
        try:
            async with asyncio.timeout(seconds):
                await self._claims.resign(self._me.worker)
        except (Unavailable, TimeoutError) as exc:
            log.warning("resigning_failed", reason=str(exc))

    async def _renew_for_ever(self) -> None:
        pause = self._settings.lease_seconds / _RENEWALS
        renewals = 0
        while True:
            await self._renew()
            if renewals % _GIVING_PAUSE == 0:
                self._give_up_some()
            renewals += 1
            await self._clock.sleep(pause)

    async def _renew(self) -> None:
        """Renew in time, on another connection if one hangs.

        Raises:
            _LeaseOver: It was not in time.
        """
        seconds = self._settings.lease_seconds
        told = False
        while not self._lease.over:
            asked = self._clock.monotonic()
            load = self._load()
            try:
                async with asyncio.timeout(min(self._lease.left, seconds / _RENEWALS)):
                    peers = await self._claims.renew(self._as_it_is(load), lease_seconds=seconds)
            except (Unavailable, TimeoutError) as exc:
                if not told:
                    log.warning("renewal_failed", reason=str(exc) or "no answer in time")
                told = True
                await self._clock.sleep(seconds / (_RENEWALS * 8))
                continue
            if peers is None or not self._lease.renewed(asked):
                break
            self._tell_peers(peers)
            return
        self._lease.end()
        raise _LeaseOver

    def _tell_peers(self, peers: Sequence[Peer]) -> None:
        self.state.peers = peers
        load = self._load()
        WORKERS.set(len(peers))
        LOAD.set(load)
        SHARE.set(share(self._companions(load)) if peers else 0.0)
        self._changed.set()

    # --- shares -------------------------------------------------------------------------------------------------------

    def _load(self) -> float:
        now = self._clock.monotonic()
        return sum(running.activity.weight(now) for running in tuple(self._running.values()))

    def _most_streams(self) -> int:
        of_all, workers = self._settings.max_streams_per_server, max(1, len(self.state.peers))
        most = self._settings.max_streams
        return most if of_all is None else min(most, max(1, of_all // workers))

    def _room(self) -> int:
        return self._most_streams() - len(self._running)

    def _companions(self, load: float) -> list[Peer]:
        """Those that can take over what this worker has, and it from them; itself as it is now."""
        me = self._as_it_is(load)
        others = [p for p in self.state.peers if p.accounts == me.accounts and p.worker != me.worker]
        return [*others, me]

    def _as_it_is(self, load: float) -> Peer:
        """This worker now."""
        return replace(self._me, load=load, free=max(0, self._room()))

    def _give_up_some(self) -> None:
        """Let others have what is too much here."""
        now = self._clock.monotonic()
        weights = {
            chat_id: running.activity.weight(now)
            for chat_id, running in self._running.items()
            if running.follower is not None
        }
        given = to_give_up(self._me.worker, weights, self._companions(self._load()))
        above = max(0, -self._room() - len(given))  # a worker came, and the part of each got smaller
        rest = sorted(weights.keys() - set(given), key=lambda chat_id: (weights[chat_id], chat_id))
        number = 0
        for running in (self._running[chat_id] for chat_id in [*given, *rest[:above]]):
            # One that waits for the broker stays: the next look may find others that can go at once.
            if running.follower is not None and not running.follower.held_up and not running.follower.leaving:
                running.follower.leave()
                number += 1
        if number:
            MOVED.labels("given").inc(number)
            log.info("chats_given_up", number=number)

    async def _adopt_for_ever(self) -> None:
        """Look for chats that lost their follower, and for those that another worker should have claimed."""
        hungry = 0  # looks in a row that found some
        asked = self._clock.monotonic()  # when it last looked at what changes seldom
        while True:
            await self._clock.sleep(self._settings.look_seconds)
            try:
                await self._look_at_deferred()
                orphans = await self._claims.orphans(self._me.worker)
                hungry = hungry + 1 if orphans else 0
                # What nobody took at the first look goes to whoever has room.
                fair = to_adopt(self._me.worker, self._companions(self._load()), orphans)
                await self._adopt(min(self._room(), fair if hungry < 3 else orphans))
                if self._clock.monotonic() - asked >= _SELDOM_LEASES * self._settings.lease_seconds:
                    asked = self._clock.monotonic()
                    await self._look_at_holdings()
                    await self._look_at_accounts()
            except Unavailable as exc:
                log.warning("looking_failed", reason=str(exc))

    async def _adopt(self, number: int) -> None:
        while number > 0:
            # Not beside a claim: of a chat that was adopted as well, it would think that its follower had died.
            async with self._gate.alone():
                claims = await self._claims.adopt(self._me.worker, limit=min(number, _CLAIMS_AT_ONCE))
                MOVED.labels("adopted").inc(len(claims))
                for claim in claims:
                    if not self._start(claim.chat, claim):  # its follower here is about to begin, or to end
                        await self._claims.release(claim, None, seen=None, clean=claim.resume.clean)
            if not claims:
                return
            number -= len(claims)

    async def _look_at_deferred(self) -> None:
        while due := list(self._deferred.due(self._clock.monotonic(), _CLAIMS_AT_ONCE)):
            by_id = {sighting.chat.chat_id: sighting for sighting in due}
            try:
                records = await self._claims.records_of(self._upstream.deployment, by_id.keys())
            except BaseException:  # also when it is cut off: a database that is away may cost the lease
                for sighting in due:
                    self._deferred.put(sighting, self._clock.monotonic())
                raise
            held = {r.chat.chat_id for r in records if r.worker not in (None, self._me.worker)}
            for chat_id in by_id.keys() - held - self._running.keys():
                self._queue(by_id[chat_id])

    async def _look_at_holdings(self) -> None:
        """Follow what this worker holds without knowing: the answer to a claim, or to a release, was lost."""
        for chat in await self._claims.holdings(self._me.worker):
            if chat.chat_id not in self._running:
                self._deferred.put(Sighting(chat), self._clock.monotonic())

    async def _look_at_accounts(self) -> None:
        """See whose chats can be read by now: a token may have been accepted, or refused. The next renewal tells it."""
        with suppress(TimeoutError):  # Coder may let it wait, and orphans must not
            async with asyncio.timeout(self._settings.look_seconds):
                self._me = replace(self._me, accounts=_readable(await self._upstream.accounts()))

    # --- followers ----------------------------------------------------------------------------------------------------

    def _wake(self, sighting: Sighting) -> None:
        """See that the chat is followed, here or by the worker whose turn it is."""
        chat = sighting.chat
        running = self._running.get(chat.chat_id)
        if running is not None:
            if running.follower is not None and running.follower.seen != sighting.digest:
                running.follower.look()
            return
        able = [peer for peer in self.state.peers if peer.reads(chat.owner_id)]
        if chosen(chat.chat_id, able) in (self._me.worker, None):
            self._queue(sighting)
        elif not sighting.at_rest:  # the others wait for the next sweep, should their worker not come to them
            self._deferred.put(sighting, self._clock.monotonic())

    def _queue(self, sighting: Sighting) -> None:
        self._waiting.put(sighting)
        WAITING.set(len(self._waiting))
        self._changed.set()

    async def _start_lively(self) -> None:
        """Start followers of chats in which something goes on, before all others that want to connect."""
        while True:
            await self._until(lambda: self._waiting.lively and self._room() > 0)
            await self._dials.wait(urgent=True)
            self._start_next()

    async def _start_at_rest(self) -> None:
        """Start followers of the other chats, when no lively one waits."""
        while True:
            await self._until(lambda: len(self._waiting) > self._waiting.lively == 0 and self._room() > 0)
            await self._dials.wait()
            self._start_next()

    def _start_next(self) -> None:
        if self._waiting and self._room() > 0:
            sighting = self._waiting.take()
            WAITING.set(len(self._waiting))
            self._start(sighting.chat)

    async def _until(self, fact: Callable[[], object]) -> None:
        while not fact():
            self._changed.clear()
            await self._changed.wait()

    def _start(self, chat: ChatRef, claim: Claim | None = None) -> bool:
        if chat.chat_id in self._running or self._group is None:
            return False
        running = self._running[chat.chat_id] = _Running(Activity(self._clock.monotonic()))
        running.task = self._group.create_task(self._follow(chat, running, claim), name=f"follow {chat.chat_id}")
        running.task.add_done_callback(lambda task: self._ended(chat, running, task))
        return True

    def _ended(self, chat: ChatRef, running: _Running, task: asyncio.Task[None]) -> None:
        """Not the end of `_follow`: a task that is cancelled at once never begins it."""
        del self._running[chat.chat_id]
        self.state.followed.discard(chat.chat_id)
        LEASES.set(len(self.state.followed))
        self._changed.set()
        follower = running.follower
        if not task.cancelled() and follower is not None and follower.news and not follower.leaving:
            self._queue(Sighting(chat))  # it came when the follower had made up its mind to end

    async def _follow(self, chat: ChatRef, running: _Running, claim: Claim | None) -> None:
        try:
            if claim is not None:
                await self._wait_with(claim)
            else:
                async with self._gate.together():
                    claim = await self._claims.claim(chat, self._me.worker)
            if claim is not None:  # else another worker follows it
                await self._follow_claimed(claim, running)
        except Unavailable as exc:
            log.warning("claim_failed", chat_id=str(chat.chat_id), reason=str(exc))
            self._deferred.put(Sighting(chat), self._clock.monotonic())
        except LostClaim:
            pass  # whoever renews the lease finds out as well

    async def _wait_with(self, claim: Claim) -> None:
        """Until one may connect for a chat that was adopted."""
        try:
            await self._dials.wait(urgent=True)
        except BaseException:
            if not self._lease.over:
                await self._give_back(claim, clean=claim.resume.clean)
            raise

    async def _give_back(self, claim: Claim, *, clean: bool) -> None:
        """On the way out, so that the next follower need not wait. Once the lease is over it need not anyway."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._lease.left):
                await self._claims.release(claim, None, seen=None, clean=clean)

    async def _follow_claimed(self, claim: Claim, running: _Running) -> None:
        chat_id = claim.chat.chat_id
        lease = self._lease
        follower = running.follower = Follower(
            claim,
            upstream=self._upstream,
            bus=LeasedOutlet(self._bus, lease, running.activity, self._clock.monotonic),
            claims=self._claims,
            clock=self._clock,
            settings=self._follow_settings,
            pressure=self._pressure,
            dial=self._dials.wait,
        )
        self.state.followed.add(chat_id)
        LEASES.set(len(self.state.followed))
        try:
            end = await follower.run()
        except LostClaim:
            LOST.inc()
            log.warning("claim_lost", chat_id=str(chat_id), session=claim.session)
            return
        except BaseException:
            # Cancelled, or the token was refused.
            if lease.over:
                LOST.inc()  # and not another word
            else:
                await follower.finish()
                await self._give_back(claim, clean=follower.clean)
            raise
        if end.why is Ended.LEFT:
            await self._claims.release(claim, None, seen=None, clean=end.clean)
        else:
            await self._release(follower, end)

    async def _release(self, follower: Follower, end: Followed) -> None:
        commit = follower.tail.commit() if end.clean else None
        await self._claims.release(follower.claim, commit, seen=end.seen, clean=end.clean)
        self.discovery.worked_off(follower.chat_id, end.seen)
        log.info("chat_let_go", chat_id=str(follower.chat_id), why=end.why.value, clean=end.clean)


def _readable(accounts: Sequence[Account]) -> frozenset[UUID] | None:
    """Whose chats can be read; None: everybody's."""
    if any(account.administrator for account in accounts):
        return None
    return frozenset(account.user_id for account in accounts)
