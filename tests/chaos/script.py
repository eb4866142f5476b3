"""What the owner of the chats does: deeds drawn from a seed, one after another in each chat, as long as it goes on."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import aiohttp

from relay.simulator import Simulator
from relay.simulator.dialect import DIALECTS
from relay.simulator.owner import IDLE, Owner, OwnerRefused

MOST_DEEDS = 300
STUCK_SECONDS = 4.0
PLAIN = (
    "text n={n} ms={ms}",
    "reason n={n} ms={ms}",
    "tool n={n} ms={ms} toolms=200",
    "tools2 n={n} ms={ms} toolms=300",
    "steps k=3 n={n} ms={ms} toolms=200",
    "unicode n={n} ms={ms}",
    "retry fails=1 n={n} ms={ms}",
    "retrymid n={n} ms={ms}",
    "fail n={n} ms={ms}",
    "badargs n={n} ms={ms}",
    "text n=600 ms=0",
    "big size=40000",
)


class Author(Owner):
    """An owner who counts the rewrites, archives and renames."""

    edits: Counter[UUID]

    async def edit(self, chat: UUID, message_id: int, text: str) -> None:
        self.edits[chat] += 1
        await super().edit(chat, message_id, text)

    async def wait_idle(self, chat: UUID) -> None:
        """As an owner waits, but a prompt that is stuck in the queue of a chat in error is taken back."""
        while True:
            try:
                async with asyncio.timeout(STUCK_SECONDS):
                    return await super().wait_idle(chat)
            except TimeoutError:
                if (await self._call("GET", f"/{chat}"))["status"] in IDLE:
                    for queued in await self.queue(chat):
                        await self.delete_queued(chat, queued)

    async def archive(self, chat: UUID, archived: bool) -> None:
        await self._call("PATCH", f"/{chat}", {"archived": archived}, forgiving=(400,))

    async def rename(self, chat: UUID, title: str) -> None:
        """Servers that take no titles ignore it."""
        await self._call("PATCH", f"/{chat}", {"title": title})


@dataclass
class Script:
    """One owner's chats. `stop` lets each chat end its deed."""

    owner: Author
    seed: int
    chats: int
    least_deeds: int  # of each chat
    stopped: bool = False
    done: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    made: list[UUID] = field(default_factory=list)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.chats):
                group.create_task(self._chat(number))

    def stop(self) -> None:
        self.stopped = True

    async def _chat(self, number: int) -> None:
        dice = random.Random(f"{self.seed}:chat:{number}")
        chat = await self.owner.create(_prompt(dice))
        self.made.append(chat)
        deeds: list[Callable[[UUID, random.Random], Awaitable[None]]] = [
            *[self.send] * 4,
            *[self.queue] * 2,
            *[self.interrupt] * 2,
            *[self.edit] * 3,
            self.edit_running,
            self.edit_twice,
            self.client_tool,
            self.agent,
            self.archive,
            self.rename,
        ]
        for count in range(MOST_DEEDS):
            if self.stopped and count >= self.least_deeds:
                break
            deed = dice.choice(deeds)
            try:
                await deed(chat, dice)
                self.done[deed.__name__] += 1
            except OwnerRefused as exc:
                self.refused.append(f"{chat} {deed.__name__}: {exc}")  # a restart put the chat where this cannot be
            await asyncio.sleep(dice.choice((0, 0, 0.2, 0.6)))
        await self.owner.wait_idle(chat)
        if dice.random() < 0.25:
            await self.owner.archive(chat, archived=True)

    async def send(self, chat: UUID, dice: random.Random) -> None:
        await self.owner.send(chat, _prompt(dice))
        await self.owner.wait_idle(chat)

    async def queue(self, chat: UUID, dice: random.Random) -> None:
        """Prompts while it works; one is taken back, one goes first."""
        await self.owner.send(chat, f"[text n={dice.randint(60, 150)} ms=30] keep busy")
        queued = []
        for number in range(dice.randint(1, 4)):
            answer = await self.owner.send(chat, f"[text n=15 ms=20] queued {number} {dice.random()}")
            queued.append((answer.get("queued_message") or {}).get("id"))
        there = [each for each in queued if each is not None]
        if there and dice.random() < 0.5:
            await self.owner.delete_queued(chat, dice.choice(there))
        waiting = await self.owner.queue(chat)
        if waiting and dice.random() < 0.5:
            await self.owner.promote(chat, dice.choice(waiting))
        await self.owner.wait_idle(chat)

    async def interrupt(self, chat: UUID, dice: random.Random) -> None:
        await self.owner.send(chat, dice.choice(("[text n=400 ms=30] long", "[slowtool n=30 ms=20 toolms=60000] tool")))
        await self.owner.wait_parts(chat, dice.randint(1, 20))
        await self.owner.interrupt(chat)
        await self.owner.wait_idle(chat)

    async def edit(self, chat: UUID, dice: random.Random) -> None:
        prompts = await self.owner.prompts(chat)
        await self.owner.edit(chat, dice.choice(prompts), _prompt(dice))
        await self.owner.wait_idle(chat)

    async def edit_running(self, chat: UUID, dice: random.Random) -> None:
        await self.owner.send(chat, "[text n=300 ms=30] a long answer")
        await self.owner.wait_parts(chat, dice.randint(1, 15))
        await self.owner.edit(chat, (await self.owner.prompts(chat))[-1], _prompt(dice))
        await self.owner.wait_idle(chat)

    async def edit_twice(self, chat: UUID, dice: random.Random) -> None:
        """One rewrite on the heels of another."""
        await self.edit(chat, dice)
        await self.edit(chat, dice)

    async def client_tool(self, chat: UUID, dice: random.Random) -> None:
        """The chat asks for a tool of the owner's, who answers or does not care."""
        await self.owner.send(chat, "[dyn n=20 ms=20] ask me")
        if dice.random() < 0.6:
            await self.owner.answer_calls(chat)
        else:
            await self.owner.wait_blocked(chat)
            await self.owner.interrupt(chat)
        await self.owner.wait_idle(chat)

    async def agent(self, chat: UUID, dice: random.Random) -> None:
        """The chat has a chat of its own."""
        await self.owner.send(chat, f"[agent n={dice.randint(10, 40)} ms=20] ask somebody else")
        await self.owner.wait_idle(chat)

    async def archive(self, chat: UUID, dice: random.Random) -> None:
        await self.owner.archive(chat, archived=True)
        await asyncio.sleep(dice.choice((0, 0.3, 1.0)))
        await self.owner.archive(chat, archived=False)

    async def rename(self, chat: UUID, dice: random.Random) -> None:
        await self.owner.rename(chat, f"title {dice.randint(0, 999)}")


def author_of(session: aiohttp.ClientSession, simulator: Simulator, speed: float) -> Author:
    """The simulator's user `ann`, wherever the server has its chats at the moment."""

    def prefix() -> str:
        return DIALECTS[simulator.config.dialect].features.prefixes[0]

    author = Author(session, simulator.url, simulator.users["ann"], simulator.model_configs[0].id, speed, prefix=prefix)
    author.edits = Counter()
    return author


def _prompt(dice: random.Random) -> str:
    directive: Any = dice.choice(PLAIN)
    return f"[{directive.format(n=dice.randint(20, 80), ms=dice.choice((15, 20, 30)))}] {dice.random()}"
