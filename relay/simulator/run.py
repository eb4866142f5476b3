"""One turn while it runs: calls of the model, retries, tools, and what of it is stored."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from relay.simulator import model, provider
from relay.simulator.dialect import PartEvent, RetryEvent
from relay.simulator.spend import cost_micros
from relay.simulator.state import Chat, ChatError, Part
from relay.simulator.step import StepOutput, open_calls
from relay.simulator.stream import MessagesStored
from relay.simulator.turns import MAX_ATTEMPTS, ModelFailed, text_of

if TYPE_CHECKING:
    from relay.simulator.daemon import Daemon

PART_BUFFER = 10_000
# PostgreSQL refuses a notification of 8000 bytes; the envelope around an error text takes the rest.
LONGEST_NOTIFIED_TEXT = 7500


class Run:
    """One worker's hold on one chat, from `running` to its end."""

    def __init__(self, daemon: "Daemon", chat: Chat) -> None:
        self.chat = chat
        self.buffer: deque[PartEvent] = deque(maxlen=PART_BUFFER)
        self.retry: RetryEvent | None = None
        self.awaits: list[Part] = []
        self.answered = False
        self.struck = False  # by what superseded it: the run after it will be in vain
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
        error: ChatError | None = None
        self._daemon.tell_running(self.chat)
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
                self.answered = True
        except asyncio.CancelledError:
            if self._aborted is None:
                raise
            self.task.uncancel()
            await self._daemon.sleep(1.0)
            await self._save_interrupted()
            if self.struck and self.chat.status == "pending":
                await self._daemon.run_in_vain(self.chat)
        except ModelFailed as exc:
            config = self._daemon.database.model_of(self.chat)
            error = provider.final_failure(str(exc), config, self._daemon.features)
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
            self.awaits = [part for part in open_calls(self.chat) if part.tool_name in self._client_tools]
            if self.awaits or not calls:
                return

    @property
    def _client_tools(self) -> tuple[str, ...]:
        return self.chat.dynamic_tools if self._daemon.features.actions else ()

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
                typed = self._daemon.features.whole_watch
                await self._listen(model.answer(prompt, step, attempt, typed_agents=typed))
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

    def _announce_retry(self, attempt: int, delay_ms: int, text: str) -> None:
        error = provider.passing_failure(text, self._daemon.database.model_of(self.chat), self._daemon.features)
        if notifiable(error):
            retrying_at = time.time_ns() + int(delay_ms * 1_000_000 / self._daemon.pace.speed)
            self.retry = RetryEvent(attempt, delay_ms, error, retrying_at)
            self._daemon.hub.publish(self.chat, self.retry)

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
        self.retry = None
        self._daemon.hub.publish_part(self.chat, part, in_burst=in_burst)

    async def _run_tools(self) -> list[Part]:
        """All at once; the results are announced when the slowest has ended, in the order of the calls."""
        calls = [call for call in self._output.calls if call.tool not in self._client_tools]
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
                Part(
                    "tool-result",
                    tool_call_id=call_id,
                    tool_name=call.tool,
                    result=result,
                    is_error=is_error,
                    created_at=self._daemon.database.clock.now(),
                )
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
                spawned = {"chat_id": str(child.id), "status": child.status, "title": child.title}
                if self._daemon.features.raw_frames:
                    spawned["type"] = call.args["type"]
                return spawned, False
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
        # The time of a call is known of those that the server ran itself.
        content = tuple(
            replace(part, created_at=None) if part.tool_name in self._client_tools else part
            for part in self._output.content
        )
        database.insert(
            self.chat,
            "assistant",
            content,
            now,
            model=model_id,
            usage=usage,
            cost_micros=cost_micros(usage, config),
        )
        for result in results:
            database.insert(self.chat, "tool", (result,), now, model=model_id)
        self._daemon.hub.publish(self.chat, *[MessagesStored() for _ in range(1 + len(results))])
        self._output = StepOutput(database)
        if not self._daemon.features.stale_parts:
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


def notifiable(error: ChatError) -> bool:
    """Whether the error fits into a database notification; a longer one never reaches a stream."""
    return len((error.message + error.detail).encode()) < LONGEST_NOTIFIED_TEXT
