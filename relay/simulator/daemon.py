"""The part of the servers before 2.35 that runs turns: statuses, queue, interrupts, edits, and who gets a run when.

Every status change, every event and its order follow coderd/chatd as seen running, at ff8dcca and three later commits.
The public methods are one transaction each: they change rows and publish, without an await in between.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal
from uuid import UUID

from relay.simulator import model
from relay.simulator.dialect import ActionRequiredEvent, ErrorEvent, PartEvent, RetryEvent, StatusEvent
from relay.simulator.run import Run, notifiable
from relay.simulator.state import QUEUE_LIMIT, Chat, ChatError, Database, Message, Part, QueuedMessage
from relay.simulator.step import open_calls, result_of
from relay.simulator.stream import HistoryEdited, Hub, MessagesStored, QueueChanged
from relay.simulator.turns import (
    NoResultsAwaited,
    NotAUserMessage,
    Pace,
    ParentArchived,
    QueueFull,
    ResultMissing,
    ToolOutput,
    UnknownMessage,
    UnknownQueuedMessage,
    automatic_title,
    text_of,
)

CHATS_PER_POLL = 10
# How long the parts of a run that has ended are kept, where they are kept, and how long a polite stop waits for runs.
STALE_PARTS_MS = 30_000.0
DRAIN_MS = 11_000.0
SUMMARY_MS = 3.0
SUMMARIES = {
    "waiting": "Finished latest turn",
    "pending": "Still working on request",
    "requires_action": "Waiting for user input",
}
INTERRUPTED_BY_USER = "Tool execution interrupted by user"


class Daemon:
    """Runs the turns of all chats of one server life."""

    def __init__(self, database: Database, hub: Hub, pace: Pace) -> None:
        self.database = database
        self.hub = hub
        self.pace = pace
        self.features = hub.dialect.features
        self.runs: dict[UUID, Run] = {}
        self.unanswered = 0
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._stale: dict[UUID, list[PartEvent]] = {}
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
        """End all runs. Politely: their chats become pending again, without an event. Killed: rows stay as they are.

        Some servers let runs end first, as long as that takes no longer than they like, with nobody connected.
        """
        if polite and self.features.drains and self.runs:
            ending = [run.task for run in self.runs.values()]
            await asyncio.wait(ending, timeout=DRAIN_MS * 0.001 / self.pace.speed)
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
        """Wait for model milliseconds, and as long as models are held."""
        await asyncio.sleep(ms * 0.001 / self.pace.speed)
        await self.flowing.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _poll(self) -> None:
        while True:
            await self.sleep(self.pace.poll_ms)
            self.poll()

    def poll(self, only: UUID | None = None) -> None:
        """Start runs for pending chats (or for one of them), oldest change first, at most ten at once."""
        waiting = [c for c in self.database.chats.values() if self.needs_run(c) and only in (None, c.id)]
        waiting.sort(key=lambda chat: chat.updated_at)
        for chat in waiting[:CHATS_PER_POLL]:
            self._stale.pop(chat.id, None)
            self._set_status(chat, "running")
            self.runs[chat.id] = Run(self, chat)

    def needs_run(self, chat: Chat) -> bool:
        """Whether a run of this chat would begin with the next poll."""
        return chat.status == "pending" and chat.id not in self.runs

    def buffered(self, chat: Chat) -> list[PartEvent | RetryEvent]:
        """What a stream that opens now gets besides the rows: the running step so far, or what is left of the last."""
        run = self.runs.get(chat.id)
        if run is None:
            return [*self._stale.get(chat.id, ())]
        retry = [run.retry] if run.retry and self.features.retry_in_snapshot else []
        return [*retry, *run.buffer]

    async def _recover(self, lost: list[Chat]) -> None:
        await self.sleep(self.pace.recovery_ms)
        for chat in lost:
            if chat.status == "running" and chat.id not in self.runs:
                self._set_status(chat, "pending")

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
        chat.dynamic_tools, chat.labels = dynamic_tools, dict(labels or {})
        self.hub.publish_watch("created", chat)
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
        """Insert the message, or queue it while the chat is busy or its queue is not empty.

        Args:
            interrupting: Interrupt a busy chat for it. One that waits for a client's tools stays `waiting` then, with
                the prompt in its queue.

        Raises:
            QueueFull: Twenty prompts wait already.
        """
        is_blocked = chat.status == "requires_action"
        if chat.is_busy or is_blocked or chat.queue:
            if len(chat.queue) >= QUEUE_LIMIT:
                raise QueueFull
            queued = self.database.enqueue(chat, content, model_id)
            self.hub.publish(chat, QueueChanged())
            if interrupting and is_blocked:
                self._change_status(chat, "waiting")
            elif interrupting:
                self.interrupt(chat)
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
        self._supersede(chat)
        return new

    def interrupt(self, chat: Chat) -> None:
        """Set the chat waiting and let its run save what it has. A pending chat stays so and is announced again."""
        was_running = chat.status == "running"
        if chat.status == "requires_action":
            self._give_up_calls(chat)
        self._change_status(chat, "pending" if chat.status == "pending" else "waiting")
        if was_running:
            self._abort(chat, "interrupted")

    def _give_up_calls(self, chat: Chat) -> None:
        """Answer the client's calls in its place. No stream is told of these messages."""
        now = self.database.clock.now()
        for call in open_calls(chat):
            result = result_of(call, INTERRUPTED_BY_USER, is_error=True)
            self.database.insert(chat, "tool", (result,), now, model=chat.last_model_config_id)

    def delete_queued(self, chat: Chat, queue_id: int) -> None:
        chat.queue[:] = [queued for queued in chat.queue if queued.id != queue_id]
        self.hub.publish(chat, QueueChanged())

    def promote(self, chat: Chat, caller: UUID, queue_id: int) -> Message | None:
        """Make a queued prompt a message now, whatever runs: the partial output of a run is lost.

        Later servers put it at the head of the queue and interrupt the run.

        Raises:
            UnknownQueuedMessage: Nothing was changed.
        """
        queued = next((queued for queued in chat.queue if queued.id == queue_id), None)
        if queued is None:
            raise UnknownQueuedMessage
        chat.queue.remove(queued)
        if self.features.accepted_promotes and chat.status == "running":
            chat.queue.insert(0, queued)
            self.hub.publish(chat, QueueChanged())
            self.interrupt(chat)
            return None
        self.hub.publish(chat, QueueChanged())
        message = self._insert_user_message(chat, caller, queued.content, None)
        self._change_status(chat, "pending")
        self._supersede(chat)
        return None if self.features.accepted_promotes else message

    def set_archived(self, chat: Chat, archived: bool) -> None:
        """Archive the chat and its sub-agents. What is unarchived along with it depends on the server's age.

        Raises:
            ParentArchived: Nothing was changed.
        """
        has = self.features
        parent = self.database.chats.get(chat.parent_id) if chat.parent_id else None
        if not archived and has.cascading_unarchive and parent is not None and parent.archived:
            raise ParentArchived
        tree = [chat]
        if archived or has.cascading_unarchive:
            tree += [child for child in self.database.children(chat) if child.archived != archived]
        if not has.whole_watch:  # the oldest servers announce the root alone, with the row as it was
            self.hub.publish_watch("deleted" if archived else "created", chat)
        for one in tree:
            if archived and has.archive_interrupts and one.is_busy:
                self.interrupt(one)
            one.archived, one.updated_at = archived, self.database.clock.now()
            if has.whole_watch:
                self.hub.publish_watch("deleted" if archived else "created", one)

    def set_title(self, chat: Chat, title: str) -> None:
        """Name the chat by hand."""
        chat.title, chat.updated_at = title, self.database.clock.now()
        self.hub.publish_watch("title_change", chat)

    def submit_results(self, chat: Chat, caller: UUID, results: Sequence[ToolOutput]) -> None:
        """Store a client's results; the turn goes on.

        Raises:
            NoResultsAwaited, ResultMissing: Nothing was changed.
        """
        if chat.status != "requires_action":
            raise NoResultsAwaited
        given = {result.call_id: result for result in results}
        calls = open_calls(chat)
        for call in calls:
            if call.tool_call_id not in given:
                raise ResultMissing(call.tool_call_id)
        now = self.database.clock.now()
        for call in calls:
            result = given[call.tool_call_id]
            part = result_of(call, result.output, is_error=result.is_error)
            self.database.insert(chat, "tool", (part,), now, created_by=caller, model=chat.last_model_config_id)
            self.hub.publish(chat, MessagesStored())
        self._change_status(chat, "pending")

    # What a run does

    def end_run(self, run: Run, error: ChatError | None) -> None:
        """The worker lets the chat go; what follows depends on what happened to it meanwhile."""
        chat = run.chat
        self.runs.pop(chat.id, None)
        if self.features.stale_parts:
            self._keep_parts(run)
        if error is not None and notifiable(error):
            self.hub.publish(chat, ErrorEvent(error))
        if chat.status == "pending":
            self._publish_status(chat)
        elif error is not None:
            self._change_status(chat, "error", error)
        elif run.awaits:
            self._change_status(chat, "requires_action")
            self.hub.publish(chat, ActionRequiredEvent(tuple(run.awaits)))
            self.hub.publish_watch("action_required", chat, run.awaits)
        elif chat.queue and not (chat.archived and self.features.archive_interrupts):
            self._take_queued(chat)
        else:
            self._change_status(chat, "waiting")
        if not run.answered:
            chat.last_turn_summary = None
        elif self.features.summaries and chat.parent_id is None:
            self._spawn(self._summarize(chat, SUMMARIES.get(chat.status, "")))

    def _take_queued(self, chat: Chat) -> None:
        queued = chat.queue.pop(0)
        self._insert_user_message(chat, chat.owner_id, queued.content, queued.model_config_id)
        self.hub.publish(chat, QueueChanged())
        self._change_status(chat, "pending")

    def _keep_parts(self, run: Run) -> None:
        """The parts of the whole run stay for a while, ghosts of messages that are stored."""
        parts = self._stale[run.chat.id] = list(run.buffer)

        async def drop() -> None:
            await self.sleep(STALE_PARTS_MS)
            if self._stale.get(run.chat.id) is parts:
                del self._stale[run.chat.id]

        self._spawn(drop())

    async def _summarize(self, chat: Chat, summary: str) -> None:
        await self.sleep(SUMMARY_MS)
        if summary:
            chat.last_turn_summary = summary
            self.hub.publish_watch("summary_change", chat)

    def _supersede(self, chat: Chat) -> None:
        """Abort the chat's run for the prompt that came."""
        run = self.runs.get(chat.id)
        if run is not None:
            run.struck = self.features.stale_parts and self.database.chance(self.pace.skew.vain)
            run.abort("superseded")

    async def run_in_vain(self, chat: Chat) -> None:
        """The run for a prompt that has superseded another, where it began before that one's had ended.

        A late notification strikes it: it is over without an answer, and the queue goes on.
        """
        self._set_status(chat, "running")
        self.tell_running(chat)
        await self.sleep(2.0)
        if chat.queue:
            self._take_queued(chat)
        else:
            self._change_status(chat, "waiting")
        await self.sleep(1.0)

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

    def tell_running(self, chat: Chat) -> None:
        """A run has begun; watch sockets do not hear of it."""
        self._tell_status(chat, "running")

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

    def _set_status(self, chat: Chat, status: str, last_error: ChatError | None = None) -> None:
        chat.status, chat.last_error = status, last_error
        chat.updated_at = self.database.clock.now()

    def _change_status(self, chat: Chat, status: str, last_error: ChatError | None = None) -> None:
        if not (chat.status == status == "pending"):
            self._set_status(chat, status, last_error)
        self._publish_status(chat)

    def _publish_status(self, chat: Chat) -> None:
        self._tell_status(chat, chat.status)
        self.hub.publish_watch("status_change", chat)

    def _tell_status(self, chat: Chat, status: str) -> None:
        """On streams. Later servers tell it twice, and now and then the second copy comes when it is past."""
        self.hub.publish(chat, StatusEvent(status))
        if not self.features.double_statuses:
            return
        skew = self.pace.skew
        if not self.database.chance(skew.lag):
            self.hub.publish(chat, StatusEvent(status))
            return

        async def again() -> None:
            await self.sleep(skew.lag_ms)
            self.hub.publish(chat, StatusEvent(status))

        self._spawn(again())
