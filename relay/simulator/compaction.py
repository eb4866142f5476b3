"""Compaction by hand, since 2.36: the model goes on from a summary, which shows in the history as a call of a tool.

A hidden row asks for it; a worker that finds that row at the end of the history writes the summary. As seen running on
c9a1e2b.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from aiohttp import web

from relay.simulator.calls import Call, Handler, Refused, answer_json
from relay.simulator.dialect import Dialect
from relay.simulator.state import Chat, Database, Message, Part
from relay.simulator.turns import NotAllowed

Route: TypeAlias = tuple[str, str, Handler]

TOOL = "chat_summarized"
REQUEST = (Part("text", text="compact"),)
SUMMARY = "Lab title"  # the scripted model's, whatever was said


class Compacts(Protocol):
    """The machine, as far as it is asked for a compaction."""

    def compact(self, chat: Chat) -> None:
        """
        Raises:
            NotAllowed: The chat is at work.
        """


class CompactionApi:
    """Its one route."""

    def __init__(self, machine: Compacts, dialect: Dialect) -> None:
        self._machine = machine
        self._dialect = dialect
        self.routes: Sequence[Route] = [("POST", "{chat}/compact", self.compact)]

    async def compact(self, call: Call) -> web.StreamResponse:
        """The answer is the chat, running again. How the server words a refusal was not seen."""
        try:
            self._machine.compact(call.chat)
        except NotAllowed as exc:
            detail = f"execute transaction: chat state transition Compact not allowed from state {exc.state}"
            raise Refused(409, "Chat cannot be compacted in its current state.", detail) from exc
        return answer_json(self._dialect.chat(call.chat))


def is_wanted(chat: Chat) -> bool:
    """Whether a compaction is the next thing to do."""
    rows = [message for message in chat.messages if not message.deleted]
    return not rows[-1].visible and rows[-1].content == REQUEST


def is_summary(message: Message) -> bool:
    """Whether the message ends a compaction."""
    return message.role == "tool" and all(part.tool_name == TOOL for part in message.content)


def summarise(chat: Chat, database: Database) -> tuple[Part, Part]:
    """The call and its result. The context is what the last answer had read."""
    config = database.model_of(chat)
    limit, threshold = (config.context_limit, config.compression_threshold) if config else (0, 0)
    usages = [message.usage for message in chat.history() if message.usage is not None]
    tokens = usages[-1].input_tokens + usages[-1].cache_read_tokens if usages else 0
    call_id = f"{TOOL}_{database.new_id()}"
    args = {"source": "manual", "threshold_percent": threshold}
    result = {
        "context_limit_tokens": limit,
        "context_tokens": tokens,
        "source": "manual",
        "summary": SUMMARY,
        "threshold_percent": threshold,
        "usage_percent": 100 * tokens / limit if limit else 0,
    }
    call = Part("tool-call", tool_call_id=call_id, tool_name=TOOL, args=args)
    return call, Part("tool-result", tool_call_id=call_id, tool_name=TOOL, result=result)
