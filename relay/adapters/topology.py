"""What the relay declares on the broker, as data.

One list for all who need it: the RabbitMQ adapter declares it, its in-memory twin lives by it, `relay topology` prints
and exports it. Everything here is accepted by RabbitMQ 3.10 and by 4.x alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from relay.core.events import EXCHANGE

METER = "relay.meter"
ARCHIVIST = "relay.archivist"
LOG = "relay.log"
DEAD_FRAMES = "relay.frames.dead"

DELIVERY_LIMIT = 20  # returns of one message; RabbitMQ 4 has this by default, 3.x none
# A dead letter must outlive every look at it, and a look (get, put back) counts as a return. RabbitMQ 4 would drop the
# message after 20 of them. "Unlimited" cannot be said in 3.10, which refuses -1.
NEVER = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue; `arguments` as the broker knows them (`x-…`)."""

    name: str
    arguments: Mapping[str, str | int] = field(hash=False)

    @property
    def is_stream(self) -> bool:
        """Reading it takes nothing away."""
        return self.arguments["x-queue-type"] == "stream"

    @property
    def dead_letters(self) -> str | None:
        """The queue that gets what this one gives up."""
        name = self.arguments.get("x-dead-letter-routing-key")
        return None if name is None else str(name)


@dataclass(frozen=True, slots=True)
class Binding:
    """What the exchange routes to a queue: `*` stands for one word of the routing key, `#` for any number of them."""

    exchange: str
    queue: str
    pattern: str


def _worked_off(name: str) -> tuple[Queue, Queue]:
    """A queue that a program works off, behind the one for its dead letters."""
    dead = Queue(f"{name}.dead", {"x-queue-type": "quorum", "x-delivery-limit": NEVER})
    live: dict[str, str | int] = {
        "x-queue-type": "quorum",
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-dead-letter-exchange": "",  # the default exchange: straight into the queue of that name
        "x-dead-letter-routing-key": dead.name,
        # Without this pair a dead letter is published once without a confirm, and lost when that fails. The overflow
        # is only there because at-least-once asks for it: the queue has no maximum length.
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    return dead, Queue(name, live)


TOPOLOGY: tuple[Exchange | Queue | Binding, ...] = (
    Exchange(EXCHANGE, "topic"),
    *_worked_off(METER),
    *_worked_off(ARCHIVIST),
    Queue(
        LOG,
        {
            "x-queue-type": "stream",
            # Whichever comes first. Whole segments are dropped, the one being written never.
            "x-max-age": "7D",
            "x-max-length-bytes": 10_000_000_000,
            "x-stream-max-segment-size-bytes": 100_000_000,
        },
    ),
    Queue(DEAD_FRAMES, {"x-queue-type": "quorum", "x-delivery-limit": NEVER}),
    # The log first: whatever is taken while the others are not bound yet is at least there.
    Binding(EXCHANGE, LOG, "#"),
    Binding(EXCHANGE, METER, "chat.message.#"),
    Binding(EXCHANGE, ARCHIVIST, "chat.message.#"),
    Binding(EXCHANGE, ARCHIVIST, "chat.history.#"),
    Binding(EXCHANGE, ARCHIVIST, "chat.status.#"),
    Binding(EXCHANGE, ARCHIVIST, "chat.turn.#"),
    Binding(EXCHANGE, ARCHIVIST, "chat.lifecycle.#"),
)
QUEUES: Mapping[str, Queue] = {part.name: part for part in TOPOLOGY if isinstance(part, Queue)}


def consumable(name: str) -> Queue:
    """The queue of that name, one whose messages can be taken and acked.

    Raises:
        ValueError: The relay has no such queue, or it is a stream, which is read from an offset instead.
    """
    queue = QUEUES.get(name)
    if queue is None or queue.is_stream:
        names = ", ".join(sorted(q.name for q in QUEUES.values() if not q.is_stream))
        raise ValueError(f"{name!r} is not a queue to take messages from; there are {names}")
    return queue


def definitions(vhost: str = "/") -> dict[str, object]:
    """The topology in RabbitMQ's own format, for `rabbitmqctl import_definitions` and for operators of the broker."""
    return {
        "exchanges": [
            {
                "name": part.name,
                "vhost": vhost,
                "type": part.type,
                "durable": True,
                "auto_delete": False,
                "internal": False,
                "arguments": {},
            }
            for part in TOPOLOGY
            if isinstance(part, Exchange)
        ],
        "queues": [
            {"name": q.name, "vhost": vhost, "durable": True, "auto_delete": False, "arguments": dict(q.arguments)}
            for q in QUEUES.values()
        ],
        "bindings": [
            {
                "source": part.exchange,
                "vhost": vhost,
                "destination": part.queue,
                "destination_type": "queue",
                "routing_key": part.pattern,
                "arguments": {},
            }
            for part in TOPOLOGY
            if isinstance(part, Binding)
        ],
    }
