"""A worker's lease as the worker itself knows it, and the way out that ends with it."""

from collections.abc import Callable, Sequence
from uuid import UUID

from relay.core.claims import Activity
from relay.core.errors import LostClaim
from relay.core.events import ChatRef, Event
from relay.ports import Clock, Outlet


class Lease:
    """Whether a worker may still speak, by its own clock.

    It counts from before the store was asked, so that it is over here before it is over there, however long the answer
    took. A process that was frozen and wakes up finds it over without asking anybody.
    """

    def __init__(self, worker: str, clock: Clock, *, seconds: float, asked: float) -> None:
        self.worker = worker
        self._clock = clock
        self._seconds = seconds
        self._until = asked + seconds

    @property
    def left(self) -> float:
        """Seconds; 0: it is over, and stays so."""
        left = self._until - self._clock.monotonic()
        if left <= 0:
            self._until = float("-inf")
        return max(0.0, left)

    @property
    def over(self) -> bool:
        return self.left == 0

    def renewed(self, asked: float) -> bool:
        """The store said yes to what was asked at this time. False: the answer came too late."""
        if not self.over:
            self._until = asked + self._seconds
        return not self.over

    def end(self) -> None:
        """The store said that it is over."""
        self._until = float("-inf")


class LeasedOutlet:
    """`Outlet` of one follower: nothing passes once the lease is over, and what passes is counted."""

    def __init__(self, outlet: Outlet, lease: Lease, activity: Activity, now: Callable[[], float]) -> None:
        self._outlet = outlet
        self._lease = lease
        self._activity = activity
        self._now = now

    async def publish(self, events: Sequence[Event]) -> None:
        self._check(events[0].chat.chat_id if events else None)
        await self._outlet.publish(events)
        self._activity.add(len(events), self._now())

    async def park_frame(self, chat: ChatRef, raw: bytes, reason: str) -> None:
        self._check(chat.chat_id)
        await self._outlet.park_frame(chat, raw, reason)

    def _check(self, chat_id: UUID | None) -> None:
        if self._lease.over:
            raise LostClaim(f"chat {chat_id}: the lease of worker {self._lease.worker} is over")
