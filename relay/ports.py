"""What the programs ask of the world. Each port is a promise, kept by two adapters and tested by one contract test.

Every method may raise `Unavailable` when the other side does not answer within the adapter's deadline; only what
comes on top of that is said below. Any await may be the last: nothing here needs to be finished to stay correct.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum, auto
from typing import Protocol, Self
from uuid import UUID

from relay.core.claims import Peer
from relay.core.events import ChatRef, Event, JsonObject
from relay.core.resume import Commit, ResumePoint

# --- time ----------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Time, so that tests and replays can bring their own."""

    def now(self) -> datetime:
        """Wall clock, UTC. May step; never used to measure a duration."""

    def monotonic(self) -> float:
        """Seconds that only grow."""

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""


# --- Coder ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Account:
    """Whose token it is."""

    user_id: UUID
    username: str
    administrator: bool = False  # of the whole server: may read any chat by its id


@dataclass(frozen=True, slots=True)
class MessagePage:
    """The newest messages of a chat, newest first, down to where the caller asked; and the whole queue."""

    messages: Sequence[JsonObject]
    queued_messages: Sequence[JsonObject]
    complete: bool  # True: nothing lies below the last one


@dataclass(frozen=True, slots=True)
class ModelPrice:
    """US dollars per million tokens; None: that kind of token has no price."""

    model: str
    input: Decimal | None = None
    output: Decimal | None = None
    cache_read: Decimal | None = None
    cache_write: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """What the AI Gateway of a licensed server allows one user in a calendar month, in millionths of a US dollar."""

    user_id: UUID
    spent_micros: int
    limit_micros: int | None  # None: no budget applies
    source: str  # of the limit, as upstream names it; empty when there is none
    period_start: datetime
    period_end: datetime


@dataclass(frozen=True, slots=True)
class Retention:
    """When the server archives and deletes chats by itself, in days; 0: never, None: it does not know of it."""

    archived_chats_days: int | None = None  # after which an archived chat is deleted for good
    auto_archive_days: int | None = None  # without activity, after which a chat is archived


class Frames(Protocol):
    """Text frames of a socket as they come."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> str: ...

    def at_hand(self) -> list[str]:
        """Those behind the last one that are there already: nobody needs to wait for them, nor to be woken up."""


class Upstream(Protocol):
    """One Coder server, as one account or several see it.

    Every method raises `Unauthorized` when the token is not accepted, and those about one chat `ChatGone` (404) or
    `ChatRefused` (other 4xx).
    """

    @property
    def deployment(self) -> str:
        """The server's URL without a trailing slash: part of every event id."""

    async def accounts(self) -> Sequence[Account]:
        """Whose tokens are used; with several, those that are not refused at present."""

    def list_chats(self, *, archived: bool) -> AsyncGenerator[JsonObject, None]:
        """All chats that are, or are not, archived, as upstream sends them, each once; subagent chats included.

        They come while the answer is read, so that a long list is never in memory as a whole. The list was complete
        when the iterator ends without an error. Whoever may leave early closes it (`contextlib.aclosing`).
        """

    async def chat(self, chat_id: UUID) -> JsonObject:
        """The chat now."""

    async def messages(self, chat_id: UUID, *, down_to: int) -> MessagePage:
        """The newest messages and the queue. Pages until one id is at or below `down_to`, or all are read."""

    def stream(
        self, chat_id: UUID, *, after_id: int, after_revision: int | None = None
    ) -> AbstractAsyncContextManager[Frames]:
        """Text frames of the chat's stream as they come, beginning with what the chat is now.

        Args:
            after_id: Messages up to this id are left out.
            after_revision: History version that is known whole: servers that know it leave out what has not changed
                since, the others ignore it.

        The iterator ends with `Unavailable` however the connection ends (a polite close is a server restart, never
        the end of a chat), and with `BadFrame` (reason `too_large`) at a frame over the size limit.
        """

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        """Text frames of the account's watch socket; ends as `stream` does."""

    async def archive_chat(self, chat_id: UUID) -> None:
        """Archive the chat in Coder. A chat that is archived already is a success."""

    async def model_prices(self) -> Mapping[UUID, ModelPrice]:
        """Prices by model config id, as far as the server tells them; empty where it has none."""

    async def has_native_limits(self) -> bool:
        """Whether the server enforces spend limits of its own on chats; later servers have none."""

    async def budget(self, user_id: UUID) -> Budget | None:
        """The user's AI Gateway budget; None where the server has no gateway, no licence for it, or no such user."""

    async def retention(self) -> Retention:
        """When chats are archived and deleted by the server."""


# --- bus -----------------------------------------------------------------------------------------------------------


class Publisher(Protocol):
    """The way out."""

    async def publish(self, events: Sequence[Event]) -> None:
        """Return once the broker has confirmed every event, in order.

        Raises:
            Unavailable: Some may be stored, some not. Publish all of them again.
            Unroutable: No queue takes a durable event of these. As above; the bus makes its own bindings anew.
            TooLarge: The broker will never take one of these.
        """


class Outlet(Publisher, Protocol):
    """What a follower needs of the bus."""

    async def park_frame(self, chat: ChatRef, raw: bytes, reason: str) -> None:
        """Keep a frame that could not be read, in the dead letters (`relay.frames.dead`), for a person to look at.

        Raises:
            TooLarge: As `publish`.
        """


class Delivery(Protocol):
    """One message of a queue. Exactly one of the three ends it; a delivery that is dropped comes again.

    `requeue`, and a consumer that goes away, count towards the queue's delivery limit: after 20 of them the message is
    dead-lettered. So wait with the delivery in hand while the fault lasts, and do not requeue in a loop.
    """

    @property
    def body(self) -> bytes:
        """As published."""

    @property
    def routing_key(self) -> str:
        """As published."""

    @property
    def redelivered(self) -> bool:
        """True when it may have been handled before."""

    async def ack(self) -> None:
        """Handled; its effect is stored."""

    async def requeue(self) -> None:
        """Not handled for a reason outside of the message: give it again later."""

    async def dead_letter(self, reason: str) -> None:
        """It can never be handled. It goes to the queue's dead-letter queue."""


class Bus(Outlet, Protocol):
    """The exchange and the relay's own queues. Declares them when it opens."""

    def deliveries(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Messages of one of the relay's queues in order of arrival, at most `prefetch` of them not yet ended.

        The iterator raises `Unavailable` when the broker went away or cancelled the consumer; what was not ended
        comes again.
        """

    def tap(self, *patterns: str) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Copies of what is published from now on under any of the routing patterns (`*` one word, `#` any).

        For a person at a terminal: nothing is kept, acking is not needed.
        """

    async def depth(self, queue: str) -> int:
        """How many messages are ready in one of the relay's queues."""


# --- store ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to follow a chat. `session` grows with each claim of the chat: fencing token and order in one."""

    chat: ChatRef
    worker: str
    session: int
    resume: ResumePoint


@dataclass(frozen=True, slots=True)
class ChatRecord:
    """What is stored of a chat, as discovery needs it."""

    chat: ChatRef
    seen: str  # digest of the list row that was last worked off; empty before the first
    worker: str | None  # who holds a live claim
    clean: bool


class Claims(Protocol):
    """Who follows which chat, and how far.

    A worker has one lease for all of its claims: a claim is live while its worker's lease is, by the store's clock.
    A lease that ran out is not revived: its worker has lost all claims, and begins anew under another id.
    """

    async def enlist(self, peer: Peer, deployment: str, *, lease_seconds: float) -> None:
        """Begin a lease. `peer.worker` is an id that no worker ever had, `peer.accounts` whose chats it can read."""

    async def renew(self, peer: Peer, *, lease_seconds: float) -> Sequence[Peer] | None:
        """Extend the lease and tell the others how much there is to do here, and whose chats can be read by now.

        Returns all workers of the deployment whose leases are live, this one included; None when its own ran out.
        """

    async def resign(self, worker: str) -> None:
        """End the lease now: what the worker still holds is free."""

    async def records(
        self, deployment: str, *, after: UUID | None = None, limit: int | None = None
    ) -> Sequence[ChatRecord]:
        """Chats ever claimed and not forgotten, by id: all, or at most `limit` of those that come behind `after`."""

    async def records_of(self, deployment: str, chat_ids: Collection[UUID]) -> Sequence[ChatRecord]:
        """Those of these chats, at most 500, that were ever claimed."""

    async def claim(self, chat: ChatRef, worker: str) -> Claim | None:
        """Take the chat, raise its session by one and mark it as not clean, all at once.

        `resume` is as last saved, with `clean` as it was before this claim (True for a chat never claimed).
        None while another worker holds a live claim, or is about to. The same worker may claim again: the older claim
        is void.

        Raises:
            LostClaim: The worker's own lease is over.
        """

    async def holdings(self, worker: str) -> Sequence[ChatRef]:
        """The chats that a live worker has claimed: also those of claims whose answers were lost."""

    async def orphans(self, worker: str) -> int:
        """How many chats nobody holds although something goes on in them: their worker died, or gave them up in the
        middle. Only those of accounts that the worker can read; 0 when its lease is over."""

    async def adopt(self, worker: str, *, limit: int) -> Sequence[Claim]:
        """Take orphans, at most `limit` and perhaps fewer; each as `claim` does."""

    async def save(self, claim: Claim, commit: Commit) -> None:
        """Store the resume point, only if the claim's session is still the chat's session.

        Raises:
            LostClaim: It is not. Nothing was written.
        """

    async def release(self, claim: Claim, commit: Commit | None, *, seen: str | None, clean: bool) -> None:
        """Give the chat back. A claim that is lost already is no error.

        `seen`: digest of the list row that was worked off, which leaves the chat at rest. None: in the middle of
        things; the stored digest stays, and another worker is to go on at once (`orphans`).
        """


@dataclass(frozen=True, slots=True)
class Charge:
    """What one assistant message cost. Keyed by `(deployment, chat_id, message_id)`."""

    chat: ChatRef
    message_id: int
    at: datetime  # the message's created_at: which period it falls into
    model: str
    input_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cost_micros: int | None  # None: unpriced


@dataclass(frozen=True, slots=True)
class Spend:
    """A sum over charges. `unpriced` counts charges without a price, which add nothing."""

    cost_micros: int
    charges: int
    unpriced: int
    last_message_ids: Sequence[int]  # up to ten, newest first


class Raised(Enum):
    """How an alert stands that was to be remembered."""

    NEW = auto()  # by this call
    WAITING = auto()  # somebody remembered it, and nobody has published it so far
    PUBLISHED = auto()


class Charges(Protocol):
    """The meter's memory. Setting a charge twice changes nothing."""

    async def charge(self, charge: Charge) -> bool:
        """Store a charge; True when it was not there. The first one stays: a later copy does not change it.

        Raises:
            BadEvent: No store can hold it (a number of more than 64 bits, a time without a zone).
        """

    async def charged(self, chat: ChatRef, message_id: int) -> Charge | None:
        """The charge that is stored for a message."""

    async def spend(self, deployment: str, *, owner_id: UUID | None, start: datetime, end: datetime) -> Spend:
        """Sum over charges with `start <= at < end`, of one owner or of all."""

    async def spend_by_owner(self, deployment: str) -> Mapping[UUID, Spend]:
        """All charges ever, by owner."""

    async def raise_alert(self, key: str, event: Event) -> Raised:
        """Remember that the alert `key` fires with `event`. What was remembered first stays."""

    async def unpublished_alerts(self) -> Sequence[tuple[str, Event]]:
        """`(key, event)` of raised alerts that were not published yet, oldest first."""

    async def alert_published(self, key: str) -> None:
        """The broker has confirmed the alert."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What the archivist has gathered of a chat from the bus."""

    chat: ChatRef
    messages: Mapping[int, bytes]  # live message id -> the upstream object as JSON
    status: str | None
    open_turn: bool  # a user message without a `chat.turn`
    archived: bool
    archived_at: datetime | None  # upstream's own time, or earlier; None: it is not archived, or gone
    changed_at: datetime  # when the last event of the chat that told something new was taken in
    chat_json: bytes | None  # last Chat object seen


@dataclass(frozen=True, slots=True)
class Uncopied:
    """A chat that waits for its copy, without what was said in it: there may be many thousand of them."""

    chat: ChatRef
    archived_at: datetime | None
    changed_at: datetime


@dataclass(frozen=True, slots=True)
class ArchiveRecord:
    """One archived transcript. `version` counts up from 1 per chat."""

    chat: ChatRef
    version: int
    url: str
    manifest_url: str
    sha256: str
    size: int
    messages: int
    first_id: int | None
    last_id: int | None
    stored_at: datetime
    published: bool  # `archive.stored` was confirmed
    sealed: bool  # archived in Coder after it


# A chat that is in one of these does nothing until somebody asks it to.
IDLE_STATUSES = frozenset({"waiting", "completed", "error"})


class Archives(Protocol):
    """The archivist's memory. Every `collect_*` may be repeated and reordered without a second effect."""

    async def collect(self, event: Event) -> None:
        """Take in one event of the families `chat.message`, `chat.history`, `chat.status`, `chat.turn`
        and `chat.lifecycle`; others are ignored.

        Messages are set by id. Of history statements and of status and lifecycle events the one with the highest
        `(session, position)` counts; a message is live when the last statement holds its id or ends below it.

        Raises:
            BadEvent: It lacks what its type promises.
        """

    async def due(self, *, idle_since: datetime) -> Sequence[Uncopied]:
        """Chats with at least one live message, `changed_at` not after `idle_since`, and news since their last archive
        record, which are at rest: no open turn and a status of `IDLE_STATUSES`, or archived upstream, where nothing
        ends a turn any more. The longest quiet first. News is a difference in the live messages: not a copy of what is
        known, a status, or that the chat was archived."""

    async def endangered(self, deployment: str, *, archived_before: datetime) -> Sequence[Uncopied]:
        """Chats that were archived upstream before a moment and have no archive record that covers what is known of
        them; the longest archived first. Those that are known to be gone are left out."""

    async def family_copied(self, chat: ChatRef) -> bool:
        """Whether all that is known of the chat, and of each of its subagents' chats, is covered by an archive record:
        none of them went on since."""

    async def collected(self, deployment: str, chat_id: UUID) -> Collected | None:
        """What is known of one chat."""

    async def add_archive(self, record: ArchiveRecord, *, upto: datetime) -> None:
        """Store a record; `upto` is the `changed_at` it covers. The same `(chat, version)` again changes nothing."""

    async def mark_archive(self, record: ArchiveRecord, *, published: bool = False, sealed: bool = False) -> None:
        """Set the flags that are True here."""

    async def archives(self, deployment: str | None = None, chat_id: UUID | None = None) -> Sequence[ArchiveRecord]:
        """All records, of one deployment, or of one of its chats; oldest first."""

    async def unfinished_archives(self, *, seal: bool) -> Sequence[ArchiveRecord]:
        """Records that were not published; with `seal`, also the newest of each chat while it is not sealed."""


@dataclass(frozen=True, slots=True)
class AddedChat:
    """A chat that somebody named. `gone_at`: when the server was found not to have it any more."""

    chat_id: UUID
    added_at: datetime
    gone_at: datetime | None = None


class Added(Protocol):
    """Chats that are to be followed though no list of an account has them."""

    async def added(self, deployment: str) -> Sequence[AddedChat]:
        """All of them, in the order in which they were added; also those that are gone."""

    async def add(self, deployment: str, chat_id: UUID) -> bool:
        """Add a chat, or take back that it is gone; True when that changed anything."""

    async def remove(self, deployment: str, chat_id: UUID) -> bool:
        """Forget that it was added; False when it was not."""

    async def set_gone(self, deployment: str, chat_id: UUID) -> None:
        """The server does not have it any more. What was gone before stays gone since then."""


class Store(Claims, Charges, Archives, Added, Protocol):
    """All of the relay's state."""

    async def check(self) -> None:
        """Answer, or raise `Unavailable`."""


# --- objects -------------------------------------------------------------------------------------------------------


class ObjectStore(Protocol):
    """Where archives go."""

    @property
    def url(self) -> str:
        """Of the root, without credentials."""

    async def put(self, path: str, body: bytes) -> None:
        """Write an object whole; when it returns, `get` sees it. An object of that path is replaced."""

    async def get(self, path: str) -> bytes:
        """Read an object whole.

        Raises:
            FileNotFoundError: There is none.
        """

    async def paths(self, prefix: str) -> Iterable[str]:
        """Paths that begin with `prefix`, sorted."""
