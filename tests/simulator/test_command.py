"""The command, as a user runs it."""

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from click.testing import CliRunner

from relay.simulator.command import simulator
from relay.simulator.dialect import DIALECTS
from relay.simulator.gate import CHATS
from relay.simulator.owner import Owner, OwnerRefused
from relay.simulator.scenarios import SCENARIOS
from relay.simulator.server import seeded_users
from tests.simulator.listener import Listener, listen
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


@dataclass
class Served:
    """The command as a process: what it says, and an owner at its door."""

    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    url: str
    owner: Owner

    async def says(self, event: str, **values: Any) -> dict[str, Any]:
        """The next line of that event with these values."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            async for line in self.process.stdout:
                said: dict[str, Any] = json.loads(line)
                if said["event"] == event and values.items() <= said.items():
                    return said
        raise AssertionError(f"it ended without {event}")

    def stream(self, chat: UUID) -> AbstractAsyncContextManager[Listener]:
        return listen(self.session, f"{self.url}{CHATS}/{chat}/stream", self.owner.user.token)

    def watch(self) -> AbstractAsyncContextManager[Listener]:
        return listen(self.session, f"{self.url}{CHATS}/watch", self.owner.user.token)

    async def fired(self, fault: str) -> int:
        async with self.session.get(f"{self.url}/_simulator/faults") as response:
            return int((await response.json())["fired"].get(fault, 0))

    async def gone(self) -> None:
        """Wait until nobody answers."""
        with contextlib.suppress(aiohttp.ClientConnectionError):
            while True:
                await self.fired("restart")


@asynccontextmanager
async def serving(*arguments: str, port: int = 0) -> AsyncIterator[Served]:
    process = await asyncio.create_subprocess_exec(
        *RUN, "--json", "--port", str(port), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30), aiohttp.ClientSession() as session:
            started = json.loads(await process.stdout.readline())
            owner = Owner(session, started["url"], seeded_users(0)["ann"], UUID(started["model_config_id"]), 10)
            yield Served(process, session, started["url"], owner)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


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
        "--lose-parts", "0.5",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert events[0]["event"] == "started"
    assert events[0]["chats_path"] == "/api/experimental/chats"
    assert events[0]["users"]["ann"]["token"]
    done = {event["chat"] for event in events if event.get("step") == "done"}
    assert done == {*SCENARIOS, "generated 0", "generated 1"}
    assert (events[-2]["event"], events[-2]["chats"], events[-1]["event"]) == (
        "driven", len(SCENARIOS) + 2, "stopped"
    )  # fmt: skip
    assert events[-2]["fired"]["lost_parts"] > 0


async def test_a_recording_is_served() -> None:
    path = str(D0 / "text_turn.jsonl")
    code, lines, _ = await output("--port", "0", "--replay", path, "--json", stop_at="started")
    assert code == 0
    assert json.loads(lines[0])["chats"] == ["676ed80f-958e-46a0-acfd-94816354ca4b"]


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_dialect_is_that_of_the_flag(dialect: str) -> None:
    async with serving("--dialect", dialect) as served, served.session.get(f"{served.url}/_simulator/state") as state:
        assert (await state.json())["dialect"] == dialect


# --- faults by the clock ----------------------------------------------------------------------------------------------

LONG = "[text n=5000 ms=20] long"


@pytest.mark.parametrize("times", [("--zombie-every", "0.3"), ("--zombie-after", "0.3", "--zombie-after", "4")])
async def test_a_zombie_says_dropped_messages_and_then_nothing(times: tuple[str, ...]) -> None:
    async with serving(*times) as served:
        chat = await served.owner.create(LONG)
        async with served.stream(chat) as seen:
            await served.says("fault", fault="zombie", struck=1)
            await seen.until(lambda s: s.last == "error: dropped messages")
            heard = len(seen.frames)
            await served.owner.interrupt(chat)
            await served.owner.wait_answer(chat)  # so much has happened, and nobody was told
            assert (len(seen.frames), seen.ended) == (heard, False)


async def test_silence_for_ever() -> None:
    async with serving("--silence-every", "0.3") as served:
        chat = await served.owner.create(LONG)
        async with served.stream(chat) as seen, served.watch():
            await served.says("fault", fault="silence", struck=2)
            heard = len(seen.frames)
            while await served.fired("silence") < 3:
                await asyncio.sleep(0.05)
            assert (len(seen.frames), seen.ended) == (heard, False)


async def test_silence_for_a_while() -> None:
    async with serving("--silence-every", "0.3", "--silence-for", "0.1") as served:
        chat = await served.owner.create(LONG)
        async with served.stream(chat) as seen:
            while not await served.fired("silence"):
                await asyncio.sleep(0.05)
            heard = len(seen.frames)
            await seen.until(lambda s: len(s.frames) > heard)


@pytest.mark.parametrize(
    ("flags", "code"), [(("--close-every", "0.3"), 1001), (("--close-every", "0.3", "--close-code", "4001"), 4001)]
)
async def test_sockets_closed_with_a_code(flags: tuple[str, ...], code: int) -> None:
    async with serving(*flags) as served:
        chat = await served.owner.create(LONG)
        async with served.stream(chat) as seen, served.watch() as watch:
            await seen.until_ended()
            await watch.until_ended()
    assert (seen.code, watch.code) == (code, code)


@pytest.mark.parametrize(("flags", "code"), [((), None), (("--polite",), 1000)], ids=["killed", "polite"])
async def test_a_restart_keeps_the_chats(flags: tuple[str, ...], code: int | None) -> None:
    # The first may come before the stream is open, the last is for slow machines.
    times = ("--restart-after", "0.5", "--restart-after", "1.5", "--restart-after", "6")
    async with serving("--speed", "5", *times, "--recovery", "0", *flags) as served:
        chat = await served.owner.create("[text n=300 ms=20] a second and a bit")
        async with served.stream(chat) as seen:
            await seen.until_ended()
        assert seen.code == code
        for _ in range(2):
            await served.says("fault", fault="restart")
        await served.owner.wait_idle(chat)


async def test_a_restart_may_take_its_time_and_lose_the_chats() -> None:
    async with serving("--restart-after", "1", "--down", "0.5", "--lose-data") as served:
        chat = await served.owner.create(LONG)
        await served.gone()
        await served.says("fault", fault="restart")
        with pytest.raises(OwnerRefused, match="404"):
            await served.owner.messages(chat)
        await served.owner.create("[text n=1] the users are still there")


async def test_a_restart_may_be_an_upgrade() -> None:
    async with serving("--restart-after", "0.5", "--upgrade-to", "d3") as served:
        await served.says("fault", fault="restart")
        async with served.session.get(f"{served.url}/_simulator/state") as state:
            assert (await state.json())["dialect"] == "d3"


async def test_driven_chats_live_through_all_of_them() -> None:
    code, lines, errors = await output(
        "--port", "0", "--speed", "20", "--scenarios", "--chats", "2", "--json", "--exit-when-done",
        "--zombie-after", "0.3", "--silence-every", "0.7", "--silence-for", "0.1",
        "--close-every", "0.4", "--restart-after", "1", "--polite",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert {event["fault"] for event in events if event["event"] == "fault"} == {
        "zombie", "silence", "close", "restart"
    }  # fmt: skip
    assert events[-2]["chats"] == len(SCENARIOS) + 2


async def test_owners_do_not_wait_for_ever_at_a_stream_that_died() -> None:
    code, lines, errors = await output(
        "--port", "0", "--speed", "20", "--scenarios", "--json", "--exit-when-done", "--zombie-every", "0.1"
    )  # fmt: skip
    assert (code, errors) == (0, "")
    assert json.loads(lines[-2])["chats"] == len(SCENARIOS)


async def test_driven_chats_may_be_lost() -> None:
    code, lines, errors = await output(
        "--port", "0", "--speed", "5", "--scenarios", "--json", "--exit-when-done",
        "--restart-after", "1", "--lose-data",
    )  # fmt: skip
    assert (code, errors) == (0, "")
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    lost = {event["chat"] for event in events if event.get("step") == "lost"}
    done = {event["chat"] for event in events if event.get("step") == "done"}
    assert lost
    assert lost | done == set(SCENARIOS)
    assert events[-2]["chats"] == len(done)


def test_owners_who_are_refused_end_the_command_in_words() -> None:
    refusal = '{"kind": "answer", "status": 403, "path": "*/chats"}'
    result = CliRunner().invoke(simulator, ["--port", "0", "--scenarios", "--exit-when-done", "--fault", refusal])
    assert result.exit_code == 1
    assert "the owners of the driven chats cannot go on: POST" in result.output


async def test_a_restart_that_finds_its_port_taken_ends_the_command_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with serving("--restart-after", "0.5", "--down", "2", port=port) as served:
        await served.gone()
        with socket.create_server(("127.0.0.1", port)):
            _, errors = await served.process.communicate()
    assert served.process.returncode == 1
    assert f"port {port} is in use" in errors.decode()


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
        pytest.param(["--slow", "nan"], 2, "'nan' is not a number that can be used", id="not a number"),
        pytest.param(["--dialect", "d9"], 2, "Invalid value for '--dialect'", id="dialect"),
        pytest.param(["--zombie-every", "0"], 2, "Invalid value for '--zombie-every'", id="all the time"),
        pytest.param(["--restart-after", "inf"], 2, "Invalid value for '--restart-after'", id="never"),
        pytest.param(["--close-after", "1", "--close-code", "99"], 2, "1000<=x<=4999", id="close code"),
        pytest.param(["--close-code", "1001"], 2, "--close-code says how: say when with --close-after", id="no close"),
        pytest.param(["--silence-for", "1"], 2, "--silence-for says how: say when with --silence", id="no silence"),
        pytest.param(["--upgrade-to", "d3"], 2, "--upgrade-to says how: say when with --restart", id="no upgrade"),
        pytest.param(["--lose-data"], 2, "--lose-data says how: say when with --restart-after", id="no restart"),
        pytest.param(["--replay", "x", "--zombie-after", "1"], 2, "--replay serves a recording", id="replay zombie"),
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
