"""Keep a follower on each chat that has something going on.

A chat that discovery does not speak of needs no socket: its resume point makes the next connect cheap.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge
from pydantic import PositiveFloat, PositiveInt

from relay.core.errors import LostClaim, Unauthorized, Unavailable
from relay.core.events import ChatRef
from relay.ports import Bus, Claims, Clock, Upstream
from relay.programs.discovery import Discovery, DiscoverySettings, Sighting
from relay.programs.follow import Followed, Follower, FollowSettings

log = structlog.get_logger(__name__)

LEASES = Gauge("relay_leases_held", "Chats that this worker has claimed.")
LOST = Counter("relay_leases_lost_total", "Claims that another worker took over. A rise: this worker stalls.")


class WorkerSettings(DiscoverySettings, frozen=True, extra="forbid"):
    """How chats are found and shared. A dead worker's chats move after the lease."""

    name: str = ""  # of this worker; empty: host name and process id
    lease_seconds: PositiveFloat = 15.0
    max_streams: PositiveInt = 500
    unauthorized_seconds: PositiveFloat = 30.0  # wait after the token was refused


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[None]
    follower: Follower | None = None
    lost: bool = False  # the claim ran out: not another word


@dataclass(slots=True)
class WorkerState:
    """What a worker does at this moment, for `/status` and for whoever waits for it."""

    followed: set[UUID] = field(default_factory=set)


class Worker:
    """One account's chats. `run` does not end by itself."""

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
    ) -> None:
        self._name = name
        self._upstream = upstream
        self._bus = bus
        self._claims = claims
        self._clock = clock
        self._settings = settings
        self._follow_settings = follow
        self._report = report
        self._running: dict[UUID, _Running] = {}
        self._slots = asyncio.Semaphore(settings.max_streams)
        self.state = WorkerState()
        self._group: asyncio.TaskGroup | None = None  # of the followers, while `run` runs
        self.discovery = Discovery(
            upstream=upstream, claims=claims, clock=clock, settings=settings, found=self._wake, report=report
        )

    def status(self) -> dict[str, object]:
        """For `/status`."""
        return {
            "name": self._name,
            "following": sorted(str(chat_id) for chat_id in self.state.followed),
            "sweeps": self.discovery.state.sweeps,
            "watching": self.discovery.state.watching,
        }

    async def run(self) -> None:
        """Follow until cancelled. A refused token is told and tried again: it may be replaced."""
        while True:
            try:
                async with asyncio.TaskGroup() as self._group:
                    group = self._group
                    group.create_task(self.discovery.sweep(), name="sweep")
                    group.create_task(self.discovery.watch(), name="watch")
                    group.create_task(self._renew_for_ever(), name="renew")
            except* Unauthorized as refused:
                reason = str(refused.exceptions[0])
                log.warning("token_refused", reason=reason)
                self._report(False, reason)
            await self._clock.sleep(self._settings.unauthorized_seconds)

    # --- followers ----------------------------------------------------------------------------------------------------

    def _wake(self, sighting: Sighting) -> None:
        """See that the chat is followed."""
        chat = sighting.chat
        running = self._running.get(chat.chat_id)
        if running is None:
            assert self._group is not None  # noqa: S101  # discovery runs in it
            task = self._group.create_task(self._follow(chat), name=f"follow {chat.chat_id}")
            self._running[chat.chat_id] = _Running(task)
        elif running.follower is not None and running.follower.seen != sighting.digest:
            running.follower.look()

    async def _follow(self, chat: ChatRef) -> None:
        running = self._running[chat.chat_id]
        try:
            async with self._slots:
                await self._follow_claimed(chat, running)
        except Unavailable as exc:
            log.warning("claim_failed", chat_id=str(chat.chat_id), reason=str(exc))
        finally:
            del self._running[chat.chat_id]
            self.state.followed.discard(chat.chat_id)
            LEASES.set(len(self.state.followed))
        if running.follower is not None and running.follower.news:
            self._wake(Sighting(chat))  # it came when the follower had made up its mind to end

    async def _follow_claimed(self, chat: ChatRef, running: _Running) -> None:
        claim = await self._claims.claim(chat, self._name, lease_seconds=self._settings.lease_seconds)
        if claim is None:
            return  # another worker follows it; the next sweep looks again
        follower = running.follower = Follower(
            claim,
            upstream=self._upstream,
            bus=self._bus,
            claims=self._claims,
            clock=self._clock,
            settings=self._follow_settings,
        )
        self.state.followed.add(chat.chat_id)
        LEASES.set(len(self.state.followed))
        try:
            end = await follower.run()
        except LostClaim:
            LOST.inc()
            log.warning("claim_lost", chat_id=str(chat.chat_id), session=claim.session)
            return
        except BaseException:
            # Cancelled, or the token was refused: give the chat back, so that the next follower need not wait.
            if not running.lost:
                await follower.finish()
            await self._claims.release(claim, None, seen=None, clean=follower.clean)
            raise
        await self._release(follower, end)

    async def _release(self, follower: Follower, end: Followed) -> None:
        commit = follower.tail.commit() if end.clean else None
        await self._claims.release(follower.claim, commit, seen=end.seen, clean=end.clean)
        self.discovery.worked_off(follower.chat_id, end.seen)
        log.info("chat_let_go", chat_id=str(follower.chat_id), why=end.why.value, clean=end.clean)

    async def _renew_for_ever(self) -> None:
        while True:
            await self._clock.sleep(self._settings.lease_seconds / 3)
            followed = frozenset(self.state.followed)  # a claim that is made meanwhile is not among `held`
            try:
                held = await self._claims.renew(self._name, lease_seconds=self._settings.lease_seconds)
            except Unavailable as exc:
                log.warning("renewal_failed", reason=str(exc))
                continue
            for chat_id in followed - held:
                if (running := self._running.get(chat_id)) is not None and running.follower is not None:
                    LOST.inc()
                    log.warning("claim_lost", chat_id=str(chat_id))
                    running.lost = True
                    running.task.cancel()
