"""Where a follower goes on after a restart: all that must outlive it, and nothing more."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Self, cast

import msgspec

from relay.core.errors import CorruptState
from relay.core.events import ChatErrorData, JsonObject


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """A waiting prompt: its id in the queue's own sequence and the digest of its content."""

    id: int
    digest: str


class ResumePoint(msgspec.Struct, frozen=True):
    """What was confirmed by the broker, about one chat.

    `known` is the whole set of live message ids, not a highest id: snapshots bring messages out of order, and an
    edit takes some away. Kept apart from the rest when stored, so that a long chat does not rewrite it each time.
    """

    known: frozenset[int] = frozenset()
    after: int = 0  # the stream's `after_id` of the next connection
    revision: int | None = None  # its `after_revision`: history version that is known whole; servers since about 2.38
    turn: int | None = None  # id of the last user message
    open: int | None = None  # the same while its turn has not ended, else None
    idle_seen: bool = False  # an idle status was seen after the open turn's user message
    error: ChatErrorData | None = None  # error of the open turn
    error_turn: int | None = None  # turn whose error was published
    status: str | None = None  # last one published
    status_previous: str | None = None  # the one before it
    status_key: tuple[int, str, int] = (0, "", 0)  # what its id was made from: turn, value, occurrence
    status_counts: Mapping[str, int] = msgspec.field(default_factory=dict)  # per value since `turn`
    queue: tuple[QueueEntry, ...] = ()
    queue_max: int = 0  # highest queue id ever seen
    left: tuple[str, ...] = ()  # digests of prompts that left the queue and have not been seen as messages
    action: tuple[str, ...] = ()  # call ids of the last `chat.action`
    retry: tuple[str, int] | None = None  # (retrying_at, attempt) of the last `chat.retry`
    doubt: str | None = None  # why a REST read was wanted that was not answered
    lifecycle: Mapping[str, str] | None = None  # digest of each field in the last lifecycle event
    lifecycle_count: int = 0  # lifecycle events told: an archived chat may come back and be archived again
    archived: bool = False  # as told by the last lifecycle event
    clean: bool = True  # False when the last follower did not stop with everything confirmed

    def to_json(self) -> JsonObject:
        """All but `known` and `clean`, which a store keeps apart."""
        kept: JsonObject = {name: getattr(self, name) for name in _STORED}  # `asdict` copies all of it, with each save
        kept["queue"] = [{"id": entry.id, "digest": entry.digest} for entry in self.queue]
        return kept

    @classmethod
    def from_json(cls, stored: Mapping[str, object], *, known: frozenset[int], clean: bool) -> Self:
        """The opposite of `to_json`. Fields that an older version did not store have their defaults.

        Raises:
            CorruptState: A stored value has an impossible shape.
        """
        names = set(cls.__struct_fields__)
        values = {name: value for name, value in stored.items() if name in names}
        try:
            for name in ("status_key", "left", "action", "retry"):
                if values.get(name) is not None:
                    values[name] = tuple(cast(list[object], values[name]))
            queue = cast(list[dict[str, str]], values.get("queue", []))
            values["queue"] = tuple(QueueEntry(int(entry["id"]), entry["digest"]) for entry in queue)
            return cls(known=known, clean=clean, **values)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as exc:
            raise CorruptState(f"stored resume point cannot be read: {exc}") from exc


_STORED = tuple(name for name in ResumePoint.__struct_fields__ if name not in ("known", "clean"))


class Commit(msgspec.Struct, frozen=True):
    """A resume point and what changed in its set since the last one: a store writes only the difference, perhaps twice.

    `point.known` is left empty. The set of a long chat takes longer to copy than all else that is done for a message.
    """

    point: ResumePoint
    added: frozenset[int]
    removed: frozenset[int]

    def onto(self, known: Set[int]) -> ResumePoint:
        """The whole resume point, where `known` was stored before."""
        return msgspec.structs.replace(self.point, known=(frozenset(known) - self.removed) | self.added)

    def then(self, later: "Commit") -> "Commit":
        """Both in one."""
        added = (self.added - later.removed) | later.added
        return Commit(later.point, added, (self.removed - later.added) | later.removed)
