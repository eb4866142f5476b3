"""`relay bench` as a person meets it: words and exit codes, and figures that a program can read."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import RELAY, said_here

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
NOWHERE = "amqp://user:hunter2-secret@127.0.0.1:1/"


async def bench(*arguments: str, **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        str(RELAY), "bench", *arguments, env={**PLAIN, **environment}, stdout=PIPE, stderr=PIPE
    )
    output, errors = await process.communicate()
    assert b"Traceback" not in errors, errors.decode()
    assert "hunter2" not in output.decode() + errors.decode()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


@pytest.mark.parametrize("name", ["publish", "relay", "sockets", "failover", "latency", "all"])
def test_without_a_broker_it_says_how_to_get_one(name: str) -> None:
    code, output, errors = said_here("bench", name, *(["--short"] if name == "all" else []))
    assert (code, output) == (2, "")
    assert "scripts/services run -- relay bench" in errors
    assert "RELAY_RABBIT__URL" in errors


async def test_a_broker_without_its_management_is_told() -> None:
    code, _, errors = await bench(
        "publish", RELAY_RABBIT__URL=NOWHERE, RELAY_TEST_RABBIT_MANAGEMENT_URL="http://127.0.0.1:1"
    )
    assert code == 2
    assert "management API" in errors
    assert "http://127.0.0.1:1 did not do as asked (ConnectError)" in errors


def test_failover_without_postgresql_is_told() -> None:
    there = {"RELAY_RABBIT__URL": NOWHERE, "RELAY_TEST_RABBIT_MANAGEMENT_URL": "http://127.0.0.1:1"}
    code, _, errors = said_here("bench", "failover", settings=there)
    assert code == 2
    assert "two workers need PostgreSQL" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("relay", "--chats", "0"), "--chats"),
        (("publish", "--rounds", "none"), "--rounds"),
        (("sockets", "--live", "3"), "--known"),
        (("sockets", "--known", "3", "--live", "4"), "there are not so many"),
        (("nothing",), "nothing"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_told(arguments: tuple[str, ...], said: str) -> None:
    code, _, errors = said_here("bench", *arguments)
    assert code == 2
    assert said in errors


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What one run of `decode` came to: its figures as JSON and, of the same run, in Markdown."""
    file = tmp_path_factory.mktemp("bench") / "figures.json"
    code, output, errors = asyncio.run(bench("decode", "--seconds", "0.1", "--json", str(file), "--markdown"))
    assert code == 0, errors
    assert "decode: messages" in errors
    return json.loads(file.read_text()), output


def test_figures_tell_machine_and_versions(decoded: tuple[dict[str, Any], str]) -> None:
    machine = decoded[0]["machine"]
    assert machine["python"] == f"CPython {'.'.join(str(part) for part in sys.version_info[:3])}"
    assert machine["cores"] >= 1
    assert {"cpu", "memory_mib", "system", "aio-pika", "coder-chat-relay"} <= set(machine)


def test_every_kind_of_frame_is_measured(decoded: tuple[dict[str, Any], str]) -> None:
    rows = decoded[0]["results"]["decode"]
    assert [row["kind"] for row in rows] == ["messages", "previews", "snapshots"]
    for row in rows:
        assert row["frames_per_cpu_second"] > 0
        assert row["times_json"] > 0
    snapshots = rows[2]
    assert snapshots["events_per_cpu_second"] > 100 * snapshots["frames_per_cpu_second"]


def test_the_same_figures_stand_in_the_table(decoded: tuple[dict[str, Any], str]) -> None:
    figures, table = decoded
    row = figures["results"]["decode"][0]
    assert f"| messages | {row['bytes_per_frame']:,} | {row['frames_per_cpu_second']:,} |" in table


async def test_json_goes_to_standard_output_alone() -> None:
    code, output, _ = await bench("decode", "--seconds", "0.1", "--json")
    assert code == 0
    assert set(json.loads(output)) == {"machine", "results"}


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    code, _, errors = said_here("bench", "decode", "--seconds", "0.1", "--json", str(tmp_path / "no" / "figures.json"))
    assert code == 2
    assert "figures.json" in errors
    assert "decode: messages" not in errors
