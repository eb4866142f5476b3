"""The faults. Each plan strikes while chats talk, and shows that it struck."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.chaos.inbox import LOG
from tests.chaos.proxy import FaultProxy, Line
from tests.chaos.servers import Servers
from tests.chaos.stage import Broken
from tests.chaos.world import FACT_SECONDS, World, until

# A worker takes about so long to save what it has in hand. On a busy machine that may not be enough: then its chats
# are let go as after a crash.
HAND_OVER_SECONDS = 2.5

Local = Callable[[World], Awaitable[None]]
Shared = Callable[[Servers, Sequence[World], random.Random], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    """What strikes one world, and what strikes all worlds of a round.

    `crashes`: a worker may end, or lose a chat, with something unsaved; then a history may be stated again.
    """

    name: str
    local: Local | None = None
    shared: Shared | None = None
    crashes: bool = False


def fired(there_was: object, what: str) -> None:
    """Fail when a fault did not happen: a plan that strikes nothing proves nothing."""
    if not there_was:
        raise Broken(f"the fault did not happen: {what}")


# --- one world's -----------------------------------------------------------------------------------------------------


async def kill(world: World) -> None:
    """SIGKILL in the middle of steps; another worker starts some time later."""
    worker, chats = await world.in_the_middle()
    await asyncio.sleep(world.dice.uniform(0, 0.6))  # the moment is the point
    world.note(f"SIGKILL {worker.name}, in the middle of {sorted(chats)}")
    worker.child.send(signal.SIGKILL)
    await worker.ended(-signal.SIGKILL, 5)
    worker.expected = -signal.SIGKILL
    world.fired["killed"] += 1
    world.fired["chats of the killed"] += len(chats)
    await asyncio.sleep(world.dice.uniform(0, 1.0))
    await world.start_worker()


async def killed(world: World) -> None:
    for _ in range(world.dice.randint(1, 3)):
        await kill(world)


async def freeze(world: World) -> None:
    """SIGSTOP until another worker was heard in one of its chats, then it goes on."""
    if len(world.living) < 2:
        await world.start_worker()
    worker, chats = await world.in_the_middle()
    await asyncio.sleep(world.dice.uniform(0, 0.3))
    sessions = {chat: world.session_of(chat) for chat in chats | await worker.following()}
    world.note(f"SIGSTOP {worker.name}, in the middle of {sorted(chats)}")
    worker.child.send(signal.SIGSTOP)
    await until(worker.child.is_stopped, lambda: "it does not stop")
    try:
        await until(
            lambda: any(world.session_of(chat) > session for chat, session in sessions.items()),
            lambda: f"nobody took over the chats of {worker.name}, which is frozen: {sorted(sessions)}",
            seconds=FACT_SECONDS * 2,  # the broker may be away
        )
        await asyncio.sleep(world.dice.uniform(0, 1.0))
        fired(worker.child.is_stopped(), "it did not stay stopped")
    finally:
        worker.child.send(signal.SIGCONT)
        world.note(f"SIGCONT {worker.name}")
    world.woken.append(time.monotonic())
    world.fired["frozen"] += 1


async def frozen(world: World) -> None:
    await freeze(world)


async def stop_one(world: World) -> None:
    """SIGTERM in the middle of steps: it ends in good order within the grace period; another one starts."""
    worker, chats = await world.in_the_middle()
    await asyncio.sleep(world.dice.uniform(0, 0.6))
    worker.expected = 0
    world.note(f"SIGTERM {worker.name}, in the middle of {sorted(chats)}")
    worker.child.send(signal.SIGTERM)
    took = await worker.ended(0, world.grace_seconds)
    world.note(f"{worker.name} ended after {took:.1f} s")
    world.hurried = world.hurried or took > HAND_OVER_SECONDS
    world.fired["stopped"] += 1
    await world.start_worker()


async def stopped(world: World) -> None:
    for _ in range(world.dice.randint(1, 3)):
        await stop_one(world)


async def delete_queues(world: World) -> None:
    """The relay's queues are deleted and somebody's is unbound: for a while nobody takes what is published."""
    before = await world.metric("relay_publish_total{outcome=returned}")
    world.reads_log = True
    await world.inbox.delete("relay.meter", "relay.archivist", LOG)
    await world.inbox.unbind()

    async def returned() -> bool:
        return await world.metric("relay_publish_total{outcome=returned}") > before

    async def noticed() -> bool:
        # A worker that connects just now declares everything before anything is returned.
        return await returned() or await world.inbox.exists(LOG)

    await until(noticed, lambda: "nothing was returned although no queue is bound")
    await until(lambda: world.inbox.exists(LOG), lambda: f"nobody declares {LOG} again")
    await world.inbox.bind()
    world.fired["queues made anew"] += 1
    world.fired["returned"] += await returned()


async def restart_upstream(world: World, *, polite: bool) -> None:
    before = world.simulator.fired("restart")
    await world.in_the_middle()
    await asyncio.sleep(world.dice.uniform(0, 0.5))
    await until(lambda: bool(world.simulator.streams()), lambda: "no stream is open")
    streams = len(world.simulator.streams())
    world.note(f"restart of Coder, {polite=}")
    await world.simulator.restart(polite=polite, down_seconds=world.dice.choice((0.0, 0.3, 1.5)))
    world.note("Coder is up again")
    fired(world.simulator.fired("restart") > before and streams, "no stream was open at the restart")
    world.fired["restarted"] += 1


async def upstream_with_warning(world: World) -> None:
    for _ in range(world.dice.randint(1, 3)):
        await restart_upstream(world, polite=True)


async def upstream_without_warning(world: World) -> None:
    for _ in range(world.dice.randint(1, 3)):
        await restart_upstream(world, polite=False)


async def cut_sockets(world: World) -> None:
    """Every connection is reset after some bytes, within frames and handshakes; streams also between frames."""
    before = {proxy: proxy.fired["cut"] for proxy in world.proxies}
    world.simulator.faults.add("cut_every", frames=world.dice.randint(5, 40), inside=world.dice.random() < 0.5)
    world.coder.line = Line(cut_bytes=(400, 40_000))
    world.rabbit.line = Line(cut_bytes=(6_000, 60_000))
    world.database.line = Line(cut_bytes=(6_000, 60_000))
    for proxy in world.proxies:
        proxy.cut(chance=0.5)

    def enough() -> bool:
        new = [proxy.fired["cut"] - before[proxy] for proxy in world.proxies]
        if new[0] >= 150:
            return True  # so often that hardly anything is read, so that nothing goes on to the broker
        return new[0] >= 15 and new[1] >= 3 and new[2] >= 3

    await until(enough, lambda: f"too few cuts: {[proxy.fired for proxy in world.proxies]}")
    world.heal()
    world.fired["cut"] += sum(proxy.fired["cut"] - before[proxy] for proxy in world.proxies)


async def slow_network(world: World) -> None:
    """Latency, narrow lines and stalls on every way."""
    dice = world.dice
    for proxy in world.proxies:
        proxy.line = Line(
            latency_seconds=dice.uniform(0.02, 0.15),
            bytes_per_second=dice.uniform(30_000, 200_000),
            stall_chance=dice.uniform(0.002, 0.02),
            stall_seconds=dice.uniform(0.5, 3.0),
        )

    def enough() -> bool:
        return all(proxy.fired["delayed"] > 60 for proxy in world.proxies) and (
            sum(proxy.fired["stalled"] for proxy in world.proxies) >= 3
        )

    await until(enough, lambda: f"too little was slow: {[proxy.fired for proxy in world.proxies]}")
    world.heal()
    world.fired["slow"] += sum(proxy.fired["delayed"] for proxy in world.proxies)


async def half_open(world: World) -> None:
    """Connections that say nothing more and do not end, one server after another, until others take their place."""
    for proxy in world.dice.sample(world.proxies, k=3):
        while not await _half_open_and_noticed(world, proxy):
            pass  # all that were struck were at rest, and were closed unused


async def _half_open_and_noticed(world: World, proxy: FaultProxy) -> bool:
    await until(lambda: proxy.open > 0, lambda: "no connection is open")
    before = proxy.fired.copy()
    # PostgreSQL asks its system to look, as the relay tells it to; the others send heartbeats.
    noticed_after = 20.0 if proxy.name == "database" else None
    struck = proxy.half_open(chance=0.7, noticed_after=noticed_after)
    world.note(f"{struck} connections to {proxy.name} are half-open")
    world.fired["half open"] += struck

    def new(what: str) -> int:
        return proxy.fired[what] - before[what]

    await until(
        lambda: new("opened") > 0 and (new("swallowed") > 0 or new("left") >= struck),
        lambda: f"nobody noticed a connection that is dead: {proxy.fired}",
    )
    return new("swallowed") > 0


async def mute_upstream(world: World) -> None:
    """Streams that live and say nothing more, with a last word or without."""

    def struck() -> bool:
        if world.dice.random() < 0.5:
            number = world.simulator.zombie()
            world.note(f"{number} zombies")
        else:
            number = world.simulator.silence(watches=True)
            world.note(f"{number} sockets are silent")
        world.fired["muted"] += number
        return world.fired["muted"] > 0

    for _ in range(world.dice.randint(1, 3)):
        await world.in_the_middle()
        struck()
        await asyncio.sleep(world.dice.uniform(0.5, 1.5))
    # Where faults are mixed the server may just be back: its streams are opened again one by one.
    await until(lambda: world.fired["muted"] > 0 or struck(), lambda: "the fault did not happen: no stream was open")


async def several(world: World) -> None:
    """Three or four faults at once or one after another."""
    faults: list[Local] = [
        kill,
        freeze,
        stop_one,
        lambda world: restart_upstream(world, polite=world.dice.random() < 0.5),
        cut_sockets,
        slow_network,
        half_open,
        mute_upstream,
    ]
    chosen = world.dice.sample(faults, k=world.dice.randint(3, 4))
    for fault in chosen:
        await fault(world)


# --- all worlds' -----------------------------------------------------------------------------------------------------


async def broker_restarted(servers: Servers, worlds: Sequence[World], dice: random.Random) -> None:
    await servers.until_remembered()
    before = {world: (world.inbox.reconnects, world.rabbit.fired["ended"]) for world in worlds}
    await servers.kill_broker()
    await asyncio.sleep(dice.choice((0.0, 1.0, 3.0)))
    await servers.start_broker()
    for world in worlds:
        await until(
            lambda world=world: world.inbox.reconnects > before[world][0],  # type: ignore[misc]
            lambda: "a consumer did not notice the restart of the broker",
        )
        world.fired["broker restarted"] += 1
    # Of some world: the workers of another may just have been stopped or killed, where faults are mixed.
    ended = any(world.rabbit.fired["ended"] > before[world][1] for world in worlds)
    fired(ended, "no connection of a worker to the broker ended")


async def until_blocked(worlds: Sequence[World]) -> None:
    for world in worlds:

        async def blocked(world: World = world) -> bool:
            return await world.metric("relay_broker_blocked") > 0

        await until(blocked, lambda: "no worker says that the broker blocks it")
        world.fired["blocked"] += 1


async def memory_alarm(servers: Servers, worlds: Sequence[World], dice: random.Random) -> None:
    await servers.set_alarm(True)
    try:
        await until_blocked(worlds)
        await asyncio.sleep(dice.uniform(0.5, 4.0))
    finally:
        await servers.set_alarm(False)


async def killed_at_alarm(servers: Servers, worlds: Sequence[World], dice: random.Random) -> None:
    """Workers that have things in hand which the broker does not take are killed with them."""
    await servers.set_alarm(True)
    try:
        await until_blocked(worlds)
        await asyncio.sleep(dice.uniform(0.5, 2.0))
        for world in worlds:
            for worker in [each for each in world.living if (await each.metrics()).get("relay_broker_blocked")]:
                world.note(f"SIGKILL {worker.name}, which is blocked")
                worker.expected = -signal.SIGKILL
                worker.child.send(signal.SIGKILL)
                await worker.ended(-signal.SIGKILL, 5)
                world.fired["killed"] += 1
            fired(world.fired["killed"], "no blocked worker was killed")
    finally:
        await servers.set_alarm(False)
    for world in worlds:
        await world.start_worker()


async def database_restarted(servers: Servers, worlds: Sequence[World], dice: random.Random) -> None:
    before = {world: world.database.fired["ended"] for world in worlds}
    await servers.stop_database(immediately=dice.random() < 0.5)
    await asyncio.sleep(dice.choice((0.0, 1.0, 4.0)))
    await servers.start_database()
    for world in worlds:
        await until(
            lambda world=world: world.database.fired["ended"] > before[world],  # type: ignore[misc]
            lambda: "no connection to the database ended",
        )
        world.fired["database restarted"] += 1


async def any_shared(servers: Servers, worlds: Sequence[World], dice: random.Random) -> None:
    await dice.choice((broker_restarted, memory_alarm, database_restarted))(servers, worlds, dice)


PLANS = {
    plan.name: plan
    for plan in (
        Plan("worker-killed", killed, crashes=True),
        Plan("worker-frozen", frozen, crashes=True),
        Plan("worker-stopped", stopped),
        Plan("queues-deleted", delete_queues),
        Plan("upstream-restarted", upstream_with_warning),
        Plan("upstream-killed", upstream_without_warning),
        Plan("upstream-mute", mute_upstream),
        Plan("sockets-cut", cut_sockets, crashes=True),
        Plan("network-slow", slow_network, crashes=True),
        Plan("half-open", half_open, crashes=True),
        Plan("broker-restarted", shared=broker_restarted),
        Plan("broker-alarm", shared=memory_alarm),
        Plan("killed-at-alarm", shared=killed_at_alarm, crashes=True),
        Plan("database-restarted", shared=database_restarted, crashes=True),
        Plan("mixed", several, any_shared, crashes=True),
    )
}
