"""`relay migrate`: the database's tables."""

import asyncio

import click

from relay.adapters.clock import SystemClock
from relay.adapters.store import migrate, schema_version
from relay.settings import read_settings


@click.command("migrate")
def migrate_database() -> None:
    """Bring the database's tables to this version. Programs do it themselves when they start.

    \b
    Example:
      RELAY_DATABASE__URL=postgresql://relay:secret@postgres/relay relay migrate
    """
    settings = read_settings().database

    async def work() -> str | None:
        await migrate(settings, SystemClock())
        return await schema_version(settings, SystemClock())

    click.echo(f"{settings.safe_url} is at version {asyncio.run(work())}")
