"""From the server's events to frames: one subscription per open stream, two paths that feed it, snapshot first.

Path A carries database notifications (messages, statuses, retries, errors, queue), path B carries parts. Each keeps
its own order; between the two there is none, and that is where most of a client's surprises come from.
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeAlias, TypeVar
from uuid import UUID

from relay.simulator.dialect import (
    EVENTS_PER_FRAME,
    ActionRequiredEvent,
    Dialect,
    ErrorEvent,
    Event,
    MessageEvent,
    PartEvent,
    QueueEvent,
    RetryEvent,
    StatusEvent,
)
from relay.simulator.faults import Faults
from relay.simulator.state import Chat, ChatError, Part

Item = TypeVar("Item")

PART_CHANNEL = 128
NOTIFICATION_QUEUE = 2048


@dataclass(frozen=True)
class Skew:
    """How far the two paths drift apart. Times are model milliseconds, rates are chances from 0 to 1.

    Args:
        notify_ms: Shortest and longest way of a path A notification.
        overtake: Chance that a notification of stored messages is late by `overtake_ms`, so that parts of the
            next step come first.
        lag: Chance that a part (or a status) is late by `lag_ms`, so that it comes after what it preceded.
        burst_loss: Share of parts that vanish while the model sends without pauses, in runs of `burst_run` on average.
        vain: Chance that a run which takes over from an aborted one is struck by that one's late notifications and
            ends without a word, where servers have that flaw.
        snapshot_gap_ms: Time between reading the buffered parts and the messages for a snapshot.
    """

    notify_ms: tuple[float, float] = (0.3, 2.5)
    overtake: float = 0.1
    overtake_ms: float = 20.0
    lag: float = 0.005
    lag_ms: float = 6.0
    burst_loss: float = 0.07
    burst_run: float = 30.0
    vain: float = 0.3
    snapshot_gap_ms: float = 0.3


DEFAULT_SKEW = Skew()
NO_SKEW = Skew(notify_ms=(0.1, 0.1), overtake=0, lag=0, burst_loss=0, vain=0, snapshot_gap_ms=0)


@dataclass(frozen=True)
class MessagesStored:
    """Something was inserted; the subscription reads what it has not sent yet."""


@dataclass(frozen=True)
class HistoryEdited:
    """The subscription reads everything again."""


@dataclass(frozen=True)
class QueueChanged:
    """The subscription reads the queue as it is when it gets to this notification."""


@dataclass(frozen=True)
class Changed:
    """Some row of the chat is not what it was; `parts_only`: there is a part more. For streams that read it all."""

    parts_only: bool = False


@dataclass(frozen=True)
class Dropped:
    """The subscription broke inside the server: one error event, then nothing for ever."""


Notification: TypeAlias = (
    MessagesStored
    | HistoryEdited
    | QueueChanged
    | Changed
    | Dropped
    | StatusEvent
    | RetryEvent
    | ErrorEvent
    | ActionRequiredEvent
)


class Lane(Generic[Item]):
    """A first-in-first-out way on which each item takes its time. A late item holds back those behind it."""

    def __init__(self, woken: asyncio.Event) -> None:
        self._items: deque[tuple[float, Item]] = deque()
        self._woken = woken
        self._loop = asyncio.get_running_loop()
        self._last_due = 0.0

    def __len__(self) -> int:
        return len(self._items)

    def push(self, item: Item, seconds: float) -> None:
        now = self._loop.time()
        self._last_due = max(self._last_due, now + seconds)
        self._items.append((self._last_due, item))
        if self._last_due <= now:
            self._woken.set()
        else:
            self._loop.call_at(self._last_due, self._woken.set)

    def is_ready(self) -> bool:
        # The loop fires a timer up to its clock's resolution early.
        return bool(self._items) and self._items[0][0] <= self._loop.time() + 1e-6

    def pop(self) -> Item:
        return self._items.popleft()[1]

    def clear(self) -> None:
        self._items.clear()


SendFrame: TypeAlias = Callable[[str], Awaitable[None]]


@dataclass
class PartLosses:
    """Parts that streams were not given: how many so far, and at which extra rate for a chat."""

    rate: Callable[[UUID], float] = lambda _chat: 0.0
    count: int = 0


class LossyPath:
    """The way of one stream's parts: which of them get lost on it."""

    def __init__(self, chat_id: UUID, losses: PartLosses, dice: random.Random, run: float) -> None:
        self._chat_id = chat_id
        self._losses = losses
        self._dice = dice
        self._run = run
        self._still_to_lose = 0

    def loses(self, *, at_least: float = 0.0, is_full: bool = False) -> bool:
        """Whether this part is lost; it is counted. `at_least`: rate in a burst, `is_full`: there is no room for it."""
        lost = self._strikes(max(self._losses.rate(self._chat_id), at_least)) or is_full
        self._losses.count += lost
        return lost

    def _strikes(self, rate: float) -> bool:
        """Parts vanish in runs: the chance to begin one is chosen so that their share of all parts is `rate`."""
        if self._still_to_lose == 0 and rate > 0:
            run = min(self._run, max(1.0, 4 * self._run * rate))
            if self._dice.random() < (1.0 if rate >= 1 else rate / (run * (1 - rate))):
                self._still_to_lose = self._dice.randint(1, max(1, round(2 * run) - 1))
        if self._still_to_lose:
            self._still_to_lose -= 1
            return True
        return False


class OpenStream(Protocol):
    """What the server does to an open stream, whatever feeds it."""

    chat: Chat
    is_zombie: bool

    def notify(self, notification: Notification) -> None:
        """Something has happened in the chat."""

    def offer_part(self, part: PartEvent, *, in_burst: bool = False) -> None:
        """A part to send, whatever was sent before."""


class Subscription:
    """One open stream of one chat: what it has sent, and what is under way to it."""

    def __init__(
        self,
        chat: Chat,
        after_id: int,
        *,
        dialect: Dialect,
        skew: Skew,
        speed: float,
        dice: random.Random,
        losses: PartLosses,
    ) -> None:
        self.chat = chat
        self.is_zombie = False
        self._dialect = dialect
        self._skew = skew
        self._ms = 0.001 / speed
        self._dice = dice
        self._path = LossyPath(chat.id, losses, dice, skew.burst_run)
        # Id of the last row sent, not the highest: after a snapshot with turned rows they differ, as upstream.
        self._position = after_id
        self._woken = asyncio.Event()
        self._durable: Lane[Notification] = Lane(self._woken)
        self._live: Lane[PartEvent] = Lane(self._woken)
        self._ready: deque[Event] = deque()

    def notify(self, notification: Notification) -> None:
        """Path A. Nothing is dropped here, but a queue that overflows kills the subscription."""
        if self.is_zombie:
            return
        if len(self._durable) >= NOTIFICATION_QUEUE:
            notification = Dropped()
            self._durable.clear()
        delay = self._dice.uniform(*self._skew.notify_ms)
        if isinstance(notification, MessagesStored) and self._dice.random() < self._skew.overtake:
            delay += self._skew.overtake_ms
        if isinstance(notification, StatusEvent) and self._dice.random() < self._skew.lag:
            delay += self._skew.lag_ms
        self._durable.push(notification, delay * self._ms)

    def offer_part(self, part: PartEvent, *, in_burst: bool = False) -> None:
        """Path B. A full channel, or chance in a burst, loses the part without a word."""
        if self.is_zombie:
            return
        burst_loss = self._skew.burst_loss if in_burst else 0.0
        if self._path.loses(at_least=burst_loss, is_full=len(self._live) >= PART_CHANNEL):
            return
        lags = not in_burst and self._dice.random() < self._skew.lag
        self._live.push(part, self._skew.lag_ms * self._ms if lags else 0.0)

    async def run(self, buffered: Iterable[PartEvent | RetryEvent], send: SendFrame) -> None:
        """Send the snapshot, then live events, for ever. `buffered`: the parts of the step in progress, right now."""
        snapshot = await self._snapshot(list(buffered))
        for start in range(0, len(snapshot), EVENTS_PER_FRAME):
            await send(self._dialect.stream_frame(self.chat.id, snapshot[start : start + EVENTS_PER_FRAME]))
        while True:
            events = self._take()
            if events:
                await send(self._dialect.stream_frame(self.chat.id, events))
                continue
            self._woken.clear()
            if not (self._durable.is_ready() or self._live.is_ready()):
                await self._woken.wait()

    async def _snapshot(self, buffered: list[PartEvent | RetryEvent]) -> list[Event]:
        """Parts, messages, queue and chat row are read in this order; the row's status is put first."""
        if self._skew.snapshot_gap_ms:
            await asyncio.sleep(self._skew.snapshot_gap_ms * self._ms)
        rows = self.chat.rows(self._position)
        if rows:
            self._position = rows[-1].id
        queue: list[Event] = [QueueEvent(tuple(self.chat.queue))] if self.chat.queue else []
        return [StatusEvent(self.chat.status), *buffered, *map(MessageEvent, rows), *queue]

    def _take(self) -> list[Event]:
        """Whatever is ready now, at most one frame of it; where both paths have something, chance decides."""
        events: list[Event] = []
        while len(events) < EVENTS_PER_FRAME:
            if self._ready:
                events.append(self._ready.popleft())
                continue
            durable, live = self._durable.is_ready(), self._live.is_ready()
            if not durable and not live:
                break
            if durable and (not live or self._dice.random() < 0.5):
                self._ready.extend(self._read(self._durable.pop()))
            else:
                events.append(self._live.pop())
        return events

    def _read(self, notification: Notification) -> Iterable[Event]:
        match notification:
            case MessagesStored():
                fresh = self.chat.history(self._position)
                if fresh:
                    self._position = fresh[-1].id
                return [MessageEvent(message) for message in fresh]
            case HistoryEdited():
                return self._refresh()
            case QueueChanged():
                return [QueueEvent(tuple(self.chat.queue))]
            case Dropped():
                self.is_zombie = True
                self._durable.clear()
                self._live.clear()
                return [ErrorEvent(ChatError("dropped messages", kind=""))]
            case Changed():
                return []
            case _:
                return [notification]

    def _refresh(self) -> list[Event]:
        """All messages from the beginning, but for a row whose id is not above the one before it."""
        self._position = 0
        events: list[Event] = []
        for row in self.chat.rows():
            if row.id > self._position:
                self._position = row.id
                events.append(MessageEvent(row))
        return events


class WatchSubscription:
    """One open watch socket. Its events are written down when they happen: a chat goes out as it was then."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self._frames: asyncio.Queue[str] = asyncio.Queue()

    def offer(self, frame: str) -> None:
        self._frames.put_nowait(frame)

    async def run(self, send: SendFrame) -> None:
        """Greet, where the server does, then send what is offered, for ever."""
        hello = self.dialect.watch_hello()
        if hello:
            await send(hello)
        while True:
            await send(await self._frames.get())


@dataclass
class Hub:
    """Who listens to which chat, and which user's watch is open where."""

    dialect: Dialect
    faults: Faults
    streams: dict[UUID, set[OpenStream]] = field(default_factory=dict)
    watches: dict[UUID, set[WatchSubscription]] = field(default_factory=dict)

    def publish(self, chat: Chat, *notifications: Notification) -> None:
        for notification in notifications:
            for subscription in self.streams.get(chat.id, ()):
                subscription.notify(notification)

    def publish_part(self, chat: Chat, part: PartEvent, *, in_burst: bool) -> None:
        for subscription in self.streams.get(chat.id, ()):
            subscription.offer_part(part, in_burst=in_burst)

    def publish_watch(self, kind: str, chat: Chat, calls: Sequence[Part] = ()) -> None:
        """Tell the owner, with the chat as it is now; nobody else ever hears of it."""
        for watch in self.watches.get(chat.owner_id, ()):
            if not self.faults.strikes("lose_watch"):
                watch.offer(watch.dialect.watch_frame(kind, chat, calls))

    def all_streams(self) -> list[OpenStream]:
        return [subscription for subscriptions in self.streams.values() for subscription in subscriptions]
