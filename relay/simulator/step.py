"""One step's output while the model speaks, and what an interrupt makes of it; live parts; what a step waits for."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from relay.simulator import model
from relay.simulator.dialect import PartEvent
from relay.simulator.state import Chat, Database, Part

EPISODE_BYTES = 1 << 20
INTERRUPTED_RESULT = {"error": "tool call was interrupted before it produced a result"}


class StepOutput:
    """What the model has said in the step so far: blocks that ended, blocks that have not, and when."""

    def __init__(self, database: Database) -> None:
        self.content: list[Part] = []
        self.calls: list[model.Call] = []
        self.call_ids: dict[int, str] = {}
        self.results: list[Part] = []
        self._database = database
        self._open_kind = ""
        self._open_texts: list[str] = []
        self._opened_at: datetime | None = None
        self._fragments: dict[int, tuple[str, str]] = {}

    def add(self, chunk: model.Chunk) -> list[Part]:
        """Take a chunk; the parts that announce it live."""
        match chunk:
            case model.Text(text):
                return [self._extend("text", text)]
            case model.Reasoning(text):
                return [self._extend("reasoning", text)]
            case model.Arguments(call, tool, delta):
                self._close()
                call_id = self.call_ids.setdefault(call, self._database.new_call_id())
                self._fragments[call] = (tool, self._fragments.get(call, ("", ""))[1] + delta)
                return [Part("tool-call", tool_call_id=call_id, tool_name=tool, args_delta=delta)]
            case model.Call(call, tool, args):
                self._close()
                self._fragments.pop(call, None)
                call_id = self.call_ids.setdefault(call, self._database.new_call_id())
                now = self._database.clock.now()
                part = Part("tool-call", tool_call_id=call_id, tool_name=tool, args=args, created_at=now)
                self.calls.append(chunk)
                self.content.append(part)
                return [part]
            case _:
                return []

    def _extend(self, kind: str, text: str) -> Part:
        if self._open_kind != kind:
            self._close()
            self._open_kind = kind
            self._opened_at = self._database.clock.now() if kind == "reasoning" else None
        self._open_texts.append(text)
        return Part(kind, text=text, created_at=self._opened_at)

    def _close(self) -> None:
        if self._open_kind:
            ended_at = self._database.clock.now() if self._opened_at else None
            text = "".join(self._open_texts)
            part = Part(self._open_kind, text=text, created_at=self._opened_at, completed_at=ended_at)
            self.content.append(part)
            self._open_kind, self._open_texts, self._opened_at = "", [], None

    def finish(self) -> None:
        """The output ended. A call whose arguments never became JSON is forgotten."""
        self._close()
        self._fragments.clear()

    def interrupted(self) -> tuple[list[Part], list[Part]]:
        """Content and results as an interrupted step stores them: ended blocks, open text, unfinished calls."""
        self._close()
        for call, (tool, fragment) in self._fragments.items():
            args = go_value(fragment)
            self.content.append(Part("tool-call", tool_call_id=self.call_ids[call], tool_name=tool, args=args))
        answered = {part.tool_call_id for part in self.results}
        missing = [
            Part(
                "tool-result",
                tool_call_id=part.tool_call_id,
                tool_name=part.tool_name,
                result=INTERRUPTED_RESULT,
                is_error=True,
            )
            for part in self.content
            if part.type == "tool-call" and part.tool_call_id not in answered
        ]
        return self.content, self.results + missing


@dataclass
class Episode:
    """Live parts of one attempt at one history version, numbered from 1 without a gap.

    It takes about a mebibyte; of what comes after that, no stream ever hears.
    """

    history_version: int
    attempt: int
    parts: list[PartEvent] = field(default_factory=list)
    _room: int = EPISODE_BYTES

    @property
    def key(self) -> tuple[int, int]:
        return self.history_version, self.attempt

    def add(self, role: str, part: Part, size: int) -> bool:
        """Take a part of so many bytes; whether there was room for it."""
        if size > self._room:
            self._room = 0
            return False
        self._room -= size
        self.parts.append(PartEvent(role, part, self.key, len(self.parts) + 1))
        return True


def open_calls(chat: Chat) -> list[Part]:
    """Calls of the last step that have no result yet."""
    history = chat.history()
    last = max((i for i, message in enumerate(history) if message.role == "assistant"), default=len(history))
    answered = {part.tool_call_id for message in history[last:] for part in message.content if message.role == "tool"}
    if any(message.role == "user" for message in history[last:]):
        return []
    return [
        part
        for message in history[last : last + 1]
        for part in message.content
        if part.type == "tool-call" and part.tool_call_id not in answered
    ]


def result_of(call: Part, result: Any, *, is_error: bool, created_at: datetime | None = None) -> Part:
    """A call's result; what a client or an interrupt gives has no time."""
    return Part(
        "tool-result",
        tool_call_id=call.tool_call_id,
        tool_name=call.tool_name,
        result=result,
        is_error=is_error,
        created_at=created_at,
    )


def go_value(fragment: str) -> Any:
    """The decoded JSON of a complete fragment, None for anything else."""

    try:
        return json.loads(fragment)
    except ValueError:
        return None
