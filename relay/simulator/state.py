"""What the server stores: users, chats, messages, queue, settings. No asyncio here, and no event is sent from here."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal, TypeAlias
from uuid import UUID

from relay.simulator.wire import NIL_UUID, jsonb

TiedRows: TypeAlias = Literal["by_id", "turned", "shuffled"]

QUEUE_LIMIT = 20


@dataclass(frozen=True)
class User:
    """`is_owner` is the deployment's owner role ("admin"), not the ownership of a chat."""

    id: UUID
    username: str
    token: str = field(repr=False)
    is_owner: bool
    created_at: datetime
    name: str = ""


@dataclass(frozen=True)
class ModelConfig:
    """Prices are US dollars per million tokens; None means the category has no price."""

    id: UUID
    provider: str = "openai-compat"
    model: str = "lab"
    display_name: str = "Lab model"
    enabled: bool = True
    is_default: bool = True
    context_limit: int = 100_000
    compression_threshold: int = 90
    input_price: Decimal | None = Decimal("3")
    output_price: Decimal | None = Decimal("15")
    cache_read_price: Decimal | None = Decimal("0.3")
    cache_write_price: Decimal | None = None
    created_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    updated_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Part:
    """One ChatMessagePart. `args` and `result` hold decoded JSON; None means absent."""

    type: str
    text: str = ""
    tool_call_id: str = ""
    tool_name: str = ""
    args: Any = None
    args_delta: str = ""
    result: Any = None
    is_error: bool = False
    source_id: str = ""
    url: str = ""
    title: str = ""
    media_type: str = ""
    file_id: UUID | None = None
    file_name: str = ""
    start_line: int = 0
    end_line: int = 0
    content: str = ""
    created_at: datetime | None = None
    completed_at: datetime | None = None

    def stored(self) -> "Part":
        """The part as the database gives it back: object keys in the order of `jsonb`."""
        return replace(self, args=jsonb(self.args), result=jsonb(self.result))


@dataclass(frozen=True)
class ChatError:
    """Why a run ended, or is tried again. Servers before April 2026 know the message alone."""

    message: str
    detail: str = ""
    kind: str = "generic"
    provider: str = ""
    retryable: bool = False
    status_code: int = 0


@dataclass(frozen=True)
class Usage:
    """Token counts of one step; zero means absent on the wire."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    reasoning_tokens: int = 0
    cache_creation_tokens: int = 0
    cache_read_tokens: int = 0
    context_limit: int = 0

    @property
    def counts_tokens(self) -> bool:
        return bool(
            self.input_tokens
            or self.output_tokens
            or self.reasoning_tokens
            or self.cache_creation_tokens
            or self.cache_read_tokens
        )


@dataclass(slots=True)
class Message:
    """One row of chat_messages.

    Args:
        place: Where the row lies among rows of the same `created_at`.
        revision: Snapshot version of the chat that inserted or deleted it, where the server counts them.
    """

    id: int
    chat_id: UUID
    role: str
    content: tuple[Part, ...]
    created_at: datetime
    created_by: UUID | None = None
    model_config_id: UUID | None = None
    usage: Usage | None = None
    cost_micros: int | None = None
    runtime_ms: int = 0
    visible: bool = True
    deleted: bool = False
    place: int = 0
    revision: int = 0


@dataclass(frozen=True)
class QueuedMessage:
    id: int
    chat_id: UUID
    content: tuple[Part, ...]
    created_at: datetime
    model_config_id: UUID | None = None


@dataclass(slots=True)
class Chat:
    """One row of chats.

    Args:
        readers: Users with whom the chat is shared.
        read_up_to: Id of the last message that the owner has seen on a stream.
        dynamic_tools: Names of the tools that the client runs itself.
        history_version: Value of `snapshot_version` at the last change of the history, where the server counts them.
        snapshot_version: Counts changes of anything that streams tell; the server gives messages it as `revision`.
        queue_version: Its value at the last change of the queue.
        generation_attempt: How many times the model or the tools were begun on this history version.
        next_queued: Id of the queued prompt that comes next, out of turn; 0 is none.
        has_worker: A worker holds the chat, or held it when its server was killed.
    """

    id: UUID
    owner_id: UUID
    title: str
    last_model_config_id: UUID
    created_at: datetime
    updated_at: datetime
    status: str = "pending"
    last_error: ChatError | None = None
    parent_id: UUID | None = None
    root_id: UUID | None = None
    archived: bool = False
    mcp_server_ids: tuple[UUID, ...] = ()
    organization_id: UUID = NIL_UUID
    owner_username: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    pin_order: int = 0
    readers: set[UUID] = field(default_factory=set)
    last_turn_summary: str | None = None
    summary: str | None = None
    read_up_to: int = 0
    dynamic_tools: tuple[str, ...] = ()
    history_version: int = 0
    snapshot_version: int = 0
    queue_version: int = 0
    generation_attempt: int = 0
    next_queued: int = 0
    has_worker: bool = False
    messages: list[Message] = field(default_factory=list)
    queue: list[QueuedMessage] = field(default_factory=list)

    @property
    def is_busy(self) -> bool:
        """Whether a run works on it, or is about to, so that a new prompt has to wait."""
        return self.status in ("pending", "running", "interrupting")

    @property
    def has_unread(self) -> bool:
        """Whether an answer came that the owner has not seen."""
        return any(m.role == "assistant" and m.id > self.read_up_to for m in self.history())

    def mark_read(self) -> None:
        """As a stream of the owner does when it opens and when it ends."""
        self.read_up_to = self.messages[-1].id if self.messages else 0

    def mark_unread(self) -> None:
        """Unread again, if there is an answer at all."""
        self.read_up_to = 0

    def history(self, after_id: int = 0) -> list[Message]:
        """Visible, undeleted messages with a higher id, by id."""
        return [m for m in self.messages if m.visible and not m.deleted and m.id > after_id]

    def rows(self, after_id: int = 0) -> list[Message]:
        """The same as a table scan sorted by `created_at` gives them: rows of one step in any order."""
        return sorted(self.history(after_id), key=lambda m: (m.created_at, m.place))


@dataclass(frozen=True)
class StoredFile:
    id: UUID
    owner_id: UUID
    name: str
    media_type: str
    data: bytes


@dataclass
class UsageLimits:
    """`spend_limit_micros` None: limiting is off."""

    spend_limit_micros: int | None = None
    period: str = "month"
    updated_at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    overrides: dict[UUID, int] = field(default_factory=dict)


class Clock:
    """The server's clock. Two readings never tie, so `created_at` differs between transactions as in PostgreSQL."""

    def __init__(self, now: Callable[[], datetime] | None = None) -> None:
        self._now = now or (lambda: datetime.now(UTC))
        self._last = datetime.min.replace(tzinfo=UTC)

    def now(self) -> datetime:
        """UTC, in whole microseconds, always later than the last answer."""
        self._last = max(self._now().astimezone(UTC), self._last + timedelta(microseconds=1))
        return self._last


class Database:
    """All rows. Methods change rows only; who is told about it is the daemon's business."""

    def __init__(
        self, users: Iterable[User], model_configs: Iterable[ModelConfig], clock: Clock, dice: random.Random
    ) -> None:
        self.clock = clock
        self.users = {user.id: user for user in users}
        self.model_configs = {config.id: config for config in model_configs}
        self.chats: dict[UUID, Chat] = {}
        self._children: dict[UUID, list[Chat]] = {}  # by root
        self.files: dict[UUID, StoredFile] = {}
        self.organization_id = NIL_UUID
        self.limits = UsageLimits(updated_at=clock.now())
        self.tied_rows: TiedRows = "by_id"
        self.system_prompt = ""
        self.user_prompts: dict[UUID, str] = {}
        self.desktop_enabled = False
        self.retention_days = 30
        self.auto_archive_days = 0
        self.workspace_ttl_ms = 0
        self._dice = dice
        self._last_message_id = 0
        self._last_queue_id = 0

    def new_id(self) -> UUID:
        return UUID(int=self._dice.getrandbits(128), version=4)

    def new_call_id(self) -> str:
        return f"call_{self._dice.getrandbits(48):012x}"

    def chance(self, rate: float) -> bool:
        """Whether something of this rate, 0 to 1, happens now."""
        return rate > 0 and self._dice.random() < rate

    def default_model(self) -> ModelConfig | None:
        return next((config for config in self.model_configs.values() if config.is_default), None)

    def model_of(self, chat: Chat) -> ModelConfig | None:
        """A chat on an unknown config goes on with the default one."""
        return self.model_configs.get(chat.last_model_config_id) or self.default_model()

    def create_chat(
        self, owner: UUID, title: str, content: tuple[Part, ...], model: UUID, parent: Chat | None = None
    ) -> Chat:
        """Burns three message ids, two for a sub-agent: the hidden system rows come first."""
        now = self.clock.now()
        chat = Chat(self.new_id(), owner, title, model, now, now)
        chat.organization_id = self.organization_id
        chat.owner_username = self.users[owner].username if owner in self.users else ""
        if parent is not None:
            chat.parent_id = parent.id
            chat.root_id = parent.root_id or parent.id
            self._children.setdefault(chat.root_id, []).append(chat)
        self.chats[chat.id] = chat
        for _ in range(1 if parent else 2):
            self.insert(chat, "system", (Part("text", text="…"),), now, visible=False)
        self.insert(chat, "user", content, now, created_by=owner, model=model)
        return chat

    def insert(
        self,
        chat: Chat,
        role: str,
        content: tuple[Part, ...],
        now: datetime,
        *,
        created_by: UUID | None = None,
        model: UUID | None = None,
        usage: Usage | None = None,
        cost_micros: int | None = None,
        runtime_ms: int = 0,
        visible: bool = True,
    ) -> Message:
        self._last_message_id += 1
        message = Message(
            self._last_message_id,
            chat.id,
            role,
            tuple(part.stored() for part in content),
            now,
            created_by,
            None if model == NIL_UUID else model,
            usage,
            cost_micros,
            runtime_ms,
            visible,
            place=self._place(self._last_message_id),
        )
        chat.messages.append(message)
        if message.model_config_id is not None:
            chat.last_model_config_id = message.model_config_id
        return message

    def _place(self, message_id: int) -> int:
        match self.tied_rows:
            case "by_id":
                return message_id
            case "turned":
                return -message_id
            case "shuffled":
                return self._dice.getrandbits(32)

    def enqueue(self, chat: Chat, content: tuple[Part, ...], model: UUID | None = None) -> QueuedMessage:
        self._last_queue_id += 1
        model = chat.last_model_config_id if model is None else model
        queued = QueuedMessage(self._last_queue_id, chat.id, content, self.clock.now(), model)
        chat.queue.append(queued)
        return queued

    def delete_chat(self, chat: Chat) -> None:
        """As a purge does, with the chats of its sub-agents. Nobody is told."""
        for gone in (chat, *self._children.pop(chat.id, ())):
            del self.chats[gone.id]
        if chat.root_id is not None and chat.root_id in self._children:
            self._children[chat.root_id].remove(chat)

    def create_idle_chats(self, count: int, owner: UUID) -> list[Chat]:
        """So many chats of a user that have had their answer, at next to no cost. Nobody is told of them."""
        model = self.default_model()
        model_id = NIL_UUID if model is None else model.id
        prompt, answer = (Part("text", text="hello"),), (Part("text", text="Hello!"),)
        chats = []
        for number in range(count):
            chat = self.create_chat(owner, f"Idle chat {number + 1}", prompt, model_id)
            chat.status = "waiting"
            self.insert(chat, "assistant", answer, self.clock.now(), model=model_id)
            chats.append(chat)
        return chats

    def children(self, chat: Chat) -> list[Chat]:
        """The chats of its sub-agents, if it is a root."""
        return self._children.get(chat.id, [])
