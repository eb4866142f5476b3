"""From a frame on a socket to the broker's confirm, and to a consumer, at half of what the same run could take."""

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from relay.adapters.topology import ARCHIVIST, METER
from relay.bench.children import Child, ChildFailed
from relay.bench.listener import listening
from relay.bench.places import Offered
from relay.bench.talk import STAMP
from relay.bench.whole_path import confirmed, running

Say = Callable[[str], None]

_WARM_UP_SECONDS = 3.0
_DRAIN_SECONDS = 120.0
_BAR_SECONDS = "0.25"  # a bound of the worker's own histogram, so that what lies below is counted, not estimated


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    chats: int = 50
    seconds: float = 15.0  # at half load, each time
    full_seconds: float = 8.0  # at full load, to know what half of it is


async def measure_latency(offered: Offered, options: LatencyOptions, say: Say) -> dict[str, object]:
    """Milliseconds. The confirm is told by the worker's own metric, for the oldest message of what went out together;
    the consumer, which takes a share of the same cores, is listened to in a second turn."""
    async with running(offered, chats=options.chats) as world, world.vhost.kept_empty(METER, ARCHIVIST):
        say(f"latency: {options.chats} chats talk as fast as they are heard")
        await world.feeder.ask("feed", rate=None)
        await asyncio.sleep(_WARM_UP_SECONDS)
        done = await confirmed(world.worker, options.chats, options.full_seconds)
        full = done.events / done.seconds
        await world.feeder.ask("pause")
        await _drained(world.worker)
        say(f"latency: half of {full:,.0f} events/s")
        await world.feeder.ask("feed", rate=full / 2 / options.chats)
        await asyncio.sleep(_WARM_UP_SECONDS)
        before = await world.worker.ask("lags")
        half = await confirmed(world.worker, options.chats, options.seconds)
        after = await world.worker.ask("lags")
        lags = {bound: after[bound] - before[bound] for bound in after}

        taken: list[tuple[int, int]] = []  # sent, arrived
        async with listening(world.vhost.url, lambda body, at: taken.append((_sent_at(body), at))):
            say("latency: the same with a consumer")
            await asyncio.sleep(_WARM_UP_SECONDS)
            start = time.monotonic_ns()
            await asyncio.sleep(options.seconds)
            end = time.monotonic_ns()
            await world.feeder.ask("pause")
            await _drained(world.worker)
    delays = [(arrived - sent) / 1e6 for sent, arrived in taken if start <= sent < end]
    if len(delays) < 2 or not lags["+Inf"]:
        raise ChildFailed(f"{len(delays)} messages arrived in {options.seconds:g} s")
    cuts = statistics.quantiles(delays, n=100, method="inclusive")
    return {
        "chats": options.chats,
        "full_events_per_second": round(full),
        "events_per_second": round(half.events / half.seconds),
        "confirm_p50_ms": round(1000 * _quantile(lags, 0.5), 1),
        "confirm_p99_ms": round(1000 * _quantile(lags, 0.99), 1),
        "percent_within_250_ms": round(100 * lags[_BAR_SECONDS] / lags["+Inf"], 2),
        "messages": len(delays),
        "consumer_p50_ms": round(cuts[49], 1),
        "consumer_p99_ms": round(cuts[98], 1),
        "consumer_max_ms": round(max(delays), 1),
    }


def _quantile(within: Mapping[str, float], part: float) -> float:
    """As Prometheus estimates it: evenly spread within the bucket it falls into; of the last one its lower bound."""
    rows = [(0.0, 0.0), *((float(bound), number) for bound, number in within.items())]
    wanted = part * rows[-1][1]
    for (low, below), (high, upto) in pairwise(rows):
        if upto >= wanted:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / (upto - below)
    raise AssertionError(within)


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
