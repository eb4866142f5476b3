"""Streams of the Coder adapter: each way a real socket can end, its limits, its manners."""

import asyncio
import gc
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise

import pytest
from aiohttp import WSMsgType, web
from prometheus_client import REGISTRY
from websockets.protocol import Protocol

from relay.adapters.coder import CoderSettings, CoderUpstream, open_upstream
from relay.adapters.coder_answers import NOT_FOUND
from relay.adapters.coder_socket import WatchedSocket
from relay.core.errors import BadFrame, RelayError, StreamEnded, Unavailable
from tests.adapters.scripted_server import CHAT, CHATS, TOKEN, Handler, ScriptedServer, error_of, serve

Script = Callable[[web.WebSocketResponse, web.Request], Awaitable[None]]


@asynccontextmanager
async def upstream_of(script: Script, **settings: object) -> AsyncIterator[tuple[CoderUpstream, ScriptedServer]]:
    """An upstream whose every handshake succeeds, after which `script` has the socket."""

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(autoping=False, compress=False)
        await socket.prepare(request)
        await script(socket, request)
        return socket

    async with serve(handler) as server, open_it(server, settings) as upstream:
        yield upstream, server


def open_it(server: ScriptedServer, settings: dict[str, object]) -> AbstractAsyncContextManager[CoderUpstream]:
    values = {"url": server.url, "token": TOKEN, "timeout_seconds": 5} | settings
    return open_upstream(CoderSettings.model_validate(values))


async def rest_of(stream: AsyncIterator[str]) -> tuple[list[str], RelayError]:
    """All frames that are still to come, and the error the stream ends with."""
    frames: list[str] = []
    while True:
        try:
            async with asyncio.timeout(20):
                frames.append(await anext(stream))
        except RelayError as exc:
            return frames, exc


async def read(upstream: CoderUpstream, after_id: int = 0) -> tuple[list[str], RelayError]:
    async with upstream.stream(CHAT, after_id=after_id) as stream:
        return await rest_of(stream)


def counted(metric: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(metric, labels)
    assert value is not None  # every series exists from the start
    return value


# --- what goes out, what comes in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("after_id", [0, 2**63 - 1])
async def test_the_cursor_and_frames_as_sent(after_id: int) -> None:
    texts = ['{"type":"ping","data":null}\n', "", "π \u2028 \U0001f980 \x00", "x" * 3_000_000]

    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        for text in texts:
            await socket.send_str(text)
        await socket.close()

    async with upstream_of(script) as (upstream, server):
        frames, _error = await read(upstream, after_id)
    assert frames == texts
    assert server.paths[-1] == f"{CHATS}/{CHAT}/stream?after_id={after_id}"


async def test_watch() -> None:
    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.send_str('{"type":"ping","data":null}\n')
        await socket.close()

    async with upstream_of(script) as (upstream, server), upstream.watch() as stream:
        frames, error = await rest_of(stream)
    assert frames == ['{"type":"ping","data":null}\n']
    assert isinstance(error, StreamEnded)
    assert server.paths == [f"{CHATS}/watch"]


async def test_pings_are_answered_and_nothing_else_is_sent() -> None:
    received: list[WSMsgType] = []

    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        for _ in range(3):
            await socket.ping(b"alive?")
            received.append((await socket.receive()).type)
        await socket.send_str("enough")
        received.append((await socket.receive()).type)

    async with upstream_of(script) as (upstream, _server), upstream.stream(CHAT, after_id=0) as frames:
        assert await anext(frames) == "enough"
    assert received == [WSMsgType.PONG, WSMsgType.PONG, WSMsgType.PONG, WSMsgType.CLOSE]


PING = b"\x89\x02hi"


@pytest.mark.parametrize(
    ("pieces", "text", "pongs"),
    [
        pytest.param([PING], "end", [b"hi"], id="alone"),
        pytest.param([b"\x89\x00"], "end", [b""], id="without a word"),
        pytest.param([b"\x89\x7d" + b"x" * 125], "end", [b"x" * 125], id="the longest"),
        pytest.param([PING, PING + PING], "end", [b"hi"] * 3, id="together"),
        pytest.param([b"\x89", b"\x02h", b"i"], "end", [b"hi"], id="in pieces"),
        pytest.param([b"\x89\x04", PING], "end", [PING], id="in a ping"),
        pytest.param([b"\x01\x01a", PING, b"\x80\x01b"], "ab", [b"hi"], id="between two halves of a message"),
        pytest.param([b"\x81\x05\xc3", PING], "\xc9\x02hi", [], id="a part of a message"),
        pytest.param([b"\x81\x05", b"\xc3", PING], "\xc9\x02hi", [], id="a part of a message, its header before"),
    ],
)
async def test_pings_are_told_from_what_looks_like_them(pieces: list[bytes], text: str, pongs: list[bytes]) -> None:
    heard: list[bytes] = []
    closed = asyncio.Event()

    async def script(socket: web.WebSocketResponse, request: web.Request) -> None:
        for piece in pieces:
            transport(request).write(piece)
            await asyncio.sleep(0.05)  # so that it comes alone
        if text == "end":
            await socket.send_str(text)
        while (message := await socket.receive()).type is WSMsgType.PONG:
            heard.append(message.data)
        closed.set()

    async with upstream_of(script) as (upstream, _server), asyncio.timeout(30):
        async with upstream.stream(CHAT, after_id=0) as frames:
            assert await anext(frames) == text
        await closed.wait()
    assert heard == pongs


async def test_a_ping_alone_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is most of what an idle worker does; of another library this may be true no more."""
    parsed: list[bytes] = []
    receive_data = Protocol.receive_data

    def receive_and_remember(protocol: Protocol, data: bytes) -> None:
        parsed.append(data)
        receive_data(protocol, data)

    monkeypatch.setattr(Protocol, "receive_data", receive_and_remember)

    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.send_str("first")
        for _ in range(3):
            await socket.ping(b"1234")
            assert (await socket.receive()).data == b"1234"
        await socket.send_str("last")
        await socket.receive()

    async with upstream_of(script) as (upstream, _server), upstream.stream(CHAT, after_id=0) as frames:
        assert [await anext(frames), await anext(frames)] == ["first", "last"]
    assert not [data for data in parsed if data.startswith(b"\x89")]


async def test_a_server_that_pings_is_not_pinged_and_one_that_is_silent_is() -> None:
    received: list[WSMsgType] = []
    times: list[float] = []

    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        for _ in range(8):  # for longer than silence may last
            times.append(time.monotonic())
            await socket.ping(b"alive?")
            received.append((await socket.receive()).type)
            await asyncio.sleep(0.2)
        for _ in range(2):
            received.append((await socket.receive()).type)
            await socket.pong(b"")
        await socket.send_str("still here")
        await socket.receive()

    patient = {"ping_interval_seconds": 0.8, "ping_timeout_seconds": 10.0}
    async with upstream_of(script, **patient) as (upstream, _server), upstream.stream(CHAT, after_id=0) as frames:
        async with asyncio.timeout(30):
            assert await anext(frames) == "still here"
    stood_still = max(later - before for before, later in pairwise(times)) > 0.6
    assert stood_still or received == [WSMsgType.PONG] * 8 + [WSMsgType.PING] * 2


async def test_a_socket_that_is_closed_is_forgotten() -> None:
    async with upstream_of(is_silent) as (upstream, _server):
        async with upstream.stream(CHAT, after_id=0):
            pass
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, WatchedSocket)]


async def test_a_stream_that_nobody_reads_is_not_taken_for_dead() -> None:
    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        for number in range(200):
            await socket.send_str(str(number))  # more than is read ahead: then the socket is not read
        await socket.send_str("the last")
        await socket.receive()

    hasty = {"ping_interval_seconds": 0.4, "ping_timeout_seconds": 0.4}
    async with upstream_of(script, **hasty) as (upstream, _server), upstream.stream(CHAT, after_id=0) as frames:
        await anext(frames)
        await asyncio.sleep(2.0)
        async with asyncio.timeout(20):
            assert [frame async for frame in frames_until(frames, "the last")] == [str(n) for n in range(1, 200)]


async def frames_until(frames: AsyncIterator[str], last: str) -> AsyncIterator[str]:
    while (frame := await anext(frames)) != last:
        yield frame


async def test_two_streams_at_once() -> None:
    both = asyncio.Barrier(2)

    async def script(socket: web.WebSocketResponse, request: web.Request) -> None:
        await both.wait()
        await socket.send_str(request.path)
        await socket.close()

    async with (
        upstream_of(script) as (upstream, _server),
        upstream.watch() as first,
        upstream.stream(CHAT, after_id=0) as second,
    ):
        assert await anext(first) == f"{CHATS}/watch"
        assert await anext(second) == f"{CHATS}/{CHAT}/stream"


# --- each way to end -----------------------------------------------------------------------------------------------


def transport(request: web.Request) -> asyncio.Transport:
    assert isinstance(request.transport, asyncio.Transport)
    return request.transport


def closes(code: int, reason: str) -> Script:
    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.close(code=code, message=reason.encode())

    return script


def writes(raw: bytes, *, then: str) -> Script:
    """Raw bytes on the socket, then `abort` (reset), `close` (end of file) or `wait`."""

    async def script(socket: web.WebSocketResponse, request: web.Request) -> None:
        transport(request).write(raw)
        if then == "wait":
            await socket.receive()
        else:
            getattr(transport(request), then)()

    return script


async def is_silent(_socket: web.WebSocketResponse, _request: web.Request) -> None:
    await asyncio.Event().wait()


TEXT, BINARY, FINAL = 0x1, 0x2, 0x80


def frame(opcode: int, payload: bytes, length: int | None = None) -> bytes:
    """A frame as a server sends it; with `length`, its header promises another length than comes."""
    return bytes([FINAL | opcode, 127]) + struct.pack("!Q", len(payload) if length is None else length) + payload


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(closes(1000, "Connection closed"), "server_close", id="polite stop of the server"),
        pytest.param(closes(1000, ""), "server_close", id="polite stop of a newer server"),
        pytest.param(closes(1001, "going away"), "server_close", id="a proxy goes"),
        pytest.param(closes(1001, "Ping failed"), "ping_timeout", id="no pong in time"),
        pytest.param(closes(1001, "liveness probe failed"), "ping_timeout", id="no pong for a newer server"),
        pytest.param(closes(1011, "Unable to send newest message"), "server_close", id="server error"),
        pytest.param(closes(1012, "restart"), "server_close", id="service restart"),
        pytest.param(closes(1002, "Clients cannot send messages"), "protocol_error", id="we are to blame"),
        pytest.param(closes(1008, "unexpected data message"), "protocol_error", id="we are to blame, newer server"),
        pytest.param(writes(b"", then="abort"), "network_error", id="connection reset"),
        pytest.param(writes(b"", then="close"), "network_error", id="end of file without a close frame"),
        pytest.param(writes(frame(TEXT, b"half", length=900), then="close"), "network_error", id="cut inside a frame"),
        pytest.param(writes(frame(TEXT, b"", length=900)[:5], then="abort"), "network_error", id="cut inside a header"),
        pytest.param(writes(frame(0x3, b"reserved"), then="wait"), "protocol_error", id="unknown opcode"),
        pytest.param(writes(frame(TEXT | 0x40, b"compressed"), then="wait"), "protocol_error", id="reserved bit"),
        pytest.param(is_silent, "ping_timeout", id="a dead link"),
    ],
)
async def test_each_end_of_a_stream_is_unavailable_with_its_reason(script: Script, reason: str) -> None:
    async def after_one_frame(socket: web.WebSocketResponse, request: web.Request) -> None:
        await socket.send_str("good")
        await script(socket, request)

    opened = counted("relay_stream_connects_total", outcome="ok")
    ended = counted("relay_stream_disconnects_total", reason=reason)
    short_pings = {"ping_interval_seconds": 0.1, "ping_timeout_seconds": 0.1} if script is is_silent else {}
    async with upstream_of(after_one_frame, **short_pings) as (upstream, _server):
        frames, error = await read(upstream)
    assert frames == ["good"]
    assert isinstance(error, StreamEnded)
    assert error.reason == reason
    assert f"GET {CHATS}/{CHAT}/stream" in str(error)
    assert TOKEN not in f"{error!r}"
    assert counted("relay_stream_connects_total", outcome="ok") == opened + 1
    assert counted("relay_stream_disconnects_total", reason=reason) == ended + 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param(frame(TEXT, b"x" * 30_000_000), "too_large", id="30 MB"),
        pytest.param(frame(TEXT, b"x" * (2**24 + 1)), "too_large", id="one byte over the limit"),
        pytest.param(frame(TEXT, b"", length=2**62), "too_large", id="only promised"),
        pytest.param(frame(BINARY, b"{}"), "schema", id="binary"),
        pytest.param(frame(TEXT, b'"\xff"'), "bad_json", id="not UTF-8"),
    ],
)
async def test_a_frame_that_cannot_be_taken(raw: bytes, reason: str) -> None:
    ended = counted("relay_stream_disconnects_total", reason="protocol_error")
    async with upstream_of(writes(frame(TEXT, b"good") + raw, then="wait")) as (upstream, _server):
        frames, error = await read(upstream)
    assert frames == ["good"]
    assert isinstance(error, BadFrame)
    assert error.reason == reason
    assert counted("relay_stream_disconnects_total", reason="protocol_error") == ended + 1


async def test_a_frame_of_exactly_the_limit_is_taken() -> None:
    async with upstream_of(writes(frame(TEXT, b"x" * 2**24), then="close")) as (upstream, _server):
        frames, error = await read(upstream)
    assert [len(text) for text in frames] == [2**24]
    assert isinstance(error, StreamEnded)


async def test_a_stream_that_is_let_go_is_no_disconnect() -> None:
    before = {
        reason: counted("relay_stream_disconnects_total", reason=reason)
        for reason in ("server_close", "ping_timeout", "network_error", "protocol_error", "too_slow")
    }

    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.send_str("one")
        await socket.receive()

    async with upstream_of(script) as (upstream, _server), upstream.stream(CHAT, after_id=0) as frames:
        await anext(frames)
    assert before == {reason: counted("relay_stream_disconnects_total", reason=reason) for reason in before}


async def test_a_dead_link_does_not_hold_up_a_shutdown() -> None:
    reading = asyncio.Event()

    async def follow(upstream: CoderUpstream) -> None:
        async with upstream.stream(CHAT, after_id=0) as frames:
            reading.set()
            await anext(frames)

    async with upstream_of(is_silent) as (upstream, _server):
        task = asyncio.create_task(follow(upstream))
        await reading.wait()
        task.cancel()
        await asyncio.wait([task], timeout=5)  # the ping would need 40 s, the library's own patience is 10 s
        assert task.cancelled()


# --- a reader that cannot keep up ----------------------------------------------------------------------------------


async def test_what_is_not_taken_is_not_read_and_nothing_is_lost_before_the_cut() -> None:
    """The server gives up a write that takes too long, and cuts the connection inside a frame, as a real one does."""
    size, promised = 2**18, 1000  # 256 MiB in all, far more than sockets buffer
    gave_up: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def script(socket: web.WebSocketResponse, request: web.Request) -> None:
        for sent in range(promised):
            try:
                async with asyncio.timeout(0.5):
                    await socket.send_str(f"{sent:0{size}}")
            except TimeoutError:
                gave_up.set_result(sent)
                # What the system has taken arrives still; then the connection ends.
                transport(request).set_write_buffer_limits(0)
                transport(request).close()
                return
        gave_up.set_result(promised)

    slow = upstream_of(script, slow_reader_seconds=0.3)
    async with slow as (upstream, _server), upstream.stream(CHAT, after_id=0) as stream:
        first = await anext(stream)
        sent = await gave_up
        frames, error = await rest_of(stream)
    assert sent < promised / 4
    numbers = [int(text[-4:]) for text in [first, *frames]]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= sent - 1
    assert isinstance(error, StreamEnded)
    assert error.reason == "too_slow"


# --- handshakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "protocol_error"),
        (307, "protocol_error"),
        (400, "protocol_error"),
        (401, "auth_error"),
        (403, "auth_error"),
        (404, "not_found"),
        (408, "timeout"),
        (429, "rate_limited"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
async def test_refused_handshakes_are_counted(status: int, outcome: str) -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.json_response({"message": NOT_FOUND if status == 404 else "No."}, status=status)

    before = counted("relay_stream_connects_total", outcome=outcome)
    async with serve(handler) as server, open_it(server, {}) as upstream:
        await error_of(upstream, "stream")
    assert counted("relay_stream_connects_total", outcome=outcome) == before + 1


async def hangs_up(request: web.Request) -> web.StreamResponse:
    transport(request).abort()
    return web.Response()


async def never_answers(_request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    return web.Response()


async def speaks_something_else(request: web.Request) -> web.StreamResponse:
    transport(request).write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    transport(request).close()
    return web.Response()


async def agrees_with_a_wrong_key(request: web.Request) -> web.StreamResponse:
    transport(request).write(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: bm8=\r\n\r\n"
    )
    await asyncio.Event().wait()
    return web.Response()


@pytest.mark.parametrize(
    ("handler", "outcome"),
    [
        (hangs_up, "network_error"),
        (never_answers, "timeout"),
        (speaks_something_else, "protocol_error"),
        (agrees_with_a_wrong_key, "protocol_error"),
    ],
)
async def test_failed_handshakes_are_unavailable_and_counted(handler: Handler, outcome: str) -> None:
    before = counted("relay_stream_connects_total", outcome=outcome)
    async with serve(handler) as server, open_it(server, {"timeout_seconds": 0.5}) as upstream:
        error = await error_of(upstream, "stream")
    assert type(error) is Unavailable
    assert counted("relay_stream_connects_total", outcome=outcome) == before + 1


async def test_a_line_of_text_before_the_json_of_a_refusal() -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        text = 'request Origin is not authorized\n{"message":"Failed to open chat stream.","detail":"why"}\n'
        return web.Response(text=text, status=403)

    async with serve(handler) as server, open_it(server, {}) as upstream:
        assert "Failed to open chat stream. (why)" in str(await error_of(upstream, "stream"))


async def test_a_proxy_without_upgrades_is_told() -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.Response(text="WebSocket protocol violation", status=426)

    async with serve(handler) as server, open_it(server, {}) as upstream:
        error = await error_of(upstream, "stream")
    assert type(error) is Unavailable
    assert "does not let WebSocket upgrades pass" in str(error)
