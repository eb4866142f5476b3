"""Named scenarios that show what chats do: each acts as an owner would, through the HTTP API of a running simulator."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from uuid import UUID

import aiohttp

from relay.simulator.dialect import DIALECTS
from relay.simulator.generate import Plan, plan_chat, play
from relay.simulator.owner import Owner, OwnerRefused
from relay.simulator.server import Simulator


@dataclass(frozen=True)
class Progress:
    """Something a driven chat's owner has done: `created`, what it sent, `done`; `lost` with the server's data."""

    name: str
    owner: str
    chat_id: UUID
    step: str


@dataclass(frozen=True)
class DrivenChat:
    """A chat that was driven to its end; `owner` is the user name."""

    name: str
    owner: str
    owner_id: UUID
    chat_id: UUID


@dataclass
class Stage:
    """What a scenario has at hand."""

    simulator: Simulator
    owner: Owner
    chat: UUID
    tell: Callable[[str], None]

    async def send(self, text: str) -> None:
        """Post a prompt and wait for the end of the turn."""
        self.tell(text)
        await self.owner.send(self.chat, text)
        await self.owner.wait_idle(self.chat)

    async def interrupt_after(self, parts: int) -> None:
        """Interrupt the running step once it has shown so many parts, and wait for what it saves."""
        await self.owner.wait_parts(self.chat, parts)
        self.tell("interrupt")
        await self.owner.interrupt(self.chat)
        await self.owner.wait_answer(self.chat)
        await self.owner.wait_idle(self.chat)

    async def until_followed(self) -> None:
        """Wait, a second at the most, for somebody else who has the chat's stream open."""
        for _ in range(20):
            await asyncio.sleep(0.05)  # first of all, the owner's own socket has to be gone
            if self.simulator.streams(self.chat):
                return


Act: TypeAlias = Callable[[Stage], Awaitable[None]]


async def reasoning(stage: Stage) -> None:
    await stage.send("[reason n=40 ms=35] and why is that?")


async def tools(stage: Stage) -> None:
    await stage.send("[steps k=4 n=50 ms=30 toolms=300] look through all of them")
    await stage.send("[slowtool n=40 ms=30 toolms=900] and once more, slowly")


async def two_tools(stage: Stage) -> None:
    await stage.send("[tools2 n=60 ms=30] compare two templates again")


async def retry(stage: Stage) -> None:
    await stage.send("[retrymid n=50 ms=30] go on, even if the line breaks")


async def error(stage: Stage) -> None:
    await stage.send("[fail n=25 ms=40] this one fails in the middle")
    await stage.send("[text n=60 ms=30] and this one recovers")


async def interrupt(stage: Stage) -> None:
    await stage.interrupt_after(30)
    stage.tell("[slowtool n=60 ms=30 toolms=60000] wait for a tool")
    await stage.owner.send(stage.chat, "[slowtool n=60 ms=30 toolms=60000] wait for a tool")
    await stage.interrupt_after(5)
    await stage.send("[text n=50 ms=30] a shorter story then")


async def queue(stage: Stage) -> None:
    await stage.owner.wait_parts(stage.chat, 10)
    queued = []
    for number in range(4):
        text = f"[text n=30 ms=25] queued prompt {number}"
        stage.tell(text)
        queued.append((await stage.owner.send(stage.chat, text)).get("queued_message", {}).get("id"))
    if None in queued:  # the server is too fast for this owner: the chat was idle again
        return
    await stage.owner.delete_queued(stage.chat, queued[1])
    await stage.owner.wait_parts(stage.chat, 40)
    waiting = await stage.owner.queue(stage.chat)
    if queued[2] in waiting:
        stage.tell("promote the third")
        await stage.owner.promote(stage.chat, queued[2])
    await stage.owner.wait_idle(stage.chat)


async def edit(stage: Stage) -> None:
    await stage.send("[tool n=30 ms=25] a second prompt")
    await stage.send("[text n=30 ms=25] a third prompt")
    prompts = await stage.owner.prompts(stage.chat)
    stage.tell("edit the second prompt")
    await stage.owner.edit(stage.chat, prompts[1], "[text n=40 ms=25] the second prompt, better")
    await stage.owner.wait_idle(stage.chat)
    stage.tell("[text n=300 ms=30] a long answer")
    await stage.owner.send(stage.chat, "[text n=300 ms=30] a long answer")
    await stage.owner.wait_parts(stage.chat, 20)
    stage.tell("edit while it runs")
    prompts = await stage.owner.prompts(stage.chat)
    await stage.owner.edit(stage.chat, prompts[-1], "[text n=30 ms=25] a short answer instead")


async def burst(stage: Stage) -> None:
    await stage.send("[unicode n=60 ms=10] odd letters")
    await stage.send("[big size=300000] one large message")
    await stage.send("[text n=2000 ms=0] and fast again")


async def cut(stage: Stage) -> None:
    for parts in (20, 60, 100):
        await stage.owner.wait_parts(stage.chat, parts)
        await stage.until_followed()
        stage.tell("cut the stream")
        stage.simulator.cut(stage.chat)
    await stage.owner.wait_idle(stage.chat)
    await stage.send("[text n=40 ms=30] and on with a whole line")


async def client_tool(stage: Stage) -> None:
    """Where servers know no tools of clients, the call fails and the model goes on."""
    stage.tell("give a result")
    await stage.owner.answer_calls(stage.chat)
    await stage.owner.wait_idle(stage.chat)
    stage.tell("[dyn n=30 ms=25] ask once more")
    await stage.owner.send(stage.chat, "[dyn n=30 ms=25] ask once more")
    await stage.owner.wait_blocked(stage.chat)
    stage.tell("interrupt instead of an answer")
    await stage.owner.interrupt(stage.chat)
    await stage.owner.wait_idle(stage.chat)
    await stage.send("[text n=30 ms=25] never mind")


async def text(stage: Stage) -> None:
    await stage.send("[text n=60 ms=35] and a second question")
    await stage.send("[text n=40 ms=35] thank you")


# name -> (first prompt, what follows)
SCENARIOS: dict[str, tuple[str, Act]] = {
    "reasoning": ("[reason n=60 ms=35] think it over", reasoning),
    "tools": ("[tool n=60 ms=30 toolms=500] which templates are there?", tools),
    "two tools": ("[tools2 n=60 ms=30 toolms=400] compare two templates", two_tools),
    "retry": ("[retry fails=2 n=60 ms=30] ask a flaky provider", retry),
    "error": ("[text n=50 ms=30] so far so good", error),
    "interrupt": ("[text n=400 ms=40] tell a very long story", interrupt),
    "queue": ("[text n=200 ms=40] keep busy", queue),
    "edit": ("[text n=40 ms=25] a first prompt", edit),
    "burst": ("[text n=3000 ms=0] as fast as it goes", burst),
    "cut": ("[text n=180 ms=35] a long answer over a bad line", cut),
    "text": ("[text n=80 ms=35] say something", text),
    "client tool": ("[dyn n=40 ms=30] ask me for a number", client_tool),
}


async def run_scenarios(
    simulator: Simulator,
    *,
    chats: int | None = None,
    named: Sequence[str] | None = None,
    generated: int | None = None,
    seed: int = 0,
    speed: float = 1.0,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
) -> list[DrivenChat]:
    """Drive chats at once, first named scenarios, then ones made up from the seed.

    Args:
        chats: How many in all: the scenarios in their order, then generated chats. By default every scenario once.
        named, generated: Which scenarios, and how many generated chats; instead of `chats`.
        speed: How much faster than a person the owners look again; normally the simulator's own speed.

    Returns:
        The driven chats in the order above, when every chat of the simulator is idle. Sub-agents are not in it,
        nor is a chat that went with the server's data.
    """
    if named is None:
        named = list(SCENARIOS)[:chats]
    if generated is None:
        generated = max(0, (chats or 0) - len(SCENARIOS))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        model_id = simulator.model_configs[0].id

        def prefix() -> str:
            return DIALECTS[simulator.config.dialect].features.prefixes[0]

        owners = {
            name: Owner(session, simulator.url, user, model_id, speed, prefix=prefix)
            for name, user in simulator.users.items()
        }

        async def drive(name: str, owner: Owner, first: str, act: Act) -> DrivenChat | None:
            chat = await owner.create(first)
            who = owner.user.username

            def tell(step: str) -> None:
                on_progress(Progress(name, who, chat, step))

            tell("created")
            try:
                await act(Stage(simulator, owner, chat, tell))
                await owner.wait_idle(chat)
            except OwnerRefused:
                if chat in simulator.database.chats:
                    raise
                tell("lost")
                return None
            tell("done")
            return DrivenChat(name, who, owner.user.id, chat)

        def played(plan: Plan) -> Act:
            return lambda stage: play(plan, stage.owner, stage.chat)

        async with asyncio.TaskGroup() as group:
            tasks = []
            for number, name in enumerate(named):
                first, act = SCENARIOS[name]
                owner = owners["ann" if number % 2 == 0 else "bob"]
                tasks.append(group.create_task(drive(name, owner, first, _after_first(name, act))))
            for number in range(generated):
                plan = plan_chat(seed, number)
                tasks.append(group.create_task(drive(plan.name, owners[plan.owner], plan.first, played(plan))))
        # A run may still save what an interrupt left; no event of the API tells when the last one has ended.
        while not simulator.is_idle():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return [chat for task in tasks if (chat := task.result()) is not None]


def _after_first(name: str, act: Act) -> Act:
    """Most scenarios begin when the first turn has ended; four act within it."""
    if name in ("interrupt", "queue", "cut", "client tool"):
        return act

    async def patient(stage: Stage) -> None:
        await stage.owner.wait_idle(stage.chat)
        await act(stage)

    return patient
