"""Faults by the clock: what the command line asked to happen some seconds after the start, once or again and again."""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from relay.simulator.server import Simulator


@dataclass(frozen=True)
class TimedFault:
    """Something that befalls a running simulator.

    Args:
        seconds: Real time from the start to the first time, and from one time to the next.
        again: Whether there is a next time.
        strike: Does it, and returns how many sockets it struck.
    """

    name: str
    seconds: float
    again: bool
    strike: Callable[[Simulator], Awaitable[int]]


async def strike_in_time(
    simulator: Simulator, faults: Sequence[TimedFault], on_strike: Callable[[TimedFault, int], None]
) -> None:
    """Let each fault strike when it is due, one after the other: none begins while a restart is under way."""
    loop = asyncio.get_running_loop()
    due = [(loop.time() + fault.seconds, number, fault) for number, fault in enumerate(faults)]
    heapq.heapify(due)
    while due:
        when, number, fault = heapq.heappop(due)
        await asyncio.sleep(when - loop.time())
        on_strike(fault, await fault.strike(simulator))
        if fault.again:
            # In step with the clock, unless something took so long that the next time is over already.
            then = when + fault.seconds
            heapq.heappush(due, (then if then > loop.time() else loop.time() + fault.seconds, number, fault))
