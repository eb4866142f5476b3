"""The relay's state in PostgreSQL or SQLite: who follows which chat and how far, charges, alerts, archives.

What comes from upstream is stored as bytes: it may hold characters that a database's text refuses.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import func, select, update

from relay.adapters.database import Database, DatabaseSettings, migrate, open_database, schema_version
from relay.adapters.migrations.tables import alerts, charges
from relay.adapters.store_added import SqlAdded
from relay.adapters.store_archives import SqlArchives
from relay.adapters.store_claims import SqlClaims
from relay.adapters.store_rows import AnyRow, chat_columns, chat_ref, of_chat, storable
from relay.core.errors import BadEvent, CorruptState
from relay.core.events import ChatRef, Event, decode_event
from relay.ports import Charge, Clock, Raised, Spend

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

    async def raise_alert(self, key: str, event: Event) -> Raised:
        row = {"key": key, "body": event.encode(), "routing_key": event.routing_key, "raised_at": self._db.now()}
        async with self._db.writing() as connection:
            raised = await connection.execute(self._db.insert(alerts).values(row).on_conflict_do_nothing())
            if raised.rowcount == 1:
                return Raised.NEW
            published = select(alerts.c.published_at).where(alerts.c.key == key)
            at = (await connection.execute(published)).scalar_one()
        return Raised.WAITING if at is None else Raised.PUBLISHED

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


class SqlStore(SqlClaims, SqlCharges, SqlArchives, SqlAdded):
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
