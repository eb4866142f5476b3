"""The consumer's side: what a chat's history is, folded from its events in any order, with any of them twice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from relay.core.events import Event, HistoryData, JsonObject, MessageData


@dataclass(slots=True)
class Transcript:
    """Messages by id, less those that the last statement of history leaves out.

    Order does not matter: a removed id never comes back, so the statement with the highest `(session, position)`
    says all that the earlier ones said.
    """

    _messages: dict[int, JsonObject] = field(default_factory=dict)
    _statement: frozenset[int] = frozenset()
    _stated_at: tuple[int, int] = (0, 0)

    def apply(self, event: Event) -> None:
        """Take in any event of the chat; those that say nothing about history are passed over."""
        if event.family != "chat":
            return
        if event.event == "message":
            message = cast(MessageData, event.data)["message"]
            self._messages[cast(int, message["id"])] = message
        elif event.event == "history" and (event.session, event.position) > self._stated_at:
            self._stated_at = (event.session, event.position)
            self._statement = frozenset(cast(HistoryData, event.data)["message_ids"])

    @property
    def messages(self) -> Mapping[int, JsonObject]:
        """Live messages by id, ascending."""
        end = max(self._statement, default=0)
        return {key: self._messages[key] for key in sorted(self._messages) if key > end or key in self._statement}


def differences(folded: Mapping[int, JsonObject], truth: Mapping[int, JsonObject]) -> list[str]:
    """What sets a fold apart from the REST transcript, a line each; empty when they are equal. Names no text."""
    lines = [f"message {key} is missing" for key in sorted(truth.keys() - folded.keys())]
    lines += [f"message {key} is not in Coder" for key in sorted(folded.keys() - truth.keys())]
    for key in sorted(truth.keys() & folded.keys()):
        if folded[key] != truth[key]:
            names = sorted(n for n in {*truth[key], *folded[key]} if folded[key].get(n) != truth[key].get(n))
            lines.append(f"message {key} differs in {', '.join(names)}")
    return lines
