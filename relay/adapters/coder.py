"""One account of one Coder server, whatever its age: what is asked, and what the answers come to."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from uuid import UUID

import structlog
from prometheus_client import Gauge

from relay.adapters.coder_answers import (
    EXPERIMENT_OFF,
    Answer,
    as_object,
    as_objects,
    chat_rows,
    decoded,
    is_missing,
    message_id,
    model_price,
    refusal,
    user_budget,
    with_children,
)
from relay.adapters.coder_frames import SocketFrames
from relay.adapters.coder_link import TOKEN_HEADER, USER_AGENT, Body, CoderLink, CoderSettings, open_link
from relay.adapters.coder_paths import About, ChatsApi
from relay.adapters.coder_read_marks import ReadMarks
from relay.adapters.coder_reports import CostReports
from relay.adapters.coder_rows import rows_of
from relay.core.dialect import (
    Dialect,
    Evidence,
    Witness,
    chat_evidence,
    frame_evidence,
    gateway_evidence,
    limits_evidence,
    list_evidence,
    page_evidence,
    tells_all,
)
from relay.core.errors import ChatGone, ChatRefused, RelayError, Unavailable
from relay.core.events import JsonObject
from relay.ports import Account, Budget, Frames, MessagePage, ModelPrice, Retention

__all__ = ["TOKEN_HEADER", "USER_AGENT", "CoderSettings", "CoderUpstream", "open_upstream"]

log = structlog.get_logger(__name__)

SOURCE_DIALECT = Gauge(
    "relay_source_dialect",
    "1 for the age of the chats API that Coder speaks, as it was seen. mixed: servers of two ages answer in turn. If "
    "that stays, a rolling upgrade hangs.",
    ["dialect"],
)
for _dialect in Dialect:
    SOURCE_DIALECT.labels(_dialect.value)

_ALL_CHATS = 100_000
_CHATS_PAGE = 50
_LIST_PASSES = 5  # so often the pages are read when each time brings a chat that was not there before
_MESSAGES_PAGE = 200  # the server's maximum
_SURVEYED_CHATS = 5

_ARCHIVED_ALREADY = "Chat is already archived."
_WITH_ITS_ROOT = "Chat archive state can only be changed on the root chat."


@asynccontextmanager
async def open_upstream(settings: CoderSettings) -> AsyncIterator["CoderUpstream"]:
    """An `Upstream` for one account. Opening it does not speak to the server yet.

    Raises:
        WrongSettings: There is no usable token, or the proxy in the environment cannot be used.
    """
    async with open_link(settings) as link:
        yield CoderUpstream(link)


class Sight:
    """What was seen of one server, by all its accounts, and the gauge that shows it."""

    def __init__(self) -> None:
        self._witness = Witness()
        self._told: Dialect | None = None

    @property
    def dialect(self) -> Dialect:
        """The age of the server, as far as it was seen."""
        return self._witness.dialect(time.monotonic())

    @property
    def evidence(self) -> Evidence:
        """What was seen, of each kind the newest."""
        return self._witness.evidence

    def status(self) -> dict[str, object]:
        """For `/status`."""
        return {"dialect": self.dialect.value, "evidence": self.evidence.to_json()}

    def saw(self, found: Evidence) -> None:
        """Add to it."""
        self._witness.saw(found, time.monotonic())
        now = self.dialect
        if now is not self._told:
            for dialect in Dialect:
                SOURCE_DIALECT.labels(dialect.value).set(dialect is now)
            if self._told is not None:
                log.info("dialect_seen", dialect=now.value, before=self._told.value, evidence=self.evidence.to_json())
            self._told = now


class CoderUpstream:
    """`Upstream` over the network, for one account. Get one from `open_upstream`."""

    def __init__(self, link: CoderLink, sight: Sight | None = None) -> None:
        self._link = link
        self._sight = sight or Sight()
        self._saw = self._sight.saw
        self._api = ChatsApi(link, self._saw)
        self._marks = ReadMarks(self._api, lambda: (self.evidence.prefix, link.build), keep=link.keeps_unread)

    @property
    def deployment(self) -> str:
        return self._link.deployment

    # what it speaks

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
        return self._sight.status()

    async def survey(self) -> None:
        """Look at what the other calls do not show by themselves. A few reads; nothing is changed, no read mark moved.

        Raises:
            Unavailable, Unauthorized: As the methods of the port.
        """
        answer = await self._api.call("chats", "GET", query={"limit": str(_SURVEYED_CHATS)}, about=About.ACCOUNT)
        rows = chat_rows(answer)
        self._saw(list_evidence(rows))
        await self.has_native_limits()
        await self._gateway_budget("me")
        for row in rows:
            with suppress(ChatGone, ChatRefused):
                asked = {"after_id": "1", "limit": "2"}
                answer = await self._of_chat("messages", f"{row['id']}/messages", asked)
                found = page_evidence(as_object(answer, decoded(answer, of_chat=True)), after_id=1)
                self._saw(found)
                if found.asc_messages is not None:
                    break

    # REST

    async def accounts(self) -> Sequence[Account]:
        return [await self.account()]

    async def account(self) -> Account:
        """Whose token this is."""
        user, answer = await self._me()
        roles = user.get("roles")
        named = [role.get("name") for role in roles if isinstance(role, dict)] if isinstance(roles, list) else []
        try:
            return Account(UUID(str(user["id"])), str(user["username"]), administrator="owner" in named)
        except (KeyError, ValueError) as exc:
            raise Unavailable(f"{answer.call}: an answer without id and username") from exc

    async def _me(self) -> tuple[JsonObject, Answer]:
        answer = await self._link.call("account", "GET", "/api/v2/users/me")
        return as_object(answer, decoded(answer, of_chat=False)), answer

    async def list_chats(self, *, archived: bool) -> AsyncGenerator[JsonObject, None]:
        # No other term: servers differ in which they know, and answer 400 or 500 to the rest.
        query = {"q": "archived:true"} if archived else {}
        told: set[object] = set()
        async with aclosing(self._rows(query)) as rows:
            async for listed in rows:
                if not told:
                    self._saw(list_evidence([listed]))
                for row in with_children([listed]):
                    if row["id"] not in told:
                        told.add(row["id"])
                        yield row

    async def _rows(self, query: dict[str, str]) -> AsyncGenerator[JsonObject, None]:
        """The list as the server sends it."""
        # One call is the only consistent list: pages are cut from an order that moves with every change of a chat.
        body = await self._api.fetch("chats", query | {"limit": str(_ALL_CHATS)})
        if isinstance(body, Body):
            rows = rows_of(body)
        elif body.status == 400:
            rows = self._paged_rows(query)
        else:
            raise refusal(body, of_chat=False, now=datetime.now(UTC))
        async with aclosing(rows):
            async for row in rows:
                yield row

    async def _paged_rows(self, query: dict[str, str]) -> AsyncGenerator[JsonObject, None]:
        """All chats of a server that wants pages, each when it is found.

        A page starts behind the last chat of the page before, at wherever that chat is by now. It may have moved up,
        so that pages overlap; or down, as a chat that is not pinned any more, so that others are passed over; or away.
        So all is read again until that brings nothing new.
        """
        found: set[object] = set()
        for _ in range(_LIST_PASSES):
            before = len(found)
            after: dict[str, str] = {}
            stale = 0  # pages since the last one with news
            while True:
                asked = query | after | {"limit": str(_CHATS_PAGE)}
                page = chat_rows(await self._api.call("chats", "GET", query=asked, about=About.ACCOUNT))
                known = len(found)
                for row in page:
                    if row["id"] not in found:
                        found.add(row["id"])
                        yield row
                stale = stale + 1 if len(found) == known else 0
                # The cursor chat may have moved to the top, and all that is known goes by once more.
                if len(page) < _CHATS_PAGE or stale >= known // _CHATS_PAGE + 2:
                    break
                after = {"after_id": str(page[-1]["id"])}
            if len(found) == before:
                break

    def reports(self, *, days: int) -> CostReports:
        """What an administrator learns of other users' chats with an answer in so many days."""
        return CostReports(self._api, days=days, chat=self.chat)

    async def chat(self, chat_id: UUID) -> JsonObject:
        answer = await self._of_chat("chat", f"{chat_id}")
        chat = as_object(answer, decoded(answer, of_chat=True))
        self._saw(chat_evidence(chat))
        return chat

    async def messages(self, chat_id: UUID, *, down_to: int) -> MessagePage:
        # Servers since 2.33 page upwards from `after_id` too, but the queue comes with the newest page only: it has to
        # be read anyway, and going on from there is as many calls.
        messages: list[JsonObject] = []
        queued: list[JsonObject] | None = None
        before: dict[str, str] = {}
        while True:
            answer = await self._of_chat("messages", f"{chat_id}/messages", before | {"limit": str(_MESSAGES_PAGE)})
            page = as_object(answer, decoded(answer, of_chat=True))
            more = page.get("has_more")
            if "messages" not in page or not isinstance(more, bool):
                raise Unavailable(f"{answer.call}: no page of messages")  # taken for an empty one it would be an edit
            rows = as_objects(answer, page["messages"], null=True)
            lowest = min((message_id(answer, row) for row in rows), default=0)
            if queued is None:  # the queue comes with the newest page only
                self._saw(page_evidence(page))
                queued = as_objects(answer, page.get("queued_messages"), null=True)
            messages += rows
            if not more:
                break
            if not rows or lowest >= int(before.get("before_id", lowest + 1)):
                raise Unavailable(f"{answer.call}: a page that promises more and does not move on")
            if lowest <= down_to:
                break
            before = {"before_id": str(lowest)}
        return MessagePage(messages=messages, queued_messages=queued, complete=not more)

    async def archive_chat(self, chat_id: UUID) -> None:
        answer = await self._api.call("archive", "PATCH", f"/{chat_id}", body={"archived": True}, about=About.CHAT)
        # A subagent's chat goes with its root; servers since 2.35 do not archive it alone.
        done = answer.status == 400 and answer.said in (_ARCHIVED_ALREADY, _WITH_ITS_ROOT)
        if answer.status in (200, 204) or done:
            return
        error = refusal(answer, of_chat=True, now=datetime.now(UTC))
        if isinstance(error, ChatGone):
            await self.chat(chat_id)  # raises ChatGone too, unless it is there and only not ours to change
            raise ChatRefused(str(error), answer.status)
        raise error

    async def _of_chat(self, endpoint: str, below: str, query: dict[str, str] | None = None) -> Answer:
        return await self._api.call(endpoint, "GET", f"/{below}", query, about=About.CHAT)

    # money, and what the server does by itself

    async def model_prices(self) -> Mapping[UUID, ModelPrice]:
        answer = await self._option("model_configs", "/model-configs")
        # Only Coder's own word counts: a proxy's 404 would make every charge of the day unpriced.
        if answer.status == 403 and answer.said is not None:
            return {}
        if is_missing(answer):
            return await self._prices_of_organizations()
        prices = {}
        for row in as_objects(answer, decoded(answer, of_chat=False, exact_fractions=True)):
            try:
                prices[UUID(str(row["id"]))] = model_price(row)
            except (KeyError, ValueError) as exc:
                raise Unavailable(f"{answer.call}: a model config without an id or a model") from exc
        return prices

    async def _prices_of_organizations(self) -> dict[UUID, ModelPrice]:
        """As later servers have them, whose models belong to organizations. No such server told a price so far."""
        me, _ = await self._me()
        organizations = me.get("organization_ids")
        prices: dict[UUID, ModelPrice] = {}
        for organization in organizations if isinstance(organizations, list) else []:
            path = f"/api/v2/organizations/{organization}/chats/models"
            answer = await self._link.call("model_configs", "GET", path)
            if answer.status in (403, 404) and answer.said is not None:
                continue
            body = as_object(answer, decoded(answer, of_chat=False, exact_fractions=True))
            for row in as_objects(answer, body.get("models"), null=True):
                with suppress(KeyError, ValueError):
                    prices[UUID(str(row["id"]))] = model_price(row)
        return prices

    async def has_native_limits(self) -> bool:
        answer = await self._option("usage_limits", "/usage-limits/status")
        if answer.status == 200:
            decoded(answer, of_chat=False)  # a web page is no answer
        found = limits_evidence(answer.status, answer.said)
        if found.native_limits is None or EXPERIMENT_OFF in (answer.said or ""):
            raise refusal(answer, of_chat=False, now=datetime.now(UTC))
        self._saw(found)
        return found.native_limits

    async def budget(self, user_id: UUID) -> Budget | None:
        return await self._gateway_budget(str(user_id))

    async def _gateway_budget(self, user: str) -> Budget | None:
        answer = await self._link.call("gateway_budget", "GET", f"/api/v2/users/{user}/ai/spend")
        if answer.status in (403, 404) and answer.said is not None:
            self._saw(gateway_evidence(answer.status, answer.said))
            return None
        budget = user_budget(answer)
        self._saw(gateway_evidence(answer.status, answer.said))
        return budget

    async def retention(self) -> Retention:
        return Retention(
            archived_chats_days=await self._days("retention_days"),
            auto_archive_days=await self._days("auto_archive_days"),
        )

    async def _days(self, name: str) -> int | None:
        answer = await self._option("retention", f"/config/{name.replace('_', '-')}")
        if is_missing(answer) or (answer.status == 403 and answer.said is not None):
            return None
        days = as_object(answer, decoded(answer, of_chat=False)).get(name)
        if type(days) is not int:
            raise Unavailable(f"{answer.call}: an answer without {name}")
        return days

    async def _option(self, endpoint: str, below: str) -> Answer:
        return await self._api.call(endpoint, "GET", below, about=About.OPTION)

    # streams

    @asynccontextmanager
    async def stream(self, chat_id: UUID, *, after_id: int, after_revision: int | None = None) -> AsyncIterator[Frames]:
        query = {"after_id": str(after_id)}
        if after_revision is not None:
            query["after_revision"] = str(after_revision)
        unread = await self._marks.unread(chat_id)
        moved = False
        try:
            async with self._open(f"/{chat_id}/stream", query, about=About.CHAT) as frames:
                wanted = _Wanted(frames, partial(self._marks.after_first_frame, chat_id) if unread else None)
                try:
                    yield wanted
                finally:
                    moved = not wanted.broken and await self._marks.unread(chat_id)
        finally:
            if moved:
                await self._marks.after_close(chat_id)

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[str]]:
        return self._open("/watch", {}, about=About.ACCOUNT)

    @asynccontextmanager
    async def _open(self, below: str, query: dict[str, str], *, about: About) -> AsyncIterator[SocketFrames]:
        connection = await self._api.dial(below, query, about=about)
        of_chat = about is About.CHAT
        if isinstance(connection, Answer):
            raise refusal(connection, of_chat=of_chat, now=datetime.now(UTC))

        def look(frame: str) -> bool:
            found = frame_evidence(frame)
            self._saw(found)
            return not tells_all(found, of_chat=of_chat)

        request = connection.request
        path = request.path.partition("?")[0] if request else below
        slow = self._link.slow_seconds
        try:
            yield SocketFrames(connection, f"GET {path}", look, slow_seconds=slow)
        finally:
            try:
                await connection.close()
            finally:
                connection.transport.abort()  # who is cancelled while saying goodbye leaves no socket behind


class _Wanted:
    """The frames; what is to be done after the first; and whether they broke off before the reader had enough."""

    def __init__(self, frames: Frames, after_first: Callable[[], Awaitable[None]] | None) -> None:
        self._frames = frames
        self._after_first = after_first
        self.broken = False

    def __aiter__(self) -> "_Wanted":
        return self

    async def __anext__(self) -> str:
        try:
            frame = await anext(self._frames)
        except RelayError:
            self.broken = True
            raise
        if self._after_first is not None:
            act, self._after_first = self._after_first, None
            await act()
        return frame

    def at_hand(self) -> list[str]:
        return self._frames.at_hand()
