"""docs/metrics.md is what the code declares."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
KINDS = ("Counter", "Gauge", "Histogram", "Summary", "Info", "Enum")


def test_the_page_is_what_the_code_makes() -> None:
    """In a process of its own: what other tests have counted does not show."""
    program = "from relay.contract import contract; contract(['metrics'])"
    made = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert made.stdout.decode() == PAGE, 'make it anew: "make contract"'


def declared() -> Iterator[str]:
    """The first argument of every call that makes a metric, wherever in the package it stands."""
    for file in sorted((ROOT / "relay").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id=kind), args=[ast.Constant(value=str(name)), *_]) if kind in KINDS:
                    yield name


def test_no_metric_is_left_out() -> None:
    names = list(declared())
    assert len(names) > 30
    assert [name for name in names if f"| `{name}` |" not in PAGE] == []


def test_metrics_are_named_and_explained_as_promised() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(rows) == len(set(declared()))
    for name, kind, labels, help_text in rows:
        assert name.startswith("| `relay_")
        assert name.endswith("_total`") == (kind == "counter")
        assert help_text.strip(" |")
        assert "chat_id" not in labels
