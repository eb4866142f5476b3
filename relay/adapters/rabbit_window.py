"""Which of the messages sent on one channel wait for the broker's answer. Pure: tags in, batches out.

The broker numbers what is published on a channel from 1 on (the tag), and answers each number, in any order, one by
one or "all up to here". One record per batch, not per message, so that an answer to thousands costs as much as one.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from relay.adapters.rabbit_outgoing import Outgoing

Owner = TypeVar("Owner")


class Batch(Generic[Owner]):
    """Messages of one owner that were sent one after the other.

    `nacked` and `returned` hold places in `messages`. A returned message is acked as well: nobody took it.
    """

    __slots__ = ("_answered", "_low", "first", "last", "messages", "nacked", "owner", "returned", "sent_at")

    def __init__(self, first: int, messages: Sequence[Outgoing], owner: Owner, sent_at: float) -> None:
        self.first = first  # tags, both inclusive
        self.last = first + len(messages) - 1
        self.messages = messages
        self.owner = owner
        self.sent_at = sent_at
        self.nacked: set[int] | None = None
        self.returned: set[int] | None = None
        self._low = first  # all below are answered
        self._answered: set[int] | None = None  # tags above `_low`, out of order

    @property
    def unanswered(self) -> int:
        return self.last - self._low + 1 - (len(self._answered) if self._answered else 0)

    def unanswered_places(self) -> Iterator[int]:
        for tag in range(self._low, self.last + 1):
            if self._answered is None or tag not in self._answered:
                yield tag - self.first

    def answer(self, tag: int, *, ok: bool) -> int:
        """Take in the answer to one; how many were answered by it: none if it was before."""
        if ok and tag == self._low and self._answered is None:
            self._low = tag + 1  # as it is while the broker answers in order
            return 1
        if tag < self._low or (self._answered is not None and tag in self._answered):
            return 0
        if not ok:
            self._nack(range(tag, tag + 1))
        if tag != self._low:
            if self._answered is None:
                self._answered = set()
            self._answered.add(tag)
        else:
            self._advance(tag + 1)
        return 1

    def answer_up_to(self, tag: int, *, ok: bool) -> int:
        """Take in the answer to all up to `tag` that have none yet; how many these were."""
        tag = min(tag, self.last)
        if tag < self._low:
            return 0
        before = self.unanswered
        if not ok:
            self._nack(range(self._low, tag + 1))
        self._advance(tag + 1)
        return before - self.unanswered

    def _nack(self, tags: range) -> None:
        places = {tag - self.first for tag in tags if self._answered is None or tag not in self._answered}
        self.nacked = places if self.nacked is None else self.nacked | places

    def _advance(self, low: int) -> None:
        if self._answered:
            self._answered.difference_update(range(self._low, low))
            while low in self._answered:
                self._answered.remove(low)
                low += 1
        self._low = low


class Window(Generic[Owner]):
    """The batches of one channel. An answer to what is not in it changes nothing: no batch gets another one's."""

    def __init__(self) -> None:
        self.unanswered = 0  # messages
        self._next = 1
        self._batches: OrderedDict[int, Batch[Owner]] = OrderedDict()  # by first tag, in order
        self._firsts: list[int] = []  # their first tags, and some of batches that are gone
        self._current: Batch[Owner] | None = None  # that the last answer was about, while it is here
        self._returned = 0  # tag of the last message that came back

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def oldest(self) -> Batch[Owner] | None:
        """The first batch that was sent of those that wait for an answer."""
        return next(iter(self._batches.values()), None)

    def add(self, messages: Sequence[Outgoing], owner: Owner, sent_at: float) -> Batch[Owner]:
        """Messages that were just sent, at least one. Their ids are not in the window already."""
        batch = Batch(self._next, messages, owner, sent_at)
        self._batches[batch.first] = batch
        self._firsts.append(batch.first)
        self._next = batch.last + 1
        self.unanswered += len(messages)
        return batch

    def answered(self, tag: int, *, multiple: bool, ok: bool) -> Sequence[Batch[Owner]]:
        """Batches that are whole now, and gone from the window. `multiple`: all up to `tag`; 0 is all there are."""
        if multiple:
            return self._answered_up_to(tag or self._next - 1, ok=ok)
        batch = self._current  # nearly always it is about the same one as the answer before
        if batch is None or not batch.first <= tag <= batch.last:
            batch = self._current = self._around(tag)
            if batch is None:
                return ()
        self.unanswered -= batch.answer(tag, ok=ok)
        return (self._drop(batch),) if batch.unanswered == 0 else ()

    def came_back(self, message_id: str) -> Outgoing | None:
        """The message that the broker returned; None: it is not in the window.

        The broker returns in the order of publishing, and before it answers: what lies between two returned messages
        was not returned, so the search goes on where the last one ended.
        """
        for start in (self._returned, 0):
            for place in range(max(bisect_right(self._firsts, start) - 1, 0), len(self._firsts)):
                batch = self._batches.get(self._firsts[place])
                if batch is None:
                    continue
                for index in batch.unanswered_places():
                    if batch.messages[index].id == message_id:
                        self._returned = batch.first + index
                        if batch.returned is None:
                            batch.returned = set()
                        batch.returned.add(index)
                        return batch.messages[index]
        return None

    def _answered_up_to(self, tag: int, *, ok: bool) -> list[Batch[Owner]]:
        whole: list[Batch[Owner]] = []
        while self._batches:
            batch = self._batches[next(iter(self._batches))]
            if batch.first > tag:
                break
            self.unanswered -= batch.answer_up_to(tag, ok=ok)
            if batch.unanswered:
                break
            whole.append(self._drop(batch))
        return whole

    def _around(self, tag: int) -> Batch[Owner] | None:
        place = bisect_right(self._firsts, tag) - 1
        batch = self._batches.get(self._firsts[place]) if place >= 0 else None
        return batch if batch is not None and tag <= batch.last else None

    def _drop(self, batch: Batch[Owner]) -> Batch[Owner]:
        del self._batches[batch.first]
        self._current = None
        if len(self._firsts) > 64 + 2 * len(self._batches):
            self._firsts = list(self._batches)
        return batch
