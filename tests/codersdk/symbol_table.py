"""Which symbol of the Go SDK is which of ours, found in the code: docstrings name what they port.

`python -m tests.codersdk.symbol_table` writes the page in `docs/` anew.
"""

import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from relay import codersdk
from relay.codersdk import CoderClient, CoderModel, OpenEnum, Since

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "codersdk-symbols.md"
_PORTED = re.compile(r"Go:\s+`codersdk\.([\w.]+)`")

HEAD = """# Go SDK symbols in `relay.codersdk`

Every exported symbol of `codersdk/chats.go` (Coder at commit ff8dcca) and where it is in Python. Made from the code:
`python -m tests.codersdk.symbol_table` writes it anew. Fields of types have the names of their JSON keys, but for
`model_config` (`call_config`) and `providerOptions` (`provider_options`).
"""

ADDED = """## Not in the Go SDK at that commit

What later servers send and take. It is left out of our JSON while it is empty. 2.38 is an estimate.
"""


@cache
def seed() -> dict[str, Any]:
    """The exported symbols of the Go file."""
    symbols: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "seed-symbols.json").read_text())
    return symbols


def _documented() -> Iterator[tuple[str, Any]]:
    """Everything public that has a docstring, the client's calls first, with the name by which it is reached."""
    # A private method shows as its class: it works when that is read.
    for name in sorted(codersdk.__all__, key=lambda each: (each != "CoderClient", each)):
        value = getattr(codersdk, name)
        if inspect.isclass(value) and value.__name__ != name:
            continue  # an older name of it
        yield name, value
        if inspect.isclass(value):
            for member_name, member in vars(value).items():
                yield (name if member_name.startswith("_") else f"{name}.{member_name}"), member


@cache
def ported() -> dict[str, str]:
    """Go's name to ours, as the docstrings have it."""
    found: dict[str, str] = {}
    for name, value in _documented():
        for match in _PORTED.finditer(getattr(value, "__doc__", None) or ""):
            found.setdefault(match.group(1), name)
    aliases = seed()["aliases"].items()
    return found | {old: old for old, new in aliases if getattr(codersdk, old, None) is getattr(codersdk, new)}


def of_constant(constant: dict[str, Any]) -> str | None:
    """The member of an enum that stands for a constant, or the constant of the same words."""
    if constant["type"] is None:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", constant["name"]).upper()
        return name if getattr(codersdk, name, None) == constant["value"] else None
    enum: type[OpenEnum] = getattr(codersdk, constant["type"])
    member = enum(constant["value"])
    return f"{constant['type']}.{member.name}" if member.is_known else None


def symbols() -> dict[str, dict[str, str | None]]:
    """Every exported symbol of the Go file by its kind, with ours, or None where there is none."""
    types = [each["name"] for each in seed()["types"]] + list(seed()["aliases"])
    return {
        "Calls": {name: ported().get(name) for name in seed()["methods"] if name.startswith("Client.")},
        "Functions": {name: ported().get(name) for name in seed()["functions"]},
        "Methods of types": {name: ported().get(name) for name in seed()["methods"] if not name.startswith("Client.")},
        "Types": {name: ported().get(name) for name in types},
        "Constants": {each["name"]: of_constant(each) for each in seed()["constants"]},
    }


_SINCE = re.compile(r"Since (2\.\d+)")


def added() -> Iterator[tuple[str, str]]:
    """What the Go SDK at the seed does not have, with the server version that has it first: `Chat.labels`, `2.32`."""
    for name in sorted(codersdk.__all__):
        value = getattr(codersdk, name)
        if not inspect.isclass(value) or value.__name__ != name:
            continue
        whole = _SINCE.search(value.__doc__ or "")
        if whole and issubclass(value, CoderModel | OpenEnum):
            yield name, whole.group(1)
        elif issubclass(value, CoderModel):
            for field, info in value.model_fields.items():
                yield from ((f"{name}.{field}", each.version) for each in info.metadata if isinstance(each, Since))
        elif issubclass(value, OpenEnum):
            yield from ((f"{name}.{member.name}", member.since) for member in value if member.since)
    for call, function in inspect.getmembers(CoderClient, inspect.isfunction):
        said = re.search(r"\. Since (2\.\d+)", (function.__doc__ or "").partition("Args:")[0])
        if said:
            yield f"CoderClient.{call}", said.group(1)


def page() -> str:
    parts = [HEAD]
    for title, table in symbols().items():
        lines = [f"| `{go}` | `{python}` |" for go, python in table.items()]
        parts.append("\n".join([f"## {title}", "", "| Go | Python |", "|---|---|", *lines, ""]))
    lines = [f"| `{name}` | {version} |" for name, version in added()]
    parts.append("\n".join([ADDED, "| Python | servers from |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
