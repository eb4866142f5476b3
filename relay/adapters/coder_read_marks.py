"""The owner's read mark. A stream of the owner's token makes a chat count as read; here that is undone.

A server moves the mark to the end when such a stream is opened, and once more when it ends: servers of 2.32 and 2.33
for anybody's stream, those since 2.34 for the owner's alone. Servers since about 2.38 set it back when they are asked
to (`PATCH {"read": false}`); others answer 204 and do nothing, or refuse.

Nobody may find unread what he has read. So the mark is set back only for a chat that the owner's list of unread chats
held immediately before the stream was opened, or closed: whoever read the chat while the relay listened has taken it
out of that list. What is left is a person who reads it within that moment (a fraction of a second, more where the list
is long), and finds it unread once more. A connection that breaks off by itself leaves the chat read.
"""

import asyncio
import time
from collections.abc import Callable, Hashable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from uuid import UUID

import structlog
from prometheus_client import Counter

from relay.adapters.coder_answers import Answer, refusal, with_children
from relay.adapters.coder_paths import About, ChatsApi
from relay.adapters.coder_rows import rows_of
from relay.core.errors import RelayError

log = structlog.get_logger(__name__)

RESTORED = Counter(
    "relay_read_marks_total",
    "Read marks of owners that a stream of the relay moved. lost: Coder cannot set it back, or did not answer; follow "
    "with a token of another user who may read the chats.",
    ["outcome"],
)
for _outcome in ("restored", "lost"):
    RESTORED.labels(_outcome)

_ALL_CHATS = "100000"
_FRESH_SECONDS = 0.25  # so long a list of unread chats is good for all that ask
_SHARE_OF_TIME = 10  # a list that took long is good for so many times that
_SETTLE_SECONDS = 0.3  # after a close, until the server has moved the mark
_PATIENCE_SECONDS = 2.0  # a read mark must not hold up a stream, or a shutdown
_TRIALS = 2  # requests without an effect until a server counts as one that has none


class ReadMarks:
    """Of one account.

    Args:
        server: What changes when the server is upgraded; then all is learned anew.
        keep: False: marks are left where the server puts them.
    """

    def __init__(self, api: ChatsApi, server: Callable[[], Hashable], *, keep: bool) -> None:
        self._api = api
        self._server = server
        self._keep = keep
        self._learned_of: Hashable = None
        self._works: bool | None = None  # whether the server sets marks back; None: it was not seen yet
        self._failed = 0
        self._unread: set[UUID] = set()
        self._stale_at = 0.0
        self._reading = asyncio.Lock()

    async def unread(self, chat_id: UUID) -> bool:
        """Whether the owner of the token has the chat unread, and the server is able to make it so again."""
        if not self._keep or not self._may_work():
            return False
        with suppress(RelayError, TimeoutError, ValueError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return chat_id in await self._list()
        return False

    async def after_first_frame(self, chat_id: UUID) -> None:
        """Set the mark back that the server moves when a stream opens: by its first frame that is done."""
        await self._restore(chat_id, learn=True)

    async def after_close(self, chat_id: UUID) -> None:
        """Set the mark back that the server moves when a stream ends."""
        await asyncio.sleep(_SETTLE_SECONDS)
        await self._restore(chat_id, learn=False)

    async def _restore(self, chat_id: UUID, *, learn: bool) -> None:
        restored = False
        with suppress(RelayError, TimeoutError, ValueError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                answer = await self._api.call(
                    "read_mark", "PATCH", f"/{chat_id}", body={"read": False}, about=About.CHAT
                )
                restored = answer.status in (200, 204)
                if learn and self._learned() is None:
                    restored = restored and chat_id in await self._list(fresh=True)
                    self._learn(worked=restored)
        RESTORED.labels("restored" if restored else "lost").inc()

    # what the server can do

    def _may_work(self) -> bool:
        return self._learned() is not False

    def _learned(self) -> bool | None:
        """What is known of this server; of another one nothing is."""
        server = self._server()
        if server != self._learned_of:
            self._learned_of, self._works, self._failed = server, None, 0
        return self._works

    def _learn(self, *, worked: bool, trials: int = _TRIALS) -> None:
        if self._learned() is not None:
            return
        self._failed += not worked
        if worked or self._failed >= trials:
            self._works = worked
            log.info("read_marks_kept" if worked else "read_marks_not_kept")

    async def _list(self, *, fresh: bool = False) -> set[UUID]:
        async with self._reading:
            began = time.monotonic()
            if fresh or began >= self._stale_at:
                self._unread = await self._read()
                took = time.monotonic() - began
                self._stale_at = began + took + max(_FRESH_SECONDS, _SHARE_OF_TIME * took)
            return self._unread

    async def _read(self) -> set[UUID]:
        body = await self._api.fetch("chats", {"q": "has_unread:true", "limit": _ALL_CHATS})
        if isinstance(body, Answer):
            if body.status == 400:  # it does not know the term, so it is older than what sets marks back
                self._learn(worked=False, trials=1)
            raise refusal(body, of_chat=False, now=datetime.now(UTC))
        found: set[UUID] = set()
        async with aclosing(rows_of(body)) as rows:
            async for root in rows:
                for row in with_children([root]):
                    if row.get("has_unread") is True:
                        found.add(UUID(str(row["id"])))
        return found
