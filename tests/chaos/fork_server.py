"""`relay` commands as processes of their own, forked from one that has imported them: a start costs no two seconds.

What is forked runs `relay.cli.main` as the installed command does: its own process id, event loop, log and signals.
"""

import asyncio
import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NoReturn, Self

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """A forked process. `code` is its exit code, negative for a signal, as soon as it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.ended = asyncio.Event()
        self.code: int | None = None

    def send(self, number: signal.Signals) -> None:
        """A process that has ended gets nothing: its id may be another's by now."""
        if self.code is None:
            os.kill(self.pid, number)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


class ForkServer:
    """Starts children. What still runs at its end is killed."""

    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket) -> None:
        self._process = process
        self._line = line
        self._children: dict[int, Child] = {}
        self._asked: asyncio.Queue[asyncio.Future[Child]] = asyncio.Queue()

    @classmethod
    @asynccontextmanager
    async def started(cls) -> AsyncIterator[Self]:
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.fork_server", str(theirs.fileno())],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("RELAY_")},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        ours.setblocking(False)
        server = cls(process, ours)
        reader = asyncio.create_task(server._read())
        try:
            yield server
        finally:
            ours.shutdown(socket.SHUT_WR)  # it kills its children and ends
            await asyncio.to_thread(process.wait, 30)
            reader.cancel()
            await asyncio.wait([reader])
            ours.close()

    async def start(self, *arguments: str, settings: Mapping[str, str], log: Path) -> Child:
        """`relay` with these arguments and settings and no others; its output goes to the file."""
        order = json.dumps({"arguments": arguments, "settings": dict(settings), "log": str(log)}).encode() + b"\n"
        future: asyncio.Future[Child] = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(future)
        await asyncio.get_running_loop().sock_sendall(self._line, order)
        return await future

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = b""
        while data := await loop.sock_recv(self._line, 65536):
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                news = json.loads(line)
                if "started" in news:
                    child = self._children[news["started"]] = Child(news["started"])
                    self._asked.get_nowait().set_result(child)
                elif (child_or_none := self._children.pop(news["ended"], None)) is not None:
                    child_or_none.code = news["code"]
                    child_or_none.ended.set()


# --- within the server -----------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Fork on demand until the other side closes; then kill what was forked."""
    import relay.adapters.migrations  # noqa: PLC0415
    import relay.cli  # noqa: PLC0415
    import relay.commands.migrate  # noqa: PLC0415
    import relay.commands.run  # noqa: F401, PLC0415

    line = socket.socket(fileno=descriptor)
    told, tell = socket.socketpair()
    told.setblocking(False)
    tell.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    gc.freeze()
    children: set[int] = set()
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(line, selectors.EVENT_READ)
        selector.register(told, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is told:
                    with suppress(BlockingIOError):
                        told.recv(4096)
                    _reap(children, line)
                    continue
                data = line.recv(65536)
                if not data:
                    for pid in children:
                        os.kill(pid, signal.SIGKILL)
                    return
                *orders, buffer = (buffer + data).split(b"\n")
                for order in orders:
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        for each in (line, told, tell):
                            each.close()
                        _become(**json.loads(order))
                    children.add(pid)
                    line.sendall(json.dumps({"started": pid}).encode() + b"\n")
                # A child that ended before it was among them.
                _reap(children, line)


def _reap(children: set[int], line: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        children.discard(pid)
        line.sendall(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _become(arguments: list[str], settings: dict[str, str], log: str) -> NoReturn:
    """The child: the `relay` command, as its installed script runs it."""
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(settings)
    sys.argv = ["relay", *arguments]
    from relay.cli import main  # noqa: PLC0415

    main()
    sys.exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
