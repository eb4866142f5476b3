"""Several accounts of one server as one: lists, watch, who asks for which chat, tokens that are refused."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import REGISTRY
from pydantic import ValidationError

from relay.adapters.coder import CoderSettings
from relay.adapters.coder_accounts import CoderAccounts, open_accounts
from relay.core.errors import BadFrame, ChatGone, ChatRefused, Unauthorized, Unavailable, WrongSettings
from relay.settings import read_settings
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import Owner
from tests.adapters.scripted_server import TOKEN, serve
from tests.adapters.test_coder_read_marks import is_unread
from tests.adapters.test_coder_simulator import Side, is_waiting, prefix_of, read_until

WRONG = "wrongwrong-wrongwrongwrongwrongwr"
SHORT = "[text n=2 ms=1] one"


@dataclass
class Together(Side):
    accounts: CoderAccounts
    admin: Owner


@asynccontextmanager
async def together(dialect: str, *users: str, tokens: tuple[str, ...] = (), **more: Any) -> AsyncIterator[Together]:
    """A simulator, and the accounts of these users and tokens."""
    async with (
        Simulator(SimulatorConfig(speed=50.0, dialect=dialect, rate_limit=0)) as simulator,
        aiohttp.ClientSession() as session,
    ):
        model = simulator.model_configs[0].id
        ann, bob, admin = (
            Owner(session, simulator.url, simulator.users[name], model, speed=50.0, prefix=lambda: prefix_of(simulator))
            for name in ("ann", "bob", "admin")
        )
        accounts = [{"name": name, "token": simulator.users[name].token} for name in users]
        accounts += [{"token": token} for token in tokens]
        settings = {"url": simulator.url, "accounts": accounts, "timeout_seconds": 10, "refused_seconds": 0.2, **more}
        async with open_accounts(CoderSettings.model_validate(settings)) as upstream:
            yield Together(simulator, upstream, ann, bob, upstream, admin)  # type: ignore[arg-type]


async def idle_chat(owner: Owner, text: str = SHORT) -> UUID:
    chat = await owner.create(text)
    await owner.wait_idle(chat)
    return chat


async def listed(upstream: CoderAccounts) -> Counter[str]:
    return Counter([str(row["id"]) async for row in upstream.list_chats(archived=False)])


def accounts_in(state: str) -> float:
    return REGISTRY.get_sample_value("relay_accounts", {"state": state}) or 0.0


# --- lists and chats -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_all_accounts_chats_are_one_list_and_each_is_read_by_who_may(dialect: str) -> None:
    async with together(dialect, "ann", "bob", "ann") as side:  # one of them twice
        chats = [await idle_chat(side.ann), await idle_chat(side.bob)]
        assert await listed(side.accounts) == {str(chat): 1 for chat in chats}
        for chat in chats:
            assert (await side.accounts.chat(chat))["id"] == str(chat)
            assert (await side.accounts.messages(chat, down_to=0)).complete
            async with side.accounts.stream(chat, after_id=0) as stream:
                await read_until(stream, is_waiting)
            await side.accounts.archive_chat(chat)
        assert await listed(side.accounts) == {}
        assert [row["id"] async for row in side.accounts.list_chats(archived=True)] == [str(chat) for chat in chats]
        with pytest.raises(ChatGone):
            await side.accounts.chat(UUID(int=1))
        assert [account.username for account in await side.accounts.accounts()] == ["ann", "bob", "ann"]


@pytest.mark.parametrize("dialect", [name for name, one in DIALECTS.items() if one.features.owner_speaks])
async def test_a_chat_is_followed_by_who_does_not_own_it_so_that_its_owner_finds_it_unread(dialect: str) -> None:
    async with together(dialect, "ann", "admin", keep_unread=False) as side:
        chat = await idle_chat(side.ann)
        await listed(side.accounts)
        async with side.accounts.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
        assert await is_unread(side, chat)


async def test_a_shared_chat_is_followed_by_who_may_read_it_and_by_its_owner_when_he_may_not_any_more() -> None:
    async with together("d3", "ann", "bob") as side:
        chat = await idle_chat(side.ann)
        side.simulator.database.chats[chat].readers.add(side.simulator.users["bob"].id)
        await listed(side.accounts)
        async with side.accounts.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
        assert await is_unread(side, chat)
        side.simulator.database.chats[chat].readers.clear()
        async with side.accounts.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
        assert not await is_unread(side, chat)  # its owner's token, and 2.37 cannot set it back


# --- tokens that are refused -----------------------------------------------------------------------------------------


async def test_a_refused_token_stops_its_account_alone_and_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(WRONG)
    async with together("d3", "ann", "bob") as side:
        settings = side.accounts._settings.model_dump() | {
            "accounts": [
                {"name": "ann", "token": side.simulator.users["ann"].token},
                {"name": "bob", "token_file": str(file)},
            ]
        }
        mine, other = await idle_chat(side.ann), await idle_chat(side.bob)
        async with open_accounts(CoderSettings.model_validate(settings)) as accounts:
            assert await listed(accounts) == {str(mine): 1}
            assert (accounts_in("ok"), accounts_in("refused")) == (1, 1)
            shown = json.dumps(accounts.status())
            assert '"ok": false' in shown
            assert "API key" in shown
            assert WRONG not in shown
            with pytest.raises(Unauthorized, match="bob: ") as caught:
                await accounts.check()
            assert WRONG not in str(caught.value)
            with pytest.raises(Unavailable, match="token of bob is refused"):  # not gone: bob may have it
                await accounts.chat(other)
            file.write_text(side.simulator.users["bob"].token)
            async with asyncio.timeout(10):
                while await listed(accounts) != {str(mine): 1, str(other): 1}:
                    await asyncio.sleep(0.05)
            await accounts.check()
            assert (accounts_in("ok"), accounts_in("refused")) == (2, 0)


async def test_when_all_tokens_are_refused_it_is_about_the_whole() -> None:
    async with together("d0", tokens=(WRONG, WRONG[::-1])) as side:
        for call in (
            listed(side.accounts),
            side.accounts.chat(UUID(int=1)),
            side.accounts.accounts(),
            side.accounts.retention(),
            side.accounts.stream(UUID(int=1), after_id=0).__aenter__(),
        ):
            with pytest.raises(Unauthorized, match=r"account 1: .*account 2: "):
                await call
        with pytest.raises(Unauthorized, match="account 2: "):
            async with asyncio.timeout(10), side.accounts.watch() as frames:
                await anext(frames)


async def test_a_server_that_is_away_is_away_for_all_and_nobody_is_refused() -> None:
    async with together("d0", "ann", "bob") as side:
        await listed(side.accounts)
        side.simulator.faults.add("answer", status=503, path="/api/*")
        with pytest.raises(Unavailable):
            await listed(side.accounts)
        await side.accounts.check()


async def test_a_chat_that_one_may_see_but_not_read_is_refused_and_not_gone() -> None:
    async with together("d3", "ann", "bob") as side:
        chat = await idle_chat(side.ann)
        side.simulator.faults.add("answer", status=409, path=f"*/{chat}", times=1)
        with pytest.raises(ChatRefused):
            await side.accounts.chat(chat)


# --- watch -----------------------------------------------------------------------------------------------------------


async def until_told(frames: AsyncIterator[str], chat: UUID) -> None:
    async with asyncio.timeout(20):
        while str(chat) not in await anext(frames):
            pass


@pytest.mark.parametrize("dialect", ["d0", "d3ga"])
async def test_all_accounts_are_watched_and_each_socket_comes_back_by_itself(dialect: str) -> None:
    async with together(dialect, "ann", "bob", tokens=(WRONG,)) as side, side.accounts.watch() as frames:
        async with asyncio.timeout(10):
            while len(side.simulator.watches()) < 2:
                await asyncio.sleep(0.01)
        await until_told(frames, await side.ann.create(SHORT))
        await until_told(frames, await side.bob.create(SHORT))
        side.simulator.watches()[0].cut()
        async with asyncio.timeout(10):
            while len(side.simulator.watches()) != 1:
                await asyncio.sleep(0.001)
            while len(side.simulator.watches()) < 2:
                await asyncio.sleep(0.01)
        await until_told(frames, await side.ann.create(SHORT))
        await until_told(frames, await side.bob.create(SHORT))
    async with asyncio.timeout(10):
        while side.simulator.watches():
            await asyncio.sleep(0.01)


async def test_who_is_stopped_while_sockets_are_closed_for_an_error_stops() -> None:
    """A task group that ends with an error would forget that it was cancelled as well."""
    closing = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("news")
        await asyncio.Event().wait()  # it answers no goodbye
        return socket

    async def listen(accounts: CoderAccounts) -> None:
        async with accounts.watch() as frames:
            await anext(frames)
            closing.set()
            raise BadFrame("no news", reason="schema")

    async with serve(handler) as server:
        settings = {"url": server.url, "accounts": [{"name": name, "token": TOKEN} for name in ("ann", "bob")]}
        async with open_accounts(CoderSettings.model_validate(settings)) as accounts, asyncio.timeout(20):
            task = asyncio.create_task(listen(accounts))
            await closing.wait()
            await asyncio.sleep(0.1)
            assert not task.done(), "nothing was to be closed"
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert not [each for each in asyncio.all_tasks() if each.get_name().startswith("watch ")]


async def test_a_mistake_in_a_watch_reaches_who_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CoderAccounts, "_accept", lambda *_: 1 / 0)
    async with together("d0", "ann", "bob") as side:
        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(10), side.accounts.watch() as frames:
                await anext(frames)


# --- an administrator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", [name for name, one in DIALECTS.items() if one.features.native_limits])
async def test_an_administrator_finds_other_users_chats_and_reads_them_when_there_is_news(dialect: str) -> None:
    async with together(dialect, "admin", "bob", administrator=True) as side:
        own, bobs = await idle_chat(side.admin), await idle_chat(side.bob)
        anns = [await idle_chat(side.ann) for _ in range(6)]
        root = await idle_chat(side.ann, "[agent n=2 ms=1] delegate")
        (child,) = side.simulator.database.children(side.simulator.database.chats[root])
        await side.ann.wait_idle(child.id)
        children = [child.id] if DIALECTS[dialect].features.tree_list else []
        first = await listed(side.accounts)
        assert first == {str(chat): 1 for chat in (own, bobs, *anns, root, *children)}
        assert await listed(side.accounts) == {str(own): 1, str(bobs): 1}
        await side.ann.send(anns[2], SHORT)
        await side.ann.wait_idle(anns[2])
        assert await listed(side.accounts) == {str(chat): 1 for chat in (own, bobs, anns[2])}
        async with side.accounts.stream(anns[0], after_id=0) as stream:
            await read_until(stream, is_waiting)


async def test_more_users_than_a_page_of_the_report_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.adapters.coder_reports._USERS_AT_ONCE", 1)
    async with together("d2", "admin", administrator=True) as side:
        chats = [await idle_chat(side.ann), await idle_chat(side.bob)]
        assert await listed(side.accounts) == {str(chat): 1 for chat in chats}


async def test_a_chat_of_the_report_that_is_gone_harms_no_other() -> None:
    async with together("d2", "admin", administrator=True) as side:
        chat, kept = await idle_chat(side.ann), await idle_chat(side.ann)
        side.simulator.faults.add("answer", status=404, path=f"*/{chat}")
        assert await listed(side.accounts) == {str(kept): 1}
        side.simulator.faults.clear()
        assert await listed(side.accounts) == {}  # until there is news of it


async def test_a_read_that_fails_is_made_again_with_the_next_list() -> None:
    async with together("d2", "admin", administrator=True) as side:
        chat = await idle_chat(side.ann)
        side.simulator.faults.add("answer", status=503, path=f"*/{chat}", times=1)
        with pytest.raises(Unavailable):
            await listed(side.accounts)
        assert await listed(side.accounts) == {str(chat): 1}


@pytest.mark.parametrize("dialect", ["d3", "d3ga"])
async def test_where_there_are_no_cost_reports_that_is_said_once(
    dialect: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with together(dialect, "admin", administrator=True) as side:
        await idle_chat(side.ann)
        assert [await listed(side.accounts) for _ in range(3)] == [{}, {}, {}]
    assert capsys.readouterr().out.count("relay follow CHAT") == 1


async def test_without_the_setting_and_without_the_role_nothing_is_looked_for() -> None:
    for users, administrator in ((("admin",), False), (("bob",), True)):
        async with together("d2", *users, administrator=administrator) as side:
            await idle_chat(side.ann)
            assert await listed(side.accounts) == {}


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        pytest.param({}, "exactly one of RELAY_CODER__TOKEN", id="no token at all"),
        pytest.param({"token": "a", "token_file": "b"}, "both set", id="two tokens"),
        pytest.param({"accounts": [{}]}, "exactly one of token and token_file", id="an account without a token"),
        pytest.param({"accounts": [{"token": "a", "token_file": "b"}]}, "exactly one", id="an account with two"),
        pytest.param({"accounts": [{"tokn": "SECRET"}]}, "Extra inputs", id="a wrong name"),
        pytest.param({"accounts": ["SECRET"]}, "dictionary", id="no object"),
        pytest.param({"accounts": {"token": "SECRET"}}, "(?i)sequence", id="no list"),
    ],
)
def test_wrong_accounts_are_named_and_never_shown(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said) as caught:
        CoderSettings.model_validate({"url": "http://127.0.0.1:1", **settings})
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param("SECRET", "RELAY_CODER__ACCOUNTS: not JSON", id="no JSON"),
        pytest.param('[{"tokn": "SECRET"}]', "unknown setting RELAY_CODER__ACCOUNTS__0__TOKN", id="a wrong name"),
        pytest.param('[{"token": "a"}, {}]', "RELAY_CODER__ACCOUNTS__1: each account has", id="the second one"),
        pytest.param("[]", "RELAY_CODER__ACCOUNTS", id="none"),
    ],
)
def test_a_wrong_variable_is_named_and_its_value_never_shown(value: str, said: str) -> None:
    with pytest.raises(WrongSettings, match=said) as caught:
        read_settings({"RELAY_CODER__URL": "http://127.0.0.1:1", "RELAY_CODER__ACCOUNTS": value})
    assert "SECRET" not in str(caught.value)


async def test_an_account_whose_file_cannot_be_read_is_named(tmp_path: Path) -> None:
    accounts = [{"token": "abc"}, {"token_file": str(tmp_path / "none")}]
    settings = CoderSettings.model_validate({"url": "http://127.0.0.1:1", "accounts": accounts})
    assert "abc" not in repr(settings)
    with pytest.raises(WrongSettings, match=r"RELAY_CODER__ACCOUNTS, number 2: token_file \(.*none\) cannot be read"):
        async with open_accounts(settings):
            pass
