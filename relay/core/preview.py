"""Live text of the step in progress, honest about what upstream repeats, delays and loses.

Parts have no ids. They overtake the messages they belong to, come after them, come again from the start of the step
on every connect, or never. What leaves here is, for each step, a prefix of what upstream produced, told once, or
preceded by a reset that takes back what was told before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import structs

from relay.core.events import Event, JsonObject, PreviewData, parse_json
from relay.core.frames import COMPACTION_TOOL, Message, PartSeen, text_of

ResetReason = Literal["retry", "gap", "reconnect", "superseded"]


@dataclass(frozen=True, slots=True)
class Fragment:
    """New live content. `offset`: code points of its text (of `args_delta` for tool calls) before it, else a count."""

    step: int
    role: str
    part: JsonObject
    offset: int


@dataclass(frozen=True, slots=True)
class Reset:
    """What was told of the step so far is void."""

    step: int
    reason: ResetReason


Told = Fragment | Reset


@dataclass(slots=True)
class Channel:
    """One thread of content within a step: its text, its reasoning, or the arguments of one call."""

    length: int = 0  # code points told
    heard: int = 0  # of those, how many upstream has repeated on this connection
    _pieces: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        self._pieces = ["".join(self._pieces)]  # joined only when asked for: steps of many thousand parts exist
        return self._pieces[0]

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self.length += len(text)


@dataclass(slots=True)
class _Step:
    number: int
    channels: dict[str, Channel] = field(default_factory=dict)
    wholes: set[str] = field(default_factory=set)  # keys of parts that come in one piece
    heard: list[PartSeen] = field(default_factory=list)  # since the connection began, while it repeats what was told
    counts: dict[str, int] = field(default_factory=dict)  # whole parts heard on this connection, per kind
    calls: set[str] = field(default_factory=set)
    unheard: set[str] = field(default_factory=set)  # of those, the ones that this connection has yet to repeat
    results: bool = False  # a local tool-result was heard: the model's part of the step is over

    @property
    def told_anything(self) -> bool:
        return bool(self.wholes) or any(channel.length for channel in self.channels.values())

    def channel(self, name: str) -> Channel:
        return self.channels.setdefault(name, Channel())

    def told_text(self, name: str) -> str:
        channel = self.channels.get(name)
        return channel.told if channel else ""

    def forget(self) -> None:
        self.channels.clear()
        self.wholes.clear()
        self.counts.clear()
        self.calls.clear()
        self.unheard.clear()

    def rewind(self) -> None:
        self.heard.clear()
        self.unheard = set(self.calls)
        self.counts.clear()
        self.results = False
        for channel in self.channels.values():
            channel.heard = 0

    @property
    def repeating(self) -> bool:
        return bool(self.unheard) or any(channel.heard < channel.length for channel in self.channels.values())


class LiveText:
    """Sort live parts into steps. Every method returns what to tell, in order."""

    __slots__ = (
        "_earlier_calls",
        "_held",
        "_late",
        "_repeated",
        "_steps",
        "_stored_calls",
        "dropped",
        "ended",
        "next_step",
    )

    def __init__(self, first_step: int = 0) -> None:
        self.next_step = first_step
        self._steps: list[_Step] = []  # without their message yet; the last one is in progress
        self._stored_calls: set[str] = set()
        self._earlier_calls: set[str] = set()  # of the turn before
        self._late = {"text": "", "reasoning": ""}  # of the newest stored step: what no part has told
        self._held: list[PartSeen] = []  # parts that may be the end of the newest stored step
        self._repeated: dict[str, str] = {}  # per channel, all text of the snapshot that is being told
        self.dropped = 0  # parts that belonged to a stored step
        self.ended: list[int] = []  # steps that have their message

    def part(self, seen: PartSeen) -> list[Told]:
        """A part of a running chat."""
        if seen.part.get("tool_name") == COMPACTION_TOOL:
            return []
        call = seen.call_id
        if call is not None and (call in self._stored_calls or call in self._earlier_calls):
            self.dropped += 1
            return []
        if seen.kind == "tool-result":
            return self._held_as_new() + self._tell(self._step_of(call), seen)
        if self._late.get(seen.kind) and self._may_be_late(seen):
            return []
        return self._held_as_new() + self._tell(self._current(), seen)

    def stored(self, message: Message) -> list[Told]:
        """An assistant message: the oldest step without one has ended, and this is what it was."""
        if message.compaction:
            return []
        told: list[Told] = self._held_as_new() if self._held and not self._steps else []
        text, reasoning = "", ""
        if self._steps:
            told += self._died_before(message)
            if (step := self._ended_by(message)) is not None:
                self.ended.append(step.number)
                text, reasoning = step.told_text("text"), step.told_text("reasoning")
                # A provider may keep the opening chunk of a reasoning block to itself: the rest of it is no gap.
                whole = message.text.startswith(text) and reasoning in message.reasoning
                if not (whole and _arguments_agree(step, message)):
                    told.append(Reset(step.number, "gap"))
        self._stored_calls |= message.call_ids
        self._held.clear()
        self._late = {
            "text": message.text[len(text) :] if message.text.startswith(text) else "",
            "reasoning": message.reasoning[len(reasoning) :] if message.reasoning.startswith(reasoning) else "",
        }
        return told

    def retry(self, attempt: int) -> list[Told]:
        """The model call failed and will be made again: its parts are void. The step keeps its number."""
        self._held.clear()
        if not self._steps or self._steps[-1].results:
            return []
        step = self._steps[-1]
        told: list[Told] = [Reset(step.number, "retry")] if step.told_anything else []
        step.forget()
        step.rewind()
        return told

    def superseded(self) -> list[Told]:
        """The turn is over: a step that has no message by now will never have one."""
        told: list[Told] = [Reset(step.number, "superseded") for step in self._steps if step.told_anything]
        self._steps.clear()
        self._held.clear()
        self._late = {"text": "", "reasoning": ""}
        self._earlier_calls, self._stored_calls = self._stored_calls, set()
        return told

    def disconnected(self) -> None:
        """The connection ended: the next one tells the step in progress from its start."""
        for step in self._steps:
            step.rewind()
        self._held.clear()
        self._late = {"text": "", "reasoning": ""}

    def abandoned(self) -> list[Told]:
        """The next connection is to a server that numbers its parts: what was told cannot be gone on with."""
        told: list[Told] = [Reset(step.number, "reconnect") for step in self._steps if step.told_anything]
        self._steps.clear()
        return told

    def snapshot(self, parts: list[PartSeen], *, stored_calls: Iterable[str], newest_text: str | None) -> list[Told]:
        """The buffered parts that a connection begins with.

        Some servers repeat the stored step before the running one. Its parts end at the last call that a stored
        message has; a step of text alone is recognised by its text.
        """
        self._late = {"text": "", "reasoning": ""}  # what was told of a stored step before this is all of it
        calls = set(stored_calls) | self._stored_calls
        last = max((at for at, seen in enumerate(parts) if seen.call_id in calls), default=-1)
        kept = parts[last + 1 :]
        if newest_text and kept and all(seen.kind in ("text", "reasoning") for seen in kept):
            text = "".join(text_of(seen.part, "text") for seen in kept if seen.kind == "text")
            if text == newest_text and not self._told_is(text):
                kept = []
        self.dropped += len(parts) - len(kept)
        pieces: dict[str, list[str]] = {}
        for seen in kept:
            delta, channel = delta_of(seen)
            if channel is not None:
                pieces.setdefault(channel, []).append(delta)
        self._repeated = {channel: "".join(deltas) for channel, deltas in pieces.items()}
        told = self._another_run(kept) + [told for seen in kept for told in self.part(seen)]
        self._repeated.clear()
        return told

    def _another_run(self, parts: list[PartSeen]) -> list[Told]:
        """A connection repeats a step from its start: a call that was told and is not repeated is of another run."""
        if not (parts and self._steps and self._steps[-1].calls - {seen.call_id for seen in parts}):
            return []
        step = self._steps[-1]
        step.forget()
        return [Reset(step.number, "reconnect")]

    # --- which step -------------------------------------------------------------------------------------------------

    def _step_of(self, call: str | None) -> _Step:
        by_call = next((step for step in self._steps if call in step.calls), None)
        return by_call or (self._steps[-1] if self._steps else self._current())

    def _current(self) -> _Step:
        # Tools run when the model has said all: what the assistant says after a result is the next step, even if
        # the messages of this one are still on their way.
        if not self._steps or self._steps[-1].results:
            self._steps.append(_Step(self.next_step))
            self.next_step += 1
        return self._steps[-1]

    def _died_before(self, message: Message) -> list[Told]:
        """Messages come in the order of their steps: those before the one that made its calls will never have one.

        They are of a run that was edited away, and whose parts a server still had when the next one began.
        """
        died = next((at for at, step in enumerate(self._steps) if step.calls & message.calls), 0)
        told: list[Told] = [Reset(step.number, "superseded") for step in self._steps[:died] if step.told_anything]
        del self._steps[:died]
        return told

    def _ended_by(self, message: Message) -> _Step | None:
        if not self._steps:
            return None
        oldest = self._steps[0]
        if oldest.calls and message.calls and not (oldest.calls & message.calls):
            return None  # the message of a step whose parts never came
        return self._steps.pop(0)

    def _told_is(self, text: str) -> bool:
        return bool(self._steps) and bool(told := self._steps[-1].told_text("text")) and text.startswith(told)

    # --- late or new ------------------------------------------------------------------------------------------------

    def _may_be_late(self, seen: PartSeen) -> bool:
        if self._steps:
            return False  # the next step has begun
        held = "".join(text_of(one.part, "text") for one in self._held if one.kind == seen.kind)
        held += text_of(seen.part, "text")
        if not self._late[seen.kind].startswith(held):
            return False
        self._held.append(seen)
        if held == self._late[seen.kind]:
            self.dropped += sum(one.kind == seen.kind for one in self._held)
            self._held = [one for one in self._held if one.kind != seen.kind]
            self._late[seen.kind] = ""
        return True

    def _held_as_new(self) -> list[Told]:
        """The held parts were not the end of the stored step: they begin the next one."""
        held, self._held = self._held, []
        self._late = {"text": "", "reasoning": ""}
        return [told for seen in held for told in self._tell(self._current(), seen)]

    # --- what to tell -----------------------------------------------------------------------------------------------

    def _tell(self, step: _Step, seen: PartSeen) -> list[Told]:
        if seen.kind == "tool-call" and seen.call_id:
            if step.unheard and seen.call_id not in step.calls:
                # Parts are repeated in order: a new call before the told ones is of another run.
                step.heard.append(seen)
                return self._begin_anew(step, "reconnect")
            step.calls.add(seen.call_id)
            step.unheard.discard(seen.call_id)
        if seen.local_result:
            step.results = True
        delta, channel_name = delta_of(seen)
        if channel_name is None:
            return self._tell_whole(step, seen)
        channel = step.channel(channel_name)
        if step.repeating:
            step.heard.append(seen)
        offset = channel.length
        known = min(offset - channel.heard, len(delta))  # told before, if it is a repetition
        # Compared where it lies: copying the rest for each part takes seconds in a step of ten thousand.
        if known and not channel.told.startswith(delta[:known], channel.heard):
            lost = _is_subsequence(channel.told, self._repeated.get(channel_name, ""))
            return self._begin_anew(step, "gap" if lost else "reconnect")
        fresh = delta[known:]
        channel.heard += len(delta)
        if fresh:
            channel.add(fresh)
        if not step.repeating:
            step.heard.clear()
        return [Fragment(step.number, seen.role, with_delta(seen, fresh), offset)] if fresh else []

    def _tell_whole(self, step: _Step, seen: PartSeen) -> list[Told]:
        count = step.counts.get(seen.kind, 0)
        step.counts[seen.kind] = count + 1
        key = f"{seen.kind}:{seen.call_id or count}"
        if step.repeating:
            step.heard.append(seen)
        if key in step.wholes:
            return []
        step.wholes.add(key)
        offset = count
        if seen.kind == "tool-call":
            offset = len(step.told_text(f"args:{seen.call_id}"))
        return [Fragment(step.number, seen.role, seen.part, offset)]

    def _begin_anew(self, step: _Step, reason: ResetReason) -> list[Told]:
        """Upstream's repetition differs from what was told: take it back and tell the repetition."""
        heard = step.heard[:]
        step.forget()
        step.rewind()
        again: list[Told] = [Reset(step.number, reason)]
        for seen in heard:
            again += self._tell(step, seen)
        return again


def delta_of(seen: PartSeen) -> tuple[str, str | None]:
    """The text that a part adds and the channel it adds to; channel None for a part that is whole in itself."""
    if seen.kind in ("text", "reasoning"):
        return text_of(seen.part, "text"), seen.kind
    delta = seen.part.get("args_delta")
    if seen.kind == "tool-call" and isinstance(delta, str) and seen.part.get("args") is None:
        return delta, f"args:{seen.call_id}"
    return "", None


def with_delta(seen: PartSeen, text: str) -> JsonObject:
    name = "args_delta" if seen.kind == "tool-call" else "text"
    return seen.part if seen.part.get(name) == text else {**seen.part, name: text}


def _arguments_agree(step: _Step, message: Message) -> bool:
    """False where what was told of a call's arguments is whole, and not what the call has: a fragment was lost."""
    for part in message.parts:
        channel = step.channels.get(f"args:{part.tool_call_id}")
        if channel is None or part.type != "tool-call" or part.args is None:
            continue
        try:
            told = parse_json(channel.told)
        except ValueError:
            continue  # as long as it is a part of them, nobody can say
        if told != part.args:
            return False
    return True


def _is_subsequence(short: str, long: str) -> bool:
    letters = iter(long)
    return all(letter in letters for letter in short)


def coalesce(events: Iterable[Event]) -> list[Event]:
    """Join adjoining text of previews that wait together: same step, same kind, one right behind the other.

    The joined event has the id and position of its first piece.
    """
    joined: list[Event] = []
    for event in events:
        before = joined[-1] if joined and event.transient else None
        merged = _merged(before, event) if before is not None else None
        if merged is None:
            joined.append(event)
        else:
            joined[-1] = merged
    return joined


def shed(events: Iterable[Event], ended: Sequence[int]) -> list[Event]:
    """Leave out previews of steps whose message stands among the same events: it tells all of them.

    What was told of such a step before stays a prefix, so no reset is needed; a reset itself is never left out, nor is
    the first preview of a step: parts of the next step may stand before the message, and whoever saw nothing of this
    one would take the message for that of the next.
    """
    kept: list[Event] = []
    seen: set[int] = set()
    for event in events:
        if event.transient and event.detail != "reset":
            step = _preview(event)["step"]
            if step in seen and step in ended:
                continue
            seen.add(step)
        kept.append(event)
    return kept


class Muting:
    """Leaves previews out when there is no room for them.

    Once one of a step is left out, all later ones of that step are: what was told of it stays a prefix, and no reset
    is needed. A reset goes out always, and lets its step be told again: it begins anew.
    """

    def __init__(self) -> None:
        self._muted: set[int] = set()

    def mute(self, steps: Iterable[int]) -> None:
        """Nothing more of these, unless they begin anew."""
        for step in steps:
            # Steps come to an end, and their numbers do not come back.
            self._muted = {number for number in self._muted if number > step - _STEPS_AT_ONCE} | {step}

    def sift(self, events: Sequence[Event], granted: int) -> list[Event]:
        """The events that go out, at most `granted` previews among them."""
        kept: list[Event] = []
        for event in events:
            if event.transient:
                step = _preview(event)["step"]
                if event.detail == "reset":
                    self._muted.discard(step)
                elif step in self._muted or not granted:
                    self.mute([step])
                    continue
                else:
                    granted -= 1
            kept.append(event)
        return kept


_STEPS_AT_ONCE = 16  # more than can be without their message


def _merged(before: Event, event: Event) -> Event | None:
    if not (before.transient and event.transient) or before.detail != event.detail or event.detail == "reset":
        return None
    first, second = _preview(before), _preview(event)
    one, two = first["part"], second["part"]
    name = "args_delta" if event.detail == "tool-call" else "text"
    head, tail = one.get(name), two.get(name)
    if not (event.detail in ("text", "reasoning", "tool-call") and isinstance(head, str) and isinstance(tail, str)):
        return None
    same = (before.chat, before.session) == (event.chat, event.session)
    same = same and first["step"] == second["step"] and first["role"] == second["role"]
    same = same and {**one, name: ""} == {**two, name: ""} and first["offset"] + len(head) == second["offset"]
    if not same or one.get("args") is not None:
        return None
    data: PreviewData = {**first, "part": {**one, name: head + tail}}
    return structs.replace(before, content=data)


def _preview(event: Event) -> PreviewData:
    return event.content  # type: ignore[return-value]  # `transient` and not a reset: it is PreviewData
