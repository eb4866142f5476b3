"""Long lists, taken apart as they come in."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from relay.adapters.coder_rows import Rows
from relay.core.errors import Unavailable
from tests.adapters.scripted_server import Handler, upstream_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def taken(pieces: list[str]) -> list[Any]:
    rows = Rows()
    return [*(row for piece in pieces for row in rows.feed(piece)), *rows.end()]


@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6),
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
)
def test_a_list_cut_anywhere_is_the_same_list(rows: list[Any], cuts: list[int], indented: bool) -> None:
    text = json.dumps(rows, indent=1 if indented else None, ensure_ascii=indented) + "\n"
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    assert taken([text[one:other] for one, other in pairwise(places)]) == rows
    assert taken(list(text)) == rows


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=3), st.data())
def test_a_list_that_breaks_off_is_no_list(rows: list[Any], data: st.DataObject) -> None:
    text = json.dumps(rows)
    with pytest.raises(ValueError, match="no end"):
        taken([text[: data.draw(st.integers(0, len(text) - 1))]])


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "null",
        "<!doctype html>",
        '"rows"',
        "7",
        "[1]",
        "[null]",
        "[{},]",
        "[,]",
        "[{}{}]",
        "[{}]x",
        "[{}][",
        '[{"a"]',
    ],
)
def test_what_is_no_list_of_objects(text: str) -> None:
    with pytest.raises(ValueError, match=r"no |nested"):
        taken([text])


def test_a_row_that_is_nested_too_deeply_is_no_row() -> None:
    with pytest.raises(ValueError, match="nested"):
        taken(['[{"a":' + "[" * 200_000 + "]" * 200_000 + "}]"])


def test_a_long_row_is_not_read_again_for_each_piece() -> None:
    row = {"id": "x" * 4_000_000}
    text = json.dumps([row])
    assert taken([text[place : place + 1000] for place in range(0, len(text), 1000)]) == [row]


def broken_off(rows: int) -> Handler:
    """A list that ends in the middle of a row, as when a proxy goes away."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        text = json.dumps([{"id": str(number), "title": "x" * 100_000} for number in range(rows + 1)])
        await response.write(text[: text.rindex("{") + 5].encode())
        assert request.transport is not None
        request.transport.abort()
        return response

    return handler


async def collect(rows: AsyncIterator[dict[str, object]], seen: list[object]) -> None:
    async for row in rows:
        seen.append(row["id"])  # noqa: PERF401  # what came before an error counts


async def test_a_list_that_breaks_off_says_so_after_the_rows_that_were_good() -> None:
    seen: list[object] = []
    async with upstream_of(broken_off(4)) as (upstream, _):
        rows = upstream.list_chats(archived=False)
        with pytest.raises(Unavailable, match="chats"):
            await collect(rows, seen)
    assert seen[:3] == ["0", "1", "2"]  # the last piece goes with the connection


async def test_a_list_that_stands_still_is_not_waited_for_for_ever() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await response.write(b'[{"id":"0"},')
        await request.content.read()
        await asyncio.Event().wait()
        return response

    async with upstream_of(handler, timeout_seconds=0.3) as (upstream, _):
        with pytest.raises(Unavailable, match=r"no answer within 0\.3 s"):
            _ = [row async for row in upstream.list_chats(archived=False)]
