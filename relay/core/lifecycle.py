"""What changed about a chat itself, as opposed to what was said in it."""

from collections.abc import Mapping
from dataclasses import dataclass

from relay.core.events import JsonObject
from relay.core.frames import content_digest

# Told by events of their own, or moving with every turn.
_PASSED_OVER = frozenset(
    {"status", "last_error", "updated_at", "has_unread", "last_turn_summary", "queued_for_capacity", "children"}
)
# Newer servers add fields that say nothing about most chats: with an upgrade not every chat has changed.
_NOTHING: tuple[object, ...] = (None, "", 0, [], {}, "00000000-0000-0000-0000-000000000000")


@dataclass(frozen=True, slots=True)
class LifecycleChange:
    """The next lifecycle event of a chat."""

    event: str  # created, updated, archived, unarchived
    changed: list[str]  # names of fields, sorted
    digest: str  # of their values
    fields: dict[str, str]  # digest of every field, to compare with next time
    archived: bool


def lifecycle_change(chat: JsonObject, last: Mapping[str, str] | None, *, was_archived: bool) -> LifecycleChange | None:
    """Compare a Chat as REST gives it with the last lifecycle event; None when there is nothing to tell.

    Watch sends partial chats, zeros where it knows nothing: they must not come here.

    Args:
        last: `fields` of the last change; None when the chat was never told of.
    """
    told = {name: value for name, value in chat.items() if name not in _PASSED_OVER}
    fields = {name: content_digest(value) for name, value in told.items() if value not in _NOTHING}
    changed = sorted(told)
    if last is not None:
        changed = sorted(name for name in {*fields, *last} if fields.get(name) != last.get(name))
    archived = bool(chat.get("archived"))
    if not changed:
        return None
    event = "updated"
    if last is None:
        event = "created"
    elif archived != was_archived:
        event = "archived" if archived else "unarchived"
    digest = content_digest({name: chat.get(name) for name in changed})
    return LifecycleChange(event, changed, digest, fields, archived)
