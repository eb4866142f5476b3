"""Figures as a person reads them, and what they are held against."""

import pytest

from relay.bench.report import TABLES, Row, as_markdown, as_text

MACHINE = {"cpu": "Model X", "cores": 2}


def publisher(name: str, **figures: object) -> Row:
    return {
        "publisher": name,
        "per_second": 1,
        "percent_of_raw": 1,
        "per_cpu_second": 1,
        "times_faststream": 1,
        **figures,
    }


def verdicts(name: str, rows: list[Row]) -> list[str]:
    lines = as_markdown({name: rows}, MACHINE).splitlines()
    return [line.removeprefix("- ").partition(":")[0] for line in lines if line.startswith("- ")]


GOOD = publisher("pipelined", percent_of_raw=60, per_cpu_second=100_000, times_faststream=3.0)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        pytest.param("publish", [publisher("plain"), GOOD], ["met"] * 3, id="at the bar"),
        pytest.param(
            "publish", [publisher("plain", percent_of_raw=99)], ["not measured"] * 3, id="others do not count"
        ),
        pytest.param("publish", [{**GOOD, "per_cpu_second": 99_999}], ["met", "met", "NOT met"], id="below one"),
        pytest.param(
            "publish", [{**GOOD, "times_faststream": None}], ["met", "not measured", "met"], id="no FastStream"
        ),
        pytest.param("relay", [{"path": "worker", "events_per_cpu_second": 25_000}], ["met"], id="whole path"),
        pytest.param(
            "relay",
            [{"path": "libraries alone", "events_per_cpu_second": 9}],
            ["not measured"],
            id="libraries alone",
        ),
        pytest.param(
            "relay", [{"path": "worker", "events_per_cpu_second": 24_999}], ["NOT met"], id="whole path too slow"
        ),
        pytest.param(
            "sockets",
            [
                {"chats": 1000, "kib_per_chat": 90.0, "idle_cpu_percent": 2.9},
                {"chats": 5000, "kib_per_chat": 40.0, "idle_cpu_percent": 9.0},
            ],
            ["met", "met"],
            id="each bar has its number of chats",
        ),
        pytest.param(
            "sockets", [{"chats": 7, "kib_per_chat": 1, "idle_cpu_percent": 1}], ["not measured"] * 2, id="few"
        ),
        pytest.param(
            "known", [{"later_sweep_seconds": 30.0, "sockets_opened": 501, "live": 500}], ["NOT met"] * 2, id="known"
        ),
        pytest.param(
            "failover", [{"last_seconds": 3.0}, {"last_seconds": 15.0}], ["NOT met"], id="the worst round counts"
        ),
        pytest.param("latency", [{"percent_within_250_ms": 99.0}], ["NOT met"], id="latency"),
    ],
)
def test_bars(name: str, rows: list[Row], expected: list[str]) -> None:
    assert verdicts(name, rows) == expected


def test_a_table_has_a_cell_for_every_column() -> None:
    rows = [publisher("raw", per_second=12_345, times_faststream=None), publisher("faststream")]
    lines = [line for line in as_markdown({"publish": rows}, MACHINE).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| raw | 12,345 | 1 | 1 | – |"
    assert len(lines) == 4


@pytest.mark.parametrize("name", TABLES)
def test_the_machine_and_the_title_are_told(name: str) -> None:
    for text in (as_text({name: []}, MACHINE), as_markdown({name: []}, MACHINE)):
        assert TABLES[name].title in text
        assert "cpu Model X, cores 2" in text


def test_columns_stand_below_each_other() -> None:
    head, *rows = as_text(
        {"decode": [{"kind": "messages"}, {"kind": "x", "times_json": 10_000.5}]}, MACHINE
    ).splitlines()[1:4]
    assert {len(line) for line in rows} == {len(head)}
