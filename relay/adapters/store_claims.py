"""Leases, claims and resume points in the database. Part of `relay.adapters.store`.

A resume point is one row and a set of message ids beside it, of which a save writes only the difference. The saves of
all followers that come at the same time share one transaction, and so do their claims.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    Integer,
    LargeBinary,
    Select,
    Table,
    Text,
    Uuid,
    bindparam,
    delete,
    exists,
    func,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

from relay.adapters.database import Database
from relay.adapters.group_commit import GroupCommit
from relay.adapters.migrations.tables import AnyText, claims, known_messages, workers
from relay.adapters.store_rows import AnyRow, chat_columns, chat_ref
from relay.core.claims import Peer
from relay.core.errors import CorruptState, LostClaim
from relay.core.events import ChatRef, encode_json
from relay.core.resume import Commit, ResumePoint
from relay.ports import ChatRecord, Claim

_MOST_CLAIMS = 50  # that one transaction makes
_MOST_ROWS = 5000  # that one transaction changes, unless one save alone has more


@dataclass(frozen=True, slots=True)
class _Change:
    """What is to become of a claim's row, if the claim still holds."""

    claim: Claim
    commit: Commit | None
    released: bool = False
    seen: str | None = None  # None leaves what is stored
    clean: bool = False  # of one that is released

    @property
    def key(self) -> tuple[str, UUID]:
        return self.claim.chat.deployment, self.claim.chat.chat_id

    @property
    def rows(self) -> int:
        return 1 + (0 if self.commit is None else len(self.commit.added) + len(self.commit.removed))

    @property
    def added(self) -> list[int]:
        """Ids of messages, ascending."""
        return [] if self.commit is None else sorted(self.commit.added)

    @property
    def removed(self) -> list[int]:
        """Ids of messages, ascending. What is in both is added."""
        return [] if self.commit is None else sorted(self.commit.removed - self.commit.added)

    @property
    def resume(self) -> bytes | None:
        return None if self.commit is None else encode_json(self.commit.point.to_json())


@dataclass(frozen=True, slots=True)
class _Wish:
    chat: ChatRef
    worker: str

    @property
    def key(self) -> tuple[str, UUID]:
        return self.chat.deployment, self.chat.chat_id


class SqlClaims:
    """Keeps the promise of `Claims`. The row of a chat is the lock: each change of it takes the row first."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._orphans: dict[str, Select[int]] = {}  # how many a worker of this process could adopt
        self._wishes = GroupCommit(self._claim_all, key=lambda w: w.key, size=lambda _: 1, most=_MOST_CLAIMS)
        change = self._change_in_sqlite if database.sqlite else self._change_in_postgres
        self._changes = GroupCommit(change, key=lambda c: c.key, size=lambda c: c.rows, most=_MOST_ROWS)

    # --- leases -------------------------------------------------------------------------------------------------------

    async def enlist(self, peer: Peer, deployment: str, *, lease_seconds: float) -> None:
        row = {"worker": peer.worker, "deployment": deployment, **self._told(peer, lease_seconds)}
        async with self._db.writing() as connection:
            await connection.execute(delete(workers).where(workers.c.lease_until <= self._db.now()))
            await connection.execute(self._db.insert(workers).values(row))
        self._look_as(peer, deployment)

    async def renew(self, peer: Peer, *, lease_seconds: float) -> Sequence[Peer] | None:
        # The lease begins anew when the row is written: that it may have run out while this waited for the row does not
        # matter, because PostgreSQL looks at the condition again then.
        mine = workers.c.worker == peer.worker
        extended = update(workers).where(mine, self._lives()).values(self._told(peer, lease_seconds))
        async with self._db.writing() as connection:
            deployment = (await connection.execute(extended.returning(workers.c.deployment))).scalar_one_or_none()
            if deployment is None:
                self._orphans.pop(peer.worker, None)
                return None
            others = select(workers).where(workers.c.deployment == deployment)
            living = others.where(self._lives() | mine).order_by(workers.c.worker)
            peers = [_peer(row) for row in await connection.execute(living)]
        self._look_as(peer, deployment)
        return peers

    def _told(self, peer: Peer, lease_seconds: float) -> dict[str, object]:
        return {
            "accounts": encode_json(None if peer.accounts is None else sorted(str(each) for each in peer.accounts)),
            "lease_until": self._db.now(plus_seconds=lease_seconds),
            "load": peer.load,
            "free": peer.free,
        }

    def _look_as(self, peer: Peer, deployment: str) -> None:
        """Make what `orphans` asks every second: one statement, and not made anew each time."""
        living = exists().where(workers.c.worker == peer.worker, self._lives())
        counted = select(func.count()).select_from(claims).where(self._orphaned(peer, deployment), living)
        self._orphans[peer.worker] = counted

    async def resign(self, worker: str) -> None:
        self._orphans.pop(worker, None)
        gone = delete(workers).where(workers.c.worker == worker).returning(workers.c.deployment)
        async with self._db.writing() as connection:
            for deployment in (await connection.execute(gone)).scalars().all():
                held = (claims.c.deployment == deployment) & claims.c.wanted_since.is_not(None)
                await connection.execute(update(claims).where(held, claims.c.worker == worker).values(worker=None))

    def _lives(self) -> ColumnElement[bool]:
        return workers.c.lease_until > self._db.now()

    # --- claims -------------------------------------------------------------------------------------------------------

    async def records(
        self, deployment: str, *, after: UUID | None = None, limit: int | None = None
    ) -> Sequence[ChatRecord]:
        wanted = claims.c.deployment == deployment
        return await self._chat_records(wanted if after is None else wanted & (claims.c.chat_id > after), limit)

    async def records_of(self, deployment: str, chat_ids: Collection[UUID]) -> Sequence[ChatRecord]:
        return await self._chat_records((claims.c.deployment == deployment) & claims.c.chat_id.in_(chat_ids), None)

    async def _chat_records(self, wanted: ColumnElement[bool], limit: int | None) -> Sequence[ChatRecord]:
        named = (claims.c.deployment, claims.c.chat_id, claims.c.owner_id, claims.c.root_chat_id)
        holder = workers.c.worker.label("holder")
        held = claims.outerjoin(workers, (workers.c.worker == claims.c.worker) & self._lives())
        query = select(*named, claims.c.seen, claims.c.clean, holder).select_from(held).where(wanted)
        async with self._db.reading() as connection:
            rows = (await connection.execute(query.order_by(claims.c.chat_id).limit(limit))).all()
        return [ChatRecord(chat_ref(row), row.seen, row.holder, row.clean) for row in rows]

    async def claim(self, chat: ChatRef, worker: str) -> Claim | None:
        answer = await self._wishes.do(_Wish(chat, worker))
        if isinstance(answer, LostClaim):
            raise answer
        return answer

    async def holdings(self, worker: str) -> Sequence[ChatRef]:
        named = (claims.c.deployment, claims.c.chat_id, claims.c.owner_id, claims.c.root_chat_id)
        held = claims.join(workers, (workers.c.worker == claims.c.worker) & self._lives())
        wanted = (claims.c.deployment == workers.c.deployment) & claims.c.wanted_since.is_not(None)
        query = select(*named).select_from(held).where(wanted, workers.c.worker == worker)
        async with self._db.statement() as connection:
            return [chat_ref(row) for row in await connection.execute(query)]

    async def orphans(self, worker: str) -> int:
        counted = self._orphans.get(worker)  # before the wait, in which the worker may lose its lease
        if counted is None:
            return 0
        async with self._db.statement() as connection:
            return (await connection.execute(counted)).scalar_one()

    async def adopt(self, worker: str, *, limit: int) -> Sequence[Claim]:
        async with self._db.writing() as connection:
            peer, deployment = await self._living_peer(connection, worker)
            if peer is None:
                return []
            some = select(claims).where(self._orphaned(peer, deployment)).order_by(claims.c.wanted_since)
            rows = (await connection.execute(_locked(some.limit(limit)))).all()
            living = await self._living(connection, [row.worker for row in rows])
            # Another look: a row may have been claimed between the beginning of the query and its lock.
            return await self._take(connection, [(row, worker) for row in rows if row.worker not in living])

    async def _living_peer(self, connection: AsyncConnection, worker: str) -> tuple[Peer | None, str]:
        row = (await connection.execute(select(workers).where(workers.c.worker == worker, self._lives()))).one_or_none()
        return (None, "") if row is None else (_peer(row), row.deployment)

    def _orphaned(self, peer: Peer, deployment: str) -> ColumnElement[bool]:
        wanted = (claims.c.deployment == deployment) & claims.c.wanted_since.is_not(None)
        if peer.accounts is not None:
            wanted &= claims.c.owner_id.in_(peer.accounts)
        # Not NOT IN: that is never true where a claim has no worker.
        return wanted & ~exists().where(workers.c.worker == claims.c.worker, self._lives())

    async def _claim_all(self, wishes: Sequence[_Wish]) -> list[Claim | LostClaim | None]:
        async with self._db.writing() as connection:
            able = await self._living(connection, [wish.worker for wish in wishes])
            rows = await self._lock(connection, [wish for wish in wishes if wish.worker in able])
            living = await self._living(connection, [row.worker for row in rows.values()])
            granted = [
                (row, wish.worker)
                for wish in wishes
                if (row := rows.get(wish.key)) is not None and (row.worker == wish.worker or row.worker not in living)
            ]
            taken = {(c.chat.deployment, c.chat.chat_id): c for c in await self._take(connection, granted)}
        return [
            taken.get(wish.key)
            if wish.worker in able
            else LostClaim(f"chat {wish.chat.chat_id}: the lease of worker {wish.worker} is over")
            for wish in wishes
        ]

    async def _lock(self, connection: AsyncConnection, wishes: Sequence[_Wish]) -> dict[tuple[str, UUID], AnyRow]:
        """Rows of these chats, made where there were none. One that is locked is left out: somebody is at it."""
        keys = sorted(wish.key for wish in wishes)
        if not keys:
            return {}
        found = _locked(select(claims).where(_chat_key.in_(keys)).order_by(claims.c.deployment, claims.c.chat_id))
        rows = {(row.deployment, row.chat_id): row for row in await connection.execute(found)}
        missing = {wish.key: wish.chat for wish in wishes if wish.key not in rows}
        if missing:
            # What others have locked is there: an INSERT would wait for them, and they perhaps for a row locked here.
            there = select(claims.c.deployment, claims.c.chat_id).where(_chat_key.in_(missing))
            for deployment, chat_id in await connection.execute(there):
                del missing[deployment, chat_id]
        if missing:
            # `clean` is True for a chat nobody ever followed. From the first claim on it says how the last follower
            # ended, so that one that died before its first save is not taken for one that never was.
            fresh = {"session": 0, "seen": "", "clean": True}
            new = [chat_columns(missing[key]) | fresh for key in keys if key in missing]
            made = self._db.insert(claims).on_conflict_do_nothing().returning(claims)
            rows |= {(row.deployment, row.chat_id): row for row in await connection.execute(made, new)}
        return rows

    async def _living(self, connection: AsyncConnection, names: Iterable[str | None]) -> frozenset[str]:
        """Those of these workers whose leases are live now: after the rows of their claims were locked."""
        asked = {name for name in names if name is not None}
        query = select(workers.c.worker).where(workers.c.worker.in_(asked), self._lives())
        return frozenset((await connection.execute(query)).scalars()) if asked else frozenset()

    async def _take(self, connection: AsyncConnection, granted: Sequence[tuple[AnyRow, str]]) -> list[Claim]:
        """Claims of rows that are locked."""
        if not granted:
            return []
        keys = [(row.deployment, row.chat_id) for row, _ in granted]
        known: dict[tuple[str, UUID], set[int]] = {key: set() for key in keys}
        for deployment, chat_id, message_id in await connection.execute(_KNOWN, {"keys": keys}):
            known[deployment, chat_id].add(message_id)
        taken = [
            Claim(chat_ref(row), worker, row.session + 1, _resume_point(row, frozenset(known[key])))
            for (row, worker), key in zip(granted, keys, strict=True)
        ]
        marks = {"clean": False, "wanted_since": self._db.now()}
        mine: dict[str, object] = {"worker": bindparam("to_worker"), "session": bindparam("to_session")}
        await connection.execute(
            update(claims).where(_one(claims)).values(marks | mine),
            [_of(claim.chat) | {"to_worker": claim.worker, "to_session": claim.session} for claim in taken],
        )
        return taken

    async def save(self, claim: Claim, commit: Commit) -> None:
        if not await self._changes.do(_Change(claim, commit)):
            raise LostClaim(f"chat {claim.chat.chat_id}: session {claim.session} is over, nothing was saved")

    async def release(self, claim: Claim, commit: Commit | None, *, seen: str | None, clean: bool) -> None:
        await self._changes.do(_Change(claim, commit, released=True, seen=seen, clean=clean))

    # --- changes of claims that hold, many at once --------------------------------------------------------------------

    async def _change_in_postgres(self, changes: Sequence[_Change]) -> list[bool]:
        """Whether each of the claims held. Where it did not, nothing was changed."""
        places = range(len(changes))
        values = {
            "places": list(places),
            "deployments": [change.claim.chat.deployment for change in changes],
            "chats": [change.claim.chat.chat_id for change in changes],
            "sessions": [change.claim.session for change in changes],
            "workers": [change.claim.worker for change in changes],
            "resumes": [change.resume for change in changes],
            "releases": [change.released for change in changes],
            "seens": [change.seen for change in changes],
            "cleans": [change.clean for change in changes],
            "added": [_listed(change.added) for change in changes],
            "removed": [_listed(change.removed) for change in changes],
        }
        async with self._db.statement() as connection:
            held = frozenset((await connection.execute(_CHANGE, values)).scalars())
        return [place in held for place in places]

    async def _change_in_sqlite(self, changes: Sequence[_Change]) -> list[bool]:
        """As `_change_in_postgres`; nobody else writes meanwhile."""
        chats = [change.claim.chat.chat_id for change in changes]
        holders = select(claims.c.deployment, claims.c.chat_id, claims.c.session, claims.c.worker)
        async with self._db.writing() as connection:
            rows = await connection.execute(holders.where(claims.c.chat_id.in_(chats)))
            holding = {(row.deployment, row.chat_id): (row.session, row.worker) for row in rows}
            held = [holding.get(each.key) == (each.claim.session, each.claim.worker) for each in changes]
            kept = [change for change, holds in zip(changes, held, strict=True) if holds]
            saved = [
                _of(change.claim.chat) | {"to_resume": change.resume} for change in kept if change.commit is not None
            ]
            freed = [_of(change.claim.chat) | {"to_clean": change.clean} for change in kept if change.released]
            resting = [_of(change.claim.chat) | {"to_seen": change.seen} for change in kept if change.seen is not None]
            gone = [_of(change.claim.chat) | {"message": each} for change in kept for each in change.removed]
            new = [_of(change.claim.chat) | {"message": each} for change in kept for each in change.added]
            for statement, values in (
                (_SET_RESUME, saved),
                (_SET_RELEASED, freed),
                (_SET_AT_REST, resting),
                (_FORGET, gone),
                (_REMEMBER, new),
            ):
                if values:
                    await connection.execute(statement, values)
        return held


# --- statements ----------------------------------------------------------------------------------------------------


def _array(name: str, kind: type[TypeEngine[Any]]) -> BindParameter[Any]:
    return bindparam(name, type_=ARRAY(kind))


# One statement, and so a transaction by itself: a save of one claim takes one round trip, and so does one of hundreds.
_CHANGE = text("""
WITH asked AS (
    SELECT * FROM unnest(:places, :deployments, :chats, :sessions, :workers, :resumes, :releases, :seens, :cleans,
        :added, :removed)
        AS a(place, deployment, chat_id, session, worker, resume, released, seen, clean, added, removed)
), held AS (
    UPDATE claims SET
        resume = coalesce(asked.resume, claims.resume),
        worker = CASE WHEN asked.released THEN NULL ELSE claims.worker END,
        wanted_since = CASE WHEN asked.seen IS NOT NULL THEN NULL ELSE claims.wanted_since END,
        clean = CASE WHEN asked.released THEN asked.clean ELSE claims.clean END,
        seen = coalesce(asked.seen, claims.seen)
    FROM asked
    WHERE claims.deployment = asked.deployment AND claims.chat_id = asked.chat_id
        AND claims.session = asked.session AND claims.worker = asked.worker
    RETURNING asked.place, claims.deployment, claims.chat_id, asked.added, asked.removed
), forgotten AS (
    DELETE FROM known_messages AS known
    USING held CROSS JOIN LATERAL unnest(CAST(string_to_array(held.removed, ',') AS bigint[])) AS r(message_id)
    WHERE known.deployment = held.deployment AND known.chat_id = held.chat_id AND known.message_id = r.message_id
), remembered AS (
    INSERT INTO known_messages (deployment, chat_id, message_id)
    SELECT held.deployment, held.chat_id, a.message_id
    FROM held CROSS JOIN LATERAL unnest(CAST(string_to_array(held.added, ',') AS bigint[])) AS a(message_id)
    ON CONFLICT DO NOTHING
)
SELECT place FROM held
""").bindparams(
    _array("places", Integer),
    _array("sessions", BigInteger),
    *(_array(name, Boolean) for name in ("releases", "cleans")),
    *(_array(name, Text) for name in ("deployments", "workers", "added", "removed")),
    _array("chats", Uuid),
    _array("resumes", LargeBinary),
    _array("seens", AnyText),
)


def _one(table: Table) -> ColumnElement[bool]:
    return (table.c.deployment == bindparam("of_deployment")) & (table.c.chat_id == bindparam("of_chat", type_=Uuid))


_chat_key = tuple_(claims.c.deployment, claims.c.chat_id)
_KNOWN = select(known_messages).where(
    tuple_(known_messages.c.deployment, known_messages.c.chat_id).in_(bindparam("keys", expanding=True))
)
_SET_RESUME = update(claims).where(_one(claims)).values(resume=bindparam("to_resume"))
_SET_RELEASED = update(claims).where(_one(claims)).values(worker=None, clean=bindparam("to_clean"))
_SET_AT_REST = update(claims).where(_one(claims)).values(wanted_since=None, seen=bindparam("to_seen"))
_FORGET = delete(known_messages).where(_one(known_messages) & (known_messages.c.message_id == bindparam("message")))
_REMEMBER = (
    sqlite.insert(known_messages)
    .values(deployment=bindparam("of_deployment"), chat_id=bindparam("of_chat"), message_id=bindparam("message"))
    .on_conflict_do_nothing()
)


def _of(chat: ChatRef) -> dict[str, object]:
    return {"of_deployment": chat.deployment, "of_chat": chat.chat_id}


def _locked(query: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
    """Take the rows, and leave those to others that they have."""
    return query.with_for_update(of=claims, skip_locked=True, key_share=True)


def _peer(row: AnyRow) -> Peer:
    try:
        named = json.loads(row.accounts)
        accounts = None if named is None else frozenset(UUID(each) for each in named)
    except (ValueError, TypeError, AttributeError) as exc:
        raise CorruptState(f"stored accounts of worker {row.worker} cannot be read: {exc}") from exc
    return Peer(row.worker, accounts, row.load, row.free)


def _listed(messages: Sequence[int]) -> str:
    """One value: the driver looks at each element of an array, which takes longer than all else about a save."""
    return ",".join(map(str, messages))


def _resume_point(row: AnyRow, known: frozenset[int]) -> ResumePoint:
    try:
        stored = {} if row.resume is None else json.loads(row.resume)
        if not isinstance(stored, dict):
            raise CorruptState("stored resume point is not an object")
        return ResumePoint.from_json(stored, known=known, clean=row.clean)
    except (ValueError, RecursionError) as exc:
        raise CorruptState(f"stored resume point of chat {row.chat_id} is not JSON: {exc}") from exc
