"""Chats that were added by hand."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"

MOMENT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "added_chats",
        sa.Column("deployment", sa.Text(), nullable=False),
        sa.Column("chat_id", sa.Uuid(), nullable=False),
        sa.Column("added_at", MOMENT, nullable=False),
        sa.Column("gone_at", MOMENT),
        sa.PrimaryKeyConstraint("deployment", "chat_id", name="pk_added_chats"),
    )
