"""Pipelined publishing: many callers share one channel and a window of messages that the broker has not answered yet.

A caller whose messages are refused, whose time is over or who gives up is the only one who is told. What was sent for
it stays in the window until it is answered, so that no answer is booked on anybody else.
"""

import asyncio
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter

import aiormq
from aiormq.abc import AbstractChannel

from relay.adapters.rabbit_link import Link, ask, leave_behind, open_channel
from relay.adapters.rabbit_outgoing import (
    CONFIRM_SECONDS,
    Outgoing,
    blocked_by_broker,
    count_answered,
    count_sent,
    count_stored,
    cut_off,
    late,
    not_stored,
    unroutable,
)
from relay.adapters.rabbit_window import Batch, Window
from relay.adapters.rabbit_wire import Encoder, Wire
from relay.core.errors import Unroutable

_TURN = 64  # messages of one caller before the next one has its turn
_WRITE_BYTES = 256 * 1024  # handed to the socket at once
_GIVEN_UP = 64  # calls that nobody waits for any more, and that may still stand in the queue
_LOOK_SECONDS = 1.0  # how often it is looked whether the broker blocks publishers, and for deadlines

_id_of = attrgetter("id")


class PipelinedSender:
    """`Sender` of thousands of callers at once.

    Args:
        link: Its connections are made with `Wire`.
        patience: Seconds for one call as a whole.
        first_patience: Seconds for the first connection.
        size: Messages that may wait for the broker's answer at once.
    """

    def __init__(self, link: Link, *, patience: float, first_patience: float, size: int) -> None:
        self._link = link
        self._patience = patience
        self._first_patience = first_patience
        self._size = size
        self._opening = asyncio.Lock()
        self._lane: _Lane | None = None

    async def check(self) -> None:
        with self._link.translated(self._first_patience):
            async with asyncio.timeout(self._first_patience):
                await self._open_lane(first=True)

    async def send(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        deadline = asyncio.get_running_loop().time() + self._patience
        lane = self._lane
        if lane is None or lane.ended or not self._link.is_prepared:
            with self._link.translated(self._patience):
                async with asyncio.timeout_at(deadline):
                    lane = await self._open_lane()
        call = lane.begin(messages, deadline)
        try:
            failure = await call.answer
        except asyncio.CancelledError:
            lane.give_up(call, "error")
            raise
        if failure is not None:
            try:
                raise failure
            finally:
                del call, failure  # or they and this frame keep one another, and the messages

    async def _open_lane(self, *, first: bool = False) -> "_Lane":
        connection = await self._link.connection(first=first)
        wire = self._link.wire
        if not isinstance(wire, Wire):
            raise TypeError("a pipelined publisher needs connections with a Wire")
        async with self._opening:
            lane = self._lane
            if lane is None or lane.ended or lane.channel.connection is not connection:
                channel = await open_channel(connection, self._patience, confirms=True)
                lane = self._lane = _Lane(self._link, channel, wire, patience=self._patience, size=self._size)
            return lane


class _Call:
    """One `send`. `answer` is None when all is confirmed, else what to raise."""

    __slots__ = ("answer", "batches", "deadline", "failure", "messages", "sent")

    def __init__(self, messages: Sequence[Outgoing], deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        self.messages = messages
        self.deadline = deadline
        self.sent = 0
        self.batches: set[Batch[_Call]] = set()  # not answered yet
        self.failure: Exception | None = None
        self.answer: asyncio.Future[Exception | None] = loop.create_future()

    def end(self, failure: Exception | None) -> None:
        self.messages = ()  # a batch that is still to be answered has its own
        self.batches.clear()
        if not self.answer.done():
            self.answer.set_result(failure)


class _Lane:
    """One channel with its window. Ends with the channel, and everybody on it is told."""

    def __init__(self, link: Link, channel: AbstractChannel, wire: Wire, *, patience: float, size: int) -> None:
        self.channel = channel
        self.ended = False
        self._link = link
        self._wire = wire
        self._patience = patience
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._encoder = Encoder(channel.number, channel.connection.connection_tune.frame_max)
        self._window: Window[_Call] = Window()
        self._ids: set[str] = set()  # of what is in the window
        self._calls: set[_Call] = set()  # all that are not ended
        self._waiting: deque[_Call] = deque()  # those that have something to send, whose turn it is first
        self._held: list[_Call] = []  # those that wait for the answer to another message of the same id
        self._rest: Iterator[bytes] | None = None  # of a message that is written in pieces
        self._whole: list[Batch[_Call]] = []  # answered, to be looked at when all answers there are were read
        self._filling = False  # it will be sent in this turn of the loop
        self._closing = False  # by the broker; aiormq says why in a moment
        self._blocked_at = 0.0  # when the broker was seen to block publishers last
        self._watch: asyncio.TimerHandle | None = None
        wire.receivers[channel.number] = self
        channel.closing.add_done_callback(self._on_closed)

    # --- callers

    def begin(self, messages: Sequence[Outgoing], deadline: float) -> _Call:
        call = _Call(messages, deadline, self._loop)
        self._calls.add(call)
        self._waiting.append(call)
        self._fill_soon()
        if self._watch is None or deadline < self._watch.when():
            self._watch_until(deadline)
        return call

    def give_up(self, call: _Call, outcome: str, failure: Exception | None = None) -> None:
        """Nobody waits for the call any more. What was not sent is not sent; what was, stays in the window."""
        if call not in self._calls:
            return
        self._calls.remove(call)
        for batch in call.batches:
            unanswered = set(batch.unanswered_places()) - (batch.returned or set())
            stored = _count_refused(batch, unanswered)
            count_answered(outcome, len(unanswered))
            count_answered("confirmed", len(stored))
            count_stored(stored)
            CONFIRM_SECONDS.observe_times(self._loop.time() - batch.sent_at, len(stored))
        call.end(failure)
        if len(self._waiting) + len(self._held) > _GIVEN_UP + 2 * len(self._calls):
            # While the broker blocks publishers nobody else takes them out, and they are tried again and again.
            self._waiting = deque(call for call in self._waiting if call in self._calls)
            self._held = [call for call in self._held if call in self._calls]

    # --- out

    def _fill_soon(self) -> None:
        if not self._filling:
            self._filling = True
            self._loop.call_soon(self._fill)

    def _fill(self) -> None:
        """Send as much as the window and the socket take, everybody in turn."""
        self._filling = False
        if self.ended or self._closing:
            return  # one frame more, and the broker ends the connection with everybody on it
        if self._rest is not None and (self._wire.full or not self._write_rest()):
            return
        if self._waiting and (blocked := self._link.alarm.look(self.channel.connection)) is not None:
            blocked.remove_done_callback(self._on_unblocked)
            blocked.add_done_callback(self._on_unblocked)
            return
        parts: list[bytes] = []
        sizes: list[int] = []  # of the bodies
        unwritten, now = 0, self._loop.time()
        while self._waiting and not self._wire.full:
            room = self._size - self._window.unanswered
            if room <= 0:
                break
            call = self._waiting.popleft()
            if call.answer.done():
                continue
            before = len(sizes)
            self._take(call, min(room, _TURN), parts, sizes, now)
            unwritten += sum(sizes[before:])
            if self._rest is not None or unwritten >= _WRITE_BYTES:
                self._flush(parts)
                unwritten = 0
                if not self._write_rest():
                    break
        self._flush(parts)
        if sizes:
            count_sent(sizes)

    def _take(self, call: _Call, most: int, parts: list[bytes], sizes: list[int], now: float) -> None:
        """Put the next messages of a call into the window and their frames into `parts`, or one into `_rest`."""
        messages = self._sendable(call, most)
        if not messages:
            return
        try:
            number = self._encoder.encode(messages, parts)
            if number == 0:
                self._rest = self._encoder.frames(messages[0])
        except (ValueError, struct.error) as exc:
            self.give_up(call, "error", exc)  # a mistake of ours, not of the broker's
            return
        taken = messages if number == len(messages) else messages[: number or 1]
        self._ids.update(map(_id_of, taken))
        call.batches.add(self._window.add(taken, call, now))
        call.sent += len(taken)
        if call.sent < len(call.messages):
            self._waiting.append(call)
        sizes += [len(message.body) for message in taken]

    def _sendable(self, call: _Call, most: int) -> Sequence[Outgoing]:
        """The next messages without those whose id is in the window: a returned message is known by nothing else."""
        messages = call.messages[call.sent : call.sent + most]
        if len(messages) == 1 and messages[0].id not in self._ids:
            return messages  # as most callers have it
        ids = set(map(_id_of, messages))
        if len(ids) == len(messages) and ids.isdisjoint(self._ids):
            return messages
        ids = set()
        for place, message in enumerate(messages):
            if message.id in self._ids or message.id in ids:
                messages = messages[:place]
                break
            ids.add(message.id)
        if not messages:
            self._held.append(call)
        return messages

    def _flush(self, parts: list[bytes]) -> None:
        if parts:
            self._wire.write(b"".join(parts))
            parts.clear()

    def _write_rest(self) -> bool:
        """Write a message that is sent in pieces, as far as the socket takes it; whether all of it was."""
        for piece in self._rest or ():
            self._wire.write(piece)
            if self._wire.full:
                return False
        self._rest = None
        return True

    def _on_unblocked(self, _: asyncio.Task[None]) -> None:
        self._blocked_at = self._loop.time()
        self._fill_soon()

    # --- in

    def answered(self, tag: int, *, multiple: bool, ok: bool) -> None:
        self._whole += self._window.answered(tag, multiple=multiple, ok=ok)

    def came_back(self, message_id: str) -> None:
        self._window.came_back(message_id)

    def writable(self) -> None:
        self._fill()

    def lost(self) -> None:
        self._end(None)

    def closing(self) -> None:
        self._closing = True

    def read(self) -> None:
        whole, self._whole = self._whole, []
        if whole:
            self._settle(whole)
        if self._waiting:
            self._fill()

    def _settle(self, whole: list[Batch[_Call]]) -> None:
        now, forget = self._loop.time(), self._ids.difference_update
        waited: dict[float, int] = {}  # messages by when they were sent: many at once
        stored: list[Outgoing] = []
        for batch in whole:
            messages = batch.messages
            forget([message.id for message in messages])
            call = batch.owner
            if batch not in call.batches:
                continue  # nobody waits for it any more
            call.batches.remove(batch)
            if batch.returned is not None or batch.nacked is not None:
                messages = self._refused(batch)
            waited[batch.sent_at] = waited.get(batch.sent_at, 0) + len(messages)
            stored += messages
            if not call.batches and call.sent == len(call.messages):
                self._calls.remove(call)
                call.end(call.failure)
        count_answered("confirmed", len(stored))
        count_stored(stored)
        for sent_at, number in waited.items():
            CONFIRM_SECONDS.observe_times(now - sent_at, number)
        if self._held:
            self._waiting.extendleft(reversed(self._held))
            self._held = []

    def _refused(self, batch: Batch[_Call]) -> Sequence[Outgoing]:
        """Note what the broker did not take of a batch; what it did take."""
        call = batch.owner
        if batch.returned:
            self._link.doubt()  # somebody removed a binding or a queue: put it back before the next
            if not isinstance(call.failure, Unroutable):
                call.failure = unroutable(batch.messages[min(batch.returned)])
        elif call.failure is None:
            call.failure = not_stored()
        return _count_refused(batch, set())

    # --- the end

    def _watch_until(self, deadline: float) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_at(min(deadline, self._loop.time() + _LOOK_SECONDS), self._look)

    def _look(self) -> None:
        """End the calls whose time is over: one timer for all of them."""
        self._watch = None
        is_blocked = self._link.alarm.look(self.channel.connection) is not None
        now = self._loop.time()
        if is_blocked:
            self._blocked_at = now
        for call in [call for call in self._calls if call.deadline <= now]:
            self.give_up(call, "timeout", blocked_by_broker() if is_blocked else late(self._patience))
        oldest = self._window.oldest
        if oldest is not None and max(oldest.sent_at, self._blocked_at) < now - 2 * self._patience:
            # This answer will not come. It fills the window, and holds up whoever sends the same message again.
            self._end(None)
            leave_behind(asyncio.create_task(ask(self.channel.close(), self._patience)))
        elif self._calls:
            self._watch_until(min(call.deadline for call in self._calls))

    def _on_closed(self, closed: "asyncio.Future[object]") -> None:
        self._end(None if closed.cancelled() else closed.exception())

    def _end(self, reason: BaseException | None) -> None:
        if self.ended:
            return
        self.ended = True
        self._wire.receivers[self.channel.number] = None
        if self._watch is not None:
            self._watch.cancel()
        if isinstance(reason, aiormq.ChannelNotFoundEntity):
            self._link.doubt()
        for call in list(self._calls):
            self.give_up(call, "error", cut_off(call.messages, reason))
        self._waiting.clear()
        self._held.clear()
        self._ids.clear()
        self._rest = None
        self._window = Window()


def _count_refused(batch: Batch[_Call], unanswered: set[int]) -> Sequence[Outgoing]:
    """Count what was returned and nacked of a batch; what is neither that nor `unanswered`."""
    returned = batch.returned or set()
    nacked = (batch.nacked or set()) - returned
    count_answered("returned", len(returned))
    count_answered("nacked", len(nacked))
    elsewhere = returned | nacked | unanswered
    return [message for place, message in enumerate(batch.messages) if place not in elsewhere]
