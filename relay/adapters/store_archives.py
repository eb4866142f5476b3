"""What the archivist has gathered of each chat, and its archive records. Part of `relay.adapters.store`.

The bus repeats and reorders, so the fold must not care: every aspect of a chat is kept with the `(session, position)`
at which it was told, and gives way only to one that was told later.
"""

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID

from sqlalchemy import Select, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from relay.adapters.database import Database
from relay.adapters.migrations.tables import (
    archives,
    collected_chats,
    collected_messages,
    collected_turns,
    unarchived,
    uncopied,
)
from relay.adapters.store_rows import AnyRow, chat_columns, chat_key, chat_ref, of_chat, storable, with_key
from relay.core.errors import BadEvent, CorruptState
from relay.core.events import ChatRef, Event, encode_json
from relay.ports import IDLE_STATUSES, ArchiveRecord, Collected, Uncopied

_FAMILIES = frozenset({"message", "history", "status", "turn", "lifecycle"})
_ASPECTS = ("history", "status", "lifecycle")
_NOTHING_TOLD = {f"{aspect}_{half}": -1 for aspect in _ASPECTS for half in ("session", "position")}
_TICK = timedelta(microseconds=1)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)  # an archived chat that does not say since when may go at any time


@dataclass(frozen=True, slots=True)
class _Change:
    """What an event does to the row of its chat."""

    values: Mapping[str, object] = field(default_factory=dict)
    told: bool = False  # we know something that we did not know
    news: bool = False  # a transcript would look different


class SqlArchives:
    """Keeps the promise of `Archives`. The row of a chat is the lock: each change of it takes the row first."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def collect(self, event: Event) -> None:
        if event.family != "chat" or event.event not in _FAMILIES:
            return
        storable(event.chat, event.session, event.position)
        async with self._db.writing() as connection:
            chat = await self._locked(connection, event.chat)
            match event.event:
                case "message":
                    change = await self._take_message(connection, chat, event)
                case "history":
                    change = await self._take_history(connection, chat, event)
                case "turn":
                    change = await self._take_turn(connection, event)
                case "status":
                    change = _take_status(chat, event)
                case _:
                    change = _take_lifecycle(chat, event)
            # The row's own clock grows with each change, whatever the real one does: what is taken in after an archive
            # was begun is later than what the archive covers.
            moment = max(chat.now, chat.changed_at + _TICK)
            values = dict(change.values)
            if change.told:
                values["changed_at"] = moment
            if change.news:
                values["news_at"] = moment
            if values:
                row = of_chat(collected_chats, event.chat)
                await connection.execute(update(collected_chats).where(row).values(values))

    async def due(self, *, idle_since: datetime) -> Sequence[Uncopied]:
        chats = collected_chats.c
        rests = chats.status.in_(sorted(IDLE_STATUSES)) | chats.archived_at.is_not(None)
        quiet = select(collected_chats).where(unarchived(), rests, chats.changed_at <= idle_since)
        async with self._db.reading() as connection:
            rows = (await connection.execute(quiet.order_by(chats.changed_at))).all()
        # Each chat is read by itself: all of them could take longer than one operation may.
        return [_uncopied(row) for row in rows if await self._is_whole(row)]

    async def _is_whole(self, chat: AnyRow) -> bool:
        """Whether there is a message, and no turn that will still end."""
        one = with_key(collected_messages, chat.deployment, chat.chat_id)
        messages = select(collected_messages.c.message_id, collected_messages.c.by_user).where(one)
        turns = select(collected_turns.c.message_id).where(with_key(collected_turns, chat.deployment, chat.chat_id))
        async with self._db.reading() as connection:
            by_user = {row.message_id: row.by_user for row in await connection.execute(messages)}
            ended = frozenset((await connection.execute(turns)).scalars())
        live = _live(_history(chat), by_user)
        return bool(live) and (chat.archived_at is not None or not _is_open(live, by_user, ended))

    async def endangered(self, deployment: str, *, archived_before: datetime) -> Sequence[Uncopied]:
        chats = collected_chats.c
        of_it = (chats.deployment == deployment) & (chats.archived_at < archived_before)
        query = select(collected_chats).where(uncopied(), of_it).order_by(chats.archived_at)
        async with self._db.reading() as connection:
            return [_uncopied(row) for row in await connection.execute(query)]

    async def family_copied(self, chat: ChatRef) -> bool:
        chats = collected_chats.c
        family = (chats.chat_id == chat.chat_id) | (chats.root_chat_id == chat.chat_id)
        uncovered = chats.archived_upto.is_(None) | (chats.news_at > chats.archived_upto)
        query = select(chats.chat_id).where(chats.deployment == chat.deployment, family, uncovered).limit(1)
        async with self._db.reading() as connection:
            return (await connection.execute(query)).first() is None

    async def collected(self, deployment: str, chat_id: UUID) -> Collected | None:
        messages = select(collected_messages).where(with_key(collected_messages, deployment, chat_id))
        turns = select(collected_turns.c.message_id).where(with_key(collected_turns, deployment, chat_id))
        async with self._db.reading() as connection:
            query = select(collected_chats).where(with_key(collected_chats, deployment, chat_id))
            chat = (await connection.execute(query)).one_or_none()
            if chat is None:
                return None
            rows = {row.message_id: row for row in await connection.execute(messages)}
            ended = frozenset((await connection.execute(turns)).scalars())
        live = _live(_history(chat), rows)
        return Collected(
            chat=chat_ref(chat),
            messages={each: rows[each].body for each in live},
            status=chat.status,
            open_turn=_is_open(live, {each: row.by_user for each, row in rows.items()}, ended),
            archived=chat.archived,
            archived_at=chat.archived_at,
            changed_at=chat.changed_at,
            chat_json=chat.chat,
        )

    async def add_archive(self, record: ArchiveRecord, *, upto: datetime) -> None:
        values = asdict(record) | chat_columns(record.chat)
        del values["chat"]
        chats = collected_chats.c
        covered = of_chat(collected_chats, record.chat) & (chats.archived_upto.is_(None) | (chats.archived_upto < upto))
        async with self._db.writing() as connection:
            added = await connection.execute(self._db.insert(archives).values(values).on_conflict_do_nothing())
            if added.rowcount == 1:
                await connection.execute(update(collected_chats).where(covered).values(archived_upto=upto))

    async def mark_archive(self, record: ArchiveRecord, *, published: bool = False, sealed: bool = False) -> None:
        flags = {name: True for name, wanted in (("published", published), ("sealed", sealed)) if wanted}
        if not flags:
            return
        row = of_chat(archives, record.chat) & (archives.c.version == record.version)
        async with self._db.writing() as connection:
            await connection.execute(update(archives).where(row).values(flags))

    async def archives(self, deployment: str | None = None, chat_id: UUID | None = None) -> Sequence[ArchiveRecord]:
        query = select(archives)
        if deployment is not None:
            query = query.where(archives.c.deployment == deployment)
        if chat_id is not None:
            query = query.where(archives.c.chat_id == chat_id)
        return await self._records(query)

    async def unfinished_archives(self, *, seal: bool) -> Sequence[ArchiveRecord]:
        unfinished = ~archives.c.published
        if seal:
            other = archives.alias("other")
            newest = select(func.max(other.c.version)).where(
                other.c.deployment == archives.c.deployment, other.c.chat_id == archives.c.chat_id
            )
            unfinished |= ~archives.c.sealed & (archives.c.version == newest.scalar_subquery())
        return await self._records(select(archives).where(unfinished))

    async def _records(self, query: Select[*tuple[Any, ...]]) -> Sequence[ArchiveRecord]:
        ordered = query.order_by(archives.c.stored_at, archives.c.chat_id, archives.c.version)
        async with self._db.reading() as connection:
            rows = (await connection.execute(ordered)).all()
        return [
            ArchiveRecord(
                chat=chat_ref(row),
                version=row.version,
                url=row.url,
                manifest_url=row.manifest_url,
                sha256=row.sha256,
                size=row.size,
                messages=row.messages,
                first_id=row.first_id,
                last_id=row.last_id,
                stored_at=row.stored_at,
                published=row.published,
                sealed=row.sealed,
            )
            for row in rows
        ]

    async def _locked(self, connection: AsyncConnection, chat: ChatRef) -> AnyRow:
        """The chat's row, made if there is none, and `now`. Others wait for it until the transaction ends."""
        one = of_chat(collected_chats, chat)
        query = select(collected_chats, self._db.now().label("now")).where(one).with_for_update()
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            new = {**chat_columns(chat), **_NOTHING_TOLD, "archived": False, "changed_at": self._db.now()}
            await connection.execute(self._db.insert(collected_chats).values(new).on_conflict_do_nothing())
            row = (await connection.execute(query)).one()
        return row

    async def _take_message(self, connection: AsyncConnection, chat: AnyRow, event: Event) -> _Change:
        message = _object(event, "message")
        number = _message_id(message.get("id"))
        values = {"body": _json(message), "by_user": event.detail == "user", **_place(event)}
        one = of_chat(collected_messages, event.chat) & (collected_messages.c.message_id == number)
        stored = (await connection.execute(select(collected_messages).where(one))).one_or_none()
        if stored is None:
            new = {**chat_key(event.chat), "message_id": number, **values}
            await connection.execute(self._db.insert(collected_messages).values(new))
        elif (event.session, event.position) > (stored.session, stored.position):
            await connection.execute(update(collected_messages).where(one).values(values))
            if stored.body == values["body"]:  # a new session tells again what it cannot know to be known
                return _Change()
        else:
            return _Change()
        return _Change(told=True, news=bool(_live(_history(chat), [number])))

    async def _take_history(self, connection: AsyncConnection, chat: AnyRow, event: Event) -> _Change:
        ids = sorted({_message_id(each) for each in _list(event, "message_ids")})
        if not _is_newer(event, chat, "history"):
            return _Change()
        query = select(collected_messages.c.message_id).where(of_chat(collected_messages, event.chat))
        collected = (await connection.execute(query)).scalars().all()
        differs = _live(_history(chat), collected) != _live(ids, collected)
        return _Change({"history": _json(ids), **_place(event, "history_")}, told=differs, news=differs)

    async def _take_turn(self, connection: AsyncConnection, event: Event) -> _Change:
        ids = _list(event, "message_ids")
        if not ids:
            raise BadEvent("a turn without messages")
        new = {**chat_key(event.chat), "message_id": _message_id(ids[0])}  # the user message that began it
        added = await connection.execute(self._db.insert(collected_turns).values(new).on_conflict_do_nothing())
        return _Change(told=added.rowcount == 1)


def _take_status(chat: AnyRow, event: Event) -> _Change:
    status = cast(Mapping[str, object], event.data).get("status")
    if not isinstance(status, str):
        raise BadEvent("status is not a string")
    if not _is_newer(event, chat, "status"):
        return _Change()
    return _Change({"status": status, **_place(event, "status_")}, told=status != chat.status)


def _take_lifecycle(chat: AnyRow, event: Event) -> _Change:
    seen = _object(event, "chat")
    if not _is_newer(event, chat, "lifecycle"):
        return _Change()
    archived = event.detail == "archived" or (event.detail != "unarchived" and seen.get("archived") is True)
    body = _json(seen)
    since = _archived_at(chat, seen) if archived and event.detail != "gone" else None
    values = {"archived": archived, "archived_at": since, "chat": body, **_place(event, "lifecycle_")}
    return _Change(values, told=archived != chat.archived or body != chat.chat)


def _archived_at(chat: AnyRow, seen: Mapping[str, object]) -> datetime:
    """Since when an archived chat is: archiving sets `updated_at`, and what is changed later does not count."""
    if chat.archived and chat.archived_at is not None:
        return cast(datetime, chat.archived_at)
    try:
        moment = datetime.fromisoformat(str(seen.get("updated_at")))
        return moment.astimezone(UTC) if moment.tzinfo else _LONG_AGO
    except (ValueError, OverflowError):
        return _LONG_AGO


def _is_newer(event: Event, chat: AnyRow, aspect: str) -> bool:
    stored = chat._mapping
    return (event.session, event.position) > (stored[f"{aspect}_session"], stored[f"{aspect}_position"])


def _place(event: Event, prefix: str = "") -> dict[str, object]:
    return {f"{prefix}session": event.session, f"{prefix}position": event.position}


def _history(chat: AnyRow) -> list[int]:
    """Ids of the last statement; none without a statement, which keeps every message."""
    try:
        ids = [] if chat.history is None else json.loads(chat.history)
    except ValueError as exc:
        raise CorruptState(f"stored history of chat {chat.chat_id} is not JSON") from exc
    if not isinstance(ids, list):
        raise CorruptState(f"stored history of chat {chat.chat_id} is not a list")
    return ids


def _is_open(live: Iterable[int], by_user: Mapping[int, bool], ended: Container[int]) -> bool:
    """Whether the turn of the last user message has not ended."""
    last_prompt = max((each for each in live if by_user[each]), default=None)
    return last_prompt is not None and last_prompt not in ended


def _uncopied(chat: AnyRow) -> Uncopied:
    return Uncopied(chat_ref(chat), chat.archived_at, chat.changed_at)


def _live(history: Sequence[int], ids: Iterable[int]) -> list[int]:
    """Those of `ids` that the statement holds or ends below, ascending."""
    kept, last = frozenset(history), max(history, default=0)
    return sorted(each for each in ids if each in kept or each > last)


# --- what an event must hold ---------------------------------------------------------------------------------------


def _object(event: Event, name: str) -> Mapping[str, object]:
    value = cast(Mapping[str, object], event.data).get(name)
    if not isinstance(value, dict):
        raise BadEvent(f"{name} is not an object")
    return value


def _list(event: Event, name: str) -> Sequence[object]:
    value = cast(Mapping[str, object], event.data).get(name)
    if not isinstance(value, list):
        raise BadEvent(f"{name} is not a list")
    return value


def _message_id(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise BadEvent("a message id is not a positive integer of 64 bits")
    return value


def _json(value: object) -> bytes:
    try:
        return encode_json(value)
    except (ValueError, RecursionError) as exc:  # NaN, which Python reads and JSON has not
        raise BadEvent(f"data is not JSON: {exc}") from exc
