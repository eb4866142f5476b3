"""What docs/consumers.md promises, judged from outside: from deliveries and from what Coder's REST API says.

Each check returns lines, one for a breach. What is `unfinished` may come right while the relay works; what is `broken`
may not.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.chaos.inbox import Delivery

Place = tuple[int, int]


@dataclass
class Coder:
    """What is true of one chat: its REST row, its messages by id, its queue; how often its owner rewrote it."""

    row: dict[str, Any]
    messages: dict[int, dict[str, Any]]
    queue: list[dict[str, Any]]
    edits: int = 0


@dataclass
class Chat:
    """What came about one chat. `by_place` has one delivery for each `(session, position)`, in that order."""

    name: str
    deliveries: list[Delivery] = field(default_factory=list)
    by_place: list[Delivery] = field(default_factory=list)

    def named(self, prefix: str) -> list[Delivery]:
        return [each for each in self.by_place if each.key.startswith(prefix)]

    def last(self, prefix: str) -> Any:
        """The data of the event with the highest place, None when there is none."""
        found = self.named(prefix)
        return found[-1].event["data"] if found else None


def place(delivery: Delivery) -> Place:
    return delivery.event["session"], delivery.event["position"]


def chats_of(deliveries: Iterable[Delivery]) -> dict[str, Chat]:
    chats: dict[str, Chat] = {}
    for delivery in deliveries:
        if delivery.key.startswith("chat."):
            name = delivery.event["subject"]
            chats.setdefault(name, Chat(name)).deliveries.append(delivery)
    for chat in chats.values():
        first = {place(each): each for each in reversed(chat.deliveries)}
        chat.by_place = [first[key] for key in sorted(first)]
    return chats


# --- what may still come ---------------------------------------------------------------------------------------------


def unfinished(deliveries: Sequence[Delivery], truth: Mapping[str, Coder]) -> list[str]:
    """Where what a consumer knows differs from what Coder says."""
    lines = []
    chats = chats_of(deliveries)
    for name, coder in truth.items():
        chat = chats.get(name)
        if chat is None:
            lines.append(f"{name}: nothing was told")
            continue
        for check in (_fold, _turns, _states, _lifecycle):
            lines += [f"{name}: {line}" for line in check(chat, coder)]
    return lines


def transcript(chat: Chat) -> dict[int, Any]:
    """The fold that docs/consumers.md tells consumers to make."""
    statement = chat.last("chat.history.")
    stated = None if statement is None else set(statement["message_ids"])
    messages = {
        each.event["data"]["message"]["id"]: each.event["data"]["message"] for each in chat.named("chat.message.")
    }
    return {
        key: messages[key]
        for key in sorted(messages)
        if stated is None or key in stated or key > max(stated, default=0)
    }


def _fold(chat: Chat, coder: Coder) -> list[str]:
    folded = transcript(chat)
    lines = [f"message {key} is missing" for key in sorted(coder.messages.keys() - folded.keys())]
    lines += [f"message {key} is not in Coder" for key in sorted(folded.keys() - coder.messages.keys())]
    both = sorted(folded.keys() & coder.messages.keys())
    return lines + [f"message {key} differs" for key in both if said(folded[key]) != said(coder.messages[key])]


def _turns(chat: Chat, coder: Coder) -> list[str]:
    """At rest every prompt has had its turn: all messages from it to before the next."""
    lines = []
    told = {each.event["data"]["message_ids"][0]: each.event["data"] for each in chat.named("chat.turn.")}
    turn: list[int] = []
    turns = []
    for key, message in sorted(coder.messages.items()):
        if message["role"] == "user":
            turn = [key]
            turns.append(turn)
        elif turn and not _is_compaction(message):
            turn.append(key)
    for ids in turns:
        if ids[0] not in told:
            lines.append(f"turn of {ids[0]} was not told")
        elif told[ids[0]]["message_ids"] != ids:
            lines.append(f"turn of {ids[0]} has {told[ids[0]]['message_ids']}, Coder has {ids}")
    return lines


def _is_compaction(message: Mapping[str, Any]) -> bool:
    return any(part.get("tool_name") == "chat_summarized" for part in message.get("content") or ())


def _states(chat: Chat, coder: Coder) -> list[str]:
    lines = []
    status, queue = chat.last("chat.status."), chat.last("chat.queue.")
    if (status or {}).get("status") != coder.row["status"]:
        lines.append(f"status is {(status or {}).get('status')}, Coder has {coder.row['status']}")
    told = queue["queued_messages"] if queue else []
    if [each["id"] for each in told] != [each["id"] for each in coder.queue]:
        lines.append(f"queue is {[each['id'] for each in told]}, Coder has {[each['id'] for each in coder.queue]}")
    if coder.row["status"] == "error" and not chat.named("chat.error.turn."):
        lines.append("it is in error, and no error was told")
    return lines


def _lifecycle(chat: Chat, coder: Coder) -> list[str]:
    told = chat.last("chat.lifecycle.")
    if told is None:
        return ["no lifecycle was told"]
    return [
        f"{name} is {told['chat'].get(name)!r}, Coder has {coder.row.get(name)!r}"
        for name in ("title", "archived")
        if said(told["chat"].get(name)) != said(coder.row.get(name))
    ]


def said(value: Any) -> Any:
    """What two servers or two ways to ask one mean alike: absent, null, empty and zero are one, and when a part began
    or ended is not always said."""
    if isinstance(value, dict):
        passed_over = ("created_at", "completed_at") if "type" in value else ()
        return {key: kept for key, inner in value.items() if key not in passed_over and (kept := said(inner))}
    return [said(inner) for inner in value] if isinstance(value, list) else value


# --- what may never be -----------------------------------------------------------------------------------------------


def broken(
    deliveries: Sequence[Delivery], truth: Mapping[str, Coder], *, crashes: bool, unbound: bool = False
) -> list[str]:
    """Breaches that no later event mends.

    Args:
        unbound: Whether nobody's queue took what was published for a while: then previews, and what takes them back,
            may be gone.
        crashes: Whether a worker may have ended without saving all. If not, no history may be stated because of it.
    """
    lines = [line for delivery in deliveries for line in _envelope(delivery)]
    lines += _same_id_same_fact(deliveries, crashes=crashes)
    for chat in chats_of(deliveries).values():
        checks: list[Callable[[Chat], list[str]]] = [
            _order,
            _one_id,
            _statements,
            _previous,
            partial(_previews, unbound=unbound),
        ]
        for check in checks:
            lines += [f"{chat.name}: {line}" for line in check(chat)]
        told = {each.event["id"] for each in chat.named("chat.history.") if each.event["data"]["reason"] != "restart"}
        if chat.name in truth and len(told) > truth[chat.name].edits:
            lines.append(f"{chat.name}: {len(told)} rewrites told, its owner made {truth[chat.name].edits}")
        restarts = [each for each in chat.named("chat.history.") if each.event["data"]["reason"] == "restart"]
        if restarts and not crashes:
            lines.append(f"{chat.name}: restated in {[place(each) for each in restarts]}, and nobody died")
    return lines


def _envelope(delivery: Delivery) -> list[str]:
    event, words = delivery.event, delivery.key.split(".")
    lines = []
    if len(words) != 5 or delivery.key != delivery.key.lower():
        return [f"routing key {delivery.key}"]
    if event["id"] != delivery.message_id:
        lines.append(f"{delivery.key}: id {event['id']}, message_id {delivery.message_id}")
    if event["subject"] != words[4] or event["ownerid"] != words[3]:
        lines.append(f"{delivery.key}: subject {event['subject']}, owner {event['ownerid']}")
    if delivery.persistent == (words[1] == "preview"):
        lines.append(f"{delivery.key}: persistent is {delivery.persistent}")
    return lines


def _fact(delivery: Delivery) -> Any:
    """What an event says: copies of one `id` say the same. Times and places may differ."""
    data = delivery.event["data"]
    match delivery.key.split(".")[1:3]:
        case ["message", role]:
            return role, said(data["message"])
        case ["history", _]:
            return _rewrite(delivery)
        case ["turn", outcome]:
            return outcome, data["message_ids"]
        case ["status", value]:
            return value
        case ["queue", _]:
            return [each["id"] for each in data["queued_messages"]]
        case ["error", "turn"]:
            return data["message"]
        case ["retry", _]:
            return data["attempt"], data["retrying_at"]
        case ["lifecycle", detail]:
            return detail, [(name, said(data["chat"].get(name))) for name in sorted(data["changed"])]
        case ["action", _]:
            return sorted(call["tool_call_id"] for call in data["tool_calls"])
    return place(delivery), said(data)


def _rewrite(delivery: Delivery) -> Any:
    """Which rewrite a statement tells: the message that took the place of what went."""
    data = delivery.event["data"]
    if data["reason"] == "restart":
        return "restart", delivery.event["session"]
    gone = max(data["removed_ids"], default=0)
    return "rewrite", min((key for key in data["message_ids"] if key > gone), default=None)


def _same_id_same_fact(deliveries: Iterable[Delivery], *, crashes: bool) -> list[str]:
    first: dict[str, Delivery] = {}
    lines = []
    for delivery in deliveries:
        known = first.setdefault(delivery.event["id"], delivery)
        one, other = ((each.event["type"], each.event["source"], _fact(each)) for each in (known, delivery))
        if one != other and not (crashes and _told_with_less(known, delivery)):
            lines.append(f"one id, two facts: {delivery.event['id']} {one} {other}")
    return lines


def _told_with_less(first: Delivery, copy: Delivery) -> bool:
    """A turn that failed, and whose prompt was followed by another: Coder keeps no trace of why it ended.

    Who takes over from a follower that died before it saved can only say that it was interrupted.
    """
    outcomes = first.key.split(".")[1:3], copy.key.split(".")[1:3]
    later = place(copy)[0] > place(first)[0]
    return later and outcomes == (["turn", "failed"], ["turn", "interrupted"])


def _one_id(chat: Chat) -> list[str]:
    """One fact has one id, whoever tells it and how often."""
    ids: dict[Any, set[str]] = defaultdict(set)
    for delivery in chat.deliveries:
        data = delivery.event["data"]
        match delivery.key.split(".")[1]:
            case "message":
                ids["message", data["message"]["id"]].add(delivery.event["id"])
            case "turn":
                ids["turn", data["message_ids"][0]].add(delivery.event["id"])
            case "history":
                ids["history", _rewrite(delivery)].add(delivery.event["id"])
            case "retry":
                ids["retry", data["attempt"], data["retrying_at"]].add(delivery.event["id"])
            case "action":
                ids["action", str(_fact(delivery))].add(delivery.event["id"])
    return [f"one fact, {len(found)} ids: {key}" for key, found in ids.items() if len(found) > 1]


def _order(chat: Chat) -> list[str]:
    """Places grow. A copy repeats its place; a follower that lost its chat shows it by its lower session."""
    lines = []
    facts: dict[Place, tuple[str, Any]] = {}
    highest: dict[tuple[str, int], int] = defaultdict(int)
    for delivery in chat.deliveries:
        here = place(delivery)
        known = facts.setdefault(here, (delivery.event["id"], delivery.event["data"]))
        if known != (delivery.event["id"], delivery.event["data"]):
            lines.append(f"two events at {here}: {known[0]} and {delivery.key} {delivery.event['id']}")
        session, position = here
        if session < 1 or position < 1:
            lines.append(f"place {here}")
    seen: set[tuple[str, Place]] = set()
    for delivery in chat.deliveries:
        session, position = here = place(delivery)
        if (delivery.source, here) in seen:
            continue
        seen.add((delivery.source, here))
        if position < highest[delivery.source, session]:
            lines.append(f"{delivery.key} at {here} came after {(session, highest[delivery.source, session])}")
        highest[delivery.source, session] = max(position, highest[delivery.source, session])
    return lines


def _statements(chat: Chat) -> list[str]:
    """A restart states the history once a session; what went never comes back; no session tells a rewrite twice."""
    lines = []
    statements = chat.named("chat.history.")
    restarts = Counter(place(each)[0] for each in statements if each.event["data"]["reason"] == "restart")
    lines += [f"session {session} restated {times} times" for session, times in restarts.items() if times > 1]
    gone: set[int] = set()
    removed: dict[int, set[int]] = defaultdict(set)
    known: set[int] = set()
    for each in chat.by_place:
        if each.key.startswith("chat.message."):
            known.add(each.event["data"]["message"]["id"])
        if not each.key.startswith("chat.history."):
            continue
        data = each.event["data"]
        ids = data["message_ids"]
        if ids != sorted(set(ids)):
            lines.append(f"history at {place(each)} is not ascending: {ids}")
        if back := gone & set(ids):
            lines.append(f"history at {place(each)} brings back {sorted(back)}")
        gone |= {key for key in known if key not in ids and key <= max(ids, default=0)}
        if data["reason"] != "restart":
            if again := removed[place(each)[0]] & set(data["removed_ids"]):
                lines.append(f"history at {place(each)} removes {sorted(again)} a second time in its session")
            removed[place(each)[0]] |= set(data["removed_ids"])
    return lines


def _previous(chat: Chat) -> list[str]:
    """Within a session a status names the one before it."""
    lines = []
    before: dict[int, str] = {}
    for each in chat.named("chat.status."):
        data, session = each.event["data"], place(each)[0]
        if session in before and data["previous"] != before[session]:
            lines.append(f"status at {place(each)} names {data['previous']}, before it was {before[session]}")
        before[session] = data["status"]
    return lines


# --- live text -------------------------------------------------------------------------------------------------------


@dataclass
class _Step:
    """What somebody shows of a step: text by kind, arguments by call."""

    texts: dict[str, str] = field(default_factory=dict)
    whole: dict[str, bool] = field(default_factory=dict)  # nothing was left out
    last: Place = (0, 0)


def _previews(chat: Chat, *, unbound: bool) -> list[str]:
    """What is shown of a step is how its message begins, piece by piece, nothing twice and nothing out of order.

    Not of steps within which something is missing, where a reset may have been lost.
    """
    lines = []
    open_steps: dict[tuple[int, int], _Step | None] = {}
    before: Place = (0, 0)
    newest_step: dict[int, int] = {}
    for delivery in chat.by_place:
        session, _ = here = place(delivery)
        words, data = delivery.key.split("."), delivery.event["data"]
        if unbound and here != (before[0], before[1] + 1):
            open_steps = dict.fromkeys(open_steps)  # what follows of them is not judged
        before = here
        if words[1] == "preview":
            number = data["step"]
            if number < newest_step.get(session, 0) and words[2] not in ("tool-result", "reset"):
                lines.append(f"preview at {here} goes back from step {newest_step[session]} to {number}")
            newest_step[session] = max(number, newest_step.get(session, 0))
            if words[2] == "reset":
                if data["reason"] == "superseded":
                    open_steps.pop((session, number), None)
                elif (session, number) in open_steps:
                    open_steps[session, number] = _Step()  # it begins anew: its message is still to come
                continue
            if words[2] not in ("text", "reasoning", "tool-call"):
                continue  # results of tools may come when the step's message was told
            step = open_steps.setdefault((session, number), _Step())
            if step is None:
                continue
            lines += [f"preview at {here}: {line}" for line in _shown(step, words[2], data)]
            step.last = here
        elif words[1] == "message" and words[2] == "assistant":
            steps = sorted(key for key in open_steps if key[0] == session)
            while len(steps) > 1 and _may_be_over(open_steps[steps[0]], open_steps[steps[1]], data["message"]):
                open_steps.pop(steps.pop(0))
            if steps:
                step = open_steps.pop(steps[0])
                for line in _prefix(step, data["message"]) if step is not None else ():
                    lines.append(f"step {steps[0]} before {here}: {line}")
    return lines


def _may_be_over(step: _Step | None, following: _Step | None, message: Mapping[str, Any]) -> bool:
    """A step that was taken back and not told again may have died so; unless the message cannot be of the next one."""
    return step is not None and not step.texts and following is not None and not _prefix(following, message)


def _shown(step: _Step, kind: str, data: Mapping[str, Any]) -> list[str]:
    part = data["part"]
    if kind in ("text", "reasoning"):
        name, piece = kind, part["text"]
    elif kind == "tool-call" and "args_delta" in part:
        name, piece = part["tool_call_id"], part["args_delta"]
    else:
        return []
    had = step.texts.setdefault(name, "")
    if data["offset"] > len(had):
        step.whole[name] = False  # something was left out: what comes now is not shown
        return []
    if data["offset"] < len(had) and step.whole.get(name, True):
        return [f"{kind} at offset {data['offset']}, {len(had)} were told"]
    step.texts[name] = had + piece if step.whole.get(name, True) else had
    return []


def _prefix(step: _Step, message: Mapping[str, Any]) -> list[str]:
    lines = []
    content = message.get("content") or []
    for kind in ("text", "reasoning"):
        shown = step.texts.get(kind, "")
        told = "".join(part.get("text", "") for part in content if part.get("type") == kind)
        if not told.startswith(shown):
            lines.append(f"{kind} {_around(shown, told)} of message {message['id']}")
    return lines


def _around(shown: str, told: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(shown, told, strict=False)) if a != b), min(len(shown), len(told)))
    return f"differs at {at} of {len(shown)}: shown {shown[at : at + 20]!r}, is {told[at : at + 20]!r}"
