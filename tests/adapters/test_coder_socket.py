"""A socket that reads plain frames by itself gives what the library's own gives, however the bytes are cut."""

import asyncio
from collections.abc import Sequence
from itertools import accumulate, pairwise
from random import Random
from typing import Generic, TypeVar

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from relay.adapters.coder_frames import SocketFrames
from relay.adapters.coder_socket import WatchedSocket
from relay.core.errors import BadFrame

LIMIT = 100_000  # bytes of a message


class Transport(asyncio.Transport):
    """What was written to it, and whether it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


Socket = TypeVar("Socket", bound=ClientConnection)


class Link(Generic[Socket]):
    """One side of a connection whose other side is a list of bytes."""

    def __init__(self, kind: type[Socket]) -> None:
        self.server = ServerProtocol()
        protocol = ClientProtocol(parse_uri("ws://coder.test/stream"), max_size=LIMIT)
        protocol.send_request(protocol.connect())
        self.server.receive_data(b"".join(protocol.data_to_send()))
        (request,) = self.server.events_received()
        assert isinstance(request, Request)
        self.server.send_response(self.server.accept(request))
        self.handshake = b"".join(self.server.data_to_send())
        self.transport = Transport()
        self.socket = kind(protocol, ping_interval=None, max_queue=4)
        self.socket.connection_made(self.transport)

    def end(self) -> None:
        self.socket.eof_received()
        self.socket.connection_lost(None)

    def answers(self) -> list[tuple[Opcode, bytes]]:
        """Frames that the server got."""
        self.server.receive_data(self.transport.written)
        return [(e.opcode, bytes(e.data)) for e in self.server.events_received() if isinstance(e, Frame)]


def frame(opcode: Opcode, data: bytes, *, fin: bool = True, rsv1: bool = False, mask: bool = False) -> bytes:
    plain = Frame(opcode, data, fin).serialize(mask=mask)
    return bytes((plain[0] | (0x40 if rsv1 else 0),)) + plain[1:]


def text(size: int, letter: str = "a") -> bytes:
    return frame(Opcode.TEXT, (letter * size).encode())


PLAIN = [text(0), text(1), text(125), text(126, "é"), text(70), text(3000), text(65_535), text(65_536), text(LIMIT)]
SPECIAL = [
    frame(Opcode.PING, b""),
    frame(Opcode.PING, b"here?"),
    frame(Opcode.PONG, b""),
    frame(Opcode.BINARY, b"looks like a text: \x81\x01a"),
    frame(Opcode.TEXT, b"in ", fin=False) + frame(Opcode.PING, b"within") + frame(Opcode.CONT, b"two"),
    frame(Opcode.TEXT, b"a", fin=False) + frame(Opcode.CONT, b"b", fin=False) + frame(Opcode.CONT, b"c"),
]
LAST = {
    "close": frame(Opcode.CLOSE, b"\x03\xe9going away"),
    "not UTF-8": frame(Opcode.TEXT, b"\xff is not UTF-8"),
    "masked": frame(Opcode.TEXT, b"masked", mask=True),
    "masked ping": frame(Opcode.PING, b"masked", mask=True),
    "ping that is too long": b"\x89\x7e\x00\x7e" + b"x" * 200,
    "reserved bit": frame(Opcode.TEXT, b"reserved", rsv1=True),
    "text within another": frame(Opcode.TEXT, b"one in", fin=False) + text(9),  # the middle of another
    "continuation of nothing": frame(Opcode.CONT, b"of nothing"),
    "too large": text(LIMIT + 1),
    "far too large": b"\x81\x7f\xff\xff\xff\xff\xff\xff\xff\xff",
    "half a text": text(100)[:50],
    "half a large text": text(70_000)[:69_000],
    "one byte": b"\x81",
    "half a length": b"\x81\x7e\x01",
    "nothing": b"",
}


async def heard(
    kind: type[ClientConnection], frames: Sequence[bytes], cuts: Sequence[int], *, reads: Sequence[bool]
) -> tuple[object, ...]:
    """All that comes of the frames, when the bytes are cut at these places, and asked for now and then.

    Places count from the end of the handshake, which is cut only by those below 0.
    """
    link = Link(kind)
    stream = link.handshake + b"".join(frames)
    got: list[str | bytes] = []

    async def read() -> None:
        while True:
            got.append(await link.socket.recv())
            if isinstance(link.socket, WatchedSocket):
                got.extend(link.socket.at_hand())

    reading = asyncio.create_task(read())
    places = sorted({0, *(min(max(0, len(link.handshake) + cut), len(stream)) for cut in cuts), len(stream)})
    for number, (start, end) in enumerate(pairwise(places)):
        link.socket.data_received(stream[start:end])
        if reads[number % len(reads)]:
            for _ in range(3):
                await asyncio.sleep(0)
    link.end()
    with pytest.raises(ConnectionClosed) as closed:
        await reading
    return got, closed.value.rcvd, closed.value.sent, link.answers()


@pytest.mark.parametrize("last", LAST.values(), ids=LAST)
async def test_what_is_heard_is_what_the_library_hears(last: bytes) -> None:
    for seed in range(60):
        chance = Random(seed)
        frames = [*chance.choices([*PLAIN, *PLAIN, *SPECIAL], k=chance.randrange(5)), last]
        around = [end + chance.randrange(-3, 12) for end in accumulate(map(len, frames))]
        cuts = chance.sample(around, chance.randrange(len(around) + 1)) + [chance.randrange(400)] * chance.randrange(2)
        reads = chance.choices([True, False], k=3)
        ours = await heard(WatchedSocket, frames, cuts, reads=reads)
        assert ours == await heard(ClientConnection, frames, cuts, reads=reads), seed


async def test_plain_frames_never_reach_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(WatchedSocket)
    stream = link.handshake + text(70) + frame(Opcode.PING, b"") + b"".join(text(size) for size in range(1000, 1100))
    parsed: list[int] = []
    receive = link.socket.protocol.receive_data

    def parse(data: bytes) -> None:
        parsed.append(len(data))
        receive(data)

    monkeypatch.setattr(link.socket.protocol, "receive_data", parse)
    ping = len(link.handshake) + len(text(70))
    pieces = [stream[:ping], stream[ping : ping + 2]]
    pieces += [stream[start : start + 4096] for start in range(ping + 2, len(stream), 4096)]
    pieces += [text(7) + frame(Opcode.PING, b"amid") + text(8)[:5], text(8)[5:] + frame(Opcode.PING, b"cut")[:4], b"t"]
    for piece in pieces:
        link.socket.data_received(piece)
    assert parsed == [len(link.handshake)]
    assert [len(await link.socket.recv()), *map(len, link.socket.at_hand())] == [70, *range(1000, 1100), 7, 8]
    assert link.answers() == [(Opcode.PONG, b""), (Opcode.PONG, b"amid"), (Opcode.PONG, b"cut")]


async def test_what_looks_like_a_text_within_another_frame_is_none() -> None:
    (binary,) = (each for each in SPECIAL if b"looks like" in each)
    got, *_ = await heard(WatchedSocket, [binary, text(1)], [len(binary) - 3], reads=[True])
    assert got == [binary[2:], "a"]


@pytest.mark.parametrize("before", [b"", frame(Opcode.CLOSE, b"\x03\xe9")], ids=["we first", "they first"])
async def test_who_says_goodbye_answers_as_the_library_does(before: bytes) -> None:
    answers = []
    for kind in (WatchedSocket, ClientConnection):
        link = Link(kind)
        link.socket.data_received(link.handshake + before)
        link.socket.protocol.send_close(1000) if not before else None
        for data in (text(3), frame(Opcode.PING, b"here?"), frame(Opcode.PING, b"")):
            link.socket.data_received(data)
        answers.append((link.answers(), len(link.socket.recv_messages.frames)))
    assert answers[0] == answers[1]


async def test_a_socket_that_nobody_asks_is_not_read_and_is_read_again_when_somebody_does() -> None:
    link = Link(WatchedSocket)
    link.socket.data_received(link.handshake + text(9) * 4)
    states = [link.transport.reading]
    link.socket.data_received(text(9))  # more than may be read ahead
    states.append(link.transport.reading)
    assert await link.socket.recv() == "a" * 9
    states.append(link.transport.reading)
    assert link.socket.at_hand() == ["a" * 9] * 4
    states.append(link.transport.reading)
    assert states == [True, False, False, True]


async def test_a_socket_is_not_read_any_more_when_too_much_came_at_once() -> None:
    link = Link(WatchedSocket)
    link.socket.data_received(link.handshake + text(9) * 5)
    assert not link.transport.reading
    assert [await link.socket.recv(), *link.socket.at_hand()] == ["a" * 9] * 5
    assert link.transport.reading


async def test_frames_at_hand_end_where_something_else_came() -> None:
    link = Link(WatchedSocket)
    frames = SocketFrames(link.socket, "GET /stream", lambda _: True, slow_seconds=10)
    link.socket.data_received(link.handshake + text(1, "a") + text(1, "b") + frame(Opcode.BINARY, b"\x00") + text(1))
    assert [await anext(frames), *frames.at_hand()] == ["a", "b"]
    with pytest.raises(BadFrame, match="a binary frame"):
        await anext(frames)


async def test_what_came_before_an_unreadable_frame_is_handed_out_first() -> None:
    link = Link(WatchedSocket)
    frames = SocketFrames(link.socket, "GET /stream", lambda _: True, slow_seconds=10)
    link.socket.data_received(link.handshake + text(1, "a") + text(1, "b") + LAST["not UTF-8"])
    assert [await anext(frames), *frames.at_hand()] == ["a", "b"]
    asked = asyncio.ensure_future(anext(frames))
    await asyncio.sleep(0)
    link.end()
    with pytest.raises(BadFrame, match="not UTF-8"):
        await asked


async def test_all_frames_are_shown_until_enough_was_seen() -> None:
    link = Link(WatchedSocket)
    shown: list[str] = []

    def look(frame: str) -> bool:
        shown.append(frame)
        return frame != "c"

    frames = SocketFrames(link.socket, "GET /stream", look, slow_seconds=10)
    link.socket.data_received(link.handshake + b"".join(text(1, letter) for letter in "abcde"))
    assert [await anext(frames), *frames.at_hand()] == list("abcde")
    assert shown == list("abc")
