"""So many a second, however they come."""

from hypothesis import given
from hypothesis import strategies as st

from relay.core.pace import Pace


def taken(pace: Pace, at: float, number: int) -> list[float]:
    """When so many that are wanted at once may go."""
    times = []
    for _ in range(number):
        at += pace.wait(at)
        pace.take(at)
        times.append(round(at, 6))
    return times


def test_after_a_pause_those_of_one_second_go_at_once_and_then_evenly() -> None:
    assert taken(Pace(4), 100.0, 7) == [100.0, 100.0, 100.0, 100.0, 100.25, 100.5, 100.75]


def test_a_slow_pace_has_no_burst() -> None:
    assert taken(Pace(0.5), 0.0, 3) == [0.0, 2.0, 4.0]


def test_a_long_pause_saves_up_no_more_than_a_second() -> None:
    pace = Pace(2)
    taken(pace, 0.0, 4)
    assert taken(pace, 1000.0, 3) == [1000.0, 1000.0, 1000.5]


@given(st.floats(0.5, 200), st.lists(st.floats(0, 5), max_size=60))
def test_in_no_time_do_more_go_than_the_rate_and_one_burst(rate: float, pauses: list[float]) -> None:
    pace, now, times = Pace(rate), 0.0, []
    for pause in pauses:
        now += pause
        now += pace.wait(now)
        pace.take(now)
        times.append(now)
    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= (times[last] - begin) * rate + max(1.0, rate) + 1e-6
