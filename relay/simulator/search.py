"""The `q` of the chat list: which terms a server age knows, and which chats they let through."""

import re
from dataclasses import dataclass
from uuid import UUID

from relay.simulator.calls import Refused
from relay.simulator.dialect import Features
from relay.simulator.state import Chat
from relay.simulator.wire import go_json, parse_bool

# No chat of the simulator has a pull request: such a term lets nothing through.
_OF_PULL_REQUESTS = ("pr_status", "diff_url", "pr", "repo", "pr_title")


@dataclass(frozen=True)
class ChatSearch:
    """What the query asks for. None: does not matter, but `archived` None means both."""

    archived: bool | None = False
    title: str = ""
    has_unread: bool | None = None
    source: tuple[str, ...] = ("created_by_me",)
    text: str = ""
    status: str = ""
    pull_request: bool = False

    def finds(self, chat: Chat, user_id: UUID) -> bool:
        """Whether the chat is one that the user asked for."""
        mine = chat.owner_id == user_id and "created_by_me" in self.source
        shared = chat.owner_id != user_id and user_id in chat.readers and "shared_with_me" in self.source
        return (
            (mine or shared)
            and self.archived in (None, chat.archived)
            and self.title in chat.title.lower()
            and self.has_unread in (None, chat.has_unread)
            and self.status in ("", chat.status)
            and not self.pull_request
            and (not self.text or any(self.text in part.text.lower() for m in chat.history() for part in m.content))
        )


def read_search(q: str, features: Features) -> ChatSearch:
    """
    Raises:
        Refused: 400 with one validation, as coderd/searchquery words it.
    """
    values = _terms(q)
    known = ["archived"]
    if features.rich_search:
        known += ["title", "has_unread", *_OF_PULL_REQUESTS]
    if features.shared_chats:
        known.append("source")
    if features.text_search:
        known.append("search")
    if features.revisions:
        known.append("status")
    for name in values:
        if name not in known:
            raise _bad(name, f'"{name}" is not a valid query param')
    for name, given in values.items():
        if len(given) > 1:
            detail = (
                f'Query param "{name}" provided more than once, found {len(given)} times. '
                "Only provide 1 instance of this query param."
            )
            raise _bad(name, detail)

    def term(name: str, default: str = "") -> str:
        return values.get(name, [default])[0]

    any_archived = features.revisions and term("archived") == "any"
    return ChatSearch(
        archived=None if any_archived else _flag(values, "archived", False),
        title=term("title"),
        has_unread=_flag(values, "has_unread", None),
        source=tuple(term("source", "created_by_me").split(",")),
        text=term("search"),
        status=term("status"),
        pull_request=any(name in values for name in _OF_PULL_REQUESTS),
    )


def read_labels(given: list[str]) -> dict[str, str]:
    """The `label=key:value` parameters; all of them have to fit.

    Raises:
        Refused: 400.
    """
    labels: dict[str, str] = {}
    for text in given:
        key, colon, value = text.partition(":")
        if not (key and colon and value):
            wanted = "(expected format key:value, both must be non-empty)"
            raise Refused(400, f"Invalid label filter: {go_json(text)} {wanted}")
        labels[key] = value
    return labels


def _bad(name: str, detail: str) -> Refused:
    return Refused(400, "Invalid chat search query.", validations=[(name, detail)])


def _terms(q: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    loose: list[str] = []
    for token in re.findall(r'(?:[^\s"]|"[^"]*")+', q.lower()):
        if ":" not in re.sub(r'"[^"]*"', "", token):
            loose.append(token.strip('"'))
            continue
        if token.startswith(":") or token.endswith(":"):
            raise _bad("q", f"Query element {go_json(token)} cannot start or end with ':'")
        pieces = re.findall(r'(?:[^:"]|"[^"]*")+', token)
        if len(pieces) != 2:
            raise _bad("q", f"Query element {go_json(token)} can only contain 1 ':'")
        values.setdefault(pieces[0], []).append(pieces[1].strip('"'))
    if loose:
        raise _bad("q", f"unsupported search term: {go_json(' '.join(loose))}")
    return values


def _flag(values: dict[str, list[str]], name: str, default: bool | None) -> bool | None:
    if name not in values:
        return default
    try:
        return parse_bool(values[name][0])
    except ValueError as exc:
        raise _bad(name, f'Query param "{name}" must be a valid boolean: {exc}') from exc
