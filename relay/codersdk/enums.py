"""The words of the API. Each of these is a string, and one that this version does not know is taken as it is."""

from enum import StrEnum
from typing import Self

_UNKNOWN = "UNKNOWN"


class OpenEnum(StrEnum):
    """An enum that is not closed: a value without a name makes a member of its own, equal to its text."""

    since: str
    """The server version that first uses the word, such as "2.33"; empty for those of the seed."""

    def __new__(cls, value: str, since: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_ = value
        member.since = since
        return member

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = _UNKNOWN
        member._value_ = str(value)
        member.since = ""
        return member

    @property
    def is_known(self) -> bool:
        """Whether this version of the API has a name for it."""
        return self._name_ != _UNKNOWN


class ChatStatus(OpenEnum):
    """State of a chat; the seed's server makes only WAITING, PENDING, RUNNING and ERROR. Go: `codersdk.ChatStatus`."""

    WAITING = "waiting"
    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ERROR = "error"
    REQUIRES_ACTION = "requires_action", "2.33"
    """It waits for the results of tools that the client runs. Since 2.33."""
    INTERRUPTING = "interrupting", "2.35"
    """It was told to stop and has not yet. Since 2.35."""


class ChatMessageRole(OpenEnum):
    """Who speaks in a message. Go: `codersdk.ChatMessageRole`."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class ChatMessagePartType(OpenEnum):
    """What a part of a message is; the only field that tells. Go: `codersdk.ChatMessagePartType`."""

    TEXT = "text"
    REASONING = "reasoning"
    TOOL_CALL = "tool-call"
    TOOL_RESULT = "tool-result"
    SOURCE = "source"
    FILE = "file"
    FILE_REFERENCE = "file-reference"
    CONTEXT_FILE = "context-file", "2.32"
    """Since 2.32."""
    SKILL = "skill", "2.32"
    """Since 2.32."""


def all_chat_message_part_types() -> list[ChatMessagePartType]:
    """Every type that the seed has, in its order. Go: `codersdk.AllChatMessagePartTypes`."""
    return [each for each in ChatMessagePartType if not each.since]


class ChatInputPartType(OpenEnum):
    """What a part of the user's input is. Go: `codersdk.ChatInputPartType`."""

    TEXT = "text"
    FILE = "file"
    FILE_REFERENCE = "file-reference"


class ChatModelProviderUnavailableReason(OpenEnum):
    """Why a provider cannot be used. Go: `codersdk.ChatModelProviderUnavailableReason`."""

    MISSING_API_KEY = "missing_api_key"
    FETCH_FAILED = "fetch_failed"


class ChatProviderConfigSource(OpenEnum):
    """Where a provider's configuration comes from. Go: `codersdk.ChatProviderConfigSource`."""

    DATABASE = "database"
    ENV_PRESET = "env_preset"
    SUPPORTED = "supported"


class ChatStreamEventType(OpenEnum):
    """What an event of a chat's stream tells. Go: `codersdk.ChatStreamEventType`."""

    MESSAGE_PART = "message_part"
    MESSAGE = "message"
    STATUS = "status"
    ERROR = "error"
    QUEUE_UPDATE = "queue_update"
    RETRY = "retry"
    ACTION_REQUIRED = "action_required", "2.33"
    """The chat waits for the results of tools. Since 2.33."""
    PREVIEW_RESET = "preview_reset", "2.35"
    """The parts so far are void, or what they became is a message now. Since 2.35."""
    HISTORY_RESET = "history_reset", "2.35"
    """The messages that follow are all there are. Since 2.35."""


class ChatErrorKind(OpenEnum):
    """Why a turn failed. Since 2.34; older servers send some of these in errors and retries of the stream."""

    GENERIC = "generic", "2.34"
    OVERLOADED = "overloaded", "2.34"
    RATE_LIMIT = "rate_limit", "2.34"
    TIMEOUT = "timeout", "2.34"
    STARTUP_TIMEOUT = "startup_timeout", "2.34"
    """Until 2.34, then STREAM_SILENCE_TIMEOUT."""
    STREAM_SILENCE_TIMEOUT = "stream_silence_timeout", "2.35"
    AUTH = "auth", "2.34"
    CONFIG = "config", "2.34"
    USAGE_LIMIT = "usage_limit", "2.34"
    MISSING_KEY = "missing_key", "2.34"
    PROVIDER_DISABLED = "provider_disabled", "2.34"
    CONTENT_FILTER = "content_filter", "2.36"


class ServerSentEventType(OpenEnum):
    """What a frame of a stream holds. Go: `codersdk.ServerSentEventType`."""

    PING = "ping"
    DATA = "data"
    ERROR = "error"


class ChatUsageLimitPeriod(OpenEnum):
    """The window in which spending counts towards a limit, in UTC. Go: `codersdk.ChatUsageLimitPeriod`."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def valid(self) -> bool:
        """Whether it is a period that the server knows. Go: `codersdk.ChatUsageLimitPeriod.Valid`."""
        return self.is_known


class ChatWatchEventKind(OpenEnum):
    """What happened to a chat, on the watch stream; the Go SDK does not declare it."""

    CREATED = "created"
    """Created, or taken back out of the archive."""
    DELETED = "deleted"
    """Archived: a chat is never really deleted."""
    STATUS_CHANGE = "status_change"
    TITLE_CHANGE = "title_change"
    DIFF_STATUS_CHANGE = "diff_status_change"
    ACTION_REQUIRED = "action_required", "2.33"
    """Since 2.33. From 2.35 on there is no STATUS_CHANGE beside it."""
    SUMMARY_CHANGE = "summary_change", "2.34"
    """Since 2.34: `last_turn_summary`."""
    CONTEXT_DIRTY = "context_dirty", "2.35"
    """Since 2.35."""
    CHAT_SUMMARY_CHANGE = "chat_summary_change", "2.36"
    """Since 2.36: `summary`."""
