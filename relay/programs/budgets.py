"""What the AI Gateway of a licensed server allows those who spend: read now and then, told, and not enforced here."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NoReturn
from uuid import UUID

import structlog
from prometheus_client import Gauge

from relay.core.errors import ChatRefused, Unauthorized, Unavailable
from relay.core.events import utc
from relay.ports import Budget, Clock, Upstream

log = structlog.get_logger(__name__)


class BudgetState(StrEnum):
    """How much of a budget is spent."""

    UNLIMITED = "unlimited"
    WITHIN = "within"
    NEAR = "near"
    EXCEEDED = "exceeded"


BUDGETS = Gauge(
    "relay_usage_gateway_budgets",
    "Users whose AI Gateway budget is known, by how much of it is spent. near: 80 % and more; exceeded: Coder ends "
    "their turns with an error. All 0 where the server has no licensed gateway.",
    ["state"],
)
for _state in BudgetState:
    BUDGETS.labels(_state)

_NEAR_PERCENT = 80
_OWNERS = 1000  # kept at most: those who were charged last
_SILENT = 3  # owners without a budget, and nobody with one: the server has none, and is left alone for a while
_SHOWN = 20  # in /status, the most spent first


@dataclass(slots=True)
class _Owner:
    read_at: float | None = None  # monotonic
    budget: Budget | None = None
    told: BudgetState | None = None


class Budgets:
    """The budgets of the owners who were charged. A server that has none, or no licence for them, tells None."""

    def __init__(self, upstream: Upstream, clock: Clock, *, lifetime_seconds: float) -> None:
        self._upstream = upstream
        self._clock = clock
        self._lifetime = lifetime_seconds
        self._owners: dict[UUID, _Owner] = {}  # who was charged last stands last
        self._silent_until = 0.0  # monotonic
        self._due = asyncio.Event()

    def charged(self, deployment: str, owner_id: UUID) -> None:
        """An owner spent something: their budget is of interest."""
        if deployment != self._upstream.deployment:
            return
        owner = self._owners.pop(owner_id, None) or _Owner()
        self._owners[owner_id] = owner
        while len(self._owners) > _OWNERS:
            del self._owners[next(iter(self._owners))]
        if self._is_due(owner):
            self._due.set()

    async def run(self) -> NoReturn:
        """Read what is due until cancelled. Trouble with a budget is told and never stops the charging."""
        while True:
            await self._due.wait()
            self._due.clear()
            await self.read()
            # Owners that are charged meanwhile are read together: a busy server is not asked for each by itself.
            await self._clock.sleep(min(self._lifetime, 10.0))

    async def read(self) -> None:
        """Read the budgets of all owners that were not read for the lifetime."""
        for owner_id, owner in tuple(self._owners.items()):
            if not self._is_due(owner):
                continue
            if self._without_budget() >= _SILENT:
                self._silent_until = self._clock.monotonic() + self._lifetime
                self._owners = {key: _Owner() for key in self._owners}
                break
            owner.read_at = self._clock.monotonic()
            try:
                owner.budget = await self._upstream.budget(owner_id)
            except (Unavailable, Unauthorized, ChatRefused) as exc:
                log.warning("budgets_unread", reason=str(exc))
                break
            self._tell(owner_id, owner)
        self._measure()

    def status(self) -> dict[str, object]:
        """For `/status`."""
        budgets = sorted(self._current().values(), key=_share, reverse=True)
        return {
            "known": len(budgets),
            "most_spent": [
                {
                    "user_id": str(budget.user_id),
                    "state": state_of(budget).value,
                    "spent_micros": budget.spent_micros,
                    "limit_micros": budget.limit_micros,
                    "source": budget.source,
                    "period_end": utc(budget.period_end),
                }
                for budget in budgets[:_SHOWN]
            ],
        }

    def _without_budget(self) -> int:
        """How many owners were asked about and have no budget; 0 when any has one."""
        asked = [owner for owner in self._owners.values() if owner.read_at is not None]
        return 0 if any(owner.budget is not None for owner in asked) else len(asked)

    def _is_due(self, owner: _Owner) -> bool:
        if self._clock.monotonic() < self._silent_until:
            return False
        return owner.read_at is None or self._clock.monotonic() - owner.read_at > self._lifetime

    def _current(self) -> Mapping[UUID, Budget]:
        """Budgets of the running period: one that was read before it ended says nothing of the next."""
        now = self._clock.now()
        owners = tuple(self._owners.items())  # at one go: `/status` asks from another thread
        return {key: o.budget for key, o in owners if o.budget is not None and now < o.budget.period_end}

    def _tell(self, owner_id: UUID, owner: _Owner) -> None:
        if owner.budget is None:
            owner.told = None
            return
        before, owner.told = owner.told, state_of(owner.budget)
        quiet = (BudgetState.UNLIMITED, BudgetState.WITHIN)
        if owner.told is before or (before is None and owner.told in quiet):
            return
        log.info(
            "budget_state_changed",
            user_id=str(owner_id),
            state=owner.told.value,
            spent_micros=owner.budget.spent_micros,
            limit_micros=owner.budget.limit_micros,
            source=owner.budget.source,
        )

    def _measure(self) -> None:
        states = [state_of(budget) for budget in self._current().values()]
        for state in BudgetState:
            BUDGETS.labels(state).set(states.count(state))


def state_of(budget: Budget) -> BudgetState:
    """How much of a budget is spent; a limit of 0 is exceeded from the start."""
    if budget.limit_micros is None:
        return BudgetState.UNLIMITED
    if budget.spent_micros >= budget.limit_micros:
        return BudgetState.EXCEEDED
    near = budget.spent_micros * 100 >= budget.limit_micros * _NEAR_PERCENT
    return BudgetState.NEAR if near else BudgetState.WITHIN


def _share(budget: Budget) -> float:
    if budget.limit_micros is None:
        return -1.0
    return budget.spent_micros / budget.limit_micros if budget.limit_micros else float("inf")
