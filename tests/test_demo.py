"""`relay demo`, as a stranger runs it: it ends by itself, and it can fail."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import pytest

from tests.e2e.consumer import bound_to_everything
from tests.e2e.processes import finished

OPTIONS = ("--chats", "12", "--speed", "8", "--seed", "3", "--json")


def check(summary: Any) -> None:
    assert summary["good"] is True
    assert summary["differences"] == {}
    assert summary["equal"] == summary["chats"] >= 12
    assert len(summary["archives"]) >= summary["chats"]
    for archive in summary["archives"]:
        assert hashlib.sha256(Path(archive["path"]).read_bytes()).hexdigest() == archive["sha256"]
    assert set(summary["spend_micros"]) == {"ann", "bob"}
    assert summary["durable_events"] > 0
    # On a busy machine messages overtake nearly all that was to be shown before them.
    assert summary["previews"] + summary["previews_coalesced"] > 0
    assert len(summary["alerts"]) == len(set(summary["alerts"])) > 0


@pytest.mark.long
async def test_the_demo_ends_by_itself_with_every_fold_equal(tmp_path: Path) -> None:
    code, output, errors = await finished("demo", *OPTIONS, "--directory", str(tmp_path))
    assert code == 0, output + errors
    check(json.loads(output))  # standard output holds the summary and nothing else
    assert "Traceback" not in errors


async def test_the_same_with_a_real_broker(rabbit_vhost: str, tmp_path: Path) -> None:
    code, output, errors = await finished("demo", *OPTIONS, "--directory", str(tmp_path), "--rabbit", rabbit_vhost)
    assert code == 0, output + errors
    check(json.loads(output))
    assert rabbit_vhost not in output + errors


async def test_the_same_with_a_newer_coder(tmp_path: Path) -> None:
    options = ("--chats", "3", "--speed", "4", "--json", "--dialect", "d3")
    code, output, errors = await finished("demo", *options, "--directory", str(tmp_path))
    assert code == 0, output + errors
    assert "(dialect d3)" in errors
    summary = json.loads(output)
    assert (summary["equal"], summary["chats"]) == (3, 3)
    assert all(summary["spend_micros"][owner] > 0 for owner in ("ann", "bob"))  # it has no prices of its own


async def test_a_forged_message_on_the_broker_is_shown_and_ends_the_command_with_1(
    rabbit_vhost: str, tmp_path: Path
) -> None:
    async def forge() -> str:
        """Somebody with access to the exchange makes up a message of one of the chats."""
        async with bound_to_everything(rabbit_vhost) as seen:
            while not (real := seen.named("chat.message.user.")):
                await seen.changed.wait()
                seen.changed.clear()
            event = {**real[0], "id": str(UUID(int=5))}
            event["data"] = {"message": {**event["data"]["message"], "id": 10**9}, "text": ""}
            connection = await aio_pika.connect(rabbit_vhost)
            async with connection:
                exchange = await (await connection.channel()).get_exchange("coder.chats")
                await exchange.publish(aio_pika.Message(json.dumps(event).encode()), event.pop("key"))
        return str(event["subject"])

    forging = asyncio.create_task(forge())
    options = ("--chats", "2", "--speed", "8", "--seed", "3")
    code, output, errors = await finished("demo", *options, "--directory", str(tmp_path), "--rabbit", rabbit_vhost)
    chat = await forging
    assert code == 1, errors
    assert f"chat {chat}: message {10**9} is not in Coder" in output
    assert "NOT EQUAL: for 1 of 2 chats" in output
