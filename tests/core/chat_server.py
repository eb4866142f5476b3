"""A chat server of the first dialect, small enough to be believed: what it stores, and the two paths to its streams.

Path A brings stored facts in their order. Path B brings live parts in theirs. Between the two there is no order, but
for what a real server was seen to keep: a part comes at most one message too early or too late.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tests.core.frames import (
    AT,
    Json,
    assistant,
    call,
    event,
    live,
    msg,
    part,
    queue,
    queued,
    result,
    retry,
    status,
    tool,
    user,
)

IDLE = ("waiting", "error")


@dataclass
class Said:
    """What one attempt at a step produced, and whether a message came of it."""

    text: str = ""
    calls: dict[str, str] = field(default_factory=dict)  # id -> arguments
    stored: bool = False


@dataclass
class Sent:
    """One event on its way to a stream, and how far the other path must be before it may arrive."""

    event: Json
    needs: int


@dataclass
class Wire:
    """What one stream was sent and has not received."""

    facts: deque[Sent] = field(default_factory=deque)
    parts: deque[Sent] = field(default_factory=deque)
    facts_sent: int = 0
    parts_sent: int = 0
    facts_received: int = 0
    parts_received: int = 0
    parts_before_step: int = 0  # parts sent before the step in progress began
    facts_before_step: int = 0

    def fact(self, sent: Json, *, parts_first: int | None = None) -> None:
        """By default behind all parts sent so far."""
        self.facts.append(Sent(sent, self.parts_sent if parts_first is None else parts_first))
        self.facts_sent += 1

    def part(self, sent: Json, *, facts_first: int) -> None:
        self.parts.append(Sent(sent, facts_first))
        self.parts_sent += 1

    def next_fact(self) -> Json | None:
        if self.facts and self.parts_received >= self.facts[0].needs:
            self.facts_received += 1
            return self.facts.popleft().event
        return None

    def next_part(self) -> Json | None:
        if self.parts and self.facts_received >= self.parts[0].needs:
            self.parts_received += 1
            return self.parts.popleft().event
        return None

    def lose_part(self) -> None:
        """The next part vanishes without a sign."""
        if self.parts:
            self.parts.popleft()
            self.parts_received += 1


class ChatServer:
    """The chat and its run. Every method is one thing that happens; `can_*` say when it may."""

    def __init__(self) -> None:
        self.messages: dict[int, Json] = {}
        self.queue: list[Json] = []
        self.status = "waiting"
        self.last_error: str | None = None
        self.failed: set[int] = set()  # user messages whose run failed
        self.said: list[Said] = []
        self.wire: Wire | None = None
        self.stopping = False  # interrupted, and the partial message not yet saved
        self.edited = False
        self._ids = iter(range(100, 100_000))
        self._queue_ids = iter(range(1, 100_000))
        self._words = iter(range(100_000))
        self._buffer: list[Json] = []
        self._buffer_is_old = False  # its step is stored, only not yet cleared
        self._step = Said()
        self._attempt = 0

    # --- REST and snapshots -------------------------------------------------------------------------------------------

    def chat(self) -> Json:
        return {"id": "x", "status": self.status, "last_error": self.last_error}

    def page(self, down_to: int) -> tuple[list[Json], bool]:
        newest_first = [self.messages[key] for key in sorted(self.messages, reverse=True)]
        count = sum(raw["id"] > down_to for raw in newest_first) + 1
        return newest_first[:count], count >= len(newest_first)

    def connect(self, after_id: int, *, ties_turned: bool) -> list[Json]:
        """A new stream: its snapshot."""
        self.wire = Wire()
        stored = [raw for key, raw in sorted(self.messages.items()) if key > after_id]
        if ties_turned:
            stored.reverse()
            stored.sort(key=lambda raw: str(raw["created_at"]))
        running = self.status == "running"
        return [
            status(self.status),
            *(self._buffer if running else []),
            *(msg(raw) for raw in stored),
            *([queue(*self.queue)] if self.queue else []),
        ]

    def open(self, after_id: int, after_revision: int | None, chance: random.Random) -> list[Json]:
        """The same; `after_revision` is ignored."""
        return self.connect(after_id, ties_turned=chance.random() < 0.5)

    def disconnect(self) -> None:
        self.wire = None

    @property
    def nothing_on_the_way(self) -> bool:
        return self.wire is None or (not self.wire.facts and not self.wire.parts)

    def ready(self, chance: random.Random) -> list[Json]:
        """A frame of what can be sent on either path."""
        assert self.wire is not None
        frame: list[Json] = []
        for _ in range(chance.randint(1, 8)):
            paths = [self.wire.next_fact, self.wire.next_part]
            if chance.random() < 0.5:
                paths.reverse()
            one = paths[0]() or paths[1]()
            if one is not None:
                frame.append(one)
        return frame

    def rest(self) -> list[Json]:
        """The next event alone."""
        assert self.wire is not None
        one = self.wire.next_part() or self.wire.next_fact()
        assert one is not None
        return [one]

    def lose_part(self) -> None:
        """The next part vanishes without a sign."""
        if self.wire is not None:
            self.wire.lose_part()

    def odds(self) -> dict[str, int]:
        """What may happen, and how likely it is."""
        running = self.status == "running"
        return {
            "prompt": 4 if not self.prompts else 2,
            "unqueue": bool(self.queue),
            "promote": bool(self.queue),
            "edit": bool(self.prompts),
            "start": 8 * (self.status == "pending"),
            "speak": 8 * running,
            "ask": 3 * running,
            "finish_step": 6 * running,
            "compact": running,
            "try_again": running,
            "fail": running,
            "interrupt": running,
            "stopped": 8 * self.stopping,
            "go_down": running and self.wire is not None,
            "lose_a_part": 2 * (self.wire is not None and bool(self.wire.parts)),
        }

    def come_to_rest(self) -> None:
        """Work off all there is."""
        while self.status not in IDLE or self.stopping:
            if self.stopping:
                self.stopped()
            elif self.status == "pending":
                self.start()
            else:
                self.finish_step()

    @property
    def prompts(self) -> list[int]:
        return [key for key, raw in sorted(self.messages.items()) if raw["role"] == "user"]

    # --- what people do -----------------------------------------------------------------------------------------------

    def prompt(self, text: str) -> None:
        if self.status in IDLE and not self.queue and not self.stopping:
            self._store(user(next(self._ids), text))
            self._set_status("pending")
        elif len(self.queue) < 5:
            self.queue.append(queued(next(self._queue_ids), text))
            self._fact(queue(*self.queue))

    def unqueue(self, at: int) -> None:
        del self.queue[at]
        self._fact(queue(*self.queue))

    def promote(self, at: int, *, queue_first: bool) -> None:
        entry = self.queue.pop(at)
        self._drop_run()
        raw = user(next(self._ids), entry["content"][0]["text"])
        facts = [msg(raw), queue(*self.queue)]
        self._remember(raw)
        for fact in reversed(facts) if queue_first else facts:
            self._fact(fact)
        self._set_status("pending")

    def edit(self, prompt: int, text: str, *, sent_again: int) -> None:
        """Everything from the prompt on goes. Streams get `sent_again` of the earlier messages, then the new one."""
        self._drop_run()
        self.edited = True
        self.messages = {key: raw for key, raw in self.messages.items() if key < prompt}
        earlier = list(self.messages.values())
        self.queue = []
        raw = user(next(self._ids), text)
        self._remember(raw)
        for each in earlier[len(earlier) - sent_again :]:
            self._fact(msg(each))
        self._fact(msg(raw))
        self._fact(queue())
        self._set_status("pending")

    def interrupt(self) -> None:
        self.stopping = True
        self.status = "waiting"
        self._fact(status("waiting"))

    # --- what the run does --------------------------------------------------------------------------------------------

    def start(self) -> None:
        before = self.wire.facts_sent if self.wire else 0
        self._set_status("running")
        self._begin_step()
        if self.wire is not None:
            self.wire.facts_before_step = before  # a few parts may come just before `running`

    def speak(self, kind: str) -> None:
        word = f"{next(self._words)} "
        if kind == "text":
            self._step.text += word
        self._part(part(kind, word))

    def ask(self, pieces: int) -> None:
        """A tool call, its arguments in pieces and then whole."""
        id_ = f"call_{next(self._words)}"
        said = [f'"{next(self._words)}"' for _ in range(pieces)]
        self._step.calls[id_] = "".join(said)
        for piece in said:
            self._part(call(id_, args_delta=piece))
        self._part(call(id_, args={}))

    def finish_step(self) -> None:
        """With calls: results, messages, and another step. Without: the end of the turn."""
        calls, text = self._step.calls, self._step.text
        for id_ in calls:
            self._part(result(id_))
        self._step.stored = True
        before = self.wire.parts_before_step if self.wire else 0
        reasoning = "".join(
            one["message_part"]["part"]["text"]
            for one in self._buffer
            if one["message_part"]["part"]["type"] == "reasoning"
        )
        stamp = f"2026-03-20T18:20:00.{next(self._words):06}Z"
        step = [assistant(next(self._ids), text, *(call(id_, args={}) for id_ in calls), reasoning=reasoning)]
        step += [tool(next(self._ids), id_) for id_ in calls]
        facts_before = self.wire.facts_sent if self.wire else 0
        for raw in step:
            raw["created_at"] = stamp
            self._remember(raw)
            self._fact(msg(raw), parts_first=before)
        self._buffer_is_old = True
        if calls:
            self._begin_step(keep_buffer=True)
            if self.wire is not None:
                self.wire.facts_before_step = facts_before
        else:
            self._end_run("waiting")

    def compact(self) -> None:
        """Its own call and result: no step, no live text of anybody."""
        fields: dict[str, Any] = {
            "tool_call_id": f"chat_summarized_{next(self._words)}",
            "tool_name": "chat_summarized",
        }
        self._part(part("tool-call", **fields))
        for role, one in (("assistant", part("tool-call", args={}, **fields)), ("tool", part("tool-result", **fields))):
            self._store({"id": next(self._ids), "role": role, "content": [one], "created_at": str(AT)})
        self._part(part("tool-result", **fields))

    def try_again(self) -> None:
        self._attempt += 1
        self._buffer = []
        self._fact(retry(self._attempt, f"2026-03-20T18:20:{next(self._words):012}Z"))
        self._begin_step()

    def fail(self, *, told: bool) -> None:
        prompt = self.prompts[-1]
        self.failed.add(prompt)
        self.last_error = f"boom {prompt}"
        if told:
            self._fact(event("error", error={"message": self.last_error}))
        self._drop_run()
        self._set_status("error")

    def stopped(self) -> None:
        """What an interrupted run had is saved, without usage; then the end of the run."""
        self.stopping = False
        if self._step.text:
            self._step.stored = True
            raw = assistant(next(self._ids), self._step.text)
            del raw["usage"]
            self._store(raw)
        self._end_run("waiting")

    def go_down(self) -> None:
        """A polite stop: the step is lost, its prompt will run again; every stream ends."""
        self._drop_run()
        self.status = "pending"
        self.wire = None

    # --- inside -------------------------------------------------------------------------------------------------------

    def _remember(self, raw: Json) -> None:
        self.messages[raw["id"]] = raw

    def _store(self, raw: Json) -> None:
        self._remember(raw)
        self._fact(msg(raw))

    def _fact(self, sent: Json, *, parts_first: int | None = None) -> None:
        if self.wire is not None:
            self.wire.fact(sent, parts_first=parts_first)

    def _part(self, one: Json) -> None:
        if self._buffer_is_old:
            self._buffer, self._buffer_is_old = [], False
        (sent,) = live(one)
        self._buffer.append(sent)
        if self.wire is not None:
            self.wire.part(sent, facts_first=self.wire.facts_before_step)

    def _set_status(self, value: str) -> None:
        self.status = value
        if value != "error":
            self.last_error = None
        self._fact(status(value))

    def _begin_step(self, *, keep_buffer: bool = False) -> None:
        self._step = Said()
        self.said.append(self._step)
        if not keep_buffer:
            self._buffer, self._buffer_is_old = [], False
        if self.wire is not None:
            self.wire.parts_before_step = self.wire.parts_sent
            self.wire.facts_before_step = self.wire.facts_sent

    def _drop_run(self) -> None:
        self.stopping = False
        self._attempt = 0
        self._buffer, self._buffer_is_old = [], False
        self._step = Said()

    def _end_run(self, value: str) -> None:
        self._attempt = 0
        if self.queue:
            entry = self.queue.pop(0)
            self._store(user(next(self._ids), entry["content"][0]["text"]))
            self._fact(queue(*self.queue))
            value = "pending"
        self._set_status(value)
