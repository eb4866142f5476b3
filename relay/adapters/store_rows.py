"""How a chat stands in every table of the store. Part of `relay.adapters.store`."""

from typing import Any, TypeAlias
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Table

from relay.core.errors import BadEvent
from relay.core.events import ChatRef

AnyRow: TypeAlias = Row[*tuple[Any, ...]]

_MAX_DEPLOYMENT = 1000  # characters; a key of PostgreSQL's index holds 2,700 bytes


def with_key(table: Table, deployment: str, chat_id: UUID) -> ColumnElement[bool]:
    """Condition: rows of the chat with this key."""
    return (table.c.deployment == deployment) & (table.c.chat_id == chat_id)


def of_chat(table: Table, chat: ChatRef) -> ColumnElement[bool]:
    """Condition: rows of the chat."""
    return with_key(table, chat.deployment, chat.chat_id)


def chat_key(chat: ChatRef) -> dict[str, object]:
    """The chat's key in a new row."""
    return {"deployment": chat.deployment, "chat_id": chat.chat_id}


def chat_columns(chat: ChatRef) -> dict[str, object]:
    """All of the chat in a new row."""
    return {**chat_key(chat), "owner_id": chat.owner_id, "root_chat_id": chat.root_chat_id}


def chat_ref(row: AnyRow) -> ChatRef:
    """The opposite of `chat_columns`."""
    return ChatRef(row.deployment, row.chat_id, row.owner_id, row.root_chat_id)


def storable(chat: ChatRef, *numbers: int) -> None:
    """Check what came over the bus, where anybody may have sent it.

    Raises:
        BadEvent: A database cannot hold it, and would refuse the same event for ever.
    """
    if len(chat.deployment) > _MAX_DEPLOYMENT or not chat.deployment.isprintable():
        raise BadEvent("the deployment is no URL")
    if not all(0 <= number < 2**63 for number in numbers):
        raise BadEvent("a number is negative or has more than 64 bits")
