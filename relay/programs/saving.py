"""Resume points on their way to the store, beside what is published: one at a time, and of those that wait the newest.

Each save costs worker and database more than publishing what it stands for. So a chat that talks all the time is not
saved each time: a crash within the rest costs some repetition, and nothing else.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from relay.core.errors import LostClaim
from relay.core.resume import Commit
from relay.ports import Clock

_REST_SECONDS = 1.0  # between two saves of one chat, at most
_BEHIND_SECONDS = 2.0  # so long something may be confirmed and unsaved; then the store is waited for


class Saving:
    """What is confirmed of one chat and not yet stored.

    Args:
        store: Returns once the commit is stored, however long that takes.
        failed: Called when it gave up: whoever waits for something else has to hear of it.
    """

    __slots__ = ("_clock", "_failed", "_next", "_rest", "_since", "_store", "_task", "_urgent")

    def __init__(self, store: Callable[[Commit], Awaitable[None]], failed: Callable[[], None], clock: Clock) -> None:
        self._store = store
        self._failed = failed
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._next: Commit | None = None  # all that no save under way has
        self._since: float | None = None  # monotonic: when the oldest was confirmed that is not stored
        self._urgent = False  # somebody waits until all is stored
        self._rest: asyncio.Future[None] | None = None

    @property
    def all_stored(self) -> bool:
        """Nothing is on its way."""
        return self._since is None

    @property
    def failed(self) -> bool:
        """The store gave up: `finish` raises what it said."""
        return self._task is not None and self._task.done()

    async def save(self, commit: Commit) -> None:
        """Have it stored soon. Returns at once, unless the store is far behind.

        Raises:
            LostClaim: Another worker has the chat.
        """
        now = self._clock.monotonic()
        self._add(commit)
        if self._since is None:
            self._since = now
        if now - self._since > _BEHIND_SECONDS:
            await self.finish()
        elif self._task is None:
            self._begin()

    async def finish(self) -> None:
        """Return when all is stored. Who is cancelled meanwhile leaves it on its way.

        Raises:
            LostClaim: Another worker has the chat.
        """
        if self._next is not None and self._task is None:
            self._begin()
        while (task := self._task) is not None:
            self._hurry()
            await asyncio.wait([task])
            task.result()

    async def stop(self, seconds: float) -> None:
        """Let what is on its way come to its end within so many seconds, or end it. `finish` can take it up again."""
        try:
            if (task := self._task) is not None:
                self._hurry()
                await asyncio.wait([task], timeout=seconds)
        finally:
            await self.end()  # also for who is cancelled again

    async def end(self) -> None:
        """Whatever is on its way is not any more."""
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait([task])
            self._task = None
            with suppress(asyncio.CancelledError, LostClaim):
                task.result()

    def _begin(self) -> None:
        self._urgent = False
        self._task = asyncio.create_task(self._save_all(), name="save")

    async def _save_all(self) -> None:
        try:
            while (commit := self._taken()) is not None:
                begun = self._clock.monotonic()
                try:
                    await self._store(commit)
                except BaseException:
                    self._put_back(commit)
                    raise
                self._since = begun if self._next is not None else None
                await self._pause()
        except BaseException:
            self._failed()
            raise
        self._task = None

    def _taken(self) -> Commit | None:
        commit, self._next = self._next, None
        return commit

    def _add(self, later: Commit) -> None:
        self._next = later if self._next is None else self._next.then(later)

    def _put_back(self, earlier: Commit) -> None:
        self._next = earlier if self._next is None else earlier.then(self._next)

    async def _pause(self) -> None:
        if not self._urgent:
            self._rest = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._rest], timeout=_rest_seconds(self._clock.monotonic()))
            self._rest = None

    def _hurry(self) -> None:
        self._urgent = True
        if self._rest is not None and not self._rest.done():
            self._rest.set_result(None)


def _rest_seconds(now: float) -> float:
    """Until the moment that all chats wait for: what is saved at the same time is one transaction."""
    return _REST_SECONDS - now % _REST_SECONDS
