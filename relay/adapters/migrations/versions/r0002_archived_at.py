"""Since when a collected chat is archived upstream, which deletes it some days later."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"

MOMENT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
NO_COPY = "archived_at IS NOT NULL AND (archived_upto IS NULL OR news_at > archived_upto)"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CHATS = sa.table(
    "collected_chats",
    sa.column("deployment", sa.Text()),
    sa.column("chat_id", sa.Uuid()),
    sa.column("archived", sa.Boolean()),
    sa.column("chat", sa.LargeBinary()),
    sa.column("archived_at", MOMENT),
)


def upgrade() -> None:
    op.add_column("collected_chats", sa.Column("archived_at", MOMENT))
    connection = op.get_bind()
    sqlite = connection.dialect.name == "sqlite"
    for key, moment in archived_chats(connection):
        # SQLite holds microseconds since 1970.
        value: Any = round((moment - EPOCH).total_seconds() * 1_000_000) if sqlite else moment
        one = (CHATS.c.deployment == key[0]) & (CHATS.c.chat_id == key[1])
        connection.execute(sa.update(CHATS).where(one).values(archived_at=value))
    op.create_index(
        "ix_collected_chats_uncopied",
        "collected_chats",
        ["archived_at"],
        postgresql_where=sa.text(NO_COPY),
        sqlite_where=sa.text(NO_COPY),
    )
    op.create_index("ix_collected_chats_deployment_root_chat_id", "collected_chats", ["deployment", "root_chat_id"])


def archived_chats(connection: sa.Connection) -> Iterator[tuple[tuple[str, Any], datetime]]:
    """Key of each archived chat, and when upstream archived it: its `updated_at`, or 1970 where that cannot be read."""
    query = sa.select(CHATS.c.deployment, CHATS.c.chat_id, CHATS.c.chat).where(CHATS.c.archived)
    for deployment, chat_id, chat in connection.execute(query).all():
        try:
            moment = datetime.fromisoformat(json.loads(chat)["updated_at"])
        except (ValueError, TypeError, KeyError):
            moment = EPOCH
        yield (deployment, chat_id), moment if moment.tzinfo else EPOCH
