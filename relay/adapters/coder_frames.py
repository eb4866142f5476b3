"""The text frames of one socket, and what its end means."""

import math
import time
from collections.abc import Callable

from prometheus_client import Counter
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from relay.adapters.coder_socket import WatchedSocket
from relay.core.errors import BadFrame, RelayError, StreamEnded

DISCONNECTS = Counter(
    "relay_stream_disconnects_total",
    "Streams that ended though the relay wanted more of them. A rise of server_close is a restart of the server, of "
    "ping_timeout or network_error a bad link, of too_slow a relay that cannot keep up, of protocol_error a bug or a "
    "frame over the size limit.",
    ["reason"],
)
for _reason in ("server_close", "ping_timeout", "network_error", "protocol_error", "too_slow"):
    DISCONNECTS.labels(_reason)

_SLOW_MEMORY_SECONDS = 60.0  # what a pause in reading led to shows only after the buffers are read


class SocketFrames:
    """`Frames` of a socket, until it ends with an error.

    Args:
        call: What the errors name.
        look: Shown each frame before it is handed out, until it returns False: it has seen enough.
        slow_seconds: Who takes so long for what was handed out is too slow for the server.
    """

    __slots__ = ("_call", "_handed_out", "_last_slow", "_look", "_looking", "_slow_seconds", "_socket")

    def __init__(self, socket: WatchedSocket, call: str, look: Callable[[str], bool], *, slow_seconds: float) -> None:
        self._socket = socket
        self._call = call
        self._look = look
        self._looking = True
        self._slow_seconds = slow_seconds
        self._handed_out = math.inf
        self._last_slow = -math.inf

    def __aiter__(self) -> "SocketFrames":
        return self

    async def __anext__(self) -> str:
        now = time.monotonic()
        if now - self._handed_out >= self._slow_seconds:
            self._last_slow = now
        try:
            frame = await self._socket.recv()
        except ConnectionClosed as exc:
            raise self._ended(exc) from exc
        if isinstance(frame, bytes):
            DISCONNECTS.labels("protocol_error").inc()
            raise BadFrame(f"{self._call}: a binary frame", reason="schema")
        self._looking = self._looking and self._look(frame)
        self._handed_out = time.monotonic()
        return frame

    def at_hand(self) -> list[str]:
        frames = self._socket.at_hand()
        for frame in frames if self._looking else ():
            self._looking = self._looking and self._look(frame)
        return frames

    def _ended(self, exc: ConnectionClosed) -> RelayError:
        reason = _end_reason(exc, slow=time.monotonic() - self._last_slow < _SLOW_MEMORY_SECONDS)
        DISCONNECTS.labels(reason).inc()
        ours = exc.sent.code if exc.sent is not None and not exc.rcvd_then_sent else None
        if ours == CloseCode.MESSAGE_TOO_BIG:
            limit = self._socket.protocol.max_message_size
            return BadFrame(f"{self._call}: a frame of more than {limit} bytes", reason="too_large")
        if ours == CloseCode.INVALID_DATA:
            return BadFrame(f"{self._call}: a frame that is not UTF-8", reason="bad_json")
        return StreamEnded(f"{self._call}: {reason}: {exc}", reason)


def _end_reason(exc: ConnectionClosed, *, slow: bool) -> str:
    received, sent = exc.rcvd, exc.sent
    if received is not None and (sent is None or exc.rcvd_then_sent):
        if received.reason in ("Ping failed", "liveness probe failed"):  # our pong came too late for the server
            return "too_slow" if slow else "ping_timeout"
        policy = (CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA, CloseCode.INVALID_DATA, 1008, 1009, 1010)
        return "protocol_error" if received.code in policy else "server_close"
    if sent is not None and sent.code != CloseCode.INTERNAL_ERROR:
        return "protocol_error"
    if slow:
        return "too_slow"
    return "network_error" if sent is None else "ping_timeout"
