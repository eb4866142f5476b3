"""From settings to running programs: adapters on one exit stack, signals, health. One function per process."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import structlog

from relay.adapters.archive import open_objects
from relay.adapters.clock import SystemClock
from relay.adapters.coder_accounts import CoderAccounts, open_accounts
from relay.adapters.ops import Health, announce_build, open_ops, watch_loop
from relay.adapters.rabbit import RabbitBus, open_rabbit
from relay.adapters.store import SqlStore, open_store
from relay.core.backoff import backoff
from relay.core.errors import Unauthorized, Unavailable, WrongSettings
from relay.ports import ObjectStore
from relay.programs.archivist import Archivist
from relay.programs.chance import Chance
from relay.programs.meter import Meter
from relay.programs.worker import Worker
from relay.settings import Settings

log = structlog.get_logger(__name__)
T = TypeVar("T")
Report = Callable[[bool, str], None]

ROLES = ("worker", "meter", "archivist")
_CHECK_SECONDS = 5.0
_SURVEY_SECONDS = 60.0  # how old what is known of Coder may be after it was upgraded


@dataclass(frozen=True, slots=True)
class Opened:
    """The adapters that a process needs. `upstream` and `objects` are None where its roles do without."""

    bus: RabbitBus
    store: SqlStore
    upstream: CoderAccounts | None
    objects: ObjectStore | None


class Stopping(Exception):
    """A signal asked the process to end."""


async def run_roles(settings: Settings, roles: tuple[str, ...]) -> None:
    """Run the programs until SIGTERM or SIGINT. What they need is waited for; what they find wrong ends the process.

    Raises:
        WrongSettings: A setting is missing or cannot work.
    """
    _refuse_missing(settings, roles)
    announce_build(roles[0] if len(roles) == 1 else "run")
    dependencies = ["broker", "database", *(["coder"] if "worker" in roles else [])]
    health = Health(dependencies, stall_seconds=settings.ops.stall_seconds)
    status: dict[str, object] = {"roles": list(roles), "dependencies": health.dependencies}

    def current() -> Mapping[str, object]:
        return {name: value() if callable(value) else value for name, value in tuple(status.items())}

    with open_ops(settings.ops, health, current) as server:
        log.info("started", roles=list(roles), ops=f"http://{server.host}:{server.port}")
        await until_signalled(_run(settings, roles, health, status))
    log.info("stopped")


def _collect_seldom() -> None:
    """Spare the garbage collector what is not garbage: events have no cycles, and there are thousands a second.

    What is there by now stays for good and is looked at no more; the rest is looked at less often than by default.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


async def _run(settings: Settings, roles: tuple[str, ...], health: Health, status: dict[str, object]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(watch_loop(health), name="loop")
        async with opened(settings, roles, health) as world:
            _collect_seldom()
            group.create_task(_watch_dependencies(world, health), name="dependencies")
            async with asyncio.TaskGroup() as programs:
                for role in roles:
                    programs.create_task(_program(role, settings, world, health, status), name=role)


@asynccontextmanager
async def opened(settings: Settings, roles: tuple[str, ...], health: Health) -> AsyncIterator[Opened]:
    """Open what the roles need, waiting for what is not there yet."""
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        assert settings.rabbit is not None  # noqa: S101  # `_refuse_missing` has seen to it
        rabbit, database = settings.rabbit, settings.database
        store = await _until_there(stack, lambda: open_store(database, clock), "database", health)
        bus = await _until_there(stack, lambda: open_rabbit(rabbit), "broker", health)
        upstream = await stack.enter_async_context(open_accounts(settings.coder)) if settings.coder else None
        objects = open_objects(settings.archive) if settings.archive and "archivist" in roles else None
        yield Opened(bus, store, upstream, objects)


async def _until_there(
    stack: AsyncExitStack, open_it: Callable[[], AbstractAsyncContextManager[T]], name: str, health: Health
) -> T:
    for delay in backoff(chance=Chance()):
        try:
            there = await stack.enter_async_context(open_it())
        except Unavailable as exc:
            health.set(name, ok=False, reason=str(exc))
            await asyncio.sleep(delay)
        else:
            health.set(name, ok=True)
            return there
    raise AssertionError("backoff ended")


async def _watch_dependencies(world: Opened, health: Health) -> None:
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        for name, check in (("database", world.store.check), ("broker", world.bus.check)):
            await _check(name, check, health)
        if world.upstream is not None and world.upstream.several:
            await _check("coder accounts", world.upstream.check, health)


async def _check(name: str, check: Callable[[], Awaitable[None]], health: Health) -> None:
    try:
        await check()
    except (Unavailable, Unauthorized, WrongSettings) as exc:
        health.set(name, ok=False, reason=str(exc))
    else:
        health.set(name, ok=True)


async def _survey(upstream: CoderAccounts) -> None:
    """Keep knowing what Coder speaks. The worker does without: it is for people to see."""
    while True:
        try:
            await upstream.survey()
        except (Unavailable, Unauthorized) as exc:
            log.info("survey_failed", reason=str(exc))
        await asyncio.sleep(_SURVEY_SECONDS)


async def _program(role: str, settings: Settings, world: Opened, health: Health, status: dict[str, object]) -> None:
    clock = SystemClock()
    if role == "worker" and world.upstream is not None:
        status["coder"] = world.upstream.status
        worker = Worker(
            settings.worker.name or f"{socket.gethostname()}-{os.getpid()}",
            upstream=world.upstream,
            bus=world.bus,
            claims=world.store,
            added=world.store,
            clock=clock,
            settings=settings.worker,
            follow=settings.follow,
            report=lambda ok, reason: health.set("coder", ok=ok, reason=reason),
        )
        status["worker"] = worker.status
        async with asyncio.TaskGroup() as group:
            group.create_task(_survey(world.upstream), name="survey")
            group.create_task(worker.run(), name="worker")
    elif role == "meter":
        meter = Meter(bus=world.bus, charges=world.store, upstream=world.upstream, clock=clock, settings=settings.meter)
        status["meter"] = meter.status
        await meter.run(lambda ok, reason: health.set("meter queue", ok=ok, reason=reason))
    elif role == "archivist" and world.upstream is not None and world.objects is not None:
        archivist = Archivist(
            bus=world.bus,
            archives=world.store,
            objects=world.objects,
            upstream=world.upstream,
            clock=clock,
            settings=settings.archivist,
        )
        status["archivist"] = archivist.status
        await archivist.run(lambda ok, reason: health.set("archivist queue", ok=ok, reason=reason))


def _refuse_missing(settings: Settings, roles: tuple[str, ...]) -> None:
    missing = []
    if settings.rabbit is None:
        missing.append("RELAY_RABBIT__URL (amqp://user:password@host:5672/vhost)")
    if settings.coder is None and {"worker", "archivist"} & set(roles):
        missing.append("RELAY_CODER__URL and RELAY_CODER__TOKEN (or RELAY_CODER__TOKEN_FILE)")
    if settings.archive is None and "archivist" in roles:
        missing.append("RELAY_ARCHIVE__URL (file:///var/lib/relay/archive)")
    if missing:
        raise WrongSettings("\n".join(f"not set: {each}" for each in missing))


async def until_signalled(*services: Coroutine[None, None, object]) -> None:
    """Run services side by side until SIGTERM or SIGINT, or until one of them fails. Stopping is cancellation."""
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sig, stop.set)

    async def end_on_signal() -> None:
        await stop.wait()
        raise Stopping

    try:
        async with asyncio.TaskGroup() as group:
            for service in (*services, end_on_signal()):
                group.create_task(service)
    except* Stopping:
        log.info("stopping")
