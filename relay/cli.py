"""The command line: one subcommand per process, and those for a person at a terminal.

Exit codes: 0 good, 1 something is not as it should be, 2 the command or a setting is wrong.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from relay.adapters.clock import SystemClock
from relay.adapters.coder import open_upstream
from relay.adapters.logs import LogSettings, configure_logs
from relay.adapters.rabbit import RabbitSettings, open_rabbit
from relay.adapters.store import migrate, open_store, schema_version
from relay.adapters.topology import TOPOLOGY, Binding, Exchange, Queue, definitions
from relay.core.errors import BadEvent, ChatRefused, RelayError, Unauthorized, Unavailable, WrongSettings
from relay.core.events import Event, JsonObject, decode_event
from relay.processes import ROLES, run_roles
from relay.settings import Settings, read_settings

if TYPE_CHECKING:
    from relay.demo import ChatLine, DemoOptions, Seen, Summary

T = TypeVar("T")


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


def _run(work: Coroutine[None, None, T]) -> T:
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise click.exceptions.Abort from None


class _Commands(click.Group):
    """Two commands are imported when they are asked for: what they bring along would slow down every other one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "contract", "simulator"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        match cmd_name:
            case "contract":
                from relay.contract import contract  # noqa: PLC0415

                return contract
            case "simulator":
                from relay.simulator.command import simulator  # noqa: PLC0415

                return simulator
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coder-chat-relay")
def relay() -> None:
    """Follow every Coder Agents chat and publish one ordered, de-duplicated event stream on RabbitMQ.

    `relay demo` shows all of it in a minute and needs no other service. Settings are RELAY_* variables, see
    `docs/configuration.md`.
    """


# --- the processes ---------------------------------------------------------------------------------------------------


def _process(*roles: str) -> None:
    settings = read_settings()
    configure_logs(settings.log)
    _run(run_roles(settings, roles))


@relay.command()
def worker() -> None:
    """Follow the chats of one account and publish their events.

    \b
    Example:
      RELAY_CODER__URL=https://coder.example.com RELAY_CODER__TOKEN_FILE=/run/secrets/coder \\
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F \\
      RELAY_DATABASE__URL=postgresql://relay:secret@postgres/relay relay worker
    """
    _process("worker")


@relay.command()
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


@relay.command()
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


@relay.command()
def run() -> None:
    """Worker, meter and archivist in one process, with the settings of all three.

    \b
    Example:
      RELAY_CODER__URL=https://coder.example.com RELAY_CODER__TOKEN_FILE=/run/secrets/coder \\
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F RELAY_ARCHIVE__URL=file:///var/lib/relay/archive relay run
    """
    _process(*ROLES)


def _broker_url(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        RabbitSettings.model_validate({"url": value})
    except ValidationError:
        raise click.BadParameter("expected amqp://user:password@host:5672/vhost") from None
    return value


def _made(_: click.Context, __: click.Parameter, directory: Path | None) -> Path | None:
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise click.BadParameter(f"{directory} cannot be made: {exc.strerror}") from exc
    return directory


# --- demo ------------------------------------------------------------------------------------------------------------


@relay.command()
@click.option("--serve", is_flag=True, help="Keep going until Ctrl-C: the owners go on talking.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON; progress goes to standard error.")
@click.option(
    "--rabbit", metavar="URL", callback=_broker_url, help="Publish to this broker instead of the in-memory bus."
)
@click.option("--chats", type=click.IntRange(1, 500), help="How many chats; beyond the scenarios they are made up.")
@click.option(
    "--seed", default=0, show_default=True, help="Decides ids and made-up chats: the same seed, the same chats."
)
@click.option(
    "--speed", default=1.0, show_default=True, type=click.FloatRange(0.1, 50), help="Faster than life by this factor."
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_made,
    help="Where database and archives go.",
)
def demo(**options: Any) -> None:
    """Run everything in one process against a simulated Coder server, and check every fold.

    Ends by itself with a summary; exit code 1 when what was published does not fold to what Coder's REST API says.

    \b
    Examples:
      relay demo
      relay demo --chats 30 --seed 7 --speed 5
      relay demo --rabbit amqp://guest:guest@localhost:5672/%2F --json
    """
    from relay.demo import DemoOptions  # noqa: PLC0415  # as with the simulator, which it starts

    as_json = options.pop("as_json")
    configure_logs(LogSettings(level="error"))
    summary = _run(_demo(DemoOptions(**options), as_json=as_json))
    click.echo(json.dumps(summary.to_json()) if as_json else _summary_text(summary))
    sys.exit(0 if summary.good else 1)


async def _demo(options: "DemoOptions", *, as_json: bool) -> "Summary":
    from relay.demo import run_demo  # noqa: PLC0415

    stop = asyncio.Event()
    if options.serve:
        for sig in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    console = Console(stderr=as_json)
    with _progress(console) as changed:
        return await run_demo(options, changed, console.print, stop)


@contextmanager
def _progress(console: Console) -> Any:
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8) as live:
            yield lambda seen: live.update(_table(seen))
        return
    shown: dict[str, tuple[str, int]] = {}

    def plain(seen: "Seen") -> None:
        for line in seen.lines.values():
            now = ("done" if line.done else line.status, line.turns)
            if line.name and shown.get(line.chat_id) != now:
                shown[line.chat_id] = now
                console.print(_plain_line(line), highlight=False, soft_wrap=True)

    yield plain


def _plain_line(line: "ChatLine") -> str:
    state = "done" if line.done else line.status or "new"
    counts = f"{line.turns} turns, {line.messages} messages, {line.previews} previews"
    return f"{line.name:<12} {line.owner:<4} {state:<9} {counts}"


def _table(seen: "Seen") -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("chat", "owner", "status", "turns", "messages", "previews"):
        table.add_column(heading, justify="right" if heading in ("turns", "messages", "previews") else "left")
    for line in seen.lines.values():
        state = "[green]done[/]" if line.done else line.status
        table.add_row(line.name, line.owner, state, str(line.turns), str(line.messages), str(line.previews))
    return table


def _summary_text(summary: "Summary") -> str:
    spend = ", ".join(f"{owner} ${micros / 1e6:.4f}" for owner, micros in sorted(summary.spend_micros.items()))
    verdict = (
        f"{'OK' if summary.good else 'NOT EQUAL'}: for {summary.equal} of {summary.chats} chats the fold of the "
        f"published events equals the REST transcript; {len(summary.archives)} archived"
    )
    rows = [
        "",
        f"chats              {summary.chats}",
        f"durable events     {summary.durable_events}",
        f"previews           {summary.previews} ({summary.previews_coalesced} more were joined to one before)",
        f"replays filtered   {summary.replays_filtered}",
        f"reconnects         {summary.reconnects}",
        f"edits              {summary.edits}",
        f"spend              {spend or 'none'}",
        f"alerts fired       {len(summary.alerts)}",
        *(f"  {alert}" for alert in summary.alerts),
        f"archives written   {len(summary.archives)}",
        *(f"  {each['path']}\n    sha256 {each['sha256']}" for each in summary.archives),
        *(f"chat {chat}: {line}" for chat, lines in summary.differences.items() for line in lines),
        "",
        verdict,
    ]
    return "\n".join(rows)


# --- at a terminal ---------------------------------------------------------------------------------------------------


@relay.command()
@click.argument("chat", required=False, type=click.UUID)
@click.option("--match", "patterns", multiple=True, metavar="KEY", help="Routing pattern: * is one word, # any number.")
@click.option("--json", "as_json", is_flag=True, help="Whole events, one per line.")
def tail(chat: UUID | None, patterns: tuple[str, ...], *, as_json: bool) -> None:
    """Show events as they are published, until Ctrl-C.

    \b
    Examples:
      relay tail                                      everything
      relay tail 5f0c2f5e-8a1d-4c57-9e55-6b8d0f2a7c31  one chat
      relay tail --match 'chat.message.#' --match 'usage.exceeded.#'
    """
    settings = read_settings()
    configure_logs(settings.log)
    wanted = [*patterns, *([f"*.*.*.*.{chat}"] if chat else [])] or ["#"]
    _run(_tail(_broker(settings), wanted, _event_line if not as_json else None))


async def _tail(rabbit: RabbitSettings, patterns: list[str], line: Callable[[Event], str] | None) -> None:
    async with open_rabbit(rabbit) as bus, bus.tap(*patterns) as published:
        click.echo(f"listening for {' '.join(patterns)}", err=True)
        async for delivery in published:
            if line is None:
                click.echo(delivery.body)
                continue
            try:
                click.echo(line(decode_event(delivery.body, delivery.routing_key)))
            except BadEvent as exc:
                click.echo(f"{delivery.routing_key}  not an event of the relay: {exc}", err=True)


def _event_line(event: Event) -> str:
    data = dict(event.data)
    shown = {
        "message": lambda: repr(str(data.get("text", ""))[:60]),
        "preview": lambda: repr(str(dict(_object(data.get("part"))).get("text", data.get("reason", "")))[:60]),
        "status": lambda: f"{data.get('previous')} -> {data.get('status')}",
        "turn": lambda: f"{len(list(data.get('message_ids') or []))} messages",  # type: ignore[call-overload]
        "history": lambda: f"{data.get('reason')}: removed {data.get('removed_ids')}",
    }.get(event.event, lambda: "")()
    where = f"{event.session}.{event.position}"
    return f"{event.time[:23]:<23} {where:>8}  {event.routing_key}  {shown}"


def _object(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _broker(settings: Settings) -> RabbitSettings:
    if settings.rabbit is None:
        raise WrongSettings("not set: RELAY_RABBIT__URL (amqp://user:password@host:5672/vhost)")
    return settings.rabbit


@relay.group()
def topology() -> None:
    """What the relay declares on the broker."""


@topology.command("show")
@click.option("--json", "as_json", is_flag=True, help="As RabbitMQ definitions.")
def topology_show(*, as_json: bool) -> None:
    """Print exchange, queues and bindings. Needs no broker.

    \b
    Example:
      relay topology show
    """
    if as_json:
        click.echo(json.dumps(definitions(), indent=2))
        return
    for part in TOPOLOGY:
        match part:
            case Exchange(name, kind):
                click.echo(f"exchange  {name}  ({kind}, durable)")
            case Queue(name, arguments):
                click.echo(f"queue     {name}")
                for key, value in arguments.items():
                    click.echo(f"            {key} = {value}")
            case Binding(exchange, queue, pattern):
                click.echo(f"binding   {exchange} -> {queue}  {pattern}")


@topology.command("apply")
def topology_apply() -> None:
    """Declare it on the broker. Declaring again changes nothing.

    \b
    Example:
      RELAY_RABBIT__URL=amqp://relay:secret@rabbit:5672/%2F relay topology apply
    """
    rabbit = _broker(read_settings())

    async def apply() -> None:
        async with open_rabbit(rabbit):
            click.echo(f"declared on {rabbit.safe_url}")

    _run(apply())


@relay.command("migrate")
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

    click.echo(f"{settings.safe_url} is at version {_run(work())}")


@relay.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON object instead of lines.")
def check(*, as_json: bool) -> None:
    """Try settings and connections, each with what to do about it. Exit code 1 when one fails.

    \b
    Example:
      relay check
    """
    settings = read_settings()
    configure_logs(LogSettings(level="error"))
    results = _run(_check(settings))
    if as_json:
        click.echo(json.dumps({name: {"ok": ok, "said": said} for name, ok, said in results}))
    else:
        for name, ok, said in results:
            click.echo(f"{'ok  ' if ok else 'FAIL'}  {name:<9} {said}")
    sys.exit(0 if all(ok for _, ok, _ in results) else 1)


async def _check(settings: Settings) -> list[tuple[str, bool, str]]:
    async def database() -> str:
        async with open_store(settings.database, SystemClock()) as store:
            await store.check()
        return settings.database.safe_url

    async def broker() -> str:
        rabbit = _broker(settings)
        async with open_rabbit(rabbit) as bus:
            depth = await bus.depth("relay.meter")
        return f"{rabbit.safe_url}, {depth} messages wait for the meter"

    async def coder() -> str:
        if settings.coder is None:
            raise WrongSettings("not set: RELAY_CODER__URL and RELAY_CODER__TOKEN (or RELAY_CODER__TOKEN_FILE)")
        async with open_upstream(settings.coder) as upstream:
            account = await upstream.account()
            chats = await upstream.list_chats(archived=False)
        return f"{settings.coder.url} as {account.username}, {len(chats)} chats"

    results = []
    for name, attempt in (("database", database), ("broker", broker), ("coder", coder)):
        try:
            results.append((name, True, await attempt()))
        except (Unavailable, WrongSettings, Unauthorized, ChatRefused) as exc:
            results.append((name, False, str(exc)))
    return results
