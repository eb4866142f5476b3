"""A consumer's fold of history: any order, any copies, the same transcript."""

import random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.events import Event, Origin
from relay.core.transcript import Transcript, differences
from tests.core.frames import REF, Json, user


def event(kind: str, detail: str, data: Any, order: tuple[int, int], family: str = "chat") -> Event:
    return Event(str(UUID(int=1)), family, kind, detail, REF, data, "2026-01-01T00:00:00Z", Origin.LIVE, *order)


def told(id_: int, order: tuple[int, int] = (1, 1), text: str = "hi") -> Event:
    return event("message", "user", {"message": user(id_, text), "text": text}, order)


def history(ids: list[int], order: tuple[int, int], removed: list[int] | None = None) -> Event:
    return event("history", "replaced", {"message_ids": ids, "removed_ids": removed or [], "reason": "edit"}, order)


def fold(*events: Event) -> list[int]:
    transcript = Transcript()
    for one in events:
        transcript.apply(one)
    return list(transcript.messages)


def test_messages_stand_by_id() -> None:
    assert fold(told(5), told(3), told(9)) == [3, 5, 9]


def test_a_statement_drops_what_it_leaves_out_up_to_its_highest() -> None:
    assert fold(told(1), told(2), told(3), told(9), history([1, 3], (1, 5))) == [1, 3, 9]


def test_removed_ids_only_inform() -> None:
    assert fold(told(1), told(2), history([1, 2], (1, 5), removed=[2])) == [1, 2]


def test_a_message_of_a_statement_may_follow_it() -> None:
    assert fold(history([1, 3], (1, 5)), told(1), told(2), told(3)) == [1, 3]


def test_a_late_copy_of_what_was_dropped_stays_dropped() -> None:
    assert fold(told(1), told(2), history([1, 3], (1, 5)), told(3), told(2, (2, 1))) == [1, 3]


def test_the_later_statement_wins_whichever_comes_first() -> None:
    old, new = history([1, 2, 3], (1, 9)), history([1, 4], (2, 1))
    assert fold(told(1), told(2), told(3), told(4), old, new) == [1, 4]
    assert fold(told(1), told(2), told(3), told(4), new, old) == [1, 4]


def test_a_statement_of_nothing_drops_nothing() -> None:
    assert fold(told(1), history([], (1, 2))) == [1]


def test_other_events_say_nothing_about_history() -> None:
    status: Json = {"status": "waiting", "previous": None}
    assert fold(event("status", "waiting", status, (1, 1)), event("message", "user", {}, (1, 2), family="usage")) == []


def test_a_message_is_kept_as_upstream_sent_it() -> None:
    transcript = Transcript()
    transcript.apply(told(1))
    assert transcript.messages == {1: user(1, "hi")}


@st.composite
def stories(draw: st.DrawFn) -> list[Event]:
    """A chat that grows and is edited: every edit takes a suffix away and adds a higher id."""
    events: list[Event] = []
    live: list[int] = []
    position = top = 0
    for _ in range(draw(st.integers(1, 12))):
        top += draw(st.integers(1, 3))
        edited = draw(st.integers(0, 2 * len(live)))  # from here on; beyond the end: none is
        if edited < len(live):
            live = live[:edited]
            position += 1
            events.append(history([*live, top], (1, position)))
        live.append(top)
        position += 1
        events.append(told(top, (1, position)))
    events.append(history(live, (2, 1)))
    return events


@given(stories(), st.randoms(use_true_random=False), st.data())
def test_order_and_copies_do_not_matter(events: list[Event], chance: random.Random, data: st.DataObject) -> None:
    expected = dict(enumerate(fold(*events)))
    mixed = [*events, *data.draw(st.lists(st.sampled_from(events), max_size=6))]
    chance.shuffle(mixed)
    assert dict(enumerate(fold(*mixed))) == expected
    live = [one for one in events if one.event == "history"][-1]
    assert list(expected.values()) == dict(live.data)["message_ids"]


@pytest.mark.parametrize(
    ("folded", "truth", "lines"),
    [
        ({}, {}, []),
        ({1: {"a": 1}}, {1: {"a": 1}}, []),
        ({}, {2: {}, 1: {}}, ["message 1 is missing", "message 2 is missing"]),
        ({3: {}}, {}, ["message 3 is not in Coder"]),
        ({1: {"a": 1, "b": 2}}, {1: {"a": 1, "b": 3, "c": 4}}, ["message 1 differs in b, c"]),
        ({1: {"secret": "text"}}, {1: {}}, ["message 1 differs in secret"]),
    ],
)
def test_differences_name_what_differs_and_no_text(folded: Json, truth: Json, lines: list[str]) -> None:
    assert differences(folded, truth) == lines  # type: ignore[arg-type]
