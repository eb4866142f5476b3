"""Nothing but websockets: the yardstick for what a followed chat keeps in memory.

A process of its own (`python -m relay.bench.idle_websockets URL CHATS`): it opens a feeder's streams as the relay's
adapter does, reads what comes, and waits.
"""

import asyncio
import sys

from websockets.asyncio.client import connect

from relay.bench.children import allow_many_files, serve
from relay.bench.talk import CHATS_PATH, chat_id
from relay.bench.worker import memory

_DIALS_AT_ONCE = 50


async def _main(url: str, chats: int) -> None:
    allow_many_files()
    dialing = asyncio.Semaphore(_DIALS_AT_ONCE)
    place = f"ws{url.removeprefix('http')}{CHATS_PATH}"

    async def listen(number: int) -> None:
        async with dialing:
            connection = await connect(f"{place}/{chat_id(number)}/stream", compression=None, max_queue=4)
        async for _ in connection:
            pass

    tasks: list[asyncio.Task[None]] = []

    def dial() -> dict[str, object]:
        tasks.extend(asyncio.create_task(listen(number)) for number in range(chats))
        return {}

    await serve({"memory": memory, "dial": dial}, hello={})
    for task in tasks:
        task.cancel()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))
