"""Where a price comes from, on servers with and without limits of their own; and what is said when there is none."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, cast
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from relay.adapters.memory import ManualClock
from relay.core.errors import Unauthorized, Unavailable
from relay.core.events import ChatRef
from relay.core.usage import Period
from relay.ports import ModelPrice, Upstream
from relay.programs.meter import Meter, MeterSettings, PolicySettings
from relay.programs.prices import NATIVE_LIMITS, NativeLimits, PriceSettings
from tests.programs.test_meter import CHAT, DAILY, MODEL, published, said
from tests.programs.world import OtherServer, World, counted

TOLD = {MODEL: ModelPrice("lab", input=Decimal(3), output=Decimal(15))}
OWN = {"lab": PriceSettings(input=Decimal(1), output=Decimal(2))}


def metering(
    world: World, server: OtherServer | None, clock: ManualClock, *policies: PolicySettings, prices: Any = None
) -> Meter:
    return Meter(
        bus=world.bus,
        charges=world.store,
        upstream=cast(Upstream | None, server),
        clock=clock,
        settings=MeterSettings(prices=prices or {}, policies=policies),
    )


def costs(world: World) -> list[int | None]:
    return [row[0] for row in world.rows("SELECT cost_micros FROM charges ORDER BY message_id")]


def named(logs: list[Any], event: str) -> list[Any]:
    return [line for line in logs if line["event"] == event]


def state() -> list[str]:
    """The native limits that the gauge shows."""
    return [each.value for each in NativeLimits if NATIVE_LIMITS.labels(each)._value.get() == 1]


@pytest.mark.parametrize(
    ("native", "own", "cost", "source"),
    [
        pytest.param(True, False, 18_000, "coder", id="Coder's, where it has limits"),
        pytest.param(True, True, 3_000, "price_book", id="the price book wins"),
        pytest.param(False, False, None, "none", id="a server without limits has no prices, whatever it says"),
        pytest.param(False, True, 3_000, "price_book", id="the price book alone"),
    ],
)
async def test_dialects_5a_row_1_where_a_price_comes_from(
    world: World, native: bool, own: bool, cost: int | None, source: str
) -> None:
    server, before = OtherServer(world.upstream), counted("relay_usage_price_source_total", source=source)
    server.native_limits, server.prices = native, TOLD
    meter = metering(world, server, ManualClock(), prices=OWN if own else {})
    await meter.handle(said(1))
    assert costs(world) == [cost]
    assert counted("relay_usage_price_source_total", source=source) == before + 1
    assert state() == ["present" if native else "absent"]
    status = meter.status()
    assert status["native_limits"] == ("present" if native else "absent")
    assert status["prices"] == ("price book, then Coder" if native else "price book alone")
    assert published(world, "charged")[0]["model"] == "lab"  # named by Coder in either case


async def test_a_change_of_the_server_is_told_once_and_counts_from_then_on(world: World) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    server.prices = TOLD
    meter = metering(world, server, clock)
    with capture_logs() as logs:
        for number, native in enumerate([True, True, False, False, True], 1):
            server.native_limits = native
            await meter.handle(said(2 * number))
            await meter.handle(said(2 * number + 1))
            clock.advance(301)
    told = [line["event"] for line in logs if line["event"].startswith("native_limits")]
    assert told == ["native_limits_found", "native_limits_missing", "native_limits_found"]
    assert costs(world) == [18_000] * 4 + [None] * 4 + [18_000] * 2
    assert server.asked.count("has_native_limits") == 5  # not for each message


async def test_models_that_coder_does_not_name_are_asked_for_again_and_its_limits_are_not(world: World) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    meter = metering(world, server, clock)
    for number in range(1, 7):
        await meter.handle(said(number))
        clock.advance(11)
    assert server.asked == ["has_native_limits"] + ["model_prices"] * 6


async def test_an_empty_price_book_on_a_server_without_limits_is_a_warning_that_says_what_to_set(world: World) -> None:
    server = OtherServer(world.upstream)
    server.native_limits = False
    with capture_logs() as logs:
        await metering(world, server, ManualClock()).handle(said(1))
        await metering(world, server, ManualClock(), prices=OWN).handle(said(2))
    empty, filled = named(logs, "native_limits_missing")
    assert (empty["log_level"], empty["add"]) == ("warning", "RELAY_METER__PRICES")
    assert (filled["log_level"], filled["models"]) == ("info", ["lab"])


async def test_without_a_server_the_price_book_is_alone_too(world: World) -> None:
    meter = metering(world, None, ManualClock(), prices={str(MODEL): PriceSettings(input=Decimal(1))})
    await meter.handle(said(1))
    assert costs(world) == [1000]
    assert (meter.status()["native_limits"], meter.status()["prices"]) == ("unknown", "price book alone")
    assert "budgets" not in meter.status()


@pytest.mark.parametrize("which", ["native_limits", "prices"])
async def test_a_token_that_may_not_ask_leaves_what_is_known(world: World, which: str) -> None:
    server, clock = OtherServer(world.upstream), ManualClock()
    server.prices = TOLD
    meter = metering(world, server, clock)
    await meter.handle(said(1))
    clock.advance(301)
    setattr(server, which, Unauthorized("403"))
    with capture_logs() as logs:
        await meter.handle(said(2))
        await meter.handle(said(3))
    assert costs(world) == [18_000] * 3
    assert len(named(logs, "prices_refused")) == 1


async def test_a_server_that_is_away_holds_the_charge(world: World) -> None:
    server = OtherServer(world.upstream)
    server.native_limits = Unavailable("no answer")
    meter = metering(world, server, ManualClock())
    with pytest.raises(Unavailable):
        await meter.handle(said(1))
    server.native_limits, server.prices = True, TOLD
    await meter.handle(said(1))
    assert costs(world) == [18_000]


# --- without a price -----------------------------------------------------------------------------------------------


async def test_a_model_without_a_price_is_told_once_with_a_setting_that_works(world: World) -> None:
    server, other = OtherServer(world.upstream), UUID(int=78)
    server.prices = {MODEL: ModelPrice('odd "name"'), other: ModelPrice("lab")}
    meter = metering(world, server, ManualClock())
    with capture_logs() as logs:
        for number, model in enumerate([MODEL, other, MODEL, other, MODEL], 1):
            await meter.handle(said(number, model=model))
    told = named(logs, "model_unpriced")
    assert [line["model"] for line in told] == ['odd "name"', "lab"]
    assert meter.status()["unpriced_models"] == ['odd "name"', "lab"]
    assert costs(world) == [None] * 5
    name, _, entry = told[0]["add"].partition("=")
    assert name == "RELAY_METER__PRICES"
    settings = MeterSettings.model_validate({"prices": json.loads(entry.replace("…", "2"))})
    again = Meter(
        bus=world.bus,
        charges=world.store,
        upstream=cast(Upstream, server),
        clock=ManualClock(),
        settings=settings,
    )
    await again.handle(said(6))
    assert costs(world)[-1] == 4000


async def test_nothing_used_is_not_unpriced(world: World) -> None:
    meter = metering(world, None, ManualClock(), DAILY)
    with capture_logs() as logs:
        await meter.handle(said(1, usage={}))
        await meter.handle(said(2, usage={"reasoning_tokens": 5}))
    assert named(logs, "model_unpriced") == []
    assert published(world, "unpriced") == []


async def test_a_limit_that_cannot_count_a_model_says_so_once_per_scope_period_and_model(world: World) -> None:
    everybody = PolicySettings(name="all", scope="deployment", period=Period.MONTH, limit_micros=1_000_000)
    bob = ChatRef(CHAT.deployment, UUID(int=9), UUID(int=3), UUID(int=9))
    own = {str(MODEL): PriceSettings(input=Decimal(1), output=Decimal(2))}
    tomorrow = datetime(2026, 3, 2, 12, tzinfo=UTC)
    events = [
        said(1),  # 3000 of 10000, and the only one with a price
        said(2, model=UUID(int=91)),
        said(3, model=UUID(int=91)),
        said(4, model=UUID(int=92)),
        said(5, model=UUID(int=91), chat=bob),
        said(6, model=UUID(int=91), at=tomorrow),
    ]
    for copy in range(2):
        meter = metering(world, None, ManualClock(), DAILY, everybody, prices=own)
        for event in events[:: -1 if copy else 1]:
            await meter.handle(event)
    told = [
        (
            data["policy"],
            data["scope"]["id"][-3:],
            data["period"]["start"][:10],
            data["evidence"]["prices"][0]["model"][-2:],
        )
        for data in published(world, "unpriced")
    ]
    site = CHAT.deployment[-3:]
    assert told == [
        ("daily", "002", "2026-03-01", "5b"),
        ("all", site, "2026-03-01", "5b"),
        ("daily", "002", "2026-03-01", "5c"),
        ("all", site, "2026-03-01", "5c"),
        ("daily", "003", "2026-03-01", "5b"),
        ("daily", "002", "2026-03-02", "5b"),
    ]
    first = published(world, "unpriced")[0]
    assert (first["percent"], first["spend_micros"], first["limit_micros"]) == (30, 3000, 10_000)
    assert first["evidence"] == {
        "charges": 1,
        "last_message_ids": [2],
        "prices": [{"model": str(UUID(int=91))}],
    }
    keys = {event.routing_key for event in world.bus.published if event.event == "unpriced"}
    assert f"usage.unpriced.user.{CHAT.owner_id}._" in keys
    assert "usage.unpriced.deployment._._" in keys
    assert await world.store.unpublished_alerts() == []
