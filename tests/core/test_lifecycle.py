"""What changed about a chat itself."""

from relay.core.lifecycle import LifecycleChange, lifecycle_change

CHAT: dict[str, object] = {"id": "x", "title": "one", "archived": False, "labels": {"b": 1, "a": 2}}


def change(chat: dict[str, object], last: LifecycleChange | None = None) -> LifecycleChange | None:
    return lifecycle_change(chat, last.fields if last else None, was_archived=bool(last and last.archived))


def created() -> LifecycleChange:
    first = change(CHAT)
    assert first is not None
    return first


def test_a_chat_not_told_of_is_created_with_all_its_fields() -> None:
    assert (created().event, created().changed, created().archived) == (
        "created",
        ["archived", "id", "labels", "title"],
        False,
    )


def test_the_same_chat_is_no_change() -> None:
    assert change(dict(reversed(CHAT.items())), created()) is None
    assert change({**CHAT, "labels": {"a": 2, "b": 1}}, created()) is None


def test_what_other_events_tell_is_passed_over() -> None:
    moving = ("status", "last_error", "updated_at", "has_unread", "last_turn_summary", "queued_for_capacity")
    assert change({**CHAT, **dict.fromkeys(moving, "new"), "children": [CHAT]}, created()) is None


def test_a_read_mark_that_only_lists_know_is_no_change() -> None:
    """The chat alone always says that nothing is unread."""
    assert change({**CHAT, "has_unread": True}, created()) is None
    assert change({**CHAT, "has_unread": False}, created()) is None


def test_a_field_that_says_nothing_is_as_good_as_none() -> None:
    """A newer server has more fields: with the upgrade not every chat has changed."""
    empty: dict[str, object] = {
        "summary": None,
        "shared": False,
        "pin_order": 0,
        "files": [],
        "build_id": "",
        "context": {},
    }
    assert change({**CHAT, **empty}, created()) is None
    assert change({**CHAT, "summary": "about ducks"}, created()) is not None


def test_archived_wins_over_what_else_changed() -> None:
    archived = change({**CHAT, "archived": True, "title": "two"}, created())
    assert archived is not None
    assert (archived.event, archived.changed, archived.archived) == ("archived", ["archived", "title"], True)
    back = change(CHAT, archived)
    assert back is not None
    assert (back.event, back.archived) == ("unarchived", False)


def test_an_archived_chat_that_is_renamed_is_updated() -> None:
    archived = change({**CHAT, "archived": True}, created())
    renamed = change({**CHAT, "archived": True, "title": "two"}, archived)
    assert renamed is not None
    assert (renamed.event, renamed.changed) == ("updated", ["title"])


def test_different_values_have_different_digests() -> None:
    digests = {
        found.digest for title in ("two", "three", None) if (found := change({**CHAT, "title": title}, created()))
    }
    assert len(digests) == 3


def test_a_chat_archived_again_compares_with_the_last_time() -> None:
    first = change({**CHAT, "archived": True}, created())
    second = change({**CHAT, "archived": True}, change(CHAT, first))
    assert first is not None
    assert second == first
