"""Chats that wait to be followed: a few hundred bytes each, not a task."""

from collections.abc import Iterator
from uuid import UUID

from relay.programs.discovery import Sighting


class Sightings:
    """Each chat once: those where something goes on first, each kind in the order in which they came."""

    def __init__(self) -> None:
        self._lively: dict[UUID, Sighting] = {}
        self._at_rest: dict[UUID, Sighting] = {}

    def __len__(self) -> int:
        return len(self._lively) + len(self._at_rest)

    @property
    def lively(self) -> int:
        """How many of them have something going on."""
        return len(self._lively)

    def put(self, sighting: Sighting) -> None:
        """A chat keeps its place when it is seen again; one that stirs moves up."""
        chat_id = sighting.chat.chat_id
        if not sighting.at_rest:
            self._at_rest.pop(chat_id, None)
            self._lively[chat_id] = sighting
        elif chat_id not in self._lively:
            self._at_rest[chat_id] = sighting

    def take(self) -> Sighting:
        """The next one. There must be one."""
        chats = self._lively or self._at_rest
        return chats.pop(next(iter(chats)))


class Deferred:
    """Chats that another worker is to claim: looked at again a moment later, should nobody have done so.

    Args:
        seconds: How long a moment is.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[UUID, tuple[float, Sighting]] = {}  # in the order of time

    def __len__(self) -> int:
        return len(self._due)

    def put(self, sighting: Sighting, now: float) -> None:
        """A chat that is there already keeps its time."""
        self._due.setdefault(sighting.chat.chat_id, (now + self._seconds, sighting))

    def due(self, now: float, most: int) -> Iterator[Sighting]:
        """Take out those whose time has come, at most so many."""
        for _ in range(most):
            first = next(iter(self._due.items()), None)
            if first is None or first[1][0] > now:
                return
            yield self._due.pop(first[0])[1]
