"""Money: vectors of the server's own `chatcost`, periods of the calendar, levels of a limit."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.events import Tokens
from relay.core.usage import Period, Policy, Price, alert_event, cost_micros, reached, tokens_of


def tokens(**counts: int) -> Tokens:
    none: Tokens = {"input": 0, "output": 0, "reasoning": 0, "cache_read": 0, "cache_write": 0}
    return {**none, **counts}  # type: ignore[typeddict-item]


def price(**each: str) -> Price:
    return Price("m", **{name: Decimal(value) for name, value in each.items()})


ALL = price(input="1.23", output="4.56", cache_read="0.7", cache_write="7.89")


@pytest.mark.parametrize(
    ("used", "at", "micros"),
    [
        pytest.param(tokens(input=1000), price(input="3"), 3000, id="1000 in at 3"),
        pytest.param(tokens(input=1), price(input="0.01"), 1, id="rounded up"),
        pytest.param(tokens(input=101, output=201, cache_read=1005, cache_write=33), ALL, 2005, id="rounded up once"),
        pytest.param(tokens(output=500, reasoning=200), price(output="15"), 7500, id="reasoning is part of the output"),
        pytest.param(tokens(input=2**60), price(input="0.000001"), 1152921504607, id="exact where a float is not"),
        pytest.param(tokens(input=10, output=10), price(input="1"), 10, id="a kind without a price adds nothing"),
        pytest.param(tokens(output=10), price(input="1"), None, id="no price for any kind that was used"),
        pytest.param(tokens(), ALL, None, id="nothing used"),
        pytest.param(tokens(input=10), Price("m"), None, id="no price at all"),
        pytest.param(tokens(input=10), None, None, id="model not known"),
        pytest.param(tokens(input=10), price(input="0"), 0, id="free of charge is a price"),
    ],
)
def test_cost_of_a_message(used: Tokens, at: Price | None, micros: int | None) -> None:
    assert cost_micros(used, at) == micros


@given(
    st.lists(st.integers(0, 10**9), min_size=4, max_size=4),
    st.lists(st.decimals(0, 100, places=4), min_size=4, max_size=4),
)
def test_a_cost_is_never_below_its_exact_sum_nor_a_micro_above(counts: list[int], prices: list[Decimal]) -> None:
    names = ("input", "output", "cache_read", "cache_write")
    cost = cost_micros(tokens(**dict(zip(names, counts, strict=True))), Price("m", *prices))
    exact = sum((n * p for n, p in zip(counts, prices, strict=True)), Decimal(0))
    assert cost is None if not any(counts) else cost is not None and 0 <= cost - exact < 1


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({}, tokens()),
        ({"context_limit": 200000, "total_tokens": 9}, tokens()),
        (
            {
                "input_tokens": 1,
                "output_tokens": 2,
                "reasoning_tokens": 3,
                "cache_read_tokens": 4,
                "cache_creation_tokens": 5,
            },
            tokens(input=1, output=2, reasoning=3, cache_read=4, cache_write=5),
        ),
        ({"input_tokens": None, "output_tokens": "7", "reasoning_tokens": -1, "cache_read_tokens": 1.5}, tokens()),
    ],
)
def test_tokens_of_a_usage(usage: Mapping[str, object], counted: Tokens) -> None:
    assert tokens_of(usage) == counted


def test_prices_are_written_as_exact_decimals() -> None:
    assert price(input="0.0000001", output="3.50").to_json() == {"input": "0.0000001", "output": "3.50"}
    assert Price("m", cache_read=Decimal("1E+2"), cache_write=Decimal(0)).to_json() == {
        "cache_read": "100",
        "cache_write": "0",
    }


# --- periods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "now", "start", "end"),
    [
        pytest.param("day", "2026-03-01T01:30+05:00", "2026-02-28", "2026-03-01", id="UTC, not the caller's zone"),
        pytest.param("day", "2026-03-01T23:30-05:00", "2026-03-02", "2026-03-03", id="UTC, west of it"),
        pytest.param("day", "2026-12-31T00:00Z", "2026-12-31", "2027-01-01", id="the first instant is in"),
        pytest.param("week", "2026-03-01T23:59Z", "2026-02-23", "2026-03-02", id="Sunday ends its week"),
        pytest.param("week", "2026-03-02T00:00Z", "2026-03-02", "2026-03-09", id="Monday begins it"),
        pytest.param("week", "2027-01-01T12:00Z", "2026-12-28", "2027-01-04", id="over the end of a year"),
        pytest.param("month", "2028-02-29T12:00Z", "2028-02-01", "2028-03-01", id="leap day"),
        pytest.param("month", "2026-01-31T12:00Z", "2026-01-01", "2026-02-01", id="a long month before a short one"),
        pytest.param("month", "2026-12-31T23:59Z", "2026-12-01", "2027-01-01", id="December"),
        pytest.param("month", "2026-03-01T01:00+02:00", "2026-02-01", "2026-03-01", id="still February in UTC"),
    ],
)
def test_period_bounds(period: str, now: str, start: str, end: str) -> None:
    bounds = Period(period).bounds(datetime.fromisoformat(now))
    assert [day.isoformat() for day in bounds] == [f"{start}T00:00:00+00:00", f"{end}T00:00:00+00:00"]


@given(st.sampled_from(Period), st.datetimes(datetime(1971, 1, 1), datetime(2199, 1, 1)), st.integers(-14, 14))  # noqa: DTZ001
def test_every_moment_lies_in_exactly_one_period(period: Period, moment: datetime, hours: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(hours=hours)))
    start, end = period.bounds(aware)
    assert start <= aware < end
    assert period.bounds(start) == period.bounds(end - timedelta(microseconds=1)) == (start, end)
    assert period.bounds(end)[0] == end
    assert start.tzinfo is UTC


# --- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spend", "levels"),
    [(0, []), (499_999, []), (500_000, [50]), (799_999, [50]), (800_000, [50, 80]), (1_000_000, [50, 80, 95, 100])],
)
def test_a_level_is_reached_from_equality_on(spend: int, levels: list[int]) -> None:
    assert reached(Policy("p", "user", Period.DAY, 1_000_000), spend) == levels


def test_levels_come_in_ascending_order_and_may_lie_beyond_the_limit() -> None:
    assert reached(Policy("p", "user", Period.DAY, 3, levels=(200, 100, 34, 33)), 6) == [33, 34, 100, 200]
    assert reached(Policy("p", "user", Period.DAY, 3, levels=(33, 34)), 1) == [33]


def test_a_limit_of_nothing_is_reached_by_nothing() -> None:
    assert reached(Policy("p", "user", Period.DAY, 0), 0) == [50, 80, 95, 100]


@pytest.mark.parametrize(
    ("level", "event"), [(50, "threshold"), (99, "threshold"), (100, "exceeded"), (150, "exceeded")]
)
def test_the_whole_limit_is_exceeded(level: int, event: str) -> None:
    assert alert_event(level) == event
