import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol
from uuid import UUID

import aiohttp
import pytest

from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.stream import NO_SKEW
from tests.simulator.listener import Client

QUIET = {"poll_ms": 1e9}
UNHEARD_SECONDS = 0.1


class Start(Protocol):
    async def __call__(self, **config: Any) -> Client: ...


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts simulators, fifty times as fast as life and with both paths in step unless told otherwise."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())

        async def open_simulator(**config: Any) -> Client:
            settings: dict[str, Any] = {"speed": 50.0, "skew": NO_SKEW, "seed": 7, "rate_limit": 0, **QUIET, **config}
            client = Client(await stack.enter_async_context(Simulator(SimulatorConfig(**settings))), session)
            if "poll_ms" not in config:
                await stack.enter_async_context(running(start_runs_when_heard(client.simulator)))
            return client

        yield open_simulator


@asynccontextmanager
async def running(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Do some work in the background until the block ends."""
    task = asyncio.create_task(work)
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def start_runs_when_heard(simulator: Simulator) -> None:
    """Instead of a poll at any time: a run begins when somebody listens, or when nobody has for a while."""
    first_seen: dict[UUID, float] = {}
    while True:
        now = time.monotonic()
        for chat in list(simulator.database.chats.values()):
            if not simulator.needs_run(chat):
                first_seen.pop(chat.id, None)
                continue
            heard = any(outlet.frames_sent for outlet in simulator.streams(chat.id))
            if heard or now - first_seen.setdefault(chat.id, now) > UNHEARD_SECONDS:
                simulator.poll(chat.id)
        await asyncio.sleep(0.005)


@pytest.fixture
async def client(start: Start) -> Client:
    return await start()
