"""What followers share: frames that wait are bounded over all of them, previews have an allowance."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from prometheus_client import REGISTRY

from relay.programs.frame_buffer import FrameBuffer
from relay.programs.pressure import Pressure
from tests.programs.world import OneByOne, until


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class Socket:
    """Frames without end, and how many of them were read."""

    def __init__(self, size: int) -> None:
        self.read = 0
        self._size = size

    async def frames(self) -> AsyncIterator[str]:
        while True:
            self.read += 1
            yield "x" * self._size
            await asyncio.sleep(0)


def pressure(
    characters: int = 1000,
    previews_per_second: float = 10.0,
    clock: Hands | None = None,
    *,
    at_once: int = 256,
    in_turn: int = 12_800,
) -> Pressure:
    return Pressure(
        clock or Hands(),
        characters=characters,
        previews_per_second=previews_per_second,
        frames_at_once=at_once,
        frames_in_turn=in_turn,
    )


async def test_frames_of_all_followers_together_are_bounded() -> None:
    shared = pressure(characters=1000)
    sockets = [Socket(100) for _ in range(8)]
    buffers = [FrameBuffer(shared, frames=512, characters=10**6) for _ in sockets]
    async with asyncio.TaskGroup() as group:
        holding = [group.create_task(_hold(buffer, socket)) for buffer, socket in zip(buffers, sockets, strict=True)]
        await until(lambda: not shared.room)
        for _ in range(100):
            await asyncio.sleep(0)
        waiting = REGISTRY.get_sample_value("relay_frames_waiting_characters")
        assert waiting is not None
        assert 1000 <= waiting <= 1000 + 100 * len(sockets), "each may hold one frame beyond the limit"
        read = [socket.read for socket in sockets]
        for _ in range(100):
            await asyncio.sleep(0)
        assert [socket.read for socket in sockets] == read, "sockets are not read"
        assert await buffers[0].take(1.0), "who takes its frames has room again"
        await until(lambda: sockets[0].read > read[0])
        for task in holding:
            task.cancel()
    assert REGISTRY.get_sample_value("relay_frames_waiting_characters") == 0, "what was not taken is forgotten"


async def _hold(buffer: FrameBuffer, socket: Socket) -> None:
    async with buffer.filled_from(OneByOne(socket.frames())):
        await asyncio.Event().wait()


async def test_frames_are_handed_out_in_pieces_and_in_order() -> None:
    buffer = FrameBuffer(pressure(characters=10**6, at_once=4), frames=5, characters=10**6)

    async def numbers() -> AsyncIterator[str]:
        for number in range(7):
            yield str(number)
        await asyncio.Event().wait()

    async with buffer.filled_from(OneByOne(numbers())):
        await until(lambda: buffer.backlog == 5)
        assert await buffer.take(1.0) == ["0", "1", "2", "3"]
        await until(lambda: buffer.backlog == 3)
        assert await buffer.take(1.0) == ["4", "5", "6"]
        assert await buffer.take(0.01) is None


class ManyAtOnce:
    """Ten frames each time, and how often they were asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __aiter__(self) -> "ManyAtOnce":
        return self

    async def __anext__(self) -> str:
        self.asked += 1
        return "0"

    def at_hand(self) -> list[str]:
        return list("123456789")


async def test_frames_that_come_together_wait_together_and_no_more_are_read_before_there_is_room() -> None:
    buffer = FrameBuffer(pressure(characters=10**6, at_once=3), frames=5, characters=10**6)
    frames = ManyAtOnce()
    async with buffer.filled_from(frames):
        await until(lambda: buffer.backlog == 10)
        for left in (7, 4):
            assert frames.asked == 1
            assert len(await buffer.take(1.0) or ()) == 3
            assert buffer.backlog == left
            for _ in range(5):
                await asyncio.sleep(0)
        assert (frames.asked, buffer.backlog) == (2, 14)
        assert [await buffer.take(1.0), await buffer.take(1.0)] == [list("678"), list("901")]


async def test_who_has_frames_gets_fewer_at_once_the_more_others_have_some() -> None:
    shared = pressure(characters=10**9, at_once=256, in_turn=800)

    async def taken(busy: int) -> list[int]:
        buffers = [FrameBuffer(shared, frames=300, characters=10**6) for _ in range(busy)]
        async with asyncio.TaskGroup() as group:
            holding = [group.create_task(_hold(buffer, Socket(1))) for buffer in buffers]
            await until(lambda: all(buffer.backlog == 300 for buffer in buffers))
            pieces = [len(await buffer.take(1.0) or ()) for buffer in buffers]
            for task in holding:
                task.cancel()
        return pieces

    assert await taken(2) == [256] * 2
    assert await taken(8) == [100] * 8
    assert await taken(40) == [32] * 40
    assert await taken(1) == [256], "who has none any more counts no more"


async def test_who_has_taken_all_frames_leaves_the_others_more() -> None:
    shared = pressure(characters=10**9, at_once=64, in_turn=64)
    one, other = (FrameBuffer(shared, frames=100, characters=10**6) for _ in range(2))
    frames = ManyAtOnce()

    async def ten() -> AsyncIterator[str]:
        for number in range(10):
            yield str(number)
        await asyncio.Event().wait()

    async with one.filled_from(OneByOne(ten())), other.filled_from(frames):
        await until(lambda: one.backlog == 10 and other.backlog == 100)
        assert len(await other.take(1.0) or ()) == 32
        assert len(await one.take(1.0) or ()) == 10
        assert len(await other.take(1.0) or ()) == 64


def test_previews_have_an_allowance_that_grows_with_time() -> None:
    clock = Hands()
    shared = pressure(previews_per_second=10.0, clock=clock)
    assert [shared.previews(8), shared.previews(8), shared.previews(8)] == [8, 2, 0]
    clock.seconds += 0.5
    assert shared.previews(8) == 5
    clock.seconds += 3600
    assert shared.previews(100) == 10, "no more than a second's worth is saved up"
