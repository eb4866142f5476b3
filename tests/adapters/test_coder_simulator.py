"""Every method of the Coder adapter against the simulator: the two agree on one protocol."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from relay.adapters.coder import CoderSettings, CoderUpstream, open_upstream
from relay.core.errors import ChatGone, ChatRefused, StreamEnded, Unauthorized, Unavailable
from relay.ports import Account
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.owner import Owner


@dataclass
class Side:
    simulator: Simulator
    upstream: CoderUpstream  # of ann
    ann: Owner
    bob: Owner


@asynccontextmanager
async def upstream_of(simulator: Simulator, token: str) -> AsyncIterator[CoderUpstream]:
    settings = {"url": simulator.url, "token": token, "timeout_seconds": 10}
    async with open_upstream(CoderSettings.model_validate(settings)) as upstream:
        yield upstream


@pytest.fixture
async def side() -> AsyncIterator[Side]:
    speed = 50.0
    async with Simulator(SimulatorConfig(speed=speed)) as simulator, aiohttp.ClientSession() as session:
        model = simulator.model_configs[0].id
        ann, bob = (Owner(session, simulator.url, simulator.users[name], model, speed=speed) for name in ("ann", "bob"))
        async with upstream_of(simulator, simulator.users["ann"].token) as upstream:
            yield Side(simulator, upstream, ann, bob)


async def read_until(stream: AsyncIterator[str], found: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The events of the chat's stream up to the first that is `found`."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while True:
            for event in json.loads(await anext(stream))["data"]:
                events.append(event)
                if found(event):
                    return events


def is_waiting(event: dict[str, Any]) -> bool:
    return event["type"] == "status" and bool(event["status"]["status"] == "waiting")


async def test_account(side: Side) -> None:
    user = side.simulator.users["ann"]
    assert await side.upstream.account() == Account(user.id, "ann")
    assert side.upstream.deployment == side.simulator.url


async def test_the_list_has_the_own_chats_archived_or_not(side: Side) -> None:
    kept, archived = [await side.ann.create("[text n=2 ms=1] one"), await side.ann.create("[text n=2 ms=1] two")]
    await side.bob.create("[text n=2 ms=1] not mine")
    await side.ann.wait_idle(archived)
    await side.upstream.archive_chat(archived)
    await side.upstream.archive_chat(archived)
    assert [row["id"] for row in await side.upstream.list_chats(archived=False)] == [str(kept)]
    assert [row["id"] for row in await side.upstream.list_chats(archived=True)] == [str(archived)]
    assert (await side.upstream.chat(archived))["archived"] is True


async def test_messages_of_a_chat_with_many(side: Side) -> None:
    chat = await side.ann.create("[steps k=110 n=1 ms=0 toolms=0] look through all of them")
    await side.ann.wait_idle(chat)
    expected = [message["id"] for message in await side.ann.messages(chat)][::-1]
    assert len(expected) > 200
    everything = await side.upstream.messages(chat, down_to=0)
    assert [message["id"] for message in everything.messages] == expected
    assert everything.complete is True
    newest = await side.upstream.messages(chat, down_to=expected[5])
    assert [message["id"] for message in newest.messages] == expected[:200]
    assert newest.complete is False


async def test_messages_bring_the_queue(side: Side) -> None:
    chat = await side.ann.create("[slowtool n=2 ms=1 toolms=6000000] wait for a tool")
    await side.ann.wait_parts(chat, 1)
    await side.ann.send(chat, "[text n=1 ms=1] next")
    (queued,) = (await side.upstream.messages(chat, down_to=0)).queued_messages
    assert "[text n=1 ms=1] next" in json.dumps(queued["content"])


async def test_prices(side: Side) -> None:
    prices = await side.upstream.model_prices()
    (config,) = side.simulator.model_configs
    assert list(prices) == [config.id]
    price = prices[config.id]
    assert (price.model, price.input, price.output) == ("lab", Decimal(3), Decimal(15))
    assert (price.cache_read, price.cache_write) == (Decimal("0.3"), None)


async def test_a_stream_from_the_start_and_from_a_cursor(side: Side) -> None:
    chat = await side.ann.create("[text n=20 ms=5] tell me")
    async with side.upstream.stream(chat, after_id=0) as stream:
        events = await read_until(stream, is_waiting)
    seen = [event["message"]["id"] for event in events if event["type"] == "message"]
    assert seen == [message["id"] for message in await side.ann.messages(chat)]
    await side.ann.send(chat, "[text n=2 ms=1] more")
    async with side.upstream.stream(chat, after_id=seen[-1]) as stream:
        events = await read_until(stream, lambda event: bool(event["type"] == "message"))
    assert events[-1]["message"]["id"] > seen[-1]


async def test_watch_tells_of_a_new_chat(side: Side) -> None:
    async with side.upstream.watch() as frames, asyncio.timeout(20):
        assert json.loads(await anext(frames))["type"] == "ping"
        chat = await side.ann.create("[text n=2 ms=1] new")
        told = json.loads(await anext(frames))["data"]
    assert (told["kind"], told["chat"]["id"]) == ("created", str(chat))


Strike = Callable[[Simulator, UUID], Awaitable[object]]


async def cut(simulator: Simulator, chat: UUID) -> None:
    simulator.cut(chat)


def close(code: int, reason: str) -> Strike:
    return lambda simulator, chat: simulator.close(code, reason, chat)


def restart(*, polite: bool) -> Strike:
    return lambda simulator, _chat: simulator.restart(polite=polite)


@pytest.mark.parametrize(
    ("strike", "reason"),
    [
        pytest.param(cut, "network_error", id="cut"),
        pytest.param(close(1000, "Connection closed"), "server_close", id="1000"),
        pytest.param(close(1011, ""), "server_close", id="1011"),
        pytest.param(restart(polite=True), "server_close", id="polite restart"),
        pytest.param(restart(polite=False), "network_error", id="killed"),
    ],
)
async def test_a_stream_that_ends_says_why_and_can_be_opened_again(side: Side, strike: Strike, reason: str) -> None:
    chat = await side.ann.create("[text n=2 ms=1] one")
    await side.ann.wait_idle(chat)
    async with side.upstream.stream(chat, after_id=0) as stream:
        await read_until(stream, is_waiting)
        await strike(side.simulator, chat)
        with pytest.raises(StreamEnded) as caught:
            await read_until(stream, lambda _event: False)
    assert caught.value.reason == reason
    async with side.upstream.stream(chat, after_id=0) as stream:
        await read_until(stream, is_waiting)


async def test_what_is_not_there_or_not_ours(side: Side) -> None:
    foreign = await side.bob.create("[text n=2 ms=1] not mine")
    for chat in (foreign, UUID(int=1)):
        for call in (
            side.upstream.chat(chat),
            side.upstream.messages(chat, down_to=0),
            side.upstream.archive_chat(chat),
            side.upstream.stream(chat, after_id=0).__aenter__(),
        ):
            with pytest.raises(ChatGone, match="404"):
                await call


@pytest.mark.parametrize(
    ("status", "expected"), [(401, Unauthorized), (409, ChatRefused), (429, Unavailable), (503, Unavailable)]
)
async def test_faults_on_demand(side: Side, status: int, expected: type[Exception]) -> None:
    chat = await side.ann.create("[text n=2 ms=1] one")
    side.simulator.faults.add("answer", status=status, retry_after=3)
    for call in (side.upstream.chat(chat), side.upstream.stream(chat, after_id=0).__aenter__()):
        with pytest.raises(expected) as caught:
            await call
        if isinstance(caught.value, Unavailable):
            assert caught.value.retry_after_seconds == 3.0
    side.simulator.faults.clear()
    assert (await side.upstream.chat(chat))["id"] == str(chat)


async def test_a_wrong_token(side: Side) -> None:
    async with upstream_of(side.simulator, "wrongwrong-wrongwrongwrongwrongwr") as upstream:
        with pytest.raises(Unauthorized, match="API key"):
            await upstream.account()
        with pytest.raises(Unauthorized, match="API key"):
            await upstream.watch().__aenter__()
