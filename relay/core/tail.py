"""Following one chat, without sockets, clocks or tasks: frames and REST answers in, events and a resume point out.

    tail = ChatTail(chat, session, resume)
    tail.connected(after_id)          a stream was opened with this cursor
    tail.feed(frame, at)              -> Batch: publish its events; answer what it wants
    tail.answered(chat, page, at)     -> Batch: the REST read that a batch wanted
    tail.settled(at)                  -> Batch: `tail.settling`, and no frame came for a moment
    tail.disconnected()               the stream ended, however
    tail.commit()                     what to save, once the broker has confirmed all events so far: what is new of it

A tail that is dropped before its commit was saved leaves no trace: the next one tells the same facts again, with the
same ids. Servers up to 2.34 tell edits badly and ends of turns early; where the frames alone cannot decide, a batch
wants a REST read (`Reconcile`) and everything behind the doubtful event waits for its answer.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import cast

import msgspec

from relay.core.episodes import EpisodeText
from relay.core.events import ChatErrorData, ChatRef, Event, JsonObject, Origin
from relay.core.frames import (
    ActionSeen,
    ErrorSeen,
    Frame,
    HistoryResetSeen,
    Message,
    MessageSeen,
    PartSeen,
    PreviewResetSeen,
    QueueSeen,
    RetrySeen,
    Seen,
    StatusSeen,
    UnknownSeen,
    action_of,
    error_data,
    has_episodes,
)
from relay.core.history import History, lowest_above
from relay.core.preview import LiveText
from relay.core.prompts import PromptQueue
from relay.core.resume import Commit, ResumePoint
from relay.core.telling import HistoryReason, Outcome, StreamReason, Telling
from relay.core.turn import Turn

IDLE = frozenset({"waiting", "error", "completed", "paused"})
SNAPSHOT_FRAME = 256  # a snapshot is cut into frames of so many events; the first shorter one ends it


@dataclass(frozen=True, slots=True)
class Reconcile:
    """A wish for a REST read: the chat, and its newest messages down to an id at or below `down_to`."""

    reason: str
    down_to: int


class Batch(msgspec.Struct):
    """What came of one input, in the order in which it must go out."""

    events: list[Event] = msgspec.field(default_factory=list)
    wants: Reconcile | None = None  # answer before the next frame
    reconnect: str | None = None  # the stream is dead although its socket lives
    replays: int = 0  # events that were known already
    gaps: int = 0  # resets because upstream lost or changed live parts
    ended: list[int] = msgspec.field(default_factory=list)  # steps whose message is among the events
    unknown: list[str] = msgspec.field(default_factory=list)  # event types we do not know


class _FrameEnd:
    """Between two frames of a server that tells states, the status before what it is about."""


class ChatTail:
    """One follower's view of one chat, for one session."""

    __slots__ = (
        "_armed",
        "_asked",
        "_asking",
        "_batch",
        "_connection",
        "_doubt",
        "_early",
        "_episodes",
        "_error",
        "_failed",
        "_floor",
        "_history",
        "_history_version",
        "_idle_seen",
        "_listing",
        "_live",
        "_newest_text",
        "_pending",
        "_queue",
        "_queue_due",
        "_snapshot",
        "_statement_due",
        "_streamed",
        "_telling",
        "_turn",
        "_turn_id",
        "_turn_revision",
        "_unproved",
        "_upstream_status",
        "_waited_for",
        "_wanted",
        "session",
    )

    def __init__(self, chat: ChatRef, session: int, resume: ResumePoint) -> None:
        self.session = session
        self._telling = Telling(chat, session, resume)
        self._connection = 0
        self._asked = 0  # the after_id of this connection
        self._snapshot: list[Seen] | None = None  # collected until complete; None once it is
        self._unproved: list[Seen] | None = None  # a whole snapshot that waits for a REST answer
        self._pending: deque[Seen | _FrameEnd] = deque()  # live events that wait for one
        self._episodes: bool | None = None  # whether this connection's server numbers what it sends; None: not yet seen
        self._listing: dict[int, Message] | None = None  # the whole history, while it is being told
        self._waited_for = 0  # the message that the last answer was wanted for
        self._batch = Batch()
        self._wanted: Reconcile | None = None
        self._live: LiveText | EpisodeText = LiveText()
        self._early: list[PartSeen] = []  # parts before `running`

        self._history = History(resume.known)
        self._turn_id = resume.turn
        self._turn: Turn | None = Turn(resume.open) if resume.open is not None else None
        self._streamed = resume.turn  # the last user message that the stream has shown: REST may be ahead of it
        self._idle_seen = resume.idle_seen
        self._error = resume.error
        self._failed = resume.idle_seen and resume.status == "error"
        self._upstream_status: str | None = None  # last one observed on this connection
        self._queue = PromptQueue(resume.queue, resume.queue_max, resume.left)
        self._armed = False  # a live prompt came while the queue was empty: an empty queue_update now means an edit
        # Of the newest assistant message since the last prompt. An idle chat keeps this for hours.
        self._newest_text: str | None = None
        self._asking: Message | None = None  # all of it, where it has calls that want a `tool` message
        self._history_version: int | None = resume.revision
        self._turn_revision = resume.revision
        self._doubt = resume.doubt
        self._floor = resume.after if resume.doubt is not None else None  # of the cursor, while in doubt
        self._statement_due = not resume.clean
        self._queue_due = not resume.clean  # after a crash consumers may hold a queue that was not saved

    # --- what the follower asks ---------------------------------------------------------------------------------------

    @property
    def after(self) -> int:
        """The cursor of the next connection.

        Just before the last user message, whether or not its turn has ended: the replay rebuilds the turn, and that
        the message comes back proves that nothing before it was edited away. While in doubt it stays where it was when
        the doubt arose: prompts that came since must not hide what it was about.
        """
        before_turn = self._turn_id - 1 if self._turn_id is not None else 0
        return before_turn if self._floor is None else min(before_turn, self._floor)

    @property
    def revision(self) -> int | None:
        """History version that goes with `after`: nothing up to it needs to be told again, but for an open turn's."""
        return self._history_version if self._turn is None else self._turn_revision

    @property
    def newest_revision(self) -> int | None:
        """History version that goes with `beyond`."""
        return self._history_version

    @property
    def beyond(self) -> int:
        """The highest id known: the cursor when the history behind `after` is too large to be sent."""
        return self._history.highest

    @property
    def settling(self) -> bool:
        """Silence will tell: an idle status was seen but the turn's last message may still be on its way, or it may be
        the status of the turn before, or a snapshot ended with a full frame."""
        if self._snapshot is not None:
            # The status is the last word on history where messages stand before it.
            return any(isinstance(seen, StatusSeen) for seen in self._snapshot)
        return self._turn is not None and (self._idle_seen or self._perhaps_over) and not self._pending

    @property
    def idle(self) -> bool:
        """Nothing is going on: no open turn, an idle status, no doubt."""
        return self._turn is None and self._upstream_status in IDLE and self._doubt is None and self._snapshot is None

    @property
    def queued(self) -> bool:
        """Prompts wait."""
        return bool(self._queue)

    @property
    def stated(self) -> bool:
        """Consumers know what history is: no statement is owed after a crash."""
        return not self._statement_due

    @property
    def running(self) -> bool:
        """Upstream says that a turn is being worked on."""
        return self._upstream_status is not None and self._upstream_status not in IDLE

    @property
    def dropped_parts(self) -> int:
        """Live parts that belonged to a step already told."""
        return self._live.dropped

    # --- inputs -------------------------------------------------------------------------------------------------------

    def connected(self, after_id: int) -> None:
        """A stream was opened with `after_id`."""
        self._connection += 1
        self._asked = after_id
        self._history.forget_reads()
        self._snapshot = []
        self._episodes = None
        self._telling.origin = Origin.SNAPSHOT
        if self._turn is not None and self._turn.id <= after_id:
            self._streamed = self._turn.id  # it will not be shown again

    def disconnected(self) -> None:
        """The stream ended: what it left half done is void."""
        if self._armed:
            self._doubts("prompt")  # the mark of an edit may have been on its way
        self._snapshot = self._unproved = self._wanted = self._listing = None
        self._pending.clear()
        self._early.clear()
        self._armed = False
        self._upstream_status = None
        self._live.disconnected()

    def feed(self, heard: Frame | Message, at: datetime) -> Batch:
        """One frame, received at `at`."""
        self.hear(heard, at)
        return self.out()

    def hear(self, heard: Frame | Message, at: datetime) -> bool:
        """One of several frames whose events go out together, with `out`. False: hand them out before the next."""
        self._telling.at = at
        if isinstance(heard, Frame):
            self._hear(heard)
        elif self._episodes is False and self._snapshot is None and self._wanted is None:
            # A short way for what nearly all frames of servers up to 2.34 are, which list no history.
            if not self._take_message(heard):
                self._pending.append(MessageSeen(heard))
        else:
            self._hear(Frame((MessageSeen(heard),)))
        return self._wanted is None and self._batch.reconnect is None

    def _hear(self, frame: Frame) -> None:
        events = frame.events
        if (failed := _failure(frame)) is not None:
            self._stream_error(failed, "snapshot_failed")
            return
        if events and not self._episodes:
            self._recognise(events)
        if self._snapshot is None:
            self._pending.extend(_error_first(events) if self._episodes else events)
            if self._episodes and len(events) < SNAPSHOT_FRAME:
                self._pending.append(_FrameEnd())
            self._drain()
            return
        self._snapshot.extend(events)
        complete = 0 < len(events) < SNAPSHOT_FRAME
        if self._episodes:
            # Long histories span frames. With a current `after_revision` there is no reset, only a status that says so.
            complete = any(isinstance(seen, PreviewResetSeen) for seen in events) or (
                complete and any(isinstance(seen, StatusSeen) and seen.revision is not None for seen in events)
            )
        if complete:
            self._complete_snapshot()

    def _recognise(self, events: Sequence[Seen]) -> None:
        """Which kind of server has this connection: two may stand behind one address."""
        before = isinstance(self._live, EpisodeText)
        self._episodes = has_episodes(events, first_of_connection=self._episodes is None)
        if self._episodes != before:
            self._telling.previews(self._live.abandoned())
            self._batch.ended += self._live.ended
            self._live = (EpisodeText if self._episodes else LiveText)(self._live.next_step)

    def _complete_snapshot(self) -> None:
        collected, self._snapshot = self._snapshot or [], None
        if self._episodes:
            # What follows the first reset is live already.
            end = next((at for at, seen in enumerate(collected) if isinstance(seen, PreviewResetSeen)), len(collected))
            self._pending.extend(collected[end:])
            collected = _error_first(collected[:end])
        if self._episodes or (
            self._history.proved_by(_messages(collected), self._asked)
            and not (self._statement_due and self._doubt is not None)
        ):
            self._take_snapshot(collected)
            if self._episodes:
                self._pending.append(_FrameEnd())
        else:
            # After a crash in doubt, too: what is stated then must be all of it.
            self._unproved = collected
            self._want(self._doubt or "reconnect")
        self._drain()

    def answered(
        self,
        chat: JsonObject,
        messages: Sequence[JsonObject],
        *,
        complete: bool,
        at: datetime,
    ) -> Batch:
        """The REST read that `wants` asked for. `messages` newest first; `complete`: there are none below the last."""
        self._telling.at = at
        wanted, self._wanted = self._wanted or Reconcile("unasked", self.after), None
        page = sorted((Message.of(raw) for raw in messages), key=lambda message: message.id)
        in_sight = complete or not self._history.known or any(message.id in self._history for message in page)
        if not in_sight and wanted.down_to:
            # Nothing we know is in sight: an edit of something older than what was read.
            self._want(wanted.reason, down_to=0)
            return self.out()
        self._doubt = self._floor = None
        self._armed = False  # the read is later than the prompt, and knows whether it was an edit
        origin, self._telling.origin = self._telling.origin, Origin.RECONCILE
        missed = self._adopt(page, complete=complete)
        # The last message of a run that is over may be on its way, or (up to 2.34) never be told by the stream.
        over = wanted.reason == "settle" and chat.get("status") in IDLE
        if missed and not over and self._unproved is None and (wanted.reason == "timer" or self._turn is not None):
            self._batch.reconnect = "stale"  # the stream should have told it, or its live parts are behind
        self._telling.origin = origin
        if self._unproved is not None:
            collected, self._unproved = self._unproved, None
            shown = max((message.id for message in _messages(collected)), default=0)
            if any(message.id > shown for message in page):
                # REST is ahead of the snapshot: its live parts are of a step that is stored by now.
                collected = [seen for seen in collected if not isinstance(seen, PartSeen)]
                self._batch.reconnect = "stale"
            self._take_snapshot(collected, decided=True)
        self._telling.origin = Origin.RECONCILE
        self._judge(chat, wanted.reason)
        self._telling.origin = Origin.LIVE
        self._drain()
        return self.out()

    def settled(self, at: datetime) -> Batch:
        """No frame came for the settle time while `settling`: end the snapshot, or read what the turn came to."""
        self._telling.at = at
        if self._snapshot:
            self._complete_snapshot()
        else:
            self._want("settle")
        return self.out()

    def recheck(self, at: datetime, reason: str = "timer") -> Batch:
        """Compare with REST, for no other reason than that time went by, or that the follower lost something."""
        self._telling.at = at
        self._want(reason)
        return self.out()

    def stream_error(self, message: str, reason: StreamReason, at: datetime) -> Batch:
        """The follower could not use the stream: tell it, and doubt what may have been in it."""
        self._telling.at = at
        self._stream_error({"message": message}, reason)
        return self.out()

    def discovered(self, chat: JsonObject, at: datetime) -> Batch:
        """The chat as REST gives it now: tell what changed since the last lifecycle event."""
        self._telling.at = at
        self._telling.lifecycle_of(chat)
        return self.out()

    def gone(self, chat: JsonObject, at: datetime) -> Batch:
        """Upstream says the chat does not exist any more."""
        self._telling.at = at
        self._telling.gone(chat)
        return self.out()

    def commit(self) -> Commit:
        """What came since this was called last. Call only after the broker confirmed every event handed out so far."""
        told = self._telling
        point = ResumePoint(
            after=self.after,
            revision=self.revision,
            turn=self._turn_id,
            open=self._turn.id if self._turn else None,
            idle_seen=self._idle_seen,
            error=self._error,
            error_turn=told.error_turn,
            status=told.status,
            status_previous=told.status_previous,
            status_key=told.status_key,
            status_counts=dict(told.status_counts),
            queue=self._queue.entries,
            queue_max=self._queue.highest,
            left=self._queue.left,
            action=told.action_calls,
            retry=told.retry_key,
            doubt=self._doubt or ("prompt" if self._armed else None),
            lifecycle=told.lifecycle,
            lifecycle_count=told.lifecycle_count,
            archived=told.archived,
            clean=self.stated,
        )
        return Commit(point, *self._history.changes())

    # --- the snapshot -------------------------------------------------------------------------------------------------

    def _take_snapshot(self, events: Iterable[Seen], *, decided: bool = False) -> None:
        """A whole snapshot, put into the order of its meaning: messages by id, status, queue, parts.

        `decided`: a later REST read has said what history is.
        """
        messages: dict[int, Message] = {}
        parts: list[PartSeen] = []
        rest: list[Seen] = []
        queue: list[JsonObject] = []
        whole = not self._episodes  # messages above the cursor are all there is above it
        for seen in events:
            match seen:
                case MessageSeen(message):
                    messages[message.id] = message
                case PartSeen():
                    parts.append(seen)
                case QueueSeen(entries):
                    queue = entries
                case HistoryResetSeen():
                    whole = True
                case _:
                    rest.append(seen)
        if whole and not decided:
            self._rewritten(messages)
        for key in sorted(messages):
            self._take_message(messages[key], history_complete=True)
        if self._statement_due and whole:
            # After a crash: consumers may hold messages that were confirmed, not saved, and edited away since.
            self._statement(self._history.known, set(), "restart")
        self._stated()
        for seen in rest:
            self._take(seen)
        self._take_queue(queue, anyway=self._queue_due)
        self._queue_due = False
        self._take_snapshot_parts(parts)
        if self._upstream_status == "requires_action":
            self._late_action()
        self._telling.origin = Origin.LIVE
        if self._doubt is not None:
            self._want(self._doubt)

    def _rewritten(self, messages: Mapping[int, Message]) -> None:
        """Compare history with a view of all of it, or of all above the cursor: what is not there is gone."""
        above = self._history.known if self._episodes else self._history.above(self._asked)
        missing = above - set(messages)
        if self._episodes:
            # A REST read may have been ahead of the stream.
            missing = {key for key in missing if key < max(messages, default=0)}
        if missing:
            self._remove(missing, (self._history.known - missing) | set(messages), "edit", messages.values())

    def _take_snapshot_parts(self, parts: list[PartSeen]) -> None:
        if isinstance(self._live, EpisodeText):
            for seen in parts:
                self._telling.previews(self._live.part(seen))
            return
        if self._upstream_status in IDLE or self._upstream_status == "pending":
            parts = []  # of a run that is over: the messages tell it better
        stored = self._turn.calls if self._turn else frozenset[str]()
        self._telling.previews(self._live.snapshot(parts, stored_calls=stored, newest_text=self._newest_text))

    # --- live events --------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        pending = self._pending
        while pending and self._wanted is None:
            seen = pending.popleft()
            if isinstance(seen, _FrameEnd):
                self._end_frame()
            elif not self._take(seen):
                pending.appendleft(seen)

    @property
    def _perhaps_over(self) -> bool:
        """From 2.35 on: a turn is open and the status is idle. Where that was told before the prompt, another status is
        on its way, or the turn was over at once and has the same: nothing tells it."""
        shown = self._turn is not None and self._streamed == self._turn.id
        return bool(self._episodes) and shown and self._upstream_status in IDLE

    def _end_frame(self) -> None:
        """From 2.35 on a frame is a whole state, or half of one: a status of before may be followed by its own, and the
        status `error` by the error."""
        if self._turn is None or not self._perhaps_over:
            return
        failed = self._upstream_status == "error"
        over = self._error is not None if failed else self._idle_seen or self._turn.closable
        if over:
            self._failed = self._failed or failed
            self._close_turn()

    def _take(self, seen: Seen) -> bool:
        """Take in one event; False when it must wait for a REST answer and then be taken again."""
        # By exact type, those first that are nearly all: other ways to ask a Struct for its class take several times as
        # long where the answer is no.
        if type(seen) is MessageSeen:
            message = seen.message
            if self._listing is None:
                return self._take_message(message, history_complete=bool(self._episodes))
            self._listing[message.id] = message
            return True
        if self._listing is not None:
            self._listed()
        if type(seen) is PartSeen:
            self._take_part(seen)
            return True
        match seen:
            case StatusSeen(status, revision):
                self._history_version = revision if revision is not None else self._history_version
                self._take_status(status)
            case QueueSeen(entries):
                self._take_queue_update(entries)
            case ErrorSeen(error):
                self._take_error(error)
            case RetrySeen():
                self._take_retry(seen)
            case ActionSeen(calls):
                self._batch.replays += not self._telling.action(calls)
            case HistoryResetSeen():
                self._listing = {}
            case PreviewResetSeen():
                pass  # the numbers of the parts say as much
            case UnknownSeen(kind):
                self._batch.unknown.append(kind)
        return True

    def _listed(self) -> None:
        """The list of the whole history has ended."""
        messages, self._listing = self._listing or {}, None
        self._rewritten(messages)
        for key in sorted(messages):
            self._take_message(messages[key], history_complete=True)

    def _take_message(self, message: Message, *, history_complete: bool = False) -> bool:
        key, history, is_prompt = message.id, self._history, message.role == "user"
        if history.is_gone(message):
            return True
        if is_prompt:
            self._streamed = key
        if key in history.known:
            self._batch.replays += 1
            if self._turn is not None:
                self._turn.add(message)
            self._note_newest(message)
            return True
        if is_prompt:
            promoted = self._queue.promoted(message)
            if self._turn is not None:
                if not (history_complete or (promoted and self._turn.closable)) and self._wait_for(message):
                    return False
                self._close_turn()
            elif self._queue and not history_complete and self._wait_for(message):
                return False
            self._queue.arrived(message)
            self._armed = not self._queue and not history_complete
            self._open_turn(message)
        self._publish_message(message)
        return True

    def _wait_for(self, prompt: Message) -> bool:
        """Want a REST read before `prompt` is taken in; False when that was done already and told nothing of it."""
        if self._waited_for == prompt.id:
            return False
        self._waited_for = prompt.id
        self._want("prompt")
        return True

    def _publish_message(self, message: Message) -> None:
        self._history.add(message)
        if self._turn is not None:
            self._turn.add(message)
        if message.role == "assistant":
            if told := self._live.stored(message):
                self._telling.previews(told)
            self._armed = False
            self._note_newest(message)
        self._telling.message(message)

    def _note_newest(self, message: Message) -> None:
        if message.role == "assistant" and not message.compaction and message.id > (self._turn_id or 0):
            self._newest_text, self._asking = message.text, message if message.calls else None

    def _take_part(self, seen: PartSeen) -> None:
        if isinstance(self._live, EpisodeText):
            self._telling.previews(self._live.part(seen))
            if self._live.broken:
                self._batch.reconnect = "gap"
        elif self._upstream_status in IDLE or self._upstream_status == "pending":
            # A few come just before `running`; those of a run that is over are discarded with it.
            self._early.append(seen)
        else:
            self._telling.previews(self._live.part(seen))

    def _take_status(self, status: str) -> None:
        self._upstream_status = status
        self._telling.new_status(status, self._turn_id or 0, self._error)
        if status not in IDLE:
            self._idle_seen = False
            if status != "pending":
                self._failed, self._error = False, None  # it was of the turn before, told late
                early, self._early = self._early, []
                for seen in early:
                    self._telling.previews(self._live.part(seen))
            return
        self._early.clear()
        if self._turn is None or self._streamed != self._turn.id:
            return  # of a turn that is over
        self._idle_seen = True
        if status == "error":
            self._failed = True
            if self._error is not None:
                self._close_turn()
        elif self._turn.closable:
            self._close_turn()

    def _take_queue_update(self, entries: list[JsonObject]) -> None:
        edit = self._armed and not entries and not self._queue
        self._armed = False
        self._take_queue(entries)
        if edit:
            # The one mark of an edit: the server empties a queue that held nothing.
            self._want("edit")

    def _take_queue(self, entries: Sequence[JsonObject], *, anyway: bool = False) -> None:
        if not self._queue.replace(entries) and not anyway:
            return
        self._telling.queue(self._queue, entries)

    def _take_error(self, error: ChatErrorData) -> None:
        if error["message"] == "dropped messages":
            self._stream_error(error, "dropped_messages")
        else:
            if self._streamed == self._turn_id:
                self._error = error
            self._telling.turn_error(error, self._streamed or 0)

    def _stream_error(self, error: ChatErrorData, reason: StreamReason) -> None:
        self._doubts(reason)
        self._batch.reconnect = reason
        self._telling.stream_error(error, reason, self._connection)

    def _take_retry(self, seen: RetrySeen) -> None:
        if self._telling.retry(seen):
            self._telling.previews(self._live.retry(seen.attempt))
            return
        self._batch.replays += 1
        if isinstance(self._live, EpisodeText):
            self._telling.previews(self._live.retry(seen.attempt, known=True))

    def _late_action(self) -> None:
        """Who joins a waiting chat is not told what it waits for, up to 2.34: the last message's unanswered calls."""
        if self._asking is None:
            return
        wanted = self._asking.calls - (self._turn.answered if self._turn is not None else frozenset[str]())
        calls = [
            action_of(part)
            for part in self._asking.parts
            if isinstance(call := part.tool_call_id, str) and call in wanted
        ]
        if calls:
            self._telling.action(calls)

    # --- REST answers -------------------------------------------------------------------------------------------------

    def _adopt(self, page: Sequence[Message], *, complete: bool) -> bool:
        """Make history what REST says it is, as far down as the page reaches.

        True when it had a message that nobody waited for.
        """
        if gone := self._history.lost_by(page, complete=complete):
            surviving = (self._history.known - gone) | {message.id for message in page}
            successor = lowest_above(surviving, gone)
            edited = any(message.id == successor and message.role == "user" for message in page)
            self._remove(gone, surviving, "edit" if edited else "reconcile", page)
        fresh = {message.id for message in page if self._history.is_new(message)}
        if self._statement_due:
            self._statement(self._history.known | fresh, set(), "restart")
        for message in page:
            if message.id not in fresh:
                if self._turn is not None:
                    self._turn.add(message)
                continue
            if message.role == "user" and message.id > (self._turn_id or 0):
                if self._turn is not None:
                    self._close_turn()
                self._queue.arrived(message)
                self._open_turn(message)
            self._publish_message(message)
            if message.role == "user" and message.id < (self._turn_id or 0):
                self._tell_past_turn(message, page)
        self._history.read(page, complete=complete)
        return bool(fresh - {self._waited_for})

    def _tell_past_turn(self, prompt: Message, page: Sequence[Message]) -> None:
        """A user message that the stream left out and that others followed: its turn is over."""
        following = min((m.id for m in page if m.role == "user" and m.id > prompt.id), default=prompt.id + 1)
        turn = Turn(prompt.id)
        for message in page:
            if message.id < following:
                turn.add(message)
        self._telling.turn(turn, "completed" if turn.closable else "interrupted", None)

    def _judge(self, chat: JsonObject, reason: str) -> None:
        """What the chat's own status and error say about the open turn."""
        status = str(chat.get("status"))
        if status == "requires_action" and self._upstream_status == status:
            self._late_action()  # the event may have been too long to be told
        if self._turn is None:
            return
        if not (self._idle_seen or self._perhaps_over):
            # They may concern the turn before: no idle status was seen after this one's user message. Unless the
            # stream has lost it: a fresh snapshot will tell.
            if reason == "timer" and status in IDLE and self.running:
                self._batch.reconnect = "stale"
            return
        if status not in IDLE:
            self._idle_seen = False  # it runs again
            return
        if reason not in ("settle", "timer"):
            return  # an interrupted turn's last message comes some milliseconds after the status
        if status == "error":
            self._failed = True
            last_error = chat.get("last_error")
            if last_error and self._error is None:
                self._error = error_data(last_error)
                self._telling.turn_error(self._error, self._turn.id)
        self._close_turn()

    def _remove(self, gone: set[int], surviving: set[int], reason: HistoryReason, shown: Collection[Message]) -> None:
        """History lost `gone`; `surviving` is all of it now, ids of those of `shown` included that are told next."""
        self._history.remove(gone)
        if self._turn is not None and self._turn.id in gone:
            # Edited away before it ended: no `chat.turn` for it.
            self._turn = None
            self._error, self._failed = None, False
            self._telling.previews(self._live.superseded())
        self._statement(surviving, gone, "restart" if self._statement_due else reason, shown)

    def _statement(self, ids: set[int], gone: set[int], reason: HistoryReason, shown: Collection[Message] = ()) -> None:
        self._telling.history(ids, gone, reason, after_crash=self._statement_due, shown=shown)
        self._stated()

    def _stated(self) -> None:
        self._statement_due = False
        self._telling.chat_as_it_is()

    # --- turns --------------------------------------------------------------------------------------------------------

    def _open_turn(self, message: Message) -> None:
        self._turn_revision = self._history_version
        self._turn = Turn(message.id)
        self._turn_id = message.id
        self._newest_text, self._asking = None, None
        self._idle_seen = False
        self._error, self._failed = None, False
        self._telling.turn_began()
        if isinstance(self._live, EpisodeText):
            self._live.turn_began()
        self._early.clear()

    def _close_turn(self) -> None:
        turn, self._turn = cast(Turn, self._turn), None
        self._telling.previews(self._live.superseded())
        outcome: Outcome = "interrupted"
        if self._failed:
            outcome = "failed"
        elif turn.closable:
            outcome = "completed"
        self._idle_seen = False
        self._telling.turn(turn, outcome, self._error)

    # --- output -------------------------------------------------------------------------------------------------------

    def _doubts(self, reason: str) -> None:
        self._floor = self.after
        self._doubt = reason

    def _want(self, reason: str, down_to: int | None = None) -> None:
        self._doubts(reason)
        if self._wanted is None:
            self._wanted = Reconcile(reason, self.after if down_to is None else down_to)

    def out(self) -> Batch:
        """What came of all that was put in since the last batch was handed out."""
        batch, self._batch = self._batch, Batch()
        batch.events = self._telling.take()
        batch.gaps, self._telling.gaps = self._telling.gaps, 0
        batch.wants = self._wanted
        batch.ended += self._live.ended
        self._live.ended = []
        return batch


def _messages(events: Iterable[Seen]) -> list[Message]:
    return [seen.message for seen in events if isinstance(seen, MessageSeen)]


def _error_first(events: Sequence[Seen]) -> list[Seen]:
    """From 2.35 on an error stands behind its status. In the order of older servers the status can say why."""
    for at, (one, other) in enumerate(pairwise(events)):
        if isinstance(one, StatusSeen) and one.status == "error" and isinstance(other, ErrorSeen):
            return [*events[:at], other, one, *events[at + 2 :]]
    return list(events)


def _failure(frame: Frame) -> ChatErrorData | None:
    """Why the server cannot tell what a stream begins with. What it could not read looks like what is not there, and
    the rest, without its status, like what another age of servers sends."""
    if frame.refused is not None:
        return frame.refused
    for seen in frame.events:
        if type(seen) is ErrorSeen and seen.error["message"] == "failed to load initial snapshot":
            return seen.error
    return None
