"""What a server speaks, from what was recorded of servers of seven ages and from the text of frames."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from relay.core.dialect import (
    MIXED_SECONDS,
    Dialect,
    Evidence,
    Witness,
    chat_evidence,
    dialect_of,
    frame_evidence,
    gateway_evidence,
    limits_evidence,
    list_evidence,
    page_evidence,
    tells_all,
)

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
SPOKEN = {
    "d0": Dialect.D0,
    "d0b": Dialect.D0B,
    "d1": Dialect.D1,
    "d1e": Dialect.D1E,
    "d2": Dialect.D2,
    "d2b": Dialect.D2,
    "d3": Dialect.D3,
}
WITH_EPISODES = ("d2", "d2b", "d3")


def rows_of(folder: str, *names: str) -> Iterator[dict[str, Any]]:
    for name in names or sorted(path.stem for path in (CAPTURES / folder).glob("*.jsonl")):
        file = CAPTURES / folder / f"{name}.jsonl"
        if file.exists():
            yield from map(json.loads, file.read_text().splitlines())


def said(row: dict[str, Any]) -> str | None:
    try:
        return str(json.loads(row["body"])["message"])
    except (ValueError, KeyError, TypeError):
        return None


def evidence_of(row: dict[str, Any]) -> Evidence | None:
    """What the recorded answer or frame tells; None when it is nothing that the relay asks for."""
    if row.get("kind") == "frame":
        return frame_evidence(row["raw"])
    method, _, target = str(row.get("rest", "")).partition(" ")
    if method != "GET":
        return None
    url, status = urlsplit(target), row["status"]
    below = url.path.removeprefix("/api/experimental/chats")
    if below == "/usage-limits/status":
        return limits_evidence(status, said(row))
    if url.path == "/api/v2/users/me/ai/spend":
        return gateway_evidence(status, said(row))
    if status != 200 or below == url.path:
        return None
    if below == "":
        return list_evidence(json.loads(row["body"]))
    if below.endswith("/messages"):
        after = parse_qs(url.query).get("after_id", ["0"])[0]
        return page_evidence(json.loads(row["body"]), after_id=int(after))
    return chat_evidence(json.loads(row["body"])) if below.count("/") == 1 and len(below) == 37 else None


@pytest.mark.parametrize("folder", SPOKEN)
def test_a_server_is_known_by_its_first_list_its_limits_and_its_first_frame(folder: str) -> None:
    witness = Witness()
    lists = (row for row in rows_of(folder, "list_filters", "archive_and_watch") if "chats" in row.get("rest", ""))
    first_list = next(found for row in lists if (found := evidence_of(row)) and found.tree_list is not None)
    limits = next(row for row in rows_of(folder, "rest_surface") if "/usage-limits/status" in row.get("rest", ""))
    frame = next(row for row in rows_of(folder, "text_turn") if row.get("conn") == "s1" and row["kind"] == "frame")
    for found in (first_list, evidence_of(limits), evidence_of(frame), Evidence(prefix="experimental")):
        assert found is not None
        witness.saw(found, 0.0)
    assert witness.dialect(0.0) is SPOKEN[folder]


@pytest.mark.parametrize("folder", SPOKEN)
def test_nothing_that_a_server_says_contradicts_itself(folder: str) -> None:
    """Every recorded answer and frame of one server, in the order of the files, at one time: never `mixed`."""
    witness = Witness()
    for row in rows_of(folder):
        found = evidence_of(row)
        if found is not None:
            witness.saw(found, 0.0)
            assert witness.dialect(0.0) in (Dialect.UNKNOWN, SPOKEN[folder]), row
    assert witness.dialect(0.0) is SPOKEN[folder]


@pytest.mark.parametrize("folder", SPOKEN)
def test_a_list_and_limits_are_enough_before_any_frame(folder: str) -> None:
    witness = Witness()
    for row in rows_of(folder, "rest_surface", "list_filters", "archive_and_watch"):
        if "rest" in row and (found := evidence_of(row)) is not None:
            witness.saw(found, 0.0)
    assert witness.evidence.frame is None
    assert witness.dialect(0.0) is SPOKEN[folder]


@pytest.mark.parametrize("folder", SPOKEN)
def test_episodes_are_seen_in_the_frames_of_servers_that_have_them_and_of_no_other(folder: str) -> None:
    found = {frame_evidence(row["raw"]).episodes for row in rows_of(folder) if row.get("kind") == "frame"}
    assert found - {None} == ({True} if folder in WITH_EPISODES else {False} if folder in ("d1", "d1e") else set())


@pytest.mark.parametrize("folder", WITH_EPISODES)
def test_the_first_frame_of_a_connection_tells_of_episodes(folder: str) -> None:
    first: dict[tuple[str, str], str] = {}
    for name in sorted(path.stem for path in (CAPTURES / folder).glob("*.jsonl")):
        for row in rows_of(folder, name):
            if row.get("kind") == "frame" and not str(row["conn"]).startswith("watch"):
                first.setdefault((name, row["conn"]), row["raw"])
    told = [frame_evidence(text).episodes for text in first.values() if text.startswith("[")]
    assert told.count(True) > 0.9 * len(told)  # the others begin with more messages than go into a frame
    assert False not in told


# --- traps -----------------------------------------------------------------------------------------------------------


def test_after_id_0_is_unset_so_a_page_in_descending_order_does_not_say_that_pages_cannot_ascend() -> None:
    newest_first = {"messages": [{"id": 156}, {"id": 155}]}
    assert page_evidence(newest_first, after_id=0).asc_messages is None
    assert page_evidence(newest_first, after_id=1).asc_messages is False
    assert page_evidence({"messages": [{"id": 155}, {"id": 156}]}, after_id=1).asc_messages is True


@pytest.mark.parametrize("messages", [[], [{"id": 7}], None])
def test_a_page_of_one_message_has_no_order(messages: object) -> None:
    assert page_evidence({"messages": messages}, after_id=1).asc_messages is None


@pytest.mark.parametrize(
    ("folder", "ascending"), [("d0b", False), ("d1", True), ("d1e", True), ("d2", True), ("d2b", True), ("d3", True)]
)
def test_message_pages_ascend_since_2_33(folder: str, ascending: bool) -> None:
    asked = (row for row in rows_of(folder) if "messages?after_id=" in row.get("rest", ""))
    told = {found.asc_messages for row in asked if (found := evidence_of(row)) is not None}
    assert told - {None} == {ascending}


@pytest.mark.parametrize(
    ("status", "text", "limits"),
    [
        pytest.param(200, None, True, id="there"),
        pytest.param(403, "Forbidden.", True, id="there, for others"),
        pytest.param(400, 'Invalid UUID "usage-limits".', False, id="fallen into the path of a chat"),
        pytest.param(404, "Route not found.", False, id="no such path"),
        pytest.param(404, None, None, id="not Coder's word"),
        pytest.param(403, None, None, id="a proxy's refusal"),
        pytest.param(400, "Bad request.", None, id="something else is wrong"),
        pytest.param(503, "Down.", None, id="away"),
    ],
)
def test_a_removed_collection_path_answers_400_not_404(status: int, text: str | None, limits: bool | None) -> None:
    assert limits_evidence(status, text).native_limits is limits


def test_limits_without_a_period_are_limits_too() -> None:
    """A user without a limit: no period, no limit, and dates of the year 1."""
    answers = [row for row in rows_of("d2b", "rest_surface") if "/usage-limits/status" in row.get("rest", "")]
    assert answers
    for row in answers:
        assert "period" not in json.loads(row["body"])
        assert limits_evidence(row["status"], said(row)).native_limits is True


@pytest.mark.parametrize(
    ("status", "text", "gateway"),
    [
        (200, None, "licensed"),
        (403, "Forbidden.", "unlicensed"),
        (404, "Route not found.", "absent"),
        (403, None, None),
        (404, None, None),
        (500, "No.", None),
    ],
)
def test_gateway_budgets(status: int, text: str | None, gateway: str | None) -> None:
    assert gateway_evidence(status, text).gateway == gateway


PART = '{"type":"message_part","chat_id":"c","message_part":{"role":"assistant","part":{"type":"text","text":"x"}'
RESET = '{"type":"preview_reset","chat_id":"c"}'
STATUS = '{"type":"status","chat_id":"c","status":{"status":"waiting"}}'


@pytest.mark.parametrize(
    ("text", "frame", "episodes", "revisions"),
    [
        pytest.param('{"type":"ping","data":null}\n', "envelope", None, None, id="greeting"),
        pytest.param('{"type":"data","data":[' + STATUS + "]}\n", "envelope", None, None, id="envelope"),
        pytest.param('{"type":"error","data":{"message":"no"}}', "envelope", None, None, id="envelope with an error"),
        pytest.param('{"kind":"created","chat":{}}\n', "raw", None, None, id="watch event"),
        pytest.param(STATUS, "raw", None, None, id="one event alone"),
        pytest.param("[" + STATUS + "]\n", "raw", None, None, id="a status tells nothing of episodes"),
        pytest.param(" \n[" + STATUS + "]", "raw", None, None, id="space before"),
        pytest.param("[" + PART + "}}]\n", "raw", False, None, id="a part without coordinates"),
        pytest.param(
            "[" + PART + ',"history_version":7,"generation_attempt":1,"seq":3}}]\n', "raw", True, None, id="a part with"
        ),
        pytest.param("[" + PART + "}}," + STATUS + "]\n", "raw", None, None, id="a part and more"),
        pytest.param("[" + STATUS + "," + RESET + "]\n", "raw", True, None, id="reset at the end"),
        pytest.param("[" + RESET + "," + STATUS + "]\n", "raw", True, None, id="reset at the beginning"),
        pytest.param('[{"type":"history_reset","chat_id":"c"},' + STATUS + "]", "raw", True, None, id="history reset"),
        pytest.param(
            '[{"type":"message","message":{"id":1,"role":"tool","content":[{"type":"tool-result","result":['
            + RESET
            + "]}]}}]\n",
            "raw",
            None,
            None,
            id="a tool's result that looks like a reset",
        ),
        pytest.param(
            "[" + STATUS.replace('"waiting"', '"waiting","history_version":18') + "]\n", "raw", None, True, id="version"
        ),
        pytest.param(
            "[" + STATUS.replace('"waiting"', '"waiting","history_version":18') + f",{RESET}]\n",
            "raw",
            True,
            True,
            id="version, then reset",
        ),
        pytest.param("<html>", None, None, None, id="no frame"),
        pytest.param("", None, None, None, id="empty"),
    ],
)
def test_frames(text: str, frame: str | None, episodes: bool | None, revisions: bool | None) -> None:
    found = frame_evidence(text)
    assert (found.frame, found.episodes, found.rev_cursor) == (frame, episodes, revisions)


@pytest.mark.parametrize(
    ("found", "of_chat", "enough"),
    [
        (Evidence(frame="envelope"), True, True),
        (Evidence(frame="raw"), True, False),
        (Evidence(frame="raw", episodes=False), True, True),
        (Evidence(frame="raw"), False, True),
        (Evidence(), False, False),
    ],
)
def test_frames_are_looked_at_until_they_have_told_all(found: Evidence, of_chat: bool, enough: bool) -> None:
    assert tells_all(found, of_chat=of_chat) is enough


def test_a_page_with_a_history_version_can_be_resumed_by_revision() -> None:
    assert page_evidence({"messages": [], "history_version": 0}).rev_cursor is True
    assert page_evidence({"messages": []}).rev_cursor is None


# --- the name --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "name"),
    [
        (Evidence(), Dialect.UNKNOWN),
        (Evidence(prefix="experimental", frame="envelope"), Dialect.UNKNOWN),
        (Evidence(frame="raw", episodes=True), Dialect.UNKNOWN),
        (Evidence(frame="raw", last_error="object"), Dialect.UNKNOWN),
        (Evidence(prefix="v2"), Dialect.D3GA),
        (Evidence(frame="envelope", read_marks=True, tree_list=True, sharing=True), Dialect.D0B),
        (Evidence(frame="raw", last_error="object", sharing=False), Dialect.D1E),
        (Evidence(frame="raw", episodes=False, last_error="object", sharing=True), Dialect.D1E),
        (Evidence(tree_list=True, sharing=True, native_limits=False), Dialect.D3),
    ],
)
def test_the_name_says_no_more_than_was_seen(seen: Evidence, name: Dialect) -> None:
    assert dialect_of(seen) is name


OLD, NEW = Evidence(prefix="experimental", frame="raw", last_error="string"), Evidence(prefix="v2")


def test_two_servers_that_answer_in_turn_are_mixed_for_a_while() -> None:
    witness = Witness()
    for at, found in enumerate([OLD, NEW, OLD]):
        witness.saw(found, float(at))
    assert witness.dialect(2.0) is Dialect.MIXED
    witness.saw(NEW, 3.0)
    assert witness.dialect(2.9 + MIXED_SECONDS) is Dialect.MIXED
    assert witness.dialect(3.0 + MIXED_SECONDS) is Dialect.D3GA


def test_an_upgrade_in_place_is_never_mixed() -> None:
    witness = Witness()
    for at, (found, name) in enumerate(
        [(OLD, Dialect.D1), (OLD, Dialect.D1), (NEW, Dialect.D3GA), (NEW, Dialect.D3GA)]
    ):
        witness.saw(found, float(at))
        assert witness.dialect(float(at)) is name


def test_a_server_put_back_long_after_is_not_mixed() -> None:
    witness = Witness()
    witness.saw(OLD, 0.0)
    witness.saw(NEW, 1.0)
    witness.saw(OLD, 2.0 + MIXED_SECONDS)
    assert witness.dialect(2.0 + MIXED_SECONDS) is Dialect.D1


def test_a_licence_that_comes_and_goes_is_one_server() -> None:
    witness = Witness()
    for at, gateway in enumerate(("licensed", "unlicensed", "licensed")):
        witness.saw(Evidence(prefix="v2", gateway=gateway), float(at))  # type: ignore[arg-type]
    assert witness.dialect(2.0) is Dialect.D3GA


def test_the_evidence_in_words_and_as_json() -> None:
    seen = Evidence(
        prefix="experimental", frame="raw", tree_list=True, episodes=True, native_limits=True, gateway="absent"
    )
    assert seen.words() == (
        "prefix experimental, bare frames, list of roots, episodes, native limits, AI Gateway budgets absent"
    )
    assert seen.to_json() == {
        "prefix": "experimental",
        "frame": "raw",
        "tree_list": True,
        "episodes": True,
        "native_limits": True,
        "gateway": "absent",
    }
    assert Evidence().words() == "nothing seen yet"
    assert Evidence(native_limits=False, tree_list=False).words() == "flat list, no native limits"
