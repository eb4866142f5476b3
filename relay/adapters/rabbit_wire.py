"""The bytes of publishing, below aiormq: frames out in batches, answers in.

aiormq makes a task, a lock and three objects per frame, which is what publishing with it costs. Here the connection
stays aiormq's (handshake, heartbeats, alarms, closing, all other channels); only on the channels of a publisher its
frames are written beside it, and the broker's answers to them taken out before it sees them.
"""

import asyncio
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Protocol, cast

import pamqp.encode
import pamqp.frame
from pamqp.header import ContentHeader

from relay.adapters.rabbit_outgoing import Outgoing
from relay.core.events import APP_ID

# Kinds of frames and the methods of AMQP 0-9-1 as they stand on the wire: class id, method id.
_METHOD, _HEADER, _BODY, _END = 1, 2, 3, b"\xce"
_BASIC = 60
_CHANNEL_CLOSE = 0x00140028
_PUBLISH, _RETURN, _ACK, _NACK = 0x003C0028, 0x003C0032, 0x003C0050, 0x003C0078
_ANSWERS = frozenset((_ACK, _NACK))
_HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"

_frame = struct.Struct(">BHI")  # kind, channel, size of what follows without the end byte
_answer = struct.Struct(">BHIIQBB")  # a whole frame: kind, channel, size, method, tag, bits, end
_method = struct.Struct(">I")
_MULTIPLE = 1  # of the bits of an answer

_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE = 1 << 15, 1 << 13, 1 << 12
_MESSAGE_ID, _TIMESTAMP, _TYPE, _APP_ID = 1 << 7, 1 << 6, 1 << 5, 1 << 3
_PROPERTIES = _CONTENT_TYPE | _DELIVERY_MODE | _MESSAGE_ID | _TIMESTAMP | _TYPE | _APP_ID

_REMEMBERED = 4096  # what messages have in common: there are some for each chat
_ALIVE_SECONDS = 0.5  # half of the shortest heartbeat


_layout_of = lru_cache(maxsize=256)(struct.Struct)  # one is larger than what it describes, and few differ


def _short(text: str) -> bytes:
    raw = text.encode()
    if len(raw) > 255:
        raise ValueError(f"AMQP takes no more than 255 bytes for {text[:40]!r}…")
    return bytes([len(raw)]) + raw


class Encoder:
    """Messages into the frames of one channel. What comes again (routes, constant properties) is made once."""

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self.largest_body = (frame_max or 131072) - 8  # of one frame; 0 is "no limit"
        self._layouts: dict[tuple[str, str, bool, str, bool, str, int], tuple[struct.Struct, bytes, bytes, bytes]] = {}

    def encode(self, messages: Sequence[Outgoing], parts: list[bytes]) -> int:
        """Append the frames of messages, up to one that needs `frames`; how many messages these were.

        Raises:
            ValueError, struct.error: One cannot be written at all. `parts` is as it was.
        """
        before, largest, layouts = len(parts), self.largest_body, self._layouts
        number = 0
        try:
            for name, _, exchange, key, body, type_, timestamp, persistent, mandatory, content, headers in messages:
                size = len(body)
                if not 0 < size <= largest or headers is not None:
                    break
                raw = name.encode()
                alike = (exchange, key, mandatory, type_, persistent, content, len(raw))
                layout, start, middle, end = layouts.get(alike) or self._layout(alike)
                parts += (layout.pack(start, size, middle, raw, timestamp, end, size), body, _END)
                number += 1
        except BaseException:
            del parts[before:]
            raise
        return number

    def frames(self, message: Outgoing) -> Iterator[bytes]:
        """The frames of any one message: of one with headers, without a body, or with a body for several frames.

        Raises:
            ValueError, struct.error: At once, before the first frame: it cannot be written at all.
        """
        flags, headers = _PROPERTIES, b""
        if message.headers is not None:
            flags, headers = flags | _HEADERS, pamqp.encode.field_table(dict(message.headers))
        properties = b"".join(
            (
                struct.pack(">HHQH", _BASIC, 0, len(message.body), flags),
                _short(message.content_type),
                headers,
                b"\x02" if message.persistent else b"\x01",
                _short(message.id),
                struct.pack(">Q", message.timestamp),
                _short(message.type),
                _short(APP_ID),
            )
        )
        route = self._route(message.exchange, message.routing_key, message.mandatory)
        return self._cut(route + self._whole(_HEADER, properties), memoryview(message.body))

    def _cut(self, start: bytes, body: memoryview) -> Iterator[bytes]:
        yield start
        for place in range(0, len(body), self.largest_body):
            yield self._whole(_BODY, body[place : place + self.largest_body])

    def _whole(self, kind: int, content: bytes | memoryview) -> bytes:
        return b"".join((_frame.pack(kind, self._channel, len(content)), content, _END))

    def _route(self, exchange: str, key: str, mandatory: bool) -> bytes:
        content = struct.pack(">IH", _PUBLISH, 0) + _short(exchange) + _short(key) + (b"\x01" if mandatory else b"\x00")
        return self._whole(_METHOD, content)

    def _layout(self, alike: tuple[str, str, bool, str, bool, str, int]) -> tuple[struct.Struct, bytes, bytes, bytes]:
        exchange, key, mandatory, type_, persistent, content, name_size = alike
        if name_size > 255:
            raise ValueError("AMQP takes no more than 255 bytes for a message id")
        middle = struct.pack(">H", _PROPERTIES) + _short(content) + (b"\x02" if persistent else b"\x01")
        middle += bytes([name_size])
        after = _short(type_) + _short(APP_ID)
        size = 12 + len(middle) + name_size + 8 + len(after)
        start = self._route(exchange, key, mandatory)
        start += _frame.pack(_HEADER, self._channel, size) + struct.pack(">HH", _BASIC, 0)
        end = after + _END + struct.pack(">BH", _BODY, self._channel)
        layout = _layout_of(f">{len(start)}sQ{len(middle)}s{name_size}sQ{len(end)}sI")
        if len(self._layouts) >= _REMEMBERED:
            self._layouts.clear()
        known = self._layouts[alike] = (layout, start, middle, end)
        return known


class Receiver(Protocol):
    """Whom the broker answers. Nothing here may raise."""

    def answered(self, tag: int, *, multiple: bool, ok: bool) -> None:
        """Confirmed (`ok`) or nacked."""

    def came_back(self, message_id: str) -> None:
        """A mandatory message that no queue takes. Its confirm follows."""

    def read(self) -> None:
        """No more answers for now."""

    def writable(self) -> None:
        """The socket takes bytes again."""

    def closing(self) -> None:
        """The broker closes the channel: it takes no more frames on it. Why is told by the channel's own end."""

    def lost(self) -> None:
        """The connection ended. May be told twice."""


class Wire(asyncio.StreamReaderProtocol):
    """Stands between the socket and aiormq, and keeps the answers to the channels of `receivers` to itself.

    Those of a channel whose receiver has gone (None) are dropped.
    """

    def __init__(self, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(reader, loop=loop)
        self.receivers: dict[int, Receiver | None] = {}
        self.full = False  # the socket takes no more for now
        self._transport_out: asyncio.Transport
        self._clock = loop.time
        self._held = b""  # the beginning of a frame
        self._passing = 0  # bytes to come of a frame that is aiormq's
        self._told_alive = 0.0

    # --- out

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport_out = cast(asyncio.Transport, transport)
        super().connection_made(transport)

    def write(self, data: bytes) -> None:
        """Send whole frames. Look at `full` before."""
        with suppress(RuntimeError):  # aiormq has begun to end the connection; `lost` follows
            self._transport_out.write(data)

    def pause_writing(self) -> None:
        self.full = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self.full = False
        super().resume_writing()
        for receiver in self._present():
            receiver.writable()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._tell_lost()

    # --- in

    def eof_received(self) -> bool | None:
        self._pass_on(self._held)
        self._held = b""
        self._tell_lost()
        return super().eof_received()

    def data_received(self, data: bytes) -> None:
        place, found = 0, False
        if self._passing:
            place = min(self._passing, len(data))
            self._passing -= place
            self._pass_on(data[:place])
        elif self._held:
            data = self._held + data
        self._held = b""
        receivers, end, unpack = self.receivers, len(data), _answer.unpack_from
        while place < end:
            if end - place >= _answer.size:
                _, channel, _, method, tag, bits, _ = unpack(data, place)
                if method in _ANSWERS and channel in receivers and data[place] == _METHOD:
                    receiver = receivers[channel]
                    if receiver is not None:
                        receiver.answered(tag, multiple=bool(bits & _MULTIPLE), ok=method == _ACK)
                    place += _answer.size
                    found = True
                    continue
            size = self._other(data, place)
            if size == 0:
                self._held = data[place:]
                break
            place += size
        if found:
            if not self._passing:  # else it would stand within a frame
                self._tell_alive()
            for receiver in self._present():
                receiver.read()

    def _other(self, data: bytes, place: int) -> int:
        """Take in or pass on the frame that begins at `place`; its size, or 0 when too little of it is there."""
        there = len(data) - place
        if there < _frame.size:
            return 0
        kind, channel, size = _frame.unpack_from(data, place)
        whole = int(_frame.size + size + 1)
        if channel in self.receivers:
            if there < min(whole, _answer.size):
                return 0
            method = _method.unpack_from(data, place + _frame.size)[0] if kind == _METHOD and size >= 4 else 0
            if kind in (_HEADER, _BODY) or method == _RETURN:
                if there < whole:
                    return 0
                if kind == _HEADER:
                    self._returned(channel, data[place : place + whole])
                return whole
            receiver = self.receivers[channel]
            if method == _CHANNEL_CLOSE and receiver is not None:
                receiver.closing()
        part = data[place : place + whole]
        self._passing = whole - len(part)
        self._pass_on(part)
        return len(part)

    def _returned(self, channel: int, raw: bytes) -> None:
        # Only returned messages have content on a channel that publishes. The id is all that is needed of them.
        _, _, header = pamqp.frame.unmarshal(raw)
        receiver = self.receivers[channel]
        if receiver is not None and isinstance(header, ContentHeader) and header.properties.message_id is not None:
            receiver.came_back(str(header.properties.message_id))

    def _pass_on(self, data: bytes) -> None:
        if data:
            super().data_received(data)

    def _tell_alive(self) -> None:
        # A broker that answers sends no heartbeats, and aiormq, which does not see the answers, would miss them.
        now = self._clock()
        if now - self._told_alive >= _ALIVE_SECONDS:
            self._told_alive = now
            self._pass_on(_HEARTBEAT)

    def _tell_lost(self) -> None:
        for receiver in self._present():
            receiver.lost()

    def _present(self) -> list[Receiver]:
        return [receiver for receiver in self.receivers.values() if receiver is not None]
