"""What every type of the API has in common: pydantic outside, Go's JSON inside."""

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self, TypeVar, cast

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    SerializationInfo,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from relay.codersdk.codec import Codec, Reader, codec_of, write_string
from relay.codersdk.errors import InvalidJSON
from relay.codersdk.json_text import SPACE, as_text, check_depth, end_of_value, found, read_key, skip_space
from relay.codersdk.raw_json import RawJSON

T = TypeVar("T")

OMIT_EMPTY: Final = object()
"""Marks a field that is left out of the JSON when it is false, 0, "", empty or None. Go: the tag `omitempty`."""

Omit = Annotated[T, OMIT_EMPTY]


@dataclass(frozen=True, slots=True)
class Since:
    """Marks a field that the Go SDK at the seed does not have: `version` of the server that first sends or takes it.

    An older server leaves it out, and so does our JSON while it is empty: the seed's own bytes stay what they are.
    """

    version: str


Int32 = Annotated[int, Field(strict=True, ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
Float64 = Annotated[float, AllowInfNan(False)]


_Unknown = Annotated[RawJSON, AfterValidator(lambda raw: raw or RawJSON("null"))]


@dataclass(frozen=True, slots=True)
class _Field:
    name: str  # of the attribute
    key: str
    codec: Codec
    prefix: str  # `"key":`
    is_empty: Callable[[Any], bool] | None  # when the key is left out; None: never


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one type is read and written."""

    fields: tuple[_Field, ...]
    by_key: dict[str, tuple[str, Reader]]  # name of the attribute, how its value is read
    also_read: dict[str, Codec]  # keys of an older version, by which `_take_old_keys` fills today's fields
    zeros: dict[str, Any]  # the attributes of an empty value,
    made_anew: tuple[tuple[str, Callable[[], Any]], ...]  # and those of them that no two values may share


class CoderModel(BaseModel):
    """A JSON object of the API, read and written exactly as the Go SDK does it, but for two things.

    A field that this version does not know stays: `model_extra` has it as `RawJSON`, and it is written again. Keys are
    matched exactly, Go also takes them in other cases. `model_validate_json` and `model_dump_json` are exact to the
    last digit; pydantic's other ways in and out (`model_validate`, `model_dump`) go through Python's values.
    """

    model_config = ConfigDict(
        extra="allow",
        validate_assignment=True,
        validate_by_name=True,
        validate_by_alias=True,
        defer_build=True,
        hide_input_in_errors=True,  # it may be a key, or what somebody wrote
    )
    if not TYPE_CHECKING:  # a type checker would take it for an argument of the constructor
        __pydantic_extra__: dict[str, _Unknown]

    # Keys of an older version of the API: read, never written.
    _old_keys: ClassVar[dict[str, Any]] = {}

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Read one JSON value; `null` gives an empty object. pydantic's `options` are not used.

        Raises:
            InvalidJSON: It is no JSON, or a value has the wrong type or does not fit. It is a ValueError.
        """
        return read_json(cls, json_data)

    def model_dump_json(self, **options: Any) -> str:
        """Compact JSON, keys in the order of the API, unknown ones last. pydantic's `options` are not used.

        Raises:
            ValueError: A value has no text in JSON, e.g. a time with an offset of 24 hours.
        """
        return _write_model(self)

    def _take_old_keys(self, found: dict[str, Any]) -> None:
        """Called after reading with what `_old_keys` held, when there was any of them."""

    @classmethod
    def json_codec(cls) -> Codec:
        return Codec(_reader_of(cls), _write_model, lambda: _empty(cls))

    @model_validator(mode="before")
    @classmethod
    def _null_changes_nothing(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            return {key: value for key, value in data.items() if value is not None or not _has_zero(cls, key)}
        return data

    @model_serializer(mode="wrap")
    def _dump(self, handler: Callable[[Any], Any], info: SerializationInfo) -> Any:
        return json.loads(_write_model(self)) if info.mode == "json" else handler(self)


Model = TypeVar("Model", bound=CoderModel)


# --- reading -------------------------------------------------------------------------------------------------------


def read_json(kind: type[T], data: str | bytes | bytearray | memoryview, *, only_first: bool = False) -> T:
    """Read JSON as a type: a model, or a list of models (`list[Chat]`).

    Args:
        kind: The type.
        data: The text; bytes are UTF-8.
        only_first: Do not look at what follows the first value, as the Go SDK reads the server's answers.

    Raises:
        InvalidJSON: It is no JSON, or a value has the wrong type or does not fit.
    """
    text = as_text(data)
    codec = _codec_of(kind)
    try:
        index = skip_space(text, 0)
        value, end = codec.read(text, index, codec.zero())
    except IndexError as exc:
        raise InvalidJSON("unexpected end of JSON input") from exc
    if not only_first and text[end:].strip(SPACE):
        raise InvalidJSON(f"expected the end at character {end}, found {found(text, end)}")
    check_depth(text if end == len(text) else text[:end])
    return cast(T, value)


@cache
def _cached_codec(kind: Hashable) -> Codec:
    return codec_of(kind)


def _codec_of(kind: Any) -> Codec:
    return _cached_codec(cast(Hashable, kind))


@cache
def _plan(kind: type[CoderModel]) -> _Plan:
    fields = []
    for name, info in kind.model_fields.items():
        codec = codec_of(info.annotation, tuple(info.metadata))
        key = info.serialization_alias or name
        fields.append(_Field(name, key, codec, f"{write_string(key)}:", _emptiness(info, codec)))
    by_key = {field.key: (field.name, field.codec.read) for field in fields}
    also_read = {key: codec_of(annotation) for key, annotation in kind._old_keys.items()}
    zeros = {field.name: field.codec.zero() for field in fields}
    made_anew = tuple(
        (field.name, field.codec.zero) for field in fields if isinstance(zeros[field.name], (list, dict, CoderModel))
    )
    return _Plan(tuple(fields), by_key, also_read, zeros, made_anew)


def _emptiness(info: FieldInfo, codec: Codec) -> Callable[[Any], bool] | None:
    if OMIT_EMPTY not in info.metadata:
        return None
    if codec.zero() is None:  # a pointer: a zero or an empty list behind it is written
        return lambda value: value is None
    return lambda value: not value


def _empty(kind: type[Model]) -> Model:
    plan = _plan(kind)
    values = plan.zeros.copy()
    for name, make in plan.made_anew:
        values[name] = make()
    # What pydantic's model_construct does, without its search for aliases and defaults.
    model = kind.__new__(kind)
    object.__setattr__(model, "__dict__", values)
    object.__setattr__(model, "__pydantic_fields_set__", set())
    object.__setattr__(model, "__pydantic_extra__", {})
    object.__setattr__(model, "__pydantic_private__", None)
    return model


def _unknown_of(model: CoderModel) -> dict[str, RawJSON]:
    return cast(dict[str, RawJSON], model.__pydantic_extra__)


def _has_zero(kind: type[CoderModel], key: str) -> bool:
    return any(key in {field.name, field.key} and field.codec.zero() is not None for field in _plan(kind).fields)


def _reader_of(kind: type[CoderModel]) -> Reader:
    def read(text: str, index: int, current: CoderModel) -> tuple[CoderModel, int]:
        if text[index] != "{":
            if text.startswith("null", index):
                return current, index + 4
            raise InvalidJSON(f"expected an object at character {index}, found {found(text, index)}")
        plan = _plan(kind)
        by_key, values, unknown = plan.by_key, current.__dict__, _unknown_of(current)
        set_fields = current.__pydantic_fields_set__
        old: dict[str, Any] = {}
        index += 1
        while text[index] in SPACE:
            index += 1
        if text[index] == "}":
            return current, index + 1
        while True:
            key, index = read_key(text, index)
            field = by_key.get(key)
            if field is not None:
                name, read_value = field
                values[name], index = read_value(text, index, values[name])
                set_fields.add(name)
            elif key in plan.also_read:
                old[key], index = plan.also_read[key].read(text, index, old.get(key))
            else:
                end = end_of_value(text, index)
                unknown[key] = RawJSON.unchecked(text[index:end])
                index = end
            while (char := text[index]) in SPACE:
                index += 1
            if char == "}":
                break
            if char != ",":
                raise InvalidJSON(f"expected ',' or '}}' at character {index}, found {found(text, index)}")
            index += 1
            while text[index] in SPACE:
                index += 1
        if old:
            current._take_old_keys(old)
        return current, index + 1

    return read


# --- writing -------------------------------------------------------------------------------------------------------


def _write_model(model: CoderModel) -> str:
    values = model.__dict__
    parts = []
    for field in _plan(type(model)).fields:
        value = values[field.name]
        if field.is_empty is None or not field.is_empty(value):
            parts.append(field.prefix + field.codec.write(value))
    parts += [f"{write_string(key)}:{raw}" for key, raw in _unknown_of(model).items()]
    return "{" + ",".join(parts) + "}"


def write_json(value: Any, kind: Any = None) -> str:
    """JSON of a model, or of a list of them when `kind` says so (`list[Chat]`)."""
    return _codec_of(kind or type(value)).write(value)
