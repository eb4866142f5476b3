"""`relay follow` as a person meets it, and a worker that follows what was added."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.coder import CoderSettings
from relay.adapters.coder_accounts import open_accounts
from relay.adapters.memory import MemoryBus
from relay.adapters.store import DatabaseSettings, open_store
from relay.programs.worker import Worker
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import Owner
from tests.e2e.processes import finished
from tests.programs.world import FOLLOW, WORKER, until, while_running

Run = Callable[..., Awaitable[tuple[int, str, str]]]


@asynccontextmanager
async def a_server(directory: Path, *, user: str, dialect: str = "d3") -> AsyncIterator[tuple[Simulator, Owner, Run]]:
    """A simulator, ann in front of it, and `relay follow` with the token of a user."""
    async with (
        Simulator(SimulatorConfig(dialect=dialect, speed=50, rate_limit=0)) as simulator,
        aiohttp.ClientSession() as session,
    ):
        prefix = DIALECTS[dialect].features.prefixes[0]
        model = simulator.model_configs[0].id
        ann = Owner(session, simulator.url, simulator.users["ann"], model, 50, prefix=lambda: prefix)
        settings = {
            "RELAY_CODER__URL": simulator.url,
            "RELAY_CODER__TOKEN": simulator.users[user].token,
            "RELAY_DATABASE__URL": f"sqlite:///{directory}/relay.db",
        }

        async def run(*arguments: str) -> tuple[int, str, str]:
            code, output, errors = await finished("follow", *arguments, settings=settings)
            assert "Traceback" not in errors
            assert simulator.users[user].token not in output + errors
            return code, output, errors

        yield simulator, ann, run


async def a_chat(ann: Owner) -> UUID:
    chat = await ann.create("[text n=3 ms=1] hello")
    await ann.wait_idle(chat)
    return chat


async def test_a_chat_is_added_listed_and_removed(tmp_path: Path) -> None:
    async with a_server(tmp_path, user="admin") as (simulator, ann, run):
        chat = await a_chat(ann)
        code, output, _ = await run(str(chat))
        assert (code, output.startswith(f"{chat}  added: ")) == (0, True)
        assert "ann" in output
        assert "waiting: added " in (await run("--list"))[1]
        async with open_store(database_in(tmp_path), SystemClock(), migrate=False) as store:
            await store.set_gone(simulator.url, chat)
        (line,) = (await run("--list", "--json"))[1].splitlines()
        assert json.loads(line).items() >= {"chat": str(chat), "ok": True, "state": "gone"}.items()
        assert (await run("--remove", str(chat)))[0] == 0
        async with open_store(database_in(tmp_path), SystemClock(), migrate=False) as store:
            assert await store.added(simulator.url) == []


def database_in(directory: Path) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"url": f"sqlite:///{directory}/relay.db"})


async def test_a_chat_that_was_added_is_followed_and_told_as_gone_once(tmp_path: Path) -> None:
    async with (
        a_server(tmp_path, user="admin") as (simulator, ann, _),
        open_store(database_in(tmp_path), SystemClock()) as store,
        open_accounts(
            CoderSettings.model_validate({"url": simulator.url, "token": simulator.users["admin"].token})
        ) as upstream,
    ):
        bus = MemoryBus()
        chat, other = await a_chat(ann), await a_chat(ann)
        await store.add(simulator.url, chat)

        def told(event: str) -> int:
            return sum(each.chat.chat_id == chat and event in each.routing_key for each in bus.published)

        worker = Worker(
            "one",
            upstream=upstream,
            bus=bus,
            claims=store,
            added=store,
            clock=SystemClock(),
            settings=WORKER,
            follow=FOLLOW,
        )
        async with while_running(worker.run()):
            await until(lambda: told("chat.turn.completed") == 1)
            await ann.send(chat, "[text n=3 ms=1] more")
            await until(lambda: told("chat.turn.completed") == 2)
            await until(lambda: not worker.state.followed)
            simulator.database.delete_chat(simulator.database.chats[chat])
            await until(lambda: told("chat.lifecycle.gone"))
            before = worker.discovery.state.sweeps
            await until(lambda: worker.discovery.state.sweeps >= before + 3)
        assert told("chat.lifecycle.gone") == 1
        assert [each.gone_at is None for each in await store.added(simulator.url)] == [False]
        assert not any(each.chat.chat_id == other for each in bus.published)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param([], 2, "name a chat by its id", id="nothing"),
        pytest.param(["39c1479f"], 2, "not a valid UUID", id="no UUID"),
        pytest.param(["--list", str(UUID(int=1))], 2, "--list stands alone", id="two things at once"),
        pytest.param([str(UUID(int=1))], 1, "does not know it, or bob may not read it", id="unknown"),
        pytest.param(["--remove", str(UUID(int=1))], 1, "it was not added", id="not added"),
    ],
)
async def test_what_cannot_be_done_is_said(arguments: list[str], code: int, said: str, tmp_path: Path) -> None:
    async with a_server(tmp_path, user="bob") as (_, _, run):
        ended, output, errors = await run(*arguments)
    assert (ended, output) == (code, "")
    assert said in errors


async def test_of_several_chats_those_that_can_be_added_are(tmp_path: Path) -> None:
    async with a_server(tmp_path, user="bob") as (simulator, ann, run):
        foreign, shared = await a_chat(ann), await a_chat(ann)
        simulator.database.chats[shared].readers.add(simulator.users["bob"].id)
        code, output, errors = await run(str(foreign), str(shared))
        assert code == 1
        assert (str(shared) in output, str(foreign) in output) == (True, False)
        assert f"{foreign}  not added" in errors


async def test_a_refused_token_is_said(tmp_path: Path) -> None:
    async with a_server(tmp_path, user="bob") as (simulator, _, run):
        simulator.faults.add("answer", status=401, path="/api/*")
        code, output, errors = await run(str(UUID(int=1)))
    assert (code, output) == (1, "")
    assert "401" in errors
