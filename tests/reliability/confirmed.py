"""A broker that takes its time for a confirm, as brokers do, and knows how much is on its way."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from relay.adapters.memory import MemoryBus
from relay.core.events import Event


class SlowBus:
    """`MemoryBus` with a way to it and back: an event may be stored and its confirm never arrive."""

    def __init__(self, bus: MemoryBus, chance: random.Random, *, seconds: float = 0.01) -> None:
        self._bus = bus
        self._chance = chance
        self._seconds = seconds
        self.on_their_way = 0  # calls that were not answered
        self.unconfirmed = 0  # of them those that have stored a message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    async def publish(self, events: Sequence[Event]) -> None:
        stored = False
        self.on_their_way += 1
        try:
            await asyncio.sleep(self._chance.uniform(0, self._seconds))
            await self._bus.publish(events)
            stored = any(event.event == "message" for event in events)
            self.unconfirmed += stored
            await asyncio.sleep(self._chance.uniform(0, self._seconds))
        finally:
            self.on_their_way -= 1
            self.unconfirmed -= stored
