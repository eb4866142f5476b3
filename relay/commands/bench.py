"""`relay bench`: its commands and options. What measures is imported when they are right."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from relay.bench.suite import Plan

F = TypeVar("F", bound=Callable[..., None])

_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


def _output(command: F) -> F:
    """The options `--json` and `--markdown`, which every measurement has."""
    as_json = click.option(
        "--json",
        "json_file",
        type=_FILE,
        is_flag=False,
        flag_value="-",
        help="JSON instead of the table; into FILE, the table as well.",
        metavar="[FILE]",
    )
    markdown = click.option("--markdown", is_flag=True, help="The table in Markdown.")
    return as_json(markdown(command))


def _seconds(default: float, what: str) -> Callable[[F], F]:
    number = click.FloatRange(0.1, 600)
    return click.option("--seconds", default=default, show_default=True, type=number, help=what)


def _chats(default: int) -> Callable[[F], F]:
    return click.option("--chats", default=default, show_default=True, type=click.IntRange(1, 5000), help="How many.")


def _rounds(default: int) -> Callable[[F], F]:
    return click.option("--rounds", default=default, show_default=True, type=click.IntRange(1, 100), help="How many.")


@click.group()
def bench() -> None:
    """Measure this machine: publisher, decoder, the whole path, sockets, failover, latency.

    Needs a broker with the management plugin, and PostgreSQL for failover: those that RELAY_RABBIT__URL and
    RELAY_DATABASE__URL name, or those of scripts/services. Everything happens in a vhost and a database that are made
    for it and removed afterwards. Progress goes to standard error.

    \b
    Examples:
      scripts/services run -- relay bench all --json figures.json
      RELAY_RABBIT__URL=amqp://guest:guest@localhost:5672/%2F relay bench publish
    """


@bench.command()
@_rounds(3)
@_seconds(3.0, "Of each publisher in each round.")
@_output
def publish(*, rounds: int, seconds: float, json_file: Path | None, markdown: bool) -> None:
    """Confirmed publishing: ours, aio-pika, FastStream if it is installed, and a raw socket.

    \b
    Examples:
      scripts/services run -- relay bench publish
      relay bench publish --rounds 9 --seconds 5 --json
    """
    from relay.bench.suite import Plan, PublishOptions  # noqa: PLC0415

    _run(Plan(publish=PublishOptions(rounds=rounds, seconds=seconds)), json_file, markdown=markdown)


@bench.command()
@_seconds(2.0, "CPU time for each kind of frame.")
@_output
def decode(*, seconds: float, json_file: Path | None, markdown: bool) -> None:
    """From a frame to the bytes of its events, beside plain JSON. Needs no server.

    \b
    Example:
      relay bench decode
    """
    from relay.bench.suite import DecodeOptions, Plan  # noqa: PLC0415

    _run(Plan(decode=DecodeOptions(seconds=seconds)), json_file, markdown=markdown)


@bench.command()
@_chats(50)
@_seconds(15.0, "How long, after the warm-up.")
@click.option(
    "--warm-up", default=4.0, show_default=True, type=click.FloatRange(0, 600), help="Seconds that do not count."
)
@click.option("--profile", type=_FILE, metavar="FILE", help="Write where the worker's CPU time went.")
@_output
def relay(
    *, chats: int, seconds: float, warm_up: float, profile: Path | None, json_file: Path | None, markdown: bool
) -> None:
    """The whole path: frames from sockets through one worker into confirmed events.

    \b
    Examples:
      scripts/services run -- relay bench relay
      relay bench relay --chats 200 --seconds 30 --profile profile.txt
    """
    from relay.bench.suite import PathOptions, Plan  # noqa: PLC0415

    options = PathOptions(chats=chats, seconds=seconds, warm_up_seconds=warm_up, profile=profile)
    _run(Plan(relay=options), json_file, markdown=markdown)


@bench.command()
@click.option(
    "--chats",
    multiple=True,
    default=(1000, 5000),
    show_default=True,
    type=click.IntRange(1, 50_000),
    help="How many are followed at once. May be given again.",
)
@_seconds(10.0, "How long the idle worker's CPU time is counted.")
@click.option("--known", type=click.IntRange(1, 1_000_000), help="Instead: so many chats are known,")
@click.option("--live", type=click.IntRange(0, 50_000), help="and so many of them are running.  [default: 500]")
@_output
def sockets(
    *,
    chats: tuple[int, ...],
    seconds: float,
    known: int | None,
    live: int | None,
    json_file: Path | None,
    markdown: bool,
) -> None:
    """Memory and CPU time of chats that are followed while nothing happens; many known chats.

    \b
    Examples:
      scripts/services run -- relay bench sockets
      relay bench sockets --chats 2000 --json
      relay bench sockets --known 50000 --live 500
    """
    from relay.bench.suite import IdleOptions, KnownOptions, Plan  # noqa: PLC0415

    if live is not None and known is None:
        raise click.UsageError(
            "--live says how many of the known chats are running: say with --known how many those are."
        )
    if known is None:
        plan = Plan(sockets=IdleOptions(counts=chats, seconds=seconds))
    else:
        live = min(500, known) if live is None else live
        if live > known:
            raise click.UsageError(f"--live {live} of --known {known}: there are not so many.")
        plan = Plan(known=KnownOptions(known=known, live=live))
    _run(plan, json_file, markdown=markdown)


@bench.command()
@_chats(40)
@_rounds(3)
@_output
def failover(*, chats: int, rounds: int, json_file: Path | None, markdown: bool) -> None:
    """Kill one of two workers: how long until its chats are heard of again. Needs PostgreSQL.

    \b
    Example:
      scripts/services run -- relay bench failover --rounds 5
    """
    from relay.bench.suite import FailoverOptions, Plan  # noqa: PLC0415

    _run(Plan(failover=FailoverOptions(chats=chats, rounds=rounds)), json_file, markdown=markdown)


@bench.command()
@_chats(50)
@_seconds(15.0, "How long at half load.")
@_output
def latency(*, chats: int, seconds: float, json_file: Path | None, markdown: bool) -> None:
    """From a frame to its event at a consumer, at half of what the same run could take.

    \b
    Example:
      scripts/services run -- relay bench latency
    """
    from relay.bench.suite import LatencyOptions, Plan  # noqa: PLC0415

    options = LatencyOptions(chats=chats, seconds=seconds, full_seconds=max(1.0, seconds / 2))
    _run(Plan(latency=options), json_file, markdown=markdown)


@bench.command("all")
@click.option("--short", is_flag=True, help="Within three minutes, too short for figures to quote.")
@_output
def all_of_them(*, short: bool, json_file: Path | None, markdown: bool) -> None:
    """All of it, one after the other; about fifteen minutes.

    \b
    Examples:
      scripts/services run -- relay bench all --json figures.json --markdown > figures.md
      scripts/services run -- relay bench all --short
    """
    from relay.bench.suite import EVERYTHING, SHORT  # noqa: PLC0415

    _run(SHORT if short else EVERYTHING, json_file, markdown=markdown)


def _run(plan: "Plan", json_file: Path | None, *, markdown: bool) -> None:
    """Measure and print. A table that was not asked for in Markdown is for a terminal."""
    import os  # noqa: PLC0415

    from relay.adapters.logs import LogSettings, configure_logs  # noqa: PLC0415
    from relay.bench.report import as_markdown, as_text  # noqa: PLC0415
    from relay.bench.suite import measure  # noqa: PLC0415

    configure_logs(LogSettings(level="error"))
    if json_file is not None and str(json_file) != "-":
        _try_to_write(json_file)
    report = asyncio.run(measure(plan, os.environ, lambda text: click.echo(text, err=True)))
    if json_file is not None:
        with click.open_file(str(json_file), "w") as file:
            file.write(report.to_json())
        if str(json_file) == "-":
            return
    click.echo((as_markdown if markdown else as_text)(report.results, report.machine))


def _try_to_write(file: Path) -> None:
    """Better now than after a quarter of an hour."""
    try:
        file.touch()
    except OSError as exc:
        raise click.BadParameter(f"{file} cannot be written: {exc.strerror}", param_hint="--json") from exc
