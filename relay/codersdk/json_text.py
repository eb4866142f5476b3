"""JSON text, read where it stands and by the rules of Go's `encoding/json`.

A reader gets the text and the index of a value's first character and returns the value with the index behind it.
Nothing is parsed into a tree first: a raw value keeps its source text, a number its digits, a repeated key its turn.
"""

import codecs
import re
from json import JSONDecodeError, JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]  # the stubs have forgotten it
from typing import NoReturn

from relay.codersdk.errors import InvalidJSON

SPACE = " \t\n\r"
MAX_DEPTH = 10_000  # of arrays and objects within each other

_PLAIN_KEY = re.compile(r'"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*')
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_REPLACEMENT = "\ufffd"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    # Python puts one replacement for a cut sequence, Go one for each of its bytes.
    assert isinstance(error, UnicodeDecodeError)  # noqa: S101
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("relay.codersdk.each-byte", _replace_each_byte)


def as_text(data: str | bytes | bytearray | memoryview) -> str:
    """The text to read; bytes that are no UTF-8 become U+FFFD, one for each byte."""
    if isinstance(data, str):
        return data if data.isascii() else _SURROGATE.sub(_REPLACEMENT, data)
    return bytes(data).decode("utf-8", "relay.codersdk.each-byte")


def skip_space(text: str, index: int) -> int:
    while text[index] in SPACE:
        index += 1
    return index


def without_surrogates(text: str) -> str:
    """Half a surrogate pair, which JSON can escape and UTF-8 cannot hold, becomes U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub(_REPLACEMENT, text)


def read_string(text: str, index: int) -> tuple[str, int]:
    """The string whose opening quote is at `index`."""
    try:
        value, end = scanstring(text, index + 1, True)
    except JSONDecodeError as exc:
        raise InvalidJSON(str(exc)) from exc
    return (value if value.isascii() else without_surrogates(value)), end


def read_number(text: str, index: int) -> tuple[str, int]:
    """The digits of the number at `index`, as they stand."""
    match = _NUMBER.match(text, index)
    if match is None:
        raise InvalidJSON(f"expected a number at character {index}, found {found(text, index)}")
    return match.group(), match.end()


def read_integer(text: str, index: int) -> tuple[int, int]:
    """The whole number at `index`; one written with a fraction or an exponent is refused, whatever its value."""
    match = _NUMBER.match(text, index)
    if match is None or match.group(2) or match.group(3) or match.end() - index > 20:
        raise InvalidJSON(f"expected an integer of 64 bits at character {index}, found {found(text, index)}")
    return int(match.group()), match.end()


def read_key(text: str, index: int) -> tuple[str, int]:
    """The key of an object at `index`, and the index of its value."""
    match = _PLAIN_KEY.match(text, index)
    if match is not None:  # nearly always
        return match.group(1), match.end()
    if text[index] != '"':
        raise InvalidJSON(f"expected a key at character {index}, found {found(text, index)}")
    key, index = read_string(text, index)
    while text[index] in SPACE:
        index += 1
    if text[index] != ":":
        raise InvalidJSON(f"expected ':' at character {index}, found {found(text, index)}")
    index += 1
    while text[index] in SPACE:
        index += 1
    return key, index


def found(text: str, index: int) -> str:
    """What stands at `index`, for the text of an error."""
    if index >= len(text):
        return "the end"
    names = {'"': "a string", "{": "an object", "[": "an array", "t": "a boolean", "f": "a boolean", "n": "null"}
    return names.get(text[index], "a number" if text[index] in "-0123456789" else repr(text[index]))


def refuse_constant(name: str) -> NoReturn:
    raise InvalidJSON(f"{name} is not JSON")


# Numbers stay text: only their grammar counts here, and int() refuses very long ones.
_decoder = JSONDecoder(parse_int=str, parse_float=str, parse_constant=refuse_constant)


def end_of_value(text: str, index: int) -> int:
    """The index behind the value at `index`, which is checked but not kept."""
    try:
        return _decoder.raw_decode(text, index)[1]
    except JSONDecodeError as exc:
        raise InvalidJSON(str(exc)) from exc
    except RecursionError:
        return _end_of_deep_value(text, index)


def _end_of_deep_value(text: str, index: int) -> int:
    """As `end_of_value`, for values nested deeper than the interpreter's own scanner can follow."""
    closers: list[str] = []
    while True:
        index = skip_space(text, index)
        if text[index] in "[{":
            opener = text[index]
            index = skip_space(text, index + 1)
            if text[index] != ("]" if opener == "[" else "}"):
                closers.append("]" if opener == "[" else "}")
                if opener == "{":
                    index = read_key(text, index)[1]
                continue
            index += 1
        else:
            index = end_of_value(text, index)
        while closers:
            index = skip_space(text, index)
            if text[index] == ",":
                index = skip_space(text, index + 1)
                if closers[-1] == "}":
                    index = read_key(text, index)[1]
                break
            if text[index] != closers[-1]:
                raise InvalidJSON(f"expected ',' or {closers[-1]!r} at character {index}, found {found(text, index)}")
            closers.pop()
            index += 1
        else:
            return index


def check_depth(text: str) -> None:
    """Refuse text in which more than `MAX_DEPTH` arrays and objects are open at once."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKEN.finditer(text):
        first = token.group()[0]
        if first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidJSON(f"more than {MAX_DEPTH} arrays and objects within each other")
        elif first in "]}":
            depth -= 1


def check(text: str) -> None:
    """Refuse text that is not exactly one JSON value with space around it."""
    try:
        end = end_of_value(text, skip_space(text, 0))
    except IndexError as exc:
        raise InvalidJSON("the text ends within a value") from exc
    if text[end:].strip(SPACE):
        raise InvalidJSON(f"expected the end at character {end}, found {found(text, end)}")
    check_depth(text)
