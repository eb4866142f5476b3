"""Work that many tasks share, and what comes of it for each."""

import asyncio
from collections.abc import Sequence

import pytest

from relay.adapters.group_commit import GroupCommit
from relay.core.errors import Unavailable
from tests.programs.world import until


class Work:
    """Says what each item is, with an X before it; waits to be let go where it is told to."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.done: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.one_by_one = False  # the gate lets one group pass and shuts
        self.fails: dict[str, Exception] = {}

    async def __call__(self, items: Sequence[str]) -> list[str]:
        self.groups.append(list(items))
        await self.gate.wait()
        if self.one_by_one:
            self.gate.clear()
        for item in items:
            if item in self.fails:
                raise self.fails[item]
        self.done += items
        return [f"X{item}" for item in items]


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def together(work: Work) -> GroupCommit[str, str]:
    return GroupCommit(work, key=lambda item: item[0], size=len, most=6)


async def asked(together: GroupCommit[str, str], work: Work, *items: str) -> list[asyncio.Task[str]]:
    """The first is on its way and waits, the others gather behind it."""
    work.gate.clear()
    before = len(work.groups)
    tasks = [asyncio.create_task(together.do(item)) for item in items]
    await until(lambda: len(work.groups) > before)
    return tasks


async def test_what_is_asked_for_meanwhile_is_done_together(together: GroupCommit[str, str], work: Work) -> None:
    tasks = await asked(together, work, "a", "b", "c")
    work.gate.set()
    assert await asyncio.gather(*tasks) == ["Xa", "Xb", "Xc"]
    assert work.groups == [["a"], ["b", "c"]]


async def test_a_group_is_no_larger_than_it_may_be_but_one_item_may(
    together: GroupCommit[str, str], work: Work
) -> None:
    tasks = await asked(together, work, "a", "bbb", "ccc", "d", "e" * 9)
    work.gate.set()
    await asyncio.gather(*tasks)
    assert work.groups == [["a"], ["bbb", "ccc"], ["d"], ["e" * 9]]


async def test_two_of_one_key_are_done_one_after_the_other(together: GroupCommit[str, str], work: Work) -> None:
    tasks = await asked(together, work, "a", "b1", "b2", "c", "b3")
    work.gate.set()
    await asyncio.gather(*tasks)
    assert work.groups == [["a"], ["b1", "c"], ["b2"], ["b3"]]


async def test_an_item_that_cannot_be_done_fails_alone(together: GroupCommit[str, str], work: Work) -> None:
    tasks = await asked(together, work, "a", "b", "c", "d")
    work.fails["c"] = ValueError("c is wrong")
    work.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(answer) for answer in answers] == ["Xa", "Xb", "c is wrong", "Xd"]
    assert await together.do("e") == "Xe"


async def test_all_are_told_when_the_other_side_does_not_answer(together: GroupCommit[str, str], work: Work) -> None:
    tasks = await asked(together, work, "a", "b", "c")
    work.fails["c"] = Unavailable("the database is down", 3.0)
    work.gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers[0] == "Xa"
    for answer in answers[1:]:
        assert isinstance(answer, Unavailable)
        assert (str(answer), answer.retry_after_seconds) == ("the database is down", 3.0)
    assert answers[1] is not answers[2]


@pytest.mark.parametrize("cancelled", [0, 1, 2], ids=["who does the work", "who does it next", "who only waits"])
async def test_who_is_cancelled_harms_nobody(together: GroupCommit[str, str], work: Work, cancelled: int) -> None:
    tasks = await asked(together, work, "a", "b", "c")
    tasks[cancelled].cancel()
    await asyncio.wait([tasks[cancelled]])
    work.gate.set()
    left = [task for task in tasks if task is not tasks[cancelled]]
    assert await asyncio.gather(*left) == [f"X{'abc'[number]}" for number in range(3) if number != cancelled]
    assert "abc"[cancelled] not in work.done
    assert await together.do("d") == "Xd"


async def test_work_taken_up_for_others_is_done_when_its_leader_is_cancelled(
    together: GroupCommit[str, str], work: Work
) -> None:
    first, second, third, fourth = await asked(together, work, "a", "b", "c", "d")
    work.one_by_one = True
    work.gate.set()
    await first
    await until(lambda: len(work.groups) == 2)  # b leads, for c and d as well
    second.cancel()
    third.cancel()
    await asyncio.wait([second, third])
    work.gate.set()
    assert await fourth == "Xd"
    assert work.done == ["a", "d"]


async def test_who_was_told_to_lead_and_is_cancelled_hands_over(together: GroupCommit[str, str], work: Work) -> None:
    first, second, third = await asked(together, work, "a", "b", "c")
    work.gate.set()
    first.add_done_callback(lambda _: second.cancel())  # it has the lead by then, and did not run yet
    await first
    await asyncio.wait([second])
    assert await third == "Xc"
    assert await together.do("d") == "Xd"
