"""Fold what the relay tells into transcripts and spend, in a SQLite file. Copies, gaps and any order change nothing.

    RABBIT_URL=amqp://guest:guest@localhost:5672/ python consumer.py transcripts.db

Needs aio-pika. It may be killed at any time: a message is acknowledged when what it says is on the disk, not before.
"""

import asyncio
import json
import logging
import os
import sqlite3
import sys
from typing import Any

import aio_pika

QUEUE = "transcripts"  # yours: every service has a queue of its own
BINDINGS = ("chat.message.#", "chat.history.#", "chat.status.#", "usage.charged.#")
TABLES = """
CREATE TABLE IF NOT EXISTS messages (chat, id INTEGER, body, PRIMARY KEY (chat, id));
CREATE TABLE IF NOT EXISTS latest (chat, aspect, session, position, value, PRIMARY KEY (chat, aspect));
CREATE TABLE IF NOT EXISTS charges (event_id PRIMARY KEY, owner, micros INTEGER);
CREATE VIEW IF NOT EXISTS transcripts AS
    SELECT m.chat, m.id, m.body FROM messages m LEFT JOIN latest h ON h.chat = m.chat AND h.aspect = 'history'
    WHERE h.value IS NULL OR m.id IN (SELECT value FROM json_each(h.value))
        OR m.id > (SELECT coalesce(max(value), 0) FROM json_each(h.value)) ORDER BY m.chat, m.id;
CREATE VIEW IF NOT EXISTS spend AS SELECT owner, sum(micros) AS micros FROM charges GROUP BY owner;
"""
# A follower that lost its chat may still speak for a while: what was told later stays.
SET_LATEST = """
INSERT INTO latest VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE
SET session = excluded.session, position = excluded.position, value = excluded.value
WHERE (excluded.session, excluded.position) > (session, position)
"""
log = logging.getLogger("consumer")


def take(database: sqlite3.Connection, event: dict[str, Any]) -> None:
    """Set what the event says. Nothing is added up here: sums are views over rows that have a key."""
    chat, data, place = event["source"], event["data"], (event["session"], event["position"])
    match event["type"].removeprefix("io.chatrelay."):
        case "chat.message.v1":
            message = data["message"]
            database.execute("REPLACE INTO messages VALUES (?, ?, ?)", (chat, message["id"], json.dumps(message)))
        case "chat.history.replaced.v1":
            database.execute(SET_LATEST, (chat, "history", *place, json.dumps(data["message_ids"])))
        case "chat.status.v1":
            database.execute(SET_LATEST, (chat, "status", *place, data["status"]))
        case "usage.charged.v1":
            charge = (event["id"], event["ownerid"], data["cost_micros"])
            database.execute("INSERT OR IGNORE INTO charges VALUES (?, ?, ?)", charge)
        # Everything else is passed over: new types may come with any version.


async def consume(database: sqlite3.Connection, url: str) -> None:
    """Work off the queue until the connection is lost."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        queue = await channel.declare_queue(
            QUEUE, durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 20}
        )
        # As the relay declares it: whoever comes first makes it, and a consumer that was there first misses nothing.
        exchange = await channel.declare_exchange("coder.chats", aio_pika.ExchangeType.TOPIC, durable=True)
        for binding in BINDINGS:
            await queue.bind(exchange, binding)
        async with queue.iterator() as deliveries:
            log.info("consuming from %s", QUEUE)
            async for delivery in deliveries:
                with database:  # one transaction
                    take(database, json.loads(delivery.body))
                await delivery.ack()


async def consume_for_ever(database: sqlite3.Connection, url: str) -> None:
    """What was not acknowledged when a connection was lost comes again on the next one."""
    while True:
        try:
            await consume(database, url)
        except aio_pika.exceptions.CONNECTION_EXCEPTIONS as exc:
            log.warning("connection lost: %s", exc)
        await asyncio.sleep(1)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    transcripts = sqlite3.connect(sys.argv[1])
    transcripts.executescript(TABLES)
    asyncio.run(consume_for_ever(transcripts, os.environ["RABBIT_URL"]))
