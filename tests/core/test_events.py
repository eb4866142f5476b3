"""One event on the wire: ids, routing keys, the envelope, and the way back."""

import json
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast
from uuid import UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.errors import BadEvent
from relay.core.events import (
    CONTRACT,
    NOBODY,
    PREVIEW_DETAILS,
    ChatRef,
    Data,
    Event,
    Origin,
    decode_event,
    encode_json,
    event_id,
    message_event_id,
    parse_json,
    routing_word,
    to_utc,
    utc,
)
from tests.core.frames import CHAT, OWNER, REF, user

ROOT = UUID(int=77)
ANY_TEXT = st.text(st.characters())  # lone surrogates too
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


def an_event(**fields: Any) -> Event:
    values: dict[str, Any] = {
        "id": str(UUID(int=1)),
        "family": "chat",
        "event": "message",
        "detail": "user",
        "chat": ChatRef("https://coder.test", CHAT, OWNER, ROOT),
        "content": {"message": user(1, "hello"), "text": "hello"},
        "time": "2026-03-20T18:20:00Z",
        "origin": Origin.LIVE,
        "session": 3,
        "position": 14,
    }
    return Event(**{**values, **fields})


# --- ids --------------------------------------------------------------------------------------------------------------

SOURCES = st.lists(
    st.recursive(st.integers() | st.none() | ANY_TEXT, lambda inner: st.lists(inner, max_size=3), max_leaves=5),
    max_size=4,
)
FACTS = st.tuples(st.sampled_from(["message", "turn", "error", "history"]), SOURCES)


@given(FACTS, FACTS)
def test_different_facts_have_different_ids(one: tuple[str, list[object]], two: tuple[str, list[object]]) -> None:
    same = json.dumps(one) == json.dumps(two)
    assert (event_id(REF, one[0], *one[1]) == event_id(REF, two[0], *two[1])) == same


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("a", "b"), ("ab",)),
        (("a,b",), ("a", "b")),
        (('a","b',), ("a", "b")),
        ((1,), ("1",)),
        ((None,), ("null",)),
        ((["a"], "b"), (["a", "b"],)),
        ((), ([],)),
        (("é",), ("e\u0301",)),
    ],
)
def test_no_source_runs_into_the_next(one: tuple[object, ...], two: tuple[object, ...]) -> None:
    assert event_id(REF, "x", *one) != event_id(REF, "x", *two)


def test_the_chat_and_its_server_are_part_of_the_id_and_its_owner_is_not() -> None:
    base = event_id(REF, "message", 1)
    assert event_id(replace(REF, chat_id=UUID(int=9)), "message", 1) != base
    assert event_id(replace(REF, deployment="https://other.test"), "message", 1) != base
    assert event_id(replace(REF, owner_id=UUID(int=9), root_chat_id=UUID(int=9)), "message", 1) == base


def test_ids_never_change() -> None:
    """Consumers have stored them."""
    name = '["https://coder.test","5f0c2f5e-8a1d-4c57-9e55-6b8d0f2a7c31","message",1043]'
    expected = uuid5(UUID("6b2f7a0e-6f43-5c0e-9a53-3f0f8a3a5d11"), name)
    assert event_id(REF, "message", 1043) == str(expected) == "7d5d2092-5c79-5688-a2ef-c7532740aa0e"


# --- routing ----------------------------------------------------------------------------------------------------------


def test_a_routing_key_has_five_words() -> None:
    assert an_event().routing_key == f"chat.message.user.{OWNER}.{CHAT}"


def test_what_belongs_to_nobody_has_a_blank_word() -> None:
    event = an_event(
        family="usage", event="exceeded", detail="user", chat=ChatRef("https://coder.test", NOBODY, OWNER, NOBODY)
    )
    assert event.routing_key == f"usage.exceeded.user.{OWNER}._"
    assert decode_event(event.encode(), event.routing_key).chat == event.chat
    both = an_event(chat=ChatRef("https://coder.test", NOBODY, NOBODY, NOBODY))
    assert both.routing_key == "chat.message.user._._"
    assert decode_event(both.encode(), both.routing_key).chat == both.chat


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("requires_action", "requires_action"),
        ("tool-call", "tool-call"),
        ("Queued.For Capacity", "queued_for_capacity"),
        ("a.b", "a_b"),
        ("*", "_"),
        ("#", "_"),
        ("", "_"),
        ("ü\ud800\x00", "___"),
        ("x" * 300, "x" * 64),
    ],
)
def test_words_of_a_routing_key(value: str, word: str) -> None:
    assert routing_word(value) == word


@given(ANY_TEXT)
def test_a_word_is_one_word_whatever_upstream_calls_it(value: str) -> None:
    key = an_event(detail=value).routing_key
    assert key.isascii()
    assert len(key.split(".")) == 5
    assert all(key.split("."))
    assert not set(key) & set("*# ")
    assert len(key) <= 255


# --- the envelope -----------------------------------------------------------------------------------------------------


def test_the_envelope_is_a_cloud_event() -> None:
    assert json.loads(an_event().encode()) == {
        "specversion": "1.0",
        "id": "00000000-0000-0000-0000-000000000001",
        "source": f"https://coder.test/chats/{CHAT}",
        "type": "io.chatrelay.chat.message.v1",
        "subject": str(CHAT),
        "time": "2026-03-20T18:20:00Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:chatrelay:schema:chat.message.v1",
        "session": 3,
        "position": 14,
        "origin": "live",
        "ownerid": str(OWNER),
        "rootchatid": str(ROOT),
        "traceparent": "00-00000000000000000000000000000001-0000000000000001-00",
        "data": {"message": user(1, "hello"), "text": "hello"},
    }


TYPES = {
    "message": {"io.chatrelay.chat.message.v1"},
    "status": {"io.chatrelay.chat.status.v1"},
    "turn": {f"io.chatrelay.chat.turn.{detail}.v1" for detail in ("completed", "interrupted", "failed")},
    "threshold": {"io.chatrelay.usage.threshold.v1"},
    "stored": {"io.chatrelay.archive.stored.v1"},
    "history": {"io.chatrelay.chat.history.replaced.v1"},
}


@pytest.mark.parametrize("event", TYPES)
def test_the_type_leaves_a_role_a_status_or_a_scope_out(event: str) -> None:
    rows = [row for row in CONTRACT if row.event == event]
    named = {an_event(family=row.family, event=event, detail=detail).type for row in rows for detail in row.details}
    assert named == TYPES[event]


def test_previews_alone_are_transient() -> None:
    for row in CONTRACT:
        event = an_event(family=row.family, event=row.event, detail=row.details[0])
        assert event.transient == (row.event == "preview") == row.transient


def test_a_part_that_upstream_calls_reset_is_none_of_our_resets() -> None:
    assert "reset" not in PREVIEW_DETAILS
    assert "other" in PREVIEW_DETAILS


def test_the_subject_of_usage_is_the_user() -> None:
    event = an_event(family="usage", event="exceeded", subject=str(OWNER))
    assert event.envelope()["subject"] == str(OWNER)
    assert decode_event(event.encode(), event.routing_key).subject == str(OWNER)


DETAILS = [(row.family, row.event, detail) for row in CONTRACT for detail in row.details if detail not in ("*", "_")]


@given(
    kind=st.sampled_from(DETAILS),
    data=st.dictionaries(ANY_TEXT, ANY_JSON, max_size=4),
    ids=st.lists(st.uuids().filter(lambda key: key != NOBODY), min_size=4, max_size=4),
    order=st.tuples(st.integers(1), st.integers(1)),
    origin=st.sampled_from(Origin),
)
def test_what_was_encoded_is_decoded(
    kind: tuple[str, str, str], data: dict[str, Any], ids: list[UUID], order: tuple[int, int], origin: Origin
) -> None:
    event = an_event(
        id=str(ids[0]),
        family=kind[0],
        event=kind[1],
        detail=kind[2],
        chat=ChatRef("https://coder.test/a", ids[1], ids[2], ids[3]),
        content=cast(Data, data),
        origin=origin,
        session=order[0],
        position=order[1],
        subject="someone",
    )
    assert decode_event(event.encode(), event.routing_key) == event


@given(
    st.sampled_from([(t.family, t.event, detail) for t in CONTRACT for detail in t.details]),
    ANY_TEXT,
    ANY_TEXT,
    ANY_TEXT,
    ANY_JSON,
)
def test_the_body_is_the_envelope(
    kind: tuple[str, str, str], deployment: str, subject: str, time: str, value: object
) -> None:
    family, event, detail = kind
    ref = replace(REF, deployment=deployment)
    told = an_event(
        family=family, event=event, detail=detail, chat=ref, subject=subject, time=time, content={"value": value}
    )
    assert list(json.loads(told.encode()).items()) == list(told.envelope().items())


@given(FACTS)
def test_an_id_is_the_uuid5_of_its_name(fact: tuple[str, list[object]]) -> None:
    name = json.dumps([REF.deployment, str(REF.chat_id), fact[0], *fact[1]], separators=(",", ":"))
    assert event_id(REF, fact[0], *fact[1]) == str(uuid5(UUID("6b2f7a0e-6f43-5c0e-9a53-3f0f8a3a5d11"), name))


@given(st.integers(0, 2**63 - 1))
def test_a_message_has_the_id_of_its_fact(number: int) -> None:
    assert message_event_id(REF, number) == event_id(REF, "message", number)


@given(ANY_JSON)
def test_json_is_utf8_and_keeps_every_value(value: object) -> None:
    raw = encode_json(value)
    assert raw.decode("utf-8")
    assert json.loads(raw) == value


def test_json_on_the_wire_is_short() -> None:
    assert encode_json({"a": [1, "ü"]}) == '{"a":[1,"ü"]}'.encode()
    assert encode_json("\ud800ü") == b'"\\ud800\\u00fc"'


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param({"id": None}, "not an event", id="id is null"),
        pytest.param({"id": "x"}, "not an event", id="id is no uuid"),
        pytest.param({"source": 5}, "not an event", id="source is a number"),
        pytest.param({"source": "https://coder.test"}, "not an event", id="source names no chat"),
        pytest.param({"rootchatid": "x"}, "not an event", id="root is no uuid"),
        pytest.param({"data": []}, "data is not an object", id="data is a list"),
        pytest.param({"origin": "dream"}, "not an event", id="unknown origin"),
        pytest.param({"session": "x"}, "not an event", id="session is text"),
        pytest.param({"session": None}, "not an event", id="session is null"),
        pytest.param({"position": float("inf")}, "not an event", id="position is endless"),
    ],
)
def test_a_message_that_is_no_event_of_ours(change: dict[str, object], why: str) -> None:
    body = json.dumps({**an_event().envelope(), **change}).encode()
    with pytest.raises(BadEvent, match=why):
        decode_event(body, an_event().routing_key)


@pytest.mark.parametrize(
    "name", ["id", "source", "data", "time", "origin", "session", "position", "subject", "rootchatid"]
)
def test_an_attribute_that_is_missing_is_named(name: str) -> None:
    document = an_event().envelope()
    del document[name]
    with pytest.raises(BadEvent, match=f"attribute '{name}' is missing"):
        decode_event(json.dumps(document).encode(), an_event().routing_key)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b"", "chat.message.user"),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b'"x"', None),
        (b"[" * 100_000, None),
        (None, "chat.message.user"),
        (None, f"chat.message.user.extra.{OWNER}.{CHAT}"),
        (None, f"chat.message.user.nobody.{CHAT}"),
        (None, f"chat.unheard.user.{OWNER}.{CHAT}"),
        (None, ""),
    ],
)
def test_poison_is_a_bad_event_and_nothing_worse(body: bytes | None, key: str | None) -> None:
    with pytest.raises(BadEvent):
        decode_event(an_event().encode() if body is None else body, an_event().routing_key if key is None else key)


def test_unknown_attributes_are_passed_over() -> None:
    body = json.dumps({**an_event().envelope(), "fromthefuture": 1}).encode()
    assert decode_event(body, an_event().routing_key) == an_event(subject=str(CHAT))


# --- times and texts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stamp", "there"),
    [
        ("2026-03-20T20:00:05.123456789+02:00", "2026-03-20T18:00:05.123456789Z"),
        ("2026-03-20T18:00:05Z", "2026-03-20T18:00:05Z"),
        ("2026-03-20t18:00:05.5z", "2026-03-20T18:00:05.5Z"),
        ("2026-03-20T00:30:00-09:30", "2026-03-20T10:00:00Z"),
        ("2026-12-31T23:59:59+00:00", "2026-12-31T23:59:59Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z"),
        ("0001-01-01T00:00:00+01:00", None),
        ("2026-02-30T00:00:00Z", None),
        ("2026-03-20T18:00:05", None),
        ("2026-03-20 18:00:05Z", None),
        ("2026-03-20T18:00:05Zx", None),
        ("٢٠٢٦-03-20T18:00:05Z", None),
        ("2026-03-20T18:00:05.٢Z", None),
        ("2026-03-20T18:00:05.Z", None),
        ("2026-03-20T18:00:05." + "0" * 60 + "Z", None),
        ("", None),
    ],
)
def test_upstream_times_in_utc(stamp: str, there: str | None) -> None:
    assert to_utc(stamp) == there


def test_our_times_in_utc() -> None:
    zone = timezone(timedelta(hours=2))
    assert utc(datetime(2026, 3, 1, 1, 30, 0, 250, tzinfo=zone)) == "2026-02-28T23:30:00.000250Z"
    assert utc(datetime(2026, 3, 1, tzinfo=UTC)) == "2026-03-01T00:00:00Z"


def test_json_from_upstream() -> None:
    assert parse_json('{"a": 1.5, "b": 12345678901234567890}') == {"a": 1.5, "b": 12345678901234567890}
    assert parse_json("-1e999") == "-1e999"
    for wrong in ("NaN", "-Infinity", "{", ""):
        with pytest.raises(ValueError, match=r"JSON|Expecting"):
            parse_json(wrong)


def test_what_was_read_can_be_written_inside_of_more() -> None:
    """And from deeper in the program than it was read."""
    depths = range(50, sys.getrecursionlimit(), 50)
    for depth in depths:
        try:
            value = parse_json("[" * depth + "]" * depth)
        except ValueError:
            break
        _deeper(40, lambda value=value: encode_json({"data": {"message": {"content": [value]}}}))
    assert depth > 500


def _deeper(levels: int, act: Any) -> None:
    if levels:
        _deeper(levels - 1, act)
    else:
        act()
