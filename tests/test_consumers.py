"""The example of docs/consumers.md keeps its word: killed, cut off, and told everything twice in any order."""

import asyncio
import json
import os
import random
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import cast
from uuid import UUID

from msgspec import structs

from relay.adapters.memory import matches
from relay.adapters.rabbit import RabbitSettings, open_rabbit
from relay.core.events import ChargedData, ChatRef, Event, MessageData, Origin, StatusData, event_id
from tests.adapters.broker import Proxy
from tests.contract_events import chat_events, examples, usage_events
from tests.core.captures import OURS, followed

DOCS = Path(__file__).parent.parent / "docs"
RECORDINGS = [OURS / "d0" / f"{name}.jsonl" for name in ("edit_full_refresh", "queue_and_promote", "tool_turn")]
PROMPT = 30.0  # seconds; failsafe, nothing waits for it when all is well


@asynccontextmanager
async def consumer(broker: str, database: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The example as its users run it, from when it consumes until it is killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(DOCS / "examples" / "consumer.py"), str(database)),
        env={**os.environ, "RABBIT_URL": broker},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await until_it_says(process, "consuming from transcripts")
        yield process
    finally:
        process.kill()
        await process.communicate()


async def until_it_says(process: asyncio.subprocess.Process, words: str) -> None:
    assert process.stderr is not None
    async with asyncio.timeout(PROMPT):
        while words not in (line := (await process.stderr.readline()).decode()):
            assert line, f"it ended and did not say {words!r}"


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(PROMPT):
        while not fact():
            await asyncio.sleep(0.02)


def rows(database: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


def sentinel() -> Event:
    """The last event: when it is there, so is everything that stood before it in the queue."""
    chat = ChatRef("http://sentinel.test", UUID(int=7), UUID(int=8), UUID(int=7))
    data = MessageData(message={"id": 1, "role": "user"}, text="")
    return Event(
        *(event_id(chat, "message", 1), "chat", "message", "user", chat, data, "2026-11-24T12:00:00Z"),
        *(Origin.LIVE, 1, 1),
    )


def stale(status: Event) -> Event:
    """What a follower that lost its chat long ago says of its status."""
    data = StatusData(status="stale", previous=None)
    return structs.replace(status, id=event_id(status.chat, "stale"), session=0, position=10_000, content=data)


async def test_the_example_counts_nothing_twice_and_loses_nothing(rabbit_vhost: str, tmp_path: Path) -> None:
    database = tmp_path / "transcripts.db"
    told = [event for path in RECORDINGS for event in chat_events(path) if not event.transient]
    charges = [c for event in told if event.event == "message" for c in usage_events(event) if c.event == "charged"]
    charges = [charge for charge in charges if cast(ChargedData, charge.data)["cost_micros"] is not None]
    told += charges + [stale(event) for event in told if event.event == "status"]
    chance = random.Random(7)
    first, again = chance.sample(told, len(told)), chance.sample(told, len(told))

    async with open_rabbit(RabbitSettings.model_validate({"url": rabbit_vhost})) as bus:
        async with consumer(rabbit_vhost, database):
            await bus.publish(first[:40])
            await until(lambda: rows(database, "SELECT count(*) FROM messages") > [(3,)])
        await bus.publish(first[40:])  # while it is dead
        async with Proxy.to(rabbit_vhost) as proxy, consumer(proxy.url, database) as process:
            await bus.publish(again)
            assert proxy.cut() == 1
            await until_it_says(process, "connection lost")
            await bus.publish([sentinel()])
            await until(lambda: rows(database, "SELECT * FROM messages WHERE chat LIKE '%sentinel%'") != [])

    expected = {
        f"http://coder.test/chats/{one.chat.chat_id}": dict(one.truth) for path in RECORDINGS for one in followed(path)
    }
    transcripts: dict[object, dict[object, object]] = {}
    for chat, key, body in rows(database, "SELECT * FROM transcripts WHERE chat NOT LIKE '%sentinel%'"):
        transcripts.setdefault(chat, {})[key] = json.loads(str(body))
    assert transcripts == expected
    costs = {charge.id: cast(ChargedData, charge.data)["cost_micros"] or 0 for charge in charges}
    assert rows(database, "SELECT micros FROM spend") == [(sum(costs.values()),)]
    last = {e.chat.chat_id: cast(StatusData, e.data)["status"] for e in told if e.event == "status" and e.session > 0}
    statuses = {row[0]: row[1] for row in rows(database, "SELECT chat, value FROM latest WHERE aspect = 'status'")}
    assert statuses == {f"http://coder.test/chats/{chat}": status for chat, status in last.items()}


def test_every_binding_of_the_page_takes_what_it_says() -> None:
    """The table of bindings in docs/consumers.md: each has examples of the contract that it takes."""
    lines = (DOCS / "consumers.md").read_text().splitlines()
    begin = lines.index("| binding | takes |")
    table = [line.split("|")[1].strip().strip("`") for line in lines[begin + 2 : lines.index("", begin)]]
    ids = {"<owner>": "07259a4a-6dcb-4fc0-98eb-4ee18df0a1c1", "<chat>": "2f70ef55-af93-4f1a-8ae1-ff53abd75b00"}
    keys = [event.routing_key for event in examples().values()]
    assert len(table) > 5
    for binding in table:
        pattern = binding.replace("<owner>", ids["<owner>"]).replace("<chat>", ids["<chat>"])
        assert [key for key in keys if matches(pattern, key)], f"{binding} takes nothing"
