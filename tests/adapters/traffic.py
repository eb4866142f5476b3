"""Events for the tests of the bus, and ways to take them back."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from uuid import UUID

from relay.core.events import ChatRef, Event, MessageData, Origin, PreviewData, decode_event, event_id
from relay.ports import Bus, Delivery

CHAT = ChatRef("https://coder.example", UUID(int=1), UUID(int=2), UUID(int=1))
PROMPT = 10.0  # seconds; failsafe, nothing waits for it when all is well


def message(number: int, role: str = "assistant", text: str = "") -> Event:
    data = MessageData(message={"id": number, "role": role}, text=text)
    return event("message", role, data, number)


def preview(number: int) -> Event:
    data = PreviewData(step=0, role="assistant", part={"type": "text", "text": "."}, offset=number)
    return event("preview", "text", data, number)


def event(kind: str, detail: str, data: MessageData | PreviewData, number: int) -> Event:
    return Event(
        id=event_id(CHAT, kind, number),
        family="chat",
        event=kind,
        detail=detail,
        chat=CHAT,
        content=data,
        time="2026-03-01T12:00:00Z",
        origin=Origin.LIVE,
        session=1,
        position=number,
    )


async def take(deliveries: AsyncIterator[Delivery], number: int = 1) -> list[Delivery]:
    async with asyncio.timeout(PROMPT):
        return [await anext(deliveries) for _ in range(number)]


def positions(deliveries: Sequence[Delivery]) -> list[int]:
    return [decode_event(d.body, d.routing_key).position for d in deliveries]


async def until_depth(bus: Bus, queue: str, depth: int) -> None:
    """Return once so many messages are ready; a broker counts them a moment later."""
    async with asyncio.timeout(PROMPT):
        while await bus.depth(queue) != depth:
            await asyncio.sleep(0.02)
