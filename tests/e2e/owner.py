"""One owner and about ten chats, each talking on until it is told to stop: there is traffic all the time."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import aiohttp

from relay.simulator.owner import Owner
from relay.simulator.server import seeded_users
from tests.e2e.consumer import Consumer

SPEED = 2.0  # of the model
OWNER_SPEED = 0.5  # of looking again: looks cost the simulator time

LOOKS = 600  # failsafe: a minute


class Talk:
    """The owner's chats. Each deed ends with the chat idle."""

    def __init__(self, owner: Owner, seen: Consumer) -> None:
        self.owner = owner
        self.seen = seen
        self.rounds: dict[str, int] = {}
        self.stopped = False

    async def _send(self, chat: UUID, text: str) -> None:
        await self.owner.send(chat, text)
        await self.owner.wait_idle(chat)

    async def keep_on(self, name: str, first: str, act: Callable[[UUID], Awaitable[None]], gap: float) -> None:
        """Create a chat and act in it round by round."""
        chat = await self.owner.create(first)
        await self.owner.wait_idle(chat)
        self.rounds[name] = 0
        while not self.stopped:
            await act(chat)
            await self.owner.wait_idle(chat)
            self.rounds[name] += 1
            await asyncio.sleep(gap)

    async def text(self, chat: UUID) -> None:
        await self._send(chat, "[text n=120 ms=35] say something long")

    async def reasoning(self, chat: UUID) -> None:
        await self._send(chat, "[reason n=50 ms=35] think it over")

    async def tools(self, chat: UUID) -> None:
        await self._send(chat, "[steps k=4 n=40 ms=30 toolms=300] look through all of them")

    async def two_tools(self, chat: UUID) -> None:
        await self._send(chat, "[tools2 n=60 ms=30 toolms=400] compare two templates")

    async def retry(self, chat: UUID) -> None:
        await self._send(chat, "[retry fails=2 n=40 ms=30] ask a flaky provider")
        await self._send(chat, "[retrymid n=40 ms=30] go on, even if the line breaks")

    async def error(self, chat: UUID) -> None:
        await self._send(chat, "[fail n=25 ms=40] this one fails in the middle")
        await self._send(chat, "[unicode n=30 ms=30] and this one recovers")

    async def interrupt(self, chat: UUID) -> None:
        await self.owner.send(chat, "[text n=400 ms=40] tell a very long story")
        await self.owner.wait_parts(chat, 20)
        await self.owner.interrupt(chat)
        await self.owner.wait_answer(chat)
        await self._send(chat, "[text n=30 ms=30] a shorter one then")

    async def queue(self, chat: UUID) -> None:
        await self.owner.send(chat, "[text n=60 ms=40] keep busy")
        for number in range(3):
            await self.owner.send(chat, f"[text n=20 ms=25] queued prompt {number}")

    async def edit(self, chat: UUID) -> None:
        """Edit what was answered. What it cost is spent all the same, so that it must have been told before."""
        await self._send(chat, "[tool n=30 ms=25] a prompt that will be put better")
        cost = [m["id"] for m in await self.owner.messages(chat) if m.get("usage")]
        looks = 0  # since the last kill: before, no worker may have lived long enough
        while missing := set(cost) - {e["data"]["message"]["id"] for e in self.seen.named("chat.message.assistant")}:
            looks += self.stopped
            assert looks < LOOKS, f"{chat}: consumers never heard of {sorted(missing)}"
            await asyncio.sleep(0.1)
        prompts = await self.owner.prompts(chat)
        await self.owner.edit(chat, prompts[-1], "[text n=40 ms=25] the prompt, better")

    async def edit_unseen(self, chat: UUID) -> None:
        """Edit at once, whoever looks. A failed turn and an unfinished one cost nothing, so no spend goes unseen."""
        await self._send(chat, "[fail n=20 ms=30] it fails")
        await self.owner.edit(chat, (await self.owner.prompts(chat))[-1], "[text n=300 ms=30] a long answer")
        await self.owner.wait_parts(chat, 10)
        await self.owner.edit(chat, (await self.owner.prompts(chat))[-1], "[text n=20 ms=25] short")

    async def burst(self, chat: UUID) -> None:
        await self._send(chat, "[text n=800 ms=0] as fast as it goes")
        await self._send(chat, "[text n=30 ms=60] and slowly again")
        await self._send(chat, "[big size=100000] one large message")
        await self._send(chat, "[text n=30 ms=60] and slowly again")


CHATS = ("text", "reasoning", "tools", "two_tools", "retry", "error", "interrupt", "queue", "edit", "edit_unseen")


@asynccontextmanager
async def owner_of(url: str, model_id: str, seed: int) -> AsyncIterator[Owner]:
    """`ann`, acting over HTTP."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Owner(session, url, seeded_users(seed)["ann"], UUID(model_id), OWNER_SPEED)


@asynccontextmanager
async def talking(owner: Owner, seen: Consumer, names: tuple[str, ...], seed: int) -> AsyncIterator[Talk]:
    """All chats talk while the block runs; at its end each finishes its round."""
    talk = Talk(owner, seen)
    dice = random.Random(seed)
    async with asyncio.TaskGroup() as group:
        for name in names:
            act: Any = getattr(talk, name)
            group.create_task(talk.keep_on(name, "[text n=20 ms=30] hello", act, dice.uniform(1.0, 2.5)))
        try:
            yield talk
        finally:
            talk.stopped = True
