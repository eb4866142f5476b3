"""The measurements by name, each with its options, and all of them one after the other."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from relay.bench.decode import DecodeOptions, measure_decode
from relay.bench.failover import FailoverOptions, measure_failover
from relay.bench.idle import IdleOptions, KnownOptions, measure_idle, measure_known
from relay.bench.latency import LatencyOptions, measure_latency
from relay.bench.machine import can_read_memory, machine
from relay.bench.places import Offered, versions
from relay.bench.publish import PublishOptions, measure_publish
from relay.bench.report import Row
from relay.bench.whole_path import PathOptions, measure_path
from relay.core.errors import WrongSettings

__all__ = [
    "EVERYTHING",
    "SHORT",
    "DecodeOptions",
    "FailoverOptions",
    "IdleOptions",
    "KnownOptions",
    "LatencyOptions",
    "PathOptions",
    "Plan",
    "PublishOptions",
    "measure",
]

Say = Callable[[str], None]
Rows = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, in this order; None leaves one out."""

    publish: PublishOptions | None = None
    decode: DecodeOptions | None = None
    relay: PathOptions | None = None
    sockets: IdleOptions | None = None
    known: KnownOptions | None = None
    failover: FailoverOptions | None = None
    latency: LatencyOptions | None = None


@dataclass(slots=True)
class Report:
    """All that came of a plan."""

    machine: dict[str, object]
    results: dict[str, Rows] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"machine": self.machine, "results": self.results}, indent=2) + "\n"


EVERYTHING = Plan(
    publish=PublishOptions(rounds=5, seconds=4.0),
    decode=DecodeOptions(seconds=4.0),
    relay=PathOptions(seconds=20.0),
    sockets=IdleOptions(counts=(1000, 5000), seconds=20.0),
    known=KnownOptions(),
    failover=FailoverOptions(rounds=5),
    latency=LatencyOptions(seconds=20.0),
)
# All of it within three minutes: enough to see that something became much slower, too short for figures to quote.
SHORT = Plan(
    publish=PublishOptions(rounds=1, seconds=1.5),
    decode=DecodeOptions(seconds=0.5),
    relay=PathOptions(seconds=5.0, warm_up_seconds=2.0),
    sockets=IdleOptions(counts=(100,), seconds=3.0),
    known=KnownOptions(known=1000, live=20),
    failover=FailoverOptions(chats=10, rounds=1),
    latency=LatencyOptions(chats=20, seconds=4.0, full_seconds=2.0),
)


async def measure(plan: Plan, environment: Mapping[str, str], say: Say) -> Report:
    """Carry out a plan.

    Raises:
        WrongSettings: There is no broker where one is needed, or the system cannot tell what is asked for.
        ChildFailed, Unavailable: A measurement did not come to its end.
    """
    if (plan.sockets is not None or plan.known is not None) and not can_read_memory():
        raise WrongSettings("sockets: this system does not tell how much memory a process has; it takes Linux")
    report = Report(dict(machine()))
    if plan.decode is not None:
        report.results["decode"] = measure_decode(plan.decode, say)
    if plan == Plan(decode=plan.decode):
        return report
    offered = Offered.from_environment(environment)
    if plan.failover is not None and offered.database is None:
        raise WrongSettings(
            "failover: two workers need PostgreSQL: set RELAY_DATABASE__URL, or let one be started:\n"
            "scripts/services run -- relay bench failover"
        )
    report.machine |= await versions(offered)
    if plan.publish is not None:
        report.results["publish"] = await measure_publish(offered, plan.publish, say)
    if plan.relay is not None:
        report.results["relay"] = await measure_path(offered, plan.relay, say)
    if plan.latency is not None:
        report.results["latency"] = [await measure_latency(offered, plan.latency, say)]
    if plan.failover is not None:
        report.results["failover"] = await measure_failover(offered, plan.failover, say)
    if plan.sockets is not None:
        report.results["sockets"] = await measure_idle(offered, plan.sockets, say)
    if plan.known is not None:
        report.results["known"] = [await measure_known(offered, plan.known, say)]
    return report
