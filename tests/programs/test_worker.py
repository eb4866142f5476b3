"""Many chats of one account: found, followed while something goes on, let go, found again, shared between workers."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest

from relay.adapters.coder import open_upstream
from tests.e2e.consumer import last
from tests.programs.test_follow import spoken
from tests.programs.world import WORKER, World, counted, until, upstream_settings, while_running

TALK = "[text n=40 ms=30] say something"
LONG = "[text n=300 ms=30] a long answer"


async def chats_of(world: World, number: int, text: str = TALK) -> list[UUID]:
    return [await world.owner.create(text) for _ in range(number)]


async def idle(world: World, chats: list[UUID]) -> None:
    for chat in chats:
        await world.owner.wait_idle(chat)


async def test_chats_are_found_let_go_and_taken_again(world: World) -> None:
    old = await chats_of(world, 2)
    async with world.worker() as (worker, said):
        new = await chats_of(world, 2)
        await until(lambda: worker.state.followed == {*old, *new})
        await idle(world, [*old, *new])
        await world.until_equal(*old, *new)
        await until(lambda: not worker.state.followed)
        assert world.simulator.streams() == []
        assert [row[0] for row in world.rows("SELECT clean FROM claims WHERE worker IS NULL")] == [1] * 4
        await world.owner.send(old[0], LONG)
        await until(lambda: worker.state.followed == {old[0]})
        await spoken(world, old[0])
        await world.owner.wait_idle(old[0])
        await world.until_equal(*old, *new)
        assert said[0] == (True, "")
    assert [e for chat in old for e in world.told(chat, "chat.history.")] == []


async def test_without_the_watch_sweeps_still_find_everything(world: World) -> None:
    world.simulator.faults.add("answer", status=503, path="*/watch")
    async with world.worker() as (worker, _):
        chats = await chats_of(world, 3, LONG)
        await until(lambda: worker.state.followed == set(chats))
        assert not worker.discovery.state.watching
        await idle(world, chats)
        await world.until_equal(*chats)
        await world.owner.send(chats[0], TALK)
        await world.owner.wait_idle(chats[0])
        await world.until_equal(*chats)
    assert world.simulator.fired("answer") > 0


async def test_without_sweeps_the_watch_still_tells(world: World) -> None:
    async with world.worker(sweep_seconds=3600.0) as (worker, _):
        await until(lambda: worker.discovery.state.watching and worker.discovery.state.sweeps == 1)
        chats = await chats_of(world, 3, LONG)
        await until(lambda: worker.state.followed == set(chats))
        await idle(world, chats)
        await world.until_equal(*chats)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param("<html>", id="not JSON"),
        pytest.param('{"type":"data","data":{"chat":{"id":7}}}', id="an id that is a number"),
        pytest.param('{"type":"data","data":{"chat":"x"}}', id="a chat that is a string"),
        pytest.param("[" * 100_000, id="too deep"),
        pytest.param('"' + "x" * 200_000 + '"', id="larger than a frame may be"),
    ],
)
async def test_a_watch_frame_that_cannot_be_read_harms_nobody(world: World, frame: str) -> None:
    async with (
        open_upstream(upstream_settings(world.simulator, max_frame_bytes=150_000)) as upstream,
        world.worker(upstream=upstream) as (worker, _),
    ):
        await until(lambda: worker.discovery.state.watching)
        for watch in world.simulator.watches():
            await watch.inject(frame)
        (chat,) = await chats_of(world, 1)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)


async def test_edits_while_nobody_follows_are_told(world: World) -> None:
    chat = await world.owner.create(TALK)
    async with world.worker() as (worker, _):
        await world.owner.send(chat, TALK)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        await until(lambda: not worker.state.followed)
    prompts = await world.owner.prompts(chat)
    await world.owner.edit(chat, prompts[0], "[text n=20 ms=30] the first prompt, better")
    await world.owner.wait_idle(chat)
    async with world.worker():
        await world.until_equal(chat)
    (told,) = world.told(chat, "chat.history.replaced.")
    assert set(told["data"]["removed_ids"]) >= set(prompts)


async def archive(world: World, chat: UUID, *, archived: bool) -> None:
    await world.owner._call("PATCH", f"/{chat}", {"archived": archived})


async def test_archived_and_back_is_told(world: World) -> None:
    chat = await world.owner.create(TALK)
    async with world.worker(archived_sweep_every=1):
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        for archived, kind in ((True, "archived"), (False, "unarchived"), (True, "archived")):
            before = len(world.told(chat, f"chat.lifecycle.{kind}."))
            await archive(world, chat, archived=archived)
            await until(lambda k=kind, n=before: len(world.told(chat, f"chat.lifecycle.{k}.")) == n + 1)  # type: ignore[misc]
            assert last(world.told(chat), "chat.lifecycle.")["chat"]["archived"] is archived
    assert len(world.told(chat, "chat.lifecycle.created.")) == 1


async def test_what_happened_to_a_chat_while_nobody_looked_is_told(world: World) -> None:
    chat = await world.owner.create(TALK)
    async with world.worker() as (worker, _):
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        await until(lambda: not worker.state.followed)
    await archive(world, chat, archived=True)
    async with world.worker():
        await until(lambda: world.told(chat, "chat.lifecycle.archived."))


async def test_two_workers_share_and_double_nothing(world: World) -> None:
    async with world.worker("one") as (one, _), world.worker("two") as (two, _):
        chats = await chats_of(world, 6, LONG)
        await until(lambda: one.state.followed | two.state.followed == set(chats))
        assert not one.state.followed & two.state.followed
        await idle(world, chats)
        await world.until_equal(*chats)
    # Where a chat goes from one to the other, its status is told again: same id, later place.
    facts = [e.id for e in world.bus.published if e.event in ("message", "turn", "history", "lifecycle")]
    assert len(facts) == len(set(facts)) > len(chats)


async def test_the_chats_of_a_worker_that_is_gone_move_after_the_lease(world: World) -> None:
    (chat,) = await chats_of(world, 1, LONG)
    dead = await world.follower(chat, worker="dead", lease_seconds=0.5)  # it never says that it goes
    async with while_running(dead.run()):
        await spoken(world, chat)
    async with world.worker("heir"):
        await world.owner.wait_idle(chat)
        await world.owner.send(chat, TALK)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
    sessions = sorted({event.session for event in world.bus.published if event.session})
    # An heir that adopts the chat while it is about to claim it gives it back, and takes one number more.
    assert (sessions[0], len(sessions)) == (1, 2)


async def test_a_queue_that_changes_while_its_chat_is_at_rest_is_told(world: World) -> None:
    """No row and no watch event speaks of it: such a chat is looked at again with each sweep."""
    (chat,) = await chats_of(world, 1, "[fail n=100 ms=40] too much")
    async with world.worker() as (worker, _):
        await spoken(world, chat)
        for _ in range(2):
            await world.owner.send(chat, TALK)
        await until(lambda: world.told(chat, "chat.status.error") and not worker.state.followed)
        await world.until_equal(chat)
        first, second = await world.owner.queue(chat)
        for queued in (second, first):
            await until(lambda: not worker.state.followed)
            await world.owner.delete_queued(chat, queued)
            await world.until_equal(chat)
        swept = [worker.discovery.state.sweeps]
        for _ in range(2):  # a sweep under way may have read that it is to be looked at again
            await until(lambda: worker.discovery.state.sweeps > swept[-1] + 1 and not worker.state.followed)
            swept.append(worker.discovery.state.sweeps)
        before = counted("relay_stream_connects_total", outcome="ok")
        await until(lambda: worker.discovery.state.sweeps > swept[-1] + 4)
        assert counted("relay_stream_connects_total", outcome="ok") == before, "nothing waits any more"


async def test_a_worker_that_stood_still_stops_what_another_has_taken(world: World) -> None:
    (chat,) = await chats_of(world, 1, "[text n=3000 ms=20] a very long answer")
    async with world.worker("slow", lease_seconds=0.6) as (slow, _):
        await until(lambda: slow.state.followed == {chat})
        await spoken(world, chat)
        await world.write("UPDATE workers SET lease_until = 0")
        heir = await world.claim(await world.ref(chat), "quick")
        assert heir is not None
        await until(lambda: not slow.state.followed)
        told = len(world.bus.published)
        await asyncio.sleep(0.5)  # time enough for many previews, were it still to speak
        assert len(world.bus.published) == told


async def test_a_token_that_is_refused_for_a_while(world: World) -> None:
    (chat,) = await chats_of(world, 1, LONG)
    async with world.worker() as (worker, said):
        await spoken(world, chat)
        fault = world.simulator.faults.add("answer", status=401, path="/api/*")
        world.simulator.cut(chat, watches=True)
        await until(lambda: said[-1][0] is False)
        assert "401" in said[-1][1]
        assert world.simulator.users["ann"].token not in said[-1][1]
        world.simulator.faults.remove(fault.id)
        await until(lambda: said[-1][0] is True)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        assert worker.discovery.state.sweeps > 0


@pytest.mark.parametrize("status", [403, 404])
async def test_one_chat_that_is_refused_for_a_while_harms_no_other(world: World, status: int) -> None:
    sick, well = await chats_of(world, 2, LONG)
    world.simulator.faults.add("answer", status=status, path=f"*/{sick}/*")
    async with world.worker():
        await idle(world, [well])
        await world.until_equal(well)
        world.simulator.faults.clear()
        await world.owner.wait_idle(sick)
        await world.until_equal(sick, well)


async def test_a_server_that_is_away_is_said_and_comes_back(world: World) -> None:
    (chat,) = await chats_of(world, 1, LONG)
    async with world.worker() as (worker, said):
        await spoken(world, chat)
        await world.simulator.restart(down_seconds=0.6, recovery_ms=2000)
        await until(lambda: any(not ok for ok, _ in said))
        await until(lambda: said[-1][0])
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        await until(lambda: worker.discovery.state.watching)


async def test_more_chats_than_streams(world: World) -> None:
    chats = await chats_of(world, 5, LONG)
    async with world.worker(max_streams=2) as (worker, _):
        await until(lambda: len(worker.state.followed) == 2)
        await idle(world, chats)
        await world.until_equal(*chats)
    assert WORKER.max_streams > 2


async def test_a_database_that_is_away_harms_nobody(world: World) -> None:
    async with world.worker() as (worker, _):
        chats = await chats_of(world, 2, LONG)
        await until(lambda: worker.state.followed == set(chats))
        async with world.database_away():
            chats += await chats_of(world, 1)
            await idle(world, chats)
        await world.until_equal(*chats)


async def test_a_rename_is_told(world: World) -> None:
    (chat,) = await chats_of(world, 1)
    async with world.worker():
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        world.simulator.database.chats[chat].title = "a better title"
        await world.owner.send(chat, TALK)
        await world.owner.wait_idle(chat)
        await until(lambda: last(world.told(chat), "chat.lifecycle.")["chat"]["title"] == "a better title")
    assert "title" in world.told(chat, "chat.lifecycle.updated.")[-1]["data"]["changed"]


async def test_the_status_may_be_asked_for_on_another_thread_while_chats_come_and_go(world: World) -> None:
    chats = await chats_of(world, 1, LONG)
    switching = sys.getswitchinterval()
    async with world.worker() as (worker, _):
        await until(lambda: worker.state.followed == set(chats))
        (running,) = worker._running.values()
        passing = [UUID(int=number) for number in range(2000)]
        with ThreadPoolExecutor(1) as other:
            sys.setswitchinterval(1e-6)
            try:
                asking = other.submit(lambda: [worker.status() for _ in range(20)])
                while not asking.done():
                    for chat in passing:
                        worker._running[chat] = running
                        worker.state.followed.add(chat)
                    for chat in passing:
                        del worker._running[chat]
                        worker.state.followed.discard(chat)
            finally:
                sys.setswitchinterval(switching)
            asking.result()
