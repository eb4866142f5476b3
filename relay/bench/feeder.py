"""A server that speaks just as much of the Coder API as a worker needs, and costs as little as it can.

A process of its own (`python -m relay.bench.feeder`). Its chats say what `relay.bench.talk` has ready, as fast as their
sockets are read or at a pace; all else is what the simulator is for.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

from relay.bench.children import allow_many_files, serve
from relay.bench.talk import CHATS_PATH, OWNER, TOOL_ROUNDS, TalkingChat, now_text, websocket_frame
from relay.simulator.wire import go_json

_TICK_SECONDS = 0.01
_PING_SECONDS = 15.0  # as Coder does (protocol of its streams), which readers answer
_PING = b"\x89\x00"
_HELLO = websocket_frame(b'{"type":"ping","data":null}\n')
_NO_ROUTE = b'{"message":"Route not found."}\n'
_ME = go_json({"id": str(OWNER), "username": "bench", "organization_ids": []}).encode()
_BACKLOG = 4096
_SEND_BUFFER_BYTES = 65536


class _Socket:
    """One open stream: what comes in is answered by the protocol's own rules, what goes out is written as it is."""

    def __init__(self, protocol: ServerProtocol, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._protocol = protocol
        self._reader = reader
        self.writer = writer

    def flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self.writer.write(data)

    async def answer_until_closed(self) -> None:
        """Answer pings and the closing handshake until the other side is gone."""
        while self._protocol.state is State.OPEN:
            data = await self._reader.read(4096)
            if not data:
                break
            self._protocol.receive_data(data)
            self._protocol.events_received()
            self.flush()


class Feeder:
    """The chats and their sockets.

    Args:
        chats: How many the list shows.
        rounds: Of tool calls in each turn.
        history: How many of them, the first ones, have a finished turn behind them.
        running: How many, again the first ones, have one that goes on.
    """

    def __init__(self, chats: int, *, rounds: int = TOOL_ROUNDS, history: int = 0, running: int = 0) -> None:
        self._rows: list[bytes] = []
        self._chats: dict[UUID, TalkingChat] = {}
        self._order: list[UUID] = []
        self._sockets: dict[UUID, _Socket] = {}
        self._rate: float | None = None  # frames a second of each chat; None: as fast as they are read
        self._feeding = asyncio.Event()
        self._last = -1  # which chat of the order spoke last, where they speak in turn
        self.opened = 0  # streams, ever
        for number in range(chats):
            chat = TalkingChat(number, rounds)
            chat.told = (number < history) * chat.frames_per_turn + (number < running) * 2
            self._chats[chat.id] = chat
            self._order.append(chat.id)

    # --- what the parent asks for

    def state(self) -> dict[str, object]:
        return {
            "open": len(self._sockets),
            "opened": self.opened,
            "messages": sum(chat.messages for chat in self._chats.values()),
        }

    def feed(self, rate: float | None) -> dict[str, object]:
        """Let all chats talk, at so many frames a second each; None: as fast as they are read."""
        self._rate = rate
        self._feeding.set()
        return self.state()

    def pause(self) -> dict[str, object]:
        self._feeding.clear()
        return self.state()

    # --- talking

    async def pace(self) -> None:
        """Where a rate is given, chats talk whether anybody listens or not."""
        due = 0.0
        before = time.monotonic()
        while True:
            if self._rate is None or not self._feeding.is_set():
                await self._feeding.wait()
                due, before = 0.0, time.monotonic()  # nothing is due of the time in which they were silent
            await asyncio.sleep(_TICK_SECONDS)
            if self._rate is None:
                continue
            now = time.monotonic()
            due += self._rate * len(self._order) * (now - before)
            before = now
            moment = now_text(datetime.now(UTC))
            for _ in range(int(due)):
                chat = self._chats[self._next_in_turn()]
                frame = chat.next_frame(moment, time.monotonic_ns())
                stream = self._sockets.get(chat.id)
                if stream is not None and not stream.writer.is_closing():
                    stream.writer.write(frame)
            due -= int(due)

    def _next_in_turn(self) -> UUID:
        self._last = (self._last + 1) % len(self._order)
        return self._order[self._last]

    async def _talk(self, chat: TalkingChat, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            await self._feeding.wait()
            if self._rate is not None:
                await asyncio.sleep(_TICK_SECONDS)
                continue
            writer.write(chat.next_turn(now_text(datetime.now(UTC)), time.monotonic_ns()))
            await writer.drain()
            await asyncio.sleep(0)

    # --- HTTP and WebSocket

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until the other side ends it."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
                url = urlsplit(target)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                if b"upgrade: websocket" in head.lower():
                    await self._socket(head, url.path, query, reader, writer)
                    return
                status, body = self._answer(method, url.path, query)
                writer.write(
                    b"HTTP/1.1 %d %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                    % (status, status.phrase.encode(), len(body))
                )
                writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, method: str, path: str, query: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
        if method == "GET" and path == "/api/v2/users/me":
            return HTTPStatus.OK, _ME
        if method == "GET" and path == CHATS_PATH:
            return HTTPStatus.OK, self._list(query)
        below = path.removeprefix(CHATS_PATH + "/").split("/")
        try:
            chat = self._chats.get(UUID(below[0]))
        except ValueError:
            chat = None
        if method == "GET" and chat is not None and below[1:] == ["messages"]:
            before = query.get("before_id")
            page = chat.page(
                int(before) if before else None, int(query.get("limit", "50")), now_text(datetime.now(UTC))
            )
            return HTTPStatus.OK, page
        if method == "GET" and chat is not None and len(below) == 1:
            return HTTPStatus.OK, chat.row + b"\n"
        return HTTPStatus.NOT_FOUND, _NO_ROUTE

    def _list(self, query: Mapping[str, str]) -> bytes:
        if "archived:true" in query.get("q", ""):
            return b"[]\n"
        limit = int(query.get("limit", "50"))
        after = query.get("after_id")
        start = self._order.index(UUID(after)) + 1 if after else 0
        rows = (self._chats[chat_id].row for chat_id in self._order[start : start + limit])
        return b"[%b]\n" % b",".join(rows)

    async def _socket(
        self,
        head: bytes,
        path: str,
        query: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        protocol = ServerProtocol()
        protocol.receive_data(head)
        request = protocol.events_received()[0]
        assert isinstance(request, Request)  # noqa: S101
        stream = _Socket(protocol, reader, writer)
        below = path.removeprefix(CHATS_PATH + "/").split("/")
        chat = self._chats.get(UUID(below[0])) if below[1:] == ["stream"] else None
        if chat is None and below != ["watch"]:
            protocol.send_response(protocol.reject(HTTPStatus.NOT_FOUND, _NO_ROUTE.decode()))
            stream.flush()
            return
        protocol.send_response(protocol.accept(request))
        stream.flush()
        self._ping_later(stream)
        if chat is None:
            writer.write(_HELLO)
            await stream.answer_until_closed()
            return
        async with self._streaming(chat, stream, int(query.get("after_id", "0"))):
            await stream.answer_until_closed()

    def _ping_later(self, stream: _Socket) -> None:
        asyncio.get_running_loop().call_later(_PING_SECONDS, self._ping, stream)

    def _ping(self, stream: _Socket) -> None:
        if not stream.writer.is_closing():
            stream.writer.write(_PING)
            self._ping_later(stream)

    @asynccontextmanager
    async def _streaming(self, chat: TalkingChat, stream: _Socket, after_id: int) -> AsyncIterator[None]:
        self.opened += 1
        for frame in chat.snapshot(after_id, now_text(datetime.now(UTC))):
            stream.writer.write(frame)
        self._sockets[chat.id] = stream
        talking = asyncio.create_task(self._talk(chat, stream.writer))
        try:
            yield
        finally:
            if self._sockets.get(chat.id) is stream:
                del self._sockets[chat.id]
            talking.cancel()
            await asyncio.wait([talking])


async def _main(**shape: int) -> None:
    allow_many_files()
    feeder = Feeder(**shape)
    listener = socket.create_server(("127.0.0.1", 0))
    # What waits in the system's buffers was told long before it is read: no more of it than keeps a reader busy.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    server = await asyncio.start_server(feeder.connection, sock=listener, backlog=_BACKLOG)
    port = listener.getsockname()[1]
    running = (server, asyncio.create_task(feeder.pace()))
    await serve(
        {"state": feeder.state, "feed": feeder.feed, "pause": feeder.pause}, hello={"url": f"http://127.0.0.1:{port}"}
    )
    assert running  # noqa: S101  # kept up to here
    # Nothing here is worth an orderly end, and Python 3.11 complains of each connection that is ended so.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main(**json.loads(sys.argv[1])))
