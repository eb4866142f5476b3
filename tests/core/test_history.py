"""The set of live messages by itself: what a read proves, and what is still to be saved."""

from hypothesis import given
from hypothesis import strategies as st

from relay.core.frames import Message
from relay.core.history import History
from relay.core.resume import Commit, ResumePoint
from tests.core.frames import assistant


def message(key: int) -> Message:
    return Message.of(assistant(key, "text"))


def test_a_read_that_is_older_than_the_stream_proves_nothing_about_what_is_newer() -> None:
    history = History({1, 2, 9})
    assert history.lost_by([message(1), message(5)], complete=True) == {2}
    assert history.lost_by([], complete=True) == set()


def test_a_read_says_nothing_of_what_lies_below_it_unless_it_is_whole() -> None:
    history = History({1, 3, 5})
    page = [message(4), message(6)]
    assert history.lost_by(page, complete=False) == {5}
    assert history.lost_by(page, complete=True) == {1, 3, 5}


def test_a_cursor_leaves_out_the_message_it_names() -> None:
    assert History({1, 2, 3}).above(2) == {3}


@given(
    st.sets(st.integers(1, 6)),
    st.lists(st.tuples(st.sampled_from("add remove commit save fail".split()), st.integers(1, 6))),
)
def test_however_changes_are_cut_joined_and_saved_twice_the_store_comes_to_the_same_set(
    stored: set[int], steps: list[tuple[str, int]]
) -> None:
    history, waiting = History(stored), Commit(ResumePoint(), frozenset(), frozenset())
    for what, key in steps:
        if what == "add" and history.is_new(message(key)):
            history.add(message(key))
        elif what == "remove" and key in history:
            history.remove({key})
        elif what == "commit":
            waiting = waiting.then(Commit(ResumePoint(), *history.changes()))
        elif what in ("save", "fail"):
            stored = set(waiting.onto(stored).known)
            if what == "save":  # else nobody knows that it was stored
                waiting = Commit(ResumePoint(), frozenset(), frozenset())
    rest = waiting.then(Commit(ResumePoint(), *history.changes()))
    assert rest.onto(stored).known == history.known
