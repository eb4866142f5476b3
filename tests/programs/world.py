"""The whole relay within one process, against a simulated server: its bus in memory, its store in SQLite."""

import asyncio
import io
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prometheus_client import REGISTRY

from relay.adapters.clock import SystemClock
from relay.adapters.coder import CoderSettings, CoderUpstream
from relay.adapters.database import DatabaseSettings
from relay.adapters.memory import MemoryBus
from relay.adapters.store import SqlStore
from relay.core.claims import Peer
from relay.core.events import ChatRef
from relay.ports import Budget, Claim, ModelPrice, Retention
from relay.programs.follow import Follower, FollowSettings
from relay.programs.worker import Worker, WorkerSettings
from relay.simulator import Simulator
from relay.simulator.owner import Owner
from tests.e2e.consumer import Consumer, Envelope, fold, last, turns

DEADLINE_SECONDS = 20.0  # failsafe: nothing waits for it when all is well
_LONGEST_LOOK_SECONDS = 0.5
FOLLOW = FollowSettings(settle_seconds=0.15, linger_seconds=0.4, first_delay_seconds=0.05, longest_delay_seconds=0.2)
WORKER = WorkerSettings(
    sweep_seconds=0.2,
    lease_seconds=5.0,
    look_seconds=0.1,
    defer_seconds=0.2,
    dials_per_second=1000.0,
    unauthorized_seconds=0.2,
)


async def until(fact: Callable[[], object], what: Callable[[], object] = lambda: "") -> None:
    """Return once the fact holds; `what` says how things stand when it never does."""
    patience = Patience()
    while not fact():
        assert patience.left, f"{what()}\n{patience.tasks()}"
        await asyncio.sleep(0.01)


class Patience:
    """What is left of the deadline. A machine that stands still for a while does not use it up."""

    def __init__(self, seconds: float = DEADLINE_SECONDS) -> None:
        self._seconds = seconds
        self._looked = time.monotonic()

    @property
    def left(self) -> bool:
        now = time.monotonic()
        self._seconds -= min(now - self._looked, _LONGEST_LOOK_SECONDS)
        self._looked = now
        return self._seconds > 0

    @staticmethod
    def tasks() -> str:
        """Where every task waits: without it nobody knows what hung."""
        told = io.StringIO()
        for task in asyncio.all_tasks():
            task.print_stack(limit=4, file=told)
        return told.getvalue()


def counted(name: str, **labels: str) -> float:
    """A counter of this process."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


@dataclass
class World:
    simulator: Simulator
    bus: MemoryBus
    store: SqlStore
    database: DatabaseSettings
    upstream: CoderUpstream
    owner: Owner
    directory: Path
    _starts: Iterator[int] = field(default_factory=count)

    # --- the relay ------------------------------------------------------------------------------------------------

    async def ref(self, chat: UUID) -> ChatRef:
        row = await self.upstream.chat(chat)
        return ChatRef(self.upstream.deployment, chat, UUID(str(row["owner_id"])), chat)

    async def follower(self, chat: UUID, *, worker: str = "one", lease_seconds: float = 60.0) -> Follower:
        """A follower that has just claimed the chat."""
        claim = await self.claim(await self.ref(chat), worker, lease_seconds=lease_seconds)
        assert claim is not None
        return self.following(claim)

    async def claim(self, chat: ChatRef, worker: str = "one", *, lease_seconds: float = 60.0) -> Claim | None:
        """A claim by a worker that has just begun, with a lease that nobody renews."""
        peer = Peer(f"{worker}-{next(self._starts)}", None, 0.0, 1)
        await self.store.enlist(peer, chat.deployment, lease_seconds=lease_seconds)
        return await self.store.claim(chat, peer.worker)

    def following(self, claim: Any) -> Follower:
        return Follower(
            claim, upstream=self.upstream, bus=self.bus, claims=self.store, clock=SystemClock(), settings=FOLLOW
        )

    @asynccontextmanager
    async def worker(self, name: str = "one", *, upstream: CoderUpstream | None = None, **settings: Any) -> Any:
        """A worker that works while the block runs, and may not end by itself."""
        said: list[tuple[bool, str]] = []
        worker = Worker(
            name,
            upstream=upstream or self.upstream,
            bus=self.bus,
            claims=self.store,
            added=self.store,
            clock=SystemClock(),
            settings=WORKER.model_copy(update=settings),
            follow=FOLLOW,
            report=lambda ok, reason: said.append((ok, reason)),
        )
        async with while_running(worker.run()):
            yield worker, said

    # --- what consumers know ----------------------------------------------------------------------------------------

    def consumer(self) -> Consumer:
        consumer = Consumer()
        for event in self.bus.published:
            consumer.take(event.routing_key, event.encode())
        return consumer

    def told(self, chat: UUID, kind: str = "chat.") -> list[Envelope]:
        """Events of a chat whose routing key begins so, each once, in the order of `(session, position)`."""
        return [event for event in self.consumer().of(str(chat)) if event["key"].startswith(kind)]

    def in_order(self, chat: UUID) -> bool:
        """Whether everything about the chat went out in the order of `(session, position)`."""
        places = [(e.session, e.position) for e in self.bus.published if e.chat.chat_id == chat and e.family == "chat"]
        return places == sorted(places)

    async def difference(self, chat: UUID) -> list[str]:
        """What a consumer does not know as Coder does."""
        events = self.consumer().of(str(chat))
        page = await self.upstream.messages(chat, down_to=0)
        truth = {int(str(message["id"])): message for message in page.messages}
        folded, told = fold(events), turns(events)
        lines = [f"message {key} missing" for key in sorted(truth.keys() - folded.keys())]
        lines += [f"message {key} not in Coder" for key in sorted(folded.keys() - truth.keys())]
        lines += [f"message {key} differs" for key in truth.keys() & folded.keys() if not same(truth[key], folded[key])]
        prompts = [key for key, message in truth.items() if message["role"] == "user"]
        lines += [f"turn {key} told {told[key]}" for key in sorted(prompts) if len(told[key]) != 1]
        status, row = last(events, "chat.status."), await self.upstream.chat(chat)
        if (status or {}).get("status") != row["status"]:
            lines.append(f"status {status} for {row['status']}")
        queue = last(events, "chat.queue.")
        if (queue or {"queued_messages": []})["queued_messages"] != page.queued_messages:
            lines.append(f"queue {queue}")
        return lines

    async def until_equal(self, *chats: UUID) -> None:
        """Wait until consumers know these idle chats as Coder does."""
        patience = Patience()
        for chat in chats:
            while lines := await self.difference(chat):
                assert patience.left, lines
                await asyncio.sleep(0.05)

    # --- the store, looked at from behind ---------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.directory / "relay.db"

    def rows(self, query: str) -> list[Any]:
        with sqlite3.connect(self._file, timeout=10) as connection:
            return connection.execute(query).fetchall()

    def saved(self) -> set[int]:
        """All message ids in resume points."""
        return {row[0] for row in self.rows("SELECT message_id FROM known_messages")}

    async def write(self, query: str) -> None:
        """Change rows, as somebody with access to the database might."""

        def work() -> None:
            with sqlite3.connect(self._file, timeout=10) as connection:
                connection.execute(query)

        await asyncio.to_thread(work)  # who holds the lock now needs the loop to let it go

    @asynccontextmanager
    async def database_away(self) -> AsyncIterator[None]:
        """Nobody gets to write in the database while the block runs."""
        connection = sqlite3.connect(self._file, isolation_level=None, timeout=10, check_same_thread=False)
        try:
            await asyncio.to_thread(connection.execute, "BEGIN EXCLUSIVE")
            yield
        finally:
            connection.close()  # which rolls back


class OneByOne:
    """`Frames` that come one at a time, however many are there."""

    def __init__(self, frames: AsyncIterator[str]) -> None:
        self._frames = frames

    def __aiter__(self) -> "OneByOne":
        return self

    async def __anext__(self) -> str:
        return await anext(self._frames)

    def at_hand(self) -> list[str]:
        return []


@asynccontextmanager
async def while_running(work: Awaitable[object]) -> AsyncIterator[asyncio.Task[object]]:
    """Work in the background while the block runs; fails when it ended by itself, with what ended it."""

    async def run() -> object:
        return await work

    task = asyncio.create_task(run())
    await asyncio.sleep(0)  # let it begin: what never began is never awaited
    try:
        yield task
        if task.done():
            task.result()
            raise AssertionError("it ended by itself")
    finally:
        task.cancel()
        await asyncio.wait([task])


def same(one: Any, other: Any) -> bool:
    """Whether two messages say the same.

    Absent, null, empty and zero are one to the API, and server ages differ in which of them they write, and in whether
    they write when a part began.
    """
    return bool(_said(one) == _said(other))


def _said(value: Any) -> Any:
    if isinstance(value, dict):
        passed_over = ("created_at", "completed_at") if "type" in value else ()
        return {key: kept for key, inner in value.items() if key not in passed_over and (kept := _said(inner))}
    return [_said(inner) for inner in value] if isinstance(value, list) else value


def upstream_settings(simulator: Simulator, user: str = "ann", **more: Any) -> CoderSettings:
    return CoderSettings.model_validate({"url": simulator.url, "token": simulator.users[user].token, **more})


class OtherServer:
    """An upstream that answers some calls as a server of another age does; the rest is asked of the real one.

    `asked` has the names of the calls that were answered here, in order. A value that is an error is raised.
    """

    def __init__(self, upstream: CoderUpstream) -> None:
        self._upstream = upstream
        self.native_limits: bool | Exception = True
        self.prices: dict[UUID, ModelPrice] | Exception = {}
        self.budgets: dict[UUID, Budget] | Exception = {}
        self.kept: Retention | Exception = Retention()
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._upstream, name)

    def _answer(self, name: str, answer: Any) -> Any:
        self.asked.append(name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def has_native_limits(self) -> bool:
        return bool(self._answer("has_native_limits", self.native_limits))

    async def model_prices(self) -> dict[UUID, ModelPrice]:
        return cast(dict[UUID, ModelPrice], self._answer("model_prices", self.prices))

    async def budget(self, user_id: UUID) -> Budget | None:
        return cast(dict[UUID, Budget], self._answer(f"budget {user_id}", self.budgets)).get(user_id)

    async def retention(self) -> Retention:
        return cast(Retention, self._answer("retention", self.kept))
