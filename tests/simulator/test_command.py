"""The command, as a user runs it."""

import asyncio
import json
import signal
import socket
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from relay.simulator.command import simulator
from relay.simulator.scenarios import SCENARIOS
from tests.simulator.recording import D0

RUN = [sys.executable, "-c", "from relay.simulator.command import simulator; simulator()"]


async def output(*arguments: str, stop_at: str = "") -> tuple[int, list[str], str]:
    """Run the command; send SIGINT at the first line that holds `stop_at`."""
    process = await asyncio.create_subprocess_exec(
        *RUN, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    async with asyncio.timeout(60):
        async for line in process.stdout:
            lines.append(line.decode())
            if stop_at and stop_at in lines[-1]:
                process.send_signal(signal.SIGINT)
        errors = (await process.stderr.read()).decode()
        return await process.wait(), lines, errors


async def test_it_prints_url_users_and_examples_and_ends_at_ctrl_c() -> None:
    code, lines, errors = await output("--port", "0", "--seed", "3", stop_at="Ctrl-C ends.")
    text = "".join(lines)
    assert (code, errors) == (0, "Stopped.\n")
    assert "Coder chats simulator on http://127.0.0.1:" in text
    assert all(name in text for name in ("admin", "ann", "bob"))
    assert "curl -H 'Coder-Session-Token: " in text
    assert "relay worker" in text


async def test_scenarios_and_generated_chats_as_json_lines() -> None:
    code, lines, errors = await output(
        "--port", "0", "--speed", "20", "--scenarios", "--chats", "2", "--json", "--exit-when-done",
        "--lose-parts", "0.2",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert events[0]["event"] == "started"
    assert events[0]["users"]["ann"]["token"]
    done = {event["chat"] for event in events if event.get("step") == "done"}
    assert done == {*SCENARIOS, "generated 0", "generated 1"}
    assert (events[-2]["event"], events[-2]["chats"], events[-1]["event"]) == ("driven", 13, "stopped")
    assert events[-2]["fired"]["lost_parts"] > 0


async def test_a_recording_is_served() -> None:
    path = str(D0 / "text_turn.jsonl")
    code, lines, _ = await output("--port", "0", "--replay", path, "--json", stop_at="started")
    assert code == 0
    assert json.loads(lines[0])["chats"] == ["676ed80f-958e-46a0-acfd-94816354ca4b"]


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        pytest.param(["--replay", "no-such-file"], 1, "No such file or directory: no-such-file", id="no file"),
        pytest.param(["--replay", __file__], 1, "line 1: not JSON", id="no recording"),
        pytest.param(
            ["--replay", "x", "--chats", "1"], 2, "--replay serves a recording as it is", id="replay and more"
        ),
        pytest.param(["--fault", "{"], 2, "is not JSON", id="fault that is no JSON"),
        pytest.param(["--port", "0", "--fault", '{"kind": "fire"}'], 2, "unknown fault 'fire'", id="unknown fault"),
        pytest.param(["--speed", "0"], 2, "Invalid value for '--speed'", id="speed"),
    ],
)
def test_mistakes_get_a_clear_error(arguments: list[str], code: int, error: str) -> None:
    result = CliRunner().invoke(simulator, arguments)
    assert (result.exit_code, error in result.output) == (code, True), result.output
    assert "Traceback" not in result.output


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(simulator, ["--port", str(port)])
    assert result.exit_code == 1
    assert f"port {port} is in use" in result.output


def test_help_shows_examples() -> None:
    result = CliRunner().invoke(simulator, ["--help"])
    assert "relay simulator --replay" in result.output
