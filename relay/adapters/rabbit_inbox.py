"""What comes out of a RabbitMQ queue, one delivery after the other, until the broker delivers no more."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import cast

from aiormq import spec
from aiormq.abc import AbstractChannel, DeliveredMessage

from relay.adapters.rabbit_link import FAILURES, ask
from relay.core.errors import Unavailable


class Inbox:
    """The iterator of a consumer. Ends with `Unavailable`, at once, when the broker does not deliver any more.

    Args:
        patience: Seconds that an ack may take; None: nothing is acked.
    """

    def __init__(self, channel: AbstractChannel, patience: float | None, on_cancel: Callable[[], None]) -> None:
        self._channel = channel
        self._patience = patience
        self._on_cancel = on_cancel
        self._arrived: asyncio.Queue[DeliveredMessage | None] = asyncio.Queue()
        self._lost: str | None = None
        channel.on_consumer_cancel_callbacks.add(self._cancelled)
        channel.closing.add_done_callback(self._closed)

    async def put(self, message: DeliveredMessage) -> None:
        self._arrived.put_nowait(message)

    def __aiter__(self) -> "Inbox":
        return self

    async def __anext__(self) -> "RabbitDelivery":
        if self._lost is None:
            message = await self._arrived.get()
            if message is not None:
                return RabbitDelivery(message, self._channel, self._patience)
        # What arrived before the loss is left: it could not be acked any more, and comes again.
        raise Unavailable(self._lost or "the consumer was closed")

    def _cancelled(self, _: object) -> None:
        self._on_cancel()
        self._end("the broker cancelled the consumer: its queue was deleted, or it held a delivery for too long")

    def _closed(self, closed: "asyncio.Future[object]") -> None:
        error = None if closed.cancelled() else closed.exception()
        self._end(f"broker: {error or 'connection lost'}")

    def _end(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            self._arrived.put_nowait(None)


class RabbitDelivery:
    """One message of a queue or, with `patience` None, of a tap."""

    def __init__(self, message: DeliveredMessage, channel: AbstractChannel, patience: float | None) -> None:
        self._message = message
        self._frame = cast(spec.Basic.Deliver, message.delivery)
        self._channel = channel
        self._patience = patience
        self._ended = False

    @property
    def body(self) -> bytes:
        return self._message.body

    @property
    def routing_key(self) -> str:
        """As published, also of a dead letter, which travels under another one."""
        headers = self._message.header.properties.headers or {}
        match headers.get("x-death"):
            case [*_, {"routing-keys": [str() as published, *_]}]:  # the last entry is the first death
                return published
        return str(self._frame.routing_key)

    @property
    def redelivered(self) -> bool:
        return bool(self._frame.redelivered)

    async def ack(self) -> None:
        await self._end(self._channel.basic_ack)

    # reject, not nack: from RabbitMQ 4.3 on, a nack does not count towards the delivery limit.

    async def requeue(self) -> None:
        await self._end(partial(self._channel.basic_reject, requeue=True))

    async def dead_letter(self, reason: str) -> None:
        await self._end(partial(self._channel.basic_reject, requeue=False))

    async def _end(self, how: Callable[[int], Awaitable[None]]) -> None:
        if self._ended:
            raise RuntimeError("a delivery is ended once")
        self._ended = True
        if self._patience is None:
            return

        async def send() -> None:
            await how(int(self._frame.delivery_tag or 0))

        try:
            await ask(send(), self._patience)
        except FAILURES as exc:
            raise Unavailable(f"broker: {exc}") from exc
