"""The contract, version 1: what one event is, what it carries, and how it looks on the wire.

Everything that other people's systems depend on is named here: exchange, routing keys, CloudEvents attributes,
and the `data` of each type. The JSON Schemas and the AsyncAPI document in `docs/contract/` are made from these types.
"""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cached_property, lru_cache, reduce
from hashlib import sha1
from json.encoder import encode_basestring_ascii
from operator import itemgetter
from typing import Any, Literal, NotRequired, cast
from uuid import UUID

import msgspec
from typing_extensions import TypedDict

from relay.core.errors import BadEvent

EXCHANGE = "coder.chats"
CONTENT_TYPE = "application/cloudevents+json"
APP_ID = "coder-chat-relay"

# The root of all event ids. It must never change: a new value would make every old event look new.
_NAMESPACE = UUID("6b2f7a0e-6f43-5c0e-9a53-3f0f8a3a5d11")

JsonObject = dict[str, object]


class Origin(StrEnum):
    """How the relay learned of the fact."""

    SNAPSHOT = "snapshot"
    LIVE = "live"
    RECONCILE = "reconcile"
    REPLAY = "replay"


NOBODY = UUID(int=0)  # where an id does not apply: a limit of a user belongs to no chat


@dataclass(frozen=True)
class ChatRef:
    """Which chat, whose, where. `deployment` is the server's URL without a trailing slash."""

    deployment: str
    chat_id: UUID
    owner_id: UUID
    root_chat_id: UUID

    # What every event of a chat has in common is written once: a busy chat has thousands of them.

    @cached_property
    def key(self) -> str:
        """The chat's id as text."""
        return str(self.chat_id)

    @cached_property
    def routing_words(self) -> str:
        """The last two words of its routing keys, `_` for `NOBODY`."""
        return ".".join(str(key) if key != NOBODY else "_" for key in (self.owner_id, self.chat_id))

    @cached_property
    def source(self) -> str:
        """CloudEvents `source`."""
        return f"{self.deployment}/chats/{self.key}"

    # Of the envelope as JSON, from what differs to what differs: fewer pieces are put together sooner.

    @cached_property
    def wire_source(self) -> str:
        """From behind the id of an event: `source`."""
        return f'","source":{encode_json(self.source).decode()}'

    @cached_property
    def wire_people(self) -> str:
        """From behind the origin: `ownerid`, `rootchatid`, and how `traceparent` begins."""
        return f'","ownerid":"{self.owner_id}","rootchatid":"{self.root_chat_id}","traceparent":"00-'

    @cached_property
    def id_prefix(self) -> bytes:
        """How the names of its event ids begin: the namespace of all of them, then JSON."""
        head = json.dumps([self.deployment, self.key], ensure_ascii=True, separators=(",", ":"))
        return _NAMESPACE.bytes + head.removesuffix("]").encode()


# --- data, by type -------------------------------------------------------------------------------------------------
# Absent means not known. Objects that come from upstream are carried as they were sent, unknown fields included.


class MessageData(TypedDict):
    """A durable message exists."""

    message: JsonObject  # the ChatMessage as upstream sent it
    text: str  # its plain text: all `text` parts joined


class SentMessage(msgspec.Struct, frozen=True, gc=False):
    """`MessageData` whose message is still the JSON that upstream sent: most are passed on and never looked at."""

    message: msgspec.Raw
    text: str


class HistoryData(TypedDict):
    """History was rewritten. A consumer drops every id up to the maximum of `message_ids` that is not among them."""

    message_ids: list[int]  # the whole history now, ascending
    removed_ids: list[int]  # informs only; may lack ids that an earlier session published
    reason: Literal["edit", "reconcile", "restart"]


class ChatErrorData(TypedDict):
    """What upstream says went wrong, in the newest server's form."""

    message: str
    kind: NotRequired[str]
    provider: NotRequired[str]
    retryable: NotRequired[bool]
    status_code: NotRequired[int]
    detail: NotRequired[str]


class StatusData(TypedDict):
    """The status of the chat changed."""

    status: str
    previous: str | None  # the last one published; null only if none ever was
    last_error: NotRequired[ChatErrorData | None]


class TokenUsage(TypedDict, total=False):
    """Sums over the steps of a turn, in tokens."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    reasoning_tokens: int
    cache_creation_tokens: int
    cache_read_tokens: int


class TurnData(TypedDict):
    """A turn ended: a user message and all that followed up to the next one."""

    outcome: Literal["completed", "interrupted", "failed"]
    message_ids: list[int]
    steps: int  # assistant messages, compaction's own left out
    usage: TokenUsage
    error: NotRequired[ChatErrorData]


class ErrorData(ChatErrorData):
    """An error of the turn (reason `turn`) or of the stream itself (the other reasons)."""

    reason: Literal["turn", "dropped_messages", "snapshot_failed", "bad_frame"]


class RetryData(TypedDict):
    """Upstream repeats a model call that failed."""

    attempt: int  # 1 for the first repetition of a step
    delay_ms: int
    error: str
    retrying_at: str
    kind: NotRequired[str]
    provider: NotRequired[str]
    status_code: NotRequired[int]


class QueueData(TypedDict):
    """The queue of waiting prompts changed."""

    queued_messages: list[JsonObject]  # the whole queue, oldest first, as upstream sent it


class LifecycleData(TypedDict):
    """Discovery saw the chat appear, change, be archived, come back, or vanish."""

    chat: JsonObject  # the Chat as upstream sent it; for `gone` the last one known
    changed: list[str]  # fields that differ from the last lifecycle event, sorted


class ActionData(TypedDict):
    """The chat waits for results of client-side tools."""

    tool_calls: list[JsonObject]


class PreviewData(TypedDict):
    """A live fragment of the step in progress."""

    step: int  # counts up within the session, from 0
    role: str
    part: JsonObject  # as upstream sent it; adjoining text may be joined
    offset: int  # before it in the step: code points of text, characters of args_delta, else a count


class PreviewResetData(TypedDict):
    """Everything previewed of the step so far is void."""

    step: int
    reason: Literal["retry", "gap", "reconnect", "superseded"]


class Tokens(TypedDict):
    """Token counts of one charge; output includes reasoning, input leaves out what was read from the cache."""

    input: int
    output: int
    reasoning: int
    cache_read: int
    cache_write: int


class ChargedData(TypedDict):
    """One assistant message was charged."""

    message_id: int
    model: str
    tokens: Tokens
    cost_micros: int | None  # millionths of a US dollar; null when no price is known
    price: NotRequired[dict[str, str]]  # US dollars per million tokens, exact decimals
    owner_id: str
    root_chat_id: str


class Scope(TypedDict):
    """Whose spend: `kind` is user, group, deployment or chat."""

    kind: str
    id: str


class PeriodData(TypedDict):
    """`start` is part of the period, `end` is not; both UTC."""

    kind: str
    start: str
    end: str


class Evidence(TypedDict):
    """What an alert rests on."""

    charges: int
    last_message_ids: list[int]
    prices: list[dict[str, str]]  # of unpriced the model that has none


class LimitData(TypedDict):
    """Spend of a scope met a limit in a period, or (unpriced) cannot be counted whole against it."""

    policy: str
    scope: Scope
    period: PeriodData
    percent: int  # the level that was reached; of unpriced how much the priced charges make
    spend_micros: int
    limit_micros: int
    evidence: Evidence
    action: NotRequired[str]


class ArchiveData(TypedDict):
    """A transcript was archived, or could not be."""

    url: str
    sha256: str
    bytes: int
    messages: int
    first_id: int | None
    last_id: int | None
    reason: NotRequired[str]


Data = (
    MessageData
    | HistoryData
    | StatusData
    | TurnData
    | ErrorData
    | RetryData
    | QueueData
    | LifecycleData
    | ActionData
    | PreviewData
    | PreviewResetData
    | ChargedData
    | LimitData
    | ArchiveData
)


@dataclass(frozen=True, slots=True)
class EventType:
    """One row of the contract's table: `family.event`, its details, and the shape of its data."""

    family: str
    event: str
    details: tuple[str, ...]  # "*" where values we do not know yet pass through
    data: type
    transient: bool = False
    detail_in_type: bool = True  # False where the detail is a role, a status value or a scope


_SCOPES = ("user", "group", "deployment", "chat")
CONTRACT: tuple[EventType, ...] = (
    EventType("chat", "message", ("system", "user", "assistant", "tool", "*"), MessageData, detail_in_type=False),
    EventType("chat", "history", ("replaced",), HistoryData),
    EventType(
        "chat",
        "status",
        ("waiting", "pending", "running", "paused", "completed", "error", "requires_action", "interrupting", "*"),
        StatusData,
        detail_in_type=False,
    ),
    EventType("chat", "turn", ("completed", "interrupted", "failed"), TurnData),
    EventType("chat", "error", ("turn", "stream"), ErrorData),
    EventType("chat", "retry", ("scheduled",), RetryData),
    EventType("chat", "queue", ("updated",), QueueData),
    EventType("chat", "lifecycle", ("created", "updated", "archived", "unarchived", "gone"), LifecycleData),
    EventType("chat", "action", ("required",), ActionData),
    EventType(
        "chat",
        "preview",
        ("text", "reasoning", "tool-call", "tool-result", "source", "file", "file-reference", "other"),
        PreviewData,
        transient=True,
    ),
    EventType("chat", "preview", ("reset",), PreviewResetData, transient=True),
    EventType("usage", "charged", _SCOPES, ChargedData, detail_in_type=False),
    *(
        EventType("usage", event, _SCOPES, LimitData, detail_in_type=False)
        for event in ("threshold", "exceeded", "forecast", "recovered", "enforced", "unpriced")
    ),
    *(
        EventType("archive", event, ("_",), ArchiveData, detail_in_type=False)
        for event in ("stored", "failed", "sealed")
    ),
)
_BY_NAME = {(t.family, t.event): t for t in CONTRACT}
PREVIEW_DETAILS = frozenset(d for t in CONTRACT if t.data is PreviewData for d in t.details)


# --- one event -----------------------------------------------------------------------------------------------------


class Event(msgspec.Struct, gc=False):  # nobody changes one; frozen ones take longer to make
    """One fact about one chat, ready to publish.

    `id` is a UUID as text: it says which fact this is, and is the same from any replica after any restart.
    `(session, position)` says when in the life of the chat it was told. `time` is RFC 3339 in UTC.
    """

    id: str
    family: str
    event: str
    detail: str
    chat: ChatRef
    content: Data | SentMessage
    time: str
    origin: Origin
    session: int
    position: int
    subject: str = ""  # empty: the chat id

    @property
    def data(self) -> Data:
        """What its type says about the fact."""
        content = self.content
        if isinstance(content, SentMessage):
            return {"message": decode_json(bytes(content.message)), "text": content.text}
        return content

    @property
    def transient(self) -> bool:
        """True for previews: they may be joined, and under pressure dropped."""
        return self.event == "preview" and self.family == "chat"

    @property
    def routing_key(self) -> str:
        """`<family>.<event>.<detail>.<owner_id>.<chat_id>`, lower case, always five words, `_` for `NOBODY`."""
        return names_of(self.family, self.event, self.detail).routing_start + self.chat.routing_words

    @property
    def type(self) -> str:
        """CloudEvents `type`: `io.chatrelay.<family>.<event>[.<detail>].v1`."""
        return names_of(self.family, self.event, self.detail).type

    def envelope(self) -> JsonObject:
        """The CloudEvents 1.0 document in structured mode."""
        return {
            "specversion": "1.0",
            "id": self.id,
            "source": self.chat.source,
            "type": self.type,
            "subject": self.subject or self.chat.key,
            "time": self.time,
            "datacontenttype": "application/json",
            "dataschema": f"urn:chatrelay:schema:{self.type.removeprefix('io.chatrelay.')}",
            "session": self.session,
            "position": self.position,
            "origin": self.origin.value,
            "ownerid": str(self.chat.owner_id),
            "rootchatid": str(self.chat.root_chat_id),
            # A trace of its own for each fact, so that consumers can join their spans to it; not sampled by us.
            "traceparent": f"00-{(trace := self.id.replace('-', ''))}-{trace[16:]}-00",
            "data": self.data,
        }

    def encode(self, names: "Names | None" = None) -> bytes:
        """The body on the wire: `envelope` as UTF-8 JSON.

        Written by hand around `data`, since nearly all of it is the same from event to event.

        Args:
            names: Those of the event, where they are at hand.
        """
        if self.subject:
            return encode_json(self.envelope())
        names = names or names_of(self.family, self.event, self.detail)
        chat, trace = self.chat, self.id.replace("-", "")
        head = (
            f'{{"specversion":"1.0","id":"{self.id}{chat.wire_source}{names.wire_type}{chat.key}","time":'
            f'{_wire_text(self.time)}{names.wire_schema}{self.session},"position":{self.position},"origin":"'
            f'{self.origin!s}{chat.wire_people}{trace}-{trace[16:]}-00","data":'
        )
        return b"".join((head.encode(), encode_json(self.content), b"}"))


class Names(msgspec.Struct, frozen=True):
    """What a kind of event is called in each place."""

    type: str
    routing_start: str  # of routing keys, up to the owner
    transient: bool
    counted: str  # the family that metrics know it by
    wire_type: str  # of the envelope as JSON: `type`, and what stands before the subject
    wire_schema: str  # from behind `time`: content type and schema, and what stands before the session


@lru_cache(maxsize=1024)
def names_of(family: str, event: str, detail: str) -> Names:
    """Of a kind of event that `CONTRACT` has, with any detail."""
    tail = f".{detail}" if _BY_NAME[family, event].detail_in_type else ""
    name = f"io.chatrelay.{family}.{event}{tail}.v1"
    schema = f"urn:chatrelay:schema:{name.removeprefix('io.chatrelay.')}"
    kind = f',"type":{encode_json(name).decode()},"subject":"'
    about = encode_json({"datacontenttype": "application/json", "dataschema": schema}).decode()[1:-1]
    counted = event if family == "chat" else family
    start = f"{family}.{event}.{routing_word(detail)}."
    return Names(name, start, (family, event) == ("chat", "preview"), counted, kind, f',{about},"session":')


@lru_cache(maxsize=256)
def _wire_text(text: str) -> str:
    return encode_json(text).decode()


def decode_event(body: bytes, routing_key: str) -> Event:
    """The event in a message: the opposite of `Event.encode` and `Event.routing_key`.

    Unknown attributes are passed over. `data` is what the JSON holds: a consumer checks what it uses.

    Raises:
        BadEvent: It is not one of ours; the text says what is wrong with it.
    """
    try:
        document = cast(dict[str, Any], parse_json(body.decode()))
        family, event, detail, owner, _ = routing_key.split(".")
        deployment, _, chat_id = document["source"].rpartition("/chats/")
        owner_id = UUID(owner) if owner != "_" else NOBODY
        if (family, event) not in _BY_NAME:
            raise BadEvent(f"no such event: {family}.{event}")
        if not isinstance(document["data"], dict):
            raise BadEvent("data is not an object")
        return Event(
            id=str(UUID(document["id"])),
            family=family,
            event=event,
            detail=detail,
            chat=ChatRef(deployment, UUID(chat_id), owner_id, UUID(document["rootchatid"])),
            content=cast(Data, document["data"]),
            time=str(document["time"]),
            origin=Origin(document["origin"]),
            session=int(document["session"]),
            position=int(document["position"]),
            subject=str(document["subject"]),
        )
    except KeyError as exc:
        raise BadEvent(f"attribute {exc} is missing") from exc
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise BadEvent(f"not an event of the relay: {exc}") from exc


def event_id(chat: ChatRef, kind: str, *source: object) -> str:
    """The id of a fact: uuid5 over deployment, chat, kind and what makes the fact itself.

    `source` may hold strings, integers, None and lists of them. Different inputs give different names: they are
    written as JSON, in which no value can run into the next.
    """
    return _uuid5(chat.id_prefix + f",{','.join(map(_name, (kind, *source)))}]".encode())


def message_event_id(chat: ChatRef, message_id: int) -> str:
    """`event_id` of the fact that a message exists, which nearly all facts are."""
    return _uuid5(b'%b,"message",%d]' % (chat.id_prefix, message_id))


def _uuid5(name: bytes) -> str:
    """Of namespace and name, in a fifth of the time that the standard library takes for it."""
    first, second, third, variant, fourth, last = _CUT(sha1(name, usedforsecurity=False).hexdigest())
    return f"{first}-{second}-5{third}-{_VARIANT[variant]}{fourth}-{last}"


def _name(value: object) -> str:
    """JSON as `_NAMES` has it, which is slow to begin."""
    if type(value) is int:
        return str(value)
    return encode_basestring_ascii(value) if type(value) is str else _NAMES.encode(value)


_CUT = itemgetter(slice(8), slice(8, 12), slice(13, 16), 16, slice(17, 20), slice(20, 32))  # at once, and so faster
# By the digit that a hash has there, the one that a UUID has.
_VARIANT = {f"{digit:x}": f"{digit & 0b11 | 0b1000:x}" for digit in range(16)}


def parse_json(text: str) -> object:
    """JSON from upstream, integers exact. A number too large for a float stays the text that it was.

    Raises:
        ValueError: It is not JSON, or nested deeper than could be written again.
    """
    try:
        try:
            value: object = _DECODER.decode(text)
        except (ValueError, RecursionError):
            # Half surrogate pairs and very large numbers, which the fast decoder refuses; and what is not JSON.
            value = json.loads(text, parse_float=_number, parse_constant=_no_number)
        if len(text) > 2 * _DEPTH_TO_SPARE and text.count("[") + text.count("{") > _DEPTH_TO_SPARE:
            json.dumps(reduce(lambda inner, _: [inner], range(_DEPTH_TO_SPARE), value))
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    return value


def decode_json(body: bytes) -> JsonObject:
    """The object that `encode_json` wrote."""
    return cast(JsonObject, parse_json(body.decode()))


_NAMES = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))
_DECODER = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()
_DEPTH_TO_SPARE = 150  # what is parsed goes out inside of more, and from deeper in the program


def _number(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def encode_json(value: object) -> bytes:
    """JSON as UTF-8. Half surrogate pairs, which UTF-8 cannot hold, stay escaped as upstream sent them."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


@lru_cache(maxsize=1024)
def routing_word(value: str) -> str:
    """`value` as one word of a routing key: lower case, anything but letters, digits, `-` and `_` made `_`.

    >>> routing_word("Queued.For Capacity")
    'queued_for_capacity'
    """
    return re.sub(r"[^a-z0-9_-]", "_", value.lower())[:64] or "_"


def utc(moment: datetime) -> str:
    """RFC 3339 in UTC, microseconds kept.

    >>> utc(datetime(2026, 3, 1, 12, tzinfo=UTC))
    '2026-03-01T12:00:00Z'
    """
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


_LONGEST_TIME = 64
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


def to_utc(stamp: str) -> str | None:
    """An upstream time stamp in UTC with all its digits (up to nanoseconds), None when it is none.

    >>> to_utc("2026-03-20T20:00:05.123456789+02:00")
    '2026-03-20T18:00:05.123456789Z'
    """
    return _to_utc(stamp) if len(stamp) <= _LONGEST_TIME else None  # whatever is asked for is kept for a while


@lru_cache(maxsize=256)  # messages of a step have the same, and their turn has it again
def _to_utc(stamp: str) -> str | None:
    match = _RFC3339.fullmatch(stamp)
    if match is None:
        return None
    seconds, fraction, zone = match.groups()
    try:
        if zone == "Z" and seconds[10] == "T":  # as servers write it
            datetime.fromisoformat(seconds)
            return stamp
        moment = datetime.fromisoformat(seconds + zone.upper().replace("Z", "+00:00")).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%S}".rjust(19, "0") + (fraction or "") + "Z"
