"""In-memory twin of the store of chats that were added by hand."""

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from relay.ports import AddedChat, Clock


class MemoryAdded:
    """Keeps the promise of `Added` within one process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._chats: dict[tuple[str, UUID], AddedChat] = {}

    async def added(self, deployment: str) -> Sequence[AddedChat]:
        return [chat for (of, _), chat in self._chats.items() if of == deployment]

    async def add(self, deployment: str, chat_id: UUID) -> bool:
        known = self._chats.get((deployment, chat_id))
        if known is not None and known.gone_at is None:
            return False
        fresh = AddedChat(chat_id, self._clock.now()) if known is None else replace(known, gone_at=None)
        self._chats[deployment, chat_id] = fresh
        return True

    async def remove(self, deployment: str, chat_id: UUID) -> bool:
        return self._chats.pop((deployment, chat_id), None) is not None

    async def set_gone(self, deployment: str, chat_id: UUID) -> None:
        known = self._chats.get((deployment, chat_id))
        if known is not None and known.gone_at is None:
            self._chats[deployment, chat_id] = replace(known, gone_at=self._clock.now())
