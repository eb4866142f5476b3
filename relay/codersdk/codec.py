"""How a value of each type is read from JSON text and written to it, by the rules of Go's `encoding/json`.

A reader also gets the value that is there already: null leaves a plain value alone, and an object or an array that
comes a second time is read into the first one, as Go does it.
"""

import base64
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from decimal import Decimal
from json import JSONDecodeError, JSONDecoder
from json.encoder import encode_basestring
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin
from uuid import UUID

from pydantic import Field, JsonValue
from pydantic.fields import FieldInfo

from relay.codersdk.enums import OpenEnum
from relay.codersdk.errors import InvalidJSON
from relay.codersdk.json_text import (
    SPACE,
    end_of_value,
    found,
    read_integer,
    read_key,
    read_number,
    read_string,
    refuse_constant,
    skip_space,
    without_surrogates,
)
from relay.codersdk.raw_json import RawJSON
from relay.codersdk.timestamp import ZERO_TIME, Timestamp

Reader = Callable[[str, int, Any], tuple[Any, int]]
Writer = Callable[[Any], str]

NIL_UUID = UUID(int=0)
"""00000000-0000-0000-0000-000000000000: an id that was never set."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One type's way in and out of JSON text."""

    read: Reader
    write: Writer
    zero: Callable[[], Any]  # what the field holds when its key never came


def codec_of(annotation: Any, metadata: tuple[Any, ...] = ()) -> Codec:
    """The codec of a field's type.

    Raises:
        TypeError: There is none for such a type.
    """
    origin = get_origin(annotation)
    if hasattr(annotation, "__metadata__"):
        return codec_of(annotation.__origin__, (*annotation.__metadata__, *metadata))
    if origin in {Union, UnionType}:
        (inner,) = (argument for argument in get_args(annotation) if argument is not NoneType)
        return _pointer(codec_of(inner, metadata))
    if origin is list:
        return _slice(codec_of(get_args(annotation)[0]))
    if origin is dict:
        return _map(codec_of(get_args(annotation)[1]))
    if annotation is int:
        return _integer(metadata)
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if isinstance(annotation, type) and issubclass(annotation, OpenEnum):
        return _enum(annotation)
    codec = getattr(annotation, "json_codec", None)
    if codec is None:
        raise TypeError(f"no way to read and write {annotation}")
    return codec()  # type: ignore[no-any-return]


def _is_null(text: str, index: int) -> bool:
    return text[index] == "n" and text.startswith("null", index)


def _unexpected(wanted: str, text: str, index: int) -> InvalidJSON:
    return InvalidJSON(f"expected {wanted} at character {index}, found {found(text, index)}")


# --- plain values --------------------------------------------------------------------------------------------------


def _read_string(text: str, index: int, current: str) -> tuple[str, int]:
    if text[index] == '"':
        return read_string(text, index)
    if _is_null(text, index):
        return current, index + 4
    raise _unexpected("a string", text, index)


def _read_boolean(text: str, index: int, current: bool) -> tuple[bool, int]:
    if text.startswith("true", index):
        return True, index + 4
    if text.startswith("false", index):
        return False, index + 5
    if _is_null(text, index):
        return current, index + 4
    raise _unexpected("a boolean", text, index)


def bounds_of(metadata: Iterable[Any]) -> tuple[int, int]:
    """The lowest and the highest value of an integer's type, from what pydantic keeps of it."""
    flat: list[Any] = []
    for each in metadata:
        flat += each.metadata if isinstance(each, FieldInfo) else [each]
    lowest = next(each.ge for each in flat if hasattr(each, "ge"))
    return int(lowest), int(next(each.le for each in flat if hasattr(each, "le")))


def _integer(metadata: tuple[Any, ...]) -> Codec:
    lowest, highest = bounds_of(metadata)

    def read(text: str, index: int, current: int) -> tuple[int, int]:
        if _is_null(text, index):
            return current, index + 4
        value, end = read_integer(text, index)
        if not lowest <= value <= highest:
            raise InvalidJSON(f"the integer at character {index} is not within {lowest}…{highest}")
        return value, end

    return Codec(read, int.__repr__, int)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise InvalidJSON("a number is too large")
    return value


def _read_float(text: str, index: int, current: float) -> tuple[float, int]:
    if _is_null(text, index):
        return current, index + 4
    digits, end = read_number(text, index)
    return _finite(digits), end


def write_float(value: float) -> str:
    """The shortest digits that read back equal, in Go's form.

    Raises:
        ValueError: JSON has no text for infinity and for "not a number".
    """
    if not math.isfinite(value):
        raise ValueError(f"JSON cannot hold {value}")
    digits = repr(float(value))
    if value == 0 or 1e-6 <= abs(value) < 1e21:
        return format(Decimal(digits), "f").removesuffix(".0")
    return digits.removesuffix(".0").replace("e-0", "e-")


def _read_uuid(text: str, index: int, current: UUID) -> tuple[UUID, int]:
    if _is_null(text, index):
        return current, index + 4
    if text[index] != '"':
        raise _unexpected("a UUID", text, index)
    written, end = read_string(text, index)
    return parse_uuid(written), end


_UUID = re.compile(r"([0-9a-fA-F]{8})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{4})-([0-9a-fA-F]{12})")


def parse_uuid(text: str) -> UUID:
    """A UUID in any of Go's forms: plain, `urn:uuid:…`, with a character on each side (braces), or 32 hex digits.

    Raises:
        ValueError: It has none of these forms.
    """
    data = text.encode("utf-8", "replace")
    if len(data) == 45 and data[:9].lower() == b"urn:uuid:":
        data = data[9:]
    elif len(data) == 38:
        data = data[1:37]
    plain = data.decode("latin-1")
    if len(plain) == 36 and _UUID.fullmatch(plain):
        return UUID(plain)
    if len(data) == 32 and re.fullmatch(r"[0-9a-fA-F]{32}", plain):
        return UUID(plain)
    raise InvalidJSON(f"not a UUID: {text[:64]!r}")


def _source_of(text: str, index: int) -> tuple[str, int]:
    """The source text of the value at `index`, and the index behind it."""
    end = end_of_value(text, index)
    return text[index:end], end


def _read_timestamp(text: str, index: int, current: Timestamp) -> tuple[Timestamp, int]:
    if _is_null(text, index):
        return current, index + 4
    source, end = _source_of(text, index)
    if source[0] != '"':
        raise _unexpected("a time", text, index)
    try:
        return Timestamp.parse(source[1:-1]), end  # what is between the quotes, with no escape undone: so does Go
    except ValueError as exc:
        raise InvalidJSON(str(exc)) from exc


_DECIMAL = re.compile(r"([^eE]*)(?:[eE]([+-]?[0-9]+))?")
_DIGITS = re.compile(r"[+-]?[0-9]+")
_INT32 = 1 << 31


def parse_decimal(text: str) -> Decimal:
    """A decimal number, exactly. Go: `decimal.NewFromString`.

    Raises:
        ValueError: The text is no number, or its exponent does not fit into 32 bits.
    """
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise InvalidJSON(f"not a decimal: {text[:64]!r}")
    whole, _, fraction = match.group(1).partition(".")
    digits, exponent_digits = whole + fraction, match.group(2) or "0"
    if "." in fraction or not _DIGITS.fullmatch(digits) or len(exponent_digits.lstrip("+-0")) > 10:
        raise InvalidJSON(f"not a decimal: {text[:64]!r}")
    written = int(exponent_digits)
    exponent = written - len(fraction)
    if not (-_INT32 <= written < _INT32 and -_INT32 <= exponent < _INT32):
        raise InvalidJSON(f"the exponent is too large: {text[:64]!r}")
    number = Decimal(digits).as_tuple()
    return Decimal((number.sign if any(number.digits) else 0, number.digits, exponent))


def _read_decimal(text: str, index: int, current: Decimal) -> tuple[Decimal, int]:
    if _is_null(text, index):
        return current, index + 4
    source, end = _source_of(text, index)
    # Quotes are taken off, escapes stay: so does Go.
    return parse_decimal(source[1:-1] if source[0] == '"' and len(source) > 2 else source), end


def write_decimal(value: Decimal) -> str:
    """A JSON string without exponent and without zeros at the end of the fraction.

    Raises:
        ValueError: It is infinite, or not a number.
    """
    if not value.is_finite():
        raise ValueError(f"JSON cannot hold {value}")
    written = format(value, "f")
    if "." in written:
        written = written.rstrip("0").removesuffix(".")
    return '"0"' if written in {"", "-0", "-"} else f'"{written}"'


_BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def _read_bytes(text: str, index: int, current: bytes) -> tuple[bytes, int]:
    if _is_null(text, index):
        return b"", index + 4
    if text[index] == "[":
        numbers, end = _BYTE_NUMBERS.read(text, index, list(current))
        return bytes(numbers), end
    if text[index] != '"':
        raise _unexpected("base64", text, index)
    written, end = read_string(text, index)
    written = written.replace("\r", "").replace("\n", "")
    if not _BASE64.fullmatch(written):
        raise InvalidJSON(f"the string at character {index} is not base64")
    return base64.b64decode(written), end


def _write_bytes(value: bytes) -> str:
    return f'"{base64.b64encode(value).decode()}"'


def _read_raw(text: str, index: int, current: RawJSON) -> tuple[RawJSON, int]:
    source, end = _source_of(text, index)
    return RawJSON.unchecked(source), end


def write_string(value: str) -> str:
    written = encode_basestring(value)
    if written.isascii():
        return written
    return written.replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")  # as Go: some readers end a line there


def _exact_integer(digits: str) -> int | float:
    _finite(digits)  # Go would have no number for it
    return -0.0 if digits == "-0" else int(digits)


_free_decoder = JSONDecoder(parse_int=_exact_integer, parse_float=_finite, parse_constant=refuse_constant)


def _read_free(text: str, index: int, current: JsonValue) -> tuple[JsonValue, int]:
    """Any value, as Python has it; integers stay exact however long they are."""
    try:
        value, end = _free_decoder.raw_decode(text, index)
    except JSONDecodeError as exc:
        raise InvalidJSON(str(exc)) from exc
    except RecursionError as exc:
        raise InvalidJSON("a free-form value is nested too deeply") from exc
    return (_clean(value) if "\\u" in text or not text.isascii() else value), end


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): _clean(item) for key, item in value.items()}
    return value


def _write_free(value: JsonValue) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return int.__repr__(value)
        case float():
            return write_float(value)
        case str():
            return write_string(value)
        case list():
            return f"[{','.join(map(_write_free, value))}]"
        case dict():
            return "{" + ",".join(f"{write_string(key)}:{_write_free(each)}" for key, each in value.items()) + "}"


# --- values that hold others ---------------------------------------------------------------------------------------


def _enum(kind: type[OpenEnum]) -> Codec:
    known = {str(member.value): member for member in kind}

    def read(text: str, index: int, current: OpenEnum) -> tuple[OpenEnum, int]:
        written, end = _read_string(text, index, current)
        member = known.get(written)
        return (kind(written) if member is None else member), end

    return Codec(read, write_string, lambda: kind(""))


def _pointer(inner: Codec) -> Codec:
    """A value or None."""
    read_inner, zero = inner.read, inner.zero

    def read(text: str, index: int, current: Any) -> tuple[Any, int]:
        if text[index] == "n" and text.startswith("null", index):
            return None, index + 4
        return read_inner(text, index, zero() if current is None else current)

    def write(value: Any) -> str:
        return "null" if value is None else inner.write(value)

    return Codec(read, write, lambda: None)


def _slice(item: Codec) -> Codec:
    """A list; null is an empty one, except behind a pointer."""

    def read(text: str, index: int, current: list[Any]) -> tuple[list[Any], int]:
        if text[index] != "[":
            if _is_null(text, index):
                return [], index + 4
            raise _unexpected("an array", text, index)
        items: list[Any] = []
        index = skip_space(text, index + 1)
        if text[index] == "]":
            return items, index + 1
        while True:
            # What an earlier array had at this place is what this item is read into.
            there = current[len(items)] if len(items) < len(current) else item.zero()
            value, index = item.read(text, index, there)
            items.append(value)
            while text[index] in SPACE:
                index += 1
            if text[index] == "]":
                return items, index + 1
            if text[index] != ",":
                raise _unexpected("',' or ']'", text, index)
            index = skip_space(text, index + 1)

    def write(value: list[Any]) -> str:
        return f"[{','.join([item.write(each) for each in value])}]"

    return Codec(read, write, list)


def _map(value_codec: Codec) -> Codec:
    """A dict from strings; null is an empty one."""

    def read(text: str, index: int, current: dict[str, Any]) -> tuple[dict[str, Any], int]:
        if _is_null(text, index):
            return {}, index + 4
        if text[index] != "{":
            raise _unexpected("an object", text, index)
        values = dict(current)
        index = skip_space(text, index + 1)
        if text[index] == "}":
            return values, index + 1
        while True:
            key, index = read_key(text, index)
            values[key], index = value_codec.read(text, index, value_codec.zero())
            index = skip_space(text, index)
            if text[index] == "}":
                return values, index + 1
            if text[index] != ",":
                raise _unexpected("',' or '}'", text, index)
            index = skip_space(text, index + 1)

    def write(value: dict[str, Any]) -> str:
        return "{" + ",".join([f"{write_string(key)}:{value_codec.write(each)}" for key, each in value.items()]) + "}"

    return Codec(read, write, dict)


_BYTE_NUMBERS = _slice(_integer((Field(ge=0, le=255),)))

_PLAIN: dict[Any, Codec] = {
    str: Codec(_read_string, write_string, str),
    bool: Codec(_read_boolean, lambda value: "true" if value else "false", bool),
    float: Codec(_read_float, write_float, float),
    bytes: Codec(_read_bytes, _write_bytes, bytes),
    UUID: Codec(_read_uuid, lambda value: f'"{value}"', lambda: NIL_UUID),
    Timestamp: Codec(_read_timestamp, lambda value: f'"{value}"', lambda: ZERO_TIME),
    Decimal: Codec(_read_decimal, write_decimal, Decimal),
    RawJSON: Codec(_read_raw, lambda value: value or "null", RawJSON),
    JsonValue: Codec(_read_free, _write_free, lambda: None),
}
