"""The metrics tell the truth: at rest, after faults, what was handed out, confirmed, parked, received and charged adds
up."""

import asyncio
from decimal import Decimal
from uuid import UUID

from prometheus_client import REGISTRY

from relay.adapters.clock import SystemClock
from relay.adapters.rabbit import RabbitBus, open_rabbit
from relay.programs.meter import Meter, MeterSettings
from relay.programs.prices import PriceSettings
from tests.adapters.broker import Administrator, Proxy
from tests.adapters.test_rabbit_faults import impatient
from tests.adapters.traffic import until_depth
from tests.e2e.consumer import Consumer, bound_to_everything
from tests.programs.world import World, until, while_running

STEPS = "[steps k=3 n=120 ms=50 toolms=300] look through all of them"
OUTCOMES = ("confirmed", "nacked", "returned", "timeout", "error")


class Ledger:
    """What the process's counters rose by since this was made."""

    def __init__(self) -> None:
        self._before = dict(self._samples())

    def _samples(self) -> list[tuple[tuple[str, frozenset[tuple[str, str]]], float]]:
        return [
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for metric in REGISTRY.collect()
            for sample in metric.samples
        ]

    def rise(self, name: str, **labels: str) -> float:
        """Of all series of that name with these labels together."""
        return sum(
            value - self._before.get((found, said), 0.0)
            for (found, said), value in self._samples()
            if found == name and labels.items() <= dict(said).items()
        )


def gauge(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, name
    return value


async def test_after_faults_every_account_balances(world: World, rabbit_vhost: str, proxy: Proxy) -> None:
    ledger = Ledger()
    prices = {
        str(config.id): PriceSettings(input=Decimal(3), output=Decimal(15)) for config in world.simulator.model_configs
    }
    async with (
        bound_to_everything(rabbit_vhost) as seen,
        open_rabbit(impatient(proxy.url)) as bus,
        open_rabbit(impatient(rabbit_vhost)) as meters_bus,
        Administrator.of(rabbit_vhost) as administrator,
    ):
        world.bus = bus  # type: ignore[assignment]
        meter = Meter(
            bus=meters_bus,
            charges=world.store,
            upstream=None,
            clock=SystemClock(),
            settings=MeterSettings(prices=prices),
        )
        handled: list[bool] = []
        async with while_running(meter.run(lambda ok, _: handled.append(ok))):
            async with world.worker() as (worker, _):
                await until(lambda: worker.discovery.state.watching)
                chats = [await world.owner.create(STEPS) for _ in range(3)]
                await through_faults(world, chats, seen, proxy, administrator)
                await until(lambda: not worker.state.followed)
            await at_rest(seen, meters_bus)
        received = len(seen.events) + sum(len(places) - 1 for places in seen.copied.values())
        parked = await meters_bus.depth("relay.frames.dead")
        assert await meters_bus.depth("relay.meter.dead") == 0

        # The broker's side.
        outcomes = {outcome: ledger.rise("relay_publish_total", outcome=outcome) for outcome in OUTCOMES}
        assert sum(outcomes.values()) == ledger.rise("relay_message_size_bytes_count"), "each attempt has one outcome"
        assert outcomes["confirmed"] == ledger.rise("relay_events_published_total") + parked
        assert outcomes["confirmed"] == ledger.rise("relay_publish_confirm_duration_seconds_count")
        doubtful = outcomes["timeout"] + outcomes["error"] + outcomes["nacked"]
        assert outcomes["confirmed"] - parked <= received <= outcomes["confirmed"] - parked + doubtful
        assert doubtful > 0, "no cut was felt"
        assert gauge("relay_publish_inflight") == 0
        families = {
            event["key"].split(".")[1 if event["key"].startswith("chat.") else 0] for event in seen.events.values()
        }
        for family in families:
            told = [event for event in seen.events.values() if family in event["key"].split(".")[:2]]
            assert ledger.rise("relay_events_published_total", family=family) >= len(told), family

        # Coder's side.
        errors = seen.named("chat.error.stream.")
        assert parked == ledger.rise("relay_decode_errors_total") == len(errors) == 1
        assert ledger.rise("relay_stream_errors_total") == len(errors)
        edits = {event["id"] for event in seen.named("chat.history.replaced.")}
        assert ledger.rise("relay_history_replaced_total") == len(edits) >= 1
        assert ledger.rise("relay_reconnects_total", reason="network_error") >= 1
        for state in ("connecting", "live", "backoff"):
            assert gauge("relay_streams", state=state) == 0
        assert gauge("relay_leases_held") == 0

        # Money.
        charges = world.rows("SELECT cost_micros FROM charges")
        assert ledger.rise("relay_usage_charges_total") == len(charges) > 3
        assert ledger.rise("relay_usage_spend_micros_total") == sum(cost for (cost,) in charges) > 0
        acked = ledger.rise("relay_consumer_messages_total", consumer="meter", outcome="acked")
        messages = seen.named("chat.message.")
        assert acked >= len(messages)
        assert gauge("relay_consumer_inflight", consumer="meter") == 0
        assert len({event["id"] for event in seen.named("usage.charged.")}) == len(charges)


async def through_faults(
    world: World, chats: list[UUID], seen: Consumer, proxy: Proxy, administrator: Administrator
) -> None:
    """The broker's connection cut, a queue gone, sockets cut, a frame that cannot be read, an edit; then at rest, and
    a consumer knows what Coder knows."""
    first, second, third = chats
    for chat in chats:
        await until(lambda chat=chat: [e for e in seen.of(str(chat)) if e["key"].startswith("chat.preview.")])  # type: ignore[misc]
    await cut_in_full_flow(proxy)
    await administrator.delete("relay.archivist")
    assert world.simulator.cut(second) == 1
    await until(lambda: world.simulator.streams(third))
    assert await world.simulator.inject("<html>bad gateway</html>", third) == 1
    for chat in chats:
        await world.owner.wait_idle(chat)
    await world.owner.send(second, STEPS)
    await until(lambda: [e for e in seen.of(str(second)) if e["key"].startswith("chat.message.user.")][1:])
    await cut_in_full_flow(proxy)
    await world.owner.wait_idle(second)
    await world.owner.edit(first, (await world.owner.prompts(first))[0], STEPS)
    for chat in chats:
        await world.owner.wait_idle(chat)
    world.consumer = lambda: seen  # type: ignore[method-assign]
    await world.until_equal(*chats)


async def cut_in_full_flow(proxy: Proxy) -> None:
    """While messages wait for their confirms: they might be the meter's, or be answered in the last moment."""
    felt = counted_errors()
    async with asyncio.timeout(20):
        while counted_errors() == felt:
            while not gauge("relay_publish_inflight"):
                await asyncio.sleep(0)
            proxy.cut()
            await asyncio.sleep(0.01)


def counted_errors() -> float:
    return gauge("relay_publish_total", outcome="error")


async def at_rest(seen: Consumer, bus: RabbitBus) -> None:
    """Everything published was delivered and worked off."""
    await until_depth(bus, "relay.meter", 0)
    number = -1
    while number != (number := len(seen.events)):
        await asyncio.sleep(0.3)  # the worker is gone; the meter's own events may be on their way
