"""Nothing of the Go SDK's file is left out: no symbol, no field, no tag."""

from typing import Any, Union, get_args, get_origin
from uuid import UUID

import pytest
from pydantic import JsonValue

from relay import codersdk
from relay.codersdk import ChatLastError, CoderModel, OpenEnum, RawJSON, Since, Timestamp
from relay.codersdk.codec import bounds_of
from relay.codersdk.model import OMIT_EMPTY
from tests.codersdk import symbol_table
from tests.codersdk.calls import snake
from tests.codersdk.symbol_table import seed


@pytest.mark.parametrize("kind", symbol_table.symbols())
def test_every_exported_symbol_is_there(kind: str) -> None:
    table = symbol_table.symbols()[kind]
    assert table
    assert [go for go, python in table.items() if python is None] == []


@pytest.mark.parametrize("kind", symbol_table.symbols())
def test_no_two_symbols_are_the_same_one(kind: str) -> None:
    ours = list(symbol_table.symbols()[kind].values())
    assert len(set(ours)) == len(ours)


def test_the_page_is_up_to_date() -> None:
    assert symbol_table.PAGE.read_text() == symbol_table.page(), "run: python -m tests.codersdk.symbol_table"


def go_type(annotation: Any, bounds: tuple[Any, ...], *, omitted: bool) -> str:
    """The Go type that a field's type stands for."""
    if hasattr(annotation, "__metadata__"):
        return go_type(annotation.__origin__, annotation.__metadata__, omitted=omitted)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Union or type(annotation).__name__ == "UnionType":
        inner = go_type(next(each for each in arguments if each is not type(None)), bounds, omitted=omitted)
        return inner if inner.startswith("[]") and not omitted else f"*{inner}"
    if origin is list:
        return f"[]{go_type(arguments[0], (), omitted=omitted)}"
    if origin is dict:
        return f"map[string]{go_type(arguments[1], (), omitted=omitted)}"
    if annotation is int:
        return f"int{bounds_of(bounds)[1].bit_length() + 1}"
    if annotation is JsonValue:
        return "any"
    names: dict[Any, str] = {
        str: "string",
        bool: "bool",
        float: "float64",
        bytes: "[]byte",
        UUID: "uuid.UUID",
        Timestamp: "time.Time",
        RawJSON: "json.RawMessage",
        ChatLastError: "string",  # and since 2.34 an object
    }
    if annotation in names:
        return names[annotation]
    return "decimal.Decimal" if annotation.__name__ == "Decimal" else str(annotation.__name__)


def fields_of(model: type[CoderModel]) -> list[tuple[str, str, bool]]:
    """Key, Go type and omitempty of every field that is not of a later server."""
    found = []
    for name, info in model.model_fields.items():
        if any(isinstance(each, Since) for each in info.metadata):
            continue
        omitted = OMIT_EMPTY in info.metadata
        key = info.serialization_alias or name
        found.append((key, go_type(info.annotation, tuple(info.metadata), omitted=omitted), omitted))
    return found


def fields_of_go(name: str, types: dict[str, Any]) -> list[tuple[str, str, bool]]:
    struct = types[name]
    # Two types that come from other files of the SDK.
    elsewhere = {"Response": fields_of(codersdk.Response), "Pagination": fields_of(codersdk.Pagination)}
    found: list[tuple[str, str, bool]] = []
    for embedded in struct["embeds"]:
        found += elsewhere.get(embedded) or fields_of_go(embedded, types)
    go_only = {"int": "int64", "uuid.NullUUID": "*uuid.UUID"}
    for each in struct["fields"]:
        key = each["key"] or snake(each["name"])  # options of a call have no keys
        omitted = each["omitempty"] and each["type"] != "uuid.NullUUID"  # a struct, which Go never leaves out
        found.append((key, go_only.get(each["type"], each["type"]), omitted))
    return found


TYPES = {each["name"]: each for each in seed()["types"]}


@pytest.mark.parametrize("name", [name for name, each in TYPES.items() if each["kind"] == "struct"])
def test_every_field_has_go_s_key_type_and_tag(name: str) -> None:
    wanted = fields_of_go(name, TYPES)
    assert fields_of(getattr(codersdk, name)) == wanted


@pytest.mark.parametrize("name", [name for name, each in TYPES.items() if each["kind"] == "string"])
def test_every_type_of_words_is_an_open_enum(name: str) -> None:
    assert issubclass(getattr(codersdk, name), OpenEnum)
