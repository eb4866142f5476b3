"""The relay's state in PostgreSQL or SQLite: who follows which chat and how far, charges, alerts, archives.

A resume point is one row and a set of message ids beside it, of which a save writes only the difference. What comes
from upstream is stored as bytes: it may hold characters that a database's text refuses.
"""

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import bindparam, case, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.adapters.database import Database, DatabaseSettings, migrate, open_database, schema_version
from relay.adapters.migrations.tables import alerts, charges, claims, known_messages
from relay.adapters.store_archives import SqlArchives
from relay.adapters.store_rows import AnyRow, chat_columns, chat_key, chat_ref, of_chat, storable
from relay.core.errors import BadEvent, CorruptState, LostClaim
from relay.core.events import ChatRef, Event, decode_event, encode_json
from relay.core.resume import Commit, ResumePoint
from relay.ports import Charge, ChatRecord, Claim, Clock, Spend

__all__ = ["DatabaseSettings", "SqlStore", "migrate", "open_store", "schema_version"]

_EVIDENCE = 10  # message ids that a sum names


@asynccontextmanager
async def open_store(settings: DatabaseSettings, clock: Clock, *, migrate: bool = True) -> AsyncIterator["SqlStore"]:
    """The store, its tables brought to this version first unless `migrate` is False.

    Several processes may open one database at once: one migrates, the others wait for it.

    Raises:
        Unavailable: The database is down, or still starting. Wait and repeat.
        WrongSettings: It refuses the password, does not exist, or has tables of another version.
    """
    async with open_database(settings, clock, migrate=migrate) as database:
        yield SqlStore(database)


class SqlClaims:
    """Keeps the promise of `Claims`. The row of a chat is the lock: each change of it takes the row first."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def records(self, deployment: str) -> Sequence[ChatRecord]:
        holder = case((claims.c.lease_until > self._db.now(), claims.c.worker)).label("holder")
        query = select(claims, holder).where(claims.c.deployment == deployment).order_by(claims.c.chat_id)
        async with self._db.reading() as connection:
            rows = (await connection.execute(query)).all()
        return [ChatRecord(chat_ref(row), row.seen, row.holder, row.clean) for row in rows]

    async def claim(self, chat: ChatRef, worker: str, *, lease_seconds: float) -> Claim | None:
        live = func.coalesce(claims.c.lease_until > self._db.now(), False).label("live")
        locked = select(claims, live).where(of_chat(claims, chat)).with_for_update()
        async with self._db.writing() as connection:
            row = (await connection.execute(locked)).one_or_none()
            if row is None:
                # `clean` is True for a chat nobody ever followed. From the first claim on it says how the last follower
                # ended, so that one that died before its first save is not taken for one that never was.
                new = {**chat_columns(chat), "session": 0, "seen": "", "clean": True}
                await connection.execute(self._db.insert(claims).values(new).on_conflict_do_nothing())
                row = (await connection.execute(locked)).one()
            if row.live and row.worker is not None and row.worker != worker:
                return None
            resume = _resume_point(row, await self._known(connection, chat))
            taken = {"worker": worker, "session": row.session + 1, "clean": False}
            lease = {"lease_until": self._db.now(plus_seconds=lease_seconds)}
            await connection.execute(update(claims).where(of_chat(claims, chat)).values(taken | lease))
        return Claim(chat, worker, row.session + 1, resume)

    async def renew(self, worker: str, *, lease_seconds: float) -> frozenset[UUID]:
        extended = (
            update(claims)
            .where(claims.c.worker == worker, claims.c.lease_until > self._db.now())
            .values(lease_until=self._db.now(plus_seconds=lease_seconds))
            .returning(claims.c.chat_id)
        )
        async with self._db.writing() as connection:
            return frozenset((await connection.execute(extended)).scalars())

    async def save(self, claim: Claim, commit: Commit) -> None:
        async with self._db.writing() as connection:
            if not await self._change(connection, claim, commit, {}):
                raise LostClaim(f"chat {claim.chat.chat_id}: session {claim.session} is over, nothing was saved")

    async def release(self, claim: Claim, commit: Commit | None, *, seen: str | None, clean: bool) -> None:
        values: dict[str, object] = {"worker": None, "lease_until": None, "clean": clean}
        if seen is not None:
            values["seen"] = seen
        async with self._db.writing() as connection:
            await self._change(connection, claim, commit, values)

    async def _change(
        self, connection: AsyncConnection, claim: Claim, commit: Commit | None, values: dict[str, object]
    ) -> bool:
        """Change the row of a claim and its set, if the claim still holds; False when it does not."""
        if commit is not None:
            values = values | {"resume": encode_json(commit.point.to_json())}
        held = of_chat(claims, claim.chat) & (claims.c.session == claim.session) & (claims.c.worker == claim.worker)
        # Without values to set, the row is taken all the same.
        changed = await connection.execute(update(claims).where(held).values(values or {"session": claim.session}))
        if changed.rowcount == 0:
            return False
        if commit is not None:
            await self._forget(connection, claim.chat, commit.removed)
            await self._remember(connection, claim.chat, commit.added)
        return True

    async def _known(self, connection: AsyncConnection, chat: ChatRef) -> frozenset[int]:
        ids = select(known_messages.c.message_id).where(of_chat(known_messages, chat))
        return frozenset((await connection.execute(ids)).scalars())

    async def _remember(self, connection: AsyncConnection, chat: ChatRef, ids: Iterable[int]) -> None:
        rows = [{**chat_key(chat), "message_id": each} for each in sorted(ids)]
        if rows:
            await connection.execute(self._db.insert(known_messages).on_conflict_do_nothing(), rows)

    async def _forget(self, connection: AsyncConnection, chat: ChatRef, ids: Iterable[int]) -> None:
        rows = [{"gone": each} for each in sorted(ids)]
        if rows:
            one = of_chat(known_messages, chat) & (known_messages.c.message_id == bindparam("gone"))
            await connection.execute(delete(known_messages).where(one), rows)


class SqlCharges:
    """Keeps the promise of `Charges`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def charge(self, charge: Charge) -> bool:
        row = asdict(charge) | chat_columns(charge.chat) | {"at": _utc(charge.at)}
        del row["chat"]
        storable(charge.chat, *(value for value in row.values() if isinstance(value, int)))
        async with self._db.writing() as connection:
            stored = await connection.execute(self._db.insert(charges).values(row).on_conflict_do_nothing())
        return stored.rowcount == 1

    async def charged(self, chat: ChatRef, message_id: int) -> Charge | None:
        query = select(charges).where(of_chat(charges, chat), charges.c.message_id == message_id)
        async with self._db.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            return None
        return Charge(
            chat=chat_ref(row),
            message_id=row.message_id,
            at=row.at,
            model=row.model,
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            reasoning_tokens=row.reasoning_tokens,
            cache_read_tokens=row.cache_read_tokens,
            cache_write_tokens=row.cache_write_tokens,
            cost_micros=row.cost_micros,
        )

    async def spend(self, deployment: str, *, owner_id: UUID | None, start: datetime, end: datetime) -> Spend:
        which = (charges.c.deployment == deployment) & (charges.c.at >= start) & (charges.c.at < end)
        if owner_id is not None:
            which &= charges.c.owner_id == owner_id
        newest = select(charges.c.message_id).where(which).order_by(*_NEWEST_FIRST).limit(_EVIDENCE)
        async with self._db.reading() as connection:
            sums = (await connection.execute(select(*_SUMS).where(which))).one()
            ids = (await connection.execute(newest)).scalars().all()
        return _spend(sums, ids)

    async def spend_by_owner(self, deployment: str) -> Mapping[UUID, Spend]:
        which = charges.c.deployment == deployment
        place = func.row_number().over(partition_by=charges.c.owner_id, order_by=_NEWEST_FIRST).label("place")
        ranked = select(charges.c.owner_id, charges.c.message_id, place).where(which).subquery()
        newest = select(ranked).where(ranked.c.place <= _EVIDENCE).order_by(ranked.c.owner_id, ranked.c.place)
        async with self._db.reading() as connection:
            sums = (
                await connection.execute(select(charges.c.owner_id, *_SUMS).where(which).group_by(charges.c.owner_id))
            ).all()
            evidence: dict[UUID, list[int]] = {row.owner_id: [] for row in sums}
            for row in await connection.execute(newest):
                evidence[row.owner_id].append(row.message_id)
        return {row.owner_id: _spend(row, evidence[row.owner_id]) for row in sums}

    async def raise_alert(self, key: str, event: Event) -> bool:
        row = {"key": key, "body": event.encode(), "routing_key": event.routing_key, "raised_at": self._db.now()}
        async with self._db.writing() as connection:
            raised = await connection.execute(self._db.insert(alerts).values(row).on_conflict_do_nothing())
        return raised.rowcount == 1

    async def unpublished_alerts(self) -> Sequence[tuple[str, Event]]:
        waiting = select(alerts).where(alerts.c.published_at.is_(None)).order_by(alerts.c.raised_at, alerts.c.key)
        async with self._db.reading() as connection:
            rows = (await connection.execute(waiting)).all()
        try:
            return [(row.key, decode_event(row.body, row.routing_key)) for row in rows]
        except BadEvent as exc:
            raise CorruptState(f"a stored alert cannot be read: {exc}") from exc

    async def alert_published(self, key: str) -> None:
        confirmed = update(alerts).where(alerts.c.key == key, alerts.c.published_at.is_(None))
        async with self._db.writing() as connection:
            await connection.execute(confirmed.values(published_at=self._db.now()))


class SqlStore(SqlClaims, SqlCharges, SqlArchives):
    """Keeps the promise of `Store`. Safe for all tasks of a process; with PostgreSQL, of many."""

    async def check(self) -> None:
        async with self._db.reading() as connection:
            await connection.execute(select(1))


# --- rows ----------------------------------------------------------------------------------------------------------


_NEWEST_FIRST = (charges.c.at.desc(), charges.c.message_id.desc())
_SUMS = (
    func.coalesce(func.sum(charges.c.cost_micros), 0).label("cost_micros"),
    func.count().label("charges"),
    func.count(charges.c.cost_micros).label("priced"),
)


def _spend(sums: AnyRow, ids: Sequence[int]) -> Spend:
    # PostgreSQL adds big integers up to a Decimal.
    return Spend(int(sums.cost_micros), sums.charges, sums.charges - sums.priced, ids)


def _utc(moment: datetime) -> datetime:
    try:
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except OverflowError:  # in the year 1 or 9999
        pass
    raise BadEvent(f"no point in time: {moment}")


def _resume_point(row: AnyRow, known: frozenset[int]) -> ResumePoint:
    try:
        stored = {} if row.resume is None else json.loads(row.resume)
        if not isinstance(stored, dict):
            raise CorruptState("stored resume point is not an object")
        return ResumePoint.from_json(stored, known=known, clean=row.clean)
    except (ValueError, RecursionError) as exc:
        raise CorruptState(f"stored resume point of chat {row.chat_id} is not JSON: {exc}") from exc
