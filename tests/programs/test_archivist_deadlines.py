"""Chats that Coder archives, and deletes, by itself: copied in time, told when that is in danger; and what has to wait
before it is archived in Coder."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID, uuid5

import pytest
from structlog.testing import capture_logs

from relay.adapters.clock import SystemClock
from relay.adapters.memory import ManualClock
from relay.core.errors import ChatRefused, Unauthorized, Unavailable
from relay.core.events import ChatRef, Data, Event, Origin
from relay.ports import ArchiveRecord, Retention, Upstream
from relay.programs.archivist import Archivist, ArchivistSettings
from relay.programs.deadlines import ENDANGERED
from tests.programs.test_archivist import (
    collecting,
    copy_at,
    finished_chat,
    in_coder,
    look_until,
    objects_of,
    told,
    truth,
)
from tests.programs.world import OtherServer, World, counted, until

LATE = 10_000  # a session after all that followers tell
KEPT_A_DAY = Retention(archived_chats_days=1, auto_archive_days=0)  # every archived chat is near its end
KEPT_A_MONTH = Retention(archived_chats_days=30, auto_archive_days=0)


def later() -> ManualClock:
    """A clock by which everything has been quiet for an hour, and that goes on when it is told to."""
    return ManualClock(SystemClock().now() + timedelta(hours=1))


def archivist(world: World, server: Any, *, seal: bool = False, clock: ManualClock | None = None) -> Archivist:
    settings = ArchivistSettings(idle_seconds=300, archive_in_coder=seal, retention_seconds=10_000)
    return Archivist(
        bus=world.bus,
        archives=world.store,
        objects=objects_of(world),
        upstream=cast(Upstream, server),
        clock=clock or later(),
        settings=settings,
    )


def keeping(world: World, retention: Retention | Exception) -> OtherServer:
    server = OtherServer(world.upstream)
    server.kept = retention
    return server


async def tell(world: World, chat: UUID | ChatRef, event: str, detail: str, data: dict[str, object]) -> None:
    """Let the archivist know something, after all that it knows."""
    ref = chat if isinstance(chat, ChatRef) else await world.ref(chat)
    position = len(world.rows("SELECT * FROM collected_chats")) + 1
    number = uuid5(ref.chat_id, f"{event}{detail}")
    stamp = "2026-03-01T12:00:00Z"
    await world.store.collect(
        Event(str(number), "chat", event, detail, ref, cast(Data, data), stamp, Origin.LIVE, LATE, position)
    )


async def archived_upstream(world: World, chat: UUID | ChatRef, at: datetime | None = None) -> None:
    row = {"archived": True, "updated_at": (at or datetime.now(UTC)).isoformat()}
    await tell(world, chat, "lifecycle", "archived", {"chat": row, "changed": ["archived"]})


def stored_chats(world: World) -> list[str]:
    return [data["url"].split("/")[-3] for data in told(world, "stored")]


def named(logs: Sequence[Any], event: str) -> list[Any]:
    return [line for line in logs if line["event"] == event]


async def test_a_chat_that_the_server_archived_by_itself_gets_its_copy(world: World) -> None:
    chat = await world.owner.create("[tool n=10 ms=30] say something")
    async with world.worker(archived_sweep_every=1), collecting(world):
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        await world.owner._call("PATCH", f"/{chat}", {"archived": True})
        await until(lambda: world.rows("SELECT * FROM collected_chats WHERE archived_at IS NOT NULL"))
    await look_until(world, lambda: told(world, "sealed"))
    (stored,) = told(world, "stored")
    assert copy_at(stored["url"], stored["sha256"]) == await truth(world, chat)


@pytest.mark.parametrize(
    ("retention", "endangered"),
    [
        pytest.param(KEPT_A_DAY, True, id="a day"),
        pytest.param(Retention(6, 90), True, id="six days"),
        pytest.param(Retention(8, 90), False, id="eight days"),
        pytest.param(Retention(0, 0), False, id="for ever"),
        pytest.param(Retention(), False, id="a server that deletes nothing"),
    ],
)
async def test_what_is_soon_deleted_is_counted_named_and_copied_first(
    world: World, retention: Retention, endangered: bool
) -> None:
    first, second = await finished_chat(world), await finished_chat(world)
    await archived_upstream(world, second)
    seen: list[float] = []

    class Counting(OtherServer):
        async def chat(self, chat_id: UUID) -> Any:
            seen.append(ENDANGERED._value.get())
            return await world.upstream.chat(chat_id)

    server = Counting(world.upstream)
    server.kept = retention
    one = archivist(world, server)
    with capture_logs() as logs:
        await one.look()
        await one.look()
    order = [str(second), str(first)] if endangered else [str(first), str(second)]
    assert stored_chats(world) == order
    assert seen == ([1, 0] if endangered else [0, 0])
    lines = named(logs, "archived_chats_endangered")
    assert [line["chat_ids"] for line in lines] == ([[str(second)]] if endangered else [])
    assert one.status()["retention_days"] == retention.archived_chats_days
    assert (one.status()["endangered"], ENDANGERED._value.get()) == (0, 0)
    assert len(named(logs, "retention_changed")) == 1


async def test_an_endangered_chat_that_is_told_once_stays_counted_until_it_has_its_copy(world: World) -> None:
    chat = await finished_chat(world)
    at = datetime(2026, 11, 1, 10, tzinfo=UTC)
    await archived_upstream(world, chat, at)
    server = keeping(world, KEPT_A_MONTH)
    world.simulator.faults.add("answer", status=403, path=f"*/{chat}*")
    clock = later()
    one = archivist(world, server, clock=clock)
    with capture_logs() as logs:
        for _ in range(3):
            await one.look()
            await one.look()  # at once: the chat has to wait
            clock.advance(301)
    (line,) = named(logs, "archived_chats_endangered")
    assert (line["first_deletion"], line["retention_days"], line["count"]) == ("2026-12-01T10:00:00Z", 30, 1)
    assert len(named(logs, "archive_refused")) == 3
    assert one.status()["endangered_chats"] == [str(chat)]
    assert ENDANGERED._value.get() == 1


async def test_an_endangered_chat_of_which_nothing_is_known_is_copied_from_coder(world: World) -> None:
    chat = await world.owner.create("[tool n=10 ms=30] say something")
    await world.owner.wait_idle(chat)
    await archived_upstream(world, chat)
    clock = later()
    one = archivist(world, keeping(world, KEPT_A_DAY), clock=clock)
    for _ in range(3):  # as patient as with any difference
        assert told(world, "stored") == []
        await one.look()
        clock.advance(301)
    (stored,) = told(world, "stored")
    assert copy_at(stored["url"], stored["sha256"]) == await truth(world, chat)
    await one.look()
    assert one.status()["endangered"] == 0


@pytest.mark.parametrize("trouble", [Unavailable("away"), Unauthorized("401"), ChatRefused("400", 400)])
async def test_a_server_that_does_not_tell_its_retention_is_asked_again(world: World, trouble: Exception) -> None:
    chat = await finished_chat(world)
    server = keeping(world, trouble)
    one = archivist(world, server)
    await one.look()
    assert stored_chats(world) == [str(chat)]  # nothing waits for it
    server.kept = KEPT_A_DAY
    await one.look()
    await one.look()
    assert server.asked == ["retention"] * 2  # and not at each look once it is known
    assert one.status()["retention_days"] == 1


async def test_retention_that_was_changed_is_noticed(world: World) -> None:
    server = keeping(world, KEPT_A_MONTH)
    clock = later()
    one = archivist(world, server, clock=clock)
    with capture_logs() as logs:
        for retention in (KEPT_A_MONTH, KEPT_A_MONTH, KEPT_A_DAY, Unavailable("away"), KEPT_A_DAY):
            server.kept = retention
            await one.look()
            clock.advance(10_001)
    assert [line["archived_chats_days"] for line in named(logs, "retention_changed")] == [30, 1]
    assert len(named(logs, "retention_unread")) == 1


async def test_a_chat_that_was_deleted_before_its_copy_is_counted_once(world: World) -> None:
    gone, kept = await finished_chat(world), await finished_chat(world)
    await archived_upstream(world, gone)
    before = counted("relay_archive_too_late_total")
    world.simulator.faults.add("answer", status=404, path=f"*/{gone}*")
    clock = later()
    one = archivist(world, keeping(world, KEPT_A_DAY), clock=clock)
    with capture_logs() as logs:
        for _ in range(3):
            await one.look()
            clock.advance(301)
    assert counted("relay_archive_too_late_total") == before + 1
    assert [line["chat_id"] for line in named(logs, "chat_deleted_before_its_copy")] == [str(gone)]
    assert one.status()["endangered"] == 0
    assert stored_chats(world) == [str(kept)]


# --- archiving in Coder --------------------------------------------------------------------------------------------


class Reluctant(OtherServer):
    """A server that refuses to archive for some time."""

    def __init__(self, world: World, *refusals: Exception) -> None:
        super().__init__(world.upstream)
        self.refusals = list(refusals)

    async def archive_chat(self, chat_id: UUID) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        await self._upstream.archive_chat(chat_id)


async def test_an_active_chat_is_archived_in_coder_later(world: World) -> None:
    chat = await finished_chat(world)
    active = ChatRefused("PATCH: 409: Cannot archive an active chat.", 409)
    server = Reluctant(world, active, active)
    clock = later()
    one = archivist(world, server, seal=True, clock=clock)
    with capture_logs() as logs:
        await one.look()
        await one.look()  # at once: it is not asked again
        assert len(server.refusals) == 1
        assert not in_coder(world, chat)
        for _ in range(2):
            clock.advance(301)
            await one.look()
    assert in_coder(world, chat)
    assert [line["log_level"] for line in named(logs, "archive_in_coder_postponed")] == ["info", "info"]
    assert not [line for line in logs if line["log_level"] in ("warning", "error")]
    assert len(told(world, "stored")) == 1


async def test_a_chat_at_work_is_not_archived_in_coder(world: World) -> None:
    chat = await finished_chat(world)
    await archivist(world, keeping(world, Retention())).look()  # its copy
    await tell(world, chat, "status", "running", {"status": "running", "previous": "waiting"})
    await archivist(world, keeping(world, Retention()), seal=True).look()
    assert not in_coder(world, chat)
    await world.write("UPDATE collected_chats SET status = 'waiting'")
    await archivist(world, keeping(world, Retention()), seal=True).look()
    assert in_coder(world, chat)


async def test_a_root_is_archived_in_coder_when_the_chats_of_its_subagents_are_copied(world: World) -> None:
    root = await finished_chat(world)
    ref = await world.ref(root)
    child = ChatRef(ref.deployment, UUID(int=5), ref.owner_id, root)
    message: dict[str, object] = {"message": {"id": 1, "role": "user", "content": []}, "text": ""}
    await tell(world, child, "message", "user", message)
    one = archivist(world, keeping(world, Retention()), seal=True)
    await one.look()
    assert stored_chats(world) == [str(root)]
    assert not in_coder(world, root)
    collected = await world.store.collected(child.deployment, child.chat_id)
    assert collected is not None
    await world.store.add_archive(_record(child), upto=collected.changed_at)
    await one.look()
    assert in_coder(world, root)


def _record(chat: ChatRef) -> ArchiveRecord:
    return ArchiveRecord(chat, 1, "file:///t", "file:///m", "00", 1, 1, 1, 1, SystemClock().now(), True, True)


async def test_the_chat_of_a_subagent_is_sealed_when_its_root_was_archived(world: World) -> None:
    chat = await finished_chat(world)
    ref = await world.ref(chat)
    child = ChatRef(ref.deployment, chat, ref.owner_id, UUID(int=5))

    class OnlyRoots(OtherServer):
        """Since 2.35 only a root can be archived; the adapter takes that answer for a success."""

        async def archive_chat(self, chat_id: UUID) -> None:
            assert chat_id == chat

    last = max(message["id"] for message in await truth(world, chat))
    record = ArchiveRecord(
        child, 1, "file:///t", "file:///m", "00", 1, 1, 1, last, SystemClock().now(), published=True, sealed=False
    )
    await world.store.add_archive(record, upto=datetime(2999, 1, 1, tzinfo=UTC))
    clock = later()
    one = archivist(world, OnlyRoots(world.upstream), seal=True, clock=clock)
    await one.look()
    assert told(world, "sealed") == []
    await world.owner._call("PATCH", f"/{chat}", {"archived": True})  # with its root
    clock.advance(301)
    await one.look()
    assert len(told(world, "sealed")) == 1
