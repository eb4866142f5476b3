"""What a step costs, and who may still spend: prices, periods, limits."""

from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal
from uuid import UUID

from relay.simulator.state import Database, Message, ModelConfig, Usage
from relay.simulator.wire import ZERO_TIME, JsonObject, rfc3339

PERIODS = ("day", "week", "month")


def cost_micros(usage: Usage | None, config: ModelConfig | None) -> int | None:
    """Millionths of a US dollar, rounded up once over the sum; None is "unpriced".

    None too for a sum of zero: the server stores no cost then. Reasoning tokens are part of the output already.
    """
    if usage is None or config is None:
        return None
    priced = [
        (usage.input_tokens, config.input_price),
        (usage.output_tokens, config.output_price),
        (usage.cache_read_tokens, config.cache_read_price),
        (usage.cache_creation_tokens, config.cache_write_price),
    ]
    total = sum((tokens * price for tokens, price in priced if price is not None), Decimal(0))
    return int(total.to_integral_value(ROUND_CEILING)) or None


def period_bounds(period: str, now: datetime) -> tuple[datetime, datetime]:
    """The period that holds `now`, in UTC, end exclusive. A week begins on Monday."""
    day = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day, day + timedelta(days=1)
    if period == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(days=7)
    first = day.replace(day=1)
    return first, (first + timedelta(days=32)).replace(day=1)


def charged(database: Database, user_id: UUID, start: datetime, end: datetime) -> list[Message]:
    """The assistant messages of a user's chats in `[start, end)`, deleted and archived ones included."""
    return [
        message
        for chat in database.chats.values()
        if chat.owner_id == user_id
        for message in chat.messages
        if message.role == "assistant" and start <= message.created_at < end
    ]


def limit_of(database: Database, user_id: UUID) -> int | None:
    """The limit in force for the user in micros; None: not limited."""
    if database.limits.spend_limit_micros is None:
        return None
    return database.limits.overrides.get(user_id, database.limits.spend_limit_micros)


def spent(database: Database, user_id: UUID) -> tuple[int, datetime, datetime]:
    """Micros spent in the running period, and its bounds."""
    start, end = period_bounds(database.limits.period, database.clock.now())
    return sum(m.cost_micros or 0 for m in charged(database, user_id, start, end)), start, end


def limit_status(database: Database, user_id: UUID) -> JsonObject:
    limit = limit_of(database, user_id)
    if limit is None:
        return {"is_limited": False, "current_spend": 0, "period_start": ZERO_TIME, "period_end": ZERO_TIME}
    spend, start, end = spent(database, user_id)
    return {
        "is_limited": True,
        "period": database.limits.period,
        "spend_limit_micros": limit,
        "current_spend": spend,
        "period_start": rfc3339(start),
        "period_end": rfc3339(end),
    }


def exceeded(database: Database, user_id: UUID) -> JsonObject | None:
    """The 409 body when the user has spent the limit, else None."""
    limit = limit_of(database, user_id)
    if limit is None:
        return None
    spend, _, end = spent(database, user_id)
    if spend < limit:
        return None
    return {
        "message": "Chat usage limit exceeded.",
        "spent_micros": spend,
        "limit_micros": limit,
        "resets_at": rfc3339(end),
    }
