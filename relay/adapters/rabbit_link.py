"""A connection to RabbitMQ that is opened when it is needed, and again after it was lost.

Connections and channels are those of aiormq, the engine inside of aio-pika. aio-pika's robust connection reconnects in
the dark, and its plain one adds no more than names, while what matters here (who was told of a loss, a return, a
cancelled consumer) is aiormq's.
"""

import asyncio
import contextlib
import logging
import platform
import random
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import aiormq
import structlog
from aiormq.abc import AbstractChannel, AbstractConnection
from prometheus_client import Counter, Gauge
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

BLOCKED = Gauge(
    "relay_broker_blocked",
    "1 while RabbitMQ blocks publishers. A rise means that it is short of memory or disk: nothing is published.",
)

# What aiormq raises when the other side fails.
FAILURES = (aiormq.AMQPError, aiormq.ChannelInvalidStateError, OSError)
_ABORT_SECONDS = 0.5
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
            task.cancel()  # and no waiting for it: on a full socket aiormq ends a call only when the connection ends
            leave_behind(task)
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


def leave_behind(task: asyncio.Task[Any]) -> None:
    """Hold on to a task that ends by itself, and whose end is nobody's business."""
    _left_behind.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, or asyncio complains


class Alarm:
    """Whether the broker wants nothing published (`connection.blocked`: it is short of memory or disk)."""

    def __init__(self) -> None:
        self._on: asyncio.Task[None] | None = None

    def look(self, connection: AbstractConnection) -> asyncio.Task[None] | None:
        """None, or what runs until the broker wants to be published to, or the connection has ended."""
        if self._on is None and _is_blocked(connection):
            BLOCKED.set(1)
            log.warning("broker_blocked")
            self._on = asyncio.create_task(_until_unblocked(connection))
            self._on.add_done_callback(self._off)
        return self._on

    def _off(self, _: asyncio.Task[None]) -> None:
        BLOCKED.set(0)
        log.info("broker_unblocked")
        self._on = None


def _is_blocked(connection: AbstractConnection) -> bool:
    probe = connection.ready()  # aiormq tells by letting this wait, and only so
    try:
        probe.send(None)
    except StopIteration:
        return False
    probe.close()
    return True


async def _until_unblocked(connection: AbstractConnection) -> None:
    ready = asyncio.create_task(connection.ready())
    try:
        await asyncio.wait([ready, connection.closing], return_when=asyncio.FIRST_COMPLETED)
    finally:
        ready.cancel()


class _Connection(aiormq.Connection):
    # In units of the heartbeat. The protocol's own rule; aiormq would wait for three.
    HEARTBEAT_GRACE_MULTIPLIER = 1


MakeProtocol = Callable[[asyncio.StreamReader, asyncio.AbstractEventLoop], asyncio.StreamReaderProtocol]


class _Transport(aiormq.TransportFactory):
    """Opens the socket and keeps hold of it, to end a connection on which nobody answers."""

    def __init__(self, make_protocol: MakeProtocol) -> None:
        self.protocol: asyncio.StreamReaderProtocol | None = None
        self._make_protocol = make_protocol
        self._transport: asyncio.Transport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # As `asyncio.open_connection`, which lets nobody choose the protocol.
        context = await kwargs["ssl_context_provider"].get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = self.protocol = self._make_protocol(reader, loop)
        try:
            self._transport, _ = await loop.create_connection(
                lambda: protocol, url.host or "", url.port or 0, ssl=context
            )
        except OSError as exc:
            raise aiormq.AMQPConnectionError(*exc.args) from exc
        return reader, asyncio.StreamWriter(self._transport, protocol, reader, loop)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _plain_protocol(reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> asyncio.StreamReaderProtocol:
    return asyncio.StreamReaderProtocol(reader, loop=loop)


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open a connection: one URL per node of the broker. They hold the password."""

    urls: Sequence[URL]
    connect_timeout_seconds: float  # for each


def safe(url: URL) -> str:
    """The URL without password and query."""
    url = url.with_query(None)
    return str(url.with_password("***") if url.password else url)


class Link:
    """One connection, remade on use after a loss.

    Args:
        purpose: For the broker's list of connections and for the log.
        prepare: Called with each new connection before anybody else has it, and again when `doubt` was called.
        changed: Called after the connection was opened or lost.
        make_protocol: What stands between the socket and aiormq.
    """

    def __init__(
        self,
        opening: Opening,
        purpose: str,
        *,
        prepare: Callable[[AbstractConnection], Awaitable[None]],
        changed: Callable[[], None],
        make_protocol: MakeProtocol = _plain_protocol,
    ) -> None:
        self.alarm = Alarm()
        self.wanted = False  # it was opened at least once
        self._opening = opening
        self._purpose = purpose
        self._prepare = prepare
        self._changed = changed
        self._lock = asyncio.Lock()
        self._connection: _Connection | None = None
        self._make_protocol = make_protocol
        self._transport = _Transport(make_protocol)
        self._urls = list(opening.urls)  # the next to try first; each process begins with another one
        random.shuffle(self._urls)
        self._unreachable: set[URL] = set()  # as the log has it
        self.is_prepared = False
        self._lost: str | None = None  # what ended the last connection
        self._closing = False

    @property
    def is_open(self) -> bool:
        return self._connection is not None and self._connection.is_opened

    @property
    def wire(self) -> asyncio.StreamReaderProtocol | None:
        """What stands between the socket of the connection and aiormq."""
        return self._transport.protocol

    @contextlib.contextmanager
    def translated(self, seconds: float) -> Iterator[None]:
        """Let what aiormq raises when the other side fails be `Unavailable`. `seconds` is how long was waited."""
        try:
            yield
        except aiormq.ChannelNotFoundEntity as exc:
            self.doubt()
            raise Unavailable(f"broker: {exc}") from exc
        except TimeoutError as exc:
            raise Unavailable(str(exc) or f"the broker did not answer within {seconds:g} s") from exc
        except FAILURES as exc:
            raise Unavailable(f"broker: {exc}") from exc

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
                    self.is_prepared = False
                    connection = await self._open()
                if not self.is_prepared:
                    await self._prepare(connection)
                    self.is_prepared = True
            except WrongSettings as exc:
                if first:
                    raise
                # It worked before. A cluster that restarts may refuse for a while what it took all along.
                raise Unavailable(str(exc)) from exc
            return connection

    def doubt(self) -> None:
        """Have the connection prepared again before its next use."""
        self.is_prepared = False

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
        errors: list[Exception] = []
        for _ in self._urls:
            url = self._urls[0]
            self._urls.append(self._urls.pop(0))  # also when this one takes so long that the caller gives up
            try:
                return await self._open_one(url)
            except (WrongSettings, *FAILURES) as exc:
                errors.append(exc)
                if len(self._urls) > 1 and url not in self._unreachable:
                    self._unreachable.add(url)  # told once: thousands of callers try
                    log.info("broker_unreachable", url=safe(url), purpose=self._purpose, error=str(exc))
        # What somebody can mend says more than that another node is down.
        raise next((error for error in errors if isinstance(error, WrongSettings)), errors[-1])

    async def _open_one(self, url: URL) -> _Connection:
        transport = _Transport(self._make_protocol)
        name = f"coder-chat-relay {self._purpose} on {platform.node()}"
        connection = _Connection(url, transport_factory=transport, client_properties={"connection_name": name})
        try:
            await ask(connection.connect(), self._opening.connect_timeout_seconds)
        except (asyncio.CancelledError, TimeoutError):
            # The tasks that aiormq has begun end now, not with the loop, when they complain; and a connection that was
            # made in the very moment in which the patience was over does not stay open.
            transport.abort()
            await asyncio.wait([connection.closing], timeout=_ABORT_SECONDS)
            raise
        except aiormq.AMQPError as exc:
            if (refusal := _refusal(url, exc)) is None:
                raise
            if self.wanted:
                RECONNECTS.labels("auth_error").inc()
            raise refusal from exc
        self._transport, self._connection = transport, connection
        connection.closing.add_done_callback(partial(self._on_loss, connection))
        if self._lost is not None:
            RECONNECTS.labels(self._lost).inc()
        self.wanted = True
        self._unreachable.discard(url)
        self._changed()
        log.info("broker_connected", url=safe(url), purpose=self._purpose)
        return connection

    def _on_loss(self, connection: _Connection, closed: "asyncio.Future[object]") -> None:
        error = None if closed.cancelled() else closed.exception()
        if not self._closing:
            if isinstance(error, aiormq.ConnectionClosed):
                self._lost = "closed_by_broker"
            else:
                self._lost = "heartbeat" if connection.is_connection_was_stuck else "network_error"
            log.warning("broker_lost", purpose=self._purpose, reason=self._lost, error=str(error or "cut"))
        self._changed()


def _refusal(url: URL, exc: aiormq.AMQPError) -> WrongSettings | None:
    """What the broker said about who we are and where we want to go; None when it was something else."""
    at = f"RabbitMQ at {safe(url)}"
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
