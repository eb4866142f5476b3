"""A gate that many may pass together, or one alone."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Gate:
    """Who wants to be alone waits for those inside; whoever comes meanwhile waits for it."""

    def __init__(self) -> None:
        self._inside = 0
        self._alone = False
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """With all others but one that is alone."""
        await self._until(lambda: not self._alone)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._changed.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """With nobody else."""
        await self._until(lambda: not self._alone)
        self._alone = True
        try:
            await self._until(lambda: self._inside == 0)
            yield
        finally:
            self._alone = False
            self._changed.set()

    async def _until(self, fact: Callable[[], bool]) -> None:
        while not fact():
            self._changed.clear()
            await self._changed.wait()
