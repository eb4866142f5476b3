"""What was measured, as a person reads it: tables for a terminal or in Markdown, and the bars for the figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Row: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure is held against."""

    text: str
    met: Callable[[Sequence[Row]], bool | None]  # None: it was not measured


@dataclass(frozen=True, slots=True)
class Table:
    """How the rows of one measurement are shown: columns by their key, and the bars."""

    title: str
    columns: Mapping[str, str]
    bars: Sequence[Bar] = ()


def _publisher(rows: Sequence[Row], name: str, key: str) -> float | None:
    value = next((row.get(key) for row in rows if row["publisher"] == name), None)
    return float(value) if isinstance(value, int | float) else None


def _pipelined(key: str, least: float) -> Callable[[Sequence[Row]], bool | None]:
    def met(rows: Sequence[Row]) -> bool | None:
        value = _publisher(rows, "pipelined", key)
        return None if value is None else value >= least

    return met


def _each(key: str, ok: Callable[[float], bool], **where: object) -> Callable[[Sequence[Row]], bool | None]:
    def met(rows: Sequence[Row]) -> bool | None:
        values = [row[key] for row in rows if where.items() <= row.items()]
        return all(ok(float(str(value))) for value in values) if values else None

    return met


TABLES: Mapping[str, Table] = {
    "publish": Table(
        "Confirmed persistent messages of about 1.2 KB into one quorum queue (medians)",
        {
            "publisher": "publisher",
            "per_second": "messages/s",
            "percent_of_raw": "% of raw socket",
            "per_cpu_second": "messages per CPU-second",
            "times_faststream": "× FastStream",
        },
        (
            Bar("pipelined: at least 60 % of the raw socket", _pipelined("percent_of_raw", 60)),
            Bar("pipelined: at least 3 × FastStream", _pipelined("times_faststream", 3)),
            Bar("pipelined: at least 100,000 messages per CPU-second", _pipelined("per_cpu_second", 100_000)),
        ),
    ),
    "decode": Table(
        "From a frame to the bytes of its events, no sockets",
        {
            "kind": "frames of",
            "bytes_per_frame": "bytes per frame",
            "frames_per_cpu_second": "frames per CPU-second",
            "events_per_cpu_second": "events per CPU-second",
            "json_frames_per_cpu_second": "json.loads + dumps alone",
            "times_json": "cost, × json",
        },
    ),
    "relay": Table(
        "The whole path: `message` frames in, confirmed events out, one process",
        {
            "path": "path",
            "chats": "chats",
            "database": "database",
            "events_per_second": "events/s",
            "events_per_cpu_second": "events per CPU-second",
            "times_the_cpu_of_libraries": "CPU time, × libraries",
            "worker_cpu_share": "cores it used",
            "worker_resident_mib": "its MiB",
        },
        (
            Bar(
                "at least 25,000 events per CPU-second of the worker",
                _each("events_per_cpu_second", lambda value: value >= 25_000, path="worker"),
            ),
        ),
    ),
    "sockets": Table(
        "Chats that are followed while nothing happens in them",
        {
            "chats": "chats",
            "kib_per_chat": "KiB per chat",
            "websockets_alone_kib": "websockets alone, KiB",
            "worker_mib": "worker MiB",
            "idle_cpu_percent": "% of a core, idle",
            "seconds_to_follow_all": "s until all are followed",
        },
        (
            Bar(
                "at most 40 KiB for each of 5,000 chats",
                _each("kib_per_chat", lambda value: value <= 40, chats=5000),
            ),
            Bar(
                "less than 3 % of a core with 1,000 idle chats",
                _each("idle_cpu_percent", lambda value: value < 3, chats=1000),
            ),
        ),
    ),
    "known": Table(
        "Many chats are known, few are running",
        {
            "known": "known",
            "live": "running",
            "sockets_opened": "sockets",
            "first_sweep_seconds": "first sweep, s",
            "later_sweep_seconds": "later sweeps, s",
            "worker_mib": "worker MiB",
            "worker_peak_mib": "peak MiB",
        },
        (
            Bar("a sweep takes less than 30 s", _each("later_sweep_seconds", lambda value: value < 30)),
            Bar(
                "a socket for each running chat, and no other",
                lambda rows: all(row["sockets_opened"] == row["live"] for row in rows) if rows else None,
            ),
        ),
    ),
    "failover": Table(
        "`kill -9` of the worker that holds most chats, until each speaks again in a higher session",
        {
            "round": "round",
            "chats": "chats held",
            "first_seconds": "first, s",
            "median_seconds": "median, s",
            "last_seconds": "last, s",
        },
        (Bar("every chat within 15 s", _each("last_seconds", lambda value: value < 15)),),
    ),
    "latency": Table(
        "From a frame on the socket to the broker's confirm of its event, and to a consumer, at half load",
        {
            "chats": "chats",
            "full_events_per_second": "full load, events/s",
            "events_per_second": "half load, events/s",
            "confirm_p50_ms": "confirm p50, ms",
            "confirm_p99_ms": "confirm p99, ms",
            "percent_within_250_ms": "% within 250 ms",
            "consumer_p50_ms": "consumer p50, ms",
            "consumer_p99_ms": "consumer p99, ms",
            "consumer_max_ms": "longest, ms",
        },
        (Bar("confirm: p99 below 250 ms", _each("percent_within_250_ms", lambda value: value > 99)),),
    ),
}


def machine_line(machine: Mapping[str, object]) -> str:
    """All that is known of the machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def as_text(results: Mapping[str, Sequence[Row]], machine: Mapping[str, object]) -> str:
    """Tables for a terminal."""
    parts: list[str] = []
    for name, rows in results.items():
        table = TABLES[name]
        cells = [list(table.columns.values()), *(_cells(table, row) for row in rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(table.columns))]
        parts.append(f"{name}: {table.title}")
        parts += [
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
        ]
        parts += [f"  {verdict}: {text}" for verdict, text in _verdicts(table, rows)]
        parts.append("")
    return "\n".join([*parts, machine_line(machine)])


def as_markdown(results: Mapping[str, Sequence[Row]], machine: Mapping[str, object]) -> str:
    """The same for a document."""
    parts: list[str] = []
    for name, rows in results.items():
        table = TABLES[name]
        parts += [f"### {name}", "", f"{table.title}.", ""]
        parts += [_line(table.columns.values()), _line("---:" for _ in table.columns)]
        parts += [_line(_cells(table, row)) for row in rows]
        parts += ["", *(f"- {verdict}: {text}" for verdict, text in _verdicts(table, rows))]
        parts.append("")
    return "\n".join([*parts, f"Measured on: {machine_line(machine)}."])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(table: Table, row: Row) -> list[str]:
    return [_shown(row.get(key)) for key in table.columns]


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def _verdicts(table: Table, rows: Sequence[Row]) -> list[tuple[str, str]]:
    words = {True: "met", False: "NOT met", None: "not measured"}
    return [(words[bar.met(rows)], bar.text) for bar in table.bars]
