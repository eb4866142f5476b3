"""Which age of the chats API a server speaks, told by what is seen of it and never by its version number.

Backports, forks and development builds make version numbers unsafe; what a server answers cannot be wrong about itself.
Each function here reads one kind of answer; a `Witness` puts together what they found and gives it a name.

What tells the ages apart was seen on servers built from seven commits of March to August 2026 (`d0` … `d3`); `d3ga` is
what has the API at its final place, from 2.37 on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Literal

from relay.core.events import JsonObject

Prefix = Literal["v2", "experimental"]

MIXED_SECONDS = 120.0  # so long a contradiction counts: a rolling upgrade asks in turn, an upgrade in place does not


class Dialect(StrEnum):
    """Closed: it labels a metric."""

    UNKNOWN = "unknown"  # too little was seen yet
    MIXED = "mixed"  # servers of two ages answer in turn
    D0 = "d0"  # March 2026: envelopes around frames, flat list
    D0B = "d0b"  # 2.32: also read marks and labels
    D1 = "d1"  # 2.33: bare frames, list of roots
    D1E = "d1e"  # 2.34: errors are objects
    D2 = "d2"  # 2.35, 2.36: live text in numbered episodes
    D3 = "d3"  # after 2.36: no spend limits of its own
    D3GA = "d3ga"  # 2.37 and later: at /api/v2/chats


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen; None: nothing that would tell."""

    prefix: Prefix | None = None  # where the chats API is
    frame: Literal["envelope", "raw"] | None = None  # how stream and watch frames are wrapped
    last_error: Literal["string", "object"] | None = None  # of a chat
    read_marks: bool | None = None  # `has_unread` in chats (since 2.32)
    tree_list: bool | None = None  # the list has roots, with `children` (since 2.33)
    asc_messages: bool | None = None  # `after_id` of the messages page gives the oldest first (since 2.33)
    sharing: bool | None = None  # `shared` in chats (since 2.35)
    episodes: bool | None = None  # live text has coordinates; history and preview are reset by events (since 2.35)
    rev_cursor: bool | None = None  # history versions, good for `after_revision` (since 2.38)
    native_limits: bool | None = None  # spend limits of chats (until 2.36)
    gateway: Literal["licensed", "unlicensed", "absent"] | None = None  # budgets of the AI Gateway

    def to_json(self) -> JsonObject:
        """What is known, by name."""
        return {name: value for name in _KINDS if (value := getattr(self, name)) is not None}

    def words(self) -> str:
        """For a person: `prefix experimental, bare frames, episodes, native limits`."""
        said = [
            self.prefix and f"prefix {self.prefix}",
            self.frame and {"envelope": "frames in envelopes", "raw": "bare frames"}[self.frame],
            self.last_error and {"string": "errors as text", "object": "errors as objects"}[self.last_error],
            _tells(self.read_marks, "read marks", "no read marks"),
            _tells(self.tree_list, "list of roots", "flat list"),
            _tells(self.asc_messages, "ascending message pages"),
            _tells(self.sharing, "sharing"),
            _tells(self.episodes, "episodes"),
            _tells(self.rev_cursor, "resume by revision"),
            _tells(self.native_limits, "native limits", "no native limits"),
            self.gateway and f"AI Gateway budgets {self.gateway}",
        ]
        return ", ".join(word for word in said if word) or "nothing seen yet"


def _tells(seen: bool | None, yes: str, no: str | None = None) -> str | None:
    return yes if seen else no if seen is False else None


def dialect_of(seen: Evidence) -> Dialect:
    """The name for what was seen, `unknown` while two ages would fit; never `mixed`.

    Frames count more than what chats have in them: a list may have been read before the server was upgraded.
    """
    if seen.prefix == "v2":
        return Dialect.D3GA
    if seen.frame == "envelope" or (seen.frame is None and seen.tree_list is False):
        return {True: Dialect.D0B, False: Dialect.D0, None: Dialect.UNKNOWN}[seen.read_marks]
    episodes = seen.sharing if seen.episodes is None else seen.episodes
    if episodes:
        return {True: Dialect.D2, False: Dialect.D3, None: Dialect.UNKNOWN}[seen.native_limits]
    if seen.frame == "raw" or seen.tree_list:
        if seen.last_error == "string":
            return Dialect.D1
        if seen.last_error == "object" and episodes is False:
            return Dialect.D1E
    return Dialect.UNKNOWN


_KINDS = tuple(f.name for f in fields(Evidence))

# A contradiction in one of these means two servers. The others may differ between two answers of one server.
_STEADY = (
    "prefix",
    "frame",
    "last_error",
    "read_marks",
    "tree_list",
    "asc_messages",
    "sharing",
    "episodes",
    "native_limits",
)


class Witness:
    """What was seen of one server so far: of each kind the newest, and whether it goes to and fro.

    Times are seconds of any clock that only grows.
    """

    def __init__(self) -> None:
        self.evidence = Evidence()
        self._last_seen: dict[tuple[str, object], float] = {}
        self._wavered: float | None = None  # when something came back that had changed shortly before

    def saw(self, found: Evidence, at: float) -> None:
        """Add what was found. What it leaves open stays as it was."""
        changed: dict[str, object] = {}
        for name in _KINDS:
            value = getattr(found, name)
            if value is None:
                continue
            if getattr(self.evidence, name) != value:
                changed[name] = value
                before = self._last_seen.get((name, value))
                if name in _STEADY and before is not None and at - before < MIXED_SECONDS:
                    self._wavered = at
            self._last_seen[name, value] = at
        if changed:
            self.evidence = replace(self.evidence, **changed)  # type: ignore[arg-type]

    def dialect(self, at: float) -> Dialect:
        """What the server speaks, as far as it is known at that time."""
        if self._wavered is not None and at - self._wavered < MIXED_SECONDS:
            return Dialect.MIXED
        return dialect_of(self.evidence)


# --- answers ---------------------------------------------------------------------------------------------------------


def chat_evidence(chat: Mapping[str, object]) -> Evidence:
    """Of a chat as the list or a read of it gives it. The chats of watch events are partial and tell nothing."""
    error = chat.get("last_error")
    # A server of before 2.34 writes null where there is no error, a later one leaves it out.
    as_object = "last_error" not in chat or isinstance(error, dict)
    return Evidence(
        last_error="object" if as_object else "string",
        read_marks="has_unread" in chat,
        sharing="shared" in chat,
    )


def list_evidence(rows: Sequence[Mapping[str, object]]) -> Evidence:
    """Of the list as sent. One row is as good as all: they are of one server."""
    if not rows:
        return Evidence()
    chat = chat_evidence(rows[0])
    return Evidence(
        last_error=chat.last_error, read_marks=chat.read_marks, sharing=chat.sharing, tree_list="children" in rows[0]
    )


def page_evidence(page: Mapping[str, object], *, after_id: int = 0) -> Evidence:
    """Of a page of messages that was asked for with this `after_id`; 0: without.

    The order tells only where there are two messages, and where `after_id` was above 0: the server takes 0 for unset.
    Servers that do not know the parameter answer with the newest first, so that a mere answer proves nothing.
    """
    rows = page.get("messages")
    rows = rows if isinstance(rows, list) else []
    ids = [row["id"] for row in rows if isinstance(row, dict) and type(row.get("id")) is int]
    ascending = ids[0] < ids[-1] if after_id > 0 and len(ids) > 1 else None
    return Evidence(asc_messages=ascending, rev_cursor=type(page.get("history_version")) is int or None)


def limits_evidence(status: int, said: str | None) -> Evidence:
    """Of an answer to `usage-limits/status`; `said` is Coder's error text, None when something else answered.

    Without limits the path falls into that of one chat: 400 `Invalid UUID "usage-limits"`, and not 404.
    """
    if status == 200 or (status == 403 and said is not None):
        return Evidence(native_limits=True)
    gone = said is not None and (status == 404 or (status == 400 and said.startswith("Invalid UUID")))
    return Evidence(native_limits=False) if gone else Evidence()


def gateway_evidence(status: int, said: str | None) -> Evidence:
    """Of an answer to a user's `ai/spend`; `said` as for `limits_evidence`."""
    if status == 200:
        return Evidence(gateway="licensed")
    if said is None:
        return Evidence()
    names: dict[int, Literal["unlicensed", "absent"]] = {403: "unlicensed", 404: "absent"}
    return Evidence(gateway=names.get(status))


# --- frames ----------------------------------------------------------------------------------------------------------
# Read as text: whoever follows the chat parses the frame. The server writes compact JSON with the type first, and an
# event is surely one of the frame's own, and not an object inside a tool's result, only at the frame's two ends.

_ENDS = 400  # characters of a frame's beginning and end that are looked at
_ONE_RESET = r'\{"type":"preview_reset","chat_id":"[^"]*"\}'
_ENDS_IN_RESET = re.compile(rf"{_ONE_RESET}\]\s*\Z")
_ENDS_IN_COORDINATES = re.compile(r'"history_version":\d+,"generation_attempt":\d+,"seq":\d+\}\}\]\s*\Z')
_ENDS_IN_VERSION = re.compile(rf'"status":\{{[^{{}}]*"history_version":\d+[^{{}}]*\}}\}}(?:,{_ONE_RESET})*\]\s*\Z')


def frame_evidence(text: str) -> Evidence:
    """Of a text frame of a stream or of the watch socket."""
    head, tail = text[:_ENDS].lstrip(), text[-_ENDS:]
    if head.startswith("["):
        return Evidence(
            frame="raw", episodes=_episodes(text, head, tail), rev_cursor=bool(_ENDS_IN_VERSION.search(tail)) or None
        )
    if head.startswith(('{"type":"ping"', '{"type":"data"', '{"type":"error","data"')):
        return Evidence(frame="envelope")
    if head.startswith(('{"kind":', '{"type":')):
        return Evidence(frame="raw")
    return Evidence()


def _episodes(text: str, head: str, tail: str) -> bool | None:
    if head.startswith(('[{"type":"history_reset"', '[{"type":"preview_reset"')) or _ENDS_IN_RESET.search(tail):
        return True
    if _ENDS_IN_COORDINATES.search(tail):
        return True
    if head.startswith('[{"type":"message_part"') and '},{"type":"' not in text:
        return False  # one part, and it has none
    return None


def tells_all(found: Evidence, *, of_chat: bool) -> bool:
    """Whether a connection's frames need not be looked at any further."""
    return found.frame == "envelope" or (found.frame == "raw" and (not of_chat or found.episodes is not None))
