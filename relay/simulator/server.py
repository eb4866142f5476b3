"""The simulator as one object: a server on a port, its data, its faults, and the ways to stop and restart it."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from uuid import UUID

from aiohttp import web

from relay.simulator.admin import AdminApi
from relay.simulator.compaction import CompactionApi, Route
from relay.simulator.control import ControlApi
from relay.simulator.costs import CostsApi
from relay.simulator.daemon import Daemon
from relay.simulator.dialect import DIALECTS, Dialect, Event
from relay.simulator.faults import Faults
from relay.simulator.gate import BUILD_VERSION, RATE_LIMIT, Gate, RateLimiter
from relay.simulator.machine import Machine
from relay.simulator.outlet import Farewells, Outlet, Patience, Produce
from relay.simulator.rest import ChatsApi
from relay.simulator.state import Chat, Clock, Database, ModelConfig, TiedRows, User
from relay.simulator.stream import DEFAULT_SKEW, Dropped, Hub, PartLosses, Skew, Subscription, WatchSubscription
from relay.simulator.sync import Sync
from relay.simulator.turns import Pace

PATIENCE = Patience()
LARGEST_BODY = 64 * 1024 * 1024


@dataclass(frozen=True)
class SimulatorConfig:
    """What can be set from the start.

    Args:
        port: 0 takes a free one.
        seed: Decides ids, tokens and every throw of the dice. Times come from the clock.
        dialect: Which age of server it is, see `DIALECTS`.
        speed: Divides all model times, poll delays and rate-limit windows. Not divided: pings and write deadlines.
        poll_ms: Longest time a pending chat waits for its run, in model milliseconds.
        recovery_ms: After a crash, how long `running` chats without a worker stay so, in model milliseconds.
        tied_rows: In which order rows of one `created_at` come in snapshots and refreshes.
        rate_limit: Requests per minute, user and path; 0 is none.
        patience: Of the sockets, in real seconds.
        now: The clock, for tests of periods.
    """

    host: str = "127.0.0.1"
    port: int = 0
    seed: int = 0
    speed: float = 1.0
    dialect: str = "d0"
    model_configs: Sequence[ModelConfig] = ()
    skew: Skew = DEFAULT_SKEW
    poll_ms: float = 1000.0
    titles: bool = True
    recovery_ms: float = 303_000.0
    tied_rows: TiedRows = "by_id"
    rate_limit: int = RATE_LIMIT
    patience: Patience = PATIENCE
    now: Callable[[], datetime] | None = None


def _check_dialect(name: str) -> None:
    """
    Raises:
        ValueError: Unknown; the text says which there are.
    """
    if name not in DIALECTS:
        raise ValueError(f"unknown dialect {name!r}; there are: {', '.join(DIALECTS)}")


def seeded_users(seed: int) -> dict[str, User]:
    """`admin` (owner role), `ann` and `bob` (plain members); the same seed gives the same ids and tokens."""
    letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    dice = random.Random(f"{seed}:users")
    users = {}
    for name in ("admin", "ann", "bob"):
        token = "".join(dice.choices(letters, k=10)) + "-" + "".join(dice.choices(letters, k=22))
        user_id = uuid.UUID(int=dice.getrandbits(128), version=4)
        users[name] = User(user_id, name, token, name == "admin", datetime(2026, 1, 1, tzinfo=UTC))
    return users


@dataclass
class _Life:
    """From one start of the server to its stop."""

    daemon: Daemon | Machine
    hub: Hub
    gate: Gate
    other_gate: Gate | None = None  # of the age that half of the requests find
    outlets: set[Outlet] = field(default_factory=set)


@dataclass(frozen=True)
class _Sockets:
    """Opens sockets that speak one dialect."""

    simulator: "Simulator"
    dialect: Dialect

    async def serve_stream(
        self, request: web.Request, chat: Chat, after_id: int, after_revision: int | None = None
    ) -> web.StreamResponse:
        return await self.simulator.serve_stream(request, chat, self.dialect, after_id, after_revision)

    async def serve_watch(self, request: web.Request, user_id: UUID) -> web.StreamResponse:
        return await self.simulator.serve_watch(request, user_id, self.dialect)


class Simulator:
    """A running server. Use as `async with Simulator(config) as simulator:`."""

    def __init__(self, config: SimulatorConfig | None = None) -> None:
        self.config = config or SimulatorConfig()
        _check_dialect(self.config.dialect)
        if self.config.speed <= 0:
            raise ValueError("speed must be above 0")
        seed = self.config.seed
        self._names = random.Random(f"{seed}:names")
        self._dice = random.Random(f"{seed}:dice")
        self.organization_id = self._uuid()
        self.users = seeded_users(seed)
        self.model_configs = list(self.config.model_configs) or [ModelConfig(self._uuid())]
        self.faults = Faults(random.Random(f"{seed}:faults"))
        self.losses = PartLosses(self.faults.loss_rate)
        self.port = self.config.port
        self.skew = self.config.skew  # of streams that are opened from now on
        self._clock = Clock(self.config.now)
        self._lives = 0
        self.database = self._new_database()
        self._life = self._new_life()
        self._control = ControlApi(self)
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._restart: asyncio.Task[None] | None = None
        self._is_up = False

    # Life

    async def __aenter__(self) -> Self:
        application = web.Application(client_max_size=LARGEST_BODY)
        application.router.add_route("*", "/{path:.*}", self._answer)
        application.on_response_prepare.append(self._put_headers)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._restart is not None:
            self._restart.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._restart
        await self._stop(polite=True)
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://{self.config.host}:{self.port}"

    async def restart(
        self,
        *,
        keep_data: bool = True,
        polite: bool = False,
        down_seconds: float = 0.0,
        recovery_ms: float | None = None,
        dialect: str | None = None,
    ) -> None:
        """Stop the server and start it again on the same port; returns when it is up.

        Args:
            keep_data: False begins with an empty database: message ids start again from 1, users stay.
            polite: Sockets are closed with 1000 and running chats are let go, to be run again at once. Otherwise the
                server is killed: sockets end abruptly, running chats are recovered much later.
            down_seconds: Real time in which the port refuses connections.
            recovery_ms: Replaces the configured time of that name for this start.
            dialect: Another age of server takes over the data, from now on. Chats keep their ids and messages.

        Raises:
            ValueError: There is no such dialect.
        """
        if dialect is not None:
            _check_dialect(dialect)
        self.faults.fired["restart"] += 1
        await self._stop(polite=polite)
        if dialect is not None:
            self.config = replace(self.config, dialect=dialect)
            self._migrate()
        await asyncio.sleep(down_seconds)
        if not keep_data:
            self.database = self._new_database()
        self._life = self._new_life(recovery_ms)
        await self._start()

    def roll(self, dialect: str | None) -> None:
        """Begin a rolling upgrade, or end it with the old age (None) as well as with any restart.

        From now on chance decides, request by request, which of two ages answers. Open sockets stay what they are. Both
        ages work on the same rows and run turns as the present one does.

        Raises:
            ValueError: There is no such dialect, or it does not run turns in the same way.
        """
        other = None
        if dialect is not None:
            _check_dialect(dialect)
            other = DIALECTS[dialect]
            if other.features.episodes != self._life.hub.dialect.features.episodes:
                raise ValueError(f"{dialect} cannot run the turns of {self.config.dialect}; restart with it instead")
            self.faults.fired["roll"] += 1
        self._life.other_gate = None if other is None else self._new_gate(self._life.daemon, other)

    def _migrate(self) -> None:
        """States that a server age does not know become those from which it goes on. Machine.start does the reverse."""
        if not DIALECTS[self.config.dialect].features.episodes:
            for chat in self.database.chats.values():
                chat.status = "pending" if chat.status == "interrupting" else chat.status

    def restart_soon(
        self,
        *,
        keep_data: bool,
        polite: bool,
        down_seconds: float,
        recovery_ms: float | None,
        dialect: str | None = None,
    ) -> None:
        """The same in the background, for a request that must be answered before the server goes."""

        async def work() -> None:
            await asyncio.sleep(0.05)
            await self.restart(
                keep_data=keep_data,
                polite=polite,
                down_seconds=down_seconds,
                recovery_ms=recovery_ms,
                dialect=dialect,
            )

        self._restart = asyncio.create_task(work())

    async def _start(self) -> None:
        if self._runner is None:
            raise RuntimeError("the simulator is not open")
        self._site = web.TCPSite(self._runner, self.config.host, self.port, reuse_address=True)
        await self._site.start()
        address = self._runner.addresses[0]
        self.port = int(address[1])
        self._life.daemon.start()
        self._is_up = True

    async def _stop(self, *, polite: bool) -> None:
        life = self._life
        self._is_up = False
        if self._site is not None:
            await self._site.stop()
            self._site = None
        if polite:
            await asyncio.gather(*[outlet.say_goodbye() for outlet in list(life.outlets)])
        await life.daemon.stop(polite=polite)
        for outlet in list(life.outlets):
            outlet.cut()
        if self._runner is not None and self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    def _new_database(self) -> Database:
        dice = random.Random(f"{self.config.seed}:rows:{self._lives}")
        database = Database(self.users.values(), self.model_configs, self._clock, dice)
        database.tied_rows = self.config.tied_rows
        database.organization_id = self.organization_id
        return database

    def _new_life(self, recovery_ms: float | None = None) -> _Life:
        self._lives += 1
        config = self.config
        recovery = config.recovery_ms if recovery_ms is None else recovery_ms
        dialect = DIALECTS[config.dialect]
        hub = Hub(dialect, self.faults)
        pace = Pace(config.speed, config.poll_ms, config.titles, recovery_ms=recovery, skew=config.skew)
        daemon = (Machine if dialect.features.episodes else Daemon)(self.database, hub, pace)
        return _Life(daemon, hub, self._new_gate(daemon, dialect))

    def _new_gate(self, daemon: Daemon | Machine, dialect: Dialect) -> Gate:
        chats = ChatsApi(self.database, daemon, dialect, _Sockets(self, dialect))
        admin = AdminApi(self.database, dialect.features)
        more: Sequence[Route] = ()
        if isinstance(daemon, Machine) and dialect.features.compaction:
            more = CompactionApi(daemon, dialect).routes
        limiter = RateLimiter(self.config.rate_limit, self.config.speed)
        return Gate(
            self.database,
            routes=[*admin.routes, *CostsApi(self.database, dialect.features).routes, *chats.routes, *more],
            site_routes=admin.site_routes,
            features=dialect.features,
            limiter=limiter,
            organization_id=self.organization_id,
            base_url=lambda: self.url,
        )

    def _uuid(self) -> UUID:
        return uuid.UUID(int=self._names.getrandbits(128), version=4)

    # Requests

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not self._is_up:
            # A connection from before the stop: a stopped server answers nothing, and nothing may join its old life.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=503)
        if request.path.startswith("/_simulator"):
            return await self._control.answer(request)
        slow = self.faults.for_request("slow", request.method, request.path)
        if slow is not None:
            await asyncio.sleep(slow.delay)
        fault = self.faults.for_request("answer", request.method, request.path)
        if fault is not None:
            return self._control.fault_answer(fault)
        other = self._life.other_gate
        gate = self._life.gate if other is None or self._dice.random() < 0.5 else other
        return await gate.answer(request)

    async def _put_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Coder-Build-Version"] = BUILD_VERSION
        response.headers["X-Coder-Request-Id"] = str(UUID(int=self._dice.getrandbits(128), version=4))
        response.headers["X-Content-Type-Options"] = "nosniff"

    async def serve_stream(
        self, request: web.Request, chat: Chat, dialect: Dialect, after_id: int, after_revision: int | None
    ) -> web.StreamResponse:
        """Upgrade the request and follow the chat until the socket ends."""
        life = self._life
        stream = self._sync(chat, dialect, after_id, after_revision) or self._subscription(chat, dialect, after_id)

        async def produce(outlet: Outlet) -> None:
            streams = life.hub.streams.setdefault(chat.id, set())
            streams.add(stream)
            try:
                if isinstance(stream, Sync):
                    await stream.run(outlet.send_frame)
                else:
                    buffered = life.daemon.buffered(chat) if isinstance(life.daemon, Daemon) else ()
                    await stream.run(buffered, outlet.send_frame)
            finally:
                streams.discard(stream)

        return await self._serve(life, self._outlet(dialect, chat.id), request, produce)

    def _sync(self, chat: Chat, dialect: Dialect, after_id: int, after_revision: int | None) -> Sync | None:
        machine = self._life.daemon
        if not isinstance(machine, Machine):
            return None
        return Sync(
            chat,
            machine,
            after_id=after_id,
            after_revision=after_revision,
            dialect=dialect,
            skew=self.skew,
            speed=self.config.speed,
            dice=random.Random(self._dice.getrandbits(64)),
            losses=self.losses,
        )

    def _subscription(self, chat: Chat, dialect: Dialect, after_id: int) -> Subscription:
        return Subscription(
            chat,
            after_id,
            dialect=dialect,
            skew=self.skew,
            speed=self.config.speed,
            dice=random.Random(self._dice.getrandbits(64)),
            losses=self.losses,
        )

    def _outlet(self, dialect: Dialect, chat_id: UUID | None) -> Outlet:
        return Outlet(chat_id, self.faults, self.config.patience, Farewells.of(dialect.features))

    async def serve_watch(self, request: web.Request, user_id: UUID, dialect: Dialect) -> web.StreamResponse:
        """Upgrade the request and tell of the user's chats until the socket ends."""
        life = self._life
        watch = WatchSubscription(dialect)

        async def produce(outlet: Outlet) -> None:
            watches = life.hub.watches.setdefault(user_id, set())
            watches.add(watch)
            try:
                await watch.run(outlet.send_frame)
            finally:
                watches.discard(watch)

        return await self._serve(life, self._outlet(dialect, None), request, produce)

    async def _serve(self, life: _Life, outlet: Outlet, request: web.Request, produce: Produce) -> web.StreamResponse:
        life.outlets.add(outlet)
        try:
            return await outlet.serve(request, produce)
        finally:
            life.outlets.discard(outlet)

    # Faults that happen at once. Each returns how many sockets it struck.

    def streams(self, chat_id: UUID | None = None) -> list[Outlet]:
        """Open stream sockets, of one chat or of all."""
        return [o for o in self._life.outlets if o.chat_id is not None and chat_id in (None, o.chat_id)]

    def watches(self) -> list[Outlet]:
        """Open watch sockets."""
        return [outlet for outlet in self._life.outlets if outlet.chat_id is None]

    def _struck(self, chat_id: UUID | None, include_watches: bool) -> list[Outlet]:
        return self.streams(chat_id) + (self.watches() if include_watches and chat_id is None else [])

    def cut(self, chat_id: UUID | None = None, *, watches: bool = False) -> int:
        """Drop connections without a close frame."""
        struck = self._struck(chat_id, watches)
        for outlet in struck:
            outlet.cut()
        return self._count("cut", struck)

    async def close(self, code: int, reason: str = "", chat_id: UUID | None = None, *, watches: bool = True) -> int:
        """Close sockets with a code and a reason; without `chat_id` the watch sockets as well."""
        struck = self._struck(chat_id, watches)
        await asyncio.gather(*[outlet.close(code, reason) for outlet in struck])
        return self._count("close", struck)

    def zombie(self, chat_id: UUID | None = None) -> int:
        """Send nothing on streams for ever, with the sockets open; before 2.35 the last word is `dropped messages`."""
        struck = [s for s in self._life.hub.all_streams() if chat_id in (None, s.chat.id) and not s.is_zombie]
        for subscription in struck:
            subscription.notify(Dropped())
        return self._count("zombie", struck)

    def silence(self, chat_id: UUID | None = None, seconds: float | None = None, *, watches: bool = False) -> int:
        """Send nothing on open sockets, for a while or for ever; pings are answered."""
        struck = self._struck(chat_id, watches)
        for outlet in struck:
            outlet.silence(seconds)
        return self._count("silenced", struck)

    async def inject(self, raw: str, chat_id: UUID | None = None) -> int:
        """Send a raw text as a frame on a chat's open streams."""
        struck = self.streams(chat_id)
        await asyncio.gather(*[outlet.inject(raw) for outlet in struck])
        return self._count("inject", struck)

    def replay_parts(self, chat_id: UUID | None = None) -> int:
        """Send the whole part buffer again to open streams, as a relay between replicas does. Counts streams."""
        struck = []
        for subscription in self._life.hub.all_streams():
            run = self._life.daemon.runs.get(subscription.chat.id)
            if run is not None and run.buffer and chat_id in (None, subscription.chat.id):
                struck.append(subscription)
                for part in list(run.buffer):
                    subscription.offer_part(part)
        return self._count("replay_parts", struck)

    def leave_unanswered(self, times: int = 1) -> None:
        """The next runs end at once, in `waiting`, without a word from the model."""
        self._life.daemon.unanswered += times

    def hold_models(self, held: bool) -> None:
        """Let no model time pass until it is taken back. Servers since 2.35 do not know this."""
        if isinstance(self._life.daemon, Daemon):
            (self._life.daemon.flowing.clear if held else self._life.daemon.flowing.set)()

    def buffered(self, chat_id: UUID) -> Sequence[Event]:
        """Parts (and a retry) with which a stream that opened now would begin, besides the rows."""
        if isinstance(self._life.daemon, Daemon):
            return self._life.daemon.buffered(self.database.chats[chat_id])
        run = self._life.daemon.runs.get(chat_id)
        return run.buffer if run else ()

    def poll(self, chat_id: UUID | None = None) -> None:
        """Start runs for pending chats (or for one) now, without waiting for the next poll."""
        self._life.daemon.poll(chat_id)

    def needs_run(self, chat: Chat) -> bool:
        """Whether a run of this chat would begin with the next poll."""
        return self._life.daemon.needs_run(chat)

    def _count(self, name: str, struck: Sequence[object]) -> int:
        self.faults.fired[name] += len(struck)
        return len(struck)

    def fired(self, name: str) -> int:
        """How often a fault of this name has fired since the simulator began."""
        return self.counters().get(name, 0)

    def counters(self) -> dict[str, int]:
        """All faults that fired; `lost_parts` are parts that a stream was not given."""
        return {**self.faults.fired, "lost_parts": self.losses.count}

    def is_idle(self) -> bool:
        """Whether no chat is pending or running. A chat in `error` may still hold a queue."""
        return not any(chat.is_busy for chat in self.database.chats.values()) and not self._life.daemon.runs
