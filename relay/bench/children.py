"""Processes of a measurement: started by the bench, told what to do over standard input, gone when it goes.

Each line is a JSON object. The first line of a child says that it is ready; after that every question gets one answer.
"""

import asyncio
import json
import resource
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from relay.core.errors import RelayError

_END_SECONDS = 15.0
_LINE_BYTES = 2**24
Answers = Mapping[str, Callable[..., dict[str, object]]]


class ChildFailed(RelayError):
    """A process of the measurement ended, or did not answer. React: end the measurement."""


class Child:
    """The parent's hold on one."""

    def __init__(self, process: Process, name: str, hello: dict[str, Any]) -> None:
        self._process = process
        self._name = name
        self.hello = hello

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, question: str, *, patience: float = 60.0, **arguments: object) -> dict[str, Any]:
        """Its answer. Raises ChildFailed when it has ended, or does not answer in time."""
        assert self._process.stdin is not None  # noqa: S101
        with suppress(ConnectionError):
            self._process.stdin.write(json.dumps([question, arguments]).encode() + b"\n")
            await self._process.stdin.drain()
        return await _line(self._process, self._name, patience)

    def must_run(self) -> None:
        """Raises ChildFailed when it has ended."""
        if self._process.returncode is not None:
            raise ChildFailed(
                f"{self._name} ended with exit code {self._process.returncode}; what it said stands above"
            )

    async def kill(self) -> None:
        """End it as nothing else would: no word to anybody."""
        self._process.kill()
        await self._process.wait()


async def _line(process: Process, name: str, seconds: float) -> dict[str, Any]:
    assert process.stdout is not None  # noqa: S101
    try:
        async with asyncio.timeout(seconds):
            line = await process.stdout.readline()
    except TimeoutError as exc:
        raise ChildFailed(f"{name} did not answer within {seconds:g} s") from exc
    if not line:
        raise ChildFailed(f"{name} ended with exit code {await process.wait()}; what it said stands above")
    answer: dict[str, Any] = json.loads(line)
    if "failed" in answer:
        raise ChildFailed(f"{name}: {answer['failed']}")
    return answer


def feeder(seconds: float = 60.0, **shape: int) -> AbstractAsyncContextManager[Child]:
    """A server with chats of that shape, see `relay.bench.feeder.Feeder`."""
    return child("relay.bench.feeder", json.dumps(shape), seconds=seconds)


@asynccontextmanager
async def child(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None, seconds: float = 60.0
) -> AsyncIterator[Child]:
    """Run a module as a process while the block runs; it must speak as `serve` does."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        env=environment,
        limit=_LINE_BYTES,
        start_new_session=True,  # Ctrl-C is for us, and we end them in order
    )
    name = module.rpartition(".")[2]
    try:
        yield Child(process, name, await _line(process, name, seconds))
    finally:
        assert process.stdin is not None  # noqa: S101
        if process.returncode is None:
            process.stdin.close()  # each of them ends when nobody can ask it anything any more
            try:
                async with asyncio.timeout(_END_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


# --- the child's side


def say(answer: Mapping[str, object]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def serve(answers: Answers, hello: Mapping[str, object]) -> None:
    """Answer the parent in the loop's own thread until it is gone."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()

    def answered(question: str, arguments: dict[str, Any]) -> None:
        say(answers[question](**arguments))

    def read() -> None:
        # A thread, because a loop cannot wait for every kind of standard input.
        for line in sys.stdin:
            question, arguments = json.loads(line)
            loop.call_soon_threadsafe(answered, question, arguments)
        with suppress(RuntimeError):  # the loop ended first
            loop.call_soon_threadsafe(gone.set)

    threading.Thread(target=read, daemon=True).start()
    say(hello)
    await gone.wait()


def allow_many_files() -> int:
    """Raise the limit of open files to what the system lets this process have; that number."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
