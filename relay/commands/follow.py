"""`relay follow`: chats added by hand."""

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from uuid import UUID

import click

from relay.adapters.clock import SystemClock
from relay.adapters.coder import CoderSettings
from relay.adapters.coder_accounts import open_accounts
from relay.adapters.logs import LogSettings, configure_logs
from relay.adapters.store import SqlStore, open_store
from relay.core.errors import ChatGone, ChatRefused, WrongSettings
from relay.ports import AddedChat, ChatRecord
from relay.programs.follow import GONE
from relay.settings import read_settings


@click.command()
@click.argument("chats", nargs=-1, type=click.UUID, metavar="[CHAT]...")
@click.option("--list", "list_them", is_flag=True, help="Show the chats that were added.")
@click.option("--remove", is_flag=True, help="Take chats back that were added.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object for each chat, one per line.")
def follow(chats: tuple[UUID, ...], *, list_them: bool, remove: bool, as_json: bool) -> None:
    """Follow chats that no account of the relay lists: those of other users, where a token may read them.

    They are looked at with each sweep of the workers. The chats of the accounts' own users are followed anyway.
    Exit code 1 when one of the chats cannot be added or taken back; the others are.

    \b
    Examples:
      relay follow 5f0c2f5e-8a1d-4c57-9e55-6b8d0f2a7c31
      relay follow --list
      relay follow --remove 5f0c2f5e-8a1d-4c57-9e55-6b8d0f2a7c31
    """
    if list_them and (remove or chats):
        raise click.UsageError("--list stands alone.")
    if not list_them and not chats:
        raise click.UsageError("name a chat by its id (a UUID, the end of its address in Coder), or use --list.")
    settings = read_settings()
    configure_logs(LogSettings(level="error"))
    coder = settings.coder
    if coder is None:
        raise WrongSettings("not set: RELAY_CODER__URL and RELAY_CODER__TOKEN (or RELAY_CODER__TOKEN_FILE)")

    async def work() -> Sequence[_Said]:
        async with open_store(settings.database, SystemClock()) as store:
            if list_them:
                return await _listed(store, coder.url)
            if remove:
                return [await _removed(store, coder.url, chat) for chat in chats]
            return await _added(store, coder, chats)

    said = asyncio.run(work())
    for each in said:
        # What is wrong goes where errors go, and is part of the data when a program reads it.
        wrong = not each.ok and not as_json
        click.echo(json.dumps(asdict(each)) if as_json else f"{each.chat}  {each.state}: {each.said}", err=wrong)
    if list_them and not said and not as_json:
        click.echo("no chat was added")
    sys.exit(0 if all(each.ok for each in said) else 1)


@dataclass(frozen=True, slots=True)
class _Said:
    """What there is to say of one chat."""

    chat: str
    ok: bool
    state: str
    said: str


async def _added(store: SqlStore, coder: CoderSettings, chats: Sequence[UUID]) -> list[_Said]:
    said = []
    async with open_accounts(coder) as upstream:
        users = ", ".join(account.username for account in await upstream.accounts())
        for chat in chats:
            try:
                row = await upstream.chat(chat)
            except ChatGone:
                why = f"{coder.url} does not know it, or {users} may not read it (the server does not say which)"
                said.append(_Said(str(chat), ok=False, state="not added", said=why))
            except ChatRefused as exc:
                why = f"{users} may not read it: {exc}"
                said.append(_Said(str(chat), ok=False, state="not added", said=why))
            else:
                new = await store.add(coder.url, chat)
                title, owner = str(row.get("title", "")), row.get("owner_username") or row.get("owner_id")
                what = f"{title!r} of {owner}"
                said.append(_Said(str(chat), ok=True, state="added" if new else "was added before", said=what))
    return said


async def _removed(store: SqlStore, deployment: str, chat: UUID) -> _Said:
    if await store.remove(deployment, chat):
        return _Said(str(chat), ok=True, state="removed", said="it is let go when it is idle")
    return _Said(str(chat), ok=False, state="not removed", said="it was not added; see relay follow --list")


async def _listed(store: SqlStore, deployment: str) -> list[_Said]:
    added = await store.added(deployment)
    known: dict[UUID, ChatRecord] = {}
    for place in range(0, len(added), 100):
        ids = [each.chat_id for each in added[place : place + 100]]
        known |= {record.chat.chat_id: record for record in await store.records_of(deployment, ids)}
    return [_state(each, known.get(each.chat_id)) for each in added]


def _state(added: AddedChat, record: ChatRecord | None) -> _Said:
    since = f"added {added.added_at:%Y-%m-%d %H:%M} UTC"
    if added.gone_at is not None or (record is not None and record.seen == GONE):
        when = f", gone since {added.gone_at:%Y-%m-%d %H:%M} UTC" if added.gone_at else ""
        return _Said(str(added.chat_id), ok=True, state="gone", said=f"{since}{when}")
    if record is None:
        return _Said(str(added.chat_id), ok=True, state="waiting", said=f"{since}, no worker has looked at it yet")
    state = f"followed by {record.worker}" if record.worker else "idle"
    return _Said(str(added.chat_id), ok=True, state=state, said=since)
