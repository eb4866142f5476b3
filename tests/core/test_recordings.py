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
ENDED_OTHERWISE: dict[str, dict[int, str]] = {
    "d0/interrupt_mid_stream": {39: "interrupted"},
    "d0/queue_and_promote": {60: "interrupted"},
    "d0/terminal_error": {34: "failed"},
    "d0b/control_states": {149: "interrupted", 153: "interrupted"},
    "d0b/edit_while_running": {56: "interrupted"},  # the server lost the prompt: no answer ever came
    "d0b/error_with_queue": {172: "interrupted", 177: "failed"},
    "d0b/interrupt_mid_stream": {39: "interrupted"},
    "d0b/queue_and_promote": {59: "interrupted", 60: "interrupted"},
    "d0b/terminal_error": {34: "failed"},
    "d1/control_states": {143: "interrupted"},
    "d1/dynamic_tool": {132: "interrupted", 137: "interrupted"},
    "d1/error_with_queue": {165: "interrupted", 170: "failed"},
    "d1/interrupt_mid_stream": {39: "interrupted"},
    "d1/long_history": {94: "interrupted"},  # the server lost the prompt here, too
    "d1/queue_and_promote": {60: "interrupted", 61: "interrupted"},
    "d1/terminal_error": {34: "failed"},
    "d1e/control_states": {145: "interrupted"},
    "d1e/dynamic_tool": {134: "interrupted", 139: "interrupted"},
    "d1e/error_with_queue": {167: "interrupted", 172: "failed"},
    "d1e/interrupt_mid_stream": {39: "interrupted"},
    "d1e/queue_and_promote": {60: "interrupted"},
    "d1e/terminal_error": {34: "failed"},
    **{
        f"{folder}/{name}": outcomes
        for folder in ("d2", "d2b")
        for name, outcomes in (
            ("control_states", {152: "interrupted"}),
            ("error_with_queue", {174: "interrupted", 179: "failed"}),
            ("interrupt_mid_stream", {39: "interrupted"}),
            ("queue_and_promote", {60: "interrupted"}),
            ("terminal_error", {34: "failed"}),
        )
    },
    "d3/control_states": {362: "interrupted"},
    "d3/error_with_queue": {384: "interrupted", 389: "failed"},
    "d3/interrupt_mid_stream": {249: "interrupted"},
    "d3/queue_and_promote": {270: "interrupted"},
    "d3/terminal_error": {244: "failed"},
}
ERRORS = {
    "d0/terminal_error": ["stream response: unauthorized: invalid api key"],
    "d0b/terminal_error": ["OpenAI Compatible returned an unexpected error (HTTP 400)."],
    **{
        f"d1/{name}": ["OpenAI Compatible returned an unexpected error (HTTP 400)."]
        for name in ("error_with_queue", "terminal_error")
    },
    **{
        f"{folder}/{name}": ["OpenAI Compatible returned an unexpected error."]
        for folder in ("d1e", "d2", "d2b", "d3")
        for name in ("error_with_queue", "terminal_error")
    },
}


@each_recording
def test_the_fold_of_the_events_is_what_rest_says(path: Path) -> None:
    for one in followed(path):
        assert differences(fold(one.life.events), one.truth) == []


@pytest.mark.parametrize("path", sorted(OURS.glob("*/*.jsonl")), ids=name_of)
def test_the_truth_to_compare_with_is_the_recorded_one(path: Path) -> None:
    """The server that answers the follower has no rules of its own in the end: it stands where REST stood."""
    for one in followed(path):
        if one.chat.truth is not None and path.stem != "child_verbs":  # its stream went on after the last read
            assert one.truth == one.chat.truth


@each_recording
def test_each_user_message_has_exactly_one_turn(path: Path) -> None:
    for one in followed(path):
        assert one.ended <= turns(one.life.events).keys()


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
            {"chats": 57, "turns": 154, "equal": 226, "prefix": 2, "without a reconcile": 40},
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
        pytest.param(
            "d1",
            {"chats": 32, "turns": 62, "equal": 60, "prefix": 0, "without a reconcile": 19},
            {"retry": 1, "superseded": 3},
            {"edit": 2, "prompt": 9, "settle": 3},
            id="d1",
        ),
        pytest.param(
            "d1e",
            {"chats": 33, "turns": 64, "equal": 62, "prefix": 1, "without a reconcile": 21},
            {"retry": 1, "superseded": 1},
            {"edit": 2, "prompt": 7, "settle": 3},
            id="d1e",
        ),
        pytest.param(
            "d2",
            {"chats": 32, "turns": 66, "equal": 67, "prefix": 0, "without a reconcile": 32},
            {"retry": 2, "superseded": 1},
            {},
            id="d2",
        ),
        *(
            pytest.param(
                folder,
                {"chats": 33, "turns": 67, "equal": 68, "prefix": 0, "without a reconcile": 33},
                {"retry": 2, "superseded": 1},
                {},
                id=folder,
            )
            for folder in ("d2b", "d3")
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
