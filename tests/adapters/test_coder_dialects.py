"""What the Coder adapter makes of servers of every age: recorded answers over real HTTP, and what they lack or have."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from relay.adapters.coder import CoderUpstream
from relay.adapters.coder_answers import NOT_FOUND
from relay.core.dialect import Dialect
from relay.core.errors import ChatGone, ChatRefused, StreamEnded, Unauthorized, Unavailable
from relay.ports import Budget, Retention
from relay.programs.discovery import watched_chats
from tests.adapters.scripted_server import CHAT, CHATS, USER, Handler, answer, call, error_of, no_route, upstream_of

CAPTURES = Path(__file__).parent.parent / "data" / "captures"
FOLDERS = ("d0", "d0b", "d1", "d1e", "d2", "d2b", "d3")
SPOKEN = dict(zip(FOLDERS, ("d0", "d0b", "d1", "d1e", "d2", "d2", "d3"), strict=True))
BEFORE_2_35 = ("d0b", "d1", "d1e")
SINCE_2_35 = ("d2", "d2b", "d3")


def recorded(folder: str, *names: str) -> Iterator[dict[str, Any]]:
    for name in names:
        file = CAPTURES / folder / f"{name}.jsonl"
        if file.exists():
            yield from map(json.loads, file.read_text().splitlines())


def answers_of(folder: str, user: str = "ann") -> dict[str, tuple[int, str]]:
    """The user's recorded answers to reads, by path and query."""
    names = ("rest_surface", "misc_endpoints", "list_filters", "edited_chat_storm", "archive_and_watch")
    rows = (row for row in recorded(folder, *names) if str(row.get("rest", "")).startswith(f"GET {CHATS}"))
    mine = {row["rest"][4:]: (row["status"], row["body"]) for row in rows if row.get("as_") == user}
    others = {
        row["rest"][4:]: (row["status"], row["body"])
        for row in recorded(folder, "misc_endpoints")
        if str(row.get("rest", "")).startswith("GET /api/v2/")
    }
    return {**others, **mine}


class Recorded:
    """Answers reads as the server did that was recorded, whatever the limit; sockets bring recorded frames."""

    def __init__(self, folder: str) -> None:
        self.answers = answers_of(folder)
        lists = [row for row in recorded(folder, "list_filters", "archive_and_watch") if row.get("status") == 200]
        self.lists: dict[bool, str] = {}
        for row in lists:
            target, body = row["rest"].removeprefix(f"GET {CHATS}"), row["body"]
            if target.partition("?")[0] == "" and json.loads(body):
                self.lists.setdefault("archived:true" in target, body)
        frames = [row for row in recorded(folder, "text_turn") if row.get("kind") == "frame"]
        self.stream = [row["raw"] for row in frames if row["conn"] == "s1"]
        self.watch = [row["raw"] for row in frames if row["conn"] != "s1"]

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.path.endswith(("/stream", "/watch")):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            for frame in self.stream if request.path.endswith("/stream") else self.watch:
                await socket.send_str(frame)
            await socket.close()
            return socket
        if request.path == CHATS:
            status, body = 200, self.lists[request.query.get("q") == "archived:true"]
        elif request.path.endswith("/messages"):
            return await self.messages(request)
        else:
            status, body = self.answers.get(request.path, (404, '{"message":"Route not found."}'))
        return web.Response(text=body, status=status, content_type="application/json")

    async def messages(self, request: web.Request) -> web.Response:
        """Those of the recorded chat that was paged with `after_id`; other chats have none."""
        pages = {key: body for key, (_, body) in self.answers.items() if "messages?after_id=" in key}
        wanted = "after_id=0" if request.query.get("after_id", "0") == "0" else "after_id="
        body = next((body for key, body in reversed(pages.items()) if wanted in key and '"messages":[{' in body), None)
        return web.Response(text=body or '{"messages":[],"queued_messages":[],"has_more":false}')


async def rest_of(stream: AsyncIterator[str]) -> list[str]:
    """All frames that come before the server closes politely."""
    frames: list[str] = []
    with suppress(Unavailable):
        while True:
            frames.append(await anext(stream))
    return frames


@pytest.mark.parametrize("folder", FOLDERS)
async def test_each_recorded_server_is_known_after_a_survey(folder: str) -> None:
    async with upstream_of(Recorded(folder)) as (upstream, server):
        await upstream.survey()
    assert upstream.dialect.value == SPOKEN[folder]
    assert upstream.evidence.native_limits is (folder != "d3")
    assert upstream.evidence.gateway == "absent"
    assert upstream.evidence.frame is None  # no socket was opened: that would move the owner's read mark
    assert {request.method for request in server.requests} == {"GET"}


@pytest.mark.parametrize("folder", FOLDERS)
async def test_frames_are_told_apart_as_they_go_by(folder: str) -> None:
    script = Recorded(folder)
    async with upstream_of(script) as (upstream, _server):
        for what, frames in (("watch", script.watch), ("stream", script.stream)):
            opened = upstream.watch() if what == "watch" else upstream.stream(CHAT, after_id=0)
            async with opened as stream:
                assert await rest_of(stream) == frames
        assert upstream.evidence.frame == ("envelope" if folder in ("d0", "d0b") else "raw")
        assert upstream.evidence.episodes is {"d0": None, "d0b": None, "d1": False, "d1e": False}.get(folder, True)


# --- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("archived", [False, True])
async def test_a_list_has_all_chats_of_all_its_trees_and_their_objects_whole(folder: str, archived: bool) -> None:
    script = Recorded(folder)
    async with upstream_of(script) as (upstream, _server):
        rows = [row async for row in upstream.list_chats(archived=archived)]
        assert upstream.evidence.tree_list is (folder not in ("d0", "d0b"))
    roots = json.loads(script.lists[archived])
    children = [child for root in roots for child in root.get("children") or []]
    assert [row for row in rows if row in roots] == roots
    assert sorted(str(row["id"]) for row in rows) == sorted(row["id"] for row in [*roots, *children])
    assert children or not archived or folder in ("d0", "d0b")


async def test_a_subagents_chat_comes_with_its_root_once_and_however_deep() -> None:
    grandchild = {"id": str(UUID(int=3)), "children": []}
    child = {"id": str(UUID(int=2)), "archived": True, "children": [grandchild, {"shape": "unknown"}, "odd"]}
    root = {"id": str(UUID(int=1)), "children": [child]}
    async with upstream_of(answer([root, child, {"id": str(UUID(int=4)), "children": None}])) as (upstream, _server):
        rows = [row async for row in upstream.list_chats(archived=False)]
    assert [UUID(str(row["id"])).int for row in rows] == [1, 2, 3, 4]
    assert rows[0] == root


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "d0"])
async def test_the_only_search_term_is_one_that_every_server_answers(folder: str) -> None:
    """`search:` is 500 for members of one, `status:` and the like are 400 on others."""
    answered = {key.partition("?")[2]: status for key, (status, _) in answers_of(folder).items() if "?q=" in key}
    assert {400, 500} & set(answered.values())
    async with upstream_of(Recorded(folder)) as (upstream, server):
        [row async for row in upstream.list_chats(archived=False)]
        [row async for row in upstream.list_chats(archived=True)]
        await upstream.survey()
    searched = {f"q={request.query['q']}" for request in server.requests if "q" in request.query}
    assert {answered[query] for query in searched} == {200}


# --- archiving -------------------------------------------------------------------------------------------------------


def replies(folder: str, *names: str, note: str = "", request: object = None) -> list[tuple[int, str]]:
    return [
        (row["status"], row["body"])
        for row in recorded(folder, *names)
        if row.get("request") == request and note in row.get("note", "") and str(row.get("rest")).startswith("PATCH")
    ]


ARCHIVE = {"archived": True}


def replays(status: int, body: str) -> Handler:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=body, status=status)

    return handler


@pytest.mark.parametrize("folder", [*BEFORE_2_35, *SINCE_2_35])
async def test_a_subagents_chat_that_only_goes_with_its_root_is_no_failure(folder: str) -> None:
    (reply,) = replies(folder, "child_verbs", note="archive the child", request=ARCHIVE)
    assert reply[0] == (204 if folder in BEFORE_2_35 else 400)
    async with upstream_of(replays(*reply)) as (upstream, _server):
        await upstream.archive_chat(CHAT)


@pytest.mark.parametrize("folder", SINCE_2_35)
async def test_an_active_chat_is_refused_with_409_so_that_others_are_archived_meanwhile(folder: str) -> None:
    reply = next(reply for reply in replies(folder, "control_states", request=ARCHIVE) if reply[0] == 409)
    async with upstream_of(replays(*reply)) as (upstream, _server):
        error = await error_of(upstream, "archive")
    assert isinstance(error, ChatRefused)
    assert error.status == 409
    assert "Cannot archive an active chat" in str(error)


@pytest.mark.parametrize("folder", FOLDERS)
async def test_an_archived_chat_that_refuses_changes_is_archived(folder: str) -> None:
    (reply,) = (reply for reply in replies(folder, "archive_and_watch", request=ARCHIVE) if reply[0] == 400)
    async with upstream_of(replays(*reply)) as (upstream, _server):
        await upstream.archive_chat(CHAT)


@pytest.mark.parametrize("readable", [True, False])
async def test_a_chat_that_is_only_shared_answers_404_to_changes_and_is_not_gone(readable: bool) -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.method == "GET" and readable:
            return web.json_response({"id": str(CHAT), "shared": True})
        return web.json_response({"message": NOT_FOUND}, status=404)

    async with upstream_of(handler) as (upstream, _server):
        error = await error_of(upstream, "archive")
    assert isinstance(error, ChatRefused if readable else ChatGone)


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("revision", "query"),
    [(None, "after_id=7"), (0, "after_id=7&after_revision=0"), (2**40, f"after_id=7&after_revision={2**40}")],
)
async def test_the_known_history_version_is_sent_where_there_is_one(revision: int | None, query: str) -> None:
    async with (
        upstream_of(Recorded("d3")) as (upstream, server),
        upstream.stream(CHAT, after_id=7, after_revision=revision) as frames,
    ):
        await anext(frames)
    assert server.paths == [f"{CHATS}/{CHAT}/stream?{query}"]


def sends(*frames: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for frame in frames:
            await socket.send_str(frame)
        await socket.close()
        return socket

    return handler


async def read(upstream: CoderUpstream) -> None:
    async with upstream.stream(CHAT, after_id=0) as frames:
        await rest_of(frames)


PART = (
    '[{"type":"message_part","chat_id":"c","message_part":{"role":"assistant","part":{"type":"text","text":"x"}%s}}]\n'
)
NUMBERED = PART % ',"history_version":7,"generation_attempt":1,"seq":3'


async def test_a_connection_is_looked_at_only_until_it_has_told_all() -> None:
    async with upstream_of(sends(NUMBERED, PART % "")) as (upstream, server):
        await read(upstream)
        assert upstream.evidence.episodes is True
        server.handler = sends(PART % "", NUMBERED)
        await read(upstream)
        assert upstream.evidence.episodes is False


def closes(folder: str, name: str) -> list[tuple[int, str]]:
    """Code and reason of each close frame that the server sent in that recording."""
    rows = (row for row in recorded(folder, name) if row.get("kind") in ("closed", "close"))
    return [(row["code"], row["reason"]) for row in rows if row["code"] is not None]


@pytest.mark.parametrize(
    ("recording", "codes", "reason"),
    [
        pytest.param("server_restart", {1000}, "server_close", id="a polite stop with 1000 is a restart"),
        pytest.param("liveness_raw", {1001}, "ping_timeout", id="no pong, whatever the server calls it"),
        pytest.param("long_history", {1002, 1008}, "protocol_error", id="a client that talked"),
    ],
)
@pytest.mark.parametrize("folder", [*BEFORE_2_35, *SINCE_2_35])
async def test_a_close_of_the_server_never_ends_a_chat(
    folder: str, recording: str, codes: set[int], reason: str
) -> None:
    seen = closes(folder, recording)
    assert seen
    assert {code for code, _ in seen} <= codes
    for code, text in seen:

        async def script(request: web.Request, code: int = code, text: str = text) -> web.StreamResponse:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            await socket.close(code=code, message=text.encode())
            return socket

        async with upstream_of(script) as (upstream, _server), upstream.stream(CHAT, after_id=0) as frames:
            with pytest.raises(StreamEnded) as caught:
                await anext(frames)
        assert caught.value.reason == reason


@pytest.mark.parametrize("folder", ["d1", "d1e", "d2", "d2b", "d3"])
async def test_an_action_is_told_on_watch_with_or_without_its_calls(folder: str) -> None:
    """Servers up to 2.34 add the calls; later ones leave them out, and tell of no other change of status."""
    frames = [row["raw"] for row in recorded(folder, "dynamic_tool") if row.get("kind") == "frame"]
    watched = [frame for frame in frames if frame.startswith('{"kind":"action_required"')]
    assert watched
    assert all(("tool_calls" in json.loads(frame)) is (folder in ("d1", "d1e")) for frame in watched)
    async with upstream_of(sends(*watched)) as (upstream, _server), upstream.watch() as stream:
        chats = [chat for _ in watched for chat in watched_chats(await anext(stream))]
    assert [chat["id"] for chat in chats] == [json.loads(frame)["chat"]["id"] for frame in watched]


# --- limits and budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
async def test_a_removed_collection_path_answers_400_not_404(folder: str) -> None:
    async with upstream_of(Recorded(folder)) as (upstream, _server):
        assert await upstream.has_native_limits() is (folder != "d3")
    status, body = answers_of(folder)[f"{CHATS}/usage-limits/status"]
    assert (status, "Invalid UUID" in body) == ((400, True) if folder == "d3" else (200, False))


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if folder != "d3"])
async def test_a_limit_status_without_period_and_with_dates_of_the_year_1_is_one(folder: str) -> None:
    _, body = answers_of(folder)[f"{CHATS}/usage-limits/status"]
    assert json.loads(body) == {
        "is_limited": False,
        "current_spend": 0,
        "period_start": "0001-01-01T00:00:00Z",
        "period_end": "0001-01-01T00:00:00Z",
    }
    async with upstream_of(Recorded(folder)) as (upstream, _server):
        assert await upstream.has_native_limits() is True


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (403, "Forbidden.", True),
        (404, "Route not found.", False),
        (403, "Agents functionality requires enabling the 'agents' experiment.", Unauthorized),
        (400, "Something else.", Unavailable),
        (429, "Slow down.", Unavailable),
        (503, "AI Gateway must be enabled.", Unavailable),
    ],
)
async def test_native_limits(status: int, message: str, expected: object) -> None:
    async with upstream_of(answer({"message": message}, status)) as (upstream, _server):
        if isinstance(expected, bool):
            assert await upstream.has_native_limits() is expected
        else:
            assert type(await error_of(upstream, "limits")) is expected


@pytest.mark.parametrize("what", ["limits", "budget", "retention"])
@pytest.mark.parametrize("status", [200, 403, 404, 502])
async def test_a_web_page_says_nothing_of_limits(what: str, status: int) -> None:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text="<html>not now</html>", content_type="text/html", status=status)

    async with upstream_of(handler) as (upstream, _server):
        assert isinstance(await error_of(upstream, what), Unavailable | Unauthorized)
    assert (upstream.evidence.native_limits, upstream.evidence.gateway) == (None, None)


SPEND = {
    "user_id": str(USER),
    "effective_group_id": None,
    "effective_budget": {"spend_limit_micros": 20_000_000, "limit_source": "group"},
    "period_start": "2026-11-01T00:00:00Z",
    "period_end": "2026-12-01T00:00:00.123456789Z",
    "current_spend_micros": 1_234_567,
}


async def test_a_budget_of_the_gateway() -> None:
    async with upstream_of(answer(SPEND)) as (upstream, server):
        budget = await upstream.budget(USER)
    start, end = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, microsecond=123456, tzinfo=UTC)
    assert budget == Budget(USER, 1_234_567, 20_000_000, "group", start, end)
    assert server.paths == [f"/api/v2/users/{USER}/ai/spend"]
    assert upstream.evidence.gateway == "licensed"


@pytest.mark.parametrize("effective", [None, {"spend_limit_micros": None}])
async def test_a_user_without_a_budget_has_spend_and_no_limit(effective: object) -> None:
    async with upstream_of(answer(SPEND | {"effective_budget": effective})) as (upstream, _server):
        budget = await upstream.budget(USER)
    assert budget is not None
    assert (budget.limit_micros, budget.source, budget.spent_micros) == (None, "", 1_234_567)


@pytest.mark.parametrize(("status", "gateway"), [(403, "unlicensed"), (404, "absent")])
async def test_a_server_without_a_licence_or_a_gateway_has_no_budget(status: int, gateway: str) -> None:
    async with upstream_of(answer({"message": "No."}, status)) as (upstream, _server):
        assert await upstream.budget(USER) is None
    assert upstream.evidence.gateway == gateway


@pytest.mark.parametrize(
    "change",
    [
        {"current_spend_micros": "12"},
        {"current_spend_micros": True},
        {"effective_budget": {"spend_limit_micros": 1.5}},
        {"period_end": "soon"},
        {"period_end": "2026-12-01T00:00:00"},
        {"user_id": "ann"},
    ],
)
async def test_a_budget_of_another_shape_is_no_answer(change: dict[str, object]) -> None:
    async with upstream_of(answer(SPEND | change)) as (upstream, _server):
        assert type(await error_of(upstream, "budget")) is Unavailable
    assert upstream.evidence.gateway is None


@pytest.mark.parametrize("folder", FOLDERS)
async def test_retention(folder: str) -> None:
    async with upstream_of(Recorded(folder)) as (upstream, _server):
        found = await upstream.retention()
    assert found == (Retention(None, None) if folder in ("d0", "d0b") else Retention(30, 0))


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        pytest.param(answer({"message": "Forbidden."}, 403), Retention(), id="not for us"),
        pytest.param(answer({"message": 'Invalid UUID "config".'}, 400), Retention(), id="removed"),
        pytest.param(answer({"retention_days": "30"}), None, id="another shape"),
        pytest.param(answer({"message": "Down."}, 503), None, id="away"),
    ],
)
async def test_retention_that_is_not_told(handler: Handler, expected: Retention | None) -> None:
    async with upstream_of(handler) as (upstream, _server):
        if expected is not None:
            assert await upstream.retention() == expected
        else:
            assert type(await error_of(upstream, "retention")) is Unavailable


@pytest.mark.parametrize("folder", ["d1e", "d2", "d2b", "d3"])
async def test_prices_come_without_the_provider_api_that_is_410_gone(folder: str) -> None:
    gone = {row["status"] for row in recorded(folder, "rest_surface") if row.get("rest") == f"GET {CHATS}/providers"}
    assert gone == {410}
    async with upstream_of(Recorded(folder)) as (upstream, server):
        prices = await upstream.model_prices()
    assert {price.model for price in prices.values()} == {"lab"}
    assert all((price.input is None) is (folder == "d3") for price in prices.values())
    assert not any("providers" in path for path in server.paths)


# --- what is shown ---------------------------------------------------------------------------------------------------


def gauge() -> dict[str, float]:
    values = {name.value: REGISTRY.get_sample_value("relay_source_dialect", {"dialect": name}) for name in Dialect}
    assert None not in values.values()  # every series exists from the start
    return {name: value for name, value in values.items() if value}


async def test_what_is_spoken_is_shown_in_status_metric_and_log() -> None:
    script = Recorded("d2b")
    async with upstream_of(script) as (upstream, server):
        assert upstream.status() == {"dialect": "unknown", "evidence": {}}
        await upstream.survey()
        assert gauge() == {"d2": 1.0}
        assert upstream.status()["dialect"] == "d2"
        evidence = upstream.status()["evidence"]
        assert isinstance(evidence, dict)
        assert evidence["prefix"] == "experimental"
        assert evidence["asc_messages"] is True
        server.handler = Recorded("d3")
        with capture_logs() as lines:
            await upstream.survey()
        assert gauge() == {"d3": 1.0}
        (line,) = [line for line in lines if line["event"] == "dialect_seen"]
        assert (line["before"], line["dialect"]) == ("d2", "d3")


async def test_a_chat_and_a_page_of_messages_tell_what_they_have() -> None:
    async with upstream_of(answer({"id": str(CHAT), "last_error": None, "has_unread": False})) as (upstream, server):
        await call(upstream, "chat")
        assert upstream.evidence.to_json() == {
            "prefix": "experimental",
            "last_error": "string",
            "read_marks": True,
            "sharing": False,
        }
        server.handler = answer({"messages": [], "has_more": False, "history_version": 3})
        await call(upstream, "messages")
        assert upstream.evidence.rev_cursor is True


async def test_a_chat_that_goes_during_a_survey_does_not_end_it() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == CHATS:
            return web.json_response([{"id": str(CHAT)}, {"id": str(USER)}])
        if str(CHAT) in request.path:
            return web.json_response({"message": NOT_FOUND}, status=404)
        if str(USER) in request.path:
            page = {"messages": [{"id": 2, "role": "user"}, {"id": 3, "role": "assistant"}], "has_more": False}
            return web.json_response(page)
        return no_route()

    async with upstream_of(handler) as (upstream, _server):
        await upstream.survey()
    assert upstream.evidence.asc_messages is True


async def test_a_survey_of_an_account_without_chats_leaves_open_what_only_chats_show() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response([]) if request.path == CHATS else no_route()

    async with upstream_of(handler) as (upstream, _server):
        await upstream.survey()
        assert upstream.dialect is Dialect.UNKNOWN
        assert upstream.evidence.to_json() == {
            "prefix": "experimental",
            "native_limits": False,
            "gateway": "absent",
        }
        await call(upstream, "list")
