"""Chats that were added by hand, in the database. Part of `relay.adapters.store`."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import delete, select, update

from relay.adapters.database import Database
from relay.adapters.migrations.tables import added_chats
from relay.adapters.store_rows import with_key
from relay.ports import AddedChat


class SqlAdded:
    """Keeps the promise of `Added`."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def added(self, deployment: str) -> Sequence[AddedChat]:
        rows = added_chats.c
        query = select(rows.chat_id, rows.added_at, rows.gone_at).where(rows.deployment == deployment)
        async with self._db.reading() as connection:
            found = (await connection.execute(query.order_by(rows.added_at, rows.chat_id))).all()
        return [AddedChat(row.chat_id, row.added_at, row.gone_at) for row in found]

    async def add(self, deployment: str, chat_id: UUID) -> bool:
        row = {"deployment": deployment, "chat_id": chat_id, "added_at": self._db.now(), "gone_at": None}
        new = self._db.insert(added_chats).values(row).on_conflict_do_nothing()
        back = (
            update(added_chats)
            .where(with_key(added_chats, deployment, chat_id), added_chats.c.gone_at.is_not(None))
            .values(gone_at=None)
        )
        async with self._db.writing() as connection:
            inserted = (await connection.execute(new)).rowcount
            return inserted > 0 or (await connection.execute(back)).rowcount > 0

    async def remove(self, deployment: str, chat_id: UUID) -> bool:
        async with self._db.writing() as connection:
            gone = await connection.execute(delete(added_chats).where(with_key(added_chats, deployment, chat_id)))
        return gone.rowcount > 0

    async def set_gone(self, deployment: str, chat_id: UUID) -> None:
        found = (
            update(added_chats)
            .where(with_key(added_chats, deployment, chat_id), added_chats.c.gone_at.is_(None))
            .values(gone_at=self._db.now())
        )
        async with self._db.writing() as connection:
            await connection.execute(found)
