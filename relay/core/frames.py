"""From a text frame to typed events: the one place that knows how each dialect writes them.

D0 (servers up to 2.32) wraps events in an envelope `{"type":"data","data":[…]}`; later ones send the bare array.
Which one is in use shows in every frame, so both are read at any time. Servers from 2.35 on (D2, D3) number what they
send: parts have an episode and a sequence number, and resets are told.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import msgspec

from relay.core.errors import BadFrame
from relay.core.events import ChatErrorData, JsonObject, parse_json

COMPACTION_TOOL = "chat_summarized"  # the server's own call and result around a summary; no model or user asked for it


_NONE: frozenset[str] = frozenset()


class Message:
    """A durable message, its upstream object kept whole in `raw`."""

    __slots__ = (
        "call_ids",
        "calls",
        "compaction",
        "created_at",
        "id",
        "parts",
        "raw",
        "reasoning",
        "results",
        "role",
        "text",
        "usage",
    )

    def __init__(self, raw: JsonObject) -> None:
        """Raises TypeError when `raw` has no integer `id` or no `role`."""
        message_id, role = raw.get("id"), raw.get("role")
        if type(message_id) is not int or not isinstance(role, str):
            raise TypeError("a message needs an integer id and a role")
        self.raw = raw
        self.id = message_id
        self.role = role
        self.created_at = str(raw.get("created_at") or "")  # as upstream wrote it; empty when absent
        usage = raw.get("usage")
        # Token counts; None on all but the assistant messages of regularly finished steps.
        self.usage: Mapping[str, object] | None = usage if isinstance(usage, dict) else None
        self.text = ""  # all text parts joined
        self.reasoning = ""  # all reasoning parts joined
        self.call_ids: frozenset[str] = _NONE  # all that its parts name
        self.calls: frozenset[str] = _NONE  # tool calls that want a `tool` message: the provider's own do not
        self.results: frozenset[str] = _NONE  # tool calls that it answers
        self.compaction = False  # True for the visible traces of a compaction
        self.parts: list[JsonObject] = []  # a message without content has none
        content = raw.get("content")
        # One pass: each message comes by here, and what is read of it is read more than once.
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict):
                continue
            self.parts.append(part)
            kind = part.get("type")
            if kind == "text" or kind == "reasoning":  # noqa: PLR1714  # the hot path: no set is made for it
                text = part.get("text")
                if not isinstance(text, str):
                    pass
                elif kind == "text":
                    self.text += text
                else:
                    self.reasoning += text
            elif kind == "tool-call":
                if not part.get("provider_executed"):
                    self.calls |= {str(part.get("tool_call_id"))}
            elif kind == "tool-result":
                self.results |= {str(part.get("tool_call_id"))}
            if call := part.get("tool_call_id"):
                self.call_ids |= {str(call)}
            if part.get("tool_name") == COMPACTION_TOOL:
                self.compaction = True

    @property
    def digest(self) -> str:
        """Of the content: a promoted prompt has that of its queue entry."""
        return content_digest(self.raw.get("content"))


class MessageSeen(msgspec.Struct, frozen=True):
    """A durable message."""

    message: Message


class PartSeen(msgspec.Struct, frozen=True):
    """A live part. From 2.35 on it has coordinates: `episode` is (history version, generation attempt), `seq` counts
    within it from 1."""

    role: str
    part: JsonObject
    episode: tuple[int, int] | None = None
    seq: int = 0

    @property
    def kind(self) -> str:
        """The part's type."""
        return str(self.part.get("type"))

    @property
    def call_id(self) -> str | None:
        """Of tool calls and results."""
        call_id = self.part.get("tool_call_id")
        return call_id if isinstance(call_id, str) and call_id else None

    @property
    def local_result(self) -> bool:
        """The result of a tool that the server ran, as opposed to the provider."""
        return self.kind == "tool-result" and not self.part.get("provider_executed")


class StatusSeen(msgspec.Struct, frozen=True):
    """A status, perhaps the one before once more. `revision`: history version it goes with, from about 2.38 on."""

    status: str
    revision: int | None = None


class ErrorSeen(msgspec.Struct, frozen=True):
    """Upstream's `error` event: of the turn, or of the stream."""

    error: ChatErrorData


class RetrySeen(msgspec.Struct, frozen=True):
    """Upstream will repeat a model call."""

    attempt: int
    retrying_at: str
    raw: JsonObject


class QueueSeen(msgspec.Struct, frozen=True):
    """The whole queue."""

    entries: list[JsonObject]


class ActionSeen(msgspec.Struct, frozen=True):
    """The chat waits for the results of these tool calls, which the client has to run."""

    calls: list[JsonObject]


class HistoryResetSeen(msgspec.Struct, frozen=True):
    """The messages that follow, up to the first other event, are the whole history."""


class PreviewResetSeen(msgspec.Struct, frozen=True):
    """History moved on, or the model call is made again. Ends what a connection begins with."""


class UnknownSeen(msgspec.Struct, frozen=True):
    """An event type that this version does not know."""

    type: str


Seen = (
    MessageSeen
    | PartSeen
    | StatusSeen
    | ErrorSeen
    | RetrySeen
    | QueueSeen
    | ActionSeen
    | HistoryResetSeen
    | PreviewResetSeen
    | UnknownSeen
)


class Frame(msgspec.Struct, frozen=True):
    """The events of one frame, in order. `refused` is set by an envelope error: the server cannot serve the stream."""

    events: tuple[Seen, ...]
    refused: ChatErrorData | None = None


def decode_frame(text: str) -> Frame:
    """Read a text frame of a chat stream, of any dialect.

    Raises:
        BadFrame: It is not JSON (`bad_json`), or a known event lacks what it promises (`schema`).
    """
    try:
        value = parse_json(text)
    except ValueError as exc:
        raise BadFrame("frame is not JSON", "bad_json", text) from exc
    try:
        if isinstance(value, dict) and "chat_id" not in value and value.get("type") in ("data", "ping", "error"):
            if value["type"] == "error":
                return Frame((), refused=error_data(value.get("data")))
            value = value.get("data") or []
        rows = value if isinstance(value, list) else [value]
        return Frame(tuple([_seen(row) for row in rows]))  # a list first: half the time of a generator
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise BadFrame(f"frame has an unexpected shape: {exc}", "schema", text) from exc


def _seen(value: object) -> Seen:
    row = _object(value)
    kind = row["type"]
    if kind == "message":
        return MessageSeen(Message(_object(row["message"])))
    if not isinstance(kind, str):
        raise TypeError("an event needs a type")
    match kind:
        case "message_part":
            body = _object(row["message_part"])
            part = _object(body["part"])
            if not isinstance(part.get("type"), str):
                raise TypeError("a part needs a type")
            episode, seq = _coordinates(body)
            return PartSeen(str(body.get("role") or "assistant"), part, episode, seq)
        case "status":
            status = _object(row["status"])
            revision = status.get("history_version")
            return StatusSeen(_text(status["status"]), revision if type(revision) is int and revision > 0 else None)
        case "error":
            return ErrorSeen(error_data(row["error"]))
        case "retry":
            retry = _object(row["retry"])
            return RetrySeen(_integer(retry["attempt"]), _text(retry["retrying_at"]), retry)
        case "queue_update":
            # Left out when empty, by the server's own rule.
            entries = row.get("queued_messages") or []
            if not isinstance(entries, list):
                raise TypeError("queued_messages is not a list")
            return QueueSeen([queue_entry(entry) for entry in entries])
        case "action_required":
            calls = _object(row["action_required"])["tool_calls"] or []
            if not isinstance(calls, list):
                raise TypeError("tool_calls is not a list")
            return ActionSeen([action_call(call) for call in calls])
        case "history_reset":
            return HistoryResetSeen()
        case "preview_reset":
            return PreviewResetSeen()
        case _:
            return UnknownSeen(kind)


def _coordinates(body: JsonObject) -> tuple[tuple[int, int] | None, int]:
    seq = body.get("seq")
    if type(seq) is not int or seq < 1:
        return None, 0
    return (_integer(body["history_version"]), _integer(body["generation_attempt"])), seq


def has_episodes(events: Sequence[Seen], *, first_of_connection: bool = False) -> bool:
    """Whether a server of 2.35 or later sent these events: such a one tells resets and numbers its parts.

    Args:
        first_of_connection: They begin with the first event of a connection. Older servers begin with the status,
            these with messages or the queue where there are any.
    """
    if first_of_connection and events and isinstance(events[0], MessageSeen | QueueSeen):
        return True
    for seen in events:
        if type(seen) is PartSeen:
            numbered = seen.episode is not None
        elif type(seen) is StatusSeen:
            numbered = seen.revision is not None
        else:
            numbered = type(seen) is PreviewResetSeen or type(seen) is HistoryResetSeen
        if numbered:
            return True
    return False


def action_call(call: object) -> JsonObject:
    """A tool call that waits for the client, as upstream sent it, checked for its id. Raises TypeError."""
    checked = _object(call)
    if not isinstance(checked.get("tool_call_id"), str):
        raise TypeError("a tool call needs a text as tool_call_id")
    return checked


def action_of(part: JsonObject) -> JsonObject:
    """The tool call of a stored message in the form in which upstream asks for its result."""
    args = part.get("args")
    text = args if isinstance(args, str) else json.dumps({} if args is None else args, ensure_ascii=False)
    return {"tool_call_id": part["tool_call_id"], "tool_name": part.get("tool_name") or "", "args": text}


def queue_entry(entry: object) -> JsonObject:
    """A waiting prompt as upstream sent it, checked for its id. Raises TypeError."""
    checked = _object(entry)
    if type(checked.get("id")) is not int:
        raise TypeError("a queued message needs an integer id")
    return checked


def error_data(value: object) -> ChatErrorData:
    """Upstream's error in the newest form, whether it was a string (up to 2.33) or an object."""
    if isinstance(value, str):
        return {"message": value}
    fields = value if isinstance(value, dict) else {}
    error: ChatErrorData = {"message": str(fields.get("message") or "")}
    for name in ("kind", "provider", "detail"):
        if fields.get(name):
            error[name] = str(fields[name])
    if isinstance(fields.get("retryable"), bool):
        error["retryable"] = fields["retryable"]
    if isinstance(fields.get("status_code"), int) and fields["status_code"]:
        error["status_code"] = fields["status_code"]
    return error


def content_digest(content: object) -> str:
    """The same for equal content, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def text_of(part: JsonObject, name: str) -> str:
    """A field of a part as text; empty when it is absent or not a text."""
    value = part.get(name)
    return value if isinstance(value, str) else ""


def _object(value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return value


def _integer(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {type(value).__name__}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return value
