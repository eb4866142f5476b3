"""Turns, statuses, the queue, errors, retries and the chat's own life, law by law."""

from typing import Any

import pytest

from relay.core.events import Event, Origin, event_id
from tests.core.frames import (
    AT,
    PREVIEW_RESET,
    REF,
    Tail,
    assistant,
    call,
    compaction,
    error,
    event,
    interrupted,
    msg,
    part,
    queue,
    queued,
    result,
    retry,
    status,
    text,
    told,
    tool,
    user,
)
from tests.core.laws import assert_no_event_twice, data_of


def running_chat() -> Tail:
    """The first prompt is being worked on."""
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    return tail


def turn_of(tail: Tail) -> dict[str, Any]:
    (one,) = [each for each in tail.all if each.event == "turn"]
    return data_of(one)


# --- the end of a turn ------------------------------------------------------------------------------------------------


def test_a_turn_ends_with_waiting_behind_an_answer_that_was_charged() -> None:
    tail = running_chat()
    assert told(tail.feed(msg(assistant(2, "one")))) == ["message 2"]
    assert told(tail.feed(status("waiting"))) == ["status waiting", "completed 1 2"]
    assert tail.wants is None
    assert tail.is_idle()
    assert not tail.is_settling()


def test_a_turn_sums_the_usage_of_its_steps() -> None:
    tail = running_chat()
    tail.feed(
        msg(assistant(2, "", call("c"), usage={"reasoning_tokens": 1, "context_limit": 200000})), msg(tool(3, "c"))
    )
    tail.feed(msg(assistant(4, "done", usage={"cache_read_tokens": 7})), status("waiting"))
    assert turn_of(tail) == {
        "outcome": "completed",
        "message_ids": [1, 2, 3, 4],
        "steps": 2,
        "usage": {"input_tokens": 20, "output_tokens": 4, "reasoning_tokens": 1, "cache_read_tokens": 7},
    }


def test_the_time_of_a_turn_is_that_of_its_last_message() -> None:
    tail = running_chat()
    tail.feed(msg({**assistant(2, "one"), "created_at": "2026-03-20T18:19:59.5+01:00"}), status("waiting"))
    assert [one.time for one in tail.all if one.event == "turn"] == ["2026-03-20T17:19:59.5Z"]


def test_waiting_again_closes_nothing_twice() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"), status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2"]
    assert told(tail.all, "status") == ["status running", "status waiting"]


def test_a_call_without_its_result_keeps_the_turn_open() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "", call("a"), call("b"))), msg(tool(3, "a")), status("waiting"))
    assert told(tail.all, "turn") == []
    assert tail.is_settling()


def test_a_call_the_provider_ran_itself_waits_for_no_message() -> None:
    tail = running_chat()
    own = {"provider_executed": True}
    tail.feed(msg(assistant(2, "found", call("w", **own), result("w", **own))), status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2"]


def test_a_tool_message_is_no_end() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "", call("c"))), msg(tool(3, "c")), status("waiting"))
    assert told(tail.all, "turn") == []
    assert tail.is_settling()


def test_an_interrupted_turn_waits_for_the_message_behind_its_status() -> None:
    """`waiting` comes first, then the partial message, then `waiting` again: who stops at the first loses it."""
    tail = running_chat()
    tail.feed(text("par"), status("waiting"))
    assert tail.is_settling()
    assert told(tail.feed(msg(interrupted(2, "partial")), status("waiting"))) == ["message 2"]
    assert tail.settle() == []
    assert tail.wants == "settle"
    assert told(tail.answer(user(1), interrupted(2, "partial"))) == ["interrupted 1 2"]
    assert tail.is_idle()


def test_rest_may_have_the_partial_message_before_the_stream() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    tail.settle()
    assert told(tail.answer(user(1), interrupted(2, "partial"))) == ["message 2", "interrupted 1 2"]
    assert tail.feed(msg(interrupted(2, "partial")), status("waiting")) == []


def test_a_prompt_that_nobody_answered_is_an_interrupted_turn_without_steps() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    tail.settle()
    tail.answer(user(1))
    assert turn_of(tail) == {"outcome": "interrupted", "message_ids": [1], "steps": 0, "usage": {}}


def test_a_chat_that_runs_again_when_rest_is_asked_keeps_its_turn() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    tail.settle()
    assert tail.answer(user(1), status="running") == []
    assert not tail.is_settling()
    assert tail.to_save().open == 1


def test_a_read_for_another_reason_does_not_end_a_turn_that_settles() -> None:
    """It may be too early: the last message comes some milliseconds after the status."""
    tail = running_chat()
    tail.feed(msg(user(3)))
    assert tail.wants == "prompt"
    tail.feed(status("waiting"))
    tail.answer(user(1), user(3))
    assert told(tail.all, "turn") == ["interrupted 1"]
    assert tail.is_settling()


def test_a_read_that_did_not_wait_for_silence_does_not_end_a_turn() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    tail.tail.recheck(AT, "too_large")
    assert tail.answer(user(1)) == []
    assert tail.is_settling()


def test_rest_that_is_older_than_a_new_prompt_is_no_reason_to_reconnect() -> None:
    """`pending` is still on its way."""
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"), msg(user(3)))
    tail.recheck()
    tail.answer(user(1), assistant(2, "one"), user(3), status="waiting")
    assert tail.batch.reconnect is None


def test_a_failure_that_only_rest_tells() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    tail.settle()
    assert told(tail.answer(user(1), status="error", last_error="boom")) == ["error turn: boom", "failed 1"]


def test_the_timer_ends_a_turn_as_well() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    tail.recheck()
    assert told(tail.answer(user(1))) == ["interrupted 1"]


def test_rest_that_is_idle_says_nothing_about_a_turn_of_which_no_idle_status_was_seen() -> None:
    """It may concern the turn before."""
    tail = running_chat()
    tail.recheck()
    assert tail.answer(user(1), status="waiting") == []
    assert tail.to_save().open == 1
    assert tail.batch.reconnect == "stale", "unless the stream lost it: a fresh snapshot will tell"


def test_running_for_long_is_healthy() -> None:
    """After a crash of the server nothing comes for five minutes, and REST says `running` too."""
    tail = running_chat()
    tail.recheck()
    tail.answer(user(1), status="running")
    assert tail.batch.reconnect is None
    assert tail.is_running()


def test_requires_action_ends_nothing() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "", call("c"))), status("requires_action"))
    assert told(tail.all, "turn") == []
    assert not tail.is_settling()
    assert not tail.is_idle()


def test_a_snapshot_that_waits_and_lacks_the_last_message_gets_it_live() -> None:
    """Status is read after the messages."""
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)))
    assert tail.is_settling()
    tail.feed(msg(assistant(2, "one")))
    tail.settle()
    assert told(tail.answer(user(1), assistant(2, "one"))) == ["completed 1 2"]


def test_a_first_follow_tells_the_turns_of_the_past() -> None:
    tail = Tail()
    tail.connect(
        status("running"), msg(user(1)), msg(assistant(2, "a")), msg(user(3)), msg(interrupted(4, "b")), msg(user(5))
    )
    assert told(tail.all, "turn") == ["completed 1 2", "interrupted 3 4"]
    assert tail.to_save().open == 5


def test_a_follow_up_without_a_status_between_closes_the_turn_after_a_look() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")))
    assert tail.feed(msg(user(3))) == []
    assert tail.wants == "prompt"
    assert told(tail.answer(user(1), assistant(2, "one"), user(3))) == ["completed 1 2", "message 3"]


def test_compaction_is_no_step_and_not_of_the_turn() -> None:
    tail = running_chat()
    one, two = compaction(3)
    tail.feed(msg(assistant(2, "half")), msg(one), msg(two), msg(assistant(6, "rest")), status("waiting"))
    assert turn_of(tail)["message_ids"] == [1, 2, 6]
    assert turn_of(tail)["steps"] == 2


def test_compaction_after_the_last_step_does_not_keep_the_turn_open() -> None:
    tail = running_chat()
    one, two = compaction(3)
    tail.feed(msg(assistant(2, "all")), msg(one), msg(two), status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2"]


def test_a_run_without_a_user_message_is_no_turn() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"))
    one, two = compaction(3)
    tail.feed(status("running"), msg(one), msg(two), status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2"]
    assert tail.is_idle()


def test_a_closed_turn_never_reopens() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"), msg(assistant(3, "late")), status("waiting"))
    tail.recheck()
    tail.answer(user(1), assistant(2, "one"), assistant(3, "late"))
    assert told(tail.all, "turn") == ["completed 1 2"]
    second = tail.again()
    second.connect(status("waiting"), msg(user(1)), msg(assistant(2, "one")), msg(assistant(3, "late")))
    assert told(second.all, "turn") == []


def test_an_open_turn_is_rebuilt_from_the_replay_after_a_restart() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "", call("c"))), msg(tool(3, "c")))
    second = tail.again()
    second.connect(status("running"), msg(user(1)), msg(assistant(2, "", call("c"))), msg(tool(3, "c")))
    second.feed(msg(assistant(4, "done")), status("waiting"))
    assert turn_of(second)["message_ids"] == [1, 2, 3, 4]
    assert turn_of(second)["usage"]["input_tokens"] == 20


def test_a_turn_that_settled_when_the_follower_died_settles_again() -> None:
    tail = running_chat()
    tail.feed(status("waiting"))
    second = tail.again()
    second.connect(status("waiting"), msg(user(1)))
    assert second.is_settling()


def test_the_turn_has_the_same_id_in_every_life() -> None:
    tail = running_chat()
    saved = tail.to_save()
    tail.feed(msg(assistant(2, "one")), status("waiting"))
    second = tail.again(saved=saved)
    second.connect(status("waiting"), msg(user(1)), msg(assistant(2, "one")))
    ids = [one.id for one in [*tail.all, *second.all] if one.event == "turn"]
    assert len(ids) == 2
    assert len(set(ids)) == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_error_and_its_status_fail_the_turn_at_once() -> None:
    tail = running_chat()
    events = tail.feed(error("stream response: unauthorized", kind="auth", status_code=401), status("error"))
    assert told(events) == ["error turn: stream response: unauthorized", "status error", "failed 1"]
    why = {"message": "stream response: unauthorized", "kind": "auth", "status_code": 401}
    assert turn_of(tail)["error"] == why
    assert data_of(events[1])["last_error"] == why
    assert data_of(events[0]) == {**why, "reason": "turn"}


def test_an_error_without_its_event_is_asked_of_rest() -> None:
    """A text of some 7.5 kB is never sent; a socket that joins never gets it."""
    tail = running_chat()
    assert told(tail.feed(status("error"))) == ["status error"]
    assert tail.is_settling()
    tail.settle()
    events = tail.answer(user(1), status="error", last_error="very long")
    assert told(events) == ["error turn: very long", "failed 1"]
    assert turn_of(tail)["error"] == {"message": "very long"}
    assert tail.is_idle()


def test_a_failure_that_rest_no_longer_knows_is_still_one() -> None:
    tail = running_chat()
    tail.feed(status("error"))
    tail.feed(msg(user(3)), status("pending"))
    tail.answer(user(1), user(3), status="pending")
    assert told(tail.all, "turn") == ["failed 1"]
    assert "error" not in turn_of(tail)


def test_an_error_event_alone_ends_nothing() -> None:
    """Somebody who prompts while the run fails makes it `pending` instead."""
    tail = running_chat()
    assert told(tail.feed(error("boom"))) == ["error turn: boom"]
    assert tail.to_save().open == 1
    tail.feed(msg(assistant(2, "one")), status("waiting"))
    assert turn_of(tail)["outcome"] == "completed"
    assert "error" not in turn_of(tail)


def test_the_error_of_a_turn_is_told_once() -> None:
    tail = running_chat()
    tail.feed(error("boom"), error("boom"))
    assert len(told(tail.all, "error")) == 1
    second = tail.again()
    second.connect(status("error"), msg(user(1)))
    second.settle()
    second.answer(user(1), status="error", last_error="boom")
    assert told(second.all, "error") == []
    assert turn_of(second) == {
        "outcome": "failed",
        "message_ids": [1],
        "steps": 0,
        "usage": {},
        "error": {"message": "boom"},
    }


def test_the_next_turn_forgets_the_error() -> None:
    tail = running_chat()
    tail.feed(error("boom"), status("error"))
    tail.feed(msg(user(3)), status("pending"), status("running"), msg(assistant(4, "well")), status("waiting"))
    assert told(tail.all, "turn") == ["failed 1", "completed 3 4"]
    tail.feed(msg(user(5)), status("running"), error("boom"), status("error"))
    assert len(told(tail.all, "error")) == 2
    assert_no_event_twice(tail.all)


def test_an_error_status_of_the_turn_before_does_not_fail_this_one() -> None:
    tail = Tail()
    tail.connect(status("error"), msg(user(1)))
    tail.settle()
    tail.answer(user(1), status="error", last_error="boom")
    tail.feed(msg(user(3)), status("pending"))
    tail.recheck()
    assert tail.answer(user(1), user(3), status="error", last_error="boom") == []
    tail.feed(status("running"), msg(assistant(4, "well")), status("waiting"))
    assert told(tail.all, "turn") == ["failed 1", "completed 3 4"]


def test_a_failed_turn_is_still_failed_after_a_restart_in_between() -> None:
    tail = running_chat()
    tail.feed(status("error"))
    second = tail.again()
    second.connect(status("error"), msg(user(1)))
    second.settle()
    second.answer(user(1), status="error", last_error="boom")
    assert turn_of(second)["outcome"] == "failed"


# --- status -----------------------------------------------------------------------------------------------------------


def test_a_status_names_the_one_before() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"))
    assert [(one.detail, data_of(one)["previous"]) for one in tail.all if one.event == "status"] == [
        ("running", None),
        ("waiting", "running"),
    ]


def test_a_status_that_is_well_has_no_error() -> None:
    tail = running_chat()
    assert data_of(tail.all[-1]) == {"status": "running", "previous": None, "last_error": None}
    (one,) = tail.feed(status("error"))
    assert "last_error" not in data_of(one), "absent means not known"


def test_a_repeated_status_is_told_once() -> None:
    """`running` again means that the step was restarted after a crash."""
    tail = running_chat()
    assert tail.feed(status("running"), status("running")) == []


def test_each_time_a_status_comes_back_is_a_fact_of_its_own() -> None:
    tail = running_chat()
    tail.feed(status("pending"), status("running"), status("pending"), status("running"))
    assert len(told(tail.all, "status")) == 5
    assert_no_event_twice(tail.all)


def test_the_same_status_under_the_next_prompt_is_another_fact() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"), msg(user(3)), status("running"), msg(assistant(4, "two")))
    tail.feed(status("waiting"))
    assert told(tail.all, "status") == ["status running", "status waiting"] * 2
    assert_no_event_twice(tail.all)


def test_statuses_are_counted_from_the_prompt_on() -> None:
    tail = running_chat()
    tail.feed(status("pending"), status("running"), msg(assistant(2, "one")), status("waiting"), msg(user(3)))
    tail.feed(status("pending"), status("running"))
    assert tail.to_save().status_counts == {"pending": 1, "running": 1}


def test_after_a_restart_the_status_that_was_told_last_goes_out_again_as_the_same_fact() -> None:
    tail = running_chat()
    second = tail.again()
    second.connect(status("running"), msg(user(1)))
    before, after = ([one for one in life.all if one.event == "status"][-1] for life in (tail, second))
    assert before.id == after.id
    assert (after.session, data_of(after)["status"]) == (2, "running")
    second.reconnect(status("running"), msg(user(1)))
    assert len(told(second.all, "status")) == 1


def test_status_ids_are_the_same_from_the_same_point() -> None:
    saved = running_chat().to_save()
    lives = [Tail(saved, session=2), Tail(saved, session=3)]
    for life in lives:
        life.connect(status("running"), msg(user(1)))
        life.feed(status("pending"), status("running"), msg(user(1)), msg(assistant(2, "one")), status("waiting"))
    ids = [[one.id for one in life.all if one.event == "status"] for life in lives]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 4


def test_a_status_from_the_future_passes_through() -> None:
    tail = running_chat()
    (one,) = tail.feed(status("queued_for_capacity"))
    assert one.detail == "queued_for_capacity"
    assert tail.is_running()


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_whole_queue_is_told_as_upstream_sent_it() -> None:
    tail = running_chat()
    entries = [queued(3, "a"), {**queued(4, "b"), "from_the_future": 1}]
    (one,) = tail.feed(queue(*entries))
    assert data_of(one) == {"queued_messages": entries}
    assert tail.feed(queue(*entries)) == []


def test_an_empty_queue_is_told_only_if_it_was_not() -> None:
    tail = running_chat()
    assert tail.feed(queue()) == []
    tail.feed(queue(queued(3, "a")))
    assert told(tail.feed(queue())) == ["queue"]


def test_a_snapshot_without_a_queue_has_an_empty_one() -> None:
    tail = running_chat()
    tail.feed(queue(queued(3, "a")))
    assert told(tail.reconnect(status("running"), msg(user(1)))) == ["queue"]
    assert told(tail.reconnect(status("running"), msg(user(1)))) == []


def test_the_queue_is_a_fact_told_once_over_a_restart() -> None:
    tail = running_chat()
    tail.feed(queue(queued(3, "a")))
    second = tail.again()
    assert told(second.connect(status("running"), msg(user(1)), queue(queued(3, "a"))), "queue") == []


def test_each_emptying_is_a_fact_of_its_own() -> None:
    tail = running_chat()
    tail.feed(queue(queued(3, "a")), queue(), queue(queued(4, "a")), queue())
    assert told(tail.all, "queue") == ["queue 3", "queue", "queue 4", "queue"]
    assert_no_event_twice(tail.all)


def test_a_reordered_queue_is_told() -> None:
    tail = running_chat()
    tail.feed(queue(queued(3, "a"), queued(4, "b")))
    assert told(tail.feed(queue(queued(4, "b"), queued(3, "a")))) == ["queue 4 3"]


def test_an_entry_that_was_rewritten_is_told() -> None:
    tail = running_chat()
    tail.feed(queue(queued(3, "a")))
    assert told(tail.feed(queue(queued(3, "b")))) == ["queue 3"]
    assert_no_event_twice(tail.all)


@pytest.mark.parametrize("queue_first", [True, False])
def test_a_prompt_from_the_queue_follows_at_once(queue_first: bool) -> None:
    """Message and queue come in either order; with a queue there is no `waiting` between two turns."""
    tail = running_chat()
    tail.feed(queue(queued(3, "next")), msg(assistant(2, "one")))
    promoted = [msg(user(4, "next")), queue()]
    for each in reversed(promoted) if queue_first else promoted:
        tail.feed(each)
        assert tail.wants is None
    tail.feed(status("pending"), status("running"), msg(assistant(5, "two")), status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2", "completed 4 5"]
    kinds = told(tail.all)
    assert kinds.index("completed 1 2") < kinds.index("message 4"), "the old turn stands before the new message"


def test_a_prompt_promoted_over_a_running_turn_interrupts_it() -> None:
    tail = running_chat()
    tail.feed(text("partial"), queue(queued(3, "a"), queued(4, "b")))
    assert tail.feed(queue(queued(3, "a")), msg(user(5, "b")), status("pending"))
    assert tail.wants == "prompt"
    events = tail.answer(user(1), user(5, "b"), status="pending")
    assert told(events)[:3] == ["reset 0 superseded", "interrupted 1", "message 5"]


def test_a_prompt_promoted_out_of_a_dead_end_could_be_an_edit_and_is_not() -> None:
    """`error` with prompts waiting: nothing runs until somebody promotes one, or edits."""
    tail = running_chat()
    tail.feed(queue(queued(3, "next")))
    tail.feed(error("boom"), status("error"))
    tail.feed(msg(user(4, "next")), queue(), status("pending"))
    assert tail.wants == "prompt"
    assert told(tail.answer(user(1), user(4, "next"), status="pending")) == ["message 4", "queue", "status pending"]
    assert tail.wants is None


def test_a_prompt_that_left_the_queue_is_remembered_over_a_restart() -> None:
    tail = running_chat()
    tail.feed(queue(queued(3, "next")), msg(assistant(2, "one")), queue())
    assert len(tail.to_save().left) == 1
    second = tail.again()
    second.connect(status("running"), msg(user(1)), msg(assistant(2, "one")))
    second.feed(msg(user(4, "next")))
    assert second.wants is None
    assert second.to_save().left == ()


def test_only_so_many_prompts_can_be_on_their_way() -> None:
    tail = running_chat()
    for key in range(3, 40):
        tail.feed(queue(queued(key, f"prompt {key}")))
    tail.feed(queue())
    assert len(tail.to_save().left) == 20


def test_an_answer_does_not_bring_a_queue_from_the_future() -> None:
    """Two copies of one queue with another between them leave a consumer that drops copies with the wrong one."""
    tail = running_chat()
    tail.feed(queue(queued(3, "a")))
    tail.feed(msg(user(5, "a")), queue(queued(4, "b")))
    tail.answer(user(1), user(5, "a"))
    tail.feed(queue(queued(4, "b"), queued(6, "c")))
    assert told(tail.all, "queue") == ["queue 3", "queue 4", "queue 4 6"]
    assert_no_event_twice(tail.all)


# --- retries ----------------------------------------------------------------------------------------------------------


def test_a_retry_is_told_with_the_time_of_the_failure() -> None:
    tail = running_chat()
    (one,) = tail.feed(retry(2, kind="overloaded", provider="openai-compat", status_code=503))
    assert one.time == "2026-03-20T18:20:03.901733Z"
    assert data_of(one) == {
        "attempt": 2,
        "delay_ms": 2000,
        "error": "overloaded",
        "retrying_at": "2026-03-20T18:20:05.901733002Z",
        "kind": "overloaded",
        "provider": "openai-compat",
        "status_code": 503,
    }


def test_a_repeated_retry_is_told_once() -> None:
    tail = running_chat()
    tail.feed(retry(1), retry(1))
    tail.reconnect(status("running"), msg(user(1)), retry(1))
    assert told(tail.all, "retry") == ["retry scheduled"]
    second = tail.again()
    second.connect(status("running"), msg(user(1)), retry(1))
    assert told(second.all, "retry") == []


def test_the_first_retry_of_two_steps_is_two_facts() -> None:
    tail = running_chat()
    tail.feed(retry(1), retry(1, "2026-03-20T18:21:05Z"))
    assert len(told(tail.all, "retry")) == 2
    assert_no_event_twice(tail.all)


@pytest.mark.parametrize(
    ("retrying_at", "delay", "time"),
    [
        pytest.param("0001-01-01T00:00:00Z", 1000, "2026-03-20T18:20:00Z", id="Go's zero time: nothing lies before it"),
        pytest.param("2026-03-20T18:20:05Z", 10**20, "2026-03-20T18:20:00Z", id="a delay beyond all time"),
        pytest.param("2026-03-20T20:20:05+02:00", 1000, "2026-03-20T18:20:04Z", id="the server's own zone"),
        pytest.param("soon", 1000, "2026-03-20T18:20:00Z", id="no time at all: that of the receipt"),
        pytest.param("2026-03-20T18:20:05Z", None, "2026-03-20T18:20:05Z", id="no delay"),
        pytest.param("2026-03-20T18:20:05.123456789Z", 0, "2026-03-20T18:20:05.123456Z", id="nanoseconds"),
    ],
)
def test_times_of_a_retry(retrying_at: str, delay: int | None, time: str) -> None:
    tail = running_chat()
    (one,) = tail.feed(retry(1, retrying_at, delay_ms=delay))
    assert one.time == time
    assert data_of(one)["delay_ms"] == (delay or 0)


# --- the chat itself --------------------------------------------------------------------------------------------------

CHAT = {"id": "x", "title": "one", "archived": False, "status": "waiting", "updated_at": "t1", "last_error": None}


def discover(tail: Tail, **changed: object) -> list[str]:
    return told(tail.tail.discovered({**CHAT, **changed}, AT).events)


def test_a_chat_is_created_once() -> None:
    tail = Tail()
    batch = tail.tail.discovered(dict(CHAT), AT)
    assert told(batch.events) == ["lifecycle created"]
    assert data_of(batch.events[0]) == {"chat": CHAT, "changed": ["archived", "id", "title"]}
    assert batch.events[0].origin is Origin.RECONCILE
    assert discover(tail) == []
    assert discover(tail.again()) == []


def test_what_moves_with_every_turn_is_no_change_of_the_chat() -> None:
    tail = Tail()
    discover(tail)
    assert discover(tail, status="running", updated_at="t2", last_error="x", has_unread=True) == []


def test_changes_name_their_fields() -> None:
    tail = Tail()
    discover(tail)
    batch = tail.tail.discovered({**CHAT, "title": "two", "labels": {"a": "b"}}, AT)
    assert told(batch.events) == ["lifecycle updated"]
    assert data_of(batch.events[0])["changed"] == ["labels", "title"]


def test_a_field_that_vanished_changed() -> None:
    tail = Tail()
    discover(tail)
    without = {key: value for key, value in CHAT.items() if key != "title"}
    assert data_of(tail.tail.discovered(without, AT).events[0])["changed"] == ["title"]


def test_archived_unarchived_and_archived_again_are_three_facts() -> None:
    tail = Tail()
    discover(tail)
    kinds = []
    for archived in (True, False, True):
        batch = tail.tail.discovered({**CHAT, "archived": archived}, AT)
        tail.all += batch.events
        kinds += told(batch.events)
        tail = tail if len(kinds) != 2 else _restarted(tail)
    assert kinds == ["lifecycle archived", "lifecycle unarchived", "lifecycle archived"]
    assert_no_event_twice([one for one in tail.all if one.event == "lifecycle"])


def _restarted(tail: Tail) -> Tail:
    second = tail.again()
    second.all = [*tail.all]
    return second


def test_a_chat_found_archived_is_created_and_not_archived_again() -> None:
    tail = Tail()
    assert discover(tail, archived=True) == ["lifecycle created"]
    assert discover(tail, archived=True) == []
    assert discover(tail, archived=False) == ["lifecycle unarchived"]


def test_the_same_change_has_the_same_id_in_every_life() -> None:
    first = Tail()
    discover(first)
    saved = first.to_save()
    changed = {**CHAT, "title": "two"}
    lives = [first, first.again(saved=saved), Tail(saved, session=7)]
    assert len({life.tail.discovered(changed, AT).events[0].id for life in lives}) == 1


def test_after_a_crash_the_chat_is_told_as_it_is_though_nothing_changed() -> None:
    """Archived, which was told and not saved; then unarchived while nobody looked; then archived again."""
    first = Tail()
    discover(first)
    saved = first.to_save()
    archived = {**CHAT, "archived": True}
    (lost,) = first.tail.discovered(archived, AT).events
    second = first.again(saved=saved, clean=False)
    restated = stated_anew(second)
    assert told([restated]) == ["lifecycle updated"]
    assert data_of(restated) == {"chat": CHAT, "changed": []}
    assert discover(second) == []
    (again,) = second.again().tail.discovered(archived, AT).events
    assert told([again]) == ["lifecycle archived"]
    assert len({lost.id, restated.id, again.id}) == 3
    assert stated_anew(second.again(clean=False)).id != restated.id


def stated_anew(tail: Tail) -> Event:
    """The chat as it is told to those that hold what a session before may have told, behind its history."""
    assert discover(tail) == []
    events = tail.connect(status("waiting"), msg(user(1)))
    assert [one.event for one in events if one.event in ("history", "lifecycle")] == ["history", "lifecycle"]
    return next(one for one in events if one.event == "lifecycle")


def test_a_chat_that_cannot_be_read_after_a_crash_is_not_told_with_each_attempt() -> None:
    first = Tail()
    discover(first)
    second = first.again(clean=False)
    for _ in range(3):
        assert discover(second) == []
        second = second.again(clean=False)
    assert told([stated_anew(second)]) == ["lifecycle updated"]


def test_a_chat_whose_history_has_not_changed_is_told_as_it_is_too() -> None:
    """From 2.35 on a server that is asked for what came after a revision may say: nothing."""
    first = Tail()
    discover(first)
    first.connect(msg(user(1)), status("waiting", 3), PREVIEW_RESET)
    second = first.again(clean=False)
    assert discover(second) == []
    assert told(second.connect(status("waiting", 3), PREVIEW_RESET), "history", "lifecycle") == ["lifecycle updated"]


def test_after_a_crash_a_change_that_stands_is_told_under_its_old_id() -> None:
    first = Tail()
    discover(first)
    saved = first.to_save()
    archived = {**CHAT, "archived": True}
    (lost,) = first.tail.discovered(archived, AT).events
    second = first.again(saved=saved, clean=False)
    assert [one.id for one in second.tail.discovered(archived, AT).events] == [lost.id]
    assert discover(second, archived=True) == []


def test_a_chat_that_was_gone_and_is_there_again_begins_anew() -> None:
    tail = Tail()
    first = tail.tail.discovered(dict(CHAT), AT).events
    tail.tail.gone(dict(CHAT), AT)
    (again,) = tail.again().tail.discovered(dict(CHAT), AT).events
    assert told([again]) == ["lifecycle created"]
    assert again.id != first[0].id


def test_gone_says_so_with_what_was_known_last() -> None:
    tail = Tail()
    discover(tail)
    (one,) = tail.tail.gone(dict(CHAT), AT).events
    assert told([one]) == ["lifecycle gone"]
    assert data_of(one) == {"chat": CHAT, "changed": []}


def test_coming_back_and_going_again_is_another_fact() -> None:
    tail = Tail()
    first = tail.tail.gone(dict(CHAT), AT).events
    again = tail.again()
    again.tail.discovered(dict(CHAT), AT)
    second = again.tail.gone(dict(CHAT), AT).events
    assert first[0].id != second[0].id


def test_a_chat_that_is_gone_is_gone_once() -> None:
    tail = Tail()
    tail.tail.gone(dict(CHAT), AT)
    assert tail.again().tail.gone(dict(CHAT), AT).events == []


# --- what a follower asks ---------------------------------------------------------------------------------------------


def test_a_chat_in_doubt_is_not_idle() -> None:
    tail = running_chat()
    tail.feed(msg(assistant(2, "one")), status("waiting"))
    assert tail.is_idle()
    tail.feed(msg(user(3)), queue(), status("waiting"))
    tail.tail.disconnected()
    assert not tail.is_idle()


def test_a_chat_without_a_connection_is_neither_idle_nor_running() -> None:
    tail = running_chat()
    assert tail.is_running()
    tail.tail.disconnected()
    assert not tail.is_running()
    assert not tail.is_idle()


def test_positions_count_every_event_of_the_session() -> None:
    tail = running_chat()
    tail.feed(text("a"), event("novelty"), msg(assistant(2, "a")), status("waiting"))
    assert [one.position for one in tail.all] == list(range(1, len(tail.all) + 1))
    assert {one.session for one in tail.all} == {1}


def test_parts_of_a_prompt_are_no_calls() -> None:
    """A prompt may hold files."""
    tail = Tail()
    raw = user(1)
    raw["content"] = [part("file", media_type="text/plain"), part("text", "see file")]
    (one, *_) = tail.connect(status("running"), msg(raw))
    assert data_of(one)["text"] == "see file"


def test_an_old_error_status_does_not_fail_a_turn_that_rest_told_first() -> None:
    """REST was ahead of the stream (it was down for a minute): the status is of a turn long over."""
    tail = running_chat()
    tail.feed(msg(user(3)))
    tail.answer(user(1), user(3), user(5), status="running")  # 3 failed meanwhile, 5 was sent
    tail.feed(status("pending"), status("running"), error("boom"), status("error"))
    tail.feed(msg(user(5)), status("pending"), status("running"), msg(assistant(6, "well")), status("waiting"))
    assert told(tail.all, "turn")[-1] == "completed 5 6"


def test_an_old_error_status_in_a_snapshot_that_rest_overtook() -> None:
    """The snapshot could not prove itself; the next prompt came before REST was read."""
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)), msg(assistant(2, "a")), msg(user(3)), msg(assistant(4, "b")))
    tail.reconnect(status("error"), msg(user(7)))
    tail.answer(user(1), assistant(2, "a"), user(7), user(9), status="pending")
    tail.feed(msg(user(9)), status("pending"), status("running"), msg(assistant(10, "well")), status("waiting"))
    assert told(tail.all, "turn")[-1] == "completed 9 10"


def test_a_queue_emptied_while_the_follower_was_dead_is_told_empty() -> None:
    """The queue that was told was not saved."""
    first = running_chat()
    saved = first.to_save()
    first.feed(queue(queued(3, "a")))
    second = first.again(clean=False, saved=saved)
    second.connect(status("running"), msg(user(1)))
    assert told(second.all, "queue") == ["queue"]


def test_an_old_idle_status_does_not_settle_a_turn_that_rest_told_first() -> None:
    tail = running_chat()
    tail.feed(msg(user(3)))
    tail.answer(user(1), user(3), user(5), status="running")
    tail.feed(status("pending"), status("running"), status("waiting"))
    assert not tail.is_settling()
    tail.feed(msg(user(5)), status("pending"), status("running"), status("waiting"))
    assert tail.is_settling()


def test_the_queue_of_a_crash_is_told_once() -> None:
    second = running_chat().again(clean=False)
    second.connect(status("running"), msg(user(1)))
    second.reconnect(status("running"), msg(user(1)))
    assert told(second.all, "queue") == ["queue"]


def test_the_error_of_one_turn_is_not_that_of_the_next() -> None:
    tail = running_chat()
    tail.feed(error("first"), status("error"), msg(user(3)), status("error"))
    assert tail.is_settling()
    tail.settle()
    events = tail.answer(user(1), user(3), status="error", last_error="second")
    assert told(events) == ["error turn: second", "failed 3"]


def test_an_old_error_is_told_of_the_turn_that_it_ended() -> None:
    tail = running_chat()
    tail.feed(msg(user(3)))
    tail.answer(user(1), user(3), user(5), status="running")
    (one,) = tail.feed(error("old"))
    assert one.id == event_id(REF, "error", 3)
    tail.feed(msg(user(5)), status("error"))
    tail.settle()
    assert told(tail.answer(user(1), user(3), user(5), status="error", last_error="new"), "turn", "error") == [
        "error turn: new",
        "failed 5",
    ]


def test_a_status_counts_for_a_prompt_that_lies_behind_the_cursor() -> None:
    """It will not be shown again."""
    tail = running_chat()
    tail.feed(msg(user(3)))
    tail.answer(user(1), user(3), user(5), status="running")
    tail.tail.disconnected()
    tail.connect(status("waiting"), after=tail.tail.beyond)
    assert tail.is_settling()


def test_a_turn_that_failed_before_a_restart_and_was_followed_by_another_during_it() -> None:
    first = running_chat()
    first.feed(status("error"))
    second = first.again()
    second.connect(status("running"), msg(user(1)), msg(user(3)))
    assert told(second.all, "turn") == ["failed 1"]


def test_an_error_told_before_a_restart_is_not_told_again() -> None:
    first = running_chat()
    first.feed(error("boom"))
    second = first.again()
    second.connect(status("running"), msg(user(1)))
    assert told(second.feed(error("boom"))) == []
