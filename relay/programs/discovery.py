"""Find the chats: what is there, and what has changed.

Watch says at once, and may lose anything; the list says everything, and late.
"""

import json
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge
from pydantic import BaseModel, PositiveFloat, PositiveInt

from relay.core.backoff import backoff
from relay.core.errors import BadFrame, ChatGone, ChatRefused, Unavailable
from relay.core.events import ChatRef, JsonObject
from relay.core.tail import IDLE
from relay.ports import Added, Claims, Clock, Upstream
from relay.programs.chance import Chance
from relay.programs.follow import GONE, row_digest

log = structlog.get_logger(__name__)

CHATS = Gauge("relay_chats_known", "Chats that the last sweep of the list saw, archived ones included.")
SWEPT = Gauge(
    "relay_discovery_last_success_timestamp_seconds", "When the list was last read whole. Old: new chats are missed."
)
SWEEPS = Counter("relay_discovery_sweeps_total", "Sweeps of the list. failed: Coder did not answer.", ["outcome"])
WATCH_EVENTS = Counter("relay_watch_events_total", "Events of the watch socket. None for long: it may have died.")
for _outcome in ("ok", "failed"):
    SWEEPS.labels(_outcome)

_AT_ONCE = 100  # rows or records that are dealt with before the others get their turn


class DiscoverySettings(BaseModel, frozen=True, extra="forbid"):
    """How chats are found."""

    sweep_seconds: PositiveFloat = 30.0
    archived_sweep_every: PositiveInt = 10  # one sweep in so many reads the archived chats too
    follow_archived: bool = True  # also those that were archived before the relay saw them first
    missing_at_once: PositiveInt = 200  # known chats in no list that such a sweep asks for one by one


@dataclass(frozen=True, slots=True)
class Sighting:
    """A chat that may have news. `digest`: of its row in the list, where there was one to compare."""

    chat: ChatRef
    digest: str | None = None
    at_rest: bool = False  # nothing goes on there: it can wait for those where something does


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of a row."""

    chat: ChatRef
    digest: str
    archived: bool


@dataclass(slots=True)
class DiscoveryState:
    """For `/status`, and for whoever waits for it."""

    sweeps: int = 0
    watching: bool = False


class Discovery:
    """Tells `found` of every chat that may have news, again and again while it may. `sweep` and `watch` run for ever.

    Args:
        found: Called with each sighting, from the loop's thread; it must not block.
        report: Told whether Coder can be used, and why not.
    """

    def __init__(
        self,
        *,
        upstream: Upstream,
        claims: Claims,
        clock: Clock,
        settings: DiscoverySettings,
        found: Callable[[Sighting], None],
        report: Callable[[bool, str], None],
        added: Added | None = None,
    ) -> None:
        self._upstream = upstream
        self._claims = claims
        self._added = added
        self._clock = clock
        self._settings = settings
        self._found = found
        self._report = report
        self._seen: dict[UUID, str] = {}  # digests of rows that were worked off, as far as this worker knows
        self._unclaimed: dict[UUID, _Row] = {}  # at rest, of chats that nobody ever claimed, as far as it knows
        self._asked_up_to: UUID | None = None  # the last known chat that was looked for in the lists
        self.state = DiscoveryState()

    def worked_off(self, chat_id: UUID, seen: str) -> None:
        """The chat was let go at a row with this digest: another one is news."""
        self._seen[chat_id] = seen
        self._unclaimed.pop(chat_id, None)

    async def sweep(self) -> None:
        """Read the list again and again.

        Raises:
            Unauthorized: The token was refused.
        """
        while True:
            try:
                await self._sweep(archived=self.state.sweeps % self._settings.archived_sweep_every == 0)
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

    async def _sweep(self, *, archived: bool) -> None:
        listed: set[UUID] = set()
        if archived:
            self._seen.clear()  # another worker may have set chats back since: the database knows
        await self._read(self._upstream.list_chats(archived=False), listed)
        if archived:
            await self._read(self._upstream.list_chats(archived=True), listed)
            CHATS.set(len(listed))
            await self._look_for_the_missing(listed)
        await self._read(self._added_rows(listed), listed)
        await self._look_at_the_unclaimed(listed)

    async def _added_rows(self, listed: Collection[UUID]) -> AsyncGenerator[JsonObject, None]:
        """Chats that were added by hand and that no list has, with those of their subagents."""
        if self._added is None:
            return
        deployment = self._upstream.deployment
        for added in await self._added.added(deployment):
            if added.chat_id in listed or added.gone_at is not None:
                continue
            try:
                row = await self._upstream.chat(added.chat_id)
            except ChatGone:
                records = await self._claims.records_of(deployment, [added.chat_id])
                untold = [record.chat for record in records if record.seen != GONE]
                for chat in untold:
                    self._found(Sighting(chat))  # its follower finds the same, and tells
                if not untold:  # not before: no sweep looks at it after that
                    await self._added.set_gone(deployment, added.chat_id)
            except ChatRefused as exc:
                log.info("chat_refused", chat_id=str(added.chat_id), reason=str(exc))
            else:
                yield row
                children = row.get("children")
                for child in children if isinstance(children, list) else []:
                    if isinstance(child, dict):
                        yield child

    async def _read(self, rows: AsyncGenerator[JsonObject, None], listed: set[UUID]) -> None:
        """Tell of every row that may mean news. What is kept of it is kept until somebody has claimed its chat."""
        differing: list[_Row] = []
        async with aclosing(rows):
            async for row in rows:
                if (chat_id := _uuid(row.get("id"))) is None:
                    log.warning("chat_row_unreadable", keys=sorted(row)[:20])
                    continue
                listed.add(chat_id)
                digest, busy = row_digest(row), row.get("status") not in IDLE
                if (self._seen.get(chat_id) == digest and not busy) or (chat := self._ref(row)) is None:
                    continue
                if busy:
                    self._found(Sighting(chat, digest))
                else:
                    self._unclaimed[chat_id] = _Row(chat, digest, bool(row.get("archived")))
                    differing.append(self._unclaimed[chat_id])
                if len(differing) == _AT_ONCE:
                    await self._compare(differing)
                    differing = []
        await self._compare(differing)

    async def _compare(self, differing: Sequence[_Row]) -> None:
        """Tell of the rows that nobody has worked off, this worker or another."""
        if not differing:
            return
        asked = [row.chat.chat_id for row in differing]
        stored = {r.chat.chat_id: r.seen for r in await self._claims.records_of(self._upstream.deployment, asked)}
        for row in differing:
            chat_id = row.chat.chat_id
            seen = stored.get(chat_id)
            unwanted = seen is None and row.archived and not self._settings.follow_archived
            if seen is not None or unwanted:
                self._unclaimed.pop(chat_id, None)
            if seen == row.digest or unwanted:
                self._seen[chat_id] = row.digest
            else:
                self._found(Sighting(row.chat, row.digest, at_rest=True))

    async def _look_at_the_unclaimed(self, listed: Collection[UUID]) -> None:
        """Tell again of chats whose rows this sweep did not bring: cost reports tell of a chat once, and the sweep may
        have failed then, or the worker that was to claim it stopped."""
        left = [row for chat_id, row in self._unclaimed.items() if chat_id not in listed]
        for place in range(0, len(left), _AT_ONCE):
            await self._compare(left[place : place + _AT_ONCE])

    async def _look_for_the_missing(self, listed: Collection[UUID]) -> None:
        """Ask for known chats that are in no list: whether they are there still.

        Not for all of them at once: where one sweep ends, the next one goes on.
        """
        accounts = await self._upstream.accounts()
        owners = {account.user_id for account in accounts}
        reads_all = any(account.administrator for account in accounts)
        left = self._settings.missing_at_once
        while True:
            page = await self._claims.records(self._upstream.deployment, after=self._asked_up_to, limit=_AT_ONCE)
            for record in page:
                self._asked_up_to = record.chat.chat_id
                # Where another account's token is set now, its chats are not gone, only not to be seen.
                askable = reads_all or record.chat.owner_id in owners
                followed = record.worker is not None  # whoever follows it hears of it
                if record.chat.chat_id in listed or record.seen == GONE or followed or not askable:
                    continue
                await self._ask_for(record.chat, record.seen)
                left -= 1
                if left == 0:
                    return
            if len(page) < _AT_ONCE:
                self._asked_up_to = None
                return

    async def _ask_for(self, chat: ChatRef, seen: str) -> None:
        try:
            digest = row_digest(await self._upstream.chat(chat.chat_id))
        except ChatGone:
            self._found(Sighting(chat))  # its follower finds the same, and tells
        except ChatRefused as exc:
            log.info("chat_refused", chat_id=str(chat.chat_id), reason=str(exc))
        else:
            if seen != digest:
                self._found(Sighting(chat, digest))

    async def watch(self) -> None:
        """Listen to the account's watch socket, and open it again whenever it ends.

        Raises:
            Unauthorized: The token was refused.
        """
        delays = backoff(chance=Chance())
        while True:
            asked = 0.0  # seconds that the server wants us to wait
            try:
                async with self._upstream.watch() as frames:
                    self.state.watching = True
                    async for text in frames:
                        delays = backoff(chance=Chance())
                        for row in watched_chats(text):
                            WATCH_EVENTS.inc()
                            if (chat := self._ref(row)) is not None:
                                self._found(Sighting(chat))
            except (Unavailable, BadFrame) as exc:
                log.info("watch_broken", reason=str(exc))  # the sweeps find what it would have told
                asked = (exc.retry_after_seconds or 0.0) if isinstance(exc, Unavailable) else 0.0
            finally:
                self.state.watching = False
            await self._clock.sleep(max(next(delays), asked))

    def _ref(self, row: JsonObject) -> ChatRef | None:
        try:
            chat_id, owner = UUID(str(row["id"])), UUID(str(row["owner_id"]))
            root = UUID(str(row.get("root_chat_id") or chat_id))
        except (KeyError, ValueError):
            log.warning("chat_row_unreadable", keys=sorted(row)[:20])
            return None
        return ChatRef(self._upstream.deployment, chat_id, owner, root)


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(str(value))
    except ValueError:
        return None


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
