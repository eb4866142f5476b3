"""Histories that are edited, rewound and asked again at random, while somebody watches, is away, or just died: in the
end the events fold to what REST has."""

import asyncio
import random
from uuid import UUID

import pytest

from tests.e2e.consumer import fold
from tests.programs.world import World, until

TALKS = ("[text n=20 ms=10] say", "[steps k=2 n=15 ms=10 toolms=40] look", "[text n=300 ms=20] a long answer")


async def something_happens(world: World, chat: UUID, chance: random.Random, done: list[str]) -> None:
    """One step of a person at the chat: what it was is noted."""
    text = f"{chance.choice(TALKS)} {chance.randrange(10**6)}"
    prompts = await world.owner.prompts(chat)
    what = chance.choice(("send", "edit", "edit", "edit first", "interrupt"))
    if what == "send":
        await world.owner.send(chat, text)
    elif what == "interrupt":
        await world.owner.interrupt(chat)
    elif prompts:
        await world.owner.edit(chat, prompts[0] if what == "edit first" else chance.choice(prompts), text)
    done.append(what)


@pytest.mark.parametrize("seed", [18, 19])
async def test_whatever_is_edited_and_whoever_dies_the_events_fold_to_what_rest_has(world: World, seed: int) -> None:
    chance = random.Random(seed)
    chats = [await world.owner.create(TALKS[0]) for _ in range(2)]
    done: list[str] = []
    for life in range(4):
        async with world.worker(f"worker {life}") as (worker, _):
            await until(lambda: worker.discovery.state.sweeps)
            for _ in range(4):
                await something_happens(world, chance.choice(chats), chance, done)
                await asyncio.sleep(chance.uniform(0, 0.2))  # the moment is the point
            if chance.random() < 0.5:
                world.bus.down = True  # the worker's last words are lost: it ends as if it were killed
        world.bus.down = False
        for _ in range(2):
            await something_happens(world, chance.choice(chats), chance, done)  # and nobody looks
    async with world.worker("heir"):
        for chat in chats:
            await world.owner.wait_idle(chat)
        await world.until_equal(*chats)
    assert done.count("edit") + done.count("edit first") >= 5
    taken_back = 0
    for chat in chats:
        events = world.told(chat)
        told = {event["data"]["message"]["id"] for event in events if event["key"].startswith("chat.message.")}
        taken_back += len(told - fold(events).keys())
    assert taken_back, "no message was ever taken back"
