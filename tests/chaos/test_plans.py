"""Every fault plan once, small. `make chaos` runs them large, over many seeds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chaos.plans import PLANS
from tests.chaos.rounds import Result, run_round
from tests.chaos.servers import Servers
from tests.chaos.stage import Run, Stage
from tests.programs.world import until

pytestmark = [
    pytest.mark.skipif(not Servers.can_be_started(), reason="needs RabbitMQ and PostgreSQL of its own, on Linux"),
    pytest.mark.timeout(600),
    # Processes die and connections are reset: what libraries leave behind of them says nothing about the relay.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]

# Each age of server has its share.
QUICK = (
    (
        Run("worker-killed", 1, "d0", small=True),
        Run("upstream-restarted", 1, "d3ga", small=True),
        Run("sockets-cut", 1, "d3", small=True),
    ),
)
ROUNDS = (
    (
        Run("worker-killed", 1, "d0", small=True),
        Run("worker-frozen", 1, "d1", small=True),
        Run("worker-stopped", 1, "d3", small=True),
        Run("queues-deleted", 1, "d2", small=True),
    ),
    (
        Run("upstream-restarted", 1, "d3ga", small=True),
        Run("upstream-killed", 1, "d0b", small=True),
        Run("upstream-mute", 1, "d1e", small=True),
    ),
    (
        Run("sockets-cut", 1, "d3", small=True),
        Run("network-slow", 1, "d0", small=True),
        Run("half-open", 1, "d1e", small=True),
    ),
    (Run("broker-restarted", 1, "d3ga", small=True),),
    (Run("broker-alarm", 1, "d1", small=True),),
    (Run("killed-at-alarm", 1, "d3", small=True),),
    (Run("database-restarted", 1, "d0", small=True),),
    (Run("mixed", 1, "d2", small=True),),
)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with Stage.open(tmp_path / "chaos", patience=1.5) as stage:
        yield stage


async def test_some_plans_lose_nothing(stage: Stage) -> None:
    await lose_nothing(stage, QUICK)


@pytest.mark.long
async def test_every_plan_loses_nothing(stage: Stage) -> None:
    results = await lose_nothing(stage, ROUNDS)
    assert {result.run.plan for result in results} == set(PLANS)


async def lose_nothing(stage: Stage, rounds: tuple[tuple[Run, ...], ...]) -> list[Result]:
    results: list[Result] = []
    for runs in rounds:
        results += await run_round(stage, runs)
    wrong = [f"{result.run.command}: {line}" for result in results for line in result.lines]
    assert not wrong, "\n".join(wrong)
    assert all(result.fired for result in results)
    assert all(result.events for result in results)
    return results


@pytest.mark.long
async def test_what_was_started_is_gone(tmp_path: Path) -> None:
    """Also a child that nobody ended."""
    async with Stage.open(tmp_path) as stage:
        settings = {"RELAY_RABBIT__URL": "amqp://127.0.0.1:1/", "RELAY_OPS__PORT": "0"}
        child = await stage.forks.start("meter", settings=settings, log=tmp_path / "meter.log")
        assert Path(f"/proc/{child.pid}").exists()
    await until(lambda: not Path(f"/proc/{child.pid}").exists())  # whose parent has ended, init waits for
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", int(stage.servers.rabbit_url.rpartition(":")[2].partition("/")[0]))
