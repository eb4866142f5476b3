"""WebSockets that notice that their link is dead."""

import asyncio
from types import GeneratorType
from typing import cast

from websockets.asyncio.client import ClientConnection
from websockets.frames import CloseCode
from websockets.protocol import State

_LOOKS = 8  # in the time after which a silent socket is pinged
_PING = 0x89  # first byte of a ping in one piece (RFC 6455, 5.2)
_LONGEST_PING = 125


class WatchedSocket(ClientConnection):
    """A connection that knows when it heard something last."""

    heard = 0.0  # by the loop's clock
    pinged = False  # since then
    pulse: "Pulse | None" = None

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        self.pinged = False
        if data[0] == _PING and self._is_lone_ping(data):
            self.protocol.send_pong(data[2:])
            self.send_data()
        else:
            super().data_received(data)

    def _is_lone_ping(self, data: bytes) -> bool:
        """A ping, all of it, and nothing else: all that a worker hears of most of its chats.

        The library's parser takes longer for it than all the rest of a ping and its pong does. Of anything that is not
        plain, and of a library that waits for frames in another way, this says no.
        """
        if not (2 <= len(data) == 2 + data[1] <= 2 + _LONGEST_PING and self.protocol.state is State.OPEN):
            return False
        waits: object = self.protocol.parser  # of the client, for one of frames, for what it reads
        for _ in range(2):
            waits = waits.gi_yieldfrom if isinstance(waits, GeneratorType) else None
        return isinstance(waits, GeneratorType) and waits.__name__ == "at_eof"  # not in the middle of a frame

    def connection_lost(self, exc: Exception | None) -> None:
        if self.pulse is not None:
            self.pulse.forget(self)
        super().connection_lost(exc)


class Pulse:
    """Pings sockets that hear nothing, and ends those that go on hearing nothing. One timer for all of them.

    The library's keepalive takes a task for each socket, and pings whatever is heard. Servers ping too, every 15 s
    (protocol.md 4): that is proof enough.

    Args:
        interval: Seconds of silence, about, after which a socket is pinged.
        patience: Seconds after that until it is taken for dead.
    """

    def __init__(self, *, interval: float, patience: float) -> None:
        self._interval = interval
        self._patience = patience
        self._sockets: set[WatchedSocket] = set()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, connection: ClientConnection) -> None:
        """From now on until it is closed."""
        socket = cast(WatchedSocket, connection)
        socket.heard, socket.pulse = socket.loop.time(), self
        self._sockets.add(socket)
        if self._timer is None:
            self._look_later(socket.loop)

    def forget(self, socket: WatchedSocket) -> None:
        self._sockets.discard(socket)

    def _look_later(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(min(self._interval, self._patience) / _LOOKS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._sockets:
            self._look_later(loop)
        now = loop.time()
        for socket in [socket for socket in self._sockets if now - socket.heard >= self._interval]:
            self._look_at(socket, now - socket.heard)

    def _look_at(self, socket: WatchedSocket, silent: float) -> None:
        if socket.protocol.state is not State.OPEN:
            self._sockets.discard(socket)  # lost before it was watched; or saying goodbye, with a deadline of its own
        elif socket.recv_messages.paused:
            socket.heard, socket.pinged = socket.loop.time(), False  # nobody reads, so nothing can be heard
        elif not socket.pinged:
            socket.pinged = True
            socket.protocol.send_ping(b"")
            socket.send_data()
        elif silent >= self._interval + self._patience:
            socket.protocol.fail(CloseCode.INTERNAL_ERROR, "keepalive ping timeout")
            socket.send_data()
            socket.transport.abort()
