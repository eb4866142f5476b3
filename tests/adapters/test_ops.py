"""The ops port over real HTTP: from outside the process's event loop, as a probe sees it."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from structlog.testing import capture_logs

from relay.adapters.ops import Health, OpsServer, OpsSettings, announce_build, open_ops, watch_loop
from relay.core.errors import WrongSettings

ANY_PORT = OpsSettings(port=0)


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def get(server: OpsServer, path: str, method: str = "GET") -> httpx.Response:
    return httpx.request(method, f"http://{server.host}:{server.port}{path}", trust_env=False, timeout=10)


def series() -> dict[str, list[Mapping[str, str]]]:
    with open_ops(ANY_PORT, Health()) as server:
        answer = get(server, "/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {family.name: [sample.labels for sample in family.samples] for family in families}


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_process() -> None:
    names = series()
    assert "relay_event_loop_lag_seconds" in names
    assert "process_resident_memory_bytes" in names
    assert "python_info" in names


def test_the_build_is_one_series() -> None:
    announce_build("worker")
    announce_build("meter")
    (labels,) = series()["relay_build_info"]
    assert set(labels) == {"version", "revision", "python_version", "role"}
    assert labels["role"] == "meter"
    assert labels["version"][0].isdigit()
    assert labels["python_version"].startswith("3.")
    assert labels["revision"]


# --- alive ---------------------------------------------------------------------------------------------------------


def test_a_process_is_alive_until_its_loop_stands_still() -> None:
    clock = Clock()
    health = Health(stall_seconds=30, monotonic=clock)
    with open_ops(ANY_PORT, health) as server:
        clock.seconds += 30
        assert get(server, "/livez").status_code == 200
        clock.seconds += 1
        dead = get(server, "/livez")
        assert (dead.status_code, dead.json()["reasons"]) == (503, ["the event loop has not run for 31 s"])
        health.tick()
        assert get(server, "/livez").json() == {"alive": True, "reasons": []}


def test_a_task_that_ended_is_never_forgiven() -> None:
    health = Health()
    with open_ops(ANY_PORT, health) as server:
        health.died("discovery")
        health.tick()
        dead = get(server, "/livez")
    assert (dead.status_code, dead.json()["reasons"]) == (503, ["task discovery has ended"])


def test_a_dependency_that_is_down_is_no_reason_to_restart() -> None:
    health = Health(["broker"])
    health.set("broker", ok=False, reason="refused")
    with open_ops(ANY_PORT, health) as server:
        assert get(server, "/livez").status_code == 200


async def test_a_blocked_event_loop_is_told() -> None:
    answers: list[httpx.Response] = []
    clock = Clock()
    with open_ops(ANY_PORT, Health(stall_seconds=5, monotonic=clock)) as server:
        clock.seconds += 6
        probe = threading.Thread(target=lambda: answers.append(get(server, "/livez")))
        probe.start()
        probe.join(timeout=10)  # here the loop is blocked until the answer is there
    assert [answer.status_code for answer in answers] == [503]


async def test_watching_the_loop_ticks_and_measures() -> None:
    def total() -> tuple[float, float]:
        values = [REGISTRY.get_sample_value(f"relay_event_loop_lag_seconds_{one}") for one in ("count", "sum")]
        return values[0] or 0.0, values[1] or 0.0

    clock = Clock()
    health = Health(stall_seconds=5, monotonic=clock)
    clock.seconds += 6
    count, lag = total()
    watch = asyncio.create_task(watch_loop(health, interval_seconds=0.01))
    await asyncio.sleep(0)  # it has started its first interval
    time.sleep(0.2)  # what must not happen
    async with asyncio.timeout(10):
        while health.why_dead():
            await asyncio.sleep(0)
    watch.cancel()
    assert total()[0] == count + 1
    assert total()[1] >= lag + 0.15


# --- ready ---------------------------------------------------------------------------------------------------------


def test_a_process_is_ready_when_all_it_needs_is_there() -> None:
    clock = Clock()
    health = Health(["broker", "database"], monotonic=clock)
    with open_ops(ANY_PORT, health) as server:
        first = get(server, "/readyz")
        assert first.status_code == 503
        assert first.json() == {
            "ready": False,
            "dependencies": {
                "broker": {"ok": False, "reason": "not connected yet", "seconds": 0.0},
                "database": {"ok": False, "reason": "not connected yet", "seconds": 0.0},
            },
        }
        health.set("broker", ok=True)
        assert get(server, "/readyz").status_code == 503
        health.set("database", ok=True)
        assert get(server, "/readyz").status_code == 200
        clock.seconds += 5
        health.set("coder", ok=False, reason="503: AI Gateway must be enabled")
        clock.seconds += 2
        health.set("coder", ok=False, reason="timeout")
        last = get(server, "/readyz")
    assert last.status_code == 503
    assert last.json()["dependencies"] == {
        "broker": {"ok": True, "reason": "", "seconds": 7.0},
        "coder": {"ok": False, "reason": "timeout", "seconds": 2.0},
        "database": {"ok": True, "reason": "", "seconds": 7.0},
    }


def test_a_change_is_logged_once() -> None:
    health = Health(["broker"])
    with capture_logs() as logs:
        for reason in ("refused", "refused", "still refused"):
            health.set("broker", ok=False, reason=reason)
        health.set("broker", ok=True)
        health.set("broker", ok=True)
        health.set("broker", ok=False, reason="refused")
    assert [(entry["event"], entry["log_level"], entry.get("reason")) for entry in logs] == [
        ("dependency_down", "warning", "refused"),  # also the first one: who waits at the start says for what
        ("dependency_up", "info", None),
        ("dependency_down", "warning", "refused"),
    ]


# --- status, and everything else -----------------------------------------------------------------------------------


def test_status_is_made_when_asked() -> None:
    chats: list[str] = []
    with open_ops(ANY_PORT, Health(), lambda: {"chats": list(chats)}) as server:
        assert get(server, "/status").json() == {"chats": []}
        chats.append("one")
        answer = get(server, "/status")
    assert answer.json() == {"chats": ["one"]}
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/livez/", 404),
        ("GET", "/metrics/x", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/status?verbose=1", 200),
        ("HEAD", "/livez", 200),
        ("POST", "/livez", 405),
        ("DELETE", "/status", 405),
    ],
)
def test_other_requests(method: str, path: str, status: int) -> None:
    with open_ops(ANY_PORT, Health()) as server:
        answer = get(server, path, method)
    assert answer.status_code == status
    if method == "HEAD":
        assert answer.content == b""
    else:
        json.loads(answer.content)


def test_nothing_is_printed_for_a_request(capfd: pytest.CaptureFixture[str]) -> None:
    with open_ops(ANY_PORT, Health()) as server:
        get(server, "/livez")
        get(server, "/nothing")
    assert capfd.readouterr() == ("", "")


# --- the port ------------------------------------------------------------------------------------------------------


def test_the_port_is_free_again_afterwards() -> None:
    with open_ops(ANY_PORT, Health()) as first:
        pass
    with open_ops(OpsSettings(port=first.port), Health()) as second:
        assert second.port == first.port
        assert get(second, "/livez").status_code == 200
    assert not [thread for thread in threading.enumerate() if thread.name == "ops"]


def test_nothing_is_done_until_somebody_asks() -> None:
    with open_ops(ANY_PORT, Health()) as ops:
        get(ops, "/livez")
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "ops"]
        time.sleep(0.1)  # until it sleeps as well
        before = wakings(thread)
        time.sleep(0.5)
        assert wakings(thread) == before


def wakings(thread: threading.Thread) -> int:
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(re.findall(r"\nvoluntary_ctxt_switches:\t(\d+)", status)[0])


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with open_ops(OpsSettings(host="::1", port=0), Health()) as server:
        assert get(OpsServer("[::1]", server.port), "/livez").status_code == 200


def test_a_port_in_use_is_told() -> None:
    with (
        open_ops(ANY_PORT, Health()) as server,
        pytest.raises(WrongSettings, match=f"port {server.port} .* in use.*RELAY_OPS__PORT"),
        open_ops(OpsSettings(port=server.port), Health()),
    ):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_this_machine_is_told(host: str) -> None:
    with pytest.raises(WrongSettings, match=f"RELAY_OPS__HOST={host}"), open_ops(OpsSettings(host=host), Health()):
        pass


@pytest.mark.parametrize("values", [{"port": 65536}, {"port": -1}, {"stall_seconds": 0}, {"prt": 1}])
def test_wrong_settings(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OpsSettings.model_validate(values)
