"""A long JSON list, row by row as it comes in: 50,000 chats must neither fill the memory nor hold up the event loop."""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from enum import Enum, auto

from relay.adapters.coder_link import Body
from relay.core.errors import Unavailable
from relay.core.events import JsonObject, parse_json

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_ROW = 64 * 2**20  # characters: what has no end by then is no row


class _Expects(Enum):
    LIST = auto()
    FIRST = auto()  # a row, or the end of the list
    NEXT = auto()  # a comma, or the end of the list
    ROW = auto()
    NOTHING = auto()


class Rows:
    """Takes the text of a JSON list of objects apart. Every method raises ValueError at what is no such list."""

    def __init__(self) -> None:
        self._text = ""  # what came and was not handed out
        self._enough = 0  # characters from which another try makes sense: a long row is not read again for each piece
        self._expects = _Expects.LIST

    def feed(self, piece: str) -> Iterator[JsonObject]:
        """The rows that are whole with this piece of the text. Exhaust it before the next piece."""
        self._text += piece
        if len(self._text) >= self._enough:
            yield from self._whole_rows()

    def end(self) -> Iterator[JsonObject]:
        """The last rows. The text has ended: now it must be whole."""
        yield from self._whole_rows()
        if self._text or self._expects is not _Expects.NOTHING:
            raise ValueError("the list has no end")

    def _whole_rows(self) -> Iterator[JsonObject]:
        text, place = self._text, 0
        while True:
            place = self._to_row(text, place)
            if place == len(text):
                break
            try:
                _, end = _DECODER.raw_decode(text, place)
            except json.JSONDecodeError as exc:
                if len(text) - place > _LONGEST_ROW:
                    raise ValueError("a row without an end") from exc
                break
            except RecursionError as exc:
                raise ValueError("nested too deeply") from exc
            row = parse_json(text[place:end])
            assert isinstance(row, dict)  # noqa: S101  # it begins with a brace
            self._expects = _Expects.NEXT
            place = end
            yield row
        self._text = text[place:]
        self._enough = 2 * len(self._text)

    def _to_row(self, text: str, place: int) -> int:
        """Where the next row begins, from `place` on; the end of the text when that is not there yet."""
        while True:
            matched = _SPACE.match(text, place)
            place = matched.end() if matched else place
            if place == len(text):
                return place
            match self._expects, text[place]:
                case _Expects.LIST, "[":
                    self._expects = _Expects.FIRST
                case _Expects.NEXT, ",":
                    self._expects = _Expects.ROW
                case ((_Expects.FIRST | _Expects.NEXT), "]"):
                    self._expects = _Expects.NOTHING
                case ((_Expects.FIRST | _Expects.ROW), "{"):
                    return place
                case ((_Expects.FIRST | _Expects.ROW), _):
                    raise ValueError("no JSON object where one was expected")
                case _:
                    raise ValueError("no JSON list where one was expected")
            place += 1


async def rows_of(body: Body) -> AsyncGenerator[JsonObject, None]:
    """The chats of a list, one by one. The body is closed when the last one was taken, or no more are wanted.

    Raises:
        Unavailable: It is no list of chats, or it broke off; the rows before that were good.
    """
    rows = Rows()
    try:
        async with aclosing(body.pieces()) as pieces:
            async for piece in pieces:
                for row in rows.feed(piece):
                    yield _chat(body, row)
        for row in rows.end():
            yield _chat(body, row)
    except ValueError as exc:
        kind = body.headers.get("content-type", "untyped").partition(";")[0]
        raise Unavailable(f"{body.call}: 200: {exc} ({kind}); RELAY_CODER__URL must be a Coder server") from exc
    finally:
        await body.close()


def _chat(body: Body, row: JsonObject) -> JsonObject:
    if not isinstance(row.get("id"), str):
        raise Unavailable(f"{body.call}: a chat without an id")
    return row
