"""Publishing as aiormq does it, one task per message: slow, and what the pipelined way is compared with."""

import asyncio
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import partial

import aiormq
from aiormq import spec
from aiormq.abc import AbstractChannel, AbstractConnection

from relay.adapters.rabbit_link import FAILURES, Link, is_loss, open_channel
from relay.adapters.rabbit_outgoing import (
    CONFIRM_SECONDS,
    Outgoing,
    blocked_by_broker,
    count_answered,
    count_sent,
    count_stored,
    cut_off,
    not_stored,
    unroutable,
)
from relay.core.errors import TooLarge, Unavailable
from relay.core.events import APP_ID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CHECK_SECONDS = 1.0  # how often a publish that waits looks whether the broker blocks it


class PlainSender:
    """`Sender` without a window.

    Args:
        patience: Seconds for one call as a whole.
        first_patience: Seconds for the first connection.
    """

    def __init__(self, link: Link, *, patience: float, first_patience: float) -> None:
        self._link = link
        self._patience = patience
        self._first_patience = first_patience
        self._opening = asyncio.Lock()
        self._channel: AbstractChannel | None = None
        self._in_flight: dict[str, asyncio.Task[object]] = {}  # by message id

    async def check(self) -> None:
        with self._link.translated(self._first_patience):
            async with asyncio.timeout(self._first_patience):
                await self._open_channel(first=True)

    async def send(self, messages: Sequence[Outgoing]) -> None:
        if not messages:
            return
        tasks: list[asyncio.Task[object]] = []
        late = False
        try:
            with self._link.translated(self._patience):
                async with asyncio.timeout(self._patience):
                    channel = await self._open_channel()
                    # What is sent to a broker that does not read waits in the socket, and its repetitions behind it.
                    if (blocked := self._link.alarm.look(channel.connection)) is not None:
                        await asyncio.wait([blocked])
                    for message in messages:
                        # aiormq knows a returned message by its id. Two copies in flight, and the return of the first
                        # would be booked on the second: the first, which nobody took, would count as delivered.
                        while (copy := self._in_flight.get(message.id)) is not None:
                            await asyncio.wait([copy])
                        tasks.append(self._start(channel, message))
                    await self._until_answered(tasks, channel.connection)
        except Unavailable as exc:
            late = isinstance(exc.__cause__, TimeoutError)
            connection = None if self._channel is None else self._channel.connection
            if late and connection is not None and self._link.alarm.look(connection) is not None:
                raise blocked_by_broker() from exc
            raise
        finally:
            undone = [task for task in tasks if not task.done()]
            for task in undone:
                task.cancel()
            if undone:
                await asyncio.wait(undone)
            outcomes = [_outcome_of(task, late=late) for task in tasks]
            for outcome in outcomes:
                count_answered(outcome, 1)
        for message, task, outcome in zip(messages, tasks, outcomes, strict=True):
            if outcome == "returned":
                self._link.doubt()  # somebody removed a binding or a queue: put it back before the next
                raise unroutable(message)
            if outcome == "error" and not _is_failure(task):
                await task  # a mistake of ours, not of the broker's: raise it
        if any(outcome != "confirmed" for outcome in outcomes):
            raise not_stored() if "nacked" in outcomes else self._cut_off(messages, channel)

    async def _open_channel(self, *, first: bool = False) -> AbstractChannel:
        connection = await self._link.connection(first=first)
        async with self._opening:
            if self._channel is None or self._channel.is_closed or self._channel.connection is not connection:
                self._channel = await open_channel(connection, self._patience, confirms=True)
            return self._channel

    def _start(self, channel: AbstractChannel, message: Outgoing) -> asyncio.Task[object]:
        properties = spec.Basic.Properties(
            message_id=message.id,
            message_type=message.type,
            app_id=APP_ID,
            timestamp=_EPOCH + timedelta(seconds=message.timestamp),
            content_type=message.content_type,
            delivery_mode=2 if message.persistent else 1,
            headers=None if message.headers is None else dict(message.headers),
        )
        # The task does not run before the next await: tasks begin, and so publish, in the order of their making.
        task: asyncio.Task[object] = asyncio.create_task(
            channel.basic_publish(
                message.body,
                exchange=message.exchange,
                routing_key=message.routing_key,
                properties=properties,
                mandatory=message.mandatory,
            )
        )
        self._in_flight[message.id] = task
        count_sent([len(message.body)])
        task.add_done_callback(partial(self._on_answer, message, time.monotonic()))
        return task

    def _on_answer(self, message: Outgoing, started: float, task: asyncio.Task[object]) -> None:
        del self._in_flight[message.id]
        if _outcome_of(task, late=False) == "confirmed":
            CONFIRM_SECONDS.observe(time.monotonic() - started)
            count_stored([message])

    def _cut_off(self, messages: Sequence[Outgoing], channel: AbstractChannel) -> TooLarge | Unavailable:
        closing = channel.closing
        reason = closing.exception() if closing.done() and not closing.cancelled() else None
        if isinstance(reason, aiormq.ChannelNotFoundEntity):
            self._link.doubt()
        return cut_off(messages, reason)

    async def _until_answered(self, tasks: Sequence[asyncio.Task[object]], connection: AbstractConnection) -> None:
        waiting = set(tasks)
        while waiting:
            _, waiting = await asyncio.wait(waiting, timeout=_CHECK_SECONDS)
            if waiting:
                self._link.alarm.look(connection)


def _outcome_of(task: asyncio.Task[object], *, late: bool) -> str:
    if task.cancelled():
        return "timeout" if late else "error"
    match task.exception():
        case None:
            return "confirmed"
        case aiormq.PublishError():
            return "returned"
        case aiormq.DeliveryError():
            return "nacked"
    return "error"


def _is_failure(task: asyncio.Task[object]) -> bool:
    """Whether it ended because the broker or the way to it failed."""
    return task.cancelled() or isinstance(error := task.exception(), FAILURES) or is_loss(error)
