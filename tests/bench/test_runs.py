"""Each measurement as small as it gets, on real servers: the rig counts what was sent, and leaves nothing behind."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import asyncpg
import httpx
import pytest

from relay.adapters.coder import CoderSettings, open_upstream
from relay.bench.children import ChildFailed, child, feeder
from relay.bench.listener import listening
from relay.bench.places import Offered, own_vhost
from relay.bench.publishers import POOL
from relay.bench.suite import (
    FailoverOptions,
    IdleOptions,
    KnownOptions,
    LatencyOptions,
    PathOptions,
    Plan,
    PublishOptions,
    measure,
)
from relay.bench.whole_path import Running, running
from relay.core.errors import Unavailable
from relay.core.frames import MessageSeen, decode_frame

Rows = list[dict[str, Any]]


@pytest.fixture
def servers(rabbit_url: str, rabbit_management_url: str, database_url: str) -> Mapping[str, str]:
    return {
        "RELAY_TEST_RABBIT_URL": rabbit_url,
        "RELAY_TEST_RABBIT_MANAGEMENT_URL": rabbit_management_url,
        "RELAY_TEST_DATABASE_URL": database_url,
    }


async def measured(plan: Plan, servers: Mapping[str, str], name: str) -> Rows:
    said: list[str] = []
    report = await measure(plan, servers, said.append)
    assert said
    assert {"broker", "database", "cpu"} <= set(report.machine)
    assert list(report.results) == [name]
    rows: Rows = json.loads(report.to_json())["results"][name]
    return rows


@pytest.mark.long
async def test_publishers_have_all_their_messages_confirmed(servers: Mapping[str, str]) -> None:
    rows = await measured(Plan(publish=PublishOptions(rounds=1, seconds=0.3)), servers, "publish")
    assert {"pipelined", "plain", "aio-pika", "raw"} <= {row["publisher"] for row in rows}
    for row in rows:
        assert row["messages"] > 0
        assert row["per_second"] > 0
        assert row["per_cpu_second"] > 0
    assert next(row for row in rows if row["publisher"] == "raw")["percent_of_raw"] == 100


@pytest.mark.parametrize(
    "name",
    ["pipelined", *(pytest.param(name, marks=pytest.mark.long) for name in ("plain", "aio-pika", "faststream", "raw"))],
)
async def test_what_a_publisher_counts_is_in_the_queue(servers: Mapping[str, str], name: str) -> None:
    if name == "faststream":
        pytest.importorskip("faststream")
    async with own_vhost(Offered.from_environment(servers)) as vhost:
        connection = await aio_pika.connect(vhost.url)
        async with connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("one", durable=True, arguments={"x-queue-type": "quorum"})
            async with child("relay.bench.publishers", name, vhost.url, "one") as publisher:
                result = await publisher.ask("publish", seconds=0.2)
            found = set()
            for _ in range(result["confirmed"]):
                message = await queue.get(no_ack=True, timeout=10)
                body = json.loads(message.body)
                assert (message.message_id, message.type) == (body["id"], body["type"])
                assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
                assert message.content_type == "application/cloudevents+json"
                found.add(message.message_id)
            assert await queue.get(no_ack=True, fail=False) is None
    assert result["refused"] == 0
    assert result["confirmed"] > 0
    assert len(found) == min(result["confirmed"], POOL)  # then they come again


async def test_a_feeder_is_a_server_to_the_relay() -> None:
    async with feeder(chats=3, rounds=1, history=2, running=1) as server:
        settings = CoderSettings.model_validate({"url": server.hello["url"], "token": "any"})
        async with open_upstream(settings) as upstream:
            rows = [row async for row in upstream.list_chats(archived=False)]
            assert [row["status"] for row in rows] == ["running", "waiting", "waiting"]
            assert [row async for row in upstream.list_chats(archived=True)] == []
            chats = [str(row["id"]) for row in rows]
            page = await upstream.messages(UUID(chats[0]), down_to=0)
            assert len(page.messages) == 5
            async with upstream.stream(UUID(chats[0]), after_id=0) as frames, asyncio.timeout(20):
                first = decode_frame(await anext(frames))
                shown = [seen.message.id for seen in first.events if isinstance(seen, MessageSeen)]
                assert shown == [message["id"] for message in reversed(page.messages)]
                await server.ask("feed", rate=20.0)
                following = decode_frame(await anext(frames))
                assert len(following.events) == 1
            async with upstream.watch() as frames, asyncio.timeout(20):
                assert "ping" in await anext(frames)
            assert (await server.ask("state"))["opened"] == 1


@pytest.mark.long
async def test_every_message_that_is_told_arrives_once(servers: Mapping[str, str]) -> None:
    arrived: list[tuple[str, int]] = []

    def take(body: bytes, _: int) -> None:
        event = json.loads(body)
        arrived.append((event["subject"], event["data"]["message"]["id"]))

    async with running(Offered.from_environment(servers), chats=4) as world:
        before = (await world.feeder.ask("state"))["messages"]
        async with listening(world.vhost.url, take):
            await world.feeder.ask("feed", rate=50.0)
            async with asyncio.timeout(60):
                while len(arrived) < 400:
                    await asyncio.sleep(0.05)
                told = (await world.feeder.ask("pause"))["messages"] - before
                while len(arrived) < told:
                    await asyncio.sleep(0.05)
        counted = await world.worker.ask("counted")
    assert len(set(arrived)) == len(arrived) == told
    assert counted["events"] > told
    assert counted["refused"] == 0


async def test_the_whole_path(servers: Mapping[str, str], tmp_path: Path) -> None:
    profile = tmp_path / "profile.txt"
    options = PathOptions(chats=5, seconds=1.5, warm_up_seconds=0.5, profile=profile)
    (row,) = await measured(Plan(relay=options), servers, "relay")
    assert row["events"] > 0
    assert row["streams_opened"] == 5
    assert row["events_per_cpu_second"] > row["events_per_second"] > 0
    assert row["database"] == "PostgreSQL"
    assert "relay/programs/follow.py" in profile.read_text()


@pytest.mark.long
async def test_the_whole_path_beside_the_libraries_that_it_stands_on(servers: Mapping[str, str]) -> None:
    rows = await measured(Plan(relay=PathOptions(chats=5, seconds=1.0, warm_up_seconds=0.5)), servers, "relay")
    assert [row["path"] for row in rows] == ["worker", "libraries alone"]
    for row in rows:
        assert row["events"] > 0
        assert row["refused"] == 0
        assert row["streams_opened"] == 5
    worker, libraries = rows
    assert worker["times_the_cpu_of_libraries"] > libraries["times_the_cpu_of_libraries"] == 1


@pytest.mark.long
async def test_the_whole_path_without_postgresql(servers: Mapping[str, str]) -> None:
    without = {name: value for name, value in servers.items() if "DATABASE" not in name}
    row, _ = await measured(Plan(relay=PathOptions(chats=2, seconds=1.0, warm_up_seconds=0.5)), without, "relay")
    assert row["database"] == "SQLite"
    assert row["events"] > 0


@pytest.mark.long
async def test_idle_chats(servers: Mapping[str, str]) -> None:
    (row,) = await measured(Plan(sockets=IdleOptions(counts=(20,), seconds=0.5)), servers, "sockets")
    assert row["chats"] == row["open"] == 20
    assert row["worker_mib"] > 20
    assert row["websockets_alone_kib"] > 0


@pytest.mark.long
async def test_known_chats(servers: Mapping[str, str]) -> None:
    (row,) = await measured(Plan(known=KnownOptions(known=60, live=5)), servers, "known")
    assert row["sockets_opened"] == 5
    assert row["worker_peak_mib"] >= row["worker_mib"] > 20


@pytest.mark.timeout(240)
@pytest.mark.long
async def test_failover(servers: Mapping[str, str]) -> None:
    hasty = {"WORKER__LEASE_SECONDS": "3", "WORKER__SWEEP_SECONDS": "1"}
    rows = await measured(Plan(failover=FailoverOptions(chats=4, rounds=2, settings=hasty)), servers, "failover")
    assert [row["round"] for row in rows] == [1, 2]
    for row in rows:
        assert 1 <= row["chats"] <= 4
        assert 0 < row["first_seconds"] <= row["median_seconds"] <= row["last_seconds"]


@pytest.mark.long
async def test_latency(servers: Mapping[str, str]) -> None:
    options = LatencyOptions(chats=3, seconds=1.5, full_seconds=1.0)
    (row,) = await measured(Plan(latency=options), servers, "latency")
    assert row["messages"] > 10
    assert 0 < row["consumer_p50_ms"] <= row["consumer_p99_ms"] <= row["consumer_max_ms"]
    assert 0 < row["confirm_p50_ms"] <= row["confirm_p99_ms"]
    assert 0 < row["percent_within_250_ms"] <= 100
    assert 0 < row["events_per_second"] < 0.8 * row["full_events_per_second"]  # what was not told is not made up for
    assert row["full_events_per_second"] > 0


@pytest.mark.long
async def test_nothing_is_left_behind(servers: Mapping[str, str]) -> None:
    world: Running | None = None

    async def break_off() -> None:
        nonlocal world
        async with running(Offered.from_environment(servers), chats=1) as world:
            assert world.vhost.name in await vhosts(servers)
            raise Unavailable("something went wrong in the middle")

    with pytest.raises(Unavailable, match="in the middle"):
        await break_off()
    assert world is not None
    assert world.vhost.name not in await vhosts(servers)
    server = await asyncpg.connect(servers["RELAY_TEST_DATABASE_URL"])
    try:
        database = world.place.url.rpartition("/")[2]
        assert not await server.fetch("SELECT 1 FROM pg_database WHERE datname = $1", database)
    finally:
        await server.close()
    for process in (world.feeder, world.worker):
        with pytest.raises(ChildFailed, match="ended with exit code"):
            process.must_run()


async def vhosts(servers: Mapping[str, str]) -> set[str]:
    async with httpx.AsyncClient(base_url=servers["RELAY_TEST_RABBIT_MANAGEMENT_URL"], verify=False) as management:
        return {str(vhost["name"]) for vhost in (await management.get("/api/vhosts")).json()}


async def test_a_child_that_fails_is_told_with_its_code() -> None:
    with pytest.raises(ChildFailed, match="publishers ended with exit code 1"):
        async with child("relay.bench.publishers", "pipelined", "amqp://guest:guest@127.0.0.1:1/", "queue"):
            pass


async def test_a_killed_child_is_noticed() -> None:
    async with feeder(chats=1) as server:
        await server.kill()
        with pytest.raises(ChildFailed, match="feeder ended with exit code -9"):
            await server.ask("state")
