"""The command line as a person at a terminal meets it: clear words, exit codes 0, 1 and 2, never a traceback."""

import asyncio
import json
import socket
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import aiohttp
import click
import pytest

from relay.cli import COMMANDS, relay
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.owner import Owner
from tests.e2e.processes import ROOT, START_SECONDS, Relay, finished, running, said_here

SECRET = "hunter2-do-not-show"


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(relay))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    command = ALL[path]
    context = click.Context(command, info_name=" ".join(("relay", *path)))
    text = command.get_help(context)
    assert command.help
    if not isinstance(command, click.Group):
        assert "Example" in text
        assert f"relay {' '.join(path)}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(name: str) -> None:
    command = ALL[(name,)]
    assert command.name == name
    assert (command.help or "").startswith(COMMANDS[name].does.removesuffix("."))


@pytest.mark.parametrize("arguments", [("--help",), ("topology", "show"), ("wroker",)], ids=" ".join)
async def test_what_needs_no_server_loads_no_library_for_one(arguments: tuple[str, ...]) -> None:
    program = (
        "import atexit, sys; from relay.cli import main;"
        "atexit.register(lambda: print('\\nloaded:', *sorted(sys.modules))); main()"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=DEVNULL
    )
    output, _ = await process.communicate()
    loaded = set(output.decode().rpartition("loaded: ")[2].split())
    assert {"click", "relay.cli"} <= loaded
    assert {"asyncio", "pydantic", "sqlalchemy", "aio_pika", "aiohttp", "httpx", "rich", "structlog"} & loaded == set()


async def test_help_of_the_installed_command() -> None:
    code, output, errors = await finished("--help")
    assert (code, errors) == (0, "")
    assert all(path[0] in output for path in ALL)


def in_words(errors: str) -> str:
    assert "Traceback" not in errors, errors
    assert SECRET not in errors
    return errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(("wroker",), "wroker", id="no such command"),
        pytest.param(("demo", "--chats", "0"), "--chats", id="no chats"),
        pytest.param(("demo", "--speed", "fast"), "--speed", id="speed a word"),
        pytest.param(("demo", "--dialect", "d9"), "--dialect", id="dialect nobody speaks"),
        pytest.param(("demo", "--rabbit", f"http://u:{SECRET}@x"), "--rabbit", id="broker by HTTP"),
        pytest.param(("demo", "--rabbit", SECRET), "--rabbit", id="broker a word"),
        pytest.param(("demo", "--directory", "/proc/relay"), "/proc/relay", id="directory that cannot be made"),
        pytest.param(("worker",), "RELAY_RABBIT__URL", id="worker without settings"),
        pytest.param(("meter",), "RELAY_RABBIT__URL", id="meter without settings"),
        pytest.param(("archivist",), "RELAY_ARCHIVE__URL", id="archivist without settings"),
        pytest.param(("run",), "RELAY_CODER__URL", id="run without settings"),
        pytest.param(("tail",), "RELAY_RABBIT__URL", id="tail without settings"),
        pytest.param(("tail", "not-a-chat"), "not-a-chat", id="tail of no chat"),
        pytest.param(("topology", "apply"), "RELAY_RABBIT__URL", id="apply without settings"),
        pytest.param(("simulator", "--fault", "{"), "--fault", id="fault that is no JSON"),
    ],
)
def test_a_mistake_of_the_user_is_told_in_words(arguments: tuple[str, ...], told: str) -> None:
    code, output, errors = said_here(*arguments)
    assert told in in_words(errors)
    assert (code, output) == (2, "")


def test_a_wrong_setting_is_told_in_words() -> None:
    code, _, errors = said_here("meter", settings={"RELAY_RABBIT_URL": f"amqp://u:{SECRET}@x"})
    assert in_words(errors) == "relay: unknown setting RELAY_RABBIT_URL: did you mean RELAY_RABBIT__URL?\n"
    assert code == 2


async def test_topology_show_needs_nothing() -> None:
    code, output, errors = await finished("topology", "show")
    assert (code, errors) == (0, "")
    for name in ("coder.chats", "relay.meter", "relay.archivist", "relay.log", "relay.frames.dead", "relay.meter.dead"):
        assert name in output
    code, output, _ = await finished("topology", "show", "--json")
    assert {queue["name"] for queue in json.loads(output)["queues"]} >= {"relay.meter", "relay.log"}
    assert code == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def test_a_port_that_is_taken_is_told_in_words() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        settings = {"RELAY_RABBIT__URL": "amqp://guest:guest@127.0.0.1/", "RELAY_OPS__PORT": port}
        code, _, errors = await finished("meter", settings=settings)
    assert "RELAY_OPS__PORT" in in_words(errors)
    assert port in errors
    assert code == 2


# --- with a real broker and a real database ---------------------------------------------------------------------------


def with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{password}@{parts.hostname}:{parts.port}"))


@pytest.mark.parametrize("arguments", [("meter",), ("topology", "apply")], ids=" ".join)
async def test_a_broker_that_refuses_the_password(rabbit_url: str, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    settings = {
        "RELAY_RABBIT__URL": with_password(rabbit_url, SECRET),
        "RELAY_DATABASE__URL": f"sqlite:///{tmp_path}/relay.db",
        "RELAY_OPS__PORT": "0",
    }
    code, _, errors = await finished(*arguments, settings=settings)
    said = [line for line in in_words(errors).splitlines() if line.startswith("relay: ")]
    assert len(said) == 1
    assert "password" in said[0]
    assert code == 2


async def test_a_database_that_refuses_the_password(rabbit_vhost: str, database_url: str) -> None:
    settings = {
        "RELAY_RABBIT__URL": rabbit_vhost,
        "RELAY_DATABASE__URL": with_password(database_url, SECRET),
        "RELAY_OPS__PORT": "0",
    }
    code, _, errors = await finished("meter", settings=settings)
    assert "password" in next(line for line in in_words(errors).splitlines() if line.startswith("relay: "))
    assert code == 2


async def test_a_database_that_is_down_at_the_start_is_waited_for(rabbit_vhost: str, database_url: str) -> None:
    port = free_port()
    here = urlsplit(database_url)
    down = urlunsplit(here._replace(netloc=f"{here.username}:{here.password}@127.0.0.1:{port}"))
    settings = {"RELAY_RABBIT__URL": rabbit_vhost, "RELAY_DATABASE__URL": down, "RELAY_OPS__PORT": "0"}
    async with running("meter", settings=settings) as meter:
        assert (await meter.logged("dependency_down"))["dependency"] == "database"
        ready = await meter.ask("/readyz")
        assert ready.status_code == 503
        database = ready.json()["dependencies"]["database"]
        assert database["ok"] is False
        assert database["reason"]
        assert str(here.password) not in ready.text
        assert (await meter.ask("/livez")).status_code == 200

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(here.hostname, here.port)
            await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))

        async with await asyncio.start_server(connect, "127.0.0.1", port):  # it comes up
            async with asyncio.timeout(START_SECONDS):
                while (await meter.ask("/readyz")).status_code != 200:
                    await asyncio.sleep(0.1)
            assert await meter.terminate() == 0
    in_words("\n".join(meter.errors))


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def test_sigterm_ends_a_process_that_still_waits_for_its_database(rabbit_url: str) -> None:
    down = f"postgresql://relay:{SECRET}@127.0.0.1:{free_port()}/relay"
    settings = {"RELAY_RABBIT__URL": rabbit_url, "RELAY_DATABASE__URL": down, "RELAY_OPS__PORT": "0"}
    async with running("meter", settings=settings) as meter:
        while (await meter.ask("/readyz")).json()["dependencies"]["database"]["reason"] == "not connected yet":
            await asyncio.sleep(0.05)
        assert await meter.terminate() == 0
    in_words("\n".join(meter.errors))


async def test_tail_shows_live_what_matches(rabbit_vhost: str, tmp_path: Path) -> None:
    async with Simulator(SimulatorConfig(speed=5)) as simulator:
        user = simulator.users["ann"]
        settings = {
            "RELAY_RABBIT__URL": rabbit_vhost,
            "RELAY_CODER__URL": simulator.url,
            "RELAY_CODER__TOKEN": user.token,
            "RELAY_DATABASE__URL": f"sqlite:///{tmp_path}/relay.db",
            "RELAY_OPS__PORT": "0",
        }
        async with (
            running("tail", "--match", "chat.message.#", settings=settings) as tail,
            running("tail", "--json", "--match", "chat.turn.#", settings=settings) as turns,
            running("worker", settings=settings) as worker,
        ):
            for each in (tail, turns):
                await until_said(each.errors, "listening")
            await until_ready(worker)
            connection = await aio_pika.connect(rabbit_vhost)
            async with connection:  # somebody else's message on our exchange ends nothing
                exchange = await (await connection.channel()).get_exchange("coder.chats")
                await exchange.publish(aio_pika.Message(b"not ours"), "chat.message.user.not.ours")
            await talk(simulator)
            lines = [await tail.output_line() for _ in range(2)]
            while not lines[-1].count("chat.message.assistant."):
                lines.append(await tail.output_line())
            assert any("chat.message.user." in line for line in lines)
            turn = json.loads(await turns.output_line())
            assert turn["type"] == "io.chatrelay.chat.turn.completed.v1"
            assert await worker.terminate() == 0


async def until_said(errors: list[str], word: str) -> None:
    async with asyncio.timeout(START_SECONDS):
        while not any(word in line for line in errors):
            await asyncio.sleep(0.02)


async def until_ready(process: Relay) -> None:
    async with asyncio.timeout(START_SECONDS):
        while (await process.ask("/readyz")).status_code != 200:
            await asyncio.sleep(0.1)


async def talk(simulator: Simulator) -> None:
    async with aiohttp.ClientSession() as session:
        owner = Owner(session, simulator.url, simulator.users["ann"], simulator.model_configs[0].id, 5)
        chat = await owner.create("[text n=20 ms=30] hello")
        await owner.wait_idle(chat)


async def test_check_says_what_works_and_what_does_not(rabbit_vhost: str, tmp_path: Path) -> None:
    async with Simulator() as simulator:
        settings = {
            "RELAY_RABBIT__URL": rabbit_vhost,
            "RELAY_CODER__URL": simulator.url,
            "RELAY_CODER__TOKEN": simulator.users["ann"].token,
            "RELAY_DATABASE__URL": f"sqlite:///{tmp_path}/relay.db",
        }
        code, output, errors = await finished("check", settings=settings)
        assert (code, output.count("ok  "), in_words(errors)) == (0, 3, "")
        wrong = {**settings, "RELAY_CODER__TOKEN": SECRET, "RELAY_RABBIT__URL": with_password(rabbit_vhost, SECRET)}
        code, output, errors = await finished("check", "--json", settings=wrong)
        in_words(output + errors)
        assert code == 1
        assert {name: result["ok"] for name, result in json.loads(output).items()} == {
            "database": True,
            "broker": False,
            "coder": False,
        }
