"""One turn: a user message and all that answers it."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import cast

import msgspec

from relay.core.events import TokenUsage
from relay.core.frames import Message, Usage

_COUNTS = (
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "reasoning_tokens",
    "cache_creation_tokens",
    "cache_read_tokens",
)
_counts_of = attrgetter(*_COUNTS)


class _Line(msgspec.Struct, frozen=True):
    role: str
    created_at: str
    usage: Usage | None


@dataclass(slots=True)
class Turn:
    """What is known of the turn that the user message `id` began. Messages may be added in any order, and again."""

    id: int
    calls: set[str] = field(default_factory=set)  # ids of all local tool calls in its messages
    answered: set[str] = field(default_factory=set)  # ids of the tool calls whose results are among them
    _lines: dict[int, _Line] = field(default_factory=dict)

    def add(self, message: Message) -> None:
        """Take in a message, unless it is older than the turn or a trace of compaction, which belongs to no turn."""
        if message.id < self.id or message.compaction:
            return
        self._lines[message.id] = _Line(message.role, message.created_at, message.usage)
        if message.calls:
            self.calls |= message.calls
        if message.results:
            self.answered |= message.results

    @property
    def message_ids(self) -> list[int]:
        """Ascending, the user message first."""
        return sorted({self.id, *self._lines})

    @property
    def steps(self) -> int:
        """Assistant messages."""
        return [line.role for line in self._lines.values()].count("assistant")

    @property
    def usage(self) -> TokenUsage:
        """Sums over its steps; a kind that no step reported is absent."""
        usages = [line.usage for line in self._lines.values() if line.usage is not None]
        sums: dict[str, int] = {}
        for kind, counts in zip(_COUNTS, zip(*map(_counts_of, usages), strict=True), strict=False):
            if counts.count(None) < len(counts):
                sums[kind] = sum(filter(None, counts))
        return cast(TokenUsage, sums)

    @property
    def ended_at(self) -> str:
        """`created_at` of its last message; empty when none was seen."""
        return self._lines[max(self._lines)].created_at if self._lines else ""

    @property
    def closable(self) -> bool:
        """True when the messages alone say that it was completed: the last one is an assistant's that was charged,
        and no call waits for its result."""
        if not self._lines:
            return False
        last = self._lines[max(self._lines)]
        return last.role == "assistant" and last.usage is not None and self.calls <= self.answered
