"""The whole relay as separate processes with RabbitMQ and PostgreSQL, its worker killed in the middle of steps.

Whatever dies when: nothing is lost, nothing is told twice as two facts, nothing is charged twice.
"""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import asyncpg
import httpx
import pytest
import zstandard

from tests.e2e.consumer import Consumer, bound_to_everything, fold, last, place, turns
from tests.e2e.owner import CHATS, SPEED, Talk, owner_of, talking
from tests.e2e.processes import START_SECONDS, Relay, running
from tests.extent import as_many

SEED = 11
KILLS = as_many(quick=4, long=10)
ARRIVAL_SECONDS = 120.0  # for everything to arrive after the last word; failsafe
API = "/api/experimental/chats"


class World:
    """A simulated server, broker and database, and what is set for the programs."""

    def __init__(self, coder: dict[str, Any], rabbit: str, database: str, archive: Path, seen: Consumer) -> None:
        self.url: str = coder["url"]
        self.model_id: str = coder["model_config_id"]
        self.token: str = coder["users"]["ann"]["token"]
        self.rabbit = rabbit
        self.database = database
        self.archive = archive
        self.seen = seen
        self.http = httpx.AsyncClient(base_url=self.url, headers={"Coder-Session-Token": self.token}, timeout=30)
        self.settings = {
            "RELAY_CODER__URL": self.url,
            "RELAY_CODER__TOKEN": self.token,
            "RELAY_RABBIT__URL": rabbit,
            "RELAY_DATABASE__URL": database,
            "RELAY_ARCHIVE__URL": f"file://{archive}",
            "RELAY_OPS__PORT": "0",
            "RELAY_LOG__LEVEL": "info",
            # Less patient than in earnest.
            "RELAY_WORKER__LEASE_SECONDS": "3",  # with less, a worker on a busy machine loses what it has
            "RELAY_WORKER__SWEEP_SECONDS": "0.5",
            "RELAY_FOLLOW__SETTLE_SECONDS": "0.4",
            "RELAY_FOLLOW__LINGER_SECONDS": "1",
            "RELAY_METER__POLICIES": '[{"name": "daily", "period": "day", "limit_micros": 200000}]',
            "RELAY_ARCHIVIST__IDLE_SECONDS": "1.5",
            "RELAY_ARCHIVIST__LOOK_SECONDS": "0.5",
            "RELAY_ARCHIVIST__PATIENCE": "100",
        }

    async def get(self, path: str) -> Any:
        return (await self.http.get(path)).raise_for_status().json()

    async def busy(self) -> set[str]:
        """Chats in the middle of a turn."""
        state = await self.get("/_simulator/state")
        return {chat["id"] for chat in state["chats"] if chat["status"] == "running"}

    async def truth(self) -> dict[str, dict[str, Any]]:
        """What Coder's REST API says of each chat of the owner: `status`, `messages` by id, `queue`."""
        chats = {}
        for row in await self.get(f"{API}?limit=1000"):
            messages: dict[int, Any] = {}
            more, before, queue = True, "", None
            while more:
                page = await self.get(f"{API}/{row['id']}/messages?limit=200{before}")
                messages |= {message["id"]: message for message in page["messages"]}
                more, before = page["has_more"], f"&before_id={min(messages, default=0)}"
                queue = page["queued_messages"] if queue is None else queue
            chats[row["id"]] = {"status": row["status"], "messages": dict(sorted(messages.items())), "queue": queue}
        return chats

    async def rows(self, query: str) -> list[Any]:
        connection = await asyncpg.connect(urlunsplit(urlsplit(self.database)._replace(scheme="postgresql")))
        try:
            found: list[Any] = await connection.fetch(query)
            return found
        finally:
            await connection.close()

    async def sessions(self) -> int:
        """How many claims were ever made."""
        return int((await self.rows("SELECT coalesce(sum(session), 0) AS n FROM claims"))[0]["n"])

    async def depths(self) -> dict[str, int]:
        """Messages in the relay's queues."""
        names = ("relay.meter", "relay.archivist", "relay.meter.dead", "relay.archivist.dead", "relay.frames.dead")
        connection = await aio_pika.connect(self.rabbit)
        async with connection:
            channel = await connection.channel()
            declared = [await channel.declare_queue(name, passive=True) for name in names]
            return {q.name: int(q.declaration_result.message_count or 0) for q in declared}


@pytest.fixture
async def world(rabbit_vhost: str, postgres_database: str, tmp_path: Path) -> AsyncIterator[World]:
    async with running("simulator", "--port", "0", "--json", "--seed", str(SEED), "--speed", str(SPEED)) as simulator:
        coder = json.loads(await simulator.output_line())
        async with bound_to_everything(rabbit_vhost) as seen:
            world = World(coder, rabbit_vhost, postgres_database, tmp_path / "archive", seen)
            async with world.http:
                yield world


@asynccontextmanager
async def talk_of(world: World, names: tuple[str, ...]) -> AsyncIterator[Talk]:
    async with owner_of(world.url, world.model_id, SEED) as owner, talking(owner, world.seen, names, SEED) as talk:
        yield talk


async def in_the_middle_of_steps(world: World, worker: Relay, *, spoken: bool, patience: float) -> set[str]:
    """Return a random moment after the worker began to follow, or after it first spoke, when chats that it follows are
    in a turn: those."""
    before = {place(event) for event in world.seen.named("chat.")}
    newest = max(before, default=(0, 0))[0] if spoken else -1
    async with asyncio.timeout(START_SECONDS):
        while not await worker.following() or not any(e["session"] > newest for e in world.seen.named("chat.")):
            await asyncio.sleep(0.05)
        await asyncio.sleep(patience)  # the moment of the kill is the point, not a wait for a fact
        while not (struck := await worker.following() & await world.busy()):
            await asyncio.sleep(0.02)
    return struck


def wrong(world: World, truth: dict[str, dict[str, Any]]) -> list[str]:
    """Where what a consumer knows differs from Coder, a line each."""
    lines = []
    for chat, coder in truth.items():
        events = world.seen.of(chat)
        folded = fold(events)
        if folded != coder["messages"]:
            missing, surplus = coder["messages"].keys() - folded.keys(), folded.keys() - coder["messages"].keys()
            lines.append(f"{chat}: messages missing {sorted(missing)}, not in Coder {sorted(surplus)}")
        told, prompts = turns(events), [m["id"] for m in coder["messages"].values() if m["role"] == "user"]
        lines += [f"{chat}: turn of {key} told {len(told[key])} times" for key in prompts if len(told[key]) != 1]
        status, queue = last(events, "chat.status."), last(events, "chat.queue.")
        if status is None or status["status"] != coder["status"]:
            lines.append(f"{chat}: status {status} is not {coder['status']}")
        if (queue["queued_messages"] if queue else []) != coder["queue"]:
            lines.append(f"{chat}: queue {queue} is not {coder['queue']}")
    return lines


async def until_arrived(world: World, meanwhile: Relay) -> dict[str, dict[str, Any]]:
    """Wait until a consumer knows all that Coder knows; the failsafe says what it lacks."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    truth = await world.truth()
    while lines := wrong(world, truth):
        assert meanwhile.process.returncode is None, "\n".join(meanwhile.errors)
        assert time.monotonic() < deadline, "\n".join(lines)
        await asyncio.sleep(0.5)
    return truth


async def until_empty(world: World) -> dict[str, int]:
    """Wait until meter and archivist have worked off their queues."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while (depths := await world.depths())["relay.meter"] or depths["relay.archivist"]:
        assert time.monotonic() < deadline, depths
        await asyncio.sleep(0.2)
    return depths


async def check_money(world: World) -> None:
    """Each assistant message that cost something is charged once, whether it is still there or was edited away."""
    used = {
        (event["subject"], event["data"]["message"]["id"])
        for event in world.seen.named("chat.message.assistant")
        if event["data"]["message"].get("usage")
    }
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while len(charges := await world.rows("SELECT chat_id, message_id, cost_micros FROM charges")) < len(used):
        assert time.monotonic() < deadline, f"{len(charges)} of {len(used)} charged"
        await asyncio.sleep(0.2)
    assert sorted((str(row["chat_id"]), row["message_id"]) for row in charges) == sorted(used)
    coder = await world.get(f"{API}/cost/me/summary")
    assert sum(row["cost_micros"] for row in charges) == coder["total_cost_micros"] > 0
    assert coder["unpriced_message_count"] == 0
    while len(world.seen.named("usage.charged.")) < len(used):
        assert time.monotonic() < deadline, "usage.charged is missing"
        await asyncio.sleep(0.2)
    levels = [event["data"]["percent"] for event in world.seen.named("usage.") if "percent" in event["data"]]
    spent = coder["total_cost_micros"]
    assert sorted(levels) == [level for level in (50, 80, 95, 100) if spent * 100 >= 200_000 * level]


async def check_archive(world: World, truth: dict[str, dict[str, Any]]) -> None:
    """The newest copy of every chat is what Coder has, and its sha256 is what was told."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while True:
        newest: dict[str, Any] = {}
        for event in sorted(world.seen.named("archive.stored."), key=place):
            newest[event["subject"]] = event["data"]
        stale = [
            chat
            for chat, coder in truth.items()
            if newest.get(chat, {}).get("last_id") != max(coder["messages"]) or newest[chat]["messages"] == 0
        ]
        if not stale:
            break
        assert time.monotonic() < deadline, f"without a copy of their end: {stale}"
        await asyncio.sleep(0.2)
    for chat, coder in truth.items():
        body = Path(newest[chat]["url"].removeprefix("file://")).read_bytes()
        assert hashlib.sha256(body).hexdigest() == newest[chat]["sha256"]
        lines = zstandard.ZstdDecompressor().decompressobj().decompress(body).splitlines()
        assert [json.loads(line) for line in lines] == list(coder["messages"].values())


@pytest.mark.timeout(400)
async def test_a_worker_killed_many_times_in_the_middle_of_steps_loses_nothing(world: World) -> None:
    dice = random.Random(SEED)
    struck: list[set[str]] = []
    sessions: list[int] = []
    async with (
        running("meter", settings=world.settings) as meter,
        running("archivist", settings=world.settings) as archivist,
    ):
        async with talk_of(world, (*CHATS, "burst")) as talk:
            for number in range(KILLS):
                async with running("worker", settings=world.settings) as worker:
                    # Some die before their first word.
                    spoken, patience = number % 3 != 1, dice.uniform(0.0, 1.0)
                    struck.append(await in_the_middle_of_steps(world, worker, spoken=spoken, patience=patience))
                    await worker.kill()
                sessions.append(await world.sessions())
            talk.stopped = True
            survivor = running("worker", settings=world.settings)
            worker = await survivor.__aenter__()
        try:
            truth = await until_arrived(world, worker)
            depths = await until_empty(world)
            await check_money(world)
            await check_archive(world, truth)
        finally:
            await survivor.__aexit__(None, None, None)
        for program in (meter, archivist):
            assert program.process.returncode is None, program.errors
            assert await program.terminate() == 0
    assert depths == dict.fromkeys(depths, 0)
    assert len(truth) == len(CHATS) + 1
    # It was no walk-over: each kill hit turns that were being followed, each worker had claimed chats before.
    assert all(struck)
    assert len(struck) == KILLS
    assert sorted(set(sessions)) == sessions
    assert all(rounds > 0 for rounds in talk.rounds.values())
    assert world.seen.copied
    assert world.seen.named("chat.history.replaced.")
    assert world.seen.named("chat.preview.text.")


async def test_a_worker_that_is_asked_to_stop_leaves_nothing_open(world: World) -> None:
    names = ("text", "reasoning", "tools", "retry", "queue")  # without edits: no statement of history is needed
    dice = random.Random(SEED)
    # Who comes next waits for no lease; and chats stay with a worker, so that none is just being claimed at the end.
    settings = world.settings | {"RELAY_WORKER__LEASE_SECONDS": "60", "RELAY_FOLLOW__LINGER_SECONDS": "60"}
    async with talk_of(world, names) as talk:
        for _ in range(3):
            async with running("worker", settings=settings) as worker:
                async with asyncio.timeout(START_SECONDS):
                    while len(await worker.following()) < len(names):
                        await asyncio.sleep(0.05)
                await in_the_middle_of_steps(world, worker, spoken=False, patience=dice.uniform(0.5, 1.5))
                assert await worker.terminate() == 0
                assert not [line for line in worker.errors if "Traceback" in line]
            confirmed = await told_messages(world)
            claims = await world.rows("SELECT chat_id, worker, clean FROM claims")
            assert claims
            assert [str(row["chat_id"]) for row in claims if row["worker"] is not None] == []
            assert [str(row["chat_id"]) for row in claims if not row["clean"]] == []
            known = await world.rows("SELECT chat_id, message_id FROM known_messages")
            assert sorted((str(row["chat_id"]), row["message_id"]) for row in known) == confirmed
        talk.stopped = True
        survivor = running("worker", settings=settings)
        worker = await survivor.__aenter__()
    try:
        await until_arrived(world, worker)
    finally:
        await survivor.__aexit__(None, None, None)
    assert world.seen.named("chat.history.") == []
    assert len({event["session"] for event in world.seen.named("chat.")}) > 3
    # A batch in hand may have gone out twice, as it was; no later session told a message again.
    messages = {event["id"]: event["key"] for event in world.seen.named("chat.message.")}
    again = {key: places for key, places in world.seen.copied.items() if key in messages and len(set(places)) > 1}
    assert again == {}


async def told_messages(world: World) -> list[tuple[str, int]]:
    """All messages that were published, once the broker has handed them all over."""
    counted = -1
    while counted != (counted := len(world.seen.events)):
        await asyncio.sleep(0.3)  # the worker is gone: nothing more is published, only delivered
    return sorted((e["subject"], e["data"]["message"]["id"]) for e in world.seen.named("chat.message."))
