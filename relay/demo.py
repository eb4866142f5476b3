"""The whole relay in one process against the built-in simulator: no other service, and it ends by itself.

Workers of two owners, meter and archivist run over the in-memory bus (or a real broker) and SQLite, while the
simulator's owners drive their chats. Whatever is published is folded as a consumer would, and compared at the end with
what Coder's REST API says.
"""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import cast
from uuid import UUID

from prometheus_client import REGISTRY
from pydantic import AmqpDsn

from relay.adapters.archive import ArchiveSettings, open_objects
from relay.adapters.clock import SystemClock
from relay.adapters.coder import CoderSettings, CoderUpstream, open_upstream
from relay.adapters.database import DatabaseSettings
from relay.adapters.memory import MemoryBus
from relay.adapters.rabbit import RabbitSettings, open_rabbit
from relay.adapters.store import SqlStore, open_store
from relay.core.events import Event, JsonObject, LimitData, decode_event
from relay.core.transcript import Transcript, differences
from relay.core.usage import Period
from relay.ports import Bus, Delivery
from relay.programs.archivist import Archivist, ArchivistSettings
from relay.programs.follow import FollowSettings
from relay.programs.meter import Meter, MeterSettings, PolicySettings
from relay.programs.prices import PriceSettings
from relay.programs.worker import Worker, WorkerSettings
from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.scenarios import Progress, run_scenarios

OWNERS = ("ann", "bob")
# Low enough for an alert within a minute of talk.
_POLICIES = (
    PolicySettings(name="daily", scope="user", period=Period.DAY, limit_micros=250_000),
    PolicySettings(name="monthly", scope="deployment", period=Period.MONTH, limit_micros=15_000_000),
)
# Newer servers have no prices of their own: without these nothing would cost anything.
_PRICES = {"lab": PriceSettings(input=Decimal(3), output=Decimal(15), cache_read=Decimal("0.3"))}
_PATIENCE_SECONDS = 15.0  # after the last turn, for something more to arrive
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What `relay demo` was asked for."""

    chats: int | None = None
    seed: int = 0
    speed: float = 1.0
    dialect: str = "d0"
    rabbit: str | None = None
    serve: bool = False
    directory: Path | None = None  # for database and archives; None: a new one below the system's temporary files


@dataclass(slots=True)
class ChatLine:
    """One chat as the progress shows it."""

    chat_id: str
    name: str = ""
    owner: str = ""
    status: str = ""
    messages: int = 0
    previews: int = 0
    turns: int = 0
    done: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """What the demo came to. Money in millionths of a US dollar, by owner."""

    chats: int
    durable_events: int
    previews: int
    previews_coalesced: int
    replays_filtered: int
    reconnects: int
    edits: int
    spend_micros: Mapping[str, int]
    alerts: list[str]
    archives: list[dict[str, object]]
    equal: int
    differences: Mapping[str, list[str]]

    @property
    def good(self) -> bool:
        """Every fold is what REST says, and every chat has its copy."""
        return self.equal == self.chats and len(self.archives) >= self.chats

    def to_json(self) -> JsonObject:
        """For `--json`."""
        return {**asdict(self), "good": self.good}


@dataclass(slots=True)
class Seen:
    """All that a consumer bound to `#` would have: folds, counts and alerts, each event once."""

    folds: dict[UUID, Transcript] = field(default_factory=dict)
    lines: dict[str, ChatLine] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    alerts: list[tuple[str, str]] = field(default_factory=list)  # whose, what
    _ids: set[str] = field(default_factory=set)

    def take(self, event: Event) -> None:
        """Take in one event; a copy changes nothing."""
        if event.id in self._ids:
            return
        self._ids.add(event.id)
        self.counts["previews" if event.transient else "durable"] += 1
        if event.family == "usage" and event.event in ("threshold", "exceeded"):
            data = cast(LimitData, event.data)
            self.alerts.append((data["scope"]["id"], f"{data['policy']} {data['percent']} % ({event.event})"))
        if event.family != "chat":
            return
        self.folds.setdefault(event.chat.chat_id, Transcript()).apply(event)
        line = self.line(str(event.chat.chat_id))
        if event.event == "status":
            line.status = event.detail
        elif event.event == "message":
            line.messages = len(self.folds[event.chat.chat_id].messages)
        elif event.event == "turn":
            line.turns += 1
        elif event.transient:
            line.previews += 1

    def line(self, chat_id: str) -> ChatLine:
        """The progress line of a chat."""
        return self.lines.setdefault(chat_id, ChatLine(chat_id))


async def run_demo(
    options: DemoOptions, changed: Callable[[Seen], None], announce: Callable[[str], None], stop: asyncio.Event
) -> Summary:
    """Run until the chats are done and everything has arrived; with `serve`, until `stop` is set as well.

    Args:
        changed: Called whenever there is something new to show.
        announce: Takes a line for the user.
    """
    directory = options.directory or Path(tempfile.mkdtemp(prefix="relay-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    seen = Seen()
    async with (
        Simulator(SimulatorConfig(seed=options.seed, speed=options.speed, dialect=options.dialect)) as simulator,
        open_store(_database(directory), SystemClock()) as store,
        _bus(options) as bus,
        _accounts(simulator) as accounts,
        bus.tap("#") as published,
        asyncio.TaskGroup() as group,
    ):
        announce(f"simulated Coder server {simulator.url} (dialect {simulator.config.dialect}), data in {directory}")
        running = [group.create_task(_read(published, seen, changed))]
        running += [group.create_task(each) for each in _programs(bus, store, accounts, directory)]
        await _drive(simulator, options, seen, changed, generated=None)
        summary = await _arrived(accounts, store, seen)
        if options.serve:
            announce(f"serving on {simulator.url} until Ctrl-C; the owners go on talking")
            for name in OWNERS:
                announce(f"  token of {name}: {simulator.users[name].token}")
            for seed in count(options.seed + 1):
                if stop.is_set():
                    break
                await _drive(simulator, replace(options, seed=seed), seen, changed, generated=2)
            summary = await _arrived(accounts, store, seen)
        for task in running:
            task.cancel()
    return summary


def _database(directory: Path) -> DatabaseSettings:
    return DatabaseSettings.model_validate({"url": f"sqlite:///{directory}/relay.db"})


@asynccontextmanager
async def _bus(options: DemoOptions) -> AsyncIterator[Bus]:
    if options.rabbit is None:
        yield MemoryBus(keep=0)
        return
    async with open_rabbit(RabbitSettings(url=AmqpDsn(options.rabbit))) as bus:
        yield bus


@asynccontextmanager
async def _accounts(simulator: Simulator) -> AsyncIterator[dict[str, CoderUpstream]]:
    """A connection for each user, the administrator included."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                open_upstream(CoderSettings.model_validate({"url": simulator.url, "token": user.token}))
            )
            for name, user in simulator.users.items()
        }


def _programs(
    bus: Bus, store: SqlStore, accounts: Mapping[str, CoderUpstream], directory: Path
) -> list[Coroutine[None, None, None]]:
    """Two workers, a meter and an archivist, less patient than in earnest."""
    clock = SystemClock()
    workers = [
        Worker(
            f"demo-{name}",
            upstream=accounts[name],
            bus=bus,
            claims=store,
            clock=clock,
            settings=WorkerSettings(sweep_seconds=2.0),
            follow=FollowSettings(settle_seconds=0.5, linger_seconds=1.0, recheck_seconds=30.0),
        ).run()
        for name in OWNERS
    ]
    # Chats of all owners are priced and archived as the administrator, who may read any chat by its id.
    meter = Meter(
        bus=bus,
        charges=store,
        upstream=accounts["admin"],
        clock=clock,
        settings=MeterSettings(policies=_POLICIES, prices=_PRICES),
    )
    archivist = Archivist(
        bus=bus,
        archives=store,
        objects=open_objects(ArchiveSettings(url=f"file://{directory}/archive")),
        upstream=accounts["admin"],
        clock=clock,
        settings=ArchivistSettings(idle_seconds=2.0, look_seconds=0.5, patience=20),
    )
    return [*workers, meter.run(), archivist.run()]


async def _read(published: AsyncIterator[Delivery], seen: Seen, changed: Callable[[Seen], None]) -> None:
    async for delivery in published:
        seen.take(decode_event(delivery.body, delivery.routing_key))
        changed(seen)


async def _drive(
    simulator: Simulator,
    options: DemoOptions,
    seen: Seen,
    changed: Callable[[Seen], None],
    *,
    generated: int | None,
) -> None:
    """Let the owners talk until all their chats are idle: the scenarios, or so many generated chats."""

    def tell(progress: Progress) -> None:
        line = seen.line(str(progress.chat_id))
        line.name, line.owner, line.done = progress.name, progress.owner, progress.step == "done"
        changed(seen)

    await run_scenarios(
        simulator,
        chats=options.chats,
        named=None if generated is None else (),
        generated=generated,
        seed=options.seed,
        speed=options.speed,
        on_progress=tell,
    )


async def _arrived(accounts: Mapping[str, CoderUpstream], store: SqlStore, seen: Seen) -> Summary:
    """Wait until all has arrived that will, and say what it came to."""
    clock = asyncio.get_running_loop().time
    best, deadline = -1, 0.0
    while True:
        truths = {
            UUID(str(row["id"])): (await account.messages(UUID(str(row["id"])), down_to=0)).messages
            for account in (accounts[name] for name in OWNERS)
            async for row in account.list_chats(archived=False)
        }
        wrong = {
            str(chat_id): lines
            for chat_id, truth in truths.items()
            if (lines := _compared(seen.folds.get(chat_id, Transcript()), truth))
        }
        archives = [record for record in await store.archives() if record.published]
        archived = {record.chat.chat_id for record in archives}
        if (good := len(archived) + len(truths) - len(wrong)) > best:
            best, deadline = good, clock() + _PATIENCE_SECONDS
        if (not wrong and archived >= truths.keys()) or clock() > deadline:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    deployment = accounts[OWNERS[0]].deployment
    spend = await store.spend_by_owner(deployment)
    names = {str((await accounts[name].account()).user_id): name for name in OWNERS}
    return Summary(
        chats=len(truths),
        durable_events=seen.counts["durable"],
        previews=seen.counts["previews"],
        previews_coalesced=_metric("relay_previews_coalesced_total"),
        replays_filtered=_metric("relay_replays_filtered_total"),
        reconnects=_metric("relay_reconnects_total"),
        edits=_metric("relay_history_replaced_total", reason="edit"),
        spend_micros={names[str(owner)]: total.cost_micros for owner, total in spend.items()},
        alerts=[f"{names.get(whose, 'all')}: {what}" for whose, what in seen.alerts],
        archives=[
            {"path": record.url.removeprefix("file://"), "sha256": record.sha256, "messages": record.messages}
            for record in archives
        ],
        equal=len(truths) - len(wrong),
        differences=wrong,
    )


def _compared(fold: Transcript, truth: Sequence[JsonObject]) -> list[str]:
    return differences(fold.messages, {cast(int, message["id"]): message for message in truth})


def _metric(name: str, **labels: str) -> int:
    """A counter of this process, summed over the labels that are not given."""
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name == name)
    return int(sum(sample.value for sample in samples if labels.items() <= sample.labels.items()))
