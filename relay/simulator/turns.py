"""What requests ask of the part of the server that runs turns, how it refuses, and what both of its kinds share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from relay.simulator.state import Chat, Message, Part, QueuedMessage
from relay.simulator.stream import NO_SKEW, Skew

MAX_ATTEMPTS = 25
POLL_MS = 1000.0


class QueueFull(Exception):
    """The chat's queue holds as many prompts as it may."""


class UnknownMessage(Exception):
    """No such message in this chat, or edited away."""


class NotAUserMessage(Exception):
    """Only user messages can be edited."""


class UnknownQueuedMessage(Exception):
    """No such prompt in this chat's queue."""


class NotAllowed(Exception):
    """The chat's state does not allow what was asked; nothing was changed.

    `state` is the server's own name of the state, e.g. `W` (waiting), `R0` (running, nothing queued), `XW` (archived).
    """

    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state


class NotInterruptible(NotAllowed):
    """Nothing runs that could be interrupted."""


class ChatActive(NotAllowed):
    """A chat at work cannot be archived."""


class NothingQueued(NotAllowed):
    """There is no queued prompt to delete or promote."""


class NotARoot(Exception):
    """A sub-agent's chat is archived and unarchived with its root only."""


class ParentArchived(Exception):
    """A sub-agent's chat cannot be unarchived while its parent is archived."""


class NoResultsAwaited(Exception):
    """The chat does not wait for results of client tools."""


class ResultMissing(Exception):
    """A call has no result; `call_id` names it."""

    def __init__(self, call_id: str) -> None:
        super().__init__(call_id)
        self.call_id = call_id


class ModelFailed(Exception):
    """The model's provider answered with an error."""


@dataclass(frozen=True)
class ToolOutput:
    """A client's result for one of its tools; `output` is decoded JSON."""

    call_id: str
    output: Any
    is_error: bool = False


class Turns(Protocol):
    """What requests ask of the part of the server that runs turns. Each call is one transaction."""

    def create_chat(
        self,
        owner: UUID,
        title: str,
        content: tuple[Part, ...],
        model_id: UUID,
        parent: Chat | None = None,
        *,
        dynamic_tools: tuple[str, ...] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Chat: ...

    def send(
        self,
        chat: Chat,
        caller: UUID,
        content: tuple[Part, ...],
        model_id: UUID | None,
        *,
        interrupting: bool = False,
    ) -> Message | QueuedMessage:
        """
        Raises:
            QueueFull: Twenty prompts wait already.
        """

    def edit(self, chat: Chat, caller: UUID, message_id: int, content: tuple[Part, ...]) -> Message:
        """
        Raises:
            UnknownMessage, NotAUserMessage: Nothing was changed.
        """

    def interrupt(self, chat: Chat) -> None:
        """
        Raises:
            NotInterruptible: Nothing runs, where the server minds.
        """

    def delete_queued(self, chat: Chat, queue_id: int) -> None:
        """
        Raises:
            NothingQueued: The queue is empty, where the server minds.
        """

    def promote(self, chat: Chat, caller: UUID, queue_id: int) -> Message | None:
        """Answer with the prompt to come; None where it only moves to the head of the queue.

        Raises:
            UnknownQueuedMessage, NothingQueued: Nothing was changed.
        """

    def set_archived(self, chat: Chat, archived: bool) -> None:
        """
        Raises:
            ChatActive, NotARoot, ParentArchived: Nothing was changed.
        """

    def set_title(self, chat: Chat, title: str) -> None: ...

    def submit_results(self, chat: Chat, caller: UUID, results: Sequence[ToolOutput]) -> None:
        """
        Raises:
            NoResultsAwaited, ResultMissing: Nothing was changed.
        """


@dataclass(frozen=True)
class Pace:
    """`speed` divides every model time; the poll for pending chats is a model time too."""

    speed: float = 1.0
    poll_ms: float = POLL_MS
    titles: bool = True
    title_ms: float = 10.0
    recovery_ms: float = 303_000.0
    skew: Skew = NO_SKEW


def state_name(chat: Chat) -> str:
    """The server's name of a chat's state: `W`, `R0` (running, nothing queued), `A1`, `XW` (archived) …"""
    letter = {"waiting": "W", "error": "E", "requires_action": "A", "interrupting": "I"}.get(chat.status, "R")
    queued = "" if letter == "W" else "1" if chat.queue else "0"
    return ("X" if chat.archived else "") + letter + queued


def text_of(content: Iterable[Part]) -> str:
    """All text of a prompt."""
    return " ".join(part.text for part in content if part.type == "text")


def automatic_title(texts: Iterable[str]) -> str:
    """The first six words, `…` when there were more, cut to 80 code points."""
    words = " ".join(texts).split()
    if not words:
        return "New Chat"
    title = " ".join(words[:6])
    if len(title) > 80:
        return title[:80]
    return title + ("…" if len(words) > 6 else "")
