"""One chat followed through everything that can break: nothing lost, nothing told out of order."""

import asyncio
import json
from collections.abc import Sequence
from typing import cast
from uuid import UUID

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.coder import open_upstream
from relay.core.errors import LostClaim, TooLarge, Unavailable
from relay.core.events import Event
from relay.ports import Upstream
from relay.programs import follow
from relay.programs.follow import Ended, Follower, FollowSettings
from relay.programs.pressure import Pressure
from tests.e2e.consumer import fold
from tests.programs.world import World, counted, until, upstream_settings, while_running
from tests.reliability.hot_server import HotServer, chat_ref

LONG = "[text n=120 ms=30] a long answer"
STEPS = "[steps k=3 n=60 ms=30 toolms=300] look through all of them"


async def spoken(world: World, chat: UUID, parts: int = 3) -> None:
    """Wait until consumers see the step in progress."""
    before = len(world.told(chat, "chat.preview."))
    await until(lambda: len(world.told(chat, "chat.preview.")) >= before + parts)


async def test_nothing_is_saved_before_it_is_confirmed(world: World) -> None:
    chat = await world.owner.create(STEPS)
    follower = await world.follower(chat)
    async with while_running(follower.run()):
        await spoken(world, chat)
        world.bus.down = True
        confirmed = {event["data"]["message"]["id"] for event in world.told(chat, "chat.message.")}
        await world.owner.wait_idle(chat)
        assert {message["id"] for message in await world.owner.messages(chat)} > confirmed
        assert world.saved() <= confirmed
        world.bus.down = False
        await world.until_equal(chat)
    await follower.finish()
    assert world.saved() == {message["id"] for message in await world.owner.messages(chat)}
    assert world.in_order(chat)


async def test_a_broker_that_is_away_for_a_while_costs_nothing(world: World) -> None:
    chat = await world.owner.create(STEPS)
    async with while_running((await world.follower(chat)).run()):
        for _ in range(4):
            await spoken(world, chat, 1)
            world.bus.down = True
            count = len(world.bus.published)
            await asyncio.sleep(0.1)
            assert len(world.bus.published) == count
            world.bus.down = False
            await world.owner.wait_idle(chat)
            await world.owner.send(chat, STEPS)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        assert world.in_order(chat)


async def test_an_event_that_no_queue_takes_goes_out_again_when_one_does(world: World) -> None:
    chat = await world.owner.create(LONG)
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        for queue in ("relay.log", "relay.meter", "relay.archivist"):
            world.bus.unbind(queue)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        assert world.in_order(chat)


async def test_a_database_that_is_away_for_a_while_costs_nothing(world: World) -> None:
    chat = await world.owner.create(STEPS)
    following = asyncio.create_task((await world.follower(chat)).run())
    await spoken(world, chat)
    async with world.database_away():
        await world.owner.wait_idle(chat)
        await world.owner.send(chat, STEPS)
        await world.owner.wait_idle(chat)
        assert not following.done(), "what is not saved is not let go"
    await following  # the chat has been idle for long enough
    await world.until_equal(chat)
    assert world.saved() == {message["id"] for message in await world.owner.messages(chat)}
    assert world.in_order(chat)


async def test_who_is_asked_to_leave_ends_once_all_is_confirmed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_FINISH_SECONDS", 0.1)
    chat = await world.owner.create(LONG)
    follower = await world.follower(chat)
    task = asyncio.create_task(follower.run())
    await spoken(world, chat)
    world.bus.down = True
    await world.owner.wait_idle(chat)
    follower.leave()
    await asyncio.sleep(0.3)
    assert not task.done()
    world.bus.down = False
    end = await asyncio.wait_for(task, 20)
    assert (end.why, end.clean) == (Ended.LEFT, True)
    assert world.saved() == {event["data"]["message"]["id"] for event in world.told(chat, "chat.message.")}


async def test_who_is_asked_to_leave_ends_though_nothing_comes(world: World) -> None:
    claim = await world.claim(chat_ref(1))
    assert claim is not None
    follower = Follower(
        claim,
        upstream=cast(Upstream, HotServer(steps=3)),
        bus=world.bus,
        claims=world.store,
        clock=SystemClock(),
        settings=FollowSettings(settle_seconds=60, linger_seconds=60),
    )
    task = asyncio.create_task(follower.run())
    await until(lambda: follower.tail.settling and follower.clean)
    follower.leave()
    end = await asyncio.wait_for(task, 10)  # not after the minute for which it would listen
    assert (end.why, end.clean) == (Ended.LEFT, True)


async def test_who_is_asked_to_leave_while_it_cannot_connect_does_not_connect_again(world: World) -> None:
    chat = await world.owner.create(LONG)
    follower = await world.follower(chat)
    task = asyncio.create_task(follower.run())
    await spoken(world, chat)
    world.simulator.faults.add("answer", status=503, path="/api/*/stream")
    world.simulator.cut(chat)
    await asyncio.sleep(0.1)
    follower.leave()
    end = await asyncio.wait_for(task, 10)
    assert end.why is Ended.LEFT


async def test_who_lost_the_claim_says_nothing_more(world: World) -> None:
    chat = await world.owner.create("[steps k=4 n=300 ms=30 toolms=200] look through all of them")
    first = asyncio.create_task((await world.follower(chat, lease_seconds=0.3)).run())
    await spoken(world, chat)
    ref = await world.ref(chat)
    claim = None
    while claim is None:
        claim = await world.claim(ref, "two")
    assert claim.session == 2
    with pytest.raises(LostClaim):
        await asyncio.wait_for(first, 10)
    told = [event for event in world.bus.published if event.session == 1]
    async with while_running(world.following(claim).run()):
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
    assert [event for event in world.bus.published if event.session == 1] == told


@pytest.mark.parametrize("polite", [True, False], ids=["polite", "killed"])
async def test_a_restart_of_the_server_in_the_middle_of_a_step(world: World, *, polite: bool) -> None:
    chat = await world.owner.create(STEPS)
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        await world.simulator.restart(polite=polite, down_seconds=0.3, recovery_ms=1000)
        await world.owner.wait_idle(chat)
        await world.owner.send(chat, LONG)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        assert world.in_order(chat)
    assert world.simulator.fired("restart") == 1


async def test_a_stream_that_fell_silent_while_its_chat_was_idle_hides_no_turn(world: World) -> None:
    """The socket lives, pings are answered: the chat is let go only when REST knows no more than was told."""
    chat = await world.owner.create("[text n=5 ms=5] hello")
    follower = await world.follower(chat)
    task = asyncio.create_task(follower.run())
    await until(lambda: world.told(chat, "chat.turn."))
    assert world.simulator.silence(chat) == 1
    await world.owner.send(chat, "[text n=5 ms=5] a second question")
    await world.owner.wait_idle(chat)
    assert (await task).why is Ended.IDLE
    await world.until_equal(chat)
    assert follower.clean


async def test_a_stream_that_fell_silent_in_a_turn_is_found_when_discovery_sees_its_end(world: World) -> None:
    """Long before the next comparison with REST, which is minutes away."""
    async with world.worker():
        chat = await world.owner.create(LONG)
        await spoken(world, chat)
        assert world.simulator.silence(chat) == 1
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)


async def test_a_stream_that_is_dead_although_its_socket_lives(world: World) -> None:
    before = counted("relay_reconnects_total", reason="dropped_messages")
    chat = await world.owner.create(LONG)
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        assert world.simulator.zombie(chat) == 1
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
    assert counted("relay_reconnects_total", reason="dropped_messages") == before + 1
    assert [e["data"]["reason"] for e in world.told(chat, "chat.error.stream.")] == ["dropped_messages"]


def frame(*events: object) -> str:
    return json.dumps({"type": "data", "data": events})


PROMPT_WITHOUT_ID = {"type": "message", "message": {"role": "user", "content": []}}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param("<html>bad gateway</html>", "bad_json", id="a page of a proxy"),
        pytest.param("", "bad_json", id="nothing at all"),
        pytest.param('{"type":"data","data":[{"type":"mess', "bad_json", id="half a frame"),
        pytest.param("[" * 100_000, "bad_json", id="too deep"),
        pytest.param(frame(PROMPT_WITHOUT_ID), "schema", id="a message without an id"),
        pytest.param(frame({"type": "message"}), "schema", id="a message event without a message"),
        pytest.param(frame({"type": "status", "status": 7}), "schema", id="a status that is a number"),
        pytest.param(frame({"type": "message_part", "message_part": {"role": "assistant"}}), "schema", id="no part"),
        pytest.param(frame({"no": "type"}), "schema", id="an event without a type"),
        pytest.param(frame("text"), "schema", id="an event that is a string"),
        pytest.param("17", "schema", id="a number"),
    ],
)
async def test_a_frame_that_cannot_be_read_is_parked_counted_and_told(world: World, raw: str, reason: str) -> None:
    before = counted("relay_decode_errors_total", reason=reason)
    chat = await world.owner.create(LONG)
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        assert await world.simulator.inject(raw, chat) == 1
        await until(lambda: world.told(chat, "chat.error.stream."))
        await spoken(world, chat)  # what comes after it still arrives
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
    assert [e["data"]["reason"] for e in world.told(chat, "chat.error.stream.")] == ["bad_frame"]
    assert counted("relay_decode_errors_total", reason=reason) == before + 1
    async with world.bus.deliveries("relay.frames.dead", prefetch=10) as parked:
        assert (await anext(parked)).body == raw.encode()
    assert raw not in str([event["data"] for event in world.told(chat, "chat.error.")]) or raw in ("", "17")


async def test_an_event_of_a_type_that_nobody_knows_is_counted_and_passed_over(world: World) -> None:
    before = counted("relay_decode_errors_total", reason="unknown_type")
    chat = await world.owner.create(LONG)
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        await world.simulator.inject(frame({"type": "telepathy", "telepathy": {"to": "you"}}), chat)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
    assert counted("relay_decode_errors_total", reason="unknown_type") == before + 1
    assert await world.bus.depth("relay.frames.dead") == 0
    assert world.told(chat, "chat.error.") == []


async def test_a_part_of_a_type_that_nobody_knows_passes_through(world: World) -> None:
    chat = await world.owner.create(LONG)
    part = {"type": "hologram", "shape": "cube"}
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        event = {"type": "message_part", "message_part": {"role": "assistant", "part": part}}
        await world.simulator.inject(frame(event), chat)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
    assert [e["data"]["part"] for e in world.told(chat, "chat.preview.other.")] == [part]


async def test_a_message_without_content_is_a_message(world: World) -> None:
    chat = await world.owner.create(LONG)
    bare = {"id": 10**6, "chat_id": str(chat), "role": "assistant", "created_at": "2026-03-01T12:00:00Z"}
    async with while_running((await world.follower(chat)).run()):
        await spoken(world, chat)
        await world.simulator.inject(frame({"type": "message", "message": bare}), chat)
        await until(lambda: 10**6 in fold(world.told(chat)))
        await world.owner.wait_idle(chat)
        await spoken_status(world, chat, "waiting")
    told = fold(world.told(chat))[10**6]
    assert told == bare
    assert await world.bus.depth("relay.frames.dead") == 0


async def spoken_status(world: World, chat: UUID, status: str) -> None:
    await until(lambda: (world.told(chat, "chat.status.") or [{"data": {}}])[-1]["data"].get("status") == status)


async def test_a_message_that_fits_no_frame_still_arrives(world: World) -> None:
    before = counted("relay_decode_errors_total", reason="too_large")
    chat = await world.owner.create("[text n=10 ms=30] small")
    async with open_upstream(upstream_settings(world.simulator, max_frame_bytes=100_000)) as narrow:
        world.upstream = narrow
        async with world.worker():  # which takes the chat again, should it be let go before we look
            await world.owner.wait_idle(chat)
            await world.owner.send(chat, "[big size=300000] one large message")
            await world.owner.wait_idle(chat)
            await world.until_equal(chat)
            await world.owner.send(chat, LONG)
            await spoken(world, chat)  # and the stream is of use again
            await world.owner.wait_idle(chat)
            await world.until_equal(chat)
    assert counted("relay_decode_errors_total", reason="too_large") > before
    assert max(len(str(message)) for message in fold(world.told(chat)).values()) > 300_000


@pytest.mark.parametrize(("shed_frames", "at_once"), [(1, 256), (64, 32)], ids=["alone", "one of many"])
async def test_under_load_each_step_is_seen_before_its_message(
    world: World, monkeypatch: pytest.MonkeyPatch, shed_frames: int, at_once: int
) -> None:
    """A part of the next step may overtake that message: who saw nothing of this step takes it for the next one's."""
    publish = world.bus.publish

    async def slow(events: Sequence[Event]) -> None:
        await asyncio.sleep(0.01)
        await publish(events)

    monkeypatch.setattr(world.bus, "publish", slow)
    claim = await world.claim(chat_ref(1))
    assert claim is not None
    server = HotServer(steps=100)
    follower = Follower(
        claim,
        upstream=cast(Upstream, server),
        bus=world.bus,
        claims=world.store,
        clock=SystemClock(),
        settings=FollowSettings(settle_seconds=60, linger_seconds=60, shed_frames=shed_frames),
        pressure=Pressure(SystemClock(), characters=10**8, previews_per_second=10**6, frames_at_once=at_once),
    )
    left_out = counted("relay_previews_dropped_total", reason="ended")
    async with while_running(follower.run()):
        await until(lambda: follower.tail.settling and follower.clean)
    assert counted("relay_previews_dropped_total", reason="ended") > left_out
    seen: set[object] = set()
    messages = 0
    for event in world.bus.published:
        if event.event == "preview":
            seen.add(dict(event.data)["step"])
        elif (event.event, event.detail) == ("message", "assistant"):
            assert messages in seen
            messages += 1
    assert messages == server.steps


async def test_an_event_too_large_for_the_broker_waits_until_it_takes_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, tries, away = 100_000, 0, False
    publish = world.bus.publish

    async def narrow(events: Sequence[Event]) -> None:
        nonlocal tries
        if away:
            raise Unavailable("the broker is away")
        large = max((len(event.encode()) for event in events), default=0)
        if large > limit:
            tries += len(events) == 1
            raise TooLarge("raise max_message_size", large, limit)
        await publish(events)

    monkeypatch.setattr(world.bus, "publish", narrow)
    chat = await world.owner.create(LONG)
    async with world.worker():
        await world.until_equal(chat)
        away = True  # so that others stand before it when it is published
        await world.owner.send(chat, "[big size=300000] one large message")
        await world.owner.wait_idle(chat)
        away = False
        await until(lambda: tries >= 3)
        ids = [event["id"] for event in world.told(chat) if not event["type"].startswith("io.chatrelay.chat.preview")]
        assert len(ids) == len(set(ids)), "what stands before it went out once"
        limit = 1_000_000
        await world.until_equal(chat)
    assert {event["session"] for event in world.told(chat)} == {1}
    assert world.in_order(chat)


@pytest.mark.parametrize(
    ("status", "path"), [(429, "*/chats/*"), (503, "*/stream"), (502, "*/chats/*"), (500, "*/stream")]
)
async def test_a_server_that_will_not_answer_for_a_while(world: World, status: int, path: str) -> None:
    chat = await world.owner.create(STEPS)
    async with world.worker():  # which takes the chat again, should it be let go before we look
        await spoken(world, chat)
        world.simulator.faults.add("answer", status=status, path=path, method="GET", seconds=0.6)
        world.simulator.cut(chat)
        await until(lambda: world.simulator.fired("answer") >= 1)
        await world.owner.send(chat, STEPS)
        await world.owner.wait_idle(chat)
        await world.until_equal(chat)
        assert world.in_order(chat)


async def test_retry_after_is_obeyed(world: World) -> None:
    chat = await world.owner.create(LONG)
    await world.owner.wait_idle(chat)
    world.simulator.faults.add("answer", status=429, retry_after=1, path="*/messages", method="GET", seconds=0.9)
    async with while_running((await world.follower(chat)).run()):
        await world.owner.send(chat, "[text n=400 ms=30] tell a very long story")
        await spoken(world, chat)
        await world.owner.interrupt(chat)  # to judge an interrupted turn, REST must be asked
        await until(lambda: world.told(chat, "chat.turn.interrupted."))
    assert world.simulator.fired("answer") <= 2


async def test_a_chat_that_may_not_be_read_is_set_aside(world: World) -> None:
    chat = await world.owner.create(LONG)
    follower = await world.follower(chat)
    world.simulator.faults.add("answer", status=403, path="*/stream")
    assert (await asyncio.wait_for(follower.run(), 10)).why is Ended.REFUSED


async def test_a_chat_that_is_gone_is_told_once(world: World) -> None:
    chat = await world.owner.create(LONG)
    follower = await world.follower(chat)
    world.simulator.faults.add("answer", status=404, path="*/stream")
    assert (await asyncio.wait_for(follower.run(), 10)).why is Ended.GONE
    assert len(world.told(chat, "chat.lifecycle.gone.")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"kind": "cut_every", "frames": 7}, id="cut between frames"),
        pytest.param({"kind": "cut_every", "frames": 9, "inside": True}, id="cut within a frame"),
        pytest.param({"kind": "duplicate_frames", "rate": 0.5}, id="frames that come twice"),
        pytest.param({"kind": "lose_parts", "rate": 0.9}, id="live parts that are lost"),
        pytest.param({"kind": "slow", "delay": 0.05}, id="slow answers"),
    ],
)
async def test_a_bad_line(world: World, fault: dict[str, object]) -> None:
    parameters = {name: value for name, value in fault.items() if name != "kind"}
    chat = await world.owner.create(STEPS)
    world.simulator.faults.add(str(fault["kind"]), **parameters)
    async with while_running((await world.follower(chat)).run()):
        await until(lambda: world.told(chat, "chat.message."))
        await world.owner.wait_idle(chat)
        await world.owner.send(chat, LONG)
        await world.owner.wait_idle(chat)
        world.simulator.faults.clear()
        await world.until_equal(chat)
        assert world.in_order(chat)
    durable = [event.id for event in world.bus.published if not event.transient]
    assert len(durable) == len(set(durable))  # one session: not even a copy
    assert world.simulator.counters().get(str(fault["kind"]), 0) or world.simulator.fired("lost_parts")
