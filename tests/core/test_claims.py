"""Who follows which chat: shares that come out even, and nothing that goes to and fro."""

from dataclasses import replace
from random import Random
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.claims import Activity, Peer, chosen, share, to_adopt, to_give_up

CHATS = [UUID(int=number) for number in range(1, 601)]


def peer(name: str, load: float = 0.0, free: int = 1000) -> Peer:
    return Peer(name, None, load, free)


# --- weights -------------------------------------------------------------------------------------------------------


def test_an_idle_chat_weighs_one() -> None:
    assert Activity(5.0).weight(5.0) == 1.0


def test_a_busy_chat_weighs_its_events_a_second_and_cools_down() -> None:
    activity = Activity(0.0)
    for second in range(300):
        activity.add(20, float(second))
    assert activity.weight(300.0) == pytest.approx(20, rel=0.05)
    assert activity.weight(330.0) == pytest.approx(20 / 2.718, rel=0.05)
    assert activity.weight(1000.0) == 1.0


def test_a_worker_reads_the_chats_of_its_accounts() -> None:
    ann, bob = UUID(int=1), UUID(int=2)
    assert [Peer("a", frozenset({ann}), 0, 1).reads(user) for user in (ann, bob)] == [True, False]
    assert Peer("a", None, 0, 1).reads(bob)


# --- who claims ----------------------------------------------------------------------------------------------------

PEERS = st.lists(
    st.builds(Peer, st.sampled_from("abcdef"), st.none(), st.floats(0, 500), st.integers(0, 50)),
    unique_by=lambda p: p.worker,
    max_size=6,
)


@given(PEERS, st.randoms())
def test_all_workers_choose_the_same_one_and_it_has_room(peers: list[Peer], chance: Random) -> None:
    shuffled = list(peers)
    chance.shuffle(shuffled)
    for chat_id in CHATS[:20]:
        name = chosen(chat_id, peers)
        assert name == chosen(chat_id, shuffled)
        able = {p.worker for p in peers if p.free > 0}
        assert name in able if able else name is None


def test_nobody_above_its_share_is_chosen_and_the_rest_evenly() -> None:
    peers = [peer("full", 90, free=0), peer("busy", 90), peer("one", 10), peer("two", 12)]
    names = [chosen(chat_id, peers) for chat_id in CHATS]
    assert set(names) == {"one", "two"}
    assert 250 < names.count("one") < 350


def test_when_a_worker_comes_only_its_own_chats_change_hands() -> None:
    before = [peer("a", 10), peer("b", 10)]
    after = [*before, peer("c", 10)]
    changed = [c for c in CHATS if chosen(c, before) != chosen(c, after)]
    assert {chosen(c, after) for c in changed} == {"c"}
    assert 150 < len(changed) < 250


# --- who adopts ----------------------------------------------------------------------------------------------------


@given(PEERS, st.integers(0, 200))
def test_all_orphans_are_adopted_as_far_as_there_is_room(peers: list[Peer], orphans: int) -> None:
    peers = [replace(p, free=p.free and 1000) for p in peers]
    taken = {p.worker: to_adopt(p.worker, peers, orphans) for p in peers}
    able = [p for p in peers if p.free > 0]
    assert all(0 <= number <= orphans for number in taken.values())
    assert sum(taken.values()) >= (orphans if able else 0)
    assert sum(taken.values()) <= orphans + len(able)  # one more each, from rounding up
    if able and orphans:
        assert taken[min(able, key=lambda p: p.load).worker] > 0


def test_who_has_less_to_do_adopts_more() -> None:
    peers = [peer("a", 10), peer("b", 20), peer("c", 100)]
    assert [to_adopt(p.worker, peers, 30) for p in peers] == [20, 10, 0]


# --- who gives up --------------------------------------------------------------------------------------------------


def test_a_worker_that_joins_gets_its_share_of_idle_chats() -> None:
    weights = dict.fromkeys(CHATS[:100], 1.0) | {CHATS[0]: 30.0}
    given_up = to_give_up("a", weights, [peer("a", 129), peer("b")])
    assert len(given_up) == 64  # (30 + 99) / 2
    assert CHATS[0] not in given_up


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        pytest.param(12, [peer("b", 10)], id="a little more than the other"),
        pytest.param(100, [], id="nobody else is there"),
        pytest.param(100, [peer("b", 0, free=0)], id="the other has no room"),
        pytest.param(10, [peer("b", 100)], id="the other has more"),
    ],
)
def test_nothing_is_given_up_without_need_or_without_a_taker(mine: int, others: list[Peer]) -> None:
    assert to_give_up("a", dict.fromkeys(CHATS[:mine], 1.0), [peer("a", mine), *others]) == []


def test_one_chat_too_heavy_for_anybody_stays_where_it_is() -> None:
    assert to_give_up("a", {CHATS[0]: 500.0}, [peer("a", 500), peer("b")]) == []


@given(
    st.lists(st.lists(st.sampled_from([1.0, 1.0, 1.0, 4.0, 25.0]), max_size=60), min_size=2, max_size=5),
    st.integers(0, 40),
)
def test_shares_come_out_even_and_then_nothing_moves(loads: list[list[float]], orphaned: int) -> None:
    ids = iter(CHATS)
    held = {name: {next(ids): weight for weight in weights} for name, weights in zip("abcde", loads, strict=False)}
    orphans = {next(ids): 1.0 for _ in range(orphaned)}

    def peers() -> list[Peer]:
        return [peer(name, sum(weights.values())) for name, weights in held.items()]

    moves = []
    for _ in range(12):
        known = peers()  # all decide at once, by what was told before
        for name, weights in held.items():
            for chat_id in to_give_up(name, weights, known):
                orphans[chat_id] = weights.pop(chat_id)
        number, known = len(orphans), peers()
        for name, weights in held.items():
            for _ in range(min(len(orphans), to_adopt(name, known, number))):
                chat_id, weight = orphans.popitem()
                weights[chat_id] = weight
        moves.append(number)
        assert not orphans  # one look is enough
    assert moves[-1] == 0
    # Whoever has too much yet has only chats that would be too much for the others as well.
    fair = share(peers())
    for name, weights in held.items():
        excess = sum(weights.values()) - fair
        assert excess <= max(2.0, fair * 0.2) or min(weights.values()) > 1.0, (name, loads)
