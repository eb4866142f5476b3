"""A worker as `relay worker` runs it, in a process that also answers the bench (`python -m relay.bench.worker`).

Settings come from its environment, as in earnest.
"""

import asyncio
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

from prometheus_client import REGISTRY

from relay.adapters.logs import configure_logs
from relay.bench.children import allow_many_files, serve
from relay.bench.machine import resident_bytes
from relay.bench.sampling import Sampler
from relay.processes import run_roles
from relay.settings import read_settings

_COUNTERS: dict[str, tuple[str, Callable[[dict[str, str]], bool]]] = {
    "events": ("relay_events_published_total", lambda _: True),
    "refused": ("relay_publish_total", lambda labels: labels["outcome"] != "confirmed"),
    "swept": ("relay_discovery_sweeps_total", lambda labels: labels["outcome"] == "ok"),
}
_sampler = Sampler()


def counted() -> dict[str, object]:
    """CPU seconds of the process so far, and what it has done in them."""
    times = os.times()
    found = dict.fromkeys(_COUNTERS, 0.0)
    for metric in REGISTRY.collect():  # once: it costs milliseconds of what is measured
        for sample in metric.samples:
            for name, (counter, which) in _COUNTERS.items():
                if sample.name == counter and which(sample.labels):
                    found[name] += sample.value
    return {"cpu": times.user + times.system, **found}


def lags() -> dict[str, object]:
    """How many batches were confirmed within so many seconds of their oldest frame, by upper bound."""
    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    return {s.labels["le"]: s.value for s in samples if s.name == "relay_event_lag_seconds_bucket"}


def memory(*, collect: bool) -> dict[str, object]:
    """Resident bytes, shared pages by their share; with `collect`, after garbage was collected."""
    if collect:
        gc.collect()
    return {"resident": resident_bytes()}


def profile(*, start: bool, path: str = "") -> dict[str, object]:
    if start:
        _sampler.start()
    else:
        _sampler.stop()
        Path(path).write_text(_sampler.text())
    return {"samples": _sampler.samples}


async def _main() -> None:
    settings = read_settings()
    configure_logs(settings.log)
    allow_many_files()

    async def answer() -> None:
        await serve(
            {"counted": counted, "lags": lags, "memory": memory, "profile": profile}, hello={"pid": os.getpid()}
        )
        os.kill(os.getpid(), signal.SIGTERM)  # nobody asks any more: stop as in earnest

    async with asyncio.TaskGroup() as group:
        answering = group.create_task(answer())
        await run_roles(settings, ("worker",))
        answering.cancel()


if __name__ == "__main__":
    asyncio.run(_main())
