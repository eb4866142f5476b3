"""The real servers of the tests: who needs one asks for a fixture here and gets a corner of it for itself."""

import gc
import logging
import os
import ssl
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import cache
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from hypothesis import settings

from tests.extent import LONG

# The same examples every time: a red run can be repeated. `--hypothesis-profile=default` looks for new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


class Complaints(logging.Handler):
    """What asyncio reports of tasks whose exception nobody asked for, or that were forgotten while they ran."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record))


@pytest.fixture(scope="session")
def complaints_of_all_tests() -> Iterator[Complaints]:
    complaints = Complaints()
    logging.getLogger("asyncio").addHandler(complaints)
    yield complaints
    gc.collect()
    logging.getLogger("asyncio").removeHandler(complaints)
    assert not complaints.heard, "\n".join(complaints.heard)


@pytest.fixture(autouse=True)
def asyncio_complaints(complaints_of_all_tests: Complaints) -> Iterator[list[str]]:
    """No exception vanishes: what asyncio complains of fails the test, or one soon after it, when its garbage is found.

    Who provokes a complaint clears the list.
    """
    yield complaints_of_all_tests.heard
    heard = complaints_of_all_tests.heard.copy()
    complaints_of_all_tests.heard.clear()
    assert not heard, "\n".join(heard)


def offered(variable: str) -> str:
    url = os.environ.get(variable)
    if not url:
        pytest.fail(
            f'{variable} is not set: run "make test", or "scripts/services run -- .venv/bin/pytest …"', pytrace=False
        )
    return url


@pytest.fixture(scope="session")
def rabbit_url() -> str:
    """AMQP URL of the broker. Shared by all tests: take `rabbit_vhost` instead to be alone."""
    return offered("RELAY_TEST_RABBIT_URL")


@pytest.fixture(scope="session")
def rabbit_management_url(rabbit_url: str) -> str:
    """HTTP URL of the broker's management plugin, with user and password; by default port 15672 beside the broker."""
    url = os.environ.get("RELAY_TEST_RABBIT_MANAGEMENT_URL")
    if url:
        return url.rstrip("/")
    broker = urlsplit(rabbit_url)
    return f"http://{broker.username or 'guest'}:{broker.password or 'guest'}@{broker.hostname}:15672"


@pytest.fixture(scope="session")
def database_url() -> str:
    """`postgresql://…` of a database whose user may create others. Take `postgres_database` to have your own."""
    return offered("RELAY_TEST_DATABASE_URL")


@cache
def certificates() -> ssl.SSLContext:
    """Those of the system. Loading them takes longer than most tests: once is enough."""
    return ssl.create_default_context()


@pytest.fixture
async def rabbit_vhost(rabbit_url: str, rabbit_management_url: str) -> AsyncIterator[str]:
    """AMQP URL of a new and empty vhost, gone with all its queues and connections after the test."""
    name = f"test-{uuid.uuid4().hex}"
    user = urlsplit(rabbit_url).username or "guest"
    async with httpx.AsyncClient(base_url=rabbit_management_url, verify=certificates()) as management:
        # Classic is every broker's default; said here so that a broker set up otherwise gives the same tests.
        vhost = await management.put(f"/api/vhosts/{name}", json={"default_queue_type": "classic"})
        vhost.raise_for_status()
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        permissions = await management.put(f"/api/permissions/{name}/{quote(user, safe='')}", json=everything)
        permissions.raise_for_status()
        yield urlunsplit(urlsplit(rabbit_url)._replace(path=f"/{name}"))
        (await management.delete(f"/api/vhosts/{name}")).raise_for_status()


@pytest.fixture
async def postgres_database(database_url: str) -> AsyncIterator[str]:
    """SQLAlchemy URL (`postgresql+asyncpg://…`) of a new and empty database, dropped after the test."""
    name = f"test_{uuid.uuid4().hex}"
    server = await asyncpg.connect(database_url)
    try:
        await server.execute(f'CREATE DATABASE "{name}"')
        yield urlunsplit(urlsplit(database_url)._replace(scheme="postgresql+asyncpg", path=f"/{name}"))
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')  # FORCE: a failed test may have left connections
    finally:
        await server.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, unless it is asked for."""
    if LONG:
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("long")]
