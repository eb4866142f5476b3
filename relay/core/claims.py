"""Who of several workers follows a chat: fair shares by weight, decided by each for itself from the same figures.

The figures are some seconds old and differ a little from worker to worker, so that nothing may hang on them: the claim
in the store decides who follows. A wrong guess costs a second or a query.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil, exp
from uuid import UUID

_MEMORY_SECONDS = 30.0  # how long a burst counts
_NOTHING = 0.5  # events a second: less weighs nothing more than the chat itself
_SLACK = 0.2  # of a fair share: so much more is no reason to move chats
_LEAST_SLACK = 2.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A live worker, as it told of itself with its last renewal."""

    worker: str
    accounts: frozenset[UUID] | None  # whose chats it can read; None: everybody's
    load: float  # sum of the weights of its chats
    free: int  # chats that it could follow besides

    def reads(self, owner_id: UUID) -> bool:
        """Whether it can follow that user's chats."""
        return self.accounts is None or owner_id in self.accounts


class Activity:
    """How busy one chat is. An idle one weighs as much as an event a second: its socket costs something too."""

    __slots__ = ("_at", "_rate")

    def __init__(self, now: float) -> None:
        self._rate = 0.0
        self._at = now

    def add(self, events: int, now: float) -> None:
        """So many events were published. `now`: seconds of a monotonic clock."""
        self._rate = self._decayed(now) + events / _MEMORY_SECONDS
        self._at = now

    def weight(self, now: float) -> float:
        """Events a second, of late; at least 1."""
        if self._rate == 0.0:
            return 1.0  # as of most, and all are asked again and again
        rate = self._decayed(now)
        if rate < _NOTHING:
            self._rate = 0.0
        return max(1.0, rate)

    def _decayed(self, now: float) -> float:
        return self._rate * exp(-max(0.0, now - self._at) / _MEMORY_SECONDS)


def share(peers: Sequence[Peer]) -> float:
    """The load that each of the workers would have if all had the same; 0 of none."""
    return sum(peer.load for peer in peers) / len(peers) if peers else 0.0


def chosen(chat_id: UUID, peers: Sequence[Peer]) -> str | None:
    """The worker that is to claim a chat that all of them see; None when none has room.

    Each comes to the same one without asking, whatever the order, and chats spread evenly over all that are not above
    their share. When a worker comes or goes, only chats that it gets or had change hands.
    """
    most = share(peers) + _slack(share(peers))
    able = [peer.worker for peer in peers if peer.free > 0 and peer.load <= most]
    able = able or [peer.worker for peer in peers if peer.free > 0]
    return max(able, key=lambda worker: (_lot(chat_id, worker), worker), default=None)


def to_adopt(me: str, peers: Sequence[Peer], orphans: int) -> int:
    """How many of the chats that lost their follower a worker takes, so that each gets its share of them.

    All workers together take at least all, and the one with the least to do at least one, as far as they have room.
    """
    able = [peer for peer in peers if peer.free > 0]
    mine = next((peer for peer in able if peer.worker == me), None)
    if mine is None:
        return 0
    # Filled up like vessels: who is above the level that all come to gets nothing.
    level = _level([peer.load for peer in able], orphans)
    return max(0, min(ceil(level - mine.load), mine.free, orphans))


def to_give_up(me: str, weights: Mapping[UUID, float], peers: Sequence[Peer]) -> list[UUID]:
    """The chats that a worker with too much to do lets others take: those with the least going on.

    Never more than brings it down to its share or than others have room for below theirs, and nothing while it is
    only a little above: so no chat goes to and fro.

    Args:
        weights: Of all chats that it follows.
    """
    load = sum(weights.values())
    others = [peer for peer in peers if peer.worker != me]
    fair = (load + sum(peer.load for peer in others)) / (len(others) + 1)
    if load - fair <= _slack(fair):
        return []
    takers = [peer for peer in others if peer.free > 0 and peer.load < fair]
    left = min(load - fair, sum(fair - peer.load for peer in takers))
    given: list[UUID] = []
    for chat_id, weight in sorted(weights.items(), key=lambda item: (item[1], item[0])):
        if weight > left or len(given) == sum(peer.free for peer in takers):
            break
        given.append(chat_id)
        left -= weight
    return given


def _slack(fair: float) -> float:
    return max(_LEAST_SLACK, fair * _SLACK)


def _level(loads: Sequence[float], more: float) -> float:
    """Up to where `more` fills vessels that hold `loads`."""
    level, filled = 0.0, 0.0
    for number, load in enumerate(sorted(loads), start=1):
        if number > 1 and level <= load:
            break
        filled += load
        level = (filled + more) / number
    return level


def _lot(chat_id: UUID, worker: str) -> bytes:
    return blake2b(chat_id.bytes + worker.encode(), digest_size=8).digest()
