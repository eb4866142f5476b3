"""A consumer that knows only the contract: what arrives on a queue of its own, and when."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from relay.core.events import EXCHANGE

QUEUE = "relay.bench.listener"


@asynccontextmanager
async def listening(url: str, take: Callable[[bytes, int], None]) -> AsyncIterator[None]:
    """Hand every `chat.message` event to `take` while the block runs: its body, and the monotonic nanoseconds of now.

    The queue is a quorum queue, so that a message arrives when the broker has it for good.
    """
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
        queue = await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        await queue.bind(exchange, "chat.message.#")

        async def arrived(message: AbstractIncomingMessage) -> None:
            take(message.body, time.monotonic_ns())

        tag = await queue.consume(arrived, no_ack=True)
        yield
        await queue.cancel(tag)
        await asyncio.sleep(0)
