"""The table of promises names tests that are there and run."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/reliability.md").read_text()
ROWS = re.findall(r"^\| (\d+|–) \| (.+?) \| (`tests/.+`) \|$", PAGE, re.MULTILINE)
NAMED = {test for _, _, tests in ROWS for test in re.findall(r"`(tests/[^`]+)`", tests)}
# 14 (a node lost while it dead-letters) needs a cluster; 22, 23 and 25 to 27 are of the meter and the archivist.
NUMBERS = [*range(1, 14), *range(15, 22), 24, 28, 29]


@cache
def found_in(file: str) -> dict[str, str]:
    """The tests that pytest collects from a file: their names, and what stands above them."""
    assert re.fullmatch(r"tests/(\w+/)?test_\w+\.py", file), f"pytest does not look into {file}"
    tree = ast.parse((ROOT / file).read_text())
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {
        function.name: " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
        for function in functions
        if function.name.startswith("test_")
    }


def test_every_promise_has_its_tests() -> None:
    assert [int(number) for number, _, _ in ROWS if number != "–"] == NUMBERS
    assert PAGE.count("| `tests/") == len(ROWS), "a row is not read"


@pytest.mark.parametrize("test", sorted(NAMED))
def test_every_test_that_is_named_runs(test: str) -> None:
    file, _, name = test.partition("::")
    assert name in found_in(file), "there is no such test"
    assert not re.search(r"\bmark\.(skip|xfail)\b", found_in(file)[name])


def test_no_test_of_a_promise_is_left_out_of_the_table() -> None:
    files = [f"tests/reliability/{path.name}" for path in sorted((ROOT / "tests/reliability").glob("test_*.py"))]
    there = {f"{file}::{name}" for file in files for name in found_in(file)}
    assert there - NAMED == set()
