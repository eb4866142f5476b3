"""Calls of the Coder adapter, its token, its settings, its metrics, against a real server over real sockets."""

import asyncio
import json
import logging
import traceback
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest
from aiohttp import web
from prometheus_client import REGISTRY
from pydantic import ValidationError

from relay.adapters.coder import CoderSettings, open_upstream
from relay.core.errors import ChatRefused, RelayError, Unauthorized, Unavailable, WrongSettings
from relay.ports import Account, ModelPrice
from tests.adapters.scripted_server import (
    CHAT,
    CHATS,
    OF_ACCOUNT,
    OF_CHAT,
    TOKEN,
    USER,
    Handler,
    answer,
    call,
    error_of,
    serve,
    upstream_of,
)

# --- requests ------------------------------------------------------------------------------------------------------


async def test_the_token_goes_in_the_header_that_works_for_rest_and_streams() -> None:
    async with upstream_of(answer({"id": str(USER), "username": "ann"})) as (upstream, server):
        await upstream.account()
        await error_of(upstream, "stream")
    rest, stream = server.requests
    for request in (rest, stream):
        assert request.headers["Coder-Session-Token"] == TOKEN
        assert request.headers["User-Agent"].startswith("coder-chat-relay/")
        assert "Origin" not in request.headers
        assert "Sec-WebSocket-Extensions" not in request.headers


async def test_a_cookie_of_the_server_never_comes_back() -> None:
    async with upstream_of(answer([], headers={"Set-Cookie": "coder_session_token=stale; Path=/"})) as (
        upstream,
        server,
    ):
        [row async for row in upstream.list_chats(archived=False)]
        [row async for row in upstream.list_chats(archived=False)]
    assert ["Cookie" in request.headers for request in server.requests] == [False, False]


async def test_a_server_below_a_path() -> None:
    async with serve(answer([])) as server:
        settings = CoderSettings.model_validate({"url": f"{server.url}/coder/", "token": TOKEN})
        async with open_upstream(settings) as upstream:
            assert upstream.deployment == f"{server.url}/coder"
            [row async for row in upstream.list_chats(archived=False)]
            await error_of(upstream, "watch")
    assert [request.path for request in server.requests] == [f"/coder{CHATS}", f"/coder{CHATS}/watch"]


async def test_account() -> None:
    async with upstream_of(answer({"id": str(USER), "username": "ann", "email": "x"})) as (upstream, server):
        assert await upstream.account() == Account(USER, "ann")
    assert server.paths == ["/api/v2/users/me"]


async def test_a_chat_comes_as_sent_with_exact_integers() -> None:
    chat = {"id": str(CHAT), "new_field": {"n": 2**63 - 1}, "last_error": None}
    async with upstream_of(answer(chat)) as (upstream, server):
        assert await upstream.chat(CHAT) == chat
    assert server.paths == [f"{CHATS}/{CHAT}"]


# --- the list ------------------------------------------------------------------------------------------------------


async def test_hundreds_of_calls_at_once_are_answered_some_at_a_time() -> None:
    now = most = 0

    async def slowly(_request: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return web.json_response({"id": str(CHAT)})

    async with upstream_of(slowly) as (upstream, _server):
        answers = await asyncio.gather(*(upstream.chat(CHAT) for _ in range(200)))
    assert answers == [{"id": str(CHAT)}] * 200
    assert 1 < most <= 32


@pytest.mark.parametrize(
    ("archived", "query"), [(False, {"limit": "100000"}), (True, {"q": "archived:true", "limit": "100000"})]
)
async def test_the_list_is_one_call(archived: bool, query: dict[str, str]) -> None:
    rows = [{"id": str(UUID(int=n))} for n in range(700)]
    async with upstream_of(answer(rows)) as (upstream, server):
        assert [row async for row in upstream.list_chats(archived=archived)] == rows
    assert [dict(request.query) for request in server.requests] == [query]


class PagedChats:
    """Refuses large limits; newest first; a page starts behind the cursor chat, at wherever that is by now."""

    def __init__(self, count: int) -> None:
        self.order = [str(UUID(int=n)) for n in range(count)]
        self.moves: dict[int, str] = {}  # after which page which chat moves to the top
        self.falls: dict[int, str] = {}  # after which page which chat moves to the bottom
        self.goes: dict[int, str] = {}  # after which page which chat is deleted
        self.pages = 0

    async def __call__(self, request: web.Request) -> web.Response:
        limit = int(request.query["limit"])
        if limit > 50:
            return web.json_response({"message": "Query parameters have invalid values."}, status=400)
        after = request.query.get("after_id")
        if after is not None and after not in self.order:
            return web.json_response([])
        start = self.order.index(after) + 1 if after else 0
        page = [{"id": chat} for chat in self.order[start : start + limit]]
        self.pages += 1
        if chat := self.moves.get(self.pages):
            self.order.remove(chat)
            self.order.insert(0, chat)
        if chat := self.falls.get(self.pages):
            self.order.remove(chat)
            self.order.append(chat)
        if chat := self.goes.get(self.pages):
            self.order.remove(chat)
        return web.json_response(page)


@pytest.mark.parametrize("count", [0, 1, 49, 50, 51, 130, 200])
async def test_a_server_that_wants_pages_loses_no_chat(count: int) -> None:
    chats = PagedChats(count)
    async with upstream_of(chats) as (upstream, _server):
        assert [row["id"] async for row in upstream.list_chats(archived=False)] == chats.order


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param({1: 49}, id="the first cursor chat"),
        pytest.param({3: 149}, id="a later cursor chat, so that all known pages go by again"),
        pytest.param({1: 199}, id="a chat we had not come to yet"),
        pytest.param({1: 49, 2: 120, 4: 199}, id="several"),
    ],
)
async def test_a_chat_that_moves_while_the_pages_are_read_is_not_lost(moves: dict[int, int]) -> None:
    chats = PagedChats(200)
    chats.moves = {page: chats.order[place] for page, place in moves.items()}
    async with upstream_of(chats) as (upstream, _server):
        found = [str(row["id"]) async for row in upstream.list_chats(archived=False)]
    assert sorted(found) == sorted(chats.order)


@pytest.mark.parametrize("place", [49, 99])
async def test_a_cursor_chat_that_is_not_pinned_any_more_makes_nothing_be_passed_over(place: int) -> None:
    chats = PagedChats(200)
    chats.falls = {place // 50 + 1: chats.order[place]}
    async with upstream_of(chats) as (upstream, _server):
        found = [str(row["id"]) async for row in upstream.list_chats(archived=False)]
    assert sorted(found) == sorted(chats.order)


@pytest.mark.parametrize("place", [49, 99])
async def test_a_cursor_chat_that_is_deleted_does_not_end_the_list(place: int) -> None:
    chats = PagedChats(200)
    chats.goes = {place // 50 + 1: chats.order[place]}
    async with upstream_of(chats) as (upstream, _server):
        found = [str(row["id"]) async for row in upstream.list_chats(archived=False)]
    assert set(found) >= set(chats.order)


async def test_a_server_that_ignores_the_cursor_does_not_hold_us_for_ever() -> None:
    async def handler(request: web.Request) -> web.Response:
        limit = int(request.query["limit"])
        if limit > 50:
            return web.json_response({"message": "too many"}, status=400)
        return web.json_response([{"id": str(UUID(int=n))} for n in range(limit)])

    async with upstream_of(handler) as (upstream, server):
        assert len([row async for row in upstream.list_chats(archived=False)]) == 50
    assert len(server.requests) < 10


# --- messages ------------------------------------------------------------------------------------------------------


class Messages:
    """A chat with the ids 10, 20, … as the server pages them."""

    def __init__(self, count: int) -> None:
        self.ids = [10 * (n + 1) for n in range(count)]

    async def __call__(self, request: web.Request) -> web.Response:
        limit, before = int(request.query["limit"]), int(request.query.get("before_id", 0))
        if not 1 <= limit <= 200:
            return web.json_response({"message": "Invalid limit parameter (1-200)."}, status=400)
        ids = [one for one in reversed(self.ids) if not before or one < before]
        return web.json_response(
            {
                "messages": [{"id": one, "role": "user", "text": "π"} for one in ids[:limit]],
                "queued_messages": [] if before else [{"id": 7}],
                "has_more": len(ids) > limit,
            }
        )


@pytest.mark.parametrize(
    ("count", "down_to", "read", "complete", "requests"),
    [
        pytest.param(0, 0, 0, True, 1, id="empty chat"),
        pytest.param(3, 30, 3, True, 1, id="all on one page"),
        pytest.param(200, 0, 200, True, 1, id="a full page that is all"),
        pytest.param(201, 0, 201, True, 2, id="one more than a page"),
        pytest.param(450, 0, 450, True, 3, id="all of three pages"),
        pytest.param(450, 4500, 200, False, 1, id="the newest is known"),
        pytest.param(450, 2510, 200, False, 1, id="the last of the page is at down_to"),
        pytest.param(450, 2509, 400, False, 2, id="the last of the page is above down_to"),
        pytest.param(450, 9999, 200, False, 1, id="above everything"),
    ],
)
async def test_messages_are_paged_down_to_where_asked(
    count: int, down_to: int, read: int, complete: bool, requests: int
) -> None:
    chat = Messages(count)
    async with upstream_of(chat) as (upstream, server):
        page = await upstream.messages(CHAT, down_to=down_to)
    assert [message["id"] for message in page.messages] == list(reversed(chat.ids))[:read]
    assert page.queued_messages == [{"id": 7}]
    assert page.complete is complete
    assert len(server.requests) == requests


@pytest.mark.parametrize(
    "row", [{"role": "user"}, {"id": "5", "role": "user"}, {"id": True, "role": "user"}, {"id": 5}]
)
async def test_a_row_that_is_no_message_is_no_end_of_history(row: dict[str, object]) -> None:
    page = {"messages": [row], "queued_messages": [], "has_more": False}
    async with upstream_of(answer(page)) as (upstream, _):
        assert "without an id or a role" in str(await error_of(upstream, "messages"))


@pytest.mark.parametrize("rows", [[], [{"id": 5, "role": "user"}]], ids=["no rows", "the same row again"])
async def test_a_page_that_does_not_move_on_is_no_answer(rows: list[object]) -> None:
    async with upstream_of(answer({"messages": rows, "has_more": True})) as (upstream, server):
        assert "does not move on" in str(await error_of(upstream, "messages"))
    assert len(server.requests) <= 2


async def test_a_chat_without_messages_and_queue() -> None:
    async with upstream_of(answer({"messages": None, "queued_messages": None, "has_more": False})) as (upstream, _):
        page = await upstream.messages(CHAT, down_to=0)
    assert (list(page.messages), list(page.queued_messages), page.complete) == ([], [], True)


# --- archiving -----------------------------------------------------------------------------------------------------


async def test_archiving_sends_a_patch() -> None:
    bodies = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append((request.method, request.path, await request.json()))
        return web.Response(status=204)

    async with upstream_of(handler) as (upstream, _server):
        await upstream.archive_chat(CHAT)
    assert bodies == [("PATCH", f"{CHATS}/{CHAT}", {"archived": True})]


async def test_a_chat_that_is_archived_already_is_a_success() -> None:
    async with upstream_of(answer({"message": "Chat is already archived."}, status=400)) as (upstream, _server):
        await upstream.archive_chat(CHAT)


@pytest.mark.parametrize("status", [400, 409])
async def test_a_chat_that_cannot_be_archived_is_refused(status: int) -> None:
    async with upstream_of(answer({"message": "Archive it later."}, status=status)) as (upstream, _server):
        error = await error_of(upstream, "archive")
    assert isinstance(error, ChatRefused)
    assert error.status == status
    assert "Archive it later." in str(error)


# --- prices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(
            '{"cost":{"input_price_per_million_tokens":"3","output_price_per_million_tokens":"15.10",'
            '"cache_read_price_per_million_tokens":"0.3","cache_write_price_per_million_tokens":"0"}}',
            ["3", "15.10", "0.3", "0"],
            id="strings, as the server writes them",
        ),
        pytest.param(
            '{"cost":{"input_price_per_million_tokens":0.1000000000000000055,"output_price_per_million_tokens":15}}',
            ["0.1000000000000000055", "15", None, None],
            id="numbers, not by way of float",
        ),
        pytest.param(
            '{"input_price_per_million_tokens":"1","output_price_per_million_tokens":"2",'
            '"cost":{"input_price_per_million_tokens":"9","cache_read_price_per_million_tokens":null},'
            '"cache_read_price_per_million_tokens":0.5}',
            ["9", "2", "0.5", None],
            id="legacy keys fill what cost leaves open",
        ),
        pytest.param(
            '{"cost":{"input_price_per_million_tokens":"dear","output_price_per_million_tokens":NaN,'
            '"cache_read_price_per_million_tokens":"-1","cache_write_price_per_million_tokens":true}}',
            [None, None, None, None],
            id="what is no price is none",
        ),
        pytest.param("null", [None, None, None, None], id="no configuration"),
        pytest.param('{"cost":[]}', [None, None, None, None], id="cost of another shape"),
    ],
)
async def test_prices(config: str, expected: list[str | None]) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=f'[{{"id":"{USER}","model":"lab","model_config":{config}}}]')

    async with upstream_of(handler) as (upstream, server):
        price = (await upstream.model_prices())[USER]
    assert price.model == "lab"
    assert [price.input, price.output, price.cache_read, price.cache_write] == [
        None if text is None else Decimal(text) for text in expected
    ]
    assert server.paths == [f"{CHATS}/model-configs"]


ORGANIZATION = UUID("88eed6df-f868-4a42-bd05-83cb26643f03")
MODELS = f"/api/v2/organizations/{ORGANIZATION}/chats/models"


def models_of_organizations(status: int, body: object) -> Handler:
    """A server on which model configs have moved to the organizations."""

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/api/v2/users/me":
            me = {"id": str(USER), "username": "ann", "organization_ids": [str(ORGANIZATION)]}
            return web.json_response(me)
        if request.path == MODELS:
            return web.json_response(body, status=status)
        return web.json_response({"message": 'Invalid UUID "model-configs".'}, status=400)

    return handler


@pytest.mark.parametrize("status", [403, 404])
async def test_a_server_without_prices_has_none(status: int) -> None:
    async with upstream_of(models_of_organizations(status, {"message": "Route not found."})) as (upstream, _server):
        assert await upstream.model_prices() == {}


async def test_model_configs_that_may_not_be_read_have_no_prices() -> None:
    async with upstream_of(answer({"message": "Forbidden."}, status=403)) as (upstream, _server):
        assert await upstream.model_prices() == {}


async def test_models_of_organizations_are_read_for_what_prices_they_have() -> None:
    models = [
        {"id": str(CHAT), "model": "dear", "cost": {"input_price_per_million_tokens": "7"}},
        {"id": str(USER), "model": "untold"},
        {"id": "lab", "model": "of a shape that nobody knows"},
    ]
    body = {"models": models, "providers": [], "unsupported_providers": []}
    async with upstream_of(models_of_organizations(200, body)) as (upstream, server):
        prices = await upstream.model_prices()
    assert prices == {CHAT: ModelPrice("dear", input=Decimal(7)), USER: ModelPrice("untold")}
    assert server.paths == [f"{CHATS}/model-configs", "/api/v2/users/me", MODELS]


@pytest.mark.parametrize("status", [403, 404, 500])
async def test_a_proxy_in_trouble_does_not_make_models_free(status: int) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text="<html>not now</html>", content_type="text/html", status=status)

    async with upstream_of(handler) as (upstream, _server):
        assert isinstance(await error_of(upstream, "prices"), Unavailable | Unauthorized)


# --- the token -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["account", "chat", "stream"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(what: str, status: int) -> None:
    async with serve(answer([])) as other:
        target = f"{other.url}/login?state=secret"
        async with upstream_of(answer({}, status, {"Location": target})) as (upstream, _server):
            error = await error_of(upstream, what)
        assert type(error) is Unavailable
        assert other.url in str(error)
        assert "secret" not in str(error)
        assert other.requests == []  # the token was not shown to another server


@pytest.mark.parametrize("what", [*OF_ACCOUNT, *OF_CHAT, "prices", "limits", "budget", "retention"])
@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 418, 429, 500])
async def test_the_token_is_in_no_error_and_no_log(
    what: str, status: int, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(request: web.Request) -> web.Response:
        echoed = request.headers["Coder-Session-Token"]
        body = json.dumps({"message": f"Bad token {echoed}.", "detail": echoed})
        return web.Response(text=body if status != 200 else f"<{echoed}>", status=status, headers={"Location": "//x/"})

    caplog.set_level(logging.DEBUG)
    async with upstream_of(handler) as (upstream, _server):
        none_there = what in ("limits", "budget", "retention") and status in (403, 404)
        if none_there or (what, status) in {("archive", 200), ("prices", 403)}:  # which are no errors
            await call(upstream, what)
        else:
            error = await error_of(upstream, what)
            shown = f"{error} {error!r} {''.join(traceback.format_exception(error))}"
            assert TOKEN not in shown
            assert TOKEN[11:] not in shown
        assert TOKEN not in f"{upstream} {upstream!r}"
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capsys.readouterr())


class OneToken:
    """Accepts one token only; knows which ones were tried."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.tried: list[str] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.tried.append(request.headers["Coder-Session-Token"])
        if self.tried[-1] != self.token:
            return web.json_response({"message": "You are signed out."}, status=401)
        if request.path.endswith("/stream"):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.close()
            return socket
        return web.json_response({"id": str(CHAT)})


@pytest.mark.parametrize("what", ["chat", "stream"])
async def test_a_new_token_in_the_file_is_taken_up_when_the_old_one_is_refused(tmp_path: Path, what: str) -> None:
    file = tmp_path / "token"
    file.write_text("old-token\n")
    server = OneToken("old-token")
    async with upstream_of(server, token_file=file) as (upstream, _server):
        await call(upstream, what)
        server.token = "new-token"
        file.write_text("new-token\n")
        await call(upstream, what)
        await call(upstream, what)
    assert server.tried == ["old-token", "old-token", "new-token", "new-token"]


@pytest.mark.parametrize("what", ["chat", "stream"])
@pytest.mark.parametrize(
    ("content", "tries"),
    [("old-token", 1), ("bad-token", 2), ("", 1), (None, 1)],
    ids=["the same", "another bad one", "empty", "no file"],
)
async def test_a_refused_token_is_tried_once_more_at_most(
    tmp_path: Path, what: str, content: str | None, tries: int
) -> None:
    file = tmp_path / "token"
    file.write_text("old-token")
    server = OneToken("the right one")
    async with upstream_of(server, token_file=file) as (upstream, _server):
        if content is None:
            file.unlink()
        else:
            file.write_text(content)
        assert isinstance(await error_of(upstream, what), Unauthorized)
    assert len(server.tried) == tries


async def test_a_token_that_was_given_is_tried_once() -> None:
    server = OneToken("another")
    async with upstream_of(server) as (upstream, _server):
        assert isinstance(await error_of(upstream, "chat"), Unauthorized)
    assert server.tried == [TOKEN]


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "deployment"),
    [
        ("https://coder.example.com", "https://coder.example.com"),
        ("https://Coder.Example.com:443//", "https://coder.example.com"),
        ("http://127.0.0.1:3000/coder/", "http://127.0.0.1:3000/coder"),
    ],
)
def test_the_same_server_has_one_url(url: str, deployment: str) -> None:
    assert CoderSettings.model_validate({"url": url, "token": TOKEN}).url == deployment


@pytest.mark.parametrize(
    ("values", "word"),
    [
        pytest.param({"url": "coder.example.com"}, "URL", id="no scheme"),
        pytest.param({"url": "ftp://coder.example.com"}, "http", id="another scheme"),
        pytest.param({"url": f"https://ann:{TOKEN}@coder.example.com"}, "no user or password", id="password in it"),
        pytest.param({"url": "https://coder.example.com/?x=1"}, "query", id="query"),
        pytest.param({"token": None}, "exactly one of", id="no token"),
        pytest.param({"token_file": "/run/token"}, "both set", id="two tokens"),
        pytest.param({"tokn": "x"}, "tokn", id="a misspelt name"),
        pytest.param({"timeout_seconds": 0}, "greater than 0", id="no time"),
    ],
)
def test_wrong_settings_say_what_is_wrong_and_show_no_token(values: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CoderSettings.model_validate({"url": "https://coder.example.com", "token": TOKEN} | values)
    assert word in str(caught.value)
    assert not any(part in str(caught.value) for part in ("abcd", "secret"))  # a part of it is too much


@pytest.mark.parametrize("token", ["", "  \n", "two words", "tökén", "a\nb"])
async def test_a_token_that_cannot_be_one_is_told_at_the_start(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token)
    for given in ({"token": token}, {"token_file": file}):
        settings = CoderSettings.model_validate({"url": "https://coder.example.com", **given})
        with pytest.raises(WrongSettings, match="RELAY_CODER__TOKEN"):
            async with open_upstream(settings):
                pass


async def test_a_token_file_that_is_missing_is_told_at_the_start(tmp_path: Path) -> None:
    settings = CoderSettings.model_validate({"url": "https://coder.example.com", "token_file": tmp_path / "none"})
    with pytest.raises(WrongSettings, match=r"RELAY_CODER__TOKEN_FILE \(.*none\) cannot be read"):
        async with open_upstream(settings):
            pass


async def test_a_proxy_that_cannot_be_used_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "gopher://proxy.example.com")
    with pytest.raises(WrongSettings, match="HTTPS_PROXY"):
        async with open_upstream(CoderSettings.model_validate({"url": "https://coder.example.com", "token": TOKEN})):
            pass


# --- metrics -------------------------------------------------------------------------------------------------------


def requests_counted(endpoint: str, code: str) -> float:
    value = REGISTRY.get_sample_value("relay_source_http_requests_total", {"endpoint": endpoint, "code": code})
    assert value is not None  # every series exists from the start
    return value


@pytest.mark.parametrize(
    ("what", "endpoint"),
    [
        ("account", "account"),
        ("list", "chats"),
        ("chat", "chat"),
        ("messages", "messages"),
        ("archive", "archive"),
        ("prices", "model_configs"),
        ("limits", "usage_limits"),
        ("budget", "gateway_budget"),
    ],
)
@pytest.mark.parametrize(
    ("status", "code"),
    [(200, "2xx"), (302, "error"), (401, "401"), (404, "404"), (409, "409"), (418, "4xx"), (429, "429"), (502, "5xx")],
)
async def test_requests_are_counted_by_endpoint_and_code(what: str, endpoint: str, status: int, code: str) -> None:
    before = requests_counted(endpoint, code)
    async with upstream_of(answer("odd", status=status)) as (upstream, server):
        with suppress(RelayError):
            await call(upstream, what)
    asked = len(server.requests)
    assert requests_counted(endpoint, code) == before + asked
    assert asked == (4 if status == 404 and what not in ("account", "budget") else 1)  # at both places, twice


async def test_a_request_without_an_answer_is_counted() -> None:
    before = requests_counted("account", "error")
    async with serve(answer([])) as server:
        url = server.url
    async with open_upstream(CoderSettings.model_validate({"url": url, "token": TOKEN})) as upstream:
        await error_of(upstream, "account")
    assert requests_counted("account", "error") == before + 1
