"""The page about the library shows calls that exist."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from relay import codersdk
from relay.codersdk import CoderClient

PAGE = (Path(__file__).parent.parent.parent / "docs" / "codersdk.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def parsed(example: str) -> ast.AST:
    """An example, which may use await and speak of names that it does not make."""
    lines = "\n".join(f"    {line}" for line in example.splitlines())
    return ast.parse(f"async def example():\n{lines}\n    pass")


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_call_what_there_is(example: str) -> None:
    for node in ast.walk(parsed(example)):
        if isinstance(node, ast.ImportFrom) and node.module == "relay.codersdk":
            assert [each.name for each in node.names if not hasattr(codersdk, each.name)] == []
        if isinstance(node, ast.Call):
            names = [keyword.arg or "" for keyword in node.keywords]
            positional = [None] * len(node.args)
            match node.func:
                case ast.Attribute(value=ast.Name(id="coder"), attr=attribute):
                    call = getattr(CoderClient, attribute)
                    inspect.signature(call).bind(None, *positional, **dict.fromkeys(names))
                case ast.Name(id=name) if inspect.isclass(kind := getattr(codersdk, name, None)):
                    assert set(names) <= set(getattr(kind, "model_fields", names))


def test_every_call_is_shown_or_listed() -> None:
    listed = (Path(__file__).parent.parent.parent / "docs" / "codersdk-symbols.md").read_text()
    calls = [name for name, _ in inspect.getmembers(CoderClient, inspect.isfunction) if not name.startswith("_")]
    missing = [name for name in calls if f"`{name}`" not in PAGE and f".{name}" not in PAGE + listed]
    assert missing == ["aclose"]
