"""Every method of the Coder adapter against the simulator, as a server of each age: the two agree on one protocol."""

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
from relay.adapters.coder_paths import PATHS
from relay.core.errors import ChatGone, ChatRefused, StreamEnded, Unauthorized, Unavailable
from relay.ports import Account, ModelPrice, Retention
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import Owner


@dataclass
class Side:
    simulator: Simulator
    upstream: CoderUpstream  # of ann
    ann: Owner
    bob: Owner


@asynccontextmanager
async def upstream_of(simulator: Simulator, token: str, **more: object) -> AsyncIterator[CoderUpstream]:
    settings = {"url": simulator.url, "token": token, "timeout_seconds": 10, **more}
    async with open_upstream(CoderSettings.model_validate(settings)) as upstream:
        yield upstream


def prefix_of(simulator: Simulator) -> str:
    return DIALECTS[simulator.config.dialect].features.prefixes[0]


@pytest.fixture(params=list(DIALECTS))
async def side(request: pytest.FixtureRequest) -> AsyncIterator[Side]:
    speed = 50.0
    config = SimulatorConfig(speed=speed, dialect=request.param)
    async with Simulator(config) as simulator, aiohttp.ClientSession() as session:
        model = simulator.model_configs[0].id
        ann, bob = (
            Owner(session, simulator.url, user, model, speed=speed, prefix=lambda: prefix_of(simulator))
            for user in (simulator.users["ann"], simulator.users["bob"])
        )
        async with upstream_of(simulator, simulator.users["ann"].token) as upstream:
            yield Side(simulator, upstream, ann, bob)


async def read_until(stream: AsyncIterator[str], found: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The events of the chat's stream up to the first that is `found`."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(20):
        while True:
            frame = json.loads(await anext(stream))
            for event in frame["data"] if isinstance(frame, dict) else frame:
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
    assert [row["id"] async for row in side.upstream.list_chats(archived=False)] == [str(kept)]
    assert [row["id"] async for row in side.upstream.list_chats(archived=True)] == [str(archived)]
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
    told = DIALECTS[side.simulator.config.dialect].features.priced_models
    expected = ModelPrice("lab", Decimal(3), Decimal(15), Decimal("0.3"), None) if told else ModelPrice("lab")
    assert prices == {config.id: expected}


async def test_a_survey_names_the_server(side: Side) -> None:
    chat = await side.ann.create("[text n=2 ms=1] one")
    await side.ann.wait_idle(chat)
    await side.upstream.survey()
    assert side.upstream.dialect == side.simulator.config.dialect
    features = DIALECTS[side.simulator.config.dialect].features
    assert side.upstream.evidence.asc_messages is features.ascending_pages
    async with side.upstream.stream(chat, after_id=0) as stream:
        await read_until(stream, is_waiting)
    assert side.upstream.dialect == side.simulator.config.dialect
    assert side.upstream.evidence.frame == ("raw" if features.raw_frames else "envelope")
    assert side.upstream.evidence.rev_cursor is (True if features.revisions else None)
    assert prefix_of(side.simulator) == PATHS[side.upstream.evidence.prefix or "experimental"]


async def test_limits_budget_and_retention(side: Side) -> None:
    features = DIALECTS[side.simulator.config.dialect].features
    assert await side.upstream.has_native_limits() is features.native_limits
    assert await side.upstream.budget(side.ann.user.id) is None
    assert await side.upstream.retention() == (Retention(30, 0) if features.retention else Retention())


async def test_a_subagents_chat_is_listed_as_its_root_is(side: Side) -> None:
    root = await side.ann.create("[agent n=2 ms=1] delegate")
    await side.ann.wait_idle(root)
    rows = [row async for row in side.upstream.list_chats(archived=False)]
    assert sorted(str(row.get("parent_chat_id")) for row in rows) == sorted(["None", str(root)])


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
    raw = DIALECTS[side.simulator.config.dialect].features.raw_frames
    async with side.upstream.watch() as frames, asyncio.timeout(20):
        if not raw:
            assert json.loads(await anext(frames))["type"] == "ping"
        chat = await side.ann.create("[text n=2 ms=1] new")
        told = json.loads(await anext(frames))
    told = told if raw else told["data"]
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
    await side.upstream.chat(chat)
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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("d2", "d3ga", id="to where the API is at its final place alone"),
        pytest.param("d0", "d1", id="to bare frames"),
        pytest.param("d1e", "d2", id="to episodes"),
        pytest.param("d3ga", "d3", id="put back"),
    ],
)
async def test_a_server_that_is_upgraded_under_us_is_followed(before: str, after: str) -> None:
    config = SimulatorConfig(speed=50.0, dialect=before)
    async with Simulator(config) as simulator, aiohttp.ClientSession() as session:
        user, model = simulator.users["ann"], simulator.model_configs[0].id
        ann = Owner(session, simulator.url, user, model, speed=50.0, prefix=lambda: prefix_of(simulator))
        async with upstream_of(simulator, user.token) as upstream:
            chat = await ann.create("[text n=2 ms=1] one")
            await ann.wait_idle(chat)
            await upstream.survey()
            assert upstream.dialect == before
            async with upstream.stream(chat, after_id=0) as stream:
                await read_until(stream, is_waiting)
                await simulator.restart(polite=True, dialect=after)
                with pytest.raises(StreamEnded):
                    await read_until(stream, lambda _event: False)
            assert (await upstream.chat(chat))["id"] == str(chat)
            async with upstream.stream(chat, after_id=0) as stream:
                await read_until(stream, is_waiting)
            assert [row["id"] async for row in upstream.list_chats(archived=False)] == [str(chat)]
            await upstream.survey()
            assert upstream.dialect == after
