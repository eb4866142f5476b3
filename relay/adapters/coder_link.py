"""The link to one Coder server: the token, REST calls through httpx, WebSockets through websockets.

What is asked and what answers mean is decided elsewhere; here every call ends in an `Answer` or in one of our errors.
"""

import asyncio
import codecs
import logging
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Self, cast
from urllib.parse import urlencode

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
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidMessage, InvalidStatus, WebSocketException

from relay.adapters.coder_answers import Answer
from relay.adapters.coder_socket import Pulse, WatchedSocket
from relay.core.errors import Unauthorized, Unavailable, WrongSettings

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


_TOKEN = "RELAY_CODER__TOKEN"  # noqa: S105


class AccountSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """One of several accounts."""

    name: str = ""  # in logs and in `/status`
    token: SecretStr | None = None  # this or
    token_file: Path | None = None  # that; read again when the server refuses the token

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if (self.token is None) == (self.token_file is None):
            raise ValueError("each account has exactly one of token and token_file")
        return self


class CoderSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """Which server, as whom."""

    url: Annotated[str, AfterValidator(_server_url)]  # the server's access URL; it may have a path
    token: SecretStr | None = None  # this or
    token_file: Path | None = None  # that; read again when the server refuses the token
    timeout_seconds: PositiveFloat = 30.0  # of one REST call or one handshake, from its first byte to its last
    max_frame_bytes: PositiveInt = 16 * 2**20  # one message travels in one frame, whatever its size; 12 MB was seen
    ping_interval_seconds: PositiveFloat = 20.0  # of silence: a dead link looks like a chat where nothing happens
    ping_timeout_seconds: PositiveFloat = 20.0
    slow_reader_seconds: PositiveFloat = 10.0  # the server drops a stream it could not write to for so long
    keep_unread: bool = True  # set read marks of owners back that a stream of theirs moved, where the server can

    accounts: Sequence[AccountSettings] = ()  # more of them, of the same server
    refused_seconds: PositiveFloat = 30.0  # after which an account is tried again whose token was refused
    administrator: bool = False  # follow other users' chats too, where cost reports name them
    administrator_days: PositiveInt = 30  # those with an answer in so many days

    @model_validator(mode="after")
    def _one_token(self) -> Self:
        if self.token is not None and self.token_file is not None:
            raise ValueError("RELAY_CODER__TOKEN and RELAY_CODER__TOKEN_FILE are both set: leave one of them out")
        if self.token is None and self.token_file is None and not self.accounts:
            raise ValueError(
                "exactly one of RELAY_CODER__TOKEN and RELAY_CODER__TOKEN_FILE is needed, or RELAY_CODER__ACCOUNTS"
            )
        return self

    def each_account(self) -> Iterator[tuple[str, str, Self]]:
        """Name of each account, where its token stands, and settings with that token alone."""
        if self.token is not None or self.token_file is not None:
            yield "account", _TOKEN, self.model_copy(update={"accounts": ()})
        for number, account in enumerate(self.accounts, 1):
            token = {"token": account.token, "token_file": account.token_file}
            where = f"RELAY_CODER__ACCOUNTS, number {number}: token"
            yield account.name or f"account {number}", where, self.model_copy(update={**token, "accounts": ()})


def _read_token(settings: CoderSettings, where: str) -> SecretStr:
    if settings.token_file is None:
        token = cast(SecretStr, settings.token).get_secret_value()
    else:
        where = f"{where}_FILE ({settings.token_file})" if where == _TOKEN else f"{where}_file ({settings.token_file})"
        try:
            token = settings.token_file.read_text()
        except (OSError, UnicodeDecodeError) as exc:
            raise WrongSettings(f"{where} cannot be read: {exc}") from exc
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):  # it has to fit into an HTTP header
        raise WrongSettings(f"{where} does not hold a Coder session token (letters, digits and a dash)")
    return SecretStr(token)


# --- metrics -------------------------------------------------------------------------------------------------------

_ENDPOINTS = (
    "account",
    "archive",
    "chat",
    "chats",
    "cost_reports",
    "gateway_budget",
    "messages",
    "model_configs",
    "probe",
    "read_mark",
    "retention",
    "usage_limits",
)
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

for _endpoint in _ENDPOINTS:
    HTTP_SECONDS.labels(_endpoint)
    for _code in _CODES:
        HTTP_REQUESTS.labels(_endpoint, _code)
for _outcome in _OUTCOMES:
    CONNECTS.labels(_outcome)


def _code_label(status: int) -> str:
    exact, family = str(status), f"{status // 100}xx"
    return next((label for label in (exact, family) if label in _CODES), "error")


def _outcome_label(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "auth_error", 403: "auth_error", 404: "not_found", 408: "timeout", 429: "rate_limited"}.get(
        status, "protocol_error"
    )


# --- the link ------------------------------------------------------------------------------------------------------

_CLOSE_SECONDS = 1.0  # politeness of a socket that is let go; a dead one must not hold up the shutdown
_PIECE_BYTES = 64 * 2**10  # of a long answer: a few milliseconds of work
_CALLS_AT_ONCE = 32
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
async def open_link(settings: CoderSettings, where: str = _TOKEN) -> AsyncIterator["CoderLink"]:
    """A link for one account. Opening it does not speak to the server yet.

    Args:
        where: The setting that has the token, for errors.

    Raises:
        WrongSettings: There is no usable token, or the proxy in the environment cannot be used.
    """
    token = _read_token(settings, where)
    try:
        http = httpx.AsyncClient(
            verify=_tls(),
            timeout=settings.timeout_seconds,
            limits=httpx.Limits(max_connections=_CALLS_AT_ONCE, max_keepalive_connections=_CALLS_AT_ONCE),
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
        yield CoderLink(settings, token, http, where)


class Body:
    """The text of a 200 as it comes in. Whoever gets one closes it."""

    def __init__(
        self,
        call: str,
        response: httpx.Response,
        timeout_seconds: float,
        no_answer: Callable[[str, Exception], Unavailable],
    ) -> None:
        self.call = call
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._timeout_seconds = timeout_seconds
        self._no_answer = no_answer

    async def pieces(self) -> AsyncGenerator[str, None]:
        """Pieces of about 64 KiB. The others get their turn before each.

        Raises:
            Unavailable: The next piece did not come within the deadline of a call, or never will.
            ValueError: It is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        chunks = self._response.aiter_bytes(_PIECE_BYTES)
        while True:
            await asyncio.sleep(0)
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                break
            except (httpx.HTTPError, TimeoutError) as exc:
                raise self._no_answer(self.call, exc) from exc
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)

    async def close(self) -> None:
        """Let the connection go; what was not read is not wanted."""
        await self._response.aclose()


class CoderLink:
    """Calls and sockets of one account. Get one from `open_link`."""

    def __init__(self, settings: CoderSettings, token: SecretStr, http: httpx.AsyncClient, where: str) -> None:
        self._settings = settings
        self._token = token
        self._where = where
        self._http = http
        # The pool of httpx looks through all that wait, and all connections, each time that one is free.
        self._turns = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._pulse = Pulse(interval=settings.ping_interval_seconds, patience=settings.ping_timeout_seconds)
        self.build = ""  # of the server that answered last, as it calls itself: it changes with an upgrade

    @property
    def keeps_unread(self) -> bool:
        return self._settings.keep_unread

    @property
    def slow_seconds(self) -> float:
        """Who takes so long for frames is too slow for the server."""
        return self._settings.slow_reader_seconds

    @property
    def deployment(self) -> str:
        """The server's URL without a trailing slash."""
        return self._settings.url

    # REST

    def _tokens(self) -> Iterator[SecretStr]:
        """The token; and after it was refused, the one that its file holds by now, if that is another."""
        refused = self._token
        yield refused
        if self._token == refused and self._settings.token_file is not None:
            try:
                self._token = _read_token(self._settings, self._where)
            except WrongSettings as exc:
                raise Unauthorized(f"the token is refused, and {exc}") from exc
            if self._token != refused:
                log.info("token_file_reread", deployment=self.deployment)
        if self._token != refused:
            yield self._token

    async def call(
        self, endpoint: str, method: str, path: str, query: dict[str, str] | None = None, body: object = None
    ) -> Answer:
        """A REST call. `endpoint` is its name in the metrics, `body` is sent as JSON.

        Raises:
            Unavailable: There was no whole answer within the deadline.
            Unauthorized: The token is refused, and its file cannot be read.
        """
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

    async def fetch(self, endpoint: str, path: str, query: dict[str, str]) -> "Body | Answer":
        """As a GET through `call`, for an answer that may be long: the body of a 200 comes in pieces."""
        call = f"GET {path}"
        for token in self._tokens():
            request = self._http.build_request(
                "GET", self.deployment + path, params=query, headers={TOKEN_HEADER: token.get_secret_value()}
            )
            response = await self._send(endpoint, call, request, stream=True)
            if response.status_code == 200:
                return Body(call, response, self._settings.timeout_seconds, self._no_answer)
            try:
                async with asyncio.timeout(self._settings.timeout_seconds):
                    body = await response.aread()
            except (httpx.HTTPError, TimeoutError) as exc:
                raise self._no_answer(call, exc) from exc
            finally:
                await response.aclose()
            if response.status_code != 401:
                break
        return _answer(call, response.status_code, response.headers, body, token)

    async def _send(self, endpoint: str, call: str, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        started = time.perf_counter()
        try:
            # httpx limits the wait for each read; a server that drips must not hold us for ever.
            async with asyncio.timeout(self._settings.timeout_seconds), self._turns:
                response = await self._http.send(request, stream=stream)
        except (httpx.HTTPError, TimeoutError) as exc:
            HTTP_REQUESTS.labels(endpoint, "error").inc()
            raise self._no_answer(call, exc) from exc
        HTTP_SECONDS.labels(endpoint).observe(time.perf_counter() - started)
        HTTP_REQUESTS.labels(endpoint, _code_label(response.status_code)).inc()
        self.build = response.headers.get("X-Coder-Build-Version", self.build)
        return response

    # sockets

    async def dial(self, path: str, query: dict[str, str]) -> WatchedSocket | Answer:
        """Open a WebSocket; the answer of a server that refuses to. Raises as `call`."""
        for token in self._tokens():
            reply = await self._handshake(path, query, token)
            if isinstance(reply, WatchedSocket) or reply.status != 401:
                break
        return reply

    async def _handshake(self, path: str, query: dict[str, str], token: SecretStr) -> WatchedSocket | Answer:
        call = f"GET {path}"
        url = re.sub("^http", "ws", self.deployment) + path + (f"?{urlencode(query)}" if query else "")
        try:
            opened = await _Connect(
                url,
                additional_headers={TOKEN_HEADER: token.get_secret_value()},
                user_agent_header=USER_AGENT,
                compression=None,
                open_timeout=self._settings.timeout_seconds,
                ping_interval=None,
                close_timeout=_CLOSE_SECONDS,
                max_size=self._settings.max_frame_bytes,
                max_queue=_FRAMES_AHEAD,
                logger=_quiet,
                ssl=_tls() if url.startswith("wss:") else None,
                create_connection=WatchedSocket,
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
        connection = cast(WatchedSocket, opened)
        self._pulse.watch(connection)
        return connection

    # both

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
