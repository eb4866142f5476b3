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
    "Deliveries by outcome. requeued: a dependency was away. dead_lettered: look at the dead-letter queue.",
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
    for _outcome in ("acked", "requeued", "dead_lettered"):
        MESSAGES.labels(_consumer, _outcome)

Handle = Callable[[Event], Awaitable[None]]


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

    async def work_off(self, handle: Handle, report: Callable[[bool, str], None]) -> None:
        """Until cancelled. `report` hears whether the queue can be read, and why not."""
        delays = backoff(chance=Chance())
        while True:
            try:
                async with self._bus.deliveries(self._queue, prefetch=self._prefetch) as deliveries:
                    report(True, "")
                    log.info("consuming", consumer=self._consumer, queue=self._queue)
                    async for delivery in deliveries:
                        await self._take(delivery, handle)
                        delays = backoff(chance=Chance())
            except Unavailable as exc:
                report(False, str(exc))
                log.warning("consumer_interrupted", consumer=self._consumer, reason=str(exc))
            await self._clock.sleep(next(delays))

    async def _take(self, delivery: Delivery, handle: Handle) -> None:
        began = self._clock.monotonic()
        with INFLIGHT.labels(self._consumer).track_inprogress():
            try:
                await handle(decode_event(delivery.body, delivery.routing_key))
            except BadEvent as exc:
                log.warning("event_dead_lettered", consumer=self._consumer, reason=str(exc))
                await delivery.dead_letter(str(exc))
                outcome = "dead_lettered"
            except Unavailable:
                # Not its fault: it comes again. The link is made anew, with a pause, so that it does not spin.
                MESSAGES.labels(self._consumer, "requeued").inc()
                raise
            else:
                await delivery.ack()
                outcome = "acked"
        MESSAGES.labels(self._consumer, outcome).inc()
        SECONDS.labels(self._consumer).observe(self._clock.monotonic() - began)
