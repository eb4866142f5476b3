"""Money: what a message costs, which period it falls into, which levels a spend has reached."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from relay.core.events import Tokens


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens, which is the same number as millionths of a dollar per token. None: no price."""

    model: str
    input: Decimal | None = None
    output: Decimal | None = None
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None

    def to_json(self) -> dict[str, str]:
        """The prices that are set, as exact decimals."""
        prices = {
            "input": self.input,
            "output": self.output,
            "cache_read": self.cache_read,
            "cache_write": self.cache_write,
        }
        return {name: format(price, "f") for name, price in prices.items() if price is not None}


def tokens_of(usage: Mapping[str, object]) -> Tokens:
    """Token counts of a ChatMessageUsage. What is absent, or not a number, counts as 0.

    `input` leaves out what was read from or written to the cache; `output` includes reasoning.
    """

    def count(name: str) -> int:
        value = usage.get(name)
        return value if isinstance(value, int) and value > 0 else 0

    return {
        "input": count("input_tokens"),
        "output": count("output_tokens"),
        "reasoning": count("reasoning_tokens"),
        "cache_read": count("cache_read_tokens"),
        "cache_write": count("cache_creation_tokens"),
    }


def cost_micros(tokens: Tokens, price: Price | None) -> int | None:
    """Cost of one message in millionths of a US dollar, rounded up once, as Coder's own `chatcost` does.

    None when it has no price: no price is known at all, or none for any kind of token that was used. Reasoning is
    part of the output and is not added.

    >>> price = Price("m", Decimal("1.23"), Decimal("4.56"), Decimal("0.7"), Decimal("7.89"))
    >>> cost_micros({"input": 101, "output": 201, "reasoning": 0, "cache_read": 1005, "cache_write": 33}, price)
    2005
    """
    if price is None:
        return None
    pairs = (
        (tokens["input"], price.input),
        (tokens["output"], price.output),
        (tokens["cache_read"], price.cache_read),
        (tokens["cache_write"], price.cache_write),
    )
    priced = [count * each for count, each in pairs if count and each is not None]
    return math.ceil(sum(priced, Decimal(0))) if priced else None


class Period(StrEnum):
    """A span of the calendar, in UTC as the server has it. Weeks begin on Monday."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def bounds(self, moment: datetime) -> tuple[datetime, datetime]:
        """The period that `moment` falls into: its start, and its end, which is not part of it."""
        day = moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if self is Period.DAY:
            return day, day + timedelta(days=1)
        if self is Period.WEEK:
            monday = day - timedelta(days=day.weekday())
            return monday, monday + timedelta(days=7)
        first = day.replace(day=1)
        return first, (first + timedelta(days=32)).replace(day=1)


@dataclass(frozen=True, slots=True)
class Policy:
    """A limit for everybody's own spend (`scope` user) or for all of it (`deployment`), per period."""

    name: str
    scope: str
    period: Period
    limit_micros: int
    levels: Sequence[int] = (50, 80, 95, 100)  # per cent of the limit, ascending


def reached(policy: Policy, spend_micros: int) -> list[int]:
    """Levels that the spend has reached; a level counts from equality on, as the server blocks at `spend >= limit`.

    >>> reached(Policy("p", "user", Period.DAY, 100), 80)
    [50, 80]
    """
    return [level for level in sorted(policy.levels) if spend_micros * 100 >= policy.limit_micros * level]


def alert_event(level: int) -> str:
    """`exceeded` from the whole limit on, `threshold` below it."""
    return "exceeded" if level >= 100 else "threshold"
