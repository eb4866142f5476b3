"""A worker is killed; how long until its chats speak again, in a higher session, from another one."""

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from relay.adapters.topology import ARCHIVIST, METER
from relay.bench.children import Child, ChildFailed, child, feeder
from relay.bench.listener import listening
from relay.bench.places import Offered, Place, Vhost, own_database, own_vhost, worker_environment
from relay.bench.whole_path import followed

Say = Callable[[str], None]

_NAMES = ("bench-a", "bench-b")
_FRAMES_PER_SECOND = 4.0  # of each chat: how finely the moment is seen
_PATIENCE_SECONDS = 90.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class FailoverOptions:
    chats: int = 40
    rounds: int = 3
    settings: Mapping[str, str] = field(default_factory=dict)  # of both workers, RELAY_ names without that prefix


class _World(NamedTuple):
    place: Place
    vhost: Vhost
    server: Child


@dataclass(slots=True)
class _Heard:
    """The highest session of each chat, and when its first event came."""

    sessions: dict[str, int] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)

    def take(self, body: bytes, at: int) -> None:
        event = json.loads(body)
        chat, session = event["subject"], event["session"]
        if session > self.sessions.get(chat, 0):
            self.sessions[chat] = session
            self.since[chat] = at / 1e9


async def measure_failover(offered: Offered, options: FailoverOptions, say: Say) -> list[dict[str, object]]:
    """One row for each kill. The database must be one that two processes can use."""
    heard = _Heard()
    async with (
        own_vhost(offered) as vhost,
        own_database(offered) as place,
        feeder(chats=options.chats, running=options.chats) as server,
        listening(vhost.url, heard.take),
        AsyncExitStack() as stack,
    ):
        world = _World(place, vhost, server)
        workers = {name: await _started(stack, name, world, options) for name in _NAMES}
        await followed(server, options.chats, workers[_NAMES[0]])
        await stack.enter_async_context(vhost.kept_empty(METER, ARCHIVIST))
        await server.ask("feed", rate=_FRAMES_PER_SECOND)
        rows = []
        for number in range(options.rounds):
            await _all_heard(heard, options.chats)
            held = await _held(place)
            victim = max(held, key=lambda name: len(held[name]))
            say(f"failover: round {number + 1}, killing {victim}, which holds {len(held[victim])} chats")
            rows.append({"round": number + 1, **await _kill(workers[victim], held[victim], heard)})
            workers[victim] = await _started(stack, victim, world, options)
        return rows


async def _started(stack: AsyncExitStack, name: str, world: _World, options: FailoverOptions) -> Child:
    environment = worker_environment(
        world.place,
        world.vhost.url,
        world.server.hello["url"],
        WORKER__NAME=name,
        WORKER__MAX_STREAMS=str(options.chats + 10),
        **options.settings,
    )
    return await stack.enter_async_context(child("relay.bench.worker", environment=environment))


async def _all_heard(heard: _Heard, chats: int) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while len(heard.sessions) < chats:
        if time.monotonic() > deadline:
            raise ChildFailed(f"{len(heard.sessions)} of {chats} chats were heard of in {_PATIENCE_SECONDS:g} s")
        await asyncio.sleep(_LOOK_SECONDS)


async def _held(place: Place) -> dict[str, list[str]]:
    """Chats by the worker that holds their claim."""
    connection = await asyncpg.connect(urlunsplit(urlsplit(place.url)._replace(scheme="postgresql")))
    try:
        rows = await connection.fetch("SELECT worker, chat_id FROM claims WHERE worker IS NOT NULL")
    finally:
        await connection.close()
    # A worker's id begins with its name.
    return {name: [str(row["chat_id"]) for row in rows if row["worker"].startswith(name)] for name in _NAMES}


async def _kill(victim: Child, held: list[str], heard: _Heard) -> dict[str, object]:
    before = {chat: heard.sessions[chat] for chat in held}
    await victim.kill()
    killed = time.monotonic()
    while waiting := [chat for chat in held if heard.sessions[chat] <= before[chat]]:
        if time.monotonic() > killed + _PATIENCE_SECONDS:
            raise ChildFailed(f"{len(waiting)} chats said nothing for {_PATIENCE_SECONDS:g} s after the kill")
        await asyncio.sleep(_LOOK_SECONDS)
    delays = [heard.since[chat] - killed for chat in held]
    return {
        "chats": len(held),
        "first_seconds": round(min(delays), 2),
        "median_seconds": round(statistics.median(delays), 2),
        "last_seconds": round(max(delays), 2),
    }
