"""Live text: what is told of parts that come early, late, twice, or never."""

from dataclasses import replace
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from relay.core.events import Event
from relay.core.preview import Muting, coalesce, shed
from tests.core.frames import (
    Json,
    Tail,
    assistant,
    call,
    compaction,
    interrupted,
    live,
    message,
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
from tests.core.laws import data_of


def running() -> Tail:
    tail = Tail()
    tail.connect(status("running"), msg(user(1)))
    return tail


def delta(id_: str, piece: str) -> Json:
    return call(id_, args_delta=piece)


def whole(id_: str) -> Json:
    return call(id_, args={})


# --- plain progress ---------------------------------------------------------------------------------------------------


def test_each_fragment_goes_on_where_the_last_one_ended() -> None:
    tail = running()
    tail.feed(text("Let ", "me"), text(" look"))
    assert told(tail.all, "preview") == ["text 0+0 Let", "text 0+4 me", "text 0+6  look"]
    assert data_of(tail.all[-1])["role"] == "assistant"


def test_offsets_count_code_points_of_one_kind() -> None:
    tail = running()
    tail.feed(
        live(part("reasoning", "\U0001f914"), part("text", "e\u0301"), part("reasoning", "b"), part("text", "\x00"))
    )
    assert [data_of(one)["offset"] for one in tail.all if one.event == "preview"] == [0, 0, 1, 2]


def test_an_empty_delta_tells_nothing() -> None:
    tail = running()
    assert tail.feed(live(part("reasoning", ""), part("text", ""))) == []


def test_a_text_that_is_null_tells_nothing() -> None:
    tail = running()
    assert tail.feed(live({**part("text"), "text": None})) == []


def test_a_part_is_told_as_upstream_sent_it() -> None:
    tail = running()
    sent = {**part("text", "a"), "from_the_future": [1]}
    (one,) = tail.feed(live(sent))
    assert data_of(one)["part"] == sent


def test_fragments_of_arguments_and_then_the_whole() -> None:
    """The whole repeats the fragments: its offset says how much of it was told."""
    tail = running()
    tail.feed(live(delta("a", '{"x"'), delta("b", "{"), delta("a", ":1}"), whole("a"), result("a")))
    assert told(tail.all, "preview") == [
        'tool-call 0+0 {"x"',
        "tool-call 0+0 {",
        "tool-call 0+4 :1}",
        "tool-call 0+7 a",
        "tool-result 0+0 a",
    ]
    assert data_of(tail.all[-1])["role"] == "tool"


def test_arguments_that_are_null_are_not_the_whole() -> None:
    """A key says nothing: parts carry keys without a value."""
    tail = running()
    tail.feed(live(call("c", args=None, args_delta='{"x"'), call("c", args=None, args_delta=":1}"), whole("c")))
    assert told(tail.all, "preview") == ['tool-call 0+0 {"x"', "tool-call 0+4 :1}", "tool-call 0+7 c"]
    joined = coalesce(one for one in tail.all if one.event == "preview")
    assert told(joined) == ['tool-call 0+0 {"x":1}', "tool-call 0+7 c"]


def test_whole_parts_are_counted_by_kind() -> None:
    tail = running()
    tail.feed(live(part("source", url="u1"), part("source", url="u2"), part("file", media_type="x")))
    assert told(tail.all, "preview") == ["source 0+0", "source 0+1", "file 0+0"]


@pytest.mark.parametrize("kind", ["diagram", "reset", "other", "tool.call", "", "\ud800"])
def test_a_part_of_an_unknown_type_is_other(kind: str) -> None:
    tail = running()
    (one,) = tail.feed(live(part(kind, "x")))
    assert one.detail == "other"
    assert data_of(one)["part"]["type"] == kind


@pytest.mark.parametrize("kind", ["text", "reasoning", "tool-call", "tool-result", "source", "file", "file-reference"])
def test_a_part_of_a_known_type_has_it_as_detail(kind: str) -> None:
    (one,) = running().feed(live(part(kind, "x")))
    assert one.detail == kind


def test_steps_count_up_within_the_session() -> None:
    tail = running()
    tail.feed(text("one"), msg(assistant(2, "one")), status("waiting"))
    tail.feed(msg(user(3)), status("running"), text("two"), msg(assistant(4, "two")), status("waiting"))
    assert told(tail.all, "preview") == ["text 0+0 one", "text 1+0 two"]


def test_a_step_that_ends_in_its_message_is_not_taken_back() -> None:
    tail = running()
    tail.feed(text("on"), msg(assistant(2, "one")), status("waiting"))
    assert told(tail.all, "preview") == ["text 0+0 on"]
    assert tail.batch.ended == [0]


# --- which step -------------------------------------------------------------------------------------------------------


def test_parts_behind_a_tool_result_are_the_next_step() -> None:
    """They overtake the messages of the step before, at every tenth boundary."""
    tail = running()
    tail.feed(live(part("text", "Look."), whole("c"), result("c"), part("text", "The")))
    tail.feed(msg(assistant(2, "Look.", call("c"))), msg(tool(3, "c")), text(" end"), msg(assistant(4, "The end")))
    assert told(tail.all, "preview", "message")[1:] == [
        "text 0+0 Look.",
        "tool-call 0+0 c",
        "tool-result 0+0 c",
        "text 1+0 The",
        "message 2",
        "message 3",
        "text 1+3  end",
        "message 4",
    ]


def test_results_of_two_tools_belong_to_the_step_of_their_calls() -> None:
    tail = running()
    tail.feed(live(whole("a"), whole("b"), result("a")), text("next"), live(result("b")))
    assert told(tail.all, "preview") == [
        "tool-call 0+0 a",
        "tool-call 0+0 b",
        "tool-result 0+0 a",
        "text 1+0 next",
        "tool-result 0+1 b",
    ]


def test_tools_that_the_provider_ran_do_not_end_a_step() -> None:
    own = {"provider_executed": True}
    tail = running()
    tail.feed(live(call("w", args={}, **own), result("w", **own), part("source", url="u"), part("text", "found")))
    assert {data_of(one)["step"] for one in tail.all if one.event == "preview"} == {0}
    tail.feed(msg(assistant(2, "found", call("w", **own), result("w", **own))), status("waiting"))
    assert told(tail.all, "turn") == ["completed 1 2"]


def test_the_message_of_a_step_whose_parts_never_came_leaves_the_next_one_alone() -> None:
    tail = running()
    tail.feed(live(whole("a"), result("a"), part("text", "then"), whole("b")))
    tail.feed(msg(assistant(2, "lost", call("x"))), msg(tool(3, "x")))
    assert told(tail.all, "preview")[-1] == "tool-call 1+0 b", "nothing was taken back"
    tail.feed(msg(assistant(4, "", call("a"))), msg(tool(5, "a")), msg(assistant(6, "then", call("b"))))
    assert "gap" not in " ".join(told(tail.all, "preview"))


def test_a_call_that_never_became_json_does_not_keep_its_step() -> None:
    """Fragments were streamed, no call is in the message and no result follows."""
    tail = running()
    tail.feed(text("Well"), live(delta("a", "{nope")), msg(assistant(2, "Well")), text("Next"))
    assert told(tail.all, "preview")[-1] == "text 1+0 Next"


def test_parts_of_compaction_are_no_live_text() -> None:
    tail = running()
    name = {"tool_call_id": "chat_summarized_1", "tool_name": "chat_summarized"}
    one, two = compaction(3)
    tail.feed(text("half"), msg(assistant(2, "half")))
    assert told(tail.feed(live(part("tool-call", **name)), msg(one), msg(two), live(part("tool-result", **name)))) == [
        "message 3",
        "message 4",
    ]
    tail.feed(text("rest"), msg(assistant(6, "rest")))
    assert told(tail.all, "preview") == ["text 0+0 half", "text 1+0 rest"]


def test_the_messages_of_a_compaction_end_no_step() -> None:
    tail = running()
    one, two = compaction(3)
    tail.feed(text("still "), msg(one), msg(two), text("going"))
    assert told(tail.all, "preview") == ["text 0+0 still", "text 0+6 going"]


# --- late parts -------------------------------------------------------------------------------------------------------


def test_text_behind_its_message_is_dropped() -> None:
    tail = running()
    tail.feed(text("Hel"), msg(assistant(2, "Hello you", call("c"))))
    assert tail.feed(text("lo ", "you")) == []
    assert tail.tail.dropped_parts == 2
    tail.feed(msg(tool(3, "c")), text("lo"))
    assert told(tail.all, "preview") == ["text 0+0 Hel", "text 1+0 lo"], "the rest is used up"


def test_what_only_began_like_the_rest_is_the_next_step() -> None:
    tail = running()
    tail.feed(text("Hel"), msg(assistant(2, "Hello you", call("c"))), msg(tool(3, "c")))
    assert tail.feed(text("lo ")) == []
    assert told(tail.feed(text("there"))) == ["text 1+0 lo", "text 1+3 there"]


def test_what_was_held_is_told_before_its_own_message() -> None:
    tail = running()
    tail.feed(text("Hel"), msg(assistant(2, "Hello", call("c"))), msg(tool(3, "c")), text("l"))
    assert told(tail.feed(msg(assistant(4, "l")))) == ["text 1+0 l", "message 4"]


def test_late_reasoning_is_dropped_too() -> None:
    tail = running()
    tail.feed(live(part("reasoning", "be")), msg(assistant(2, "", call("c"), reasoning="because")))
    assert tail.feed(live(part("reasoning", "cause"))) == []


def test_a_late_tool_result_is_dropped() -> None:
    """About 1 in 100, under load."""
    tail = running()
    tail.feed(live(whole("c")), msg(assistant(2, "", call("c"))), msg(tool(3, "c")))
    assert tail.feed(live(result("c"))) == []
    assert told(tail.feed(text("next"))) == ["text 1+0 next"]


def test_a_tool_result_later_than_its_turn_is_dropped() -> None:
    tail = running()
    tail.feed(live(whole("c")), msg(assistant(2, "", call("c"))), msg(tool(3, "c")), msg(assistant(4, "end")))
    tail.feed(status("waiting"), msg(user(5)), status("running"))
    assert tail.feed(live(result("c"))) == []


def test_a_part_behind_the_end_of_the_turn_is_ignored() -> None:
    tail = running()
    tail.feed(text("one"), msg(assistant(2, "one")), status("waiting"))
    assert tail.feed(text("more")) == []
    assert told(tail.feed(msg(user(3)), status("running"), text("two")), "preview") == ["text 1+0 two"]


def test_a_part_just_before_running_belongs_to_the_run() -> None:
    tail = Tail()
    tail.connect(status("pending"), msg(user(1)))
    assert tail.feed(text("Hel")) == []
    assert told(tail.feed(status("running"), text("lo"))) == ["status running", "text 0+0 Hel", "text 0+3 lo"]


@pytest.mark.parametrize("ending", [status("waiting"), msg(user(5))])
def test_parts_before_running_are_discarded_with_what_they_waited_for(ending: Json) -> None:
    tail = running()
    tail.feed(msg(assistant(2, "one")), status("waiting"), msg(user(3)), status("pending"), text("old"))
    tail.feed(status("pending"), ending)
    if tail.wants:
        tail.answer(user(1), assistant(2, "one"), user(3), user(5))
    assert told(tail.feed(status("running")), "preview") == []


# --- taken back -------------------------------------------------------------------------------------------------------


def test_a_retry_voids_the_attempt_and_keeps_the_step() -> None:
    tail = running()
    tail.feed(text("It is"), retry(1), text("It is a"), msg(assistant(2, "It is a")))
    assert told(tail.all, "preview") == ["text 0+0 It is", "reset 0 retry", "text 0+0 It is a"]


def test_a_retry_before_any_part_takes_nothing_back() -> None:
    tail = running()
    tail.feed(retry(1), retry(2, "2026-03-20T18:21:00Z"), text("Now"))
    assert told(tail.all, "preview") == ["text 0+0 Now"]


def test_a_retry_of_the_next_step_leaves_the_one_before_alone() -> None:
    tail = running()
    tail.feed(live(whole("c"), result("c")), retry(1))
    assert told(tail.all, "preview") == ["tool-call 0+0 c", "tool-result 0+0 c"]


def test_the_calls_of_a_failed_attempt_are_forgotten() -> None:
    tail = running()
    tail.feed(live(whole("c1")), retry(1), text("x"))
    tail.feed(msg(assistant(2, "x", call("c2"))), msg(tool(3, "c2")), text("y"), msg(assistant(4, "y")))
    assert told(tail.all, "preview") == ["tool-call 0+0 c1", "reset 0 retry", "text 0+0 x", "text 1+0 y"]


def test_text_that_upstream_lost_is_taken_back_when_the_message_shows_it() -> None:
    tail = running()
    tail.feed(text("the ", "follows"))
    events = tail.feed(msg(assistant(2, "the relay follows")))
    assert told(events) == ["reset 0 gap", "message 2"]
    assert tail.batch.gaps == 1


def test_reasoning_may_lack_its_first_chunk() -> None:
    """The provider keeps it; that is no gap."""
    tail = running()
    tail.feed(live(part("reasoning", "cause")), msg(assistant(2, "so", reasoning="because")))
    assert told(tail.all, "preview") == ["reasoning 0+0 cause"]
    tail.feed(live(part("reasoning", "other")), msg(assistant(3, "", reasoning="because")))
    assert told(tail.all, "preview")[-1] == "reset 1 gap"


@pytest.mark.parametrize(
    ("pieces", "takes_back"),
    [
        pytest.param(['{"path":"a', 'c"}'], True, id="a fragment in the middle was lost"),
        pytest.param(['{"path":"a', 'bc"}'], False, id="all came"),
        pytest.param(['{ "path" : "a', 'bc" }\n'], False, id="written in another way"),
        pytest.param(['{"path":"a'], False, id="the rest is late or lost"),
        pytest.param([""], False, id="nothing"),
    ],
)
def test_arguments_that_are_not_those_of_the_message_are_taken_back(pieces: list[str], *, takes_back: bool) -> None:
    tail = running()
    tail.feed(live(*(delta("c", piece) for piece in pieces)))
    events = tail.feed(msg(assistant(2, "", call("c", args={"path": "abc"}))))
    assert told(events) == [*(["reset 0 gap"] if takes_back else []), "message 2"]


def test_of_several_calls_each_has_its_own_arguments() -> None:
    tail = running()
    tail.feed(live(delta("c", '{"x":1}'), delta("d", '{"x":2}'), delta("e", "2}")))
    calls = (call("c", args={"x": 1}), call("d", args={"x": 2}), call("e", args={"x": 2}), call("f", args={}))
    assert told(tail.feed(msg(assistant(2, "", *calls)))) == ["message 2"]


def test_a_step_that_died_without_its_message_is_superseded() -> None:
    tail = running()
    tail.feed(text("par"), queue(queued(3, "next")), msg(user(4, "next")))
    tail.answer(user(1), user(4, "next"))
    assert told(tail.all, "preview", "turn") == ["text 0+0 par", "reset 0 superseded", "interrupted 1"]


def test_steps_before_the_one_whose_message_came_are_superseded() -> None:
    """A snapshot may begin with parts of a run that was edited away."""
    tail = Tail()
    old = live(part("text", "Old"), whole("a"), result("a"), part("text", "half of an old ans"))
    tail.connect(status("running"), msg(user(1)), old)
    tail.feed(text("New"), live(whole("b"), result("b")), msg(assistant(2, "New", call("b"))), msg(tool(3, "b")))
    tail.feed(text("Next"), msg(assistant(4, "Next")))
    assert told(tail.all, "preview", "message")[-6:] == [
        "reset 0 superseded",
        "reset 1 gap",
        "message 2",
        "message 3",
        "text 2+0 Next",
        "message 4",
    ]


def test_a_step_of_which_nothing_was_told_is_not_taken_back() -> None:
    tail = running()
    tail.feed(live(part("text", "")), status("waiting"))
    tail.settle()
    tail.answer(user(1))
    assert told(tail.all, "preview") == []


def test_an_interrupted_step_ends_in_its_message() -> None:
    tail = running()
    tail.feed(text("par"), status("waiting"), msg(interrupted(2, "partial")), status("waiting"))
    tail.settle()
    tail.answer(user(1), interrupted(2, "partial"))
    assert told(tail.all, "preview") == ["text 0+0 par"]


# --- connections ------------------------------------------------------------------------------------------------------


def test_a_reconnect_in_the_middle_of_a_step_goes_on_without_repetition() -> None:
    tail = running()
    tail.feed(text("the ", "relay "), live(delta("c", '{"a"')))
    again = [*text("the ", "relay ", "follows"), *live(delta("c", '{"a"'), delta("c", ":1}"))]
    events = tail.reconnect(status("running"), again, msg(user(1)))
    assert told(events, "preview") == ["text 0+10 follows", "tool-call 0+4 :1}"]
    assert told(tail.feed(text(" on"))) == ["text 0+17  on"]


def test_the_repetition_may_be_cut_into_other_pieces() -> None:
    tail = running()
    tail.feed(text("the ", "relay"))
    assert told(tail.reconnect(status("running"), text("t", "he relay fol", "lows"), msg(user(1))), "preview") == [
        "text 0+9  fol",
        "text 0+13 lows",
    ]


@given(st.text("ab", max_size=30), st.lists(st.integers(0, 30)), st.lists(st.integers(0, 30)), st.integers(0, 30))
def test_however_the_repetition_is_cut_each_letter_is_told_once(
    said: str, cuts: list[int], other_cuts: list[int], heard: int
) -> None:
    def pieces(upto: int, at: list[int]) -> list[Json]:
        ends = sorted({0, upto, *(cut for cut in at if cut < upto)})
        return text(*(said[begin:end] for begin, end in pairwise(ends)))

    tail = running()
    tail.feed(*pieces(min(heard, len(said)), cuts))
    tail.reconnect(status("running"), *pieces(len(said), other_cuts), msg(user(1)))
    fragments = [data_of(one) for one in tail.all if one.event == "preview"]
    assert "".join(one["part"]["text"] for one in fragments) == said
    assert [one["offset"] for one in fragments] == [
        sum(len(one["part"]["text"]) for one in fragments[:at]) for at in range(len(fragments))
    ]


def test_the_repetition_may_come_live() -> None:
    """From another replica: after the snapshot, not inside it."""
    tail = running()
    tail.feed(text("the ", "relay"))
    tail.reconnect(status("running"), msg(user(1)))
    assert told(tail.feed(text("the ")), "preview") == []
    assert told(tail.feed(text("relay works")), "preview") == ["text 0+9  works"]


def test_parts_lost_on_the_first_connection_show_on_the_second() -> None:
    tail = running()
    tail.feed(text("the ", "follows"))
    events = tail.reconnect(status("running"), text("the ", "relay ", "follows"), msg(user(1)))
    assert told(events, "preview") == ["reset 0 gap", "text 0+0 the", "text 0+4 relay", "text 0+10 follows"]
    assert tail.batch.gaps == 1


def test_a_step_begun_anew_with_other_text() -> None:
    """A server that went down does the step again."""
    tail = running()
    tail.feed(live(part("reasoning", "r")), text("the relay"))
    events = tail.reconnect(status("running"), live(part("reasoning", "r")), text("A re", "lay"), msg(user(1)))
    assert told(events, "preview") == [
        "reset 0 reconnect",
        "reasoning 0+0 r",
        "text 0+0 A re",
        "text 0+4 lay",
    ]
    assert tail.batch.gaps == 0


@pytest.mark.parametrize("in_snapshot", [True, False])
def test_a_step_begun_anew_with_another_call(in_snapshot: bool) -> None:
    """The call that was told belongs to nothing: its id is in no message."""
    tail = running()
    tail.feed(live(delta("c1", "{}"), whole("c1")))
    anew = live(delta("c2", "{}"), whole("c2"))
    tail.reconnect(status("running"), *([anew] if in_snapshot else []), msg(user(1)))
    if not in_snapshot:
        tail.feed(anew)
    assert told(tail.all, "preview")[2:] == ["reset 0 reconnect", "tool-call 0+0 {}", "tool-call 0+2 c2"]


def test_whole_parts_are_told_once_over_a_reconnect() -> None:
    tail = running()
    parts = live(part("source", url="u1"), whole("c"), part("source", url="u2"))
    tail.feed(parts)
    assert told(tail.reconnect(status("running"), parts, msg(user(1))), "preview") == []
    assert told(tail.feed(live(part("source", url="u3"), result("c")))) == ["source 0+2", "tool-result 0+0 c"]


def test_a_step_that_ended_while_away_gets_its_message_and_no_repetition() -> None:
    tail = running()
    tail.feed(live(part("text", "Look"), whole("c")))
    events = tail.reconnect(
        status("running"),
        text("The"),
        msg(user(1)),
        msg(assistant(2, "Look", call("c"))),
        msg(tool(3, "c")),
    )
    assert told(events, "preview", "message") == ["message 2", "message 3", "text 1+0 The"]


def test_parts_and_message_of_one_step_in_one_snapshot() -> None:
    """Parts and messages are read one after the other while the worker goes on."""
    tail = Tail()
    events = tail.connect(
        status("running"),
        live(part("text", "Look"), whole("c"), result("c")),
        text("The"),
        msg(user(1)),
        msg(assistant(2, "Look", call("c"))),
        msg(tool(3, "c")),
    )
    assert told(events, "preview") == ["text 0+0 The"]
    assert tail.tail.dropped_parts == 3


def test_text_of_the_stored_step_repeated_by_a_snapshot() -> None:
    tail = Tail()
    events = tail.connect(status("running"), text("All ", "done"), msg(user(1)), msg(assistant(2, "All done")))
    assert told(events, "preview") == []


@pytest.mark.parametrize("known", [True, False])
def test_text_like_the_answer_to_the_prompt_before_is_of_this_turn(known: bool) -> None:
    history = [msg(user(1)), msg(assistant(2, "All done")), msg(user(3))]
    tail = Tail()
    if known:
        tail.connect(status("running"), *history)
        tail.tail.disconnected()
    events = tail.connect(status("running"), text("All ", "done"), *history, after=0)
    assert told(events, "preview") == ["text 0+0 All", "text 0+4 done"]


def test_a_step_that_says_the_same_as_the_stored_one_is_not_lost() -> None:
    """What was told of it shows that it is a step of its own."""
    stored = [msg(user(1)), msg(assistant(2, "Again.", call("c"))), msg(tool(3, "c"))]
    tail = running()
    tail.feed(text("Again."), live(whole("c"), result("c")), stored, text("Aga"))
    assert told(tail.reconnect(status("running"), text("Again."), stored), "preview") == ["text 1+3 in."]


@pytest.mark.parametrize("joined_as", ["running", "pending"])
def test_who_joins_between_two_steps_hears_all_of_the_next_one(joined_as: str) -> None:
    """It begins with the words of the stored one, of which this connection has told nothing: none of them is late."""
    tail = Tail()
    tail.connect(status(joined_as), msg(user(1)), msg(assistant(2, "Again", call("c"))), msg(tool(3, "c")))
    tail.feed(status("running"), text("Aga"), text("in", ", now"))
    assert told(tail.all, "preview") == ["text 0+0 Aga", "text 0+3 in", "text 0+5 , now"]


def test_parts_of_an_idle_chat_are_stale() -> None:
    for value in ("waiting", "pending", "error"):
        tail = Tail()
        assert told(tail.connect(status(value), text("stale"), msg(user(1))), "preview") == []


def test_what_was_held_is_void_when_the_connection_ends() -> None:
    tail = running()
    tail.feed(text("Hel"), msg(assistant(2, "Hello", call("c"))), msg(tool(3, "c")), text("lo"[:1]))
    tail.reconnect(
        status("running"), text("lazy"), msg(user(1)), msg(assistant(2, "Hello", call("c"))), msg(tool(3, "c"))
    )
    assert told(tail.all, "preview") == ["text 0+0 Hel", "text 1+0 lazy"]


def test_a_second_reconnect_repeats_nothing_either() -> None:
    tail = running()
    tail.feed(text("one ", "two "))
    tail.reconnect(status("running"), text("one "), msg(user(1)))
    tail.reconnect(status("running"), text("one ", "two ", "three"), msg(user(1)))
    assert told(tail.all, "preview") == ["text 0+0 one", "text 0+4 two", "text 0+8 three"]


def test_a_retry_while_away() -> None:
    tail = running()
    tail.feed(text("It is"))
    tail.reconnect(status("running"), msg(user(1)))
    tail.feed(retry(1), text("It was"))
    assert told(tail.all, "preview") == ["text 0+0 It is", "reset 0 retry", "text 0+0 It was"]


def test_a_new_session_begins_its_steps_anew() -> None:
    tail = running()
    tail.feed(text("the "))
    second = tail.again()
    second.connect(status("running"), text("the ", "relay"), msg(user(1)))
    assert told(second.all, "preview") == ["text 0+0 the", "text 0+4 relay"]
    assert {one.id for one in tail.all}.isdisjoint(one.id for one in second.all if one.transient)


# --- joined and left out ----------------------------------------------------------------------------------------------


def previews(*batches: list[Json]) -> list[Event]:
    tail = running()
    for each in batches:
        tail.feed(each)
    return [one for one in tail.all if one.event == "preview"]


def test_adjoining_text_is_joined_under_the_name_of_its_first_piece() -> None:
    events = previews(text("a", "b", "c"))
    (joined,) = coalesce(events)
    assert (joined.id, joined.position) == (events[0].id, events[0].position)
    assert data_of(joined)["part"] == part("text", "abc")
    assert data_of(events[0])["part"] == part("text", "a"), "what was handed out is not changed"


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param([live(part("text", "a"), part("reasoning", "b"))], id="another kind"),
        pytest.param([live(delta("a", "{"), delta("b", "}"))], id="another call"),
        pytest.param([live(delta("a", "{}"), whole("a"))], id="the whole behind its fragments"),
        pytest.param([live(whole("a"), delta("a", "{}"))], id="a fragment behind the whole"),
        pytest.param([live(part("source"), part("source"))], id="parts that are whole in themselves"),
        pytest.param([live(result("a"), result("b"))], id="results"),
        pytest.param([text("a"), [retry(1)], text("b")], id="a reset between them"),
        pytest.param([text("a"), [msg(assistant(2, "a", call("c")))], text("b")], id="another step"),
        pytest.param([live({**part("text", "a"), "x": 1}, {**part("text", "b"), "x": 2})], id="another field differs"),
        pytest.param([live(part("diagram", "a"), part("diagram", "b"))], id="a type that we do not know"),
    ],
)
def test_what_is_not_joined(batches: list[list[Json]]) -> None:
    events = previews(*batches)
    assert coalesce(events) == events


def test_previews_of_two_chats_or_sessions_are_not_joined() -> None:
    one, two = previews(text("a", "b"))
    elsewhere = structs.replace(two, chat=replace(two.chat, chat_id=UUID(int=5)))
    assert coalesce([one, elsewhere]) == [one, elsewhere]
    later = structs.replace(two, session=2)
    assert coalesce([one, later]) == [one, later]


def test_a_piece_that_is_missing_between_two_is_not_covered_up() -> None:
    one, _, three = previews(text("a", "b", "c"))
    assert coalesce([one, three]) == [one, three]


def test_a_durable_event_between_them_keeps_its_place() -> None:
    tail = running()
    tail.feed(text("a"), queue(queued(3, "x")), text("b"))
    assert coalesce(tail.all) == tail.all


@given(
    st.lists(st.tuples(st.sampled_from(["text", "reasoning", "a", "b", "message"]), st.text(max_size=3)), max_size=20)
)
def test_joining_keeps_every_text_and_every_offset(pieces: list[tuple[str, str]]) -> None:
    tail = running()
    for at, (kind, piece) in enumerate(pieces):
        if kind == "message":
            tail.feed(msg(message(100 + at, "tool")))
        else:
            tail.feed(live(part(kind, piece) if kind in ("text", "reasoning") else delta(kind, piece)))
    joined = coalesce(tail.all)
    assert coalesce(joined) == joined
    assert [one for one in joined if not one.transient] == [one for one in tail.all if not one.transient]
    for channel in ("text", "reasoning", "a", "b"):
        assert _said(joined, channel) == _said(tail.all, channel)
    assert [one.position for one in joined] == sorted(one.position for one in joined)


def _said(events: list[Event], channel: str) -> str:
    said = ""
    for one in events:
        data: dict[str, Any] = data_of(one)
        if one.event == "preview" and channel in (one.detail, data["part"].get("tool_call_id")):
            assert data["offset"] == len(said)
            said += data["part"].get("args_delta") or data["part"]["text"]
    return said


def test_previews_of_a_step_whose_message_is_there_may_be_left_out() -> None:
    tail = running()
    tail.feed(text("one"))
    parts = text(" two"), text(" three")
    events = tail.feed(*parts, msg(assistant(2, "one two three", call("c"))), msg(tool(3, "c")), text("four"))
    kept = shed(events, tail.batch.ended)
    assert told(kept) == ["text 0+3  two", "message 2", "message 3", "text 1+0 four"]


def test_a_step_that_the_next_one_overtakes_is_seen_before_it() -> None:
    tail = running()
    first = text("one", " two"), live(call("c"), result("c"))
    events = tail.feed(*first, text("three"), msg(assistant(2, "one two", call("c"))), msg(tool(3, "c")))
    kept = shed(events, tail.batch.ended)
    assert told(kept) == ["text 0+0 one", "text 1+0 three", "message 2", "message 3"]


def test_a_reset_is_never_left_out() -> None:
    tail = running()
    tail.feed(text("the ", "follows"))
    events = tail.feed(text("!"), msg(assistant(2, "the relay follows!")))
    assert told(shed(events, tail.batch.ended)) == ["text 0+11 !", "reset 0 gap", "message 2"]
    assert shed(events, []) == events


def test_a_read_ahead_of_the_stream_in_the_middle_of_a_turn() -> None:
    """Parts of what REST told already must not be told as a step of their own."""
    tail = running()
    tail.feed(msg(user(3)))
    tail.answer(
        user(1),
        user(3),
        assistant(4, "a", call("c")),
        tool(5, "c"),
        assistant(6, "b", call("d")),
        tool(7, "d"),
        status="running",
    )
    if tail.batch.reconnect is None:
        tail.feed(status("running"), live(*[part("text", "a"), whole("c"), result("c"), part("text", "b"), whole("d")]))
    assert "text 0+1 b" not in told(tail.all, "preview")


def test_a_read_ahead_of_a_snapshot_makes_its_parts_old() -> None:
    tail = Tail()
    tail.connect(status("waiting"), msg(user(1)), msg(assistant(2, "a")), msg(user(3)), msg(assistant(4, "b")))
    tail.reconnect(status("running"), text("par"), msg(user(7)))
    tail.answer(user(1), assistant(2, "a"), user(7), assistant(8, "partial"), user(9), status="running")
    assert told(tail.all, "preview") == []


def test_a_new_call_behind_the_repetition_is_of_the_same_run() -> None:
    tail = running()
    tail.feed(live(whole("c1")))
    tail.reconnect(status("running"), live(whole("c1")), msg(user(1)))
    tail.feed(live(whole("c2")))
    assert told(tail.all, "preview") == ["tool-call 0+0 c1", "tool-call 0+0 c2"]


def test_a_step_with_a_preview_left_out_stays_a_prefix() -> None:
    muting = Muting()
    tail = running()
    events = tail.feed(text("a"), msg(message(50, "tool")), text("b", "c"))
    assert told(muting.sift(events, 2)) == ["text 0+0 a", "message 50", "text 0+1 b"]
    assert told(muting.sift(tail.feed(text("d")), 9)) == [], "c is missing before it"


def test_a_reset_goes_out_with_no_room_and_its_step_is_told_again() -> None:
    muting = Muting()
    tail = running()
    assert muting.sift(tail.feed(text("a")), 0) == []
    assert told(muting.sift(tail.feed([retry(1)]), 0)) == ["retry scheduled", "reset 0 retry"]
    assert told(muting.sift(tail.feed(text("b")), 1)) == ["text 0+0 b"]


def test_the_next_step_is_told_again() -> None:
    muting = Muting()
    tail = running()
    muting.sift(tail.feed(text("a")), 0)
    events = tail.feed(msg(assistant(2, "a", call("c"))), msg(tool(3, "c")), text("b"))
    assert told(muting.sift(events, 1)) == ["message 2", "message 3", "text 1+0 b"]


def test_a_step_that_was_left_out_under_load_does_not_go_on_in_the_middle() -> None:
    muting, tail = Muting(), running()
    muting.mute([0])
    assert told(muting.sift(tail.feed(text("a")), 9)) == []
    assert told(muting.sift(tail.feed([retry(1)], text("a")), 9)) == ["retry scheduled", "reset 0 retry", "text 0+0 a"]


@given(st.lists(st.tuples(st.sampled_from(["text", "reasoning", "message", "retry"]), st.integers(0, 3)), max_size=30))
def test_whatever_is_left_out_what_goes_out_is_a_prefix(pieces: list[tuple[str, int]]) -> None:
    muting, tail = Muting(), running()
    upstream: dict[tuple[int, str], str] = {}
    heard: dict[tuple[int, str], str] = {}
    for at, (kind, granted) in enumerate(pieces):
        match kind:
            case "message":
                events = tail.feed(msg(message(100 + at, "tool")))
            case "retry":
                events = tail.feed([retry(at + 1)])
            case _:
                events = tail.feed(live(part(kind, f"<{at}>")))
        kept = muting.sift(events, granted)
        assert sum(one.transient and one.detail != "reset" for one in kept) <= granted
        assert [one for one in kept if not one.transient] == [one for one in events if not one.transient]
        for said, of in ((upstream, events), (heard, kept)):
            for one in of:
                data: dict[str, Any] = data_of(one)
                if one.detail == "reset":
                    said.clear()
                elif one.transient:
                    key = (data["step"], one.detail)
                    assert data["offset"] == len(said.get(key, ""))
                    said[key] = said.get(key, "") + data["part"]["text"]
        assert all(upstream[key].startswith(text) for key, text in heard.items())
