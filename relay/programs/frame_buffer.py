"""Frames on their way from the socket to the tail: as many as fit, then the socket is not read."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relay.core.errors import StreamEnded
from relay.ports import Frames
from relay.programs.pressure import Pressure


class FrameBuffer:
    """Read ahead of a stream, bounded by count and by size, and with those of other streams by size.

    That frames wait here is the sign of a slow broker: whoever takes them gets all at once and can join their
    previews.
    """

    __slots__ = (
        "_changed",
        "_characters",
        "_limit",
        "_poked",
        "_pressure",
        "_reader",
        "_room",
        "_size",
        "_waiting",
    )

    def __init__(self, pressure: Pressure, *, frames: int, characters: int) -> None:
        self._pressure = pressure
        self._limit = frames
        self._characters = characters
        self._waiting: list[str] = []
        self._size = 0
        self._reader: asyncio.Task[None] | None = None
        self._poked = False
        self._changed: asyncio.Future[None] | None = None  # somebody waits for a frame, a poke or the end
        self._room: asyncio.Future[None] | None = None  # the reader waits for room

    def poke(self) -> None:
        """Let `take` return at once, even with nothing."""
        self._poked = True
        self._wake()

    @property
    def backlog(self) -> int:
        """Frames that wait."""
        return len(self._waiting)

    async def take(self, timeout_seconds: float) -> list[str] | None:
        """The frames that wait, at least one, at most this chat's share; an empty list after a poke; None when none
        came in time.

        Raises:
            RelayError: What ended the stream, once every frame before it was taken.
        """
        if not (self._waiting or self._poked or self._ended):
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._change()
            except TimeoutError:
                return None
        self._poked = False
        if not self._waiting and self._reader is not None and self._reader.done():
            self._reader.result()
            raise StreamEnded("the stream ended", "network_error")
        return self._hand_out(self._pressure.share)

    def _hand_out(self, most: int) -> list[str]:
        frames, self._waiting = self._waiting[:most], self._waiting[most:]
        size = sum(map(len, frames))
        self._size -= size
        self._pressure.wait(-size, -1 if frames and not self._waiting else 0)
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        return frames

    async def _change(self) -> None:
        # Futures, not events: an idle chat keeps its buffer for hours, and an event is ten times the size.
        self._changed = asyncio.get_running_loop().create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    @property
    def _full(self) -> bool:
        waits = self._size >= self._characters or not self._pressure.room
        return bool(self._waiting) and (waits or len(self._waiting) >= self._limit)

    @property
    def _ended(self) -> bool:
        return self._reader is not None and self._reader.done()

    async def _fill(self, frames: Frames) -> None:
        async for frame in frames:
            some = [frame, *frames.at_hand()]
            size = sum(map(len, some))
            self._pressure.wait(size, 0 if self._waiting else 1)
            self._waiting += some
            self._size += size
            del frame, some  # not to be held on to while the next ones are waited for
            self._wake()
            while self._full:
                self._room = asyncio.get_running_loop().create_future()
                await self._room
                self._room = None

    @asynccontextmanager
    async def filled_from(self, frames: Frames) -> AsyncIterator[None]:
        """Read the stream while the block runs. What ends the stream is raised by `take`, not here."""
        self._reader = asyncio.create_task(self._fill(frames), name="frames")
        self._reader.add_done_callback(lambda _: self._wake())
        try:
            yield
        finally:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._hand_out(len(self._waiting))
