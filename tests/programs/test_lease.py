"""A worker's own belief in its lease: never longer than the store's."""

from relay.adapters.memory import ManualClock
from relay.programs.lease import Lease


def test_a_lease_counts_from_before_the_store_was_asked() -> None:
    clock = ManualClock()
    lease = Lease("a", clock, seconds=6.0, asked=clock.monotonic())
    clock.advance(4)
    asked = clock.monotonic()
    clock.advance(1)  # the answer takes a second
    assert lease.renewed(asked)
    assert lease.left == 5.0
    clock.advance(4.5)
    assert not lease.over
    clock.advance(0.5)
    assert lease.over


def test_an_answer_that_comes_too_late_revives_nothing() -> None:
    clock = ManualClock()
    lease = Lease("a", clock, seconds=6.0, asked=clock.monotonic())
    clock.advance(5)
    asked = clock.monotonic()
    clock.advance(2)  # the store had renewed it in time, but nobody here knew
    assert not lease.renewed(asked)
    assert lease.over


def test_a_lease_that_was_found_over_stays_so() -> None:
    clock = ManualClock()
    lease = Lease("a", clock, seconds=6.0, asked=clock.monotonic())
    clock.advance(6)
    assert lease.over
    clock.step(-3600)  # the wall clock has no say
    assert lease.over
    assert not lease.renewed(clock.monotonic())


def test_a_lease_that_the_store_ended_is_over_at_once() -> None:
    clock = ManualClock()
    lease = Lease("a", clock, seconds=6.0, asked=clock.monotonic())
    lease.end()
    assert lease.over
