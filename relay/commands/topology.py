"""`relay topology`: what the relay declares on the broker."""

import json

import click

from relay.adapters.topology import TOPOLOGY, Binding, Exchange, Queue, definitions


@click.group()
def topology() -> None:
    """What the relay declares on the broker.

    \b
    Example:
      relay topology show
    """


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
    # Here, because `show` is for scripts and needs none of this.
    import asyncio  # noqa: PLC0415

    from relay.adapters.rabbit import open_rabbit  # noqa: PLC0415
    from relay.settings import read_settings  # noqa: PLC0415

    rabbit = read_settings().broker

    async def apply() -> None:
        async with open_rabbit(rabbit):
            click.echo(f"declared on {rabbit.safe_url}")

    asyncio.run(apply())
