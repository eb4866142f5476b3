"""A meter that is killed between the effect of its n-th event and the acknowledgement. Run by `test_redelivery.py`."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count

from relay.adapters.clock import SystemClock
from relay.adapters.database import DatabaseSettings
from relay.adapters.rabbit import RabbitBus, RabbitSettings, open_rabbit
from relay.adapters.store import open_store
from relay.core.usage import Period
from relay.ports import Delivery
from relay.programs.meter import Meter, MeterSettings, PolicySettings
from relay.programs.prices import PriceSettings

MODEL = "00000000-0000-0000-0000-00000000004d"
SETTINGS = MeterSettings(
    prices={MODEL: PriceSettings(input=Decimal(1), output=Decimal(2))},
    policies=[PolicySettings(name="daily", period=Period.DAY, limit_micros=10_000)],
    prefetch=5,
)


class Fatal:
    """A delivery whose acknowledgement is the end of the process: SIGKILL, before a byte of it was sent."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self.body, self.routing_key, self.redelivered = delivery.body, delivery.routing_key, delivery.redelivered
        self.requeue, self.dead_letter = delivery.requeue, delivery.dead_letter

    async def ack(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.Event().wait()


class FatalBus:
    """A broker whose n-th delivery is `Fatal`."""

    def __init__(self, bus: RabbitBus, number: int) -> None:
        self._bus = bus
        self._number = number
        self.publish = bus.publish

    @asynccontextmanager
    async def deliveries(self, queue: str, *, prefetch: int) -> AsyncIterator[AsyncIterator[Delivery]]:
        async with self._bus.deliveries(queue, prefetch=prefetch) as deliveries:

            async def until_the_last() -> AsyncIterator[Delivery]:
                numbers = count(1)
                async for delivery in deliveries:
                    yield Fatal(delivery) if next(numbers) == self._number else delivery

            yield until_the_last()


async def work(rabbit: str, database: str, number: int) -> None:
    clock = SystemClock()
    async with (
        open_store(DatabaseSettings(url=database), clock) as store,
        open_rabbit(RabbitSettings.model_validate({"url": rabbit})) as bus,
    ):
        fatal = FatalBus(bus, number)
        meter = Meter(bus=fatal, charges=store, upstream=None, clock=clock, settings=SETTINGS)  # type: ignore[arg-type]
        await meter.run()


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1], sys.argv[2], int(sys.argv[3])))
