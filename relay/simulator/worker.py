"""One process's hold on one chat of a server since 2.35, and what it does between two transactions.

The stored history says what comes next, so that a new process goes on where an old one was stopped.
"""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from relay.simulator import compaction, model, provider
from relay.simulator.dialect import PartEvent
from relay.simulator.state import Chat, Part
from relay.simulator.step import Episode, StepOutput, open_calls, result_of
from relay.simulator.turns import MAX_ATTEMPTS, ModelFailed, text_of

if TYPE_CHECKING:
    from relay.simulator.machine import Machine

ACTIVE = ("running", "interrupting")

BEFORE_ATTEMPT_MS = 12.0
BEFORE_FINISH_MS = 16.0
BEFORE_INTERRUPTED_MS = 25.0

NO_TEMPLATES = {
    "next_step": "No templates are available to this chat. Inform the user.",
    "page": 1,
    "templates": [],
}


class Worker:
    """One process's hold on one chat, as long as the chat runs."""

    def __init__(self, machine: "Machine", chat: Chat) -> None:
        self.chat = chat
        self._machine = machine
        self._step: asyncio.Task[None] | None = None
        self.task = asyncio.create_task(self._work())

    @property
    def buffer(self) -> list[PartEvent]:
        """The parts of the current episode so far."""
        episode = self._machine.episodes.get(self.chat.id)
        return list(episode.parts) if episode else []

    def abort(self) -> None:
        """Stop the model or the tools; what the rows say by now decides what comes next."""
        if self._step is not None:
            self._step.cancel()

    async def _work(self) -> None:
        machine, chat = self._machine, self.chat
        while chat.status in ACTIVE:
            if chat.status == "interrupting":
                await machine.sleep(BEFORE_INTERRUPTED_MS)
                if chat.status == "interrupting":  # nobody has edited it meanwhile
                    machine.finish_interrupt(chat)
                continue
            self._step = asyncio.create_task(self._next_step())
            try:
                await asyncio.wait([self._step])
            finally:
                self._step.cancel()
            if not self._step.cancelled():
                self._step.result()
        machine.let_go(self)

    async def _next_step(self) -> None:
        """What the stored history asks for: the model, the tools, the client, or nothing more."""
        machine, chat = self._machine, self.chat
        calls = open_calls(chat)
        last = chat.history()[-1]
        if compaction.is_wanted(chat):
            await self._compact()
        elif any(call.tool_name not in chat.dynamic_tools for call in calls):
            await self._run_tools([call for call in calls if call.tool_name not in chat.dynamic_tools])
        elif calls:
            await machine.sleep(BEFORE_FINISH_MS)
            machine.require_action(chat)
        elif last.role == "assistant" or compaction.is_summary(last):
            await machine.sleep(BEFORE_FINISH_MS)
            machine.finish_turn(chat)
        else:
            await self._call_model()

    async def _compact(self) -> None:
        machine, chat = self._machine, self.chat
        await machine.sleep(BEFORE_ATTEMPT_MS)
        episode = machine.begin_attempt(chat)
        call, result = compaction.summarise(chat, machine.database)
        machine.show(chat, episode, "assistant", replace(call, args=None))
        machine.show(chat, episode, "tool", result)
        await machine.sleep(BEFORE_FINISH_MS)
        machine.store_summary(chat, call, result)

    async def _call_model(self) -> None:
        machine, chat = self._machine, self.chat
        machine.generate_title(chat)
        await machine.sleep(BEFORE_ATTEMPT_MS)
        episode = machine.begin_attempt(chat)
        output = StepOutput(machine.database)
        config = machine.database.model_of(chat)
        try:
            await self._listen(output, episode)
        except ModelFailed as exc:
            if not model.is_transient(str(exc)) or episode.attempt >= MAX_ATTEMPTS:
                machine.fail(chat, provider.final_failure(str(exc), config, machine.features))
                return
            delay_ms = machine.announce_retry(chat, provider.passing_failure(str(exc), config, machine.features))
            await machine.sleep(delay_ms)
            return
        output.finish()
        if output.content:
            await machine.sleep(BEFORE_FINISH_MS)
            machine.store_answer(chat, output.content)
        else:
            machine.finish_turn(chat)

    async def _listen(self, output: StepOutput, episode: Episode) -> None:
        """Show what the model says."""
        machine, chat = self._machine, self.chat
        prompt, step = self._prompt()
        calls: list[Part] = []
        unpaused = 0
        if machine.unanswered > 0:
            machine.unanswered -= 1
            machine.hub.faults.fired["unanswered"] += 1
            return
        for chunk in model.answer(prompt, step, episode.attempt, typed_agents=True):
            if isinstance(chunk, model.Pause):
                unpaused = unpaused + 1 if chunk.ms == 0 else 0
                # A burst still lets the streams have a turn now and then.
                if unpaused % 8 == 0:
                    await machine.sleep(chunk.ms)
            elif isinstance(chunk, model.Break):
                raise ModelFailed(chunk.error)
            else:
                for part in output.add(chunk):
                    if part.args is not None and machine.features.calls_last:
                        calls.append(part)
                    else:
                        machine.show(chat, episode, "assistant", part)
        for call in calls:
            machine.show(chat, episode, "assistant", call)

    async def _run_tools(self, calls: list[Part]) -> None:
        """An episode of their own, of one history version with the step that called them."""
        machine, chat = self._machine, self.chat
        await machine.sleep(BEFORE_ATTEMPT_MS)
        episode = machine.begin_attempt(chat)
        await machine.sleep(self._tool_ms())
        results = [self._tool(call) for call in calls]
        for result in results:
            machine.show(chat, episode, "tool", result)
        await machine.sleep(BEFORE_FINISH_MS)
        machine.store_results(chat, results)

    def _tool(self, call: Part) -> Part:
        """The result of one of the server's own tools."""
        chat = self.chat
        match call.tool_name:
            case "list_templates":
                result, is_error = NO_TEMPLATES, False
            case "read_template":
                result, is_error = {"error": "template not found"}, True
            case "spawn_agent":
                content = (Part("text", text=str(call.args["prompt"])),)
                title = str(call.args["title"])
                child = self._machine.create_chat(chat.owner_id, title, content, chat.last_model_config_id, chat)
                result = {"chat_id": str(child.id), "status": child.status, "title": title, "type": "general"}
                is_error = False
            case name:
                result, is_error = {"error": f"Tool not found: {name}"}, True
        return result_of(call, result, is_error=is_error, created_at=self._machine.database.clock.now())

    def _prompt(self) -> tuple[str, int]:
        """The text that began this turn, and how many of its steps are stored."""
        history = self.chat.history()
        last = max(i for i, message in enumerate(history) if message.role == "user")
        return text_of(history[last].content), sum(m.role == "assistant" for m in history[last:])

    def _tool_ms(self) -> float:
        """How long the slowest tool of the stored step takes, which only the script knows."""
        prompt, step = self._prompt()
        chunks = model.answer(prompt, step - 1, 1, typed_agents=True)
        return max((chunk.ms for chunk in chunks if isinstance(chunk, model.Call)), default=0.0)
