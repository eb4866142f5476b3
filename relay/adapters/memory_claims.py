"""The in-memory twin of `Claims`. Part of `relay.adapters.memory`."""

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import msgspec

from relay.core.claims import Peer
from relay.core.errors import LostClaim, Unavailable
from relay.core.events import ChatRef
from relay.core.resume import Commit, ResumePoint
from relay.ports import ChatRecord, Claim, Clock


@dataclass(slots=True)
class _Row:
    chat: ChatRef
    worker: str | None = None
    session: int = 0
    seen: str = ""
    clean: bool = True
    wanted: bool = False
    point: ResumePoint = field(default_factory=ResumePoint)


class MemoryClaims:
    """`Claims` within one process, gone at its end. Leases go by the monotonic clock."""

    def __init__(self, clock: Clock) -> None:
        self.down = False  # True: the database is away, calls raise `Unavailable`
        self._clock = clock
        self._rows: dict[tuple[str, UUID], _Row] = {}
        self._workers: dict[str, tuple[str, Peer, float]] = {}  # deployment, what it told, end of the lease

    async def enlist(self, peer: Peer, deployment: str, *, lease_seconds: float) -> None:
        await self._reach()
        for worker in [worker for worker in self._workers if not self._live(worker)]:
            del self._workers[worker]
        if peer.worker in self._workers:
            raise ValueError(f"there is a worker {peer.worker} already")
        self._workers[peer.worker] = deployment, peer, self._clock.monotonic() + lease_seconds

    async def renew(self, peer: Peer, *, lease_seconds: float) -> Sequence[Peer] | None:
        await self._reach()
        if not self._live(peer.worker):
            return None
        deployment, _, _ = self._workers[peer.worker]
        self._workers[peer.worker] = deployment, peer, self._clock.monotonic() + lease_seconds
        return [
            each
            for name, (where, each, _) in sorted(self._workers.items())
            if where == deployment and (self._live(name) or name == peer.worker)
        ]

    async def resign(self, worker: str) -> None:
        await self._reach()
        if self._workers.pop(worker, None) is not None:
            for row in self._rows.values():
                row.worker = None if row.worker == worker else row.worker

    async def records(
        self, deployment: str, *, after: UUID | None = None, limit: int | None = None
    ) -> Sequence[ChatRecord]:
        await self._reach()
        found = [key for key in sorted(self._rows) if key[0] == deployment and (after is None or key[1] > after)]
        return [self._record(self._rows[key]) for key in found[:limit]]

    async def records_of(self, deployment: str, chat_ids: Collection[UUID]) -> Sequence[ChatRecord]:
        return [record for record in await self.records(deployment) if record.chat.chat_id in set(chat_ids)]

    async def claim(self, chat: ChatRef, worker: str) -> Claim | None:
        await self._reach()
        if not self._live(worker):
            raise LostClaim(f"the lease of worker {worker} is over")
        row = self._rows.setdefault((chat.deployment, chat.chat_id), _Row(chat))
        if row.worker != worker and self._live(row.worker):
            return None
        return self._take(row, worker)

    async def holdings(self, worker: str) -> Sequence[ChatRef]:
        await self._reach()
        return [row.chat for row in self._rows.values() if row.worker == worker and self._live(worker)]

    async def orphans(self, worker: str) -> int:
        await self._reach()
        return len(self._orphans(worker))

    async def adopt(self, worker: str, *, limit: int) -> Sequence[Claim]:
        await self._reach()
        return [self._take(row, worker) for row in self._orphans(worker)[:limit]]

    async def save(self, claim: Claim, commit: Commit) -> None:
        await self._reach()
        row = self._held(claim)
        if row is None:
            raise LostClaim(f"chat {claim.chat.chat_id}: session {claim.session} is over, nothing was saved")
        self._store(row, commit)

    async def release(self, claim: Claim, commit: Commit | None, *, seen: str | None, clean: bool) -> None:
        await self._reach()
        row = self._held(claim)
        if row is None:
            return
        if commit is not None:
            self._store(row, commit)
        row.worker, row.clean = None, clean
        if seen is not None:
            row.seen, row.wanted = seen, False

    # Within

    async def _reach(self) -> None:
        await asyncio.sleep(0)  # as a network would, let the others have their turn
        if self.down:
            raise Unavailable("the database is down")

    def _live(self, worker: str | None) -> bool:
        return worker in self._workers and self._workers[worker][2] > self._clock.monotonic()

    def _record(self, row: _Row) -> ChatRecord:
        return ChatRecord(row.chat, row.seen, row.worker if self._live(row.worker) else None, row.clean)

    def _orphans(self, worker: str) -> list[_Row]:
        if not self._live(worker):
            return []
        deployment, peer, _ = self._workers[worker]
        return [
            row
            for row in self._rows.values()
            if row.wanted
            and row.chat.deployment == deployment
            and peer.reads(row.chat.owner_id)
            and not self._live(row.worker)
        ]

    def _take(self, row: _Row, worker: str) -> Claim:
        claim = Claim(row.chat, worker, row.session + 1, msgspec.structs.replace(row.point, clean=row.clean))
        row.worker, row.session, row.clean, row.wanted = worker, claim.session, False, True
        return claim

    def _held(self, claim: Claim) -> _Row | None:
        row = self._rows.get((claim.chat.deployment, claim.chat.chat_id))
        return row if row is not None and (row.session, row.worker) == (claim.session, claim.worker) else None

    def _store(self, row: _Row, commit: Commit) -> None:
        row.point = commit.onto(row.point.known)
