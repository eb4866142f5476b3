"""What Coder speaks, as a person and a monitor see it: `relay check`, `/status`, `/metrics`."""

import asyncio
import json
from pathlib import Path

import aiohttp
import pytest

from relay.simulator import Simulator, SimulatorConfig
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import Owner
from tests.e2e.processes import START_SECONDS, Relay, finished, running

SPEAKS = {
    "d0": "prefix experimental, frames in envelopes, errors as text, no read marks, flat list, native limits",
    "d2": "prefix experimental, errors as objects, read marks, list of roots, ascending message pages, sharing, "
    "native limits",
    "d3ga": "prefix v2, errors as objects, read marks, list of roots, ascending message pages, sharing, "
    "resume by revision, no native limits",
}
SAID = {
    "d0": (
        "has spend limits of its own; models cost what RELAY_METER__PRICES says, else what Coder says",
        "deletes archived chats: never by itself, or it does not say",
    ),
    "d2": (
        "has spend limits of its own; models cost what RELAY_METER__PRICES says, else what Coder says",
        "deletes archived chats: after 30 days in the archive",
    ),
    "d3ga": (
        "has no spend limits of its own; models cost what RELAY_METER__PRICES says",
        "archives chats: never by itself",
    ),
}


async def talk(simulator: Simulator) -> None:
    prefix = DIALECTS[simulator.config.dialect].features.prefixes[0]
    async with aiohttp.ClientSession() as session:
        model = simulator.model_configs[0].id
        owner = Owner(session, simulator.url, simulator.users["ann"], model, 50, prefix=lambda: prefix)
        chat = await owner.create("[text n=3 ms=1] hello")
        await owner.wait_idle(chat)


def settings_for(simulator: Simulator, directory: Path) -> dict[str, str]:
    return {
        "RELAY_CODER__URL": simulator.url,
        "RELAY_CODER__TOKEN": simulator.users["ann"].token,
        "RELAY_DATABASE__URL": f"sqlite:///{directory}/relay.db",
    }


@pytest.mark.parametrize("dialect", SAID)
async def test_check_says_what_coder_speaks_has_and_lacks(dialect: str, tmp_path: Path) -> None:
    async with Simulator(SimulatorConfig(dialect=dialect, speed=50)) as simulator:
        await talk(simulator)
        settings = settings_for(simulator, tmp_path)
        _, output, errors = await finished("check", settings=settings)
        speaks = f"speaks {dialect} ({SPEAKS[dialect]}, AI Gateway budgets absent)"
        for line in (speaks, *SAID[dialect]):
            assert f"{'':15} {line}" in output.splitlines()
        assert errors == ""
        _, output, _ = await finished("check", "--json", settings=settings)
    coder = json.loads(output)["coder"]
    assert (coder["ok"], coder["dialect"]) == (True, dialect)
    assert coder["evidence"]["prefix"] == ("v2" if dialect == "d3ga" else "experimental")
    assert coder["retention"] == (
        {"archived_chats_days": None, "auto_archive_days": None}
        if dialect == "d0"
        else {"archived_chats_days": 30, "auto_archive_days": 0}
    )


async def spoken(worker: Relay, dialect: str) -> dict[str, object]:
    """What `/status` says of Coder once it says that it speaks this."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            coder: dict[str, object] = (await worker.ask("/status")).json().get("coder") or {}
            if coder.get("dialect") == dialect:
                return coder
            await asyncio.sleep(0.05)


async def test_a_worker_shows_what_coder_speaks(rabbit_vhost: str, tmp_path: Path) -> None:
    async with Simulator(SimulatorConfig(dialect="d2", speed=50)) as simulator:
        await talk(simulator)
        settings = settings_for(simulator, tmp_path) | {"RELAY_RABBIT__URL": rabbit_vhost}
        settings["RELAY_WORKER__SWEEP_SECONDS"] = "0.5"
        async with running("worker", settings=settings) as worker:
            coder = await spoken(worker, "d2")
            assert isinstance(coder["evidence"], dict)
            assert coder["evidence"]["native_limits"] is True
            page = (await worker.ask("/metrics")).text
            assert 'relay_source_dialect{dialect="d2"} 1.0' in page
            assert 'relay_source_dialect{dialect="d3ga"} 0.0' in page
            await simulator.restart(polite=True, dialect="d3ga")
            await spoken(worker, "d3ga")
            told = await worker.logged("dialect_seen")
            assert await worker.terminate() == 0
    assert told["before"] in ("unknown", "d2")
