"""From a frame to the bytes of its events, without any socket: what the pure core costs."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from relay.bench.samples import message_frames, preview_frames, snapshot_frames, tail_of_one_chat
from relay.core.frames import FrameReader

Say = Callable[[str], None]
_NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
_TURNS, _PARTS, _HISTORY = 100, 3000, 1000


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    seconds: float = 2.0  # of CPU time for each row


@dataclass(slots=True)
class _Cost:
    frames: int = 0
    events: int = 0
    out: int = 0  # bytes
    seconds: float = 0.0


def measure_decode(options: DecodeOptions, say: Say) -> list[dict[str, object]]:
    """One row for each kind of frame; the yardstick is `json.loads` and `json.dumps` of the same text."""
    rows: list[dict[str, object]] = []
    for kind, frames in (
        ("messages", message_frames(_TURNS)),
        ("previews", preview_frames(_PARTS)),
        ("snapshots", snapshot_frames(_HISTORY)),
    ):
        say(f"decode: {kind}")
        ours = _repeated(frames, _through_the_core, options.seconds)
        bare = _repeated(frames, _through_json, options.seconds)
        rows.append(
            {
                "kind": kind,
                "bytes_per_frame": round(sum(len(frame.encode()) for frame in frames) / len(frames)),
                "frames_per_cpu_second": round(ours.frames / ours.seconds),
                "events_per_cpu_second": round(ours.events / ours.seconds),
                "json_frames_per_cpu_second": round(bare.frames / bare.seconds),
                "times_json": round((ours.seconds / ours.frames) / (bare.seconds / bare.frames), 2),
            }
        )
    return rows


def _repeated(frames: Sequence[str], once: Callable[[Sequence[str], _Cost], None], seconds: float) -> _Cost:
    once(frames, _Cost())  # warm-up
    cost = _Cost()
    while cost.seconds < seconds:
        started = time.process_time()
        once(frames, cost)
        cost.seconds += time.process_time() - started
    return cost


def _through_the_core(frames: Sequence[str], cost: _Cost) -> None:
    """As a follower does it: decode, feed, encode, and a commit that is saved."""
    tail, read = tail_of_one_chat(), FrameReader().read
    for text in frames:
        batch = tail.feed(read(text), _NOW)
        for event in batch.events:
            cost.out += len(event.encode())
        if batch.events and not all(event.transient for event in batch.events):
            tail.commit()
        cost.events += len(batch.events)
    cost.frames += len(frames)


def _through_json(frames: Sequence[str], cost: _Cost) -> None:
    for text in frames:
        cost.out += len(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")).encode())
    cost.events += len(frames)
    cost.frames += len(frames)
