"""The first line and the headers of a request, where the vectors do not look."""

import pytest

from relay.codersdk import InvalidRequest
from relay.codersdk.urls import content_disposition, header_value, is_json, quoted, request_target


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/a/b", "/a/b"),
        ("/a/../b", "/b"),
        ("/a/../../../b", "/b"),
        ("/..//a", "/a"),
        ("/a/.", "/a/"),
        ("/a/..", "/"),
        ("/a/./b//c", "/a/b//c"),
        ("/a?b=../c", "/a?b=../c"),
        ("/a b?c d=é", "/a%20b?c%20d=%C3%A9"),
        ("/a!é", "/a%21%C3%A9"),
        ("/a!%c3", "/a!%c3"),
        ("/a#b?c", "/a"),
        ("/a?", "/a?"),
    ],
)
def test_paths_become_targets(path: str, target: str) -> None:
    assert request_target(path) == target


@pytest.mark.parametrize("path", ["/%", "/%zz", "/a#%4", "/a\x00", "/a\x7f", "/\ud800"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest):
        request_target(path)


def test_headers_hold_no_line_end() -> None:
    assert header_value(" \té ") == "é".encode()
    for wrong in ("a\nb", "a\rb", "a\x00b", "\x7f"):
        with pytest.raises(InvalidRequest):
            header_value(wrong)


@pytest.mark.parametrize(
    ("content_type", "is_so"),
    [
        ("application/json", True),
        (" application/json ;x", True),
        ("Application/JSON; a=b; c=\"d;\\\"e\"", True),
        ("Application/JSON; a=b;", True),
        ("Application/JSON; a=b; a=c", False),
        ("Application/JSON; a", False),
        ('Application/JSON; a="b', False),
        ("application/problem+json", False),
        ("", False),
    ],
)  # fmt: skip
def test_what_counts_as_json(content_type: str, is_so: bool) -> None:
    assert is_json(content_type) is is_so


def test_names_of_files() -> None:
    assert content_disposition("a b.txt") == 'attachment; filename="a b.txt"'
    assert content_disposition("\udcff") == "attachment; filename*=utf-8''%FF"


def test_quotes_are_go_s() -> None:
    assert quoted('a"\\\n\x01é\u200b\U000e0001\udcff') == '"a\\"\\\\\\n\\x01é\\u200b\\U000e0001\\xff"'
