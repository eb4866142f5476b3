"""The socket under a stream."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, ProxyError

from relay.codersdk.answers import refusal
from relay.codersdk.errors import ConnectionFailed, InvalidAnswer, StreamBroken
from relay.codersdk.json_text import as_text
from relay.codersdk.server import GET_INSTEAD, MAX_REQUESTS, SAME_METHOD, Server
from relay.codersdk.urls import quoted, request_target

_NORMAL, _GOING_AWAY = 1000, 1001
_CLOSE_SECONDS = 5  # to wait for the server's goodbye

# At level DEBUG the library writes the headers of a handshake, and with them the token.
_log = logging.getLogger("relay.codersdk.websocket")
_log.setLevel(logging.INFO)


class _Connect(connect):
    """A dial that takes a redirect for the answer: the library would follow it to any host."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


class FrameStream:
    """The frames of a stream as text, for whoever decodes them himself.

    `async with` opens and closes it; `async for` over one that is not open does both. It ends when the server closes it
    with 1000 or 1001, which means that the server is going, never that a chat is done. While nobody asks for the next
    frame, only a few are kept and the server waits; after 10 s it gives up.

    Raises:
        APIError, ConnectionFailed, InvalidAnswer: When it is opened, see `CoderClient`.
        StreamBroken: It ended in any other way.
    """

    def __init__(
        self,
        server: Server,
        path: str,
        *,
        timeout: float,
        read_limit: int,
        ping_interval: float | None,
        ping_timeout: float | None,
    ) -> None:
        self._server = server
        self._path = path
        self._timeout = timeout
        self._read_limit = read_limit
        self._ping_interval = ping_interval
        self._ping_timeout = ping_timeout
        self._connection: ClientConnection | None = None
        self.goodbye: tuple[int, str] = (_NORMAL, "")
        """Code and reason with which it will be closed."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def open(self) -> None:
        if self._connection is not None:
            raise RuntimeError("the stream is open already")
        target = request_target(self._path)
        for _ in range(MAX_REQUESTS):
            connection = await self._dial(target)
            if not isinstance(connection, str):
                self._connection = connection
                return
            target = connection
        raise InvalidAnswer(f"GET {self._server.origin}{target}: stopped after {MAX_REQUESTS} redirects")

    async def _dial(self, target: str) -> ClientConnection | str:
        """An open connection, or the target that a redirect names."""
        url = f"{self._server.origin}{target}"
        try:
            return await _Connect(
                f"ws{url.removeprefix('http')}",
                additional_headers=[
                    (name.decode(), value.decode("latin-1"))
                    for name, value in self._server.headers
                    if name != b"User-Agent"
                ],
                user_agent_header=self._server.user_agent,
                compression=None,
                open_timeout=self._timeout,
                close_timeout=_CLOSE_SECONDS,
                ping_interval=self._ping_interval,
                ping_timeout=self._ping_timeout,
                max_size=self._read_limit,
                logger=_log,
                ssl=self._server.tls(),
            )
        except InvalidStatus as exc:
            response = exc.response
            location = response.headers.get("Location")
            if location is not None and response.status_code in GET_INSTEAD | SAME_METHOD:
                return self._server.redirected(target, location, response.status_code)
            raise refusal(
                response.status_code,
                response.headers.get("Content-Type", ""),
                bytes(response.body or b""),
                method="GET",
                url=url,
                retry_after=response.headers.get("Retry-After"),
            ) from exc
        except InvalidMessage as exc:  # an answer that is no HTTP, most often none at all
            raise ConnectionFailed(f"GET {url}: {exc.__cause__ or exc}") from exc
        except (ProxyError, OSError) as exc:  # a TimeoutError is an OSError
            raise ConnectionFailed(f"GET {url}: {str(exc) or 'no answer in time'}") from exc
        except InvalidHandshake as exc:
            raise InvalidAnswer(f"GET {url}: {exc}") from exc

    async def aclose(self) -> None:
        """Say goodbye and close; harmless when it is closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(*self.goodbye)

    async def next_frame(self) -> bytes | None:
        """The next frame as it came, None at the end."""
        if self._connection is None:
            raise RuntimeError("the stream is not open")
        try:
            return await self._connection.recv(decode=False)
        except ConnectionClosed as exc:
            received, sent = exc.rcvd, exc.sent
            if received is not None and received.code in {_NORMAL, _GOING_AWAY}:
                return None
            if received is not None and (exc.rcvd_then_sent or sent is None):
                text = f"received close frame: status = {received.code} and reason = {quoted(received.reason)}"
                raise StreamBroken(text, received.code, received.reason) from exc
            if (
                sent is not None
            ):  # we closed it: too long a frame, no answer to our ping, something against the protocol
                raise StreamBroken(f"closed with {sent.code}: {sent.reason}", sent.code, sent.reason) from exc
            raise StreamBroken("the connection is gone without a close frame") from exc

    async def __aiter__(self) -> AsyncIterator[str]:
        async with self.while_open():
            while (frame := await self.next_frame()) is not None:
                yield as_text(frame)

    @asynccontextmanager
    async def while_open(self) -> AsyncIterator[None]:
        """Leave an open stream as it is; open one that is not, and close it at the end."""
        if self._connection is not None:
            yield
            return
        async with self:
            yield
