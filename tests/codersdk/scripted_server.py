"""A server on a real socket that answers as it is told, to the byte, and keeps what it was sent."""

import asyncio
import base64
import contextlib
import hashlib
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from tests.codersdk.vectors import as_bytes

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_TEXT, _BINARY, _CONTINUATION, _CLOSE, _PING, _PONG = 1, 2, 0, 8, 9, 10
_SECONDS = 10  # for what has to come at once


@dataclass
class Received:
    """One request, as it came in."""

    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass
class Reply:
    """What to answer one request with."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    truncated: bool = False  # the connection ends before the body does
    frames: Sequence[Mapping[str, Any]] | None = None  # of a WebSocket, after the handshake


@dataclass
class Goodbye:
    """What a WebSocket client sent."""

    close: tuple[int, str] | None = None  # code (1005: none given) and reason; None: no close frame
    pongs: list[bytes] = field(default_factory=list)


class ScriptedServer:
    """Answers requests with the replies of its script, in their order; with status 500 when there is none left."""

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.received: list[Received] = []
        self.goodbyes: list[asyncio.Future[Goodbye]] = []
        self.address = ""
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def begin(self, *replies: Reply) -> None:
        """Forget what was; the next requests get these replies."""
        self.script, self.received, self.goodbyes = list(replies), [], []

    async def goodbye(self) -> Goodbye:
        """What the only WebSocket client sent, once it is gone."""
        async with asyncio.timeout(_SECONDS):
            (gone,) = self.goodbyes
            return await gone

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.ensure_future(self._serve(reader, writer)))

    async def stop(self) -> None:
        """Hang up, and fail if the script could not be played."""
        for connection in self._connections:
            connection.cancel()
        for outcome in await asyncio.gather(*self._connections, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await _read_request(reader):
                self.received.append(request)
                reply = self.script.pop(0) if self.script else Reply(500)
                if reply.frames is not None:
                    await self._serve_frames(reader, writer, request, reply.frames)
                    break
                writer.write(_head(reply, request))
                await writer.drain()
                if reply.truncated or reply.status == 101:
                    break
            writer.close()
            await writer.wait_closed()

    async def _serve_frames(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        request: Received,
        frames: Sequence[Mapping[str, Any]],
    ) -> None:
        gone: asyncio.Future[Goodbye] = asyncio.get_running_loop().create_future()
        self.goodbyes.append(gone)
        accept = base64.b64encode(hashlib.sha1(request.headers["sec-websocket-key"].encode() + _GUID).digest())
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        goodbye = Goodbye()
        try:
            listening = asyncio.ensure_future(_listen(reader, writer, goodbye))
            # At once, so that the client finds the same things waiting every time.
            writer.write(b"".join(piece for frame in frames for piece in _frames_of(frame)))
            await writer.drain()
            if frames and frames[-1]["kind"] in {"abort", "cut"}:
                writer.write_eof()  # the client can still say something
            async with asyncio.timeout(_SECONDS):
                await listening
        except ConnectionError:
            await listening
        finally:
            gone.set_result(goodbye)


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head[:-4].split(b"\r\n")
    method, target, _ = first.decode("latin-1").split(" ")
    pairs = [line.decode("utf-8", "surrogateescape").split(":", 1) for line in lines]
    headers = {name.lower(): value.strip(" \t") for name, value in pairs}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    return Received(method, target, headers, body)


def _head(reply: Reply, request: Received) -> bytes:
    names = {each.value: each.phrase for each in HTTPStatus}
    lines = [f"HTTP/1.1 {reply.status} {names.get(reply.status, 'Odd')}".encode()]
    # The server that the vectors were made with leaves out what a 304 has no body for.
    dropped = {"Content-Type"} if reply.status == 304 else set()
    lines += [
        f"{name}: {value}".encode("utf-8", "surrogateescape")
        for name, value in reply.headers.items()
        if name not in dropped
    ]
    if reply.status in {204, 304} or reply.status < 200:
        return b"\r\n".join(lines) + b"\r\n\r\n"
    length = len(reply.body) + (10 if reply.truncated else 0)
    lines.append(f"Content-Length: {length}".encode())
    return b"\r\n".join(lines) + b"\r\n\r\n" + reply.body


def _frame(opcode: int, payload: bytes, *, last: bool = True) -> bytes:
    head = bytes([opcode | (0x80 if last else 0)])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 1 << 16:
        return head + b"\x7e" + struct.pack("!H", len(payload)) + payload
    return head + b"\x7f" + struct.pack("!Q", len(payload)) + payload


def _frames_of(frame: Mapping[str, Any]) -> list[bytes]:
    match frame["kind"]:
        case "text" | "binary" as kind:
            if "repeat" in frame:
                text = frame["prefix"] + frame["repeat"] * frame["count"] + frame["suffix"]
                payload = text.encode()
            else:
                payload = as_bytes(frame, "data")
            return [_frame(_TEXT if kind == "text" else _BINARY, payload)]
        case "abort":
            return []
        case "cut":
            return [_frame(_TEXT, as_bytes(frame, "data"))[:-5]]
        case "ping":
            return [_frame(_PING, as_bytes(frame, "data"))]
        case "text-fragments":
            parts = [part.encode() for part in frame["parts"]]
            return [
                _frame(_CONTINUATION if index else _TEXT, part, last=index == len(parts) - 1)
                for index, part in enumerate(parts)
            ]
        case "close":
            return [_frame(_CLOSE, struct.pack("!H", frame["code"]) + frame["reason"].encode())]
        case "close-empty":
            return [_frame(_CLOSE, b"")]
        case "close-raw":
            return [_frame(_CLOSE, as_bytes(frame, "data"))]
    raise AssertionError(f"a frame of an unknown kind: {frame['kind']}")


async def _listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, goodbye: Goodbye) -> None:
    """Take what the client sends until it closes; close when it says goodbye."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = await reader.readexactly(2)
            length = head[1] & 0x7F
            assert head[1] & 0x80, "a client's frame is masked"
            if length == 126:
                (length,) = struct.unpack("!H", await reader.readexactly(2))
            mask = await reader.readexactly(4)
            payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(await reader.readexactly(length)))
            match head[0] & 0x0F:
                case 8:
                    code = struct.unpack("!H", payload[:2])[0] if payload else 1005
                    goodbye.close = (code, payload[2:].decode("utf-8", "replace"))
                    writer.write(_frame(_CLOSE, payload))
                    writer.close()
                    return
                case 10:
                    goodbye.pongs.append(payload)


@asynccontextmanager
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer()
    listener = await asyncio.start_server(server.connected, "127.0.0.1", 0, limit=1 << 26)
    host, port = listener.sockets[0].getsockname()
    server.address = f"{host}:{port}"
    try:
        yield server
    finally:
        listener.close()
        await server.stop()
