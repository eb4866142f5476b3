"""Faults by the clock, without a command around them."""

import asyncio

from relay.simulator import Simulator
from relay.simulator.timed import TimedFault, strike_in_time


async def test_each_strikes_when_it_is_due_once_or_again_and_never_two_at_a_time() -> None:
    begun: list[str] = []
    under_way = 0

    def fault(name: str, seconds: float, *, again: bool, takes: float = 0.0) -> TimedFault:
        async def strike(_: Simulator) -> int:
            nonlocal under_way
            assert under_way == 0, f"{name} within {begun[-1]}"
            begun.append(name)
            under_way += 1
            await asyncio.sleep(takes)
            under_way -= 1
            return len(begun)

        return TimedFault(name, seconds, again=again, strike=strike)

    told: list[tuple[str, int]] = []
    enough = asyncio.Event()

    def on_strike(struck: TimedFault, sockets: int) -> None:
        told.append((struck.name, sockets))
        if sockets == 12:
            enough.set()

    faults = [
        fault("slow", 0.002, again=False, takes=0.02),
        fault("again", 0.004, again=True, takes=0.001),
        fault("once", 0.008, again=False),
    ]
    striking = asyncio.create_task(strike_in_time(Simulator(), faults, on_strike))
    async with asyncio.timeout(10):
        await enough.wait()
    striking.cancel()
    assert begun[:3] == ["slow", "again", "once"]
    assert begun[3:] == ["again"] * 9
    assert told == [(name, number + 1) for number, name in enumerate(begun)]


async def test_it_ends_when_nothing_is_to_come() -> None:
    async with asyncio.timeout(10):
        await strike_in_time(Simulator(), [], lambda fault, struck: None)
