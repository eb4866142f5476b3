"""Chats made up from a seed: the same seed gives the same owners, texts and deeds in the same order."""

import random
from dataclasses import dataclass
from typing import Literal, TypeAlias
from uuid import UUID

from relay.simulator.owner import Owner

Deed: TypeAlias = Literal["send", "queue", "interrupt", "edit", "edit_running"]

_SUBJECTS = "the login page,a flaky test,the release notes,our billing job,the search index,a slow query".split(",")
_WISHES = "explain,rewrite,look into,summarise,clean up,draft a plan for".split(",")
_DEEDS: tuple[Deed, ...] = ("send", "send", "send", "queue", "interrupt", "edit", "edit_running")


@dataclass(frozen=True)
class Turn:
    """One deed of the owner: `texts` are the prompts of it, `parts` after how many parts an abort comes."""

    deed: Deed
    texts: tuple[str, ...]
    parts: int


@dataclass(frozen=True)
class Plan:
    name: str
    owner: str
    first: str
    turns: tuple[Turn, ...]


def plan_chat(seed: int, number: int) -> Plan:
    """The plan of one generated chat, about five to fifteen seconds of model time."""
    dice = random.Random(f"{seed}:chat:{number}")
    turns = []
    for _ in range(dice.randint(1, 4)):
        deed = dice.choice(_DEEDS)
        texts = tuple(_prompt(dice) for _ in range(3 if deed == "queue" else 2 if deed == "edit_running" else 1))
        turns.append(Turn(deed, texts, dice.randint(3, 12)))
    return Plan(f"generated {number}", dice.choice(("ann", "bob")), _prompt(dice), tuple(turns))


async def play(plan: Plan, owner: Owner, chat: UUID) -> None:
    """Do what the plan says; the chat exists and works on its first prompt."""
    await owner.wait_idle(chat)
    for turn in plan.turns:
        match turn.deed:
            case "send" | "queue":
                for text in turn.texts:
                    await owner.send(chat, text)
            case "interrupt":
                await owner.send(chat, turn.texts[0])
                await owner.wait_parts(chat, turn.parts)
                await owner.interrupt(chat)
            case "edit":
                prompts = await owner.prompts(chat)
                await owner.edit(chat, prompts[turn.parts % len(prompts)], turn.texts[0])
            case "edit_running":
                await owner.send(chat, turn.texts[0])
                await owner.wait_parts(chat, turn.parts)
                await owner.edit(chat, (await owner.prompts(chat))[-1], turn.texts[1])
        await owner.wait_idle(chat)


def _prompt(dice: random.Random) -> str:
    n, ms = dice.randint(15, 60), dice.choice((15, 20, 30))
    directive = dice.choice(
        (
            f"text n={n} ms={ms}",
            f"text n={n} ms={ms}",
            f"reason n={n // 2} ms={ms}",
            f"tool n={n} ms={ms}",
            f"tools2 n={n} ms={ms}",
            f"steps k={dice.randint(2, 4)} n={n} ms={ms}",
            f"unicode n={n} ms={ms}",
            f"retry fails=1 n={n} ms={ms}",
        )
    )
    return f"[{directive}] {dice.choice(_WISHES)} {dice.choice(_SUBJECTS)}"
