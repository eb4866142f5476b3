"""The proxy does what it says, and counts it."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import FaultProxy, Line

PROMPT = 5.0


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def echoing(seed: int = 1) -> AsyncIterator[FaultProxy]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    async with server, FaultProxy.to("echo", "127.0.0.1", port, random.Random(seed)) as proxy:
        yield proxy


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the end, however it comes."""
    got = b""
    try:
        async with asyncio.timeout(PROMPT):
            while data := await reader.read(65536):
                got += data
    except ConnectionError:
        pass
    return got


async def passed(seed: int) -> int:
    """How many bytes of a large message pass a line that is cut somewhere."""
    async with echoing(seed) as proxy:
        proxy.line = Line(cut_bytes=(1000, 9000))
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"x" * 8000)
        got = await read_all(reader)
        writer.close()
        assert proxy.fired["cut"] == 1
        return len(got)


async def test_a_line_is_cut_after_some_bytes() -> None:
    assert await passed(1) < 8000


async def test_a_good_line_lets_everything_pass() -> None:
    async with echoing() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"y" * 500_000)
        assert await reader.readexactly(500_000) == b"y" * 500_000
        writer.close()
        while proxy.open:
            await asyncio.sleep(0.01)
        assert proxy.fired == {"opened": 1, "ended": 1}


async def test_half_open_is_silence_without_an_end() -> None:
    async with echoing() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        assert proxy.half_open() == 1
        writer.write(b"2")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reader.read(1)
        assert proxy.fired["swallowed"] == 1
        writer.close()
        async with asyncio.timeout(10):
            while not proxy.fired["left"]:
                await asyncio.sleep(0.01)
        assert proxy.fired["ended"] == 0


async def test_a_server_may_notice_that_its_end_is_dead() -> None:
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await read_all(reader)
        finally:
            ended.set()
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with FaultProxy.to("one", "127.0.0.1", port, random.Random(1)) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"1")
            while not proxy.open:
                await asyncio.sleep(0.01)
            assert proxy.half_open(noticed_after=0.2) == 1
            async with asyncio.timeout(10):
                await ended.wait()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await reader.read(1)
            writer.close()


async def test_connections_are_cut_and_refused() -> None:
    async with echoing() as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"1")
        assert await reader.readexactly(1) == b"1"
        proxy.refuse(True)
        assert await read_all(reader) == b""
        again, other = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await read_all(again) == b""
        assert proxy.fired["refused"] == 1
        proxy.refuse(False)
        last, third = await asyncio.open_connection("127.0.0.1", proxy.port)
        third.write(b"3")
        assert await last.readexactly(1) == b"3"
        for each in (writer, other, third):
            each.close()


async def test_a_slow_line_takes_its_time() -> None:
    async with echoing() as proxy:
        proxy.line = Line(bytes_per_second=100_000, stall_chance=1.0, stall_seconds=0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        started = asyncio.get_running_loop().time()
        writer.write(b"z" * 10_000)
        await reader.readexactly(10_000)
        assert asyncio.get_running_loop().time() - started >= 0.2 + 0.1  # there and back
        assert proxy.fired["narrowed"] >= 2
        assert proxy.fired["stalled"] >= 2
        writer.close()
