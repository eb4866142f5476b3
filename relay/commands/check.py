"""`relay check`: does what the settings name answer?"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import click

from relay.adapters.clock import SystemClock
from relay.adapters.coder_accounts import CoderAccounts, open_accounts
from relay.adapters.logs import LogSettings, configure_logs
from relay.adapters.rabbit import open_rabbit
from relay.adapters.store import open_store
from relay.core.dialect import Dialect
from relay.core.errors import BadFrame, ChatRefused, Unauthorized, Unavailable, WrongSettings
from relay.ports import Account, Retention
from relay.settings import Settings, read_settings

_GREETING_SECONDS = 1.0  # a server that greets does so at once


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON object instead of lines.")
def check(*, as_json: bool) -> None:
    """Try settings and connections, each with what to do about it. Exit code 1 when one fails.

    \b
    Example:
      relay check
    """
    settings = read_settings()
    configure_logs(LogSettings(level="error"))
    results = asyncio.run(_check(settings))
    if as_json:
        click.echo(json.dumps({each.name: {"ok": each.ok, "said": each.said, **each.found} for each in results}))
    else:
        for each in results:
            click.echo(f"{'ok  ' if each.ok else 'FAIL'}  {each.name:<9} {each.said}")
            for line in each.more:
                click.echo(f"{'':15} {line}")
    sys.exit(0 if all(each.ok for each in results) else 1)


@dataclass(frozen=True, slots=True)
class _Result:
    """`found` and `more` say the same: what was learned, for a program and in lines for a person."""

    name: str
    ok: bool
    said: str
    found: Mapping[str, object] = field(default_factory=dict)
    more: Sequence[str] = ()


async def _check(settings: Settings) -> list[_Result]:
    async def database() -> _Result:
        async with open_store(settings.database, SystemClock()) as store:
            await store.check()
        return _Result("database", True, settings.database.safe_url)

    async def broker() -> _Result:
        rabbit = settings.broker
        async with open_rabbit(rabbit) as bus:
            depth = await bus.depth("relay.meter")
        return _Result("broker", True, f"{rabbit.safe_url}, {depth} messages wait for the meter")

    async def coder() -> _Result:
        if settings.coder is None:
            raise WrongSettings("not set: RELAY_CODER__URL and RELAY_CODER__TOKEN (or RELAY_CODER__TOKEN_FILE)")
        async with open_accounts(settings.coder) as upstream:
            accounts = {name: who async for name, who in upstream.each()}
            known = [who for who in accounts.values() if isinstance(who, Account)]
            chats = 0
            async for _ in upstream.list_chats(archived=False):
                chats += 1
            await upstream.survey()
            await _see_a_frame(upstream)
            retention = await upstream.retention()
        users = ", ".join(who.username for who in known)
        shown = {name: _account(who) for name, who in accounts.items()}
        lines = [f"{name}: {said}" for name, said in shown.items()] if len(shown) > 1 else []
        if not settings.coder.administrator and any(who.administrator for who in known):
            lines.append("a token of the owner role: RELAY_CODER__ADMINISTRATOR=true follows other users' chats too")
        return _Result(
            "coder",
            len(known) == len(accounts),
            f"{settings.coder.url} as {users}, {chats} chats",
            {**upstream.status(), "accounts": shown, "retention": asdict(retention)},
            [*lines, *_about(upstream, retention)],
        )

    results = []
    for name, attempt in (("database", database), ("broker", broker), ("coder", coder)):
        try:
            results.append(await attempt())
        except (Unavailable, WrongSettings, Unauthorized, ChatRefused) as exc:
            results.append(_Result(name, False, str(exc)))
    return results


def _account(who: Account | Unauthorized) -> str:
    if isinstance(who, Unauthorized):
        return f"REFUSED {who}"
    return who.username + (", owner role" if who.administrator else "")


async def _see_a_frame(upstream: CoderAccounts) -> None:
    """The watch socket opens, and says what frames look like, if the server greets there as old ones do."""
    async with upstream.watch() as frames:
        with suppress(TimeoutError, BadFrame):
            async with asyncio.timeout(_GREETING_SECONDS):
                await anext(frames)


def _about(upstream: CoderAccounts, retention: Retention) -> list[str]:
    seen = upstream.evidence
    limits = {
        True: "has spend limits of its own; models cost what RELAY_METER__PRICES says, else what Coder says",
        False: "has no spend limits of its own; models cost what RELAY_METER__PRICES says",
        None: "did not say whether it has spend limits of its own",
    }[seen.native_limits]
    gateway = {
        "licensed": "AI Gateway budgets are read",
        "unlicensed": "has no licence for AI Gateway budgets",
        "absent": "has no AI Gateway budgets",
        None: "did not say whether it has AI Gateway budgets",
    }[seen.gateway]
    unknown = ": the account has no chats to tell it by; ask again when there is one"
    return [
        f"speaks {upstream.dialect.value} ({seen.words()}){unknown if upstream.dialect is Dialect.UNKNOWN else ''}",
        limits,
        gateway,
        f"archives chats: {_when(retention.auto_archive_days, 'without activity')}",
        f"deletes archived chats: {_when(retention.archived_chats_days, 'in the archive')}",
    ]


def _when(days: int | None, doing: str) -> str:
    if days is None:
        return "never by itself, or it does not say"
    return f"after {days} days {doing}" if days else "never by itself"
