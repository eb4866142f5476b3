"""The words of the API. Each of these is a string, and one that this version does not know is taken as it is."""

from enum import StrEnum
from typing import Self

_UNKNOWN = "UNKNOWN"


class OpenEnum(StrEnum):
    """An enum that is not closed: a value without a name makes a member of its own, equal to its text."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        member = str.__new__(cls, value)
        member._name_ = _UNKNOWN
        member._value_ = str(value)
        return member

    @property
    def is_known(self) -> bool:
        """Whether this version of the API has a name for it."""
        return self._name_ != _UNKNOWN


class ChatStatus(OpenEnum):
    """State of a chat; the server makes only WAITING, PENDING, RUNNING and ERROR. Go: `codersdk.ChatStatus`."""

    WAITING = "waiting"
    PENDING = "pending"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ERROR = "error"


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


def all_chat_message_part_types() -> list[ChatMessagePartType]:
    """Every type with a name, in the order of the SDK. Go: `codersdk.AllChatMessagePartTypes`."""
    return list(ChatMessagePartType)


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
