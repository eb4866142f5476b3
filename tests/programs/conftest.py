import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.coder import open_upstream
from relay.adapters.database import DatabaseSettings, migrate
from relay.adapters.memory import MemoryBus
from relay.adapters.store import open_store
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.owner import Owner
from tests.programs.world import World, upstream_settings

SPEED = 10.0


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the tables takes longer than most tests: once is enough."""
    file = tmp_path_factory.mktemp("empty") / "relay.db"
    asyncio.run(migrate(DatabaseSettings(url=f"sqlite:///{file}"), SystemClock()))
    return file


@pytest.fixture
async def world(empty_database: Path, tmp_path: Path) -> AsyncIterator[World]:
    shutil.copy(empty_database, tmp_path / "relay.db")
    database = DatabaseSettings(url=f"sqlite:///{tmp_path}/relay.db", operation_timeout_seconds=5.0)
    async with (
        Simulator(SimulatorConfig(seed=5, speed=SPEED, rate_limit=0, poll_ms=200)) as simulator,
        open_store(database, SystemClock(), migrate=False) as store,
        open_upstream(upstream_settings(simulator)) as upstream,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        owner = Owner(session, simulator.url, simulator.users["ann"], simulator.model_configs[0].id, SPEED)
        yield World(simulator, MemoryBus(), store, database, upstream, owner, tmp_path)
