"""One account of one Coder server: REST through httpx, streams through websockets, every end as one of our errors."""

import asyncio
import logging
import math
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Self, cast
from urllib.parse import urlencode
from uuid import UUID

import httpx
import structlog
from prometheus_client import Counter, Histogram
from pydantic import (
    AfterValidator,
    BaseModel,
    HttpUrl,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    TypeAdapter,
    model_validator,
)
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus, WebSocketException
from websockets.frames import CloseCode

from relay.adapters.coder_answers import (
    Answer,
    as_object,
    as_objects,
    chat_rows,
    decoded,
    message_id,
    model_price,
    refusal,
)
from relay.core.errors import BadFrame, RelayError, StreamEnded, Unauthorized, Unavailable, WrongSettings
from relay.core.events import JsonObject
from relay.ports import Account, MessagePage, ModelPrice

log = structlog.get_logger(__name__)

USER_AGENT = f"coder-chat-relay/{version('coder-chat-relay')}"
TOKEN_HEADER = "Coder-Session-Token"  # noqa: S105

# --- settings ------------------------------------------------------------------------------------------------------


def _server_url(text: str) -> str:
    url = TypeAdapter(HttpUrl).validate_python(text)
    if url.username or url.password:
        raise ValueError("no user or password in the URL: the token has a setting of its own")
    if url.query or url.fragment:
        raise ValueError("the URL ends with its path: no query, no fragment")
    return str(url).rstrip("/")  # host in lower case, default port left out: it becomes part of event ids


class CoderSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """Which server, as whom."""

    url: Annotated[str, AfterValidator(_server_url)]  # the server's access URL; it may have a path
    token: SecretStr | None = None  # this or
    token_file: Path | None = None  # that; read again when the server refuses the token
    timeout_seconds: PositiveFloat = 30.0  # of one REST call or one handshake, from its first byte to its last
    max_frame_bytes: PositiveInt = 16 * 2**20  # one message travels in one frame, whatever its size; 12 MB was seen
    ping_interval_seconds: PositiveFloat = 20.0  # we ping too: a dead link looks like a chat where nothing happens
    ping_timeout_seconds: PositiveFloat = 20.0
    slow_reader_seconds: PositiveFloat = 10.0  # the server drops a stream it could not write to for so long

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if (self.token is None) == (self.token_file is None):
            raise ValueError("exactly one of token and token_file is needed")
        return self


def _read_token(settings: CoderSettings) -> SecretStr:
    if settings.token_file is None:
        where, token = "RELAY_CODER__TOKEN", cast(SecretStr, settings.token).get_secret_value()
    else:
        where = f"RELAY_CODER__TOKEN_FILE ({settings.token_file})"
        try:
            token = settings.token_file.read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise WrongSettings(f"{where} cannot be read: {exc}") from exc
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):  # it has to fit into an HTTP header
        raise WrongSettings(f"{where} does not hold a Coder session token (letters, digits and a dash)")
    return SecretStr(token)


# --- metrics -------------------------------------------------------------------------------------------------------

_ENDPOINTS = ("account", "chats", "chat", "messages", "archive", "model_configs")
_CODES = ("2xx", "401", "403", "404", "409", "429", "4xx", "5xx", "error")
_OUTCOMES = (
    "ok",
    "auth_error",
    "not_found",
    "rate_limited",
    "server_error",
    "timeout",
    "network_error",
    "protocol_error",
)
_END_REASONS = ("server_close", "ping_timeout", "network_error", "protocol_error", "too_slow")

HTTP_REQUESTS = Counter(
    "relay_source_http_requests_total",
    "REST calls to Coder by answer. A rise of 401 or 403 is a bad token, of 429 the server's rate limit, of 5xx or "
    "error (no answer, or a redirect) a server or network in trouble.",
    ["endpoint", "code"],
)
HTTP_SECONDS = Histogram(
    "relay_source_http_request_duration_seconds",
    "How long REST calls to Coder take. A rise is a loaded server, and discovery and reconciling slow down with it.",
    ["endpoint"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
CONNECTS = Counter(
    "relay_stream_connects_total",
    "Attempts to open a stream by outcome. A rise of anything but ok means that chats are not being followed.",
    ["outcome"],
)
DISCONNECTS = Counter(
    "relay_stream_disconnects_total",
    "Streams that ended though the relay wanted more of them. A rise of server_close is a restart of the server, of "
    "ping_timeout or network_error a bad link, of too_slow a relay that cannot keep up, of protocol_error a bug or a "
    "frame over the size limit.",
    ["reason"],
)

for _endpoint in _ENDPOINTS:
    HTTP_SECONDS.labels(_endpoint)
    for _code in _CODES:
        HTTP_REQUESTS.labels(_endpoint, _code)
for _outcome in _OUTCOMES:
    CONNECTS.labels(_outcome)
for _reason in _END_REASONS:
    DISCONNECTS.labels(_reason)


def _code_label(status: int) -> str:
    exact, family = str(status), f"{status // 100}xx"
    return next((label for label in (exact, family) if label in _CODES), "error")


def _outcome_label(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "auth_error", 403: "auth_error", 404: "not_found", 408: "timeout", 429: "rate_limited"}.get(
        status, "protocol_error"
    )


def _end_reason(exc: ConnectionClosed, *, slow: bool) -> str:
    received, sent = exc.rcvd, exc.sent
    if received is not None and (sent is None or exc.rcvd_then_sent):
        if received.reason in ("Ping failed", "liveness probe failed"):  # our pong came too late for the server
            return "too_slow" if slow else "ping_timeout"
        policy = (CloseCode.PROTOCOL_ERROR, CloseCode.UNSUPPORTED_DATA, CloseCode.INVALID_DATA, 1008, 1009, 1010)
        return "protocol_error" if received.code in policy else "server_close"
    if sent is not None and sent.code != CloseCode.INTERNAL_ERROR:
        return "protocol_error"
    if slow:
        return "too_slow"
    return "network_error" if sent is None else "ping_timeout"


# --- the adapter ---------------------------------------------------------------------------------------------------

_ALL_CHATS = 100_000
_CHATS_PAGE = 50
_MESSAGES_PAGE = 200  # the server's maximum
_CLOSE_SECONDS = 1.0  # politeness of a socket that is let go; a dead one must not hold up the shutdown
_SLOW_MEMORY_SECONDS = 60.0  # what a pause in reading led to shows only after the buffers are read
_FRAMES_AHEAD = 4  # read before they are asked for, apart from what came in the same read; each may be of full size

# At DEBUG websockets logs the headers of handshakes, so the token. Not even then.
_quiet = logging.getLogger("websockets.client.coder")
_quiet.setLevel(logging.WARNING)


class _Connect(connect):
    """A dial that takes a redirect for the answer: following one would show the token to another host."""

    def process_redirect(self, exc: Exception) -> Exception:
        return exc


@cache
def _tls() -> ssl.SSLContext:
    """The system's certificates, or those of SSL_CERT_FILE: the same for REST and streams. Slow to load."""
    return ssl.create_default_context()


@asynccontextmanager
async def open_upstream(settings: CoderSettings) -> AsyncIterator["CoderUpstream"]:
    """An `Upstream` for one account. Opening it does not speak to the server yet.

    Raises:
        WrongSettings: There is no usable token, or the proxy in the environment cannot be used.
    """
    token = _read_token(settings)
    try:
        http = httpx.AsyncClient(
            verify=_tls(),
            timeout=settings.timeout_seconds,
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
            follow_redirects=False,
            headers={"User-Agent": USER_AGENT, "Accept": "application/json"},
            # The server prefers a session cookie to the token header, and sets cookies.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        )
    except (ValueError, ImportError) as exc:
        raise WrongSettings(
            f"the proxy that the environment names (HTTPS_PROXY, ALL_PROXY) cannot be used: {exc}"
        ) from exc
    async with http:
        yield CoderUpstream(settings, token, http)


class CoderUpstream:
    """`Upstream` over the network. Get one from `open_upstream`."""

    def __init__(self, settings: CoderSettings, token: SecretStr, http: httpx.AsyncClient) -> None:
        self._settings = settings
        self._token = token
        self._http = http

    @property
    def deployment(self) -> str:
        return self._settings.url

    @property
    def _chats(self) -> str:
        """Path of the chats API. Newer servers have it at /api/v2/chats; this is the place to tell them apart."""
        return "/api/experimental/chats"

    def _chat_path(self, chat_id: UUID) -> str:
        return f"{self._chats}/{chat_id}"

    # REST

    async def account(self) -> Account:
        answer = await self._call("account", "GET", "/api/v2/users/me")
        user = as_object(answer, decoded(answer, of_chat=False))
        try:
            return Account(user_id=UUID(str(user["id"])), username=str(user["username"]))
        except (KeyError, ValueError) as exc:
            raise Unavailable(f"{answer.call}: an answer without id and username") from exc

    async def list_chats(self, *, archived: bool) -> Sequence[JsonObject]:
        query = {"q": "archived:true"} if archived else {}
        # One call is the only consistent list: pages are cut from an order that moves with every change of a chat.
        answer = await self._call("chats", "GET", self._chats, query | {"limit": str(_ALL_CHATS)})
        if answer.status == 400:
            return await self._list_by_pages(query)
        return chat_rows(answer)

    async def _list_by_pages(self, query: dict[str, str]) -> Sequence[JsonObject]:
        """All chats of a server that wants pages.

        A page starts behind the last chat of the page before, at wherever that chat is by now. So pages overlap, and
        a chat that moves up meanwhile is missed, and stands at the top when we look again.
        """
        found: dict[object, JsonObject] = {}
        for again in (False, True):
            after: dict[str, str] = {}
            stale = 0  # pages since the last one with news
            while True:
                answer = await self._call("chats", "GET", self._chats, query | after | {"limit": str(_CHATS_PAGE)})
                page, known = chat_rows(answer), len(found)
                found.update((row["id"], row) for row in page)
                stale = stale + 1 if len(found) == known else 0
                # The cursor chat may have moved to the top, and all that is known goes by once more.
                patience = 1 if again else known // _CHATS_PAGE + 2
                if len(page) < _CHATS_PAGE or stale >= patience:
                    break
                after = {"after_id": str(page[-1]["id"])}
        return list(found.values())

    async def chat(self, chat_id: UUID) -> JsonObject:
        answer = await self._call("chat", "GET", self._chat_path(chat_id))
        return as_object(answer, decoded(answer, of_chat=True))

    async def messages(self, chat_id: UUID, *, down_to: int) -> MessagePage:
        messages: list[JsonObject] = []
        queued: list[JsonObject] | None = None
        before: dict[str, str] = {}
        while True:
            answer = await self._call(
                "messages", "GET", f"{self._chat_path(chat_id)}/messages", before | {"limit": str(_MESSAGES_PAGE)}
            )
            page = as_object(answer, decoded(answer, of_chat=True))
            more = page.get("has_more")
            if "messages" not in page or not isinstance(more, bool):
                raise Unavailable(f"{answer.call}: no page of messages")  # taken for an empty one it would be an edit
            rows = as_objects(answer, page["messages"], null=True)
            lowest = min((message_id(answer, row) for row in rows), default=0)
            if queued is None:  # the queue comes with the newest page only
                queued = as_objects(answer, page.get("queued_messages"), null=True)
            messages += rows
            if not more:
                break
            if not rows or lowest >= int(before.get("before_id", lowest + 1)):
                raise Unavailable(f"{answer.call}: a page that promises more and does not move on")
            if lowest <= down_to:
                break
            before = {"before_id": str(lowest)}
        return MessagePage(messages=messages, queued_messages=queued, complete=not more)

    async def archive_chat(self, chat_id: UUID) -> None:
        answer = await self._call("archive", "PATCH", self._chat_path(chat_id), body={"archived": True})
        if answer.status in (200, 204) or (answer.status == 400 and answer.said == "Chat is already archived."):
            return
        raise refusal(answer, of_chat=True, now=datetime.now(UTC))

    async def model_prices(self) -> Mapping[UUID, ModelPrice]:
        answer = await self._call("model_configs", "GET", f"{self._chats}/model-configs")
        # Only Coder's own word counts: a proxy's 404 would make every charge of the day unpriced.
        if answer.status in (400, 403, 404) and answer.said is not None:
            return {}
        prices = {}
        for row in as_objects(answer, decoded(answer, of_chat=False, exact_fractions=True)):
            try:
                prices[UUID(str(row["id"]))] = model_price(row)
            except (KeyError, ValueError) as exc:
                raise Unavailable(f"{answer.call}: a model config without an id or a model") from exc
        return prices

    # streams

    def stream(self, chat_id: UUID, *, after_id: int) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        return self._open(f"{self._chat_path(chat_id)}/stream", {"after_id": str(after_id)}, of_chat=True)

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        return self._open(f"{self._chats}/watch", {}, of_chat=False)

    @asynccontextmanager
    async def _open(self, path: str, query: dict[str, str], *, of_chat: bool) -> AsyncIterator[AsyncIterator[str]]:
        connection = await self._dial(path, query, of_chat=of_chat)
        frames = self._frames(connection, f"GET {path}")
        try:
            yield frames
        finally:
            await frames.aclose()
            await connection.close()

    async def _frames(self, connection: ClientConnection, call: str) -> AsyncGenerator[str, None]:
        last_slow = -math.inf
        while True:
            try:
                frame = await connection.recv()
            except ConnectionClosed as exc:
                slow = time.monotonic() - last_slow < _SLOW_MEMORY_SECONDS
                raise self._ended(exc, call, slow=slow) from exc
            if isinstance(frame, bytes):
                DISCONNECTS.labels("protocol_error").inc()
                raise BadFrame(f"{call}: a binary frame", reason="schema")
            handed_out = time.monotonic()
            yield frame
            if time.monotonic() - handed_out >= self._settings.slow_reader_seconds:
                last_slow = time.monotonic()

    def _ended(self, exc: ConnectionClosed, call: str, *, slow: bool) -> RelayError:
        reason = _end_reason(exc, slow=slow)
        DISCONNECTS.labels(reason).inc()
        ours = exc.sent.code if exc.sent is not None and not exc.rcvd_then_sent else None
        if ours == CloseCode.MESSAGE_TOO_BIG:
            limit = self._settings.max_frame_bytes
            return BadFrame(f"{call}: a frame of more than {limit} bytes", reason="too_large")
        if ours == CloseCode.INVALID_DATA:
            return BadFrame(f"{call}: a frame that is not UTF-8", reason="bad_json")
        return StreamEnded(f"{call}: {reason}: {exc}", reason)

    # below both

    def _tokens(self) -> Iterator[SecretStr]:
        """The token; and after it was refused, the one that its file holds by now, if that is another."""
        refused = self._token
        yield refused
        if self._token == refused and self._settings.token_file is not None:
            try:
                self._token = _read_token(self._settings)
            except WrongSettings as exc:
                raise Unauthorized(f"the token is refused, and {exc}") from exc
            if self._token != refused:
                log.info("token_file_reread", deployment=self.deployment)
        if self._token != refused:
            yield self._token

    async def _call(
        self, endpoint: str, method: str, path: str, query: dict[str, str] | None = None, body: object = None
    ) -> Answer:
        for token in self._tokens():
            request = self._http.build_request(
                method,
                self.deployment + path,
                params=query,
                json=body,
                headers={TOKEN_HEADER: token.get_secret_value()},
            )
            response = await self._send(endpoint, f"{method} {path}", request)
            if response.status_code != 401:
                break
        return _answer(f"{method} {path}", response.status_code, response.headers, response.content, token)

    async def _send(self, endpoint: str, call: str, request: httpx.Request) -> httpx.Response:
        started = time.perf_counter()
        try:
            # httpx limits the wait for each read; a server that drips must not hold us for ever.
            async with asyncio.timeout(self._settings.timeout_seconds):
                response = await self._http.send(request)
        except (httpx.HTTPError, TimeoutError) as exc:
            HTTP_REQUESTS.labels(endpoint, "error").inc()
            raise self._no_answer(call, exc) from exc
        HTTP_SECONDS.labels(endpoint).observe(time.perf_counter() - started)
        HTTP_REQUESTS.labels(endpoint, _code_label(response.status_code)).inc()
        return response

    async def _dial(self, path: str, query: dict[str, str], *, of_chat: bool) -> ClientConnection:
        for token in self._tokens():
            answer = await self._handshake(path, query, token)
            if isinstance(answer, ClientConnection):
                return answer
            refused = refusal(answer, of_chat=of_chat, now=datetime.now(UTC))
            if answer.status != 401:
                break
        raise refused

    async def _handshake(self, path: str, query: dict[str, str], token: SecretStr) -> ClientConnection | Answer:
        call = f"GET {path}"
        url = re.sub("^http", "ws", self.deployment) + path + (f"?{urlencode(query)}" if query else "")
        try:
            connection = await _Connect(
                url,
                additional_headers={TOKEN_HEADER: token.get_secret_value()},
                user_agent_header=USER_AGENT,
                compression=None,
                open_timeout=self._settings.timeout_seconds,
                ping_interval=self._settings.ping_interval_seconds,
                ping_timeout=self._settings.ping_timeout_seconds,
                close_timeout=_CLOSE_SECONDS,
                max_size=self._settings.max_frame_bytes,
                max_queue=_FRAMES_AHEAD,
                logger=_quiet,
                ssl=_tls() if url.startswith("wss:") else None,
            )
        except InvalidStatus as exc:
            response = exc.response
            CONNECTS.labels(_outcome_label(response.status_code)).inc()
            headers = httpx.Headers(list(response.headers.raw_items()))
            return _answer(call, response.status_code, headers, bytes(response.body or b""), token)
        except TimeoutError as exc:
            CONNECTS.labels("timeout").inc()
            raise self._no_answer(call, exc) from exc
        except (OSError, WebSocketException) as exc:
            cut = isinstance(exc, OSError) or (isinstance(exc, InvalidMessage) and isinstance(exc.__cause__, EOFError))
            CONNECTS.labels("network_error" if cut else "protocol_error").inc()
            raise self._no_answer(call, exc) from exc
        CONNECTS.labels("ok").inc()
        return connection

    def _no_answer(self, call: str, exc: Exception) -> Unavailable:
        if isinstance(exc, TimeoutError | httpx.TimeoutException):
            why = f"no answer within {self._settings.timeout_seconds:g} s"
        else:
            why = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        return Unavailable(f"{call}: {self.deployment}: {why}")


def _answer(call: str, status: int, headers: Mapping[str, str], body: bytes, token: SecretStr) -> Answer:
    # Parts of a refusal's body go into error texts, and a proxy's error page may show the request's headers.
    if status >= 300:
        body = body.replace(token.get_secret_value().encode(), b"[token]")
    return Answer(call, status, headers, body)
