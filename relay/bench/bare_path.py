"""Nothing but the libraries: the yardstick for what the whole path costs a worker.

A process of its own (`python -m relay.bench.bare_path CHATS`, in a worker's environment): it opens a feeder's streams,
reads each frame as JSON, writes what is in it as JSON, and publishes that through the same publisher into the same
topology. It knows of no chat, no id that it saw before and no resume point.
"""

import asyncio
import sys
from typing import Any

import msgspec
from websockets.asyncio.client import ClientConnection, connect

from relay.adapters.logs import configure_logs
from relay.adapters.rabbit import RabbitBus, open_rabbit
from relay.adapters.rabbit_outgoing import Outgoing
from relay.bench.children import allow_many_files, serve
from relay.bench.talk import CHATS_PATH, OWNER, chat_id
from relay.bench.worker import counted, memory
from relay.core.events import EXCHANGE
from relay.settings import read_settings

_FRAMES_AHEAD = 512  # of one chat, as a follower has them
_AT_ONCE = 256


async def _main(chats: int) -> None:
    settings = read_settings()
    configure_logs(settings.log)
    allow_many_files()
    if settings.rabbit is None or settings.coder is None:
        raise SystemExit("bare_path needs RELAY_RABBIT__URL and RELAY_CODER__URL")
    place = f"ws{settings.coder.url.removeprefix('http').rstrip('/')}{CHATS_PATH}"
    async with open_rabbit(settings.rabbit) as bus:

        async def one(number: int) -> None:
            chat = chat_id(number)
            connection = await connect(f"{place}/{chat}/stream", compression=None, max_queue=4)
            await _Chat(f"chat.message.assistant.{OWNER}.{chat}", connection, bus).relay()

        tasks = [asyncio.create_task(one(number)) for number in range(chats)]
        await serve({"memory": memory, "counted": counted}, hello={})
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class _Chat:
    def __init__(self, routing_key: str, connection: ClientConnection, bus: RabbitBus) -> None:
        self._routing_key = routing_key
        self._connection = connection
        self._bus = bus
        self._waiting: asyncio.Queue[str] = asyncio.Queue(_FRAMES_AHEAD)

    async def relay(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._publish())

    async def _read(self) -> None:
        async for frame in self._connection:
            await self._waiting.put(str(frame))

    async def _publish(self) -> None:
        number = 0
        while True:
            frames = [await self._waiting.get()]
            while len(frames) < _AT_ONCE and not self._waiting.empty():
                frames.append(self._waiting.get_nowait())
            messages = []
            for frame in frames:
                for event in _events(frame):
                    number += 1
                    body = msgspec.json.encode(event)
                    name = f"{self._routing_key[-36:]}-{number}"
                    messages.append(Outgoing(name, event["type"], EXCHANGE, self._routing_key, body, "bare", 0))
            if messages:
                await self._bus.publisher.send(messages)


def _events(frame: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] | None = msgspec.json.decode(frame)["data"]
    return found or []  # a hello has none


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
