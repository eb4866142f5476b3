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
    """`requests` holds what came so far; `handler` may be changed at any time."""

    handler: Handler
    requests: list[web.BaseRequest] = field(default_factory=list)
    url: str = ""

    @property
    def paths(self) -> list[str]:
        return [request.path_qs for request in self.requests]


@asynccontextmanager
async def serve(handler: Handler) -> AsyncIterator[ScriptedServer]:
    """Serve on a free loopback port. Handlers that still run at the end are cancelled."""
    server = ScriptedServer(handler)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        server.requests.append(request)
        return await server.handler(request)  # type: ignore[arg-type]

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=0.1)
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
async def upstream_of(handler: Handler, **settings: object) -> AsyncIterator[tuple[CoderUpstream, ScriptedServer]]:
    async with serve(handler) as server:
        values = {"url": server.url, "token": TOKEN, "timeout_seconds": 5} | settings
        if "token_file" in settings:
            del values["token"]
        async with open_upstream(CoderSettings.model_validate(values)) as upstream:
            yield upstream, server


async def call(upstream: Upstream, what: str) -> object:
    match what:
        case "account":
            return await upstream.account()
        case "list":
            return await upstream.list_chats(archived=False)
        case "prices":
            return await upstream.model_prices()
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
