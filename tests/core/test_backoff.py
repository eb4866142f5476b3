"""Delays between tries."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from relay.core.backoff import backoff


def first(count: int, draw: float, **settings: float) -> list[float]:
    return list(itertools.islice(backoff(chance=itertools.repeat(draw), **settings), count))


def test_delays_double_up_to_the_longest() -> None:
    assert first(9, 1.0) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_chance_takes_away_up_to_all_of_it() -> None:
    assert first(3, 0.0) == [0.0, 0.0, 0.0]
    assert first(3, 0.5) == [0.25, 0.5, 1.0]


def test_first_factor_and_longest_are_the_callers() -> None:
    assert first(4, 1.0, first=1, factor=3, longest=5) == [1, 3, 5, 5]


def test_a_first_delay_beyond_the_longest_is_cut_from_the_second_on() -> None:
    assert first(3, 1.0, first=8, longest=5) == [8, 5, 5]


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30))
def test_delays_stay_within_their_steps(draws: list[float]) -> None:
    delays = list(backoff(chance=iter(draws)))
    whole = first(len(draws), 1.0)
    assert all(0 <= delay <= w for delay, w in zip(delays, whole, strict=True))


def test_chance_is_drawn_once_for_each_delay() -> None:
    draws = iter([0.0, 1.0, 0.0])
    delays = backoff(chance=draws)
    assert [next(delays), next(delays)] == [0.0, 1.0]
    assert list(draws) == [0.0]
