"""Copies of finished chats: written, read back, verified, told; and only then archived in Coder, wherever it dies."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
import zstandard

from relay.adapters.archive import ArchiveSettings, open_objects
from relay.adapters.clock import SystemClock
from relay.ports import ObjectStore
from relay.programs.archivist import Archivist, ArchivistSettings
from tests.programs.world import DEADLINE_SECONDS, World, counted, until, while_running

TALK = "[tool n=10 ms=30] say something"


def archivist(world: World, *, in_coder: bool = True, patience: int = 3, **ports: Any) -> Archivist:
    settings = ArchivistSettings(
        idle_seconds=0.05, look_seconds=0.05, archive_in_coder=in_coder, prefetch=10, patience=patience
    )
    given: dict[str, Any] = {
        "bus": world.bus,
        "archives": world.store,
        "objects": objects_of(world),
        "upstream": world.upstream,
    }
    return Archivist(clock=SystemClock(), settings=settings, **{**given, **ports})


def objects_of(world: World) -> ObjectStore:
    return cast(ObjectStore, open_objects(ArchiveSettings(url=f"file://{world.directory}/archive")))


@asynccontextmanager
async def collecting(world: World) -> AsyncIterator[None]:
    """Take in what is published; archive nothing."""
    async with while_running(archivist(world)._inbox.work_off(world.store.collect, lambda ok, reason: None)):
        yield


async def finished_chat(world: World, chat: UUID | None = None) -> UUID:
    """A chat whose end is published and collected."""
    if chat is None:
        chat = await world.owner.create(TALK)
    else:
        await world.owner.send(chat, TALK)
    async with world.worker() as (worker, _), collecting(world):
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        await until(lambda: world.bus._queues["relay.archivist"].consumers)
        queue = world.bus._queues["relay.archivist"]
        await until(lambda: not queue and not any(len(consumer.unended) for consumer in queue.consumers))
        assert worker.discovery.state.sweeps
    return chat


def told(world: World, event: str) -> list[Any]:
    """Data of the archivist's events of a kind, copies left out."""
    mine = [e for e in world.bus.published if (e.family, e.event) == ("archive", event)]
    return list({e.id: cast(Any, e.data) for e in mine}.values())


def in_coder(world: World, chat: UUID) -> bool:
    return world.simulator.database.chats[chat].archived


async def truth(world: World, chat: UUID) -> list[Any]:
    page = await world.upstream.messages(chat, down_to=0)
    return sorted(page.messages, key=lambda message: cast(int, message["id"]))


def copy_at(url: str, sha256: str) -> list[Any]:
    """The messages of a copy, its sha256 checked."""
    body = Path(url.removeprefix("file://")).read_bytes()
    assert hashlib.sha256(body).hexdigest() == sha256
    return [json.loads(line) for line in zstandard.ZstdDecompressor().decompressobj().decompress(body).splitlines()]


async def look_until(world: World, fact: Any, **ports: Any) -> None:
    """Let an archivist work until the fact holds."""
    async with while_running(archivist(world, **ports).run()):
        await until(fact)


async def test_a_finished_chat_is_stored_verified_told_and_archived_in_coder(world: World) -> None:
    chat = await finished_chat(world)
    await look_until(world, lambda: told(world, "sealed"))
    (stored,) = told(world, "stored")
    assert copy_at(stored["url"], stored["sha256"]) == await truth(world, chat)
    manifest = json.loads((Path(stored["url"].removeprefix("file://")).parent / "manifest.json").read_text())
    assert manifest["transcript"]["sha256"] == stored["sha256"]
    assert manifest["chat_id"] == str(chat)
    assert in_coder(world, chat)


async def test_nothing_is_archived_in_coder_unless_asked(world: World) -> None:
    chat = await finished_chat(world)
    await look_until(world, lambda: told(world, "stored"), in_coder=False)
    assert not in_coder(world, chat)
    assert told(world, "sealed") == []


class Killed(BaseException):
    """The process dies here."""


class Fuse:
    """Counts the calls to all ports of a program; at the nth, before or after its effect, the process dies."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at, self.after = at, after
        self.calls: list[str] = []

    def port(self, port: Any) -> Any:
        return _Port(port, self)

    async def burn(self, name: str, method: Any, *arguments: Any, **named: Any) -> Any:
        self.calls.append(name)
        dies = len(self.calls) == self.at
        if dies and not self.after:
            raise Killed
        result = await method(*arguments, **named)
        if dies:
            raise Killed
        return result


class _Port:
    def __init__(self, port: Any, fuse: Fuse) -> None:
        self._port, self._fuse = port, fuse

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._port, name)
        if not callable(value):
            return value
        return lambda *arguments, **named: self._fuse.burn(name, value, *arguments, **named)


@pytest.mark.parametrize(
    "after",
    [pytest.param(False, id="before its effect", marks=pytest.mark.long), pytest.param(True, id="after its effect")],
)
async def test_it_may_die_at_any_call(world: World, *, after: bool) -> None:
    chat, steps = await finished_chat(world), list[str]()
    while True:
        await until_due(world)
        fuse = Fuse(len(steps) + 1, after=after)
        ports = {
            "bus": fuse.port(world.bus),
            "archives": fuse.port(world.store),
            "objects": fuse.port(objects_of(world)),
            "upstream": fuse.port(world.upstream),
        }
        try:
            await archivist(world, **ports).look()
        except Killed:
            steps.append(fuse.calls[-1])
        else:
            break
        if in_coder(world, chat):  # then there is a copy, it is whole, and consumers heard of it
            newest = told(world, "stored")[-1]
            assert copy_at(newest["url"], newest["sha256"]) == await truth(world, chat)
        await look_until(
            world, lambda: len(told(world, "sealed")) == len(steps)
        )  # started anew, it ends what was begun
        await archivist(world).look()  # the last mark comes after the last word
        assert in_coder(world, chat)
        record = (await world.store.archives())[-1]
        assert (record.version, record.published, record.sealed) == (len(steps), True, True)
        assert copy_at(record.url, record.sha256) == await truth(world, chat)
        assert len(told(world, "stored")) == record.version
        # The chat goes on, so that there is something to archive again.
        await world.owner._call("PATCH", f"/{chat}", {"archived": False})
        await finished_chat(world, chat)
    assert {"put", "get", "publish", "add_archive", "mark_archive", "archive_chat", "messages"} <= set(steps)


async def until_due(world: World) -> None:
    """Wait until some chat has been quiet for long enough."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    async with collecting(world):
        while not await world.store.due(idle_since=SystemClock().now() - timedelta(seconds=0.05)):
            assert time.monotonic() < deadline, world.rows("SELECT * FROM collected_chats")
            await asyncio.sleep(0.02)


class Damaging:
    """An object store that gives back something else than it was given, until told otherwise."""

    def __init__(self, objects: ObjectStore, how: str) -> None:
        self._objects, self._how, self.sick = objects, how, True

    url = property(lambda self: self._objects.url)

    async def put(self, path: str, body: bytes) -> None:
        await self._objects.put(path, body)

    async def get(self, path: str) -> bytes:
        body = await self._objects.get(path)
        if not self.sick:
            return body
        return {"cut": body[:-1], "flipped": bytes([body[0] ^ 1]) + body[1:], "empty": b""}[self._how]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
async def test_a_damaged_copy_is_told_and_nothing_is_archived_in_coder(world: World, how: str) -> None:
    before = counted("relay_archive_objects_total", outcome="failed")
    chat = await finished_chat(world)
    objects = Damaging(objects_of(world), how)
    async with while_running(archivist(world, objects=objects).run()):
        await until(lambda: told(world, "failed"))
        await until(lambda: counted("relay_archive_objects_total", outcome="failed") >= before + 2)  # it tries again
        assert not in_coder(world, chat)
        assert told(world, "stored") == []
        assert "sha256" in told(world, "failed")[0]["reason"]
        objects.sick = False
        await until(lambda: in_coder(world, chat))
    (stored,) = told(world, "stored")
    assert copy_at(stored["url"], stored["sha256"]) == await truth(world, chat)


async def test_a_copy_that_vanished_before_it_was_read_back_is_written_again(world: World) -> None:
    chat = await finished_chat(world)

    class Forgetting(Damaging):
        async def get(self, path: str) -> bytes:
            if self.sick:
                self.sick = False
                raise FileNotFoundError(path)
            return await super().get(path)

    await look_until(world, lambda: in_coder(world, chat), objects=Forgetting(objects_of(world), "cut"))
    assert len(told(world, "stored")) == 1


async def test_a_chat_that_goes_on_gets_another_version(world: World) -> None:
    chat = await finished_chat(world)
    await look_until(world, lambda: told(world, "stored"), in_coder=False)
    await finished_chat(world, chat)
    await look_until(world, lambda: len(told(world, "stored")) == 2, in_coder=False)
    first, second = told(world, "stored")
    assert [first["url"].split("/")[-2], second["url"].split("/")[-2]] == ["v0001", "v0002"]
    assert copy_at(second["url"], second["sha256"]) == await truth(world, chat)
    assert copy_at(first["url"], first["sha256"]) == (await truth(world, chat))[: first["messages"]]
    await archivist(world, in_coder=False).look()
    assert len(told(world, "stored")) == 2  # without news there is no third


async def test_what_the_events_lack_is_waited_for_and_then_taken_from_coder(world: World) -> None:
    before = counted("relay_archive_differences_total")
    chat = await finished_chat(world)
    await world.owner.send(chat, TALK)  # nobody publishes this
    await world.owner.wait_idle(chat)
    patient = archivist(world, in_coder=False)
    read = counted("relay_source_http_requests_total", endpoint="messages", code="2xx")
    looks = 0
    while not told(world, "stored"):
        await patient.look()
        looks += 1
    (stored,) = told(world, "stored")
    # Coder was asked as often as the patience says, with a pause each time, whatever the number of looks.
    assert counted("relay_source_http_requests_total", endpoint="messages", code="2xx") == read + 3 < read + looks
    assert copy_at(stored["url"], stored["sha256"]) == await truth(world, chat)
    assert counted("relay_archive_differences_total") == before + 1


async def test_a_chat_that_is_gone_does_not_keep_the_others_waiting(world: World) -> None:
    gone, kept = await finished_chat(world), await finished_chat(world)
    world.simulator.faults.add("answer", status=404, path=f"*/{gone}*")
    await look_until(world, lambda: in_coder(world, kept))
    assert [stored["url"].split("/")[-3] for stored in told(world, "stored")] == [str(kept)]


async def test_a_chat_that_is_gone_is_asked_for_once_and_no_longer_due(world: World) -> None:
    chat = await finished_chat(world)
    world.simulator.faults.add("answer", status=404, path=f"*/{chat}*")
    stubborn = archivist(world)
    await until_due(world)
    await stubborn.look()
    asked = world.simulator.fired("answer")
    assert asked > 0
    for _ in range(5):
        await asyncio.sleep(0.06)  # longer than others are set aside for
        await stubborn.look()
    assert world.simulator.fired("answer") == asked
    assert counted("relay_archive_due_chats") == 0


async def test_a_copy_that_has_more_than_the_events_is_archived_in_coder_too(world: World) -> None:
    chat = await finished_chat(world)
    await world.owner.send(chat, TALK)  # nobody publishes this
    await world.owner.wait_idle(chat)
    await look_until(world, lambda: told(world, "sealed"))
    assert in_coder(world, chat)
    (stored,) = told(world, "stored")
    assert copy_at(stored["url"], stored["sha256"]) == await truth(world, chat)


async def test_of_many_chats_that_wait_one_at_a_time_is_read(world: World) -> None:
    for _ in range(3):
        await finished_chat(world)
    await until_due(world)
    order: list[str] = []

    class Watched:
        """The store, and the order in which chats are read and archived."""

        def __getattr__(self, name: str) -> Any:
            if name in ("collected", "add_archive"):
                order.append(name)
            return getattr(world.store, name)

    await archivist(world, in_coder=False, archives=Watched()).look()
    assert order == ["collected", "add_archive"] * 3


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_a_server_that_refuses_for_a_while(world: World, status: int) -> None:
    chat = await finished_chat(world)
    world.simulator.faults.add("answer", status=status, path="/api/*", times=2)
    await look_until(world, lambda: in_coder(world, chat))
    assert world.simulator.fired("answer") > 0


async def test_broker_and_database_away_for_a_while(world: World) -> None:
    chat = await finished_chat(world)
    async with while_running(archivist(world).run()):
        world.bus.down = True
        await until(lambda: list((world.directory / "archive").rglob("*.zst")))
        assert not in_coder(world, chat)  # not told, so not archived there
        async with world.database_away():
            world.bus.down = False
        await until(lambda: told(world, "sealed"))
    assert in_coder(world, chat)
    assert len(told(world, "stored")) == len(told(world, "sealed")) == 1
