"""Follow one chat: connect, feed, publish, save, again.

Publish, then save: so any await may be the last, and a follower that is cancelled or killed anywhere loses nothing.
While one batch is saved the next ones go out. What waits for a broker or a database waits here, with the socket unread
behind it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import partial
from operator import attrgetter
from typing import TypeVar
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, PositiveFloat, PositiveInt

from relay.core.backoff import backoff
from relay.core.errors import (
    BadFrame,
    ChatGone,
    ChatRefused,
    LostClaim,
    StreamEnded,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from relay.core.events import Event, JsonObject, Origin, decode_json, encode_json
from relay.core.frames import FrameReader, content_digest
from relay.core.preview import Muting, coalesce, shed
from relay.core.resume import Commit
from relay.core.tail import IDLE, Batch, ChatTail, Reconcile
from relay.ports import Claim, Claims, Clock, Outlet, Upstream
from relay.programs.chance import Chance
from relay.programs.frame_buffer import FrameBuffer
from relay.programs.pressure import Pressure
from relay.programs.saving import Saving

log = structlog.get_logger(__name__)
T = TypeVar("T")

_KINDS = ("overloaded", "rate_limit", "timeout", "auth", "config", "usage_limit", "generic", "other")
RETRIES = Counter(
    "relay_chat_retries_total", "Retries of model calls that Coder reported. A rise: the provider ails.", ["kind"]
)
CHAT_ERRORS = Counter(
    "relay_chat_errors_total", "Turns that failed, as Coder reported. A rise: the provider ails.", ["kind"]
)
STREAM_ERRORS = Counter(
    "relay_stream_errors_total",
    "Streams that failed although their socket lived. A rise: Coder's database or this relay's decoder ails.",
    ["reason"],
)
RECONNECTS = Counter(
    "relay_reconnects_total",
    "Streams opened again, by what ended the one before. A rise: network or Coder ails.",
    ["reason"],
)
CLOSES = Counter(
    "relay_stream_closes_total",
    "Streams that ended, by what is done about it. retry: connect again; resync: again, and compare; auth: the token "
    "does not serve, so look at it; gone: the chat is not there.",
    ["class"],
)
RECONCILES = Counter(
    "relay_reconciles_total",
    "REST reads because frames alone could not decide. A rise costs Coder requests.",
    ["reason"],
)
REPLAYS = Counter("relay_replays_filtered_total", "Events that Coder repeated and that were not told again.")
EDITS = Counter("relay_history_replaced_total", "Rewritten histories told to consumers, by reason.", ["reason"])
GAPS = Counter(
    "relay_preview_gaps_total", "Steps whose previews were taken back: Coder lost live parts. Messages are whole."
)
COALESCED = Counter(
    "relay_previews_coalesced_total", "Previews joined to the one before. A rise: the broker is slower than Coder."
)
DROPPED = Counter(
    "relay_previews_dropped_total",
    "Previews left out. ended: under load, their message being there, the broker is too slow; budget: more of them "
    "than a process may send.",
    ["reason"],
)
DECODE_ERRORS = Counter(
    "relay_decode_errors_total",
    "Frames or events that could not be read. Any rise: Coder speaks something new.",
    ["reason"],
)
LAG = Histogram(
    "relay_event_lag_seconds",
    "From Coder's time stamp of a live message to the broker's confirm, of the oldest of those that went out together. "
    "A rise: consumers see chats late.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900),
)
STREAMS = Gauge("relay_streams", "Chats followed now, by state.", ["state"])

_HELD_UP_SECONDS = 1.0
_FINISH_SECONDS = 3.0  # for what a cancelled follower had in hand
_COUNTED = frozenset(("retry", "error", "history"))  # events that have a metric of their own
_event_of = attrgetter("event")
_RARELY = 60  # longest delays, at most, between two tries of what the broker will not take
_PUBLISH_AT_ONCE = 512  # more than a turn of frames tells; a long history goes out in pieces: each has one deadline

_STREAM_ERRORS = ("dropped_messages", "snapshot_failed", "bad_frame")
_RESYNCS = ("dropped_messages", "snapshot_failed", "bad_frame", "gap", "stale", "too_large")
_RECONNECTS = ("server_close", "ping_timeout", "network_error", "protocol_error", "too_slow", "refused", *_RESYNCS)
_RECONCILES = ("edit", "prompt", "reconnect", "settle", "timer", *_STREAM_ERRORS, "too_large")
for _counter, _values in (
    (RETRIES, _KINDS),
    (CHAT_ERRORS, _KINDS),
    (STREAM_ERRORS, _STREAM_ERRORS),
    (RECONNECTS, _RECONNECTS),
    (CLOSES, ("retry", "resync", "auth", "gone")),
    (RECONCILES, _RECONCILES),
    (EDITS, ("edit", "reconcile", "restart")),
    (DROPPED, ("ended", "budget")),
    (DECODE_ERRORS, ("bad_json", "schema", "unknown_type", "too_large")),
):
    for _value in _values:
        _counter.labels(_value)
for _value in ("connecting", "live", "backoff"):
    STREAMS.labels(_value)


class FollowSettings(BaseModel, frozen=True, extra="forbid"):
    """How one chat is followed. The defaults fit a server under load; tests and demos are less patient."""

    settle_seconds: PositiveFloat = 1.5  # silence after an idle status before the end of a turn is judged
    recheck_seconds: PositiveFloat = 300.0  # compare with REST at least so often
    linger_seconds: PositiveFloat = 30.0  # keep the socket so long after a turn; of a chat that does nothing not at all
    buffer_frames: PositiveInt = 512
    buffer_characters: PositiveInt = 32 * 2**20
    buffer_characters_of_all: PositiveInt = 256 * 2**20  # of all chats of the process together
    previews_per_second: PositiveFloat = 5000.0  # of all chats of the process, joined ones counted once
    shed_frames: PositiveInt = 64  # with so many frames waiting, previews of finished steps are left out
    first_delay_seconds: PositiveFloat = 0.5
    longest_delay_seconds: PositiveFloat = 30.0

    def pressure(self, clock: Clock) -> Pressure:
        """What the followers of a process share."""
        return Pressure(clock, characters=self.buffer_characters_of_all, previews_per_second=self.previews_per_second)


GONE = "gone"  # instead of the digest of a row, where a chat has none any more


class Ended(StrEnum):
    """Why a follower stopped by itself."""

    IDLE = "idle"  # let go: nothing is going on
    GONE = "gone"  # the chat does not exist any more
    REFUSED = "refused"  # the server does not let us read it
    LEFT = "left"  # to another worker, as it was asked to


@dataclass(frozen=True, slots=True)
class Followed:
    """The end of a follower. `seen` is the digest of the chat's list row that it has worked off."""

    why: Ended
    seen: str
    clean: bool


def row_digest(chat: JsonObject) -> str:
    """What must have changed in a list row for the chat to be worth a look."""
    return content_digest([chat.get(name) for name in ("updated_at", "status", "archived", "title", "last_error")])


class Follower:
    """One chat in one session. `run` until it ends, or until it is cancelled; then ask `clean`."""

    def __init__(
        self,
        claim: Claim,
        *,
        upstream: Upstream,
        bus: Outlet,
        claims: Claims,
        clock: Clock,
        settings: FollowSettings,
        pressure: Pressure | None = None,
        dial: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.claim = claim
        self.tail = ChatTail(claim.chat, claim.session, claim.resume)
        self._reader = FrameReader()
        self._upstream = upstream
        self._bus = bus
        self._claims = claims
        self._clock = clock
        self._settings = settings
        self._pressure = pressure or settings.pressure(clock)
        self._dial = dial  # returns when this process may connect again
        self._muting = Muting()
        self._log = log.bind(chat_id=str(claim.chat.chat_id), session=claim.session)
        self._row = ""  # digest of the chat's row as it was read last; empty before that
        self._status: object = None  # in that row
        self._chat = b"{}"  # all of it as JSON: an idle chat keeps it for hours
        self._buffer: FrameBuffer | None = None
        self._look = True  # read the chat itself: it may have been renamed or archived
        self._leaving = False  # it ends when nothing is in hand any more
        self._beyond = False  # open the next stream behind all history: it does not fit a frame
        self._heard = False  # this connection brought something: the link works
        self._stirred = False  # and something that happened while it stood: more may come soon
        self._unheard = False  # discovery saw the chat begin or end a turn, and no frame has come since
        self._proved = ""  # digest of the row up to which the tail is known to have all
        self._in_hand: list[Event] = []  # told by the tail, not confirmed by the broker
        self._unsaved = False  # durable events were confirmed, and `_saving` has not heard of it
        self._saving = Saving(self._store, self._wake, clock)
        self._waits_since: dict[str, float] = {}  # monotonic, for a broker, a database or Coder

    @property
    def chat_id(self) -> UUID:
        """Which chat."""
        return self.claim.chat.chat_id

    @property
    def clean(self) -> bool:
        """True when the saved resume point is what was confirmed, and nothing durable is on its way."""
        saved = not self._unsaved and self._saving.all_stored
        return saved and all(event.transient for event in self._in_hand) and self.tail.stated

    @property
    def held_up(self) -> bool:
        """Broker, database or Coder do not answer as they should: what is in hand may take long to get out."""
        now = self._clock.monotonic()
        return any(now - since > _HELD_UP_SECONDS for since in self._waits_since.values())

    @property
    def seen(self) -> str:
        """Digest of the chat's row as it was read last; empty before that."""
        return self._row

    @property
    def news(self) -> bool:
        """Discovery saw something that this follower has not looked at."""
        return self._look

    def look(self) -> None:
        """Discovery saw news of the chat."""
        self._look = True
        self._wake()

    @property
    def leaving(self) -> bool:
        """It was asked to end."""
        return self._leaving

    def leave(self) -> None:
        """End as soon as all that was told is confirmed and saved, however long that takes: another worker is to follow
        the chat. One that is cancelled instead waits for so long only that its heir might have to state it anew."""
        self._leaving = True
        self._wake()

    async def run(self) -> Followed:
        """Follow until the chat has been idle for the linger time, is not there to be followed, or is to be left.

        Raises:
            LostClaim: Another worker has it.
            Unauthorized: The token is not accepted.
        """
        try:
            return await self._until_it_ends()
        finally:
            # `finish` could begin no save while a broker that is away has events due.
            await self._saving.stop(_FINISH_SECONDS)

    async def _until_it_ends(self) -> Followed:
        try:
            return await self._follow()
        except ChatGone:
            self._log.info("chat_gone")
            self._look = False  # that was the news
            CLOSES.labels("gone").inc()
            await self._send(self.tail.gone(decode_json(self._chat), self._clock.now()))
            return await self._ended(Ended.GONE, GONE)
        except Unauthorized:
            CLOSES.labels("auth").inc()
            raise
        except ChatRefused as exc:
            self._log.warning("chat_refused", status=exc.status, reason=str(exc))
            self._look = False
            CLOSES.labels("auth" if exc.status in (401, 403) else "retry").inc()
            return await self._ended(Ended.REFUSED, "")  # tried again with each sweep: it was not worked off

    async def _ended(self, why: Ended, seen: str) -> Followed:
        await self._saving.finish()
        return Followed(why, seen, self.clean)

    async def _follow(self) -> Followed:
        delays = self._delays()
        while True:
            self._heard = self._stirred = False
            asked = 0.0  # to wait, by the server
            try:
                with in_state("connecting"):
                    await self._discover()
                self._proved = self._row  # the stream begins with all that this row stands for
                self._unheard = False
                why = await self._connection()
                if isinstance(why, Followed):
                    return why
                if why != "snapshot_failed":
                    delays = self._delays()
            except Unavailable as exc:
                why = exc.reason if isinstance(exc, StreamEnded) else "refused"
                asked = exc.retry_after_seconds or 0.0
                if self._heard:
                    delays = self._delays()  # forget earlier failures
                self._log.info("stream_broken", reason=str(exc))
            except BadFrame as exc:
                why = await self._cannot_read(exc)
            finally:
                self._buffer = None
                self.tail.disconnected()
            await self._saving.finish()  # or somebody else has the chat: no reason to connect again
            if self._leaving:
                return await self._ended(Ended.LEFT, "")
            RECONNECTS.labels(why).inc()
            CLOSES.labels("resync" if why in _RESYNCS else "retry").inc()
            with in_state("backoff"):
                await self._clock.sleep(max(next(delays), asked))
                if self._dial is not None:
                    await self._dial()

    async def _connection(self) -> Followed | str:
        """One stream, until the chat is let go or the tail finds the stream dead: then the reason."""
        beyond, self._beyond = self._beyond, False
        after = self.tail.beyond if beyond else self.tail.after
        revision = self.tail.newest_revision if beyond else self.tail.revision
        async with self._upstream.stream(self.chat_id, after_id=after, after_revision=revision) as frames:
            with in_state("live"):
                self._log.debug("stream_opened", after_id=after)
                self.tail.connected(after)
                buffer = self._buffer = FrameBuffer(
                    self._pressure, frames=self._settings.buffer_frames, characters=self._settings.buffer_characters
                )
                async with buffer.filled_from(frames):
                    return await self._live(buffer)

    async def _live(self, buffer: FrameBuffer) -> Followed | str:
        checked = heard = self._clock.monotonic()  # when REST was compared last, when a frame came last
        while True:
            if self._saving.failed:
                await self._saving.finish()
            if self._leaving:
                return await self._ended(Ended.LEFT, "")
            frames = await buffer.take(self._patience(checked, heard))
            if frames:
                heard = self._clock.monotonic()
                self._unheard = False
                reconnect = await self._take(frames, len(frames) + buffer.backlog)
                del frames[:]  # not to be held on to while the next ones are waited for
            elif frames is None and self.tail.settling:
                reconnect = await self._send(self.tail.settled(self._clock.now()))
            elif frames is None and self.tail.idle and not self._unheard:
                if (end := await self._let_go(buffer)) is not None:
                    return end
                heard = self._clock.monotonic()
                continue
            elif frames is None:
                self._unheard = False
                checked = self._clock.monotonic()
                reconnect = await self._send(self.tail.recheck(self._clock.now()))
            else:
                await self._discover()  # poked
                continue
            if reconnect is not None:
                return reconnect

    def _patience(self, checked: float, heard: float) -> float:
        if self.tail.settling or self._unheard:
            return self._settings.settle_seconds
        if not self.tail.idle:
            until = checked + self._settings.recheck_seconds
        else:
            until = heard + (self._settings.linger_seconds if self._stirred else self._settings.settle_seconds)
        return max(0.0, until - self._clock.monotonic())

    async def _take(self, frames: list[str], waited: int) -> str | None:
        """Feed frames, of so many that waited, and publish what comes of them together."""
        self._heard = True
        at, read, hear = self._clock.now(), self._reader.read, self.tail.hear
        for text in frames:
            # What stood before one that cannot be read goes out with what is told of it.
            if not hear(read(text), at):
                if (reconnect := await self._send(self.tail.out())) is not None:
                    return reconnect  # what waits behind it comes again
                at = self._clock.now()
        whole = self.tail.out()
        self._stirred = self._stirred or any(event.origin is Origin.LIVE for event in whole.events)
        if behind := waited >= self._settings.shed_frames:
            kept = shed(whole.events, whole.ended)
            DROPPED.labels("ended").inc(len(whole.events) - len(kept))
            whole.events = kept
        reconnect = await self._send(whole)
        if behind:
            self._muting.mute(whole.ended)  # results of tools may still come
        return reconnect

    async def _discover(self) -> None:
        """Read the chat itself, if there is news of it, and tell what changed."""
        if not self._look:
            return
        self._look = False
        try:
            chat = await self._upstream.chat(self.chat_id)
        except BaseException:
            self._look = True
            raise
        # A stream may be silent although its socket lives: REST tells, unless a frame does in a moment.
        self._row, self._status, self._chat = row_digest(chat), chat.get("status"), encode_json(chat)
        self._unheard = (self._status in IDLE) == self.tail.running
        await self._send(self.tail.discovered(chat, self._clock.now()))

    async def _let_go(self, buffer: FrameBuffer) -> Followed | str | None:
        """The chat was idle long enough. None when something is going on after all; a reason when the stream is dead.

        The chat will not be looked at again until its row changes, so that all this row stands for must be known: what
        happened since the stream was opened, REST has to confirm.
        """
        self._look = True
        await self._discover()
        if not self._quiet(buffer):
            return None
        row = self._row
        if row != self._proved:
            reconnect = await self._send(self.tail.recheck(self._clock.now()))
            if reconnect is not None:
                return reconnect
            self._proved = row
        await self._saving.finish()
        # Prompts that still wait may be taken back, or joined by others, and no row and no watch event says so
        # (protocol.md 3.3): such a chat is looked at again with each sweep.
        seen = "" if self.tail.queued else row
        return Followed(Ended.IDLE, seen, self.clean) if self._quiet(buffer) else None

    def _quiet(self, buffer: FrameBuffer) -> bool:
        return not buffer.backlog and self.tail.idle and self._status in IDLE

    async def _cannot_read(self, exc: BadFrame) -> str:
        """Keep the frame, tell consumers, and let REST say what was in it."""
        self._log.error("frame_unreadable", reason=exc.reason, error=str(exc), size=len(exc.raw))
        DECODE_ERRORS.labels(exc.reason).inc()
        if exc.reason == "too_large":
            # One message travels in one frame, whatever its size: REST has it, and the next stream begins behind it.
            await self._send(self.tail.recheck(self._clock.now(), "too_large"))
            self._beyond = True
            return "too_large"
        parked = exc.raw.encode("utf-8", "surrogatepass")
        try:
            await self._until_available(lambda: self._bus.park_frame(self.claim.chat, parked, exc.reason), "broker")
        except TooLarge as refused:
            self._log.error("frame_not_kept", reason=str(refused))
        await self._send(self.tail.stream_error(str(exc), "bad_frame", self._clock.now()))
        return "bad_frame"

    # --- publish, then save -------------------------------------------------------------------------------------------

    async def _send(self, batch: Batch) -> str | None:
        """Publish and save a batch, answer what it wants, and so on until it wants nothing.

        Returns why to reconnect, or None.
        """
        reconnect = batch.reconnect
        await self._publish(batch)
        while batch.wants is not None:
            batch = await self._answer(batch.wants)
            reconnect = reconnect or batch.reconnect
            await self._publish(batch)
        return reconnect

    async def _publish(self, batch: Batch) -> None:
        events = batch.events
        kinds = set(map(_event_of, events))  # at once: it is done for every event
        if "preview" in kinds:
            joined = coalesce(events)
            COALESCED.inc(len(events) - len(joined))
            events = self._fitting(joined)
        self._count(batch, kinds)
        self._in_hand += events
        await self._confirmed()
        live = (event for event in events if event.origin is Origin.LIVE)
        if (oldest := next((event for event in live if event.event == "message"), None)) is not None:
            LAG.observe(max(0.0, (self._clock.now() - datetime.fromisoformat(oldest.time)).total_seconds()))
        await self._save()

    def _fitting(self, events: list[Event]) -> list[Event]:
        """Without the previews that are too many for the process."""
        previews = sum(event.transient and event.detail != "reset" for event in events)
        kept = self._muting.sift(events, self._pressure.previews(previews))
        DROPPED.labels("budget").inc(len(events) - len(kept))
        return kept

    async def _confirmed(self) -> None:
        """Publish what is in hand, and return when the broker has it.

        An event that is too large for the broker stays in hand, and all that comes after it waits: somebody has to
        raise the broker's limit. It is tried again more and more rarely, because the channel that is closed for it is
        everybody's.
        """
        at_once, delays = _PUBLISH_AT_ONCE, self._rare_delays()
        while self._in_hand:
            some = self._in_hand[:at_once]
            try:
                await self._until_available(partial(self._bus.publish, some), "broker")
            except TooLarge as exc:
                if len(some) == 1:
                    self._log.error("event_too_large", reason=str(exc))
                    await self._clock.sleep(next(delays))
                at_once = 1  # what stands before it goes out, once
                continue
            del self._in_hand[: len(some)]
            self._unsaved = self._unsaved or any(not event.transient for event in some)

    async def _save(self) -> None:
        """Have the resume point saved, if there is a new one. The next frames do not wait for it."""
        if self._unsaved:
            self._unsaved = False
            await self._saving.save(self.tail.commit())

    async def _store(self, commit: Commit) -> None:
        await self._until_available(partial(self._claims.save, self.claim, commit), "database")

    def _wake(self) -> None:
        if self._buffer is not None:
            self._buffer.poke()

    async def finish(self) -> None:
        """After a cancellation: see what was on its way to its end, within a short time, so that the next follower
        goes on where this one stood. Without it nothing is lost either, only told again."""
        try:
            with suppress(TimeoutError, LostClaim, TooLarge):
                async with asyncio.timeout(_FINISH_SECONDS):
                    await self._confirmed()
                    await self._save()
                    await self._saving.finish()
        finally:
            await self._saving.end()

    async def _answer(self, wanted: Reconcile) -> Batch:
        RECONCILES.labels(wanted.reason).inc()
        self._log.debug("reconciling", reason=wanted.reason)

        async def read() -> Batch:
            # Messages last: the status may be older than they are, never newer.
            chat = await self._upstream.chat(self.chat_id)
            page = await self._upstream.messages(self.chat_id, down_to=wanted.down_to)
            return self.tail.answered(chat, page.messages, complete=page.complete, at=self._clock.now())

        return await self._until_available(read, "coder")

    async def _until_available(self, act: Callable[[], Awaitable[T]], what: str) -> T:
        """Repeat until it works. What was handed out by the tail must get out, in this order, before anything else."""
        delays = self._delays()
        waited = False
        self._waits_since[what] = self._clock.monotonic()
        while True:
            try:
                result = await act()
            except Unavailable as exc:
                if not waited:
                    self._log.warning("waiting", dependency=what, reason=str(exc))
                waited = True
                await self._clock.sleep(max(next(delays), exc.retry_after_seconds or 0.0))
            else:
                del self._waits_since[what]
                if waited:
                    self._log.info("available_again", dependency=what)
                return result

    def _delays(self) -> Iterator[float]:
        return backoff(
            chance=Chance(), first=self._settings.first_delay_seconds, longest=self._settings.longest_delay_seconds
        )

    def _rare_delays(self) -> Iterator[float]:
        longest = self._settings.longest_delay_seconds
        return backoff(chance=Chance(), first=longest, longest=_RARELY * longest)

    def _count(self, batch: Batch, kinds: Set[str]) -> None:
        REPLAYS.inc(batch.replays)
        GAPS.inc(batch.gaps)
        for kind in batch.unknown:
            DECODE_ERRORS.labels("unknown_type").inc()
            self._log.warning("event_type_unknown", type=kind[:64])
        for event in batch.events if kinds & _COUNTED else ():
            match event.event:
                case "retry":
                    RETRIES.labels(_kind(event)).inc()
                case "error" if event.detail == "turn":
                    CHAT_ERRORS.labels(_kind(event)).inc()
                case "error":
                    STREAM_ERRORS.labels(str(dict(event.data)["reason"])).inc()
                case "history":
                    EDITS.labels(str(dict(event.data)["reason"])).inc()


def _kind(event: Event) -> str:
    kind = str(dict(event.data).get("kind") or "generic")
    return kind if kind in _KINDS else "other"


@contextmanager
def in_state(state: str) -> Iterator[None]:
    """Count a stream in this state while the block runs."""
    STREAMS.labels(state).inc()
    try:
        yield
    finally:
        STREAMS.labels(state).dec()
