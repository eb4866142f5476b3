"""How fast a process may connect: thousands of chats must not storm a server that just came back."""

import asyncio
import heapq
from itertools import count

from prometheus_client import Histogram

from relay.core.pace import Pace
from relay.ports import Clock

WAITED = Histogram(
    "relay_dial_wait_seconds",
    "From wanting to connect to being allowed to. A rise: more chats at once than RELAY_WORKER__DIALS_PER_SECOND.",
    buckets=(0.01, 0.1, 1, 5, 15, 60, 300),
)


class Dials:
    """So many a second, urgent ones first and otherwise in the order in which they were asked for.

    `run` lets them pass; without it nobody does.
    """

    def __init__(self, clock: Clock, *, per_second: float) -> None:
        self._clock = clock
        self._pace = Pace(per_second)
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []  # a heap
        self._numbers = count()
        self._asked = asyncio.Event()

    async def wait(self, *, urgent: bool = False) -> None:
        """Return when one may connect."""
        since = self._clock.monotonic()
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (not urgent, next(self._numbers), turn))
        self._asked.set()
        await turn
        WAITED.observe(self._clock.monotonic() - since)

    async def run(self) -> None:
        """Let pass who waits, for ever."""
        while True:
            await self._asked.wait()
            await self._clock.sleep(self._pace.wait(self._clock.monotonic()))
            self._let_one_pass()
            if not self._waiting:
                self._asked.clear()

    def _let_one_pass(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():  # else it was cancelled
                self._pace.take(self._clock.monotonic())
                turn.set_result(None)
                return
