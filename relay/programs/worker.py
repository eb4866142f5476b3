"""Find the chats of one account and keep a follower on each that has something going on.

Watch says at once, and may lose anything; the list says everything, and late. A chat that neither speaks of needs no
socket: its resume point makes the next connect cheap.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge
from pydantic import BaseModel, PositiveFloat, PositiveInt

from relay.core.backoff import backoff
from relay.core.errors import BadFrame, LostClaim, Unauthorized, Unavailable
from relay.core.events import ChatRef, JsonObject
from relay.core.tail import IDLE
from relay.ports import Bus, Claims, Clock, Upstream
from relay.programs.chance import Chance
from relay.programs.follow import Followed, Follower, FollowSettings, row_digest

log = structlog.get_logger(__name__)

CHATS = Gauge("relay_chats_known", "Chats that the last sweep of the list saw, archived ones included.")
SWEPT = Gauge(
    "relay_discovery_last_success_timestamp_seconds", "When the list was last read whole. Old: new chats are missed."
)
SWEEPS = Counter("relay_discovery_sweeps_total", "Sweeps of the list. failed: Coder did not answer.", ["outcome"])
WATCH_EVENTS = Counter("relay_watch_events_total", "Events of the watch socket. None for long: it may have died.")
LEASES = Gauge("relay_leases_held", "Chats that this worker has claimed.")
LOST = Counter("relay_leases_lost_total", "Claims that another worker took over. A rise: this worker stalls.")
for _outcome in ("ok", "failed"):
    SWEEPS.labels(_outcome)


class WorkerSettings(BaseModel, frozen=True, extra="forbid"):
    """How chats are found and shared. A dead worker's chats move after the lease."""

    name: str = ""  # of this worker; empty: host name and process id
    sweep_seconds: PositiveFloat = 30.0
    archived_sweep_every: PositiveInt = 10  # one sweep in so many reads the archived chats too
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
    sweeps: int = 0
    watching: bool = False


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
        self._report = report  # whether Coder can be used, and why not
        self._running: dict[UUID, _Running] = {}
        self._seen: dict[UUID, str] = {}  # row digests that were worked off
        self._slots = asyncio.Semaphore(settings.max_streams)
        self.state = WorkerState()

    def status(self) -> dict[str, object]:
        """For `/status`."""
        return {
            "name": self._name,
            "following": sorted(str(chat_id) for chat_id in self.state.followed),
            "sweeps": self.state.sweeps,
            "watching": self.state.watching,
        }

    async def run(self) -> None:
        """Follow until cancelled. A refused token is told and tried again: it may be replaced."""
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._sweep_for_ever(group), name="sweep")
                    group.create_task(self._watch_for_ever(group), name="watch")
                    group.create_task(self._renew_for_ever(), name="renew")
            except* Unauthorized as refused:
                reason = str(refused.exceptions[0])
                log.warning("token_refused", reason=reason)
                self._report(False, reason)
            await self._clock.sleep(self._settings.unauthorized_seconds)

    # --- discovery ----------------------------------------------------------------------------------------------------

    async def _sweep_for_ever(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                await self._sweep(group, archived=self.state.sweeps % self._settings.archived_sweep_every == 0)
                self.state.sweeps += 1
                SWEEPS.labels("ok").inc()
                SWEPT.set(self._clock.now().timestamp())
                self._report(True, "")
                wait = self._settings.sweep_seconds
            except Unavailable as exc:
                SWEEPS.labels("failed").inc()
                log.warning("sweep_failed", reason=str(exc))
                self._report(False, str(exc))
                wait = max(min(5.0, self._settings.sweep_seconds), exc.retry_after_seconds or 0.0)
            await self._clock.sleep(wait)

    async def _sweep(self, group: asyncio.TaskGroup, *, archived: bool) -> None:
        for record in await self._claims.records(self._upstream.deployment):
            self._seen[record.chat.chat_id] = record.seen
        rows = list(await self._upstream.list_chats(archived=False))
        if archived:
            rows += await self._upstream.list_chats(archived=True)
            CHATS.set(len(rows))
        for row in rows:
            if (chat := self._ref(row)) is None:
                continue
            digest = row_digest(row)
            if self._seen.get(chat.chat_id) != digest or row.get("status") not in IDLE:
                self._wake(group, chat, digest)

    async def _watch_for_ever(self, group: asyncio.TaskGroup) -> None:
        delays = backoff(chance=Chance())
        while True:
            try:
                async with self._upstream.watch() as frames:
                    self.state.watching = True
                    async for text in frames:
                        delays = backoff(chance=Chance())
                        for row in watched_chats(text):
                            WATCH_EVENTS.inc()
                            if (chat := self._ref(row)) is not None:
                                self._wake(group, chat)
            except (Unavailable, BadFrame) as exc:
                log.info("watch_broken", reason=str(exc))  # the sweeps find what it would have told
            finally:
                self.state.watching = False
            await self._clock.sleep(next(delays))

    def _ref(self, row: JsonObject) -> ChatRef | None:
        try:
            chat_id, owner = UUID(str(row["id"])), UUID(str(row["owner_id"]))
            root = UUID(str(row.get("root_chat_id") or chat_id))
        except (KeyError, ValueError):
            log.warning("chat_row_unreadable", keys=sorted(row)[:20])
            return None
        return ChatRef(self._upstream.deployment, chat_id, owner, root)

    # --- followers ----------------------------------------------------------------------------------------------------

    def _wake(self, group: asyncio.TaskGroup, chat: ChatRef, digest: str | None = None) -> None:
        """See that the chat is followed. `digest`: of its row in the list, when there is one to compare."""
        running = self._running.get(chat.chat_id)
        if running is None:
            task = group.create_task(self._follow(group, chat), name=f"follow {chat.chat_id}")
            self._running[chat.chat_id] = _Running(task)
        elif running.follower is not None and running.follower.seen != digest:
            running.follower.look()

    async def _follow(self, group: asyncio.TaskGroup, chat: ChatRef) -> None:
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
            self._wake(group, chat)  # it came when the follower had made up its mind to end

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
        self._seen[follower.chat_id] = end.seen
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


def watched_chats(text: str) -> Iterable[JsonObject]:
    """The chats that a watch frame speaks of, in any dialect; none for a ping or for what cannot be read.

    They are partial (zeros where the server did not look): good for an id, not for a state.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        log.warning("watch_frame_unreadable")
        return
    if isinstance(value, dict) and value.get("type") == "data" and "kind" not in value:
        value = value.get("data")
    if isinstance(value, dict) and isinstance(value.get("chat"), dict):
        yield value["chat"]
