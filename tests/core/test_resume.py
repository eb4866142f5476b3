"""The resume point through a store and back."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.core.errors import CorruptState
from relay.core.resume import QueueEntry, ResumePoint

TEXT = st.text(max_size=8)
IDS = st.integers(0, 2**63 - 1)
POINTS = st.builds(
    ResumePoint,
    known=st.frozensets(IDS),
    after=IDS,
    turn=st.none() | IDS,
    open=st.none() | IDS,
    idle_seen=st.booleans(),
    error=st.none() | st.fixed_dictionaries({"message": TEXT}, optional={"kind": TEXT, "retryable": st.booleans()}),
    error_turn=st.none() | IDS,
    status=st.none() | TEXT,
    status_key=st.tuples(IDS, TEXT, IDS),
    status_counts=st.dictionaries(TEXT, IDS, max_size=3),
    queue=st.lists(st.builds(QueueEntry, IDS, TEXT), max_size=3).map(tuple),
    queue_max=IDS,
    left=st.lists(TEXT, max_size=3).map(tuple),
    action=st.lists(TEXT, max_size=3).map(tuple),
    retry=st.none() | st.tuples(TEXT, IDS),
    doubt=st.none() | TEXT,
    lifecycle=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    lifecycle_count=IDS,
    archived=st.booleans(),
    clean=st.booleans(),
)


@given(POINTS)
def test_what_was_stored_is_loaded(point: ResumePoint) -> None:
    stored: dict[str, Any] = json.loads(json.dumps(point.to_json()))
    assert ResumePoint.from_json(stored, known=point.known, clean=point.clean) == point


def test_the_ids_and_cleanness_are_kept_apart() -> None:
    stored = ResumePoint(known=frozenset({1, 2})).to_json()
    assert "known" not in stored
    assert "clean" not in stored


def test_fields_that_an_older_version_did_not_store_have_their_defaults() -> None:
    assert ResumePoint.from_json({}, known=frozenset(), clean=True) == ResumePoint()


def test_fields_that_a_newer_version_stored_are_passed_over() -> None:
    assert ResumePoint.from_json({"from_the_future": 1, "after": 4}, known=frozenset(), clean=True).after == 4


def test_a_stored_word_about_what_is_kept_apart_does_not_count() -> None:
    stored = {"after": 4, "status": "waiting"}
    loaded = ResumePoint.from_json(stored, known=frozenset({5}), clean=False)
    assert loaded == ResumePoint(after=4, status="waiting", known=frozenset({5}), clean=False)


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param({"queue": [1]}, id="an entry is a number"),
        pytest.param({"queue": [{"id": 1}]}, id="an entry without digest"),
        pytest.param({"queue": [{"id": "x", "digest": "d"}]}, id="an entry's id is text"),
        pytest.param({"queue": None}, id="the queue is null"),
        pytest.param({"queue": 5}, id="the queue is a number"),
        pytest.param({"left": 5}, id="left is a number"),
        pytest.param({"status_key": True}, id="the key is a truth"),
        pytest.param({"retry": 1}, id="retry is a number"),
        pytest.param({"known": [1]}, id="what is kept apart is here as well"),
    ],
)
def test_an_impossible_point_is_corrupt(stored: dict[str, object]) -> None:
    with pytest.raises(CorruptState, match="stored resume point cannot be read"):
        ResumePoint.from_json(stored, known=frozenset(), clean=True)
