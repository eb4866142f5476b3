"""RabbitMQ and the way to it may break at any time. Each test shows that its fault happened."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

import httpx
import pytest
from structlog.testing import capture_logs

from relay.adapters.rabbit import RabbitBus, RabbitSettings, open_rabbit
from relay.adapters.rabbit_link import FAILURES, ask
from relay.adapters.topology import METER, QUEUES
from relay.core.errors import TooLarge, Unavailable, Unroutable, WrongSettings
from relay.core.events import Event
from relay.ports import Bus
from tests.adapters.broker import Administrator, PrivateBroker, Proxy, free_port
from tests.adapters.test_rabbit import both_ways, publish_for_ever, sample, vhost_of
from tests.adapters.traffic import CHAT, PROMPT, message, positions, take, until_depth


@pytest.fixture
async def proxy(rabbit_vhost: str) -> AsyncIterator[Proxy]:
    async with Proxy.to(rabbit_vhost) as proxy:
        yield proxy


@pytest.fixture
def publisher(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "pipelined"))


@pytest.fixture
async def bus(proxy: Proxy, publisher: str) -> AsyncIterator[RabbitBus]:
    async with open_rabbit(impatient(proxy.url, publisher)) as bus:
        yield bus


def impatient(url: str, publisher: str = "pipelined") -> RabbitSettings:
    return RabbitSettings.model_validate(
        {"url": url, "confirm_timeout_seconds": 2, "heartbeat_seconds": 1, "publisher": publisher}
    )


async def publish_until_confirmed(bus: Bus, events: list[Event]) -> int:
    """Publish as every program does; how often it took another try."""
    failures = 0
    while True:
        try:
            await bus.publish(events)
            return failures
        except Unroutable:
            raise
        except Unavailable:
            failures += 1
            await asyncio.sleep(0.05)


async def assert_all_in_order(bus: Bus, last: int) -> None:
    """Every message from 0 to `last` is in the meter's queue, and the first copies are in order."""
    first_copies: list[int] = []
    async with bus.deliveries(METER, prefetch=500) as deliveries:
        while last not in first_copies:
            (delivery,) = await take(deliveries)
            await delivery.ack()
            (position,) = positions([delivery])
            if position not in first_copies:
                first_copies.append(position)
    assert first_copies == list(range(last + 1))


# --- what aiormq does to those who wait -----------------------------------------------------------------------------


async def cancel_itself() -> None:
    raise asyncio.CancelledError  # as a future that aiormq rejects, or a task of its that it cancels


async def fail_without_a_reason() -> None:
    raise Exception  # noqa: TRY002


async def end_an_iteration() -> None:
    raise StopAsyncIteration


@pytest.mark.parametrize("call", [cancel_itself, fail_without_a_reason, end_an_iteration])
async def test_a_call_given_up_by_the_library_is_a_lost_connection(
    call: Callable[[], Coroutine[None, None, None]],
) -> None:
    with pytest.raises(FAILURES, match="connection lost"):
        await ask(call(), PROMPT)


async def test_a_call_that_does_not_end_is_given_up_in_time_even_if_it_ignores_its_end() -> None:
    ended = asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await ended.wait()

    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        await ask(stubborn(), 0.05)
    ended.set()


# --- the way to the broker -----------------------------------------------------------------------------------------


@both_ways
async def test_connections_cut_in_full_flow_lose_nothing(bus: RabbitBus, proxy: Proxy) -> None:
    reconnects = sample("relay_broker_reconnects_total", reason="network_error")
    failures = 0
    for batch in range(40):
        events = [message(10 * batch + n) for n in range(10)]
        if batch % 10 == 5:
            publishing = asyncio.create_task(publish_until_confirmed(bus, events))
            while not sample("relay_publish_inflight"):
                await asyncio.sleep(0)
            assert proxy.cut() == 1
            failures += await publishing
        else:
            failures += await publish_until_confirmed(bus, events)
    assert failures >= 4, "each cut was felt"
    assert sample("relay_broker_reconnects_total", reason="network_error") == reconnects + 4
    await assert_all_in_order(bus, 399)


@both_ways
async def test_a_half_open_connection_holds_no_publish_longer_than_its_deadline(bus: RabbitBus, proxy: Proxy) -> None:
    await bus.publish([message(1)])
    heartbeats = sample("relay_broker_reconnects_total", reason="heartbeat")
    timeouts = sample("relay_publish_total", outcome="timeout")
    assert proxy.swallow() == 1
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await bus.publish([message(2)])
    assert time.monotonic() - started < 2 + 1  # the deadline; noticed by then or not
    assert proxy.swallowed > 0
    async with asyncio.timeout(PROMPT):
        await publish_until_confirmed(bus, [message(3)])
    assert (
        sample("relay_broker_reconnects_total", reason="heartbeat") == heartbeats + 1
        or sample("relay_publish_total", outcome="timeout") > timeouts
    )


@both_ways
async def test_a_deadline_is_kept_before_the_heartbeat_notices(proxy: Proxy, publisher: str) -> None:
    slow = impatient(proxy.url, publisher).model_copy(update={"confirm_timeout_seconds": 1, "heartbeat_seconds": 60})
    async with open_rabbit(slow) as bus:
        timeouts = sample("relay_publish_total", outcome="timeout")
        assert proxy.swallow() == 1
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(Unavailable, match=r"within 1 s"):
                await bus.publish([message(1), message(2)])
            assert 0.9 < time.monotonic() - started < 1.5
        assert proxy.swallowed > 0
        assert sample("relay_publish_total", outcome="timeout") >= timeouts + 2  # sent again, or held back
        assert sample("relay_publish_inflight") == 0
        proxy.cut()  # or closing asks in vain


async def test_a_consumer_on_a_half_open_connection_is_told_within_two_heartbeats(bus: RabbitBus, proxy: Proxy) -> None:
    async with bus.deliveries(METER, prefetch=1) as deliveries:
        waiting = asyncio.ensure_future(anext(deliveries))
        started = time.monotonic()
        assert proxy.swallow() == 2
        with pytest.raises(Unavailable):
            async with asyncio.timeout(PROMPT):
                await waiting
        assert time.monotonic() - started < 4.5  # 2 s, what aiormq rounds up, and a loaded machine
        assert proxy.swallowed > 0
        assert bus_is_connected() == 0
        proxy.cut()
    async with asyncio.timeout(PROMPT):
        await publish_until_confirmed(bus, [message(1)])
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            assert positions(await take(deliveries)) == [1]
    assert bus_is_connected() == 1


async def test_a_publisher_on_a_half_open_connection_notices_within_two_heartbeats(
    bus: RabbitBus, proxy: Proxy
) -> None:
    """Also while there is nothing to publish: what comes next need not wait for a deadline."""
    await bus.publish([message(1)])
    heartbeats = sample("relay_broker_reconnects_total", reason="heartbeat")
    started = time.monotonic()
    assert proxy.swallow() == 1
    async with asyncio.timeout(PROMPT):
        while bus_is_connected():
            await asyncio.sleep(0.02)
    assert time.monotonic() - started < 4.5  # 2 s, what aiormq rounds up, and a loaded machine
    proxy.cut()
    async with asyncio.timeout(PROMPT):
        await publish_until_confirmed(bus, [message(2)])
    assert bus_is_connected() == 1
    assert sample("relay_broker_reconnects_total", reason="heartbeat") == heartbeats + 1


def bus_is_connected() -> float:
    return sample("relay_broker_connected")


async def test_connections_closed_by_an_administrator_are_made_anew(
    bus: RabbitBus, rabbit_vhost: str, rabbit_management_url: str
) -> None:
    closed = sample("relay_broker_reconnects_total", reason="closed_by_broker")
    await bus.publish([message(1)])
    with capture_logs() as logs:
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            await take(deliveries)
            waiting = asyncio.ensure_future(anext(deliveries))
            async with httpx.AsyncClient(base_url=rabbit_management_url) as management, asyncio.timeout(PROMPT):
                assert await close_connections(management, vhost_of(rabbit_vhost)) == 2
            with pytest.raises(Unavailable, match="CONNECTION_FORCED"):
                async with asyncio.timeout(PROMPT):
                    await waiting
        await publish_until_confirmed(bus, [message(2)])
        async with bus.deliveries(METER, prefetch=2) as deliveries:
            assert positions(await take(deliveries, 2)) == [1, 2]
    assert sample("relay_broker_reconnects_total", reason="closed_by_broker") == closed + 2
    told = Counter((entry["event"], entry["purpose"]) for entry in logs)
    assert told == {
        ("broker_lost", "publisher"): 1,
        ("broker_connected", "publisher"): 1,
        ("broker_lost", "consumer"): 1,
        ("broker_connected", "consumer"): 2,
    }


async def close_connections(management: httpx.AsyncClient, vhost: str) -> int:
    """Close the connections of the relay; how many. The management plugin lists them a few seconds late."""
    while True:
        listed = (await management.get(f"/api/vhosts/{vhost}/connections")).json()
        names = [c["name"] for c in listed if "coder-chat-relay" in str(c.get("client_properties"))]
        if len(names) == 2:
            break
        await asyncio.sleep(0.1)
    for name in names:
        (await management.delete(f"/api/connections/{name}")).raise_for_status()
    return len(names)


@both_ways
async def test_a_publish_cancelled_on_a_stuck_connection_ends_at_once(bus: RabbitBus, proxy: Proxy) -> None:
    assert proxy.swallow() == 1
    publishing = asyncio.create_task(bus.publish([message(n, text="x" * 100_000) for n in range(200)]))
    while proxy.swallowed < 1_000_000:
        await asyncio.sleep(0.01)
    started = time.monotonic()
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    assert time.monotonic() - started < 0.5
    assert sample("relay_publish_inflight") == 0
    async with asyncio.timeout(PROMPT):
        await publish_until_confirmed(bus, [message(1)])


async def test_reconnecting_leaves_no_tasks_behind(bus: RabbitBus, proxy: Proxy) -> None:
    async def one_round() -> int:
        async with bus.deliveries(METER, prefetch=1) as deliveries, bus.tap("#") as tapped:
            await publish_until_confirmed(bus, [message(1)])
            await (await take(deliveries))[0].ack()
            await take(tapped)
            assert proxy.cut() == 2  # the ack may be cut off too: its message stays for a later round
            with pytest.raises(Unavailable):
                await anext(deliveries)
        await publish_until_confirmed(bus, [message(1)])
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            await (await take(deliveries))[0].ack()
        return len(asyncio.all_tasks())

    at_first = await one_round()
    for _ in range(10):
        last = await one_round()
    async with asyncio.timeout(PROMPT):
        while last > at_first:
            await asyncio.sleep(0.05)
            last = len(asyncio.all_tasks())


async def test_closing_does_not_wait_for_a_broker_that_does_not_answer(proxy: Proxy) -> None:
    async with open_rabbit(impatient(proxy.url)):
        assert proxy.swallow() == 1
        started = time.monotonic()
    assert time.monotonic() - started < 5 + 1


# --- the broker itself ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateBroker]:
    if not PrivateBroker.is_installed():
        pytest.skip("needs RabbitMQ installed from Debian packages: the tests' broker must not be killed")
    broker = PrivateBroker(tmp_path_factory.mktemp("broker"), [free_port() for _ in range(3)])
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


@pytest.fixture
async def private(private_broker: PrivateBroker) -> PrivateBroker:
    async with open_rabbit(impatient(private_broker.url)):
        await asyncio.to_thread(private_broker.until_remembered)
    async with Administrator.of(private_broker.url) as administrator:
        for queue in QUEUES.values():
            if not queue.is_stream:
                await administrator.channel.queue_purge(queue.name)
    return private_broker


@both_ways
async def test_a_broker_killed_in_full_flow_and_started_again_has_everything(
    private: PrivateBroker, publisher: str
) -> None:
    async with open_rabbit(impatient(private.url, publisher)) as bus:
        await bus.publish([message(n) for n in range(100)])
        confirmed = sample("relay_events_published_total", family="message")
        publishing = asyncio.create_task(publish_until_confirmed(bus, [message(n) for n in range(100, 1100)]))
        while sample("relay_events_published_total", family="message") == confirmed:
            await asyncio.sleep(0)
        private.kill()  # at once: nothing of ours runs meanwhile
        assert sample("relay_events_published_total", family="message") < confirmed + 1000, "it was in full flow"
        with pytest.raises(Unavailable):
            await bus.depth(METER)
        await asyncio.to_thread(private.start)
        async with asyncio.timeout(60):
            assert await publishing > 0
        await assert_all_in_order(bus, 1099)


@both_ways
async def test_a_broker_short_of_memory_blocks_publishers_but_not_acks(private: PrivateBroker, publisher: str) -> None:
    async with open_rabbit(impatient(private.url, publisher)) as bus:
        await bus.publish([message(1), message(2)])
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            await take(deliveries)
            await asyncio.to_thread(private.control, "set_vm_memory_high_watermark", "0.00001")
            with pytest.raises(Unavailable, match="blocks publishers"):
                await publish_for_ever(bus)  # the alarm comes a moment later
            assert sample("relay_broker_blocked") == 1
            sent = sample("relay_message_size_bytes_count")
            started = time.monotonic()
            with pytest.raises(Unavailable, match="blocks publishers"):
                await bus.publish([message(100)])
            assert time.monotonic() - started < 2 + 0.5
            assert sample("relay_message_size_bytes_count") == sent, "nothing more is put into a socket nobody reads"
        async with bus.deliveries(METER, prefetch=1) as deliveries:
            await (await take(deliveries))[0].ack()
            assert positions(await take(deliveries)) == [2]
        await asyncio.to_thread(private.control, "set_vm_memory_high_watermark", "0.6")
        async with asyncio.timeout(PROMPT):
            await publish_until_confirmed(bus, [message(101)])
        assert sample("relay_broker_blocked") == 0


@both_ways
async def test_what_waited_for_a_broker_without_memory_goes_out_when_it_has_some(
    private: PrivateBroker, publisher: str
) -> None:
    patient = impatient(private.url, publisher).model_copy(update={"confirm_timeout_seconds": 60.0})
    async with open_rabbit(patient) as bus:
        await bus.publish([message(0)])
        await asyncio.to_thread(private.control, "set_vm_memory_high_watermark", "0.00001")
        with capture_logs() as logs:
            calls = [asyncio.create_task(bus.publish([message(1)]))]
            while sample("relay_broker_blocked") == 0:  # the broker tells who publishes
                await asyncio.sleep(0.01)
                if calls[-1].done():
                    calls.append(asyncio.create_task(bus.publish([message(len(calls) + 1)])))
            calls += [asyncio.create_task(bus.publish([message(len(calls) + n)])) for n in range(1, 101)]
            sent = sample("relay_message_size_bytes_count")
            await bus.depth(METER)
            assert sample("relay_message_size_bytes_count") == sent
            assert not any(call.done() for call in calls[-100:])
            await asyncio.to_thread(private.control, "set_vm_memory_high_watermark", "0.6")
            async with asyncio.timeout(PROMPT):
                await asyncio.gather(*calls)
        assert [log["event"] for log in logs if log["event"].startswith("broker_")] == [
            "broker_blocked",
            "broker_connected",  # to ask for the depth
            "broker_unblocked",
        ]
        await assert_all_in_order(bus, len(calls))


@both_ways
async def test_a_broker_with_tls_is_trusted_by_its_authority_only(private: PrivateBroker, publisher: str) -> None:
    trusting = impatient(f"{private.tls_url}?cafile={private.authority}", publisher)
    async with open_rabbit(trusting) as bus:
        await asyncio.gather(*(bus.publish([message(n, text="x" * 5000)]) for n in range(500)))
        await bus.park_frame(CHAT, bytes(500_000), "schema")
        await until_depth(bus, METER, 500)
    with pytest.raises(WrongSettings, match=r"no TLS with RabbitMQ at amqps:.*CERTIFICATE_VERIFY_FAILED"):
        async with open_rabbit(impatient(private.tls_url, publisher)):
            pass


@both_ways
async def test_a_message_over_the_brokers_limit_is_not_repeated_for_ever(
    private: PrivateBroker, publisher: str
) -> None:
    async with open_rabbit(impatient(private.url, publisher)) as bus:
        huge = message(1, text="x" * private.LARGEST)
        small = asyncio.create_task(publish_until_confirmed(bus, [message(n) for n in range(2, 50)]))
        with pytest.raises(TooLarge, match=r"chat\.message\.assistant.*max_message_size") as caught:
            await bus.publish([huge])
        assert caught.value.size == len(huge.encode())
        assert caught.value.limit == private.LARGEST
        await small  # others on the channel go on
        fits = message(0, text="x" * (private.LARGEST - 2000))
        await bus.publish([fits])
        await until_depth(bus, METER, 49)
