"""The golden vectors: what the Go SDK returned, sent and printed. `tests/data/goldens/README.md` tells their form.

`CODERSDK_GOLDENS=DIR` runs the same tests over other vectors of the same form.
"""

import base64
import json
import os
from collections.abc import Iterable, Mapping
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from relay import codersdk
from relay.codersdk import CoderModel, InvalidJSON, read_json, write_json

COMMITTED = Path(__file__).parent.parent / "data" / "goldens"
GOLDENS = Path(os.environ.get("CODERSDK_GOLDENS", COMMITTED))

Row = dict[str, Any]


@cache
def rows(name: str) -> list[Row]:
    """The lines of `<name>.jsonl`; each also has its number, from 1, under `line`."""
    text = (GOLDENS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [
        json.loads(line, parse_int=_integer) | {"line": number}
        for number, line in enumerate(text.split("\n"), 1)
        if line
    ]


def _integer(digits: str) -> int | float:
    return -0.0 if digits == "-0" else int(digits)  # Go's negative zero


def type_named(name: str) -> Any:
    """The Python type of a Go type: `Chat`, `[]Chat` (which can be null)."""
    if name.startswith("[]"):
        return list[type_named(name[2:])] | None  # type: ignore[misc]
    return getattr(codersdk, name)


def source(row: Mapping[str, Any], key: str) -> str | bytes | None:
    """The text under `key`, or the bytes under `<key>_b64`."""
    if f"{key}_b64" in row:
        return base64.b64decode(row[f"{key}_b64"])
    value: str | None = row.get(key)
    return value


def as_bytes(row: Mapping[str, Any], key: str) -> bytes:
    value = source(row, key) or b""
    return value.encode() if isinstance(value, str) else value


def as_str(row: Mapping[str, Any], key: str) -> str:
    """As `source`, with bytes that are no UTF-8 as Python's lone surrogates."""
    value = source(row, key) or ""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def value_of(text: str) -> Any:
    """A JSON text as a value in which numbers are exact and true is not 1."""
    return _marked(json.loads(text, parse_float=Decimal))


def _marked(value: Any) -> Any:
    if isinstance(value, bool):
        return ("boolean", value)
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    return value


def without_unknown(value: Any) -> Any:
    """The same value without the fields that this version does not know: Go drops them."""
    if isinstance(value, list):
        return [without_unknown(item) for item in value]
    if isinstance(value, CoderModel):
        bare = value.model_copy()
        bare.__pydantic_extra__ = {}
        for name in type(value).model_fields:
            bare.__dict__[name] = without_unknown(getattr(value, name))
        return bare
    return value


class Digits(str):
    """A number as it stands in the text."""

    __slots__ = ()


Pairs = list[tuple[str, Any]]


class Members(Pairs):
    """An object as its pairs, in order, repeated keys and all."""


def members(text: str) -> Any:
    """A JSON text as a tree that can be written again without loss; None when it is no JSON."""
    try:
        return json.loads(text, parse_int=Digits, parse_float=Digits, object_pairs_hook=Members)
    except ValueError:
        return None


def written(tree: Any) -> str:
    if isinstance(tree, Members):
        return "{" + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return str(tree) if isinstance(tree, Digits) else json.dumps(tree)


UNWRITABLE = "cannot be written"


def decoded(type_name: str, text: str | bytes, *, only_first: bool = False) -> str | None:
    """What a text is read and written as, unknown fields left out; None where it is refused."""
    try:
        value = read_json(type_named(type_name), text, only_first=only_first)
    except InvalidJSON:
        return None
    try:
        return write_json(without_unknown(value), type_named(type_name))
    except ValueError:
        return UNWRITABLE


def go_decoded(row: Row) -> str | None:
    """What Go made of the text of a `decode` vector, in the words of `decoded`."""
    if "marshal_error" in row:
        return UNWRITABLE
    output: str | None = row["output"] if row["ok"] else None
    return output


def same_json(got: str | None, wanted: str | None) -> bool:
    if got == wanted:
        return True
    if got is None or wanted is None or UNWRITABLE in {got, wanted}:
        return False
    try:
        return bool(value_of(got) == value_of(wanted))
    except RecursionError:  # too deep for Python's parser, and then there is no space in it
        return False


def report(failures: Iterable[tuple[Row, str]]) -> None:
    """Fail with the first few of them, if there are any."""
    failed = list(failures)
    shown = "\n".join(f"line {row['line']}: {what[:1200]}" for row, what in failed[:5])
    assert not failed, f"{len(failed)} vectors differ, such as\n{shown}"
