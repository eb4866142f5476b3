"""A TCP proxy that breaks what passes: cuts after so many bytes, stalls, latency, narrow lines, half-open connections.

Its chance comes from a seed. Counters say what really happened.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Self

PIECE = 16_384  # bytes at once


@dataclass(frozen=True)
class Line:
    """How a connection is. Each connection throws its own dice within these bounds.

    Args:
        cut_bytes: Cut after so many bytes in both directions together, drawn from this range; None: never.
        latency_seconds: Longest delay of a piece.
        bytes_per_second: Bandwidth of each direction; None: any.
        stall_chance: Of each piece, to wait for `stall_seconds`.
    """

    cut_bytes: tuple[int, int] | None = None
    latency_seconds: float = 0.0
    bytes_per_second: float | None = None
    stall_chance: float = 0.0
    stall_seconds: float = 0.0


GOOD = Line()


class FaultProxy:
    """Between clients and one server. `port` stays the same while it lives."""

    def __init__(self, name: str, host: str, port: int, dice: random.Random) -> None:
        self.name = name
        self.line = GOOD  # of pieces and connections from now on
        self.fired: Counter[str] = (
            Counter()
        )  # opened, ended (by either end), cut, refused, half_open, swallowed (bytes), left (half-open ones), …
        self.port = 0
        self._target = (host, port)
        self._dice = dice
        self._refusing = False
        self._server: asyncio.Server | None = None
        self._passages: dict[_Passage, None] = {}  # in the order of their coming: the dice shall choose again alike
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, name: str, host: str, port: int, dice: random.Random) -> AsyncIterator[Self]:
        proxy = cls(name, host, port, dice)
        proxy._server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        proxy.port = proxy._server.sockets[0].getsockname()[1]
        try:
            yield proxy
        finally:
            proxy._server.close()
            for passage in list(proxy._passages):
                passage.cut()
            for task in proxy._tasks:
                task.cancel()
            await asyncio.gather(*proxy._tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        """Connections that pass now."""
        return len(self._passages)

    def cut(self, chance: float = 1.0) -> int:
        """Reset connections, each with this chance; how many."""
        struck = self._chosen(chance)
        for passage in struck:
            passage.cut()
        self.fired["cut"] += len(struck)
        return len(struck)

    def half_open(self, chance: float = 1.0, *, noticed_after: float | None = None) -> int:
        """From now on nothing passes on the chosen connections, whose ends are told nothing; how many.

        Args:
            noticed_after: Seconds until the server's system finds out, as it does by TCP keepalive. None: never.
        """
        struck = [passage for passage in self._chosen(chance) if not passage.swallowing]
        for passage in struck:
            passage.swallowing = True
            if noticed_after is not None:
                asyncio.get_running_loop().call_later(noticed_after, passage.end_at_server)
        self.fired["half_open"] += len(struck)
        return len(struck)

    def refuse(self, refusing: bool) -> None:
        """Cut connections and take no new ones, until it is taken back."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def _chosen(self, chance: float) -> list["_Passage"]:
        chosen = [passage for passage in self._passages if self._dice.random() < chance]
        return chosen or ([self._dice.choice(list(self._passages))] if self._passages and chance > 0 else [])

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._pass(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            self.fired["refused"] += 1
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        passage = _Passage(self, writer, far_writer, random.Random(self._dice.getrandbits(64)))
        self._passages[passage] = None
        self.fired["opened"] += 1
        try:
            await asyncio.gather(passage.pump(reader, far_writer), passage.pump(far_reader, writer))
        finally:
            passage.cut()
            self._passages.pop(passage, None)


class _Passage:
    """One client's way to the server and back."""

    def __init__(
        self, proxy: FaultProxy, near: asyncio.StreamWriter, far: asyncio.StreamWriter, dice: random.Random
    ) -> None:
        self.swallowing = False
        self._is_left = False  # by an end that did not know that it is half-open
        self._proxy = proxy
        self._writers = (near, far)
        self._dice = dice
        self._passed = 0
        self._is_cut = False
        bounds = proxy.line.cut_bytes
        self._last_byte = None if bounds is None else dice.randint(*bounds)

    def cut(self) -> None:
        """Both ends see a reset, or an end of file where the system chooses so."""
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def end_at_server(self) -> None:
        """Its end sees a reset; the client's hears nothing."""
        _, far = self._writers
        far.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(PIECE):
                if not self.swallowing:
                    await self._delay(len(data))
                if self._is_cut:
                    return
                if self.swallowing:
                    self._proxy.fired["swallowed"] += len(data)
                    continue
                data, ends = self._until_last_byte(data)
                writer.write(data)
                await writer.drain()
                if ends:
                    self._proxy.fired["cut"] += 1
                    self.cut()
                    return
        if not self.swallowing:
            if not self._is_cut:
                self._proxy.fired["ended"] += 1
            self.cut()
        elif not self._is_left:  # the other side is not to hear of the end either
            self._is_left = True
            self._proxy.fired["left"] += 1

    def _until_last_byte(self, data: bytes) -> tuple[bytes, bool]:
        self._passed += len(data)
        if self._last_byte is None or self._passed < self._last_byte:
            return data, False
        surplus = self._passed - self._last_byte
        return data[: len(data) - surplus], True

    async def _delay(self, size: int) -> None:
        line = self._proxy.line
        delay = 0.0
        if line.latency_seconds:
            delay += self._dice.uniform(0, line.latency_seconds)
            self._proxy.fired["delayed"] += 1
        if line.bytes_per_second:
            delay += size / line.bytes_per_second
            self._proxy.fired["narrowed"] += 1
        if line.stall_chance and self._dice.random() < line.stall_chance:
            delay += line.stall_seconds
            self._proxy.fired["stalled"] += 1
        if delay:
            await asyncio.sleep(delay)
