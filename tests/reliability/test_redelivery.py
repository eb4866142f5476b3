"""What comes again has no second effect; poison is given up after as many tries as the queue says, and nothing else."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.database import DatabaseSettings, migrate
from relay.adapters.memory import MemoryBus
from relay.adapters.rabbit import RabbitBus, RabbitSettings, open_rabbit
from relay.adapters.topology import DELIVERY_LIMIT, METER
from relay.core.errors import Unavailable
from relay.core.events import Event
from relay.programs.inbox import Inbox
from relay.programs.prices import PriceSettings
from tests.adapters.broker import Proxy
from tests.adapters.test_rabbit_faults import impatient
from tests.adapters.traffic import message, positions, take, until_depth
from tests.core.laws import data_of
from tests.programs.test_meter import DAILY, meter, said, worked_off
from tests.programs.world import World, counted, until, while_running
from tests.reliability.dying_meter import MODEL

ROOT = Path(__file__).parents[2]
PROMPT = 30.0  # failsafe


async def rows(database: str, query: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(urlunsplit(urlsplit(database)._replace(scheme="postgresql")))
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def test_a_meter_killed_between_effect_and_ack_charges_and_alerts_once(
    rabbit_vhost: str, postgres_database: str
) -> None:
    await migrate(DatabaseSettings(url=postgres_database), SystemClock())
    charged = [said(number) for number in range(1, 7)]  # 3000 micros each of a limit of 10 000
    async with open_rabbit(RabbitSettings.model_validate({"url": rabbit_vhost})) as bus, bus.tap("usage.#") as told:
        await bus.publish([*charged, charged[0]])
        # Each one acks what the one before had charged, charges some more, and dies on the last: 1; 2 and 3; 4 to 6.
        for number in (1, 3, 4):
            await dies(rabbit_vhost, postgres_database, number)
        assert await rows(postgres_database, "SELECT count(*) FROM charges") == [(6,)]
        await dies(rabbit_vhost, postgres_database, 2)  # on the copy of the first
        await until_depth(bus, METER, 1)
        seen: dict[str, Any] = {}
        copies: Counter[str] = Counter()
        while not any(each["data"].get("percent") == 100 for each in seen.values()) or len(seen) < 6 + 4:
            (delivery,) = await take(told)
            event = json.loads(delivery.body)
            seen[event["id"]] = event
            copies[event["id"]] += 1
        assert await bus.depth(f"{METER}.dead") == 0
    stored = await rows(postgres_database, "SELECT message_id, cost_micros FROM charges ORDER BY 1")
    assert stored == [(number, 3000) for number in range(1, 7)]
    levels = sorted(each["data"]["percent"] for each in seen.values() if "percent" in each["data"])
    assert levels == [50, 80, 95, 100]
    assert max(copies.values()) > 1, "nobody died between the effect and the ack"


async def test_a_copy_after_a_change_of_price_tells_what_was_charged(world: World) -> None:
    await world.bus.publish([said(1)])
    await worked_off(world, meter(world))
    await world.bus.publish([said(1)])
    dearer = {MODEL: PriceSettings(input=Decimal(100), output=Decimal(200))}
    await worked_off(world, meter(world, prices=dearer))
    told = [data_of(event) for event in world.bus.published if event.event == "charged"]
    assert [each["cost_micros"] for each in told] == [3000, 3000]
    assert told[0]["price"] == {"input": "1", "output": "2"}
    assert "price" not in told[1], "it is another one by now"
    assert world.rows("SELECT cost_micros FROM charges") == [(3000,)]


async def test_a_level_is_counted_once_however_often_its_message_comes(world: World) -> None:
    before = counted("relay_usage_alerts_total", event="threshold")
    for _ in range(3):
        await world.bus.publish([said(1), said(2), said(1)])
        await worked_off(world, meter(world, DAILY))
    levels = {event.id for event in world.bus.published if event.event == "threshold"}
    assert counted("relay_usage_alerts_total", event="threshold") == before + len(levels) == before + 1


async def test_an_event_whose_consumer_was_stopped_in_the_middle_comes_again() -> None:
    bus, entered, handled = MemoryBus(), asyncio.Event(), list[int]()

    async def never(_: Event) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def handle(event: Event) -> None:
        handled.append(event.position)

    await bus.publish([said(1), said(2)])
    inbox = Inbox("meter", METER, bus=bus, clock=SystemClock(), prefetch=5)
    async with while_running(inbox.work_off(never, lambda ok, reason: None)):
        await entered.wait()
    assert await bus.depth(f"{METER}.dead") == 0
    async with while_running(inbox.work_off(handle, lambda ok, reason: None)):
        await until(lambda: handled == [1, 2])
    assert await bus.depth(METER) == await bus.depth(f"{METER}.dead") == 0


async def dies(rabbit: str, database: str, number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.reliability.dying_meter", rabbit, database, str(number)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PROMPT):
            _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.parametrize("prefetch", [1, 10])
async def test_poison_that_kills_and_fails_its_consumers_by_turns_is_given_up_after_the_limit(
    rabbit_vhost: str, proxy: Proxy, prefetch: int
) -> None:
    """A consumer whose connection is cut counts as one that gave the message back. No other message is lost."""
    good = list(range(1, 15))
    async with open_rabbit(impatient(rabbit_vhost)) as way_in:
        await way_in.publish([message(number) for number in (*good[:7], 666, *good[7:])])
        failures, cuts, handled = 0, 0, list[int]()
        async with open_rabbit(impatient(proxy.url)) as bus:
            while failures < DELIVERY_LIMIT + 1:
                try:
                    async with bus.deliveries(METER, prefetch=prefetch) as deliveries:
                        while True:
                            (delivery,) = await take(deliveries)
                            (position,) = positions([delivery])
                            if position != 666:
                                await delivery.ack()
                                handled.append(position)
                                continue
                            failures += 1
                            if failures % 3:
                                await delivery.requeue()
                            else:
                                cuts += 1
                                assert proxy.cut() > 0
                except (Unavailable, TimeoutError):
                    continue
        await until_depth(way_in, f"{METER}.dead", 1)
        await finished(way_in, handled, set(good))
        assert failures == DELIVERY_LIMIT + 1  # delivered once, and given back as often as the limit says
        assert cuts == (DELIVERY_LIMIT + 1) // 3
        async with way_in.deliveries(f"{METER}.dead", prefetch=5) as dead:
            assert positions(await take(dead)) == [666]


async def finished(bus: RabbitBus, handled: list[int], everything: set[int]) -> None:
    """Work off what is left; nothing is missing, nothing is there but what was published."""
    async with bus.deliveries(METER, prefetch=50) as deliveries:
        while not everything <= set(handled):
            (delivery,) = await take(deliveries)
            await delivery.ack()
            handled += positions([delivery])
    assert set(handled) == everything
    await until_depth(bus, METER, 0)
