"""Messages, edits, snapshots and restarts: what the published history is, law by law."""

import pytest

from relay.core.events import Origin, utc
from relay.core.frames import decode_frame
from relay.core.resume import ResumePoint
from tests.core.frames import (
    AT,
    HISTORY_RESET,
    PREVIEW_RESET,
    STORED,
    Tail,
    assistant,
    call,
    compaction,
    error,
    event,
    frame,
    interrupted,
    message,
    msg,
    part,
    queue,
    queued,
    status,
    text,
    told,
    tool,
    user,
    words,
)
from tests.core.laws import assert_no_event_twice, data_of, fold


def answered_chat() -> Tail:
    """Two turns, both over: 1-2 and 5-6."""
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)), msg(assistant(2, "one")), msg(user(5)), msg(assistant(6, "two")))
    return tail


# --- replays ----------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_told_in_the_order_of_ids_then_status() -> None:
    tail = Tail()
    events = tail.connect(status("waiting"), msg(assistant(2, "one")), msg(user(1)))
    assert told(events) == ["message 1", "message 2", "status waiting", "completed 1 2"]
    assert {one.origin for one in events} == {Origin.SNAPSHOT}


def test_a_replay_comes_back_as_nothing() -> None:
    tail = answered_chat()
    assert tail.reconnect(status("waiting"), msg(user(5)), msg(assistant(6, "two"))) == []
    assert tail.batch.replays == 2


def test_a_lower_id_that_comes_late_is_not_lost() -> None:
    """By the whole set of ids, never by the highest: `tool` may come before its `assistant`."""
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    assert told(tail.feed(msg(tool(3, "c")))) == ["message 3"]
    assert told(tail.feed(msg(assistant(2, "", call("c"))))) == ["message 2"]


def test_a_message_that_comes_twice_on_one_connection_is_told_once() -> None:
    tail = answered_chat()
    assert tail.feed(msg(assistant(6, "two"))) == []


def test_a_message_without_content_is_a_message() -> None:
    raw = user(1)
    del raw["content"]
    events = Tail().connect(status("pending"), msg(raw))
    assert told(events, "message") == ["message 1"]
    assert data_of(events[0])["text"] == ""


def test_unknown_fields_of_a_message_are_kept() -> None:
    raw = {**user(1), "from_the_future": {"a": [1, None]}}
    assert data_of(Tail().connect(status("pending"), msg(raw))[0])["message"] == raw


def test_an_unknown_event_type_is_counted_and_passed_over() -> None:
    tail = answered_chat()
    assert tail.feed(event("mood_change"), event("weather", weather={})) == []
    assert tail.batch.unknown == ["mood_change", "weather"]


def test_a_role_we_do_not_know_passes_through() -> None:
    tail = answered_chat()
    assert [one.detail for one in tail.feed(msg(message(9, "moderator", part("text", "hm"))))] == ["moderator"]


def test_live_messages_say_so_and_carry_the_time_they_were_stored() -> None:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    (one,) = tail.feed(msg(assistant(2, "one")))
    assert (one.origin, one.time) == (Origin.LIVE, STORED)


def test_a_message_without_a_time_has_that_of_its_receipt() -> None:
    raw = user(1)
    del raw["created_at"]
    assert Tail().connect(status("pending"), msg(raw))[0].time == "2026-03-20T18:20:00Z"


# --- the end of a snapshot --------------------------------------------------------------------------------------------


def test_a_snapshot_of_several_frames_is_taken_whole() -> None:
    tail = Tail()
    history = [msg(user(1)), *(msg(assistant(key, "x")) for key in range(2, 301))]
    assert tail.connect(status("running"), text("now "), *history[:254]) == []
    assert not tail.is_idle()
    events = tail.feed(*history[254:])
    assert told(events, "message") == [f"message {key}" for key in range(1, 301)]
    assert told(events, "preview") == ["text 0+0 now"]


def test_a_snapshot_of_exactly_256_events_ends_with_silence() -> None:
    tail = Tail()
    assert tail.connect(status("waiting"), msg(user(1)), *(msg(assistant(key, "x")) for key in range(2, 256))) == []
    assert tail.is_settling()
    assert told(tail.settle())[-2:] == ["status waiting", "completed " + " ".join(map(str, range(1, 256)))]
    assert tail.is_idle()


def test_a_ping_does_not_end_a_snapshot() -> None:
    tail = Tail()
    tail.tail.connected(0)
    assert tail.tail.feed(decode_frame('{"type":"ping","data":null}'), AT).events == []
    assert not tail.is_settling(), "nothing has come yet: there is nothing to settle"
    assert {one.origin for one in tail.feed(status("pending"), msg(user(1)))} == {Origin.SNAPSHOT}


def test_a_connection_lost_inside_its_snapshot_leaves_no_trace() -> None:
    tail = Tail()
    tail.connect(*(msg(user(key)) for key in range(1, 257)))
    tail.tail.disconnected()
    assert tail.to_save() == ResumePoint()
    assert tail.all == []


def test_a_failed_snapshot_says_nothing_about_history() -> None:
    """What could not be read stands there as an error, and is not gone."""
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)), msg(assistant(2, "one")))
    assert told(tail.reconnect(status("waiting"), error("failed to load initial snapshot"))) == [
        "error snapshot_failed: failed to load initial snapshot"
    ]
    assert tail.batch.reconnect == "snapshot_failed"
    assert tail.reconnect(status("waiting"), msg(user(1)), msg(assistant(2, "one")), msg(user(3))) != []
    assert tail.wants == "snapshot_failed"
    assert list(fold(tail.all)) == [1, 2, 3]


def test_a_failed_snapshot_says_nothing_about_the_queue() -> None:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)), queue(queued(7, "next")))
    events = tail.reconnect(status("running"), msg(user(1)), error("failed to load initial snapshot"))
    assert told(events, "queue") == []


def test_a_snapshot_without_its_chat_row_has_failed_whoever_sends_it() -> None:
    """No status stands in it: it begins with a message, like that of a server from 2.35 on, which ends with a reset."""
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(text("on"))
    events = tail.reconnect(msg(user(1)), msg(assistant(2, "one")), error("failed to load initial snapshot"))
    assert told(events) == ["error snapshot_failed: failed to load initial snapshot"], "live text is not given up"
    assert tail.gives_up() == "snapshot_failed"
    tail.reconnect(status("running"), text("one"), msg(user(1)))
    assert tail.wants == "snapshot_failed"
    tail.answer(user(1), status="running")
    assert told(tail.all, "preview") == ["text 0+0 on", "text 0+2 e"]


def test_a_failure_ends_a_snapshot_of_several_frames() -> None:
    tail = Tail()
    tail.connect(*(msg(user(key)) for key in range(1, 257)))
    assert told(tail.feed(error("failed to load initial snapshot")), "message") == []
    assert tail.gives_up() == "snapshot_failed"


def test_two_failures_of_one_snapshot_are_told_as_one() -> None:
    failed = error("failed to load initial snapshot")
    tail = Tail()
    assert told(tail.connect(failed, failed)) == ["error snapshot_failed: failed to load initial snapshot"]
    assert_no_event_twice(tail.all)


def test_an_envelope_error_is_a_stream_that_cannot_be_served() -> None:
    tail = Tail()
    tail.tail.connected(0)
    batch = tail.tail.feed(decode_frame('{"type":"error","data":{"message":"Chat streaming is not available."}}'), AT)
    assert told(batch.events) == ["error snapshot_failed: Chat streaming is not available."]
    assert batch.reconnect == "snapshot_failed"


# --- edits ------------------------------------------------------------------------------------------------------------


def test_an_ordinary_prompt_asks_nothing() -> None:
    tail = answered_chat()
    assert told(tail.feed(msg(user(9)), status("pending"))) == ["message 9", "status pending"]
    assert tail.wants is None
    tail.feed(status("running"), text("three"), msg(assistant(10, "three")), status("waiting"))
    assert tail.wants is None


def test_an_empty_queue_update_on_an_empty_queue_is_the_mark_of_an_edit() -> None:
    tail = answered_chat()
    tail.feed(msg(user(1)), msg(assistant(2, "one")), msg(user(9)), queue(), status("pending"))
    assert tail.wants == "edit"
    assert told(tail.answer(user(1), assistant(2, "one"), user(9), status="pending")) == [
        "history 1 2 9 (edit)",
        "status pending",
    ]
    assert list(fold(tail.all)) == [1, 2, 9]


def test_the_mark_may_come_in_a_frame_of_its_own() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)))
    assert tail.wants is None
    tail.feed(queue())
    assert tail.wants == "edit"


def test_the_mark_counts_once() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), queue())
    tail.answer(user(1), assistant(2, "one"), user(9))
    tail.feed(queue())
    assert tail.wants is None


def test_a_queue_that_came_and_went_since_the_prompt_is_no_mark() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), queue(queued(3, "next")), queue(), queue())
    assert tail.wants is None


def test_an_empty_queue_update_long_after_the_prompt_is_no_mark() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"), msg(assistant(10, "three")), queue())
    assert tail.wants is None


def test_an_edit_to_the_text_of_a_prompt_that_left_the_queue_is_noticed() -> None:
    tail = answered_chat()
    tail.feed(msg(user(7, "a")), status("running"), queue(queued(3, "again")), queue())
    tail.feed(msg(assistant(8, "b")), status("waiting"))
    tail.feed(msg(user(9, "again")), queue(), status("pending"))
    assert tail.wants == "edit"


def test_an_edit_of_the_first_message_leaves_nothing_of_the_old_history() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), queue(), status("pending"))
    assert told(tail.answer(user(9), status="pending"), "history") == ["history 9 (edit)"]
    assert list(fold(tail.all)) == [9]


def test_an_edit_while_running_ends_the_old_turn_without_a_turn_event() -> None:
    """One edited away before it ended gets no `chat.turn`; its live text is void."""
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"), text("partial"))
    tail.feed(msg(user(12, "better")), queue(), status("pending"))
    assert tail.wants == "prompt"
    events = tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"), user(12, "better"))
    assert told(events)[:3] == ["reset 0 superseded", "history 1 2 5 6 12 (edit)", "message 12"]
    assert told(tail.all, "turn") == ["completed 1 2", "completed 5 6"]
    if tail.wants:
        tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"), user(12, "better"), status="pending")
    tail.feed(status("running"), msg(assistant(13, "new")), status("waiting"))
    assert told(tail.all, "turn")[2:] == ["completed 12 13"]


def test_an_edit_with_a_queue_asks_before_it_tells() -> None:
    """An unknown prompt while a queue exists that is none of its entries."""
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"), queue(queued(3, "next")), error("boom"), status("error"))
    assert told(tail.feed(msg(user(12, "better")), queue(), status("pending"))) == []
    assert tail.wants == "prompt"
    events = tail.answer(user(1), assistant(2, "one"), user(12, "better"), status="pending")
    assert told(events, "history", "message", "queue") == ["history 1 2 12 (edit)", "message 12", "queue"]


def test_a_prompt_that_rest_does_not_have_yet_is_asked_for_once() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"))
    tail.feed(msg(user(12)))
    assert tail.wants == "prompt"
    assert told(tail.answer(user(5), assistant(6, "two"), user(9), complete=False)) == ["interrupted 9", "message 12"]
    assert tail.wants is None


def test_a_missed_edit_is_found_after_a_reconnect() -> None:
    tail = answered_chat()
    assert tail.reconnect(status("waiting"), msg(user(9)), msg(assistant(10, "new"))) == []
    assert tail.wants == "reconnect"
    events = tail.answer(user(1), assistant(2, "one"), user(9), assistant(10, "new"), complete=False)
    assert tail.batch.reconnect is None, "the read showed no more than the snapshot"
    assert told(events) == ["history 1 2 9 10 (edit)", "message 9", "message 10", "completed 9 10"]
    assert list(fold(tail.all)) == [1, 2, 9, 10]


@pytest.mark.parametrize("shown_by", ["rest", "reset"])
def test_a_rewrite_has_the_time_of_the_message_that_it_made(shown_by: str) -> None:
    tail = answered_chat()
    edit = {**user(9), "created_at": "2026-03-20T18:19:30Z"}
    if shown_by == "rest":
        tail.reconnect(status("waiting"), msg(edit))
        tail.answer(user(1), assistant(2, "one"), edit)
    else:
        tail.reconnect(
            HISTORY_RESET, msg(user(1)), msg(assistant(2, "one")), msg(edit), status("waiting"), PREVIEW_RESET
        )
    (rewrite,) = [one for one in tail.all if one.event == "history"]
    assert told([rewrite]) == ["history 1 2 9 (edit)"]
    assert rewrite.time == "2026-03-20T18:19:30Z"


def test_a_missed_edit_of_something_old_is_looked_for_further_down() -> None:
    """Nothing of the page is known: the edit lies below what was read."""
    tail = answered_chat()
    tail.reconnect(status("waiting"), msg(user(20)), msg(assistant(21, "new")))
    assert tail.batch.wants is not None
    assert tail.batch.wants.down_to == 4
    assert tail.answer(user(20), assistant(21, "new"), complete=False) == []
    assert tail.batch.wants is not None
    assert tail.batch.wants.down_to == 0
    tail.answer(user(1), assistant(2, "one"), user(20), assistant(21, "new"))
    assert list(fold(tail.all)) == [1, 2, 20, 21]


def test_a_last_prompt_that_came_back_proves_the_history() -> None:
    tail = answered_chat()
    tail.reconnect(status("waiting"), msg(user(5)), msg(assistant(6, "two")), msg(user(9)), msg(assistant(10, "x")))
    assert tail.wants is None
    assert told(tail.all, "turn")[-1] == "completed 9 10"


def test_what_is_missing_behind_a_prompt_that_came_back_is_gone() -> None:
    """The follow-up was edited while away: its prompt is the highest known below the cursor's reach."""
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"), msg(assistant(10, "x")), status("waiting"))
    tail.tail.disconnected()
    events = tail.connect(status("waiting"), msg(user(5)), msg(assistant(6, "two")), msg(user(15)), after=4)
    assert told(events, "history") == ["history 1 2 5 6 15 (edit)"]
    assert list(fold(tail.all)) == [1, 2, 5, 6, 15]


def test_a_removed_id_never_returns() -> None:
    """A late replay of what an edit took away is not history."""
    tail = answered_chat()
    tail.feed(msg(user(9)), queue())
    tail.answer(user(1), assistant(2, "one"), user(9))
    assert tail.feed(msg(user(5)), msg(assistant(6, "two"))) == []
    assert tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"), user(9)) == []
    assert list(fold(tail.all)) == [1, 2, 9]


def test_what_rest_lacks_although_it_is_newer_than_the_read_stays() -> None:
    tail = answered_chat()
    tail.recheck()
    tail.answer(user(1), assistant(2, "one"))
    assert list(fold(tail.all)) == [1, 2, 5, 6]


def test_what_lies_below_the_page_stays() -> None:
    tail = answered_chat()
    tail.recheck()
    tail.answer(assistant(2, "one"), user(5), assistant(6, "two"), complete=False)
    assert list(fold(tail.all)) == [1, 2, 5, 6]


def test_a_message_that_upstream_lost_without_an_edit_is_told_as_reconciled() -> None:
    tail = answered_chat()
    tail.recheck()
    assert told(tail.answer(user(1), assistant(2, "one"), assistant(6, "two"))) == ["history 1 2 6 (reconcile)"]


def test_a_message_that_the_stream_skipped_comes_from_rest() -> None:
    tail = answered_chat()
    tail.recheck()
    events = tail.answer(user(1), assistant(2, "one"), tool(3), user(5), assistant(6, "two"))
    assert told(events) == ["message 3"]
    assert events[0].origin is Origin.RECONCILE


def test_a_prompt_that_the_stream_skipped_has_its_own_turn_and_leaves_the_open_one_alone() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"))
    tail.recheck()
    page = [user(1), assistant(2, "one"), user(5), assistant(6, "two"), user(7), assistant(8, "skipped"), user(9)]
    events = tail.answer(*page, status="running")
    assert sorted(told(events)) == ["completed 7 8", "message 7", "message 8"]
    assert tail.to_save().open == 9
    tail.feed(msg(assistant(10, "three")), status("waiting"))
    assert told(tail.all, "turn")[-1] == "completed 9 10"


def test_rest_may_be_ahead_of_the_snapshot_that_it_was_asked_for() -> None:
    tail = answered_chat()
    tail.reconnect(status("running"), msg(user(9)))
    assert tail.wants == "reconnect"
    tail.answer(user(1), assistant(2, "one"), user(9), assistant(10, "new"), status="running")
    tail.feed(msg(assistant(10, "new")), status("waiting"))
    assert list(fold(tail.all)) == [1, 2, 9, 10]
    assert told(tail.all, "history") == ["history 1 2 9 10 (edit)"]
    assert told(tail.all, "turn")[-1] == "completed 9 10"
    assert_no_event_twice(tail.all)


def test_events_behind_a_doubtful_one_wait_for_the_answer() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"))
    assert tail.feed(msg(user(12)), status("pending")) == []
    assert tail.feed(status("running"), msg(assistant(13, "x")), status("waiting")) == []
    events = tail.answer(user(5), assistant(6, "two"), user(9), user(12), complete=False, status="pending")
    assert told(events) == [
        "interrupted 9",
        "message 12",
        "status pending",
        "status running",
        "message 13",
        "status waiting",
        "completed 12 13",
    ]


def test_compaction_removes_nothing_from_history() -> None:
    tail = answered_chat()
    one, two = compaction(10)
    tail.feed(msg(user(8)), status("running"), msg(assistant(9, "x")), msg(one), msg(two))
    assert list(fold(tail.all)) == [1, 2, 5, 6, 8, 9, 10, 11]


# --- doubt outlives what raised it ------------------------------------------------------------------------------------


def test_a_connection_lost_while_the_mark_may_come_leaves_a_doubt() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)))
    assert tail.reconnect(status("running"), msg(user(9))) != []
    assert tail.wants == "prompt"


def test_a_doubt_that_was_not_answered_is_part_of_the_resume_point() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), queue())
    second = tail.again()
    second.connect(status("pending"), msg(user(9)))
    assert second.wants == "edit"
    second.answer(user(1), assistant(2, "one"), user(9), status="pending")
    assert second.to_save().doubt is None
    assert list(fold([*tail.all, *second.all])) == [1, 2, 9]


def test_a_prompt_seen_just_before_the_end_is_a_doubt_of_the_point() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)))
    assert tail.to_save().doubt == "prompt"
    tail.feed(status("running"), msg(assistant(10, "x")))
    assert tail.to_save().doubt is None


def test_dropped_messages_means_a_dead_stream_and_a_look_at_rest() -> None:
    tail = answered_chat()
    assert told(tail.feed(error("dropped messages"))) == ["error dropped_messages: dropped messages"]
    assert tail.batch.reconnect == "dropped_messages"
    assert tail.to_save().doubt == "dropped_messages"
    tail.reconnect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    assert tail.wants == "dropped_messages"
    tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"))
    assert tail.to_save().doubt is None
    assert told(tail.all, "turn") == ["completed 1 2", "completed 5 6"], "a stream error is no failed turn"


def test_what_stands_behind_the_last_word_of_a_stream_is_not_heard_with_it() -> None:
    tail = answered_chat().tail
    assert tail.hear(frame(status("running")), AT)
    assert not tail.hear(frame(error("dropped messages")), AT)


def test_a_step_that_ended_as_an_old_server_tells_it_is_told_as_ended() -> None:
    """A server of 2.35 begins as older ones do where a chat has no messages."""
    tail = Tail()
    tail.connect(status("running"))
    frames = [msg(user(1))], text("a"), [msg(assistant(2, "a"))], words((1, 1), 1, "b")
    for each in frames:
        assert tail.tail.hear(frame(*each), AT)
    assert tail.tail.out().ended == [0]


def test_each_connection_tells_its_own_failure() -> None:
    tail = answered_chat()
    tail.feed(error("dropped messages"), error("dropped messages"))
    tail.reconnect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"))
    tail.feed(error("dropped messages"))
    assert len(told(tail.all, "error")) == 2
    assert_no_event_twice(tail.all)


def test_a_frame_that_cannot_be_read_is_told_and_doubted() -> None:
    tail = answered_chat()
    batch = tail.tail.stream_error("frame is not JSON", "bad_frame", AT)
    assert told(batch.events) == ["error bad_frame: frame is not JSON"]
    assert batch.reconnect == "bad_frame"
    assert tail.to_save().doubt == "bad_frame"


# --- after a crash ----------------------------------------------------------------------------------------------------


def test_after_a_crash_the_history_is_stated_exactly_once() -> None:
    second = answered_chat().again(clean=False)
    assert not second.to_save().clean
    events = second.connect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    assert told(events, "history") == ["history 1 2 5 6 (restart)"]
    assert second.to_save().clean
    second.reconnect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    assert len(told(second.all, "history")) == 1


def test_a_clean_restart_states_nothing() -> None:
    second = answered_chat().again()
    assert told(second.connect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))) == ["status waiting"]


def test_the_statement_takes_back_what_was_told_unsaved_and_edited_away_since() -> None:
    first = answered_chat()
    saved = first.to_save()
    first.feed(msg(user(9)), status("running"), msg(assistant(10, "x")), status("waiting"))
    second = first.again(clean=False, saved=saved)
    second.connect(status("waiting"), msg(user(5)), msg(assistant(6, "two")), msg(user(12)), msg(assistant(13, "y")))
    assert list(fold([*first.all, *second.all])) == [1, 2, 5, 6, 12, 13]


def test_the_statement_includes_an_edit_that_was_missed() -> None:
    """One event for both, from whichever side it is found."""
    second = answered_chat().again(clean=False)
    second.connect(status("waiting"), msg(user(9)), msg(assistant(10, "new")))
    second.answer(user(1), assistant(2, "one"), user(9), assistant(10, "new"))
    assert told(second.all, "history") == ["history 1 2 9 10 (restart)"]
    assert [one.time for one in second.all if one.event == "history"] == [utc(AT)], "it is the session's own"


def test_the_statement_waits_for_the_answer_to_a_doubt() -> None:
    """Made before, it would bring back for good what an edit took away: the edit's own event is only a copy by then."""
    first = answered_chat()
    first.feed(msg(user(9)))
    saved = first.to_save()
    first.feed(queue(), status("pending"))
    first.answer(user(1), assistant(2, "one"), user(9), status="pending")
    second = first.again(clean=False, saved=saved)
    second.connect(status("pending"), msg(user(9)))
    assert told(second.all, "history") == []
    assert not second.to_save().clean
    second.answer(user(1), assistant(2, "one"), user(9), status="pending")
    assert told(second.all, "history") == ["history 1 2 9 (restart)"]
    assert list(fold([*first.all, *second.all])) == [1, 2, 9]


def test_each_session_states_under_its_own_id() -> None:
    """The statement of one that crashed again says less than the next one's."""
    second = answered_chat().again(clean=False)
    second.connect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    third = second.again(clean=False)
    third.connect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    ids = {one.id for one in [*second.all, *third.all] if one.event == "history"}
    assert len(ids) == 2


def test_a_first_follow_states_nothing() -> None:
    tail = answered_chat()
    assert told(tail.all, "history") == []


def test_the_same_edit_has_the_same_id_in_every_life() -> None:
    first = answered_chat()
    saved = first.to_save()
    first.feed(msg(user(9)), queue())
    first.answer(user(1), assistant(2, "one"), user(9))
    second = first.again(saved=saved)
    second.connect(status("pending"), msg(user(9)))
    second.answer(user(1), assistant(2, "one"), user(9))
    ids = [one.id for one in [*first.all, *second.all] if one.event == "history"]
    assert len(ids) == 2
    assert len(set(ids)) == 1


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_the_next_connection_asks_from_just_before_the_last_prompt() -> None:
    tail = answered_chat()
    assert (tail.tail.after, tail.to_save().after, tail.tail.beyond) == (4, 4, 6)
    tail.feed(msg(user(9)))
    assert (tail.tail.after, tail.to_save().after, tail.tail.beyond) == (8, 8, 9)
    assert Tail().tail.after == 0


def test_a_commit_holds_what_changed_since_the_last_one() -> None:
    tail = answered_chat().tail
    first = tail.commit()
    assert first.added == {1, 2, 5, 6}
    assert (tail.commit().added, tail.commit().removed) == (frozenset(), frozenset())
    tail.feed(frame(msg(user(9)), queue()), AT)
    tail.answered({"status": "pending"}, [user(9), assistant(2, "one"), user(1)], complete=True, at=AT)
    commit = tail.commit()
    assert [set(ids) for ids in (commit.added, commit.removed)] == [{9}, {5, 6}]
    assert commit.onto({1, 2, 5, 6}) == first.then(commit).onto(set())
    assert commit.onto({1, 2, 5, 6}).known == {1, 2, 9}


def test_a_tail_dropped_before_its_commit_was_saved_leaves_no_trace() -> None:
    saved = answered_chat().to_save()
    lives = [Tail(saved, session=2), Tail(saved, session=3)]
    for life in lives:
        life.connect(status("running"), msg(user(5)), msg(assistant(6, "two")), msg(user(9)))
    assert [one.id for one in lives[0].all] == [one.id for one in lives[1].all]


def test_a_message_may_hold_any_text() -> None:
    odd = "\U0001f600 e\u0301 \x00 \u2028 \ud800 \u202e"
    tail = Tail()
    (one, *_) = tail.connect(status("running"), msg(user(1, odd)))
    assert data_of(one)["text"] == odd
    assert one.encode().decode()
    tail.feed(text(odd[:3], odd[3:]), msg(assistant(2, odd)))
    assert told(tail.all, "preview") == [f"text 0+0 {odd[:3]}".strip(), f"text 0+3 {odd[3:]}".strip()]


@pytest.mark.parametrize("frames", [[status("waiting"), msg(interrupted(2))], [msg(interrupted(2)), status("waiting")]])
def test_an_assistant_message_without_content_is_a_step(frames: list[dict[str, object]]) -> None:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    for each in frames:
        tail.feed(each)
    tail.settle()
    tail.answer(user(1), interrupted(2))
    assert told(tail.all, "turn") == ["interrupted 1 2"]


def test_frames_are_read_while_an_answer_is_awaited() -> None:
    tail = answered_chat()
    tail.recheck()
    assert tail.tail.feed(frame(msg(user(9))), AT).events == []
    assert told(tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"))) == ["message 9"]


def test_a_message_that_rest_no_longer_has_is_not_told_when_it_comes_late() -> None:
    """Edited twice while REST was asked: the first edit's message is gone before it is taken in."""
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(msg(user(3)))
    assert tail.wants == "prompt"
    tail.answer(user(5), status="pending")
    tail.feed(queue(), status("pending"), msg(assistant(4, "of 3")), msg(user(5)), queue(), status("pending"))
    if tail.wants:
        tail.answer(user(5), status="pending")
    tail.feed(status("running"), msg(assistant(6, "well")), status("waiting"))
    assert told(tail.all, "message") == ["message 1", "message 5", "message 6"]
    assert told(tail.all, "turn") == ["completed 5 6"]
    assert tail.to_save().known == {5, 6}
    assert tail.is_idle()


def test_an_edit_to_the_text_of_a_waiting_prompt_is_no_promotion() -> None:
    tail = answered_chat()
    tail.feed(
        msg(user(9)), status("running"), queue(queued(3, "next"), queued(4, "last")), error("boom"), status("error")
    )
    tail.feed(msg(user(12, "next")), queue(), status("pending"))
    assert tail.wants is not None
    tail.answer(user(1), assistant(2, "one"), user(12, "next"), status="pending")
    assert list(fold(tail.all)) == [1, 2, 12]


def test_a_doubt_is_looked_into_as_deep_as_it_is_old() -> None:
    """While away the turn in doubt ended and another prompt came."""
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(
        msg(assistant(2, "one")),
        status("waiting"),
        msg(user(3)),
        status("running"),
        msg(assistant(4, "two")),
        status("waiting"),
    )
    tail.feed(msg(user(5)))  # an edit of 3; its mark is lost with the connection
    tail.reconnect(status("running"), msg(user(5)), msg(assistant(6, "new")), msg(user(7)))
    assert tail.batch.wants is not None
    assert tail.batch.wants.down_to == 4


def test_a_doubt_keeps_its_depth_over_a_restart() -> None:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(
        msg(assistant(2, "one")),
        status("waiting"),
        msg(user(3)),
        status("running"),
        msg(assistant(4, "two")),
        status("waiting"),
    )
    tail.feed(msg(user(5)))  # an edit of 3
    tail.reconnect(status("running"), msg(user(5)), msg(assistant(6, "new")), msg(user(7)))
    for clean in (True, False):
        second = tail.again(clean=clean)
        second.connect(status("running"), msg(user(7)))
        assert second.batch.wants is not None
        assert second.batch.wants.down_to <= 4


def test_what_a_new_connection_shows_exists_whatever_was_read_before() -> None:
    tail = answered_chat()
    tail.recheck()
    tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"))
    events = tail.reconnect(status("waiting"), msg(user(1)), msg(assistant(2, "one")), msg(tool(3)), msg(user(5)))
    assert told(events, "message") == ["message 3"]


def test_what_waited_for_an_answer_is_void_when_the_connection_ends() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"), msg(user(12)), status("pending"), msg(assistant(13, "x")))
    assert tail.wants == "prompt"
    tail.reconnect(status("running"), msg(user(15)))
    tail.answer(user(1), assistant(2, "one"), user(15), status="running")
    assert told(tail.all, "message")[4:] == ["message 9", "message 15"]
    assert list(fold(tail.all)) == [1, 2, 15]


def test_a_snapshot_that_waited_for_an_answer_is_void_when_the_connection_ends() -> None:
    tail = answered_chat()
    tail.reconnect(status("error"), msg(user(9)))
    assert tail.wants == "reconnect"
    tail.reconnect(status("waiting"), msg(user(5)), msg(assistant(6, "two")))
    tail.answer(user(1), assistant(2, "one"), user(5), assistant(6, "two"))
    assert told(tail.all, "status") == ["status waiting"]
    assert list(fold(tail.all)) == [1, 2, 5, 6]


def test_the_queue_that_waited_for_an_answer_is_void_when_the_connection_ends() -> None:
    tail = answered_chat()
    tail.feed(msg(user(9)), status("running"), msg(user(12)), queue(queued(3, "old")))
    tail.reconnect(status("running"), msg(user(9)), msg(user(12)))
    if tail.wants:
        tail.answer(user(5), assistant(6, "two"), user(9), user(12), complete=False, status="running")
    assert told(tail.all, "queue") == []
