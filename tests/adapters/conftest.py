"""The store's databases. Making tables takes longer than most tests: they are made once and handed out empty."""

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from relay.adapters.database import Database, DatabaseSettings, migrate
from relay.adapters.migrations.tables import metadata
from relay.ports import Clock


class SteppedClock:
    """Stands still until somebody sleeps by it. PostgreSQL does not ask it."""

    def __init__(self) -> None:
        self._now = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._now.timestamp()

    async def sleep(self, seconds: float) -> None:
        self._now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "relay.db"
    asyncio.run(migrate(DatabaseSettings(url=f"sqlite:///{file}"), SteppedClock()))
    return file


@pytest.fixture
def sqlite_settings(sqlite_template: Path, tmp_path: Path) -> DatabaseSettings:
    """A database of its own, with empty tables."""
    file = shutil.copy(sqlite_template, tmp_path / "relay.db")
    return DatabaseSettings(url=f"sqlite:///{file}")


@pytest.fixture(scope="session")
def postgres_for_all(database_url: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    url = urlunsplit(urlsplit(database_url)._replace(path=f"/{name}"))

    async def server(command: str) -> None:
        connection = await asyncpg.connect(database_url)
        await connection.execute(command)
        await connection.close()

    asyncio.run(server(f'CREATE DATABASE "{name}"'))
    asyncio.run(migrate(DatabaseSettings(url=url), SteppedClock()))
    yield url
    asyncio.run(server(f'DROP DATABASE "{name}" WITH (FORCE)'))  # FORCE: a failed test may have left connections


@pytest.fixture
def postgres_settings(postgres_for_all: str) -> DatabaseSettings:
    """Empty tables in a database that all tests use, one after the other."""

    async def empty_tables() -> None:
        connection = await asyncpg.connect(postgres_for_all)
        # Deleting from empty tables is much faster than TRUNCATE.
        await connection.execute("".join(f"DELETE FROM {table.name};" for table in reversed(metadata.sorted_tables)))
        await connection.close()

    asyncio.run(empty_tables())
    return DatabaseSettings(url=postgres_for_all)


@pytest.fixture(params=["sqlite", "postgres"])
def database_settings(request: pytest.FixtureRequest) -> DatabaseSettings:
    """Every test that takes it runs against both."""
    settings: DatabaseSettings = request.getfixturevalue(f"{request.param}_settings")
    return settings


@pytest.fixture
async def behind(database_settings: DatabaseSettings, clock: Clock) -> AsyncIterator[Database]:
    """Another way into the same database: to look at its rows, or to damage them."""
    async with Database(database_settings, clock) as database:
        yield database
