"""What streams carry."""

from typing import Annotated
from uuid import UUID

from pydantic import Field

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import (
    ChatErrorKind,
    ChatMessageRole,
    ChatStatus,
    ChatStreamEventType,
    ChatWatchEventKind,
    ServerSentEventType,
)
from relay.codersdk.model import CoderModel, Int64, Omit, Since
from relay.codersdk.models_chat import Chat
from relay.codersdk.models_messages import ChatMessage, ChatMessagePart, ChatQueuedMessage
from relay.codersdk.raw_json import RawJSON
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatStreamMessagePart(CoderModel):
    """A piece of a message that is being written. Go: `codersdk.ChatStreamMessagePart`."""

    role: Omit[ChatMessageRole] = ChatMessageRole("")
    part: ChatMessagePart = Field(default_factory=ChatMessagePart)
    history_version: Annotated[Omit[Int64], Since("2.35")] = 0
    """Which attempt at which step the part belongs to, with `generation_attempt`. Since 2.35."""
    generation_attempt: Annotated[Omit[Int64], Since("2.35")] = 0
    """Since 2.35."""
    seq: Annotated[Omit[Int64], Since("2.35")] = 0
    """Counted from 1 within the attempt, without gaps; the same on every connection. Since 2.35."""


class ChatStreamStatus(CoderModel):
    """The chat's new state. Go: `codersdk.ChatStreamStatus`."""

    status: ChatStatus = ChatStatus("")
    history_version: Annotated[Omit[Int64], Since("2.38")] = 0
    """For `after_revision` of a stream. About since 2.38."""


class ChatStreamError(CoderModel):
    """What went wrong. Go: `codersdk.ChatStreamError`."""

    message: str = ""
    kind: Annotated[Omit[ChatErrorKind], Since("2.32")] = ChatErrorKind("")
    """Since 2.32, as are the fields down to `status_code`; see `ChatError`."""
    provider: Annotated[Omit[str], Since("2.32")] = ""
    retryable: Annotated[Omit[bool], Since("2.32")] = False
    status_code: Annotated[Omit[Int64], Since("2.32")] = 0
    detail: Annotated[Omit[str], Since("2.33")] = ""
    """Since 2.33."""


class ChatStreamRetry(CoderModel):
    """The server will ask the model again. Go: `codersdk.ChatStreamRetry`."""

    attempt: Int64 = 0
    """Counted from 1."""
    delay_ms: Int64 = 0
    error: str = ""
    retrying_at: Timestamp = ZERO_TIME
    kind: Annotated[Omit[ChatErrorKind], Since("2.32")] = ChatErrorKind("")
    """Since 2.32, as are `provider` and `status_code`; see `ChatError`."""
    provider: Annotated[Omit[str], Since("2.32")] = ""
    status_code: Annotated[Omit[Int64], Since("2.32")] = 0


class ChatStreamToolCall(CoderModel):
    """A call of a tool that the client has to run. Since 2.33."""

    tool_call_id: str = ""
    tool_name: str = ""
    args: str = ""
    """JSON, as the model wrote it."""


class ChatStreamActionRequired(CoderModel):
    """What a chat waits for: `submit_chat_tool_results` with all of them. Since 2.33."""

    tool_calls: list[ChatStreamToolCall] | None = None


class ChatStreamEvent(CoderModel):
    """One thing that happened in a chat; `type` says which field holds it. Go: `codersdk.ChatStreamEvent`."""

    type: ChatStreamEventType = ChatStreamEventType("")
    chat_id: UUID = NIL_UUID
    message: Omit[ChatMessage | None] = None
    message_part: Omit[ChatStreamMessagePart | None] = None
    status: Omit[ChatStreamStatus | None] = None
    error: Omit[ChatStreamError | None] = None
    retry: Omit[ChatStreamRetry | None] = None
    queued_messages: Omit[list[ChatQueuedMessage]] = Field(default_factory=list)
    """The whole queue; an empty one is not in the JSON."""
    action_required: Annotated[Omit[ChatStreamActionRequired | None], Since("2.33")] = None
    """Since 2.33."""


class StreamEnvelope(CoderModel):
    """One frame of a stream. Go: `codersdk.chatStreamEnvelope`."""

    type: ServerSentEventType = ServerSentEventType("")
    data: Omit[RawJSON] = RawJSON()


class ChatWatchEvent(CoderModel):
    """Something happened to one of the user's chats. The Go SDK does not declare it.

    The chat is not whole: the seed never fills `last_model_config_id`, `last_error`, `archived` and `mcp_server_ids`,
    later servers not `files`.
    """

    kind: ChatWatchEventKind = ChatWatchEventKind("")
    chat: Chat = Field(default_factory=Chat)
    tool_calls: Annotated[Omit[list[ChatStreamToolCall] | None], Since("2.33")] = None
    """Of ACTION_REQUIRED, in 2.33 and 2.34 only."""
