"""The whole path: frames from sockets through a worker into confirmed messages, per CPU second of the worker.

Beside it the same path by nothing but the libraries that a worker stands on.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from relay.adapters.topology import ARCHIVIST, METER
from relay.bench.children import Child, ChildFailed, child, feeder
from relay.bench.places import Offered, Place, Vhost, own_database, own_vhost, worker_environment

Say = Callable[[str], None]
_START_SECONDS = 60.0
_PATIENCE_SECONDS = 120.0
_OF_EACH_CHAT = 20
WORKER, LIBRARIES = "worker", "libraries alone"


@dataclass(frozen=True, slots=True)
class PathOptions:
    chats: int = 50
    seconds: float = 15.0
    warm_up_seconds: float = 4.0
    profile: Path | None = None


@dataclass(frozen=True, slots=True)
class Running:
    """A feeder, a worker (or what is compared with one) that follows all of its chats, and where they are."""

    feeder: Child
    worker: Child
    vhost: Vhost
    place: Place


@asynccontextmanager
async def running(offered: Offered, *, chats: int, path: str = WORKER, **settings: str) -> AsyncIterator[Running]:
    """Start feeder and worker, and wait until every chat is followed; each has a turn that was begun."""
    module = ("relay.bench.worker",) if path == WORKER else ("relay.bench.bare_path", str(chats))
    async with (
        own_vhost(offered) as vhost,
        own_database(offered) as place,
        feeder(chats=chats, running=chats) as server,
    ):
        environment = worker_environment(place, vhost.url, server.hello["url"], **settings)
        async with child(*module, environment=environment) as worker:
            await followed(server, chats, worker)
            yield Running(server, worker, vhost, place)


async def followed(server: Child, chats: int, by: Child, seconds: float = _START_SECONDS) -> None:
    """Return once so many streams are open, by whom they are to be opened."""
    deadline = time.monotonic() + seconds
    while (state := await server.ask("state"))["open"] < chats:
        by.must_run()
        if time.monotonic() > deadline:
            raise ChildFailed(f"{state['open']} of {chats} chats are followed after {seconds:g} s")
        await asyncio.sleep(0.1)


async def let_go(server: Child, seconds: float = _START_SECONDS) -> None:
    """Return once no stream is open."""
    deadline = time.monotonic() + seconds
    while (await server.ask("state"))["open"]:
        if time.monotonic() > deadline:
            raise ChildFailed(f"streams are open {seconds:g} s after their owner has ended")
        await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Done:
    """What a worker did in some time: its events were confirmed, what was refused it published again."""

    events: int
    refused: int
    cpu: float
    seconds: float


async def confirmed(worker: Child, chats: int, seconds: float) -> Done:
    """What is done in so many seconds, or until some events of every chat were confirmed if that takes longer."""
    before, started = await worker.ask("counted"), time.monotonic()
    while time.monotonic() < started + seconds + _PATIENCE_SECONDS:
        await asyncio.sleep(seconds)
        now, elapsed = await worker.ask("counted"), time.monotonic() - started
        events = int(now["events"] - before["events"])
        if events >= _OF_EACH_CHAT * chats:
            refused = int(now["refused"] - before["refused"])
            return Done(events, refused, now["cpu"] - before["cpu"], elapsed)
    raise ChildFailed(f"{events} events of {chats} chats were confirmed in {elapsed:.0f} s")


async def measure_path(offered: Offered, options: PathOptions, say: Say) -> list[dict[str, object]]:
    """Feed as fast as frames are taken; what was confirmed in the measured time, by a worker and by the libraries."""
    worker = await _measure(offered, options, say, WORKER)
    if options.profile is not None:
        return [worker]
    libraries = await _measure(offered, options, say, LIBRARIES)
    for row in (worker, libraries):
        row["times_the_cpu_of_libraries"] = round(_cpu_of_one(row) / _cpu_of_one(libraries), 2)
    return [worker, libraries]


def _cpu_of_one(row: Mapping[str, object]) -> float:
    return 1 / float(str(row["events_per_cpu_second"]))


async def _measure(offered: Offered, options: PathOptions, say: Say, path: str) -> dict[str, object]:
    async with running(offered, chats=options.chats, path=path, **_settings(options.chats)) as world:
        async with world.vhost.kept_empty(METER, ARCHIVIST):
            await world.feeder.ask("feed", rate=None)
            say(f"relay: {path}: {options.chats} chats talk, warming up for {options.warm_up_seconds:g} s")
            await confirmed(world.worker, options.chats, options.warm_up_seconds)
            if options.profile is not None:
                await world.worker.ask("profile", start=True)
            done = await confirmed(world.worker, options.chats, options.seconds)
            if options.profile is not None:
                await world.worker.ask("profile", start=False, path=str(options.profile.absolute()))
            told = await world.feeder.ask("pause")
            memory = await world.worker.ask("memory", collect=False)
        database = world.place.kind
    return {
        "path": path,
        "chats": options.chats,
        "seconds": round(done.seconds, 2),
        "events": done.events,
        "events_per_second": round(done.events / done.seconds),
        "events_per_cpu_second": round(done.events / done.cpu),
        "worker_cpu_share": round(done.cpu / done.seconds, 3),
        "refused": done.refused,
        "streams_opened": told["opened"],
        "worker_resident_mib": round(memory["resident"] / 2**20, 1),
        "database": database,
        "profiled": options.profile is not None,
    }


def _settings(chats: int) -> dict[str, str]:
    return {"WORKER__MAX_STREAMS": str(chats + 10)}
