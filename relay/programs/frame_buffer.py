"""Frames on their way from the socket to the tail: as many as fit, then the socket is not read."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relay.core.errors import StreamEnded
from relay.programs.pressure import Pressure


class FrameBuffer:
    """Read ahead of a stream, bounded by count and by size, and with those of other streams by size.

    That frames wait here is the sign of a slow broker: whoever takes them gets all at once and can join their
    previews.
    """

    def __init__(self, pressure: Pressure, *, frames: int, characters: int) -> None:
        self._pressure = pressure
        self._limit = frames
        self._characters = characters
        self._waiting: deque[str] = deque()
        self._size = 0
        self._reader: asyncio.Task[None] | None = None
        self._poked = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def poke(self) -> None:
        """Let `take` return at once, even with nothing."""
        self._poked = True
        self._changed.set()

    @property
    def backlog(self) -> int:
        """Frames that wait."""
        return len(self._waiting)

    async def take(self, timeout_seconds: float) -> list[str] | None:
        """All frames that wait, at least one; an empty list after a poke; None when none came in time.

        Raises:
            RelayError: What ended the stream, once every frame before it was taken.
        """
        if not (self._waiting or self._poked or self._ended):
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._changed.wait()
            except TimeoutError:
                return None
        self._changed.clear()
        self._poked = False
        if not self._waiting and self._reader is not None and self._reader.done():
            self._reader.result()
            raise StreamEnded("the stream ended", "network_error")
        frames = list(self._waiting)
        self._empty()
        return frames

    def _empty(self) -> None:
        self._waiting.clear()
        self._pressure.wait(-self._size)
        self._size = 0
        self._room.set()

    @property
    def _ended(self) -> bool:
        return self._reader is not None and self._reader.done()

    async def _fill(self, frames: AsyncIterator[str]) -> None:
        async for frame in frames:
            await self._room.wait()
            self._waiting.append(frame)
            self._size += len(frame)
            self._pressure.wait(len(frame))
            if len(self._waiting) >= self._limit or self._size >= self._characters or not self._pressure.room:
                self._room.clear()
            self._changed.set()

    @asynccontextmanager
    async def filled_from(self, frames: AsyncIterator[str]) -> AsyncIterator[None]:
        """Read the stream while the block runs. What ends the stream is raised by `take`, not here."""
        self._reader = asyncio.create_task(self._fill(frames), name="frames")
        self._reader.add_done_callback(lambda _: self._changed.set())
        try:
            yield
        finally:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._empty()
