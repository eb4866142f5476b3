"""`relay` commands as processes of their own, as they run in earnest: asked over HTTP, stopped by signals."""

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from relay.cli import main

ROOT = Path(__file__).resolve().parents[2]
RELAY = Path(sys.executable).parent / "relay"
START_SECONDS = 40.0  # failsafe on a loaded machine
STOP_SECONDS = 10.0  # the grace period that is promised


class Relay:
    """One running `relay` command."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.errors: list[str] = []  # lines of standard error
        # One for all that is asked, and without certificates: to load them costs more than a process's whole answer.
        self.http = httpx.AsyncClient(verify=False, timeout=START_SECONDS)
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read_errors())

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._news:
                self.errors.append(line.decode().rstrip("\n"))
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()

    async def logged(self, event: str) -> dict[str, Any]:
        """The first log line of that event, waited for."""
        async with asyncio.timeout(START_SECONDS), self._news:
            while True:
                for line in self.errors:
                    if line.startswith("{") and json.loads(line).get("event") == event:
                        found: dict[str, Any] = json.loads(line)
                        return found
                assert not self._reader.done(), f"ended without {event!r}:\n" + "\n".join(self.errors)
                await self._news.wait()

    async def ask(self, path: str) -> httpx.Response:
        """What the ops port says."""
        ops = (await self.logged("started"))["ops"]
        return await self.http.get(ops + path)

    async def following(self) -> set[str]:
        """Ids of the chats that this worker follows."""
        worker = (await self.ask("/status")).json().get("worker") or {}
        return set(worker.get("following", ()))

    async def kill(self) -> None:
        """SIGKILL: no chance to say anything."""
        self.process.kill()
        await self.process.wait()
        await self._reader

    async def terminate(self) -> int:
        """SIGTERM, as Kubernetes sends it; the exit code. Fails when it takes longer than the grace period."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            code = await self.process.wait()
        await self._reader
        return code

    async def output_line(self) -> str:
        """The next line of standard output."""
        assert self.process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            line = (await self.process.stdout.readline()).decode()
        assert line, "it ended:\n" + "\n".join(self.errors)
        return line


@asynccontextmanager
async def running(*arguments: str, settings: Mapping[str, str] | None = None) -> AsyncIterator[Relay]:
    """Run `relay …` with these settings and no others; it is killed at the end if it still runs."""
    process = await asyncio.create_subprocess_exec(
        RELAY,
        *arguments,
        env=environment(settings or {}),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    relay = Relay(process)
    try:
        yield relay
    finally:
        if process.returncode is None:
            await relay.kill()
        await relay._reader
        await relay.http.aclose()


async def finished(*arguments: str, settings: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run `relay …` to its end: exit code, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        RELAY,
        *arguments,
        env=environment(settings or {}),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_SECONDS * 2):
            output, errors = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def said_here(*arguments: str, settings: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """As `finished`, in this process: for commands that end before they start anything. Starting one takes seconds."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment(settings or {}), clear=True),
        patch.object(sys, "argv", ["relay", *arguments]),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as exc:
            return int(exc.code or 0), output.getvalue(), errors.getvalue()
    return 0, output.getvalue(), errors.getvalue()


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Nothing of this process's own RELAY_* settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return {**kept, "PYTHONPATH": str(ROOT), **settings}
