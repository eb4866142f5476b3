"""Faults on demand: rules that stay until they are used up or taken away, and how often each fault fired."""

import fnmatch
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any
from uuid import UUID

from relay.simulator.wire import JsonObject, parse_uuid

# kind -> (what it does, parameters it must have)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "answer": ("answer matching requests with `status` (and `retry_after`; `html`: a page with 200)", ()),
    "slow": ("hold matching requests for `delay` seconds before they are looked at", ("delay",)),
    "cut_every": ("cut a stream abruptly after every `frames` frames; `inside`: within a frame", ("frames",)),
    "lose_parts": ("lose live parts at `rate` (0 to 1), in runs", ("rate",)),
    "lose_watch": ("lose watch events at `rate`, without a word", ("rate",)),
    "duplicate_frames": ("send stream frames twice at `rate`", ("rate",)),
}


class BadFault(ValueError):
    """A fault that cannot be: unknown kind, missing or impossible parameter. Its text says what to do."""


@dataclass
class Fault:
    """One rule.

    Args:
        path: Shell pattern over the request's path, e.g. `*/stream`.
        chat: Only this chat's streams; None: all.
        times: How often it may still fire; None: no bound.
        seconds: How long it lives; None: until removed.
        status, retry_after, html: Of `answer`. `retry_after` in seconds.
        delay: Of `slow`, in seconds.
    """

    kind: str
    path: str = "*"
    method: str | None = None
    chat: UUID | None = None
    times: int | None = None
    seconds: float | None = None
    status: int = 503
    retry_after: int | None = None
    html: bool = False
    delay: float = 0.0
    frames: int = 0
    inside: bool = False
    rate: float = 0.0
    id: int = 0
    fired: int = 0

    def as_json(self) -> JsonObject:
        body = {key: value for key, value in asdict(self).items() if value is not None}
        if self.chat is not None:
            body["chat"] = str(self.chat)
        return body


_PARAMETERS = {field.name: field.type for field in fields(Fault)}.keys() - {"id", "fired"}


class Faults:
    """The rules in force, and counters by kind that never go down."""

    def __init__(self, dice: random.Random) -> None:
        self.fired: Counter[str] = Counter()
        self._rules: dict[int, tuple[Fault, float | None]] = {}
        self._last_id = 0
        self._dice = dice

    @classmethod
    def silent(cls) -> "Faults":
        """No rules at all."""
        return cls(random.Random(0))

    def add(self, kind: str, **parameters: Any) -> Fault:
        """Put a rule in force.

        Raises:
            BadFault: Unknown kind or parameter, or one that is missing or out of range.
        """
        if kind not in KINDS:
            raise BadFault(f"unknown fault {kind!r}; there are: {', '.join(KINDS)}")
        unknown = parameters.keys() - _PARAMETERS
        if unknown:
            raise BadFault(f"unknown parameter {min(unknown)!r}; there are: {', '.join(sorted(_PARAMETERS))}")
        missing = [name for name in KINDS[kind][1] if name not in parameters]
        if missing:
            raise BadFault(f"fault {kind!r} needs {missing[0]!r}")
        try:
            if parameters.get("chat") is not None:
                parameters["chat"] = parse_uuid(str(parameters["chat"]))
            fault = Fault(kind, **parameters)
            _check(fault)
        except (TypeError, ValueError) as exc:
            raise BadFault(str(exc)) from exc
        self._last_id += 1
        fault.id = self._last_id
        expires = None if fault.seconds is None else time.monotonic() + fault.seconds
        self._rules[fault.id] = (fault, expires)
        return fault

    def remove(self, fault_id: int) -> bool:
        """Whether there was such a rule."""
        return self._rules.pop(fault_id, None) is not None

    def clear(self) -> None:
        """Take all rules away; the counters stay."""
        self._rules.clear()

    def rules(self) -> list[Fault]:
        """Those in force, used up and expired ones left out."""
        now = time.monotonic()
        return [
            fault
            for fault, expires in self._rules.values()
            if (expires is None or now < expires) and (fault.times is None or fault.times > 0)
        ]

    def count(self, fault: Fault, times: int = 1) -> None:
        fault.fired += times
        self.fired[fault.kind] += times
        if fault.times is not None:
            fault.times -= times

    def for_request(self, kind: str, method: str, path: str) -> Fault | None:
        """The first rule of the kind that matches the request; it counts as fired."""
        for fault in self.rules():
            if fault.kind == kind and fault.method in (None, method) and fnmatch.fnmatchcase(path, fault.path):
                self.count(fault)
                return fault
        return None

    def for_stream(self, kind: str, chat: UUID | None) -> Fault | None:
        """The first rule of the kind for the chat. The caller counts."""
        return next((f for f in self.rules() if f.kind == kind and f.chat in (None, chat)), None)

    def strikes(self, kind: str, chat: UUID | None = None) -> bool:
        """Throw the dice for a rule with a rate; a hit counts as fired."""
        fault = self.for_stream(kind, chat)
        if fault is None or self._dice.random() >= fault.rate:
            return False
        self.count(fault)
        return True

    def loss_rate(self, chat: UUID) -> float:
        fault = self.for_stream("lose_parts", chat)
        return 0.0 if fault is None else fault.rate


def _check(fault: Fault) -> None:
    for name in ("status", "rate", "delay", "frames"):
        value = getattr(fault, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number")
    if not 100 <= fault.status <= 599:
        raise ValueError(f"status must be from 100 to 599, not {fault.status}")
    if not 0 <= fault.rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, not {fault.rate}")
    if fault.delay < 0 or (fault.seconds is not None and fault.seconds < 0):
        raise ValueError("seconds and delay must not be negative")
    if fault.kind == "cut_every" and fault.frames < 1:
        raise ValueError("frames must be at least 1")
