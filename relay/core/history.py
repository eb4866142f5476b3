"""Which messages a chat has, and what the frames and REST answers prove about those it has lost.

The whole set of ids is kept, not a highest one: snapshots bring a `tool` before its `assistant`, and an edit takes a
suffix away, from a user message on, and adds a user message above it.
"""

from collections.abc import Collection, Iterable, Sequence

from relay.core.frames import Message

_READS = 8  # REST reads that a stream can lag behind


class History:
    """The live ids of one chat."""

    __slots__ = (
        "_added",
        "_gone",
        "_read",
        "_removed",
        "known",
    )

    def __init__(self, known: Iterable[int]) -> None:
        self.known = set(known)
        self._added: set[int] = set()  # since `changes` was asked last
        self._removed: set[int] = set()
        self._gone: set[int] = set()  # never come back
        self._read: list[tuple[int, int]] = []  # spans that REST has told whole on this connection: [lowest, highest)

    def __contains__(self, message_id: int) -> bool:
        return message_id in self.known

    def is_gone(self, message: Message) -> bool:
        """It was edited away: whoever still speaks of it is late."""
        if message.id in self._gone:
            return True
        if not self._read or message.id in self.known:
            return False
        return any(lowest <= message.id < highest for lowest, highest in self._read)

    def forget_reads(self) -> None:
        """A new connection shows what there is now."""
        self._read.clear()

    def read(self, page: Sequence[Message], *, complete: bool) -> None:
        """All of the page is known now. What the stream sent before the read and the page lacks is gone, too."""
        ids = [message.id for message in page]
        if ids:
            self._read = [*self._read[1 - _READS :], (0 if complete else min(ids), max(ids))]

    def is_new(self, message: Message) -> bool:
        """Neither known nor gone."""
        return message.id not in self.known and message.id not in self._gone

    @property
    def highest(self) -> int:
        """0 when there is none."""
        return max(self.known, default=0)

    def add(self, message: Message) -> None:
        """The message exists."""
        key = message.id
        self.known.add(key)
        self._added.add(key)
        if self._removed:
            self._removed.discard(key)

    def remove(self, gone: Collection[int]) -> None:
        """These do not exist any more, and never will."""
        lost = self.known.intersection(gone)
        self._removed |= lost - self._added
        self._added -= lost
        self.known -= lost
        self._gone.update(gone)

    def changes(self) -> tuple[frozenset[int], frozenset[int]]:
        """What was added and removed since this was asked last."""
        changes = frozenset(self._added), frozenset(self._removed)
        self._added.clear()
        self._removed.clear()
        return changes

    def above(self, after_id: int) -> set[int]:
        """The known ids that a stream opened with `after_id` has to show."""
        return {key for key in self.known if key > after_id}

    def proved_by(self, messages: Sequence[Message], after_id: int) -> bool:
        """True when a whole snapshot shows by itself all that happened to history.

        An edit is in full view when a user message that is known came back, since what stands before it is untouched
        then; or when everything known lies above the cursor. Where no prompt is new and nothing is missing, there was
        no edit.
        """
        above = self.above(after_id)
        if len(above) == len(self.known):
            return True
        prompts = [message for message in messages if message.role == "user"]
        if any(message.id in self.known for message in prompts):
            return True
        return not prompts and above <= {message.id for message in messages}

    def lost_by(self, page: Sequence[Message], *, complete: bool) -> set[int]:
        """Known ids that a REST page should hold and does not. Those above its highest are newer than the read.

        Args:
            complete: Nothing lies below the page's lowest.
        """
        ids = {message.id for message in page}
        lowest = 0 if complete else min(ids, default=0)
        return {key for key in self.known if lowest <= key < max(ids, default=0)} - ids


def lowest_above(ids: Collection[int], gone: Collection[int]) -> int:
    """The lowest id above all of `gone`; the highest of all where there is none, 0 where there are no ids."""
    return min((key for key in ids if key > max(gone, default=0)), default=max(ids, default=0))
