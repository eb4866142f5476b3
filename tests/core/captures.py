"""The recordings to follow: those in the repository and any that `RELAY_TEST_CAPTURES` names (files or directories,
with `:` or `,` between them)."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from relay.core.tail import IDLE
from tests.core.recorded_follower import Life, RecordedFollower
from tests.core.recorded_server import RecordedServer
from tests.core.recording import NEVER, Json, RecordedChat, load

OURS = Path(__file__).parent.parent / "data" / "captures"


@dataclass(frozen=True)
class Followed:
    """A recorded chat, its history at the end as REST had it, and the life of a follower that saw all of it."""

    chat: RecordedChat
    truth: Mapping[int, Json]
    life: Life

    running: bool  # when the recording ended

    @property
    def prompts(self) -> set[int]:
        return {key for key, message in self.truth.items() if message["role"] == "user"}

    @property
    def ended(self) -> set[int]:
        """The user messages whose turn had ended when the recording did."""
        return self.prompts - {max(self.prompts, default=0)} if self.running else self.prompts


def recordings() -> list[Path]:
    offered = [Path(name) for name in re.split("[:,]", os.environ.get("RELAY_TEST_CAPTURES", "")) if name]
    places = [*sorted(OURS.iterdir()), *offered]
    return [path for place in places for path in (sorted(place.glob("*.jsonl")) if place.is_dir() else [place])]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


each_recording = pytest.mark.parametrize("path", recordings(), ids=name_of)


@functools.cache
def followed(path: Path) -> list[Followed]:
    """The streamed chats of a recording, each followed from the first frame to the last."""
    lives = []
    for chat in load(path).values():
        follower = RecordedFollower(chat)
        for connection in chat.primary():
            follower.live_through(connection)
        server = RecordedServer(chat)
        server.until(NEVER)
        lives.append(Followed(chat, server.messages, follower.life, server.chat["status"] not in IDLE))
    return lives
