"""What goes out to RabbitMQ, and how it is counted: the same for every way of sending it."""

import re
from bisect import bisect_left, bisect_right
from collections import Counter as Count
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from typing import NamedTuple, Protocol

import prometheus_client
from prometheus_client import Counter, Gauge

from relay.core.errors import TooLarge, Unavailable, Unroutable
from relay.core.events import CONTENT_TYPE, EXCHANGE, Event, names_of


class Histogram(prometheus_client.Histogram):
    """One that takes a batch at the price of one: observing one by one takes longer than sending a message."""

    def observe_times(self, amount: float, times: int) -> None:
        """As `times` calls of `observe(amount)`."""
        self._sum.inc(amount * times)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(times)

    def observe_each(self, amounts: Collection[float]) -> None:
        """As `observe` for each."""
        self._sum.inc(sum(amounts))
        ascending, before = sorted(amounts), 0
        for place, bound in enumerate(self._upper_bounds):
            if (below := bisect_right(ascending, bound)) > before:
                self._buckets[place].inc(below - before)
                before = below


PUBLISHED = Counter(
    "relay_publish_total",
    "Messages by what became of them. A rise of returned is a durable event that no queue is bound for; of nacked, "
    "timeout or error a broker in trouble: the relay publishes these again.",
    ["outcome"],
)
for _outcome in ("confirmed", "nacked", "returned", "timeout", "error"):
    PUBLISHED.labels(_outcome)
EVENTS = Counter(
    "relay_events_published_total",
    "Events that the broker has confirmed, copies included. A rise is traffic; none while chats run is a fault.",
    ["family"],
)
for _family in ("message", "history", "status", "turn", "error", "retry", "queue", "lifecycle", "action", "preview"):
    EVENTS.labels(_family)
for _family in ("usage", "archive"):
    EVENTS.labels(_family)
CONFIRM_SECONDS = Histogram(
    "relay_publish_confirm_duration_seconds",
    "From handing a message over to the broker's confirm. A rise is a slow broker: disk, replication or memory.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
IN_FLIGHT = Gauge(
    "relay_publish_inflight", "Messages that wait for a confirm. A rise that stays is a broker that does not keep up."
)
MESSAGE_BYTES = Histogram(
    "relay_message_size_bytes",
    "Size of published bodies. A rise towards the broker's max_message_size (16 MiB from RabbitMQ 4) ends in refusals.",
    buckets=(256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304),
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # AMQP knows nothing before; Go's zero time is in the year 1
_TOO_LARGE = re.compile(r"message size (\d+) is larger than (?:configured )?max size (\d+)")


class Outgoing(NamedTuple):
    """A message ready to send. A tuple: one is made for each event, and a frozen dataclass takes five times as long."""

    id: str
    family: str | None  # for the count of events; None: not one
    exchange: str
    routing_key: str
    body: bytes
    type: str
    timestamp: int  # seconds since 1970
    persistent: bool = True
    mandatory: bool = True
    content_type: str = CONTENT_TYPE
    headers: Mapping[str, str] | None = None


class Sender(Protocol):
    """The way to the broker: `RabbitBus` is told by settings which one to take."""

    async def check(self) -> None:
        """Connect and declare the topology, if that is not done.

        Raises:
            Unavailable: The broker cannot be reached.
            WrongSettings: It refused the user, the vhost or the declaration of the topology.
        """

    async def send(self, messages: Sequence[Outgoing]) -> None:
        """Return once the broker has confirmed all, in order. Raises as `Publisher.publish` does."""


def outgoing(event: Event) -> Outgoing:
    """The event as it travels."""
    names = names_of(event.family, event.event, event.detail)
    durable = not names.transient
    time = event.time
    return _outgoing(
        Outgoing,
        (
            event.id,
            names.counted,
            EXCHANGE,
            names.routing_start + event.chat.routing_words,
            event.encode(names),
            names.type,
            _seconds(time[:19] if time[-1:] == "Z" else time),
            durable,  # persistent
            durable,  # mandatory
            CONTENT_TYPE,
            None,  # headers
        ),
    )


_outgoing = tuple.__new__  # `Outgoing(…)` takes three times as long, in a function of its own


@lru_cache(maxsize=256)
def _seconds(time: str) -> int:
    """Since 1970, of a time in UTC where it says no other. What goes out together mostly happened within a few."""
    moment = datetime.fromisoformat(time)
    return int(max(moment.replace(tzinfo=moment.tzinfo or UTC), _EPOCH).timestamp())


# --- counted -------------------------------------------------------------------------------------------------------

_family_of = attrgetter("family")


def count_sent(sizes: Sequence[int]) -> None:
    """Messages that are waited for from now on, by the bytes in their bodies."""
    IN_FLIGHT.inc(len(sizes))
    MESSAGE_BYTES.observe_each(sizes)


def count_answered(outcome: str, number: int) -> None:
    """Messages that are waited for no more, by outcome."""
    if number:
        IN_FLIGHT.dec(number)
        PUBLISHED.labels(outcome).inc(number)


def count_stored(messages: Iterable[Outgoing]) -> None:
    """Events among messages that the broker confirmed."""
    for family, number in Count(map(_family_of, messages)).items():
        if family is not None:
            EVENTS.labels(family).inc(number)


# --- what went wrong -----------------------------------------------------------------------------------------------


def unroutable(message: Outgoing) -> Unroutable:
    return Unroutable(f"no queue is bound for {message.routing_key}")


def not_stored() -> Unavailable:
    return Unavailable("the broker could not store a message")


def cut_off(messages: Sequence[Outgoing], reason: BaseException | None) -> TooLarge | Unavailable:
    """Why these were neither confirmed nor refused one by one: their channel or connection ended.

    The channel is shared: only who sent the message that the broker ended it for is told, the others send theirs again.
    """
    if match := _TOO_LARGE.search(str(reason)):
        size, limit = int(match[1]), int(match[2])
        for message in messages:
            if len(message.body) == size:
                what = f"{message.routing_key} has {size} bytes, RabbitMQ takes {limit}"
                return TooLarge(f"{what}: raise max_message_size in its rabbitmq.conf", size, limit)
    return Unavailable(f"broker: {reason or 'connection lost'}")


def blocked_by_broker() -> Unavailable:
    return Unavailable("RabbitMQ blocks publishers: it is short of memory or disk")


def late(seconds: float) -> Unavailable:
    return Unavailable(f"the broker did not answer within {seconds:g} s")
