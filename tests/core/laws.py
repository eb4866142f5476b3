"""What must hold for the events of any chat, however it was followed."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay.core.events import Event
from relay.core.frames import COMPACTION_TOOL
from relay.core.transcript import Transcript

Data = Mapping[str, Any]


def data_of(event: Event) -> dict[str, Any]:
    """The data without its type, to look at freely."""
    return dict(event.data)


def fold(events: Iterable[Event]) -> dict[int, Any]:
    """What a consumer has in the end: in the order of `(session, position)`, copies dropped by id."""
    transcript = Transcript()
    seen: set[str] = set()
    for event in sorted(events, key=lambda event: (event.session, event.position)):
        if event.id not in seen:
            seen.add(event.id)
            transcript.apply(event)
    return dict(transcript.messages)


def facts(events: Iterable[Event]) -> dict[str, tuple[str, str, int]]:
    """Messages and turns by the id of their event: kind, detail, and the message (of a turn: its user message).

    Of several copies the first, as a consumer has it.
    """
    found: dict[str, tuple[str, str, int]] = {}
    for event in events:
        data = data_of(event)
        if event.event == "message":
            found.setdefault(event.id, ("message", event.detail, data["message"]["id"]))
        elif event.event == "turn":
            found.setdefault(event.id, ("turn", event.detail, data["message_ids"][0]))
    return found


def turns(events: Iterable[Event]) -> dict[int, str]:
    """Outcome by user message, of events that hold each turn once."""
    ended = [event for event in events if event.event == "turn"]
    outcomes = {data_of(event)["message_ids"][0]: event.detail for event in ended}
    assert len(outcomes) == len(ended), "a user message has two turns"
    return outcomes


def assert_no_event_twice(events: Sequence[Event]) -> None:
    """Within one life each fact is told once."""
    twice = [id_ for id_, count in Counter(event.id for event in events).items() if count > 1]
    assert [(e.event, e.detail, e.position) for e in events if e.id in twice] == []


def assert_positions_grow(events: Sequence[Event]) -> None:
    """By one with each event of a session, from 1 on."""
    positions: dict[int, int] = defaultdict(int)
    for event in events:
        positions[event.session] += 1
        assert event.position == positions[event.session]


def assert_copies_agree(events: Iterable[Event]) -> None:
    """Two copies of a message or a turn, from whichever life, say the same.

    A later copy may know less of why a turn failed: upstream forgets it with the next prompt, and up to 2.33 REST has
    the text of an error, without the details that the event had.
    """
    said: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.event not in ("message", "turn"):
            continue
        first, copy = said.setdefault(event.id, data_of(event)), data_of(event)
        if first != copy and event.event == "turn" and first["outcome"] == "failed":
            assert copy["outcome"] in ("failed", "interrupted")
            assert copy.get("error", {}).get("message") in (None, first.get("error", {}).get("message"))
            copy = {**copy, **{name: first[name] for name in ("outcome", "error") if name in first}}
        assert first == copy
    turns(list({event.id: event for event in events if event.event == "turn"}.values()))


def assert_copies_of_statuses_agree(events: Iterable[Event]) -> None:
    """After a clean restart. From an older point on, a status may follow another one than it did the first time."""
    told: dict[str, tuple[str, str | None]] = {}
    for event in events:
        if event.event == "status":
            now = (event.detail, data_of(event)["previous"])
            assert told.setdefault(event.id, now) == now


@dataclass
class Step:
    """What was told of one step since its last reset."""

    text: dict[str, str] = field(default_factory=lambda: defaultdict(str))  # by kind, or by call
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def tell(self, data: Data) -> None:
        part, offset = data["part"], data["offset"]
        kind = part["type"]
        if kind in ("text", "reasoning"):
            assert offset == len(self.text[kind]), "an offset does not continue what was told"
            assert part["text"], "an empty fragment tells nothing"
            self.text[kind] += part["text"]
        elif kind == "tool-call" and "args" not in part and "args_delta" in part:
            call = f"args:{part['tool_call_id']}"
            assert offset == len(self.text[call]), "an offset does not continue the arguments"
            self.text[call] += part["args_delta"]
        elif kind == "tool-call":
            assert offset == len(self.text[f"args:{part.get('tool_call_id')}"])
        else:
            assert offset == self.counts[kind], "a count is wrong"
            self.counts[kind] += 1


@dataclass
class Previews:
    """How the live text of some events compares with the messages it became."""

    equal: int = 0
    prefix: int = 0
    resets: Counter[str] = field(default_factory=Counter)


def assert_honest_previews(events: Iterable[Event], *, shed: bool = False) -> Previews:
    """Each step's text since its last reset is a prefix of the text that was stored, and nothing is told twice.

    `shed`: under load, steps whose message was there may be left out.

    Which step a message ends is not said; steps end in the order in which they began.
    """
    found = Previews()
    steps: dict[int, Step] = {}
    ended: dict[int, Step] = {}  # of this turn
    session, highest = 0, -1
    for event in events:
        data = data_of(event)
        if event.session != session:
            assert event.session > session
            session, highest, steps, ended = event.session, -1, {}, {}
        if event.event == "preview":
            number = data["step"]
            assert number in steps or event.detail != "reset", "a step of which nothing was told is taken back"
            # Servers from 2.35 on run tools when the message that asked for them is stored.
            late = data.get("part", {}).get("type") == "tool-result" and number in ended
            if late:
                ended[number].tell(data)
                continue
            assert number >= highest or number in steps, "a step that had ended goes on"
            assert shed or number <= highest + 1, "a step is left out"
            highest = max(highest, number)
            if event.detail == "reset":
                found.resets[data["reason"]] += 1
                steps[number] = Step()
                if data["reason"] == "superseded":
                    del steps[number]  # it will never have a message
            else:
                steps.setdefault(number, Step()).tell(data)
        elif event.event == "message" and event.detail == "assistant" and steps:
            message = data["message"]
            if any(part.get("tool_name") == COMPACTION_TOOL for part in message.get("content") or []):
                continue
            number = min(steps)
            step = ended[number] = steps.pop(number)
            assert data["text"].startswith(step.text["text"]), "the live text is not a prefix of the message"
            if data["text"] == step.text["text"]:
                found.equal += 1
            else:
                found.prefix += 1
        elif event.event == "turn":
            steps.clear()
            ended.clear()
    return found
