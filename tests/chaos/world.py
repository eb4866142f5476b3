"""One world: a simulated Coder with its owner, some workers as processes, a vhost, a database, proxies on every way."""

import asyncio
import json
import math
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import asyncpg
import httpx
from prometheus_client.parser import text_string_to_metric_families

from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from tests.chaos.contract import Coder, place
from tests.chaos.fork_server import Child, ForkServer
from tests.chaos.inbox import Inbox
from tests.chaos.proxy import GOOD, FaultProxy
from tests.chaos.script import Author, Script, author_of
from tests.chaos.servers import new_name
from tests.chaos.stage import Broken, Run, Stage

SPEED = 6.0
OWNER_SPEED = 1.0
LEASE_SECONDS = 6.0
GRACE_SECONDS = 10.0  # what is promised for an end in good order
FACT_SECONDS = 90.0  # failsafe of every wait for a fact
START_SECONDS = 30.0


class Worker:
    """One `relay worker`."""

    def __init__(self, name: str, child: Child, log: Path, http: httpx.AsyncClient) -> None:
        self.name = name
        self.child = child
        self.log = log
        self.expected: int | None = None  # exit code, where a plan ends it
        self._http = http
        self.ops = ""

    @property
    def alive(self) -> bool:
        return self.child.code is None

    def events(self) -> list[dict[str, Any]]:
        """Its log so far."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    async def started(self) -> None:
        """Until its ops port is known."""

        def fact() -> bool:
            if not self.alive:
                raise Broken(f"{self.name} ended with {self.child.code} at its start, see {self.log}")
            found = [event["ops"] for event in self.events() if event.get("event") == "started"]
            self.ops = found[0] if found else ""
            return bool(found)

        await until(fact, lambda: f"{self.name} did not start, see {self.log}")

    async def following(self) -> set[str]:
        """Ids of the chats it follows; none when it does not answer."""
        try:
            body = (await self._http.get(self.ops + "/status")).json()
        except httpx.HTTPError:
            return set()
        return set((body.get("worker") or {}).get("following", ()))

    async def metrics(self) -> dict[str, float]:
        """Samples by name, and by name and labels: `relay_publish_total{outcome=returned}`."""
        try:
            text = (await self._http.get(self.ops + "/metrics")).text
        except httpx.HTTPError:
            return {}
        found: dict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] += sample.value
                for label, value in sample.labels.items():
                    found[f"{sample.name}{{{label}={value}}}"] += sample.value
        return found

    async def ended(self, code: int, within: float) -> float:
        """Until it has ended so; how long it took."""
        started = time.monotonic()
        try:
            await asyncio.wait_for(self.child.ended.wait(), within)
        except TimeoutError:
            raise Broken(f"{self.name} still runs {within:g} s after it was to end, see {self.log}") from None
        if self.child.code != code:
            raise Broken(f"{self.name} ended with {self.child.code}, not {code}, see {self.log}")
        return time.monotonic() - started


class World:
    """Everything that belongs to one seed."""

    def __init__(self, run: Run, directory: Path, forks: ForkServer, patience: float) -> None:
        self.lease_seconds = LEASE_SECONDS * patience
        self.grace_seconds = GRACE_SECONDS * patience
        self.directory = directory
        self.dice = random.Random(f"{run.plan}:{run.seed}:faults")
        self.forks = forks
        self.workers: list[Worker] = []
        self.fired: Counter[str] = Counter()
        self.journal: list[str] = []
        self.hurried = False  # a worker that was stopped had no time to hand over in good order
        self.reads_log = False  # queues were deleted: what came meanwhile is in the relay's stream
        self.woken: list[float] = []  # when a frozen worker went on
        self.simulator: Simulator
        self.author: Author
        self.script: Script
        self.inbox: Inbox
        self.coder: FaultProxy
        self.rabbit: FaultProxy
        self.database: FaultProxy
        self.vhost = ""
        self._database_url = ""
        self._http: httpx.AsyncClient
        self._settings: dict[str, str] = {}

    @property
    def proxies(self) -> tuple[FaultProxy, FaultProxy, FaultProxy]:
        return self.coder, self.rabbit, self.database

    @classmethod
    @asynccontextmanager
    async def open(cls, run: Run, stage: Stage, directory: Path) -> AsyncIterator[Self]:
        """Logs go to the directory."""
        world = cls(run, directory, stage.forks, stage.patience)
        directory.mkdir(parents=True, exist_ok=True)
        servers = stage.servers
        seed = run.seed
        config = SimulatorConfig(
            seed=seed, speed=SPEED, dialect=run.dialect, rate_limit=0, poll_ms=300, recovery_ms=4000
        )
        async with AsyncExitStack() as stack:
            world.vhost = new_name()
            rabbit = await stack.enter_async_context(servers.vhost(world.vhost))
            database = await stack.enter_async_context(servers.database(new_name(), stage.template))
            world._database_url = database
            world.simulator = await stack.enter_async_context(Simulator(config))
            world.inbox = await stack.enter_async_context(Inbox.open(rabbit, "quorum" if seed % 2 else "classic"))
            world._http = await stack.enter_async_context(httpx.AsyncClient(verify=False, timeout=5))
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
            world.author = author_of(session, world.simulator, OWNER_SPEED)
            chats, deeds = (2, 2) if run.small else (3 + seed % 3, 3)
            world.script = Script(world.author, seed, chats, deeds)
            for name, url in (("coder", world.simulator.url), ("rabbit", rabbit), ("database", database)):
                parts = urlsplit(url)
                proxy = await stack.enter_async_context(
                    FaultProxy.to(name, "127.0.0.1", parts.port or 0, random.Random(f"{run.plan}:{seed}:{name}"))
                )
                setattr(world, name, proxy)
                account, _, _ = parts.netloc.rpartition("@")
                netloc = f"{account}@127.0.0.1:{proxy.port}" if account else f"127.0.0.1:{proxy.port}"
                world._settings[f"RELAY_{name.upper()}__URL"] = urlunsplit(parts._replace(netloc=netloc))
            answer, dead = f"{5 * stage.patience:g}", f"{math.ceil(2 * stage.patience)}"
            world._settings |= {
                "RELAY_CODER__TOKEN": world.simulator.users["ann"].token,
                "RELAY_CODER__TIMEOUT_SECONDS": answer,
                "RELAY_CODER__PING_INTERVAL_SECONDS": dead,
                "RELAY_CODER__PING_TIMEOUT_SECONDS": dead,
                "RELAY_RABBIT__CONFIRM_TIMEOUT_SECONDS": answer,
                "RELAY_RABBIT__CONNECT_TIMEOUT_SECONDS": answer,
                "RELAY_RABBIT__HEARTBEAT_SECONDS": dead,
                "RELAY_DATABASE__OPERATION_TIMEOUT_SECONDS": answer,
                "RELAY_OPS__PORT": "0",
                "RELAY_LOG__LEVEL": "debug",
                "RELAY_LOG__FORMAT": "json",
                "RELAY_WORKER__LEASE_SECONDS": f"{world.lease_seconds:g}",
                "RELAY_WORKER__SWEEP_SECONDS": "0.5",
                "RELAY_WORKER__ARCHIVED_SWEEP_EVERY": "2",
                "RELAY_FOLLOW__SETTLE_SECONDS": "0.3",
                "RELAY_FOLLOW__LINGER_SECONDS": "0.8",
                "RELAY_FOLLOW__FIRST_DELAY_SECONDS": "0.1",
                "RELAY_FOLLOW__LONGEST_DELAY_SECONDS": "1",
            }
            try:
                yield world
            finally:
                for worker in world.workers:
                    if worker.alive:
                        worker.child.send(signal.SIGCONT)
                        worker.child.send(signal.SIGKILL)
                        await worker.child.ended.wait()

    def note(self, what: str) -> None:
        """For the journal of what struck when."""
        self.journal.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")

    # --- workers ------------------------------------------------------------------------------------------------------

    async def start_worker(self) -> Worker:
        name = f"worker{len(self.workers) + 1}"
        self.note(f"start of {name}")
        log = self.directory / f"{name}.log"
        settings = {**self._settings, "RELAY_WORKER__NAME": name}
        child = await self.forks.start("worker", settings=settings, log=log)
        worker = Worker(name, child, log, self._http)
        self.workers.append(worker)
        await worker.started()
        return worker

    @property
    def living(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.alive]

    async def following(self) -> dict[Worker, set[str]]:
        return {worker: await worker.following() for worker in self.living}

    def busy(self) -> set[str]:
        """Chats in the middle of a turn."""
        return {str(chat.id) for chat in self.simulator.database.chats.values() if chat.is_busy}

    async def in_the_middle(self) -> tuple[Worker, set[str]]:
        """A worker that follows chats in the middle of a turn, drawn by the dice, and those chats."""
        found: dict[Worker, set[str]] = {}

        async def fact() -> bool:
            busy = self.busy()
            found.clear()
            found.update({worker: mine for worker, chats in (await self.following()).items() if (mine := chats & busy)})
            return bool(found)

        await until(fact, lambda: f"nobody follows a busy chat: {self.busy()}")
        worker = self.dice.choice(sorted(found, key=lambda each: each.name))
        return worker, found[worker]

    def logged(self, event: str) -> int:
        """How often workers said so."""
        return sum(line.get("event") == event for worker in self.workers for line in worker.events())

    async def metric(self, name: str) -> float:
        """Sum over the living."""
        return sum([(await worker.metrics()).get(name, 0.0) for worker in self.living])

    def session_of(self, chat: str) -> int:
        """The highest that consumers have seen."""
        return max((place(each)[0] for each in self.inbox.deliveries if each.event["subject"] == chat), default=0)

    async def keep_evidence(self) -> None:
        """How things stand, for whoever asks why nothing comes: what workers say, and who claims what."""
        found: dict[str, Any] = {}
        for worker in self.living:
            with suppress(httpx.HTTPError):
                found[worker.name] = (await self._http.get(worker.ops + "/status")).json()
        url = urlsplit(self._database_url)
        connection = await asyncpg.connect(urlunsplit(url._replace(scheme="postgresql")))
        try:
            tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in tables:
                if table not in ("known_messages", "messages", "charges"):
                    found[table] = [dict(row) for row in await connection.fetch(f'SELECT * FROM "{table}" LIMIT 500')]
            found["now"] = await connection.fetchval("SELECT now()")
            found["activity"] = [
                dict(row)
                for row in await connection.fetch(
                    "SELECT pid, state, wait_event_type, now() - xact_start AS age, left(query, 200) AS query "
                    "FROM pg_stat_activity WHERE datname = current_database()"
                )
            ]
        finally:
            await connection.close()
        (self.directory / "evidence.json").write_text(json.dumps(found, indent=1, default=str))

    def heal(self) -> None:
        """The lines are good again; nothing strikes any more."""
        for proxy in self.proxies:
            proxy.line = GOOD
            proxy.refuse(False)
        self.simulator.faults.clear()

    # --- truth --------------------------------------------------------------------------------------------------------

    async def truth(self) -> dict[str, Coder]:
        """What the REST API says of every chat of the owner, chats of sub-agents included."""
        base = self.simulator.url + DIALECTS[self.simulator.config.dialect].features.prefixes[0]
        headers = {"Coder-Session-Token": self.simulator.users["ann"].token}
        chats = {}
        for chat in list(self.simulator.database.chats.values()):
            url = f"{base}/{chat.id}"
            row = (await self._http.get(url, headers=headers)).raise_for_status().json()
            messages: dict[int, Any] = {}
            more, before, queue = True, "", None
            while more:
                page = (await self._http.get(f"{url}/messages?limit=200{before}", headers=headers)).json()
                messages |= {message["id"]: message for message in page["messages"]}
                more, before = page["has_more"], f"&before_id={min(messages, default=0)}"
                queue = page["queued_messages"] if queue is None else queue
            chats[str(chat.id)] = Coder(row, messages, queue or [], self.author.edits[chat.id])
        return chats


async def until(
    fact: Callable[[], bool | Awaitable[bool]], what: Callable[[], str], *, seconds: float = FACT_SECONDS
) -> None:
    """Return once the fact holds; `what` says how things stand when it never does."""
    deadline = time.monotonic() + seconds
    while True:
        answer = fact()
        if answer if isinstance(answer, bool) else await answer:
            return
        if time.monotonic() > deadline:
            raise Broken(what())
        await asyncio.sleep(0.1)
