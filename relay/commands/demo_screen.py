"""`relay demo` on the screen: progress while it runs, and the summary."""

import asyncio
import signal
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from relay.demo import ChatLine, DemoOptions, Seen, Summary, run_demo


async def show_demo(options: DemoOptions, *, as_json: bool) -> Summary:
    """Run the demo and show how it goes; with `as_json` on standard error: standard output is the summary's."""
    stop = asyncio.Event()
    if options.serve:
        for sig in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(sig, stop.set)
    console = Console(stderr=as_json)
    with _progress(console) as changed:
        return await run_demo(options, changed, console.print, stop)


@contextmanager
def _progress(console: Console) -> Any:
    if console.is_terminal:
        with Live(console=console, refresh_per_second=8) as live:
            yield lambda seen: live.update(_table(seen))
        return
    shown: dict[str, tuple[str, int]] = {}

    def plain(seen: Seen) -> None:
        for line in seen.lines.values():
            now = ("done" if line.done else line.status, line.turns)
            if line.name and shown.get(line.chat_id) != now:
                shown[line.chat_id] = now
                console.print(_plain_line(line), highlight=False, soft_wrap=True)

    yield plain


def _plain_line(line: ChatLine) -> str:
    state = "done" if line.done else line.status or "new"
    counts = f"{line.turns} turns, {line.messages} messages, {line.previews} previews"
    return f"{line.name:<12} {line.owner:<4} {state:<9} {counts}"


def _table(seen: Seen) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("chat", "owner", "status", "turns", "messages", "previews"):
        table.add_column(heading, justify="right" if heading in ("turns", "messages", "previews") else "left")
    for line in seen.lines.values():
        state = "[green]done[/]" if line.done else line.status
        table.add_row(line.name, line.owner, state, str(line.turns), str(line.messages), str(line.previews))
    return table


def summary_text(summary: Summary) -> str:
    """The summary for a person, the verdict last."""
    spend = ", ".join(f"{owner} ${micros / 1e6:.4f}" for owner, micros in sorted(summary.spend_micros.items()))
    verdict = (
        f"{'OK' if summary.good else 'NOT EQUAL'}: for {summary.equal} of {summary.chats} chats the fold of the "
        f"published events equals the REST transcript; {len(summary.archives)} archived"
    )
    rows = [
        "",
        f"chats              {summary.chats}",
        f"durable events     {summary.durable_events}",
        f"previews           {summary.previews} ({summary.previews_coalesced} more were joined to one before)",
        f"replays filtered   {summary.replays_filtered}",
        f"reconnects         {summary.reconnects}",
        f"edits              {summary.edits}",
        f"spend              {spend or 'none'}",
        f"alerts fired       {len(summary.alerts)}",
        *(f"  {alert}" for alert in summary.alerts),
        f"archives written   {len(summary.archives)}",
        *(f"  {each['path']}\n    sha256 {each['sha256']}" for each in summary.archives),
        *(f"chat {chat}: {line}" for chat, lines in summary.differences.items() for line in lines),
        "",
        verdict,
    ]
    return "\n".join(rows)
