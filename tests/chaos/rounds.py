"""Run plans: some worlds at once beside one broker and one database, and judge each when everything is at rest."""

import asyncio
import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.contract import Coder, broken, chats_of, place, unfinished
from tests.chaos.plans import PLANS, Plan
from tests.chaos.stage import Broken, Run, Stage
from tests.chaos.world import World, until

ARRIVAL_SECONDS = 90.0  # for everything to arrive when nothing strikes any more; failsafe
SCRIPT_SECONDS = 90.0
WARM_DELIVERIES = 30


@dataclass
class Result:
    """What became of a run. `lines` say what is wrong; `fired` how often each fault struck."""

    run: Run
    directory: Path
    lines: list[str] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    deeds: Counter[str] = field(default_factory=Counter)
    events: int = 0
    copies: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)  # seconds that each took

    def phase(self, name: str) -> None:
        """This one has ended."""
        self.phases[name] = time.monotonic() - self._began - sum(self.phases.values())

    def __post_init__(self) -> None:
        self._began = time.monotonic()

    @property
    def good(self) -> bool:
        return not self.lines


async def run_round(stage: Stage, runs: Sequence[Run]) -> list[Result]:
    """All these at once. What strikes all of them is the first plan's: put such plans into rounds of their own."""
    shared = {PLANS[run.plan].shared for run in runs}
    assert len(shared) == 1, "a fault of all worlds strikes all of them"
    warm = asyncio.Barrier(len(runs) + 1)
    struck = asyncio.Event()
    results = [Result(run, stage.directory / f"{run.plan}-{run.seed}-{run.dialect}") for run in runs]
    worlds: list[World] = []

    async def strike() -> None:
        try:
            await warm.wait()
            if (fault := next(iter(shared))) is not None and worlds:
                dice = random.Random(f"{runs[0].plan}:{runs[0].seed}:shared")
                await asyncio.sleep(dice.uniform(0, 1.0))
                await fault(stage.servers, list(worlds), dice)
        except Broken as exc:
            for result in results:
                result.lines.append(f"for all: {exc}")
        finally:
            struck.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(strike())
        for result in results:
            group.create_task(_run(stage, result, worlds, warm, struck))
    return results


async def _run(stage: Stage, result: Result, worlds: list[World], warm: asyncio.Barrier, struck: asyncio.Event) -> None:
    started = time.monotonic()
    run = result.run
    plan = PLANS[run.plan]
    shutil.rmtree(result.directory, ignore_errors=True)
    opening = World.open(run, stage, result.directory)
    arrived = False
    async with opening as world:
        try:
            result.phase("open")
            for _ in range(world.dice.choice((2, 2, 3))):
                await world.start_worker()
            result.phase("start")
            script = asyncio.create_task(world.script.run())
            try:
                await until(
                    lambda: len(world.inbox.deliveries) > WARM_DELIVERIES or script.done(),
                    lambda: f"only {len(world.inbox.deliveries)} events came",
                )
                worlds.append(world)
                arrived = True
                await warm.wait()
                result.phase("warm")
                await asyncio.sleep(world.dice.uniform(0, 1.0))
                if plan.local is not None:
                    await plan.local(world)
                await struck.wait()
                result.phase("strike")
                world.note("nothing strikes any more")
                world.script.stop()
                await _ends(world, script)
                result.phase("talk")
            finally:
                script.cancel()
                await asyncio.wait([script])
            result.lines += await _judge(world, plan, result)
        except Broken as exc:
            result.lines.append(str(exc))
            if not arrived:
                await warm.wait()  # the others wait for us
        finally:
            if world in worlds:
                worlds.remove(world)
        result.fired, result.deeds = world.fired, world.script.done
        durable = [each for each in world.inbox.deliveries if each.persistent]
        result.events = len({each.event["id"] for each in durable})
        result.copies = len(durable) - result.events
        result.seconds = time.monotonic() - started
        if result.lines:
            await _keep(world, result)
    if result.good:
        shutil.rmtree(result.directory, ignore_errors=True)


async def _ends(world: World, script: "asyncio.Task[None]") -> None:
    _, waiting = await asyncio.wait([script], timeout=SCRIPT_SECONDS)
    if waiting:
        raise Broken(f"the owner's script does not end; done {dict(world.script.done)}, busy {world.busy()}")
    script.result()
    await until(world.simulator.is_idle, lambda: f"Coder is not idle: {world.busy()}")


async def _judge(world: World, plan: Plan, result: Result) -> list[str]:
    """Wait until everything is at rest, then say what is wrong."""
    world.heal()
    if not world.living:
        await world.start_worker()
    deadline = time.monotonic() + ARRIVAL_SECONDS
    truth = await world.truth()
    lines = ["never judged"]
    while lines and time.monotonic() < deadline:
        await asyncio.sleep(0.25)
        if world.reads_log:
            world.fired["read from the log"] = await world.inbox.read_log()
        lines = unfinished(world.inbox.deliveries, truth)
    at_rest: list[str] = []
    result.phase("arrive")
    if lines:
        await world.keep_evidence()
    if not lines:
        at_rest = await _rest(world, deadline)
    result.phase("rest")
    if world.reads_log:
        await world.inbox.read_log()
    lines = unfinished(world.inbox.deliveries, truth) + at_rest
    # On a busy machine a lease may run out though nobody struck: then a session ends as in a crash.
    lost = world.logged("claim_lost") + world.logged("lease_lost")
    crashes = plan.crashes or lost > 0 or world.hurried
    lines += broken(world.inbox.deliveries, truth, crashes=crashes, unbound=world.reads_log)
    lines += _stale(world)
    lines += await _ledger(world)
    lines += await _end(world)
    result.phase("end")
    return lines


async def _rest(world: World, deadline: float) -> list[str]:
    """Everybody has let go of every chat: nothing more can come. What is there by then was told."""

    async def nothing_goes_on() -> bool:
        return not any((await world.following()).values()) and await world.metric("relay_publish_inflight") == 0

    def what() -> str:
        return "chats are never let go, or messages wait for a confirm that does not come"

    try:
        await until(nothing_goes_on, what, seconds=max(5.0, deadline - time.monotonic()))
    except Broken as exc:
        return [str(exc)]
    return []


def _stale(world: World) -> list[str]:
    """Who was frozen past its lease finishes a sentence and says no more."""
    lines = []
    for moment in world.woken:
        limit = moment + world.lease_seconds + 5.0
        for chat in chats_of(world.inbox.deliveries).values():
            highest = 0
            for each in chat.deliveries:
                session = place(each)[0]
                highest = max(highest, session)
                if session < highest and each.at > limit and each.source != "relay.log":
                    late = each.at - moment
                    lines.append(f"{chat.name}: {each.key} of session {session} {late:.1f} s after the wake-up")
    return lines


async def _ledger(world: World) -> list[str]:
    """What workers that live have counted."""
    lines = []
    for worker in world.living:
        counted = await worker.metrics()
        events = counted.get("relay_events_published_total", 0.0)
        # Another look: one takes a while, and a message may be confirmed in the middle of it.
        confirmed = (await worker.metrics()).get("relay_publish_total{outcome=confirmed}", 0.0)
        if not events <= confirmed:
            lines.append(f"{worker.name}: {events:g} events published, {confirmed:g} confirmed")
        if unreadable := counted.get("relay_decode_errors_total"):
            lines.append(f"{worker.name}: {unreadable:g} frames could not be read")
    if len(world.living) == len(world.workers) and not world.reads_log:
        durable = await world.metric("relay_events_published_total") - await world.metric(
            "relay_events_published_total{family=preview}"
        )
        came = sum(each.persistent for each in world.inbox.deliveries)
        if durable > came:
            lines.append(f"{durable:g} durable events are said to be confirmed, {came} came")
    return lines


async def _end(world: World) -> list[str]:
    """Who lives ends in good order; nobody leaves a traceback behind; who died was to die."""
    lines = []
    for worker in world.living:
        worker.expected = 0
        worker.child.send(signal.SIGTERM)
    for worker in world.workers:
        try:
            await asyncio.wait_for(worker.child.ended.wait(), world.grace_seconds)
        except TimeoutError:
            lines.append(f"{worker.name} runs {world.grace_seconds:g} s after SIGTERM")
            continue
        if worker.child.code != worker.expected:
            lines.append(f"{worker.name} ended with {worker.child.code}")
        lines += [f"{worker.name}: {line}" for line in _complaints(worker.log.read_text(errors="replace"))]
    return lines


def _complaints(log: str) -> list[str]:
    """Tracebacks through the relay's own code. Libraries leave tasks behind on connections that break: not judged."""
    lines = []
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            if "Traceback" in line:
                lines.append("Traceback in its log")
            continue
        if "/relay/" in event.get("exception", ""):
            lines.append(f"Traceback in its log: {event['exception'].splitlines()[-1]}")
    return lines


async def _keep(world: World, result: Result) -> None:
    """What there is to find out why."""
    directory = result.directory
    with (directory / "deliveries.jsonl").open("w") as file:
        for each in world.inbox.deliveries:
            file.write(json.dumps(asdict(each)) + "\n")
    truth: dict[str, Coder] = await world.truth()
    (directory / "coder.json").write_text(json.dumps({name: asdict(chat) for name, chat in truth.items()}, indent=1))
    script = {"done": world.script.done, "refused": world.script.refused, "chats": list(map(str, world.script.made))}
    about = {"run": str(result.run), "wrong": result.lines, "fired": world.fired, "script": script}
    about["journal"] = world.journal
    proxies = {name: getattr(world, name).fired for name in ("coder", "rabbit", "database")}
    (directory / "result.json").write_text(json.dumps({**about, "proxies": proxies}, indent=1))
