"""Chats of all users, for an administrator: found through the cost reports of servers up to 2.36.

An administrator may read any chat by its id, but no list and no watch tells him the ids of others' chats. What a report
says of a user's chats comes by root, and only once an answer was stored in the window: subagents' chats are those that
the root names (since 2.33).
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from uuid import UUID

import structlog

from relay.adapters.coder_answers import as_object, as_objects, decoded, is_missing, refusal, with_children
from relay.adapters.coder_paths import About, ChatsApi
from relay.core.errors import ChatGone, ChatRefused, RelayError
from relay.core.events import JsonObject
from relay.core.frames import content_digest

log = structlog.get_logger(__name__)

_USERS_AT_ONCE = 100
_CHATS_AT_ONCE = 4  # reads by id on their way together


class CostReports:
    """What the reports said last, so that only chats whose line has changed are read again.

    Args:
        days: Length of the window: chats without an answer in it are not found.
        chat: Reads a chat by its id.
    """

    def __init__(self, api: ChatsApi, *, days: int, chat: Callable[[UUID], Awaitable[JsonObject]]) -> None:
        self._api = api
        self._days = days
        self._chat = chat
        self._users: dict[str, str] = {}  # digest of the line of each user
        self._chats: dict[UUID, str] = {}  # and of each root chat
        self._absent_told = False

    async def rows(self, *, but_of: Collection[UUID]) -> AsyncGenerator[JsonObject, None]:
        """Chats with news, as a read by id gives them; nothing where the server has no such reports.

        Args:
            but_of: Users whose chats are listed anyway.
        """
        window = self._window()
        async for user, digest in self._changed_users(window, but_of):
            changed = await self._changed_chats(user, window)
            for place in range(0, len(changed), _CHATS_AT_ONCE):
                for chat_id, line, row in await self._read(changed[place : place + _CHATS_AT_ONCE]):
                    for each in with_children([row] if row else []):
                        yield each
                    self._chats[chat_id] = line
            self._users[user] = digest

    def _window(self) -> dict[str, str]:
        """In whole days, so that a report changes only once a day by itself."""
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        start, end = midnight - timedelta(days=self._days), midnight + timedelta(days=2)
        return {"start_date": f"{start:%Y-%m-%dT%H:%M:%SZ}", "end_date": f"{end:%Y-%m-%dT%H:%M:%SZ}"}

    async def _changed_users(
        self, window: Mapping[str, str], but_of: Collection[UUID]
    ) -> AsyncGenerator[tuple[str, str], None]:
        offset = 0
        while True:
            page = {"limit": str(_USERS_AT_ONCE), "offset": str(offset)}
            answer = await self._api.call("cost_reports", "GET", "/cost/users", {**window, **page}, about=About.OPTION)
            if is_missing(answer):
                if not self._absent_told:
                    log.warning("no_cost_reports", advice="chats of other users have to be named: relay follow CHAT")
                self._absent_told = True
                return
            self._absent_told = False
            users = as_objects(answer, as_object(answer, decoded(answer, of_chat=False)).get("users"), null=True)
            for line in users:
                user, digest = str(line.get("user_id")), content_digest(line)
                if self._users.get(user) != digest and _uuid(user) not in but_of:
                    yield user, digest
            if len(users) < _USERS_AT_ONCE:
                return
            offset += len(users)

    async def _changed_chats(self, user: str, window: Mapping[str, str]) -> list[tuple[UUID, str]]:
        answer = await self._api.call("cost_reports", "GET", f"/cost/{user}/summary", dict(window), about=About.OPTION)
        if is_missing(answer):  # the user was deleted a moment ago
            return []
        if answer.status != 200:
            raise refusal(answer, of_chat=False, now=datetime.now(UTC))
        lines = as_objects(answer, as_object(answer, decoded(answer, of_chat=False)).get("by_chat"), null=True)
        return [(chat_id, digest) for chat_id, digest in _by_chat(lines) if self._chats.get(chat_id) != digest]

    async def _read(self, changed: list[tuple[UUID, str]]) -> list[tuple[UUID, str, JsonObject | None]]:
        async def read(chat_id: UUID) -> JsonObject | RelayError | None:
            try:
                return await self._chat(chat_id)
            except (ChatGone, ChatRefused):
                return None  # the report remembers more chats than there are
            except RelayError as exc:
                return exc

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(chat_id)) for chat_id, _ in changed]
        found = []
        for (chat_id, line), task in zip(changed, tasks, strict=True):
            row = task.result()
            if isinstance(row, RelayError):
                raise row
            found.append((chat_id, line, row))
        return found


def _by_chat(lines: list[JsonObject]) -> Iterator[tuple[UUID, str]]:
    for line in lines:
        if (chat_id := _uuid(line.get("root_chat_id"))) is not None:
            yield chat_id, content_digest(line)


def _uuid(value: object) -> UUID | None:
    try:
        return UUID(str(value))
    except ValueError:
        return None
