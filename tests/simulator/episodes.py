"""What the tests of servers since 2.35 have in common: frames in a few words, and ways to get a chat going."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from tests.simulator.listener import Client, Json, Listener, events_of, tell
from tests.simulator.recording import collapse


def story(frame: str) -> list[str]:
    """A frame in a few words; parts by their episode, runs of one as one."""
    return collapse([_told(event) for event in events_of(frame)])


def stories(seen: Listener) -> list[str]:
    """The same of all frames together."""
    return collapse([_told(event) for event in seen.events])


def _told(event: Json) -> str:
    part = event.get("message_part")
    return f"p{part['history_version']}.{part['generation_attempt']}" if part else tell(event)


def idle(seen: Listener) -> bool:
    return any(tell(event) in ("waiting", "error") for event in seen.events[-2:]) and len(seen.frames) > 1


def part_seqs(seen: Listener) -> list[tuple[int, int, int]]:
    return [(part["history_version"], part["generation_attempt"], part["seq"]) for part in seen.parts]


async def finished(client: Client, *texts: str) -> UUID:
    owner = client.owner()
    chat = await owner.create(texts[0])
    client.simulator.poll(chat)
    await owner.wait_idle(chat)
    for text in texts[1:]:
        await owner.send(chat, text)
        client.simulator.poll(chat)
        await owner.wait_idle(chat)
    return chat


async def send(client: Client, chat: UUID, text: str, **fields: Any) -> Json:
    body = {"content": [{"type": "text", "text": text}], **fields}
    answer = await client.call("POST", f"/{chat}/messages", body)
    assert answer.status == 200, answer
    return answer.json


async def asking(client: Client, text: str = "[dyn n=3 ms=2] call") -> UUID:
    """A new chat whose client has a tool of its own."""
    body = {
        "content": [{"type": "text", "text": text}],
        "organization_id": str(client.simulator.organization_id),
        "model_config_id": str(client.simulator.model_configs[0].id),
        "unsafe_dynamic_tools": [{"name": "lab_tool", "description": "", "input_schema": {"type": "object"}}],
    }
    answer = await client.call("POST", "", body)
    assert answer.status == 201, answer
    return UUID(answer.json["id"])


@asynccontextmanager
async def resumed(client: Client, chat: UUID, query: str) -> AsyncIterator[Listener]:
    """A stream with any query, first frame there."""
    async with client.socket(f"/{chat}/stream?{query}") as seen:
        await seen.until(lambda s: s.frames)
        yield seen
