"""Laws of the store: order, copies and rivals change nothing, whatever the sequence."""

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from relay.adapters.database import DatabaseSettings
from relay.adapters.store import SqlStore, open_store
from relay.core.events import ChatRef, Event
from relay.ports import Charge, Clock, Collected, Spend
from tests.adapters.test_store_archives import history, lifecycle, message, status, turn
from tests.extent import as_many

# One store serves all examples of a test: each has a chat and a deployment of its own.
examples = settings(
    max_examples=as_many(quick=12, long=40), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_numbers = itertools.count()


def new_chat() -> ChatRef:
    number = next(_numbers)
    return ChatRef(f"https://{number}.example", UUID(int=number), UUID(int=1), UUID(int=number))


@pytest.fixture
async def store(database_settings: DatabaseSettings, clock: Clock) -> AsyncIterator[SqlStore]:
    async with open_store(database_settings, clock) as opened:
        yield opened


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

# --- the archivist's fold ------------------------------------------------------------------------------------------

ids = st.integers(1, 6)
EVENTS = st.one_of(
    st.builds(
        lambda number, role, text: message(number, (0, 0), role=role, text=text),
        ids,
        st.sampled_from(["user", "tool"]),
        st.text(max_size=2),
    ),
    st.builds(lambda kept: history(kept, (0, 0)), st.lists(ids)),
    st.builds(lambda value: status(value, (0, 0)), st.sampled_from(["running", "waiting"])),
    st.builds(lambda n: turn([n], (0, 0)), ids),
    st.builds(lambda detail: lifecycle(detail, (0, 0)), st.sampled_from(["archived", "unarchived", "updated"])),
)
PLACES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), unique=True, min_size=12, max_size=12)


@st.composite
def tellings(draw: st.DrawFn) -> tuple[list[Event], list[Event]]:
    """Events, each at its own place, and the same with copies in another order."""
    places = draw(PLACES)
    events = [
        structs.replace(event, session=session, position=position)
        for event, (session, position) in zip(draw(st.lists(EVENTS, min_size=1, max_size=12)), places, strict=False)
    ]
    return events, draw(st.permutations(events + draw(st.lists(st.sampled_from(events), max_size=5))))


async def gathered(store: SqlStore, events: Sequence[Event]) -> Collected:
    chat = new_chat()
    for event in events:
        await store.collect(structs.replace(event, chat=chat))
    collected = await store.collected(chat.deployment, chat.chat_id)
    assert collected is not None
    return replace(collected, chat=events[0].chat, changed_at=NOON)


@examples
@given(tellings())
async def test_any_order_and_any_copies_gather_the_same(
    store: SqlStore, telling: tuple[list[Event], list[Event]]
) -> None:
    events, shuffled = telling
    assert await gathered(store, shuffled) == await gathered(
        store, sorted(events, key=lambda e: (e.session, e.position))
    )


@examples
@given(tellings())
async def test_what_is_live_is_what_the_contract_says(
    store: SqlStore, telling: tuple[list[Event], list[Event]]
) -> None:
    events, shuffled = telling
    last: dict[str, Event] = {}
    messages: dict[int, Event] = {}
    for event in sorted(events, key=lambda e: (e.session, e.position)):
        last[event.event] = event
        if event.event == "message":
            messages[event.data["message"]["id"]] = event  # type: ignore[typeddict-item, index]
    kept = last["history"].data["message_ids"] if "history" in last else []  # type: ignore[typeddict-item]
    live = {number for number in messages if number in kept or number > max(kept, default=0)}
    prompts = [number for number in live if messages[number].detail == "user"]
    turns = {event.data["message_ids"][0] for event in events if event.event == "turn"}  # type: ignore[typeddict-item]

    collected = await gathered(store, shuffled)
    assert set(collected.messages) == live
    assert collected.open_turn is (bool(prompts) and max(prompts) not in turns)
    assert collected.status == (last["status"].detail if "status" in last else None)
    assert collected.archived is ("lifecycle" in last and last["lifecycle"].detail == "archived")


# --- charges -------------------------------------------------------------------------------------------------------

CHARGES = st.lists(
    st.builds(
        lambda chat, number, seconds, cost: Charge(
            ChatRef("", UUID(int=chat), UUID(int=chat % 2), UUID(int=chat)),
            number,
            NOON + timedelta(seconds=seconds),
            *("model", 1, 2, 3, 4, 5),
            cost,
        ),
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(-3, 3),
        st.none() | st.integers(0, 2**53),
    ),
    max_size=15,
)


@examples
@given(CHARGES, st.integers(-3, 3), st.integers(0, 4))
async def test_spend_is_the_sum_over_the_first_copy_of_each_charge(
    store: SqlStore, told: list[Charge], start: int, length: int
) -> None:
    deployment = new_chat().deployment
    first: dict[tuple[UUID, int], Charge] = {}
    for charge in (replace(charge, chat=replace(charge.chat, deployment=deployment)) for charge in told * 2):
        key = (charge.chat.chat_id, charge.message_id)
        assert await store.charge(charge) is (key not in first)
        first.setdefault(key, charge)

    begin, end = NOON + timedelta(seconds=start), NOON + timedelta(seconds=start + length)
    for owner in (None, UUID(int=0), UUID(int=1)):
        wanted = [c for c in first.values() if begin <= c.at < end and owner in (None, c.chat.owner_id)]
        wanted.sort(key=lambda c: (c.at, c.message_id), reverse=True)
        costs = [charge.cost_micros for charge in wanted if charge.cost_micros is not None]
        newest = [charge.message_id for charge in wanted][:10]
        assert await store.spend(deployment, owner_id=owner, start=begin, end=end) == Spend(
            sum(costs), len(wanted), len(wanted) - len(costs), newest
        )
