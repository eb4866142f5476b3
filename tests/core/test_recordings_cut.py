"""The recordings once more, with a follower that loses its connection, or its life, at every frame."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from relay.core.events import Event
from relay.core.frames import Frame, MessageSeen, PartSeen, UnknownSeen
from relay.core.resume import ResumePoint
from relay.core.tail import SNAPSHOT_FRAME
from relay.core.transcript import differences
from tests.core.captures import Followed, each_recording, followed
from tests.core.laws import (
    assert_copies_agree,
    assert_copies_of_statuses_agree,
    assert_honest_previews,
    assert_no_event_twice,
    assert_positions_grow,
    facts,
    fold,
    turns,
)
from tests.core.recorded_follower import RecordedFollower, Reshape, clock, stored_and_loaded
from tests.core.recording import Connection

# Cuts per recording and test: most recordings have more frames, and all of them takes an hour.
MOST_PLACES = int(os.environ.get("RELAY_TEST_PLACES", "12"))
MOST_PARTS = 660 * MOST_PLACES  # and live parts in all of them together

Place = tuple[Followed, int, list[Connection], int]


def places(path: Path, begin: int) -> Iterator[Place]:
    """(chat, connections before, the cut one and those behind it, frames before the cut), at every frame.

    Where there are too many, each test begins with another one and skips as it must.
    """
    everywhere: list[Place] = []
    parts = 0
    for one in followed(path):
        connections = list(one.chat.primary())
        for before, connection in enumerate(connections):
            everywhere += [(one, before, connections[before:], at + 1) for at in range(len(connection.frames))]
            parts = max(parts, sum(len(frame.events) for _, frame in connection.frames))
    most = max(1, min(MOST_PLACES, MOST_PARTS // max(1, parts)))
    step = max(1, -(-len(everywhere) // most))
    return iter(everywhere[begin % step :: step])


def goes_on(follower: RecordedFollower, connections: Sequence[Connection], at: int) -> list[Event]:
    """Join before frame `at` of the first connection and live through the rest."""
    told = len(follower.life.events)
    follower.join(connections[0], at)
    for connection in connections[1:]:
        follower.live_through(connection)
    return follower.life.events[told:]


def assert_nothing_is_missing(one: Followed, events: Sequence[Event], *, lives: int) -> None:
    assert differences(fold(events), one.truth) == []
    mine = facts(events)
    lost = {key: fact for key, fact in facts(one.life.events).items() if mine.get(key) != fact}
    assert lost == {}
    assert_copies_agree(events)
    assert one.ended <= turns({event.id: event for event in events if event.event == "turn"}.values()).keys()
    assert {event.session for event in events} <= set(range(1, lives + 1))
    assert_positions_grow(events)
    assert_honest_previews(events)


@each_recording
def test_a_lost_connection_changes_nothing(path: Path) -> None:
    for one, before, rest, at in places(path, 3):
        follower = RecordedFollower(one.chat)
        for connection in list(one.chat.primary())[:before]:
            follower.live_through(connection)
        follower.live_through(rest[0], stop=at)
        goes_on(follower, rest, at)
        assert_nothing_is_missing(one, follower.life.events, lives=1)
        assert_no_event_twice(follower.life.events)


@each_recording
def test_a_clean_restart_changes_nothing(path: Path) -> None:
    for one, before, rest, at in places(path, 6):
        told, point = one.life.marks[before, at - 1]
        second = RecordedFollower(one.chat, session=2, resume=stored_and_loaded(point, clean=True))
        events = goes_on(second, rest, at)
        assert_no_event_twice(events)
        assert_nothing_is_missing(one, [*one.life.events[:told], *events], lives=2)
        assert_copies_of_statuses_agree([*one.life.events[:told], *events])
        again = {event.id for event in one.life.events[:told] if not event.transient} & {e.id for e in events}
        assert Counter(e.event for e in events if e.id in again) <= Counter(status=1), "told again without need"


@each_recording
def test_a_crash_changes_nothing_but_states_the_history_once(path: Path) -> None:
    for one, before, rest, at in places(path, 9):
        told, point = one.life.marks[before, at - 1]
        second = RecordedFollower(one.chat, session=2, resume=stored_and_loaded(point, clean=False))
        events = goes_on(second, rest, at)
        assert_nothing_is_missing(one, [*one.life.events[:told], *events], lives=2)
        assert_no_event_twice(events)
        stated = sum(e.event == "history" and dict(e.data)["reason"] == "restart" for e in events)
        assert stated == second.history_in_view


@each_recording
@pytest.mark.parametrize("unsaved", [1, 7])
def test_what_was_told_and_not_saved_is_told_again_under_the_same_ids(path: Path, unsaved: int) -> None:
    for one, before, rest, at in places(path, unsaved):
        told, _ = one.life.marks[before, at - 1]
        saved = one.life.marks[before, at - 1 - unsaved][1] if at > unsaved else ResumePoint()
        if at <= unsaved and before:
            continue  # the frames before belong to another connection
        second = RecordedFollower(one.chat, session=2, resume=stored_and_loaded(saved, clean=False))
        events = goes_on(second, rest, at)
        assert_nothing_is_missing(one, [*one.life.events[:told], *events], lives=2)
        assert_no_event_twice(events)


# --- frames in another shape ---------------------------------------------------------------------------------------


def fed_twice(frame: Frame, _: bool) -> list[Frame]:
    """The frame, and once more all of it that has an identity."""
    return [frame, replace(frame, events=tuple(seen for seen in frame.events if not isinstance(seen, PartSeen)))]


def with_ties_turned(frame: Frame, is_snapshot: bool) -> list[Frame]:
    """A snapshot in which the messages of one step, equal in `created_at`, stand the other way round."""
    if not is_snapshot:
        return [frame]
    places = [at for at, seen in enumerate(frame.events) if isinstance(seen, MessageSeen)]
    messages = [seen for seen in frame.events if isinstance(seen, MessageSeen)]
    messages.reverse()
    turned = sorted(messages, key=lambda seen: seen.message.created_at)  # stable: only ties change places
    events = list(frame.events)
    for at, seen in zip(places, turned, strict=True):
        events[at] = seen
    return [replace(frame, events=tuple(events))]


def split_before(at: int) -> Reshape:
    """A snapshot so long that its first frame ends before event `at` of the recorded one."""

    def split(frame: Frame, is_snapshot: bool) -> list[Frame]:
        if not is_snapshot or not 0 < at < len(frame.events):
            return [frame]
        padding = tuple(UnknownSeen("padding") for _ in range(SNAPSHOT_FRAME - at))
        return [replace(frame, events=padding + frame.events[:at]), replace(frame, events=frame.events[at:])]

    return split


def followed_reshaped(one: Followed, reshape: Reshape) -> list[Event]:
    follower = RecordedFollower(one.chat, reshape=reshape)
    for connection in one.chat.primary():
        follower.live_through(connection)
    return follower.life.events


def durable(events: Sequence[Event]) -> list[tuple[object, ...]]:
    return [(event.id, event.data) for event in events if not event.transient]


class Gathering(RecordedFollower):
    """One that takes in five frames before it asks what came of them."""

    waiting = 0

    def _feed(self, frame: Frame, moment: float, *, is_snapshot: bool) -> None:
        self.waiting += 1
        if not self.tail.hear(frame, clock(moment)) or self.waiting == 5:
            self._gather(moment)

    def _gather(self, moment: float) -> None:
        self.waiting = 0
        self._take(self.tail.out(), moment)

    def _settled(self, moment: float) -> None:
        self._gather(moment)
        super()._settled(moment)

    def _saved(self) -> ResumePoint:
        return self._point  # there is nothing to commit before the events are out

    def _live(self, connection: Connection, begin: int, stop: int) -> None:
        super()._live(connection, begin, stop)
        self._gather(connection.frames[stop - 1][0])


@each_recording
def test_frames_that_are_heard_together_tell_the_same(path: Path) -> None:
    for one in followed(path):
        together, one_by_one = Gathering(one.chat), RecordedFollower(one.chat)
        for connection in one.chat.primary():
            together.live_through(connection)
            one_by_one.live_through(connection)
        assert together.life.events == one_by_one.life.events
        assert together.life.replays == one_by_one.life.replays
        assert together.life.reconnects == one_by_one.life.reconnects


@each_recording
def test_a_frame_that_comes_twice_changes_nothing(path: Path) -> None:
    for one in followed(path):
        events = followed_reshaped(one, fed_twice)
        assert_nothing_is_missing(one, events, lives=1)
        assert_no_event_twice(events)


@each_recording
def test_the_order_of_equal_times_in_a_snapshot_changes_nothing(path: Path) -> None:
    for one in followed(path):
        assert durable(followed_reshaped(one, with_ties_turned)) == durable(one.life.events)


@each_recording
def test_where_a_snapshot_is_cut_into_frames_changes_nothing(path: Path) -> None:
    for one in followed(path):
        longest = max(len(connection.frames[0][1].events) for connection in one.chat.primary() if connection.frames)
        for at in range(1, longest, max(1, longest // 10)):
            assert durable(followed_reshaped(one, split_before(at))) == durable(one.life.events)
