"""Many pass together, or one alone."""

import asyncio

from relay.programs.gate import Gate


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Visitor:
    """Somebody inside, until it is to leave."""

    def __init__(self, gate: Gate, *, alone: bool) -> None:
        self._inside = False
        self.leave = asyncio.Event()
        self._place = gate.alone() if alone else gate.together()
        self.task = asyncio.create_task(self._visit())

    def inside(self) -> bool:
        return self._inside

    async def _visit(self) -> None:
        async with self._place:
            self._inside = True
            try:
                await self.leave.wait()
            finally:
                self._inside = False


async def test_who_wants_to_be_alone_waits_for_those_inside_and_keeps_others_out() -> None:
    gate = Gate()
    first, second = Visitor(gate, alone=False), Visitor(gate, alone=False)
    await settle()
    assert first.inside()
    assert second.inside()
    hermit = Visitor(gate, alone=True)
    await settle()
    third = Visitor(gate, alone=False)
    first.leave.set()
    await settle()
    assert not hermit.inside()
    assert not third.inside()
    second.leave.set()
    await settle()
    assert hermit.inside()
    assert not third.inside()
    hermit.leave.set()
    await settle()
    assert third.inside()
    third.leave.set()
    await third.task


async def test_two_are_never_alone_together() -> None:
    gate = Gate()
    first = Visitor(gate, alone=True)
    await settle()
    second = Visitor(gate, alone=True)
    await settle()
    assert (first.inside(), second.inside()) == (True, False)
    first.leave.set()
    await settle()
    assert second.inside()
    second.leave.set()
    await second.task


async def test_who_gives_up_waiting_keeps_nobody_out() -> None:
    gate = Gate()
    inside = Visitor(gate, alone=False)
    await settle()
    waiting = Visitor(gate, alone=True)
    await settle()
    late = Visitor(gate, alone=False)
    await settle()
    assert not late.inside()
    waiting.task.cancel()
    await settle()
    assert late.inside()
    for visitor in (inside, late):
        visitor.leave.set()
        await visitor.task
