"""Live text from servers that number their parts: what is told of parts that come again, late, or never."""

import pytest

from tests.core.frames import (
    PREVIEW_RESET,
    Json,
    Tail,
    assistant,
    call,
    compaction,
    error,
    interrupted,
    msg,
    numbered,
    part,
    queue,
    result,
    retry,
    status,
    text,
    told,
    tool,
    user,
    words,
)
from tests.core.laws import assert_honest_previews


def running() -> Tail:
    tail = Tail()
    tail.connect(msg(user(1)), status("running"), PREVIEW_RESET)
    return tail


def previews(tail: Tail) -> list[str]:
    return told(tail.all, "preview")


def lost(tail: Tail, *then: Json | list[Json]) -> None:
    """The connection ends, and the next one begins with the state of a running chat."""
    tail.reconnect(msg(user(1)), status("running"), PREVIEW_RESET)
    if then:
        tail.feed(*then)


# --- plain progress ---------------------------------------------------------------------------------------------------


def test_each_part_goes_on_where_the_last_one_ended() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "Let ", "me"))
    tail.feed(words((1, 1), 3, " look"))
    assert previews(tail) == ["text 0+0 Let", "text 0+4 me", "text 0+6  look"]


def test_a_step_ends_in_its_message_and_the_next_one_has_another_number() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(msg(assistant(2, "a")), PREVIEW_RESET)
    assert tail.batch.ended == [0]
    tail.feed(words((3, 1), 1, "b"))
    assert previews(tail) == ["text 0+0 a", "text 1+0 b"]


def test_arguments_are_told_piece_by_piece_and_then_whole() -> None:
    tail = running()
    tail.feed(numbered((1, 1), 1, call("c", args_delta='{"x"'), call("c", args_delta=": 1}"), call("c", args={"x": 1})))
    assert previews(tail) == ['tool-call 0+0 {"x"', "tool-call 0+4 : 1}", "tool-call 0+8 c"]


def test_a_result_belongs_to_the_step_that_called_for_it() -> None:
    """Tools run when the message is stored, as an episode of their own."""
    tail = running()
    tail.feed(numbered((1, 1), 1, call("c", args={}), call("d", args={})))
    tail.feed(msg(assistant(2, "", call("c", args={}), call("d", args={}))), PREVIEW_RESET)
    tail.feed(numbered((4, 1), 1, result("c"), result("d")))
    tail.feed(msg(tool(3, "c")), msg(tool(4, "d")), PREVIEW_RESET)
    tail.feed(words((6, 1), 1, "done"))
    assert previews(tail)[2:] == ["tool-result 0+0 c", "tool-result 0+1 d", "text 1+0 done"]
    assert "reset" not in " ".join(previews(tail))


def test_a_result_of_a_step_that_nobody_was_told_of_is_left_out() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), msg(assistant(2, "", call("c", args={}))), status("running"), PREVIEW_RESET)
    tail.feed(numbered((4, 1), 1, result("c")), numbered((4, 1), 2, part("text", "done")))
    assert previews(tail) == ["text 0+0 done"]
    assert tail.tail.dropped_parts == 1


def test_compaction_is_no_live_text_of_anybody_and_leaves_no_hole() -> None:
    tail = running()
    fields = {"tool_call_id": "chat_summarized_1", "tool_name": "chat_summarized"}
    tail.feed(numbered((1, 1), 1, part("tool-call", args={}, **fields), part("text", "a")))
    tail.feed(*(msg(raw) for raw in compaction(2)), PREVIEW_RESET)
    assert previews(tail) == ["text 0+0 a"]


# --- again ------------------------------------------------------------------------------------------------------------


def test_what_was_told_is_known_by_its_number() -> None:
    tail = running()
    tail.feed(words((7, 1), 1, "a ", "a "))
    lost(tail, words((7, 1), 1, "a ", "a ", "a "))
    assert previews(tail) == ["text 0+0 a", "text 0+2 a", "text 0+4 a"]
    assert tail.tail.dropped_parts == 2


def test_parts_of_a_step_that_is_stored_are_late() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(msg(assistant(2, "ab")), PREVIEW_RESET)
    tail.feed(words((1, 1), 2, "b"))
    assert previews(tail) == ["text 0+0 a"]


def test_a_session_that_begins_in_the_middle_of_a_step_tells_all_of_it() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a", "b"))
    second = tail.again()
    lost(second, words((1, 1), 1, "a", "b", "c"))
    assert previews(second) == ["text 0+0 a", "text 0+1 b", "text 0+2 c"]


def test_an_interrupted_step_may_be_stored_in_many_pieces() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a ", "b "))
    stored = interrupted(2, "", part("text", "a "), part("text", "b "))
    tail.feed(msg(stored), status("waiting"), PREVIEW_RESET)
    assert previews(tail) == ["text 0+0 a", "text 0+2 b"]
    assert assert_honest_previews(tail.all).equal == 1


# --- never ------------------------------------------------------------------------------------------------------------


def test_a_hole_takes_the_step_back_and_the_next_connection_tells_it_anew() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a "))
    tail.feed(words((1, 1), 3, "c "))
    assert previews(tail)[-1] == "reset 0 gap"
    assert tail.gives_up() == "gap"
    assert tail.batch.gaps == 1
    tail.feed(words((1, 1), 4, "d "))
    lost(tail, words((1, 1), 1, "a ", "b ", "c "))
    assert tail.gives_up() is None
    assert previews(tail)[1:] == ["reset 0 gap", "text 0+0 a", "text 0+2 b", "text 0+4 c"]


def test_a_step_whose_first_part_is_missing_is_told_by_the_next_connection() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"), msg(assistant(2, "a")), PREVIEW_RESET)
    tail.feed(words((3, 1), 2, "c"))
    assert tail.gives_up() == "gap"
    lost(tail, words((3, 1), 1, "b", "c"))
    assert previews(tail) == ["text 0+0 a", "text 1+0 b", "text 1+1 c"]


def test_a_hole_that_is_still_there_after_a_reconnect_is_no_reason_for_another() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a "))
    lost(tail, words((1, 1), 5, "e "))
    assert tail.gives_up() is None
    tail.feed(words((1, 1), 6, "f "))
    assert tail.gives_up() is None
    assert previews(tail) == ["text 0+0 a", "reset 0 gap"]
    tail.feed(msg(assistant(2, "a b c d e f ")), PREVIEW_RESET)
    tail.feed(words((3, 1), 1, "next"))
    assert previews(tail)[2:] == ["text 1+0 next"]


def test_parts_that_end_at_the_servers_limit_are_a_prefix() -> None:
    """The row says 1 MB per step: the message is longer than what was told, and no reset is needed."""
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(msg(assistant(2, "abc")), PREVIEW_RESET)
    assert previews(tail) == ["text 0+0 a"]


def test_a_message_that_says_something_else_takes_the_step_back() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(msg(assistant(2, "z")), PREVIEW_RESET)
    assert previews(tail) == ["text 0+0 a", "reset 0 gap"]


def test_a_history_that_moved_on_without_the_steps_message_supersedes_it() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(words((5, 1), 1, "b"))
    assert previews(tail) == ["text 0+0 a", "reset 0 superseded", "text 1+0 b"]


def test_an_empty_part_tells_nothing_and_leaves_no_hole() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a", "", "b"))
    assert previews(tail) == ["text 0+0 a", "text 0+1 b"]


# --- another attempt --------------------------------------------------------------------------------------------------


def test_a_retry_takes_the_attempt_back_and_keeps_the_step() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(retry(1))
    tail.feed(PREVIEW_RESET)
    tail.feed(words((1, 2), 1, "b"))
    assert previews(tail) == ["text 0+0 a", "reset 0 retry", "text 0+0 b"]


@pytest.mark.parametrize("known", [True, False])
def test_during_a_back_off_the_failed_attempt_is_still_told_to_who_joins(known: bool) -> None:
    """Retry, reset, and then the parts of the attempt that failed."""
    tail = Tail()
    if known:
        tail = running()
        tail.feed(words((1, 1), 1, "a"), retry(1))
        assert previews(tail) == ["text 0+0 a", "reset 0 retry"]
        tail.tail.disconnected()
    tail.connect(msg(user(1)), status("running"), retry(1), PREVIEW_RESET)
    tail.feed(words((1, 1), 1, "a", "b"))
    tail.feed(PREVIEW_RESET)
    tail.feed(words((1, 2), 1, "c"))
    assert previews(tail)[2 * known :] == ["text 0+0 c"]


def test_a_retry_that_was_told_in_another_session_voids_its_attempt_too() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"), retry(1))
    second = tail.again()
    second.connect(msg(user(1)), status("running"), retry(1), PREVIEW_RESET)
    second.feed(words((1, 1), 1, "a"))
    assert told(second.all, "retry", "preview") == []


def test_an_attempt_voided_before_it_said_anything_does_not_void_the_next_history() -> None:
    tail = running()
    tail.feed(retry(1))
    tail.feed(PREVIEW_RESET, words((1, 2), 1, "a"))
    tail.feed(msg(assistant(2, "a", call("c", args={}))), PREVIEW_RESET)
    tail.feed(words((3, 1), 1, "b"))
    assert previews(tail) == ["text 0+0 a", "text 1+0 b"]


def test_an_attempt_that_said_nothing_at_all_does_not_void_the_next_step() -> None:
    tail = running()
    tail.feed(retry(1))
    tail.feed(msg(assistant(2, "", call("c", args={}))), PREVIEW_RESET)
    tail.feed(words((3, 1), 1, "b"))
    assert previews(tail) == ["text 0+0 b"]


def test_a_retry_of_a_compaction_does_not_void_the_next_step() -> None:
    tail = running()
    tail.feed(retry(1))
    tail.feed(*(msg(raw) for raw in compaction(2)), PREVIEW_RESET)
    tail.feed(words((4, 1), 1, "b"))
    assert previews(tail) == ["text 0+0 b"]


def test_a_retry_of_a_run_without_a_prompt_does_not_void_the_next_turn() -> None:
    tail = Tail()
    tail.connect(msg(user(1)), msg(assistant(2, "a")), status("waiting"), PREVIEW_RESET)
    tail.feed(status("running"), PREVIEW_RESET)
    tail.feed(retry(1))
    tail.feed(status("error"), error("boom"))
    tail.feed(msg(user(5)), status("running"), PREVIEW_RESET)
    tail.feed(words((9, 1), 1, "b"))
    assert previews(tail) == ["text 0+0 b"]


def test_a_retry_voids_the_newest_attempt_whatever_its_number() -> None:
    """The server counts retries from 1; a restart of it is an attempt more."""
    tail = running()
    tail.feed(words((1, 2), 1, "a"))
    tail.feed(retry(1))
    lost(tail, words((1, 2), 1, "a", "b"))
    assert previews(tail) == ["text 0+0 a", "reset 0 retry"]


def test_an_old_retry_told_again_does_not_void_the_attempt_that_followed() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"), retry(1))
    tail.feed(PREVIEW_RESET, words((1, 2), 1, "b"))
    tail.reconnect(msg(user(1)), status("running"), retry(1), PREVIEW_RESET)
    tail.feed(words((1, 2), 1, "b", "c"))
    assert previews(tail)[2:] == ["text 0+0 b", "text 0+1 c"]


def test_a_late_part_of_an_attempt_that_was_replaced_is_left_out() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(words((1, 2), 1, "b"))
    tail.feed(words((1, 1), 2, "x"))
    assert previews(tail) == ["text 0+0 a", "reset 0 retry", "text 0+0 b"]


def test_a_server_that_was_restarted_begins_another_attempt() -> None:
    """Without a `retry`: a new process goes on with the chat."""
    tail = running()
    tail.feed(words((7, 1), 1, "a ", "b "))
    lost(tail, words((7, 2), 1, "a ", "x "))
    assert previews(tail)[2:] == ["reset 0 retry", "text 0+0 a", "text 0+2 x"]


def test_a_step_without_a_message_is_superseded_when_its_turn_ends() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"))
    tail.feed(status("error"), error("boom"), PREVIEW_RESET)
    assert told(tail.all, "preview", "turn") == ["text 0+0 a", "reset 0 superseded", "failed 1"]
    tail.feed(words((1, 1), 2, "late"))
    tail.feed(msg(user(5)), queue(), status("running"), PREVIEW_RESET, words((9, 1), 1, "b"))
    assert previews(tail)[2:] == ["text 1+0 b"]


def test_parts_without_a_number_between_numbered_ones_cannot_be_placed() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a"), text("?"))
    assert previews(tail) == ["text 0+0 a"]


# --- two ages of servers behind one address ---------------------------------------------------------------------------


def test_a_server_that_is_replaced_by_a_newer_one_in_the_middle_of_a_step() -> None:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    tail.feed(text("a ", "b "))
    lost(tail, words((2, 2), 1, "a ", "c "))
    assert previews(tail) == ["text 0+0 a", "text 0+2 b", "reset 0 reconnect", "text 1+0 a", "text 1+2 c"]


def test_a_server_that_is_replaced_by_an_older_one_in_the_middle_of_a_step() -> None:
    tail = running()
    tail.feed(words((1, 1), 1, "a ", "b "))
    tail.reconnect(status("running"), text("a "), msg(user(1)))
    tail.feed(text("c "))
    assert previews(tail) == ["text 0+0 a", "text 0+2 b", "reset 0 reconnect", "text 1+0 a", "text 1+2 c"]
