"""Do together what many tasks ask for at the same time: a transaction costs many times what one of its rows does."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from relay.core.errors import Unavailable

T = TypeVar("T")
R = TypeVar("R")


class _Lead:
    """Told to a task that waits: it is its turn to do the work, its own and that of others."""


@dataclass(slots=True, eq=False)
class _Asked(Generic[T, R]):
    item: T
    turn: "asyncio.Future[R | Unavailable | _Lead]"
    alone: bool = False


class GroupCommit(Generic[T, R]):
    """While one group is on its way, what is asked for meanwhile gathers to the next.

    There is no task of its own: the first who asks does the work of all who wait, then hands over. Who is cancelled
    harms nobody: what it had taken up for others is done by the next, so the work must bear to be done twice.

    Args:
        work: Does all items in one transaction and says what came of each, in order. `Unavailable` is told to each.
            After any other error every item of the group is tried alone: the error reaches only whom it is about.
        key: Two items of one key are never in one group, and are done in the order in which they were asked for.
        size: Of an item; a group is closed before its sizes add up to more than `most`.
    """

    def __init__(
        self,
        work: Callable[[Sequence[T]], Awaitable[Sequence[R]]],
        *,
        key: Callable[[T], Hashable],
        size: Callable[[T], int],
        most: int,
    ) -> None:
        self._work = work
        self._key = key
        self._size = size
        self._most = most
        self._waiting: deque[_Asked[T, R]] = deque()
        self._led = False

    async def do(self, item: T) -> R:
        """Have it done; what came of it.

        Raises:
            Unavailable: Perhaps it was done, perhaps not.
        """
        mine: _Asked[T, R] = _Asked(item, asyncio.get_running_loop().create_future())
        if self._led:
            self._waiting.append(mine)
            answer = await self._turn(mine)
            if isinstance(answer, Unavailable):
                raise Unavailable(str(answer), answer.retry_after_seconds) from answer
            if not isinstance(answer, _Lead):
                return answer
        self._led = True
        try:
            return await self._lead(mine)
        finally:
            self._hand_over()

    async def _turn(self, mine: _Asked[T, R]) -> R | Unavailable | _Lead:
        try:
            return await mine.turn
        except asyncio.CancelledError:
            if mine in self._waiting:
                self._waiting.remove(mine)
            elif not mine.turn.cancelled() and isinstance(mine.turn.result(), _Lead):
                self._hand_over()
            raise

    async def _lead(self, mine: _Asked[T, R]) -> R:
        others = [] if mine.alone else self._gather(mine)
        try:
            answers = await self._work([mine.item, *(each.item for each in others)])
        except Unavailable as exc:
            _tell(others, [exc] * len(others))
            raise
        except asyncio.CancelledError:
            self._put_back(others)
            raise
        except Exception:
            if not others:
                raise
            for each in others:
                each.alone = True
            self._put_back(others)
            return (await self._work([mine.item]))[0]
        _tell(others, answers[1:])
        return answers[0]

    def _gather(self, mine: _Asked[T, R]) -> list[_Asked[T, R]]:
        """Take out of the queue what goes together with this one."""
        room = self._most - self._size(mine.item)
        keys = {self._key(mine.item)}
        taken: list[_Asked[T, R]] = []
        left: deque[_Asked[T, R]] = deque()
        for each in self._waiting:
            key, size = self._key(each.item), self._size(each.item)
            if room >= size and key not in keys and not each.alone:
                taken.append(each)
                room -= size
            else:
                left.append(each)
            keys.add(key)
        self._waiting = left
        return taken

    def _put_back(self, others: list[_Asked[T, R]]) -> None:
        self._waiting.extendleft(each for each in reversed(others) if not each.turn.done())

    def _hand_over(self) -> None:
        while self._waiting:
            heir = self._waiting.popleft()
            if not heir.turn.done():
                heir.turn.set_result(_Lead())
                return
        self._led = False


def _tell(others: Sequence[_Asked[T, R]], answers: Sequence[R | Unavailable]) -> None:
    for each, answer in zip(others, answers, strict=True):
        if not each.turn.done():  # else it was cancelled
            each.turn.set_result(answer)
