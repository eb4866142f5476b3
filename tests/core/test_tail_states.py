"""Servers that tell a state instead of a sequence of facts (2.35 and later): history, turns, actions, resume."""

import pytest

from relay.core.errors import BadFrame
from relay.core.events import Origin
from relay.core.resume import ResumePoint
from tests.core.frames import (
    HISTORY_RESET,
    PREVIEW_RESET,
    Json,
    Tail,
    action,
    assistant,
    call,
    error,
    event,
    interrupted,
    msg,
    queue,
    queued,
    status,
    told,
    tool,
    user,
    words,
)
from tests.core.laws import assert_no_event_twice, data_of, fold


def listed(*messages: Json) -> list[Json]:
    """The whole history, told anew."""
    return [HISTORY_RESET, *(msg(raw) for raw in messages)]


def idle_chat() -> Tail:
    """One turn of two messages, over."""
    tail = Tail()
    tail.connect(msg(user(1)), msg(assistant(2, "a")), status("waiting"), PREVIEW_RESET)
    return tail


def edited_chat() -> Tail:
    """The prompt was replaced, and answered again."""
    tail = idle_chat()
    tail.feed(listed(user(3, "better")), status("running"), PREVIEW_RESET)
    tail.feed(msg(assistant(4, "b")), PREVIEW_RESET)
    tail.feed(status("waiting"))
    return tail


# --- what a connection begins with ------------------------------------------------------------------------------------


def test_a_snapshot_ends_with_the_first_preview_reset() -> None:
    tail = Tail()
    assert tail.connect(msg(user(1)), msg(assistant(2, "a"))) == []
    assert tail.feed(msg(user(3))) == []
    events = tail.feed(status("running"), PREVIEW_RESET, words((7, 1), 1, "b"))
    assert told(events) == ["message 1", "message 2", "completed 1 2", "message 3", "status running", "text 0+0 b"]
    assert [one.origin for one in events] == [Origin.SNAPSHOT] * 5 + [Origin.LIVE]


def test_nothing_is_wanted_of_rest() -> None:
    tail = idle_chat()
    tail.reconnect(msg(user(1)), msg(assistant(2, "a")), msg(user(3)), msg(assistant(4, "b")), status("waiting"))
    assert tail.wants is None
    tail.feed(PREVIEW_RESET)
    assert told(tail.batch.events) == ["message 3", "message 4", "completed 3 4"]
    assert tail.wants is None


def test_silence_in_the_middle_of_a_long_history_does_not_end_it() -> None:
    tail = idle_chat()
    tail.reconnect(HISTORY_RESET, msg(user(1)))
    assert not tail.is_settling()
    tail.feed(msg(assistant(2, "a")), status("waiting"), PREVIEW_RESET)
    assert told(tail.all, "history") == []


def test_a_status_that_knows_its_history_ends_a_snapshot_without_a_reset() -> None:
    """With a current `after_revision` there is no `preview_reset`."""
    tail = Tail()
    events = tail.connect(status("waiting", 18))
    assert told(events) == ["status waiting"]
    assert tail.is_idle()


def test_a_turn_that_was_over_before_the_stream_looked_again_is_closed() -> None:
    """The status went from idle to idle: there is no event of it."""
    tail = idle_chat()
    events = tail.feed(msg(user(3)), msg(assistant(4, "b")), PREVIEW_RESET)
    assert told(events) == ["message 3", "message 4", "completed 3 4"]


def test_a_turn_that_was_over_at_once_is_closed_by_its_last_message_alone() -> None:
    tail = idle_chat()
    assert told(tail.feed(msg(user(3)), PREVIEW_RESET)) == ["message 3"]
    assert told(tail.feed(msg(assistant(4, "b")))) == ["message 4", "completed 3 4"]


# --- edits ------------------------------------------------------------------------------------------------------------


def test_a_history_reset_tells_an_edit_exactly() -> None:
    tail = idle_chat()
    events = tail.feed(listed(user(3, "better")), status("running"), PREVIEW_RESET)
    assert told(events) == ["history 3 (edit)", "message 3", "status running"]
    assert data_of(events[0])["removed_ids"] == [1, 2]


def test_a_list_may_span_frames_and_ends_at_the_first_other_event() -> None:
    tail = idle_chat()
    assert tail.feed(HISTORY_RESET, msg(user(1))) == []
    assert tail.feed(msg(assistant(2, "a"))) == []
    assert told(tail.feed(msg(user(9)), status("running"), PREVIEW_RESET)) == ["message 9", "status running"]


@pytest.mark.parametrize("live", [True, False])
def test_a_history_that_fills_more_than_one_frame_is_one_history(live: bool) -> None:
    """A frame holds 256 events; the status of an idle chat stands behind the last message."""
    turns = [raw for key in range(1, 271, 2) for raw in (user(key), assistant(key + 1, "a"))]
    tail = Tail()
    if live:
        tail.connect(*(msg(raw) for raw in turns), status("waiting"), PREVIEW_RESET)
    edited = [*turns[:268], user(300, "better")]
    events = [*listed(*edited), status("running"), PREVIEW_RESET]
    first = tail.feed(events[:256]) if live else tail.connect(*events[:256])
    assert told(first, "history", "turn") == []
    second = tail.feed(events[256:])
    assert set(fold(tail.all)) == {raw["id"] for raw in edited}
    assert len(told(second, "history")) == live
    assert told(tail.all, "status")[-1] == "status running"


def test_a_list_that_was_cut_off_says_nothing() -> None:
    tail = idle_chat()
    tail.feed(HISTORY_RESET, msg(user(3, "better")))
    tail.reconnect(listed(user(1), assistant(2, "a")), status("waiting"), PREVIEW_RESET)
    assert told(tail.all, "history") == []
    assert set(fold(tail.all)) == {1, 2}


def test_an_edit_while_the_chat_runs_keeps_its_status() -> None:
    tail = idle_chat()
    tail.feed(msg(user(3)), status("running"), PREVIEW_RESET)
    tail.feed(words((7, 1), 1, "cut off"))
    events = tail.feed(listed(user(1), assistant(2, "a"), user(4, "instead")), PREVIEW_RESET)
    assert told(events) == ["reset 0 superseded", "history 1 2 4 (edit)", "message 4"]
    tail.feed(words((10, 1), 1, "b"))
    tail.feed(msg(assistant(5, "b")), status("waiting"), PREVIEW_RESET)
    assert told(tail.all, "turn") == ["completed 1 2", "completed 4 5"]


def test_a_chat_that_was_ever_edited_tells_everything_on_each_connect_and_nobody_hears_of_it() -> None:
    tail = edited_chat()
    assert told(tail.all, "history") == ["history 3 (edit)"]
    for _ in range(10):
        events = tail.reconnect(listed(user(3, "better"), assistant(4, "b")), status("waiting"), PREVIEW_RESET)
        assert events == []
        assert tail.batch.replays == 2
    assert_no_event_twice(tail.all)


def test_an_edit_while_nobody_listened_is_told_once() -> None:
    tail = idle_chat()
    second = tail.again()
    state = [*listed(user(3, "better"), assistant(4, "b")), status("waiting"), PREVIEW_RESET]
    events = second.connect(*state)
    assert told(events, "history", "message", "turn") == [
        "history 3 4 (edit)",
        "message 3",
        "message 4",
        "completed 3 4",
    ]
    assert second.reconnect(*state) == []


def test_an_edit_of_the_first_message_while_nobody_listened_needs_no_rest() -> None:
    """Nothing lower exists: no known prompt comes back to prove anything."""
    tail = idle_chat()
    tail.feed(msg(user(3)), msg(assistant(4, "b")), status("waiting"), PREVIEW_RESET)
    second = tail.again()
    assert second.tail.after > 0
    events = second.connect(listed(user(9, "all new")), status("running"), PREVIEW_RESET)
    assert told(events, "history", "message") == ["history 9 (edit)", "message 9"]
    assert second.wants is None


@pytest.mark.parametrize("ever_edited", [True, False])
def test_after_a_crash_history_is_stated_only_where_it_was_ever_rewritten(ever_edited: bool) -> None:
    tail = edited_chat() if ever_edited else idle_chat()
    second = tail.again(clean=False)
    state = listed(user(3, "better"), assistant(4, "b")) if ever_edited else [msg(user(1)), msg(assistant(2, "a"))]
    events = second.connect(state, status("waiting"), PREVIEW_RESET)
    assert told(events, "history") == (["history 3 4 (restart)"] if ever_edited else [])
    assert second.to_save().clean


def test_what_rest_told_first_is_not_gone_because_an_older_list_lacks_it() -> None:
    tail = idle_chat()
    tail.recheck()
    tail.answer(user(1), assistant(2, "a"), user(3), status="running")
    tail.feed(listed(user(1), assistant(2, "a")), PREVIEW_RESET)
    assert told(tail.all, "history") == []
    assert set(fold(tail.all)) == {1, 2, 3}


# --- ids out of order -------------------------------------------------------------------------------------------------


def test_an_id_below_the_highest_that_comes_later_is_a_message_like_any_other() -> None:
    """Before ids were given in the order of appending, N-1 could become visible after N."""
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    tail.feed(msg(assistant(3, "b", call("c", args={}))), PREVIEW_RESET)
    tail.feed(msg(tool(2, "c")), PREVIEW_RESET)
    tail.feed(msg(assistant(4, "done")), status("waiting"), PREVIEW_RESET)
    assert sorted(fold(tail.all)) == [1, 2, 3, 4]
    assert told(tail.all, "turn") == ["completed 1 2 3 4"]


def test_a_late_id_below_the_cursor_is_found_by_the_timer() -> None:
    tail = idle_chat()
    tail.feed(msg(user(9)), status("running"), PREVIEW_RESET)
    assert tail.tail.after == 8
    tail.recheck()
    events = tail.answer(user(1), assistant(2, "a"), assistant(8, "late"), user(9), status="running")
    assert told(events, "message") == ["message 8"]


# --- turns ------------------------------------------------------------------------------------------------------------


def test_a_turn_closes_at_the_end_of_the_frame_that_brings_an_idle_status() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    events = tail.feed(status("error"), error("boom", kind="overloaded"), PREVIEW_RESET)
    assert told(events) == ["error turn: boom", "status error", "failed 1"]
    assert data_of(events[-1])["error"] == {"message": "boom", "kind": "overloaded"}


@pytest.mark.parametrize("joining", [True, False])
def test_a_status_of_a_failure_says_why_although_it_stands_before_its_error(joining: bool) -> None:
    tail = Tail()
    state = [status("error"), error("boom", kind="overloaded"), PREVIEW_RESET]
    if joining:
        events = tail.connect(msg(user(1)), *state)
    else:
        tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
        events = tail.feed(*state)
    (failed,) = [one for one in events if one.event == "status"]
    assert data_of(failed)["last_error"] == {"message": "boom", "kind": "overloaded"}


def test_a_turn_that_fails_before_the_stream_looked_again_has_failed() -> None:
    """The status went from error to error: there is no event of it, but one of the error."""
    tail = Tail()
    tail.connect(msg(user(1)), status("error"), error("boom"), PREVIEW_RESET)
    events = tail.feed(msg(user(3)), error("again"), PREVIEW_RESET)
    assert told(events) == ["message 3", "error turn: again", "failed 3"]


def test_a_prompt_whose_status_comes_in_the_next_frame_is_not_over() -> None:
    """One state may travel in two frames: the idle status is of the turn before."""
    tail = idle_chat()
    assert told(tail.feed(msg(user(3)))) == ["message 3"]
    assert tail.is_settling()
    assert told(tail.feed(status("running"), PREVIEW_RESET)) == ["status running"]
    assert not tail.is_settling()
    events = tail.feed(msg(assistant(4, "b")), status("waiting"), PREVIEW_RESET)
    assert told(events) == ["message 4", "status waiting", "completed 3 4"]


def test_an_error_that_comes_in_the_frame_behind_its_status_is_that_of_the_turn() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    assert told(tail.feed(status("error"))) == ["status error"]
    assert tail.is_settling()
    events = tail.feed(error("boom", kind="overloaded"), PREVIEW_RESET)
    assert told(events) == ["error turn: boom", "failed 1"]
    assert data_of(events[-1])["error"] == {"message": "boom", "kind": "overloaded"}


def test_an_error_that_never_comes_is_asked_of_rest() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    tail.feed(status("error"))
    tail.settle()
    assert tail.wants == "settle"
    assert told(tail.answer(user(1), status="error", last_error="boom")) == ["error turn: boom", "failed 1"]


@pytest.mark.parametrize(
    ("value", "why", "ending"),
    [
        ("waiting", None, ["interrupted 3"]),
        ("error", "again", ["error turn: again", "failed 3"]),
    ],
)
def test_a_turn_that_was_over_at_once_and_left_nothing_is_closed_after_a_look(
    value: str, why: str | None, ending: list[str]
) -> None:
    """The same idle status as before, so none is told."""
    tail = Tail()
    tail.connect(msg(user(1)), status(value), *([error("boom")] if why else []), PREVIEW_RESET)
    assert told(tail.feed(msg(user(3)), PREVIEW_RESET)) == ["message 3"]
    tail.settle()
    assert told(tail.answer(user(1), user(3), status=value, last_error=why)) == ending
    assert tail.is_idle()


def test_a_look_that_finds_a_prompt_at_work_waits_for_the_stream_to_say_so() -> None:
    tail = idle_chat()
    tail.feed(msg(user(3)))
    tail.settle()
    assert tail.answer(user(1), assistant(2, "a"), user(3), status="running") == []
    assert tail.batch.reconnect is None
    assert tail.is_settling(), "it may be over before the stream looks again"
    tail.feed(status("running"), PREVIEW_RESET)
    assert not tail.is_settling()


def test_the_error_status_of_the_turn_before_does_not_fail_the_next_one_after_a_restart() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("error"), error("boom"), PREVIEW_RESET)
    tail.feed(msg(user(3)))
    second = tail.again(clean=False)
    second.connect(msg(user(3)), status("running"), PREVIEW_RESET)
    events = second.feed(msg(assistant(4, "b")), status("waiting"), PREVIEW_RESET)
    assert told(events, "turn") == ["completed 3 4"]


def test_a_turn_that_rest_told_first_is_not_closed_by_an_older_state() -> None:
    tail = idle_chat()
    tail.recheck()
    tail.answer(user(1), assistant(2, "a"), user(3), status="running")
    tail.feed(PREVIEW_RESET)
    assert told(tail.all, "turn") == ["completed 1 2"]


def test_an_error_is_repeated_on_each_connect_and_told_once() -> None:
    tail = Tail()
    state = [msg(user(1)), status("error"), error("boom"), PREVIEW_RESET]
    assert told(tail.connect(*state), "error", "turn") == ["error turn: boom", "failed 1"]
    assert told(tail.reconnect(*state), "error", "turn") == []
    assert told(tail.again().connect(*state), "error", "turn") == []


def test_interrupting_ends_nothing() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    tail.feed(words((1, 1), 1, "a "))
    assert told(tail.feed(status("interrupting"))) == ["status interrupting"]
    assert tail.is_running()
    events = tail.feed(msg(interrupted(2, "a ")), status("waiting"), PREVIEW_RESET)
    assert told(events) == ["message 2", "status waiting", "interrupted 1 2"]


def test_a_promoted_prompt_ends_the_turn_without_a_status() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), queue(queued(7, "next")), status("running"), PREVIEW_RESET)
    tail.feed(msg(assistant(2, "a")), PREVIEW_RESET)
    events = tail.feed(msg(user(3, "next")), queue(), PREVIEW_RESET)
    assert told(events) == ["completed 1 2", "message 3", "queue"]


def test_a_run_without_a_prompt_is_no_turn() -> None:
    """A compaction that somebody asked for."""
    tail = idle_chat()
    tail.feed(status("running"), PREVIEW_RESET)
    tail.feed(status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2"]


def test_five_minutes_of_running_without_an_event_are_no_reason_to_reconnect() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    assert not tail.is_settling()
    tail.recheck()
    assert tail.answer(user(1), status="running") == []
    assert tail.batch.reconnect is None


# --- actions ----------------------------------------------------------------------------------------------------------


def test_an_action_is_told_once_and_ends_nothing() -> None:
    tail = Tail()
    state = [msg(user(1)), msg(assistant(2, "", call("c", args={"x": 1}))), status("requires_action"), action("c")]
    events = tail.connect(*state, PREVIEW_RESET)
    assert told(events) == ["message 1", "message 2", "status requires_action", "action required"]
    assert data_of(events[-1])["tool_calls"][0]["tool_call_id"] == "c"
    assert tail.reconnect(*state, PREVIEW_RESET) == []
    assert tail.batch.replays == 3
    assert told(tail.again().connect(*state, PREVIEW_RESET)) == ["status requires_action"]
    assert tail.is_running()
    events = tail.feed(msg(tool(3, "c")), status("running"), PREVIEW_RESET)
    assert told(events) == ["message 3", "status running"]


def test_who_joins_a_waiting_chat_of_an_older_server_learns_what_it_waits_for() -> None:
    """Up to 2.34 a fresh socket gets only the status."""
    tail = Tail()
    asked = [call("done", args={}), call("c", args={"x": 1})]
    events = tail.connect(status("requires_action"), msg(user(1)), msg(assistant(2, "", *asked)), msg(tool(3, "done")))
    (required,) = [one for one in events if one.event == "action"]
    assert data_of(required)["tool_calls"] == [{"tool_call_id": "c", "tool_name": "execute", "args": '{"x": 1}'}]
    live = Tail()
    live.connect(status("running"), msg(user(1)))
    live.feed(msg(assistant(2, "", *asked)), msg(tool(3, "done")))
    live.feed(status("requires_action"))
    (same,) = live.feed(action("c"))
    assert same.id == required.id


@pytest.mark.parametrize("id_", [{"a": 1}, [1], 7])
def test_a_call_whose_id_is_no_text_asks_for_nothing(id_: object) -> None:
    tail = Tail()
    asked = {**call("c", args={}), "tool_call_id": id_}
    events = tail.connect(status("requires_action"), msg(user(1)), msg(assistant(2, "", asked)))
    assert told(events) == ["message 1", "message 2", "status requires_action"]


def test_an_action_too_long_to_be_told_is_found_by_the_timer() -> None:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(msg(assistant(2, "", call("c", args={}))))
    tail.feed(status("requires_action"))
    tail.recheck()
    events = tail.answer(user(1), assistant(2, "", call("c", args={})), status="requires_action")
    assert told(events) == ["action required"]


def test_a_result_that_the_stream_never_tells_is_read_when_the_chat_falls_silent() -> None:
    """Up to 2.34 an interrupt of a waiting chat stores a result of its own, and open streams never get it."""
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(msg(assistant(2, "", call("c", args={}))))
    tail.feed(status("requires_action"), action("c"))
    tail.feed(status("waiting"), status("waiting"))
    tail.settle()
    events = tail.answer(user(1), assistant(2, "", call("c", args={})), tool(3, "c"))
    assert told(events) == ["message 3", "interrupted 1 2 3"]
    assert tail.batch.reconnect is None


# --- resume -----------------------------------------------------------------------------------------------------------


def test_the_revision_that_goes_with_the_cursor_is_from_before_the_open_turn() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), msg(assistant(2, "a")), status("waiting", 5), PREVIEW_RESET)
    assert (tail.tail.after, tail.tail.revision) == (0, 5)
    tail.feed(msg(user(3)), status("running", 7), PREVIEW_RESET)
    assert (tail.tail.after, tail.tail.revision) == (2, 5)
    assert tail.to_save().revision == 5
    second = tail.again()
    assert second.tail.revision == 5
    second.connect(msg(user(3)), msg(assistant(4, "b")), status("waiting", 9), PREVIEW_RESET)
    assert told(second.all, "message", "turn") == ["message 4", "completed 3 4"]
    assert second.tail.revision == 9
    assert second.again().tail.revision == 9


def test_a_server_without_revisions_leaves_it_open() -> None:
    tail = idle_chat()
    assert tail.tail.revision is None
    assert ResumePoint.from_json({}, known=frozenset(), clean=True).revision is None


def test_with_a_current_revision_nothing_comes_and_nothing_is_missed() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), msg(assistant(2, "a")), status("waiting", 5), PREVIEW_RESET)
    second = tail.again()
    assert told(second.connect(status("waiting", 5))) == ["status waiting"]
    assert second.wants is None
    assert second.is_idle()


# --- an upgrade -------------------------------------------------------------------------------------------------------


def test_a_doubt_of_an_older_server_is_answered_by_rest() -> None:
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)), msg(assistant(2, "a")))
    tail.feed(msg(user(3)))  # perhaps an edit: its mark had not come when the server was replaced
    tail.tail.disconnected()
    events = tail.connect(listed(user(3)), status("running"), PREVIEW_RESET)
    assert told(events, "history") == ["history 3 (edit)"]
    assert tail.wants == "prompt"
    assert tail.answer(user(3), status="running") == []


def test_one_edit_is_told_once_by_two_ages_of_servers() -> None:
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)), msg(assistant(2, "a")))
    tail.feed(msg(user(3, "better")), queue())
    assert tail.wants == "edit"
    assert told(tail.answer(user(3, "better"), status="running"), "history") == ["history 3 (edit)"]
    tail.reconnect(listed(user(3, "better")), status("running"), PREVIEW_RESET)
    tail.reconnect(status("running"), msg(user(3, "better")))
    assert told(tail.all, "history") == ["history 3 (edit)"]


# --- what nobody knows yet --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["queued_for_capacity", "daydreaming"])
def test_a_status_we_do_not_know_is_told_and_ends_nothing(value: str) -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    assert told(tail.feed(status(value))) == [f"status {value}"]
    assert tail.is_running()


def test_the_statuses_of_every_server_age_are_told_as_they_are() -> None:
    """`completed` and `paused` were never seen, and `interrupting` only from 2.35 on; all may come."""
    tail = Tail()
    tail.connect(status("pending"), msg(user(1)))
    for value in ("running", "requires_action", "interrupting", "waiting"):
        tail.feed(status(value))
    for value in ("paused", "completed"):
        tail.feed(status(value))
        assert tail.batch.unknown == []
    assert [one.detail for one in tail.all if one.event == "status"] == [
        *("pending", "running", "requires_action", "interrupting", "waiting", "paused", "completed"),
    ]


def test_a_part_with_half_its_coordinates_spoils_its_frame() -> None:
    tail = Tail()
    broken = words((1, 1), 1, "a")[0]
    del broken["message_part"]["generation_attempt"]
    with pytest.raises(BadFrame):
        tail.connect(broken)


def test_an_action_without_calls_asks_for_nothing() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    assert told(tail.feed(event("action_required", action_required={"tool_calls": None}))) == []
