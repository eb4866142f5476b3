"""From a frame on a socket to its event on a queue, at half of what the same run could take."""

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from relay.adapters.topology import ARCHIVIST, METER
from relay.bench.children import Child, ChildFailed
from relay.bench.listener import listening
from relay.bench.places import Offered
from relay.bench.talk import STAMP
from relay.bench.whole_path import confirmed, running

Say = Callable[[str], None]

_WARM_UP_SECONDS = 3.0
_DRAIN_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    chats: int = 50
    seconds: float = 15.0  # at half load
    full_seconds: float = 8.0  # at full load, to know what half of it is


async def measure_latency(offered: Offered, options: LatencyOptions, say: Say) -> dict[str, object]:
    """Milliseconds between the feeder's clock and the consumer's, which are one clock."""
    async with running(offered, chats=options.chats) as world, world.vhost.kept_empty(METER, ARCHIVIST):
        say(f"latency: {options.chats} chats talk as fast as they are heard")
        await world.feeder.ask("feed", rate=None)
        await asyncio.sleep(_WARM_UP_SECONDS)
        done = await confirmed(world.worker, options.chats, options.full_seconds)
        full = done.events / done.seconds
        await world.feeder.ask("pause")
        await _drained(world.worker)

        taken: list[tuple[int, int]] = []  # sent, arrived
        rate = full / 2 / options.chats
        async with listening(world.vhost.url, lambda body, at: taken.append((_sent_at(body), at))):
            say(f"latency: half of {full:,.0f} events/s")
            await world.feeder.ask("feed", rate=rate)
            await asyncio.sleep(_WARM_UP_SECONDS)
            start = time.monotonic_ns()
            await asyncio.sleep(options.seconds)
            end = time.monotonic_ns()
            await world.feeder.ask("pause")
            await _drained(world.worker)
    delays = [(arrived - sent) / 1e6 for sent, arrived in taken if start <= sent < end]
    if len(delays) < 2:
        raise ChildFailed(f"{len(delays)} messages arrived in {options.seconds:g} s")
    cuts = statistics.quantiles(delays, n=1000, method="inclusive")
    return {
        "chats": options.chats,
        "full_events_per_second": round(full),
        "messages": len(delays),
        "messages_per_second": round(len(delays) / ((end - start) / 1e9)),
        "p50_ms": round(cuts[499], 1),
        "p99_ms": round(cuts[989], 1),
        "p999_ms": round(cuts[998], 1),
        "max_ms": round(max(delays), 1),
    }


def _sent_at(body: bytes) -> int:
    """Nanoseconds from the first stamp of a message's text."""
    at = body.index(STAMP) + len(STAMP)
    return int(body[at : at + 20])


async def _drained(worker: Child) -> None:
    """Return once a second has passed in which nothing was confirmed."""
    deadline = time.monotonic() + _DRAIN_SECONDS
    before = await worker.ask("counted")
    while time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        now = await worker.ask("counted")
        if now["events"] == before["events"]:
            return
        before = now
    raise ChildFailed(f"the worker has not worked off its backlog within {_DRAIN_SECONDS:g} s")
