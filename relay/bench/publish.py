"""Confirmed publishing into one quorum queue: ours beside what others do, and beside the broker's own limit."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec

import aio_pika

from relay.bench.children import Child, ChildFailed, child
from relay.bench.places import Offered, own_vhost
from relay.bench.publishers import PUBLISHERS, RAW

Say = Callable[[str], None]

QUEUE = "relay.bench"
_WARM_UP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class PublishOptions:
    rounds: int = 3
    seconds: float = 3.0  # of each publisher in each round
    publishers: Sequence[str] = (*PUBLISHERS, RAW)


@dataclass(slots=True)
class _Runs:
    """The rounds of one publisher."""

    per_second: list[float] = field(default_factory=list)
    per_cpu_second: list[float] = field(default_factory=list)
    confirmed: int = 0
    refused: int = 0


async def measure_publish(offered: Offered, options: PublishOptions, say: Say) -> list[dict[str, object]]:
    """One row for each publisher: medians over the rounds, in each of which all have their turn."""
    names = [name for name in options.publishers if name != "faststream" or find_spec("faststream") is not None]
    if len(names) < len(options.publishers):
        say("publish: faststream is not installed and left out: pip install --group bench")
    runs = {name: _Runs() for name in names}
    async with own_vhost(offered) as vhost, AsyncExitStack() as stack:
        await _declare(vhost.url)
        children: dict[str, Child] = {}
        for name in names:
            say(f"publish: starting {name}")
            children[name] = await stack.enter_async_context(
                child("relay.bench.publishers", name, vhost.url, QUEUE, seconds=120)
            )
            await children[name].ask("publish", seconds=_WARM_UP_SECONDS)
            await vhost.purge(QUEUE)
        for number in range(options.rounds):
            for name in _in_turn(names, number):
                result = await children[name].ask("publish", seconds=options.seconds)
                await vhost.purge(QUEUE)
                if result["refused"]:
                    raise ChildFailed(f"the broker refused {result['refused']} messages of {name}")
                run = runs[name]
                run.confirmed += result["confirmed"]
                run.per_second.append(result["confirmed"] / result["seconds"])
                run.per_cpu_second.append(result["confirmed"] / max(result["cpu"], 0.01))
                say(f"publish: round {number + 1}, {name}: {run.per_second[-1]:,.0f}/s")
    return _rows(runs)


def _in_turn(names: Sequence[str], number: int) -> Sequence[str]:
    """Another one begins each round: what the machine does beside this hits all alike."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def _rows(runs: dict[str, _Runs]) -> list[dict[str, object]]:
    medians = {name: statistics.median(run.per_second) for name, run in runs.items()}
    return [
        {
            "publisher": name,
            "messages": runs[name].confirmed,
            "per_second": round(median),
            "percent_of_raw": round(100 * median / medians[RAW]) if RAW in medians else None,
            "per_cpu_second": round(statistics.median(runs[name].per_cpu_second)),
            "times_faststream": round(median / medians["faststream"], 1) if "faststream" in medians else None,
        }
        for name, median in medians.items()
    ]


async def _declare(url: str) -> None:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
