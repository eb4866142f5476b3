"""An upstream whose chats speak faster than anybody can listen, and that counts what is taken from it."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from relay.core.errors import ChatGone, StreamEnded
from relay.core.events import ChatRef, JsonObject
from relay.ports import Account, MessagePage
from tests.programs.world import OneByOne

DEPLOYMENT = "https://hot.example"
OWNER = UUID(int=2)
AT = "2026-03-01T12:00:00Z"


def chat_ref(number: int) -> ChatRef:
    return ChatRef(DEPLOYMENT, UUID(int=number), OWNER, UUID(int=number))


def message(key: int, role: str = "assistant", text: str = "") -> JsonObject:
    content = [{"type": "text", "text": text}]
    return {"id": key, "role": role, "created_at": AT, "content": content}


def frame(*events: object) -> str:
    return json.dumps({"type": "data", "data": events})


def part(text: str) -> object:
    return {"type": "message_part", "message_part": {"role": "assistant", "part": {"type": "text", "text": text}}}


class HotServer:
    """As a server of the first age: each chat is a turn of many steps, a few live parts and a message each.

    Args:
        chats: How many.
        steps: Of each chat; the turn is over after them.
        parts: Live parts of each step.
        breaks_after: Frames after which a stream breaks off; 0: it stays.
        unreadable_after: Frames of the first stream after which comes one that is none; 0: never.
    """

    deployment = DEPLOYMENT

    def __init__(
        self,
        chats: int = 1,
        *,
        steps: int,
        parts: int = 3,
        breaks_after: int = 0,
        unreadable_after: int = 0,
        size: int = 10,
    ) -> None:
        self.chats = [UUID(int=number) for number in range(1, chats + 1)]
        self.steps = steps
        self.parts = parts
        self.size = size
        self.breaks_after = breaks_after
        self.unreadable_after = unreadable_after
        self.title = "hot"
        self.told: Counter[UUID] = Counter()  # messages that upstream has by now, by chat
        self.asked: Counter[UUID] = Counter(self.chats)  # prompts
        self.taken = 0  # frames
        self.characters = 0
        self.dialled: Counter[UUID] = Counter()
        self.calls: Counter[str] = Counter()
        self.open = 0  # streams
        self.vanish_when_dialled = False
        self.without_snapshot: UUID | None = None  # chat whose stream says each time that it cannot begin
        self.failures: dict[tuple[str, UUID | None], Exception] = {}  # call, chat: what it raises

    def fail(self, call: str, error: Exception, *, only: UUID | None = None) -> None:
        """Answer the call so from now on; `only` about this chat, where it is about one."""
        self.failures[call, None if call in ("list", "watch") else only] = error

    def _fail(self, call: str, chat: UUID | None = None) -> None:
        self.calls[call] += 1
        error = self.failures.get((call, chat)) or self.failures.get((call, None))
        if error is not None:
            raise error

    async def accounts(self) -> list[Account]:
        return [Account(OWNER, "ann")]

    async def list_chats(self, *, archived: bool) -> AsyncIterator[JsonObject]:
        self._fail("list")
        for chat in () if archived else tuple(self.chats):
            yield self._row(chat)

    async def chat(self, chat_id: UUID) -> JsonObject:
        self._fail("chat", chat_id)
        if chat_id not in self.chats:
            raise ChatGone("no such chat")
        return self._row(chat_id)

    def _row(self, chat: UUID) -> JsonObject:
        status = "waiting" if self.told[chat] >= self._limit(chat) else "running"
        changed = f"2026-03-01T12:00:00.{self.asked[chat]:06}Z"
        return {"id": str(chat), "owner_id": str(OWNER), "title": self.title, "status": status, "updated_at": changed}

    def _limit(self, chat: UUID) -> int:
        return self.asked[chat] * (self.steps + 1)

    def ask(self, chat: UUID) -> None:
        """Another prompt, and another turn."""
        self.asked[chat] += 1

    def history(self, chat: UUID) -> list[JsonObject]:
        """Ascending; the prompt is number 1."""
        return [self._message(key) for key in range(1, self.told[chat] + 1)]

    def _message(self, key: int) -> JsonObject:
        return message(key, "user" if key % (self.steps + 1) == 1 else "assistant", self.text(key))

    def text(self, key: int) -> str:
        return "".join(self._words(key))

    def _words(self, key: int) -> list[str]:
        return [f"{key}.{number} ".ljust(self.size, "x") for number in range(self.parts)]

    async def messages(self, chat_id: UUID, *, down_to: int) -> MessagePage:
        self._fail("messages", chat_id)
        return MessagePage(self.history(chat_id)[::-1], [], complete=True)

    def stream(self, chat_id: UUID, *, after_id: int, after_revision: int | None = None) -> Any:
        return self._open(chat_id, after_id)

    @asynccontextmanager
    async def _open(self, chat: UUID, after_id: int) -> AsyncIterator[OneByOne]:
        self.dialled[chat] += 1
        if self.vanish_when_dialled and ("stream", chat) in self.failures:
            self.chats.remove(chat)
        self._fail("stream", chat)
        self.open += 1
        try:
            yield OneByOne(self._frames(chat, after_id))
        finally:
            self.open -= 1

    async def _frames(self, chat: UUID, after_id: int) -> AsyncIterator[str]:
        for sent, text in enumerate(self._texts(chat, after_id), 1):
            await asyncio.sleep(0)
            yield text
            self.taken += 1
            self.characters += len(text)
            if sent == self.unreadable_after and self.dialled[chat] == 1:
                yield "<html>bad gateway</html>"
            if sent == self.breaks_after:
                raise StreamEnded("cut", "network_error")
        await asyncio.Event().wait()

    def _texts(self, chat: UUID, after_id: int) -> Iterator[str]:
        self.told[chat] = self.told[chat] or 1
        if chat == self.without_snapshot:
            error = {"type": "error", "error": {"message": "failed to load initial snapshot"}}
            yield frame({"type": "status", "status": {"status": "running"}}, error)
            return
        history = [each for each in self.history(chat) if int(str(each["id"])) > after_id]
        state = {"type": "status", "status": {"status": self._row(chat)["status"]}}
        yield frame(state, *({"type": "message", "message": each} for each in history))
        while self.told[chat] < self._limit(chat):
            said = self._message(self.told[chat] + 1)
            if said["role"] == "user":
                yield frame({"type": "status", "status": {"status": "running"}})
            else:
                for word in self._words(self.told[chat] + 1):
                    yield frame(part(word))
            self.told[chat] += 1
            yield frame({"type": "message", "message": said})
        yield frame({"type": "status", "status": {"status": "waiting"}})

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[str]]:
        self._fail("watch")

        async def silence() -> AsyncIterator[str]:
            await asyncio.Event().wait()
            yield ""

        yield silence()
