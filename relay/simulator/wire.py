"""How the server writes and reads values: JSON as Go writes it, times, UUIDs, numbers in queries.

The error texts are those of Go's parsers, because clients see them in `detail`.
"""

import json
import re
from datetime import UTC, datetime
from typing import Any, TypeAlias
from uuid import UUID

NIL_UUID = UUID(int=0)
ZERO_TIME = "0001-01-01T00:00:00Z"

JsonObject: TypeAlias = dict[str, Any]

_HEX_32 = re.compile(r"[0-9a-fA-F]{32}")
_HEX_36 = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def go_json(value: object) -> str:
    """Compact JSON with the escapes of Go's encoder, without the newline that ends every body and frame.

    `<`, `>`, `&`, U+2028 and U+2029 occur only inside strings, so replacing them in the whole text is safe.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def go_text(text: str) -> str:
    """The text as Go's JSON decoder keeps it: a lone surrogate becomes U+FFFD."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def jsonb(value: object) -> Any:
    """The value as PostgreSQL's `jsonb` gives it back: shorter keys first, then bytewise."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
        return {key: jsonb(value[key]) for key in keys}
    if isinstance(value, list):
        return [jsonb(item) for item in value]
    return value


def rfc3339(moment: datetime) -> str:
    """RFC 3339 in UTC, fraction without trailing zeros, none at all when it is zero."""
    moment = moment.astimezone(UTC)
    text = moment.strftime("%Y-%m-%dT%H:%M:%S")
    if moment.microsecond:
        text += f".{moment.microsecond:06d}".rstrip("0")
    return text + "Z"


def rfc3339_nanoseconds(nanoseconds: int) -> str:
    """The same for a Unix time in nanoseconds: up to nine digits, as `retrying_at` has them."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    if fraction:
        text += f".{fraction:09d}".rstrip("0")
    return text + "Z"


def parse_uuid(text: str) -> UUID:
    """Parse the forms that Go's uuid package takes.

    Raises:
        ValueError: With that package's text, e.g. `invalid UUID length: 10`.
    """
    if len(text) == 45:
        if text[:9].lower() != "urn:uuid:":
            raise ValueError(f'invalid urn prefix: "{text[:9]}"')
        text = text[9:]
    elif len(text) == 38:
        text = text[1:-1]
    elif len(text) == 32:
        if not _HEX_32.fullmatch(text):
            raise ValueError("invalid UUID format")
        return UUID(text)
    elif len(text) != 36:
        raise ValueError(f"invalid UUID length: {len(text)}")
    if not _HEX_36.fullmatch(text):
        raise ValueError("invalid UUID format")
    return UUID(text)


def parse_int(text: str, bits: int = 64) -> int:
    """Parse as Go's `strconv.ParseInt(text, 10, bits)`.

    Raises:
        ValueError: With its text, e.g. `strconv.ParseInt: parsing "x": invalid syntax`.
    """
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError(f"strconv.ParseInt: parsing {go_json(text)}: invalid syntax")
    value = int(text)
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise ValueError(f"strconv.ParseInt: parsing {go_json(text)}: value out of range")
    return value


def parse_bool(text: str) -> bool:
    """Parse as Go's `strconv.ParseBool`, with its error text."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError(f"strconv.ParseBool: parsing {go_json(text)}: invalid syntax")
