"""The simulator as one object: a server on a port, its data, its faults, and the ways to stop and restart it."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from uuid import UUID

from aiohttp import web

from relay.simulator.admin import AdminApi
from relay.simulator.control import ControlApi
from relay.simulator.costs import CostsApi
from relay.simulator.daemon import Daemon, Pace
from relay.simulator.dialect import DIALECTS
from relay.simulator.faults import Faults
from relay.simulator.gate import BUILD_VERSION, RATE_LIMIT, Gate, RateLimiter
from relay.simulator.outlet import Outlet, Patience, Produce
from relay.simulator.rest import ChatsApi
from relay.simulator.state import Chat, Clock, Database, ModelConfig, TiedRows, User
from relay.simulator.stream import DEFAULT_SKEW, Dropped, Hub, PartLosses, Skew, Subscription, WatchSubscription

PATIENCE = Patience()
LARGEST_BODY = 64 * 1024 * 1024


@dataclass(frozen=True)
class SimulatorConfig:
    """What can be set from the start.

    Args:
        port: 0 takes a free one.
        seed: Decides ids, tokens and every throw of the dice. Times come from the clock.
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

    daemon: Daemon
    hub: Hub
    gate: Gate
    outlets: set[Outlet] = field(default_factory=set)


class Simulator:
    """A running server. Use as `async with Simulator(config) as simulator:`."""

    def __init__(self, config: SimulatorConfig | None = None) -> None:
        self.config = config or SimulatorConfig()
        if self.config.dialect not in DIALECTS:
            raise ValueError(f"unknown dialect {self.config.dialect!r}; there are: {', '.join(DIALECTS)}")
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
    ) -> None:
        """Stop the server and start it again on the same port; returns when it is up.

        Args:
            keep_data: False begins with an empty database: message ids start again from 1, users stay.
            polite: Sockets are closed with 1000 and running chats go back to pending. Otherwise the server is killed:
                sockets end abruptly, running chats go on saying so until they are recovered.
            down_seconds: Real time in which the port refuses connections.
            recovery_ms: Replaces the configured time of that name for this start.
        """
        self.faults.fired["restart"] += 1
        await self._stop(polite=polite)
        await asyncio.sleep(down_seconds)
        if not keep_data:
            self.database = self._new_database()
        self._life = self._new_life(recovery_ms)
        await self._start()

    def restart_soon(self, *, keep_data: bool, polite: bool, down_seconds: float, recovery_ms: float | None) -> None:
        """The same in the background, for a request that must be answered before the server goes."""

        async def work() -> None:
            await asyncio.sleep(0.05)
            await self.restart(keep_data=keep_data, polite=polite, down_seconds=down_seconds, recovery_ms=recovery_ms)

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
            await asyncio.gather(*[outlet.close(1000, "Connection closed") for outlet in list(life.outlets)])
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
        return database

    def _new_life(self, recovery_ms: float | None = None) -> _Life:
        self._lives += 1
        config = self.config
        recovery = config.recovery_ms if recovery_ms is None else recovery_ms
        dialect = DIALECTS[config.dialect]
        hub = Hub(dialect, self.faults)
        pace = Pace(config.speed, config.poll_ms, config.titles, recovery_ms=recovery)
        daemon = Daemon(self.database, hub, pace)
        chats = ChatsApi(self.database, daemon, dialect, self)
        limiter = RateLimiter(config.rate_limit, config.speed)
        gate = Gate(
            self.database,
            routes=[*AdminApi(self.database).routes, *CostsApi(self.database).routes, *chats.routes],
            limiter=limiter,
            organization_id=self.organization_id,
            base_url=lambda: self.url,
        )
        return _Life(daemon, hub, gate)

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
        return await self._life.gate.answer(request)

    async def _put_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Coder-Build-Version"] = BUILD_VERSION
        response.headers["X-Coder-Request-Id"] = str(UUID(int=self._dice.getrandbits(128), version=4))
        response.headers["X-Content-Type-Options"] = "nosniff"

    async def serve_stream(self, request: web.Request, chat: Chat, after_id: int) -> web.StreamResponse:
        life = self._life
        subscription = Subscription(
            chat,
            after_id,
            dialect=life.hub.dialect,
            skew=self.skew,
            speed=self.config.speed,
            dice=random.Random(self._dice.getrandbits(64)),
            losses=self.losses,
        )

        async def produce(outlet: Outlet) -> None:
            subscriptions = life.hub.streams.setdefault(chat.id, set())
            subscriptions.add(subscription)
            try:
                run = life.daemon.runs.get(chat.id)
                await subscription.run(run.buffer if run else (), outlet.send_frame)
            finally:
                subscriptions.discard(subscription)

        outlet = Outlet(chat.id, self.faults, self.config.patience)
        return await self._serve(life, outlet, request, produce)

    async def serve_watch(self, request: web.Request, user_id: UUID) -> web.StreamResponse:
        life = self._life
        watch = WatchSubscription()

        async def produce(outlet: Outlet) -> None:
            watches = life.hub.watches.setdefault(user_id, set())
            watches.add(watch)
            try:
                await watch.run(life.hub.dialect.watch_hello(), outlet.send_frame)
            finally:
                watches.discard(watch)

        return await self._serve(life, Outlet(None, self.faults, self.config.patience), request, produce)

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
        """Send `dropped messages` on streams, then nothing for ever, with the sockets open."""
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

    def poll(self, chat_id: UUID | None = None) -> None:
        """Start runs for pending chats (or for one) now, without waiting for the next poll."""
        self._life.daemon.poll(chat_id)

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
