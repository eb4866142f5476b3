"""Each message that costs is charged once at the right price; each limit level fires once."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import pytest

from relay.adapters.clock import SystemClock
from relay.adapters.coder import open_upstream
from relay.core.errors import Unavailable
from relay.core.events import ChatRef, Event, MessageData, Origin, decode_event, event_id, utc
from relay.core.usage import Period
from relay.ports import Charges
from relay.programs.meter import Meter, MeterSettings, PolicySettings
from relay.programs.prices import PriceSettings
from relay.simulator.state import ModelConfig
from tests.programs.world import World, until, upstream_settings, while_running

MODEL = UUID(int=77)
ANN = UUID(int=2)
CHAT = ChatRef("https://coder.example", UUID(int=1), ANN, UUID(int=1))
DAILY = PolicySettings(name="daily", period=Period.DAY, limit_micros=10_000)
OWN = {str(MODEL): PriceSettings(input=Decimal(1), output=Decimal(2))}
AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def said(
    number: int, *, usage: dict[str, Any] | None = None, model: UUID = MODEL, at: datetime = AT, chat: ChatRef = CHAT
) -> Event:
    """An assistant message; by default it costs 3000 micros at the tests' own prices."""
    message: dict[str, object] = {
        "id": number,
        "role": "assistant",
        "created_at": at.isoformat(),
        "model_config_id": str(model),
        "content": [],
        "usage": {"input_tokens": 1000, "output_tokens": 1000} if usage is None else usage,
    }
    return Event(
        id=event_id(chat, "message", number),
        family="chat",
        event="message",
        detail="assistant",
        chat=chat,
        content=MessageData(message=message, text=""),
        time=utc(at),
        origin=Origin.LIVE,
        session=1,
        position=number,
    )


def meter(
    world: World, *policies: PolicySettings, prices: Any = OWN, bus: Any = None, charges: Charges | None = None
) -> Meter:
    settings = MeterSettings(prices=prices, policies=policies)
    return Meter(
        bus=bus or world.bus, charges=charges or world.store, upstream=None, clock=SystemClock(), settings=settings
    )


def published(world: World, event: str) -> list[Any]:
    """Data of the meter's events of a kind, copies left out."""
    mine = [e for e in world.bus.published if (e.family, e.event) == ("usage", event)]
    return list({e.id: cast(Any, e.data) for e in mine}.values())


async def worked_off(world: World, *meters: Meter) -> None:
    """Let meters work until the queue is empty and nothing is in their hands."""
    for one in meters:
        reported: list[bool] = []
        async with while_running(one.run(lambda ok, _, heard=reported: heard.append(ok))):  # type: ignore[misc]
            await until(lambda heard=reported: heard and not world.bus._queues["relay.meter"] and not unended(world))  # type: ignore[misc]


def unended(world: World) -> int:
    return sum(len(consumer.unended) for consumer in world.bus._queues["relay.meter"].consumers)


async def test_a_message_is_charged_once_however_often_it_comes(world: World) -> None:
    await world.bus.publish([said(1), said(2), said(1), said(2), said(1)])
    await worked_off(world, meter(world))
    await world.bus.publish([said(2)])
    await worked_off(world, meter(world))
    assert world.rows("SELECT message_id, cost_micros FROM charges ORDER BY 1") == [(1, 3000), (2, 3000)]
    charged = {e.id for e in world.bus.published if (e.family, e.event) == ("usage", "charged")}
    assert len(charged) == 2


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        pytest.param({"input_tokens": 3, "output_tokens": 0}, 3, id="input only"),
        pytest.param({"input_tokens": 1, "output_tokens": 2, "reasoning_tokens": 2}, 5, id="reasoning is in output"),
        pytest.param({"cache_read_tokens": 50}, None, id="no price for what was used"),
        pytest.param({}, None, id="nothing was used"),
    ],
)
async def test_cost(world: World, usage: dict[str, Any], cost: int | None) -> None:
    await world.bus.publish([said(1, usage=usage)])
    await worked_off(world, meter(world))
    assert world.rows("SELECT cost_micros FROM charges") == [(cost,)]
    assert published(world, "charged")[0]["cost_micros"] == cost


async def test_an_interrupted_step_without_usage_is_no_charge(world: World) -> None:
    event = said(1)
    del cast(Any, event.data)["message"]["usage"]
    await world.bus.publish([event])
    await worked_off(world, meter(world))
    assert world.rows("SELECT * FROM charges") == []


async def test_a_model_without_a_price_is_charged_as_unpriced(world: World) -> None:
    await world.bus.publish([said(1, model=UUID(int=99))])
    await worked_off(world, meter(world, DAILY))
    assert world.rows("SELECT cost_micros FROM charges") == [(None,)]
    assert "price" not in published(world, "charged")[0]
    assert published(world, "threshold") == []


async def test_prices_come_from_coder_and_the_price_book_wins(world: World) -> None:
    (config,) = world.simulator.model_configs
    assert isinstance(config, ModelConfig)
    async with open_upstream(upstream_settings(world.simulator, "admin")) as upstream:

        def reader(prices: Any) -> Meter:
            settings = MeterSettings(prices=prices)
            return Meter(bus=world.bus, charges=world.store, upstream=upstream, clock=SystemClock(), settings=settings)

        await world.bus.publish([said(1, model=config.id)])
        await worked_off(world, reader({}))
        await world.bus.publish([said(2, model=config.id)])
        await worked_off(world, reader({config.model: PriceSettings(input=Decimal(7), output=Decimal("0.0005"))}))
        await world.bus.publish([said(3, model=config.id)])
        await worked_off(world, reader({str(config.id): PriceSettings(input=Decimal(9))}))
    costs = world.rows("SELECT cost_micros FROM charges ORDER BY message_id")
    # 3 and 15 USD per million from Coder; 7000.5 is rounded up; without an output price output costs nothing.
    assert costs == [(18_000,), (7_001,), (9_000,)]
    assert {data["model"] for data in published(world, "charged")} == {config.model}


async def test_each_level_fires_once_whatever_comes_again(world: World) -> None:
    events = [said(number) for number in range(1, 6)]  # 15000 of 10000
    await world.bus.publish(events)
    await worked_off(world, meter(world, DAILY))
    await world.bus.publish(events[::-1])
    await worked_off(world, meter(world, DAILY), meter(world, DAILY))
    assert [data["percent"] for data in published(world, "threshold")] == [50, 80, 95]
    assert [data["percent"] for data in published(world, "exceeded")] == [100]
    exceeded = published(world, "exceeded")[0]
    assert exceeded["spend_micros"] == 12_000
    assert exceeded["scope"] == {"kind": "user", "id": str(ANN)}


async def test_levels_fire_again_in_the_next_period_and_for_another_owner(world: World) -> None:
    bob = ChatRef(CHAT.deployment, UUID(int=9), UUID(int=3), UUID(int=9))
    big = {"input_tokens": 10_000}
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    await world.bus.publish(
        [
            said(1, usage=big),
            said(2, usage=big, at=midnight - timedelta(microseconds=1)),
            said(3, usage=big, at=midnight),
            said(4, usage=big, chat=bob),
        ]
    )
    await worked_off(world, meter(world, DAILY))
    fired = [(data["scope"]["id"], data["period"]["start"]) for data in published(world, "exceeded")]
    assert fired == [
        (str(ANN), "2026-03-01T00:00:00Z"),
        (str(ANN), "2026-03-02T00:00:00Z"),
        (str(bob.owner_id), "2026-03-01T00:00:00Z"),
    ]


class Killed(BaseException):
    """The process dies here."""


class Fuse:
    """A port that works until its nth call, before or after which the process dies."""

    def __init__(self, port: Any, calls: Sequence[str], *, after: bool) -> None:
        self._port, self._calls, self._after = port, calls, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._port, name)
        if name not in self._calls:
            return method

        async def call(*arguments: Any, **named: Any) -> Any:
            if not self._after:
                raise Killed
            await method(*arguments, **named)
            raise Killed

        return call


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["charge", "spend", "raise_alert", "alert_published", "publish"])
async def test_a_meter_that_dies_anywhere_charges_and_alerts_once(world: World, call: str, *, after: bool) -> None:
    event = said(1, usage={"input_tokens": 6000})
    dying = meter(
        world,
        DAILY,
        bus=Fuse(world.bus, [call], after=after),
        charges=cast(Charges, Fuse(world.store, [call], after=after)),
    )
    with pytest.raises(Killed):
        await dying.handle(event)
    await world.bus.publish([event])  # it was not acked: it comes again
    await worked_off(world, meter(world, DAILY))
    assert world.rows("SELECT cost_micros FROM charges") == [(6000,)]
    alerts = {e.id: cast(Any, e.data)["percent"] for e in world.bus.published if e.event == "threshold"}
    assert sorted(alerts.values()) == [50]
    assert {cast(Any, e.data)["cost_micros"] for e in world.bus.published if e.event == "charged"} == {6000}
    assert await world.store.unpublished_alerts() == []


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param({"message": "text"}, id="a message that is text"),
        pytest.param({}, id="no message"),
        pytest.param({"message": {"role": "assistant", "usage": {"input_tokens": 1}}}, id="no id"),
        pytest.param({"message": {"id": "7", "usage": {"input_tokens": 1}}}, id="an id that is text"),
        pytest.param({"message": {"id": 2**70, "usage": {"input_tokens": 1}}}, id="an id no store can hold"),
        pytest.param({"message": {"id": 7, "usage": {"input_tokens": 2**70}}}, id="more tokens than a store can hold"),
    ],
)
async def test_poison_goes_to_the_dead_letters_and_the_next_is_charged(world: World, damage: Any) -> None:
    poison = said(7)
    cast(Any, poison.data).clear()
    cast(Any, poison.data).update(damage)
    await world.bus.publish([poison, said(1)])
    await worked_off(world, meter(world))
    assert await world.bus.depth("relay.meter.dead") == 1
    assert (1, 3000) in world.rows("SELECT message_id, cost_micros FROM charges")


async def test_a_number_where_usage_should_be_harms_nobody(world: World) -> None:
    strange = said(7, usage={"input_tokens": "many", "output_tokens": -5, "cache_read_tokens": None})
    await world.bus.publish([strange, said(1)])
    await worked_off(world, meter(world))
    assert (1, 3000) in world.rows("SELECT message_id, cost_micros FROM charges")


async def test_what_comes_while_the_database_is_away_is_charged_afterwards(world: World) -> None:
    reported: list[bool] = []
    async with while_running(meter(world).run(lambda ok, _: reported.append(ok))):
        await until(lambda: reported == [True])
        async with world.database_away():
            await world.bus.publish([said(number) for number in range(1, 6)])
            await until(lambda: False in reported)
        await until(lambda: len(world.rows("SELECT * FROM charges")) == 5)
        await until(lambda: reported[-1])
    assert await world.bus.depth("relay.meter.dead") == 0


class Answerless:
    """A store whose first answer to one call is lost on its way."""

    def __init__(self, store: Any, call: str) -> None:
        self._store, self._call, self.lost = store, call, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name != self._call or self.lost:
            return method

        async def call(*arguments: Any, **named: Any) -> Any:
            self.lost += 1
            await method(*arguments, **named)
            raise Unavailable("the answer is lost")

        return call


async def test_an_alert_whose_storing_was_never_confirmed_goes_out(world: World) -> None:
    charges = Answerless(world.store, "raise_alert")
    running = meter(world, DAILY, charges=cast(Charges, charges))
    await running.handle(said(1, usage={"input_tokens": 10}))  # from now on no alert is known to wait
    await world.bus.publish([said(2, usage={"input_tokens": 6000})])
    await worked_off(world, running)
    assert charges.lost == 1
    assert [data["percent"] for data in published(world, "threshold")] == [50]
    assert await world.store.unpublished_alerts() == []


async def test_an_alert_that_another_meter_left_behind_goes_out(world: World) -> None:
    living = meter(world, DAILY)
    await living.handle(said(1, usage={"input_tokens": 10}))
    event = said(2, usage={"input_tokens": 6000})
    dying = meter(world, DAILY, bus=Dead(world.bus, "threshold"))
    with pytest.raises(Killed):
        await dying.handle(event)
    await living.handle(event)  # it was not acked: it comes again
    assert [data["percent"] for data in published(world, "threshold")] == [50]


class Dead:
    """A bus before which the process dies once it is to take a kind of event."""

    def __init__(self, bus: Any, event: str) -> None:
        self._bus, self._event = bus, event

    async def publish(self, events: Sequence[Event]) -> None:
        if any(each.event == self._event for each in events):
            raise Killed
        await self._bus.publish(events)


async def test_alerts_of_a_meter_that_died_before_telling_go_out_at_the_next_message(world: World) -> None:
    world.bus.down = True
    with pytest.raises(Unavailable):
        await meter(world, DAILY).handle(said(1, usage={"input_tokens": 6000}))
    world.bus.down = False
    await world.bus.publish([said(1, usage={"input_tokens": 6000})])
    await worked_off(world, meter(world, DAILY))
    assert [data["percent"] for data in published(world, "threshold")] == [50]
    body = next(e for e in world.bus.published if e.event == "threshold")
    assert decode_event(body.encode(), body.routing_key) == body
