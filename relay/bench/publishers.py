"""The publishers that are compared, each in a process of its own (`python -m relay.bench.publishers NAME URL QUEUE`).

All publish the same persistent messages into the same quorum queue, mandatory and confirmed, with as many unconfirmed
as they like best.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

from pydantic import AmqpDsn

from relay.adapters.logs import LogSettings, configure_logs
from relay.bench.children import say
from relay.bench.raw_publisher import RawPublisher
from relay.bench.samples import Sample, samples
from relay.core.events import APP_ID, CONTENT_TYPE

POOL = 5_000  # different messages; more than ever are in flight
_TASKS = 256  # of those that publish one message at a time
_SENDERS, _AT_ONCE = 8, 128  # of ours, which takes several
_RAW_WINDOW = 2048

Send = Callable[[Iterator[Sample]], Awaitable[int]]
Opened = AbstractAsyncContextManager[Send]


@asynccontextmanager
async def _ours(url: str, queue: str, kind: str) -> AsyncIterator[list[Send]]:
    from relay.adapters.rabbit import RabbitSettings, open_rabbit  # noqa: PLC0415
    from relay.adapters.rabbit_outgoing import Outgoing  # noqa: PLC0415

    settings = RabbitSettings.model_validate({"url": AmqpDsn(url), "publisher": kind})
    async with open_rabbit(settings) as bus:

        async def send(messages: Iterator[Sample]) -> int:
            batch = [
                Outgoing(each.id, each.family, "", queue, each.body, each.type, each.timestamp)
                for each in itertools.islice(messages, _AT_ONCE)
            ]
            await bus.publisher.send(batch)
            return len(batch)

        yield [send] * _SENDERS


@asynccontextmanager
async def _aio_pika(url: str, queue: str) -> AsyncIterator[list[Send]]:
    import aio_pika  # noqa: PLC0415

    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchange = channel.default_exchange

        async def send(messages: Iterator[Sample]) -> int:
            each = next(messages)
            message = aio_pika.Message(
                each.body,
                content_type=CONTENT_TYPE,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                message_id=each.id,
                timestamp=each.moment,
                type=each.type,
                app_id=APP_ID,
            )
            await exchange.publish(message, queue, mandatory=True)
            return 1

        yield [send] * _TASKS


@asynccontextmanager
async def _faststream(url: str, queue: str) -> AsyncIterator[list[Send]]:
    from faststream.rabbit import Channel, RabbitBroker  # noqa: PLC0415

    confirming = Channel(publisher_confirms=True, on_return_raises=True)
    async with RabbitBroker(url, default_channel=confirming, app_id=APP_ID, logger=None) as broker:
        publisher = broker.publisher(routing_key=queue, persist=True, mandatory=True)
        await broker.start()

        async def send(messages: Iterator[Sample]) -> int:
            each = next(messages)
            await publisher.publish(
                each.body,
                content_type=CONTENT_TYPE,
                message_id=each.id,
                timestamp=each.moment,
                message_type=each.type,
            )
            return 1

        yield [send] * _TASKS


PUBLISHERS: dict[str, Callable[[str, str], AbstractAsyncContextManager[list[Send]]]] = {
    "pipelined": lambda url, queue: _ours(url, queue, "pipelined"),
    "plain": lambda url, queue: _ours(url, queue, "plain"),
    "aio-pika": _aio_pika,
    "faststream": _faststream,
}
RAW = "raw"


class _Round:
    """Messages for so many seconds, from many tasks at once."""

    def __init__(self, pool: Sequence[Sample]) -> None:
        self._messages = itertools.cycle(pool)

    async def publish(self, sends: Sequence[Send], seconds: float) -> int:
        until = time.monotonic() + seconds

        async def go_on(send: Send) -> int:
            confirmed = 0
            while time.monotonic() < until:
                confirmed += await send(self._messages)
            return confirmed

        return sum(await asyncio.gather(*(go_on(send) for send in sends)))


async def _serve_library(name: str, url: str, queue: str) -> None:
    pool = samples(POOL)
    async with PUBLISHERS[name](url, queue) as sends:
        rounds = _Round(pool)
        say({"ready": name})
        while line := await asyncio.to_thread(sys.stdin.readline):
            seconds = float(json.loads(line)[1]["seconds"])
            started, before = time.monotonic(), _cpu()
            confirmed = await rounds.publish(sends, seconds)
            say(_result(confirmed, 0, started, before))


def _serve_raw(url: str, queue: str) -> None:
    publisher = RawPublisher(url, queue, samples(POOL), _RAW_WINDOW)
    say({"ready": RAW})
    for line in sys.stdin:
        seconds = float(json.loads(line)[1]["seconds"])
        started, before = time.monotonic(), _cpu()
        confirmed, refused = publisher.publish(seconds)
        say(_result(confirmed, refused, started, before))
    publisher.close()


def _result(confirmed: int, refused: int, started: float, before: float) -> dict[str, object]:
    return {
        "confirmed": confirmed,
        "refused": refused,
        "seconds": time.monotonic() - started,
        "cpu": _cpu() - before,
    }


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


def _main(name: str, url: str, queue: str) -> None:
    configure_logs(LogSettings(level="error"))
    if name == RAW:
        _serve_raw(url, queue)
    else:
        asyncio.run(_serve_library(name, url, queue))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _main(*sys.argv[1:])
