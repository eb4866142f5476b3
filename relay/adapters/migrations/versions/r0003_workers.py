"""Leases of workers instead of one per claim, and which chats wait for somebody to go on with them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"

MOMENT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")
HELD = "wanted_since IS NOT NULL"


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("deployment", sa.Text(), nullable=False),
        sa.Column("accounts", sa.LargeBinary(), nullable=False),
        sa.Column("lease_until", MOMENT, nullable=False),
        sa.Column("load", sa.Double(), nullable=False),
        sa.Column("free", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("worker", name="pk_workers"),
    )
    op.add_column("claims", sa.Column("wanted_since", MOMENT))
    # Workers of before are gone, or will find that they are: what they held waits for a follower.
    op.execute("UPDATE claims SET wanted_since = lease_until WHERE worker IS NOT NULL")
    op.execute("UPDATE claims SET worker = NULL")
    op.drop_index("ix_claims_worker", "claims")
    op.drop_column("claims", "lease_until")
    op.create_index(
        "ix_claims_wanted", "claims", ["deployment"], postgresql_where=sa.text(HELD), sqlite_where=sa.text(HELD)
    )
