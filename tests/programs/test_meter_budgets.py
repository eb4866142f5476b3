"""Budgets of the AI Gateway: read for those who spend, told and measured, never in the way of a charge."""

from datetime import timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from relay.adapters.clock import SystemClock
from relay.adapters.memory import ManualClock
from relay.core.errors import ChatRefused, Unauthorized, Unavailable
from relay.core.events import ChatRef
from relay.ports import Budget, Upstream
from relay.programs.budgets import BUDGETS, Budgets, BudgetState, state_of
from relay.programs.meter import Meter, MeterSettings
from tests.programs.test_meter import OWN, said
from tests.programs.world import OtherServer, World, until, while_running

USERS = [UUID(int=number) for number in range(1, 2000)]


def budget(user: UUID, spent: int, limit: int | None, *, clock: ManualClock | SystemClock) -> Budget:
    now = clock.now()
    source = "" if limit is None else "group"
    return Budget(user, spent, limit, source, now - timedelta(days=1), now + timedelta(days=10))


def measured() -> dict[str, float]:
    return {state.value: BUDGETS.labels(state)._value.get() for state in BudgetState}


def budgets_of(server: OtherServer, clock: ManualClock) -> Budgets:
    return Budgets(cast(Upstream, server), clock, lifetime_seconds=300.0)


@pytest.mark.parametrize(
    ("spent", "limit", "state"),
    [
        (0, None, "unlimited"),
        (79, 100, "within"),
        (80, 100, "near"),
        (99, 100, "near"),
        (100, 100, "exceeded"),
        (101, 100, "exceeded"),
        (0, 0, "exceeded"),
    ],
)
def test_states(spent: int, limit: int | None, state: str) -> None:
    assert state_of(budget(USERS[0], spent, limit, clock=ManualClock())).value == state


async def test_those_who_spend_are_read_measured_shown_and_told_when_it_changes(world: World) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    within, near, free, over, nobody = USERS[:5]
    read = budgets_of(server, clock)
    server.budgets = {
        within: budget(within, 10, 100, clock=clock),
        near: budget(near, 90, 100, clock=clock),
        free: budget(free, 10, None, clock=clock),
        over: budget(over, 200, 100, clock=clock),
    }
    for user in (within, near, free, over, nobody):
        read.charged(world.upstream.deployment, user)
    with capture_logs() as logs:
        await read.read()
        await read.read()  # nothing is due
        assert measured() == {"unlimited": 1, "within": 1, "near": 1, "exceeded": 1}
        clock.advance(301)
        server.budgets[within] = budget(within, 100, 100, clock=clock)
        await read.read()
    assert measured() == {"unlimited": 1, "within": 0, "near": 1, "exceeded": 2}
    assert len(server.asked) == 10
    changes = [(line["user_id"], line["state"]) for line in logs if line["event"] == "budget_state_changed"]
    assert changes == [(str(near), "near"), (str(over), "exceeded"), (str(within), "exceeded")]
    status = cast(Any, read.status())
    assert status["known"] == 4
    assert [row["user_id"] for row in status["most_spent"]] == [str(u) for u in (over, within, near, free)]
    assert status["most_spent"][0] == {
        "user_id": str(over),
        "state": "exceeded",
        "spent_micros": 200,
        "limit_micros": 100,
        "source": "group",
        "period_end": "2026-03-11T12:00:00Z",
    }


async def test_a_budget_of_a_period_that_is_over_says_nothing(world: World) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    server.budgets = {USERS[0]: budget(USERS[0], 200, 100, clock=clock)}
    read = budgets_of(server, clock)
    read.charged(world.upstream.deployment, USERS[0])
    await read.read()
    assert measured()["exceeded"] == 1
    clock.advance(10 * 86400)
    server.budgets = Unavailable("away")
    await read.read()
    assert measured()["exceeded"] == 0
    assert cast(Any, read.status())["known"] == 0


async def test_a_server_without_a_gateway_is_asked_a_few_times_and_left_alone(world: World) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    read = budgets_of(server, clock)
    with capture_logs() as logs:
        for _ in range(5):
            for user in USERS[:50]:
                read.charged(world.upstream.deployment, user)
            await read.read()
    assert len(server.asked) == 3
    assert logs == []
    clock.advance(301)
    server.budgets = {user: budget(user, 1, 100, clock=clock) for user in USERS[:50]}
    await read.read()  # it has one now
    assert measured()["within"] == 50


async def test_only_the_last_to_spend_are_kept_and_nobody_of_another_server(world: World) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    server.budgets = {user: budget(user, 1, 100, clock=clock) for user in USERS}
    read = budgets_of(server, clock)
    for user in (*USERS[:-1000], *USERS[-5:], *USERS[-1000:-5]):
        read.charged(world.upstream.deployment, user)
    for user in USERS[-5:]:
        read.charged(world.upstream.deployment, user)
    read.charged("https://elsewhere.example", UUID(int=9999))
    await read.read()
    assert server.asked == [f"budget {user}" for user in USERS[-1000:]]


@pytest.mark.parametrize("trouble", [Unavailable("away"), Unauthorized("401"), ChatRefused("400", 400)])
async def test_trouble_with_budgets_does_not_hold_a_charge(world: World, trouble: Exception) -> None:
    server = OtherServer(world.upstream)
    server.budgets = trouble
    settings = MeterSettings(prices=OWN)
    one = Meter(
        bus=world.bus,
        charges=world.store,
        upstream=cast(Upstream, server),
        clock=SystemClock(),
        settings=settings,
    )
    owner = UUID(int=77)
    chat = ChatRef(world.upstream.deployment, UUID(int=5), owner, UUID(int=5))
    with capture_logs() as logs:
        async with while_running(one.run()):
            await world.bus.publish([said(1, chat=chat)])
            await until(lambda: f"budget {owner}" in server.asked)
            await world.bus.publish([said(2, chat=chat)])
            await until(lambda: len(world.rows("SELECT * FROM charges")) == 2)
    assert len([line for line in logs if line["event"] == "budgets_unread"]) == 1


async def test_the_budget_of_who_is_charged_is_in_the_meter_s_status(world: World) -> None:
    server, owner = OtherServer(world.upstream), UUID(int=77)
    server.budgets = {owner: budget(owner, 95, 100, clock=SystemClock())}
    one = Meter(
        bus=world.bus,
        charges=world.store,
        upstream=cast(Upstream, server),
        clock=SystemClock(),
        settings=MeterSettings(),
    )
    chat = ChatRef(world.upstream.deployment, UUID(int=5), owner, UUID(int=5))
    async with while_running(one.run()):
        await world.bus.publish([said(1, chat=chat)])
        await until(lambda: cast(Any, one.status())["budgets"]["known"])
    assert cast(Any, one.status())["budgets"]["most_spent"][0]["state"] == "near"
