"""Live text under load and over broken connections: since the last reset a prefix of what was said, in order, never
twice; and where upstream lost none of it, all of it."""

import asyncio
import random
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.adapters.clock import SystemClock
from relay.core.events import Event, Origin, PreviewData, PreviewResetData, event_id
from relay.core.preview import coalesce, shed
from relay.ports import Bus, Claims, Upstream
from relay.programs.follow import Ended, Follower
from tests.core.frames import REF
from tests.core.laws import Step, assert_honest_previews, data_of
from tests.programs.world import FOLLOW, World, counted
from tests.reliability.confirmed import SlowBus
from tests.reliability.hot_server import HotServer, chat_ref

TALK = "[steps k=3 n=150 ms=20 toolms=100] look through all of them"


def text_of(events: list[Event]) -> dict[tuple[int, int, str], str]:
    """By session, step and channel: what a reader of the previews has on the screen."""
    shown: dict[tuple[int, int, str], str] = {}
    for event in events:
        data = data_of(event)
        if event.event != "preview":
            continue
        if event.detail == "reset":
            shown = {key: text for key, text in shown.items() if key[:2] != (event.session, data["step"])}
            continue
        part = data["part"]
        channel = f"{part['type']} {part.get('tool_call_id', '')}"
        key = (event.session, data["step"], channel)
        shown[key] = shown.get(key, "") + str(part.get("text", part.get("args_delta", "")))
    return shown


# --- joined, and left out ------------------------------------------------------------------------------------------


@st.composite
def previews(draw: st.DrawFn) -> list[Event]:
    """Previews of some steps as a tail tells them: each goes on where the last one of its channel ended."""
    told: list[Event] = []
    ends: dict[tuple[int, str], int] = {}
    step = 0
    for position in range(draw(st.integers(0, 30))):
        data: PreviewData | PreviewResetData
        kind = draw(st.sampled_from(["text", "text", "text", "reasoning", "args", "source", "reset", "next"]))
        if kind == "next":
            step += 1
            continue
        if kind == "reset":
            data, detail = {"step": step, "reason": "gap"}, "reset"
            ends = {key: end for key, end in ends.items() if key[0] != step}
        else:
            words = draw(st.sampled_from(["a", "bc", "\U0001f980", " "]))
            call = draw(st.sampled_from(["c", "d"]))
            channel = f"args {call}" if kind == "args" else kind
            offset = ends.get((step, channel), 0)
            ends[step, channel] = offset + (1 if kind == "source" else len(words))
            part: dict[str, object] = {"type": kind, "text": words}
            if kind == "args":
                part = {"type": "tool-call", "tool_call_id": call, "tool_name": "look", "args_delta": words}
            elif kind == "source":
                part = {"type": "source", "url": words}
            detail = str(part["type"])
            data = {"step": step, "role": "assistant", "part": part, "offset": offset}
        told.append(
            Event(
                id=event_id(REF, "preview", 1, position + 1),
                family="chat",
                event="preview",
                detail=detail,
                chat=REF,
                content=data,
                time="2026-03-01T12:00:00Z",
                origin=Origin.LIVE,
                session=1,
                position=position + 1,
            )
        )
    return told


@settings(max_examples=60)
@given(previews())
def test_joined_previews_show_the_same_text_in_the_same_order(told: list[Event]) -> None:
    joined = coalesce(told)
    assert text_of(joined) == text_of(told)
    places = [event.position for event in joined]
    assert places == sorted(set(places))
    assert {event.id for event in joined} <= {event.id for event in told}
    assert [e for e in joined if e.detail in ("reset", "source")] == [
        e for e in told if e.detail in ("reset", "source")
    ]
    assert coalesce(joined) == joined
    for event in joined:
        data = data_of(event)
        if event.detail in ("text", "reasoning"):
            before = [e for e in joined if e.position < event.position and e.event == "preview"]
            shown = text_of(before).get((1, data["step"], f"{event.detail} "), "")
            assert data["offset"] == len(shown)


@settings(max_examples=60)
@given(previews(), st.sets(st.integers(0, 3)))
def test_what_is_left_out_is_of_steps_that_are_over_and_never_a_reset(told: list[Event], over: set[int]) -> None:
    kept = shed(told, sorted(over))
    left_out = [event for event in told if event not in kept]
    assert all(data_of(event)["step"] in over and event.detail != "reset" for event in left_out)
    assert [event for event in told if data_of(event)["step"] not in over] == [
        event for event in kept if data_of(event)["step"] not in over
    ]
    assert [event for event in kept if event.detail == "reset"] == [e for e in told if e.detail == "reset"]


# --- the whole way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shed_frames", [20, 10**6], ids=["left out", "joined"])
async def test_a_slow_broker_and_a_line_that_breaks_never_make_it_lie(world: World, shed_frames: int) -> None:
    bus = SlowBus(world.bus, random.Random(5), seconds=0.02)
    joined, left_out = (
        counted("relay_previews_coalesced_total"),
        counted("relay_previews_dropped_total", reason="ended"),
    )
    server = HotServer(steps=60, parts=6, breaks_after=100)
    follower = await following(world, server, cast(Bus, bus), shed_frames=shed_frames)
    async with asyncio.timeout(60):
        assert (await follower.run()).why is Ended.IDLE
    assert any(event.event == "turn" for event in world.bus.published)
    assert server.dialled.total() >= 4
    if shed_frames < 10**6:
        assert counted("relay_previews_dropped_total", reason="ended") > left_out, "nothing was left out"
    else:
        assert counted("relay_previews_coalesced_total") > joined, "nothing was joined"
    events = list(world.bus.published)
    assert_each_step_is_a_prefix(events, least=1 if shed_frames < 10**6 else 40)
    assert [(event.session, event.position) for event in events] == sorted({(e.session, e.position) for e in events})


async def following(world: World, server: HotServer, bus: Bus, **settings: object) -> Follower:
    claim = await world.claim(chat_ref(1), "one", lease_seconds=60)
    assert claim is not None
    return Follower(
        claim,
        upstream=cast(Upstream, server),
        bus=bus,
        claims=cast(Claims, world.store),
        clock=SystemClock(),
        settings=FOLLOW.model_copy(update={"first_delay_seconds": 0.001, **settings}),
    )


def assert_each_step_is_a_prefix(events: list[Event], *, least: int) -> None:
    """Of a message that was stored. Whole steps may have been left out, but for some."""
    stored = [data_of(event)["text"] for event in events if (event.event, event.detail) == ("message", "assistant")]
    steps: dict[tuple[int, int], Step] = {}
    for event in events:
        data = data_of(event)
        key = (event.session, data.get("step", -1))
        if event.event == "preview" and event.detail == "reset":
            steps[key] = Step()
        elif event.event == "preview":
            assert key >= max(steps, default=key) or data["part"]["type"] == "tool-result", (
                "a step that had ended goes on"
            )
            steps.setdefault(key, Step()).tell(data)
    texts = [step.text["text"] for step in steps.values() if step.text["text"]]
    assert len(texts) >= least
    assert all(any(text.startswith(shown) for text in stored) for shown in texts)


async def test_where_nothing_is_lost_all_of_it_is_told_however_often_the_line_breaks(world: World) -> None:
    server = HotServer(steps=30, parts=5, breaks_after=8)
    follower = await following(world, server, world.bus, shed_frames=10**6)
    async with asyncio.timeout(60):
        assert (await follower.run()).why is Ended.IDLE
    assert any(event.event == "turn" for event in world.bus.published)
    assert server.dialled.total() > 20
    found = assert_honest_previews(list(world.bus.published))
    assert (found.equal, found.prefix) == (30, 0)
