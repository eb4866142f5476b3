"""The server's end of a one-way WebSocket: pings, the rule that clients are silent, deadlines, and ways to break it."""

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

from aiohttp import WSMsgType, web

from relay.simulator.dialect import Features
from relay.simulator.faults import Faults

CLIENTS_ARE_SILENT = "Clients cannot send messages for one-way WebSockets"


@dataclass(frozen=True)
class Patience:
    """Real seconds: between two pings and for each pong; for one frame to be taken by the network."""

    ping_seconds: float = 15.0
    write_seconds: float = 10.0


@dataclass(frozen=True)
class Farewells:
    """How the server closes sockets, code and reason: to clients that speak, or do not answer pings; when it stops.

    A server of 2.32 that stops says nothing on watch sockets.
    """

    spoken_to: tuple[int, str] = (1002, CLIENTS_ARE_SILENT)
    unanswered: tuple[int, str] = (1001, "Ping failed")
    stopping: tuple[int, str] = (1000, "Connection closed")
    drops_watch: bool = False

    @classmethod
    def of(cls, features: Features) -> "Farewells":
        """Those of a server age."""
        return cls(
            (1008, "unexpected data message") if features.raw_frames else cls.spoken_to,
            (1001, "liveness probe failed") if features.episodes else cls.unanswered,
            (1000, "") if features.raw_frames else cls.stopping,
            features.whole_watch and not features.raw_frames,
        )


SEED = Farewells()


class Gone(Exception):
    """The socket was cut; nothing more can be sent."""


class Outlet:
    """One open socket. `chat_id` None: a watch socket."""

    def __init__(self, chat_id: UUID | None, faults: Faults, patience: Patience, farewells: Farewells = SEED) -> None:
        self.chat_id = chat_id
        self.frames_sent = 0
        self._faults = faults
        self._patience = patience
        self._farewells = farewells
        self._socket = web.WebSocketResponse(
            autoclose=False, autoping=False, compress=False, max_msg_size=0, timeout=1.0
        )
        self._transport: asyncio.Transport | None = None
        self._pong = asyncio.Event()
        self._silent_until = 0.0
        self._closing: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def serve(
        self, request: web.Request, produce: Callable[["Outlet"], Awaitable[None]]
    ) -> web.WebSocketResponse:
        """Upgrade, then run the producer until it, the client or a fault ends the socket."""
        transport = request.transport
        await self._socket.prepare(request)
        self._transport = transport if isinstance(transport, asyncio.Transport) else None
        self._listener = asyncio.create_task(self._listen())
        tasks = [
            self._listener,
            asyncio.create_task(self._keep_alive()),
            asyncio.create_task(self._produce(produce)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            if self._closing is not None:
                await self._closing
        for result in results:
            if isinstance(result, Exception):
                raise result
        return self._socket

    async def _produce(self, produce: "Produce") -> None:
        with contextlib.suppress(Gone):
            await produce(self)

    async def _listen(self) -> None:
        """Answer pings and closes; anything else from a client ends the socket."""
        while True:
            message = await self._socket.receive()
            match message.type:
                case WSMsgType.PING:
                    await self._socket.pong(message.data)
                case WSMsgType.PONG:
                    self._pong.set()
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    await self.close(*self._farewells.spoken_to)
                    return
                case WSMsgType.CLOSE:
                    await self.close(message.data or 1000, "")
                    return
                case _:
                    return

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._patience.ping_seconds)
            self._pong.clear()
            try:
                await self._socket.ping()
            except (ConnectionError, RuntimeError):
                return
            try:
                async with asyncio.timeout(self._patience.ping_seconds):
                    await self._pong.wait()
            except TimeoutError:
                await self.close(*self._farewells.unanswered)
                return

    async def send_frame(self, text: str) -> None:
        """Send one text frame, or do to it what a fault asks for.

        Raises:
            Gone: The socket was cut here, or had been cut.
        """
        if asyncio.get_running_loop().time() < self._silent_until:
            self._faults.fired["silence"] += 1
            return
        cut = None if self.chat_id is None else self._faults.for_stream("cut_every", self.chat_id)
        cut_now = cut is not None and (self.frames_sent + 1) % cut.frames == 0
        if cut is not None and cut_now and cut.inside:
            self._faults.count(cut)
            self.cut_inside(text)
            raise Gone
        await self._send(text)
        if self.chat_id is not None and self._faults.strikes("duplicate_frames", self.chat_id):
            await self._send(text)
        if cut is not None and cut_now:
            self._faults.count(cut)
            self.cut()
            raise Gone

    async def inject(self, text: str) -> None:
        """Send any text as a frame, at once. Frames of the producer are not torn."""
        with contextlib.suppress(Gone):
            await self._send(text)

    async def _send(self, text: str) -> None:
        try:
            async with asyncio.timeout(self._patience.write_seconds):
                await self._socket.send_str(text)
        except TimeoutError:
            self._faults.fired["write_deadline"] += 1
            self.cut()
            raise Gone from None
        except (ConnectionError, RuntimeError) as exc:
            raise Gone from exc
        self.frames_sent += 1

    def silence(self, seconds: float | None) -> None:
        """Send no frame for a while, or for ever; what comes meanwhile is lost. Pings go on."""
        self._silent_until = float("inf") if seconds is None else asyncio.get_running_loop().time() + seconds

    async def say_goodbye(self) -> None:
        """The server stops."""
        if self.chat_id is None and self._farewells.drops_watch:
            self.cut()
        else:
            await self.close(*self._farewells.stopping)

    async def close(self, code: int, reason: str) -> None:
        """A close handshake, as far as the client takes part in it. The first one counts."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(code, reason))
        # The end of one of the socket's tasks cancels its fellows: the handshake goes on all the same.
        await asyncio.shield(self._closing)

    async def _close(self, code: int, reason: str) -> None:
        # aiohttp waits for the client's close frame only where nobody else is reading; without waiting, the
        # connection would be torn down behind our frame, which is then lost when the client has just sent a pong.
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait([self._listener])
        with contextlib.suppress(ConnectionError, RuntimeError):
            await self._socket.close(code=code, message=reason.encode())

    def cut(self) -> None:
        """Drop the connection without a close frame."""
        if self._transport is not None:
            self._transport.abort()

    def cut_inside(self, text: str) -> None:
        """Write half a frame, then drop the connection."""
        if self._transport is not None:
            payload = text.encode()
            self._transport.write(_frame_head(len(payload)) + payload[: len(payload) // 2])
            self._transport.close()


Produce: TypeAlias = Callable[[Outlet], Awaitable[None]]


def _frame_head(length: int) -> bytes:
    """The head of an unmasked, final text frame."""
    if length < 126:
        return struct.pack("!BB", 0x81, length)
    if length < 1 << 16:
        return struct.pack("!BBH", 0x81, 126, length)
    return struct.pack("!BBQ", 0x81, 127, length)
