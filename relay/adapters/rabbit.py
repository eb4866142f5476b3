"""RabbitMQ behind the `Bus` port: confirmed publishing, deliveries with manual acks, taps.

Two connections: a broker that is short of memory stops reading from one that publishes, and acks must still reach it.
Nothing is repeated in here. Whatever fails is told to the caller as `Unavailable`, and the next call connects and
declares anew.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from uuid import uuid4

import aiormq
import structlog
from aio_pika import DeliveryMode, Message
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp.common import FieldValue
from prometheus_client import Counter, Gauge, Histogram
from pydantic import AmqpDsn, BaseModel, Field, PositiveFloat, PositiveInt, field_validator
from yarl import URL

from relay.adapters.rabbit_inbox import Inbox
from relay.adapters.rabbit_link import FAILURES, Link, Opening, ask, is_blocked, is_loss, open_channel, until_unblocked
from relay.adapters.topology import DEAD_FRAMES, TOPOLOGY, Binding, Exchange, Queue, consumable
from relay.core.errors import TooLarge, Unavailable, Unroutable, WrongSettings
from relay.core.events import APP_ID, CONTENT_TYPE, EXCHANGE, ChatRef, Event
from relay.ports import Delivery

log = structlog.get_logger(__name__)

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
CONNECTED = Gauge(
    "relay_broker_connected", "1 while all connections to RabbitMQ that are in use stand. A fall to 0 stops all events."
)
BLOCKED = Gauge(
    "relay_broker_blocked",
    "1 while RabbitMQ blocks publishers. A rise means that it is short of memory or disk: nothing is published.",
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)  # AMQP knows nothing before; Go's zero time is in the year 1
_CHECK_SECONDS = 1.0  # how often a publish that waits looks whether the broker blocks it
_TOO_LARGE = re.compile(r"message size (\d+) is larger than (?:configured )?max size (\d+)")


class RabbitSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """The broker.

    `url`: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS, then with `?cafile=` for an own authority and
    `certfile=` and `keyfile=` for a client certificate. A vhost named `/` is written `%2F` or left out.
    """

    url: AmqpDsn = Field(repr=False)  # holds the password; show `safe_url`
    confirm_timeout_seconds: PositiveFloat = 10.0  # for one publish as a whole, and for any other answer
    connect_timeout_seconds: PositiveFloat = 10.0
    heartbeat_seconds: PositiveInt = 10  # a dead connection is noticed within twice that

    @field_validator("url")
    @classmethod
    def _has_host(cls, url: AmqpDsn) -> AmqpDsn:
        if not url.host:
            raise ValueError("a host is missing: amqp://user:password@host:5672/vhost")
        return url

    @property
    def safe_url(self) -> str:
        """The URL without password and query."""
        url = URL(str(self.url)).with_query(None)
        return str(url.with_password("***") if url.password else url)

    def __str__(self) -> str:
        return repr(self)


@asynccontextmanager
async def open_rabbit(settings: RabbitSettings) -> AsyncIterator["RabbitBus"]:
    """Connect and declare the topology.

    Raises:
        Unavailable: The broker cannot be reached.
        WrongSettings: It refused the user, the vhost or the declaration of the topology.
    """
    bus = RabbitBus(settings)
    try:
        await bus.check()
        yield bus
    finally:
        await bus.close()


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A message ready to send."""

    id: str
    family: str | None  # for the count of events; None: not one
    exchange: str
    routing_key: str
    message: Message
    mandatory: bool


class RabbitBus:
    """`Bus` on RabbitMQ. Made by `open_rabbit`."""

    def __init__(self, settings: RabbitSettings) -> None:
        self._patience = settings.confirm_timeout_seconds
        self._first_patience = settings.connect_timeout_seconds + self._patience
        url = URL(str(settings.url)).update_query(heartbeat=settings.heartbeat_seconds)
        opening = Opening(url, settings.safe_url, settings.connect_timeout_seconds)
        self._out = Link(opening, "publisher", prepare=self._declare, changed=self._on_change)
        self._in = Link(opening, "consumer", prepare=self._declare, changed=self._on_change)
        self._opening_channel = asyncio.Lock()
        self._channel: AbstractChannel | None = None
        self._in_flight: dict[str, asyncio.Task[object]] = {}  # by message id
        self._blocked: asyncio.Task[None] | None = None  # runs until the broker wants to be published to again

    async def check(self) -> None:
        """Connect and declare, if that is not done. Raises as `open_rabbit` does."""
        with self._translated():
            async with asyncio.timeout(self._first_patience):
                await self._publishing(first=True)

    async def close(self) -> None:
        """End both connections. What was not acked comes again to the next consumer."""
        await self._out.close()
        await self._in.close()
        CONNECTED.set(0)

    # --- publishing

    async def publish(self, events: Sequence[Event]) -> None:
        if not events:
            return
        await self._send([_outgoing(event) for event in events])

    async def park_frame(self, chat: ChatRef, raw: bytes, reason: str) -> None:
        about = {"deployment": chat.deployment, "chat_id": str(chat.chat_id), "owner_id": str(chat.owner_id)}
        name = uuid4().hex
        frame = Message(
            raw,
            message_id=name,
            type="io.chatrelay.frame",
            app_id=APP_ID,
            timestamp=datetime.now(UTC),
            content_type="application/octet-stream",
            delivery_mode=DeliveryMode.PERSISTENT,
            headers={**about, "reason": reason},
        )
        await self._send([_Outgoing(name, None, "", DEAD_FRAMES, frame, mandatory=True)])

    async def _send(self, messages: Sequence[_Outgoing]) -> None:
        """Publish in order, then wait for all answers, all of it under one deadline."""
        tasks: list[asyncio.Task[object]] = []
        late = False
        try:
            with self._translated():
                async with asyncio.timeout(self._patience):
                    channel = await self._publishing()
                    await self._until_unblocked(channel.connection)
                    for message in messages:
                        # aiormq knows a returned message by its id. Two copies in flight, and the return of the first
                        # would be booked on the second: the first, which nobody took, would count as delivered.
                        while (copy := self._in_flight.get(message.id)) is not None:
                            await asyncio.wait([copy])
                        tasks.append(self._start(channel, message))
                    await self._until_answered(tasks, channel.connection)
        except Unavailable as exc:
            late = isinstance(exc.__cause__, TimeoutError)
            if late and self._blocked is not None:
                raise Unavailable("RabbitMQ blocks publishers: it is short of memory or disk") from exc
            raise
        finally:
            undone = [task for task in tasks if not task.done()]
            for task in undone:
                task.cancel()
            if undone:
                await asyncio.wait(undone)
            outcomes = [_outcome_of(task, late=late) for task in tasks]
            for outcome in outcomes:
                PUBLISHED.labels(outcome).inc()
        for message, task, outcome in zip(messages, tasks, outcomes, strict=True):
            if outcome == "returned":
                self._out.doubt()  # somebody removed a binding or a queue: put it back before the next
                raise Unroutable(f"no queue is bound for {message.routing_key}")
            if outcome == "error" and not _is_failure(task):
                await task  # a mistake of ours, not of the broker's: raise it
        if any(outcome != "confirmed" for outcome in outcomes):
            raise self._failure(messages, outcomes, channel)

    async def _publishing(self, *, first: bool = False) -> AbstractChannel:
        connection = await self._out.connection(first=first)
        async with self._opening_channel:
            if self._channel is None or self._channel.is_closed or self._channel.connection is not connection:
                self._channel = await open_channel(connection, self._patience, confirms=True)
            return self._channel

    def _start(self, channel: AbstractChannel, message: _Outgoing) -> asyncio.Task[object]:
        # The task does not run before the next await: tasks begin, and so publish, in the order of their making.
        task: asyncio.Task[object] = asyncio.create_task(
            channel.basic_publish(
                message.message.body,
                exchange=message.exchange,
                routing_key=message.routing_key,
                properties=message.message.properties,
                mandatory=message.mandatory,
            )
        )
        self._in_flight[message.id] = task
        MESSAGE_BYTES.observe(len(message.message.body))
        IN_FLIGHT.inc()
        task.add_done_callback(partial(self._on_answer, message, time.monotonic()))
        return task

    def _on_answer(self, message: _Outgoing, started: float, task: asyncio.Task[object]) -> None:
        del self._in_flight[message.id]
        IN_FLIGHT.dec()
        if _outcome_of(task, late=False) == "confirmed":
            CONFIRM_SECONDS.observe(time.monotonic() - started)
            if message.family is not None:
                EVENTS.labels(message.family).inc()

    def _failure(
        self, messages: Sequence[_Outgoing], outcomes: Sequence[str], channel: AbstractChannel
    ) -> TooLarge | Unavailable:
        """Why messages were neither confirmed nor returned."""
        if "nacked" in outcomes:
            return Unavailable("the broker could not store a message")
        closing = channel.closing
        reason = closing.exception() if closing.done() and not closing.cancelled() else None
        if isinstance(reason, aiormq.ChannelNotFoundEntity):
            self._out.doubt()
        # The channel is shared: only who sent that message is told, the others send theirs again.
        if match := _TOO_LARGE.search(str(reason)):
            size, limit = int(match[1]), int(match[2])
            for message in messages:
                if len(message.message.body) == size:
                    what = f"{message.routing_key} has {size} bytes, RabbitMQ takes {limit}"
                    return TooLarge(f"{what}: raise max_message_size in its rabbitmq.conf", size, limit)
        return Unavailable(f"broker: {reason or 'connection lost'}")

    async def _until_answered(self, tasks: Sequence[asyncio.Task[object]], connection: AbstractConnection) -> None:
        waiting = set(tasks)
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=_CHECK_SECONDS)
            if waiting:
                self._look_if_blocked(connection)

    async def _until_unblocked(self, connection: AbstractConnection) -> None:
        # What is sent to a broker that does not read waits in the socket, and its repetitions behind it.
        self._look_if_blocked(connection)
        if self._blocked is not None:
            await asyncio.wait([self._blocked])

    def _look_if_blocked(self, connection: AbstractConnection) -> None:
        if self._blocked is None and is_blocked(connection):
            BLOCKED.set(1)
            log.warning("broker_blocked")
            self._blocked = asyncio.create_task(until_unblocked(connection))
            self._blocked.add_done_callback(self._on_unblocked)

    def _on_unblocked(self, _: asyncio.Task[None]) -> None:
        BLOCKED.set(0)
        log.info("broker_unblocked")
        self._blocked = None

    # --- consuming

    @asynccontextmanager
    async def deliveries(self, queue: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        name = consumable(queue).name

        async def source(channel: AbstractChannel) -> str:
            await ask(channel.basic_qos(prefetch_count=prefetch), self._patience)
            return name

        async with self._consuming(source, no_ack=False) as inbox:
            yield inbox

    @asynccontextmanager
    async def tap(self, *patterns: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        async def source(channel: AbstractChannel) -> str:
            declared = await ask(channel.queue_declare(exclusive=True, auto_delete=True), self._patience)
            name = str(declared.queue)
            for pattern in patterns:
                await ask(channel.queue_bind(name, EXCHANGE, pattern), self._patience)
            return name

        async with self._consuming(source, no_ack=True) as inbox:
            yield inbox

    async def depth(self, queue: str) -> int:
        with self._translated():
            async with self._passing_channel() as channel:
                declared = await ask(channel.queue_declare(queue, passive=True), self._patience)
        return int(declared.message_count or 0)

    @asynccontextmanager
    async def _consuming(
        self, source: Callable[[AbstractChannel], Awaitable[str]], *, no_ack: bool
    ) -> AsyncIterator[Inbox]:
        async with contextlib.AsyncExitStack() as stack:
            with self._translated():
                channel = await stack.enter_async_context(self._passing_channel())
                inbox = Inbox(channel, None if no_ack else self._patience, self._in.doubt)
                queue = await source(channel)
                await ask(channel.basic_consume(queue, inbox.put, no_ack=no_ack), self._patience)
            yield inbox

    # --- both

    async def _declare(self, connection: AbstractConnection) -> None:
        channel = await open_channel(connection, self._patience, confirms=False)
        try:
            for part in TOPOLOGY:
                await self._declare_part(channel, part)
        finally:
            await self._close(channel)

    async def _declare_part(self, channel: AbstractChannel, part: Exchange | Queue | Binding) -> None:
        try:
            match part:
                case Exchange():
                    await ask(
                        channel.exchange_declare(part.name, exchange_type=part.type, durable=True), self._patience
                    )
                case Queue():
                    arguments: dict[str, FieldValue] = dict(part.arguments)
                    await ask(channel.queue_declare(part.name, durable=True, arguments=arguments), self._patience)
                case Binding():
                    await ask(channel.queue_bind(part.queue, part.exchange, part.pattern), self._patience)
        except aiormq.ChannelPreconditionFailed as exc:
            name = part.queue if isinstance(part, Binding) else part.name
            raise WrongSettings(
                f"RabbitMQ does not take {name} as the relay declares it ({exc.args[0]}). If it is there with other "
                "arguments, let it be worked off, delete it (management page, rabbitmqctl delete_queue) and start again"
            ) from exc
        except aiormq.ChannelAccessRefused as exc:
            raise WrongSettings(
                f"RabbitMQ does not let the relay declare its topology ({exc.args[0]}). Give the user configure, write "
                r"and read permission for ^(coder\.chats|relay\..*|amq\.gen.*|amq\.default)$"
            ) from exc

    @asynccontextmanager
    async def _passing_channel(self) -> AsyncIterator[AbstractChannel]:
        """A channel for one consumer or one question: an error closes it, and nobody else's with it."""
        async with asyncio.timeout(self._first_patience):
            connection = await self._in.connection()
        channel = await open_channel(connection, self._patience, confirms=False)
        try:
            yield channel
        finally:
            await self._close(channel)

    async def _close(self, channel: AbstractChannel) -> None:
        # It fails where the connection is gone, and the channel with it.
        with contextlib.suppress(*FAILURES):
            await ask(channel.close(), self._patience)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except aiormq.ChannelNotFoundEntity as exc:
            self._in.doubt()
            raise Unavailable(f"broker: {exc}") from exc
        except TimeoutError as exc:
            raise Unavailable(str(exc) or f"the broker did not answer within {self._patience:g} s") from exc
        except FAILURES as exc:
            raise Unavailable(f"broker: {exc}") from exc

    def _on_change(self) -> None:
        CONNECTED.set(all(link.is_open for link in (self._out, self._in) if link.wanted))


def _outgoing(event: Event) -> _Outgoing:
    message = Message(
        event.encode(),
        message_id=str(event.id),
        type=event.type,
        app_id=APP_ID,
        timestamp=max(datetime.fromisoformat(event.time), _EPOCH),
        content_type=CONTENT_TYPE,
        delivery_mode=DeliveryMode.NOT_PERSISTENT if event.transient else DeliveryMode.PERSISTENT,
    )
    family = event.event if event.family == "chat" else event.family
    return _Outgoing(str(event.id), family, EXCHANGE, event.routing_key, message, mandatory=not event.transient)


def _outcome_of(task: asyncio.Task[object], *, late: bool) -> str:
    if task.cancelled():
        return "timeout" if late else "error"
    match task.exception():
        case None:
            return "confirmed"
        case aiormq.PublishError():
            return "returned"
        case aiormq.DeliveryError():
            return "nacked"
    return "error"


def _is_failure(task: asyncio.Task[object]) -> bool:
    """Whether it ended because the broker or the way to it failed."""
    return task.cancelled() or isinstance(error := task.exception(), FAILURES) or is_loss(error)
