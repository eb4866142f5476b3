"""docs/compatibility.md: what each age of server gives and lacks, read off the recordings and off following them.

`python -m tests.compatibility > docs/compatibility.md` makes the page. The last column has no recording: it comes
from the simulator, which was written from the description of those servers.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from relay.core.transcript import differences
from relay.simulator.dialect import DIALECTS, Features
from tests.core.captures import OURS, followed
from tests.core.laws import assert_honest_previews, data_of, fold, turns

FOLDERS = ("d0", "d0b", "d1", "d1e", "d2", "d2b", "d3")
SERVERS = ("seed, Mar 2026", "2.32", "2.33", "2.34 ESR", "2.35", "2.36", "Aug 2026", "2.37 and later")
NAMES = ("D0", "D0b", "D1", "D1e", "D2", "D2b", "D3", "D3ga")
YES, NO, UNKNOWN = "yes", "no", "?"

HEAD = """\
# Which Coder servers, and what each gives

The relay follows every server that has the chats API, from the seed of March 2026 on. What it speaks to is found out
from what the server sends, never from its version; `relay check` shows it. This page is made from recordings of real
servers (`tests/data/captures`, one folder a column) and from what the relay told when it followed them; the last column
has no recording and comes from the simulator. It is what the relay calls any server with `/api/v2/chats`; resuming by
history version came with about 2.38. `make contract` makes it anew, and a test fails when it is out of date.

Events are the same on all of them. What differs is what the server gives the relay to make them from:
"""

NOTES = """\

## What it means

- **Edits.** Up to 2.34 a stream tells an edit by next to nothing: the relay recognises the one mark there is, and reads
  the messages by REST when it is in doubt (those are the reads in the table). From 2.35 on the stream says so, at the
  price that a chat which was ever edited tells its whole history on each connect; the relay keeps it to itself. From
  about 2.38 on it asks with `after_revision` and gets what changed.
- **Live text.** Up to 2.34 parts have no numbers: they are placed by what they say. Where the server lost some, a
  `preview.reset` says so.
- **An action that a chat waits for** is told to who joins only from 2.35 on; for older servers it is built from the
  last message.
- **Money.** Where there are no native limits, and where model configs say no price, the meter prices from
  `RELAY_METER__PRICES` alone, and says so in its log and its status. AI Gateway budgets are read where the server is
  licensed for them; 403 and 404 mean that it is not.
- **Archived chats are deleted** by servers from 2.33 on, after 30 days unless set otherwise. The archivist tells when
  one without a verified copy comes near.
- **The owner's read mark** moves when a stream is opened and when it ends: by anybody's up to 2.33, by the owner's only
  from 2.34 on. So a chat that is followed with the owner's token does not stay unread; the relay sets the mark back
  where the server can do that (from about 2.38 on), and follows with another account's token where one may read the
  chat. `docs/accounts.md` says more.
- **An upgrade while the relay runs**, also one that moves the API to `/api/v2/chats`, and two ages of servers behind
  one address, lose nothing and tell nothing twice.
"""


@dataclass
class Recorded:
    """What the recordings of one server show."""

    first_characters: set[str] = field(default_factory=set)
    event_types: set[str] = field(default_factory=set)
    statuses: set[str] = field(default_factory=set)
    watch_kinds: set[str] = field(default_factory=set)
    numbered_parts: bool = False
    errors: set[str] = field(default_factory=set)
    children: bool = False
    organizations: bool = False
    ascending: bool = False
    chat_keys: set[str] = field(default_factory=set)
    answers: dict[str, set[int]] = field(default_factory=dict)

    def answered(self, call: str, status: int = 200) -> bool:
        return status in self.answers.get(call, set())


def lines(folder: str) -> Iterator[dict[str, Any]]:
    for path in sorted((OURS / folder).glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                yield json.loads(line)


@cache
def recorded(folder: str) -> Recorded:
    found = Recorded()
    for row in lines(folder):
        if row.get("kind") == "frame":
            _frame(found, row)
        elif "rest" in row:
            _rest(found, row)
    return found


def _frame(found: Recorded, row: dict[str, Any]) -> None:
    value = json.loads(row["raw"])
    if row["conn"].startswith("watch"):
        inner = value.get("data") if value.get("type") == "data" else value
        if inner and inner.get("kind"):
            found.watch_kinds.add(inner["kind"])
        return
    found.first_characters.add(row["raw"][0])
    for event in (value.get("data") or []) if isinstance(value, dict) else value:
        found.event_types.add(event["type"])
        if event["type"] == "status":
            found.statuses.add(event["status"]["status"])
        if event["type"] == "message_part":
            found.numbered_parts |= "seq" in event["message_part"]


def _rest(found: Recorded, row: dict[str, Any]) -> None:
    method, _, path = row["rest"].partition(" ")
    plain = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", path).replace("/api/experimental/chats", "BASE")
    call = f"{method} {re.sub(r'/[0-9]+', '/N', plain.partition('?')[0])}"
    found.answers.setdefault(call, set()).add(int(row["status"]))
    try:
        body = json.loads(row["body"]) if isinstance(row["body"], str) else row["body"]
    except (KeyError, ValueError):  # too large to be recorded, or none
        return
    if call == "GET BASE" and row["status"] == 200:
        found.children |= any("children" in chat for chat in body)
    if call == "GET BASE/ID" and row["status"] == 200:
        found.chat_keys |= body.keys()
        if body.get("last_error"):
            found.errors.add("text" if isinstance(body["last_error"], str) else "object")
    if row["status"] == 400 and isinstance(body, dict):
        found.organizations |= "organization_id is required" in str(body.get("message"))
    if call == "GET BASE/ID/messages" and "after_id=" in plain and isinstance(body, dict):
        ids = [message["id"] for message in body.get("messages") or []]
        found.ascending |= len(ids) > 1 and ids == sorted(ids)


@cache
def outcome(folder: str) -> dict[str, int]:
    """What the relay told when it followed the recordings."""
    total = dict.fromkeys(("chats", "equal", "prompts", "turns", "steps", "told", "reads", "edits"), 0)
    for path in sorted((OURS / folder).glob("*.jsonl")):
        for one in followed(path):
            events = one.life.events
            previews = assert_honest_previews(events)
            total["chats"] += 1
            total["equal"] += not differences(fold(events), one.truth)
            total["prompts"] += len(one.ended)
            total["turns"] += len(one.ended & turns(events).keys())
            total["steps"] += previews.equal + previews.prefix
            total["told"] += previews.equal
            total["reads"] += len(one.life.reconciles)
            total["edits"] += sum(e.event == "history" and data_of(e)["reason"] == "edit" for e in events)
    return total


def either(value: bool) -> str:
    return YES if value else NO


def of(folder: str, first: str, second: str) -> str:
    total = outcome(folder)
    return f"{total[first]} of {total[second]}"


def read_marks(folder: str) -> dict[str, bool]:
    """What the list said of one chat's `has_unread` after each deed; empty where chats have none."""
    path = OURS / folder / "unread2.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
    return {row["note"]: row["has_unread"][0] for row in rows if "has_unread" in row}


def read_mark_mover(folder: str) -> str:
    marks = read_marks(folder)
    if not marks:
        return "there is none"
    assert not marks["while the owner streams"]
    return "the owner" if marks["after the admin (site owner, not chat owner) streamed"] else "anybody"


def mark_restored(folder: str) -> str:
    return either(read_marks(folder).get("after PATCH read:false", False))


GA: Features = DIALECTS["d3ga"].features

# name -> (a recorded server's cell, the cell of the last column)
ROWS: dict[str, tuple[Callable[[str], str], str]] = {
    "path of the API": (lambda _: "`/api/experimental/chats`", f"`{GA.prefixes[0]}`"),
    "frames": (
        lambda d: "envelope" if recorded(d).first_characters == {"{"} else "bare array",
        "bare array" if GA.raw_frames else "envelope",
    ),
    "numbered live parts": (lambda d: either(recorded(d).numbered_parts), either(GA.episodes)),
    "edits told by the stream": (lambda d: either("history_reset" in recorded(d).event_types), either(GA.episodes)),
    "resume by history version": (lambda _: NO, either(GA.revisions)),
    "statuses seen": (lambda d: ", ".join(sorted(recorded(d).statuses)), UNKNOWN),
    "waits for client tools": (
        lambda d: either("action_required" in recorded(d).event_types),
        either(GA.actions),
    ),
    "`last_error`": (
        lambda d: ", ".join(sorted(recorded(d).errors)) or UNKNOWN,
        "object" if GA.error_object else "text",
    ),
    "watch events seen": (lambda d: ", ".join(sorted(recorded(d).watch_kinds)) or UNKNOWN, UNKNOWN),
    "list of chats": (lambda d: "roots with `children`" if recorded(d).children else "flat", "roots with `children`"),
    "messages in ascending pages": (lambda d: either(recorded(d).ascending), either(GA.ascending_pages)),
    "organization needed to create": (lambda d: either(recorded(d).organizations), either(GA.organizations)),
    "whole-chat summary": (lambda d: either("summary" in recorded(d).chat_keys), YES),
    "sharing": (lambda d: either(recorded(d).answered("GET BASE/ID/acl")), YES),
    "the owner's read mark is moved by": (read_mark_mover, "the owner"),
    "a read mark can be set back": (mark_restored, either(GA.unread_again)),
    "an administrator finds other users' chats": (
        lambda d: either(recorded(d).answered("GET BASE/usage-limits/status")),
        either(GA.native_limits),
    ),
    "native limits and cost reports": (
        lambda d: either(recorded(d).answered("GET BASE/usage-limits/status")),
        either(GA.native_limits),
    ),
    "cost of one chat": (lambda d: either(recorded(d).answered("GET BASE/ID/cost")), YES),
    "deletes archived chats": (lambda d: either(recorded(d).answered("GET BASE/config/retention-days")), YES),
    "refuses to archive an active chat": (lambda d: either(recorded(d).answered("PATCH BASE/ID", 409)), YES),
}

MEASURED: dict[str, Callable[[str], str]] = {
    "chats whose fold equals REST": lambda d: of(d, "equal", "chats"),
    "ended turns told, each once": lambda d: of(d, "turns", "prompts"),
    "steps whose live text is the whole text": lambda d: of(d, "told", "steps"),
    "edits told": lambda d: str(outcome(d)["edits"]),
    "REST reads because the stream left a doubt": lambda d: str(outcome(d)["reads"]),
}


def page() -> str:
    """The whole page."""
    head = ["", *(f"{name} ({server})" for name, server in zip(NAMES, SERVERS, strict=True))]
    table = [head, ["---"] * len(head)]
    table += [[name, *(cell(folder) for folder in FOLDERS), last] for name, (cell, last) in ROWS.items()]
    measured = [["", *NAMES[:-1]], ["---"] * len(NAMES)]
    measured += [[name, *(cell(folder) for folder in FOLDERS)] for name, cell in MEASURED.items()]
    return "\n".join(
        [
            HEAD,
            *(f"| {' | '.join(row)} |" for row in table),
            "\nFollowed from the first frame to the last:\n",
            *(f"| {' | '.join(row)} |" for row in measured),
            NOTES,
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(page())
