"""Find the chats of one account: what is there, and what has changed.

Watch says at once, and may lose anything; the list says everything, and late.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge
from pydantic import BaseModel, PositiveFloat, PositiveInt

from relay.core.backoff import backoff
from relay.core.errors import BadFrame, Unavailable
from relay.core.events import ChatRef, JsonObject
from relay.core.tail import IDLE
from relay.ports import Claims, Clock, Upstream
from relay.programs.chance import Chance
from relay.programs.follow import row_digest

log = structlog.get_logger(__name__)

CHATS = Gauge("relay_chats_known", "Chats that the last sweep of the list saw, archived ones included.")
SWEPT = Gauge(
    "relay_discovery_last_success_timestamp_seconds", "When the list was last read whole. Old: new chats are missed."
)
SWEEPS = Counter("relay_discovery_sweeps_total", "Sweeps of the list. failed: Coder did not answer.", ["outcome"])
WATCH_EVENTS = Counter("relay_watch_events_total", "Events of the watch socket. None for long: it may have died.")
for _outcome in ("ok", "failed"):
    SWEEPS.labels(_outcome)


class DiscoverySettings(BaseModel, frozen=True, extra="forbid"):
    """How chats are found."""

    sweep_seconds: PositiveFloat = 30.0
    archived_sweep_every: PositiveInt = 10  # one sweep in so many reads the archived chats too


@dataclass(frozen=True, slots=True)
class Sighting:
    """A chat that may have news. `digest`: of its row in the list, where there was one to compare."""

    chat: ChatRef
    digest: str | None = None


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
    ) -> None:
        self._upstream = upstream
        self._claims = claims
        self._clock = clock
        self._settings = settings
        self._found = found
        self._report = report
        self._seen: dict[UUID, str] = {}  # row digests that were worked off
        self.state = DiscoveryState()

    def worked_off(self, chat_id: UUID, seen: str) -> None:
        """The chat was let go at a row with this digest: another one is news."""
        self._seen[chat_id] = seen

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
                self._found(Sighting(chat, digest))

    async def watch(self) -> None:
        """Listen to the account's watch socket, and open it again whenever it ends.

        Raises:
            Unauthorized: The token was refused.
        """
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
                                self._found(Sighting(chat))
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
