"""Price what was used and tell when a limit is near: charge, sum, decide, alert.

Spend is a sum over charge rows, so a message that comes twice costs once. An alert is a row too: it is stored before
it is published and marked after, so that a crash between the two publishes it again under the same id, never a
second one.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, cast

import structlog
from msgspec import structs
from prometheus_client import Counter
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, field_validator

from relay.core.errors import BadEvent
from relay.core.events import NOBODY, ChargedData, ChatRef, Event, Evidence, JsonObject, LimitData, event_id, utc
from relay.core.usage import Period, Policy, Price, alert_event, cost_micros, reached, tokens_of
from relay.ports import Bus, Charge, Charges, Clock, Raised, Spend, Upstream
from relay.programs.budgets import Budgets
from relay.programs.inbox import Inbox
from relay.programs.prices import PRICED, PriceBook, PriceSettings, Quote

log = structlog.get_logger(__name__)

CHARGED = Counter(
    "relay_usage_charges_total", "Messages charged, each once. unpriced: the price book lacks its model.", ["priced"]
)
SPENT = Counter("relay_usage_spend_micros_total", "Millionths of a US dollar charged. The slope is the burn rate.")
TOKENS = Counter("relay_usage_tokens_total", "Tokens charged.", ["token_type"])
ALERTS = Counter(
    "relay_usage_alerts_total",
    "Limit levels that fired, each once per scope and period. unpriced: a limit that cannot count all that was used.",
    ["event"],
)
for _priced in ("priced", "unpriced"):
    CHARGED.labels(_priced)
for _type in ("input", "output", "reasoning", "cache_read", "cache_write"):
    TOKENS.labels(_type)
for _event in ("threshold", "exceeded", "unpriced"):
    ALERTS.labels(_event)

QUEUE = "relay.meter"


class PolicySettings(BaseModel, frozen=True, extra="forbid"):
    """A spend limit: of each user by themselves, or of the whole deployment."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    scope: Literal["user", "deployment"] = "user"
    period: Period = Period.MONTH
    limit_micros: PositiveInt
    levels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (50, 80, 95, 100)


class MeterSettings(BaseModel, frozen=True, extra="forbid"):
    """Prices by model name or by model config id, which win over those that Coder tells; and limits."""

    prices: Mapping[str, PriceSettings] = {}
    policies: Sequence[PolicySettings] = ()
    prefetch: PositiveInt = 50
    prices_seconds: PositiveFloat = 300.0  # what Coder says of prices and budgets is read again after so long

    @field_validator("policies")
    @classmethod
    def _names_differ(cls, policies: Sequence[PolicySettings]) -> Sequence[PolicySettings]:
        names = [policy.name for policy in policies]
        if doubled := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two policies are named {doubled!r}: alerts are told apart by that name")
        return policies


class Meter:
    """The consumer of `relay.meter`."""

    def __init__(
        self, *, bus: Bus, charges: Charges, upstream: Upstream | None, clock: Clock, settings: MeterSettings
    ) -> None:
        self._bus = bus
        self._charges = charges
        lifetime = settings.prices_seconds
        self._prices = PriceBook(settings.prices, upstream, clock, lifetime_seconds=lifetime)
        self._budgets = None if upstream is None else Budgets(upstream, clock, lifetime_seconds=lifetime)
        self._policies = [Policy(p.name, p.scope, p.period, p.limit_micros, p.levels) for p in settings.policies]
        self._inbox = Inbox("meter", QUEUE, bus=bus, clock=clock, prefetch=settings.prefetch)
        self._clock = clock
        self._alerts_waiting = True  # some may have been stored and not published by a meter that died

    async def run(self, report: Callable[[bool, str], None] = lambda ok, reason: None) -> None:
        """Work off the queue until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._inbox.work_off(self.handle, report), name="charge")
            if self._budgets is not None:
                group.create_task(self._budgets.run(), name="budgets")

    def status(self) -> dict[str, object]:
        """For `/status`."""
        budgets: dict[str, object] = {} if self._budgets is None else {"budgets": self._budgets.status()}
        return {**self._prices.status(), "policies": [policy.name for policy in self._policies], **budgets}

    async def handle(self, event: Event) -> None:
        """Charge the message of an event, if it is one that costs.

        Raises:
            BadEvent: It does not hold what its type promises.
        """
        if self._alerts_waiting:
            await self._publish_alerts()
        if (event.family, event.event, event.detail) != ("chat", "message", "assistant"):
            return
        message = dict(event.data).get("message")
        if not isinstance(message, dict):
            raise BadEvent("chat.message without a message")
        usage = message.get("usage")
        if not isinstance(usage, dict):
            return  # an interrupted step: it cost, but nobody says what
        charge, quote = await self._charge(event, message, usage)
        price = quote.price
        if await self._charges.charge(charge):
            CHARGED.labels("unpriced" if charge.cost_micros is None else "priced").inc()
            PRICED.labels(quote.source).inc()
            SPENT.inc(charge.cost_micros or 0)
            for name, count in tokens_of(usage).items():
                TOKENS.labels(name).inc(cast(int, count))
        else:
            # It is here again, and the price may be another one by now. What was charged stays, and is told.
            stored = await self._charges.charged(charge.chat, charge.message_id)
            if stored is not None and stored != charge:
                charge, price = stored, None
        await self._bus.publish([charged_event(event, charge, price)])
        if self._budgets is not None:
            self._budgets.charged(charge.chat.deployment, charge.chat.owner_id)
        if unpriced(charge):
            self._prices.unpriced(charge.model)
        for policy in self._policies:
            await self._judge(policy, event, charge)
        if self._alerts_waiting:
            await self._publish_alerts()

    async def _charge(self, event: Event, message: JsonObject, usage: JsonObject) -> tuple[Charge, Quote]:
        message_id = message.get("id")
        if type(message_id) is not int:
            raise BadEvent("a message without an integer id")
        try:
            at = datetime.fromisoformat(event.time)
        except ValueError as exc:
            raise BadEvent(f"time is not RFC 3339: {event.time!r}") from exc
        quote = await self._prices.quote(str(message.get("model_config_id") or ""))
        tokens = tokens_of(usage)
        return Charge(
            chat=event.chat,
            message_id=message_id,
            at=at,
            model=quote.model,
            input_tokens=tokens["input"],
            output_tokens=tokens["output"],
            reasoning_tokens=tokens["reasoning"],
            cache_read_tokens=tokens["cache_read"],
            cache_write_tokens=tokens["cache_write"],
            cost_micros=cost_micros(tokens, quote.price),
        ), quote

    async def _judge(self, policy: Policy, event: Event, charge: Charge) -> None:
        chat = event.chat
        bounds = policy.period.bounds(charge.at)
        owner = chat.owner_id if policy.scope == "user" else None
        spend = await self._charges.spend(chat.deployment, owner_id=owner, start=bounds[0], end=bounds[1])
        for level in reached(policy, spend.cost_micros):
            if await self._raise(limit_event(policy, level, spend, event, bounds)):
                log.info("limit_level_reached", policy=policy.name, percent=level, scope=policy.scope)
        if unpriced(charge) and await self._raise(unpriced_event(policy, charge, spend, event, bounds)):
            log.warning("limit_blind", policy=policy.name, model=charge.model, scope=policy.scope)

    async def _raise(self, alert: Event) -> bool:
        """Store an alert; True when it is new."""
        raised = await self._charges.raise_alert(str(alert.id), alert)
        if raised is not Raised.PUBLISHED:  # by a meter that died, or by us when the database's answer was lost
            self._alerts_waiting = True
        if raised is not Raised.NEW:
            return False
        ALERTS.labels(alert.event).inc()
        return True

    async def _publish_alerts(self) -> None:
        for key, alert in await self._charges.unpublished_alerts():
            await self._bus.publish([alert])
            await self._charges.alert_published(key)
        self._alerts_waiting = False


def charged_event(event: Event, charge: Charge, price: Price | None) -> Event:
    """`usage.charged` for a message event. It stands where the message stood: same session and position."""
    data: ChargedData = {
        "message_id": charge.message_id,
        "model": charge.model,
        "tokens": {
            "input": charge.input_tokens,
            "output": charge.output_tokens,
            "reasoning": charge.reasoning_tokens,
            "cache_read": charge.cache_read_tokens,
            "cache_write": charge.cache_write_tokens,
        },
        "cost_micros": charge.cost_micros,
        "owner_id": str(charge.chat.owner_id),
        "root_chat_id": str(charge.chat.root_chat_id),
    }
    if price is not None:
        data["price"] = price.to_json()
    return Event(
        id=event_id(charge.chat, "charged", charge.message_id),
        family="usage",
        event="charged",
        detail="chat",
        chat=charge.chat,
        content=data,
        time=event.time,
        origin=event.origin,
        session=event.session,
        position=event.position,
        subject=str(charge.chat.owner_id),
    )


def unpriced(charge: Charge) -> bool:
    """Whether a charge used something and nobody says what it costs."""
    used = charge.input_tokens + charge.output_tokens + charge.cache_read_tokens + charge.cache_write_tokens
    return charge.cost_micros is None and used > 0


def limit_event(policy: Policy, level: int, spend: Spend, cause: Event, bounds: tuple[datetime, datetime]) -> Event:
    """`usage.threshold` or `usage.exceeded`. Its id says policy, scope, period and level, and nothing else."""
    chat = cause.chat
    start, end = utc(bounds[0]), utc(bounds[1])
    scope_id = str(chat.owner_id) if policy.scope == "user" else chat.deployment
    whose = ChatRef(chat.deployment, NOBODY, chat.owner_id if policy.scope == "user" else NOBODY, NOBODY)
    data: LimitData = {
        "policy": policy.name,
        "scope": {"kind": policy.scope, "id": scope_id},
        "period": {"kind": policy.period.value, "start": start, "end": end},
        "percent": level,
        "spend_micros": spend.cost_micros,
        "limit_micros": policy.limit_micros,
        "evidence": {"charges": spend.charges, "last_message_ids": list(spend.last_message_ids), "prices": []},
    }
    return Event(
        id=event_id(whose, "limit", policy.name, policy.scope, scope_id, policy.period.value, start, level),
        family="usage",
        event=alert_event(level),
        detail=policy.scope,
        chat=whose,
        content=data,
        time=cause.time,
        origin=cause.origin,
        session=cause.session,
        position=cause.position,
        subject=scope_id,
    )


def unpriced_event(
    policy: Policy, charge: Charge, spend: Spend, cause: Event, bounds: tuple[datetime, datetime]
) -> Event:
    """`usage.unpriced`: the policy cannot count what a model costs. Once per policy, scope, period and model.

    `evidence` has the model under `prices`, without a price, the message that showed it, and how many charges of the
    scope and period were without a price until then.
    """
    limit = limit_event(policy, spend.cost_micros * 100 // policy.limit_micros, spend, cause, bounds)
    data = cast(LimitData, limit.data)
    evidence: Evidence = {
        "charges": spend.unpriced,
        "last_message_ids": [charge.message_id],
        "prices": [{"model": charge.model}],
    }
    which = (policy.name, policy.scope, limit.subject, policy.period.value, data["period"]["start"], charge.model)
    return structs.replace(
        limit, id=event_id(limit.chat, "unpriced", *which), event="unpriced", content={**data, "evidence": evidence}
    )
