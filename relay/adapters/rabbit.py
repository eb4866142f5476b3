"""RabbitMQ behind the `Bus` port: confirmed publishing, deliveries with manual acks, taps.

Two connections: a broker that is short of memory stops reading from one that publishes, and acks must still reach it.
Nothing is repeated in here. Whatever fails is told to the caller as `Unavailable`, and the next call connects and
declares anew.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Literal
from uuid import uuid4

import aiormq
from aiormq.abc import AbstractChannel, AbstractConnection
from pamqp.common import FieldValue
from prometheus_client import Gauge
from pydantic import AmqpDsn, BaseModel, Field, PositiveFloat, PositiveInt, field_validator
from yarl import URL

from relay.adapters.rabbit_inbox import Inbox
from relay.adapters.rabbit_link import FAILURES, Link, Opening, ask, open_channel, safe
from relay.adapters.rabbit_outgoing import Outgoing, Sender, outgoing
from relay.adapters.rabbit_plain import PlainSender
from relay.adapters.rabbit_publisher import PipelinedSender
from relay.adapters.rabbit_wire import Wire
from relay.adapters.topology import DEAD_FRAMES, TOPOLOGY, Binding, Exchange, Queue, consumable
from relay.core.errors import WrongSettings
from relay.core.events import EXCHANGE, ChatRef, Event
from relay.ports import Delivery

CONNECTED = Gauge(
    "relay_broker_connected", "1 while all connections to RabbitMQ that are in use stand. A fall to 0 stops all events."
)


class RabbitSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """The broker.

    `url`: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS, then with `?cafile=` for an own authority and
    `certfile=` and `keyfile=` for a client certificate. A vhost named `/` is written `%2F` or left out.
    `hosts`: more nodes of the same cluster, `host` or `host:port`; user, vhost and TLS are those of the URL.
    """

    url: AmqpDsn = Field(repr=False)  # holds the password; show `safe_url`
    hosts: Sequence[str] = ()
    confirm_timeout_seconds: PositiveFloat = 10.0  # for one publish as a whole, and for any other answer
    connect_timeout_seconds: PositiveFloat = 10.0  # for each host
    heartbeat_seconds: PositiveInt = 10  # a dead connection is noticed within twice that
    publisher: Literal["pipelined", "plain"] = "pipelined"  # plain: by way of aiormq, many times slower
    window: PositiveInt = 2048  # messages that may wait for the broker's confirm at once; `plain` has no limit

    @field_validator("url")
    @classmethod
    def _has_host(cls, url: AmqpDsn) -> AmqpDsn:
        if not url.host:
            raise ValueError("a host is missing: amqp://user:password@host:5672/vhost")
        return url

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, hosts: Sequence[str]) -> Sequence[str]:
        for host in hosts:
            try:
                url = URL(f"amqp://{host}")
                plain = url.host is not None and str(url.origin()) == f"amqp://{host}".lower() and url.user is None
            except ValueError:
                plain = False
            if not plain:
                raise ValueError('each is "host" or "host:port"; user, vhost and the rest are those of the URL')
        return tuple(hosts)

    @property
    def urls(self) -> Sequence[URL]:
        """One per node, each with the password."""
        url = URL(str(self.url)).update_query(heartbeat=self.heartbeat_seconds)
        others = [URL(f"amqp://{host}") for host in self.hosts]
        return [url, *(url.with_host(other.host or "").with_port(other.explicit_port or url.port) for other in others)]

    @property
    def safe_url(self) -> str:
        """The URL without password and query."""
        return safe(URL(str(self.url)))

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


class RabbitBus:
    """`Bus` on RabbitMQ. Made by `open_rabbit`."""

    def __init__(self, settings: RabbitSettings) -> None:
        self._patience = settings.confirm_timeout_seconds
        opening = Opening(settings.urls, settings.connect_timeout_seconds)
        self._first_patience = len(opening.urls) * settings.connect_timeout_seconds + self._patience
        self._in = Link(opening, "consumer", prepare=self._declare, changed=self._on_change)
        self._out: Link
        self.publisher: Sender
        if settings.publisher == "pipelined":
            self._out = Link(opening, "publisher", prepare=self._declare, changed=self._on_change, make_protocol=Wire)
            self.publisher = PipelinedSender(
                self._out, patience=self._patience, first_patience=self._first_patience, size=settings.window
            )
        else:
            self._out = Link(opening, "publisher", prepare=self._declare, changed=self._on_change)
            self.publisher = PlainSender(self._out, patience=self._patience, first_patience=self._first_patience)

    async def check(self) -> None:
        """Connect and declare, if that is not done. Raises as `open_rabbit` does."""
        await self.publisher.check()

    async def close(self) -> None:
        """End both connections. What was not acked comes again to the next consumer."""
        await self._out.close()
        await self._in.close()
        CONNECTED.set(0)

    # --- publishing

    async def publish(self, events: Sequence[Event]) -> None:
        await self.publisher.send([outgoing(event) for event in events])

    async def park_frame(self, chat: ChatRef, raw: bytes, reason: str) -> None:
        about = {"deployment": chat.deployment, "chat_id": str(chat.chat_id), "owner_id": str(chat.owner_id)}
        frame = Outgoing(
            uuid4().hex,
            None,
            "",
            DEAD_FRAMES,
            raw,
            "io.chatrelay.frame",
            int(datetime.now(UTC).timestamp()),
            content_type="application/octet-stream",
            headers={**about, "reason": reason},
        )
        await self.publisher.send([frame])

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
        with self._in.translated(self._patience):
            async with self._passing_channel() as channel:
                declared = await ask(channel.queue_declare(queue, passive=True), self._patience)
        return int(declared.message_count or 0)

    @asynccontextmanager
    async def _consuming(
        self, source: Callable[[AbstractChannel], Awaitable[str]], *, no_ack: bool
    ) -> AsyncIterator[Inbox]:
        async with contextlib.AsyncExitStack() as stack:
            with self._in.translated(self._patience):
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

    def _on_change(self) -> None:
        CONNECTED.set(all(link.is_open for link in (self._out, self._in) if link.wanted))
