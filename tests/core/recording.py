"""A recording of a real server, by chat: its streams frame by frame, its REST answers, and the truth at the end."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from relay.core.frames import Frame, decode_frame

Json = dict[str, Any]

NEVER = float("inf")
_STREAM = re.compile(r"/chats/([0-9a-f-]{36})/stream(?:\?(?:.*&)?after_id=(-?\d+))?")
_REST = re.compile(r"([A-Z]+) \S*?/chats/([0-9a-f-]{36})(/[^\s?]*)?(\?\S*)?$")


@dataclass
class Connection:
    """One recorded stream of a chat: when it was opened and with which cursor, its frames, when it ended."""

    name: str
    chat_id: str
    after_id: int
    opened: float
    closed: float = NEVER
    texts: list[tuple[float, str]] = field(default_factory=list)  # seconds since the start, frame as received

    @cached_property
    def frames(self) -> list[tuple[float, Frame]]:
        return [(moment, decode_frame(text)) for moment, text in self.texts]


@dataclass(frozen=True)
class Answer:
    """A REST call about one chat that succeeded."""

    method: str
    path: str  # below the chat, without the query
    query: str
    body: Json

    @property
    def all_messages(self) -> list[Json] | None:
        """The whole history, newest first, when that is what was asked for and all of it came."""
        whole = self.method == "GET" and self.path == "/messages" and self.query in ("", "?limit=200")
        return self.body["messages"] if whole and not self.body.get("has_more") else None


@dataclass
class RecordedChat:
    """All that the recording shows of one chat. `happened`: answers and batches of stream events, with their times."""

    chat_id: str
    connections: list[Connection] = field(default_factory=list)
    happened: list[tuple[float, Answer | list[Json]]] = field(default_factory=list)
    truth: dict[int, Json] | None = None  # the last whole history that REST gave

    def primary(self) -> Iterator[Connection]:
        """The connections that one follower would have had: one at a time, in order. Others only looked on."""
        free = 0.0
        for connection in self.connections:
            if connection.opened >= free:
                yield connection
                free = connection.closed

    def onlookers(self) -> Iterator[Connection]:
        """The connections that ran beside a primary one."""
        primary = [id(connection) for connection in self.primary()]
        return (connection for connection in self.connections if id(connection) not in primary)


def load(path: Path) -> dict[str, RecordedChat]:
    """The streamed chats of a recording, by id."""
    chats: dict[str, RecordedChat] = {}
    open_now: dict[str, Connection] = {}
    # Split on newlines alone: texts may hold other line ends.
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        moment, kind, name = float(row.get("t", 0)), row.get("kind"), row.get("conn", "")
        if kind == "open" and (match := _STREAM.search(str(row.get("path")))):
            open_now[name] = Connection(name, match[1], int(match[2] or 0), moment)
            chats.setdefault(match[1], RecordedChat(match[1])).connections.append(open_now[name])
        elif kind == "frame" and name in open_now:
            connection = open_now[name]
            connection.texts.append((moment, row["raw"]))
            chats[connection.chat_id].happened.append((moment, _events(row["raw"])))
        elif kind in ("closed", "closed-by-us", "failed") and name in open_now:
            open_now.pop(name).closed = moment
        elif "rest" in row and 200 <= int(row["status"]) < 300 and (match := _REST.search(row["rest"])):
            body = json.loads(row["body"]) if isinstance(row["body"], str) and row["body"] else row["body"] or {}
            answer = Answer(match[1], match[3] or "", match[4] or "", body)
            chat = chats.setdefault(match[2], RecordedChat(match[2]))
            chat.happened.append((moment, answer))
            if (messages := answer.all_messages) is not None:
                chat.truth = {message["id"]: message for message in messages}
    return {chat_id: chat for chat_id, chat in chats.items() if chat.connections}


def _events(text: str) -> list[Json]:
    value = json.loads(text)
    events: list[Json] = value.get("data") or [] if isinstance(value, dict) else value
    # A snapshot's status stands first, but was read last.
    return sorted(events, key=lambda event: bool(event["type"] == "status"))
