"""What servers after the seed send: recordings of five of them, read whole; and calls that the seed does not have."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from relay import codersdk
from relay.codersdk import (
    CHATS_PATH_V2,
    Chat,
    ChatCost,
    ChatErrorKind,
    ChatLastError,
    ChatMessagesResponse,
    ChatStatus,
    ChatStreamEvent,
    ChatStreamEventType,
    ChatToolResult,
    ChatUsageLimitExceeded,
    ChatUsageLimitStatus,
    ChatWatchEventKind,
    CoderClient,
    CoderModel,
    Conflict,
    OpenEnum,
    Since,
    StreamDecoder,
    read_json,
    write_json,
)
from relay.codersdk.answers import refusal
from tests.codersdk.scripted_server import Reply, ScriptedServer
from tests.codersdk.vectors import Row, rows, value_of

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
NEWER = ("d1", "d1e", "d2", "d2b", "d3")
CHAT = UUID("bb6d3fbe-1b59-436b-8dd3-90d705751897")
JSON = {"Content-Type": "application/json"}


@cache
def recorded(dialect: str) -> tuple[Row, ...]:
    files = sorted((CAPTURES / dialect).glob("*.jsonl"))
    assert files
    return tuple(json.loads(line) for file in files for line in file.read_text().splitlines())


def frames(dialect: str) -> Iterator[str]:
    """Text frames of all sockets, those cut short by the recorder left out."""
    for row in recorded(dialect):
        if row.get("kind") == "frame" and isinstance(row.get("raw"), str) and "size" not in row:
            yield row["raw"]


def is_watch(frame: str) -> bool:
    return frame.lstrip().startswith('{"kind"')


@cache
def events(dialect: str) -> tuple[ChatStreamEvent, ...]:
    decoder = StreamDecoder(CHAT)
    found = [event for frame in frames(dialect) if not is_watch(frame) for event in decoder.feed(frame)]
    assert not decoder.ended
    return tuple(found)


def bodies(dialect: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Bodies of answered GETs whose path below the chats API fits."""
    for row in recorded(dialect):
        method, _, target = str(row.get("rest", "")).partition(" ")
        path = target.partition("?")[0].removeprefix("/api/experimental/chats")
        if method == "GET" and row.get("status") == 200 and target != path and wanted(path):
            yield row["body"]


def is_chat(path: str) -> bool:
    return path.count("/") == 1 and path.count("-") == 4


def chats(dialect: str) -> list[Chat]:
    listed = [chat for body in bodies(dialect, lambda path: not path) for chat in read_json(list[Chat], body)]
    return listed + [read_json(Chat, body) for body in bodies(dialect, is_chat)]


@pytest.mark.parametrize("dialect", NEWER)
def test_every_frame_is_read_and_says_what_it_said(dialect: str) -> None:
    said = [event for frame in frames(dialect) if not is_watch(frame) for event in json.loads(frame)]
    found = events(dialect)
    assert len(said) == len(found) > 1000
    kinds = {event.type for event in found}
    assert all(kind.is_known for kind in kinds)
    assert ChatStreamEventType.ACTION_REQUIRED in kinds
    assert {"history_reset", "preview_reset"} <= kinds if dialect >= "d2" else not {"history_reset"} & kinds
    # Nothing is lost: what is left out of our JSON is empty in theirs.
    for wanted, event in zip(said, found, strict=True):
        assert without_empty(value_of(event.model_dump_json())) == without_empty(value_of(json.dumps(wanted)))


@pytest.mark.parametrize("dialect", NEWER)
def test_every_watch_frame_is_read(dialect: str) -> None:
    seen = [read_json(codersdk.ChatWatchEvent, frame) for frame in frames(dialect) if is_watch(frame)]
    assert len(seen) > 40
    assert all(event.kind.is_known and event.chat.id.int for event in seen)
    assert all(event.chat.organization_id for event in seen)
    calls = [event.tool_calls for event in seen if event.kind == ChatWatchEventKind.ACTION_REQUIRED]
    assert calls
    assert all(calls) if dialect < "d2" else not any(calls)


@pytest.mark.parametrize("dialect", NEWER)
def test_every_chat_is_read_with_what_was_added(dialect: str) -> None:
    found = chats(dialect)
    assert len(found) > 100
    assert all(chat.organization_id and chat.children is not None and chat.client_type == "api" for chat in found)
    children = [child for chat in found for child in chat.children or []]
    assert children
    assert all(child.parent_chat_id for child in children)
    failed = [chat.last_error for chat in found if chat.last_error]
    assert failed
    assert {type(each) for each in failed} == {ChatLastError}
    if dialect == "d1":
        assert {each.error.kind for each in failed} == {ChatErrorKind.GENERIC}
    else:
        assert all(each.error.message == each and each.error.kind.is_known and each.error.provider for each in failed)
        assert {chat.owner_username for chat in found} >= {"ann"}
        assert any(chat.last_turn_summary for chat in found) or dialect == "d1e"
    assert any(chat.shared for chat in found) == (dialect >= "d2")
    assert not [key for chat in found for key in chat.model_extra or {}]


@pytest.mark.parametrize("dialect", NEWER)
def test_every_page_of_messages_is_read(dialect: str) -> None:
    pages = list(bodies(dialect, lambda path: path.endswith("/messages")))
    assert len(pages) > 30
    for body in pages:
        page = read_json(ChatMessagesResponse, body)
        assert without_empty(value_of(write_json(page))) == without_empty(value_of(body))
        assert not [
            key for message in page.messages or [] for part in message.content for key in part.model_extra or {}
        ]


@pytest.mark.parametrize("dialect", NEWER)
def test_parts_have_coordinates_since_the_episodes(dialect: str) -> None:
    parts = [event.message_part for event in events(dialect) if event.message_part]
    assert len(parts) > 500
    if dialect < "d2":
        assert {(part.history_version, part.generation_attempt, part.seq) for part in parts} == {(0, 0, 0)}
    else:
        assert all(part.history_version and part.generation_attempt and part.seq for part in parts)
        assert {part.generation_attempt for part in parts} > {1}


@pytest.mark.parametrize("dialect", NEWER)
def test_errors_and_retries_say_of_what_kind_they_are(dialect: str) -> None:
    errors = [event.error for event in events(dialect) if event.error]
    retries = [event.retry for event in events(dialect) if event.retry]
    assert errors
    assert retries
    assert all(each.kind.is_known and each.provider for each in errors)
    assert all(each.kind.is_known and each.provider for each in retries)
    assert {each.status_code for each in errors} & {400, 401, 502}
    assert any(each.detail for each in errors)
    calls = [event.action_required for event in events(dialect) if event.action_required]
    assert [call.tool_name for call in calls[0].tool_calls or []] == ["lab_tool"]
    assert json.loads((calls[0].tool_calls or [])[0].args)["x"] == 1


@pytest.mark.parametrize(("dialect", "requests", "priced"), [("d2b", 0, 1), ("d3", 2, 0)])
def test_dialects_5a_row_13_what_a_chat_cost_is_told_in_two_ways(dialect: str, requests: int, priced: int) -> None:
    costs = [read_json(ChatCost, body) for body in bodies(dialect, lambda path: path.endswith("/cost"))]
    assert [(cost.request_count, cost.priced_message_count) for cost in costs] == [(requests, priced)]
    assert not costs[0].model_extra


@pytest.mark.parametrize("dialect", ["d1", "d1e", "d2", "d2b"])
def test_dialects_5a_row_15_a_used_up_limit_has_no_detail_and_no_limit_no_dates(dialect: str) -> None:
    refused = [row for row in recorded(dialect) if row.get("status") == 409 and "resets_at" in str(row["body"])]
    assert refused
    for row in refused:
        error = refusal(409, JSON["Content-Type"], row["body"].encode(), method="POST", url="", may_be_limit=True)
        assert isinstance(error, ChatUsageLimitExceeded)
        assert error.detail == ""
        assert error.spent_micros > error.limit_micros == 1
    states = [
        read_json(ChatUsageLimitStatus, body)
        for body in bodies(dialect, lambda path: path.endswith("usage-limits/status"))
    ]
    free = [state for state in states if not state.is_limited]
    assert free
    assert all(state.period == "" and state.spend_limit_micros is None for state in free)
    assert all(state.period_start.is_zero() and state.period_end.is_zero() for state in free)


def without_empty(value: Any) -> Any:
    """A value without what means "nothing" in an optional field."""
    if isinstance(value, dict):
        kept = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in _EMPTY}
    if isinstance(value, list):
        return [without_empty(item) for item in value]
    return value


_EMPTY: tuple[Any, ...] = (None, "", 0, ("boolean", False), [], {})


# --- the seed's own JSON --------------------------------------------------------------------------------------------

MODELS = [
    kind
    for name in codersdk.__all__
    if isinstance(kind := getattr(codersdk, name), type) and issubclass(kind, CoderModel)
]


def added(kind: type[CoderModel]) -> dict[str, str]:
    """Fields that the seed does not have, with the version that has them."""
    marks = ((name, each) for name, info in kind.model_fields.items() for each in info.metadata)
    return {name: each.version for name, each in marks if isinstance(each, Since)}


def test_no_added_field_changes_what_the_seed_s_values_are_written_as() -> None:
    vectors = {kind: [row["json"] for row in rows("types") if row["type"] == kind.__name__] for kind in MODELS}
    written = {kind: [json.loads(read_json(kind, text).model_dump_json()) for text in vectors[kind]] for kind in MODELS}
    with_additions = [kind for kind in MODELS if added(kind) and vectors[kind]]
    assert sum(len(written[kind]) for kind in with_additions) > 50
    for kind in with_additions:
        options = kind.__name__.endswith("Options")  # never JSON, only part of a URL
        assert options or not [keys for keys in written[kind] if set(added(kind)) & set(keys)], kind


def test_what_was_added_says_since_when() -> None:
    versions = [version for kind in MODELS for version in added(kind).values()]
    enums = [each for name in codersdk.__all__ if issubclass_of_enum(each := getattr(codersdk, name))]
    versions += [member.since for enum in enums for member in enum if member.since]
    assert len(versions) > 60
    assert set(versions) <= {f"2.{minor}" for minor in range(32, 39)}
    assert ChatStatus.WAITING.since == ""
    assert ChatStatus("newest").since == ""
    assert ChatStatus("requires_action") is ChatStatus.REQUIRES_ACTION


def issubclass_of_enum(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, OpenEnum) and value is not OpenEnum


@pytest.mark.parametrize(
    ("text", "message", "kind", "again"),
    [
        ('"boom"', "boom", "generic", '"boom"'),
        ('{"message":"boom","kind":"timeout"}', "boom", "timeout", None),
        ('{ "message": "boom", "new": 1.50 }', "boom", "", None),
        ("{}", "", "", None),
    ],
)
def test_the_last_error_is_a_text_that_may_know_more(text: str, message: str, kind: str, again: str | None) -> None:
    chat = Chat.model_validate_json(f'{{"last_error":{text}}}')
    assert chat.last_error == message
    assert chat.last_error is not None
    assert (chat.last_error.error.message, chat.last_error.error.kind) == (message, kind)
    assert f'"last_error":{again or text}' in chat.model_dump_json()


@pytest.mark.parametrize("text", ["5", "[]", "true", '{"message":5}', '{"message":"a"', '"'])
def test_what_is_no_error_is_refused(text: str) -> None:
    with pytest.raises(codersdk.InvalidJSON):
        Chat.model_validate_json(f'{{"last_error":{text}}}')


def test_an_error_can_be_given() -> None:
    assert Chat(last_error={"message": "a", "status_code": 5}).last_error == "a"
    assert Chat(last_error="a").last_error == "a"
    with pytest.raises(ValueError, match="a text or an error"):
        Chat(last_error=5)


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["", " \t\r\n"])
def test_one_decoder_reads_both_kinds_of_frames(space: str) -> None:
    event = {"type": "status", "status": {"status": "running"}}
    decoder = StreamDecoder(CHAT)
    bare = decoder.feed(space + json.dumps([event, event]))
    wrapped = decoder.feed(space + json.dumps({"type": "data", "data": [event, event]}))
    assert bare == wrapped
    assert len(bare) == 2
    assert bare[0].chat_id == CHAT
    (error,) = decoder.feed(space + '[{"type":5}]')
    assert error.error is not None
    assert error.error.message.startswith("decode chat stream event batch: ")
    assert decoder.ended


async def test_a_watch_without_a_ping_is_open_and_tells(server: ScriptedServer) -> None:
    frame = json.dumps({"kind": "action_required", "chat": {"id": str(CHAT)}, "tool_calls": [{"tool_call_id": "c"}]})
    server.begin(Reply(101, frames=[]))
    async with CoderClient(server.url, "token") as coder, coder.watch_chats():
        pass  # it is open although nothing came
    server.begin(Reply(101, frames=[{"kind": "text", "data": frame}, {"kind": "close", "code": 1000, "reason": ""}]))
    async with CoderClient(server.url, "token") as coder, coder.watch_chats() as watch:
        (event,) = [each async for each in watch]
    assert event.kind is ChatWatchEventKind.ACTION_REQUIRED
    assert event.tool_calls is not None
    assert event.tool_calls[0].tool_call_id == "c"


# --- calls ---------------------------------------------------------------------------------------------------------


async def test_the_api_at_its_other_path(server: ScriptedServer) -> None:
    server.begin(Reply(200, JSON, b"[]"), Reply(101, frames=[{"kind": "close", "code": 1000, "reason": ""}]))
    async with CoderClient(server.url, "token", chats_path=CHATS_PATH_V2) as coder:
        assert await coder.list_chats() == []
        assert [event async for event in coder.stream_chat(CHAT, after_id=7, after_revision=9)] == []
    assert [each.target for each in server.received] == [
        "/api/v2/chats",
        f"/api/v2/chats/{CHAT}/stream?after_id=7&after_revision=9",
    ]


_BASE = f"/api/experimental/chats/{CHAT}"


@pytest.mark.parametrize(
    ("call", "target", "answer", "wanted"),
    [
        (
            lambda coder: coder.get_chat_cost(CHAT),
            f"{_BASE}/cost",
            '{"total_cost_micros":0,"request_count":2,"unpriced_request_count":2}',
            lambda cost: (cost.request_count, cost.priced_message_count) == (2, 0),
        ),
        (
            lambda coder: coder.get_chat_cost(CHAT),
            f"{_BASE}/cost",
            '{"total_cost_micros":4083,"priced_message_count":1,"unpriced_messages_having_usage_count":0}',
            lambda cost: (cost.total_cost_micros, cost.priced_message_count) == (4083, 1),
        ),
        (
            lambda coder: coder.get_chat_prompts(CHAT),
            f"{_BASE}/prompts",
            '{"prompts":[{"id":199,"text":"hello"}]}',
            lambda prompts: [(each.id, each.text) for each in prompts] == [(199, "hello")],
        ),
        (
            lambda coder: coder.get_chat_retention_days(),
            "/api/experimental/chats/config/retention-days",
            '{"retention_days":30}',
            lambda days: days == 30,
        ),
        (
            lambda coder: coder.get_chat_auto_archive_days(),
            "/api/experimental/chats/config/auto-archive-days",
            '{"auto_archive_days":90}',
            lambda days: days == 90,
        ),
        (
            lambda coder: coder.get_user_ai_spend("ann"),
            "/api/v2/users/ann/ai/spend",
            '{"effective_budget":{"spend_limit_micros":5,"limit_source":"group"},"current_spend_micros":3}',
            lambda spend: (spend.effective_budget.spend_limit_micros, spend.current_spend_micros) == (5, 3),
        ),
        (
            lambda coder: coder.get_chat_messages(CHAT, after_id=5, limit=2),
            f"{_BASE}/messages?after_id=5&limit=2",
            '{"messages":[],"queued_messages":[],"has_more":false,"history_version":18}',
            lambda page: page.history_version == 18,
        ),
    ],
)  # fmt: skip
async def test_calls_of_later_servers(
    server: ScriptedServer, call: Any, target: str, answer: str, wanted: Callable[[Any], bool]
) -> None:
    server.begin(Reply(200, JSON, answer.encode()))
    async with CoderClient(server.url, "token") as coder:
        assert wanted(await call(coder))
    assert (server.received[0].method, server.received[0].target) == ("GET", target)


async def test_what_later_servers_take(server: ScriptedServer) -> None:
    chat = f'{{"id":"{CHAT}"}}'.encode()
    server.begin(Reply(201, JSON, chat), Reply(200, JSON, b"{}"), Reply(204), Reply(409, JSON, b'{"message":"no"}'))
    async with CoderClient(server.url, "token") as coder:
        await coder.create_chat("hello", organization_id=CHAT)
        await coder.create_chat_message(CHAT, "more", busy_behavior="interrupt")
        await coder.submit_chat_tool_results(CHAT, [ChatToolResult(tool_call_id="c", output={"ok": True})])
        with pytest.raises(Conflict):
            await coder.submit_chat_tool_results(CHAT, [])
    sent = [json.loads(each.body) for each in server.received]
    assert sent[0]["organization_id"] == str(CHAT)
    assert sent[1]["busy_behavior"] == "interrupt"
    assert sent[2] == {"results": [{"tool_call_id": "c", "output": {"ok": True}, "is_error": False}]}
    assert server.received[2].target == f"{_BASE}/tool-results"
