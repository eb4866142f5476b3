"""A recording of a real server as a script that can be played, and the forms in which two plays are compared."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = Any

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
D0 = CAPTURES / "d0"
CHATS = "/api/experimental/chats"

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_CALL_ID = re.compile(r"call_[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+Z")


@dataclass(frozen=True)
class Rest:
    method: str
    path: str
    request: Json
    status: int
    body: str
    who: str
    at: float = 0.0

    @property
    def answer(self) -> Json:
        return json.loads(self.body) if self.body else None

    @property
    def is_list_of_chats(self) -> bool:
        return self.method == "GET" and self.path.partition("?")[0] == CHATS


@dataclass(frozen=True)
class Socket:
    """`kind`: open, frame, closed, closed-by-us, failed."""

    name: str
    kind: str
    path: str = ""
    raw: str = ""
    code: int | None = None
    reason: str = ""
    error: str = ""
    at: float = 0.0

    @property
    def is_watch(self) -> bool:
        return self.name.startswith("watch:")

    @property
    def events(self) -> list[Json]:
        return events_of(self.raw)


@dataclass(frozen=True)
class Note:
    """Something that the recording's driver wrote down."""

    values: dict[str, Json]


Line = Rest | Socket | Note


def load(path: Path) -> list[Line]:
    """The recording's lines, each call before the frames it caused."""
    lines: list[Line] = []
    for text in path.read_text().splitlines():
        record = json.loads(text)
        if "rest" in record:
            method, _, rest_path = record["rest"].partition(" ")
            body = record.get("body") or ""
            lines.append(
                Rest(
                    method,
                    rest_path,
                    record.get("request"),
                    record["status"],
                    body,
                    record.get("as_") or "ann",
                    record["t"],
                )
            )
        elif "note" in record:
            lines.append(Note(record))
        else:
            known = {name: record[name] for name in ("path", "raw", "code", "reason", "error") if record.get(name)}
            lines.append(Socket(record["conn"], record["kind"], **known, at=record["t"]))
    return _causes_first(lines)


def _causes_first(lines: list[Line]) -> list[Line]:
    """Answers stand where they were read, often after the frames of their call: move those calls up."""
    ordered: list[Line] = []
    for line in lines:
        place = len(ordered)
        if isinstance(line, Rest) and line.method != "GET" and line.status < 300:
            place = next((i for i, frame in enumerate(ordered) if _names_what_was_made(frame, line)), place)
            # The announcements have no id of their own: look only at what stands directly before.
            while place and _announces(ordered[place - 1], line):
                place -= 1
        ordered.insert(place, line)
    return ordered


def _names_what_was_made(frame: Line, call: Rest) -> bool:
    """Whether a frame shows the chat, message or queued prompt that the call made."""
    if not isinstance(frame, Socket) or frame.kind != "frame" or not call.body:
        return False
    answer = call.answer
    made = answer.get("message") or answer.get("queued_message") or answer
    if isinstance(made, str):
        return False
    if frame.is_watch:
        return call.status == 201 and any(event["chat"]["id"] == made["id"] for event in frame.events)
    return any(made["id"] in _ids_in(event) and event["chat_id"] == made.get("chat_id") for event in frame.events)


def _announces(frame: Line, call: Rest) -> bool:
    """Whether a frame could be the status that the call set, or the watch event of an archived chat."""
    if not isinstance(frame, Socket) or frame.kind != "frame" or call.path == CHATS or call.at - frame.at > 0.1:
        return False
    chat_id = call.path.split("/")[4]
    path = call.path.partition("?")[0]
    request = call.request if isinstance(call.request, dict) else {}
    wanted: tuple[str, ...] = ("pending",)
    told: tuple[str, ...] = ()
    if path.endswith("/interrupt"):  # what was queued may go on at once
        wanted = ("waiting", "pending")
        if any(_is_prompt(event, chat_id) for event in frame.events):
            return True
    elif path.endswith("/promote") or request.get("busy_behavior") == "interrupt":  # which may come first
        wanted = ("waiting", "pending")
    elif "archived" in request:
        wanted, told = ("waiting",), ("created", "deleted")
    elif "title" in request:
        wanted, told = (), ("title_change",)
    return any(
        _status_of(event, chat_id) in wanted or (event.get("kind") in told and chat_id in _tree_of(event["chat"]))
        for event in frame.events
    )


def _is_prompt(event: Json, chat_id: str) -> bool:
    return bool(event.get("type") == "message" and event["message"]["role"] == "user" and event["chat_id"] == chat_id)


def _tree_of(chat: Json) -> tuple[str, ...]:
    return (chat["id"], chat.get("root_chat_id", ""))


def _status_of(event: Json, chat_id: str) -> str | None:
    if event.get("kind") == "status_change" and event["chat"]["id"] == chat_id:
        return str(event["chat"]["status"])
    if event.get("type") == "status" and event["chat_id"] == chat_id:
        return str(event["status"]["status"])
    return None


def _ids_in(event: Json) -> list[int]:
    return (
        [event["message"]["id"]]
        if event.get("type") == "message"
        else [queued["id"] for queued in event.get("queued_messages", [])]
    )


@dataclass
class Names:
    """Gives things the names under which two plays are compared: message ids by rank within their chat, and so on."""

    messages: dict[str, set[int]] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)

    def learn(self, message: Json) -> None:
        self.messages.setdefault(message["chat_id"], set()).add(message["id"])

    def rank(self, chat_id: str, message_id: int) -> int:
        return sorted(self.messages[chat_id]).index(message_id)

    def message(self, message: Json) -> Json:
        """Everything of a message but ids and times."""
        plain = same_names(message)
        plain["id"] = self.rank(message["chat_id"], message["id"])
        if message["role"] == "assistant" and "usage" not in message:
            for part in plain["content"]:  # interrupted after some part
                part["text"] = "as far as it came" if part["text"] else ""
            plain["content"] = collapse(plain["content"])
        del plain["created_at"]
        return plain

    def durable(self, event: Json) -> Json:
        """A path A event without ids and times; None for a part."""
        match event["type"]:
            case "message":
                return ("message", self.message(event["message"]))
            case "status":
                return ("status", event["status"]["status"])
            case "queue_update":
                queue = event.get("queued_messages", [])
                return ("queue", "queued_messages" in event, [q["content"] for q in queue], [list(q) for q in queue])
            case "retry":
                retry = event["retry"]
                return ("retry", retry["attempt"], retry["delay_ms"], retry["error"], list(retry))
            case "error":
                return ("error", event["error"])
            case "action_required":
                return ("action", same_names(event["action_required"]))
            case _:
                return None


def same_names(value: Json) -> Json:
    """The value with one name for all ids, and one for all times."""
    return json.loads(_TIME.sub("TIME", _CALL_ID.sub("CALL", _UUID.sub("UUID", json.dumps(value)))))


def settled(events: list[Json]) -> list[Json]:
    """Path A events in the one order among those that are possible, where each status is told twice.

    The second copy of a status is left out, wherever it comes. What one deed makes known, goes different ways: the
    prompt, the queue, and the status may come in any order. An answer, a retry or an error ends that.
    """
    ordered: list[Json] = []
    block: list[Json] = []
    copies: Counter[str] = Counter()
    seen: set[int] = set()
    for number, event in enumerate([*events, None]):
        kind = event[0] if event is not None else ""
        if kind == "status" and number > 0:  # the first is that of the snapshot, which has no copy
            copies[event[1]] += 1
            if copies[event[1]] % 2 == 0:
                continue
        is_old = kind == "message" and event[1]["id"] in seen  # comes again after an edit
        if kind in ("queue", "action", "status") or is_old or (kind == "message" and event[1]["role"] == "user"):
            block.append(event)
            continue
        if kind == "message":
            seen.add(event[1]["id"])
        ordered += sorted(block, key=lambda one: ("message", "queue", "action", "status").index(one[0]))
        block = []
        if event is not None:
            ordered.append(event)
    return ordered


def part_kind(event: Json) -> Json:
    """What kind of part an event is, chunking aside; None for other events. Runs of one kind count as one."""
    if event["type"] != "message_part":
        return None
    part = event["message_part"]["part"]
    return (event["message_part"]["role"], part["type"], part.get("tool_name"), list(part))


def collapse(items: list[Json]) -> list[Json]:
    """Without `None`, and with runs of equal items as one."""
    kept: list[Json] = []
    for item in items:
        if item is not None and (not kept or kept[-1] != item):
            kept.append(item)
    return kept


def shape(value: Json) -> Json:
    """Keys in order and types, all the way down. Of a list: the shapes of its elements, each once."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        shapes: list[Json] = []
        for item in value:
            if shape(item) not in shapes:
                shapes.append(shape(item))
        return ("list", sorted(shapes, key=repr))
    if isinstance(value, str):
        return "uuid" if _UUID.fullmatch(value) else "time" if re.match(r"\d{4}-\d\d-\d\dT", value) else "text"
    return type(value).__name__


def shapes_of(items: list[Json]) -> set[str]:
    """The shapes that occur in a list, nested lists taken apart."""
    nested = {found for item in items for value in _lists_in(item) for found in shapes_of(value)}
    return nested | {repr(shape({key: [] if isinstance(v, list) else v for key, v in i.items()})) for i in items}


def _lists_in(item: Json) -> list[list[Json]]:
    return [value for value in item.values() if isinstance(value, list) and value and isinstance(value[0], dict)]


def events_of(frame: str) -> list[Json]:
    """The events of a frame, in an envelope or bare."""
    value = json.loads(frame)
    if isinstance(value, dict) and "kind" not in value:
        value = value["data"]
    return value if isinstance(value, list) else [value] if value else []
