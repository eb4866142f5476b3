"""Live text of the step in progress, from servers that number it (2.35 and later).

A model call, or a run of its tools, is an episode: (history version, generation attempt). Its parts count from 1, and
every connection tells the current episode from its start. So a part that was told is known by its number, and one that
is missing leaves a hole in the numbers.
"""

from dataclasses import dataclass, field

from relay.core.frames import COMPACTION_TOOL, Message, PartSeen
from relay.core.preview import Channel, Fragment, Reset, ResetReason, Told, delta_of

Episode = tuple[int, int]


@dataclass(slots=True)
class _Step:
    """What was told of a step, by channel: text, reasoning, the arguments of one call."""

    number: int
    channels: dict[str, Channel] = field(default_factory=dict)
    wholes: dict[str, int] = field(default_factory=dict)  # parts that come in one piece, counted by kind

    @property
    def told_anything(self) -> bool:
        return bool(self.channels or self.wholes)

    def text(self, name: str) -> str:
        channel = self.channels.get(name)
        return channel.told if channel else ""

    def forget(self) -> None:
        self.channels.clear()
        self.wholes.clear()


class EpisodeText:
    """Sort numbered parts into steps. Every method returns what to tell, in order."""

    __slots__ = (
        "_episode",
        "_fresh",
        "_heard",
        "_muted",
        "_over",
        "_results",
        "_step",
        "_step_of_call",
        "_void_attempt",
        "broken",
        "dropped",
        "ended",
        "next_step",
    )

    def __init__(self, first_step: int = 0) -> None:
        self.next_step = first_step
        self.dropped = 0  # parts that were told, or are void
        self.ended: list[int] = []  # steps that have their message
        self.broken = False  # a part is missing: the next connection tells the episode from its start
        self._step: _Step | None = None  # without its message yet
        self._episode: Episode | None = None  # the newest one heard of
        self._heard = 0  # the last number of it
        self._muted = False  # it has a hole: nothing more of it can be told
        self._fresh = True  # this connection has not brought a part yet
        self._over: Episode = (0, 0)  # episodes up to this one have ended, or are void
        self._void_attempt = 0  # a retry has voided these attempts, also of a history version to come
        self._step_of_call: dict[str, int] = {}
        self._results: dict[int, int] = {}  # told of each stored step

    def part(self, seen: PartSeen) -> list[Told]:
        """A part, in the order in which it came."""
        episode = seen.episode
        if episode is None:
            return []  # of a server that numbers them: cannot be placed
        if self._void_attempt and episode[1] <= self._void_attempt:
            self._over = max(self._over, (episode[0], self._void_attempt))
        if episode <= self._over or (self._episode is not None and episode < self._episode):
            self.dropped += 1
            return []
        told: list[Told] = []
        if episode != self._episode:
            told = self._begin(episode)
        if seen.seq <= self._heard or self._muted:
            self.dropped += 1
            self._fresh = False
            return told
        if seen.seq > self._heard + 1:
            return told + self._hole()
        self._heard = seen.seq
        self._fresh = False
        return told + self._tell(seen)

    def stored(self, message: Message) -> list[Told]:
        """An assistant message: the step in progress has ended, and this is what it was."""
        self._void_attempt = 0
        if message.compaction:
            return []
        step = self._step
        told: list[Told] = []
        if step is not None:
            self._step = None
            self._over = max(self._over, self._episode or (0, 0))
            self.ended.append(step.number)
            # A provider may keep the opening chunk of a reasoning block to itself: the rest of it is no gap.
            if not (message.text.startswith(step.text("text")) and step.text("reasoning") in message.reasoning):
                told.append(Reset(step.number, "gap"))
            self._step_of_call.update(dict.fromkeys(message.calls, step.number))
        return told

    def retry(self, attempt: int, *, known: bool = False) -> list[Told]:
        """The model call failed and will be made again; until then a connection still tells the failed attempt.

        Args:
            known: The same retry once more: attempts that began since are not meant.
        """
        self._void_attempt = attempt  # of the history version to come, too: its first attempt may have told nothing
        if self._episode is None or self._episode <= self._over:
            return []
        version, newest = self._episode
        self._over = max(self._over, (version, attempt if known else max(attempt, newest)))
        return self._void("retry") if self._episode <= self._over else []

    def turn_began(self) -> None:
        """A retry before it was of another run, perhaps of one without a prompt."""
        self._void_attempt = 0

    def superseded(self) -> list[Told]:
        """The turn is over: a step that has no message by now will never have one."""
        told = self._void("superseded")
        if self._step is not None:
            self._over = max(self._over, self._episode or (0, 0))
            self._step = None
        self._step_of_call.clear()
        self._results.clear()
        self._void_attempt = 0
        return told

    def disconnected(self) -> None:
        """The connection ended: the next one tells the current episode from its start."""
        self.broken = False
        self._fresh = True
        if self._muted:
            self._heard, self._muted = 0, False

    def abandoned(self) -> list[Told]:
        """The next connection is to a server that numbers nothing: what was told cannot be gone on with."""
        return self._void("reconnect")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, episode: Episode) -> list[Told]:
        before, self._episode = self._episode, episode
        self._heard, self._muted = 0, False
        if self._step is None or before is None:
            return []
        if before[0] == episode[0]:
            return self._void("retry")
        told = self._void("superseded")  # history moved on, and not by this step's message
        self._step = None
        return told

    def _hole(self) -> list[Told]:
        """A part is missing. On a fresh connection it is gone for good; else that one will bring it."""
        self.broken = not self._fresh
        self._muted, self._fresh = True, False
        return self._void("gap")

    def _void(self, reason: ResetReason) -> list[Told]:
        step = self._step
        if step is None or not step.told_anything:
            return []
        step.forget()
        return [Reset(step.number, reason)]

    def _new_step(self) -> _Step:
        self.next_step += 1
        return _Step(self.next_step - 1)

    def _tell(self, seen: PartSeen) -> list[Told]:
        if seen.part.get("tool_name") == COMPACTION_TOOL:
            return []
        if seen.local_result:
            return self._result(seen)
        step = self._step = self._step or self._new_step()
        delta, name = delta_of(seen)
        if name is None:
            return [Fragment(step.number, seen.role, seen.part, self._whole(step, seen))]
        if not delta:
            return []
        channel = step.channels.setdefault(name, Channel())
        offset = channel.length
        channel.add(delta)
        return [Fragment(step.number, seen.role, seen.part, offset)]

    def _result(self, seen: PartSeen) -> list[Told]:
        """Tools run when the message that calls them is stored: what they say belongs to that message's step."""
        number = self._step_of_call.get(seen.call_id or "")
        if number is None:
            self.dropped += 1  # of a step of which nothing was told
            return []
        self._results[number] = self._results.get(number, 0) + 1
        return [Fragment(number, seen.role, seen.part, self._results[number] - 1)]

    def _whole(self, step: _Step, seen: PartSeen) -> int:
        """The offset of a part that comes in one piece."""
        count = step.wholes.get(seen.kind, 0)
        step.wholes[seen.kind] = count + 1
        if seen.kind != "tool-call":
            return count
        arguments = step.channels.get(f"args:{seen.call_id}")
        return arguments.length if arguments else 0
