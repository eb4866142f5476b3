"""A frame with one message is read a short way, which leaves the message the JSON that it is. It must give what the
long way gives, by which the same frame is read behind a space."""

import json
import re
from collections.abc import Sequence
from math import isfinite
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.core.errors import BadFrame
from relay.core.events import Event, decode_event, decode_json
from relay.core.frames import Frame, FrameReader, Message, MessageSeen, decode_frame
from relay.core.resume import ResumePoint
from relay.core.tail import ChatTail
from tests.core.captures import OURS
from tests.core.frames import AT, PREVIEW_RESET, REF, assistant, call, message, msg, part, result, status, tool, user

ENVELOPE = '{"type":"data","data":%s}\n'
HUGE = 10**6 + 7  # stands for a number that no float holds


def written(*events: object, form: str = "%s") -> str:
    """A frame as servers write it."""
    rows = json.dumps(events, separators=(",", ":"))
    return (form % rows).replace(str(HUGE), "1e999")


def read(frame: str) -> Message:
    (seen,) = decode_frame(frame).events
    assert isinstance(seen, MessageSeen)
    return seen.message


def short(read_message: Message) -> bool:
    return isinstance(read_message.raw, msgspec.Raw)


def meaning(read_message: Message) -> dict[str, Any]:
    """All that the relay takes a message for."""
    names = ("id", "role", "created_at", "usage", "text", "reasoning", "calls", "call_ids", "results", "compaction")
    raw = read_message.raw
    parts = [(each.type, each.tool_call_id, each.tool_name, each.args) for each in read_message.parts]
    return {name: getattr(read_message, name) for name in names} | {
        "raw": raw if isinstance(raw, dict) else decode_json(bytes(raw)),
        "digest": read_message.digest,
        "parts": parts,
    }


def told(frame: str) -> Sequence[Event]:
    """What consumers get of a message that comes while a chat runs."""
    tail = ChatTail(REF, 1, ResumePoint())
    tail.connected(0)
    for before in (status("running"), msg(user(1))):
        tail.feed(decode_frame(json.dumps([before])), AT)
    return tail.feed(decode_frame(frame), AT).events


def outcome(frame: str) -> object:
    try:
        return meaning(read(frame))
    except BadFrame as exc:
        return exc.reason


# --- the same as the long way -----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.just(HUGE)
    | st.integers(-9, 9)
    | st.sampled_from(["", "a", "\ud83d", "\ud83d\ude00é"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "\ud83d", "é"]), inner, max_size=3)
    ),
    max_leaves=8,
)
PART_FIELDS = ("text", "tool_call_id", "tool_name", "args", "result", "provider_executed", "url", "start_line", "data")
KINDS = ("text", "reasoning", "tool-call", "tool-result", "file", "of tomorrow")
PARTS = st.builds(
    lambda kind, fields, other: part(kind, **fields) | other,
    st.sampled_from(KINDS),
    st.fixed_dictionaries(
        {},
        optional={
            "text": st.sampled_from(["", "one", "two é"]),
            "tool_call_id": st.sampled_from(["", "a", "b"]),
            "tool_name": st.sampled_from(["execute", "chat_summarized"]),
            "args": JSON,
            "result": JSON,
            "provider_executed": st.booleans(),
        },
    ),
    st.dictionaries(st.sampled_from([*PART_FIELDS, "type", "field_of_tomorrow"]), JSON, max_size=1),
)
MESSAGES = st.builds(
    lambda role, parts, other: message(7, role, *parts, usage={"input_tokens": 3}) | other,
    st.sampled_from(["user", "assistant", "tool", "of tomorrow"]),
    st.lists(PARTS, max_size=3),
    st.dictionaries(
        st.sampled_from(["id", "role", "created_at", "usage", "content", "created_by", "field_of_tomorrow"]),
        JSON,
        max_size=1,
    ),
)


@given(MESSAGES, st.sampled_from(["%s", ENVELOPE]))
@example(user(7, "plain"), "%s")
@example(assistant(7, "", call("a", args={"n": HUGE})), ENVELOPE)
@example(user(7, "half of a pair: \ud83d"), ENVELOPE)
def test_a_message_is_what_the_long_way_takes_it_for(raw: dict[str, Any], form: str) -> None:
    frame = written(msg(raw), form=form)
    assert outcome(frame) == outcome(" " + frame)


@given(MESSAGES)
@example(assistant(7, "é", call("a", args={"n": 0.5, "deep": [[1]]}), result("a"), reasoning="why"))
@example(assistant(7, "", call("a", args={"n": HUGE})))
@example(assistant(7, "", result("a") | {"field_of_tomorrow": HUGE}))
@example(user(7) | {"field_of_tomorrow": [HUGE]})
@example(user(7) | {"usage": {"input_tokens": HUGE}})
@example(user(7) | {"usage": {"field_of_tomorrow": HUGE}})
def test_consumers_get_what_the_long_way_gives_them(raw: dict[str, Any]) -> None:
    frame = written(msg(raw | {"id": 7, "role": "assistant"}))
    events, others = told(frame), told(" " + frame)
    assert [event.envelope() for event in events] == [event.envelope() for event in others]
    for event in events:
        assert decode_event(event.encode(), event.routing_key).envelope() == event.envelope()
        json.loads(event.encode(), parse_float=finite)


def finite(number: str) -> float:
    assert isfinite(float(number)), "most languages refuse to read this"
    return float(number)


@pytest.mark.parametrize("depth", [1, 3, 4, 40, 200, 400, 900])
def test_what_is_deep_is_read_or_refused_as_the_long_way_does(depth: int) -> None:
    frame = written(msg(assistant(7, "", call("a"))))
    frame = frame.replace('"tool_name"', '"args":' + "[" * depth + "]" * depth + ',"tool_name"', 1)
    assert outcome(frame) == outcome(" " + frame)


# --- only what is one message and nothing else ------------------------------------------------------------------------

ALONE = written(msg(user(7, "all of it")))
IN_ENVELOPE = (ENVELOPE % ALONE).rstrip()
WITH_RESET = written(msg(user(7)), PREVIEW_RESET)
WRONG = ("\ta", r"\\x", '"a')  # in a text, as long as what they take the place of


@pytest.mark.parametrize(
    "frame",
    [
        *(whole[:end] for whole in (ALONE, IN_ENVELOPE) for end in (-1, -2, -3, -4, len(whole) // 2)),
        *(whole + more for whole in (ALONE, IN_ENVELOPE) for more in ("]", "}", "x", "\x1c", "\u2003", "\x00")),
        ALONE + "}",
        ALONE[:-2] + "]}",
        IN_ENVELOPE[:-3] + "]}}",
        WITH_RESET[:-2] + "]}",
        WITH_RESET.replace('},{"type":"preview_reset"', ']{"type":"preview_reset"'),
        IN_ENVELOPE[:-1] + ',"x":1e}',
        ALONE.replace('"id":7', '"id":07'),
        ALONE.replace("all of it", "all\tof it"),
        *(re.sub('(?<="chat_id":")..', wrong, whole, count=1) for whole in (ALONE, IN_ENVELOPE) for wrong in WRONG),
    ],
)
def test_what_is_not_json_is_no_message(frame: str) -> None:
    for before in (None, ALONE, IN_ENVELOPE, WITH_RESET):
        reader = FrameReader()
        if before is not None:
            reader.read(before)
        with pytest.raises(BadFrame) as refused:
            reader.read(frame)
        assert refused.value.reason == "bad_json"


@pytest.mark.parametrize(
    ("frame", "kinds"),
    [
        (written(msg(user(7)), msg(user(8))), ["MessageSeen", "MessageSeen"]),
        (written(msg(user(7)), status("running")), ["MessageSeen", "StatusSeen"]),
        (written(msg(user(7)) | {"more": {}}), ["MessageSeen"]),
        (written(msg(user(7)), form=ENVELOPE.replace("}\n", ',"more":1}')), ["MessageSeen"]),
        (written(msg(user(7)), form=ENVELOPE.replace("}\n", ',"chat_id":"x"}')), ["UnknownSeen"]),
        (ALONE.replace('"type":"message"', '"type":"message_of_tomorrow"'), ["UnknownSeen"]),
    ],
)
def test_what_stands_beside_a_message_is_read(frame: str, kinds: list[str]) -> None:
    assert [type(seen).__name__ for seen in decode_frame(frame).events] == kinds


@pytest.mark.parametrize("wrong", [{"type": "status"}, status("x") | {"status": {}}, status("x") | {"status": "x"}])
def test_what_is_wrong_beside_a_message_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadFrame) as refused:
        decode_frame(written(msg(user(7)), wrong))
    assert refused.value.reason == "schema"


OTHERS = [msg(user(8)), status("running"), status("waiting", 9), status("waiting", 0), PREVIEW_RESET]


@given(st.lists(st.sampled_from(OTHERS)), st.sampled_from(["%s", ENVELOPE]))
@example([PREVIEW_RESET], "%s")
@example([PREVIEW_RESET], ENVELOPE)
@example([PREVIEW_RESET, PREVIEW_RESET], "%s")
def test_a_whole_state_is_what_the_long_way_takes_it_for(others: list[dict[str, Any]], form: str) -> None:
    frame = written(msg(tool(7, "a")), *others, form=form)
    seen, expected = decode_frame(frame).events, decode_frame(" " + frame).events
    assert list(map(shown, seen)) == list(map(shown, expected))


def shown(seen: object) -> object:
    return meaning(seen.message) if isinstance(seen, MessageSeen) else seen


FORMS = ["%s", "%s\n", ENVELOPE, ENVELOPE.rstrip()]
OTHER_CHAT = {"chat_id": "77777777-7777-4777-8777-777777777777"}


@given(
    st.lists(
        st.tuples(
            MESSAGES,
            st.sampled_from([{}, OTHER_CHAT]),
            st.lists(st.sampled_from(OTHERS), max_size=2),
            st.sampled_from(FORMS),
        ),
        min_size=2,
        max_size=4,
    )
)
@example([(user(7), {}, [], "%s"), (user(8), {}, [PREVIEW_RESET], "%s"), (user(9), {}, [], "%s")])
def test_whatever_a_reader_has_read_the_next_frame_is_what_it_is(
    frames: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], str]],
) -> None:
    reader = FrameReader()
    for raw, chat, others, form in frames:
        frame = written(msg(raw) | chat, *others, form=form)
        assert outcomes(reader, frame) == outcomes(FrameReader(), " " + frame)


def outcomes(reader: FrameReader, frame: str) -> object:
    try:
        read = reader.read(frame)
    except BadFrame as exc:
        return exc.reason
    return [meaning(read)] if isinstance(read, Message) else list(map(shown, read.events))


@pytest.mark.parametrize("wrong", [{"id": "7"}, {"id": None}, {"id": 7.0}, {"id": True}, {"role": None}, {"role": 1}])
def test_a_message_without_an_id_or_a_role_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(BadFrame) as refused:
        decode_frame(written(msg(user(7) | wrong)))
    assert refused.value.reason == "schema"


@pytest.mark.parametrize("name", ["id", "role"])
def test_a_message_that_lacks_its_id_or_its_role_is_refused(name: str) -> None:
    raw = user(7)
    del raw[name]
    with pytest.raises(BadFrame) as refused:
        decode_frame(written(msg(raw)))
    assert refused.value.reason == "schema"


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(path.name for path in OURS.iterdir() if path.is_dir()))
def test_messages_of_all_servers_come_the_short_way(folder: str) -> None:
    """Or a new field has made the relay slow: it belongs into `Part` or `_Fields`."""
    frames = [
        frame
        for path in sorted((OURS / folder).glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if '"type":"message"' in (frame := json.loads(line).get("raw") or "")
        and [row["type"] for row in rows_of(frame)] in (["message"], ["message", "preview_reset"])
    ]
    assert len(frames) > 50
    assert [frame for frame in frames if not short(next(iter(messages_in(frame))))] == []


def rows_of(frame: str) -> list[dict[str, Any]]:
    rows: Any = json.loads(frame)
    return list(rows["data"] if isinstance(rows, dict) else rows)


def messages_in(frame: str) -> Sequence[Message]:
    return messages_of(decode_frame(frame))


def messages_of(read: Frame | Message) -> Sequence[Message]:
    return [read] if isinstance(read, Message) else [one.message for one in read.events if isinstance(one, MessageSeen)]


def test_a_reader_goes_the_short_way_again_after_a_change_of_form() -> None:
    reader = FrameReader()
    for frame in (ALONE, WITH_RESET, ALONE, IN_ENVELOPE, ALONE + "\n", written(msg(user(7)) | OTHER_CHAT)):
        reader.read(written(status("running")))
        assert list(map(short, messages_of(reader.read(frame)))) == [True], frame


def test_a_tool_message_is_passed_on_as_it_came() -> None:
    frame = written(msg(tool(7, "a")))
    (event,) = told(frame)
    assert short(read(frame))
    assert frame[frame.index('"message":') :].removesuffix("}]").encode() in event.encode()
