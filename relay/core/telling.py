"""The events of one follower: their order, their ids, and what was told before.

An id says what a fact is, never who tells it or when: a follower that tells a fact again after a restart gives it the
id that it had. Facts that upstream repeats (a retry, an error, an action) are told once.
"""

from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from relay.core.events import (
    PREVIEW_DETAILS,
    ChatErrorData,
    ChatRef,
    Data,
    ErrorData,
    Event,
    HistoryData,
    JsonObject,
    Origin,
    RetryData,
    SentMessage,
    StatusData,
    TurnData,
    event_id,
    message_event_id,
    to_utc,
    utc,
)
from relay.core.frames import Message, RetrySeen, error_data
from relay.core.history import lowest_above
from relay.core.lifecycle import lifecycle_change
from relay.core.preview import Reset, Told
from relay.core.prompts import PromptQueue
from relay.core.resume import ResumePoint
from relay.core.turn import Turn

HistoryReason = Literal["edit", "reconcile", "restart"]
Outcome = Literal["completed", "interrupted", "failed"]
StreamReason = Literal["dropped_messages", "snapshot_failed", "bad_frame"]


class Telling:
    """Makes the events. `take` hands out those made since it was called last."""

    __slots__ = (
        "_chat_due",
        "_error_connection",
        "_events",
        "_lifecycle_due",
        "_position",
        "_status_told",
        "_told_at",
        "action_calls",
        "archived",
        "at",
        "chat",
        "error_turn",
        "gaps",
        "lifecycle",
        "lifecycle_count",
        "origin",
        "retry_key",
        "session",
        "status",
        "status_counts",
        "status_key",
        "status_previous",
    )

    def __init__(self, chat: ChatRef, session: int, resume: ResumePoint) -> None:
        self.chat = chat
        self.session = session
        self.at = datetime.fromtimestamp(0, UTC)  # of the input that is being worked off
        self._told_at = self.at, utc(self.at)  # what time it was last, and as text
        self.origin = Origin.SNAPSHOT
        self.gaps = 0  # steps taken back since the last `take`: upstream lost or changed live parts
        self._events: list[Event] = []
        self._position = 0
        self.status = resume.status  # last one told
        self.status_previous = resume.status_previous  # the one before it
        self.status_key = resume.status_key
        self.status_counts = dict(resume.status_counts)
        self._status_told = False  # in this session
        self.error_turn = resume.error_turn
        self._error_connection = -1  # the last one whose failure was told
        self.action_calls = resume.action
        self.retry_key = resume.retry
        self.lifecycle = resume.lifecycle
        self.lifecycle_count = resume.lifecycle_count
        self.archived = resume.archived
        self._lifecycle_due = not resume.clean and resume.lifecycle is not None
        self._chat_due: JsonObject | None = None  # after a crash, and unchanged: to be told once it was read

    def take(self) -> list[Event]:
        """In the order in which they must go out."""
        events, self._events = self._events, []
        return events

    # --- messages and history -----------------------------------------------------------------------------------------

    def message(self, message: Message) -> None:
        """A durable message exists."""
        raw, text = message.raw, message.text
        data: Data | SentMessage = {"message": raw, "text": text} if isinstance(raw, dict) else SentMessage(raw, text)
        key = message_event_id(self.chat, message.id)
        self._emit("message", message.role, data, key, to_utc(message.created_at))

    def history(
        self,
        ids: Collection[int],
        gone: Collection[int],
        reason: HistoryReason,
        *,
        after_crash: bool,
        shown: Iterable[Message],
    ) -> None:
        """All of history is `ids` now, those of `shown` among them. After a crash the statement is the session's own,
        whatever it says; else it is known by the message that followed what is gone, and has its time."""
        source: tuple[object, ...] = ("session", self.session)
        time = None
        if not after_crash:
            source = (lowest_above(ids, gone),)
            time = next((to_utc(message.created_at) for message in shown if message.id == source[0]), None)
        data: HistoryData = {"message_ids": sorted(ids), "removed_ids": sorted(gone), "reason": reason}
        self._emit("history", "replaced", data, event_id(self.chat, "history", *source), time)

    def turn(self, turn: Turn, outcome: Outcome, error: ChatErrorData | None) -> None:
        """A turn ended. `error`: of a failed one, where it is known."""
        data: TurnData = {
            "outcome": outcome,
            "message_ids": turn.message_ids,
            "steps": turn.steps,
            "usage": turn.usage,
        }
        if outcome == "failed" and error is not None:
            data["error"] = error
        self._emit("turn", outcome, data, event_id(self.chat, "turn", turn.id), time=to_utc(turn.ended_at))

    # --- state --------------------------------------------------------------------------------------------------------

    def turn_began(self) -> None:
        """Statuses are counted from here on."""
        self.status_counts.clear()

    def new_status(self, status: str, turn: int, error: ChatErrorData | None) -> None:
        """A status; nothing when it is the last one told, but for the first of a session: it has its old id."""
        if status == self.status and self._status_told:
            return
        if status != self.status:
            self.status_previous = self.status
            occurrence = self.status_counts.get(status, 0) + 1
            self.status_counts[status] = occurrence
            self.status_key = (turn, status, occurrence)
        data: StatusData = {"status": status, "previous": self.status_previous}
        if status != "error":
            data["last_error"] = None
        elif error is not None:
            data["last_error"] = error
        self.status, self._status_told = status, True
        self._emit("status", status, data, event_id(self.chat, "status", *self.status_key))

    def queue(self, queue: PromptQueue, entries: Sequence[JsonObject]) -> None:
        """The queue of waiting prompts. `entries`: as upstream sent it."""
        key = event_id(self.chat, "queue", queue.highest, queue.digest)
        self._emit("queue", "updated", {"queued_messages": list(entries)}, key)

    def action(self, calls: Sequence[JsonObject]) -> bool:
        """The chat waits for the client; False when that was told already."""
        key = tuple(sorted(str(call["tool_call_id"]) for call in calls))
        if key == self.action_calls:
            return False
        self.action_calls = key
        self._emit("action", "required", {"tool_calls": list(calls)}, event_id(self.chat, "action", *key))
        return True

    def lifecycle_of(self, chat: JsonObject) -> None:
        """What changed about the chat itself since the last such event, if anything. After a crash what it is, anyway:
        consumers may hold a change that was not saved, and undone since. That waits for `chat_as_it_is`."""
        change = lifecycle_change(chat, self.lifecycle, was_archived=self.archived)
        due, self._lifecycle_due = self._lifecycle_due, False
        if change is None:
            self._chat_due = chat if due else self._chat_due
            return
        self._chat_due = None
        key = event_id(self.chat, "lifecycle", change.event, change.digest, self.lifecycle_count)
        data: Data = {"chat": chat, "changed": change.changed}
        self._emit("lifecycle", change.event, data, key, origin=Origin.RECONCILE)
        self.lifecycle, self.archived = change.fields, change.archived
        self.lifecycle_count += 1

    def chat_as_it_is(self) -> None:
        """History was read: tell of the chat, too, what is due. One that cannot be read would be told with each try."""
        if self._chat_due is None:
            return
        key = event_id(self.chat, "lifecycle", "session", self.session)
        data: Data = {"chat": self._chat_due, "changed": []}
        self._emit("lifecycle", "updated", data, key, origin=Origin.RECONCILE)
        self._chat_due = None
        self.lifecycle_count += 1  # the same change may come again, and was told under the count before

    def gone(self, chat: JsonObject) -> None:
        """Upstream does not have the chat any more. Told once, also where two workers find it at the same time."""
        if self.lifecycle is None and self.lifecycle_count > 0:
            return
        key = event_id(self.chat, "lifecycle", "gone", "", self.lifecycle_count)
        self.lifecycle_count += 1
        self.lifecycle = None  # should it come back after all, that is told as its beginning
        self._emit("lifecycle", "gone", {"chat": chat, "changed": []}, key, origin=Origin.RECONCILE)

    # --- what went wrong ----------------------------------------------------------------------------------------------

    def turn_error(self, error: ChatErrorData, turn: int) -> None:
        """The turn of this user message failed. Told once."""
        if self.error_turn == turn:
            return
        self.error_turn = turn
        data: ErrorData = {**error, "reason": "turn"}
        self._emit("error", "turn", data, event_id(self.chat, "error", turn))

    def stream_error(self, error: ChatErrorData, reason: StreamReason, connection: int) -> None:
        """A connection is of no use. Told once for each."""
        if self._error_connection == connection:
            return
        self._error_connection = connection
        data: ErrorData = {**error, "reason": reason}
        self._emit("error", "stream", data, event_id(self.chat, "stream-error", self.session, connection))

    def retry(self, seen: RetrySeen) -> bool:
        """Upstream will repeat a model call; False when that was told already."""
        key = (seen.retrying_at, seen.attempt)
        if key == self.retry_key:
            return False
        self.retry_key = key
        delay = seen.raw.get("delay_ms")
        data: RetryData = {
            "attempt": seen.attempt,
            "delay_ms": delay if type(delay) is int else 0,
            "error": str(seen.raw.get("error", "")),
            "retrying_at": seen.retrying_at,
        }
        error = error_data(seen.raw)
        for name in ("kind", "provider", "status_code"):
            if name in error:
                data[name] = error[name]
        time = _before(seen.retrying_at, data["delay_ms"])
        self._emit("retry", "scheduled", data, event_id(self.chat, "retry", *key), time=time)
        return True

    # --- live text ----------------------------------------------------------------------------------------------------

    def previews(self, told: Iterable[Told]) -> None:
        """Fragments and resets, in order."""
        for item in told:
            if isinstance(item, Reset):
                self.gaps += item.reason == "gap"
                self._emit("preview", "reset", {"step": item.step, "reason": item.reason}, None)
                continue
            kind = str(item.part.get("type"))
            detail = kind if kind in PREVIEW_DETAILS else "other"
            data: Data = {"step": item.step, "role": item.role, "part": item.part, "offset": item.offset}
            self._emit("preview", detail, data, None)

    def _emit(
        self,
        event: str,
        detail: str,
        data: Data | SentMessage,
        key: str | None,
        time: str | None = None,
        *,
        origin: Origin | None = None,
    ) -> None:
        self._position += 1
        self._events.append(
            Event(
                key or event_id(self.chat, "preview", self.session, self._position),
                "chat",
                event,
                detail,
                self.chat,
                data,
                time or self._now(),
                origin or self.origin,
                self.session,
                self._position,
            )
        )

    def _now(self) -> str:
        if self._told_at[0] is not self.at:
            self._told_at = self.at, utc(self.at)
        return self._told_at[1]


def _before(stamp: str, milliseconds: int) -> str | None:
    """A time stamp less a delay; None where there is no such time, as before Go's zero time."""
    later = to_utc(stamp)
    if later is None:
        return None
    try:
        return utc(datetime.fromisoformat(later) - timedelta(milliseconds=milliseconds))
    except OverflowError:
        return None
