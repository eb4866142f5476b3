"""What a feeder's chats say is what a server would say: read by our decoder it gives every message once."""

import json
from datetime import UTC, datetime

import pytest

from relay.bench.samples import chat_ref, message_frames, payloads, preview_frames, samples, snapshot_frames
from relay.bench.samples import tail_of_one_chat as new_tail
from relay.bench.talk import STAMP, TalkingChat, now_text, websocket_frame
from relay.core.events import Event, decode_event
from relay.core.frames import decode_frame
from relay.core.resume import ResumePoint
from relay.core.tail import ChatTail

NOW = datetime(2026, 3, 1, 12, 0, 0, 120, tzinfo=UTC)
MOMENT = now_text(NOW)


def told(tail: ChatTail, frames: list[str]) -> list[Event]:
    events: list[Event] = []
    for frame in frames:
        batch = tail.feed(decode_frame(frame), NOW)
        assert batch.wants is None
        assert batch.reconnect is None
        events += batch.events
    return events


def ids(events: list[Event]) -> list[int]:
    return [dict(event.data)["message"]["id"] for event in events if event.event == "message"]  # type: ignore[index]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 70000])
def test_a_frame_of_any_size_is_read_as_it_was_written(size: int) -> None:
    text = "x" * size
    assert list(payloads(websocket_frame(text.encode()) * 2)) == [text, text]


def test_turns_are_read_as_turns_and_every_message_once() -> None:
    events = told(new_tail(), message_frames(3))
    assert len(set(ids(events))) == len(ids(events)) == 3 * 26
    turns = [event for event in events if event.event == "turn"]
    assert [event.detail for event in turns] == ["completed"] * 3
    assert sorted(ids(events)) == ids(events)


def test_frame_by_frame_or_turn_by_turn_is_the_same() -> None:
    whole, single = TalkingChat(7), TalkingChat(7)
    turn = whole.next_turn(MOMENT, 5) + whole.next_turn(MOMENT, 5)
    frames = b"".join(single.next_frame(MOMENT, 5) for _ in range(2 * single.frames_per_turn))
    assert turn == frames
    assert (whole.messages, whole.last_id, whole.status) == (single.messages, single.last_id, single.status)


def test_a_turn_that_was_begun_is_ended_first() -> None:
    chat = TalkingChat(7)
    blob = b"".join(chat.next_frame(MOMENT, 5) for _ in range(4))
    assert chat.status == "running"
    blob += chat.next_turn(MOMENT, 5)
    assert chat.status == "waiting"
    other = TalkingChat(7)
    assert blob == other.next_turn(MOMENT, 5)


@pytest.mark.parametrize("frames", [0, 1, 2, 5, 27, 28, 29, 61])
def test_who_comes_late_hears_the_same(frames: int) -> None:
    """A snapshot has what was told before, whatever the moment, and the cursor leaves out what it should."""
    chat = TalkingChat(3)
    live = list(payloads(b"".join(chat.snapshot(0, MOMENT) + [chat.next_frame(MOMENT, 5) for _ in range(frames)])))
    reference = ChatTail(chat_ref(chat.id), 1, ResumePoint())
    reference.connected(0)
    expected = ids(told(reference, live))

    late = ChatTail(chat_ref(chat.id), 2, ResumePoint())
    late.connected(0)
    assert ids(told(late, list(payloads(b"".join(chat.snapshot(0, MOMENT)))))) == expected
    assert len(expected) == chat.messages
    if expected:
        assert chat.last_id == expected[-1]
        after = [json.loads(frame) for frame in payloads(b"".join(chat.snapshot(expected[0], MOMENT)))]
        shown = [event["message"]["id"] for frame in after for event in frame["data"] if event["type"] == "message"]
        assert shown == expected[1:]


def test_rest_gives_the_same_messages_newest_first() -> None:
    chat = TalkingChat(3)
    frames = [json.loads(frame) for frame in payloads(chat.next_turn(MOMENT, 0) + chat.next_turn(MOMENT, 0))]
    streamed = [event["message"] for frame in frames for event in frame["data"] if event["type"] == "message"]
    newest = json.loads(chat.page(None, 20, MOMENT))
    older = json.loads(chat.page(newest["messages"][-1]["id"], 200, MOMENT))
    assert newest["messages"] + older["messages"] == streamed[::-1]
    assert (newest["has_more"], older["has_more"]) == (True, False)


def test_the_stamp_is_in_every_message() -> None:
    blob = TalkingChat(3).next_turn(MOMENT, 123456789)
    stamped = [frame for frame in payloads(blob) if '"type":"message"' in frame]
    assert len(stamped) == 26
    assert all(STAMP.decode() + "00000000000123456789" in frame for frame in stamped)


def test_previews_are_told_one_by_one() -> None:
    events = told(new_tail(), preview_frames(50))
    assert sum(event.transient for event in events) == 50


def test_a_snapshot_of_many_messages_takes_several_frames() -> None:
    frames = snapshot_frames(600)
    assert len(frames) == 3
    assert len(ids(told(new_tail(), frames))) == 600


def test_samples_are_different_events_of_about_a_kilobyte() -> None:
    found = samples(200)
    assert len({each.id for each in found}) == 200
    for each in found:
        event = decode_event(each.body, "chat.message.user._.x")
        assert (str(event.id), event.type) == (each.id, each.type)
        assert 900 < len(each.body) < 1500
