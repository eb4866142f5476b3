"""Where a measurement takes place: a vhost and a database of its own, gone with all that is in them afterwards."""

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import httpx

from relay.core.errors import Unavailable, WrongSettings

_RABBIT = "RELAY_TEST_RABBIT_URL"
_MANAGEMENT = "RELAY_TEST_RABBIT_MANAGEMENT_URL"
_DATABASE = "RELAY_TEST_DATABASE_URL"
_DEFAULT_MANAGEMENT_PORT = 15672
_MANAGEMENT_SECONDS = 30.0
_HOW_TO_GET_ONE = (
    "set RELAY_RABBIT__URL to a broker with the management plugin, or let one be started:\n"
    "scripts/services run -- relay bench all"
)


@dataclass(frozen=True, slots=True)
class Offered:
    """The servers that are there to be used. URLs hold passwords."""

    rabbit: str
    management: str
    database: str | None  # None: SQLite

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Offered":
        """Those of the tests (`scripts/services` names them so), else those that a relay is set to.

        Raises:
            WrongSettings: There is no broker.
        """
        rabbit, name = environment.get(_RABBIT), _RABBIT
        if not rabbit:
            rabbit, name = environment.get("RELAY_RABBIT__URL"), "RELAY_RABBIT__URL"
        if not rabbit:
            raise WrongSettings(f"no broker: {_HOW_TO_GET_ONE}")
        parts = urlsplit(rabbit)
        if parts.scheme not in ("amqp", "amqps") or not parts.hostname:
            raise WrongSettings(f"{name}: expected amqp://user:password@host:5672/vhost")
        account = f"{parts.username or 'guest'}:{parts.password or 'guest'}"
        management = environment.get(_MANAGEMENT) or f"http://{account}@{parts.hostname}:{_DEFAULT_MANAGEMENT_PORT}"
        database = environment.get(_DATABASE) or environment.get("RELAY_DATABASE__URL")
        if database and not database.startswith(("postgres://", "postgresql://", "postgresql+asyncpg://")):
            database = None  # a SQLite file of somebody's: take one of our own
        return cls(rabbit, management.rstrip("/"), database)


async def versions(offered: Offered) -> Mapping[str, object]:
    """The servers' versions, by what they are.

    Raises:
        WrongSettings: The broker's management API does not answer.
        Unavailable: PostgreSQL does not.
    """
    async with _management(offered) as management:
        overview = await _asked(management.get("/api/overview"), offered)
    found: dict[str, object] = {"broker": f"RabbitMQ {overview.json().get('rabbitmq_version', 'unknown')}"}
    if offered.database is None:
        return found | {"database": f"SQLite {sqlite3.sqlite_version}"}
    async with _postgres(offered.database) as server:
        return found | {"database": f"PostgreSQL {server.get_server_version().major}"}


class Vhost:
    """A vhost of our own."""

    def __init__(self, name: str, url: str, management: httpx.AsyncClient) -> None:
        self.name = name
        self.url = url
        self._management = management

    async def purge(self, queue: str) -> None:
        """Throw away what is ready in a queue."""
        (await self._management.delete(f"/api/queues/{self.name}/{quote(queue, safe='')}/contents")).raise_for_status()

    async def purge_all(self, *queues: str) -> None:
        for queue in queues:
            await self.purge(queue)

    @asynccontextmanager
    async def kept_empty(self, *queues: str, seconds: float = 1.0) -> AsyncIterator[None]:
        """Purge again and again while the block runs, so that no run pays for the backlog of the one before."""

        async def go_on() -> None:
            while True:
                await asyncio.sleep(seconds)
                await self.purge_all(*queues)

        task = asyncio.create_task(go_on())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def own_vhost(offered: Offered) -> AsyncIterator[Vhost]:
    """A new vhost, deleted at the end with everything in it.

    Raises:
        WrongSettings: The management API does not answer, or refuses.
    """
    name = f"relay-bench-{uuid4().hex[:12]}"
    user = urlsplit(offered.rabbit).username or "guest"
    async with _management(offered) as management:
        await _asked(management.put(f"/api/vhosts/{name}", json={}), offered)
        try:
            everything = {"configure": ".*", "write": ".*", "read": ".*"}
            permissions = f"/api/permissions/{name}/{quote(user, safe='')}"
            await _asked(management.put(permissions, json=everything), offered)
            yield Vhost(name, urlunsplit(urlsplit(offered.rabbit)._replace(path=f"/{name}")), management)
        finally:
            await _asked(management.delete(f"/api/vhosts/{name}"), offered)


def _management(offered: Offered) -> httpx.AsyncClient:
    secure = offered.management.startswith("https:")  # certificates take a second to load
    return httpx.AsyncClient(base_url=offered.management, verify=secure, timeout=_MANAGEMENT_SECONDS)


async def _asked(call: Coroutine[None, None, httpx.Response], offered: Offered) -> httpx.Response:
    try:
        return (await call).raise_for_status()
    except httpx.HTTPError as exc:
        parts = urlsplit(offered.management)
        why = str(exc.response.status_code) if isinstance(exc, httpx.HTTPStatusError) else type(exc).__name__
        raise WrongSettings(
            "a measurement makes a vhost of its own, for which it needs the broker's management API:\n"
            f"{parts.scheme}://{parts.hostname}:{parts.port or 80} did not do as asked ({why}). Say where it is with\n"
            f"{_MANAGEMENT}=http://user:password@host:15672, or {_HOW_TO_GET_ONE}"
        ) from exc


@dataclass(frozen=True, slots=True)
class Place:
    """A database of our own: its URL, and what kind it is."""

    url: str
    kind: str


@asynccontextmanager
async def own_database(offered: Offered) -> AsyncIterator[Place]:
    """A new database, dropped at the end: PostgreSQL where one is offered, else a file of SQLite.

    Raises:
        WrongSettings: PostgreSQL does not let us make one.
        Unavailable: It does not answer.
    """
    if offered.database is None:
        with tempfile.TemporaryDirectory(prefix="relay-bench-") as directory:
            yield Place(f"sqlite:///{Path(directory, 'relay.db')}", "SQLite")
        return
    name = f"relay_bench_{uuid4().hex[:12]}"
    async with _postgres(offered.database) as server:
        try:
            await server.execute(f'CREATE DATABASE "{name}"')
        except asyncpg.InsufficientPrivilegeError as exc:
            raise WrongSettings("the database's user may not create the database of the measurement") from exc
        try:
            yield Place(urlunsplit(urlsplit(offered.database)._replace(path=f"/{name}")), "PostgreSQL")
        finally:
            await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@asynccontextmanager
async def _postgres(url: str) -> AsyncIterator[asyncpg.Connection]:
    parts = urlsplit(url)
    try:
        server = await asyncpg.connect(urlunsplit(parts._replace(scheme="postgresql")))
    except (OSError, asyncpg.PostgresError) as exc:
        raise Unavailable(f"PostgreSQL at {parts.hostname}: {type(exc).__name__}: {exc}") from exc
    try:
        yield server
    finally:
        await server.close()


def worker_environment(place: Place, vhost_url: str, upstream_url: str, **more: str) -> dict[str, str]:
    """The environment of a worker process; `more` are RELAY_ names without that prefix."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    ours = {
        "RELAY_CODER__URL": upstream_url,
        "RELAY_CODER__TOKEN": "bench-token",
        "RELAY_RABBIT__URL": vhost_url,
        "RELAY_DATABASE__URL": place.url,
        "RELAY_OPS__PORT": "0",
        "RELAY_LOG__LEVEL": "error",
    }
    return kept | ours | {f"RELAY_{name}": value for name, value in more.items()}
