"""What every request passes before its handler: rate limit, token, chat lookup, route."""

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias
from uuid import UUID

from aiohttp import web

from relay.simulator.admin import find_user, user_json
from relay.simulator.calls import Call, Handler, Refused, answer_json, not_found
from relay.simulator.dialect import EXPERIMENTAL, Features
from relay.simulator.rest import parse_chat_id
from relay.simulator.state import Chat, Database, User
from relay.simulator.wire import go_json

BUILD_VERSION = "v0.0.0-devel"
CHATS = EXPERIMENTAL
SIGNED_OUT = "You are signed out or your session has expired. Please sign in again to continue."
RATE_LIMIT = 512


@dataclass
class RateLimiter:
    """Requests per minute and path of one user; a window is shorter by `speed`, so that a fast server is not stricter.

    Zero requests: no limit.
    """

    requests: int = RATE_LIMIT
    speed: float = 1.0
    _windows: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def count(self, who: str, path: str) -> dict[str, str]:
        """Headers for the answer.

        Raises:
            Refused: 429.
        """
        if self.requests <= 0:
            return {}
        seconds = 60 / self.speed
        window = int(time.time() / seconds)
        since, count = self._windows.get((who, path), (window, 0))
        count = count + 1 if since == window else 1
        if len(self._windows) > 100_000:
            self._windows.clear()
        self._windows[who, path] = (window, count)
        headers = {
            "X-RateLimit-Limit": str(self.requests),
            "X-RateLimit-Remaining": str(max(0, self.requests - count)),
            "X-RateLimit-Reset": str(math.ceil((window + 1) * seconds)),
        }
        if count > self.requests:
            text = f"You've been rate limited for sending more than {self.requests} requests in 1m0s."
            raise Refused(429, text, headers={**headers, "Retry-After": "60"})
        return headers


class Gate:
    """Routes requests of one server life."""

    def __init__(
        self,
        database: Database,
        *,
        routes: Iterable[tuple[str, str, Handler]],
        site_routes: Iterable[tuple[str, str, Handler]] = (),
        features: Features,
        limiter: RateLimiter,
        organization_id: UUID,
        base_url: Callable[[], str],
    ) -> None:
        self._database = database
        self._features = features
        self._limiter = limiter
        self._organization_id = organization_id
        self._base_url = base_url
        self._routes = _split(routes)
        self._site_routes = _split(site_routes)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer one request; refusals become bodies, and every answer gets the server's headers."""
        headers: dict[str, str] = {}
        try:
            response = await self._answer(request, headers)
        except Refused as exc:
            response = answer_json(exc.body, exc.status)
            headers.update(exc.headers)
        except web.HTTPException as exc:
            response = web.Response(status=exc.status, text=exc.text, headers=exc.headers)
        if not response.prepared:
            response.headers.update(headers)
        return response

    async def _answer(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        path = re.sub(r"/{2,}", "/", request.path)
        if path == "/api/v2/buildinfo" and request.method == "GET":
            return self._buildinfo()
        if not path.startswith("/api/"):
            return web.Response(text="<!doctype html><title>Coder</title>", content_type="text/html")
        token = token_of(request)
        user = next((user for user in self._database.users.values() if user.token == token), None)
        headers |= self._limiter.count(str(user.id) if user else str(request.remote), path)
        for prefix in self._features.prefixes:
            if path == prefix or path.startswith(prefix + "/"):
                return await self._chats(request, path.removeprefix(prefix), user or self._refuse_token(token))
        if path.startswith("/api/v2/"):
            return await self._site(request, path.removeprefix("/api/v2"), user or self._refuse_unknown(path, token))
        raise Refused(404, "Route not found.")

    async def _chats(self, request: web.Request, path: str, user: User) -> web.StreamResponse:
        segments = path.strip("/").split("/")
        call = Call(request, user)
        if segments != [""] and not self._is_fixed(segments[0], request.method):
            call = Call(request, user, _chat=self._chat(segments[0], user, reads=request.method == "GET"))
            segments = ["{chat}", *segments[1:]]
        return await self._route(self._routes, call, segments)

    def _is_fixed(self, segment: str, method: str) -> bool:
        """Whether the first segment names a collection. Where a server age has not that one, it is a bad chat id."""
        has = self._features
        match segment:
            case "files" | "config":
                return True
            case "watch":
                return method == "GET"
            case "by-workspace":
                return method == "GET" and has.labels
            case "models":
                return method == "GET" and not has.organization_models
            case "model-configs" | "providers":
                return not has.organization_models
            case "cost" | "usage-limits":
                return has.native_limits
            case "insights":
                return has.pull_request_insights
            case _:
                return False

    async def _route(self, routes: "Routes", call: Call, segments: list[str]) -> web.StreamResponse:
        allowed: list[tuple[str, Handler, list[str]]] = []
        for method, pattern, handler in routes:
            names = _match(pattern, segments)
            if names is not None:
                allowed.append((method, handler, names))
        for method, handler, names in allowed:
            if method == call.request.method:
                call.names = names
                return await handler(call)
        if allowed:
            methods = ", ".join(sorted({method for method, _, _ in allowed}))
            return web.Response(status=405, headers={"Allow": methods})
        raise Refused(404, "Route not found.")

    def _chat(self, text: str, user: User, *, reads: bool) -> Chat:
        chat = self._database.chats.get(parse_chat_id(text))
        if chat is None:
            raise not_found()
        if user.is_owner or chat.owner_id == user.id or (reads and user.id in chat.readers):
            return chat
        raise not_found()

    async def _site(self, request: web.Request, path: str, user: User) -> web.StreamResponse:
        segments = path.strip("/").split("/")
        call = Call(request, user)
        if len(segments) == 2 and segments[0] == "users" and request.method == "GET":
            return answer_json(user_json(find_user(self._database, user, segments[1]), self._organization_id))
        if segments == ["experiments"] and request.method == "GET":
            return answer_json(["agents"])
        return await self._route(self._site_routes, call, segments)

    def _buildinfo(self) -> web.Response:
        return answer_json(
            {
                "external_url": "https://github.com/coder/coder",
                "version": BUILD_VERSION,
                "dashboard_url": self._base_url(),
                "telemetry": False,
                "workspace_proxy": False,
                "agent_api_version": "1.0",
                "provisioner_api_version": "1.16",
                "upgrade_message": "",
                "deployment_id": str(self._organization_id),
                "webpush_public_key": "",
            }
        )

    def _refuse_unknown(self, path: str, token: str) -> User:
        """Without a token only a path that exists asks for one.

        Raises:
            Refused: Always: 401 or 404.
        """
        if path.startswith(("/api/v2/users/", "/api/v2/experiments")):
            self._refuse_token(token)
        raise Refused(404, "Route not found.")

    def _refuse_token(self, token: str) -> User:
        """
        Raises:
            Refused: Always: 401, with what is wrong with the token.
        """
        parts = token.split("-")
        if not token:
            detail = 'Cookie "coder_session_token" or query parameter must be provided.'
        elif len(parts) != 2:
            detail = f"Invalid API key format: incorrect amount of API key parts, expected 2 got {len(parts)}"
        elif len(parts[0]) != 10:
            detail = f"Invalid API key format: invalid API key ID length, expected 10 got {len(parts[0])}"
        elif len(parts[1]) != 22:
            detail = f"Invalid API key format: invalid API key secret length, expected 22 got {len(parts[1])}"
        elif any(user.token.startswith(parts[0] + "-") for user in self._database.users.values()):
            detail = "API key secret is invalid."
        else:
            detail = "API key is invalid."
        challenge = f'Bearer realm="coder", error="invalid_token", error_description={go_json(detail)}'
        raise Refused(401, SIGNED_OUT, detail, headers={"WWW-Authenticate": challenge})


def token_of(request: web.Request) -> str:
    """The first token that is not empty, in the server's order of places."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    places = (
        request.cookies.get("coder_session_token"),
        request.query.get("coder_session_token"),
        request.headers.get("Coder-Session-Token"),
        bearer.strip() if scheme.lower() == "bearer" else "",
        request.query.get("access_token"),
    )
    return next((token for token in places if token), "")


Routes: TypeAlias = list[tuple[str, list[str], Handler]]


def _split(routes: Iterable[tuple[str, str, Handler]]) -> Routes:
    return [(method, pattern.split("/"), handler) for method, pattern, handler in routes]


def _match(pattern: list[str], segments: list[str]) -> list[str] | None:
    """The path's variable segments but for `{chat}`, or None when the pattern does not fit."""
    if len(pattern) != len(segments):
        return None
    names = []
    for wanted, segment in zip(pattern, segments, strict=True):
        if wanted == "{chat}" or segment == "{chat}":
            if wanted != segment:
                return None
        elif wanted.startswith("{"):
            names.append(segment)
        elif wanted != segment:
            return None
    return names
