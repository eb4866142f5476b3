"""The window against a model that remembers every message; the frames against pamqp's own reading of them."""

import asyncio
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import pamqp.frame
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from relay.adapters.rabbit_outgoing import Outgoing
from relay.adapters.rabbit_window import Batch, Window
from relay.adapters.rabbit_wire import Encoder, Wire


def numbered(number: int) -> Outgoing:
    return Outgoing(f"id-{number}", "message", "exchange", "key", b"body", "type", 1)


# --- the window ----------------------------------------------------------------------------------------------------


class WindowMachine(RuleBasedStateMachine):
    """What the broker may say, in any order, and things it should not."""

    def __init__(self) -> None:
        super().__init__()
        self.window: Window[int] = Window()
        self.sent = 0  # tags
        self.batches: list[Batch[int]] = []
        self.owner: dict[int, int] = {}  # batch by tag
        self.answers: dict[int, bool] = {}  # by tag
        self.returned: set[int] = set()  # tags
        self.whole: list[int] = []

    @rule(size=st.integers(1, 7))
    def send(self, size: int) -> None:
        number = len(self.batches)
        tags = range(self.sent + 1, self.sent + size + 1)
        batch = self.window.add([numbered(tag) for tag in tags], number, sent_at=0.0)
        assert (batch.first, batch.last) == (tags[0], tags[-1])
        self.batches.append(batch)
        self.owner.update(dict.fromkeys(tags, number))
        self.sent += size

    @rule(place=st.integers(0, 19), ok=st.booleans())
    def answer(self, place: int, ok: bool) -> None:
        open_tags = [tag for tag in range(1, self.sent + 1) if tag not in self.answers]
        if open_tags:
            self.hear(open_tags[place % len(open_tags)], multiple=False, ok=ok)

    @rule(place=st.integers(0, 19), ok=st.booleans())
    def answer_some(self, place: int, ok: bool) -> None:
        self.hear(place * self.sent // 20 + 1, multiple=True, ok=ok)

    @rule(ok=st.booleans())
    def answer_all(self, ok: bool) -> None:
        self.hear(0, multiple=True, ok=ok)

    @rule(place=st.integers(0, 19), ok=st.booleans())
    def answer_again(self, place: int, ok: bool) -> None:
        known = sorted(self.answers)
        if known:
            self.hear(known[-1 - place % len(known)], multiple=False, ok=ok)

    @rule(beyond=st.integers(1, 3), multiple=st.booleans(), ok=st.booleans())
    def answer_what_was_not_sent(self, beyond: int, multiple: bool, ok: bool) -> None:
        self.hear(self.sent + beyond, multiple=multiple, ok=ok)

    def hear(self, tag: int, *, multiple: bool, ok: bool) -> None:
        for answered in range(1, (tag or self.sent) + 1) if multiple else [tag]:
            if answered <= self.sent:
                self.answers.setdefault(answered, ok)
        gone = [batch.owner for batch in self.window.answered(tag, multiple=multiple, ok=ok)]
        expected = [n for n in range(len(self.batches)) if n not in self.whole and self.is_whole(n)]
        assert gone == expected
        self.whole += gone

    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """In the order of publishing, and before the answer."""
        open_tags = [tag for tag in range(max(self.returned, default=0) + 1, self.sent + 1) if tag not in self.answers]
        if open_tags:
            tag = data.draw(st.sampled_from(open_tags))
            found = self.window.came_back(f"id-{tag}")
            assert found is not None
            assert found.id == f"id-{tag}"
            self.returned.add(tag)

    @rule()
    def something_unknown_comes_back(self) -> None:
        assert self.window.came_back("id-0") is None

    def is_whole(self, number: int) -> bool:
        return all(tag in self.answers for tag, owner in self.owner.items() if owner == number)

    @invariant()
    def the_window_is_the_model(self) -> None:
        assert self.window.unanswered == self.sent - len(self.answers)
        assert len(self.window) == len(self.batches) - len(self.whole)
        for number, batch in enumerate(self.batches):
            tags = [tag for tag, owner in self.owner.items() if owner == number]
            unanswered = [tag - batch.first for tag in tags if tag not in self.answers]
            assert batch.unanswered == len(unanswered)
            assert list(batch.unanswered_places()) == unanswered
            assert (batch.nacked or set()) == {t - batch.first for t in tags if not self.answers.get(t, True)}
            assert (batch.returned or set()) == {t - batch.first for t in tags if t in self.returned}


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=60, stateful_step_count=30)


def window_of(*sizes: int) -> Window[int]:
    window: Window[int] = Window()
    tags = iter(range(1, sum(sizes) + 1))
    for owner, size in enumerate(sizes):
        window.add([numbered(next(tags)) for _ in range(size)], owner, 0.0)
    return window


def test_an_answer_counts_once() -> None:
    window = window_of(3)
    for _ in range(2):
        assert not window.answered(2, multiple=False, ok=True)
        assert window.unanswered == 2


def test_an_answer_to_what_was_not_sent_is_nobodys() -> None:
    window = window_of(2)
    assert not window.answered(3, multiple=False, ok=True)
    assert window.unanswered == 2
    assert [batch.owner for batch in window.answered(9, multiple=True, ok=True)] == [0]


def test_two_that_come_back_one_after_the_other_are_both_found() -> None:
    window = window_of(3)
    assert [window.came_back(f"id-{tag}") for tag in (1, 2)] == [numbered(1), numbered(2)]
    (batch,) = window.answered(3, multiple=True, ok=True)
    assert batch.returned == {0, 1}


def test_what_lies_before_the_last_that_came_back_is_found_as_well() -> None:
    """The broker keeps the order; nothing is lost should one not do so."""
    window = window_of(1, 1)
    assert window.came_back("id-2") is not None
    assert window.came_back("id-1") is not None


def test_a_window_remembers_nothing_of_what_is_answered() -> None:
    window: Window[int] = Window()
    window.add([numbered(1)], 0, 0.0)  # never answered
    for number in range(2, 10_000):
        window.add([numbered(number)], 0, 0.0)
        assert len(window.answered(number, multiple=False, ok=True)) == 1
    assert len(window) == 1
    assert len(window._firsts) < 100


# --- out -----------------------------------------------------------------------------------------------------------

short = st.text(max_size=30)
any_message = st.builds(
    Outgoing,
    id=short,
    family=st.none(),
    exchange=short,
    routing_key=short,
    body=st.binary(max_size=600),
    type=short,
    timestamp=st.integers(0, 2**32 - 1),
    persistent=st.booleans(),
    mandatory=st.booleans(),
    content_type=short,
    headers=st.none() | st.dictionaries(st.text(max_size=9), short, max_size=2),
)


def frames_of(raw: bytes) -> Iterator[object]:
    while raw:
        size, channel, frame = pamqp.frame.unmarshal(raw)
        assert channel in (0, 7)
        yield frame
        raw = raw[size:]


def decoded(raw: bytes, frame_max: int) -> Iterator[Outgoing]:
    frames = frames_of(raw)
    for publish in frames:
        assert isinstance(publish, spec.Basic.Publish)
        header = next(frames)
        assert isinstance(header, ContentHeader)
        body = b""
        while len(body) < header.body_size:
            part = next(frames)
            assert isinstance(part, ContentBody)
            assert 0 < len(part.value) <= frame_max - 8
            body += part.value
        properties = header.properties
        assert properties.app_id == "coder-chat-relay"
        assert properties.timestamp is not None
        yield Outgoing(
            id=properties.message_id or "",
            family=None,
            exchange=publish.exchange,
            routing_key=publish.routing_key,
            body=body,
            type=properties.message_type or "",
            timestamp=int(properties.timestamp.timestamp()),
            persistent=properties.delivery_mode == 2,
            mandatory=publish.mandatory,
            content_type=properties.content_type or "",
            headers=cast(Mapping[str, str] | None, properties.headers),
        )


@given(st.lists(any_message, max_size=6), st.sampled_from([0, 64, 256]))
def test_frames_say_what_the_messages_say(messages: list[Outgoing], frame_max: int) -> None:
    encoder = Encoder(7, frame_max)
    for _ in range(2):  # the second time from memory
        parts: list[bytes] = []
        done = 0
        while done < len(messages):
            number = encoder.encode(messages[done:], parts)
            if number == 0:
                parts += encoder.frames(messages[done])
                number = 1
            done += number
        assert list(decoded(b"".join(parts), frame_max or 131072)) == messages


def test_more_routes_than_are_remembered_are_all_right() -> None:
    encoder = Encoder(7, 0)
    messages = [numbered(n)._replace(routing_key=f"key-{n}", type=f"type-{n}") for n in range(5000)]
    parts: list[bytes] = []
    assert encoder.encode(messages, parts) == 5000
    assert [(m.routing_key, m.type) for m in decoded(b"".join(parts), 131072)] == [
        (m.routing_key, m.type) for m in messages
    ]
    assert len(encoder._layouts) <= 4096


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(numbered(2)._replace(id="x" * 256), id="id too long"),
        pytest.param(numbered(2)._replace(id="\ud800"), id="no text"),
        pytest.param(numbered(2)._replace(routing_key="x" * 256), id="key too long"),
        pytest.param(numbered(2)._replace(timestamp=-1), id="before 1970"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_half_written(wrong: Outgoing) -> None:
    encoder = Encoder(7, 0)
    parts = [b"before"]
    with pytest.raises((ValueError, struct.error)):
        encoder.encode([numbered(1), wrong], parts)
    assert parts == [b"before"]
    with pytest.raises((ValueError, struct.error)):
        encoder.frames(wrong)  # at once, not at the first frame


# --- in ------------------------------------------------------------------------------------------------------------

OWN = 7
ack = st.builds(spec.Basic.Ack, delivery_tag=st.integers(0, 2**63 - 1), multiple=st.booleans())
nack = st.builds(spec.Basic.Nack, delivery_tag=st.integers(0, 2**63 - 1), multiple=st.booleans(), requeue=st.just(True))


def returned(message_id: str, body: bytes) -> list[pamqp.frame.FrameTypes]:
    properties = spec.Basic.Properties(message_id=message_id)
    frames: list[pamqp.frame.FrameTypes] = [
        spec.Basic.Return(reply_code=312, reply_text="NO_ROUTE", exchange="e", routing_key="k"),
        ContentHeader(body_size=len(body), properties=properties),
    ]
    return frames + [ContentBody(body[place : place + 40]) for place in range(0, len(body), 40)]


own_frames = st.one_of(
    ack.map(lambda frame: [frame]),
    nack.map(lambda frame: [frame]),
    st.builds(returned, st.text(min_size=1, max_size=30), st.binary(max_size=200)),
)
foreign_frames = st.sampled_from(
    [
        (0, [Heartbeat()]),
        (0, [spec.Connection.Blocked("memory")]),
        (OWN, [spec.Channel.Close(406, "PRECONDITION_FAILED", 60, 40)]),
        (OWN, [spec.Confirm.SelectOk()]),
        (3, [spec.Basic.Ack(delivery_tag=5)]),
        (3, returned("of another channel", b"x" * 90)),
    ]
)
conversation = st.lists(st.one_of(own_frames.map(lambda frames: (OWN, frames)), foreign_frames), max_size=12)


class Notes:
    def __init__(self) -> None:
        self.taken: list[object] = []

    def answered(self, tag: int, *, multiple: bool, ok: bool) -> None:
        self.taken.append((tag, multiple, ok))

    def came_back(self, message_id: str) -> None:
        self.taken.append(message_id)

    def read(self) -> None: ...

    def writable(self) -> None: ...

    def closing(self) -> None: ...

    def lost(self) -> None: ...


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for all examples: making one takes longer than what is tested."""
    with asyncio.Runner() as runner:
        yield runner


async def heard(raw: bytes, cuts: Sequence[int], *, attached: bool = True) -> tuple[list[object], bytes]:
    """What the receiver and what aiormq gets of bytes that arrive in pieces."""
    reader = asyncio.StreamReader()
    wire = Wire(reader, asyncio.get_running_loop())
    notes = Notes()
    wire.receivers = {OWN: notes} if attached else {}
    before = 0
    for cut in [*sorted(cuts), len(raw)]:
        if cut > before:
            wire.data_received(raw[before:cut])
            before = cut
    wire.eof_received()
    return notes.taken, await reader.read()


@given(conversation, st.lists(st.integers(0, 1500), max_size=40))
def test_answers_are_taken_out_however_they_arrive(
    runner: asyncio.Runner, talk: list[tuple[int, list[pamqp.frame.FrameTypes]]], cuts: list[int]
) -> None:
    raw, expected, foreign = b"", list[object](), list[bytes]()
    for channel, frames in talk:
        raw += b"".join(pamqp.frame.marshal(frame, channel) for frame in frames)
        for frame in frames:
            own = channel == OWN
            if own and isinstance(frame, spec.Basic.Ack | spec.Basic.Nack):
                expected.append((frame.delivery_tag, frame.multiple, isinstance(frame, spec.Basic.Ack)))
            elif own and isinstance(frame, ContentHeader):
                expected.append(frame.properties.message_id)
            elif not (own and isinstance(frame, spec.Basic.Return | ContentBody)):
                foreign.append(pamqp.frame.marshal(frame, channel))
    cuts = [cut for cut in cuts if cut < len(raw)]
    taken, passed = runner.run(heard(raw, cuts))
    assert taken == expected
    beat = pamqp.frame.marshal(Heartbeat(), 0)
    assert passed.replace(beat, b"") == b"".join(foreign).replace(beat, b"")


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_before_there_is_a_channel_all_is_passed_on_as_it_is(
    runner: asyncio.Runner, raw: bytes, cuts: list[int]
) -> None:
    taken, passed = runner.run(heard(raw, [cut for cut in cuts if cut < len(raw)], attached=False))
    assert taken == []
    assert passed == raw


def test_aiormq_hears_that_the_broker_lives_from_the_answers(runner: asyncio.Runner) -> None:
    _, passed = runner.run(heard(pamqp.frame.marshal(spec.Basic.Ack(1), OWN), []))
    assert passed == pamqp.frame.marshal(Heartbeat(), 0)


def test_a_nack_in_its_turn_is_no_confirm() -> None:
    window = window_of(2)
    assert not window.answered(1, multiple=False, ok=False)
    (batch,) = window.answered(2, multiple=False, ok=True)
    assert batch.nacked == {0}
