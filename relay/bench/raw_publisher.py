"""As fast as the broker goes: a socket, frames that were encoded beforehand, and nothing read but the acks.

No publisher can be faster than this against the same broker, and none that does anything else for its messages as fast.
"""

import select
import socket
import ssl
import time
from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from pamqp import commands, frame, header
from pamqp.body import ContentBody
from pamqp.heartbeat import Heartbeat

from relay.bench.samples import Sample
from relay.core.errors import Unavailable
from relay.core.events import APP_ID, CONTENT_TYPE

_BATCH = 64  # messages in one write
_ACK, _NACK = 80, 120

T = TypeVar("T")


class RawPublisher:
    """One connection with one channel in confirm mode. Blocking: it has its process for itself."""

    def __init__(self, url: str, queue: str, samples: Sequence[Sample], window: int) -> None:
        self._window = window
        self._batches = [
            (min(_BATCH, len(samples) - at), b"".join(_encoded(each, queue) for each in samples[at : at + _BATCH]))
            for at in range(0, len(samples), _BATCH)
        ]
        self._next = 0
        self._received = bytearray()
        self._sent = 0  # tags, since the channel was opened
        self._answered = 0
        self._refused = 0
        self._out_of_order: set[int] = set()
        self._socket = _connected(url)
        self._greet(url)

    def publish(self, seconds: float) -> tuple[int, int]:
        """Publish for so long, wait for all answers; how many were confirmed, and how many refused."""
        before, refused = self._answered, self._refused
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            while self._sent - self._answered < self._window:
                count, batch = self._batches[self._next]
                self._next = (self._next + 1) % len(self._batches)
                self._sent += count
                self._write(batch)
            self._read(block=True)
        while self._answered < self._sent:
            self._read(block=True)
        refused = self._refused - refused
        return self._answered - before - refused, refused

    def close(self) -> None:
        self._socket.close()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            # A broker that is busy answering reads no more until its answers are read.
            readable, writable, _ = select.select([self._socket], [self._socket], [], 30.0)
            if readable:
                self._read(block=False)
            if writable:
                rest = rest[self._socket.send(rest) :]
            if not readable and not writable:
                raise Unavailable("the broker has not read anything for 30 s")

    def _read(self, *, block: bool) -> None:
        if block and not select.select([self._socket], [], [], 30.0)[0]:
            raise Unavailable("the broker has not confirmed anything for 30 s")
        data = self._socket.recv(1 << 16)
        if not data:
            raise Unavailable("the broker closed the connection")
        self._received += data
        at = 0
        while len(self._received) - at >= 8:
            size = int.from_bytes(self._received[at + 3 : at + 7], "big")
            if len(self._received) - at < size + 8:
                break
            if self._received[at] == 1:
                self._take(bytes(self._received[at + 7 : at + 7 + size]))
            at += size + 8
        del self._received[:at]

    def _take(self, payload: bytes) -> None:
        class_id, method = int.from_bytes(payload[:2], "big"), int.from_bytes(payload[2:4], "big")
        if class_id != 60 or method not in (_ACK, _NACK):
            raise Unavailable(f"the broker said {class_id}.{method} where a confirm was expected")
        tag, many = int.from_bytes(payload[4:12], "big"), payload[12] & 1
        if method == _NACK:
            self._refused += tag - self._answered if many else 1
        if many:
            self._answered = max(self._answered, tag)
            self._out_of_order = {each for each in self._out_of_order if each > tag}
        else:
            self._out_of_order.add(tag)
        while self._answered + 1 in self._out_of_order:
            self._answered += 1
            self._out_of_order.discard(self._answered)

    def _greet(self, url: str) -> None:
        parts = urlsplit(url)
        user, password = unquote(parts.username or "guest"), unquote(parts.password or "guest")
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._expect(commands.Connection.Start)
        response = f"\0{user}\0{password}"
        self._send(0, commands.Connection.StartOk({"product": "relay bench"}, "PLAIN", response, "en_US"))
        tune = self._expect(commands.Connection.Tune)
        self._send(0, commands.Connection.TuneOk(tune.channel_max, tune.frame_max, 0))
        self._send(0, commands.Connection.Open(unquote(parts.path.removeprefix("/")) or "/"))
        self._expect(commands.Connection.OpenOk)
        self._send(1, commands.Channel.Open())
        self._expect(commands.Channel.OpenOk)
        self._send(1, commands.Confirm.Select())
        self._expect(commands.Confirm.SelectOk)

    def _send(self, channel: int, command: frame.FrameTypes) -> None:
        self._socket.sendall(frame.marshal(command, channel))

    def _expect(self, kind: type[T]) -> T:
        while True:
            at, _, found = frame.unmarshal(bytes(self._received)) if len(self._received) >= 8 else (0, 0, None)
            if found is None:
                data = self._socket.recv(4096)
                if not data:
                    raise Unavailable("the broker closed the connection during the greeting")
                self._received += data
                continue
            del self._received[:at]
            if isinstance(found, kind):
                return found
            if not isinstance(found, Heartbeat):
                raise Unavailable(f"the broker said {type(found).__name__}, not {kind.__name__}")


def _connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    host = parts.hostname or "localhost"
    secure = parts.scheme == "amqps"
    connection = socket.create_connection((host, parts.port or (5671 if secure else 5672)), timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if secure:
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host)
    return connection


def _encoded(sample: Sample, queue: str) -> bytes:
    properties = commands.Basic.Properties(
        content_type=CONTENT_TYPE,
        delivery_mode=2,
        message_id=sample.id,
        timestamp=sample.moment,
        message_type=sample.type,
        app_id=APP_ID,
    )
    return b"".join(
        (
            frame.marshal(commands.Basic.Publish(0, "", queue, mandatory=True), 1),
            frame.marshal(header.ContentHeader(0, len(sample.body), properties), 1),
            frame.marshal(ContentBody(sample.body), 1),
        )
    )
