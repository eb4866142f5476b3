"""The command line: one subcommand per process, and those for a person at a terminal.

Exit codes: 0 good, 1 something is not as it should be, 2 the command or a setting is wrong.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

import click

from relay.core.errors import RelayError, WrongSettings


def main() -> None:
    """The `relay` command."""
    try:
        relay.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as exc:
        exc.show()
        sys.exit(2)
    except RelayError as exc:
        sys.exit(_complain(exc))
    except BaseExceptionGroup as group:
        ours, others = group.split(RelayError)
        if ours is None or others is not None:
            raise
        sys.exit(_complain(_first(ours)))


def _first(exc: BaseException) -> BaseException:
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def _complain(exc: BaseException) -> int:
    for line in str(exc).splitlines():
        click.echo(f"relay: {line}", err=True)
    return 2 if isinstance(exc, WrongSettings) else 1


class _Later(NamedTuple):
    """A command that is imported when it is asked for: `module:name`, and its line in the list of commands."""

    where: str
    does: str


# The list of commands is shown from here: to import all of them for it would take seconds.
COMMANDS: Mapping[str, _Later] = {
    "archivist": _Later("relay.commands.run:archivist", "Keep a verified copy of every finished chat."),
    "bench": _Later(
        "relay.commands.bench:bench",
        "Measure this machine: publisher, decoder, the whole path, sockets, failover, latency.",
    ),
    "check": _Later("relay.commands.check:check", "Try settings and connections, each with what to do about it."),
    "contract": _Later("relay.contract.command:contract", "The contract of this version as documents."),
    "demo": _Later("relay.commands.demo:demo", "Run everything in one process against a simulated Coder server."),
    "follow": _Later("relay.commands.follow:follow", "Follow chats that no account of the relay lists."),
    "meter": _Later(
        "relay.commands.run:meter", "Charge what was used at configured prices and tell when a limit is near."
    ),
    "migrate": _Later("relay.commands.migrate:migrate_database", "Bring the database's tables to this version."),
    "run": _Later("relay.commands.run:run", "Worker, meter and archivist in one process."),
    "simulator": _Later("relay.simulator.command:simulator", "Run a Coder chats server with a scripted model."),
    "tail": _Later("relay.commands.tail:tail", "Show events as they are published, until Ctrl-C."),
    "topology": _Later("relay.commands.topology:topology", "What the relay declares on the broker."),
    "worker": _Later("relay.commands.run:worker", "Follow the chats of one account and publish their events."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].where.partition(":")
        command = getattr(import_module(module), name)
        assert isinstance(command, click.Command)  # noqa: S101  # a test asks for each of them
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].does) for name in self.list_commands(ctx)])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coder-chat-relay")
def relay() -> None:
    """Follow every Coder Agents chat and publish one ordered, de-duplicated event stream on RabbitMQ.

    `relay demo` shows all of it in a minute and needs no other service. Settings are RELAY_* variables, see
    `docs/configuration.md`.
    """
