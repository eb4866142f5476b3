"""What the outside asks of one process: metrics, alive, ready, status. On a thread of its own, so that a blocked
event loop is told and not shared."""

import asyncio
import errno
import json
import platform
import selectors
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from typing import TYPE_CHECKING, Annotated, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog
from prometheus_client import Gauge, Histogram, make_wsgi_app
from pydantic import BaseModel, Field, PositiveFloat

from relay.core.errors import WrongSettings

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

log = structlog.get_logger(__name__)


class OpsSettings(BaseModel, frozen=True, extra="forbid"):
    """Where metrics and health are served. They need no password, so only this machine sees them by default; in a
    container set the host to 0.0.0.0, or probes and Prometheus do not get in."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 9464  # 0: any free one
    stall_seconds: PositiveFloat = 30.0  # an event loop that stood still for so long is not alive


BUILD_INFO = Gauge(
    "relay_build_info",
    "Always 1. Says which version runs in which role; two versions for long mean a rollout that hangs.",
    ["version", "revision", "python_version", "role"],
)
LOOP_LAG = Histogram(
    "relay_event_loop_lag_seconds",
    "How late the event loop wakes a task, sampled each second. A rise means too much work in one process, or a call "
    "that blocks.",
    buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 5),
)


def announce_build(role: str) -> None:
    """Set `relay_build_info` for this process. The revision is the commit, where the package was installed from git."""
    package = distribution("coder-chat-relay")
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    revision = origin.get("vcs_info", {}).get("commit_id", "unknown")
    BUILD_INFO.clear()
    BUILD_INFO.labels(package.version, revision, platform.python_version(), role).set(1)


# --- health --------------------------------------------------------------------------------------------------------


_NOT_YET = "not connected yet"


@dataclass(frozen=True, slots=True)
class _State:
    ok: bool
    reason: str
    since: float


class Health:
    """What a process knows of its own health. Every method may be called from any thread.

    A dependency that is named at the start is not ready until it is `set`.
    """

    def __init__(
        self,
        dependencies: Iterable[str] = (),
        *,
        stall_seconds: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._ticked = monotonic()
        self._died: list[str] = []
        self._states = {name: _State(ok=False, reason=_NOT_YET, since=monotonic()) for name in dependencies}

    def tick(self) -> None:
        """The event loop runs."""
        self._ticked = self._monotonic()

    def died(self, task: str) -> None:
        """A task that must run for ever has ended. There is no way back: the process has to be restarted."""
        with self._lock:
            self._died.append(task)

    def set(self, name: str, *, ok: bool, reason: str = "") -> None:
        """How a dependency is now. A change of `ok` is logged, once. `reason` goes to `/readyz`: no secrets in it."""
        with self._lock:
            before = self._states.get(name)
            changed = before is None or before.ok != ok or before.reason == _NOT_YET
            since = self._monotonic() if before is None or changed else before.since
            self._states[name] = _State(ok=ok, reason=reason, since=since)
        if changed and ok:
            log.info("dependency_up", dependency=name)
        elif changed:
            log.warning("dependency_down", dependency=name, reason=reason)

    def why_dead(self) -> list[str]:
        """Why the process should be restarted; empty while it lives. Never because of a dependency."""
        silent = self._monotonic() - self._ticked
        stalled = [f"the event loop has not run for {silent:.0f} s"] if silent > self._stall_seconds else []
        with self._lock:
            return stalled + [f"task {task} has ended" for task in self._died]

    def dependencies(self) -> dict[str, dict[str, object]]:
        """Of each dependency `ok`, `reason` and `seconds`, which is how long `ok` has been so."""
        with self._lock:
            states, now = dict(self._states), self._monotonic()
        return {
            name: {"ok": state.ok, "reason": state.reason, "seconds": round(now - state.since, 1)}
            for name, state in sorted(states.items())
        }


async def watch_loop(health: Health, *, interval_seconds: float = 1.0) -> NoReturn:
    """Tick for as long as the event loop runs, and measure how late it is."""
    while True:
        started = time.monotonic()
        await asyncio.sleep(interval_seconds)
        LOOP_LAG.observe(max(0.0, time.monotonic() - started - interval_seconds))
        health.tick()


# --- server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpsServer:
    """Where it listens. `port` is a real one also when the settings said 0."""

    host: str
    port: int


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # Not HTTPServer's: it looks the host's name up, which may take as long as a DNS server that is down.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def serve_until(self, ended: socket.socket) -> None:
        """Serve until the other end is closed. `serve_forever` would look several times a second whether it is to go
        on, which is most of what an idle process does."""
        self.timeout = 0  # a client that is gone by then is not waited for
        with selectors.DefaultSelector() as asked:
            asked.register(self, selectors.EVENT_READ)
            asked.register(ended, selectors.EVENT_READ)
            while all(key.fileobj is not ended for key, _ in asked.select()):
                self.handle_request()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Request(WSGIRequestHandler):
    timeout = 10  # seconds for a client that connects and says nothing

    def log_message(self, *_args: object) -> None:
        """Say nothing: a probe each second is no news."""


@contextmanager
def open_ops(
    settings: OpsSettings, health: Health, status: Callable[[], Mapping[str, object]] | None = None
) -> Iterator[OpsServer]:
    """Serve `/metrics`, `/livez`, `/readyz` and `/status` until the context ends.

    Args:
        status: Makes the body of `/status`. It is called on the server's threads.

    Raises:
        WrongSettings: Host or port cannot be listened on.
    """
    try:
        server = (_Server6 if ":" in settings.host else _Server)((settings.host, settings.port), _Request)
    except OSError as exc:
        raise _cannot_listen(settings, exc) from exc
    server.set_app(_application(health, status or dict))
    end, ended = socket.socketpair()
    thread = threading.Thread(target=server.serve_until, args=(ended,), name="ops", daemon=True)
    thread.start()
    try:
        yield OpsServer(settings.host, server.server_port)
    finally:
        end.close()
        thread.join()
        server.server_close()
        ended.close()


def _cannot_listen(settings: OpsSettings, exc: OSError) -> WrongSettings:
    if exc.errno == errno.EADDRINUSE:
        return WrongSettings(
            f"port {settings.port} on {settings.host}, for metrics and health, is in use: "
            "stop what uses it, or set RELAY_OPS__PORT to a free port"
        )
    if exc.errno == errno.EACCES:
        return WrongSettings(f"port {settings.port} is only for root: set RELAY_OPS__PORT to one above 1023")
    return WrongSettings(f"cannot listen on RELAY_OPS__HOST={settings.host}: {exc.strerror or exc}")


_Application = Callable[["WSGIEnvironment", "StartResponse"], Iterable[bytes]]


def _application(health: Health, status: Callable[[], Mapping[str, object]]) -> _Application:
    metrics: _Application = make_wsgi_app()

    def answer(path: str) -> tuple[str, Mapping[str, object]]:
        if path == "/livez":
            reasons = health.why_dead()
            return "503 Service Unavailable" if reasons else "200 OK", {"alive": not reasons, "reasons": reasons}
        if path == "/readyz":
            dependencies = health.dependencies()
            ready = all(state["ok"] for state in dependencies.values())
            return "200 OK" if ready else "503 Service Unavailable", {"ready": ready, "dependencies": dependencies}
        if path == "/status":
            return "200 OK", status()
        return "404 Not Found", {"message": "There are /metrics, /livez, /readyz and /status."}

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        line, body = (
            answer(path)
            if environ["REQUEST_METHOD"] in ("GET", "HEAD")
            else ("405 Method Not Allowed", {"message": "Only GET."})
        )
        raw = json.dumps(body, default=str).encode() + b"\n"
        start_response(line, [("Content-Type", "application/json"), ("Content-Length", str(len(raw)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else raw]

    return application
