"""`relay tail`: events as they are published."""

import asyncio
from collections.abc import Callable
from uuid import UUID

import click

from relay.adapters.logs import configure_logs
from relay.adapters.rabbit import RabbitSettings, open_rabbit
from relay.core.errors import BadEvent
from relay.core.events import Event, JsonObject, decode_event
from relay.settings import read_settings


@click.command()
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
    asyncio.run(_tail(settings.broker, wanted, _event_line if not as_json else None))


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
