"""What every call sends and makes of a good answer, against Go's client."""

import re
from typing import Any

from relay.codersdk import ChatFile, CoderClient, CoderError, CoderModel
from tests.codersdk.calls import call, printed
from tests.codersdk.differences import Tally
from tests.codersdk.scripted_server import Received, Reply, ScriptedServer
from tests.codersdk.vectors import Row, as_bytes, rows, same_json, value_of, without_unknown

_CODER_TEST = re.compile(r"coder\.test(:\d+)?", re.IGNORECASE)


def replies(row: Row) -> list[Reply]:
    answers = [row["response"], *row.get("more_responses", [])]
    return [
        Reply(each["status"], each.get("headers", {}), as_bytes(each, "body"), frames=each.get("frames"))
        for each in answers
        if each is not None
    ]


def sent(received: Received) -> dict[str, Any]:
    """What counts of a request."""
    is_json = received.headers.get("content-type") == "application/json"
    return {
        "method": received.method,
        "request_uri": received.target,
        "content_type": received.headers.get("content-type"),
        "content_disposition": received.headers.get("content-disposition"),
        "content_length": received.headers.get("content-length"),
        "transfer_encoding": received.headers.get("transfer-encoding"),
        "body": value_of(received.body.decode()) if is_json else received.body,
        "token": received.headers.get("coder-session-token"),
        "authorization": received.headers.get("authorization"),
    }


def sent_by_go(request: Row) -> dict[str, Any]:
    body = as_bytes(request, "body")
    return {
        "method": request["method"],
        "request_uri": request["request_uri"],
        "content_type": request["content_type"],
        "content_disposition": request["content_disposition"],
        "content_length": request["content_length"],
        "transfer_encoding": request.get("transfer_encoding"),
        "body": value_of(body.decode()) if request["content_type"] == "application/json" else body,
        "token": request["other_headers"].get("Coder-Session-Token"),
        "authorization": request["other_headers"].get("Authorization"),
    }


class Clients:
    """A client for each server and token, kept between vectors."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._open: dict[tuple[str, str], CoderClient] = {}

    async def outcome(self, row: Row) -> Any:
        """The result of a call, or its error."""
        base = _CODER_TEST.sub(self._server.address, row.get("base_url", "http://coder.test"))
        token = row.get("session_token", "golden-token")
        try:
            if (base, token) not in self._open:
                self._open[base, token] = CoderClient(base, token)
            return await call(self._open[base, token], row)
        except (CoderError, ValueError) as exc:
            return exc

    async def aclose(self) -> None:
        for client in self._open.values():
            await client.aclose()


def same_result(result: Any, row: Row) -> bool:
    if row["error"] is not None:
        return isinstance(result, Exception)
    wanted = row["result"]
    if isinstance(result, ChatFile):
        return result == (as_bytes(wanted, "data"), wanted["content_type"])
    if result is None or wanted is None or isinstance(result, Exception):
        return result is wanted
    if isinstance(result, CoderModel | list):
        return same_json(printed(without_unknown(result)), wanted)
    return False


async def test_calls_send_what_go_sends(server: ScriptedServer) -> None:
    tally = Tally("requests")
    clients = Clients(server)
    for row in rows("requests"):
        server.begin(*replies(row))
        result = await clients.outcome(row)
        got = [sent(each) for each in server.received]
        wanted = [sent_by_go(each) for each in [row["request"], *row.get("more_requests", [])] if each is not None]
        if got != wanted or not same_result(result, row):
            tally.differs(
                row,
                (got, result),
                f"{row['method']}\n {got}\n {wanted}\n {result!r}\n {row['result']}\n {row['error']}",
            )
    await clients.aclose()
    tally.check()
