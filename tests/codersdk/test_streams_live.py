"""Streams over a real socket: opening, leaving, limits, redirects, and watching."""

import asyncio
import json
from uuid import UUID

import pytest

from relay.codersdk import (
    NIL_UUID,
    ChatWatchEventKind,
    CoderClient,
    InvalidAnswer,
    NotFound,
    StreamBroken,
    StreamDecoder,
)
from tests.codersdk.scripted_server import Reply, ScriptedServer

CHAT = UUID("bb6d3fbe-1b59-436b-8dd3-90d705751897")
STATUS = {"kind": "text", "data": '{"type":"data","data":[{"type":"status","status":{"status":"running"}}]}'}
GOODBYE = {"kind": "close", "code": 1000, "reason": ""}


async def test_a_stream_is_opened_and_closed_by_reading_it(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[STATUS, STATUS]))
    async with CoderClient(server.url, "golden-token") as coder:
        async for event in coder.stream_chat(CHAT):
            assert event.status is not None
            break
        assert (await server.goodbye()).close == (1000, "")


async def test_frames_come_as_text_and_a_bad_end_is_an_error(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[STATUS, {"kind": "close", "code": 1011, "reason": "boom"}]))
    frames: list[str] = []

    async def collect(coder: CoderClient) -> None:
        async for frame in coder.stream_chat_frames(CHAT, after_id=7):
            frames.append(frame)  # noqa: PERF401  # what came before the end is wanted

    async with CoderClient(server.url, "golden-token") as coder:
        with pytest.raises(StreamBroken, match="boom") as broken:
            await collect(coder)
    assert frames == [STATUS["data"]]
    assert (broken.value.code, broken.value.reason) == (1011, "boom")
    assert server.received[0].target.endswith(f"/{CHAT}/stream?after_id=7")


async def test_frames_end_in_silence_when_the_server_goes(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[STATUS, {"kind": "close", "code": 1001, "reason": "bye"}]))
    async with CoderClient(server.url, "golden-token") as coder:
        assert [frame async for frame in coder.stream_chat_frames(CHAT)] == [STATUS["data"]]


@pytest.mark.parametrize(
    ("limit", "says", "closes_with"),
    [
        pytest.param(1 << 20, "read chat stream: ", 1009, id="too small"),
        pytest.param(1 << 23, "xxxxx", 1000, id="large enough"),
    ],
)
async def test_the_read_limit_can_be_set(server: ScriptedServer, limit: int, says: str, closes_with: int) -> None:
    prefix = '{"type":"data","data":[{"type":"error","error":{"message":"'
    long = {"kind": "text", "prefix": prefix, "repeat": "x", "count": 5 << 20, "suffix": '"}}]}'}
    server.begin(Reply(101, frames=[long, GOODBYE]))
    async with CoderClient(server.url, "golden-token") as coder:
        (event,) = [event async for event in coder.stream_chat(CHAT, read_limit=limit)]
    assert event.error is not None
    assert event.error.message.startswith(says)
    close = (await server.goodbye()).close
    assert close is not None
    assert close[0] == closes_with


async def test_a_slow_reader_loses_nothing(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[STATUS] * 500 + [GOODBYE]))
    seen = 0
    async with CoderClient(server.url, "golden-token") as coder, coder.stream_chat(CHAT) as stream:
        async for _ in stream:
            seen += 1
            await asyncio.sleep(0)
    assert seen == 500


async def test_a_cancelled_reader_leaves_with_a_goodbye(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[STATUS]))
    first = asyncio.Event()

    async def follow_for_ever(coder: CoderClient) -> None:
        async with coder.stream_chat(CHAT) as stream:
            async for _ in stream:
                first.set()

    async with CoderClient(server.url, "golden-token") as coder:
        task = asyncio.ensure_future(follow_for_ever(coder))
        await asyncio.wait_for(first.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await server.goodbye()).close == (1000, "")


async def test_a_stream_follows_a_redirect_on_its_own_host_alone(server: ScriptedServer) -> None:
    server.begin(Reply(307, {"Location": "/elsewhere?x=1"}), Reply(101, frames=[GOODBYE]))
    async with CoderClient(server.url, "golden-token") as coder:
        assert [event async for event in coder.stream_chat(CHAT)] == []
        assert server.received[1].target == "/elsewhere?x=1"
        assert server.received[1].headers["coder-session-token"] == "golden-token"
        server.begin(Reply(307, {"Location": "http://localhost:1/elsewhere"}))
        with pytest.raises(InvalidAnswer, match="only for the host"):
            async with coder.stream_chat(CHAT):
                pass


# --- watch ----------------------------------------------------------------------------------------------------------

PING = {"kind": "text", "data": '{"type":"ping","data":null}'}
CREATED = {"kind": "text", "data": f'{{"type":"data","data":{{"kind":"created","chat":{{"id":"{CHAT}"}}}}}}'}


async def test_watching_gives_what_happens_to_chats(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[PING, CREATED, PING, CREATED, GOODBYE]))
    async with CoderClient(server.url, "golden-token") as coder, coder.watch_chats() as watch:
        assert server.received[0].target == "/api/experimental/chats/watch"
        events = [event async for event in watch]
    assert [(event.kind, event.chat.id) for event in events] == [(ChatWatchEventKind.CREATED, CHAT)] * 2


async def test_an_event_before_the_first_ping_is_not_lost(server: ScriptedServer) -> None:
    server.begin(Reply(101, frames=[CREATED, GOODBYE]))
    async with CoderClient(server.url, "golden-token") as coder, coder.watch_chats() as watch:
        assert len([event async for event in watch]) == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"type":"error","data":{"message":"no","detail":"why"}}', StreamBroken),
        ('{"type":"data","data":[]}', InvalidAnswer),
        ('{"type":"new"}', InvalidAnswer),
        ("no JSON", InvalidAnswer),
    ],
)
async def test_a_watch_that_cannot_go_on_says_so(server: ScriptedServer, text: str, error: type[Exception]) -> None:
    async with CoderClient(server.url, "golden-token") as coder:
        for frames in ([PING], []):
            server.begin(Reply(101, frames=[*frames, {"kind": "text", "data": text}]))
            with pytest.raises(error):
                async with coder.watch_chats() as watch:
                    [event async for event in watch]
            assert (await server.goodbye()).close == (1000, "")


async def test_a_watch_that_is_refused_says_why(server: ScriptedServer) -> None:
    server.begin(Reply(404, {"Content-Type": "application/json"}, b'{"message":"Route not found."}'))
    async with CoderClient(server.url, "golden-token") as coder:
        with pytest.raises(NotFound, match="Route not found"):
            async with coder.watch_chats():
                pass


# --- the decoder alone ----------------------------------------------------------------------------------------------


def test_a_decoder_that_has_ended_gives_nothing_more() -> None:
    decoder = StreamDecoder(NIL_UUID)
    assert len(decoder.feed('{"type":"error"}')) == 1
    assert decoder.ended
    assert decoder.feed(str(STATUS["data"])) == []
    assert decoder.broken(StreamBroken("late")) == []


def test_the_words_of_an_error_are_trimmed_as_go_trims() -> None:
    data = json.dumps({"message": "\u00a0\u001cbad\u001c\u3000", "detail": "\tworse\u0085\n"})
    (event,) = StreamDecoder(NIL_UUID).feed(f'{{"type":"error","data":{data}}}')
    assert event.error is not None
    assert event.error.message == "\u001cbad\u001c: worse"
