"""The first tables: claims, charges and alerts, what the archivist collects, archives."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None

MOMENT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")


def required(name: str, kind: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False)


def chat_columns() -> list[sa.Column[Any]]:
    return [required("deployment", sa.Text()), required("chat_id", sa.Uuid())]


def chat_key(table: str, *more: str) -> sa.PrimaryKeyConstraint:
    return sa.PrimaryKeyConstraint("deployment", "chat_id", *more, name=f"pk_{table}")


def belongs_to(owner: str, table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["deployment", "chat_id"],
        [f"{owner}.deployment", f"{owner}.chat_id"],
        name=f"fk_{table}_{owner}",
        ondelete="CASCADE",
    )


def where(condition: str) -> dict[str, Any]:
    return {"postgresql_where": sa.text(condition), "sqlite_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "claims",
        *chat_columns(),
        required("owner_id", sa.Uuid()),
        required("root_chat_id", sa.Uuid()),
        sa.Column("worker", sa.Text()),
        required("session", sa.BigInteger()),
        sa.Column("lease_until", MOMENT),
        required("seen", sa.Text()),
        required("clean", sa.Boolean()),
        sa.Column("resume", sa.LargeBinary()),
        chat_key("claims"),
    )
    op.create_index("ix_claims_worker", "claims", ["worker"])
    op.create_table(
        "known_messages",
        *chat_columns(),
        required("message_id", sa.BigInteger()),
        chat_key("known_messages", "message_id"),
        belongs_to("claims", "known_messages"),
    )
    op.create_table(
        "charges",
        *chat_columns(),
        required("message_id", sa.BigInteger()),
        required("owner_id", sa.Uuid()),
        required("root_chat_id", sa.Uuid()),
        required("at", MOMENT),
        required("model", sa.Text()),
        required("input_tokens", sa.BigInteger()),
        required("output_tokens", sa.BigInteger()),
        required("reasoning_tokens", sa.BigInteger()),
        required("cache_read_tokens", sa.BigInteger()),
        required("cache_write_tokens", sa.BigInteger()),
        sa.Column("cost_micros", sa.BigInteger()),
        chat_key("charges", "message_id"),
    )
    op.create_index("ix_charges_deployment_at", "charges", ["deployment", "at"])
    op.create_index("ix_charges_deployment_owner_id_at", "charges", ["deployment", "owner_id", "at"])
    op.create_table(
        "alerts",
        required("key", sa.Text()),
        required("body", sa.LargeBinary()),
        required("routing_key", sa.Text()),
        required("raised_at", MOMENT),
        sa.Column("published_at", MOMENT),
        sa.PrimaryKeyConstraint("key", name="pk_alerts"),
    )
    op.create_index("ix_alerts_unpublished", "alerts", ["raised_at"], **where("published_at IS NULL"))
    op.create_table(
        "collected_chats",
        *chat_columns(),
        required("owner_id", sa.Uuid()),
        required("root_chat_id", sa.Uuid()),
        sa.Column("history", sa.LargeBinary()),
        required("history_session", sa.BigInteger()),
        required("history_position", sa.BigInteger()),
        sa.Column("status", sa.Text()),
        required("status_session", sa.BigInteger()),
        required("status_position", sa.BigInteger()),
        required("archived", sa.Boolean()),
        sa.Column("chat", sa.LargeBinary()),
        required("lifecycle_session", sa.BigInteger()),
        required("lifecycle_position", sa.BigInteger()),
        required("changed_at", MOMENT),
        sa.Column("news_at", MOMENT),
        sa.Column("archived_upto", MOMENT),
        chat_key("collected_chats"),
    )
    op.create_index(
        "ix_collected_chats_unarchived",
        "collected_chats",
        ["changed_at"],
        **where("news_at IS NOT NULL AND (archived_upto IS NULL OR news_at > archived_upto)"),
    )
    op.create_table(
        "collected_messages",
        *chat_columns(),
        required("message_id", sa.BigInteger()),
        required("by_user", sa.Boolean()),
        required("body", sa.LargeBinary()),
        required("session", sa.BigInteger()),
        required("position", sa.BigInteger()),
        chat_key("collected_messages", "message_id"),
        belongs_to("collected_chats", "collected_messages"),
    )
    op.create_table(
        "collected_turns",
        *chat_columns(),
        required("message_id", sa.BigInteger()),
        chat_key("collected_turns", "message_id"),
        belongs_to("collected_chats", "collected_turns"),
    )
    op.create_table(
        "archives",
        *chat_columns(),
        required("version", sa.Integer()),
        required("owner_id", sa.Uuid()),
        required("root_chat_id", sa.Uuid()),
        required("url", sa.Text()),
        required("manifest_url", sa.Text()),
        required("sha256", sa.Text()),
        required("size", sa.BigInteger()),
        required("messages", sa.BigInteger()),
        sa.Column("first_id", sa.BigInteger()),
        sa.Column("last_id", sa.BigInteger()),
        required("stored_at", MOMENT),
        required("published", sa.Boolean()),
        required("sealed", sa.Boolean()),
        chat_key("archives", "version"),
    )
