"""The promise of the bus, kept by RabbitMQ and by its in-memory twin alike."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol, cast

import pytest
from msgspec import structs

from relay.adapters.memory import MemoryBus
from relay.adapters.rabbit import RabbitSettings, open_rabbit
from relay.adapters.topology import ARCHIVIST, DEAD_FRAMES, DELIVERY_LIMIT, LOG, METER, QUEUES
from relay.core.errors import Unavailable, Unroutable
from relay.core.events import MessageData, decode_event
from relay.ports import Bus
from tests.adapters.broker import Administrator, Proxy
from tests.adapters.traffic import CHAT, PROMPT, event, message, positions, preview, take, until_depth


class Faults(Protocol):
    """What may happen to a broker, done from outside of the bus."""

    async def unbind(self, queue: str) -> None:
        """Remove every binding of the queue."""

    async def delete(self, queue: str) -> None:
        """Delete the queue."""

    async def go_down(self) -> None:
        """Cut all connections and accept no new one."""

    async def come_back(self) -> None:
        """Accept connections again."""


class MemoryFaults:
    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus

    async def unbind(self, queue: str) -> None:
        self._bus.unbind(queue)

    async def delete(self, queue: str) -> None:
        self._bus.delete(queue)

    async def go_down(self) -> None:
        self._bus.down = True

    async def come_back(self) -> None:
        self._bus.down = False


class RabbitFaults:
    def __init__(self, administrator: Administrator, proxy: Proxy) -> None:
        self._administrator = administrator
        self._proxy = proxy

    async def unbind(self, queue: str) -> None:
        await self._administrator.unbind(queue)

    async def delete(self, queue: str) -> None:
        await self._administrator.delete(queue)

    async def go_down(self) -> None:
        assert await self._proxy.refuse() > 0, "there was a connection to cut"

    async def come_back(self) -> None:
        await self._proxy.accept()


@pytest.fixture
def memory_world() -> tuple[Bus, Faults]:
    bus = MemoryBus()
    return bus, MemoryFaults(bus)


@asynccontextmanager
async def a_rabbit_world(url: str, publisher: str) -> AsyncIterator[tuple[Bus, Faults]]:
    async with AsyncExitStack() as stack:
        administrator = await stack.enter_async_context(Administrator.of(url))
        proxy = await stack.enter_async_context(Proxy.to(url))
        settings = RabbitSettings.model_validate({"url": proxy.url, "publisher": publisher})
        bus = await stack.enter_async_context(open_rabbit(settings))
        yield bus, RabbitFaults(administrator, proxy)


@pytest.fixture
async def rabbit_world(rabbit_vhost: str) -> AsyncIterator[tuple[Bus, Faults]]:
    async with a_rabbit_world(rabbit_vhost, "pipelined") as world:
        yield world


@pytest.fixture
async def plain_rabbit_world(rabbit_vhost: str) -> AsyncIterator[tuple[Bus, Faults]]:
    async with a_rabbit_world(rabbit_vhost, "plain") as world:
        yield world


@pytest.fixture(params=["memory", "rabbit", "plain_rabbit"])
def world(request: pytest.FixtureRequest) -> tuple[Bus, Faults]:
    return cast(tuple[Bus, Faults], request.getfixturevalue(f"{request.param}_world"))


@pytest.fixture
def bus(world: tuple[Bus, Faults]) -> Bus:
    return world[0]


@pytest.fixture
def faults(world: tuple[Bus, Faults]) -> Faults:
    return world[1]


# --- publishing ----------------------------------------------------------------------------------------------------


async def test_events_arrive_as_they_were_and_in_order(bus: Bus) -> None:
    events = [message(n, role) for n, role in enumerate(("system", "user", "assistant", "tool") * 25)]
    await bus.publish(events[:40])
    await bus.publish(events[40:])
    async with bus.deliveries(METER, prefetch=200) as deliveries:
        arrived = await take(deliveries, 100)
    assert [d.body for d in arrived] == [e.encode() for e in events]
    assert [d.routing_key for d in arrived] == [e.routing_key for e in events]
    assert not any(d.redelivered for d in arrived)


async def test_each_queue_gets_the_families_it_is_bound_to(bus: Bus) -> None:
    kinds = [("message", "user"), ("history", "replaced"), ("status", "running"), ("turn", "completed")]
    kinds += [("lifecycle", "created"), ("retry", "scheduled"), ("error", "turn"), ("preview", "text")]
    await bus.publish([event(kind, detail, MessageData(message={}, text=""), 1) for kind, detail in kinds])
    await until_depth(bus, METER, 1)
    await until_depth(bus, ARCHIVIST, 5)


async def test_publishing_nothing_is_nothing(bus: Bus) -> None:
    await bus.publish([])
    assert await bus.depth(METER) == 0


async def test_an_event_that_no_queue_takes_is_not_passed_over_in_silence(bus: Bus, faults: Faults) -> None:
    for queue in (METER, ARCHIVIST, LOG):
        await faults.unbind(queue)
    with pytest.raises(Unroutable, match=r"chat\.message\.user"):
        await bus.publish([message(1), message(2, "user"), message(3)][1:])
    assert await bus.depth(METER) == 0


async def test_the_other_events_of_a_call_with_an_unroutable_one_are_stored(bus: Bus, faults: Faults) -> None:
    await faults.unbind(LOG)
    stray = event("retry", "scheduled", MessageData(message={}, text=""), 2)  # only the log takes it
    with pytest.raises(Unroutable, match=r"chat\.retry\.scheduled"):
        await bus.publish([message(1), stray, message(3)])
    async with bus.deliveries(METER, prefetch=5) as deliveries:
        assert positions(await take(deliveries, 2)) == [1, 3]


async def test_a_lost_binding_is_told_once_and_then_made_anew(bus: Bus, faults: Faults) -> None:
    for queue in (METER, ARCHIVIST, LOG):
        await faults.unbind(queue)
    with pytest.raises(Unroutable):
        await bus.publish([message(1)])
    await bus.publish([message(1)])
    await until_depth(bus, METER, 1)


async def test_a_preview_may_go_nowhere(bus: Bus, faults: Faults) -> None:
    await faults.unbind(LOG)
    await bus.publish([preview(1)])


async def test_the_same_event_twice_in_one_call_keeps_the_order(bus: Bus) -> None:
    await bus.publish([message(1), message(2), message(1), message(3)])
    async with bus.deliveries(METER, prefetch=5) as deliveries:
        assert positions(await take(deliveries, 4)) == [1, 2, 1, 3]


async def test_publishers_side_by_side_each_keep_their_order(bus: Bus) -> None:
    calls = [[message(100 * caller + n) for n in range(20)] for caller in range(5)]
    await asyncio.gather(*(bus.publish(events) for events in calls))
    async with bus.deliveries(METER, prefetch=100) as deliveries:
        arrived = positions(await take(deliveries, 100))
    for caller in range(5):
        assert [p for p in arrived if p // 100 == caller] == [100 * caller + n for n in range(20)]


async def test_a_cancelled_publish_leaves_a_bus_that_works(bus: Bus) -> None:
    for _ in range(10):
        publishing = asyncio.create_task(bus.publish([message(n) for n in range(50)]))
        await asyncio.sleep(0)
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing
    await bus.publish([message(n) for n in range(1000, 1003)])
    async with bus.deliveries(METER, prefetch=1000) as deliveries:
        async with asyncio.timeout(PROMPT):
            arrived: list[int] = []
            while arrived[-3:] != [1000, 1001, 1002]:
                arrived += positions([await anext(deliveries)])


# --- deliveries ----------------------------------------------------------------------------------------------------


async def test_at_most_prefetch_deliveries_are_open(bus: Bus) -> None:
    await bus.publish([message(n) for n in range(5)])
    async with bus.deliveries(METER, prefetch=2) as deliveries:
        first, second = await take(deliveries, 2)
        await until_depth(bus, METER, 3)
        third = asyncio.ensure_future(anext(deliveries))
        await bus.publish([message(5)])  # time for a third delivery to come, if it would
        await until_depth(bus, METER, 4)
        assert not third.done()
        await second.ack()
        async with asyncio.timeout(PROMPT):
            assert positions([await third]) == [2]
        await first.ack()
        assert positions(await take(deliveries)) == [3]


async def test_what_was_acked_does_not_come_again_and_the_rest_does(bus: Bus) -> None:
    await bus.publish([message(n) for n in range(4)])
    async with bus.deliveries(METER, prefetch=3) as deliveries:
        taken = await take(deliveries, 3)
        await taken[1].ack()
    async with bus.deliveries(METER, prefetch=10) as deliveries:
        again = await take(deliveries, 3)
    assert positions(again) == [0, 2, 3]
    assert [d.redelivered for d in again[:2]] == [True, True]  # the last one may have been on its way to us before


async def test_a_requeued_delivery_comes_again_and_says_so(bus: Bus) -> None:
    await bus.publish([message(1)])
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        (delivery,) = await take(deliveries)
        assert not delivery.redelivered
        await delivery.requeue()
        (again,) = await take(deliveries)
        assert again.redelivered
        assert again.body == delivery.body
        await again.ack()
    await until_depth(bus, METER, 0)


async def test_a_dead_letter_is_kept_as_it_was(bus: Bus) -> None:
    await bus.publish([message(1), message(2, "user", "né à l'étranger")])
    async with bus.deliveries(METER, prefetch=5) as deliveries:
        good, poison = await take(deliveries, 2)
        await poison.dead_letter("cannot be read")
        await good.ack()
    await until_depth(bus, f"{METER}.dead", 1)
    await until_depth(bus, METER, 0)
    async with bus.deliveries(f"{METER}.dead", prefetch=1) as dead:
        (letter,) = await take(dead)
    assert letter.body == poison.body
    assert letter.routing_key == poison.routing_key


async def test_poison_ends_in_the_dead_letters_and_nothing_else_is_lost(bus: Bus) -> None:
    await bus.publish([message(666), message(1)])
    seen = 0
    async with bus.deliveries(ARCHIVIST, prefetch=1) as deliveries:
        while True:
            (delivery,) = await take(deliveries)
            if positions([delivery]) == [1]:
                await delivery.ack()
                break
            seen += 1
            await delivery.requeue()
    assert seen == DELIVERY_LIMIT + 1  # delivered once, given back as often as the limit says, and once more
    async with bus.deliveries(f"{ARCHIVIST}.dead", prefetch=1) as dead:
        assert positions(await take(dead)) == [666]
    assert await bus.depth(ARCHIVIST) == 0


async def test_a_message_that_kills_its_consumers_ends_in_the_dead_letters(bus: Bus) -> None:
    await bus.publish([message(666)])
    for _ in range(DELIVERY_LIMIT + 1):
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            await take(deliveries)
    await until_depth(bus, f"{METER}.dead", 1)
    assert await bus.depth(METER) == 0


async def test_a_dead_letter_outlives_being_looked_at(bus: Bus) -> None:
    await bus.publish([message(1)])
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        await (await take(deliveries))[0].dead_letter("poison")
    async with bus.deliveries(f"{METER}.dead", prefetch=1) as dead:
        for _ in range(DELIVERY_LIMIT + 5):
            await (await take(dead))[0].requeue()
        assert positions(await take(dead)) == [1]


async def test_a_delivery_is_ended_once(bus: Bus) -> None:
    await bus.publish([message(1)])
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        (delivery,) = await take(deliveries)
        await delivery.ack()
        with pytest.raises(RuntimeError):
            await delivery.requeue()
        await bus.publish([message(2)])  # and the consumer still lives
        assert positions(await take(deliveries)) == [2]


async def test_a_delivery_cannot_be_ended_after_its_consumer(bus: Bus) -> None:
    await bus.publish([message(1)])
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        (delivery,) = await take(deliveries)
    with pytest.raises(Unavailable):
        await delivery.ack()
    await until_depth(bus, METER, 1)


async def test_waiting_for_a_delivery_may_be_given_up_and_taken_up_again(bus: Bus) -> None:
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await anext(deliveries)
        await bus.publish([message(1)])
        assert positions(await take(deliveries)) == [1]


async def test_consumers_of_one_queue_share_it(bus: Bus) -> None:
    async with bus.deliveries(METER, prefetch=1) as one, bus.deliveries(METER, prefetch=1) as other:
        await bus.publish([message(1), message(2)])
        assert sorted(positions([*await take(one), *await take(other)])) == [1, 2]


@pytest.mark.parametrize("name", ["relay.unknown", LOG])
async def test_only_queues_that_can_be_worked_off_are_consumed(bus: Bus, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        async with bus.deliveries(name, prefetch=1):
            pass


# --- faults --------------------------------------------------------------------------------------------------------


async def test_a_broker_that_went_away_is_told_to_all_and_found_again(bus: Bus, faults: Faults) -> None:
    await bus.publish([message(1)])
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        (delivery,) = await take(deliveries)
        waiting = asyncio.ensure_future(anext(deliveries))
        await faults.go_down()
        with pytest.raises(Unavailable):
            async with asyncio.timeout(PROMPT):
                await waiting
        with pytest.raises(Unavailable):
            await anext(deliveries)
        with pytest.raises(Unavailable):
            await delivery.ack()
    with pytest.raises(Unavailable):
        await bus.publish([message(2)])
    with pytest.raises(Unavailable):
        await bus.depth(METER)
    with pytest.raises(Unavailable):
        async with bus.deliveries(METER, prefetch=1):
            pass
    await faults.come_back()
    await bus.publish([message(3)])
    async with bus.deliveries(METER, prefetch=2) as deliveries:
        again = await take(deliveries, 2)
    assert positions(again) == [1, 3]
    assert [d.redelivered for d in again] == [True, False]


async def test_a_queue_deleted_under_its_consumer_is_told_and_made_anew(bus: Bus, faults: Faults) -> None:
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries))
        await faults.delete(METER)
        with pytest.raises(Unavailable):
            async with asyncio.timeout(PROMPT):
                await waiting
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        await bus.publish([message(1)])
        assert positions(await take(deliveries)) == [1]


# --- taps, parked frames, depth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        pytest.param(["#"], [1, 2, 3], id="everything"),
        pytest.param(["chat.message.*.*.*"], [1, 3], id="one word each"),
        pytest.param(["chat.message.user.#"], [3], id="the rest"),
        pytest.param(["chat.message.*"], [], id="a star is exactly one word"),
        pytest.param([f"*.*.*.*.{CHAT.chat_id}"], [1, 2, 3], id="one chat"),
        pytest.param([f"#.{CHAT.owner_id}.*"], [1, 2, 3], id="one owner"),
        pytest.param(["#.user.#", "chat.preview.#", "#"], [1, 2, 3], id="no copies when several match"),
        pytest.param(["chat.#.message.#"], [1, 3], id="a hash may be no word"),
    ],
)
async def test_a_tap_gets_what_its_patterns_match(bus: Bus, patterns: list[str], expected: list[int]) -> None:
    last = event("retry", "scheduled", MessageData(message={}, text=""), 99)
    async with bus.tap(*patterns, "chat.retry.#") as tapped:
        await bus.publish([message(1), preview(2), message(3, "user"), last])
        assert positions(await take(tapped, len(expected) + 1)) == [*expected, 99]


async def test_a_tap_sees_only_what_comes_after_it_and_takes_nothing_away(bus: Bus) -> None:
    await bus.publish([message(1)])
    async with bus.tap("#") as tapped:
        await bus.publish([message(2)])
        (delivery,) = await take(tapped)
        assert positions([delivery]) == [2]
        await delivery.ack()
    async with bus.deliveries(METER, prefetch=2) as deliveries:
        assert positions(await take(deliveries, 2)) == [1, 2]


async def test_a_tap_on_a_broker_that_went_away_says_so(bus: Bus, faults: Faults) -> None:
    async with bus.tap("#") as tapped:
        waiting = asyncio.ensure_future(anext(tapped))
        await faults.go_down()
        with pytest.raises(Unavailable):
            async with asyncio.timeout(PROMPT):
                await waiting


async def test_a_frame_that_could_not_be_read_is_kept_whole(bus: Bus) -> None:
    raw = b'[{"type": "message", \xff\x00'
    await bus.park_frame(CHAT, raw, "bad_json")
    await until_depth(bus, DEAD_FRAMES, 1)
    async with bus.deliveries(DEAD_FRAMES, prefetch=1) as frames:
        assert (await take(frames))[0].body == raw


async def test_all_queues_are_there_from_the_start_and_empty(bus: Bus) -> None:
    assert [await bus.depth(name) for name in QUEUES] == [0] * len(QUEUES)


async def test_events_can_be_told_apart_by_id_when_published_again(bus: Bus) -> None:
    first = message(1)
    await bus.publish([first])
    await bus.publish([structs.replace(first, session=2)])
    async with bus.deliveries(METER, prefetch=2) as deliveries:
        one, two = [decode_event(d.body, d.routing_key) for d in await take(deliveries, 2)]
    assert one.id == two.id
    assert (one.session, two.session) == (1, 2)
