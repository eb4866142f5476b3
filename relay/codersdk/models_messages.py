"""Messages, the parts they are made of, and what a user sends."""

from typing import Annotated
from uuid import UUID

from pydantic import Field, JsonValue

from relay.codersdk.codec import NIL_UUID
from relay.codersdk.enums import ChatInputPartType, ChatMessagePartType, ChatMessageRole
from relay.codersdk.model import CoderModel, Int64, Omit, Since
from relay.codersdk.raw_json import RawJSON
from relay.codersdk.timestamp import ZERO_TIME, Timestamp


class ChatMessagePart(CoderModel):
    """One piece of a message: every kind in one object. Go: `codersdk.ChatMessagePart`.

    Look at `type` and at nothing else to know what it is: the fields of other kinds are there too, as zeros.
    """

    type: ChatMessagePartType = ChatMessagePartType("")
    text: str = ""
    """Of text and reasoning."""
    signature: Omit[str] = ""
    tool_call_id: Omit[str] = ""
    """Of tool calls and results, as are the fields down to `is_error`."""
    tool_name: Omit[str] = ""
    args: Omit[RawJSON] = RawJSON()
    """What the tool is called with, whole; what the model wrote, when it is JSON."""
    args_delta: Omit[str] = ""
    """The next piece of what the model writes as arguments; on streams only."""
    result: Omit[RawJSON] = RawJSON()
    result_delta: Omit[str] = ""
    is_error: Omit[bool] = False
    source_id: Omit[str] = ""
    """Of sources, as are `url` and `title`."""
    url: str = ""
    title: Omit[str] = ""
    media_type: str = ""
    """Of files, as are `data` and `file_id`."""
    data: Omit[bytes] = b""
    file_id: UUID | None = None
    file_name: str = ""
    """Of references into files, as are the lines and `content`."""
    start_line: Int64 = 0
    end_line: Int64 = 0
    content: str = ""
    """The lines of the diff that the user commented on."""
    provider_metadata: Omit[RawJSON] = RawJSON()
    """Internal to the server: never sent to clients."""
    provider_executed: Omit[bool] = False
    """Whether the model's provider ran the tool itself."""
    mcp_server_config_id: Annotated[Omit[UUID | None], Since("2.32")] = None
    """Since 2.32, as are the fields down to `skill_name`."""
    context_file_path: Annotated[Omit[str], Since("2.32")] = ""
    """Of context files, as is the agent."""
    context_file_agent_id: Annotated[Omit[UUID | None], Since("2.32")] = None
    skill_name: Annotated[Omit[str], Since("2.32")] = ""
    created_at: Annotated[Omit[Timestamp | None], Since("2.33")] = None
    """When it began. Since 2.33, of reasoning and of tools."""
    completed_at: Annotated[Omit[Timestamp | None], Since("2.34")] = None
    """When it was done. Since 2.34, of reasoning in messages."""

    def strip_internal(self) -> None:
        """Take out what is not for clients: the provider's metadata, and the bytes of a file that has an id.

        Go: `codersdk.ChatMessagePart.StripInternal`.
        """
        self.provider_metadata = RawJSON()
        if self.file_id is not None:
            self.data = b""


def chat_message_text(text: str) -> ChatMessagePart:
    """A text part. Go: `codersdk.ChatMessageText`."""
    return ChatMessagePart(type=ChatMessagePartType.TEXT, text=text)


def chat_message_reasoning(text: str) -> ChatMessagePart:
    """A reasoning part. Go: `codersdk.ChatMessageReasoning`."""
    return ChatMessagePart(type=ChatMessagePartType.REASONING, text=text)


def chat_message_tool_call(tool_call_id: str, tool_name: str, args: RawJSON | str | None) -> ChatMessagePart:
    """A tool-call part; `args` is JSON text, or nothing. Go: `codersdk.ChatMessageToolCall`."""
    return ChatMessagePart(
        type=ChatMessagePartType.TOOL_CALL, tool_call_id=tool_call_id, tool_name=tool_name, args=RawJSON(args or "")
    )


def chat_message_tool_result(
    tool_call_id: str, tool_name: str, result: RawJSON | str | None, is_error: bool
) -> ChatMessagePart:
    """A tool-result part; `result` is JSON text, or nothing. Go: `codersdk.ChatMessageToolResult`."""
    return ChatMessagePart(
        type=ChatMessagePartType.TOOL_RESULT,
        tool_call_id=tool_call_id,
        tool_name=tool_name,
        result=RawJSON(result or ""),
        is_error=is_error,
    )


def chat_message_file(file_id: UUID, media_type: str) -> ChatMessagePart:
    """A file part. Go: `codersdk.ChatMessageFile`."""
    return ChatMessagePart(type=ChatMessagePartType.FILE, file_id=file_id, media_type=media_type)


def chat_message_file_reference(file_name: str, start_line: int, end_line: int, content: str) -> ChatMessagePart:
    """A file-reference part. Go: `codersdk.ChatMessageFileReference`."""
    return ChatMessagePart(
        type=ChatMessagePartType.FILE_REFERENCE,
        file_name=file_name,
        start_line=start_line,
        end_line=end_line,
        content=content,
    )


def chat_message_source(source_id: str, source_url: str, title: str) -> ChatMessagePart:
    """A source part. Go: `codersdk.ChatMessageSource`."""
    return ChatMessagePart(type=ChatMessagePartType.SOURCE, source_id=source_id, url=source_url, title=title)


class ChatMessageUsage(CoderModel):
    """Tokens of one message; the server leaves zeros out. Go: `codersdk.ChatMessageUsage`."""

    input_tokens: Omit[Int64 | None] = None
    output_tokens: Omit[Int64 | None] = None
    total_tokens: Omit[Int64 | None] = None
    reasoning_tokens: Omit[Int64 | None] = None
    cache_creation_tokens: Omit[Int64 | None] = None
    cache_read_tokens: Omit[Int64 | None] = None
    context_limit: Omit[Int64 | None] = None


class ChatMessage(CoderModel):
    """A message of a chat. Go: `codersdk.ChatMessage`.

    Ids come from one sequence for all chats and grow within a chat; all messages of one step share `created_at`.
    """

    id: Int64 = 0
    chat_id: UUID = NIL_UUID
    created_by: Omit[UUID | None] = None
    model_config_id: Omit[UUID | None] = None
    created_at: Timestamp = ZERO_TIME
    role: ChatMessageRole = ChatMessageRole("")
    content: Omit[list[ChatMessagePart]] = Field(default_factory=list)
    usage: Omit[ChatMessageUsage | None] = None


class ChatQueuedMessage(CoderModel):
    """A message that waits for its turn; its id is of another sequence than those of messages.

    Go: `codersdk.ChatQueuedMessage`.
    """

    id: Int64 = 0
    chat_id: UUID = NIL_UUID
    content: list[ChatMessagePart] | None = None
    created_at: Timestamp = ZERO_TIME
    model_config_id: Annotated[Omit[UUID | None], Since("2.33")] = None
    """Since 2.33."""


class ChatMessagesResponse(CoderModel):
    """A page of messages, newest first but after an `after_id`, and the queue. Go: `codersdk.ChatMessagesResponse`."""

    messages: list[ChatMessage] | None = None
    queued_messages: list[ChatQueuedMessage] | None = None
    """Oldest first; only on the first page."""
    has_more: bool = False
    history_version: Annotated[Omit[Int64], Since("2.38")] = 0
    """For `after_revision` of a stream. About since 2.38."""


class ChatMessagesPaginationOptions(CoderModel):
    """Which messages to get; zeros are not sent. Go: `codersdk.ChatMessagesPaginationOptions`."""

    before_id: Int64 = 0
    limit: Int64 = 0
    after_id: Annotated[Int64, Since("2.33")] = 0
    """Since 2.33; older servers ignore it."""


class ChatInputPart(CoderModel):
    """One piece of what a user sends. Go: `codersdk.ChatInputPart`."""

    type: ChatInputPartType = ChatInputPartType("")
    text: Omit[str] = ""
    file_id: Omit[UUID] = NIL_UUID
    """Always in the JSON: Go cannot leave an id out."""
    file_name: Omit[str] = ""
    """Of references into files, as are the lines and `content`."""
    start_line: Omit[Int64] = 0
    end_line: Omit[Int64] = 0
    content: Omit[str] = ""


class CreateChatMessageRequest(CoderModel):
    """A message to send. Go: `codersdk.CreateChatMessageRequest`."""

    content: list[ChatInputPart] | None = None
    model_config_id: Omit[UUID | None] = None
    mcp_server_ids: Omit[list[UUID] | None] = None
    """None leaves the chat's servers as they are, an empty list takes them away."""
    busy_behavior: Annotated[Omit[str], Since("2.32")] = ""
    """While the agent works: `queue` or `interrupt`. Since 2.32."""


class ChatToolResult(CoderModel):
    """What a tool that the client ran gave. Since 2.33."""

    tool_call_id: str = ""
    output: JsonValue = None
    """Any value that JSON has."""
    is_error: bool = False


class SubmitChatToolResultsRequest(CoderModel):
    """The results that a chat waits for, all of them. Since 2.33."""

    results: list[ChatToolResult] = Field(default_factory=list)


class ChatPrompt(CoderModel):
    """What a user once sent. Since 2.34."""

    id: Int64 = 0
    text: str = ""


class ChatPromptsResponse(CoderModel):
    """The prompts of a chat. Since 2.34."""

    prompts: list[ChatPrompt] | None = None


class EditChatMessageRequest(CoderModel):
    """What a user message becomes. Go: `codersdk.EditChatMessageRequest`."""

    content: list[ChatInputPart] | None = None


class CreateChatMessageResponse(CoderModel):
    """The message as it was stored, or as it waits in the queue. Go: `codersdk.CreateChatMessageResponse`."""

    message: Omit[ChatMessage | None] = None
    queued_message: Omit[ChatQueuedMessage | None] = None
    queued: bool = False
