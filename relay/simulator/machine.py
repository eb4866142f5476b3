"""The part of the server that runs turns, since 2.35: a state machine over rows that count their own changes.

Each public method is one transaction: it changes rows, gives the chat a new `snapshot_version`, and wakes the streams,
which read the rows again (sync.py). Nothing but parts is ever handed to a stream. What a worker does between two
transactions stands in worker.py.

States, versions and the order of the steps follow coderd/chatd at 681d771, dba45ce and c9a1e2b as seen running.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any
from uuid import UUID

from relay.simulator import compaction, model
from relay.simulator.dialect import RetryEvent
from relay.simulator.spend import cost_micros
from relay.simulator.state import QUEUE_LIMIT, Chat, ChatError, Database, Message, Part, QueuedMessage
from relay.simulator.step import Episode, open_calls, result_of
from relay.simulator.stream import Changed, Hub
from relay.simulator.turns import (
    ChatActive,
    NoResultsAwaited,
    NotAllowed,
    NotARoot,
    NotAUserMessage,
    NothingQueued,
    NotInterruptible,
    Pace,
    QueueFull,
    ResultMissing,
    ToolOutput,
    UnknownMessage,
    UnknownQueuedMessage,
    automatic_title,
    state_name,
    text_of,
)
from relay.simulator.wire import go_json
from relay.simulator.worker import ACTIVE, Worker

# A worker hears of a chat that needs one long before the poll would find it.
CLAIM_SHARE_OF_POLL = 0.02
STATUSES = ("waiting", "running", "interrupting", "requires_action", "error")

FINISHED = "Finished latest turn"
AWAITING = "Waiting for user input"
INTERRUPTED = "Tool execution interrupted by user"
INTERRUPTED_BY_MESSAGE = "Tool execution interrupted by user message"


class Machine:
    """Runs the turns of all chats of one server life."""

    def __init__(self, database: Database, hub: Hub, pace: Pace) -> None:
        self.database = database
        self.hub = hub
        self.pace = pace
        self.features = hub.dialect.features
        self.runs: dict[UUID, Worker] = {}
        self.episodes: dict[UUID, Episode] = {}
        self.retries: dict[UUID, RetryEvent] = {}
        self.unanswered = 0
        self._lost: set[UUID] = set()  # chats whose worker died; nobody else gets them before its lease has run out
        self._tasks: set[asyncio.Task[None]] = set()

    # Life

    def start(self) -> None:
        """Take up what was running. Where the old process was killed, its lease has to run out first."""
        for chat in self.database.chats.values():
            _adopt(chat)
            if chat.status not in ACTIVE:
                chat.has_worker = False
            elif chat.has_worker:
                self._lost.add(chat.id)
                self._spawn(self._recover(chat))
            else:
                self._spawn(self._claim_soon(chat))

    async def stop(self, *, polite: bool) -> None:
        """End all runs; no row says that they ended. Politely, chats are let go, so that they are taken up at once."""
        tasks = [*self._tasks, *(worker.task for worker in self.runs.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if polite:
            for worker in self.runs.values():
                worker.chat.has_worker = False
        self.runs.clear()

    async def sleep(self, ms: float) -> None:
        """Wait for model milliseconds."""
        await asyncio.sleep(ms * 0.001 / self.pace.speed)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def poll(self, only: UUID | None = None) -> None:
        """Give workers to chats that need one now (or to one of them), whatever their wait."""
        for chat in list(self.database.chats.values()):
            if only in (None, chat.id) and self.needs_run(chat):
                self._claim(chat)

    def needs_run(self, chat: Chat) -> bool:
        """Whether the chat waits for a worker, and may get one."""
        return chat.status in ACTIVE and chat.id not in self.runs and chat.id not in self._lost

    async def _claim_soon(self, chat: Chat) -> None:
        await self.sleep(self.pace.poll_ms * CLAIM_SHARE_OF_POLL)
        if self.needs_run(chat):
            self._claim(chat)

    async def _recover(self, chat: Chat) -> None:
        await self.sleep(self.pace.recovery_ms)
        self._lost.discard(chat.id)
        if self.needs_run(chat):
            self._claim(chat)

    def _claim(self, chat: Chat) -> None:
        if not chat.has_worker:
            self._begin(chat)
            chat.has_worker = True
        self.runs[chat.id] = Worker(self, chat)

    # What a request does

    def create_chat(
        self,
        owner: UUID,
        title: str,
        content: tuple[Part, ...],
        model_id: UUID,
        parent: Chat | None = None,
        *,
        dynamic_tools: tuple[str, ...] = (),
        labels: Mapping[str, str] | None = None,
    ) -> Chat:
        chat = self.database.create_chat(owner, title, content, model_id, parent)
        chat.dynamic_tools = dynamic_tools
        chat.labels = dict(labels or {})
        chat.status = "running"
        _adopt(chat)
        self.hub.publish_watch("created", chat)
        self._spawn(self._claim_soon(chat))
        return chat

    def send(
        self,
        chat: Chat,
        caller: UUID,
        content: tuple[Part, ...],
        model_id: UUID | None,
        *,
        interrupting: bool = False,
    ) -> Message | QueuedMessage:
        """Insert the message, or queue it while the chat is busy.

        Args:
            interrupting: End what runs, so that the queue is reached.

        Raises:
            QueueFull: Twenty prompts wait already.
        """
        if chat.status == "waiting" or (chat.status == "error" and not chat.queue):
            self._begin(chat)
            message = self._insert_user(chat, caller, content, model_id)
            self._enter(chat, "running")
            self._publish(chat)
            return message
        if len(chat.queue) >= QUEUE_LIMIT:
            raise QueueFull
        self._begin(chat)
        queued = self.database.enqueue(chat, content, model_id)
        chat.queue_version = chat.snapshot_version
        if chat.status == "error":
            self._promote_next(chat)
            self._enter(chat, "running")
        elif interrupting:
            self._interrupt(chat, INTERRUPTED_BY_MESSAGE)
        self._publish(chat)
        return queued

    def edit(self, chat: Chat, caller: UUID, message_id: int, content: tuple[Part, ...]) -> Message:
        """Replace a user message and all after it by a new message; empty the queue; begin anew.

        Raises:
            UnknownMessage, NotAUserMessage: Nothing was changed.
        """
        old = next((m for m in chat.messages if m.id == message_id and not m.deleted and m.visible), None)
        if old is None:
            raise UnknownMessage
        if old.role != "user":
            raise NotAUserMessage
        self._begin(chat)
        for message in chat.messages:
            if message.id >= message_id and not message.deleted:
                message.deleted, message.revision = True, chat.snapshot_version
        if chat.queue:
            chat.queue.clear()
            chat.queue_version = chat.snapshot_version
        new = self._insert_user(chat, caller, content, old.model_config_id)
        self._enter(chat, "running")
        self._publish(chat)
        self._abort(chat)
        return new

    def interrupt(self, chat: Chat) -> None:
        """Let the run save what it has. A chat that waits for its client's tools gets results and goes on instead.

        Raises:
            NotInterruptible: Nothing runs, or it is being interrupted already.
        """
        if chat.archived or chat.status not in ("running", "requires_action"):
            raise NotInterruptible(state_name(chat))
        self._begin(chat)
        self._interrupt(chat, INTERRUPTED)
        self._publish(chat)

    def delete_queued(self, chat: Chat, queue_id: int) -> None:
        """Forget a queued prompt; one that is not in the queue is no error.

        Raises:
            NothingQueued: The queue is empty.
        """
        if not chat.queue:
            raise NothingQueued(state_name(chat))
        self._begin(chat)
        chat.queue[:] = [queued for queued in chat.queue if queued.id != queue_id]
        chat.queue_version = chat.snapshot_version
        self._publish(chat, watch="")

    def promote(self, chat: Chat, caller: UUID, queue_id: int) -> Message | None:
        """Let a queued prompt come next, and end what runs. None: it becomes a message later.

        Raises:
            UnknownQueuedMessage, NothingQueued: Nothing was changed.
        """
        if not chat.queue:
            raise NothingQueued(state_name(chat))
        if all(queued.id != queue_id for queued in chat.queue):
            raise UnknownQueuedMessage
        self._begin(chat)
        chat.next_queued = queue_id
        chat.queue_version = chat.snapshot_version
        message = None
        if chat.status == "error":
            message = self._promote_next(chat)
            self._enter(chat, "running")
        else:
            self._interrupt(chat, INTERRUPTED_BY_MESSAGE)
        self._publish(chat)
        return message

    def set_archived(self, chat: Chat, archived: bool) -> None:
        """Archive or unarchive the chat with its sub-agents. Streams hear nothing of it.

        Raises:
            NotARoot, ChatActive: Nothing was changed.
        """
        if chat.parent_id is not None:
            raise NotARoot
        family = [chat, *self.database.children(chat)]
        active = next((one for one in family if one.status not in ("waiting", "error")), None)
        if archived and active is not None:
            raise ChatActive(state_name(active))
        for one in family:
            self._begin(one)
            one.archived = archived
            self.hub.publish_watch("deleted" if archived else "created", one)

    def set_title(self, chat: Chat, title: str) -> None:
        chat.title = title
        chat.updated_at = self.database.clock.now()
        self.hub.publish_watch("title_change", chat)

    def submit_results(self, chat: Chat, caller: UUID, results: Sequence[ToolOutput]) -> None:
        """Store the results of all calls that wait for them, and go on.

        Raises:
            NoResultsAwaited, ResultMissing: Nothing was changed.
        """
        if chat.status != "requires_action":
            raise NoResultsAwaited
        by_call = {result.call_id: result for result in results}
        calls = open_calls(chat)
        for call in calls:
            if call.tool_call_id not in by_call:
                raise ResultMissing(call.tool_call_id)
        self._begin(chat)
        for call in calls:
            result = by_call[call.tool_call_id]
            part = result_of(call, result.output, is_error=result.is_error)
            self._insert(chat, "tool", (part,), created_by=caller)
        self._enter(chat, "running")
        self._publish(chat)

    def compact(self, chat: Chat) -> None:
        """Ask for a summary of the history.

        Raises:
            NotAllowed: The chat is at work.
        """
        if chat.archived or chat.status not in ("waiting", "error"):
            raise NotAllowed(state_name(chat))
        self._begin(chat)
        self._insert(chat, "system", compaction.REQUEST, visible=False)
        self._enter(chat, "running")
        self._publish(chat)

    # What a worker does

    def begin_attempt(self, chat: Chat) -> Episode:
        """Parts from now on belong to a new episode; the one before it is void."""
        self._begin(chat)
        chat.generation_attempt += 1
        self.retries.pop(chat.id, None)
        episode = self.episodes[chat.id] = Episode(chat.history_version, chat.generation_attempt)
        self._publish(chat, watch="")
        return episode

    def show(self, chat: Chat, episode: Episode, role: str, part: Part) -> None:
        """Let the streams have a part."""
        size = len(go_json(self.hub.dialect.part(part)))
        if episode.add(role, part, size):
            self.hub.publish(chat, Changed(parts_only=True))

    def announce_retry(self, chat: Chat, error: ChatError) -> float:
        """Model milliseconds to wait. Until the next attempt begins, the failed one stays the current one."""
        delay_ms = model.retry_delay_ms(chat.generation_attempt)
        retrying_at = time.time_ns() + int(delay_ms * 1_000_000 / self.pace.speed)
        self._begin(chat)
        self.retries[chat.id] = RetryEvent(chat.generation_attempt, delay_ms, error, retrying_at)
        self._publish(chat, watch="")
        return delay_ms

    def store_answer(self, chat: Chat, content: Sequence[Part]) -> None:
        """The assistant's message of one step, with its usage."""
        config = self.database.model_of(chat)
        text = "".join(part.text for part in content if part.type == "text")
        usage = model.usage_for(text, config.context_limit if config else 0)
        self._begin(chat)
        message = self._insert(chat, "assistant", tuple(content))
        message.usage, message.cost_micros = usage, cost_micros(usage, config)
        self._publish(chat, watch="")

    def store_results(self, chat: Chat, results: Iterable[Part]) -> None:
        """One message for each result of a step's tools."""
        self._begin(chat)
        for result in results:
            self._insert(chat, "tool", (result,))
        self._publish(chat, watch="")

    def store_summary(self, chat: Chat, call: Part, result: Part) -> None:
        """What a compaction leaves in the history: neither is charged."""
        self._begin(chat)
        self._insert(chat, "assistant", (call,))
        self._insert(chat, "tool", (result,))
        self._publish(chat, watch="")

    def require_action(self, chat: Chat) -> None:
        """The client has to run the open calls; watch hears of the action, not of the status."""
        self._begin(chat)
        self._enter(chat, "requires_action")
        self._publish(chat, watch="action_required")
        self._summarise(chat, AWAITING)

    def finish_turn(self, chat: Chat) -> None:
        """The next queued prompt becomes a message and the chat runs on, or it waits."""
        self._begin(chat)
        promoted = self._promote_next(chat)
        self._enter(chat, "running" if promoted else "waiting")
        self._publish(chat)
        self._summarise(chat, None if promoted else FINISHED)

    def finish_interrupt(self, chat: Chat) -> None:
        """Store what the episode has shown, part by part, and a result for every call that has none; then go on."""
        self._begin(chat)
        episode = self.episodes.get(chat.id)
        if episode is not None and episode.key == (chat.history_version, chat.generation_attempt):
            self._store_partial(chat, episode)
        for call in open_calls(chat):
            self._insert(chat, "tool", (result_of(call, INTERRUPTED, is_error=True),))
        promoted = self._promote_next(chat)
        self._enter(chat, "running" if promoted else "waiting")
        self._publish(chat)
        self._summarise(chat, None)

    def fail(self, chat: Chat, error: ChatError) -> None:
        """The run ends with an error. Its partial output is lost; the queue stays."""
        self._begin(chat)
        self._enter(chat, "error", error)
        self._publish(chat)

    def let_go(self, worker: "Worker") -> None:
        """The worker is done with the chat, unless it only waits for the client."""
        chat = worker.chat
        del self.runs[chat.id]
        self.episodes.pop(chat.id, None)
        if chat.status != "requires_action":
            self._begin(chat)
            chat.has_worker = False

    def generate_title(self, chat: Chat) -> None:
        """For a chat of one prompt under its automatic title, a while later."""
        history = chat.history()
        if not self.pace.titles or [message.role for message in history] != ["user"]:
            return
        text = text_of(history[0].content)
        if chat.title != automatic_title([text]):
            return

        async def work() -> None:
            await self.sleep(self.pace.title_ms)
            self.set_title(chat, model.title_for(text))

        self._spawn(work())

    # Within one transaction

    def _begin(self, chat: Chat) -> None:
        chat.snapshot_version += 1
        chat.updated_at = self.database.clock.now()

    def _publish(self, chat: Chat, *, watch: str = "status_change") -> None:
        self.hub.publish(chat, Changed())
        if watch:
            self.hub.publish_watch(watch, chat)

    def _enter(self, chat: Chat, status: str, error: ChatError | None = None) -> None:
        chat.status, chat.last_error = status, error
        if status != "interrupting":
            self.retries.pop(chat.id, None)
        if status == "running" and self.needs_run(chat):
            self._spawn(self._claim_soon(chat))

    def _insert(
        self,
        chat: Chat,
        role: str,
        content: tuple[Part, ...],
        *,
        created_by: UUID | None = None,
        model_id: UUID | None = None,
        visible: bool = True,
    ) -> Message:
        message = self.database.insert(
            chat,
            role,
            content,
            chat.updated_at,  # rows of one transaction have its time
            created_by=created_by,
            model=model_id or chat.last_model_config_id,
            visible=visible,
        )
        message.revision = chat.history_version = chat.snapshot_version
        chat.generation_attempt = 0
        return message

    def _insert_user(self, chat: Chat, caller: UUID, content: tuple[Part, ...], model_id: UUID | None) -> Message:
        return self._insert(chat, "user", content, created_by=caller, model_id=model_id)

    def _interrupt(self, chat: Chat, why: str) -> None:
        if chat.status == "running":
            self._enter(chat, "interrupting")
            self._abort(chat)
        elif chat.status == "requires_action":
            for call in open_calls(chat):
                self._insert(chat, "tool", (result_of(call, why, is_error=True),))
            self._enter(chat, "running")

    def _promote_next(self, chat: Chat) -> Message | None:
        if not chat.queue:
            return None
        queued = next((queued for queued in chat.queue if queued.id == chat.next_queued), chat.queue[0])
        chat.next_queued = 0
        chat.queue.remove(queued)
        chat.queue_version = chat.snapshot_version
        return self._insert_user(chat, chat.owner_id, queued.content, queued.model_config_id)

    def _store_partial(self, chat: Chat, episode: Episode) -> None:
        shown = [event.part for event in episode.parts if not event.part.args_delta]
        said = tuple(part for part in shown if part.type != "tool-result")
        if said:
            self._insert(chat, "assistant", said)
        for part in shown:
            if part.type == "tool-result":
                self._insert(chat, "tool", (part,))

    def _summarise(self, chat: Chat, summary: str | None) -> None:
        """Sub-agents have no summaries of turns, but their whole chat may get one when they wait."""
        if chat.parent_id is None:
            chat.last_turn_summary = summary
            self.hub.publish_watch("summary_change", chat)
        elif self.features.chat_summaries and chat.status == "waiting":
            chat.summary = " ".join(text_of(chat.history()[-1].content).split()[:10])
            self.hub.publish_watch("chat_summary_change", chat)

    def _abort(self, chat: Chat) -> None:
        worker = self.runs.get(chat.id)
        if worker is not None:
            worker.abort()


def _adopt(chat: Chat) -> None:
    """Begin to count the changes of a chat that is new, or was last changed by a server that did not count them."""
    if chat.status not in STATUSES:
        chat.status = "running"
    if all(message.revision for message in chat.messages):
        return
    chat.snapshot_version += 1
    chat.history_version, chat.generation_attempt = chat.snapshot_version, 0
    for message in chat.messages:
        message.revision = chat.snapshot_version
