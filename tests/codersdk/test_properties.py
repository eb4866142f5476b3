"""Laws that hold for every value."""

import json
from collections.abc import Hashable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from functools import cache
from typing import Any, Union, cast, get_args, get_origin
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from relay import codersdk
from relay.codersdk import (
    ChatError,
    ChatLastError,
    ChatStreamEventType,
    CoderModel,
    InvalidJSON,
    OpenEnum,
    RawJSON,
    StreamBroken,
    StreamDecoder,
    Timestamp,
    read_json,
    write_json,
)
from relay.codersdk.codec import bounds_of
from tests.codersdk.differences import known_keys

MODELS = [
    kind
    for name in codersdk.__all__
    if isinstance(kind := getattr(codersdk, name), type) and issubclass(kind, CoderModel) and kind is not CoderModel
]
CHAT = UUID("bb6d3fbe-1b59-436b-8dd3-90d705751897")

integers = st.integers(-(2**63), 2**63 - 1)
timestamps = st.builds(
    Timestamp,
    st.integers(-62167219200 + 90_000, 253402300799 - 90_000),  # the years 0 to 9999, whatever the offset
    st.integers(0, 999_999_999),
    st.integers(-23 * 60 - 59, 23 * 60 + 59).map(lambda minutes: minutes * 60),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
raw_json = json_values.map(RawJSON.of)


@cache
def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Every value that a field of this type can hold."""
    if hasattr(annotation, "__metadata__"):
        if annotation.__origin__ is int:
            return st.integers(*bounds_of(annotation.__metadata__))
        return values_of(annotation.__origin__)
    plain = {
        str: st.text(),
        bool: st.booleans(),
        int: st.integers(-(2**31), 2**31 - 1),  # within 32 bits as within 64
        float: st.floats(allow_nan=False, allow_infinity=False),
        bytes: st.binary(),
        UUID: st.uuids(),
        Timestamp: timestamps,
        Decimal: st.decimals(allow_nan=False, allow_infinity=False),
        RawJSON: raw_json | st.just(RawJSON()),
        JsonValue: json_values,
    }
    if annotation in plain:
        return plain[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(st.text(), values_of(arguments[1]), max_size=2)
    if origin is Union or type(annotation).__name__ == "UnionType":
        return st.none() | values_of(next(each for each in arguments if each is not type(None)))
    if issubclass(annotation, OpenEnum):
        return st.sampled_from(annotation) | st.text().map(annotation)
    if annotation is ChatLastError:
        return st.text().map(ChatLastError) | models(ChatError).map(
            lambda error: ChatLastError.of(cast(ChatError, error))
        )
    return st.deferred(lambda: models(annotation))  # a chat holds chats


@cache
def models(kind: type[CoderModel]) -> st.SearchStrategy[CoderModel]:
    fields = {name: values_of(cast(Hashable, info.annotation)) for name, info in kind.model_fields.items()}
    known = set(known_keys(kind)) | set(fields)
    unknown = st.dictionaries(st.text().filter(lambda key: key not in known), raw_json, max_size=2)

    def made(some: dict[str, Any], more: dict[str, RawJSON]) -> CoderModel:
        return kind.model_validate(some | more)

    return st.builds(made, st.fixed_dictionaries({}, optional=fields), unknown)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_model_reads_back_equal(kind: type[CoderModel]) -> None:
    @settings(max_examples=6, suppress_health_check=list(HealthCheck), database=None)
    @given(models(kind))
    def law(model: CoderModel) -> None:
        text = model.model_dump_json()
        again = kind.model_validate_json(text)
        assert again == model
        assert again.model_dump_json() == text
        assert json.loads(text) is not None

    law()


def _frame(kind: str, data: str) -> str:
    return f'{{"type":{json.dumps(kind)},"data":{data}}}'


events = st.builds(
    lambda kind, chat_id, status: {"type": kind, "chat_id": str(chat_id), "status": {"status": status}},
    st.sampled_from([each.value for each in ChatStreamEventType]) | st.text(),
    st.uuids() | st.just(UUID(int=0)),
    st.text(),
)
frames = (
    st.lists(events, max_size=3).map(lambda batch: _frame("data", json.dumps(batch)))
    | st.builds(_frame, st.sampled_from(["ping", "data", "error"]) | st.text(), json_values.map(json.dumps))
    | st.text()
    | st.binary()
)


@given(st.lists(frames, max_size=6), st.integers(0, 6))
def test_after_any_frames_a_decoder_knows_where_it_is(sent: list[str | bytes], cut: int) -> None:
    decoder = StreamDecoder(CHAT)
    seen = [event for frame in sent[:cut] for event in decoder.feed(frame)]
    errors = [event for event in seen if event.error and event.chat_id == CHAT]
    if decoder.ended:
        assert seen
        assert seen[-1] is errors[-1]
        assert decoder.close_code in {1000, 1007}
    assert all(event.chat_id.int for event in seen)
    rest = [event for frame in sent[cut:] for event in decoder.feed(frame)]
    whole = StreamDecoder(CHAT)
    assert [event for frame in sent for event in whole.feed(frame)] == seen + rest
    assert whole.ended == decoder.ended
    last = decoder.broken(StreamBroken("gone"))
    assert len(last) == (0 if whole.ended else 1)
    assert decoder.ended


@given(st.text() | st.binary() | json_values.map(json.dumps))
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    for kind in (codersdk.ChatStreamEvent, codersdk.ChatModelConfig, list[codersdk.Chat]):
        try:
            value: Any = read_json(kind, text)
        except InvalidJSON:
            continue
        assert read_json(kind, write_json(value, kind)) == value


@given(models(codersdk.ChatStreamEvent), st.data())
def test_what_is_cut_short_is_refused(event: CoderModel, data: st.DataObject) -> None:
    text = event.model_dump_json()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(InvalidJSON):
        codersdk.ChatStreamEvent.model_validate_json(text[:cut])


@given(st.text(alphabet='[]{}",:0123456789.eE+-truefalsn \n\t\\u') | json_values.map(json.dumps))
def test_raw_json_is_what_python_takes_for_json(text: str) -> None:
    try:
        json.loads(text, parse_constant=lambda _: json.loads(""))
    except ValueError:
        if text:
            with pytest.raises(InvalidJSON):
                RawJSON(text)
    else:
        assert RawJSON(text) == text


@given(timestamps)
def test_a_time_reads_back_with_its_nanoseconds_and_its_offset(moment: Timestamp) -> None:
    again = Timestamp.parse(str(moment))
    assert (again.unix_seconds, again.nanosecond) == (moment.unix_seconds, moment.nanosecond)
    assert again.offset_seconds == moment.offset_seconds


@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 1, 1)),  # noqa: DTZ001
    st.integers(-1439, 1439),
)
def test_a_datetime_comes_back(moment: datetime, minutes: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    back = Timestamp.from_datetime(aware).to_datetime()
    assert (back, back.utcoffset()) == (aware, aware.utcoffset())
