"""In-memory twins of the ports: for tests, and for `relay demo`, which needs no other service.

Each keeps the promise of its port as the real one does, and has switches for what can go wrong.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import count

from relay.adapters.topology import DEAD_FRAMES, QUEUES, TOPOLOGY, Binding, consumable
from relay.core.errors import Unavailable, Unroutable
from relay.core.events import ChatRef, Event
from relay.ports import Delivery

# --- bus -----------------------------------------------------------------------------------------------------------


def matches(pattern: str, routing_key: str) -> bool:
    """Whether a topic exchange routes the key to a binding of that pattern.

    >>> matches("chat.*.user.#", "chat.message.user.o.c"), matches("chat.*", "chat.message.user")
    (True, False)
    """
    return _match(pattern.split("."), routing_key.split("."))


def _match(pattern: Sequence[str], words: Sequence[str]) -> bool:
    if not pattern:
        return not words
    head, *rest = pattern
    if head == "#":
        return any(_match(rest, words[taken:]) for taken in range(len(words) + 1))
    return bool(words) and head in ("*", words[0]) and _match(rest, words[1:])


@dataclass(frozen=True, slots=True)
class _Message:
    body: bytes
    routing_key: str
    returns: int = 0  # how often it came back to its queue


@dataclass(slots=True, eq=False)
class _Queue:
    patterns: set[str] = field(default_factory=set)
    fresh: deque[_Message] = field(default_factory=deque)
    returned: deque[_Message] = field(default_factory=deque)  # goes out before what is fresh
    consumers: list["_Consumer"] = field(default_factory=list)
    delivery_limit: int | None = None
    dead_letters: "_Queue | None" = None

    def __len__(self) -> int:
        return len(self.returned) + len(self.fresh)

    def take(self) -> _Message:
        return (self.returned or self.fresh).popleft()

    def take_back(self, message: _Message) -> None:
        again = replace(message, returns=message.returns + 1)
        if self.delivery_limit is not None and again.returns > self.delivery_limit:
            self.give_up(again)
        else:
            self.returned.append(again)

    def give_up(self, message: _Message) -> None:
        if self.dead_letters is not None:
            self.dead_letters.fresh.append(replace(message, returns=0))


class _News:
    """Wakes all who wait, whenever something changed."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def tell(self) -> None:
        self._next.set()
        self._next = asyncio.Event()

    async def wait(self) -> None:
        await self._next.wait()


class MemoryBus:
    """`Bus` within one process: the same topology, nothing on disk, gone at the end.

    Args:
        keep: How many of the newest messages `published` and the queue `relay.log` hold, which nobody works off;
            None for all.
    """

    def __init__(self, *, keep: int | None = None) -> None:
        self.published: deque[Event] = deque(maxlen=keep)  # what was confirmed, in order, previews included
        self._keep = keep
        self._queues: dict[str, _Queue] = {}
        self._taps: list[_Queue] = []
        self._down = False
        self._news = _News()
        self._declare()

    # Switches

    @property
    def down(self) -> bool:
        """True: the broker is away. Consumers are cut off, calls raise `Unavailable`, queues keep what they hold."""
        return self._down

    @down.setter
    def down(self, down: bool) -> None:
        self._down = down
        self._complete = False  # it is declared again after each reconnect
        if down:
            for queue in (*self._queues.values(), *self._taps):
                self._cut_off(queue, "the broker is down")

    def unbind(self, queue: str) -> None:
        """Take away all bindings of a queue, as somebody with access to the broker might."""
        self._queues[queue].patterns.clear()

    def delete(self, queue: str) -> None:
        """Delete a queue and what it holds; the broker cancels its consumers."""
        deleted = self._queues.pop(queue)
        deleted.fresh.clear()
        self._cut_off(deleted, f"queue {queue} was deleted")

    # The port

    async def publish(self, events: Sequence[Event]) -> None:
        await self._reach()
        unroutable = None
        for event in events:
            if self._route(event.encode(), event.routing_key) or event.transient:
                self.published.append(event)
            else:
                unroutable = unroutable or event.routing_key
        self._news.tell()
        if unroutable is not None:
            self._complete = False
            raise Unroutable(f"no queue is bound for {unroutable}")

    @asynccontextmanager
    async def deliveries(self, queue: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        name = consumable(queue).name
        await self._reach()
        with self._consuming(self._queues[name], prefetch) as consumer:
            yield consumer

    @asynccontextmanager
    async def tap(self, *patterns: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        await self._reach()
        queue = _Queue(set(patterns))
        self._taps.append(queue)
        try:
            with self._consuming(queue, None) as consumer:
                yield consumer
        finally:
            self._taps.remove(queue)

    async def park_frame(self, chat: ChatRef, raw: bytes, reason: str) -> None:
        await self._reach()
        self._queues[DEAD_FRAMES].fresh.append(_Message(raw, DEAD_FRAMES))
        self._news.tell()

    async def depth(self, queue: str) -> int:
        await self._reach()
        return len(self._queues[queue])

    # Within

    async def _reach(self) -> None:
        await asyncio.sleep(0)  # as a network would, let the others have their turn
        if self._down:
            raise Unavailable("the broker is down")
        if not self._complete:
            self._declare()

    def _declare(self) -> None:
        for queue in QUEUES.values():
            if queue.name not in self._queues:
                self._queues[queue.name] = _Queue(fresh=deque(maxlen=self._keep if queue.is_stream else None))
        for queue in QUEUES.values():
            twin = self._queues[queue.name]
            if queue.dead_letters is not None:
                twin.dead_letters = self._queues[queue.dead_letters]
                twin.delivery_limit = int(queue.arguments["x-delivery-limit"])
        for part in TOPOLOGY:
            if isinstance(part, Binding):
                self._queues[part.queue].patterns.add(part.pattern)
        self._complete = True  # as far as this side knows

    def _route(self, body: bytes, routing_key: str) -> bool:
        takers = [
            queue
            for queue in (*self._queues.values(), *self._taps)
            if any(matches(pattern, routing_key) for pattern in queue.patterns)
        ]
        for queue in takers:
            queue.fresh.append(_Message(body, routing_key))
        return bool(takers)

    @contextmanager
    def _consuming(self, queue: _Queue, prefetch: int | None) -> Iterator["_Consumer"]:
        consumer = _Consumer(queue, prefetch, self._news)
        queue.consumers.append(consumer)
        try:
            yield consumer
        finally:
            if consumer in queue.consumers:
                self._end(consumer, "the consumer was closed")

    def _cut_off(self, queue: _Queue, reason: str) -> None:
        self._complete = False
        for consumer in tuple(queue.consumers):
            self._end(consumer, reason)

    def _end(self, consumer: "_Consumer", reason: str) -> None:
        consumer.queue.consumers.remove(consumer)
        consumer.lost = reason
        for message in consumer.unended.values():
            consumer.queue.take_back(message)
        consumer.unended.clear()
        self._news.tell()


class _Consumer:
    """Both the consumer that the broker knows and the iterator that its program holds."""

    def __init__(self, queue: _Queue, prefetch: int | None, news: _News) -> None:
        self.queue = queue
        self.lost: str | None = None
        self.unended: dict[int, _Message] = {}  # by delivery tag, in order
        self.news = news
        self._prefetch = prefetch  # None: a delivery is ended by being delivered
        self._tags = count(1)

    def __aiter__(self) -> "_Consumer":
        return self

    async def __anext__(self) -> "MemoryDelivery":
        await asyncio.sleep(0)  # a full queue must not keep the others from running
        while self.lost is None:
            if self.queue and (self._prefetch is None or len(self.unended) < self._prefetch):
                tag, message = next(self._tags), self.queue.take()
                if self._prefetch is None:
                    return MemoryDelivery(message, None, tag)
                self.unended[tag] = message
                return MemoryDelivery(message, self, tag)
            await self.news.wait()
        raise Unavailable(self.lost)


class MemoryDelivery:
    """A message of a queue or, without a consumer that keeps count, of a tap."""

    def __init__(self, message: _Message, consumer: _Consumer | None, tag: int) -> None:
        self._message = message
        self._consumer = consumer
        self._tag = tag
        self._ended = False

    @property
    def body(self) -> bytes:
        return self._message.body

    @property
    def routing_key(self) -> str:
        return self._message.routing_key

    @property
    def redelivered(self) -> bool:
        return self._message.returns > 0

    async def ack(self) -> None:
        self._end()

    async def requeue(self) -> None:
        if (consumer := self._end()) is not None:
            consumer.queue.take_back(self._message)
            consumer.news.tell()

    async def dead_letter(self, reason: str) -> None:
        if (consumer := self._end()) is not None:
            consumer.queue.give_up(self._message)
            consumer.news.tell()

    def _end(self) -> _Consumer | None:
        if self._ended:
            raise RuntimeError("a delivery is ended once")
        self._ended = True
        if self._consumer is not None:
            if self._consumer.lost is not None:
                raise Unavailable(self._consumer.lost)
            del self._consumer.unended[self._tag]
            self._consumer.news.tell()  # there is room for the next one
        return self._consumer


# --- time ----------------------------------------------------------------------------------------------------------


class ManualClock:
    """`Clock` that stands still until it is told to go on.

    Args:
        now: What the wall clock shows at first.
    """

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)) -> None:
        self._now = now
        self._monotonic = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []  # a heap
        self._numbers = count()
        self._news = _News()

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        sleeper = (self._monotonic + seconds, next(self._numbers), asyncio.get_running_loop().create_future())
        heapq.heappush(self._sleepers, sleeper)
        self._news.tell()
        try:
            await sleeper[2]
        finally:
            if sleeper in self._sleepers:  # it was cancelled
                self._sleepers.remove(sleeper)
                heapq.heapify(self._sleepers)

    def advance(self, seconds: float) -> None:
        """Let time pass at once: who sleeps no longer than that wakes, the earliest first, and sees the new time."""
        self._now += timedelta(seconds=seconds)
        self._monotonic += seconds
        while self._sleepers and self._sleepers[0][0] <= self._monotonic:
            wake = heapq.heappop(self._sleepers)[2]
            if not wake.done():
                wake.set_result(None)

    def step(self, seconds: float) -> None:
        """Set the wall clock forward or back, as an administrator might; no time passes."""
        self._now += timedelta(seconds=seconds)

    async def until_asleep(self, sleepers: int = 1) -> None:
        """Return once so many tasks sleep: the fact to wait for before `advance`."""
        while len(self._sleepers) < sleepers:
            await self._news.wait()
