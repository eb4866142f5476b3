"""One open stream of servers since 2.35: it reads the whole state again whenever something may have changed.

A notification is a hint only. What goes out is the difference between the rows and what this stream has told, in a
fixed order: [history_reset] message* queue status error action_required retry preview_reset, then live parts. Several
changes that come close together are one sync.
"""

import asyncio
import random
from collections import deque

from relay.simulator.dialect import (
    EVENTS_PER_FRAME,
    ActionRequiredEvent,
    Dialect,
    ErrorEvent,
    Event,
    HistoryResetEvent,
    MessageEvent,
    PartEvent,
    PreviewResetEvent,
    QueueEvent,
    RetryEvent,
    StatusEvent,
)
from relay.simulator.machine import Machine
from relay.simulator.state import Chat, Message
from relay.simulator.step import Episode, open_calls
from relay.simulator.stream import Changed, Dropped, LossyPath, Notification, PartLosses, SendFrame, Skew
from relay.simulator.worker import ACTIVE


class Sync:
    """What one stream has told, and how it tells the rest.

    Args:
        after_id: Rows up to this id are left out of the first sync, unless the history was ever edited.
        after_revision: Snapshot version up to which the client knows the history; None on servers that do not take it.
    """

    def __init__(
        self,
        chat: Chat,
        machine: Machine,
        *,
        after_id: int,
        after_revision: int | None,
        dialect: Dialect,
        skew: Skew,
        speed: float,
        dice: random.Random,
        losses: PartLosses,
    ) -> None:
        self.chat = chat
        self.is_zombie = False
        self._machine = machine
        self._dialect = dialect
        self._notify_ms = skew.notify_ms
        self._ms = 0.001 / speed
        self._dice = dice
        self._path = LossyPath(chat.id, losses, dice, skew.burst_run)
        self._after_id = after_id
        self._revision = after_revision or 0
        self._queue_version = 0
        self._status = ""
        self._told_at: dict[type[Event], int] = {}
        self._retry: RetryEvent | None = None
        # (history version, generation attempt) that the client's preview belongs to.
        self._preview: tuple[int, int] | None = None
        if after_revision is not None and after_revision == chat.history_version:
            self._preview = (chat.history_version, chat.generation_attempt)
        self._episode: Episode | None = None
        self._parts_read = 0
        self._extra: deque[PartEvent] = deque()
        self._is_stale = False
        self._hint: asyncio.TimerHandle | None = None
        self._woken = asyncio.Event()

    def notify(self, notification: Notification) -> None:
        """Take a hint. It arrives after a while, and those that come meanwhile arrive with it."""
        if isinstance(notification, Dropped):
            self.is_zombie = True
        elif isinstance(notification, Changed) and notification.parts_only:
            self._woken.set()
        elif self._hint is None:
            delay = self._dice.uniform(*self._notify_ms) * self._ms
            self._hint = asyncio.get_running_loop().call_later(delay, self._arrive)

    def _arrive(self) -> None:
        self._hint = None
        self._is_stale = True
        self._woken.set()

    def offer_part(self, part: PartEvent, *, in_burst: bool = False) -> None:
        """Send a part once more."""
        self._extra.append(part)
        self._woken.set()

    async def run(self, send: SendFrame) -> None:
        """Send the first sync, then whatever is new, for ever."""
        await self._send(self._sync(), send)
        while True:
            events = self._take()
            if self.is_zombie or not events:
                self._woken.clear()
                await self._woken.wait()
            else:
                await self._send(events, send)

    async def _send(self, events: list[Event], send: SendFrame) -> None:
        for start in range(0, len(events), EVENTS_PER_FRAME):
            await send(self._dialect.stream_frame(self.chat.id, events[start : start + EVENTS_PER_FRAME]))

    def _take(self) -> list[Event]:
        """Parts first: those of a step that was stored meanwhile were shown before it was."""
        events: list[Event] = [*self._parts()]
        if self._is_stale:
            self._is_stale = False
            events += self._sync()
            events += self._parts()
        return events

    def _parts(self) -> list[PartEvent]:
        parts = [*self._extra]
        self._extra.clear()
        if self._episode is not None:
            fresh = self._episode.parts[self._parts_read :]
            self._parts_read += len(fresh)
            parts += [part for part in fresh if not self._path.loses()]
        return parts

    def _sync(self) -> list[Event]:
        """The difference between what the rows say and what was told."""
        chat = self.chat
        version = chat.history_version
        events = self._history()
        if chat.queue_version > self._queue_version:
            self._queue_version = chat.queue_version
            events.append(QueueEvent(tuple(chat.queue)))
        if chat.status != self._status:
            self._status = chat.status
            events.append(StatusEvent(chat.status, version if self._dialect.features.revisions else 0))
        if chat.status == "error" and chat.last_error is not None and self._is_news(ErrorEvent):
            events.append(ErrorEvent(chat.last_error))
        if chat.status == "requires_action" and self._is_news(ActionRequiredEvent):
            events.append(ActionRequiredEvent(tuple(open_calls(chat))))
        retry = self._machine.retries.get(chat.id)
        if retry is not None and retry != self._retry:
            events.append(retry)
        self._retry = retry
        preview = (version, chat.generation_attempt)
        if preview != self._preview:
            self._preview = preview
            events.append(PreviewResetEvent())
        episode = self._machine.episodes.get(chat.id)
        if episode is not self._episode:
            is_current = episode is not None and episode.key == preview and chat.status in ACTIVE
            self._episode, self._parts_read = (episode if is_current else None), 0
        return events

    def _is_news(self, kind: type[Event]) -> bool:
        """Whether an event of this kind was not told yet at this history version."""
        told_at = self._told_at.get(kind)
        self._told_at[kind] = self.chat.history_version
        return told_at != self.chat.history_version

    def _history(self) -> list[Event]:
        """Rows that are newer than the revision told; a deleted one among them, and everything goes out again."""
        if self._revision >= self.chat.history_version:
            return []
        rows = self._in_order([message for message in self.chat.messages if message.visible])
        news = [message for message in rows if message.revision > self._revision]
        after_id, self._after_id = self._after_id, 0
        self._revision = max(self._revision, self.chat.snapshot_version)
        if any(message.deleted for message in news):
            return [HistoryResetEvent(), *[MessageEvent(message) for message in rows if not message.deleted]]
        return [MessageEvent(message) for message in news if message.id > after_id]

    def _in_order(self, rows: list[Message]) -> list[Message]:
        """As the database gives them: by id, or by time, where rows of one transaction may come in any order."""
        if self._dialect.features.append_order:
            return rows
        return sorted(rows, key=lambda row: (row.created_at, row.place))
