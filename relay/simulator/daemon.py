"""The part of the server that runs turns: the status machine, the part buffer, steps, retries, interrupts.

Every status change, every event and its order follow coderd/chatd at ff8dcca as seen running. The public methods are
one transaction each: they change rows and publish, without an await in between.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import UUID

from relay.simulator import model
from relay.simulator.dialect import ErrorEvent, PartEvent, RetryEvent, StatusEvent
from relay.simulator.spend import cost_micros
from relay.simulator.state import QUEUE_LIMIT, Chat, Database, Message, Part, QueuedMessage
from relay.simulator.step import StepOutput
from relay.simulator.stream import HistoryEdited, Hub, MessagesStored, QueueChanged

PART_BUFFER = 10_000
MAX_ATTEMPTS = 25
# PostgreSQL refuses a notification of 8000 bytes; the envelope around an error text takes the rest.
LONGEST_NOTIFIED_TEXT = 7500
POLL_MS = 1000.0
CHATS_PER_POLL = 10


class QueueFull(Exception):
    """The chat's queue holds as many prompts as it may."""


class UnknownMessage(Exception):
    """No such message in this chat, or edited away."""


class NotAUserMessage(Exception):
    """Only user messages can be edited."""


class UnknownQueuedMessage(Exception):
    """No such prompt in this chat's queue."""


class ModelFailed(Exception):
    """The model's provider answered with an error."""


@dataclass(frozen=True)
class Pace:
    """`speed` divides every model time; the poll for pending chats is a model time too."""

    speed: float = 1.0
    poll_ms: float = POLL_MS
    titles: bool = True
    title_ms: float = 10.0
    recovery_ms: float = 303_000.0


class Daemon:
    """Runs the turns of all chats of one server life."""

    def __init__(self, database: Database, hub: Hub, pace: Pace) -> None:
        self.database = database
        self.hub = hub
        self.pace = pace
        self.runs: dict[UUID, Run] = {}
        self.unanswered = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None

    # Life

    def start(self) -> None:
        """Begin to poll. Chats that still say `running` lost their worker in a crash: they are found much later."""
        lost = [chat for chat in self.database.chats.values() if chat.status == "running"]
        if lost:
            self._spawn(self._recover(lost))
        self._poller = asyncio.create_task(self._poll())

    async def stop(self, *, polite: bool) -> None:
        """End all runs. Politely: their chats become pending again, without an event. Killed: rows stay as they are."""
        tasks = [*self._tasks, *(run.task for run in self.runs.values())]
        if self._poller is not None:
            tasks.append(self._poller)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for run in self.runs.values():
            if polite and run.chat.status == "running":
                self._set_status(run.chat, "pending")
        self.runs.clear()

    async def sleep(self, ms: float) -> None:
        """Wait for model milliseconds."""
        await asyncio.sleep(ms * 0.001 / self.pace.speed)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _poll(self) -> None:
        while True:
            await self.sleep(self.pace.poll_ms)
            self.poll()

    def poll(self, only: UUID | None = None) -> None:
        """Start runs for pending chats (or for one of them), oldest change first, at most ten at once."""
        pending = [c for c in self.database.chats.values() if c.status == "pending" and only in (None, c.id)]
        free = sorted((chat for chat in pending if chat.id not in self.runs), key=lambda chat: chat.updated_at)
        for chat in free[:CHATS_PER_POLL]:
            self._set_status(chat, "running")
            self.runs[chat.id] = Run(self, chat)

    async def _recover(self, lost: list[Chat]) -> None:
        await self.sleep(self.pace.recovery_ms)
        for chat in lost:
            if chat.status == "running" and chat.id not in self.runs:
                self._set_status(chat, "pending")

    # What a request does

    def create_chat(
        self, owner: UUID, title: str, content: tuple[Part, ...], model_id: UUID, parent: Chat | None = None
    ) -> Chat:
        chat = self.database.create_chat(owner, title, content, model_id, parent)
        self.hub.publish_watch("created", chat)
        return chat

    def send(
        self, chat: Chat, caller: UUID, content: tuple[Part, ...], model_id: UUID | None
    ) -> Message | QueuedMessage:
        """Insert the message, or queue it while the chat is busy or its queue is not empty.

        Raises:
            QueueFull: Twenty prompts wait already.
        """
        if chat.is_busy or chat.queue:
            if len(chat.queue) >= QUEUE_LIMIT:
                raise QueueFull
            queued = self.database.enqueue(chat, content)
            self.hub.publish(chat, QueueChanged())
            return queued
        message = self._insert_user_message(chat, caller, content, model_id)
        self._change_status(chat, "pending")
        return message

    def edit(self, chat: Chat, caller: UUID, message_id: int, content: tuple[Part, ...]) -> Message:
        """Replace a user message and all after it by a new message; empty the queue; abort a run.

        Raises:
            UnknownMessage, NotAUserMessage: Nothing was changed.
        """
        old = next((m for m in chat.messages if m.id == message_id and not m.deleted and m.visible), None)
        if old is None:
            raise UnknownMessage
        if old.role != "user":
            raise NotAUserMessage
        for message in chat.messages:
            if message.id >= message_id:
                message.deleted = True
        chat.queue.clear()
        model_id = old.model_config_id or chat.last_model_config_id
        new = self.database.insert(chat, "user", content, self.database.clock.now(), created_by=caller, model=model_id)
        self.hub.publish(chat, HistoryEdited(), QueueChanged())
        self._change_status(chat, "pending")
        self._abort(chat, "superseded")
        return new

    def interrupt(self, chat: Chat) -> None:
        """Set the chat waiting and let its run save what it has. A pending chat stays so and is announced again."""
        was_running = chat.status == "running"
        self._change_status(chat, "pending" if chat.status == "pending" else "waiting")
        if was_running:
            self._abort(chat, "interrupted")

    def delete_queued(self, chat: Chat, queue_id: int) -> None:
        chat.queue[:] = [queued for queued in chat.queue if queued.id != queue_id]
        self.hub.publish(chat, QueueChanged())

    def promote(self, chat: Chat, caller: UUID, queue_id: int) -> Message:
        """Make a queued prompt a message now, whatever runs; the partial output of a run is lost.

        Raises:
            UnknownQueuedMessage: Nothing was changed.
        """
        queued = next((queued for queued in chat.queue if queued.id == queue_id), None)
        if queued is None:
            raise UnknownQueuedMessage
        chat.queue.remove(queued)
        self.hub.publish(chat, QueueChanged())
        message = self._insert_user_message(chat, caller, queued.content, None)
        self._change_status(chat, "pending")
        self._abort(chat, "superseded")
        return message

    def set_archived(self, chat: Chat, archived: bool) -> None:
        """Archive the chat and its sub-agents, or unarchive the chat alone. The event has the row as it was."""
        self.hub.publish_watch("deleted" if archived else "created", chat)
        now = self.database.clock.now()
        for one in [chat, *self.database.children(chat)] if archived else [chat]:
            one.archived, one.updated_at = archived, now

    # What a run does

    def end_run(self, run: "Run", error: str | None) -> None:
        """The worker lets the chat go; what follows depends on what happened to it meanwhile."""
        chat = run.chat
        self.runs.pop(chat.id, None)
        run.buffer.clear()
        if error is not None and len(error.encode()) < LONGEST_NOTIFIED_TEXT:
            self.hub.publish(chat, ErrorEvent(error))
        if chat.status == "pending":
            self._publish_status(chat)
        elif error is not None:
            self._change_status(chat, "error", error)
        elif chat.queue:
            queued = chat.queue.pop(0)
            self._insert_user_message(chat, chat.owner_id, queued.content, None)
            self.hub.publish(chat, QueueChanged())
            self._change_status(chat, "pending")
        else:
            self._change_status(chat, "waiting")

    def generate_title(self, chat: Chat) -> None:
        """For a chat of one prompt under its automatic title; told on watch with the row as the worker acquired it."""
        users = [message for message in chat.history() if message.role == "user"]
        if not self.pace.titles or len(users) != 1 or len(chat.history()) != 1:
            return
        text = text_of(users[0].content)
        if chat.title != automatic_title([text]):
            return
        acquired = replace(chat, messages=[], queue=[])

        async def work() -> None:
            await self.sleep(self.pace.title_ms)
            chat.title = acquired.title = model.title_for(text)
            chat.updated_at = self.database.clock.now()
            self.hub.publish_watch("title_change", acquired)

        self._spawn(work())

    def spawn_agent(self, parent: Chat, args: Any) -> Chat:
        prompt, title = str(args["prompt"]), str(args["title"])
        return self.create_chat(
            parent.owner_id, title, (Part("text", text=prompt),), parent.last_model_config_id, parent
        )

    def _insert_user_message(
        self, chat: Chat, caller: UUID, content: tuple[Part, ...], model_id: UUID | None
    ) -> Message:
        message = self.database.insert(
            chat,
            "user",
            content,
            self.database.clock.now(),
            created_by=caller,
            model=chat.last_model_config_id if model_id is None else model_id,
        )
        self.hub.publish(chat, MessagesStored())
        return message

    def _abort(self, chat: Chat, why: Literal["interrupted", "superseded"]) -> None:
        run = self.runs.get(chat.id)
        if run is not None:
            run.abort(why)

    def _set_status(self, chat: Chat, status: str, last_error: str | None = None) -> None:
        chat.status, chat.last_error = status, last_error
        chat.updated_at = self.database.clock.now()

    def _change_status(self, chat: Chat, status: str, last_error: str | None = None) -> None:
        if not (chat.status == status == "pending"):
            self._set_status(chat, status, last_error)
        self._publish_status(chat)

    def _publish_status(self, chat: Chat) -> None:
        self.hub.publish(chat, StatusEvent(chat.status))
        self.hub.publish_watch("status_change", chat)


class Run:
    """One worker's hold on one chat, from `running` to its end."""

    def __init__(self, daemon: Daemon, chat: Chat) -> None:
        self.chat = chat
        self.buffer: deque[PartEvent] = deque(maxlen=PART_BUFFER)
        self._daemon = daemon
        self._aborted: Literal["interrupted", "superseded"] | None = None
        # A task that is cancelled before its first turn never runs at all.
        self._cancellable = False
        self._output = StepOutput(daemon.database)
        self.task = asyncio.create_task(self._work())

    def abort(self, why: Literal["interrupted", "superseded"]) -> None:
        """Stop the run. An interrupted step is saved, unless something supersedes it before that is done."""
        if self._aborted != "superseded":
            self._aborted = why
        if self._cancellable:
            self._cancellable = False
            self.task.cancel()

    async def _work(self) -> None:
        error: str | None = None
        self._daemon.hub.publish(self.chat, StatusEvent("running"))
        try:
            self._cancellable = True
            if self._aborted is not None:
                pass
            elif self._daemon.unanswered > 0:
                self._daemon.unanswered -= 1
                self._daemon.hub.faults.fired["unanswered"] += 1
            else:
                self._daemon.generate_title(self.chat)
                await self._turn()
        except asyncio.CancelledError:
            if self._aborted is None:
                raise
            self.task.uncancel()
            await self._daemon.sleep(1.0)
            await self._save_interrupted()
        except ModelFailed as exc:
            error = f"stream response: {exc}"
        self._cancellable = False
        await self._daemon.sleep(1.0)
        self._daemon.end_run(self, error)

    async def _turn(self) -> None:
        while True:
            prompt, step = self._prompt()
            await self._call_model(prompt, step)
            self._output.finish()
            calls = self._output.calls
            if not self._output.content:
                return
            results = await self._run_tools()
            await self._store_step(results)
            if not calls:
                return

    def _prompt(self) -> tuple[str, int]:
        """The text that began this turn, and how many of its steps are stored."""
        history = self.chat.history()
        last = max(i for i, message in enumerate(history) if message.role == "user")
        return text_of(history[last].content), sum(m.role == "assistant" for m in history[last:])

    async def _call_model(self, prompt: str, step: int) -> None:
        """Stream one step's output into the buffer and to the streams; repeat what fails for a passing reason.

        Raises:
            ModelFailed: For good, or for the 25th time.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            self._output = StepOutput(self._daemon.database)
            try:
                await self._listen(model.answer(prompt, step, attempt))
                return
            except ModelFailed as exc:
                if not model.is_transient(str(exc)):
                    raise
                if attempt == MAX_ATTEMPTS:
                    raise ModelFailed(f"max retry attempts ({MAX_ATTEMPTS}) exceeded: {exc}") from exc
                delay_ms = model.retry_delay_ms(attempt)
                self.buffer.clear()
                self._announce_retry(attempt, delay_ms, str(exc))
            self._output = StepOutput(self._daemon.database)
            await self._daemon.sleep(delay_ms)

    def _announce_retry(self, attempt: int, delay_ms: int, error: str) -> None:
        if len(error.encode()) < LONGEST_NOTIFIED_TEXT:
            retrying_at = time.time_ns() + int(delay_ms * 1_000_000 / self._daemon.pace.speed)
            self._daemon.hub.publish(self.chat, RetryEvent(attempt, delay_ms, error, retrying_at))

    async def _listen(self, chunks: Iterable[model.Chunk]) -> None:
        in_burst, unpaused = False, 0
        for chunk in chunks:
            if isinstance(chunk, model.Pause):
                in_burst = chunk.ms == 0
                unpaused = unpaused + 1 if in_burst else 0
                # A burst still lets the forwarding side have a turn now and then.
                if not in_burst or unpaused % 8 == 0:
                    await self._daemon.sleep(chunk.ms)
            elif isinstance(chunk, model.Break):
                raise ModelFailed(chunk.error)
            else:
                for part in self._output.add(chunk):
                    self._publish(PartEvent("assistant", part), in_burst=in_burst and unpaused > 64)

    def _publish(self, part: PartEvent, *, in_burst: bool = False) -> None:
        self.buffer.append(part)
        self._daemon.hub.publish_part(self.chat, part, in_burst=in_burst)

    async def _run_tools(self) -> list[Part]:
        """All at once; the results are announced when the slowest has ended, in the order of the calls."""
        calls = self._output.calls
        if not calls:
            return []
        interrupted = False
        try:
            await self._daemon.sleep(max(call.ms for call in calls))
        except asyncio.CancelledError:
            if self._aborted is None:
                raise
            interrupted = True
        results: list[Part] = []
        for call in calls:
            result, is_error = ({"error": "context canceled"}, True) if interrupted else self._tool(call)
            call_id = self._output.call_ids[call.call]
            results.append(
                Part("tool-result", tool_call_id=call_id, tool_name=call.tool, result=result, is_error=is_error)
            )
        self._output.results = results
        for part in results:
            self._publish(PartEvent("tool", part))
        if interrupted:
            raise asyncio.CancelledError
        return results

    def _tool(self, call: model.Call) -> tuple[Any, bool]:
        match call.tool:
            case "list_templates":
                return {"count": 0, "page": 1, "templates": [], "total_count": 0, "total_pages": 1}, False
            case "read_template":
                return {"error": "template not found"}, True
            case "spawn_agent":
                child = self._daemon.spawn_agent(self.chat, call.args)
                return {"chat_id": str(child.id), "status": child.status, "title": child.title}, False
            case _:
                return {"error": f"Tool not found: {call.tool}"}, True

    async def _store_step(self, results: list[Part]) -> None:
        """Assistant and tool messages in one insert; then the buffer is cleared, a moment too late to hide it."""
        database = self._daemon.database
        config = database.model_of(self.chat)
        text = "".join(part.text for part in self._output.content if part.type == "text")
        usage = model.usage_for(text, config.context_limit if config else 0)
        now = database.clock.now()
        model_id = self.chat.last_model_config_id
        database.insert(
            self.chat,
            "assistant",
            tuple(self._output.content),
            now,
            model=model_id,
            usage=usage,
            cost_micros=cost_micros(usage, config),
        )
        for result in results:
            database.insert(self.chat, "tool", (result,), now, model=model_id)
        self._daemon.hub.publish(self.chat, *[MessagesStored() for _ in range(1 + len(results))])
        self._output = StepOutput(database)
        await self._daemon.sleep(0.2)
        self.buffer.clear()

    async def _save_interrupted(self) -> None:
        """What was received so far, and a result for every call that has none; no usage, no cost."""
        content, results = self._output.interrupted()
        # Somebody set the chat pending meanwhile: this run no longer owns it.
        if self._aborted != "interrupted" or self.chat.status == "pending" or not content:
            return
        database = self._daemon.database
        now, model_id = database.clock.now(), self.chat.last_model_config_id
        database.insert(self.chat, "assistant", tuple(content), now, model=model_id)
        for result in results:
            database.insert(self.chat, "tool", (result,), now, model=model_id)
        self._daemon.hub.publish(self.chat, *[MessagesStored() for _ in range(1 + len(results))])


def text_of(content: Iterable[Part]) -> str:
    """All text of a prompt."""
    return " ".join(part.text for part in content if part.type == "text")


def automatic_title(texts: Iterable[str]) -> str:
    """The first six words, `…` when there were more, cut to 80 code points."""
    words = " ".join(texts).split()
    if not words:
        return "New Chat"
    title = " ".join(words[:6])
    if len(title) > 80:
        return title[:80]
    return title + ("…" if len(words) > 6 else "")
