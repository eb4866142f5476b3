"""What every bad answer becomes, against Go's client."""

import logging
from typing import Any

import pytest

from relay.codersdk import (
    NIL_UUID,
    APIError,
    ChatUsageLimitExceeded,
    CoderClient,
    CoderError,
    Conflict,
    ConnectionFailed,
    Forbidden,
    InvalidAnswer,
    InvalidRequest,
    NotFound,
    RateLimited,
    ServerError,
    Unauthorized,
    chat_usage_limit_exceeded_from,
)
from tests.codersdk.calls import call, printed
from tests.codersdk.differences import Tally
from tests.codersdk.failures import same_error, seen, seen_by_go
from tests.codersdk.scripted_server import Reply, ScriptedServer
from tests.codersdk.vectors import Row, as_bytes, rows, same_json


def reply(answer: Row) -> Reply:
    headers = {key.removeprefix("header_"): value for key, value in answer.items() if key.startswith("header_")}
    if answer.get("content_type") is not None:
        headers["Content-Type"] = answer["content_type"]
    frame = {key.replace("ws_text_frame", "data"): value for key, value in answer.items() if key.startswith("ws_")}
    frames = [{"kind": "text", **frame}] if frame else None
    return Reply(answer["status"], headers, as_bytes(answer, "body"), answer.get("truncated", False), frames)


def same(got: Any, row: Row) -> bool:
    if "error_event_messages" in row:
        return (
            isinstance(got, list)
            and [event.error.message for event in got if event.error] == row["error_event_messages"]
        )
    if "result" in row:
        return isinstance(got, str) and same_json(got, row["result"])
    return isinstance(got, dict) and same_error(got, seen_by_go(row))


async def test_bad_answers_become_the_errors_that_go_makes(server: ScriptedServer) -> None:
    tally = Tally("errors")
    async with (
        CoderClient(server.url, "golden-token") as coder,
        CoderClient("http://127.0.0.1:1", "golden-token") as nowhere,
    ):
        for row in rows("errors"):
            refused = "dial_error" in row["answer"]
            server.begin(*([] if refused else [reply(row["answer"])]))
            got: Any
            try:
                got = await call(nowhere if refused else coder, row)
            except CoderError as exc:
                got = seen(exc, server.address)
            else:
                if "error_event_messages" not in row:
                    got = printed(got)
            if not same(got, row):
                tally.differs(row, got, f"{row['method']} {row['label']} {row['answer']!s:.300}\n{got}\n{row!s:.900}")
    tally.check()


# --- each catchable by name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, APIError),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (418, APIError),
        (429, RateLimited),
        (500, ServerError),
        (503, ServerError),
    ],
)
async def test_each_status_has_its_class(server: ScriptedServer, status: int, kind: type[APIError]) -> None:
    server.begin(Reply(status, {"Content-Type": "application/json"}, b'{"message":"No."}'))
    async with CoderClient(server.url, "secret-token") as coder:
        with pytest.raises(kind, match="No") as raised:
            await coder.list_chat_models()
    assert type(raised.value) is kind
    assert raised.value.message == "No."


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("60", 60.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), (None, None)],
)
async def test_a_rate_limit_says_how_long_to_wait(
    server: ScriptedServer, header: str | None, seconds: float | None
) -> None:
    headers = {"Content-Type": "application/json"} | ({"Retry-After": header} if header else {})
    server.begin(Reply(429, headers, b'{"message":"Slow down."}'))
    async with CoderClient(server.url, "secret-token") as coder:
        with pytest.raises(RateLimited) as raised:
            await coder.list_chats()
    assert raised.value.retry_after == seconds


async def test_a_used_up_limit_says_how_much_and_until_when(server: ScriptedServer) -> None:
    body = b'{"message":"Over.","spent_micros":7,"limit_micros":5,"resets_at":"2026-03-16T12:00:00.000000001Z"}'
    server.begin(Reply(409, {"Content-Type": "application/json"}, body))
    async with CoderClient(server.url, "secret-token") as coder:
        with pytest.raises(ChatUsageLimitExceeded) as raised:
            await coder.create_chat("hello")
    assert isinstance(raised.value, Conflict)
    assert (raised.value.spent_micros, raised.value.limit_micros) == (7, 5)
    assert str(raised.value.resets_at) == "2026-03-16T12:00:00.000000001Z"
    wrapped = RuntimeError()
    wrapped.__cause__ = raised.value
    assert chat_usage_limit_exceeded_from(wrapped) == raised.value.response
    assert chat_usage_limit_exceeded_from(KeyError()) is None


async def test_a_server_that_is_not_there_is_no_answer() -> None:
    async with CoderClient("http://127.0.0.1:1", "secret-token") as coder:
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
            await coder.list_chats()
        with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
            async with coder.stream_chat(NIL_UUID):
                pass


async def test_what_cannot_be_sent_is_not(server: ScriptedServer) -> None:
    async with CoderClient(server.url, "secret-token") as coder:
        with pytest.raises(InvalidRequest, match="limit"):
            await coder.list_chats(limit=2**63)
        with pytest.raises(InvalidRequest, match="control"):
            await coder.get_chat_cost_summary("a\nb")
    for url in ("coder.example.com", "ftp://coder.example.com", "http://", "http://coder.example.com:port"):
        with pytest.raises(InvalidRequest, match="URL"):
            CoderClient(url, "secret-token")
    assert server.received == []


async def test_the_token_and_the_password_are_shown_nowhere(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = server.url.replace("http://", "http://user:secret-word@")
    async with CoderClient(url, "secret-token") as coder:
        assert "secret" not in repr(coder)
        server.begin(Reply(404), Reply(404))
        with pytest.raises(NotFound) as refused:
            await coder.get_chat(NIL_UUID)
        with pytest.raises(NotFound) as stream_refused:
            async with coder.stream_chat(NIL_UUID):
                pass
        assert [each.headers["coder-session-token"] for each in server.received] == ["secret-token"] * 2
    for error in (refused.value, stream_refused.value):
        assert "secret" not in f"{error} {error!r} {vars(error)}"
    assert "secret" not in caplog.text


async def test_an_answer_of_something_else_is_told_from_a_refusal(server: ScriptedServer) -> None:
    server.begin(Reply(200, {"Content-Type": "text/html"}, b"<html>"))
    async with CoderClient(server.url, "secret-token") as coder:
        with pytest.raises(InvalidAnswer) as raised:
            await coder.get_chat(NIL_UUID)
    assert raised.value.status_code == 200
