"""The judge itself: a good story passes, and each breach of the contract is seen."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.contract import Coder, broken, unfinished
from tests.chaos.inbox import LOG, QUEUE, Delivery

CHAT = "11111111-1111-4111-8111-111111111111"
OWNER = "22222222-2222-4222-8222-222222222222"
Story = list[Delivery]


def told(detail: str, session: int, position: int, data: dict[str, Any], fact: str = "") -> Delivery:
    name = fact or f"{detail}-{session}-{position}"
    event = {
        "id": name,
        "type": f"io.chatrelay.chat.{detail.partition('.')[0]}.v1",
        "source": f"http://coder/chats/{CHAT}",
        "subject": CHAT,
        "ownerid": OWNER,
        "session": session,
        "position": position,
        "data": data,
    }
    key = f"chat.{detail}.{OWNER}.{CHAT}"
    return Delivery(key, event, name, not detail.startswith("preview"), QUEUE, 0.0)


def message(number: int, role: str, text: str) -> dict[str, Any]:
    return {"id": number, "role": role, "content": [{"type": "text", "text": text}]}


ROW = {"id": CHAT, "status": "waiting", "title": "a title", "archived": False}
OLD, NEW, ANSWER = message(1, "user", "hello"), message(2, "user", "hello again"), message(3, "assistant", "hi there")
EDIT = {"message_ids": [2], "removed_ids": [1], "reason": "edit"}
TURN = {"outcome": "completed", "message_ids": [2, 3], "steps": 1}


def truth(edits: int = 1) -> dict[str, Coder]:
    return {CHAT: Coder(ROW, {2: NEW, 3: ANSWER}, [], edits)}


def story() -> Story:
    """A prompt, put better, and its answer."""
    return [
        told("lifecycle.created", 1, 1, {"chat": ROW, "changed": ["title"]}),
        told("message.user", 1, 2, {"message": OLD}, "m1"),
        told("status.running", 1, 3, {"status": "running", "previous": None}),
        told("history.replaced", 1, 4, EDIT, "h2"),
        told("message.user", 1, 5, {"message": NEW}, "m2"),
        told("preview.text", 1, 6, {"step": 0, "offset": 0, "part": {"text": "hi "}}),
        told("preview.text", 1, 7, {"step": 0, "offset": 3, "part": {"text": "the"}}),
        told("message.assistant", 1, 8, {"message": ANSWER}, "m3"),
        told("status.waiting", 1, 9, {"status": "waiting", "previous": "running"}),
        told("turn.completed", 1, 10, TURN, "t2"),
    ]


def test_a_good_story_passes() -> None:
    assert unfinished(story(), truth()) == []
    assert broken(story(), truth(), crashes=False) == []


def test_copies_and_the_next_session_pass() -> None:
    again = [
        told("history.replaced", 2, 1, {"message_ids": [2, 3], "removed_ids": [], "reason": "restart"}, "restart-2"),
        told("message.assistant", 2, 2, {"message": ANSWER}, "m3"),
        told("status.waiting", 2, 3, {"status": "waiting", "previous": "running"}),
        told("turn.completed", 2, 4, TURN, "t2"),
        told("preview.text", 1, 11, {"step": 1, "offset": 0, "part": {"text": "of a follower that lost its chat"}}),
    ]
    assert unfinished(story() + story()[5:] + again, truth()) == []
    assert broken(story() + story()[5:] + again, truth(), crashes=True) == []
    assert broken(story() + again, truth(), crashes=False) != []  # nobody died


def without(index: int) -> Callable[[Story], None]:
    def leave_out(story: Story) -> None:
        del story[index]

    return leave_out


def changed(index: int, **data: Any) -> Callable[[Story], None]:
    return lambda story: story[index].event["data"].update(data)


def with_more(*more: Delivery) -> Callable[[Story], None]:
    return lambda story: story.extend(more)


@pytest.mark.parametrize(
    ("breach", "seen"),
    [
        (without(0), "no lifecycle"),
        (without(3), "message 1 is not in Coder"),
        (without(4), "message 2 is missing"),
        (without(7), "message 3 is missing"),
        (without(8), "status is running"),
        (without(9), "turn of 2 was not told"),
        (changed(7, message=message(3, "assistant", "hi")), "message 3 differs"),
        (changed(9, message_ids=[2]), "turn of 2 has [2]"),
        (with_more(told("queue.updated", 1, 11, {"queued_messages": [{"id": 7}]})), "queue is [7]"),
        (changed(0, chat={**ROW, "title": "another"}), "title is 'another'"),
    ],
)
def test_what_is_missing_is_seen(breach: Callable[[Story], None], seen: str) -> None:
    events = copy.deepcopy(story())
    breach(events)
    assert seen in "\n".join(unfinished(events, truth()))


def swapped(one: int, other: int) -> Callable[[Story], None]:
    def swap(story: Story) -> None:
        story[one], story[other] = story[other], story[one]

    return swap


@pytest.mark.parametrize(
    ("breach", "seen"),
    [
        (swapped(4, 7), "came after"),
        (with_more(told("message.user", 1, 5, {"message": ANSWER}, "m9")), "two events at (1, 5)"),
        (with_more(told("message.assistant", 2, 1, {"message": ANSWER}, "another")), "one fact, 2 ids"),
        (with_more(told("turn.failed", 2, 1, {**TURN, "outcome": "failed"}, "t2")), "one id, two facts"),
        (with_more(told("history.replaced", 2, 1, EDIT, "h2b")), "one fact, 2 ids"),
        (
            with_more(told("history.replaced", 1, 11, {**EDIT, "message_ids": [2, 3]}, "h2")),
            "a second time in its session",
        ),
        (
            with_more(told("history.replaced", 2, 1, {"message_ids": [1, 2], "removed_ids": [], "reason": "restart"})),
            "brings back [1]",
        ),
        (changed(3, message_ids=[2, 1]), "is not ascending"),
        (changed(8, previous="waiting"), "names waiting"),
        (changed(6, offset=1), "3 were told"),
        (changed(5, part={"text": "ho "}), "differs at 1"),
        (with_more(told("preview.text", 1, 12, {"step": -1, "offset": 0, "part": {"text": ""}})), "goes back"),
    ],
)
def test_what_must_not_be_is_seen(breach: Callable[[Story], None], seen: str) -> None:
    events = copy.deepcopy(story())
    breach(events)
    assert seen in "\n".join(broken(events, truth(), crashes=True))


def test_a_restatement_comes_once_a_session() -> None:
    data = {"message_ids": [2, 3], "removed_ids": [], "reason": "restart"}
    twice = [told("history.replaced", 2, place, data, f"restart-2-{place}") for place in (1, 2)]
    assert "restated 2 times" in "\n".join(broken(story() + twice, truth(), crashes=True))


def test_more_rewrites_than_edits_are_seen() -> None:
    assert "1 rewrites told, its owner made 0" in "\n".join(broken(story(), truth(edits=0), crashes=True))


def test_previews_that_were_left_out_are_no_breach() -> None:
    events = story()
    del events[5]
    assert broken(events, truth(), crashes=False) == []


def test_a_reset_voids_what_was_shown() -> None:
    events = story()
    events[5:7] = [
        told("preview.text", 1, 6, {"step": 0, "offset": 0, "part": {"text": "wrong"}}),
        told("preview.reset", 1, 7, {"step": 0, "reason": "retry"}),
    ]
    assert broken(events, truth(), crashes=False) == []


def shown(step: int, position: int, text: str) -> Delivery:
    return told("preview.text", 1, position, {"step": step, "offset": 0, "part": {"text": text}})


def taken_back(step: int, position: int, reason: str) -> Delivery:
    return told("preview.reset", 1, position, {"step": step, "reason": reason})


@pytest.mark.parametrize(
    ("previews", "breach"),
    [
        pytest.param([shown(0, 5, "i"), shown(1, 6, "more"), taken_back(0, 7, "gap")], False, id="its own"),
        pytest.param([shown(0, 5, "ho"), shown(1, 6, "hi"), taken_back(0, 7, "retry")], False, id="that of the next"),
        pytest.param([shown(0, 5, "ho"), shown(1, 6, "ho"), taken_back(0, 7, "superseded")], True, id="no other"),
        pytest.param([shown(0, 5, "ho"), shown(1, 6, "hi")], True, id="not taken back"),
    ],
)
def test_which_step_a_message_ends_of_which_the_first_was_taken_back(previews: Story, breach: bool) -> None:
    events = story()
    events[5:7] = previews
    for number, event in enumerate(events, 1):
        event.event["position"] = number
    assert bool(broken(events, truth(), crashes=False)) is breach


def test_a_reset_that_nobody_took_is_a_breach_unless_queues_were_gone() -> None:
    events = story()
    events[5:7] = [told("preview.text", 1, 6, {"step": 0, "offset": 0, "part": {"text": "wrong"}})]
    assert broken(events, truth(), crashes=False) != []
    assert broken(events, truth(), crashes=False, unbound=True) == []
    events = story()
    events[6] = told("preview.text", 1, 7, {"step": 0, "offset": 0, "part": {"text": "hi"}})
    assert broken(events, truth(), crashes=False, unbound=True) != []  # nothing is missing here


def test_a_turn_that_failed_may_be_told_again_with_less_by_who_takes_over() -> None:
    failed = told("turn.failed", 1, 10, TURN | {"outcome": "failed"}, "t2")
    copy = told("turn.interrupted", 2, 3, TURN | {"outcome": "interrupted"}, "t2")
    told_twice = [*story()[:9], failed, copy]
    assert "two facts" not in "\n".join(broken(told_twice, truth(), crashes=True))
    assert "two facts" in "\n".join(broken(told_twice, truth(), crashes=False))
    other = told("turn.completed", 2, 3, TURN, "t2")
    assert "two facts" in "\n".join(broken([*story()[:9], failed, other], truth(), crashes=True))


def test_the_order_of_two_sources_is_not_compared() -> None:
    from_log = [Delivery(each.key, each.event, each.message_id, each.persistent, LOG, 0.0) for each in story()]
    assert broken(story() + from_log, truth(), crashes=False) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": f"chat.message.user.{OWNER}"},
        {"message_id": "another"},
        {"persistent": False},
        {"key": f"chat.message.user.{CHAT}.{OWNER}"},
    ],
)
def test_envelopes_are_looked_at(wrong: dict[str, Any]) -> None:
    first = told("message.user", 1, 1, {"message": NEW}, "m2")
    fields = {"key": first.key, "message_id": first.message_id, "persistent": True, **wrong}
    bad = Delivery(event=first.event, source=QUEUE, at=0.0, **fields)
    assert broken([bad], {}, crashes=True) != []
