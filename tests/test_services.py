"""The servers that the tests get, and the script that starts them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

ROOT = Path(__file__).parent.parent
SERVICES = ROOT / "scripts" / "services"


def services(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SERVICES, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_shows_examples() -> None:
    shown = services("--help")
    assert shown.returncode == 0
    assert 'eval "$(scripts/services start)"' in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param([], "required: run|start|stop", id="no action"),
        pytest.param(["run"], "which command?", id="nothing to run"),
        pytest.param(["run", "--", "no-such-program"], "no such command: no-such-program", id="unknown program"),
    ],
)
def test_a_users_mistake_gets_one_clear_line(arguments: list[str], said: str) -> None:
    answered = services(
        *arguments, RELAY_TEST_RABBIT_URL="amqp://offered", RELAY_TEST_DATABASE_URL="postgresql://offered"
    )
    assert answered.returncode == 2
    assert said in answered.stderr
    assert "Traceback" not in answered.stderr


def test_offered_servers_are_used_and_the_commands_exit_code_is_kept() -> None:
    program = "import os, sys; print(os.environ['RELAY_TEST_RABBIT_URL']); sys.exit(7)"
    ran = services(
        "run",
        "--",
        sys.executable,
        "-c",
        program,
        RELAY_TEST_RABBIT_URL="amqp://mine",
        RELAY_TEST_DATABASE_URL="postgresql://mine",
    )
    assert (ran.returncode, ran.stdout) == (7, "amqp://mine\n")


def test_without_servers_the_tests_say_how_to_get_them() -> None:
    nothing_offered = {name: "" for name in os.environ if name.startswith("RELAY_TEST_")}
    one_test = f"{__file__}::test_a_database_is_new_and_speaks_utf8"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", one_test],
        cwd=ROOT,
        env=os.environ | nothing_offered,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert 'RELAY_TEST_DATABASE_URL is not set: run "make test"' in ran.stdout


@pytest.mark.skipif(
    not (shutil.which("initdb") or list(Path("/usr/lib/postgresql").glob("*/bin/initdb"))),
    reason="PostgreSQL's programs are not installed here: the tests use a server from elsewhere",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_server_runs_beside_the_first_and_ends_with_its_script(number: signal.Signals) -> None:
    tell_and_wait = "import os, time; print(os.environ['RELAY_TEST_DATABASE_URL'], flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, SERVICES, "run", "--", sys.executable, "-c", tell_and_wait],
        env=os.environ | {"RELAY_TEST_RABBIT_URL": "amqp://offered", "RELAY_TEST_DATABASE_URL": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as script:
        assert script.stdout is not None
        url = urlsplit(script.stdout.readline())
        socket.create_connection((url.hostname, url.port)).close()
        os.killpg(script.pid, number)  # like Ctrl-C, which reaches the script and its command
        assert script.wait(timeout=30) == 128 + number
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((url.hostname, url.port))


@pytest.mark.parametrize("kind", ["quorum", "stream"])
async def test_the_broker_has_the_kinds_of_queue_that_the_relay_declares(rabbit_vhost: str, kind: str) -> None:
    async with await aio_pika.connect(rabbit_vhost) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await channel.set_qos(prefetch_count=1)
        queue = await channel.declare_queue(kind, durable=True, arguments={"x-queue-type": kind})
        await channel.default_exchange.publish(aio_pika.Message(b"kept", delivery_mode=2), routing_key=queue.name)

        async def first() -> AbstractIncomingMessage:
            from_the_start = {"x-stream-offset": "first"} if kind == "stream" else None
            async with queue.iterator(arguments=from_the_start, timeout=30) as messages:
                return await anext(messages)

        assert (await first()).body == b"kept"


async def test_a_database_is_new_and_speaks_utf8(postgres_database: str) -> None:
    engine = create_async_engine(postgres_database)
    async with engine.connect() as connection:
        tables = await connection.scalar(text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"))
        assert (tables, await connection.scalar(text("SELECT '👩‍👧'::text"))) == (0, "👩‍👧")
    await engine.dispose()
