"""What a model's tokens cost: the settings' price book first, then what Coder says, where it says anything.

A server without spend limits of its own keeps no prices either: there the price book is all there is, which is told.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge
from pydantic import BaseModel, Field

from relay.core.errors import ChatRefused, Unauthorized
from relay.core.events import NOBODY
from relay.core.usage import Price
from relay.ports import Clock, ModelPrice, Upstream

log = structlog.get_logger(__name__)


class NativeLimits(StrEnum):
    """Whether the server enforces spend limits of its own on chats, which goes with its having prices."""

    UNKNOWN = "unknown"
    PRESENT = "present"
    ABSENT = "absent"


class PriceSource(StrEnum):
    """Who told a price."""

    PRICE_BOOK = "price_book"
    CODER = "coder"
    NONE = "none"


PRICED = Counter(
    "relay_usage_price_source_total",
    "Messages charged by where their price came from. A rise of none: the price book lacks a model.",
    ["source"],
)
NATIVE_LIMITS = Gauge(
    "relay_usage_native_limits",
    "1 at what holds. absent: Coder has no spend limits and no prices of its own, the price book alone counts; "
    "unknown: not asked yet, or no Coder server is set.",
    ["state"],
)
for _source in PriceSource:
    PRICED.labels(_source)
for _state in NativeLimits:
    NATIVE_LIMITS.labels(_state).set(_state is NativeLimits.UNKNOWN)

SETTING = "RELAY_METER__PRICES"
_UNKNOWN_SECONDS = 10.0  # a model that Coder did not name may be new: ask again, but not for every message
_MODELS_TOLD = 1000  # names come from outside


class PriceSettings(BaseModel, frozen=True, extra="forbid"):
    """US dollars per million tokens of one model; what is left out has no price."""

    input: Decimal | None = Field(None, ge=0)
    output: Decimal | None = Field(None, ge=0)
    cache_read: Decimal | None = Field(None, ge=0)
    cache_write: Decimal | None = Field(None, ge=0)


@dataclass(frozen=True, slots=True)
class Quote:
    """Name of a model and its price; None when nobody tells one."""

    model: str
    price: Price | None
    source: PriceSource


class PriceBook:
    """Prices by model.

    Args:
        prices: The settings' own, by model name or model config id.
        upstream: Where Coder's are read; None for none.
        clock: Measures how old they are.
        lifetime_seconds: How long they are kept.
    """

    def __init__(
        self, prices: Mapping[str, PriceSettings], upstream: Upstream | None, clock: Clock, *, lifetime_seconds: float
    ) -> None:
        self.native_limits = NativeLimits.UNKNOWN
        self._own = {name: Price(name, p.input, p.output, p.cache_read, p.cache_write) for name, p in prices.items()}
        self._upstream = upstream
        self._clock = clock
        self._lifetime = lifetime_seconds
        self._told: Mapping[UUID, ModelPrice] = {}
        self._read_at: float | None = None
        self._limits_read_at: float | None = None
        self._unpriced: dict[str, None] = {}  # in order of their first charge

    async def quote(self, model_config_id: str) -> Quote:
        """The price of the model of a message. May raise `Unavailable`."""
        try:
            config = UUID(model_config_id)
        except ValueError:
            config = NOBODY
        if self._older_than(self._lifetime if config in self._told else _UNKNOWN_SECONDS, self._read_at):
            await self._read()
        told = self._told.get(config)
        name = told.model if told else model_config_id
        if own := self._own.get(name) or self._own.get(model_config_id):
            return Quote(name, own, PriceSource.PRICE_BOOK)
        if told is None or self.native_limits is NativeLimits.ABSENT:
            return Quote(name, None, PriceSource.NONE)
        return Quote(
            name, Price(told.model, told.input, told.output, told.cache_read, told.cache_write), PriceSource.CODER
        )

    def unpriced(self, model: str) -> None:
        """A message of the model was charged without a price. Tell it once per model, with what to do."""
        if model in self._unpriced or len(self._unpriced) >= _MODELS_TOLD:
            return
        self._unpriced[model] = None
        entry = json.dumps({model: {"input": "…", "output": "…"}}, ensure_ascii=False)
        log.warning("model_unpriced", model=model, add=f"{SETTING}={entry}", unit="US dollars per million tokens")

    def status(self) -> dict[str, object]:
        """For `/status`."""
        alone = self._upstream is None or self.native_limits is NativeLimits.ABSENT
        return {
            "native_limits": self.native_limits.value,
            "prices": "price book alone" if alone else "price book, then Coder",
            "price_book_models": sorted(self._own),
            "unpriced_models": list(self._unpriced),
        }

    def _older_than(self, seconds: float, read_at: float | None) -> bool:
        return read_at is None or self._clock.monotonic() - read_at > seconds

    async def _read(self) -> None:
        if self._upstream is None:
            return
        try:
            if self._older_than(self._lifetime, self._limits_read_at):
                self._learn(has_limits=await self._upstream.has_native_limits())
                self._limits_read_at = self._clock.monotonic()
            self._told = await self._upstream.model_prices()
        except (Unauthorized, ChatRefused) as exc:
            log.warning("prices_refused", reason=str(exc))
        self._read_at = self._clock.monotonic()

    def _learn(self, *, has_limits: bool) -> None:
        found = NativeLimits.PRESENT if has_limits else NativeLimits.ABSENT
        if found is self.native_limits:
            return
        self.native_limits = found
        for state in NativeLimits:
            NATIVE_LIMITS.labels(state).set(state is found)
        if has_limits:
            log.info("native_limits_found", prices="price book, then Coder")
        elif self._own:
            log.info("native_limits_missing", prices="price book alone", models=sorted(self._own))
        else:
            log.warning("native_limits_missing", prices="none: the price book is empty", add=SETTING)
