"""Where this library is meant to differ from the Go SDK, and why. Outside of this list every vector passes.

A vector that gave something else than Go is looked up here. The tests count how often each reason was needed: a reason
that no vector needs any more, or one that swallows new ones, fails.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, get_args, get_origin
from urllib.parse import urlsplit
from uuid import UUID

from relay.codersdk import (
    NIL_UUID,
    ChatStreamEvent,
    ChatUsageLimitExceededResponse,
    CoderModel,
    InvalidAnswer,
    Response,
    StreamDecoder,
    StreamEnvelope,
)
from relay.codersdk.answers import refusal
from relay.codersdk.json_text import as_text
from tests.codersdk.failures import same_error, seen, seen_by_go
from tests.codersdk.vectors import (
    COMMITTED,
    GOLDENS,
    Members,
    Row,
    as_bytes,
    as_str,
    decoded,
    go_decoded,
    members,
    report,
    same_json,
    type_named,
    value_of,
    without_unknown,
    written,
)

# --- keys in other cases -------------------------------------------------------------------------------------------


def known_keys(model: type[CoderModel]) -> dict[str, Any]:
    """The keys that are read into a model, with the type of each."""
    fields = {info.serialization_alias or name: info.annotation for name, info in model.model_fields.items()}
    return fields | model._old_keys


def model_in(annotation: Any) -> type[CoderModel] | None:
    """The model that a field's type is, or is a list of, or points to."""
    if isinstance(annotation, type) and issubclass(annotation, CoderModel):
        return annotation
    if get_origin(annotation) is dict:
        return None
    return next(filter(None, map(model_in, get_args(annotation))), None)


def with_exact_keys(kind: Any, tree: Any) -> Any:
    """The same JSON with every key as this API writes it that Go takes for one of the API's."""
    model = model_in(kind)
    if model is None:
        return tree
    if isinstance(tree, Members):
        known = known_keys(model)
        folded = {_folded(key): key for key in known}
        renamed = [(key if key in known else folded.get(_folded(key), key), value) for key, value in tree]
        return Members((key, with_exact_keys(known.get(key), value)) for key, value in renamed)
    if isinstance(tree, list):
        return [with_exact_keys(model, item) for item in tree]
    return tree


def _folded(key: str) -> str:
    # Two characters beyond ASCII are the same as a letter without regard to case: long s and the sign of kelvin.
    return "".join(chr(ord(each) | 0x20) if each.isascii() and each.isalpha() else each for each in key).translate(
        {0x017F: "s", 0x212A: "k"}
    )


def decodes_with_exact_keys(row: Row, got: str | None) -> bool:
    tree = members(as_str(row, "input"))
    exact = written(with_exact_keys(type_named(row["type"]), tree))
    return same_json(decoded(row["type"], exact), go_decoded(row))


def frame_with_exact_keys(frame: bytes) -> str:
    """A frame of a chat's stream, with its keys as this API writes them."""
    envelope = with_exact_keys(StreamEnvelope, members(as_text(frame)))
    is_data = ("type", "data") in envelope
    payload = list[ChatStreamEvent] if is_data else Response
    return written(
        Members((key, with_exact_keys(payload, value) if key == "data" else value) for key, value in envelope)
    )


def _refuses_with_exact_keys(row: Row, got: Any) -> bool:
    answer = row["answer"]
    if "ws_text_frame" in answer:
        events = StreamDecoder(NIL_UUID).feed(frame_with_exact_keys(answer["ws_text_frame"].encode()))
        return bool([event.error.message for event in events if event.error] == row["error_event_messages"])
    exact = written(with_exact_keys(ChatUsageLimitExceededResponse, members(as_str(answer, "body"))))
    error = refusal(
        answer["status"],
        answer["content_type"] or "",
        exact.encode(),
        method=row.get("http_method", ""),
        url=row.get("url", ""),
        may_be_limit=row["method"] in {"CreateChat", "CreateChatMessage", "EditChatMessage"},
    )
    return same_error(seen(error, "coder.test"), seen_by_go(row))


def _streams_with_exact_keys(row: Row, got: "Streamed") -> bool:
    decoder = StreamDecoder(UUID(row["chat_id"]))
    events, changed = [], False
    for frame in row["frames"]:
        if frame["kind"] == "text" and not decoder.ended:
            text = as_bytes(frame, "data")
            exact = frame_with_exact_keys(text)
            changed |= value_of(exact) != value_of(as_text(text))
            events += decoder.feed(exact)
    made = [without_unknown(event).model_dump_json() for event in events]
    return changed and len(made) == len(row["events"]) and all(map(same_json, made, row["events"]))


# --- ends of streams ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Streamed:
    """What came of a stream."""

    same_events: bool
    close_code: int | None  # of the client's close frame


def _ends_with(row: Row, *kinds: str) -> bool:
    return bool(row["frames"]) and row["frames"][-1]["kind"] in kinds


def _answer_to(close: Row) -> int:
    """The code that a close frame is answered with."""
    if close["kind"] == "close-empty":
        return 1005
    code = int(close["code"])
    return code if code in {1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)} else 1002


def _bad_reason(row: Row) -> bool:
    try:
        as_bytes(row["frames"][-1], "data")[2:].decode()
    except UnicodeDecodeError:
        return True
    return False


# --- texts ----------------------------------------------------------------------------------------------------------


def _same_as_unicode(row: Row, got: dict[str, Any]) -> bool:
    wanted = {key: as_text(value) if isinstance(value, bytes) else value for key, value in seen_by_go(row).items()}
    return "detail_b64" in row and same_error(got, wanted)


# --- handshakes -----------------------------------------------------------------------------------------------------


def _tells_why(row: Row, got: dict[str, Any]) -> bool:
    """A refused handshake, told as the refusal of a call is."""
    answer = row["answer"]
    if row["method"] != "StreamChat" or answer.get("status") in {None, 101}:
        return False
    said = refusal(
        answer["status"],
        answer["content_type"] or "",
        b"" if answer["status"] == 204 else as_bytes(answer, "body"),
        method="GET",
        url=got.get("url", ""),
    )
    return row["is_sdk_error"] is False and got == seen(said, "coder.test")


# --- integers in free-form maps -------------------------------------------------------------------------------------

_FREE_FORM = {"prediction", "metadata", "extra_body"}


def as_go_floats(value: Any, *, free: bool = False) -> Any:
    """A value with the integers of its free-form maps rounded to float64, as Go prints them."""
    if isinstance(value, dict):
        return {key: as_go_floats(item, free=free or key in _FREE_FORM) for key, item in value.items()}
    if isinstance(value, list):
        return [as_go_floats(item, free=free) for item in value]
    return Decimal(repr(float(value))) if free and isinstance(value, int) else value


# --- redirects ------------------------------------------------------------------------------------------------------


def _leaves_host(row: Row) -> bool:
    host = urlsplit(row["response"]["headers"].get("Location", "")).netloc
    return host not in {"", "coder.test"}


# --- the list ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One reason, the vectors it covers by a rule, and how many of the committed ones need it."""

    reason: str
    covers: dict[str, Callable[[Row, Any], bool]]  # by the name of the vectors; gets the vector and what we made of it
    needed: dict[str, int]


def bare_array(row: Row) -> bool:
    """Whether a frame of a stream is an array of events without an envelope."""
    return any(frame["kind"] == "text" and as_bytes(frame, "data").lstrip().startswith(b"[") for frame in row["frames"])


DIFFERENCES: dict[str, Difference] = {
    "a frame may be a bare array": Difference(
        "The seed's frames are envelopes; those of servers since 2.33 are the events alone, which are read as well.",
        {"stream": lambda row, got: bare_array(row) and not got.same_events},
        {"stream": 1},
    ),
    "an error may be an object": Difference(
        "The seed's `last_error` is a string; servers since 2.34 send an object, which is read as well.",
        {
            "decode": lambda row, got: (
                "cannot unmarshal object into Go struct field Chat.last_error" in row.get("error", "")
            )
        },
        {"decode": 2},
    ),
    "integers stay exact": Difference(
        "Go's free-form maps hold float64: an integer beyond 2^53 comes out as another one. Ours is exact.",
        {
            "types": lambda row, got: as_go_floats(value_of(got)) == value_of(row["roundtrip"]),
            "decode": lambda row, got: "output" in row and as_go_floats(value_of(got)) == value_of(row["output"]),
        },
        {"types": 2, "decode": 3},
    ),
    "keys match exactly": Difference(
        "Go takes `TITLE` for `title`. No server of this API sends that; here it is an unknown field, and kept.",
        {
            "decode": decodes_with_exact_keys,
            "errors": _refuses_with_exact_keys,
            "stream": _streams_with_exact_keys,
        },
        {"decode": 661, "errors": 15, "stream": 3},
    ),
    "a list of answers is a list": Difference(
        "Go's nil slice is null. Where a call answers with a list, ours is empty.",
        {"requests": lambda row, got: got[1] == [] and row["result"] == "null"},
        {"requests": 2},
    ),
    "the token stays with its host": Difference(
        "Go follows a redirect to another host and sends it the token. Ours does not follow it.",
        {"requests": lambda row, got: len(got[0]) == 1 and isinstance(got[1], InvalidAnswer) and _leaves_host(row)},
        {"requests": 1},
    ),
    "texts are Unicode": Difference(
        "Go cuts a long body within a character and keeps bytes that are no UTF-8; here each becomes U+FFFD.",
        {"errors": _same_as_unicode},
        {"errors": 8},
    ),
    "a refused stream says why": Difference(
        "Go drops what the server says when it refuses a handshake; ours is the error of any other call.",
        {"errors": _tells_why},
        {"errors": 27},
    ),
    "a client that leaves says so": Difference(
        "Go drops the connection when the caller closes a stream; ours closes it with 1000.",
        {
            "stream": lambda row, got: (
                "client_closes_after_events" in row and got == Streamed(same_events=True, close_code=1000)
            )
        },
        {"stream": 2},
    ),
    "no goodbye to nobody": Difference(
        "Go writes a close frame into a connection that the server has left; ours does not.",
        {
            "stream": lambda row, got: (
                _ends_with(row, "abort", "cut") and got == Streamed(same_events=True, close_code=None)
            )
        },
        {"stream": 8},
    ),
    "a goodbye is answered when it comes": Difference(
        "Go answers a close frame when it has read all before it; ours at once, even if a bad frame waits before it.",
        {
            "stream": lambda row, got: (
                _ends_with(row, "close", "close-empty")
                and got == Streamed(same_events=True, close_code=_answer_to(row["frames"][-1]))
            )
        },
        {"stream": 1},
    ),
    "the reason of a close is UTF-8": Difference(
        "RFC 6455 wants one that is not answered with 1007; Go's library lets it pass.",
        {
            "stream": lambda row, got: (
                _ends_with(row, "close-raw") and _bad_reason(row) and got == Streamed(same_events=True, close_code=1007)
            )
        },
        {"stream": 1},
    ),
}


@dataclass
class Tally:
    """What came of one file of vectors: differences that have a reason, and the ones that do not."""

    vectors: str
    explained: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Row, str]] = field(default_factory=list)

    def differs(self, row: Row, got: Any, what: str) -> None:
        """A vector gave something else than Go; `what` says so to people."""
        for name, each in DIFFERENCES.items():
            covers = each.covers.get(self.vectors)
            if covers is not None and got is not None and covers(row, got):
                self.explained[name] += 1
                return
        self.failures.append((row, what))

    def check(self) -> None:
        report(self.failures)
        if GOLDENS == COMMITTED:
            needed = {
                name: each.needed[self.vectors] for name, each in DIFFERENCES.items() if self.vectors in each.covers
            }
            assert dict(self.explained) == needed
