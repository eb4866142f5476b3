"""Somebody else's consumer: a queue bound to everything, and a fold written from the contract alone."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

Envelope = dict[str, Any]


@dataclass
class Consumer:
    """All that came, copies left out by `id`. Where a fact came twice, the later `(session, position)` counts."""

    events: dict[str, Envelope] = field(default_factory=dict)
    copied: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # ids that came again, and where
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, key: str, body: bytes) -> None:
        event = {**json.loads(body), "key": key}
        earlier = self.events.get(event["id"])
        if earlier is not None:
            self.copied.setdefault(event["id"], [place(earlier)]).append(place(event))
            if place(earlier) >= place(event):
                return
        self.events[event["id"]] = event
        self.changed.set()

    def of(self, chat: str) -> list[Envelope]:
        """The chat's own events in the order in which they were told."""
        mine = [e for e in self.events.values() if e["key"].startswith("chat.") and e["subject"] == chat]
        return sorted(mine, key=place)

    def named(self, prefix: str) -> list[Envelope]:
        """Events whose routing key begins so."""
        return [event for event in self.events.values() if event["key"].startswith(prefix)]

    def chats(self) -> set[str]:
        return {event["subject"] for event in self.named("chat.")}


def place(event: Envelope) -> tuple[int, int]:
    return event["session"], event["position"]


def fold(events: Iterable[Envelope]) -> dict[int, Any]:
    """The history that a chat's events say, by message id."""
    messages: dict[int, Any] = {}
    removed: set[int] = set()
    for event in events:
        match event["key"].split(".")[:2]:
            case ["chat", "message"]:
                messages[event["data"]["message"]["id"]] = event["data"]["message"]
            case ["chat", "history"]:
                ids = set(event["data"]["message_ids"])
                # Whoever orders by place sees a message after the statement that removed it only as a late copy.
                removed |= set(range(1, max(ids, default=0) + 1)) - ids
    return {key: messages[key] for key in sorted(messages.keys() - removed)}


def last(events: Iterable[Envelope], kind: str) -> Any:
    """The data of the last event of a kind, None when there is none."""
    found = [event["data"] for event in events if event["key"].startswith(kind)]
    return found[-1] if found else None


def turns(events: Iterable[Envelope]) -> dict[int, list[str]]:
    """Outcomes told, by user message."""
    told: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if event["key"].startswith("chat.turn."):
            told[event["data"]["message_ids"][0]].append(event["data"]["outcome"])
    return told


@asynccontextmanager
async def bound_to_everything(rabbit: str) -> AsyncIterator[Consumer]:
    """A consumer whose queue is bound to `#` before anything is published."""
    consumer = Consumer()
    connection = await aio_pika.connect(rabbit)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=2000)
        exchange = await channel.declare_exchange("coder.chats", aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue("test.everything", durable=True, arguments={"x-queue-type": "classic"})
        await queue.bind(exchange, "#")

        async def take(message: AbstractIncomingMessage) -> None:
            consumer.take(str(message.routing_key), message.body)
            await message.ack()

        await queue.consume(take)
        yield consumer
