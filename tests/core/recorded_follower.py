"""A follower that lives through recorded streams, connection by connection, without sockets or waiting."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from relay.core.events import ChatRef, Event
from relay.core.frames import Frame, decode_frame
from relay.core.resume import ResumePoint
from relay.core.tail import Batch, ChatTail
from tests.core.recorded_server import RecordedServer
from tests.core.recording import Connection, Json, RecordedChat

SETTLE_SECONDS = 1.5
_START = datetime(2026, 11, 24, tzinfo=UTC)
_OWNER = UUID("07259a4a-6dcb-4fc0-98eb-4ee18df0a1c1")

Reshape = Callable[[Frame, bool], Iterable[Frame]]  # (frame, is it a snapshot) -> the frames to feed instead


@dataclass
class Life:
    """What a follower told and asked for."""

    events: list[Event] = field(default_factory=list)
    reconciles: list[str] = field(default_factory=list)
    reconnects: list[str] = field(default_factory=list)
    # After each frame, by (connections before, frames before in this one): how many events were told, what was saved.
    marks: dict[tuple[int, int], tuple[int, ResumePoint]] = field(default_factory=dict)
    replays: int = 0


class RecordedFollower:
    """Drives a tail through a recorded chat, answering what it wants as the server would have at that moment."""

    def __init__(
        self,
        chat: RecordedChat,
        *,
        session: int = 1,
        resume: ResumePoint | None = None,
        reshape: Reshape | None = None,
    ) -> None:
        self.server = RecordedServer(chat)
        ref = ChatRef("http://coder.test", UUID(chat.chat_id), _OWNER, UUID(chat.chat_id))
        self._point = resume or ResumePoint()  # as saved last
        self.tail = ChatTail(ref, session, self._point)
        self.life = Life()
        self._reshape = reshape
        self._connections = 0
        self.history_in_view = False  # when it joined

    def live_through(self, connection: Connection, *, stop: int | None = None) -> None:
        """From the first frame to the last, or to before frame `stop`."""
        self.tail.connected(connection.after_id)
        self._live(connection, 0, len(connection.frames) if stop is None else stop)
        self._connections += 1
        self.tail.disconnected()

    def join(self, connection: Connection, at: int) -> None:
        """Connect anew before frame `at` of a recorded stream, with the tail's own cursor, and live on."""
        moment = connection.frames[at - 1][0] if at else connection.opened
        self.server.until(moment)
        self.tail.connected(self.tail.after)
        self.history_in_view = self.server.states_history
        snapshot = decode_frame(json.dumps(self.server.snapshot(self.tail.after)))
        self._feed(snapshot, moment, is_snapshot=True)
        self._settle(moment, self._silence_after(connection, at - 1))
        self._live(connection, at, len(connection.frames))
        self.tail.disconnected()

    def _silence_after(self, connection: Connection, at: int) -> float:
        """When the frame after frame `at` came, or the connection ended."""
        return connection.frames[at + 1][0] if at + 1 < len(connection.frames) else connection.closed

    def _live(self, connection: Connection, begin: int, stop: int) -> None:
        for at in range(begin, stop):
            moment, frame = connection.frames[at]
            self._feed(frame, moment, is_snapshot=at == 0)
            self.life.marks[self._connections, at] = (len(self.life.events), self._saved())
            if at + 1 < stop or stop == len(connection.frames):
                self._settle(moment, self._silence_after(connection, at))
        if stop == len(connection.frames) and self.tail.settling:
            # The recording ends where the scenario was over; a follower would have stayed a little longer.
            self._settled(connection.closed + SETTLE_SECONDS)

    def _feed(self, frame: Frame, moment: float, *, is_snapshot: bool) -> None:
        for each in self._reshape(frame, is_snapshot) if self._reshape else (frame,):
            self._take(self.tail.feed(each, clock(moment)), moment)

    def _settle(self, moment: float, until: float) -> None:
        """Let the tail settle while the recording is silent."""
        while self.tail.settling and until - moment > SETTLE_SECONDS:
            moment += SETTLE_SECONDS
            self._settled(moment)

    def _settled(self, moment: float) -> None:
        self._take(self.tail.settled(clock(moment)), moment)

    def _take(self, batch: Batch, moment: float) -> None:
        self._keep(batch)
        while batch.wants is not None:
            self.life.reconciles.append(batch.wants.reason)
            self.server.until(moment)
            page, complete = self.server.page(batch.wants.down_to)
            batch = self.tail.answered(dict(self.server.chat), page, complete=complete, at=clock(moment))
            self._keep(batch)

    def _saved(self) -> ResumePoint:
        self._point = self.tail.commit().onto(self._point.known)
        return self._point

    def _keep(self, batch: Batch) -> None:
        self.life.events += batch.events
        self.life.replays += batch.replays
        self.life.reconnects += [batch.reconnect] if batch.reconnect is not None else []


def clock(moment: float) -> datetime:
    """A recorded time as a wall clock."""
    return _START + timedelta(seconds=min(moment, 1e6))


def stored_and_loaded(point: ResumePoint, *, clean: bool) -> ResumePoint:
    """The point as a store gives it back."""
    stored: Json = json.loads(json.dumps(point.to_json()))
    return ResumePoint.from_json(stored, known=point.known, clean=clean)
