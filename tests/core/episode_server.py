"""A chat server from 2.35 on, small enough to be believed: what it stores, and how its streams come to know of it.

A stream is told a state, not a sequence of facts: it looks at what is stored, tells what it has not told in a fixed
order, now and then over two frames, and then the parts of the current episode.
"""

import random
from dataclasses import dataclass, field

from tests.core.chat_server import IDLE, ChatServer, Said
from tests.core.frames import (
    AT,
    HISTORY_RESET,
    PREVIEW_RESET,
    Json,
    action,
    assistant,
    call,
    error,
    msg,
    numbered,
    part,
    queue,
    queued,
    result,
    retry,
    status,
    tool,
    user,
)

_LISTED = ("history_reset", "message")


@dataclass
class View:
    """What one stream has told."""

    after: int
    revision: int  # rows up to this one
    begun: bool = False
    version: int | None = None  # history version of the last reset of the preview
    attempt: int = 0
    queue: list[int] | None = None
    status: str = ""
    said_at: int = -1  # history version whose error or action was told
    retry: Json | None = None
    seq: int = 0
    torn: list[list[Json]] = field(default_factory=list)  # frames of one look that have not been sent


class EpisodeServer:
    """The chat and its run. Every method is one thing that happens."""

    def __init__(self, *, revisions: bool = False, old: ChatServer | None = None) -> None:
        """Args: `revisions`: honours `after_revision`. `old`: the server that was upgraded to this one."""
        self.revisions = revisions
        self.messages: dict[int, Json] = {}
        self.queue: list[Json] = []
        self.status = "waiting"
        self.last_error: str | None = None
        self.failed: set[int] = set()
        self.said: list[Said] = []
        self.wire: View | None = None
        self.stopping = False
        self.finishing = False  # the last message is stored, the status has not followed
        self._revision = 0  # of the last change to history
        self._row_revisions: dict[int, int] = {}
        self._last_deletion = 0
        self._attempt = 1
        self._retry: Json | None = None  # set while a failed attempt waits for the next one
        self._waits_for: list[str] = []  # tool calls of the client
        self._tools: list[str] = []  # calls that the server is running
        self._buffer: list[Json] = []
        self._step = Said()
        self._ids = iter(range(100, 100_000))
        self._queue_ids = iter(range(1, 100_000))
        self._words = iter(range(100_000))
        self._touched_queue = False
        if old is not None:
            self._take_over(old)

    def _take_over(self, old: ChatServer) -> None:
        self.__dict__.update({name: old.__dict__[name] for name in ("_ids", "_queue_ids", "_words", "said", "failed")})
        self.messages, self.queue, self.last_error = old.messages, old.queue, old.last_error
        self._touched_queue = bool(self.queue)
        self._revision = 1
        self._row_revisions = dict.fromkeys(self.messages, 1)
        self._last_deletion = int(old.edited)
        self.status = old.status if old.status in IDLE else "running"
        if self.status == "waiting" and self.queue:
            self._promote(self.queue.pop(0))
        if self.status == "running":
            self._begin_step()

    # --- REST and streams ---------------------------------------------------------------------------------------------

    def chat(self) -> Json:
        said = {} if self.last_error is None else {"last_error": {"message": self.last_error, "kind": "generic"}}
        return {"id": "x", "status": self.status, **said}

    def page(self, down_to: int) -> tuple[list[Json], bool]:
        newest_first = [self.messages[key] for key in sorted(self.messages, reverse=True)]
        count = sum(raw["id"] > down_to for raw in newest_first) + 1
        return newest_first[:count], count >= len(newest_first)

    def open(self, after_id: int, after_revision: int | None, chance: random.Random) -> list[Json]:
        """A new stream: the first frame of what it tells."""
        self.wire = View(after_id, (after_revision or 0) if self.revisions else 0)
        return self._look(chance, whole=chance.random() < 0.5)

    def disconnect(self) -> None:
        self.wire = None

    @property
    def nothing_on_the_way(self) -> bool:
        view = self.wire
        return view is None or not (view.torn or self._news(view) or len(self._buffer) > view.seq)

    def ready(self, chance: random.Random) -> list[Json]:
        """The next frame."""
        return self._look(chance, whole=chance.random() < 0.5)

    def rest(self) -> list[Json]:
        """The next frame, cut nowhere."""
        return self._look(random.Random(0), whole=True)

    def _news(self, view: View) -> bool:
        return (
            view.revision < self._revision
            or view.status != self.status
            or view.retry != self._retry
            or view.attempt != self._attempt
            or view.queue != [entry["id"] for entry in self.queue]
        )

    def _look(self, chance: random.Random, *, whole: bool) -> list[Json]:
        view = self.wire
        assert view is not None
        if not view.torn and (self._news(view) or not view.begun):
            begins = not view.begun
            state = self._state(view)
            cut = chance.randint(0, len(state) - 1) if state and not whole else 0
            # What a connection begins with is cut only inside a list of messages: that may be long.
            while begins and cut and (state[0] != HISTORY_RESET or state[cut - 1]["type"] not in _LISTED):
                cut -= 1
            view.torn = [frame for frame in (state[:cut], state[cut:]) if frame]
        if view.torn:
            return view.torn.pop(0)
        upto = len(self._buffer) if whole else min(len(self._buffer), view.seq + chance.randint(1, 4))
        parts, view.seq = self._buffer[view.seq : upto], upto
        return parts

    def _state(self, view: View) -> list[Json]:
        events: list[Json] = []
        if view.revision < self._revision:
            live = sorted(self.messages)
            if self._last_deletion > view.revision:
                events = [HISTORY_RESET, *(msg(self.messages[key]) for key in live)]
            else:
                fresh = [key for key in live if self._row_revisions[key] > view.revision]
                events = [msg(self.messages[key]) for key in fresh if view.begun or key > view.after]
        ids = [entry["id"] for entry in self.queue]
        if view.queue != ids and (view.begun or self._touched_queue):
            events.append(queue(*self.queue))
        if view.status != self.status:
            events.append(status(self.status, self._revision if self.revisions else None))
        if view.said_at != self._revision and self.status == "error":
            events.append(error(str(self.last_error), kind="generic"))
        if view.said_at != self._revision and self.status == "requires_action":
            events.append(action(*self._waits_for))
        if view.retry != self._retry and self._retry is not None:
            events.append(self._retry)
        current = self.revisions and not view.begun and view.revision == self._revision
        if (view.version, view.attempt) != (self._revision, self._attempt) and not current:
            events.append(PREVIEW_RESET)
            view.seq = 0
        view.begun, view.revision, view.queue, view.status = True, self._revision, ids, self.status
        view.version, view.attempt, view.retry, view.said_at = (
            self._revision,
            self._attempt,
            self._retry,
            self._revision,
        )
        return events

    @property
    def prompts(self) -> list[int]:
        return [key for key, raw in sorted(self.messages.items()) if raw["role"] == "user"]

    def lose_part(self) -> None:
        """The next part vanishes."""
        if self.wire is not None and self.wire.seq < len(self._buffer):
            self.wire.seq += 1

    def odds(self) -> dict[str, int]:
        """What may happen, and how likely it is."""
        running = self.status == "running"
        return {
            "prompt": 4 if not self.prompts else 2,
            "unqueue": bool(self.queue),
            "promote": bool(self.queue),
            "edit": bool(self.prompts) and not self.stopping,
            "speak": 8 * running,
            "ask": 3 * running,
            "finish_step": 6 * running,
            "compact": running,
            "try_again": running,
            "fail": running,
            "interrupt": running,
            "stopped": 8 * self.stopping,
            "client_answers": 8 * (self.status == "requires_action"),
            "go_down": running and self.wire is not None,
            "lose_a_part": 2 * (self.wire is not None and self.wire.seq < len(self._buffer)),
        }

    def come_to_rest(self) -> None:
        """Work off all there is."""
        while self.status not in IDLE:
            if self.stopping:
                self.stopped()
            elif self.status == "requires_action":
                self.client_answers()
            else:
                self.finish_step()

    # --- what people do -----------------------------------------------------------------------------------------------

    def prompt(self, text: str) -> None:
        entry = queued(next(self._queue_ids), text)
        if self.status in IDLE and not self.queue and not self.finishing:
            self._promote(entry)
        elif len(self.queue) < 5:
            self.queue.append(entry)
            self._touched_queue = True
            if self.status == "error":
                self._promote(self.queue.pop(0))

    def unqueue(self, at: int) -> None:
        del self.queue[at]

    def promote(self, at: int, *, queue_first: bool) -> None:
        """Moves it to the front, whatever `queue_first`; a run is interrupted for it."""
        self.queue.insert(0, self.queue.pop(at))
        if self.status == "running" and not self.finishing:
            self.interrupt()
        elif self.status == "error":
            self._promote(self.queue.pop(0))

    def edit(self, prompt: int, text: str, *, sent_again: int) -> None:
        self.stopping = self.finishing = False
        self._last_deletion = self._changed()
        self.messages = {key: raw for key, raw in self.messages.items() if key < prompt}
        self.queue = []
        self._store(user(next(self._ids), text))
        self._run()

    def interrupt(self) -> None:
        if self.finishing:
            return
        self.stopping = True
        self.status = "interrupting"
        self._retry = None

    # --- what the run does --------------------------------------------------------------------------------------------

    def speak(self, kind: str) -> None:
        if self._is_silent:
            return
        word = f"{next(self._words)} "
        if kind == "text":
            self._step.text += word
        self._part(part(kind, word))

    def ask(self, pieces: int) -> None:
        if self._is_silent:
            return
        id_ = f"call_{next(self._words)}"
        said = [f'"{next(self._words)}"' for _ in range(pieces)]
        self._step.calls[id_] = "".join(said)
        for piece in said:
            self._part(call(id_, args_delta=piece))
        self._part(call(id_, args={}))

    def finish_step(self) -> None:
        if self.finishing:
            self.finished()
            return
        if self._tools:
            self._answer(self._tools)
            return
        if self._retry is not None:
            self.try_again()
        calls = list(self._step.calls)
        self._save_step(usage=True, calls=calls)
        if not calls:
            self.finishing = True
        elif next(self._words) % 3 == 0:
            self._waits_for = calls
            self.status = "requires_action"
        else:
            self._tools = calls
            for id_ in calls:
                self._part(result(id_))

    def client_answers(self) -> None:
        """Results from the client, or what an interrupt makes of them: the run goes on."""
        self._answer(self._waits_for)
        self._run()

    def finished(self) -> None:
        self.finishing = False
        self.status = "waiting"
        if self.queue:
            self._promote(self.queue.pop(0))

    @property
    def _is_silent(self) -> bool:
        return self._retry is not None or self.finishing or bool(self._tools)

    def compact(self) -> None:
        if self._is_silent or self._step.text or self._step.calls:
            return  # between two steps
        fields = {"tool_call_id": f"chat_summarized_{next(self._words)}", "tool_name": "chat_summarized"}
        for role, one in (("assistant", part("tool-call", args={}, **fields)), ("tool", part("tool-result", **fields))):
            self._store({"id": next(self._ids), "role": role, "content": [one], "created_at": str(AT)})
        self._begin_step()

    def try_again(self) -> None:
        """First the attempt fails, then the next one begins."""
        if self.finishing or self._tools:
            return
        if self._retry is None:
            self._retry = retry(self._attempt, f"2026-03-20T18:20:{next(self._words):012}Z")
        else:
            self._attempt += 1
            self._new_attempt()

    def fail(self, *, told: bool) -> None:
        """Told always, with the status."""
        if self.finishing:
            return
        prompt = self.prompts[-1]
        self.failed.add(prompt)
        self.last_error = f"boom {prompt}"
        self._changed()
        self.status, self._retry, self._buffer = "error", None, []
        self._step, self._tools = Said(), []

    def stopped(self) -> None:
        self.stopping = False
        if self._tools:
            self._answer(self._tools)
        if self._step.text:
            self._save_step(usage=False, calls=[])
        self._changed()
        self._buffer = []
        self.status = "waiting"
        if self.queue:
            self._promote(self.queue.pop(0))

    def go_down(self) -> None:
        """A polite stop: the next process repeats the attempt under another number."""
        self.wire = None
        if self.status == "running" and not self.finishing:
            self._attempt += 1
            self._new_attempt()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _changed(self) -> int:
        self._revision += 1
        return self._revision

    def _store(self, raw: Json) -> None:
        self.messages[raw["id"]] = raw
        self._row_revisions[raw["id"]] = self._changed()

    def _promote(self, entry: Json) -> None:
        self._store(user(next(self._ids), entry["content"][0]["text"]))
        self._run()

    def _run(self) -> None:
        self.status, self.last_error = "running", None
        self._begin_step()

    def _begin_step(self) -> None:
        self._attempt = 1
        self._new_attempt()

    def _new_attempt(self) -> None:
        self._retry = None
        self._buffer = []
        self._tools = []
        self._step = Said()
        self.said.append(self._step)

    def _save_step(self, *, usage: bool, calls: list[str]) -> None:
        said = [one["message_part"]["part"] for one in self._buffer]
        reasoning = "".join(one["text"] for one in said if one["type"] == "reasoning")
        self._step.stored = True
        parts = (call(id_, args={}) for id_ in calls)
        raw = assistant(next(self._ids), self._step.text, *parts, reasoning=reasoning)
        if not usage:
            del raw["usage"]
        self._store(raw)
        self._begin_step()

    def _answer(self, calls: list[str]) -> None:
        for id_ in calls:
            self._store(tool(next(self._ids), id_))
        self._begin_step()

    def _part(self, one: Json) -> None:
        self._buffer += numbered((self._revision, self._attempt), len(self._buffer) + 1, one)
