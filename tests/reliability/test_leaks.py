"""Connections that break again and again leave nothing behind: no task, no object, no socket."""

import asyncio
import gc
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import cast

from relay.adapters.clock import SystemClock
from relay.adapters.memory import MemoryBus
from relay.adapters.memory_claims import MemoryClaims
from relay.adapters.rabbit import open_rabbit
from relay.core.claims import Peer
from relay.core.events import Event
from relay.ports import Upstream
from relay.programs.follow import Follower
from relay.programs.inbox import Inbox
from relay.programs.worker import Worker
from tests.adapters.broker import Proxy
from tests.adapters.test_rabbit_faults import impatient, publish_until_confirmed
from tests.adapters.traffic import message
from tests.programs.world import FOLLOW, WORKER, World, counted, until, while_running
from tests.reliability.hot_server import HotServer, chat_ref

LOOKED_AT = (
    *("relay.", "asyncio.", "_asyncio.", "websockets.", "aiormq.", "aio_pika.", "pamqp.", "httpx.", "httpcore."),
    *("builtins.coroutine", "builtins.async_generator", "builtins.traceback", "builtins.method"),
)
# The bus in memory keeps messages, the simulator its chats: that is what they are for. A timer that was cancelled stays
# in the loop's heap until a hundred of them are thrown out together.
PASSED_OVER = ("relay.adapters.memory.", "relay.simulator.", "asyncio.events.")
NOT_MORE = 15  # objects of one kind that come and go by chance


def census() -> Counter[str]:
    """Living objects by kind."""
    gc.collect()
    found = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    return Counter(
        {kind: n for kind, n in found.items() if kind.startswith(LOOKED_AT) and not kind.startswith(PASSED_OVER)}
    )


async def growth(once: Callable[[], Awaitable[None]], *, warm: int, rounds: int) -> dict[str, int]:
    """Do something some times, look, do it so many times more, and look again: what there is more of by then."""
    for _ in range(warm):
        await once()
    before, tasks = census(), len(asyncio.all_tasks())
    for _ in range(rounds):
        await once()
    after, names = census(), sorted(task.get_name() for task in asyncio.all_tasks())
    assert len(names) <= tasks + 2, names
    return {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind] > NOT_MORE}


async def test_streams_that_break_three_hundred_times_leave_nothing_behind() -> None:
    server = HotServer(steps=1, parts=50, breaks_after=3)  # never gets beyond its first parts
    clock = SystemClock()
    claims = MemoryClaims(clock)
    await claims.enlist(Peer("one", None, 0.0, 1), server.deployment, lease_seconds=1e6)
    claim = await claims.claim(chat_ref(1), "one")
    assert claim is not None
    settings = FOLLOW.model_copy(update={"first_delay_seconds": 1e-4, "longest_delay_seconds": 1e-4})
    upstream, bus = cast(Upstream, server), MemoryBus(keep=10)
    follower = Follower(claim, upstream=upstream, bus=bus, claims=claims, clock=clock, settings=settings)
    async with while_running(follower.run()):

        async def once() -> None:
            before = server.dialled.total()
            await until(lambda: server.dialled.total() >= before + 5)

        assert await growth(once, warm=4, rounds=60) == {}
        assert server.open <= 1
    assert server.dialled.total() >= 300
    assert server.open == 0


async def test_sockets_that_are_cut_leave_nothing_behind(world: World) -> None:
    world.bus = MemoryBus(keep=10)
    chat = await world.owner.create("[text n=20000 ms=40] an answer without end")
    async with while_running((await world.follower(chat)).run()):

        async def once() -> None:
            await until(lambda: len(world.simulator.streams(chat)) == 1)
            opened = counted("relay_stream_connects_total", outcome="ok")
            assert world.simulator.cut(chat) == 1
            await until(lambda: counted("relay_stream_connects_total", outcome="ok") > opened)

        assert await growth(once, warm=3, rounds=18) == {}


async def test_a_broker_that_is_lost_again_and_again_leaves_nothing_behind(rabbit_vhost: str, proxy: Proxy) -> None:
    handled: list[int] = []

    async def handle(event: Event) -> None:
        handled.append(event.position)

    async with open_rabbit(impatient(proxy.url)) as bus:
        inbox = Inbox("meter", "relay.meter", bus=bus, clock=Hasty(), prefetch=10)
        async with while_running(inbox.work_off(handle, lambda ok, reason: None)):

            async def once() -> None:
                handled.clear()
                await publish_until_confirmed(bus, [message(1)])
                await until(lambda: handled)
                assert proxy.cut() == 2

            assert await growth(once, warm=2, rounds=18) == {}


class Hasty(SystemClock):
    """Pauses are short."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(min(seconds, 0.01))


async def test_followers_that_come_and_go_leave_nothing_behind() -> None:
    server, clock = HotServer(3, steps=2), SystemClock()
    worker = Worker(
        "one",
        upstream=cast(Upstream, server),
        bus=MemoryBus(keep=10),
        claims=MemoryClaims(clock),
        clock=clock,
        settings=WORKER.model_copy(update={"sweep_seconds": 0.02}),
        follow=FOLLOW.model_copy(update={"linger_seconds": 0.02, "settle_seconds": 0.02}),
    )
    async with while_running(worker.run()):

        async def once() -> None:
            before = server.dialled.total()
            for chat in server.chats:
                server.ask(chat)
            await until(lambda: server.dialled.total() >= before + 3 and not worker.state.followed)

        assert await growth(once, warm=2, rounds=10) == {}
