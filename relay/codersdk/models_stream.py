"""What streams carry."""

from uuid import UUID

from pydantic import Field

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import (
    ChatMessageRole,
    ChatStatus,
    ChatStreamEventType,
    ChatWatchEventKind,
    ServerSentEventType,
)
from relay.codersdk.model import CoderModel, Int64, Omit
from relay.codersdk.models_chat import Chat
from relay.codersdk.models_messages import ChatMessage, ChatMessagePart, ChatQueuedMessage
from relay.codersdk.raw_json import RawJSON
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatStreamMessagePart(CoderModel):
    """A piece of a message that is being written. Go: `codersdk.ChatStreamMessagePart`."""

    role: Omit[ChatMessageRole] = ChatMessageRole("")
    part: ChatMessagePart = Field(default_factory=ChatMessagePart)


class ChatStreamStatus(CoderModel):
    """The chat's new state. Go: `codersdk.ChatStreamStatus`."""

    status: ChatStatus = ChatStatus("")


class ChatStreamError(CoderModel):
    """What went wrong. Go: `codersdk.ChatStreamError`."""

    message: str = ""


class ChatStreamRetry(CoderModel):
    """The server will ask the model again. Go: `codersdk.ChatStreamRetry`."""

    attempt: Int64 = 0
    """Counted from 1."""
    delay_ms: Int64 = 0
    error: str = ""
    retrying_at: Timestamp = ZERO_TIME


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


class StreamEnvelope(CoderModel):
    """One frame of a stream. Go: `codersdk.chatStreamEnvelope`."""

    type: ServerSentEventType = ServerSentEventType("")
    data: Omit[RawJSON] = RawJSON()


class ChatWatchEvent(CoderModel):
    """Something happened to one of the user's chats. The Go SDK does not declare it.

    The chat is not whole: `last_model_config_id`, `last_error`, `archived` and `mcp_server_ids` are never filled.
    """

    kind: ChatWatchEventKind = ChatWatchEventKind("")
    chat: Chat = Field(default_factory=Chat)
