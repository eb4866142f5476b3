"""Several accounts of one Coder server as one `Upstream`.

A token lists and watches the chats of its own user only. So every account is listed and watched, and each chat is asked
for through the account that owns it, or another that may read it. A token that is refused stops its account alone.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import structlog
from prometheus_client import Gauge

from relay.adapters.coder import CoderSettings, CoderUpstream, Sight
from relay.adapters.coder_link import open_link
from relay.adapters.coder_reports import CostReports
from relay.core.backoff import backoff
from relay.core.dialect import Dialect, Evidence
from relay.core.errors import BadFrame, ChatGone, ChatRefused, Unauthorized, Unavailable
from relay.core.events import JsonObject
from relay.ports import Account, Budget, Frames, MessagePage, ModelPrice, Retention

log = structlog.get_logger(__name__)
T = TypeVar("T")

ACCOUNTS = Gauge(
    "relay_accounts",
    "Accounts of Coder by what their token is worth. refused above 0: chats of these users are not followed.",
    ["state"],
)
for _state in ("ok", "refused"):
    ACCOUNTS.labels(_state)

_FRAMES_AHEAD = 256  # of all watch sockets together; then they are not read


@asynccontextmanager
async def open_accounts(settings: CoderSettings) -> AsyncIterator["CoderAccounts"]:
    """All accounts that the settings name. Opening them does not speak to the server yet.

    Raises:
        WrongSettings: There is no usable token, or the proxy in the environment cannot be used.
    """
    sight = Sight()
    async with AsyncExitStack() as stack:
        accounts = []
        for name, where, one in settings.each_account():
            link = await stack.enter_async_context(open_link(one, where))
            accounts.append(_Account(name, CoderUpstream(link, sight)))
        yield CoderAccounts(accounts, sight, settings)


@dataclass(slots=True, eq=False)
class _Account:
    name: str
    upstream: CoderUpstream
    who: Account | None = None
    refused: str = ""  # why its token is; empty: it is not
    again_at: float = 0.0  # when it is tried again, monotonic
    reports: CostReports | None = None


class CoderAccounts:
    """`Upstream` over all accounts. Get one from `open_accounts`.

    `Unauthorized` means that every token is refused. As long as one is not, a chat that cannot be found is not gone:
    it may belong to the account that is refused, and that is `Unavailable`.
    """

    def __init__(self, accounts: Sequence[_Account], sight: Sight, settings: CoderSettings) -> None:
        self._accounts = accounts
        self._sight = sight
        self._settings = settings
        self._owner: dict[UUID, _Account] = {}  # of chats, where there are several accounts
        self._shared: set[UUID] = set()  # chats that others may read
        self._count()

    @property
    def deployment(self) -> str:
        return self._accounts[0].upstream.deployment

    @property
    def dialect(self) -> Dialect:
        """The age of the server, as far as it was seen."""
        return self._sight.dialect

    @property
    def evidence(self) -> Evidence:
        """What was seen, of each kind the newest."""
        return self._sight.evidence

    def status(self) -> dict[str, object]:
        """For `/status`."""
        accounts = [
            {
                "name": account.name,
                "user": account.who.username if account.who else None,
                "administrator": account.who.administrator if account.who else None,
                "ok": not account.refused,
                "reason": account.refused,
            }
            for account in self._accounts
        ]
        return {**self._sight.status(), "accounts": accounts}

    @property
    def several(self) -> bool:
        """Whether there is more than one account."""
        return len(self._accounts) > 1

    async def check(self) -> None:
        """Return, or raise `Unauthorized` with the accounts whose tokens were refused last. Speaks to nobody."""
        refused = [f"{account.name}: {account.refused}" for account in self._accounts if account.refused]
        if refused:
            raise Unauthorized("; ".join(refused))

    async def survey(self) -> None:
        """As `CoderUpstream.survey`, with an account that is not refused."""
        await self._any(lambda upstream: upstream.survey())

    async def each(self) -> AsyncGenerator[tuple[str, Account | Unauthorized], None]:
        """Every account by name: who it is, or why its token is refused. All are asked."""
        for account in self._accounts:
            try:
                yield account.name, await account.upstream.account()
            except Unauthorized as exc:
                yield account.name, exc

    # accounts

    async def accounts(self) -> Sequence[Account]:
        found = []
        for account in self._usable():
            try:
                found.append(await self._who(account))
            except Unauthorized as exc:
                self._refuse(account, exc)
        if not found:
            raise self._all_refused()
        return found

    def _usable(self) -> list[_Account]:
        """Those that are not refused, and those whose turn it is to be tried again. A single one always is."""
        now = time.monotonic()
        alone = len(self._accounts) == 1
        return [each for each in self._accounts if alone or not each.refused or now >= each.again_at]

    async def _who(self, account: _Account) -> Account:
        if account.who is None:
            account.who = await account.upstream.account()
            self._accept(account)
        return account.who

    def _accept(self, account: _Account) -> None:
        if account.refused:
            log.info("account_accepted", account=account.name)
            account.refused = ""
            self._count()

    def _refuse(self, account: _Account, exc: Unauthorized) -> None:
        if not account.refused:
            log.warning("account_refused", account=account.name, reason=str(exc))
        account.refused = str(exc)
        account.who = None  # its file may hold another user's token next time
        account.again_at = time.monotonic() + self._settings.refused_seconds
        self._count()

    def _count(self) -> None:
        refused = sum(bool(account.refused) for account in self._accounts)
        ACCOUNTS.labels("refused").set(refused)
        ACCOUNTS.labels("ok").set(len(self._accounts) - refused)

    def _all_refused(self) -> Unauthorized:
        return Unauthorized("; ".join(f"{each.name}: {each.refused}" for each in self._accounts))

    # lists

    async def list_chats(self, *, archived: bool) -> AsyncGenerator[JsonObject, None]:
        listed: set[UUID] = set()
        for account in self._usable():
            try:
                who = await self._who(account)
                if who.user_id in listed:
                    continue  # two tokens of one user
                async with aclosing(account.upstream.list_chats(archived=archived)) as rows:
                    async for row in rows:
                        self._remember(row, account)
                        yield row
                listed.add(who.user_id)
                self._accept(account)
            except Unauthorized as exc:
                self._refuse(account, exc)
        if not listed:
            raise self._all_refused()
        if self._settings.administrator and not archived:
            async with aclosing(self._reported(listed)) as rows:
                async for row in rows:
                    yield row

    async def _reported(self, listed: Collection[UUID]) -> AsyncGenerator[JsonObject, None]:
        """Chats of other users, as far as an administrator finds them. They come when there is news of them."""
        for account in self._usable():
            try:
                if not (await self._who(account)).administrator:
                    continue
                if account.reports is None:
                    account.reports = account.upstream.reports(days=self._settings.administrator_days)
                async with aclosing(account.reports.rows(but_of=listed)) as rows:
                    async for row in rows:
                        yield row
                return
            except Unauthorized as exc:
                self._refuse(account, exc)
        log.warning("no_administrator", advice="RELAY_CODER__ADMINISTRATOR needs a token of a user of the owner role")

    def _remember(self, row: JsonObject, account: _Account) -> None:
        if len(self._accounts) == 1:
            return
        chat_id = UUID(str(row["id"]))
        self._owner[chat_id] = account
        (self._shared.add if row.get("shared") is True else self._shared.discard)(chat_id)

    # one chat

    async def chat(self, chat_id: UUID) -> JsonObject:
        return await self._of_chat(chat_id, lambda upstream: upstream.chat(chat_id))

    async def messages(self, chat_id: UUID, *, down_to: int) -> MessagePage:
        return await self._of_chat(chat_id, lambda upstream: upstream.messages(chat_id, down_to=down_to))

    async def archive_chat(self, chat_id: UUID) -> None:
        await self._of_chat(chat_id, lambda upstream: upstream.archive_chat(chat_id))

    @asynccontextmanager
    async def stream(self, chat_id: UUID, *, after_id: int, after_revision: int | None = None) -> AsyncIterator[Frames]:
        async with AsyncExitStack() as stack:

            async def opened(upstream: CoderUpstream) -> Frames:
                stream = upstream.stream(chat_id, after_id=after_id, after_revision=after_revision)
                return await stack.enter_async_context(stream)

            # Another user's stream leaves the owner's read mark alone, since 2.34.
            yield await self._of_chat(chat_id, opened, listening=True)

    async def _of_chat(
        self, chat_id: UUID, ask: Callable[[CoderUpstream], Awaitable[T]], *, listening: bool = False
    ) -> T:
        refusal: ChatGone | ChatRefused | None = None
        for account in self._in_turn(chat_id, listening=listening):
            try:
                return await ask(account.upstream)
            except Unauthorized as exc:
                self._refuse(account, exc)
            except (ChatGone, ChatRefused) as exc:
                if not isinstance(refusal, ChatRefused):  # who may see it but not read it knows that it is there
                    refusal = exc
        if refusal is None:
            raise self._all_refused()
        blind = [account.name for account in self._accounts if account.refused]
        if blind and isinstance(refusal, ChatGone):
            raise Unavailable(f"{refusal}, and the token of {', '.join(blind)} is refused") from refusal
        raise refusal

    def _in_turn(self, chat_id: UUID, *, listening: bool) -> list[_Account]:
        """Who is asked about a chat, the most promising first."""
        owner = self._owner.get(chat_id)
        usable = self._usable()

        def rank(account: _Account) -> int:
            reads_all = account.who is not None and account.who.administrator
            may_read = account is not owner and (reads_all or chat_id in self._shared)
            if listening and owner is not None and may_read:
                return 0 if reads_all else 1
            if account is owner:
                return 2
            return 3 if reads_all else 4

        return sorted(usable, key=rank)

    # money, and what the server does by itself

    async def model_prices(self) -> Mapping[UUID, ModelPrice]:
        return await self._any(lambda upstream: upstream.model_prices())

    async def has_native_limits(self) -> bool:
        return await self._any(lambda upstream: upstream.has_native_limits())

    async def budget(self, user_id: UUID) -> Budget | None:
        return await self._any(lambda upstream: upstream.budget(user_id), user_id)

    async def retention(self) -> Retention:
        return await self._any(lambda upstream: upstream.retention())

    async def _any(self, ask: Callable[[CoderUpstream], Awaitable[T]], user_id: UUID | None = None) -> T:
        """Ask one account that is not refused: that of the user, else an administrator's, else any."""

        def rank(account: _Account) -> int:
            if account.who is None:
                return 2
            return 0 if account.who.user_id == user_id else 1 if account.who.administrator else 2

        for account in sorted(self._usable(), key=rank):
            try:
                return await ask(account.upstream)
            except Unauthorized as exc:
                self._refuse(account, exc)
        raise self._all_refused()

    # watch

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[str]]:
        """Of one account as `CoderUpstream.watch`. Of several: what all their sockets tell, as it comes.

        Each socket is opened again by itself, after a pause that grows, so that one that ends is not the end of all.
        The iterator ends with `Unauthorized` when every token is refused, and in no other way.
        """
        if len(self._accounts) == 1:
            async with self._accounts[0].upstream.watch() as frames:
                yield frames
            return
        told: asyncio.Queue[str | Exception] = asyncio.Queue(_FRAMES_AHEAD)
        tasks = [asyncio.create_task(self._watch(each, told), name=f"watch {each.name}") for each in self._accounts]
        try:
            yield _Told(told)
        finally:
            await _cancelled(tasks)

    async def _watch(self, account: _Account, told: asyncio.Queue[str | Exception]) -> None:
        try:
            await self._watch_for_ever(account, told)
        except Exception as exc:  # noqa: BLE001  # who listens raises it: nobody else would hear of it
            await told.put(exc)

    async def _watch_for_ever(self, account: _Account, told: asyncio.Queue[str | Exception]) -> None:
        delays = backoff(chance=_chance())
        while True:
            wait = 0.0
            try:
                async with account.upstream.watch() as frames:
                    self._accept(account)
                    async for frame in frames:
                        delays = backoff(chance=_chance())
                        await told.put(frame)
            except Unauthorized as exc:
                self._refuse(account, exc)
                wait = self._settings.refused_seconds
                if all(each.refused for each in self._accounts):
                    await told.put(self._all_refused())
            except (Unavailable, BadFrame) as exc:
                log.info("watch_broken", account=account.name, reason=str(exc))
                wait = (exc.retry_after_seconds or 0.0) if isinstance(exc, Unavailable) else 0.0
            await asyncio.sleep(max(next(delays), wait))


def _chance() -> Iterator[float]:
    return iter(random.random, None)


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Return when all have ended. Not a task group's end: one that ends with an error forgets that who waits for it was
    cancelled as well."""
    asked_to_end: asyncio.CancelledError | None = None
    for task in tasks:
        task.cancel()
    while running := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as exc:
            asked_to_end = exc
    if asked_to_end is not None:
        raise asked_to_end


class _Told:
    """What was told, until that is that every token is refused."""

    def __init__(self, told: asyncio.Queue[str | Exception]) -> None:
        self._told = told

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        frame = await self._told.get()
        if isinstance(frame, Exception):
            raise frame
        return frame
