"""A broker and a database of the plans' own, started by `scripts/services`, to be restarted and starved.

Linux only: a server is started again with the command line and the environment that /proc shows of it.
"""

import asyncio
import importlib.machinery
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Self
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import httpx

ROOT = Path(__file__).resolve().parents[2]
RABBITMQCTL = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")


def _services() -> ModuleType:
    """`scripts/services` as a module."""
    loader = importlib.machinery.SourceFileLoader("scripts_services", str(ROOT / "scripts" / "services"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


class Servers:
    """RabbitMQ and PostgreSQL, private. `stop` ends what was started and nothing else."""

    def __init__(self, services: Any, running: Any) -> None:
        self._services = services
        self._running = running
        self.rabbit_url: str = running.variables[services.RABBIT]
        self.management_url: str = running.variables[services.MANAGEMENT]
        self.database_url: str = running.variables[services.DATABASE]
        self._started = {process.pid: (command_of(process.pid), environment_of(process.pid)) for process in self._all}

    @staticmethod
    def can_be_started() -> bool:
        """Whether their programs are there, and the ways in which they are restarted."""
        services = _services()
        programs = (*services.rabbit_programs(), *services.postgres_programs())
        return sys.platform == "linux" and all(programs) and RABBITMQCTL.exists()

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Self]:
        services = _services()
        offered = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("RELAY_TEST_")}
        try:
            running = services.start_servers()
        finally:
            os.environ.update(offered)
        try:
            yield cls(services, running)
        finally:
            running.stop()

    @property
    def _all(self) -> list[Any]:
        return [process for process, _ in self._running.processes]

    def _index(self, program: str) -> int:
        for index, process in enumerate(self._all):
            if any(program in word for word in self._started[process.pid][0]):
                return index
        raise LookupError(program)

    # --- the broker ---------------------------------------------------------------------------------------------------

    async def kill_broker(self) -> None:
        """SIGKILL to the node; return when nothing listens on its port."""
        process = self._all[self._index("rabbitmq-server")]
        os.killpg(process.pid, signal.SIGKILL)
        await self._until_silent(process, urlsplit(self.rabbit_url).port or 0)

    async def start_broker(self) -> None:
        """Start the node again on its data and its ports; return when it takes connections."""
        directory = Path(self._running.directory, "rabbitmq")
        await self._start_again("rabbitmq-server", directory, self._services.Account.first("rabbitmq", "nobody"))
        management = urlsplit(self.management_url)
        await self._until(
            lambda: self._services.answers_management(management.port, management.username, management.password)
        )

    async def until_remembered(self) -> None:
        """Return once a restart would find streams: a new node notes some moments later that it keeps such."""
        notes = "rabbitmq/mnesia/*/coordination/*/names.dets"
        directory = Path(self._running.directory)
        await self._until(
            lambda: any(b"rabbit_stream_coordinator" in path.read_bytes() for path in directory.glob(notes))
        )

    async def set_alarm(self, on: bool) -> None:
        """Let the broker believe that it is out of memory, or no more."""
        process = self._all[self._index("rabbitmq-server")]
        account = self._services.Account.first("rabbitmq", "nobody")
        done = await asyncio.create_subprocess_exec(
            RABBITMQCTL,
            "--quiet",
            "set_vm_memory_high_watermark",
            "0" if on else "0.6",
            env=self._started[process.pid][1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            user=account.uid if account.switch else None,
            group=account.gid if account.switch else None,
        )
        assert await done.wait() == 0

    @asynccontextmanager
    async def vhost(self, name: str) -> AsyncIterator[str]:
        """AMQP URL of a new and empty vhost."""
        user = quote(urlsplit(self.rabbit_url).username or "", safe="")
        async with httpx.AsyncClient(base_url=self.management_url, verify=False, timeout=30) as management:
            made = await management.put(f"/api/vhosts/{name}", json={"default_queue_type": "classic"})
            made.raise_for_status()
            everything = {"configure": ".*", "write": ".*", "read": ".*"}
            (await management.put(f"/api/permissions/{name}/{user}", json=everything)).raise_for_status()
            try:
                yield urlunsplit(urlsplit(self.rabbit_url)._replace(path=f"/{name}"))
            finally:
                await management.delete(f"/api/vhosts/{name}")

    async def blocked_connections(self, vhost: str) -> int:
        """How many of the vhost's connections the broker does not read from."""
        async with httpx.AsyncClient(base_url=self.management_url, verify=False, timeout=30) as management:
            rows = (await management.get(f"/api/vhosts/{vhost}/connections")).raise_for_status().json()
        return sum(row.get("state") in ("blocked", "blocking") for row in rows)

    # --- the database -------------------------------------------------------------------------------------------------

    async def stop_database(self, *, immediately: bool) -> None:
        """Stop the server; `immediately` it tells its clients nothing and recovers when it starts."""
        process = self._all[self._index("postgres")]
        os.kill(process.pid, signal.SIGQUIT if immediately else signal.SIGINT)
        await self._until_silent(process, urlsplit(self.database_url).port or 0)

    async def start_database(self) -> None:
        directory = Path(self._running.directory, "postgresql")
        await self._start_again("postgres", directory, self._services.Account.first("postgres", "nobody"))
        await self._until_database_accepts()

    async def _until_database_accepts(self) -> None:
        data = Path(self._running.directory, "postgresql", "data")
        await self._until(lambda: self._services.accepts_connections(data))

    @asynccontextmanager
    async def database(self, name: str, template: str | None = None) -> AsyncIterator[str]:
        """URL of a new database, a copy of the template."""
        copy = f' TEMPLATE "{template}"' if template else ""
        await self._execute(f'CREATE DATABASE "{name}"{copy}')
        # The server forgets the last commits in a crash, to be fast; those of the plans it must keep as in earnest.
        await self._execute(f'ALTER DATABASE "{name}" SET synchronous_commit = on')
        try:
            yield urlunsplit(urlsplit(self.database_url)._replace(path=f"/{name}"))
        finally:
            await self._until_database_accepts()  # it may be down for the run of another world
            await self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    async def _execute(self, statement: str) -> None:
        server = await asyncpg.connect(self.database_url)
        try:
            await server.execute(statement)
        finally:
            await server.close()

    # --- both ---------------------------------------------------------------------------------------------------------

    async def _start_again(self, program: str, directory: Path, account: Any) -> None:
        index = self._index(program)
        old, ends_with = self._running.processes[index]
        command, environment = self._started[old.pid]
        process = account.spawn(command, directory, environment)
        self._running.processes[index] = (process, ends_with)
        self._started[process.pid] = (command, environment)

    async def _until_silent(self, process: Any, port: int) -> None:
        await self._until(lambda: not process.alive() and not self._services.listens(port))

    async def _until(self, fact: Any) -> None:
        deadline = time.monotonic() + 90
        while not await asyncio.to_thread(fact):
            assert time.monotonic() < deadline, f"a server did not do it, see {self._running.directory}"
            await asyncio.sleep(0.05)


def command_of(pid: int) -> list[str]:
    """The words a process was started with; of a script without its interpreter."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    return words[1:] if words[0].endswith("sh") else words


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)


def new_name() -> str:
    return f"chaos{secrets.token_hex(6)}"
