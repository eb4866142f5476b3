"""What is known of one turn, in whatever order its messages come."""

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relay.core.frames import Message
from relay.core.turn import Turn
from tests.core.frames import Json, assistant, call, compaction, interrupted, result, tool, user


def turn(*messages: Json) -> Turn:
    one = Turn(1)
    for raw in messages:
        one.add(Message.of(raw))
    return one


WHOLE = [user(1), assistant(2, "", call("a"), call("b")), tool(3, "a"), tool(4, "b"), assistant(6, "end")]


@given(st.lists(st.sampled_from(WHOLE), max_size=8), st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(again: list[Json], chance: random.Random) -> None:
    mixed = [*WHOLE, *again]
    chance.shuffle(mixed)
    one = turn(*mixed)
    assert (one.message_ids, one.steps, one.closable) == ([1, 2, 3, 4, 6], 2, True)
    assert one.usage == {"input_tokens": 20, "output_tokens": 4}


def test_a_turn_of_which_nothing_was_seen() -> None:
    one = turn()
    assert (one.message_ids, one.steps, one.usage, one.ended_at, one.closable) == ([1], 0, {}, "", False)


def test_what_is_older_belongs_to_another_turn() -> None:
    assert Turn(5).message_ids == [5]
    one = Turn(5)
    one.add(Message.of(assistant(4, "before")))
    assert (one.message_ids, one.steps) == ([5], 0)


def test_compaction_belongs_to_no_turn() -> None:
    one = turn(*WHOLE, *compaction(7))
    assert (one.message_ids, one.closable) == ([1, 2, 3, 4, 6], True)


def test_when_the_messages_alone_say_completed() -> None:
    own: dict[str, Any] = {"provider_executed": True}
    assert not turn(user(1)).closable
    assert turn(user(1), assistant(2, "a")).closable
    assert not turn(user(1), interrupted(2, "a")).closable
    assert not turn(user(1), assistant(2, "", call("a"))).closable
    assert not turn(user(1), assistant(2, "", call("a")), tool(3, "a")).closable
    assert not turn(user(1), assistant(2, "", call("a")), assistant(4, "b")).closable
    assert turn(user(1), assistant(2, "", call("a")), tool(3, "a"), assistant(4, "b")).closable
    assert turn(user(1), assistant(2, "", call("a", **own), result("a", **own))).closable
    assert turn(user(1), assistant(2, "", usage={"context_limit": 1})).closable


def test_usage_sums_what_was_reported() -> None:
    one = turn(
        user(1),
        assistant(2, "", usage={"reasoning_tokens": 3, "total_tokens": 12, "context_limit": 200000}),
        assistant(3, "", usage={"reasoning_tokens": 4, "cache_creation_tokens": 1, "cache_read_tokens": 2}),
        interrupted(4, "x"),
        assistant(5, "", usage={"input_tokens": None, "output_tokens": "9"}),
    )
    assert one.usage == {
        "input_tokens": 20,
        "output_tokens": 4,
        "total_tokens": 12,
        "reasoning_tokens": 7,
        "cache_creation_tokens": 1,
        "cache_read_tokens": 2,
    }


def test_a_turn_ends_with_its_last_message_by_id() -> None:
    late, early = {**assistant(3, "b"), "created_at": "t1"}, {**assistant(2, "a"), "created_at": "t9"}
    assert turn(user(1), late, early).ended_at == "t1"
