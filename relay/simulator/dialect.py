"""What the server's values and events look like on the wire. A dialect is one server age's way to write them.

The rest of the simulator knows events and rows only; keys, their order and the frame around them stand here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from uuid import UUID

from relay.simulator.state import Chat, Message, Part, QueuedMessage, Usage
from relay.simulator.wire import NIL_UUID, JsonObject, go_json, rfc3339, rfc3339_nanoseconds

EVENTS_PER_FRAME = 256


@dataclass(frozen=True)
class StatusEvent:
    status: str


@dataclass(frozen=True)
class MessageEvent:
    message: Message


@dataclass(frozen=True)
class PartEvent:
    role: str
    part: Part


@dataclass(frozen=True)
class QueueEvent:
    queue: tuple[QueuedMessage, ...]


@dataclass(frozen=True)
class RetryEvent:
    """`retrying_at`: Unix time in nanoseconds."""

    attempt: int
    delay_ms: int
    error: str
    retrying_at: int


@dataclass(frozen=True)
class ErrorEvent:
    message: str


Event: TypeAlias = StatusEvent | MessageEvent | PartEvent | QueueEvent | RetryEvent | ErrorEvent


class Dialect(Protocol):
    """One server age. Frames and bodies are text that ends in a newline, as the server sends them."""

    name: str

    def chat(self, chat: Chat, *, diff_status: bool = False) -> JsonObject: ...
    def message(self, message: Message) -> JsonObject: ...
    def queued_message(self, queued: QueuedMessage) -> JsonObject: ...
    def stream_frame(self, chat_id: UUID, events: Sequence[Event]) -> str: ...
    def watch_hello(self) -> str: ...
    def watch_frame(self, kind: str, chat: Chat) -> str: ...


class EnvelopeDialect:
    """D0, Coder at ff8dcca (2026-03-20): `{"type":"data","data":[…]}` around the events."""

    name = "d0"

    def chat(self, chat: Chat, *, diff_status: bool = False) -> JsonObject:
        body = self._chat_head(chat, chat.last_model_config_id, chat.last_error)
        if diff_status:
            body["diff_status"] = {
                "chat_id": str(chat.id),
                "pull_request_title": "",
                "pull_request_draft": False,
                "changes_requested": False,
                "additions": 0,
                "deletions": 0,
                "changed_files": 0,
            }
        return body | {
            "created_at": rfc3339(chat.created_at),
            "updated_at": rfc3339(chat.updated_at),
            "archived": chat.archived,
            "mcp_server_ids": [str(server) for server in chat.mcp_server_ids],
        }

    def _chat_head(self, chat: Chat, model: UUID, last_error: str | None) -> JsonObject:
        body: JsonObject = {"id": str(chat.id), "owner_id": str(chat.owner_id)}
        if chat.parent_id is not None:
            body["parent_chat_id"] = str(chat.parent_id)
        return body | {
            "root_chat_id": str(chat.root_id or chat.parent_id or chat.id),
            "last_model_config_id": str(model),
            "title": chat.title,
            "status": chat.status,
            "last_error": last_error,
        }

    def watch_chat(self, chat: Chat) -> JsonObject:
        """The partial chat of watch events: four fields are zero whatever the row says."""
        return self._chat_head(chat, NIL_UUID, None) | {
            "created_at": rfc3339(chat.created_at),
            "updated_at": rfc3339(chat.updated_at),
            "archived": False,
            "mcp_server_ids": None,
        }

    def message(self, message: Message) -> JsonObject:
        body: JsonObject = {"id": message.id, "chat_id": str(message.chat_id)}
        if message.created_by is not None:
            body["created_by"] = str(message.created_by)
        if message.model_config_id is not None:
            body["model_config_id"] = str(message.model_config_id)
        body["created_at"] = rfc3339(message.created_at)
        body["role"] = message.role
        if message.content:
            body["content"] = [self.part(part) for part in message.content]
        if message.usage is not None:
            body["usage"] = self.usage(message.usage)
        return body

    def usage(self, usage: Usage) -> JsonObject:
        return {name: getattr(usage, name) for name in _USAGE_KEYS if getattr(usage, name)}

    def part(self, part: Part) -> JsonObject:
        """Every part has the keys that some kind of part needs, zero where this kind does not."""
        body: JsonObject = {"type": part.type, "text": part.text}
        for name in ("tool_call_id", "tool_name"):
            if getattr(part, name):
                body[name] = getattr(part, name)
        if part.args is not None:
            body["args"] = part.args
        if part.args_delta:
            body["args_delta"] = part.args_delta
        if part.result is not None:
            body["result"] = part.result
        if part.is_error:
            body["is_error"] = True
        if part.source_id:
            body["source_id"] = part.source_id
        body["url"] = part.url
        if part.title:
            body["title"] = part.title
        return body | {
            "media_type": part.media_type,
            "file_id": str(part.file_id) if part.file_id else None,
            "file_name": part.file_name,
            "start_line": part.start_line,
            "end_line": part.end_line,
            "content": part.content,
        }

    def queued_message(self, queued: QueuedMessage) -> JsonObject:
        return {
            "id": queued.id,
            "chat_id": str(queued.chat_id),
            "content": [self.part(part) for part in queued.content],
            "created_at": rfc3339(queued.created_at),
        }

    def event(self, chat_id: UUID, event: Event) -> JsonObject:
        def named(kind: str, payload: JsonObject) -> JsonObject:
            return {"type": kind, "chat_id": str(chat_id), kind: payload}

        match event:
            case StatusEvent(status):
                return named("status", {"status": status})
            case MessageEvent(message):
                return named("message", self.message(message))
            case PartEvent(role, part):
                return named("message_part", {"role": role, "part": self.part(part)})
            case RetryEvent(attempt, delay_ms, error, retrying_at):
                at = rfc3339_nanoseconds(retrying_at)
                return named("retry", {"attempt": attempt, "delay_ms": delay_ms, "error": error, "retrying_at": at})
            case ErrorEvent(text):
                return named("error", {"message": text})
            case QueueEvent(queue):
                body: JsonObject = {"type": "queue_update", "chat_id": str(chat_id)}
                if queue:
                    body["queued_messages"] = [self.queued_message(queued) for queued in queue]
                return body

    def stream_frame(self, chat_id: UUID, events: Sequence[Event]) -> str:
        return go_json({"type": "data", "data": [self.event(chat_id, event) for event in events]}) + "\n"

    def watch_hello(self) -> str:
        return '{"type":"ping","data":null}\n'

    def watch_frame(self, kind: str, chat: Chat) -> str:
        return go_json({"type": "data", "data": {"kind": kind, "chat": self.watch_chat(chat)}}) + "\n"


_USAGE_KEYS = (
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "reasoning_tokens",
    "cache_creation_tokens",
    "cache_read_tokens",
    "context_limit",
)

DIALECTS: dict[str, Dialect] = {"d0": EnvelopeDialect()}
