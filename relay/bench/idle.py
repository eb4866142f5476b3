"""What a chat costs that is followed while nothing happens in it: memory, and CPU time of the whole process.

Such a chat has a finished turn behind it and one that was begun: its tool takes long, or its user does.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

import httpx

from relay.adapters.clock import SystemClock
from relay.adapters.database import DatabaseSettings, open_database
from relay.adapters.migrations.tables import claims
from relay.bench.children import Child, ChildFailed, child, feeder
from relay.bench.machine import peak_bytes
from relay.bench.places import Offered, Place, Vhost, own_database, own_vhost, worker_environment
from relay.bench.talk import CHATS_PATH
from relay.bench.whole_path import followed, let_go
from relay.programs.follow import row_digest

Say = Callable[[str], None]

_PAUSE_SECONDS = 5.0  # between two sweeps
_LOOK_SECONDS = 0.5  # the answer costs the worker 10 ms
_ROWS_AT_ONCE = 1000
_IDLE = 0.2  # CPU seconds within a second


@dataclass(frozen=True, slots=True)
class IdleOptions:
    counts: Sequence[int] = (1000, 5000)
    seconds: float = 10.0  # over which CPU time is measured


async def measure_idle(offered: Offered, options: IdleOptions, say: Say) -> list[dict[str, object]]:
    """One row for each number of chats."""
    return [await _measure(offered, count, options.seconds, say) for count in options.counts]


async def _measure(offered: Offered, chats: int, seconds: float, say: Say) -> dict[str, object]:
    say(f"sockets: {chats} chats")
    patience = 300.0 + chats / 10  # of many at once only some get a claim before the next sweep
    async with (
        own_vhost(offered) as vhost,
        feeder(patience, chats=chats, rounds=1, history=chats, running=chats) as server,
    ):
        async with child("relay.bench.idle_websockets", server.hello["url"], str(chats)) as bare:
            before = await _memory(bare)
            await bare.ask("dial")
            await followed(server, chats, bare, patience)
            alone = await _memory(bare) - before
        await let_go(server)
        async with (
            own_database(offered) as place,
            feeder(chats=0) as nobody,
            child("relay.bench.worker", environment=_environment(place, vhost, nobody, 1)) as worker,
        ):
            await _quiet(worker, sweeps=1)
            empty = await _memory(worker)
        async with own_database(offered) as place:
            started = time.monotonic()
            async with child("relay.bench.worker", environment=_environment(place, vhost, server, chats)) as worker:
                await followed(server, chats, worker, patience)
                opened = time.monotonic() - started
                say(f"sockets: {chats} chats followed after {opened:.1f} s")
                await _quiet(worker, sweeps=1)
                full = await _memory(worker)
                before_cpu, began = (await worker.ask("counted"))["cpu"], time.monotonic()
                await asyncio.sleep(seconds)
                cpu = ((await worker.ask("counted"))["cpu"] - before_cpu) / (time.monotonic() - began)
                still = (await server.ask("state"))["open"]
    return {
        "chats": chats,
        "open": still,
        "kib_per_chat": round((full - empty) / chats / 1024, 1),
        "websockets_alone_kib": round(alone / chats / 1024, 1),
        "worker_mib": round(full / 2**20, 1),
        "empty_worker_mib": round(empty / 2**20, 1),
        "idle_cpu_percent": round(100 * cpu, 2),
        "seconds_to_follow_all": round(opened, 1),
    }


def _environment(place: Place, vhost: Vhost, server: Child, chats: int) -> dict[str, str]:
    return worker_environment(
        place,
        vhost.url,
        server.hello["url"],
        WORKER__MAX_STREAMS=str(chats + 10),
    )


async def _quiet(worker: Child, *, sweeps: int, seconds: float = 600.0) -> None:
    """Return once the worker has swept so often, and does nothing any more."""
    deadline = time.monotonic() + seconds
    before = await worker.ask("counted")
    while time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        now = await worker.ask("counted")
        if now["swept"] >= sweeps and now["events"] == before["events"] and now["cpu"] - before["cpu"] < _IDLE:
            return
        before = now
    raise ChildFailed(f"the worker is not idle after {seconds:g} s")


async def _memory(process: Child) -> int:
    await process.ask("memory", collect=True)
    return int((await process.ask("memory", collect=True))["resident"])


@dataclass(frozen=True, slots=True)
class KnownOptions:
    """So many chats are known from before and rest; so many of them are running."""

    known: int = 50_000
    live: int = 500
    sweeps: int = 2


async def measure_known(offered: Offered, options: KnownOptions, say: Say) -> dict[str, object]:
    """What a worker does with many chats of which few are running: sockets, how long a sweep takes, memory."""
    say(f"sockets: {options.known} chats known, {options.live} of them running")
    patience = 120.0 + options.known / 100
    async with (
        own_vhost(offered) as vhost,
        own_database(offered) as place,
        feeder(patience, chats=options.known, rounds=1, history=options.known, running=options.live) as server,
    ):
        await _remember(place, server.hello["url"])
        environment = _environment(place, vhost, server, options.known)
        environment["RELAY_WORKER__SWEEP_SECONDS"] = str(_PAUSE_SECONDS)
        started = time.monotonic()
        async with child("relay.bench.worker", environment=environment) as worker:
            ready = time.monotonic()
            sweeps: list[float] = []  # when each ended
            while len(sweeps) < options.sweeps:
                if time.monotonic() - started > patience:
                    raise ChildFailed(f"{len(sweeps)} sweeps within {patience:g} s")
                if (await worker.ask("counted", patience=patience))["swept"] > len(sweeps):
                    sweeps.append(time.monotonic())
                    say(f"sockets: sweep {len(sweeps)} done")
                await asyncio.sleep(_LOOK_SECONDS)
            await followed(server, options.live, worker, patience)
            open_now = (await server.ask("state", patience=patience))["open"]
            peak = peak_bytes(worker.pid)
            resident = await _memory(worker)
    return {
        "known": options.known,
        "live": options.live,
        "sockets_opened": open_now,
        "first_sweep_seconds": round(sweeps[0] - ready, 1),
        "later_sweep_seconds": round((sweeps[-1] - sweeps[0]) / (len(sweeps) - 1) - _PAUSE_SECONDS, 1),
        "worker_mib": round(resident / 2**20, 1),
        "worker_peak_mib": round(peak / 2**20, 1),
    }


async def _remember(place: Place, url: str) -> None:
    """Store all chats of a server as worked off."""
    async with httpx.AsyncClient(timeout=120) as http:
        rows = (await http.get(url + CHATS_PATH, params={"limit": "1000000"})).json()
    settings = DatabaseSettings.model_validate({"url": place.url})
    async with open_database(settings, SystemClock(), migrate=True) as database:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            values = [
                {
                    "deployment": url,
                    "chat_id": UUID(row["id"]),
                    "owner_id": UUID(row["owner_id"]),
                    "root_chat_id": UUID(row["root_chat_id"]),
                    "session": 1,
                    "seen": row_digest(row),
                    "clean": True,
                }
                for row in rows[start : start + _ROWS_AT_ONCE]
            ]
            async with database.writing() as connection:
                await connection.execute(database.insert(claims), values)
