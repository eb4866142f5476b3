"""Work off one of the relay's queues: effect first, then the acknowledgement; a message that cannot be understood goes
to the dead letters; whatever breaks the link, the consumer comes back."""

from collections.abc import Awaitable, Callable

import structlog
from prometheus_client import Counter, Gauge, Histogram

from relay.core.backoff import backoff
from relay.core.errors import BadEvent, Unavailable
from relay.core.events import Event, decode_event
from relay.ports import Bus, Clock, Delivery
from relay.programs.chance import Chance

log = structlog.get_logger(__name__)

CONSUMERS = ("meter", "archivist")
MESSAGES = Counter(
    "relay_consumer_messages_total",
    "Deliveries by outcome. held: a dependency is away, tried again. dead_lettered: look at the dead-letter queue.",
    ["consumer", "outcome"],
)
SECONDS = Histogram(
    "relay_consumer_processing_duration_seconds",
    "Time to handle one delivery. A rise: the database or the broker is slow, the queue will grow.",
    ["consumer"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
INFLIGHT = Gauge("relay_consumer_inflight", "Deliveries being handled.", ["consumer"])
for _consumer in CONSUMERS:
    SECONDS.labels(_consumer)
    INFLIGHT.labels(_consumer)
    for _outcome in ("acked", "held", "dead_lettered"):
        MESSAGES.labels(_consumer, _outcome)

Handle = Callable[[Event], Awaitable[None]]
Report = Callable[[bool, str], None]


class Inbox:
    """One consumer of one queue.

    `handle` must store its effect before it returns, and may be called again for the same event. It raises `BadEvent`
    for one that it cannot understand.
    """

    def __init__(self, consumer: str, queue: str, *, bus: Bus, clock: Clock, prefetch: int) -> None:
        self._consumer = consumer
        self._queue = queue
        self._bus = bus
        self._clock = clock
        self._prefetch = prefetch

    async def work_off(self, handle: Handle, report: Report) -> None:
        """Until cancelled. `report` hears whether the queue can be worked off, and why not."""
        delays = backoff(chance=Chance())
        while True:
            try:
                async with self._bus.deliveries(self._queue, prefetch=self._prefetch) as deliveries:
                    report(True, "")
                    log.info("consuming", consumer=self._consumer, queue=self._queue)
                    async for delivery in deliveries:
                        await self._take(delivery, handle, report)
                        delays = backoff(chance=Chance())
            except Unavailable as exc:
                report(False, str(exc))
                log.warning("consumer_interrupted", consumer=self._consumer, reason=str(exc))
            await self._clock.sleep(next(delays))

    async def _take(self, delivery: Delivery, handle: Handle, report: Report) -> None:
        began = self._clock.monotonic()
        with INFLIGHT.labels(self._consumer).track_inprogress():
            try:
                await self._handle(decode_event(delivery.body, delivery.routing_key), handle, report)
            except BadEvent as exc:
                log.warning("event_dead_lettered", consumer=self._consumer, reason=str(exc))
                await delivery.dead_letter(str(exc))
                outcome = "dead_lettered"
            else:
                await delivery.ack()
                outcome = "acked"
        MESSAGES.labels(self._consumer, outcome).inc()
        SECONDS.labels(self._consumer).observe(self._clock.monotonic() - began)

    async def _handle(self, event: Event, handle: Handle, report: Report) -> None:
        """Until it is handled. To give it back instead would count towards the delivery limit: an outage of some
        minutes would end in the dead letters."""
        for delay in backoff(chance=Chance()):
            try:
                await handle(event)
            except Unavailable as exc:
                report(False, str(exc))
                MESSAGES.labels(self._consumer, "held").inc()
                log.warning("event_held", consumer=self._consumer, reason=str(exc))
                await self._clock.sleep(max(delay, exc.retry_after_seconds or 0.0))
            else:
                report(True, "")
                return
