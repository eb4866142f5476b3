"""Where a Coder server has its chats API, found out by asking, and found again when it moves.

Servers up to 2.36 have it at `/api/experimental/chats`, 2.37 at both places, later ones at `/api/v2/chats` alone. A
server is upgraded while the relay runs; for a while servers of two ages may answer in turn behind one address.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from enum import Enum
from typing import Generic, TypeVar

import structlog

from relay.adapters.coder_answers import NOT_FOUND, Answer, decoded, refusal
from relay.adapters.coder_link import Body, CoderLink
from relay.adapters.coder_socket import WatchedSocket
from relay.core.dialect import Evidence, Prefix
from relay.core.errors import RelayError

log = structlog.get_logger(__name__)
T = TypeVar("T")
Reply = TypeVar("Reply", Answer, WatchedSocket | Answer, Body | Answer)

PATHS: dict[Prefix, str] = {"v2": "/api/v2/chats", "experimental": "/api/experimental/chats"}
_OTHER: dict[Prefix, Prefix] = {"v2": "experimental", "experimental": "v2"}

# Answers of a server that has the path. Not 408, 429 or 5xx: those a proxy gives as well while a server restarts.
_IS_THERE = (200, 400, 401, 403)


class About(Enum):
    """What a path below the API names, and so what a 404 may mean."""

    ACCOUNT = "account"  # always there: a 404 means that the API is elsewhere
    CHAT = "chat"  # the chat may be gone
    OPTION = "option"  # not every server has it


class ChatsApi:
    """Calls below the API's path, wherever that is.

    The first call asks where. The place is kept until it answers 404; then the same call goes to the other place. With
    servers of two ages behind one address either may answer 404 in turn, so that both are tried twice, in an order
    that a strict rotation between two servers does not defeat.
    """

    def __init__(self, link: CoderLink, saw: Callable[[Evidence], None]) -> None:
        self._link = link
        self._saw = saw
        self._prefix: Prefix | None = None
        self._told: Prefix | None = None  # in the log
        self._find = _Shared(self._look_for_it)
        self._still_there = {prefix: _Shared(self._asks_the_list(prefix)) for prefix in PATHS}

    async def call(
        self,
        endpoint: str,
        method: str,
        below: str = "",
        query: dict[str, str] | None = None,
        body: object = None,
        *,
        about: About,
    ) -> Answer:
        """As `CoderLink.call`, at the path `below` the API's.

        A 404 to `About.CHAT` is returned when the server has the API and says so about this very chat.
        """
        return await self._ask(lambda path: self._link.call(endpoint, method, path + below, query, body), about)

    async def fetch(self, endpoint: str, query: dict[str, str]) -> Body | Answer:
        """As `CoderLink.fetch`, of the list of chats."""
        return await self._ask(lambda path: self._link.fetch(endpoint, path, query), About.ACCOUNT)

    async def dial(self, below: str, query: dict[str, str], *, about: About) -> WatchedSocket | Answer:
        """As `CoderLink.dial`, at the path `below` the API's."""
        return await self._ask(lambda path: self._link.dial(path + below, query), about)

    async def _ask(self, ask: Callable[[str], Awaitable[Reply]], about: About) -> Reply:
        first = self._prefix or await self._find()
        other = _OTHER[first]
        for prefix in (first, other, other, first):
            reply = await ask(PATHS[prefix])
            if not isinstance(reply, Answer):
                self._lock(prefix)
                return reply
            if not await self._is_elsewhere(reply, prefix, about):
                if reply.status in _IS_THERE or reply.status < 300:
                    self._lock(prefix)
                return reply
            self._unlock(prefix)
        assert isinstance(reply, Answer)  # noqa: S101
        if about is not About.ACCOUNT and await self._still_there[first]():
            return reply  # no place has it, and one has the API: that is an answer
        raise refusal(reply, of_chat=False, now=datetime.now(UTC))

    async def _is_elsewhere(self, answer: Answer, prefix: Prefix, about: About) -> bool:
        """Whether the API may not be there any more. When in doubt it may: no chat must be forgotten for it."""
        if answer.status != 404:
            return False
        if about is not About.CHAT or answer.said != NOT_FOUND:
            return True
        return not await self._still_there[prefix]()

    # where it is

    async def _look_for_it(self) -> Prefix:
        for prefix in ("v2", "experimental", "experimental", "v2"):
            if await self._asks_the_list(prefix)():
                return prefix
        raise refusal(Answer(f"GET {' and '.join(PATHS.values())}", 404, {}, b""), of_chat=False, now=datetime.now(UTC))

    def _asks_the_list(self, prefix: Prefix) -> Callable[[], Awaitable[bool]]:
        async def is_there() -> bool:
            answer = await self._link.call("probe", "GET", PATHS[prefix], {"limit": "1"})
            if answer.status == 404:
                self._unlock(prefix)
                return False
            if answer.status not in _IS_THERE:
                raise refusal(answer, of_chat=False, now=datetime.now(UTC))
            if answer.status == 200:
                decoded(answer, of_chat=False)  # a web page for every path is no API
            self._lock(prefix)
            return True

        return is_there

    def _lock(self, prefix: Prefix) -> None:
        if self._prefix is None:  # else a call that was on its way when another moved would move all of them back
            self._prefix = prefix
            if prefix != self._told:
                log.info("chats_api_found", path=PATHS[prefix])
                self._told = prefix
        self._saw(Evidence(prefix=prefix))

    def _unlock(self, prefix: Prefix) -> None:
        if self._prefix == prefix:
            self._prefix = None


class _Shared(Generic[T]):
    """An action that all who wait for it at the same time share, its failure too."""

    def __init__(self, action: Callable[[], Awaitable[T]]) -> None:
        self._action = action
        self._lock = asyncio.Lock()
        self._done = 0
        self._outcome: T | RelayError

    async def __call__(self) -> T:
        done = self._done
        async with self._lock:
            if self._done == done:  # nobody did it while we waited
                try:
                    self._outcome = await self._action()
                except RelayError as exc:
                    self._outcome = exc
                self._done += 1
            outcome = self._outcome
        if isinstance(outcome, RelayError):
            raise outcome
        return outcome
