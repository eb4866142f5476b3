"""What a server sends, in the fewest words: events, frames of them, REST bodies."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from relay.core.events import ChatRef, Event
from relay.core.frames import Frame, decode_frame
from relay.core.resume import ResumePoint
from relay.core.tail import Batch, ChatTail
from tests.core.laws import data_of

Json = dict[str, Any]

CHAT = UUID("5f0c2f5e-8a1d-4c57-9e55-6b8d0f2a7c31")
OWNER = UUID("0d9a3b52-6f1e-4b7c-8a44-2f1f6c9e7d10")
REF = ChatRef("https://coder.test", CHAT, OWNER, CHAT)
AT = datetime(2026, 3, 20, 18, 20, tzinfo=UTC)
STORED = "2026-03-20T18:19:00Z"
_EMPTY: Json = {
    "text": "",
    "url": "",
    "media_type": "",
    "file_id": None,
    "file_name": "",
    "start_line": 0,
    "end_line": 0,
    "content": "",
}


def part(kind: str, text: str = "", **fields: object) -> Json:
    """A part as it travels, with all the keys that are never left out."""
    return {"type": kind, **_EMPTY, "text": text, **fields}


def call(id_: str, **fields: Any) -> Json:
    return part("tool-call", tool_call_id=id_, tool_name="execute", **fields)


def result(id_: str, **fields: Any) -> Json:
    return part("tool-result", tool_call_id=id_, tool_name="execute", result={"output": "ok"}, **fields)


# --- messages ---------------------------------------------------------------------------------------------------------


def message(id_: int, role: str, *content: Json, **fields: object) -> Json:
    return {"id": id_, "chat_id": str(CHAT), "created_at": STORED, "role": role, "content": list(content), **fields}


def user(id_: int, text: str = "do it") -> Json:
    return message(id_, "user", part("text", text))


def assistant(id_: int, text: str = "", *parts: Json, reasoning: str = "", usage: Json | None = None) -> Json:
    """A regularly finished step: it has usage."""
    content = [part("reasoning", reasoning)] if reasoning else []
    content += [part("text", text)] if text else []
    return message(id_, "assistant", *content, *parts, usage={"input_tokens": 10, "output_tokens": 2, **(usage or {})})


def interrupted(id_: int, text: str = "", *parts: Json) -> Json:
    """An assistant message of a step that was cut short: no usage."""
    return message(id_, "assistant", *([part("text", text)] if text else []), *parts)


def tool(id_: int, *calls: str) -> Json:
    return message(id_, "tool", *(result(each) for each in calls))


def compaction(id_: int) -> list[Json]:
    """The two visible messages that a compaction leaves."""
    name = {"tool_call_id": "chat_summarized_1", "tool_name": "chat_summarized"}
    return [
        message(id_, "assistant", part("tool-call", args={"source": "automatic"}, **name)),
        message(id_ + 1, "tool", part("tool-result", result={"summary": "so far"}, **name)),
    ]


# --- events and frames ------------------------------------------------------------------------------------------------


def event(kind: str, **fields: object) -> Json:
    return {"type": kind, "chat_id": str(CHAT), **fields}


def status(value: str, revision: int | None = None) -> Json:
    return event("status", status={"status": value} | ({} if revision is None else {"history_version": revision}))


HISTORY_RESET = event("history_reset")
PREVIEW_RESET = event("preview_reset")


def msg(raw: Json) -> Json:
    return event("message", message=raw)


def live(*parts: Json) -> list[Json]:
    """Parts of the step in progress."""
    return [
        event(
            "message_part", message_part={"role": "tool" if one["type"] == "tool-result" else "assistant", "part": one}
        )
        for one in parts
    ]


def numbered(episode: tuple[int, int], first: int, *parts: Json) -> list[Json]:
    """Live parts of a server that numbers them: `episode` is (history version, attempt)."""
    events = live(*parts)
    for seq, one in enumerate(events, first):
        body = one["message_part"]
        body["history_version"], body["generation_attempt"] = episode
        body["seq"] = seq
    return events


def words(episode: tuple[int, int], first: int, *pieces: str) -> list[Json]:
    """Numbered text."""
    return numbered(episode, first, *(part("text", piece) for piece in pieces))


def action(*calls: str) -> Json:
    """The chat waits for the client's results."""
    asked = [{"tool_call_id": id_, "tool_name": "execute", "args": '{"x": 1}'} for id_ in calls]
    return event("action_required", action_required={"tool_calls": asked})


def text(*pieces: str) -> list[Json]:
    return live(*(part("text", piece) for piece in pieces))


def queued(id_: int, prompt: str) -> Json:
    return {"id": id_, "chat_id": str(CHAT), "content": [part("text", prompt)], "created_at": STORED}


def queue(*entries: Json) -> Json:
    """The whole queue; the key is left out when it is empty."""
    return event("queue_update", queued_messages=list(entries)) if entries else event("queue_update")


def error(said: str, **fields: object) -> Json:
    return event("error", error={"message": said, **fields})


def retry(attempt: int, retrying_at: str = "2026-03-20T18:20:05.901733002Z", **fields: object) -> Json:
    body = {
        "attempt": attempt,
        "delay_ms": 1000 * 2 ** (attempt - 1),
        "error": "overloaded",
        "retrying_at": retrying_at,
    }
    return event("retry", retry={**body, **fields})


def frame(*events: Json | list[Json]) -> Frame:
    flat = [one for each in events for one in (each if isinstance(each, list) else [each])]
    return decode_frame(json.dumps({"type": "data", "data": flat}))


# --- a tail in the test's hand ----------------------------------------------------------------------------------------


class Tail:
    """A tail with all that came out of it. `events` are those of the last input."""

    def __init__(self, resume: ResumePoint | None = None, *, session: int = 1) -> None:
        self._resume = resume or ResumePoint()
        self.tail = ChatTail(REF, session, self._resume)
        self.batch = Batch()
        self.all: list[Event] = []

    def _keep(self, batch: Batch) -> list[Event]:
        self.batch = batch
        self.all += batch.events
        return batch.events

    def connect(self, *snapshot: Json | list[Json], after: int | None = None) -> list[Event]:
        """Open a stream, by default with the tail's own cursor, and feed its snapshot."""
        self.tail.connected(self.tail.after if after is None else after)
        return self._keep(self.tail.feed(frame(*snapshot), AT))

    def reconnect(self, *snapshot: Json | list[Json]) -> list[Event]:
        self.tail.disconnected()
        return self.connect(*snapshot)

    def feed(self, *events: Json | list[Json]) -> list[Event]:
        return self._keep(self.tail.feed(frame(*events), AT))

    def answer(
        self, *messages: Json, status: str = "waiting", last_error: object = None, complete: bool = True
    ) -> list[Event]:
        """REST says that these are the messages (oldest first)."""
        chat: Json = {"id": str(CHAT), "status": status, "last_error": last_error}
        return self._keep(self.tail.answered(chat, list(reversed(messages)), complete=complete, at=AT))

    def settle(self) -> list[Event]:
        return self._keep(self.tail.settled(AT))

    def recheck(self) -> list[Event]:
        return self._keep(self.tail.recheck(AT))

    @property
    def wants(self) -> str | None:
        return self.batch.wants.reason if self.batch.wants else None

    def gives_up(self) -> str | None:
        return self.batch.reconnect

    def is_idle(self) -> bool:
        return self.tail.idle

    def is_running(self) -> bool:
        return self.tail.running

    def is_settling(self) -> bool:
        return self.tail.settling

    def to_save(self) -> ResumePoint:
        self._resume = self.tail.commit().onto(self._resume.known)
        return self._resume

    def again(self, *, clean: bool = True, saved: ResumePoint | None = None) -> "Tail":
        """The tail of the next session, from what this one saved."""
        point = saved or self.to_save()
        stored: Json = json.loads(json.dumps(point.to_json()))
        resume = ResumePoint.from_json(stored, known=point.known, clean=clean)
        return Tail(resume, session=self.tail.session + 1)


def told(events: Sequence[Event], *kinds: str) -> list[str]:
    """Events in a few words each, of the given kinds or all: `message 5`, `text 0+3 abc`, `reset 0 gap`."""
    return [_word(one) for one in events if not kinds or one.event in kinds]


def _word(one: Event) -> str:
    data = data_of(one)
    match one.event:
        case "message":
            return f"message {data['message']['id']}"
        case "history":
            return f"history {' '.join(map(str, data['message_ids']))} ({data['reason']})"
        case "turn":
            return f"{one.detail} {' '.join(map(str, data['message_ids']))}"
        case "queue":
            return f"queue {' '.join(str(entry['id']) for entry in data['queued_messages'])}".strip()
        case "error":
            return f"error {data['reason']}: {data['message']}"
        case "preview" if one.detail == "reset":
            return f"reset {data['step']} {data['reason']}"
        case "preview":
            told_part = data["part"]
            said = told_part.get("args_delta") or told_part["text"] or told_part.get("tool_call_id", "")
            return f"{one.detail} {data['step']}+{data['offset']} {said}".strip()
        case _:
            return f"{one.event} {one.detail}"
