"""The same fact has the same id from any replica, in any process, after any restart; two facts never share one."""

import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.core.events import ChatRef, Event, event_id
from tests.core.captures import followed, recordings
from tests.core.chat_server import ChatServer
from tests.core.episode_server import EpisodeServer
from tests.core.laws import data_of
from tests.core.test_chat_model import FollowedChat

ROOT = Path(__file__).parents[2]
FACTS = int(os.environ.get("RELAY_TEST_FACTS", "20000"))  # a million takes half a minute

# --- two facts never share an id -----------------------------------------------------------------------------------

# Few and awkward, so that one fact is often a hair's breadth from another: separators, quotes, numbers that look like
# text, one letter in two spellings, halves of a surrogate pair.
WORDS = (
    *("", "a", "ab", "b", ",", '"', '","', "[", "]", '["a"]', "1", "12", "2", "null", "None", "\\", "\\u00e9"),
    *("é", "e\u0301", "\u2028", "\ud83e", "\udd80", "\U0001f980", "\x00", "message", "turn"),
)
SERVERS = ("https://a.test", "https://a.test/b", "https://a.test/b/c", "https://A.test")
KINDS = ("message", "turn", "history", "status", "queue", "error", "retry", "action", "preview", "lifecycle", "usage")


def any_source(chance: random.Random, depth: int = 0) -> object:
    match chance.randrange(5 if depth < 2 else 4):
        case 0:
            return chance.choice((0, 1, 2, 12, -1, 2**63 - 1, 2**63, 10**30))
        case 1:
            return None
        case 4:
            return [any_source(chance, depth + 1) for _ in range(chance.randrange(3))]
    return chance.choice(WORDS)


def as_key(value: object) -> Hashable:
    """Equal for equal values of one type only: 1 is not "1"."""
    return ("list", *map(as_key, value)) if isinstance(value, list) else (type(value).__name__, value)


def test_facts_that_differ_in_anything_have_different_ids() -> None:
    chance = random.Random(4)
    fact_of: dict[str, Hashable] = {}
    id_of: dict[Hashable, str] = {}
    for _ in range(FACTS):
        server, number, kind = chance.choice(SERVERS), chance.randrange(4), chance.choice(KINDS)
        sources = [any_source(chance) for _ in range(chance.randrange(4))]
        chat = ChatRef(server, UUID(int=number), UUID(int=9), UUID(int=number))
        key = event_id(chat, kind, *sources)
        fact = (server, number, kind, *map(as_key, sources))
        assert fact_of.setdefault(key, fact) == fact, f"one id for {fact} and {fact_of[key]}"
        assert id_of.setdefault(fact, key) == key
    assert len(fact_of) > FACTS / 8  # and many of them came twice
    assert len(fact_of) < FACTS


def what_it_says(event: Event) -> tuple[object, ...]:
    """What makes the fact, told from its data alone: whatever two events have in common that have one id."""
    data = data_of(event)
    match event.event:
        case "message":
            return "message", data["message"]["id"]
        case "turn":
            return "turn", data["message_ids"][0]
        case "queue":
            return "queue", str(data["queued_messages"])
        case "error" if event.detail == "turn":
            return "error", data["message"]
        case "retry":
            return "retry", data["retrying_at"], data["attempt"]
        case "action":
            return "action", *sorted(call["tool_call_id"] for call in data["tool_calls"])
        case "status":
            return "status", data["status"]
        case "preview":
            return "preview", event.session, event.position
    return event.event, event.detail, str(data.get("reason"))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(20, 120), st.booleans(), st.randoms(use_true_random=False))
def test_whatever_a_chat_does_an_id_stands_for_one_fact(steps: int, episodes: bool, chance: random.Random) -> None:
    """Edits, retries, restarts and crashes included."""
    chat = FollowedChat(EpisodeServer(revisions=True) if episodes else ChatServer(), lossy=True)
    for _ in range(steps):
        chat.happen(chance)
    said: dict[str, tuple[object, ...]] = {}
    ids: dict[tuple[object, ...], set[str]] = defaultdict(set)
    for event in chat.events:
        fact = what_it_says(event)
        assert said.setdefault(event.id, fact) == fact, "one id, two facts"
        ids[fact].add(event.id)
    alone = ("message", "turn", "retry", "action")  # the others may come to be more than once
    assert [fact for fact, its in ids.items() if fact[0] in alone and len(its) > 1] == []


# --- the same fact, the same id ------------------------------------------------------------------------------------


def test_another_process_gives_the_same_facts_the_same_ids_and_order() -> None:
    """With another seed of the hashes, so that its sets and dicts have another order."""
    here, elsewhere = (
        subprocess.run(
            [sys.executable, __file__],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    )
    assert len(set(here)) > 100
    assert here == elsewhere


def tell_some_recordings() -> None:
    for path in recordings()[::16]:
        for one in followed(path):
            for event in one.life.events:
                print(event.id, event.session, event.position, event.routing_key)  # noqa: T201


if __name__ == "__main__":
    tell_some_recordings()
