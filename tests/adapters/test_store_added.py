"""What `Added` promises, kept by both databases and by their twin in memory; and records in pages, for discovery."""

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import pytest

from relay.adapters.database import DatabaseSettings
from relay.adapters.memory_added import MemoryAdded
from relay.adapters.store import open_store
from relay.core.claims import Peer
from relay.core.events import ChatRef
from relay.ports import Added, Store
from tests.adapters.conftest import SteppedClock

SITE, ELSEWHERE = "https://coder.example.com", "https://other.example.com"
CHATS = [UUID(int=number) for number in (3, 1, 2)]


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def place(request: pytest.FixtureRequest) -> DatabaseSettings | None:
    """Where chats are kept; None: in memory."""
    return None if request.param == "memory" else request.getfixturevalue(f"{request.param}_settings")


@pytest.fixture
async def added(place: DatabaseSettings | None, clock: SteppedClock) -> AsyncIterator[Added]:
    if place is None:
        yield MemoryAdded(clock)
        return
    async with open_store(place, clock) as store:
        yield store


async def ids(added: Added, deployment: str = SITE) -> list[UUID]:
    return [each.chat_id for each in await added.added(deployment)]


async def test_chats_are_kept_in_the_order_in_which_they_were_added(added: Added, clock: SteppedClock) -> None:
    for chat in CHATS:
        assert await added.add(SITE, chat) is True
        await clock.sleep(1)
    assert await added.add(SITE, CHATS[0]) is False
    assert await added.add(ELSEWHERE, CHATS[1]) is True
    assert await ids(added) == CHATS
    assert await ids(added, ELSEWHERE) == [CHATS[1]]


async def test_a_chat_is_forgotten_when_it_is_removed(added: Added) -> None:
    await added.add(SITE, CHATS[0])
    await added.add(ELSEWHERE, CHATS[0])
    assert await added.remove(SITE, CHATS[0]) is True
    assert await added.remove(SITE, CHATS[0]) is False
    assert (await ids(added), await ids(added, ELSEWHERE)) == ([], [CHATS[0]])


async def test_what_is_gone_stays_gone_until_it_is_added_again(added: Added, clock: SteppedClock) -> None:
    await added.set_gone(SITE, CHATS[0])  # never added: nothing to mark
    await added.add(SITE, CHATS[0])
    (before,) = await added.added(SITE)
    assert before.gone_at is None
    await added.set_gone(SITE, CHATS[0])
    (first,) = await added.added(SITE)
    assert first.gone_at is not None
    await clock.sleep(60)
    await added.set_gone(SITE, CHATS[0])
    assert await added.added(SITE) == [first]
    assert await added.add(SITE, CHATS[0]) is True
    assert await added.added(SITE) == [before]
    assert timedelta() <= first.gone_at - first.added_at < timedelta(seconds=30)


# --- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def store(database_settings: DatabaseSettings, clock: SteppedClock) -> AsyncIterator[Store]:
    async with open_store(database_settings, clock) as opened:
        yield opened


async def test_records_come_in_pages_or_for_the_chats_that_are_asked_for(store: Store) -> None:
    chats = [UUID(int=number << 64) for number in range(1, 8)]
    owner = UUID(int=9)
    await store.enlist(Peer("one", None, 0.0, 100), SITE, lease_seconds=600)
    for chat in reversed(chats):
        assert await store.claim(ChatRef(SITE, chat, owner, chat), "one") is not None
    await store.enlist(Peer("two", None, 0.0, 100), ELSEWHERE, lease_seconds=600)
    assert await store.claim(ChatRef(ELSEWHERE, chats[0], owner, chats[0]), "two") is not None

    async def page(after: UUID | None, limit: int) -> list[UUID]:
        return [record.chat.chat_id for record in await store.records(SITE, after=after, limit=limit)]

    assert await page(None, 3) == chats[:3]
    assert await page(chats[2], 3) == chats[3:6]
    assert await page(chats[5], 3) == chats[6:]
    assert await page(chats[6], 3) == []
    asked = await store.records_of(SITE, [chats[4], UUID(int=5), chats[1]])
    assert [record.chat.chat_id for record in asked] == [chats[1], chats[4]]
    assert {record.worker for record in asked} == {"one"}
    assert await store.records_of(SITE, []) == []
