"""Real frames and real events of made-up chats: the same ones for whoever is measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from uuid import UUID

from relay.bench.talk import OWNER, TalkingChat, now_text
from relay.core.events import ChatRef, Event
from relay.core.frames import decode_frame
from relay.core.resume import ResumePoint
from relay.core.tail import ChatTail
from relay.simulator.dialect import DIALECTS, PartEvent
from relay.simulator.state import Part

_DIALECT = DIALECTS["d0"]
_NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
_WORDS = "the build of this page fails since the last merge because a helper moved to another package".split()


def chat_ref(chat_id: UUID) -> ChatRef:
    return ChatRef("http://127.0.0.1:3000", chat_id, OWNER, chat_id)


def payloads(blob: bytes) -> Iterator[str]:
    """The text frames of what goes onto a server's socket."""
    at = 0
    while at < len(blob):
        size, start = blob[at + 1], at + 2
        if size == 126:
            size, start = int.from_bytes(blob[at + 2 : at + 4], "big"), at + 4
        elif size == 127:
            size, start = int.from_bytes(blob[at + 2 : at + 10], "big"), at + 10
        yield blob[start : start + size].decode()
        at = start + size


def message_frames(turns: int) -> list[str]:
    """One chat's frames from its beginning: the snapshot of an empty chat, then a message a frame."""
    chat, moment = TalkingChat(0), now_text(_NOW)
    blob = b"".join(chat.snapshot(0, moment))
    return list(payloads(blob + b"".join(chat.next_turn(moment, 0) for _ in range(turns))))


def preview_frames(parts: int) -> list[str]:
    """One chat's frames: a prompt, then a step that is told word by word, one part a frame."""
    chat, moment = TalkingChat(0), now_text(_NOW)
    blob = b"".join(chat.snapshot(0, moment)) + chat.next_frame(moment, 0) + chat.next_frame(moment, 0)
    words = (PartEvent("assistant", Part("text", text=f"{_WORDS[n % len(_WORDS)]} ")) for n in range(parts))
    return [*payloads(blob), *(_DIALECT.stream_frame(chat.id, [word]) for word in words)]


def snapshot_frames(messages: int) -> list[str]:
    """What a connection begins with in a chat of so many messages."""
    chat = TalkingChat(0)
    while chat.messages < messages:
        chat.told += 1
    return list(payloads(b"".join(chat.snapshot(0, now_text(_NOW)))))


def tail_of_one_chat() -> ChatTail:
    """A tail that has just been connected to the chat of the frames above."""
    tail = ChatTail(chat_ref(TalkingChat(0).id), 1, ResumePoint())
    tail.connected(0)
    return tail


def message_events() -> Iterator[Event]:
    """`chat.message` events without end, each with an id of its own."""
    number = 0
    while True:
        number += 1
        chat, moment = TalkingChat(number, brief=True), now_text(_NOW)
        tail = ChatTail(chat_ref(chat.id), 1, ResumePoint())
        tail.connected(0)
        for frame in payloads(b"".join(chat.snapshot(0, moment)) + chat.next_turn(moment, 0)):
            batch = tail.feed(decode_frame(frame), _NOW)
            yield from (event for event in batch.events if event.event == "message")


@dataclass(frozen=True, slots=True)
class Sample:
    """A message as a publisher gets it."""

    id: str
    body: bytes
    type: str
    moment: datetime
    timestamp: int  # the same in seconds since 1970: some publishers take the one, some the other
    family: str


def samples(count: int) -> Sequence[Sample]:
    """So many different messages; their bodies have about a kilobyte."""
    return [
        Sample(event.id, event.encode(), event.type, _NOW, int(_NOW.timestamp()), event.event)
        for event in islice(message_events(), count)
    ]
