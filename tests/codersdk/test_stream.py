"""Streams over a real socket, against Go's client."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from relay.codersdk import (
    ChatStreamEvent,
    CoderClient,
    StreamDecoder,
)
from tests.codersdk.differences import Streamed, Tally, bare_array
from tests.codersdk.scripted_server import Goodbye, Reply, ScriptedServer
from tests.codersdk.vectors import Row, as_bytes, rows, same_json, without_unknown

# Behind these words stands the wording of Go's own libraries.
_CAUSES = ("read chat stream: ", "decode chat stream event batch: ")


def event_text(event: str | dict[str, Any]) -> str:
    """An event of a vector; long ones are written as parts."""
    if isinstance(event, str):
        return event
    return str(event["prefix"] + event["repeat"] * event["count"] + event["suffix"])


def same_event(got: ChatStreamEvent, wanted: str) -> bool:
    if same_json(without_unknown(got).model_dump_json(), wanted):
        return True
    go = json.loads(wanted)
    if got.error is None or go["type"] != "error" or UUID(go["chat_id"]) != got.chat_id:
        return False
    ours, theirs = got.error.message, go["error"]["message"]
    return any(ours.startswith(cause) and theirs.startswith(cause) for cause in _CAUSES)


def same_events(got: Sequence[ChatStreamEvent], row: Row) -> bool:
    wanted = [event_text(each) for each in row["events"]]
    return len(got) == len(wanted) and all(map(same_event, got, wanted))


def same_goodbye(goodbye: Goodbye, row: Row) -> bool:
    wanted = row["client_close"]
    close = None if goodbye.close is None else goodbye.close[0]
    pongs = row.get("client_pongs", len(goodbye.pongs))
    return (close, len(goodbye.pongs)) == (wanted and wanted["code"], pongs)


async def follow(coder: CoderClient, row: Row) -> list[ChatStreamEvent]:
    last = row.get("client_closes_after_events")
    events = []
    async with coder.stream_chat(UUID(row["chat_id"]), after_id=(row["opts"] or {}).get("after_id")) as stream:
        async for event in stream:
            events.append(event)
            if len(events) == last:
                break
    return events


def decoded(row: Row) -> list[ChatStreamEvent]:
    decoder = StreamDecoder(UUID(row["chat_id"]))
    return [event for frame in row["frames"] for event in decoder.feed(as_bytes(frame, "data"))]


async def test_streams_give_what_go_gives(server: ScriptedServer) -> None:
    tally = Tally("stream")
    async with CoderClient(server.url, "golden-token") as coder:
        for row in rows("stream"):
            if bare_array(row):  # Go ends here, and the server waits for that
                events = decoded(row)
                tally.differs(row, Streamed(same_events(events, row), None), f"{row['name']} {events}")
                continue
            server.begin(Reply(101, frames=row["frames"]))
            events = await follow(coder, row)
            goodbye = await server.goodbye()
            target = server.received[0].target
            same = same_events(events, row)
            if target != row["request_uri"] or not same or not same_goodbye(goodbye, row):
                tally.differs(
                    row,
                    Streamed(same, goodbye.close and goodbye.close[0]),
                    f"{row['name']} {row['frames']!s:.300}\n{[e.model_dump_json() for e in events]!s:.300}\n"
                    f"{row['events']!s:.300}\n{goodbye} instead of {row['client_close']}",
                )
    tally.check()
