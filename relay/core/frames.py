"""From a text frame to typed events: the one place that knows how each dialect writes them.

D0 (servers up to 2.32) wraps events in an envelope `{"type":"data","data":[…]}`; later ones send the bare array.
Which one is in use shows in every frame, so both are read at any time. Servers from 2.35 on (D2, D3) number what they
send: parts have an episode and a sequence number, and resets are told.
"""

import hashlib
import json
import re
from collections.abc import Sequence

import msgspec

from relay.core.errors import BadFrame
from relay.core.events import ChatErrorData, JsonObject, decode_json, parse_json

COMPACTION_TOOL = "chat_summarized"  # the server's own call and result around a summary; no model or user asked for it


_NONE: frozenset[str] = frozenset()

_Scalar = str | int | float | bool | None
# JSON as deep as tools are called. Of what is deeper nobody knows that it can be written again, inside of more.
_Flat = _Scalar | dict[str, _Scalar] | list[_Scalar]
_Shallow = _Scalar | dict[str, _Flat] | list[_Flat]
_Json = _Scalar | dict[str, _Shallow] | list[_Shallow]


class Part(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One piece of a stored message. Look only at what `_fields_of` sets too: the other fields are there so that each
    is known and read. They stand in upstream's order, since in another they take longer to read."""

    type: str | None = None
    text: str | None = None
    signature: str | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None
    mcp_server_config_id: str | None = None
    args: _Json = None
    args_delta: str | None = None
    result: _Json = None
    result_delta: str | None = None
    is_error: bool | None = None
    source_id: str | None = None
    url: str | None = None
    title: str | None = None
    media_type: str | None = None
    data: str | None = None
    file_id: str | None = None
    file_name: str | None = None
    start_line: int | None = None
    end_line: int | None = None
    content: str | None = None
    provider_metadata: _Json = None
    provider_executed: bool | None = None
    created_at: str | None = None
    completed_at: str | None = None
    context_file_path: str | None = None
    context_file_agent_id: str | None = None
    skill_name: str | None = None


class Usage(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """Token counts of one step, None where upstream left one out."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_creation_tokens: int | None = None
    cache_read_tokens: int | None = None
    context_limit: int | None = None


class _Fields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, gc=False):
    """Those of a message, in the same way."""

    id: int
    chat_id: str | None = None
    created_by: str | None = None
    model_config_id: str | None = None
    created_at: str | None = None
    role: str
    content: list[Part] | None = None
    usage: Usage | None = None


class Message(msgspec.Struct, gc=False):  # nobody changes one; frozen ones take longer to make
    """A durable message, its upstream object kept whole in `raw`."""

    raw: JsonObject | msgspec.Raw
    id: int
    role: str
    created_at: str  # as upstream wrote it; empty when absent
    usage: Usage | None  # None on all but the assistant messages of regularly finished steps
    parts: list[Part]
    text: str  # all text parts joined
    reasoning: str  # all reasoning parts joined
    call_ids: frozenset[str]  # all that its parts name
    calls: frozenset[str]  # tool calls that want a `tool` message: the provider's own do not
    results: frozenset[str]  # tool calls that it answers
    compaction: bool  # True for the visible traces of a compaction

    @classmethod
    def of(cls, raw: JsonObject) -> "Message":
        """The message that an object is; raises TypeError when it has no integer `id` or no `role`."""
        return _message(raw, _fields_of(raw))

    @property
    def digest(self) -> str:
        """Of the content: a promoted prompt has that of its queue entry."""
        raw = self.raw if isinstance(self.raw, dict) else decode_json(bytes(self.raw))
        return content_digest(raw.get("content"))


def _message(raw: JsonObject | msgspec.Raw, fields: _Fields) -> Message:
    parts = fields.content or []
    text = reasoning = ""
    call_ids = calls = results = _NONE
    compaction = False
    # One pass: each message comes by here, and what is read of it is read more than once.
    for part in parts:
        kind, call = part.type, part.tool_call_id
        if kind == "text":
            text += part.text or ""
        elif kind == "reasoning":
            reasoning += part.text or ""
        if call or kind == "tool-call" or kind == "tool-result":  # noqa: PLR1714  # no set is made
            one = frozenset((str(call),))
            if kind == "tool-call" and not part.provider_executed:
                calls = calls | one if calls else one
            elif kind == "tool-result":
                results = results | one if results else one
            if call:
                call_ids = call_ids | one if call_ids else one
            if part.tool_name == COMPACTION_TOOL:
                compaction = True
    created, usage = fields.created_at or "", fields.usage
    return Message(
        raw, fields.id, fields.role, created, usage, parts, text, reasoning, call_ids, calls, results, compaction
    )


def _fields_of(raw: JsonObject) -> _Fields:
    """What an object says, with nothing where a message would say something else; ids and names are as they are."""
    message_id, role, usage, content = raw.get("id"), raw.get("role"), raw.get("usage"), raw.get("content")
    if type(message_id) is not int or not isinstance(role, str):
        raise TypeError("a message needs an integer id and a role")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return _Fields(
        id=message_id,
        role=role,
        created_at=str(raw.get("created_at") or ""),
        usage=_usage_of(usage) if isinstance(usage, dict) else None,
        content=[
            Part(
                type=part.get("type"),
                text=text if isinstance(text := part.get("text"), str) else None,
                tool_call_id=part.get("tool_call_id"),
                tool_name=part.get("tool_name"),
                args=part.get("args"),
                provider_executed=part.get("provider_executed"),
            )
            for part in parts
        ],
    )


def _usage_of(usage: JsonObject) -> Usage:
    return Usage(*[count if type(count := usage.get(kind)) is int else None for kind in Usage.__struct_fields__])


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


# How a frame begins and ends that holds one message and no more: from 2.35 on each brings a reset.
_IN_ENVELOPE = '{"type":"data","data":[{"type":"message","chat_id":"'
_BARE = '[{"type":"message","chat_id":"'
_BEFORE_MESSAGE = '","message":'
_RESET = re.compile(r'\}\},\{"type":"preview_reset","chat_id":"[0-9a-f-]{36}"\}\]')
_RESET_SIZE = len('}},{"type":"preview_reset","chat_id":""}]') + 36
_FIELDS_DECODER = msgspec.json.Decoder(_Fields)


class FrameReader:
    """Reads the text frames of one chat, of any dialect.

    Those with one message and no more, as nearly all are, differ in the message alone. It is not made into an object:
    most are passed on as they came, and that takes a third less time.
    """

    __slots__ = ("_alike",)

    def __init__(self) -> None:
        self._alike: _Around | None = None  # what stands around the message in such frames of this chat

    def read(self, text: str) -> Frame | Message:
        """The frame; or the message, where it holds one and no more.

        Raises:
            BadFrame: It is not JSON (`bad_json`), or a known event lacks what it promises (`schema`).
        """
        alike = self._alike
        if alike is None or not (text.startswith(alike[0]) and text.endswith(alike[1])):
            if (alike := _around(text)) is None:
                return _read_whole(text)
            self._alike = alike
        _, _, start, end, reset = alike
        sent = text[start:end]
        try:
            # Every value is read, for not all that is JSON can be read by everybody (`parse_json`).
            message = _message(msgspec.Raw(sent), _FIELDS_DECODER.decode(sent))
        except (msgspec.MsgspecError, ValueError):
            return _read_whole(text)
        return Frame((MessageSeen(message), PreviewResetSeen())) if reset else message


def decode_frame(text: str) -> Frame:
    """Read one frame, as `FrameReader.read` does."""
    read = FrameReader().read(text)
    return Frame((MessageSeen(read),)) if isinstance(read, Message) else read


# Head; tail, which begins with the last character of the message; where the message begins, where it ends counted from
# the end; whether a reset follows it.
_Around = tuple[str, str, int, int, bool]


def _around(text: str) -> _Around | None:
    """What stands around a message, in a frame that begins with one and ends as if it held no more."""
    if text.startswith(_IN_ENVELOPE):
        begins, tail = len(_IN_ENVELOPE), "}}]}"
    elif text.startswith(_BARE):
        begins, tail = len(_BARE), "}}]"
    else:
        return None
    chat, begins = text[begins : begins + 36], begins + 36
    if not (text.startswith(_BEFORE_MESSAGE, begins) and chat.replace("-", "").isalnum()):
        return None
    begins += len(_BEFORE_MESSAGE)
    size, reset = len(text) - (text[-1] == "\n"), False
    if tail == "}}]" and _RESET.fullmatch(text, max(0, size - _RESET_SIZE), size):
        tail, reset = text[size - _RESET_SIZE : size], True
    elif not text.endswith(tail, begins, size):
        return None
    tail += text[size:]
    return text[:begins], tail, begins, 1 - len(tail), reset


def _read_whole(text: str) -> Frame:
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
        return MessageSeen(Message.of(_object(row["message"])))
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


def action_of(part: Part) -> JsonObject:
    """The tool call of a stored message in the form in which upstream asks for its result."""
    args = part.args
    text = args if isinstance(args, str) else json.dumps({} if args is None else args, ensure_ascii=False)
    return {"tool_call_id": part.tool_call_id, "tool_name": part.tool_name or "", "args": text}


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
