"""Events of every type that the relay tells today, made by the code that tells them.

`python -m tests.contract_events DIRECTORY` writes one of each as the examples of the contract.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from relay.core.events import ChatRef, Event, JsonObject, MessageData
from relay.core.frames import decode_frame
from relay.core.resume import ResumePoint
from relay.core.tail import ChatTail
from relay.core.usage import Period, Policy, Price, cost_micros, reached, tokens_of
from relay.ports import ArchiveRecord, Charge, Spend
from relay.programs.archivist import archive_event
from relay.programs.meter import charged_event, limit_event, unpriced_event
from tests.core.captures import OURS, followed
from tests.core.recording import Answer, Json, load

# Short ones, and together of every type that was ever recorded.
_SHOWN = ("tool_turn", "reasoning", "edit_full_refresh", "interrupt_mid_stream", "terminal_error", "retry_mid_stream")
_NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
_DIGEST = "d2928473d6fd876aa5d0b723e6e18346a94b7abff0ed6d12a847468a9aea0644"
_PRICE = Price("lab-model", Decimal(3), Decimal(15), Decimal("0.3"))


def chat_events(path: Path) -> list[Event]:
    """What a follower told of each chat of a recording."""
    return [event for one in followed(path) for event in one.life.events]


def lifecycle_events() -> list[Event]:
    """A recorded chat is found, renamed, archived, taken back, and deleted."""
    row = _recorded_row()
    tail = ChatTail(_ref(row), 1, ResumePoint())
    deeds: tuple[Json, ...] = ({}, {"title": "Another title"}, {"archived": True}, {"archived": False})
    told: list[Event] = []
    for hour, changes in enumerate(deeds):
        row = {**row, **changes}
        told += tail.discovered(row, _NOON + timedelta(hours=hour)).events
    return told + tail.gone(row, _NOON + timedelta(hours=len(deeds))).events


def events_never_recorded() -> list[Event]:
    """A stream that dies although its socket lives, and the kinds of parts that no recording holds."""
    row = _recorded_row()
    tail = ChatTail(_ref(row), 1, ResumePoint())
    tail.connected(0)
    parts: tuple[Json, ...] = (
        {"type": "source", "source_id": "1", "url": "https://example.com/", "title": "Example"},
        {"type": "file", "media_type": "image/png", "file_id": "0c7ff4b2-64b9-4a3f-9a1c-0d6b7c1f3f55"},
        {"type": "file-reference", "file_name": "main.go", "start_line": 1, "end_line": 9, "content": "package main"},
        {"type": "weather", "degrees": 21},
    )
    frames: list[list[Json]] = [
        [{"type": "status", "status": {"status": "running"}}],
        *([{"type": "message_part", "message_part": {"role": "assistant", "part": part}}] for part in parts),
        [{"type": "error", "error": {"message": "dropped messages"}}],
    ]
    told: list[Event] = []
    for events in frames:
        frame = {"type": "data", "data": [{"chat_id": row["id"], **event} for event in events]}
        told += tail.feed(decode_frame(json.dumps(frame)), _NOON).events
    return told


def usage_events(message: Event) -> Iterator[Event]:
    """What the meter tells of an assistant's message: with a price and without, below a limit and above."""
    upstream = cast(MessageData, message.data)["message"]
    usage = upstream.get("usage")
    if not isinstance(usage, dict):
        return
    tokens = tokens_of(usage)
    at = datetime.fromisoformat(message.time)
    for price in (_PRICE, None):
        charge = Charge(
            chat=message.chat,
            message_id=cast(int, upstream["id"]),
            at=at,
            model=_PRICE.model,
            input_tokens=tokens["input"],
            output_tokens=tokens["output"],
            reasoning_tokens=tokens["reasoning"],
            cache_read_tokens=tokens["cache_read"],
            cache_write_tokens=tokens["cache_write"],
            cost_micros=cost_micros(tokens, price),
        )
        yield charged_event(message, charge, price)
    cost = cost_micros(tokens, _PRICE) or 0
    for scope in ("user", "deployment"):
        policy = Policy("daily", scope, Period.DAY, limit_micros=cost or 1)
        spend = Spend(cost_micros=cost, charges=1, unpriced=0, last_message_ids=[cast(int, upstream["id"])])
        for level in reached(policy, cost):
            yield limit_event(policy, level, spend, message, policy.period.bounds(at))
        blind = Spend(cost_micros=cost // 3, charges=2, unpriced=1, last_message_ids=spend.last_message_ids)
        yield unpriced_event(policy, charge, blind, message, policy.period.bounds(at))


def archive_events(chat: ChatRef, messages: Sequence[JsonObject]) -> Iterator[Event]:
    """What the archivist tells of a chat with these messages: good and bad."""
    ids = [cast(int, message["id"]) for message in messages]
    folder = f"file:///var/lib/relay/archive/coder.test/{chat.owner_id}/{chat.chat_id}/v0001"
    record = ArchiveRecord(
        chat=chat,
        version=1,
        url=f"{folder}/transcript.jsonl.zst",
        manifest_url=f"{folder}/manifest.json",
        sha256=_DIGEST,  # a real one would change with the version of the compressor
        size=578,
        messages=len(ids),
        first_id=min(ids, default=None),
        last_id=max(ids, default=None),
        stored_at=_NOON,
        published=False,
        sealed=False,
    )
    yield archive_event(record, "stored")
    yield archive_event(record, "sealed")
    yield archive_event(record, "failed", reason=f"read back sha256 {_DIGEST[::-1]}")


def examples() -> dict[str, Event]:
    """One event of each kind by its name: the first three words of its routing key."""
    told = [event for name in _SHOWN for event in chat_events(OURS / "d0" / f"{name}.jsonl")]
    told += chat_events(OURS / "d0" / "queue_and_promote.jsonl")
    told += lifecycle_events() + events_never_recorded()
    messages = [event for event in chat_events(OURS / "d0" / "tool_turn.jsonl") if event.event == "message"]
    told += [each for event in messages for each in usage_events(event)]
    told += archive_events(messages[0].chat, [cast(MessageData, event.data)["message"] for event in messages])
    found: dict[str, Event] = {}
    for event in told:
        found.setdefault(".".join(event.routing_key.split(".")[:3]).removesuffix("._"), event)
    return found


def text_of(event: Event) -> str:
    """The whole event as a file for a person to read."""
    return json.dumps(event.envelope(), indent=2, ensure_ascii=False) + "\n"


def _recorded_row() -> Json:
    """A Chat as REST gave it."""
    for chat in load(OURS / "d0" / "title_and_model_changes.jsonl").values():
        for _, what in chat.happened:
            if isinstance(what, Answer) and what.method == "GET" and not what.path:
                return what.body
    raise AssertionError("the recording holds no chat")


def _ref(row: dict[str, Any]) -> ChatRef:
    return ChatRef("http://coder.test", UUID(row["id"]), UUID(row["owner_id"]), UUID(row["root_chat_id"]))


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, event in examples().items():
        (directory / f"{name}.json").write_bytes(text_of(event).encode())
