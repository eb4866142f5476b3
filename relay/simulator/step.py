"""One step's output while the model speaks, and what an interrupt makes of it."""

import json
from typing import Any

from relay.simulator import model
from relay.simulator.state import Database, Part

INTERRUPTED_RESULT = {"error": "tool call was interrupted before it produced a result"}


class StepOutput:
    """What the model has said in the step so far: blocks that ended, blocks that have not."""

    def __init__(self, database: Database) -> None:
        self.content: list[Part] = []
        self.calls: list[model.Call] = []
        self.call_ids: dict[int, str] = {}
        self.results: list[Part] = []
        self._database = database
        self._open_kind = ""
        self._open_texts: list[str] = []
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
                part = Part("tool-call", tool_call_id=call_id, tool_name=tool, args=args)
                self.calls.append(chunk)
                self.content.append(part)
                return [part]
            case _:
                return []

    def _extend(self, kind: str, text: str) -> Part:
        if self._open_kind != kind:
            self._close()
            self._open_kind = kind
        self._open_texts.append(text)
        return Part(kind, text=text)

    def _close(self) -> None:
        if self._open_kind:
            self.content.append(Part(self._open_kind, text="".join(self._open_texts)))
            self._open_kind, self._open_texts = "", []

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


def go_value(fragment: str) -> Any:
    """The decoded JSON of a complete fragment, None for anything else."""

    try:
        return json.loads(fragment)
    except ValueError:
        return None
