"""The small types: times, raw JSON, ids, decimals, and models as pydantic sees them."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import pytest
from pydantic import BaseModel, ValidationError

from relay.codersdk import (
    NIL_UUID,
    ZERO_TIME,
    Chat,
    ChatModelCallConfig,
    ChatModelConfig,
    ModelCostConfig,
    RawJSON,
    Timestamp,
    UpdateChatProviderConfigRequest,
    parse_decimal,
    parse_uuid,
    write_json,
)


@pytest.mark.parametrize(
    ("text", "again"),
    [
        pytest.param("2025-03-02T14:00:00.123456789Z", None, id="nanoseconds"),
        pytest.param("2025-03-02T14:00:00.120000000+05:30", "2025-03-02T14:00:00.12+05:30", id="zeros at the end"),
        pytest.param("2025-03-02T14:00:00.1234567899Z", "2025-03-02T14:00:00.123456789Z", id="a tenth digit is cut"),
        pytest.param("2025-03-02T14:00:00-00:00", "2025-03-02T14:00:00Z", id="no offset"),
        pytest.param("2025-03-02T4:00:00,5Z", "2025-03-02T04:00:00.5Z", id="as lenient as Go"),
        pytest.param("0000-01-01T00:00:00+02:00", None, id="the year 0, which Python does not know"),
        pytest.param("9999-12-31T23:59:59.999999999-23:59", None, id="the last moment"),
        pytest.param("2000-02-29T00:00:00Z", None, id="leap day"),
    ],
)
def test_a_time_is_written_as_go_writes_it(text: str, again: str | None) -> None:
    assert str(Timestamp.parse(text)) == (again or text)


@pytest.mark.parametrize(
    "text",
    ["", "yesterday", "2025-02-29T00:00:00Z", "2025-01-01T24:00:00Z", "2025-01-01T00:00:60Z", "2025-01-01 00:00:00Z",
     "2025-01-01t00:00:00z", "2025-01-01T00:00:00", "2025-1-01T00:00:00Z", "2025-01-01T00:00:00+25:00",
     " 2025-01-01T00:00:00Z"],
)  # fmt: skip
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an RFC 3339|no such"):
        Timestamp.parse(text)


def test_times_are_moments() -> None:
    noon = Timestamp.parse("2025-03-02T12:00:00Z")
    assert noon == Timestamp.parse("2025-03-02T14:00:00+02:00")
    assert hash(noon) == hash(Timestamp.parse("2025-03-02T14:00:00+02:00"))
    assert noon < Timestamp.parse("2025-03-02T12:00:00.000000001Z")
    assert noon != "2025-03-02T12:00:00Z"
    assert Timestamp.parse("0001-01-01T02:00:00+02:00").is_zero()
    assert repr(noon) == "Timestamp('2025-03-02T12:00:00Z')"


def test_times_and_datetimes() -> None:
    moment = datetime(2025, 3, 2, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))
    assert str(Timestamp.from_datetime(moment)) == "2025-03-02T12:00:00.123456-03:30"
    assert Timestamp.from_datetime(moment).to_datetime() == moment
    assert ZERO_TIME.to_datetime() == datetime(1, 1, 1, tzinfo=UTC)
    with pytest.raises(ValueError, match="time zone"):
        Timestamp.from_datetime(datetime(2025, 3, 2))  # noqa: DTZ001
    with pytest.raises(ValueError, match="no such year"):
        Timestamp.parse("0000-01-01T00:00:00Z").to_datetime()


def test_a_time_that_has_no_text_cannot_be_written() -> None:
    chat = Chat.model_validate_json('{"created_at":"2025-01-01T00:00:00+24:00"}')
    with pytest.raises(ValueError, match="24 hours"):
        chat.model_dump_json()
    assert repr(chat.created_at).startswith("Timestamp(")


def test_raw_json() -> None:
    assert RawJSON.of({"a": [1, None, "é"]}) == '{"a":[1,null,"é"]}'
    assert RawJSON(' {"a": 1.10} ').exact() == {"a": Decimal("1.10")}
    assert not RawJSON()
    assert RawJSON("null")
    assert repr(RawJSON("1")) == "RawJSON('1')"
    for wrong in ("{", "1 2", "NaN", "'a'", "[" * 20_000 + "]" * 20_000):
        with pytest.raises(ValueError, match=r"\S"):
            RawJSON(wrong)
    with pytest.raises(ValueError, match="not JSON compliant"):
        RawJSON.of(float("nan"))


@pytest.mark.parametrize(
    "text",
    [
        "3418d24b-971a-4872-804b-15f196ff92b7",
        "3418D24B-971A-4872-804B-15F196FF92B7",
        "urn:uuid:3418d24b-971a-4872-804b-15f196ff92b7",
        "{3418d24b-971a-4872-804b-15f196ff92b7}",
        "3418d24b971a4872804b15f196ff92b7",
    ],
)
def test_forms_of_a_uuid(text: str) -> None:
    assert parse_uuid(text) == UUID("3418d24b-971a-4872-804b-15f196ff92b7")


@pytest.mark.parametrize(
    "text", ["", "3418d24b", "3418d24b-971a-4872-804b-15f196ff92bg", "3418d24b-971a-4872-804b+15f196ff92b7"]
)
def test_what_is_no_uuid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a UUID"):
        parse_uuid(text)


@pytest.mark.parametrize(
    ("text", "written"),
    [("1.50", "1.5"), ("-.5", "-0.5"), ("5.", "5"), ("1e3", "1000"), ("12E-3", "0.012"), ("-0.0", "0"), ("+7", "7"),
     ("0.1000000000000000000000000000000000001", None), ("9" * 5000, None)],
)  # fmt: skip
def test_prices_are_exact(text: str, written: str | None) -> None:
    price = ModelCostConfig(input_price_per_million_tokens=parse_decimal(text))
    assert write_json(price) == f'{{"input_price_per_million_tokens":"{written or text}"}}'


@pytest.mark.parametrize("text", ["", ".", "1.2.3", "1e", "1e99999999999", "NaN", "Infinity", "1_000", " 1", "0x1"])
def test_what_is_no_decimal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"decimal|exponent"):
        parse_decimal(text)


# --- as pydantic sees them ------------------------------------------------------------------------------------------


class Holder(BaseModel):
    """Somebody else's model with one of ours in it."""

    chat: Chat


def test_a_model_within_another_one() -> None:
    held = Holder.model_validate_json('{"chat":{"id":"3418d24b-971a-4872-804b-15f196ff92b7","title":null,"new":[1]}}')
    assert held.chat.title == ""
    again = Holder.model_validate_json(held.model_dump_json())
    assert again == held
    assert "workspace_id" not in held.model_dump(mode="json")["chat"]
    assert held.model_dump()["chat"]["workspace_id"] is None


def test_values_are_checked_where_they_are_set() -> None:
    chat = Chat()
    chat.status = "new"  # type: ignore[assignment]
    assert type(chat.status).__name__ == "ChatStatus"
    with pytest.raises(ValidationError, match="title"):
        chat.title = 5  # type: ignore[assignment]
    with pytest.raises(ValidationError, match="finite"):
        ChatModelCallConfig(temperature=float("nan"))


def test_two_values_share_nothing() -> None:
    one, other = (Chat.model_validate_json('{"mcp_server_ids":[]}') for _ in range(2))
    assert one.mcp_server_ids is not None
    one.mcp_server_ids.append(NIL_UUID)
    assert other.mcp_server_ids == []


def test_the_field_whose_key_pydantic_keeps_for_itself() -> None:
    call_config = ChatModelCallConfig(top_k=5)
    assert ChatModelConfig(call_config=call_config) == ChatModelConfig.model_validate({"model_config": call_config})
    assert '"model_config":{"top_k":5}' in ChatModelConfig(call_config=call_config).model_dump_json()


def test_a_provider_s_key_is_not_shown() -> None:
    request = UpdateChatProviderConfigRequest(api_key="sk-secret")
    assert "sk-secret" not in repr(request)
    with pytest.raises(ValidationError) as refused:
        UpdateChatProviderConfigRequest.model_validate({"api_key": ["sk-secret"]})
    assert "sk-secret" not in str(refused.value)
