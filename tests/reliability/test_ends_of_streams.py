"""Each way in which a server ends a stream or refuses a call has its reaction and its count, and none of them is tried
again without a pause, or without end where the answer is final."""

import asyncio
from typing import cast
from uuid import UUID

import pytest
from aiohttp import web

from relay.adapters.memory import ManualClock, MemoryBus
from relay.adapters.memory_claims import MemoryClaims
from relay.core.errors import BadFrame, ChatGone, ChatRefused, RelayError, StreamEnded, Unauthorized, Unavailable
from relay.ports import Upstream
from relay.programs.follow import FollowSettings
from relay.programs.worker import Worker, WorkerSettings
from tests.adapters.test_coder_streams import counted, read, upstream_of
from tests.programs.world import counted as counted_or_0
from tests.programs.world import while_running
from tests.reliability.hot_server import HotServer

# --- close codes ---------------------------------------------------------------------------------------------------

# What a code says of who is to blame, whatever text comes with it. No code ends a chat.
CLOSE_CODES = {
    **dict.fromkeys((1000, 1001, 1011, 1012, 1013, 1014, 3000, 3003, 3008, 3999, 4000, 4404, 4999), "server_close"),
    **dict.fromkeys((1002, 1003, 1007, 1008, 1009, 1010), "protocol_error"),
}


async def test_every_close_code_is_a_stream_that_ended_with_one_reason_and_one_count() -> None:
    code = 0

    async def script(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.send_str("good")
        await socket.close(code=code)

    async with upstream_of(script) as (upstream, _server):
        for code, reason in CLOSE_CODES.items():
            before = disconnects()
            frames, error = await read(upstream)
            assert frames == ["good"], code
            assert isinstance(error, StreamEnded), code
            assert error.reason == reason, code
            assert disconnects() == before | {reason: before[reason] + 1}, code


def disconnects() -> dict[str, float]:
    reasons = ("server_close", "ping_timeout", "network_error", "protocol_error", "too_slow")
    return {reason: counted("relay_stream_disconnects_total", reason=reason) for reason in reasons}


# --- reactions, over an hour ---------------------------------------------------------------------------------------

HOUR = 3600.0
STEP = 5.0
SWEEP = 30.0  # seconds between two looks at the list
REFUSED = 30.0  # of waiting after a token was refused
LONGEST = 30.0  # delay between two tries
ONCE_A_SWEEP = int(HOUR / SWEEP) + 2
ONCE_A_DELAY = int(HOUR / (LONGEST / 2)) + 8  # each is between half of it and all of it, and the first are shorter
SICK, WELL = UUID(int=1), UUID(int=2)


class Hour:
    """A worker on a server where one kind of call fails. An hour passes, and nobody waits for it."""

    def __init__(self, call: str, error: Exception) -> None:
        self.server = HotServer(2, steps=3)
        self.server.fail(call, error, only=SICK)
        self.clock = ManualClock()
        self.bus = MemoryBus()
        self.said: list[tuple[bool, str]] = []
        self.worker = Worker(
            "one",
            upstream=cast(Upstream, self.server),
            bus=self.bus,
            claims=MemoryClaims(self.clock),
            clock=self.clock,
            settings=WorkerSettings(sweep_seconds=SWEEP, unauthorized_seconds=REFUSED, lease_seconds=60.0),
            follow=FollowSettings(longest_delay_seconds=LONGEST),
            report=lambda ok, reason: self.said.append((ok, reason)),
        )

    async def passes(self, part: float = 1.0) -> None:
        async with while_running(self.worker.run()):
            for _ in range(int(part * HOUR / STEP)):
                self.clock.advance(STEP)
                for _ in range(30):  # all who can do something do it
                    await asyncio.sleep(0)

    def messages(self, chat: UUID) -> int:
        return len(
            {event.id for event in self.bus.published if event.chat.chat_id == chat and event.event == "message"}
        )


def no_answer(status: int, retry_after: float | None = None) -> Unavailable:
    return Unavailable(f"GET /: {status}", retry_after)


@pytest.mark.parametrize(
    ("error", "most", "reason", "reaction"),
    [
        *(
            pytest.param(StreamEnded("cut", reason), ONCE_A_DELAY, reason, "retry", id=reason)
            for reason in ("server_close", "ping_timeout", "network_error", "protocol_error", "too_slow")
        ),
        pytest.param(no_answer(503), ONCE_A_DELAY, "refused", "retry", id="503"),
        pytest.param(BadFrame("no JSON", "bad_json", "<html>"), ONCE_A_DELAY, "bad_frame", "resync", id="not JSON"),
        pytest.param(BadFrame("binary", "schema", ""), ONCE_A_DELAY, "bad_frame", "resync", id="binary"),
        pytest.param(BadFrame("30 MB", "too_large"), ONCE_A_DELAY, "too_large", "resync", id="too large"),
        pytest.param(ChatRefused("no", 403), ONCE_A_SWEEP, None, "auth", id="403"),
        pytest.param(ChatRefused("no", 400), ONCE_A_SWEEP, None, "retry", id="400"),
        pytest.param(ChatGone("404"), ONCE_A_SWEEP, None, "gone", id="404 of a chat that is listed"),
    ],
)
async def test_a_stream_that_always_ends_is_tried_with_pauses_and_harms_no_other(
    error: RelayError, most: int, reason: str | None, reaction: str
) -> None:
    before, reacted = counted_or_0("relay_reconnects_total", reason=reason or ""), reactions()
    hour = Hour("stream", error)
    await hour.passes()
    tries = hour.server.dialled[SICK]
    assert 2 <= tries <= most
    assert hour.messages(WELL) == hour.server.steps + 1
    if reason is not None:  # and each of them is counted under its reason
        counted_now = counted_or_0("relay_reconnects_total", reason=reason)
        assert tries - 1 <= counted_now - before <= tries
    risen = {name: number - reacted[name] for name, number in reactions().items() if number != reacted[name]}
    assert risen.keys() == {reaction}
    assert tries - 1 <= risen[reaction] <= tries


async def test_a_stream_that_cannot_begin_is_tried_with_pauses_though_it_says_so_itself() -> None:
    hour = Hour("nothing", AssertionError())
    hour.server.without_snapshot = SICK
    await hour.passes()
    assert 2 <= hour.server.dialled[SICK] <= ONCE_A_DELAY
    assert hour.messages(WELL) == hour.server.steps + 1


def reactions() -> dict[str, float]:
    """Streams that ended, by what is done about it."""
    classes = ("retry", "resync", "auth", "gone")
    return {name: counted("relay_stream_closes_total", **{"class": name}) for name in classes}


async def test_a_line_that_worked_before_it_broke_is_tried_again_soon() -> None:
    """However often it has broken: each time it brought something."""
    hour = Hour("nothing", AssertionError())
    hour.server.parts, hour.server.breaks_after = 50, 3
    await hour.passes(1 / 6)
    assert hour.server.dialled[SICK] > 2 * ONCE_A_DELAY / 6


async def test_a_chat_that_vanished_is_told_so_once_and_left_alone() -> None:
    hour = Hour("stream", ChatGone("404"))
    hour.server.vanish_when_dialled = True
    await hour.passes()
    assert hour.server.dialled[SICK] == 1
    assert [event.detail for event in hour.bus.published if event.event == "lifecycle"].count("gone") == 1
    assert hour.messages(WELL) == hour.server.steps + 1


@pytest.mark.parametrize("call", ["stream", "watch", "list", "chat"])
async def test_a_token_that_is_refused_stops_the_account_and_is_tried_now_and_then(call: str) -> None:
    hour = Hour(call, Unauthorized("401: token refused"))
    await hour.passes()
    assert 2 <= hour.server.calls[call] <= 3 * (HOUR / REFUSED + 2)
    assert (False, "401: token refused") in hour.said
    hour.server.failures.clear()
    await hour.passes()
    assert hour.said[-1] == (True, "")
    assert hour.messages(SICK) == hour.messages(WELL) == hour.server.steps + 1


@pytest.mark.parametrize("call", ["list", "watch", "stream"])
async def test_a_server_that_names_a_pause_gets_it(call: str) -> None:
    hour = Hour(call, no_answer(429, 600.0))
    await hour.passes()
    tries = hour.server.dialled[SICK] if call == "stream" else hour.server.calls[call]
    assert 2 <= tries <= HOUR / 600 + 2


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_a_list_that_does_not_answer_is_asked_with_pauses(status: int) -> None:
    failed = counted_or_0("relay_discovery_sweeps_total", outcome="failed")
    hour = Hour("list", no_answer(status))
    await hour.passes()
    assert 2 <= hour.server.calls["list"] <= HOUR / 5 + 2
    assert counted_or_0("relay_discovery_sweeps_total", outcome="failed") == failed + hour.server.calls["list"]
    assert hour.said[-1] == (False, f"GET /: {status}")
