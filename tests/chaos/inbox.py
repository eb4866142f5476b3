"""Somebody's queue, bound to everything, read whatever happens to the broker."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import aiormq
from aiormq.abc import AbstractChannel, DeliveredMessage

EXCHANGE = "coder.chats"
LOG = "relay.log"
QUEUE = "somebody.everything"
PERSISTENT = 2
END = "somebody.end.of._._"  # a letter to oneself: no stream says where its end is
LOST = (OSError, RuntimeError, asyncio.TimeoutError, asyncio.CancelledError, aiormq.AMQPError)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it came. `source` is the queue it came from, `at` a monotonic time."""

    key: str
    event: dict[str, Any]
    message_id: str
    persistent: bool
    source: str
    at: float


class Inbox:
    """All that came, in the order of its coming. What the broker delivered again is left out by its tag of delivery."""

    def __init__(self, rabbit: str, queue_type: str) -> None:
        self.deliveries: list[Delivery] = []
        self.reconnects = 0
        self._rabbit = rabbit
        self._type = queue_type

    @classmethod
    @asynccontextmanager
    async def open(cls, rabbit: str, queue_type: str) -> AsyncIterator[Self]:
        """Bound when the block begins, read until it ends."""
        inbox = cls(rabbit, queue_type)
        await inbox.bind()
        reader = asyncio.create_task(inbox._read_for_ever())
        try:
            yield inbox
            assert not reader.done(), reader.exception()
        finally:
            reader.cancel()
            await asyncio.wait([reader])

    async def _read_for_ever(self) -> None:
        while True:
            try:
                await self._read(QUEUE, {}, asyncio.Event())
            except LOST:
                if (task := asyncio.current_task()) is not None and task.cancelling():
                    raise
            self.reconnects += 1
            await asyncio.sleep(0.2)

    async def read_log(self) -> int:
        """Read the stream of the last days from its beginning to where it is now; how many are in it."""
        self.deliveries = [each for each in self.deliveries if each.source != LOG]
        before = len(self.deliveries)
        async with self._channel() as channel:
            await channel.basic_publish(b"", exchange=EXCHANGE, routing_key=END)
        await asyncio.wait_for(self._read(LOG, {"x-stream-offset": "first"}, asyncio.Event()), 60)
        return len(self.deliveries) - before

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[AbstractChannel]:
        connection = aiormq.Connection(self._rabbit)
        await connection.connect()
        try:
            yield await connection.channel()
        finally:
            with suppress(*LOST):
                await asyncio.wait_for(connection.close(), 5)

    async def _read(self, name: str, arguments: dict[str, Any], enough: asyncio.Event) -> None:
        """Until the connection is lost, or the letter to oneself comes out of the log."""
        async with self._channel() as channel:

            async def take(message: DeliveredMessage) -> None:
                key = str(message.routing_key)
                if key != END:
                    self._take(key, message, name)
                elif name == LOG:
                    enough.set()
                await channel.basic_ack(message.delivery_tag or 0)

            await channel.basic_qos(prefetch_count=500)
            await channel.basic_consume(name, take, arguments=arguments)
            waits = [asyncio.ensure_future(enough.wait()), asyncio.shield(channel.closing)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def _take(self, key: str, message: DeliveredMessage, source: str) -> None:
        properties = message.header.properties
        event = json.loads(message.body)
        persistent = properties.delivery_mode == PERSISTENT
        self.deliveries.append(Delivery(key, event, str(properties.message_id), persistent, source, time.monotonic()))

    # --- what an administrator does -----------------------------------------------------------------------------------

    async def bind(self) -> None:
        async with self._channel() as channel:
            await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            await channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": self._type})
            await channel.queue_bind(QUEUE, EXCHANGE, "#")

    async def unbind(self) -> None:
        async with self._channel() as channel:
            await channel.queue_unbind(QUEUE, EXCHANGE, "#")

    async def exists(self, queue: str) -> bool:
        async with self._channel() as channel:
            try:
                await channel.queue_declare(queue, passive=True)
            except aiormq.ChannelNotFoundEntity:
                return False
            return True

    async def delete(self, *queues: str) -> None:
        async with self._channel() as channel:
            for queue in queues:
                await channel.queue_delete(queue)
