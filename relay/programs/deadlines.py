"""Archived chats that Coder will delete before we have a copy: found in time, told, and put first.

Servers since 2.33 delete an archived chat some days after it was archived, by whomever, and archive chats that nobody
uses. The watch socket does not always tell of it.
"""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge

from relay.core.errors import ChatRefused, Unauthorized, Unavailable
from relay.core.events import utc
from relay.ports import Archives, Clock, Retention, Uncopied, Upstream

log = structlog.get_logger(__name__)

ENDANGERED = Gauge(
    "relay_archive_endangered_chats",
    "Chats that Coder has archived, will delete within days (RELAY_ARCHIVIST__DEADLINE_DAYS), and that have no "
    "verified copy. Any that stay: the archivist does not get to them, its log says why.",
)
TOO_LATE = Counter(
    "relay_archive_too_late_total",
    "Archived chats that Coder no longer had when their copy was to be made. Any rise: transcripts are lost.",
)

_NAMED = 50  # chats in one line of the log


class Deadlines:
    """What is known of the server's deletions.

    Args:
        days: How long before its deletion a chat without a copy is endangered.
        retention_seconds: How often the server is asked for its settings.
    """

    def __init__(
        self, upstream: Upstream, archives: Archives, clock: Clock, *, days: int, retention_seconds: float
    ) -> None:
        self._upstream = upstream
        self._archives = archives
        self._clock = clock
        self._days = days
        self._retention_seconds = retention_seconds
        self._retention: Retention | None = None
        self._read_at: float | None = None
        self._open: dict[UUID, Uncopied] = {}  # endangered by the last look
        self._told: set[UUID] = set()
        self._lost: set[UUID] = set()

    async def endangered(self) -> Sequence[Uncopied]:
        """Chats without a copy that will soon be deleted, the first to go first."""
        await self._read()
        kept = self._retention.archived_chats_days if self._retention is not None else None
        found: Sequence[Uncopied] = ()
        if kept:  # 0: for ever
            before = self._clock.now() + timedelta(days=self._days - kept)
            found = await self._archives.endangered(self._upstream.deployment, archived_before=before)
        self._open = {each.chat.chat_id: each for each in found if each.chat.chat_id not in self._lost}
        ENDANGERED.set(len(self._open))
        self._tell(kept or 0)
        return tuple(self._open.values())

    def copied(self, chat_id: UUID) -> None:
        """A chat has its copy."""
        self._open.pop(chat_id, None)
        ENDANGERED.set(len(self._open))

    def gone(self, uncopied: Uncopied) -> None:
        """Coder does not have a chat any more, whose copy was to be made."""
        if uncopied.archived_at is None or uncopied.chat.chat_id in self._lost:
            return
        self._lost.add(uncopied.chat.chat_id)
        self.copied(uncopied.chat.chat_id)
        TOO_LATE.inc()
        log.error("chat_deleted_before_its_copy", chat_id=str(uncopied.chat.chat_id))

    def status(self) -> dict[str, object]:
        """For `/status`."""
        return {
            "retention_days": self._retention and self._retention.archived_chats_days,
            "auto_archive_days": self._retention and self._retention.auto_archive_days,
            "endangered": len(self._open),
            "endangered_chats": [str(chat_id) for chat_id in list(self._open)[:_NAMED]],
        }

    async def _read(self) -> None:
        now = self._clock.monotonic()
        if self._read_at is not None and now - self._read_at < self._retention_seconds:
            return
        try:
            retention = await self._upstream.retention()
        except (Unavailable, Unauthorized, ChatRefused) as exc:  # what is known goes on to hold
            log.warning("retention_unread", reason=str(exc))
            return
        self._read_at = now
        if retention != self._retention:
            self._retention = retention
            log.info(
                "retention_changed",
                archived_chats_days=retention.archived_chats_days,
                auto_archive_days=retention.auto_archive_days,
            )

    def _tell(self, kept: int) -> None:
        new = [each for chat_id, each in self._open.items() if chat_id not in self._told]
        self._told = set(self._open)
        if not new:
            return
        since = min(each.archived_at for each in new if each.archived_at is not None)
        log.warning(
            "archived_chats_endangered",
            count=len(new),
            chat_ids=[str(each.chat.chat_id) for each in new[:_NAMED]],
            first_deletion=utc(since + timedelta(days=kept)),
            retention_days=kept,
        )
