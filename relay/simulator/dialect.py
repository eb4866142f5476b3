"""What the server's values and events look like on the wire. A dialect is one server age's way to write them.

The rest of the simulator knows events and rows only; keys, their order and the frame around them stand here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias
from uuid import UUID

from relay.simulator.state import Chat, ChatError, Message, Part, QueuedMessage, Usage
from relay.simulator.wire import NIL_UUID, JsonObject, go_json, rfc3339, rfc3339_nanoseconds

EVENTS_PER_FRAME = 256
EXPERIMENTAL = "/api/experimental/chats"
STABLE = "/api/v2/chats"


@dataclass(frozen=True)
class StatusEvent:
    """`history_version` is told by servers that take it as a resume point."""

    status: str
    history_version: int = 0


@dataclass(frozen=True)
class MessageEvent:
    message: Message


@dataclass(frozen=True)
class PartEvent:
    """`episode`: history version and generation attempt that the part belongs to, `seq` its number there from 1."""

    role: str
    part: Part
    episode: tuple[int, int] | None = None
    seq: int = 0


@dataclass(frozen=True)
class QueueEvent:
    queue: tuple[QueuedMessage, ...]


@dataclass(frozen=True)
class RetryEvent:
    """`retrying_at`: Unix time in nanoseconds."""

    attempt: int
    delay_ms: int
    error: ChatError
    retrying_at: int


@dataclass(frozen=True)
class ErrorEvent:
    error: ChatError


@dataclass(frozen=True)
class ActionRequiredEvent:
    """Calls of tools that the client has to run."""

    calls: tuple[Part, ...]


@dataclass(frozen=True)
class HistoryResetEvent:
    """The messages that follow are the whole history."""


@dataclass(frozen=True)
class PreviewResetEvent:
    """The live text so far is void, or the step it belongs to is stored."""


Event: TypeAlias = (
    StatusEvent
    | MessageEvent
    | PartEvent
    | QueueEvent
    | RetryEvent
    | ErrorEvent
    | ActionRequiredEvent
    | HistoryResetEvent
    | PreviewResetEvent
)


@dataclass(frozen=True)
class Features:
    """What a server age has and lacks. The rest of the simulator asks here, never for a dialect's name.

    Each line tells since when; the order is that in which Coder got them.
    """

    prefixes: tuple[str, ...] = (EXPERIMENTAL,)
    # 2.32
    whole_watch: bool = False  # watch events tell the whole chat; before, four of its fields were zero
    labels: bool = False  # labels, pins, has_unread (true only in lists)
    rich_errors: bool = False  # kind, provider, status_code in `error` and `retry`
    double_statuses: bool = False  # until 2.34: each status is told twice
    stale_parts: bool = False  # until 2.33: parts of a stored step are replayed before the running one's, and when idle
    part_config: bool = False  # parts know MCP servers, context files and skills
    archive_interrupts: bool = False  # until 2.34: archiving ends a run
    wrapped_edits: bool = False  # an edit answers an object around the message
    # 2.33
    raw_frames: bool = False  # a bare array of events, no envelope
    error_details: bool = False  # `detail` in `error`
    organizations: bool = False  # `organization_id` is required
    tree_list: bool = False  # roots with `children`
    ascending_pages: bool = False  # messages?after_id=
    actions: bool = False  # requires_action, action_required, tool-results
    archive_is_closed: bool = False  # archived chats take no messages
    cascading_unarchive: bool = False  # unarchiving a root takes its children along
    retention: bool = False  # config/retention-days, config/auto-archive-days
    titles_by_hand: bool = False  # PATCH title is honoured
    part_times: bool = False  # created_at of tool calls and results
    queued_model: bool = False  # model_config_id of queued prompts
    debug_runs: bool = False
    # 2.34
    error_object: bool = False  # `last_error` is an object, absent when there is none
    summaries: bool = False  # owner's name, summary of the last turn, watch summary_change
    rich_search: bool = False  # q= knows title, has_unread, pull requests
    owner_speaks: bool = False  # only the chat's owner may send and edit; only the owner's streams mark it read
    retry_in_snapshot: bool = False
    accepted_promotes: bool = False  # 202: the prompt goes to the head of the queue, and the run is interrupted
    drains: bool = False  # a polite stop waits for runs; 2.34 only
    sharing: bool = False  # acl, prompts
    legacy_providers: bool = True  # until 2.33
    reasoning_times: bool = False  # of stored reasoning
    # 2.35
    episodes: bool = False  # state machine, coordinates of parts, history_reset, preview_reset
    shared_chats: bool = False  # `shared`, q=source:
    pull_request_insights: bool = True  # until 2.34
    # 2.36
    chat_summaries: bool = False  # of the whole chat
    compaction: bool = False  # {chat}/compact
    text_search: bool = False  # q=search:
    desktop: bool = True  # config/desktop-enabled, until 2.35
    chat_cost: bool = False  # {chat}/cost, counting requests to the gateway
    unsupported_providers: bool = False  # named in the list of models
    # 2.37
    native_limits: bool = True  # usage limits and cost reports, until 2.36
    priced_models: bool = True  # prices in model configs, until 2.36
    append_order: bool = False  # messages are told by id; before, by time, where rows of one transaction tie
    calls_last: bool = False  # a step's complete tool calls are shown when its output has ended
    message_lists: bool = False  # `messages` and `deleted_message_ids` in the answers to sends and edits
    # 2.38
    organization_models: bool = False  # models below /organizations/{org}, none below the chats
    revisions: bool = False  # after_revision, history_version in statuses and pages
    unread_again: bool = False  # PATCH read sets the owner's read mark; before, it is taken and ignored


_D0B = Features(
    whole_watch=True,
    labels=True,
    rich_errors=True,
    double_statuses=True,
    stale_parts=True,
    archive_interrupts=True,
    wrapped_edits=True,
    part_config=True,
)
_D1 = replace(
    _D0B,
    raw_frames=True,
    error_details=True,
    organizations=True,
    tree_list=True,
    ascending_pages=True,
    actions=True,
    archive_is_closed=True,
    cascading_unarchive=True,
    retention=True,
    titles_by_hand=True,
    part_times=True,
    queued_model=True,
    debug_runs=True,
)
_D1E = replace(
    _D1,
    stale_parts=False,
    error_object=True,
    summaries=True,
    rich_search=True,
    owner_speaks=True,
    retry_in_snapshot=True,
    accepted_promotes=True,
    drains=True,
    sharing=True,
    legacy_providers=False,
    reasoning_times=True,
)
_D2 = replace(_D1E, double_statuses=False, drains=False, episodes=True, shared_chats=True, pull_request_insights=False)
_D3 = replace(
    _D2,
    chat_summaries=True,
    compaction=True,
    text_search=True,
    desktop=False,
    chat_cost=True,
    unsupported_providers=True,
    native_limits=False,
    priced_models=False,
    append_order=True,
    calls_last=True,
    message_lists=True,
)
_D3GA = replace(_D3, prefixes=(STABLE,), organization_models=True, revisions=True, unread_again=True)


@dataclass(frozen=True)
class Dialect:
    """One server age. Frames and bodies are text that ends in a newline, as the server sends them."""

    name: str
    features: Features

    # Chats

    def chat(self, chat: Chat, *, children: Sequence[Chat] = (), in_list: bool = False) -> JsonObject:
        """A chat as REST gives it. In lists it has a diff status, and says truly whether something is unread.

        So have sub-agents below their root, wherever that stands.
        """
        nested = [self.chat(child, in_list=True) for child in children]
        return self._chat(chat, chat.last_model_config_id, chat.last_error, nested, in_list=in_list)

    def watch_chat(self, chat: Chat) -> JsonObject:
        """The chat of watch events. The oldest servers leave four fields zero, whatever the row says."""
        if self.features.whole_watch:
            return self.chat(chat)
        partial = self._chat(chat, NIL_UUID, None, [], in_list=False)
        return partial | {"archived": False, "mcp_server_ids": None}

    def _chat(
        self, chat: Chat, model: UUID, error: ChatError | None, children: list[JsonObject], *, in_list: bool
    ) -> JsonObject:
        has = self.features
        body: JsonObject = {"id": str(chat.id)}
        if has.organizations:
            body["organization_id"] = str(chat.organization_id)
        body["owner_id"] = str(chat.owner_id)
        if has.summaries:
            body["owner_username"] = chat.owner_username
        if chat.parent_id is not None:
            body["parent_chat_id"] = str(chat.parent_id)
        body["root_chat_id"] = str(chat.root_id or chat.parent_id or chat.id)
        body["last_model_config_id"] = str(model)
        body["title"] = chat.title
        body["status"] = chat.status
        if not has.error_object:
            body["last_error"] = error.message if error else None
        elif error:
            body["last_error"] = self.error(error)
        if has.summaries:
            body["last_turn_summary"] = chat.last_turn_summary
        if has.chat_summaries:
            body["summary"] = chat.summary
        if in_list:
            body["diff_status"] = {
                "chat_id": str(chat.id),
                "pull_request_title": "",
                "pull_request_draft": False,
                "changes_requested": False,
                "additions": 0,
                "deletions": 0,
                "changed_files": 0,
            }
        body["created_at"] = rfc3339(chat.created_at)
        body["updated_at"] = rfc3339(chat.updated_at)
        body["archived"] = chat.archived
        if has.shared_chats:
            body["shared"] = bool(chat.readers)
        if has.labels:
            body["pin_order"] = chat.pin_order
        body["mcp_server_ids"] = [str(server) for server in chat.mcp_server_ids]
        if has.labels:
            body["labels"] = dict(chat.labels)
            body["has_unread"] = in_list and chat.has_unread
        if has.tree_list:
            body["client_type"] = "api"
            body["children"] = children
        return body

    # Messages

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
        if self.features.part_config:
            body["mcp_server_config_id"] = None
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
        body |= {
            "media_type": part.media_type,
            "file_id": str(part.file_id) if part.file_id else None,
            "file_name": part.file_name,
            "start_line": part.start_line,
            "end_line": part.end_line,
            "content": part.content,
        }
        body |= self._part_times(part)
        if self.features.part_config:
            body |= {"context_file_path": "", "context_file_agent_id": None, "skill_name": ""}
        return body

    def _part_times(self, part: Part) -> JsonObject:
        """Tool calls and results first, then stored reasoning, at last live reasoning too."""
        has = self.features
        told = has.part_times
        if part.type == "reasoning":
            told = has.episodes or (has.reasoning_times and part.completed_at is not None)
        times = {"created_at": part.created_at, "completed_at": part.completed_at}
        return {name: rfc3339(time) for name, time in times.items() if told and time is not None}

    def queued_message(self, queued: QueuedMessage) -> JsonObject:
        body: JsonObject = {"id": queued.id, "chat_id": str(queued.chat_id)}
        if self.features.queued_model and queued.model_config_id is not None:
            body["model_config_id"] = str(queued.model_config_id)
        body["content"] = [self.part(part) for part in queued.content]
        body["created_at"] = rfc3339(queued.created_at)
        return body

    # Events

    def error(self, error: ChatError) -> JsonObject:
        """The error of a run, as an event has it, and `last_error` where that is an object."""
        body: JsonObject = {"message": error.message}
        if not self.features.rich_errors:
            return body
        if error.detail and self.features.error_details:
            body["detail"] = error.detail
        if error.kind:
            body["kind"] = error.kind
        if error.provider:
            body["provider"] = error.provider
        body["retryable"] = error.retryable
        if error.status_code:
            body["status_code"] = error.status_code
        return body

    def event(self, chat_id: UUID, event: Event) -> JsonObject:
        def named(kind: str, payload: JsonObject) -> JsonObject:
            return {"type": kind, "chat_id": str(chat_id), kind: payload}

        match event:
            case StatusEvent(status, version):
                return named("status", {"status": status} | ({"history_version": version} if version else {}))
            case MessageEvent(message):
                return named("message", self.message(message))
            case PartEvent(role, part, episode, seq):
                body: JsonObject = {"role": role, "part": self.part(part)}
                if episode is not None:
                    body |= {"history_version": episode[0], "generation_attempt": episode[1], "seq": seq}
                return named("message_part", body)
            case RetryEvent():
                return named("retry", self._retry(event))
            case ErrorEvent(error):
                return named("error", self.error(error))
            case QueueEvent(queue):
                body = {"type": "queue_update", "chat_id": str(chat_id)}
                if queue:
                    body["queued_messages"] = [self.queued_message(queued) for queued in queue]
                return body
            case ActionRequiredEvent(calls):
                return named("action_required", {"tool_calls": tool_calls(calls)})
            case HistoryResetEvent():
                return {"type": "history_reset", "chat_id": str(chat_id)}
            case PreviewResetEvent():
                return {"type": "preview_reset", "chat_id": str(chat_id)}

    def _retry(self, retry: RetryEvent) -> JsonObject:
        body: JsonObject = {"attempt": retry.attempt, "delay_ms": retry.delay_ms, "error": retry.error.message}
        if self.features.rich_errors:
            rich = self.error(retry.error)
            body |= {name: rich[name] for name in ("kind", "provider", "status_code") if name in rich}
        return body | {"retrying_at": rfc3339_nanoseconds(retry.retrying_at)}

    def stream_frame(self, chat_id: UUID, events: Sequence[Event]) -> str:
        return self._framed([self.event(chat_id, event) for event in events])

    def watch_hello(self) -> str:
        """The first frame of a watch socket; empty: none."""
        return "" if self.features.raw_frames else '{"type":"ping","data":null}\n'

    def watch_frame(self, kind: str, chat: Chat, calls: Sequence[Part] = ()) -> str:
        """`calls`: what a chat that needs an action waits for; the servers that re-read their state do not tell it."""
        body: JsonObject = {"kind": kind, "chat": self.watch_chat(chat)}
        if calls and not self.features.episodes:
            body["tool_calls"] = tool_calls(calls)
        return self._framed(body)

    def _framed(self, value: object) -> str:
        return go_json(value if self.features.raw_frames else {"type": "data", "data": value}) + "\n"


def tool_calls(calls: Sequence[Part]) -> list[JsonObject]:
    """Calls for a client to run: the arguments are JSON text, spaced as the model's provider spaced them."""
    return [
        {"tool_call_id": call.tool_call_id, "tool_name": call.tool_name, "args": spaced_json(call.args)}
        for call in calls
    ]


def spaced_json(value: object) -> str:
    """JSON with a space after each comma and colon outside of strings."""
    return json.dumps(value, ensure_ascii=False)


_USAGE_KEYS = (
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "reasoning_tokens",
    "cache_creation_tokens",
    "cache_read_tokens",
    "context_limit",
)

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect("d0", Features()),  # Coder at ff8dcca, 2026-03-20
        Dialect("d0b", _D0B),  # 2.32
        Dialect("d1", _D1),  # 2.33
        Dialect("d1e", _D1E),  # 2.34
        Dialect("d2", _D2),  # 2.35
        Dialect("d3", _D3),  # 2.37
        Dialect("d3ga", _D3GA),  # 2.38
    )
}
