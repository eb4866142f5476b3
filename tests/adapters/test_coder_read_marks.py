"""What a stream of the relay does to the owner's read mark, against a server of each age."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from relay.adapters import coder_read_marks
from relay.adapters.coder import CoderUpstream
from relay.core.errors import StreamEnded
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import Owner
from tests.adapters.scripted_server import CHAT, upstream_of
from tests.adapters.test_coder_simulator import Side, is_waiting, prefix_of, read_until
from tests.adapters.test_coder_simulator import upstream_of as simulated

WITH_MARKS = [name for name, dialect in DIALECTS.items() if dialect.features.labels]


@pytest.fixture(autouse=True)
def _always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of unread chats is read for each question, so that no test waits for it to grow old."""
    monkeypatch.setattr(coder_read_marks, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(coder_read_marks, "_SHARE_OF_TIME", 0)
    monkeypatch.setattr(coder_read_marks, "_SETTLE_SECONDS", 0.05)


@asynccontextmanager
async def a_side(dialect: str, user: str = "ann", **settings: Any) -> AsyncIterator[Side]:
    async with (
        Simulator(SimulatorConfig(speed=50.0, dialect=dialect, rate_limit=0)) as simulator,
        aiohttp.ClientSession() as session,
    ):
        model = simulator.model_configs[0].id
        ann, bob = (
            Owner(session, simulator.url, simulator.users[name], model, speed=50.0, prefix=lambda: prefix_of(simulator))
            for name in ("ann", "bob")
        )
        async with simulated(simulator, simulator.users[user].token, **settings) as upstream:
            yield Side(simulator, upstream, ann, bob)


async def a_chat(side: Side) -> UUID:
    """A chat with an answer that nobody has looked at."""
    chat = await side.ann.create("[text n=2 ms=1] one")
    await side.ann.wait_idle(chat)
    return chat


async def is_unread(side: Side, chat: UUID) -> bool:
    async with simulated(side.simulator, side.simulator.users["ann"].token) as other:
        (row,) = [row async for row in other.list_chats(archived=False) if row["id"] == str(chat)]
    return bool(row["has_unread"])


async def until(fact: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not fact():
            await asyncio.sleep(0.005)


async def listen(upstream: CoderUpstream, chat: UUID) -> None:
    async with upstream.stream(chat, after_id=0) as stream:
        await read_until(stream, is_waiting)


def lost() -> float:
    return REGISTRY.get_sample_value("relay_read_marks_total", {"outcome": "lost"}) or 0.0


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_the_owners_token_leaves_a_chat_unread_where_the_server_can_set_the_mark_back(dialect: str) -> None:
    async with a_side(dialect) as side:
        chat = await a_chat(side)
        async with side.upstream.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
            assert await is_unread(side, chat) is DIALECTS[dialect].features.unread_again
        await until(lambda: not side.simulator.streams())
        assert await is_unread(side, chat) is DIALECTS[dialect].features.unread_again


@pytest.mark.parametrize("dialect", WITH_MARKS)
async def test_another_users_token_moves_the_mark_only_up_to_2_33(dialect: str) -> None:
    async with a_side(dialect, "admin") as side:
        chat = await a_chat(side)
        await listen(side.upstream, chat)
        assert await is_unread(side, chat) is (dialect not in ("d0b", "d1"))


async def test_what_the_human_read_while_the_relay_listened_stays_read() -> None:
    async with a_side("d3ga") as side:
        chat = await a_chat(side)
        async with side.upstream.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
            assert await is_unread(side, chat)
            side.simulator.database.chats[chat].mark_read()
        assert not await is_unread(side, chat)
        await listen(side.upstream, chat)  # read before it was opened: nothing to set back
        assert not await is_unread(side, chat)


async def test_an_answer_that_comes_while_the_relay_listens_is_unread_afterwards() -> None:
    async with a_side("d3ga") as side:
        chat = await a_chat(side)
        side.simulator.database.chats[chat].mark_read()
        async with side.upstream.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
            await side.ann.send(chat, "[text n=2 ms=1] more")
            await read_until(stream, is_waiting)
            await side.ann.wait_idle(chat)
        await until(lambda: not side.simulator.streams())
        assert await is_unread(side, chat)


async def test_it_can_be_switched_off() -> None:
    async with a_side("d3ga", keep_unread=False) as side:
        chat = await a_chat(side)
        await listen(side.upstream, chat)
        assert not await is_unread(side, chat)


async def test_a_stream_that_breaks_off_is_not_set_back() -> None:
    async with a_side("d3ga") as side:
        chat = await a_chat(side)
        async with side.upstream.stream(chat, after_id=0) as stream:
            await read_until(stream, is_waiting)
            side.simulator.cut(chat)
            with pytest.raises(StreamEnded):
                await read_until(stream, lambda _event: False)
        await until(lambda: not side.simulator.streams())
        assert not await is_unread(side, chat)


async def test_an_upgrade_to_a_server_that_can_is_noticed() -> None:
    async with a_side("d3") as side:
        chats = [await a_chat(side) for _ in range(3)]
        for chat in chats:
            await listen(side.upstream, chat)
            assert not await is_unread(side, chat)
        await side.simulator.restart(polite=True, dialect="d3ga")
        chat = await a_chat(side)
        _ = [row async for row in side.upstream.list_chats(archived=False)]  # a sweep, which sees where the API is now
        await listen(side.upstream, chat)
        assert await is_unread(side, chat)


class Marking:
    """A server whose list of unread chats holds one chat for ever, or until it was marked as read for good."""

    def __init__(self, *, answer: int, unread: bool, knows_term: bool = True) -> None:
        self.answer, self.unread, self.knows_term = answer, unread, knows_term
        self.asked: list[str] = []
        self.build = "v2.36.0"
        self.breaks_off = False

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        headers = {"X-Coder-Build-Version": self.build}
        if request.path.endswith("/stream"):
            self.unread = False
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.send_str("[]")
            if self.breaks_off:
                await socket.close(code=1001)
            await socket.receive()
            return socket
        if request.method == "PATCH":
            self.asked.append("mark")
            return web.json_response(
                {"message": "No."} if self.answer >= 400 else {}, status=self.answer, headers=headers
            )
        self.asked.append("list")
        if not self.knows_term:
            return web.json_response({"message": "Invalid chat search query."}, status=400, headers=headers)
        rows = [{"id": str(CHAT), "has_unread": True}] if self.unread else []
        return web.json_response(rows, headers=headers)


async def look(upstream: CoderUpstream, server: Marking) -> list[str]:
    """Open a stream on an unread chat, and close it after its first frame: what the server was asked for it."""
    server.unread, server.asked = True, []
    async with upstream.stream(CHAT, after_id=0) as frames:
        await anext(frames)
    return server.asked


@pytest.mark.parametrize("answer", [204, 400, 404, 405])
async def test_a_server_that_does_not_set_marks_back_is_not_asked_for_ever(answer: int) -> None:
    server = Marking(answer=answer, unread=True)
    before = lost()
    async with upstream_of(server, keep_unread=True) as (upstream, _):
        for _ in range(2):
            assert "mark" in await look(upstream, server)
        assert lost() == before + 2
        assert [await look(upstream, server) for _ in range(3)] == [[], [], []]
        server.build = "v2.38.0"
        [row async for row in upstream.list_chats(archived=False)]
        assert "mark" in await look(upstream, server)


async def test_after_a_stream_that_broke_off_nothing_holds_up_the_next_one() -> None:
    server = Marking(answer=204, unread=True)
    server.breaks_off = True
    async with upstream_of(server, keep_unread=True) as (upstream, _), upstream.stream(CHAT, after_id=0) as frames:
        await anext(frames)
        asked = list(server.asked)
        with pytest.raises(StreamEnded):
            await anext(frames)
    assert server.asked == asked


async def test_a_server_that_does_not_know_the_term_is_not_asked_again() -> None:
    server = Marking(answer=204, unread=True, knows_term=False)
    async with upstream_of(server, keep_unread=True) as (upstream, _):
        assert [await look(upstream, server) for _ in range(3)] == [["list"], [], []]
