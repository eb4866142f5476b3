"""WebSockets that notice that their link is dead, and that cost less than the library's own where much is heard."""

import asyncio
import struct
from collections import deque
from types import GeneratorType
from typing import ClassVar, cast

import msgspec
from websockets.asyncio.client import ClientConnection
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State

_LOOKS = 8  # in the time after which a silent socket is pinged
_TEXT, _PING = 0x81, 0x89  # first byte of a text and of a ping in one piece (RFC 6455, 5.2)
_LONGEST_PING = 125
_TWO_BYTES, _EIGHT_BYTES = 126, 127  # the length follows in so many
_head = struct.Struct(">BBH")  # first byte, length, and the length if it takes two bytes
_HEADERS_END = b"\r\n\r\n"
_LONGEST_PART = 65536  # of a frame that is kept until the rest of it comes


class _Text(msgspec.Struct, gc=False):
    """As much of the library's `Frame` as it looks at in a text that came in one piece: there is one for each message,
    and the library's own takes five times as long to make."""

    data: bytes
    opcode: ClassVar[Opcode] = Opcode.TEXT
    fin: ClassVar[bool] = True


class WatchedSocket(ClientConnection):
    """A connection that knows when it heard something last.

    Texts and pings in one piece, which are nearly all that a server sends, it reads by itself: the library's parser
    takes several times as long. Whatever is not plain is the library's, and so is all that follows from a frame.
    """

    heard = 0.0  # by the loop's clock
    pinged = False  # since then
    pulse: "Pulse | None" = None
    _part = b""  # of a plain frame, from its first byte on

    def data_received(self, data: bytes) -> None:
        self.heard = self.loop.time()
        self.pinged = False
        if self._part:
            data, self._part = self._part + data, b""
        elif self.protocol.state is State.CONNECTING and (end := data.find(_HEADERS_END)) >= 0:
            # What comes with the answer to the handshake is not of it: from the first frame on all is read alike.
            end += len(_HEADERS_END)
            super().data_received(data[:end])
            if not (data := data[end:]):
                return
        plain = data[0] == _TEXT or data[0] == _PING  # no tuple is made
        if plain and self._is_between_frames() and not (data := self._beyond_plain(data)):
            return
        super().data_received(data)

    def at_hand(self) -> list[str]:
        """The texts that came with the one that `recv` gave last, up to whatever else came."""
        texts: list[str] = []
        waiting = cast(deque[Frame | _Text], self.recv_messages.frames.queue)
        for frame in waiting:
            if not isinstance(frame, _Text) and (frame.opcode is not Opcode.TEXT or not frame.fin):
                break
            try:
                texts.append(str(frame.data, "utf-8"))
            except UnicodeDecodeError:
                break  # `recv` says so
        if len(texts) == len(waiting):
            waiting.clear()
        else:
            for _ in texts:
                waiting.popleft()
        self.recv_messages.maybe_resume()
        return texts

    def _is_between_frames(self) -> bool:
        """False in the middle of a frame or of a message in several, and for a library that waits in another way."""
        if self.protocol.current_size is not None:
            return False
        waits: object = self.protocol.parser  # of the client, for one of frames, for what it reads
        for _ in range(2):
            waits = waits.gi_yieldfrom if isinstance(waits, GeneratorType) else None
        return isinstance(waits, GeneratorType) and waits.__name__ == "at_eof"

    def _beyond_plain(self, data: bytes) -> bytes:
        """Take in the plain frames that data begins with; what comes behind them. A part of one is kept for later."""
        place, end, pinged = 0, len(data), False
        texts: list[_Text] = []
        limit, last = self.protocol.max_message_size or 0, end - _head.size
        while end - place >= 2:
            if place <= last:
                first, size, long = _head.unpack_from(data, place)
            else:
                first, size, long = data[place], data[place + 1], 0
            start = place + 2
            if first == _TEXT:  # one that is masked, which is wrong, is large
                if size == _TWO_BYTES:
                    size, start = long, start + 2
                elif size == _EIGHT_BYTES:
                    size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
                elif size > _EIGHT_BYTES:
                    break
                if size > limit:
                    break
            elif first != _PING or size > _LONGEST_PING:
                break
            if start + size > end:
                if end - place <= _LONGEST_PART and size <= _LONGEST_PART:
                    self._part, place = data[place:], end
                break
            place = start + size
            if first == _TEXT:
                texts.append(_Text(data[start:place]))
            else:
                self.protocol.send_pong(data[start:place])
                pinged = True
        if texts:
            self._put(cast(list[Frame], texts))
        if pinged:
            self.send_data()
        return data[place:]

    def _put(self, frames: list[Frame]) -> None:
        """As `recv_messages.put` for each."""
        messages = self.recv_messages
        messages.put(frames[0])
        messages.frames.queue.extend(frames[1:])
        messages.maybe_pause()

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

    def watch(self, socket: WatchedSocket) -> None:
        """From now on until it is closed."""
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
