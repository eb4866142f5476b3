"""The scripted model: what a turn does stands in the user's text, e.g. `[tool n=15 ms=15] use a tool`.

The directives are those with which real servers were driven, and a few more; `DIRECTIVES` lists them. Options:
`n` how many words, `ms` model milliseconds between two of them, `wait` before the first, `fails` failing attempts,
`toolms` how long a tool runs, `k` how many tool steps (in `[retry]` and `[retrymid]`: a key, ignored), `size`
characters. Unknown options are ignored, an unknown directive is answered as plain text.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from relay.simulator.state import Usage

DIRECTIVES: dict[str, str] = {
    "text": "answers n words",
    "reason": "thinks n thoughts, then answers n words",
    "tool": "calls one tool, then answers n words",
    "tools2": "calls two tools in one step (the second fails), then answers n words",
    "slowtool": "calls one tool that takes a little longer, then answers n words",
    "steps": "calls one tool in each of k steps, then answers n words",
    "agent": "spawns a sub-agent chat, then answers n words",
    "dyn": "calls a tool that the client runs itself (lab_tool), then answers n words",
    "badargs": "begins a tool call whose arguments never become JSON, and answers n words",
    "retry": "fails `fails` times before it answers n words",
    "retrymid": "fails once in the middle of its answer of n words",
    "fail": "fails for good after n words (0); size=S makes the error text S characters long",
    "empty": "answers nothing at all",
    "say": "answers the rest of the text itself, in pieces of `size` characters (8)",
    "big": "answers one text of `size` characters (1500000), in pieces of 4096",
    "unicode": "answers n odd Unicode texts: joiners, bidi marks, U+2028, astral letters, HTML, NUL",
}

_WORDS = (
    "the relay follows every chat and writes down what was said so that nothing is lost when a line breaks "
    "a worker dies or a broker sleeps"
).split()
_ODD = (
    "e\u0301 ", "👩‍👩‍👧‍👦 ", "\u202eabc\u202c ", "\u2028", "\u2029", "𝔘𝔫𝔦 ", "<b>&amp;</b> ", "\u0000", "\ufeff",
    "日本語 ", "\u200b", "ﷺ ", "\x7f ", "\\\"\t\r\n", "🏴󠁧󠁢󠁥󠁮󠁧󠁿 ", "\ufffd ",
)  # fmt: skip
_DIRECTIVE = re.compile(r"\s*\[([a-z0-9]+)((?:\s+[a-z]+=[^\s\]]*)*)\s*\]\s*")

OVERLOADED = "service unavailable: overloaded, try again"
BROKEN_STREAM = (
    'received error while streaming: {"message": "server error: overloaded", "type": "server_error", "code": 503}'
)
UNAUTHORIZED = "unauthorized: invalid api key"

TEMPLATE_ID = "e8a1a352-db15-414f-9792-9a58620e71ca"
CHILD_PROMPT = "[text n=10 ms=20] child work please, thank you so much"
FIRST_TOKEN_MS = 4.0


@dataclass(frozen=True)
class Pause:
    """Model milliseconds in which nothing comes."""

    ms: float


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class Arguments:
    """A fragment of a tool call's arguments. `call` counts the calls of the step."""

    call: int
    tool: str
    delta: str


@dataclass(frozen=True)
class Call:
    """A tool call, complete. The server runs the tool for `ms` model milliseconds when the step's output has ended."""

    call: int
    tool: str
    args: Any
    ms: float


@dataclass(frozen=True)
class Break:
    """The call fails here with this provider error."""

    error: str


Chunk: TypeAlias = Pause | Text | Reasoning | Arguments | Call | Break


@dataclass(frozen=True)
class Prompt:
    """A user's text, taken apart."""

    directive: str
    options: dict[str, str]
    rest: str

    def number(self, name: str, default: float) -> float:
        try:
            return max(0.0, float(self.options.get(name, default)))
        except ValueError:
            return default

    def count(self, name: str, default: int) -> int:
        return int(self.number(name, default))


def read_prompt(text: str) -> Prompt:
    """Take a user's text apart; without a directive it is one of twelve words."""
    match = _DIRECTIVE.match(text)
    if match is None or match[1] not in DIRECTIVES:
        return Prompt("text", {"n": "12"}, text.strip())
    options = dict(option.split("=", 1) for option in match[2].split())
    return Prompt(match[1], options, text[match.end() :].strip())


def title_for(text: str) -> str:
    """The title the model gives a chat, from its first user text."""
    words = read_prompt(text).rest.split()[:6]
    return " ".join(words).capitalize() or "Untitled chat"


def answer(text: str, step: int, attempt: int, *, typed_agents: bool = False) -> Iterator[Chunk]:
    """The model's output for one attempt at one step of the turn that `text` began.

    Args:
        step: From 0; the steps of this turn that are stored already.
        attempt: From 1.
        typed_agents: The server's tool for sub-agents asks for their type; since 2.32.
    """
    prompt = read_prompt(text)
    n, ms = prompt.count("n", 20), prompt.number("ms", 15)
    yield Pause(FIRST_TOKEN_MS + prompt.number("wait", 0))
    tool_steps = dict.fromkeys(("tool", "tools2", "slowtool", "agent", "dyn"), 1)
    tool_steps["steps"] = prompt.count("k", 3)
    if step < tool_steps.get(prompt.directive, 0):
        yield from _tool_step(prompt, ms, typed_agents)
        return
    match prompt.directive:
        case "reason":
            yield from _spaced([Reasoning(f"thought {i} ") for i in range(n)], ms)
            yield Pause(ms)
            yield from _spaced(_words(n), ms)
        case "badargs":
            yield from _spaced([Arguments(0, "list_templates", piece) for piece in ('{"pa', 'ge": ', "tw")], ms)
            yield from _spaced(_words(n), ms)
        case "retry" if attempt <= prompt.count("fails", 1):
            yield Break(_padded(OVERLOADED, prompt))
        case "retrymid" if attempt == 1:
            yield from _spaced(_words(n // 2), ms)
            yield Break(_padded(BROKEN_STREAM, prompt))
        case "fail":
            yield from _spaced(_words(prompt.count("n", 0)), ms)
            yield Break(_padded(UNAUTHORIZED, prompt))
        case "empty":
            return
        case "say":
            yield from _spaced(_pieces(prompt.rest, prompt.count("size", 8)), ms)
        case "big":
            size = prompt.count("size", 1_500_000)
            words = " ".join(_WORDS) + " "
            yield from _spaced(_pieces((words * (size // len(words) + 1))[:size], 4096), prompt.number("ms", 0))
        case "unicode":
            yield from _spaced([Text(_ODD[i % len(_ODD)]) for i in range(n)], ms)
        case _:
            yield from _spaced(_words(n), ms)


def usage_for(answer_text: str, context_limit: int) -> Usage:
    """Token counts that grow with the words of the answer; 200 of the prompt's tokens are always cached."""
    words = len(answer_text.split())
    prompt_tokens, cached, output = 1200 + words, 200, 10 * words + 7
    return Usage(
        input_tokens=prompt_tokens - cached,
        output_tokens=output,
        total_tokens=prompt_tokens + output,
        reasoning_tokens=3,
        cache_read_tokens=cached,
        context_limit=context_limit,
    )


def _tool_step(prompt: Prompt, ms: float, typed_agents: bool) -> Iterator[Chunk]:
    for word in ("Let ", "me ", "look. ", " "):
        yield Text(word)
    tool_ms = prompt.number("toolms", 38 if prompt.directive == "slowtool" else 25)
    if prompt.directive == "agent":
        args = {"type": "general"} if typed_agents else {}
        yield from _call(0, "spawn_agent", args | {"prompt": CHILD_PROMPT, "title": "child"}, tool_ms, ms)
        return
    if prompt.directive == "dyn":
        yield from _call(0, "lab_tool", {"x": 1, "why": "dynamic tool call"}, tool_ms, ms)
        return
    yield from _call(0, "list_templates", {}, tool_ms, ms)
    if prompt.directive == "tools2":
        yield Pause(ms)
        yield from _call(1, "read_template", {"template_id": TEMPLATE_ID}, tool_ms, ms)


def _call(number: int, tool: str, args: Any, tool_ms: float, ms: float) -> Iterator[Chunk]:
    # A provider's own spacing, so that fragments are cut where the recorded ones are.
    text = json.dumps(args, ensure_ascii=False)
    yield from _spaced([Arguments(number, tool, text[i : i + 7]) for i in range(0, len(text), 7)], ms)
    yield Call(number, tool, args, tool_ms)


def _words(n: int) -> list[Text]:
    return [Text(_WORDS[i % len(_WORDS)] + " ") for i in range(n)]


def _pieces(text: str, size: int) -> list[Text]:
    size = max(1, size)
    return [Text(text[i : i + size]) for i in range(0, len(text), size)]


def _spaced(chunks: list[Any], ms: float) -> Iterator[Chunk]:
    for i, chunk in enumerate(chunks):
        if i:
            yield Pause(ms)
        yield chunk


def _padded(error: str, prompt: Prompt) -> str:
    size = prompt.count("size", 0)
    return error + " " + "x" * (size - len(error) - 1) if size > len(error) else error


_PERMANENT = (
    "context canceled", "context deadline exceeded", "authentication", "unauthorized", "forbidden",
    "invalid api key", "invalid_api_key", "invalid model", "model not found", "model_not_found",
    "context length exceeded", "context_exceeded", "maximum context length", "quota", "billing",
)  # fmt: skip
_TRANSIENT = (
    "overloaded", "rate limit", "rate_limit", "too many requests", "server error", "status 500", "status 502",
    "status 503", "status 529", "connection reset", "connection refused", "eof", "broken pipe", "timeout",
    "unavailable", "service unavailable",
)  # fmt: skip


def is_transient(error: str) -> bool:
    """Whether the server repeats a call that failed so: coderd/chatd/chatretry at ff8dcca."""
    text = error.lower()
    return not any(word in text for word in _PERMANENT) and any(word in text for word in _TRANSIENT)


def retry_delay_ms(attempt: int) -> int:
    """One second, doubling, at most a minute."""
    return int(min(60_000, 1000 * 2 ** (attempt - 1)))
