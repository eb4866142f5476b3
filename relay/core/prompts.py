"""The queue of waiting prompts, and the prompts that left it and have not been seen as messages yet."""

from collections.abc import Sequence
from typing import cast

from relay.core.events import JsonObject
from relay.core.frames import Message, content_digest
from relay.core.resume import QueueEntry

_KEEP_LEFT = 20  # the server's limit of a queue: more prompts cannot be on their way


class PromptQueue:
    """A promoted prompt gets a new id when it becomes a message: it is known by its content. Message and queue update
    come in either order, and a promotion may take any entry."""

    __slots__ = (
        "entries",
        "highest",
        "left",
    )

    def __init__(self, entries: Sequence[QueueEntry], highest: int, left: Sequence[str]) -> None:
        self.entries = tuple(entries)
        self.highest = highest  # id ever seen
        self.left = tuple(left)  # digests

    def __bool__(self) -> bool:
        return bool(self.entries)

    def replace(self, entries: Sequence[JsonObject]) -> bool:
        """The queue as upstream has it now; False when it is the same as before."""
        now = tuple(QueueEntry(cast(int, e["id"]), content_digest(e.get("content"))) for e in entries)
        if now == self.entries:
            return False
        stay = {entry.id for entry in now}
        self.left = (*self.left, *(entry.digest for entry in self.entries if entry.id not in stay))[-_KEEP_LEFT:]
        self.entries = now
        self.highest = max([self.highest, *stay])
        return True

    @property
    def digest(self) -> str:
        """Of ids and contents."""
        return content_digest([[entry.id, entry.digest] for entry in self.entries])

    def promoted(self, message: Message) -> bool:
        """Whether a user message is a prompt of the queue, or one that just left it."""
        if not (self.left or self.entries):
            return False  # nearly always: no digest is made for it
        digest = message.digest
        return digest in self.left or any(digest == entry.digest for entry in self.entries)

    def arrived(self, message: Message) -> None:
        """A user message exists: if it left the queue, it is not on its way any more."""
        if self.left and (digest := message.digest) in self.left:
            at = self.left.index(digest)
            self.left = self.left[:at] + self.left[at + 1 :]
