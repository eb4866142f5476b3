"""Every task has an owner: none outlives the program that made it, however that ends, and what ended it is heard."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.rabbit import open_rabbit
from relay.core.errors import ChatRefused, CorruptState, LostClaim, Unavailable
from relay.core.resume import Commit
from relay.ports import Claim, Claims, Upstream
from relay.programs.follow import Ended, Follower
from relay.programs.inbox import Inbox
from relay.programs.meter import Meter, MeterSettings
from relay.programs.worker import Worker
from tests.adapters.broker import Proxy
from tests.adapters.test_rabbit_faults import impatient
from tests.adapters.traffic import message
from tests.programs.test_archivist import archivist
from tests.programs.test_meter import said
from tests.programs.world import FOLLOW, WORKER, World, until
from tests.reliability.hot_server import HotServer, chat_ref

OURS = ("/relay/", "/aiormq/", "/aio_pika/", "/websockets/", "/aiosqlite/", "/httpx/")


def tasks() -> set[str]:
    """Names of the tasks that run our code, or that of a library on our behalf. The simulator is not ours."""
    found = set()
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        file = "" if code is None else str(code.co_filename)
        if any(part in file for part in OURS) and "/simulator/" not in file:
            found.add(f"{task.get_name()}: {task.get_coro()!r}")
    return found


async def ended(work: Awaitable[object], fact: Callable[[], object]) -> BaseException | None:
    """Work until the fact holds, be cancelled if it has not ended by then, and leave no task; what ended it."""
    before = tasks()

    async def run() -> object:
        return await work

    task = asyncio.create_task(run(), name="the program")
    await until(lambda: fact() or task.done())
    task.cancel()
    await asyncio.wait([task], timeout=20)
    assert task.done()
    assert tasks() - before == set()
    return None if task.cancelled() else task.exception()


async def test_a_worker_that_is_cancelled_in_the_middle_of_everything(world: World) -> None:
    for _ in range(4):
        await world.owner.create("[text n=300 ms=20] a long answer")
    worker = Worker(
        "one",
        upstream=world.upstream,
        bus=world.bus,
        claims=world.store,
        clock=SystemClock(),
        settings=WORKER,
        follow=FOLLOW,
    )
    assert await ended(worker.run(), lambda: len(world.simulator.streams()) == 4) is None
    assert not world.simulator.streams() or await closed(world)
    assert not world.simulator.watches()


async def closed(world: World) -> bool:
    await until(lambda: not world.simulator.streams() and not world.simulator.watches())
    return True


async def test_consumers_that_are_cancelled_in_the_middle_of_an_event(world: World) -> None:
    await world.bus.publish([said(number) for number in range(1, 50)])
    meter = Meter(
        bus=world.bus, charges=world.store, upstream=world.upstream, clock=SystemClock(), settings=MeterSettings()
    )
    assert await ended(meter.run(), lambda: len(world.rows("SELECT * FROM charges")) > 3) is None
    assert await ended(archivist(world).run(), lambda: len(world.rows("SELECT * FROM collected_messages")) > 3) is None


class BrokenClaims:
    """A store that fails in one way when something is to be saved."""

    def __init__(self, world: World, error: Exception) -> None:
        self._claims = world.store
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._claims, name)

    async def save(self, claim: Claim, commit: Commit) -> None:
        raise self._error


@pytest.mark.parametrize("error", [LostClaim("another has it"), CorruptState("impossible"), ZeroDivisionError()])
async def test_a_follower_that_fails_says_why_and_leaves_no_task(world: World, error: Exception) -> None:
    server, clock = HotServer(steps=100), SystemClock()
    claim = await world.claim(chat_ref(1), "one", lease_seconds=60)
    assert claim is not None
    claims = cast(Claims, BrokenClaims(world, error))
    follower = Follower(
        claim, upstream=cast(Upstream, server), bus=world.bus, claims=claims, clock=clock, settings=FOLLOW
    )
    assert await ended(follower.run(), lambda: False) is error
    assert server.open == 0


async def test_a_worker_whose_follower_meets_the_impossible_ends_with_it(world: World) -> None:
    """Going on could lose events: the process ends, and says why."""
    server = HotServer(3, steps=100)
    worker = Worker(
        "one",
        upstream=cast(Upstream, server),
        bus=world.bus,
        claims=cast(Claims, BrokenClaims(world, CorruptState("impossible"))),
        clock=SystemClock(),
        settings=WORKER,
        follow=FOLLOW,
    )
    error = await ended(worker.run(), lambda: False)
    assert isinstance(error, BaseExceptionGroup)
    assert error.subgroup(CorruptState) is not None
    assert server.open == 0


async def test_a_follower_that_ends_by_itself_leaves_no_task(world: World) -> None:
    server = HotServer(steps=3)
    claim = await world.claim(chat_ref(1), "one", lease_seconds=60)
    assert claim is not None
    follower = Follower(
        claim,
        upstream=cast(Upstream, server),
        bus=world.bus,
        claims=cast(Claims, world.store),
        clock=SystemClock(),
        settings=FOLLOW,
    )
    ends = []

    async def run() -> None:
        ends.append((await follower.run()).why)

    assert await ended(run(), lambda: False) is None
    assert ends == [Ended.IDLE]
    server.ask(server.chats[0])
    server.fail("stream", ChatRefused("no", 403))
    assert await ended(run(), lambda: False) is None
    assert ends == [Ended.IDLE, Ended.REFUSED]


@pytest.mark.parametrize("fault", ["none", "cut", "swallow"])
async def test_a_bus_that_is_closed_leaves_no_task(rabbit_vhost: str, proxy: Proxy, fault: str) -> None:
    async def handle(_: object) -> None:
        handled.append(1)

    async def work() -> None:
        async with open_rabbit(impatient(proxy.url)) as bus, asyncio.TaskGroup() as group:
            inbox = Inbox("meter", "relay.meter", bus=bus, clock=SystemClock(), prefetch=10)
            consuming = group.create_task(inbox.work_off(handle, lambda ok, reason: None))
            await bus.publish([message(1)])
            await until(lambda: handled)
            if fault == "cut":
                assert proxy.cut() == 2
            elif fault == "swallow":
                assert proxy.swallow() == 2
                with pytest.raises(Unavailable):
                    await bus.publish([message(2)])
            consuming.cancel()

    handled: list[int] = []
    assert await ended(work(), lambda: False) is None


async def test_a_connection_that_is_given_up_when_it_has_just_been_opened_leaves_no_task(rabbit_vhost: str) -> None:
    before = tasks()
    opening = asyncio.create_task(opened_and_closed(rabbit_vhost))
    connects: list[asyncio.Task[Any]] = []
    while not connects:
        await asyncio.sleep(0)
        connects = [task for task in asyncio.all_tasks() if "Connection.connect" in repr(task.get_coro())]
    while not connects[0].done():
        await asyncio.sleep(0)
    opening.cancel()  # before anybody has heard that it is open
    await asyncio.wait([opening], timeout=10)
    assert opening.cancelled()
    await asyncio.sleep(0.01)
    assert tasks() - before == set()


async def opened_and_closed(url: str) -> None:
    async with open_rabbit(impatient(url)):
        pass


# --- no exception vanishes -----------------------------------------------------------------------------------------


async def test_an_exception_that_nobody_asks_for_is_heard_by_every_test(asyncio_complaints: list[str]) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    forgotten = asyncio.create_task(fail())
    await asyncio.wait([forgotten])
    del forgotten
    gc.collect()
    (complaint,) = asyncio_complaints
    assert complaint.startswith("Task exception was never retrieved")
    assert "ZeroDivisionError" in complaint
    asyncio_complaints.clear()
