"""`relay worker`, `meter`, `archivist` and `run`: the processes that stay."""

import asyncio

import click

from relay.adapters.logs import configure_logs
from relay.processes import ROLES, run_roles
from relay.settings import read_settings


def _process(*roles: str) -> None:
    settings = read_settings()
    configure_logs(settings.log)
    asyncio.run(run_roles(settings, roles))


@click.command()
def worker() -> None:
    """Follow the chats of one account and publish their events.

    \b
    Example:
      RELAY_CODER__URL=https://coder.example.com RELAY_CODER__TOKEN_FILE=/run/secrets/coder \\
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F \\
      RELAY_DATABASE__URL=postgresql://relay:secret@postgres/relay relay worker
    """
    _process("worker")


@click.command()
def meter() -> None:
    """Charge what was used at configured prices and tell when a limit is near.

    \b
    Example:
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F \\
      RELAY_DATABASE__URL=postgresql://relay:secret@postgres/relay \\
      RELAY_METER__PRICES='{"gpt-5": {"input": "1.25", "output": "10"}}' \\
      RELAY_METER__POLICIES='[{"name": "daily", "period": "day", "limit_micros": 20000000}]' relay meter
    """
    _process("meter")


@click.command()
def archivist() -> None:
    """Keep a verified copy of every finished chat.

    \b
    Example:
      RELAY_CODER__URL=https://coder.example.com RELAY_CODER__TOKEN_FILE=/run/secrets/coder \\
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F \\
      RELAY_DATABASE__URL=postgresql://relay:secret@postgres/relay \\
      RELAY_ARCHIVE__URL=file:///var/lib/relay/archive relay archivist
    """
    _process("archivist")


@click.command()
def run() -> None:
    """Worker, meter and archivist in one process, with the settings of all three.

    \b
    Example:
      RELAY_CODER__URL=https://coder.example.com RELAY_CODER__TOKEN_FILE=/run/secrets/coder \\
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F RELAY_ARCHIVE__URL=file:///var/lib/relay/archive relay run
    """
    _process(*ROLES)
