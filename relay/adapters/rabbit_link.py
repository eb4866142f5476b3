"""A connection to RabbitMQ that is opened when it is needed, and again after it was lost.

Messages are aio-pika's; connections and channels are those of aiormq, the engine inside of it. aio-pika's robust
connection reconnects in the dark, and its plain one adds no more than names, while what matters here (who was told of a
loss, a return, a cancelled consumer) is aiormq's.
"""

import asyncio
import logging
import platform
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import aiormq
import structlog
from aiormq.abc import AbstractChannel, AbstractConnection
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from prometheus_client import Counter
from yarl import URL

from relay.core.errors import Unavailable, WrongSettings

log = structlog.get_logger(__name__)
# It reports one loss up to three times with a traceback, and at debug level every frame with the text in it.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)

RECONNECTS = Counter(
    "relay_broker_reconnects_total",
    "Connections to RabbitMQ that were made anew, by what ended the last one; auth_error counts attempts that were "
    "refused. A rise is a broker that restarts, a bad network, or a changed password.",
    ["reason"],
)
for _reason in ("closed_by_broker", "heartbeat", "network_error", "auth_error"):
    RECONNECTS.labels(_reason)

# What aiormq raises when the other side fails.
FAILURES = (aiormq.AMQPError, aiormq.ChannelInvalidStateError, OSError)
_CLOSE_SECONDS = 5.0

T = TypeVar("T")


async def ask(call: Coroutine[Any, Any, T], seconds: float) -> T:
    """Await a call of aiormq, at most `seconds`.

    In a task of its own: a connection that dies cancels what waits for it, and that must not look as if the caller had
    been cancelled.

    Raises:
        TimeoutError, AMQPError, OSError, ChannelInvalidStateError: One of `FAILURES`.
    """
    task = asyncio.create_task(call)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            _leave_behind(task)
    if not task.done():
        raise TimeoutError(f"the broker did not answer within {seconds:g} s")
    if task.cancelled():
        raise aiormq.AMQPConnectionError("connection lost")
    if is_loss(error := task.exception()):
        raise aiormq.AMQPConnectionError("connection lost") from error
    return task.result()


def is_loss(error: BaseException | None) -> bool:
    """Whether aiormq gave a call up without saying why: it raises a bare `Exception`, or what ends an iteration."""
    return type(error) in (Exception, StopAsyncIteration)


async def open_channel(connection: AbstractConnection, seconds: float, *, confirms: bool) -> AbstractChannel:
    """A new channel. With `confirms`, a message that is returned raises.

    Raises:
        TimeoutError, AMQPError, OSError: One of `FAILURES`.
    """
    try:
        return await ask(connection.channel(publisher_confirms=confirms, on_return_raises=confirms), seconds)
    except RuntimeError as exc:  # it was closed meanwhile
        raise aiormq.AMQPConnectionError("connection lost") from exc


_left_behind: set[asyncio.Task[Any]] = set()


def _leave_behind(task: asyncio.Task[Any]) -> None:
    """Cancel without waiting: on a full socket aiormq ends a call only when the connection ends."""
    task.cancel()
    _left_behind.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, or asyncio complains


def is_blocked(connection: AbstractConnection) -> bool:
    """Whether the broker wants nothing published (`connection.blocked`: it is short of memory or disk)."""
    probe = connection.ready()  # aiormq tells by letting this wait, and only so
    try:
        probe.send(None)
    except StopIteration:
        return False
    probe.close()
    return True


async def until_unblocked(connection: AbstractConnection) -> None:
    """Return once the broker wants to be published to, or the connection has ended."""
    ready = asyncio.create_task(connection.ready())
    try:
        await asyncio.wait([ready, connection.closing], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ready.cancel()


class _Connection(aiormq.Connection):
    # In units of the heartbeat. The protocol's own rule; aiormq would wait for three.
    HEARTBEAT_GRACE_MULTIPLIER = 1


class _Transport(aiormq.TransportFactory):
    """Opens the socket and keeps hold of it, to end a connection on which nobody answers."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory = TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory()
        reader, self._writer = await factory.create(url, **kwargs)
        return reader, self._writer

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open a connection. The URL holds the password; `safe_url` is the one to show."""

    url: URL
    safe_url: str
    connect_timeout_seconds: float


class Link:
    """One connection, remade on use after a loss.

    Args:
        purpose: For the broker's list of connections and for the log.
        prepare: Called with each new connection before anybody else has it, and again when `doubt` was called.
        changed: Called after the connection was opened or lost.
    """

    def __init__(
        self,
        opening: Opening,
        purpose: str,
        *,
        prepare: Callable[[AbstractConnection], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self.wanted = False  # it was opened at least once
        self._opening = opening
        self._purpose = purpose
        self._prepare = prepare
        self._changed = changed
        self._lock = asyncio.Lock()
        self._connection: _Connection | None = None
        self._transport = _Transport()
        self._prepared = False
        self._lost: str | None = None  # what ended the last connection
        self._closing = False

    @property
    def is_open(self) -> bool:
        return self._connection is not None and self._connection.is_opened

    async def connection(self, *, first: bool = False) -> AbstractConnection:
        """The open and prepared connection. `first`: what cannot work is a wrong setting, not a fault that may pass.

        Raises:
            WrongSettings: Only if `first`.
            Unavailable, TimeoutError, AMQPError, OSError, ChannelInvalidStateError: The last four are `FAILURES`.
        """
        async with self._lock:
            try:
                connection = self._connection
                if connection is None or not connection.is_opened:
                    self._prepared = False
                    connection = await self._open()
                if not self._prepared:
                    await self._prepare(connection)
                    self._prepared = True
            except WrongSettings as exc:
                if first:
                    raise
                # It worked before. A cluster that restarts may refuse for a while what it took all along.
                raise Unavailable(str(exc)) from exc
            return connection

    def doubt(self) -> None:
        """Have the connection prepared again before its next use."""
        self._prepared = False

    async def close(self) -> None:
        """End the connection, politely if the broker answers."""
        self._closing = True
        if self._connection is not None:
            try:
                await ask(self._connection.close(), _CLOSE_SECONDS)
            except FAILURES:
                self._transport.abort()

    async def _open(self) -> _Connection:
        if self._connection is not None and not self._connection.is_closed:
            self._transport.abort()
            await asyncio.wait([self._connection.closing], timeout=_CLOSE_SECONDS)  # its end is told before a new one
        transport = _Transport()
        name = f"coder-chat-relay {self._purpose} on {platform.node()}"
        connection = _Connection(
            self._opening.url, transport_factory=transport, client_properties={"connection_name": name}
        )
        try:
            await ask(connection.connect(), self._opening.connect_timeout_seconds)
        except aiormq.AMQPError as exc:
            if (refusal := self._refusal(exc)) is None:
                raise
            if self.wanted:
                RECONNECTS.labels("auth_error").inc()
            raise refusal from exc
        self._transport, self._connection = transport, connection
        connection.closing.add_done_callback(partial(self._on_loss, connection))
        if self._lost is not None:
            RECONNECTS.labels(self._lost).inc()
        self.wanted = True
        self._changed()
        log.info("broker_connected", url=self._opening.safe_url, purpose=self._purpose)
        return connection

    def _refusal(self, exc: aiormq.AMQPError) -> WrongSettings | None:
        """What the broker said about who we are and where we want to go; None when it was something else."""
        url = self._opening.url
        at = f"RabbitMQ at {self._opening.safe_url}"
        if isinstance(exc, aiormq.ProbableAuthenticationError | aiormq.AuthenticationError):
            return WrongSettings(f"{at} refused user {url.user!r}: check user and password in the URL")
        # aiormq drops the broker's words here. A vhost that is stopped or full looks the same.
        if isinstance(exc, aiormq.InvalidFrameError) and "Connection.OpenOk" in str(exc):
            vhost = url.path.removeprefix("/").replace("%2F", "/") or "/"
            return WrongSettings(
                f"{at} did not let user {url.user!r} into vhost {vhost!r}: create it, give the user permission for it "
                "(rabbitmqctl add_vhost, set_permissions), or correct the URL; the broker's log says which"
            )
        if isinstance(exc.__cause__, ssl.SSLError):
            return WrongSettings(f"no TLS with {at}: {exc.__cause__}")
        return None

    def _on_loss(self, connection: _Connection, closed: "asyncio.Future[object]") -> None:
        error = None if closed.cancelled() else closed.exception()
        if not self._closing:
            if isinstance(error, aiormq.ConnectionClosed):
                self._lost = "closed_by_broker"
            else:
                self._lost = "heartbeat" if connection.is_connection_was_stuck else "network_error"
            log.warning("broker_lost", purpose=self._purpose, reason=self._lost, error=str(error or "cut"))
        self._changed()
