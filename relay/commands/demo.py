"""`relay demo`: its options. What it needs beyond them is imported when they are right."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click

from relay.simulator.dialect import DIALECTS


def _broker_url(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    from pydantic import ValidationError  # noqa: PLC0415

    from relay.adapters.rabbit import RabbitSettings  # noqa: PLC0415

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


@click.command()
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
    "--dialect",
    default="d0",
    show_default=True,
    type=click.Choice(list(DIALECTS)),
    help="The API that the simulated server speaks.",
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
      relay demo --dialect d3
      relay demo --rabbit amqp://guest:guest@localhost:5672/%2F --json
    """
    from relay.adapters.logs import LogSettings, configure_logs  # noqa: PLC0415
    from relay.commands.demo_screen import show_demo, summary_text  # noqa: PLC0415
    from relay.demo import DemoOptions  # noqa: PLC0415

    as_json = options.pop("as_json")
    configure_logs(LogSettings(level="error"))
    summary = asyncio.run(show_demo(DemoOptions(**options), as_json=as_json))
    click.echo(json.dumps(summary.to_json()) if as_json else summary_text(summary))
    sys.exit(0 if summary.good else 1)
