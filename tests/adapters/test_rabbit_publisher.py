"""Thousands of callers on one window: each gets the answer to its own messages, in time, and nobody another one's."""

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing

import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from msgspec import structs
from pamqp.common import FieldValue

from relay.adapters.rabbit import RabbitBus, RabbitSettings, open_rabbit
from relay.adapters.rabbit_outgoing import Outgoing
from relay.adapters.topology import ARCHIVIST, DEAD_FRAMES, LOG, METER
from relay.core.errors import Unavailable, Unroutable
from relay.core.events import Event, MessageData, event_id
from tests.adapters.broker import Administrator, Proxy
from tests.adapters.test_rabbit import both_ways, sample
from tests.adapters.traffic import CHAT, PROMPT, event, message, positions, take, until_depth


@pytest.fixture
async def administrator(rabbit_vhost: str) -> AsyncIterator[Administrator]:
    async with Administrator.of(rabbit_vhost) as administrator:
        yield administrator


@pytest.fixture
async def proxy(rabbit_vhost: str) -> AsyncIterator[Proxy]:
    async with Proxy.to(rabbit_vhost) as proxy:
        yield proxy


@pytest.fixture
def publisher(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "pipelined"))


@asynccontextmanager
async def opened(url: str, **more: object) -> AsyncIterator[RabbitBus]:
    async with open_rabbit(RabbitSettings.model_validate({"url": url, **more})) as bus:
        yield bus


async def outcomes_of(calls: Sequence[asyncio.Task[None]]) -> list[type[BaseException] | None]:
    answers = await asyncio.gather(*calls, return_exceptions=True)
    return [None if answer is None else type(answer) for answer in answers]


def start(bus: RabbitBus, events: Sequence[Event]) -> asyncio.Task[None]:
    return asyncio.create_task(bus.publish(events))


# --- room in the window --------------------------------------------------------------------------------------------


async def test_thousands_of_callers_share_a_window_and_it_is_never_overdrawn(rabbit_vhost: str) -> None:
    async with opened(rabbit_vhost, window=50, confirm_timeout_seconds=60) as bus:
        calls = [start(bus, [message(10 * caller + n) for n in range(2)]) for caller in range(2000)]
        most = 0.0
        while not all(call.done() for call in calls):
            most = max(most, sample("relay_publish_inflight"))
            await asyncio.sleep(0)
        assert set(await outcomes_of(calls)) == {None}
        assert 25 < most < 100, "a batch that is answered in part still counts"
        async with bus.deliveries(METER, prefetch=4000) as deliveries:
            arrived = positions(await take(deliveries, 4000))
    assert sorted(arrived) == [10 * caller + n for caller in range(2000) for n in range(2)]
    place = {position: index for index, position in enumerate(arrived)}
    assert all(place[10 * caller] < place[10 * caller + 1] for caller in range(2000))


async def test_room_is_given_in_the_order_of_asking(rabbit_vhost: str) -> None:
    done: list[int] = []
    async with opened(rabbit_vhost, window=1) as bus:

        async def publish(number: int) -> None:
            await bus.publish([message(number)])
            done.append(number)

        await asyncio.gather(*(publish(number) for number in range(50)))
    assert done == list(range(50))


async def test_a_big_batch_lets_others_through(rabbit_vhost: str) -> None:
    async with opened(rabbit_vhost, window=64, confirm_timeout_seconds=60) as bus:
        big = start(bus, [message(n) for n in range(3000)])
        while not sample("relay_publish_inflight"):
            await asyncio.sleep(0)
        for number in range(5):
            await bus.publish([message(10_000 + number)])
        assert not big.done()
        await big
        async with bus.deliveries(METER, prefetch=4000) as deliveries:
            arrived = positions(await take(deliveries, 3005))
    assert [p for p in arrived if p < 10_000] == list(range(3000))


async def test_a_socket_that_nobody_reads_is_not_written_to_without_end(proxy: Proxy) -> None:
    async with opened(proxy.url, confirm_timeout_seconds=2) as bus:
        await bus.publish([message(1)])
        proxy.sending.clear()
        small = [start(bus, [message(n, text="x" * 50_000) for n in range(500)])]
        large = asyncio.create_task(bus.park_frame(CHAT, bytes(40_000_000), "schema"))
        assert await outcomes_of([*small, large]) == [Unavailable] * 2
        lane = bus.publisher._lane  # type: ignore[attr-defined]
        assert 0 < lane._wire._transport_out.get_write_buffer_size() < 1_000_000
        proxy.cut()


@both_ways
async def test_bodies_of_any_size_arrive_whole_and_in_order(rabbit_vhost: str, publisher: str) -> None:
    sizes = [0, 1, 131_063, 131_064, 131_065, 0, 300_000, 1000, 2_000_000, 5]
    async with opened(rabbit_vhost, publisher=publisher) as bus, Administrator.of(rabbit_vhost) as administrator:
        channel = administrator.channel
        bodies = [bytes([number]) * size for number, size in enumerate(sizes)]
        await bus.publisher.send([parked(str(number), body) for number, body in enumerate(bodies)])
        assert await everything_in(channel, DEAD_FRAMES, len(sizes)) == bodies


def parked(message_id: str, body: bytes = b"") -> Outgoing:
    return Outgoing(message_id, None, "", DEAD_FRAMES, body, "type", 1)


async def everything_in(channel: AbstractChannel, queue: str, number: int) -> list[bytes]:
    async with asyncio.timeout(PROMPT):
        return [(await channel.basic_get(queue, no_ack=True)).body for _ in range(number)]


async def test_a_message_that_cannot_be_written_fails_its_own_call_only(rabbit_vhost: str) -> None:
    async with opened(rabbit_vhost) as bus:
        wrong = asyncio.create_task(bus.publisher.send([parked("1"), parked("\ud800")]))
        others = [start(bus, [message(n)]) for n in range(20)]
        with pytest.raises(UnicodeEncodeError):
            await wrong
        assert set(await outcomes_of(others)) == {None}
        assert sample("relay_publish_inflight") == 0


# --- what is refused -----------------------------------------------------------------------------------------------


async def test_a_returned_message_fails_its_own_call_only(rabbit_vhost: str, administrator: Administrator) -> None:
    stray = event("retry", "scheduled", MessageData(message={}, text=""), 0)  # only the log takes these
    async with opened(rabbit_vhost, window=100) as bus:
        await administrator.unbind(LOG)
        returned = sample("relay_publish_total", outcome="returned")
        confirmed = sample("relay_publish_total", outcome="confirmed")
        calls = []
        for caller in range(200):
            events = [message(10 * caller + n) for n in range(3)]
            if caller % 2:
                events.insert(2, structs.replace(stray, id=event_id(CHAT, "retry", caller)))
            calls.append(start(bus, events))
        assert await outcomes_of(calls) == [None, Unroutable] * 100
        again = sample("relay_publish_total", outcome="returned") - returned
        assert again == 100
        assert sample("relay_publish_total", outcome="confirmed") == confirmed + 600
        await until_depth(bus, METER, 600)


async def test_of_hundreds_in_flight_as_many_are_told_as_were_returned(
    rabbit_vhost: str, administrator: Administrator
) -> None:
    async with opened(rabbit_vhost, confirm_timeout_seconds=30) as bus:
        for queue in (ARCHIVIST, LOG):
            await administrator.unbind(queue)
        returned = sample("relay_publish_total", outcome="returned")
        calls = [start(bus, [message(n)]) for n in range(512)]
        while sample("relay_publish_inflight") < 512:
            await asyncio.sleep(0)
        unbinding = asyncio.create_task(administrator.unbind(METER))
        while not unbinding.done():
            calls += [start(bus, [message(len(calls) + n)]) for n in range(20)]
            calls += [start(bus, [message(number)]) for number in range(5)]  # second copies of what is in flight
            await asyncio.sleep(0)
        calls += [start(bus, [message(len(calls) + n)]) for n in range(20)]
        outcomes = await outcomes_of(calls)
        assert set(outcomes) == {None, Unroutable}, "the queue was unbound in time"
        assert sample("relay_publish_total", outcome="returned") == returned + outcomes.count(Unroutable)
        await until_depth(bus, METER, outcomes.count(None))


# --- late, cancelled, cut ------------------------------------------------------------------------------------------


async def test_a_confirm_that_comes_too_late_is_nobody_elses(proxy: Proxy, administrator: Administrator) -> None:
    async with opened(proxy.url, confirm_timeout_seconds=2) as bus:
        await bus.publish([message(0)])
        proxy.answering.clear()
        late = sample("relay_publish_total", outcome="timeout")
        with pytest.raises(Unavailable, match="within 2 s"):
            await bus.publish([message(1), message(2)])
        assert sample("relay_publish_total", outcome="timeout") == late + 2
        for queue in (METER, ARCHIVIST, LOG):
            await administrator.unbind(queue)
        other = start(bus, [message(3), message(4)])
        while sample("relay_publish_inflight") < 2:
            await asyncio.sleep(0)
        confirmed = sample("relay_publish_total", outcome="confirmed")
        proxy.answering.set()  # two confirms for nobody, then two returns
        with pytest.raises(Unroutable):
            await other
        assert sample("relay_publish_total", outcome="confirmed") == confirmed
        assert sample("relay_publish_total", outcome="timeout") == late + 2


async def test_a_repetition_waits_for_the_answer_to_the_first_copy(proxy: Proxy) -> None:
    async with opened(proxy.url, confirm_timeout_seconds=2) as bus:
        await bus.publish([message(0)])
        proxy.answering.clear()
        with pytest.raises(Unavailable):
            await bus.publish([message(1)])
        again = start(bus, [message(1), message(2)])
        await bus_turns()
        assert sample("relay_publish_inflight") == 0
        proxy.answering.set()
        await again
        await until_depth(bus, METER, 4)


async def bus_turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_answer_that_never_comes_does_not_hold_up_its_message_for_ever(
    proxy: Proxy, administrator: Administrator
) -> None:
    async with opened(proxy.url, confirm_timeout_seconds=1, heartbeat_seconds=60) as bus:
        await bus.publish([message(0)])
        forget_the_next_answer(bus)
        with pytest.raises(Unavailable):
            await bus.publish([message(1)])
        async with asyncio.timeout(PROMPT):
            failures = 0
            while True:
                try:
                    await bus.publish([message(1)])
                    break
                except Unavailable:
                    failures += 1
        assert failures >= 1
        await bus.publish([message(2)])


def forget_the_next_answer(bus: RabbitBus) -> None:
    """As a broker would that loses one."""
    lane = bus.publisher._lane  # type: ignore[attr-defined]
    wire = lane._wire

    class Forgetful:
        def answered(self, tag: int, *, multiple: bool, ok: bool) -> None:
            wire.receivers[lane.channel.number] = lane

        def __getattr__(self, name: str) -> object:
            return getattr(lane, name)

    wire.receivers[lane.channel.number] = Forgetful()


async def test_callers_that_give_up_free_their_room_and_harm_nobody(proxy: Proxy) -> None:
    async with opened(proxy.url, window=20) as bus:
        await bus.publish([message(0)])
        proxy.answering.clear()
        calls = [start(bus, [message(100 * caller + n) for n in range(1, 9)]) for caller in range(10)]
        while sample("relay_publish_inflight") < 20:
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await bus_turns()
        assert [call.done() for call in calls] == [True, False] * 5
        assert sample("relay_publish_inflight") == 8, "those of the second caller; the others wait"
        proxy.answering.set()
        assert await outcomes_of(calls) == [asyncio.CancelledError, None] * 5
        await asyncio.gather(*(start(bus, [message(n)]) for n in range(2000, 2020)))  # as many as there is room
        assert sample("relay_publish_inflight") == 0


async def test_what_was_confirmed_before_the_rest_was_cut_off_has_its_time(proxy: Proxy) -> None:
    times, confirmed = (
        "relay_publish_confirm_duration_seconds_count",
        sample("relay_publish_total", outcome="confirmed"),
    )
    before = sample(times)
    async with opened(proxy.url) as bus:
        await bus.publish([message(0)])
        proxy.answering.clear()
        call = start(bus, [message(1), message(2)])
        while sample("relay_publish_inflight") < 2:
            await asyncio.sleep(0)
        bus.publisher._lane.answered(2, multiple=False, ok=True)  # type: ignore[attr-defined]  # as a broker may
        proxy.cut()
        assert await outcomes_of([call]) == [Unavailable]
    assert sample("relay_publish_total", outcome="confirmed") == confirmed + 2
    assert sample(times) == before + 2


async def test_no_caller_waits_longer_than_its_deadline_on_a_half_open_connection(proxy: Proxy) -> None:
    async with opened(proxy.url, window=100, confirm_timeout_seconds=1, heartbeat_seconds=60) as bus:
        await bus.publish([message(0)])
        assert proxy.swallow() == 1

        async def timed(number: int) -> float:
            started = time.monotonic()
            with pytest.raises(Unavailable):
                await bus.publish([message(number)])
            return time.monotonic() - started

        waited = await asyncio.gather(*(timed(number) for number in range(1, 500)))
        assert proxy.swallowed > 0
        assert max(waited) < 2
        proxy.cut()


@both_ways
@pytest.mark.parametrize("seed", range(3))
async def test_each_chat_keeps_its_order_through_nacks_returns_and_cuts(
    seed: int, publisher: str, proxy: Proxy, rabbit_vhost: str, administrator: Administrator
) -> None:
    chance = random.Random(seed)
    scripts: dict[str, list[list[Outgoing]]] = {str(chat): [] for chat in range(6)}
    before = {outcome: sample("relay_publish_total", outcome=outcome) for outcome in ("nacked", "returned", "error")}
    seen: dict[str, list[int]] = {chat: [] for chat in scripts}
    troubles = administrator.channel
    await troubles.exchange_declare("chats", exchange_type="topic", durable=True)
    full: dict[str, FieldValue] = {"x-queue-type": "quorum", "x-max-length": 3, "x-overflow": "reject-publish"}
    await troubles.queue_declare("chats", durable=True, arguments=full)

    def all_happened() -> bool:
        return all(sample("relay_publish_total", outcome=outcome) > number for outcome, number in before.items())

    async def follow(bus: RabbitBus, chat: str) -> None:
        for batch in batches_of(chat, random.Random(f"{seed} {chat}")):
            if len(scripts[chat]) >= 30 and all_happened():
                return
            scripts[chat].append(batch)
            while True:
                try:
                    await bus.publisher.send(batch)
                    break
                except Unavailable:
                    await asyncio.sleep(0.001)

    async def note(delivered: DeliveredMessage) -> None:
        chat, position = str(delivered.delivery.routing_key), int(delivered.body)  # type: ignore[union-attr]
        seen[chat].append(position)
        await delivered.channel.basic_ack(delivered.delivery.delivery_tag)  # type: ignore[arg-type,union-attr]

    async def trouble() -> None:
        while True:
            await troubles.queue_bind("chats", "chats", "#")
            await asyncio.sleep(chance.uniform(0.05, 0.3))
            if chance.random() < 0.5:
                proxy.cut()
            else:
                await troubles.queue_unbind("chats", "chats", "#")

    async with Administrator.of(rabbit_vhost) as reader, opened(proxy.url, window=40, publisher=publisher) as bus:
        await reader.channel.basic_qos(prefetch_count=5)
        await reader.channel.basic_consume("chats", note)
        async with asyncio.TaskGroup() as group:
            troubling = group.create_task(trouble())
            async with asyncio.timeout(90), asyncio.TaskGroup() as followers:
                for chat in scripts:
                    followers.create_task(follow(bus, chat))
            troubling.cancel()
        async with asyncio.timeout(PROMPT):  # all is stored, or it was confirmed in vain
            while any(not positions_in(script) <= set(seen[chat]) for chat, script in scripts.items()):
                await asyncio.sleep(0.01)
    for chat, script in scripts.items():
        assert_batches_in_order(seen[chat], [[int(message.body) for message in batch] for batch in script])


def batches_of(chat: str, chance: random.Random) -> Iterator[list[Outgoing]]:
    position = 0
    while True:
        size = chance.randint(1, 6)
        yield [
            Outgoing(f"{chat}-{number}", None, "chats", chat, str(number).encode(), "type", 1)
            for number in range(position, position + size)
        ]
        position += size


def positions_in(batches: Sequence[Sequence[Outgoing]]) -> set[int]:
    return {int(message.body) for batch in batches for message in batch}


def assert_batches_in_order(seen: Sequence[int], batches: Sequence[Sequence[int]]) -> None:
    """Nothing of a batch came before all of the one before it."""
    known: set[int] = set()
    begun = 0
    for position in seen:
        number = next(n for n, batch in enumerate(batches) if position in batch)
        if number > begun:
            missing = {p for batch in batches[:number] for p in batch} - known
            assert not missing, f"{position} came before {missing}"
            begun = number
        known.add(position)


# --- several hosts -------------------------------------------------------------------------------------------------


async def test_of_several_hosts_one_that_answers_is_taken(proxy: Proxy, rabbit_vhost: str) -> None:
    async with Proxy.to(rabbit_vhost) as other:
        host = other.url.rpartition("@")[2].partition("/")[0]
        async with opened(proxy.url, hosts=[host], confirm_timeout_seconds=5) as bus:
            for gone, left in ((proxy, other), (other, proxy), (proxy, other)):
                await gone.refuse()
                async with asyncio.timeout(PROMPT):
                    while True:
                        try:
                            await bus.publish([message(1)])
                            break
                        except Unavailable:
                            await asyncio.sleep(0.01)
                assert left.cut() > 0, "it went there"
                await gone.accept()


async def test_hosts_that_do_not_answer_have_a_deadline_each(rabbit_vhost: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        hosts = [f"127.0.0.1:{silent.getsockname()[1]}"] * 5
        async with opened(rabbit_vhost, hosts=hosts, connect_timeout_seconds=0.5) as bus:
            await bus.publish([message(1)])
