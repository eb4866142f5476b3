"""Requests and their answers, over connections that are kept. No call is known here."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import BinaryIO, cast

import httpx

from relay.codersdk.answers import refusal
from relay.codersdk.errors import CoderError, ConnectionFailed, InvalidAnswer, InvalidRequest
from relay.codersdk.server import GET_INSTEAD, MAX_REQUESTS, SAME_METHOD, Server
from relay.codersdk.urls import header_value, request_target

_CHUNK_BYTES = 64 * 1024

Content = bytes | BinaryIO | Iterable[bytes] | AsyncIterator[bytes] | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The last answer to a call, and the request that it answers."""

    status_code: int
    content_type: str
    retry_after: str | None
    body: bytes
    method: str
    url: str  # without user and password

    def refusal(self, *, may_be_limit: bool = False) -> CoderError:
        """The error that it stands for."""
        return refusal(
            self.status_code,
            self.content_type,
            self.body,
            method=self.method,
            url=self.url,
            may_be_limit=may_be_limit,
            retry_after=self.retry_after,
        )


class Transport:
    """Connections to one server."""

    def __init__(self, server: Server, *, timeout: float) -> None:
        self._server = server
        try:
            self._http = httpx.AsyncClient(
                verify=server.tls() or False,  # never asked for without TLS
                timeout=timeout,
                follow_redirects=False,
                # The server prefers a session cookie to the token, and sets cookies.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        except (ValueError, ImportError) as exc:
            raise InvalidRequest(
                f"the proxy that the environment names (HTTPS_PROXY, ALL_PROXY) cannot be used: {exc}"
            ) from exc

    async def close(self) -> None:
        await self._http.aclose()

    async def send(
        self, method: str, path: str, content: Content = None, headers: Iterable[tuple[str, str]] = ()
    ) -> Answer:
        """Make a request and follow redirects, on the same host only.

        Raises:
            InvalidRequest: Nothing can be sent for these values.
            ConnectionFailed: No answer came, or only a part of one.
            InvalidAnswer: The server redirects to another host, or for ever.
        """
        target = request_target(path)
        more = [(name.encode(), header_value(value)) for name, value in headers]
        for _ in range(MAX_REQUESTS):
            url = f"{self._server.origin}{target}"
            try:
                response = await self._http.send(self._request(method, target, content, more))
            except httpx.TimeoutException as exc:
                raise ConnectionFailed(f"{method} {url}: no answer in time") from exc
            except (httpx.HTTPError, OSError) as exc:
                raise ConnectionFailed(f"{method} {url}: {str(exc) or type(exc).__name__}") from exc
            location = response.headers.get("Location")
            can_repeat = content is None or isinstance(content, bytes)
            follow = response.status_code in GET_INSTEAD or (response.status_code in SAME_METHOD and can_repeat)
            if location is None or not follow:
                return Answer(
                    response.status_code,
                    _header(response, b"content-type") or "",
                    _header(response, b"retry-after"),
                    response.content,
                    method,
                    url,
                )
            target = self._server.redirected(target, location, response.status_code)
            if response.status_code in GET_INSTEAD:
                method, content = ("HEAD" if method == "HEAD" else "GET"), None
                more = [(name, value) for name, value in more if name != b"Content-Type"]
        raise InvalidAnswer(f"{method} {self._server.origin}{target}: stopped after {MAX_REQUESTS} redirects")

    def _request(self, method: str, target: str, content: Content, more: list[tuple[bytes, bytes]]) -> httpx.Request:
        headers = [*self._server.headers, *more]
        if isinstance(content, bytes) or (content is None and method in {"POST", "PUT", "PATCH"}):
            headers.append((b"Content-Length", str(len(content or b"")).encode()))
        url = httpx.URL(f"{self._server.origin}{target}")
        request = self._http.build_request(method, url, headers=headers, content=_chunks(content))
        if url.raw_path != target.encode():  # httpx escapes a little more than Go
            request.extensions["target"] = target.encode()
        return request


def _header(response: httpx.Response, name: bytes) -> str | None:
    for key, value in response.headers.raw:
        if key.lower() == name:
            return value.decode("utf-8", "surrogateescape")
    return None


def _chunks(content: Content) -> bytes | AsyncIterator[bytes] | None:
    if content is None or isinstance(content, bytes | AsyncIterator):
        return content
    return _read_file(cast(BinaryIO, content)) if hasattr(content, "read") else _each(content)


async def _read_file(file: BinaryIO) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, _CHUNK_BYTES):
        yield chunk


async def _each(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
