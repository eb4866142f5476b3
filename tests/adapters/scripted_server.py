"""A real HTTP and WebSocket server whose every answer a test writes itself, and the Coder adapter in front of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

from aiohttp import web

from relay.adapters.coder import CoderSettings, CoderUpstream, open_upstream
from relay.core.errors import RelayError
from relay.ports import Upstream

TOKEN = "abcdefghij-secretsecretsecretsec"
CHAT = UUID("39c1479f-cb8a-4347-ad9f-e6b8005ae04b")
USER = UUID("07259a4a-6dcb-4fc0-98eb-4ee18df0a1c1")
CHATS = "/api/experimental/chats"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class ScriptedServer:
    """`requests` holds what came so far; `handler` may be changed at any time.

    `place` is where the server says that it has the chats API, so that most tests need not speak of it. With None the
    handler gets those questions too.
    """

    handler: Handler
    place: str | None = CHATS
    requests: list[web.BaseRequest] = field(default_factory=list)
    url: str = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.place is not None and request.path.endswith("/chats") and dict(request.query) == {"limit": "1"}:
            return no_route() if not request.path.endswith(self.place) else web.json_response([])
        self.requests.append(request)
        return await self.handler(request)  # type: ignore[arg-type]

    @property
    def paths(self) -> list[str]:
        return [request.path_qs for request in self.requests]


def no_route() -> web.Response:
    """What Coder says of a path that it does not have."""
    return web.json_response({"message": "Route not found."}, status=404)


@asynccontextmanager
async def serve(handler: Handler, place: str | None = CHATS) -> AsyncIterator[ScriptedServer]:
    """Serve on a free loopback port. Handlers that still run at the end are cancelled."""
    server = ScriptedServer(handler, place)
    runner = web.ServerRunner(web.Server(server.answer), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = site.name
    try:
        yield server
    finally:
        await runner.cleanup()


def answer(body: object, status: int = 200, headers: dict[str, str] | None = None) -> Handler:
    async def handler(_request: web.Request) -> web.Response:
        return web.json_response(body, status=status, headers=headers)

    return handler


@asynccontextmanager
async def upstream_of(
    handler: Handler, *, place: str | None = CHATS, **settings: object
) -> AsyncIterator[tuple[CoderUpstream, ScriptedServer]]:
    async with serve(handler, place) as server:
        # Read marks have tests of their own; here what a call asks for is counted.
        values = {"url": server.url, "token": TOKEN, "timeout_seconds": 5, "keep_unread": False} | settings
        if "token_file" in settings:
            del values["token"]
        async with open_upstream(CoderSettings.model_validate(values)) as upstream:
            yield upstream, server


async def call(upstream: Upstream, what: str) -> object:
    match what:
        case "account":
            return (await upstream.accounts())[0]
        case "list":
            return [row async for row in upstream.list_chats(archived=False)]
        case "prices":
            return await upstream.model_prices()
        case "limits":
            return await upstream.has_native_limits()
        case "budget":
            return await upstream.budget(USER)
        case "retention":
            return await upstream.retention()
        case "chat":
            return await upstream.chat(CHAT)
        case "messages":
            return await upstream.messages(CHAT, down_to=0)
        case "archive":
            await upstream.archive_chat(CHAT)
        case "stream":
            async with upstream.stream(CHAT, after_id=0):
                pass
        case "watch":
            async with upstream.watch():
                pass
        case _:
            raise AssertionError(what)
    return None


async def error_of(upstream: Upstream, what: str) -> RelayError:
    try:
        await call(upstream, what)
    except RelayError as exc:
        return exc
    raise AssertionError(f"{what} was accepted")


OF_ACCOUNT = ("account", "list", "watch")
OF_CHAT = ("chat", "messages", "archive", "stream")
