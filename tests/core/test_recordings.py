"""Everything that was recorded of real servers, followed from the first frame to the last."""

from collections import Counter
from pathlib import Path

import pytest

from relay.core.transcript import differences
from tests.core.captures import OURS, each_recording, followed, name_of
from tests.core.laws import (
    assert_honest_previews,
    assert_no_event_twice,
    assert_positions_grow,
    data_of,
    fold,
    turns,
)
from tests.core.recorded_follower import RecordedFollower

# Turns that did not end well, by their user message. All others were completed.
ENDED_OTHERWISE = {
    "d0/interrupt_mid_stream": {39: "interrupted"},
    "d0/queue_and_promote": {60: "interrupted"},
    "d0/terminal_error": {34: "failed"},
    "d0b/control_states": {149: "interrupted", 153: "interrupted"},
    "d0b/edit_while_running": {56: "interrupted"},  # the server lost the prompt: no answer ever came
    "d0b/error_with_queue": {172: "interrupted", 177: "failed"},
    "d0b/interrupt_mid_stream": {39: "interrupted"},
    "d0b/queue_and_promote": {59: "interrupted", 60: "interrupted"},
    "d0b/terminal_error": {34: "failed"},
}
ERRORS = {
    "d0/terminal_error": ["stream response: unauthorized: invalid api key"],
    "d0b/terminal_error": ["OpenAI Compatible returned an unexpected error (HTTP 400)."],
}


@each_recording
def test_the_fold_of_the_events_is_what_rest_says(path: Path) -> None:
    for one in followed(path):
        assert differences(fold(one.life.events), one.truth) == []


@pytest.mark.parametrize("path", sorted(OURS.glob("*/*.jsonl")), ids=name_of)
def test_the_truth_to_compare_with_is_the_recorded_one(path: Path) -> None:
    """The server that answers the follower has no rules of its own in the end: it stands where REST stood."""
    for one in followed(path):
        if one.chat.truth is not None and name_of(path) != "d0b/child_verbs":  # its stream went on after the last read
            assert one.truth == one.chat.truth


@each_recording
def test_each_user_message_has_exactly_one_turn(path: Path) -> None:
    for one in followed(path):
        assert one.prompts <= turns(one.life.events).keys()


@each_recording
def test_the_turn_of_an_edited_message_was_told_before_the_edit(path: Path) -> None:
    for one in followed(path):
        gone: set[int] = set()
        for event in one.life.events:
            if event.event == "history":
                gone.update(data_of(event)["removed_ids"])
            assert not (event.event == "turn" and data_of(event)["message_ids"][0] in gone)


@pytest.mark.parametrize("path", sorted(OURS.glob("*/*.jsonl")), ids=name_of)
def test_turns_have_their_outcome(path: Path) -> None:
    outcomes = {key: outcome for one in followed(path) for key, outcome in turns(one.life.events).items()}
    otherwise = {key: outcome for key, outcome in outcomes.items() if outcome != "completed"}
    assert otherwise == ENDED_OTHERWISE.get(name_of(path), {})


@each_recording
def test_a_turn_holds_the_messages_from_its_prompt_to_the_next(path: Path) -> None:
    for one in followed(path):
        folded = fold(one.life.events)
        for event in one.life.events:
            if event.event != "turn" or data_of(event)["message_ids"][0] not in folded:
                continue
            begin = data_of(event)["message_ids"][0]
            end = min((key for key in one.prompts if key > begin), default=max(folded) + 1)
            ours = [
                key
                for key in range(begin, end)
                if key in folded and not any(p.get("tool_name") == "chat_summarized" for p in folded[key]["content"])
            ]
            assert data_of(event)["message_ids"] == ours
            assert data_of(event)["steps"] == sum(folded[key]["role"] == "assistant" for key in ours)


@pytest.mark.parametrize("path", sorted(OURS.glob("*/*.jsonl")), ids=name_of)
def test_a_turn_that_failed_says_why(path: Path) -> None:
    events = [event for one in followed(path) for event in one.life.events]
    told = [data_of(event)["message"] for event in events if event.event == "error"]
    said = [data_of(event)["error"]["message"] for event in events if event.event == "turn" and "error" in event.data]
    assert told == said == ERRORS.get(name_of(path), [])  # of d0b/error_with_queue the file does not hold it


@each_recording
def test_no_event_is_told_twice(path: Path) -> None:
    for one in followed(path):
        assert_no_event_twice(one.life.events)
        assert_positions_grow(one.life.events)


@pytest.mark.parametrize("path", sorted(OURS.glob("*/*.jsonl")), ids=name_of)
def test_no_stream_is_given_up_without_need(path: Path) -> None:
    """None of these was broken before it ended."""
    for one in followed(path):
        assert one.life.reconnects == []


@each_recording
def test_live_text_is_honest(path: Path) -> None:
    for one in followed(path):
        assert_honest_previews(one.life.events)


@each_recording
def test_a_stream_beside_another_is_whole_in_itself(path: Path) -> None:
    """Somebody who joins in the middle and sees nothing but that one stream has the history of that moment."""
    for one in followed(path):
        for connection in one.chat.onlookers():
            if connection.after_id > 0:
                continue  # a resumed stream is not meant to stand alone
            follower = RecordedFollower(one.chat)
            follower.live_through(connection)
            events = follower.life.events
            shown = {key for key in fold(events) if key in one.truth}
            assert shown == {key for key in one.truth if key <= max(shown)}
            assert_no_event_twice(events)
            assert_honest_previews(events)
            turns(events)


@pytest.mark.parametrize(
    ("folder", "expected", "resets", "most_reconciles"),
    [
        pytest.param(
            "d0",
            {"chats": 57, "turns": 154, "equal": 225, "prefix": 3, "without a reconcile": 40},
            {"gap": 2, "retry": 2, "superseded": 2},
            {"edit": 8, "prompt": 3, "reconnect": 6, "settle": 1},
            id="d0",
        ),
        pytest.param(
            "d0b",
            {"chats": 31, "turns": 65, "equal": 63, "prefix": 0, "without a reconcile": 20},
            {"retry": 1, "superseded": 3},
            {"edit": 3, "prompt": 7, "settle": 6},
            id="d0b",
        ),
    ],
)
def test_totals_of_a_dialect(
    folder: str, expected: dict[str, int], resets: dict[str, int], most_reconciles: dict[str, int]
) -> None:
    totals: Counter[str] = Counter()
    reset: Counter[str] = Counter()
    reconciles: Counter[str] = Counter()
    for path in sorted((OURS / folder).glob("*.jsonl")):
        for one in followed(path):
            previews = assert_honest_previews(one.life.events)
            totals["chats"] += 1
            totals["turns"] += len(turns(one.life.events))
            totals["equal"] += previews.equal
            totals["prefix"] += previews.prefix
            totals["without a reconcile"] += not one.life.reconciles
            reset += previews.resets
            reconciles.update(one.life.reconciles)
    assert totals == expected
    assert reset == resets
    assert {reason: count for reason, count in reconciles.items() if count > most_reconciles.get(reason, 0)} == {}
