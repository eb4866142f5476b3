"""All tables of the relay, as the newest migration leaves them (a test compares the two)."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Dialect,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

VERSION_TABLE = "relay_schema_version"  # one row, as Alembic keeps it
NEWEST = "0004"  # the newest migration: so much is known without asking Alembic
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Moment(TypeDecorator[datetime]):
    """A point in time, exact to the microsecond. SQLite has no such type: there it is microseconds since 1970."""

    impl = BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind: TypeEngine[Any] = TIMESTAMP(timezone=True) if dialect.name == "postgresql" else BigInteger()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> object:
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a zone could mean any hour")
        if value is None or dialect.name == "postgresql":
            return value
        return (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: object, dialect: Dialect) -> datetime | None:
        if isinstance(value, int):
            return _EPOCH + timedelta(microseconds=value)
        return value.astimezone(UTC) if isinstance(value, datetime) else None


class AnyText(TypeDecorator[str]):
    """Text from outside, which may hold what PostgreSQL's text refuses (NUL, half surrogate pairs).

    Stored as JSON writes it between its quotes: ordinary words look like themselves.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value)[1:-1]

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else str(json.loads(f'"{value}"'))


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)


def _chat() -> tuple[Column[str], Column[Any]]:
    return Column("deployment", Text, primary_key=True), Column("chat_id", Uuid, primary_key=True)


def _of(table: str) -> ForeignKeyConstraint:
    chat = ["deployment", "chat_id"]
    return ForeignKeyConstraint(chat, [f"{table}.{column}" for column in chat], ondelete="CASCADE")


def _required(name: str, kind: type[TypeEngine[Any]]) -> Column[Any]:
    return Column(name, kind, nullable=False)


_WANTED = text("wanted_since IS NOT NULL")
claims = Table(
    "claims",
    metadata,
    *_chat(),
    _required("owner_id", Uuid),
    _required("root_chat_id", Uuid),
    Column("worker", Text),  # who claimed it last; null: it was given back
    _required("session", BigInteger),
    Column("wanted_since", Moment),  # somebody has to follow it since then; null: it is at rest
    _required("seen", AnyText),
    _required("clean", Boolean),
    Column("resume", LargeBinary),  # JSON of `ResumePoint.to_json`; null before the first save
    Index("ix_claims_wanted", "deployment", postgresql_where=_WANTED, sqlite_where=_WANTED),
)

# A worker without a row here is dead, like one whose lease ran out.
workers = Table(
    "workers",
    metadata,
    Column("worker", Text, primary_key=True),  # another one with each start
    _required("deployment", Text),
    _required("accounts", LargeBinary),  # JSON list of user ids whose chats it can read; null for everybody's
    _required("lease_until", Moment),
    _required("load", Double),
    _required("free", Integer),
)

# The resume point's set, apart: a chat of 10,000 messages does not write them all again with each one.
known_messages = Table(
    "known_messages",
    metadata,
    *_chat(),
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    _of("claims"),
)

added_chats = Table(
    "added_chats",
    metadata,
    *_chat(),
    _required("added_at", Moment),
    Column("gone_at", Moment),  # when it was found that the server does not have the chat any more
)

charges = Table(
    "charges",
    metadata,
    *_chat(),
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    _required("owner_id", Uuid),
    _required("root_chat_id", Uuid),
    _required("at", Moment),
    _required("model", AnyText),
    _required("input_tokens", BigInteger),
    _required("output_tokens", BigInteger),
    _required("reasoning_tokens", BigInteger),
    _required("cache_read_tokens", BigInteger),
    _required("cache_write_tokens", BigInteger),
    Column("cost_micros", BigInteger),  # null: unpriced
    Index(None, "deployment", "at"),
    Index(None, "deployment", "owner_id", "at"),
)

_UNPUBLISHED = text("published_at IS NULL")
alerts = Table(
    "alerts",
    metadata,
    Column("key", AnyText, primary_key=True),
    _required("body", LargeBinary),  # the event as published
    _required("routing_key", Text),
    _required("raised_at", Moment),
    Column("published_at", Moment),
    Index("ix_alerts_unpublished", "raised_at", postgresql_where=_UNPUBLISHED, sqlite_where=_UNPUBLISHED),
)


def _place(aspect: str) -> tuple[Column[Any], Column[Any]]:
    """Where in the life of the chat the stored value of an aspect was told; -1 before the first."""
    return _required(f"{aspect}_session", BigInteger), _required(f"{aspect}_position", BigInteger)


collected_chats = Table(
    "collected_chats",
    metadata,
    *_chat(),
    _required("owner_id", Uuid),
    _required("root_chat_id", Uuid),
    Column("history", LargeBinary),  # JSON list of ids: the last statement
    *_place("history"),
    Column("status", AnyText),
    *_place("status"),
    _required("archived", Boolean),
    Column("chat", LargeBinary),  # JSON: the last Chat object
    *_place("lifecycle"),
    _required("changed_at", Moment),
    Column("news_at", Moment),  # when the live messages last changed; null before the first
    Column("archived_upto", Moment),  # `changed_at` that the last archive covers; null before the first
    Column("archived_at", Moment),  # when upstream archived it, or earlier; null: it is not archived, or gone
    Index(None, "deployment", "root_chat_id"),
)

collected_messages = Table(
    "collected_messages",
    metadata,
    *_chat(),
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),
    _required("by_user", Boolean),
    _required("body", LargeBinary),  # JSON: the upstream object
    _required("session", BigInteger),
    _required("position", BigInteger),
    _of("collected_chats"),
)

collected_turns = Table(
    "collected_turns",
    metadata,
    *_chat(),
    Column("message_id", BigInteger, primary_key=True, autoincrement=False),  # of the user message
    _of("collected_chats"),
)

archives = Table(
    "archives",
    metadata,
    *_chat(),
    Column("version", Integer, primary_key=True, autoincrement=False),
    _required("owner_id", Uuid),
    _required("root_chat_id", Uuid),
    _required("url", Text),
    _required("manifest_url", Text),
    _required("sha256", Text),
    _required("size", BigInteger),
    _required("messages", BigInteger),
    Column("first_id", BigInteger),
    Column("last_id", BigInteger),
    _required("stored_at", Moment),
    _required("published", Boolean),
    _required("sealed", Boolean),
)


def unarchived() -> ColumnElement[bool]:
    """Chats with news since their last archive."""
    chats = collected_chats.c
    return chats.news_at.is_not(None) & (chats.archived_upto.is_(None) | (chats.news_at > chats.archived_upto))


def uncopied() -> ColumnElement[bool]:
    """Chats that upstream has archived, and may delete, without an archive of ours that covers what is known."""
    chats = collected_chats.c
    no_copy = chats.archived_upto.is_(None) | (chats.news_at > chats.archived_upto)
    return chats.archived_at.is_not(None) & no_copy


Index(
    "ix_collected_chats_unarchived",
    collected_chats.c.changed_at,
    postgresql_where=unarchived(),
    sqlite_where=unarchived(),
)

Index(
    "ix_collected_chats_uncopied",
    collected_chats.c.archived_at,
    postgresql_where=uncopied(),
    sqlite_where=uncopied(),
)
