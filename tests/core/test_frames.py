"""Reading a frame: what is understood, what is passed over, what is refused and why."""

import json

import pytest

from relay.core.errors import BadFrame
from relay.core.frames import (
    ErrorSeen,
    Message,
    MessageSeen,
    PartSeen,
    QueueSeen,
    RetrySeen,
    StatusSeen,
    UnknownSeen,
    content_digest,
    decode_frame,
    error_data,
)
from tests.core.frames import (
    assistant,
    call,
    compaction,
    message,
    msg,
    part,
    queue,
    queued,
    result,
    retry,
    status,
    text,
    tool,
)


def one(event: object) -> str:
    return json.dumps({"type": "data", "data": [event]})


def test_the_envelope_and_the_bare_array_hold_the_same() -> None:
    events = [status("running"), *text("a"), queue()]
    wrapped, bare = json.dumps({"type": "data", "data": events}), json.dumps(events)
    assert decode_frame(wrapped) == decode_frame(bare)
    assert [type(seen) for seen in decode_frame(bare).events] == [StatusSeen, PartSeen, QueueSeen]


def test_a_bare_event_is_a_frame_of_one() -> None:
    assert decode_frame(json.dumps(status("running"))).events == (StatusSeen("running"),)


@pytest.mark.parametrize("raw", ['{"type":"ping","data":null}', '{"type":"data","data":null}', '{"type":"data"}', "[]"])
def test_frames_that_hold_nothing(raw: str) -> None:
    frame = decode_frame(raw)
    assert frame.events == ()
    assert frame.refused is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"message": "not available", "detail": "why"}, {"message": "not available", "detail": "why"}),
        ("plain", {"message": "plain"}),
        (None, {"message": ""}),
    ],
)
def test_an_envelope_error_refuses_the_stream(data: object, said: dict[str, str]) -> None:
    assert decode_frame(json.dumps({"type": "error", "data": data})).refused == said


def test_an_error_event_is_no_envelope_error() -> None:
    raw = json.dumps({"type": "error", "chat_id": "x", "error": {"message": "boom"}})
    assert decode_frame(raw).events == (ErrorSeen({"message": "boom"}),)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param("", "bad_json", id="nothing"),
        pytest.param("<html>", "bad_json", id="a login page"),
        pytest.param('{"type":"data","data":[', "bad_json", id="cut short"),
        pytest.param('[{"type":"status","status":{"status":NaN}}]', "bad_json", id="NaN is not JSON"),
        pytest.param('[{"type":"new","value":-Infinity}]', "bad_json", id="Infinity is not JSON"),
        pytest.param("[" * 100_000, "bad_json", id="nested without end"),
        pytest.param(
            one({"type": "new", "x": json.loads("[" * 900 + "]" * 900)}), "bad_json", id="too deep to be sent on"
        ),
        pytest.param("[1" + "0" * 5000 + "]", "bad_json", id="a number of 5000 digits"),
        pytest.param("null", "schema", id="null"),
        pytest.param("42", "schema", id="a number"),
        pytest.param('"text"', "schema", id="a string"),
        pytest.param("[[]]", "schema", id="an array in the array"),
        pytest.param("[null]", "schema", id="null in the array"),
        pytest.param('{"type":"data","data":"x"}', "schema", id="data is a string"),
        pytest.param('{"type":"data","data":7}', "schema", id="data is a number"),
        pytest.param(one({}), "schema", id="no type"),
        pytest.param(one({"type": 1}), "schema", id="type is a number"),
        pytest.param(one({"type": None}), "schema", id="type is null"),
        pytest.param(one({"type": ["status"]}), "schema", id="type is a list"),
        pytest.param(one({"type": "message"}), "schema", id="message missing"),
        pytest.param(one({"type": "message", "message": None}), "schema", id="message is null"),
        pytest.param(one({"type": "message", "message": {"role": "user"}}), "schema", id="message without id"),
        pytest.param(one({"type": "message", "message": {"id": "1", "role": "user"}}), "schema", id="id is a string"),
        pytest.param(one({"type": "message", "message": {"id": True, "role": "user"}}), "schema", id="id is a truth"),
        pytest.param(one({"type": "message", "message": {"id": 1.0, "role": "user"}}), "schema", id="id is a fraction"),
        pytest.param(one({"type": "message", "message": {"id": 1}}), "schema", id="message without role"),
        pytest.param(one({"type": "message", "message": {"id": 1, "role": None}}), "schema", id="role is null"),
        pytest.param(one({"type": "message_part"}), "schema", id="part missing"),
        pytest.param(one({"type": "message_part", "message_part": []}), "schema", id="part is a list"),
        pytest.param(one({"type": "message_part", "message_part": {"part": None}}), "schema", id="part is null"),
        pytest.param(one({"type": "message_part", "message_part": {"part": {}}}), "schema", id="part without type"),
        pytest.param(
            one({"type": "message_part", "message_part": {"part": {"type": 1}}}), "schema", id="part type is 1"
        ),
        pytest.param(one({"type": "status"}), "schema", id="status missing"),
        pytest.param(one({"type": "status", "status": "running"}), "schema", id="status is a string"),
        pytest.param(one({"type": "status", "status": {"status": None}}), "schema", id="status is null"),
        pytest.param(one({"type": "error"}), "schema", id="error missing"),
        pytest.param(one({"type": "retry"}), "schema", id="retry missing"),
        pytest.param(one({"type": "retry", "retry": {"attempt": 1}}), "schema", id="retry without time"),
        pytest.param(
            one({"type": "retry", "retry": {"attempt": "1", "retrying_at": ""}}), "schema", id="attempt is text"
        ),
        pytest.param(
            '[{"type":"retry","retry":{"attempt":1e999,"retrying_at":""}}]', "schema", id="attempt is endless"
        ),
        pytest.param(
            one({"type": "retry", "retry": {"attempt": True, "retrying_at": ""}}), "schema", id="attempt is true"
        ),
        pytest.param(
            one({"type": "retry", "retry": {"attempt": 1, "retrying_at": 5}}), "schema", id="time is a number"
        ),
        pytest.param(one({"type": "queue_update", "queued_messages": {"id": 1}}), "schema", id="queue is an object"),
        pytest.param(one({"type": "queue_update", "queued_messages": [1]}), "schema", id="entry is a number"),
        pytest.param(one({"type": "queue_update", "queued_messages": [{}]}), "schema", id="entry without id"),
        pytest.param(one({"type": "queue_update", "queued_messages": [{"id": "1"}]}), "schema", id="entry id is text"),
    ],
)
def test_frames_that_cannot_be_read(raw: str, reason: str) -> None:
    with pytest.raises(BadFrame) as caught:
        decode_frame(raw)
    assert caught.value.reason == reason
    assert caught.value.raw == raw


def test_the_text_of_a_bad_frame_is_not_in_the_error() -> None:
    with pytest.raises(BadFrame) as caught:
        decode_frame(json.dumps([{"type": "message", "message": {"id": "secret prompt", "role": "user"}}]))
    assert "secret" not in str(caught.value)


def test_one_bad_event_spoils_its_frame() -> None:
    with pytest.raises(BadFrame):
        decode_frame(json.dumps([status("running"), {"type": "status"}]))


@pytest.mark.parametrize(("version", "revision"), [(18, 18), (0, None), (None, None), ("18", None), (True, None)])
def test_a_status_may_know_its_history_version(version: object, revision: int | None) -> None:
    """Zero is as good as absent."""
    (seen,) = decode_frame(one({"type": "status", "status": {"status": "x", "history_version": version}})).events
    assert seen == StatusSeen("x", revision)


def test_an_unknown_event_type_is_named() -> None:
    assert decode_frame(one({"type": "mood_change", "x": 1})).events == (UnknownSeen("mood_change"),)


def test_a_number_too_large_for_a_float_stays_what_it_was() -> None:
    """Go passes the arguments of a tool on as raw JSON."""
    (seen,) = decode_frame('[{"type":"message_part","message_part":{"part":{"type":"x","n":1e999,"m":0.5}}}]').events
    assert isinstance(seen, PartSeen)
    assert (seen.part["n"], seen.part["m"]) == ("1e999", 0.5)


def test_an_integer_beyond_2_to_the_53_is_exact() -> None:
    (seen,) = decode_frame(one(msg(message(2**63 - 1, "user")))).events
    assert isinstance(seen, MessageSeen)
    assert seen.message.id == 9223372036854775807


def test_a_part_without_a_role_is_the_assistants() -> None:
    (seen,) = decode_frame(one({"type": "message_part", "message_part": {"part": part("text", "a")}})).events
    assert isinstance(seen, PartSeen)
    assert seen.role == "assistant"


@pytest.mark.parametrize("event", [queue(), {"type": "queue_update", "queued_messages": None}])
def test_a_queue_that_is_left_out_is_empty(event: object) -> None:
    assert decode_frame(one(event)).events == (QueueSeen([]),)


def test_a_queue_keeps_its_order() -> None:
    entries = [queued(4, "b"), queued(3, "a")]
    assert decode_frame(one(queue(*entries))).events == (QueueSeen(entries),)


def test_a_retry_is_read_with_its_key() -> None:
    (seen,) = decode_frame(one(retry(2, "soon"))).events
    assert isinstance(seen, RetrySeen)
    assert (seen.attempt, seen.retrying_at, seen.raw["error"]) == (2, "soon", "overloaded")


@pytest.mark.parametrize(
    ("upstream", "error"),
    [
        pytest.param("boom", {"message": "boom"}, id="a string, up to 2.33"),
        pytest.param({"message": "boom"}, {"message": "boom"}, id="an object"),
        pytest.param(
            {"message": "m", "kind": "auth", "provider": "p", "detail": "d", "retryable": False, "status_code": 401},
            {"message": "m", "kind": "auth", "provider": "p", "detail": "d", "retryable": False, "status_code": 401},
            id="the newest, whole",
        ),
        pytest.param(
            {"message": "m", "kind": "", "provider": None, "status_code": 0},
            {"message": "m"},
            id="what is empty is absent",
        ),
        pytest.param({"retryable": "yes", "status_code": "401"}, {"message": ""}, id="what has another type is absent"),
        pytest.param(None, {"message": ""}, id="null"),
        pytest.param(7, {"message": ""}, id="a number"),
    ],
)
def test_errors_in_every_dialect(upstream: object, error: dict[str, object]) -> None:
    assert error_data(upstream) == error


# --- messages ---------------------------------------------------------------------------------------------------------


def test_the_text_and_the_reasoning_of_a_message_are_its_parts_joined() -> None:
    read = Message.of(assistant(2, "one ", call("c"), part("text", "two"), reasoning="why"))
    assert (read.text, read.reasoning) == ("one two", "why")


def test_parts_of_another_type_have_no_text() -> None:
    assert Message.of(message(1, "user", part("file", "not this"), part("text", "this"))).text == "this"


@pytest.mark.parametrize("content", [None, "text", {}, 7, [None, "x", 3]])
def test_content_that_is_no_list_of_parts_is_none(content: object) -> None:
    read = Message.of({"id": 1, "role": "assistant", "content": content})
    assert (read.parts, read.text, read.reasoning, read.calls, read.results) == ([], "", "", frozenset(), frozenset())
    assert not read.compaction


def test_a_text_that_is_null_is_empty() -> None:
    read = Message.of(
        {"id": 1, "role": "user", "content": [{"type": "text", "text": None}, {"type": "reasoning", "text": None}]}
    )
    assert (read.text, read.reasoning) == ("", "")


def test_calls_that_want_a_message_and_results_that_are_one() -> None:
    own = {"provider_executed": True}
    read = Message.of(assistant(2, "", call("a"), call("b", **own), result("b", **own)))
    assert read.calls == {"a"}
    assert Message.of(tool(3, "a")).results == {"a"}


def test_compaction_is_known_by_its_tool() -> None:
    assert [Message.of(raw).compaction for raw in compaction(3)] == [True, True]
    assert not Message.of(tool(3, "a")).compaction


@pytest.mark.parametrize("usage", [None, [], "x", 3])
def test_usage_that_is_no_object_is_none(usage: object) -> None:
    assert Message.of({"id": 1, "role": "assistant", "usage": usage}).usage is None


def test_content_digests() -> None:
    assert content_digest([{"a": 1, "b": [1, {"x": 1, "y": 2}]}]) == content_digest(
        [{"b": [1, {"y": 2, "x": 1}], "a": 1}]
    )
    assert content_digest([1, 2]) != content_digest([2, 1])
    assert content_digest("1") != content_digest(1)
    assert content_digest("\ud800") != content_digest("\ud801")
    assert len(content_digest(None)) == 16


def test_a_part_knows_its_call() -> None:
    assert PartSeen("assistant", call("c")).call_id == "c"
    assert PartSeen("assistant", call("")).call_id is None
    assert PartSeen("assistant", part("text", "a")).call_id is None
    assert PartSeen("tool", result("c")).local_result
    assert not PartSeen("tool", result("c", provider_executed=True)).local_result
    assert not PartSeen("assistant", call("c")).local_result
