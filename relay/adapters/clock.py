"""The time of the machine."""

import asyncio
import time
from datetime import UTC, datetime


class SystemClock:
    """`Clock` of every process; tests and replays bring their own."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
