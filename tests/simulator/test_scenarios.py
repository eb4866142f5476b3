"""The driven chats: what each scenario leaves behind, and that a seed decides the rest."""

import asyncio
from collections import Counter

import pytest

from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.generate import plan_chat
from relay.simulator.scenarios import SCENARIOS, Progress, run_scenarios


async def test_every_scenario_leaves_what_it_is_for() -> None:
    told: list[Progress] = []
    async with Simulator(SimulatorConfig(speed=10, seed=5)) as simulator:
        async with asyncio.timeout(30):
            driven = await run_scenarios(simulator, chats=len(SCENARIOS) + 4, seed=5, speed=10, on_progress=told.append)
        assert simulator.is_idle()
        rows = {chat.name: simulator.database.chats[chat.chat_id] for chat in driven}
        histories = {name: row.history() for name, row in rows.items()}
        # The interrupted steps have no usage, the regular ones all have.
        unpaid = Counter(
            name for name, history in histories.items() for m in history if m.role == "assistant" and m.usage is None
        )
        assert [chat.name for chat in driven] == [*SCENARIOS, *[f"generated {i}" for i in range(4)]]
        assert {chat.owner for chat in driven} == {"ann", "bob"}
        assert all(row.status in ("waiting", "error") and not row.queue for row in rows.values())
        assert any(part.type == "reasoning" for m in histories["reasoning"] for part in m.content)
        assert sum(m.role == "tool" for m in histories["tools"]) == 6
        assert [m.role for m in histories["two tools"][:5]] == ["user", "assistant", "tool", "tool", "assistant"]
        assert unpaid["interrupt"] == 2
        assert sum(m.role == "user" for m in histories["queue"]) == 4
        assert any(message.deleted for message in rows["edit"].messages)
        assert sum(message.role == "user" for message in histories["error"]) == 3
    steps = Counter(progress.step for progress in told)
    assert steps["created"] == steps["done"] == len(driven)
    assert steps["cut the stream"] == 3


@pytest.mark.parametrize("dialect", [name for name in DIALECTS if name != "d0"])
async def test_the_scenarios_run_on_every_dialect(dialect: str) -> None:
    named = ["two tools", "retry", "interrupt", "queue", "edit", "client tool"]
    async with Simulator(SimulatorConfig(speed=20, seed=5, dialect=dialect)) as simulator:
        async with asyncio.timeout(30):
            driven = await run_scenarios(simulator, named=named, generated=2, seed=5, speed=20)
        rows = {chat.name: simulator.database.chats[chat.chat_id] for chat in driven}
    assert list(rows) == [*named, "generated 0", "generated 1"]
    assert all(row.status in ("waiting", "error") and not row.queue for row in rows.values())
    assert any(message.deleted for message in rows["edit"].messages)
    results = [part for m in rows["client tool"].history() for part in m.content if part.type == "tool-result"]
    given = {"ok": True} if DIALECTS[dialect].features.actions else {"error": "Tool not found: lab_tool"}
    assert results[0].result == given


def test_the_same_seed_gives_the_same_chats() -> None:
    assert [plan_chat(1, i) for i in range(30)] == [plan_chat(1, i) for i in range(30)]
    assert plan_chat(1, 0) != plan_chat(2, 0)
    deeds = {turn.deed for i in range(30) for turn in plan_chat(1, i).turns}
    assert deeds == {"send", "queue", "interrupt", "edit", "edit_running"}
