"""`relay simulator`: the server as a command."""

import asyncio
import contextlib
import errno
import json
import math
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click

from relay.simulator.dialect import DIALECTS
from relay.simulator.faults import BadFault
from relay.simulator.gate import CHATS
from relay.simulator.model import DIRECTIVES
from relay.simulator.owner import OwnerRefused
from relay.simulator.replay import NotARecording, Recording, Replay
from relay.simulator.scenarios import SCENARIOS, DrivenChat, Progress, run_scenarios
from relay.simulator.server import Simulator, SimulatorConfig
from relay.simulator.state import User
from relay.simulator.timed import TimedFault, strike_in_time

EXAMPLES = """
\b
Examples:
  relay simulator                                    a quiet server on port 3000
  relay simulator --scenarios --speed 5              chats that show what chats do, five times as fast
  relay simulator --chats 50 --seed 7                fifty chats made up from a seed
  relay simulator --idle-chats 50000                 many chats where nothing goes on
  relay simulator --dialect d3 --scenarios           the same chats on a newer server
  relay simulator --scenarios --cut-every 40 --lose-parts 0.05
  relay simulator --scenarios --zombie-every 20 --silence-every 15 --silence-for 5
  relay simulator --scenarios --close-after 10 --close-code 1012 --restart-after 15 --down 3
  relay simulator --chats 9 --restart-every 60 --lose-data
  relay simulator --chats 9 --restart-after 20 --upgrade-to d3
  relay simulator --fault '{"kind": "answer", "status": 503, "path": "*/messages", "times": 10}'
  relay simulator --replay d0/text_turn.jsonl        serve one recording
"""


class _Number(click.FloatRange):
    """A range that has neither `nan` nor `inf` in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number that can be used.", param, ctx)
        return number


_SECONDS = _Number(0, min_open=True)


def _timed(name: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options `--NAME-after` and `--NAME-every`."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        once = f"Fault: after so long {what}. May be given again."
        again = f"Fault: every so often {what}."
        for when, multiple, text in (("every", False, again), ("after", True, once)):
            option = click.option(f"--{name}-{when}", type=_SECONDS, metavar="SECONDS", multiple=multiple, help=text)
            command = option(command)
        return command

    return add


@click.command(epilog=EXAMPLES)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=3000, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--seed", default=0, show_default=True, help="Decides ids, tokens, generated chats and chance.")
@click.option("--speed", default=1.0, show_default=True, type=_Number(0.01, 1000), help="Faster than life.")
@click.option(
    "--dialect", default="d0", show_default=True, type=click.Choice(list(DIALECTS)), help="The API of which Coder."
)
@click.option("--scenarios", is_flag=True, help=f"Drive the named scenarios: {', '.join(SCENARIOS)}.")
@click.option("--chats", default=0, type=click.IntRange(0), help="Drive so many chats made up from the seed.")
@click.option("--idle-chats", default=0, type=click.IntRange(0), help="Chats of ann that have had their answer.")
@click.option("--replay", "recording", type=click.Path(path_type=Path), help="Serve a recording (.jsonl) instead.")
@click.option("--cut-every", type=click.IntRange(1), metavar="N", help="Fault: cut each stream after every N frames.")
@click.option("--lose-parts", type=_Number(0, 1), metavar="RATE", help="Fault: lose live parts.")
@click.option("--slow", type=_Number(0), metavar="SECONDS", help="Fault: hold every answer so long.")
@_timed("zombie", "open streams say `dropped messages`, then nothing for ever")
@_timed("silence", "open sockets say nothing more")
@click.option(
    "--silence-for", type=_SECONDS, metavar="SECONDS", show_default="for ever", help="How long they are silent."
)
@_timed("close", "open sockets are closed with a code")
@click.option("--close-code", type=click.IntRange(1000, 4999), metavar="CODE", show_default="1001", help="Which one.")
@_timed("restart", "the server is killed and starts again")
@click.option("--down", type=_Number(0), metavar="SECONDS", show_default="0", help="How long a restart takes.")
@click.option("--lose-data", is_flag=True, help="After a restart there are no chats; users stay.")
@click.option("--upgrade-to", type=click.Choice(list(DIALECTS)), help="After a restart the server speaks this dialect.")
@click.option("--polite", is_flag=True, help="Before a restart sockets are closed and running chats put back.")
@click.option(
    "--recovery",
    type=_Number(0),
    metavar="SECONDS",
    show_default="303",
    help="How long chats of a killed server say `running` before they run again; divided by the speed.",
)
@click.option("--turned-rows", is_flag=True, help="Snapshots bring a `tool` message before its `assistant`.")
@click.option("--fault", "faults", multiple=True, metavar="JSON", help="Any fault, as the control endpoint takes it.")
@click.option("--json", "as_json", is_flag=True, help="Print the start and what is driven as JSON lines.")
@click.option("--exit-when-done", is_flag=True, help="End when the driven chats are idle instead of at Ctrl-C.")
def simulator(
    *,
    host: str,
    port: int,
    seed: int,
    speed: float,
    dialect: str,
    scenarios: bool,
    chats: int,
    idle_chats: int,
    recording: Path | None,
    cut_every: int | None,
    lose_parts: float | None,
    slow: float | None,
    turned_rows: bool,
    faults: tuple[str, ...],
    as_json: bool,
    exit_when_done: bool,
    **times: Any,
) -> None:
    """Run a Coder chats server with a scripted model.

    What its model does stands in the prompts: `[tools2 n=15 ms=15] hello`. Faults can be asked for at any time over
    HTTP under /_simulator. Their times are real seconds, whatever the speed.
    """
    config = SimulatorConfig(
        host=host,
        port=port,
        seed=seed,
        speed=speed,
        dialect=dialect,
        tied_rows="turned" if turned_rows else "by_id",
    )
    say = _say_json if as_json else _say_plainly
    flags = [("cut_every", "frames", cut_every), ("lose_parts", "rate", lose_parts), ("slow", "delay", slow)]
    try:
        wanted = [_fault(text) for text in faults]
        wanted += [{"kind": kind, name: value} for kind, name, value in flags if value is not None]
        timed = _timed_faults(**times)
        if recording is not None:
            if scenarios or chats or idle_chats or wanted or timed:
                raise click.UsageError("--replay serves a recording as it is: no --scenarios, --chats or faults.")
            work = _replay(Recording(recording), config, say)
        else:
            number = (len(SCENARIOS) if scenarios else 0, chats, idle_chats)
            work = _simulate(config, say, faults=wanted, timed=timed, number=number, exit_when_done=exit_when_done)
        asyncio.run(work)
    except BadFault as exc:
        raise click.UsageError(f"--fault: {exc}") from exc
    except NotARecording as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise click.ClickException(f"port {port} is in use; choose another one with --port, or --port 0") from exc
        raise click.ClickException(f"{exc.strerror or exc}: {exc.filename or host}") from exc


async def _simulate(
    config: SimulatorConfig,
    say: Any,
    *,
    faults: list[dict[str, Any]],
    timed: Sequence[TimedFault],
    number: tuple[int, int, int],
    exit_when_done: bool,
) -> None:
    named, generated, idle = number
    interrupted = _on_interrupt()
    async with Simulator(config) as server:
        for fault in faults:
            server.faults.add(**fault)
        server.database.create_idle_chats(idle, server.users["ann"].id)
        model_id = str(server.model_configs[0].id)
        say(
            "started",
            url=server.url,
            chats_path=DIALECTS[config.dialect].features.prefixes[0],
            dialect=config.dialect,
            organization_id=str(server.organization_id),
            model_config_id=model_id,
            users=_users(server.users),
        )
        striking = strike_in_time(server, timed, lambda fault, struck: say("fault", fault=fault.name, struck=struck))
        async with _meanwhile(striking, interrupted):
            if named or generated:
                await _first_of(asyncio.create_task(_drive(server, named, generated, say)), interrupted)
            if not exit_when_done:
                await interrupted.wait()
    say("stopped")


async def _drive(server: Simulator, named: int, generated: int, say: Any) -> None:
    def tell(progress: Progress) -> None:
        say("progress", chat=progress.name, owner=progress.owner, id=str(progress.chat_id), step=progress.step)

    try:
        driven: list[DrivenChat] = await run_scenarios(
            server,
            named=list(SCENARIOS)[:named],
            generated=generated,
            seed=server.config.seed,
            speed=server.config.speed,
            on_progress=tell,
        )
    except ExceptionGroup as group:
        refused, others = group.split(OwnerRefused)
        if refused is None or others is not None:
            raise
        first = refused.exceptions[0]
        raise click.ClickException(f"the owners of the driven chats cannot go on: {first}") from first
    say("driven", chats=len(driven), fired=server.counters())


async def _replay(recording: Recording, config: SimulatorConfig, say: Any) -> None:
    interrupted = _on_interrupt()
    async with Replay(recording, config) as server:
        chats = list(recording.created_at)
        say("started", url=server.url, replay=True, chats=chats, users=_users(server.users))
        await interrupted.wait()
    say("stopped")


def _timed_faults(
    *,
    silence_for: float | None,
    close_code: int | None,
    down: float | None,
    lose_data: bool,
    upgrade_to: str | None,
    polite: bool,
    recovery: float | None,
    **times: Any,
) -> list[TimedFault]:
    """What the options of time ask for: `zombie_after`, `zombie_every` and so on, and those that say how."""
    hows: dict[str, dict[str, object]] = {
        "silence": {"--silence-for": silence_for},
        "close": {"--close-code": close_code},
        "restart": {
            "--down": down,
            "--lose-data": lose_data,
            "--upgrade-to": upgrade_to,
            "--polite": polite,
            "--recovery": recovery,
        },
    }
    for name, options in hows.items():
        given = [option for option, value in options.items() if value is not None and value is not False]
        if given and not times[f"{name}_after"] and times[f"{name}_every"] is None:
            raise click.UsageError(f"{given[0]} says how: say when with --{name}-after or --{name}-every SECONDS.")

    async def zombie(server: Simulator) -> int:
        return server.zombie()

    async def silence(server: Simulator) -> int:
        return server.silence(seconds=silence_for, watches=True)

    async def close(server: Simulator) -> int:
        return await server.close(close_code or 1001, "asked for on the command line")

    async def restart(server: Simulator) -> int:
        struck = len(server.streams()) + len(server.watches())
        await server.restart(
            keep_data=not lose_data,
            dialect=upgrade_to,
            polite=polite,
            down_seconds=down or 0.0,
            recovery_ms=None if recovery is None else recovery * 1000,
        )
        return struck

    timed = []
    for strike in (zombie, silence, close, restart):
        name = strike.__name__
        timed += [TimedFault(name, seconds, again=False, strike=strike) for seconds in times[f"{name}_after"]]
        if times[f"{name}_every"] is not None:
            timed.append(TimedFault(name, times[f"{name}_every"], again=True, strike=strike))
    return timed


@asynccontextmanager
async def _meanwhile(work: Coroutine[None, None, None], interrupted: asyncio.Event) -> AsyncIterator[None]:
    """Do some work until the block ends. If it fails, the block is told to end, and the failure is heard."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: interrupted.set() if not done.cancelled() and done.exception() else None)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _on_interrupt() -> asyncio.Event:
    """An event that Ctrl-C or SIGTERM sets from now on."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    return interrupted


async def _first_of(task: asyncio.Task[None], interrupted: asyncio.Event) -> None:
    """Wait for either; a task that lost is cancelled, one that failed is heard."""
    waiting = asyncio.create_task(interrupted.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    else:
        task.result()


def _fault(text: str) -> dict[str, Any]:
    try:
        fault = json.loads(text)
    except ValueError as exc:
        raise BadFault(f"{text!r} is not JSON ({exc})") from exc
    if not isinstance(fault, dict) or not isinstance(fault.get("kind"), str):
        raise BadFault(f"{text!r} must be an object with a 'kind'")
    return fault


def _users(users: dict[str, User]) -> dict[str, dict[str, str]]:
    return {name: {"id": str(user.id), "token": user.token} for name, user in users.items()}


def _say_json(event: str, **values: Any) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


def _say_plainly(event: str, **values: Any) -> None:
    match event:
        case "started":
            _print_start(**values)
        case "progress":
            print(f"{values['chat']:>14}  {values['owner']:<5}  {values['step']}", flush=True)
        case "fault":
            print(f"{'fault':>14}  {values['fault']}, {values['struck']} sockets struck", flush=True)
        case "driven":
            fired = ", ".join(f"{name} {count}" for name, count in values["fired"].items() if count) or "none"
            print(f"{values['chats']} chats driven and idle. Faults that fired: {fired}. Ctrl-C ends.", flush=True)
        case "stopped":
            print("Stopped.", file=sys.stderr)


def _print_start(*, url: str, users: dict[str, dict[str, str]], **values: Any) -> None:
    ann = users["ann"]["token"]
    print(f"Coder chats simulator on {url}\n")
    for name, user in users.items():
        role = "owner role" if name == "admin" else "member"
        print(f"  {name:<6} {role:<11} id {user['id']}  token {user['token']}")
    chats = url + values.get("chats_path", CHATS)
    print("\nTry:")
    print(f"  curl -H 'Coder-Session-Token: {ann}' {chats}")
    if "model_config_id" in values:
        body = {
            "content": [{"type": "text", "text": "[tools2 n=15 ms=15] hello"}],
            "organization_id": values["organization_id"],
            "model_config_id": values["model_config_id"],
        }
        print(f"  curl -H 'Coder-Session-Token: {ann}' {chats} -d '{json.dumps(body)}'")
        print(f"  curl {url}/_simulator/faults")
        print(f"  RELAY_CODER__URL={url} RELAY_CODER__TOKEN={ann} relay worker")
        print(f"\nDirectives for prompts: {', '.join(DIRECTIVES)}")
    print("\nCtrl-C ends.\n", flush=True)
