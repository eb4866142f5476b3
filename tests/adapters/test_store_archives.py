"""What `Archives` promises, kept by both databases."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import cast
from uuid import UUID, uuid5

import pytest
from msgspec import structs
from sqlalchemy import update

from relay.adapters.database import Database, DatabaseSettings
from relay.adapters.migrations.tables import collected_chats
from relay.adapters.store import SqlStore, open_store
from relay.core.errors import BadEvent, CorruptState
from relay.core.events import ChatRef, Data, Event, Origin, encode_json
from relay.ports import ArchiveRecord, Clock, Collected, Store, Uncopied

SITE = "https://coder.example"
CHAT = ChatRef(SITE, UUID(int=10), UUID(int=1), UUID(int=10))
FAR = datetime(2999, 1, 1, tzinfo=UTC)


@pytest.fixture
async def store(database_settings: DatabaseSettings, clock: Clock) -> AsyncIterator[SqlStore]:
    async with open_store(database_settings, clock) as opened:
        yield opened


def told(event: str, detail: str, place: tuple[int, int], data: object, chat: ChatRef = CHAT) -> Event:
    number = uuid5(chat.chat_id, f"{event} {place}")
    time, origin = "2026-03-01T12:00:00Z", Origin.LIVE
    return Event(str(number), "chat", event, detail, chat, cast(Data, data), time, origin, *place)


def message(
    number: int, place: tuple[int, int], *, role: str = "assistant", text: str = "", chat: ChatRef = CHAT
) -> Event:
    upstream = {"id": number, "role": role, "content": [{"type": "text", "text": text}]}
    return told("message", role, place, {"message": upstream, "text": text}, chat)


def history(ids: list[int], place: tuple[int, int]) -> Event:
    return told("history", "replaced", place, {"message_ids": ids, "removed_ids": [], "reason": "edit"})


def status(value: str, place: tuple[int, int], chat: ChatRef = CHAT) -> Event:
    return told("status", value, place, {"status": value, "previous": None}, chat)


def turn(ids: list[int], place: tuple[int, int], chat: ChatRef = CHAT) -> Event:
    return told("turn", "completed", place, {"outcome": "completed", "message_ids": ids, "steps": 1, "usage": {}}, chat)


def lifecycle(detail: str, place: tuple[int, int], **chat: object) -> Event:
    return told("lifecycle", detail, place, {"chat": {"id": str(CHAT.chat_id), **chat}, "changed": []})


def whole_turn(chat: ChatRef = CHAT) -> list[Event]:
    return [
        message(1, (1, 1), role="user", chat=chat),
        message(2, (1, 2), chat=chat),
        status("waiting", (1, 3), chat),
        turn([1, 2], (1, 4), chat),
    ]


async def after(store: Store, *events: Event) -> Collected:
    for event in events:
        await store.collect(event)
    collected = await store.collected(SITE, CHAT.chat_id)
    assert collected is not None
    return collected


def record(version: int = 1, chat: ChatRef = CHAT) -> ArchiveRecord:
    return ArchiveRecord(
        chat=chat,
        version=version,
        url=f"file:///archive/{version}.jsonl.zst",
        manifest_url=f"file:///archive/{version}.json",
        sha256="ab" * 32,
        size=2**40,
        messages=2,
        first_id=1,
        last_id=2,
        stored_at=datetime(2026, 3, 1, 12, 0, 0, version, tzinfo=UTC),
        published=False,
        sealed=False,
    )


# --- the fold ------------------------------------------------------------------------------------------------------


async def test_a_chat_nobody_told_of_is_unknown(store: Store) -> None:
    assert await store.collected(SITE, CHAT.chat_id) is None


async def test_a_turn_is_gathered_whole(store: Store) -> None:
    told_last = lifecycle("updated", (1, 5), archived=False, title="no \x00, no \ud83d alone")
    collected = await after(store, *whole_turn(), told_last)
    assert list(collected.messages) == [1, 2]
    assert collected.messages[2] == encode_json(
        {"id": 2, "role": "assistant", "content": [{"type": "text", "text": ""}]}
    )
    assert (collected.chat, collected.status, collected.open_turn, collected.archived) == (
        CHAT,
        "waiting",
        False,
        False,
    )
    assert collected.chat_json == encode_json(cast(dict[str, object], told_last.data)["chat"])


async def test_odd_text_comes_back_as_it_was(store: Store) -> None:
    odd = message(1, (1, 1), text="NUL \x00, half a pair \ud83d, emoji \U0001f600")
    assert (await after(store, odd)).messages[1] == encode_json(cast(dict[str, object], odd.data)["message"])


@pytest.mark.parametrize(
    ("events", "live"),
    [
        pytest.param([history([1, 3], (1, 9))], [1, 3], id="what the statement lacks is gone"),
        pytest.param([history([1, 2], (1, 9))], [1, 2, 3], id="what lies beyond its end stays"),
        pytest.param([history([1, 3], (1, 9)), history([1, 2, 3], (1, 8))], [1, 3], id="the later position counts"),
        pytest.param([history([1, 3], (2, 1)), history([1, 2, 3], (1, 8))], [1, 3], id="a session outweighs positions"),
        pytest.param([history([3], (1, 9)), history([1, 3], (2, 1))], [1, 3], id="a later statement brings back"),
        pytest.param([history([], (1, 9))], [1, 2, 3], id="an empty one ends below all"),
        pytest.param([history([3, 1, 1], (1, 9))], [1, 3], id="in any order"),
    ],
)
async def test_history_statements_decide_what_is_live(store: Store, events: list[Event], live: list[int]) -> None:
    messages = [message(number, (1, number)) for number in (3, 1, 2)]
    assert list((await after(store, *messages, *events)).messages) == live


async def test_an_older_status_or_lifecycle_that_comes_late_changes_nothing(store: Store) -> None:
    collected = await after(
        store,
        status("waiting", (2, 1)),
        status("running", (1, 99)),
        lifecycle("archived", (2, 2), archived=True),
        lifecycle("updated", (2, 1), archived=False),
    )
    assert (collected.status, collected.archived) == ("waiting", True)


@pytest.mark.parametrize(
    ("detail", "chat", "archived"),
    [
        ("archived", {}, True),
        ("archived", {"archived": False}, True),
        ("unarchived", {"archived": True}, False),
        ("updated", {"archived": True}, True),
        ("gone", {}, False),
    ],
)
async def test_whether_a_chat_is_archived(store: Store, detail: str, chat: dict[str, object], archived: bool) -> None:
    assert (await after(store, lifecycle(detail, (1, 1), **chat))).archived is archived


@pytest.mark.parametrize(
    ("events", "is_open"),
    [
        pytest.param([message(1, (1, 1), role="user")], True, id="a prompt without its turn"),
        pytest.param([turn([1, 2], (1, 3)), message(1, (1, 1), role="user")], False, id="the turn came first"),
        pytest.param([*whole_turn(), message(5, (1, 9), role="user")], True, id="the next prompt"),
        pytest.param(
            [*whole_turn(), message(5, (1, 9), role="user"), history([1, 2], (1, 10))],
            True,
            id="it lies beyond the end",
        ),
        pytest.param(
            [*whole_turn(), message(5, (1, 9), role="user"), message(6, (1, 10)), history([1, 2, 6], (1, 11))],
            False,
            id="a prompt that was edited away",
        ),
        pytest.param([message(1, (1, 1))], False, id="no prompt at all"),
        pytest.param(
            [message(1, (1, 1), role="user"), message(5, (1, 2), role="user"), turn([5], (1, 3))],
            False,
            id="the newest prompt counts",
        ),
    ],
)
async def test_whether_a_turn_is_open(store: Store, events: list[Event], is_open: bool) -> None:
    assert (await after(store, *events)).open_turn is is_open


async def test_a_message_told_again_by_a_later_session_replaces_the_copy(store: Store) -> None:
    first, third = message(1, (1, 1), text="a"), message(1, (3, 1), text="a")
    second = message(1, (2, 1), text="b")
    collected = await after(store, first, third, second)
    assert collected.messages[1] == encode_json(cast(dict[str, object], third.data)["message"])


async def test_other_families_are_passed_over(store: Store) -> None:
    await store.collect(told("queue", "updated", (1, 1), {"queued_messages": []}))
    await store.collect(structs.replace(message(1, (1, 1)), family="usage", event="charged"))
    await store.collect(told("preview", "text", (1, 1), {}))
    assert await store.collected(SITE, CHAT.chat_id) is None


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(told("message", "user", (1, 1), {}), id="no message"),
        pytest.param(told("message", "user", (1, 1), {"message": {}}), id="no id"),
        pytest.param(told("message", "user", (1, 1), {"message": {"id": "1"}}), id="an id in quotes"),
        pytest.param(told("message", "user", (1, 1), {"message": {"id": True}}), id="an id that is true"),
        pytest.param(told("message", "user", (1, 1), {"message": {"id": 2**63}}), id="an id of more than 64 bits"),
        pytest.param(told("history", "replaced", (1, 1), {"message_ids": "1"}), id="ids that are no list"),
        pytest.param(told("history", "replaced", (1, 1), {"message_ids": [1.5]}), id="half an id"),
        pytest.param(told("turn", "completed", (1, 1), {"message_ids": []}), id="a turn of nothing"),
        pytest.param(told("status", "waiting", (1, 1), {"status": None}), id="no status"),
        pytest.param(told("lifecycle", "updated", (1, 1), {"chat": []}), id="no chat"),
        pytest.param(message(1, (-1, 1)), id="a session below zero"),
        pytest.param(message(1, (1, 2**63)), id="a position of more than 64 bits"),
        pytest.param(message(1, (1, 1), chat=replace(CHAT, deployment="https://x/\x00")), id="a NUL in the deployment"),
        pytest.param(
            message(1, (1, 1), chat=replace(CHAT, deployment="x" * 5000)), id="a deployment longer than a key"
        ),
    ],
)
async def test_an_event_that_lacks_what_it_promises_leaves_no_trace(store: Store, bad: Event) -> None:
    with pytest.raises(BadEvent):
        await store.collect(bad)
    assert await store.collected(bad.chat.deployment.replace("\0", ""), bad.chat.chat_id) is None


@pytest.mark.parametrize("stored", [b"not json", b"{}"])
async def test_a_stored_history_that_cannot_be_read_stops_the_relay(
    store: Store, behind: Database, stored: bytes
) -> None:
    await after(store, *whole_turn())
    async with behind.writing() as connection:
        await connection.execute(update(collected_chats).values(history=stored))
    with pytest.raises(CorruptState):
        await store.collected(SITE, CHAT.chat_id)


# --- what is due ---------------------------------------------------------------------------------------------------


async def due(store: Store, idle_since: datetime = FAR) -> list[Collected]:
    """What is known of the chats that are due."""
    waiting = await store.due(idle_since=idle_since)
    found = [(each, await store.collected(each.chat.deployment, each.chat.chat_id)) for each in waiting]
    for each, collected in found:
        assert collected is not None
        assert each == Uncopied(collected.chat, collected.archived_at, collected.changed_at)
    return [collected for _, collected in found if collected is not None]


async def test_a_finished_chat_is_due_until_it_is_archived(store: Store) -> None:
    collected = await after(store, *whole_turn())
    assert await due(store) == [collected]
    await store.add_archive(record(), upto=collected.changed_at)
    assert await due(store) == []


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([status("waiting", (1, 1)), lifecycle("created", (1, 2))], id="no message"),
        pytest.param([*whole_turn(), status("running", (1, 5))], id="running"),
        pytest.param([*whole_turn(), status("requires_action", (1, 5))], id="waits for a tool"),
        pytest.param(whole_turn()[:2] + whole_turn()[3:], id="no status yet"),
        pytest.param([*whole_turn(), message(5, (1, 5), role="user")], id="an open turn"),
        pytest.param(
            [message(1, (1, 1)), status("waiting", (1, 2)), history([2], (1, 3))], id="no message is live any more"
        ),
    ],
)
async def test_a_chat_that_is_not_finished_is_not_due(store: Store, events: list[Event]) -> None:
    await after(store, *events)
    assert await due(store) == []


@pytest.mark.parametrize("value", ["waiting", "completed", "error"])
async def test_a_chat_may_rest_in_each_idle_status(store: Store, value: str) -> None:
    await after(store, *whole_turn(), status(value, (1, 5)))
    assert len(await due(store)) == 1


async def test_a_chat_is_not_due_before_it_was_quiet_long_enough(store: Store) -> None:
    changed_at = (await after(store, *whole_turn())).changed_at
    assert await due(store, changed_at - timedelta(microseconds=1)) == []
    assert len(await due(store, changed_at)) == 1


async def test_chats_are_due_longest_quiet_first(store: Store) -> None:
    chats = [replace(CHAT, chat_id=UUID(int=number)) for number in (3, 1, 2)]
    for chat in chats:
        for event in whole_turn(chat):
            await store.collect(event)
    assert [collected.chat for collected in await due(store)] == chats


@pytest.mark.parametrize(
    ("later", "again"),
    [
        pytest.param(whole_turn(), False, id="the same events once more"),
        pytest.param(
            [structs.replace(event, session=2) for event in whole_turn()], False, id="told again by a new session"
        ),
        pytest.param([history([1, 2], (2, 1))], False, id="a statement of what is known"),
        pytest.param([lifecycle("archived", (1, 9), archived=True)], False, id="archived in Coder"),
        pytest.param([status("running", (1, 9)), status("waiting", (1, 10))], False, id="nothing was said"),
        pytest.param([message(3, (1, 9))], True, id="a new message"),
        pytest.param([message(2, (1, 9), text="new")], True, id="other words"),
        pytest.param([message(3, (1, 8)), history([1, 3], (1, 9))], True, id="an edit"),
    ],
)
async def test_an_archived_chat_is_due_again_only_with_news(store: Store, later: list[Event], again: bool) -> None:
    collected = await after(store, *whole_turn())
    await store.add_archive(record(), upto=collected.changed_at)
    await after(store, *later)
    assert bool(await due(store)) is again


async def test_what_comes_while_the_archive_is_written_is_not_lost(store: Store) -> None:
    seen = await after(store, *whole_turn())
    await after(store, message(3, (1, 5)))  # the clock of SQLite's test has not moved
    await store.add_archive(record(), upto=seen.changed_at)
    assert [list(collected.messages) for collected in await due(store)] == [[1, 2, 3]]


async def test_a_late_record_of_less_does_not_take_back_what_is_covered(store: Store) -> None:
    early = (await after(store, *whole_turn())).changed_at
    late = (await after(store, message(3, (1, 5)))).changed_at
    await store.add_archive(record(2), upto=late)
    await store.add_archive(record(1), upto=early)
    assert await due(store) == []


# --- records -------------------------------------------------------------------------------------------------------


async def test_a_record_is_stored_once_and_its_flags_only_rise(store: Store) -> None:
    await store.add_archive(record(), upto=FAR)
    await store.mark_archive(record(), published=True)
    await store.add_archive(replace(record(), url="file:///other"), upto=FAR)
    await store.mark_archive(record())
    assert await store.archives() == [replace(record(), published=True)]
    await store.mark_archive(record(), sealed=True)
    assert await store.archives() == [replace(record(), published=True, sealed=True)]


async def test_the_same_record_again_covers_nothing_more(store: Store) -> None:
    covered = (await after(store, *whole_turn())).changed_at
    await store.add_archive(record(), upto=covered)
    await after(store, message(3, (1, 5)))
    await store.add_archive(record(), upto=FAR)
    assert len(await due(store)) == 1


async def test_records_come_oldest_first_and_by_deployment(store: Store) -> None:
    elsewhere = record(1, replace(CHAT, deployment="https://other.example"))
    for each in (record(3), record(2), elsewhere):
        await store.add_archive(each, upto=FAR)
    assert await store.archives() == [elsewhere, record(2), record(3)]
    assert await store.archives(SITE) == [record(2), record(3)]


async def test_an_archive_without_messages_has_no_ids(store: Store) -> None:
    empty = replace(record(), messages=0, first_id=None, last_id=None)
    await store.add_archive(empty, upto=FAR)
    assert await store.archives() == [empty]


async def test_what_is_unfinished_is_what_a_crash_may_have_left(store: Store) -> None:
    other = replace(CHAT, chat_id=UUID(int=11))
    for each in (record(1), record(2), record(1, other)):
        await store.add_archive(each, upto=FAR)
    await store.mark_archive(record(1), published=True)
    await store.mark_archive(record(1, other), published=True, sealed=True)
    assert await store.unfinished_archives(seal=False) == [record(2)]
    await store.mark_archive(record(2), published=True)
    assert await store.unfinished_archives(seal=False) == []
    # An older version that was never sealed stays as it is: the chat went on behind it.
    assert await store.unfinished_archives(seal=True) == [replace(record(2), published=True)]
    assert await store.archives(SITE, other.chat_id) == [replace(record(1, other), published=True, sealed=True)]


# --- what upstream deletes -----------------------------------------------------------------------------------------

ARCHIVED_AT = datetime(2026, 2, 1, 10, 0, 0, 123456, tzinfo=UTC)
ON = ARCHIVED_AT + timedelta(microseconds=1)


def archived_upstream(place: tuple[int, int], updated_at: object = "2026-02-01T10:00:00.123456Z") -> Event:
    return lifecycle("archived", place, archived=True, updated_at=updated_at)


async def uncopied(store: Store, before: datetime = FAR, site: str = SITE) -> list[UUID]:
    return [each.chat.chat_id for each in await store.endangered(site, archived_before=before)]


@pytest.mark.parametrize(
    ("updated_at", "since"),
    [
        ("2026-02-01T10:00:00.123456Z", ARCHIVED_AT),
        ("2026-02-01T12:00:00.123456789+02:00", ARCHIVED_AT),
        ("2026-02-01T10:00:00", datetime(1970, 1, 1, tzinfo=UTC)),
        ("soon", datetime(1970, 1, 1, tzinfo=UTC)),
        ("0001-01-01T00:00:00+10:00", datetime(1970, 1, 1, tzinfo=UTC)),
        (None, datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
async def test_since_when_a_chat_is_archived(store: Store, updated_at: object, since: datetime) -> None:
    assert (await after(store, archived_upstream((1, 1), updated_at))).archived_at == since


async def test_what_changes_on_an_archived_chat_does_not_put_off_its_end(store: Store) -> None:
    later = lifecycle("updated", (1, 2), archived=True, title="new", updated_at="2026-02-20T10:00:00Z")
    assert (await after(store, archived_upstream((1, 1)), later)).archived_at == ARCHIVED_AT
    back = lifecycle("unarchived", (1, 3), archived=False, updated_at="2026-02-21T10:00:00Z")
    assert (await after(store, back)).archived_at is None
    again = await after(store, archived_upstream((1, 4), "2026-02-22T10:00:00Z"))
    assert again.archived_at == datetime(2026, 2, 22, 10, tzinfo=UTC)


async def test_an_archived_chat_is_endangered_until_a_copy_covers_it(store: Store) -> None:
    await after(store, *whole_turn())
    assert await uncopied(store) == []
    collected = await after(store, archived_upstream((1, 5)))
    assert await uncopied(store, ON) == [CHAT.chat_id]
    assert await uncopied(store, ARCHIVED_AT) == []
    assert await uncopied(store, FAR, "https://elsewhere.example") == []
    await store.add_archive(record(), upto=collected.changed_at)
    assert await uncopied(store) == []
    await after(store, message(3, (1, 6)))  # Coder had more than the copy has
    assert await uncopied(store) == [CHAT.chat_id]
    await after(store, lifecycle("gone", (1, 7), archived=True))
    assert await uncopied(store) == []


async def test_an_archived_chat_of_which_nothing_else_is_known_is_endangered_too(store: Store) -> None:
    await after(store, archived_upstream((1, 1)))
    assert await uncopied(store) == [CHAT.chat_id]


async def test_the_longest_archived_is_first(store: Store) -> None:
    chats = [replace(CHAT, chat_id=UUID(int=number)) for number in (30, 20, 40)]
    for chat, day in zip(chats, (5, 3, 4), strict=True):
        data = {"chat": {"archived": True, "updated_at": f"2026-02-0{day}T00:00:00Z"}, "changed": []}
        await store.collect(told("lifecycle", "archived", (1, 1), data, chat))
    assert [chat.int for chat in await uncopied(store)] == [20, 40, 30]


@pytest.mark.parametrize("state", [[], [status("running", (1, 3))], [status("requires_action", (1, 3))]])
async def test_an_archived_chat_is_due_though_its_turn_never_ended(store: Store, state: list[Event]) -> None:
    await after(store, message(1, (1, 1), role="user"), message(2, (1, 2)), *state)
    assert await store.due(idle_since=FAR) == []
    collected = await after(store, archived_upstream((1, 5)))
    assert [each.chat for each in await store.due(idle_since=collected.changed_at)] == [CHAT]
    assert await store.due(idle_since=collected.changed_at - timedelta(microseconds=1)) == []
    await after(store, lifecycle("unarchived", (1, 6), archived=False))
    assert await store.due(idle_since=FAR) == []


async def test_a_family_is_copied_when_each_of_its_chats_is(store: Store) -> None:
    child = ChatRef(SITE, UUID(int=11), UUID(int=1), CHAT.chat_id)
    stranger = ChatRef(SITE, UUID(int=12), UUID(int=1), UUID(int=12))
    collected = await after(store, *whole_turn(), *whole_turn(stranger))
    assert not await store.family_copied(CHAT)
    await store.add_archive(record(), upto=collected.changed_at)
    assert await store.family_copied(CHAT)
    for event in whole_turn(child):
        await store.collect(event)
    assert not await store.family_copied(CHAT)
    of_child = await store.collected(SITE, child.chat_id)
    assert of_child is not None
    await store.add_archive(record(chat=child), upto=of_child.changed_at)
    assert await store.family_copied(CHAT)
    assert await store.family_copied(child)
    await store.collect(message(3, (1, 6), chat=child))
    assert not await store.family_copied(CHAT)
