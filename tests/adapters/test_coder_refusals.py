"""What each answer of a Coder server means, and none at all: a table over real HTTP and real handshakes."""

import asyncio
from datetime import UTC, datetime

import pytest
from aiohttp import web

from relay.adapters.coder import CoderSettings, open_upstream
from relay.adapters.coder_answers import NOT_FOUND, retry_after_seconds
from relay.core.errors import ChatGone, ChatRefused, RelayError, Unauthorized, Unavailable
from tests.adapters.scripted_server import OF_ACCOUNT, OF_CHAT, TOKEN, USER, answer, error_of, serve, upstream_of

GATE = {"message": "Agents functionality requires enabling the 'agents' experiment."}

# --- refusals ------------------------------------------------------------------------------------------------------

ALWAYS_UNAVAILABLE = {407, 408, 425, 426, 429}


def expected_class(status: int, what: str) -> type[RelayError]:
    if status == 401:
        return Unauthorized
    if status == 403:
        return ChatRefused if what in OF_CHAT else Unauthorized
    if what in OF_ACCOUNT or status in ALWAYS_UNAVAILABLE or not 400 <= status < 500:
        return Unavailable
    return ChatGone if status == 404 else ChatRefused


@pytest.mark.parametrize("what", [*OF_ACCOUNT, *OF_CHAT])
async def test_every_status_has_its_error(what: str) -> None:
    status = 0

    async def handler(_request: web.Request) -> web.Response:
        return web.json_response({"message": "No."}, status=status)

    async with upstream_of(handler) as (upstream, server):
        for status in [*range(300, 310), *range(400, 452), *range(499, 512), 599]:
            error = await error_of(upstream, what)
            assert type(error) is expected_class(status, what), status
            assert f"{server.requests[-1].method} {server.requests[-1].path}: {status}" in str(error)
            assert "No." in str(error) or status == 304  # which has no body
            if isinstance(error, ChatRefused):
                assert error.status == status


@pytest.mark.parametrize("what", OF_CHAT)
async def test_a_server_with_chats_switched_off_is_about_the_account(what: str) -> None:
    async with upstream_of(answer(GATE, status=403)) as (upstream, _server):
        error = await error_of(upstream, what)
    assert isinstance(error, Unauthorized)
    assert "enabling the 'agents' experiment" in str(error)


@pytest.mark.parametrize("what", OF_CHAT)
@pytest.mark.parametrize("body", ["<html>404 no such backend</html>", "", '{"message":"Route not found."}', '"gone"'])
async def test_a_404_that_is_not_about_the_chat_does_not_make_it_gone(what: str, body: str) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=body, status=404)

    async with upstream_of(handler) as (upstream, _server):
        assert type(await error_of(upstream, what)) is Unavailable


@pytest.mark.parametrize("what", OF_CHAT)
async def test_a_404_of_the_chat_makes_it_gone(what: str) -> None:
    async with upstream_of(answer({"message": NOT_FOUND}, status=404)) as (upstream, _server):
        assert isinstance(await error_of(upstream, what), ChatGone)


@pytest.mark.parametrize("what", ["account", "list", "prices", "chat", "messages", "stream", "watch"])
async def test_a_web_page_where_the_api_should_be(what: str) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>Coder</title>", content_type="text/html")

    async with upstream_of(handler) as (upstream, _server):
        error = await error_of(upstream, what)
    assert type(error) is Unavailable
    assert "text/html" in str(error)
    assert "RELAY_CODER__URL" in str(error)
    assert "doctype" not in str(error)


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("account", []),
        ("account", {"id": "no uuid", "username": "ann"}),
        ("account", {"username": "ann"}),
        ("list", {"chats": []}),
        ("list", ["chat"]),
        ("list", [{"title": "no id"}]),
        ("chat", [{}]),
        ("messages", []),
        ("messages", {}),
        ("messages", {"messages": {}, "has_more": False}),
        ("messages", {"messages": []}),
        ("messages", {"has_more": False}),
        ("messages", {"messages": [{"id": "7"}], "has_more": True}),
        ("messages", {"messages": [], "queued_messages": "none", "has_more": False}),
        ("prices", {}),
        ("prices", [{"id": str(USER)}]),
        ("prices", [{"model": "lab"}]),
    ],
)
async def test_json_of_another_shape_is_no_answer(what: str, body: object) -> None:
    async with upstream_of(answer(body)) as (upstream, _server):
        assert type(await error_of(upstream, what)) is Unavailable


@pytest.mark.parametrize("body", ['{"id":', "[" * 100_000, "1" * 5000, "\xff", ""])
async def test_a_body_that_is_not_json_is_no_answer(body: str) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(body=body.encode("latin-1"), content_type="application/json")

    async with upstream_of(handler) as (upstream, _server):
        assert type(await error_of(upstream, "chat")) is Unavailable


NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        pytest.param("60", 60.0, id="seconds"),
        pytest.param(" 0 ", 0.0, id="at once"),
        pytest.param("Wed, 25 Nov 2026 12:01:30 GMT", 90.0, id="date"),
        pytest.param("Wed, 25 Nov 2026 13:01:30 +0100", 90.0, id="date of another zone"),
        pytest.param("Wed, 25 Nov 2026 12:01:30 -0000", 90.0, id="date without a zone"),
        pytest.param("Wed, 25 Nov 2026 11:00:00 GMT", 0.0, id="date gone by"),
        pytest.param("Thu, 25 Nov 2027 12:00:00 GMT", 3600.0, id="at most an hour"),
        pytest.param("999999999", 3600.0, id="at most an hour, in seconds"),
        pytest.param("9" * 400, None, id="a number out of all bounds"),
        pytest.param("-5", None, id="negative"),
        pytest.param("soon", None, id="a word"),
        pytest.param("", None, id="empty"),
        pytest.param(None, None, id="absent"),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(value, NOW) == seconds


@pytest.mark.parametrize("what", ["list", "chat", "stream", "watch"])
@pytest.mark.parametrize("status", [429, 503])
async def test_how_long_the_server_wants_us_to_wait_is_passed_on(what: str, status: int) -> None:
    async with upstream_of(answer({"message": "Slow down."}, status, {"Retry-After": "17"})) as (upstream, _):
        error = await error_of(upstream, what)
    assert isinstance(error, Unavailable)
    assert error.retry_after_seconds == 17.0


# --- no answer at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [*OF_ACCOUNT, *OF_CHAT])
async def test_nobody_listens(what: str) -> None:
    async with serve(answer([])) as server:
        url = server.url
    async with open_upstream(CoderSettings.model_validate({"url": url, "token": TOKEN})) as upstream:
        error = await error_of(upstream, what)
    assert type(error) is Unavailable
    assert url in str(error)


@pytest.mark.parametrize("what", ["chat", "stream"])
async def test_a_server_that_hangs_up_before_it_answers(what: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with upstream_of(handler) as (upstream, _server):
        assert type(await error_of(upstream, what)) is Unavailable


@pytest.mark.parametrize("what", ["chat", "stream"])
async def test_a_server_that_drips_is_given_up(what: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"HTTP/1.1 200 OK\r\n")
        while not request.transport.is_closing():
            request.transport.write(b"X-More: x\r\n")
            await asyncio.sleep(0.02)
        return web.Response()

    async with upstream_of(handler, timeout_seconds=0.2) as (upstream, _server):
        async with asyncio.timeout(2):
            assert "no answer within 0.2 s" in str(await error_of(upstream, what))
