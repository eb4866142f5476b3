"""Every type through JSON and back, against what Go printed."""

import json
from collections.abc import Callable
from uuid import UUID

import pytest

from relay import codersdk
from relay.codersdk import ChatMessagePart, ChatUsageLimitPeriod, OpenEnum
from tests.codersdk.differences import Tally
from tests.codersdk.vectors import GOLDENS, Row, as_str, decoded, report, rows, same_json, value_of


def test_every_type_reads_and_writes_what_go_does() -> None:
    tally = Tally("types")
    for row in rows("types"):
        for key in ("json", "json_no_html_escape"):
            if key in row:
                got, wanted = decoded(row["type"], row[key]), row.get("roundtrip", row["json"])
                if not same_json(got, wanted):
                    tally.differs(row, got, f"{got} instead of {wanted}")
    tally.check()


def test_a_type_that_is_empty_writes_go_s_zero() -> None:
    zeros = [row for row in rows("types") if row["case"] == "zero"]
    assert len({row["type"] for row in zeros}) == len(zeros) > 60
    report(
        (row, made)
        for row in zeros
        if not same_json(made := getattr(codersdk, row["type"])().model_dump_json(), row["json"])
    )


# --- constructors ---------------------------------------------------------------------------------------------------

_CONSTRUCTORS: dict[str, Callable[..., ChatMessagePart]] = {
    "ChatMessageText": codersdk.chat_message_text,
    "ChatMessageReasoning": codersdk.chat_message_reasoning,
    "ChatMessageToolCall": codersdk.chat_message_tool_call,
    "ChatMessageToolResult": codersdk.chat_message_tool_result,
    "ChatMessageFile": codersdk.chat_message_file,
    "ChatMessageFileReference": codersdk.chat_message_file_reference,
    "ChatMessageSource": codersdk.chat_message_source,
}
_ARGUMENTS = {"url": "source_url"}


def _constructed(row: Row) -> str:
    arguments = {_ARGUMENTS.get(name, name): value for name, value in row["args"].items()}
    if row["func"] == "*ChatMessagePart.StripInternal":
        part = ChatMessagePart.model_validate_json(arguments["self"])
        part.strip_internal()
        return part.model_dump_json()
    if row["func"] == "ChatUsageLimitPeriod.Valid":
        return json.dumps(ChatUsageLimitPeriod(arguments["self"]).valid())
    if row["func"] == "AllChatMessagePartTypes":
        return json.dumps(codersdk.all_chat_message_part_types())
    if "file_id" in arguments:
        arguments["file_id"] = UUID(arguments["file_id"])
    made: ChatMessagePart = _CONSTRUCTORS[row["func"]](**arguments)
    return made.model_dump_json()


def test_constructors_make_what_go_s_do() -> None:
    report(
        (row, made) for row in rows("constructors") if value_of(made := _constructed(row)) != value_of(row["result"])
    )


# --- enums ----------------------------------------------------------------------------------------------------------


def _enum_groups() -> list[Row]:
    described = json.loads((GOLDENS / "enums.json").read_text())
    groups: list[Row] = described["groups"] + described["related_outside_the_file"]
    return groups


@pytest.mark.parametrize("group", [group for group in _enum_groups() if group["type"]], ids=lambda group: group["type"])
def test_an_enum_has_go_s_values_in_go_s_order(group: Row) -> None:
    enum: type[OpenEnum] = getattr(codersdk, group["type"])
    assert [member.value for member in enum if not member.since] == [each["value"] for each in group["values"]]


def test_the_constant_that_is_no_enum() -> None:
    (group,) = (group for group in _enum_groups() if not group["type"])
    assert [(each["name"], each["value"]) for each in group["values"]] == [
        ("DefaultChatWorkspaceTTL", codersdk.DEFAULT_CHAT_WORKSPACE_TTL)
    ]


def test_aliases_are_the_same_type() -> None:
    for alias, name in json.loads((GOLDENS / "enums.json").read_text())["type_aliases"].items():
        assert getattr(codersdk, alias) is getattr(codersdk, name)


def test_a_word_without_a_name_is_kept() -> None:
    status = codersdk.ChatStatus("brand-new")
    assert status == "brand-new"
    assert not status.is_known
    assert status not in list(codersdk.ChatStatus)
    assert codersdk.ChatStatus("waiting") is codersdk.ChatStatus.WAITING
    assert codersdk.Chat(status="brand-new").model_dump_json() == codersdk.Chat(status=status).model_dump_json()


# --- durations ------------------------------------------------------------------------------------------------------


def _lifetime(text: str) -> int | None:
    try:
        return codersdk.parse_chat_workspace_ttl(text)
    except ValueError:
        return None


def test_lifetimes_are_read_as_go_reads_them() -> None:
    report(
        (row, f"read as {got}")
        for row in rows("durations")
        if (got := _lifetime(as_str(row, "input"))) != row.get("ns")
    )
