"""Where the chats API is: found, kept, and found again while the server is upgraded. No chat is lost on the way."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from relay.adapters.coder import CoderUpstream
from relay.adapters.coder_answers import NO_ROUTE, NOT_FOUND
from relay.core.dialect import Dialect
from relay.core.errors import ChatGone, RelayError, Unauthorized, Unavailable
from tests.adapters.scripted_server import CHAT, OF_CHAT, answer, call, error_of, upstream_of

V2, EXPERIMENTAL = "/api/v2/chats", "/api/experimental/chats"
PLACES = {"2.36": (EXPERIMENTAL,), "2.37": (V2, EXPERIMENTAL), "2.38": (V2,), "none": ()}
OF_LIST = ("list", "watch")
OPTIONAL = ("limits", "retention", "prices")


def says(text: str, status: int = 404) -> Callable[[], web.Response]:
    return lambda: web.json_response({"message": text}, status=status)


def plain_404() -> web.Response:
    return web.Response(text="404 page not found\n", status=404)


class Coder:
    """A server that has its chats API at some places, and in it one chat, until that is deleted."""

    def __init__(self, version: str = "2.36") -> None:
        self.version = version
        self.has_chat = True
        self.elsewhere: Callable[[], web.Response] = says(NO_ROUTE)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        place = next((place for place in PLACES[self.version] if request.path.startswith(place)), None)
        if place is None:
            return self.elsewhere()
        below = request.path.removeprefix(place)
        if below.startswith(f"/{CHAT}") and not self.has_chat:
            return says(NOT_FOUND)()
        if below.endswith(("/stream", "/watch")):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.close()
            return socket
        if request.method == "PATCH":
            return web.Response(status=204)
        if below.endswith("/messages"):
            return web.json_response({"messages": [], "has_more": False})
        if below.startswith("/config/"):
            return web.json_response({"retention_days": 30, "auto_archive_days": 0})
        if below in ("", "/model-configs"):
            return web.json_response([{"id": str(CHAT), "model": "lab"}])
        return web.json_response({"id": str(CHAT)})


class Rolling:
    """Two servers behind one address; `turn` picks the one that answers."""

    def __init__(self, old: Coder, new: Coder, turn: Callable[[], bool]) -> None:
        self.old, self.new, self.turn = old, new, turn

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        return await (self.new if self.turn() else self.old)(request)


def in_rotation() -> Callable[[], bool]:
    turns = iter(range(1_000_000))
    return lambda: next(turns) % 2 == 1


# --- the first call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "paths"),
    [("2.36", [V2, EXPERIMENTAL, EXPERIMENTAL]), ("2.37", [V2, V2]), ("2.38", [V2, V2])],
)
async def test_the_final_place_is_tried_first(version: str, paths: list[str]) -> None:
    async with upstream_of(Coder(version), place=None) as (upstream, server):
        [row async for row in upstream.list_chats(archived=False)]
        assert [request.path for request in server.requests] == paths
        assert [dict(request.query) for request in server.requests[:-1]] == [{"limit": "1"}] * (len(paths) - 1)
        [row async for row in upstream.list_chats(archived=True)]
        assert [request.path for request in server.requests[len(paths) :]] == [paths[-1]]  # kept


@pytest.mark.parametrize("what", ["stream", "watch"])
async def test_a_socket_is_dialled_only_when_the_place_is_known(what: str) -> None:
    async with upstream_of(Coder("2.38"), place=None) as (upstream, server):
        await call(upstream, what)
    assert [(request.path, "Upgrade" in request.headers) for request in server.requests] == [
        (V2, False),
        (f"{V2}/{CHAT}/stream" if what == "stream" else f"{V2}/watch", True),
    ]


@pytest.mark.parametrize("status", [200, 400, 401, 403])
async def test_an_answer_of_the_api_itself_settles_where_it_is(status: int) -> None:
    async with upstream_of(answer([] if status == 200 else {"message": "No."}, status), place=None) as (
        upstream,
        server,
    ):
        for _ in range(2):
            with suppress(RelayError):
                [row async for row in upstream.list_chats(archived=False)]
    probes = [request.path for request in server.requests if dict(request.query) == {"limit": "1"}]
    assert probes == [V2]


@pytest.mark.parametrize("status", [302, 408, 425, 429, 500, 502, 503])
async def test_an_answer_that_a_proxy_gives_too_settles_nothing(status: int) -> None:
    server_is_back = False

    async def handler(request: web.Request) -> web.StreamResponse:
        return await Coder("2.36")(request) if server_is_back else web.json_response({"message": "No."}, status=status)

    async with upstream_of(handler, place=None) as (upstream, server):
        assert type(await error_of(upstream, "chat")) is Unavailable
        assert [request.path for request in server.requests] == [V2]
        server_is_back = True
        await call(upstream, "chat")


async def test_a_web_page_for_every_path_is_no_api() -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text="<title>Coder</title>", content_type="text/html")

    async with upstream_of(handler, place=None) as (upstream, _server):
        assert "RELAY_CODER__URL" in str(await error_of(upstream, "list"))


@pytest.mark.parametrize("elsewhere", [says(NO_ROUTE), plain_404])
async def test_a_server_that_has_it_nowhere_is_told_and_asked_again(elsewhere: Callable[[], web.Response]) -> None:
    coder = Coder("none")
    coder.elsewhere = elsewhere
    async with upstream_of(coder, place=None) as (upstream, server):
        error = await error_of(upstream, "list")
        assert type(error) is Unavailable
        assert V2 in str(error)
        assert EXPERIMENTAL in str(error)
        assert [request.path for request in server.requests] == [V2, EXPERIMENTAL, EXPERIMENTAL, V2]
        coder.version = "2.38"
        await call(upstream, "list")


async def test_calls_at_the_same_time_share_one_question() -> None:
    async with upstream_of(Coder("2.36"), place=None) as (upstream, server):
        await asyncio.gather(*(upstream.chat(CHAT) for _ in range(20)))
    probes = [request.path for request in server.requests if dict(request.query) == {"limit": "1"}]
    assert probes == [V2, EXPERIMENTAL]


async def test_calls_at_the_same_time_share_its_failure() -> None:
    async with upstream_of(answer({"message": "Down."}, 503), place=None) as (upstream, server):
        errors = await asyncio.gather(*(upstream.chat(CHAT) for _ in range(20)), return_exceptions=True)
    assert {type(error) for error in errors} == {Unavailable}
    assert len(server.requests) == 1


async def test_who_waits_for_a_question_that_is_given_up_asks_it_again() -> None:
    asked = asyncio.Event()
    coder = Coder("2.38")

    async def handler(request: web.Request) -> web.StreamResponse:
        if not asked.is_set():
            asked.set()
            await asyncio.Event().wait()
        return await coder(request)

    async with upstream_of(handler, place=None) as (upstream, _server):
        first = asyncio.create_task(upstream.chat(CHAT))
        await asked.wait()
        second = asyncio.create_task(upstream.chat(CHAT))
        await asyncio.sleep(0)  # it waits now
        first.cancel()
        assert (await second)["id"] == str(CHAT)
        assert first.cancelled()


# --- a server that is upgraded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [*OF_LIST, *OF_CHAT, *OPTIONAL])
@pytest.mark.parametrize(("before", "after"), [("2.36", "2.38"), ("2.38", "2.36"), ("2.37", "2.38"), ("2.38", "2.37")])
async def test_every_call_finds_a_server_that_was_upgraded_or_put_back(what: str, before: str, after: str) -> None:
    coder = Coder(before)
    async with upstream_of(coder, place=None) as (upstream, server):
        await call(upstream, "list")
        coder.version = after
        await call(upstream, what)
        del server.requests[:]
        await call(upstream, what)
    assert all(request.path.startswith(PLACES[after]) for request in server.requests)  # it remembers


async def test_a_call_that_was_on_its_way_during_an_upgrade_moves_nothing_back() -> None:
    old, coder = Coder("2.36"), Coder("2.36")
    asked, upgraded = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/messages"):
            asked.set()
            await upgraded.wait()
            return await old(request)
        return await coder(request)

    async with upstream_of(handler, place=None) as (upstream, server):
        await call(upstream, "list")
        late = asyncio.create_task(upstream.messages(CHAT, down_to=0))
        await asked.wait()
        coder.version = "2.38"
        await call(upstream, "list")
        upgraded.set()
        await late
        del server.requests[:]
        await call(upstream, "list")
    assert [request.path for request in server.requests] == [V2]


@pytest.mark.parametrize("what", OF_CHAT)
@pytest.mark.parametrize(
    "elsewhere", [says(NO_ROUTE), says("Not here."), says(NOT_FOUND), plain_404], ids=["route", "text", "chat", "plain"]
)
async def test_a_place_that_is_gone_never_makes_a_chat_gone(what: str, elsewhere: Callable[[], web.Response]) -> None:
    coder = Coder("2.36")
    coder.elsewhere = elsewhere
    async with upstream_of(coder, place=None) as (upstream, _server):
        await call(upstream, "list")
        coder.version = "none"
        assert type(await error_of(upstream, what)) is Unavailable
        coder.version = "2.38"
        await call(upstream, what)


@pytest.mark.parametrize("what", OF_CHAT)
@pytest.mark.parametrize("text", [NOT_FOUND, "Chat not found."])
async def test_a_chat_that_is_gone_is_gone(what: str, text: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return says(text)() if f"/{CHAT}" in request.path else await Coder("2.36")(request)

    async with upstream_of(handler, place=None) as (upstream, _server):
        assert isinstance(await error_of(upstream, what), ChatGone)


async def test_many_chats_that_are_gone_share_one_look_at_the_list() -> None:
    coder, gone = Coder("2.36"), 0
    all_are = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal gone
        if coder.has_chat or f"/{CHAT}" in request.path:
            return await coder(request)
        await all_are.wait()  # the look at the list takes until all others wait for it
        return await coder(request)

    async def read(upstream: CoderUpstream) -> None:
        nonlocal gone
        with suppress(ChatGone):
            await upstream.chat(CHAT)
            return
        gone += 1

    async with upstream_of(handler, place=None) as (upstream, server):
        await call(upstream, "list")
        coder.has_chat = False
        del server.requests[:]
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(read(upstream))
            while sum(f"/{CHAT}" in path for path in server.paths) < 10:
                await asyncio.sleep(0.001)
            all_are.set()
    assert gone == 10
    # The last to hear that the chat is gone may come when the look is over.
    assert 1 <= server.paths.count(f"{EXPERIMENTAL}?limit=1") <= 2


async def test_an_answer_of_a_moment_before_is_no_proof_that_a_chat_is_gone() -> None:
    """A server that for a while says 404 to everything, in Coder's own words."""
    coder, away = Coder("2.36"), False

    async def handler(request: web.Request) -> web.StreamResponse:
        return says(NOT_FOUND)() if away else await coder(request)

    async with upstream_of(handler, place=None) as (upstream, _server):
        await call(upstream, "list")
        away = True
        assert not isinstance(await error_of(upstream, "chat"), ChatGone)


@pytest.mark.parametrize("status", [429, 503])
async def test_a_chat_is_not_gone_while_the_list_does_not_answer(status: int) -> None:
    coder = Coder("2.36")
    restarting = False

    async def handler(request: web.Request) -> web.StreamResponse:
        if restarting and request.path == EXPERIMENTAL:
            return says("Wait.", status)()
        return await coder(request)

    async with upstream_of(handler, place=None) as (upstream, _server):
        await call(upstream, "list")
        coder.has_chat, restarting = False, True
        assert type(await error_of(upstream, "chat")) is Unavailable
        restarting = False
        assert isinstance(await error_of(upstream, "chat"), ChatGone)


async def test_a_web_page_in_the_place_of_the_list_does_not_make_a_chat_gone() -> None:
    coder = Coder("2.36")

    async def handler(request: web.Request) -> web.StreamResponse:
        if not coder.has_chat and request.path == EXPERIMENTAL:
            return web.Response(text="<title>Maintenance</title>", content_type="text/html")
        return await coder(request)

    async with upstream_of(handler, place=None) as (upstream, _server):
        await call(upstream, "list")
        coder.has_chat = False
        assert type(await error_of(upstream, "chat")) is Unavailable


async def test_an_option_that_is_missing_leaves_the_place_as_it_is() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return says(NO_ROUTE)() if "/config/" in request.path else await Coder("2.36")(request)

    async with upstream_of(handler, place=None) as (upstream, server):
        await call(upstream, "list")
        with capture_logs() as lines:
            await call(upstream, "retention")
        assert lines == []
        del server.requests[:]
        await call(upstream, "list")
    assert [request.path for request in server.requests] == [EXPERIMENTAL]


# --- a rolling upgrade -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", [*OF_LIST, *OF_CHAT])
async def test_two_servers_in_rotation_fail_no_call(what: str) -> None:
    rolling = Rolling(Coder("2.36"), Coder("2.38"), in_rotation())
    async with upstream_of(rolling, place=None) as (upstream, _server):
        await call(upstream, "list")
        for _ in range(10):
            await call(upstream, what)
        assert upstream.dialect is Dialect.MIXED


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("elsewhere", [says(NO_ROUTE), plain_404], ids=["route", "plain"])
async def test_two_servers_at_random_lose_no_chat(seed: int, elsewhere: Callable[[], web.Response]) -> None:
    chance = random.Random(seed)
    rolling = Rolling(Coder("2.36"), Coder("2.38"), lambda: chance.random() < 0.5)
    rolling.old.elsewhere = rolling.new.elsewhere = elsewhere
    good = 0
    async with upstream_of(rolling, place=None) as (upstream, _server):
        for _ in range(30):
            try:
                await call(upstream, chance.choice(["list", *OF_CHAT]))
                good += 1
            except Unavailable:  # four times the wrong one: it is tried again, never taken for an answer
                pass
    assert good >= 20


async def test_a_refused_token_does_not_move_the_place() -> None:
    refused = False

    async def handler(request: web.Request) -> web.StreamResponse:
        return says("Signed out.", 401)() if refused else await Coder("2.36")(request)

    async with upstream_of(handler, place=None) as (upstream, server):
        await call(upstream, "list")
        refused = True
        assert isinstance(await error_of(upstream, "list"), Unauthorized)
        refused = False
        del server.requests[:]
        await call(upstream, "list")
    assert [request.path for request in server.requests] == [EXPERIMENTAL]
