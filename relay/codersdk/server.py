"""One server and one token: where to, with which headers, and where never to."""

import base64
import ssl
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from urllib.parse import unquote, urljoin, urlsplit

from relay.codersdk.errors import InvalidAnswer, InvalidRequest
from relay.codersdk.urls import as_bytes, header_value, request_target

TOKEN_HEADER = "Coder-Session-Token"  # noqa: S105
MAX_REQUESTS = 10  # one, and those that redirects ask for
GET_INSTEAD = frozenset({301, 302, 303})  # redirects that make another request of it,
SAME_METHOD = frozenset({307, 308})  # and those that want the same one again

_PORTS = {"http": 80, "https": 443}


@cache
def _default_tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # the system's certificates, or those of SSL_CERT_FILE; slow to load


def _default_user_agent() -> str:
    try:
        return f"coder-chat-relay/{version('coder-chat-relay')}"
    except PackageNotFoundError:  # run from the sources
        return "coder-chat-relay"


class Server:
    """Where requests and handshakes go, and with which headers.

    Raises:
        InvalidRequest: The URL or a header cannot be used.
    """

    def __init__(self, url: str, token: str, *, user_agent: str | None, ssl_context: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        self._place = _place(url)
        # A path, a query and a fragment do not count: the API is at the root of its host.
        self.origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self.user_agent = user_agent or _default_user_agent()
        self.headers = [(TOKEN_HEADER.encode(), header_value(token)), (b"User-Agent", header_value(self.user_agent))]
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.headers.append((b"Authorization", b"Basic " + base64.b64encode(as_bytes(pair))))
        self._ssl_context = ssl_context

    def tls(self) -> ssl.SSLContext | None:
        """What to check the server's certificate with; None where it has none."""
        return (self._ssl_context or _default_tls()) if self._place[0] == "https" else None

    def redirected(self, target: str, location: str, status_code: int) -> str:
        """The path and query that a redirect names.

        Raises:
            InvalidAnswer: It is on another host, which the token is not for, or it is no URL.
        """
        url = urljoin(f"{self.origin}{target}", location)
        try:
            place = _place(url)
            parts = urlsplit(url)
            to = request_target(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}")
        except InvalidRequest as exc:
            raise InvalidAnswer(f"{self.origin}{target}: redirected to what is no URL: {exc}", status_code) from exc
        if place != self._place:
            raise InvalidAnswer(
                f"{self.origin}{target}: redirected to {place[0]}://{place[1]}:{place[2]}, which was not followed: the "
                "token is only for the host that it was given for. Is this the server's own URL?",
                status_code,
            )
        return to


def _place(url: str) -> tuple[str, str, int]:
    """Scheme, host and port, by which two URLs are on the same server."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise InvalidRequest(f"the server's URL cannot be read: {exc}") from exc
    if parts.scheme not in _PORTS or not parts.hostname:
        raise InvalidRequest("the server's URL begins with http:// or https:// and a host")
    return parts.scheme, parts.hostname, _PORTS[parts.scheme] if port is None else port
