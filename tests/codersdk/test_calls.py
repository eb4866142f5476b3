"""Calls that the Go SDK has not, and what is easier in Python."""

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

from relay.codersdk import ChatInputPart, ChatInputPartType, ChatUsageLimitPeriod, CoderClient
from tests.codersdk.scripted_server import Reply, ScriptedServer
from tests.codersdk.vectors import value_of

CHAT = UUID("bb6d3fbe-1b59-436b-8dd3-90d705751897")
JSON = {"Content-Type": "application/json; charset=utf-8"}
API = "/api/experimental/chats"


async def test_the_queue(server: ScriptedServer) -> None:
    server.begin(Reply(204), Reply(200, JSON, b'{"id":12}'))
    async with CoderClient(server.url, "token") as coder:
        await coder.delete_chat_queued_message(CHAT, 7)
        message = await coder.promote_chat_queued_message(CHAT, 8)
    assert message.id == 12
    assert [(each.method, each.target) for each in server.received] == [
        ("DELETE", f"{API}/{CHAT}/queue/7"),
        ("POST", f"{API}/{CHAT}/queue/8/promote"),
    ]


async def test_archiving(server: ScriptedServer) -> None:
    server.begin(Reply(204), Reply(204))
    async with CoderClient(server.url, "token") as coder:
        await coder.archive_chat(CHAT)
        await coder.unarchive_chat(CHAT)
    assert [(each.method, each.target, value_of(each.body.decode())) for each in server.received] == [
        ("PATCH", f"{API}/{CHAT}", value_of('{"archived":true}')),
        ("PATCH", f"{API}/{CHAT}", value_of('{"archived":false}')),
    ]


async def test_who_and_where(server: ScriptedServer) -> None:
    user = b'{"id":"%s","username":"ann","roles":[{"name":"owner"}]}' % str(CHAT).encode()
    server.begin(Reply(200, JSON, user), Reply(200, JSON, b'{"version":"v2.30.0","telemetry":true}'))
    async with CoderClient(server.url, "token") as coder:
        me = await coder.get_user()
        build = await coder.get_build_info()
    assert (me.id, me.username) == (CHAT, "ann")
    assert me.model_extra is not None
    assert me.model_extra["roles"].value() == [{"name": "owner"}]
    assert build.version == "v2.30.0"
    assert [each.target for each in server.received] == ["/api/v2/users/me", "/api/v2/buildinfo"]


async def test_insights_of_a_period_given_as_datetimes(server: ScriptedServer) -> None:
    server.begin(Reply(200, JSON, b'{"summary":{"merge_rate":0.25},"time_series":[]}'))
    async with CoderClient(server.url, "token") as coder:
        insights = await coder.get_pr_insights(
            start_date=datetime(2026, 3, 1, tzinfo=UTC), end_date=datetime(2026, 4, 1, 0, 0, 0, 999, tzinfo=UTC)
        )
    assert insights.summary.merge_rate == 0.25
    assert server.received[0].target == (
        f"{API}/insights/pull-requests?end_date=2026-04-01T00%3A00%3A00Z&start_date=2026-03-01T00%3A00%3A00Z"
    )


async def test_a_text_is_enough_for_a_message(server: ScriptedServer) -> None:
    server.begin(*[Reply(200, JSON, b'{"queued":false}')] * 2)
    part = ChatInputPart(type=ChatInputPartType.TEXT, text="hello")
    async with CoderClient(server.url, "token") as coder:
        await coder.create_chat_message(CHAT, "hello")
        await coder.create_chat_message(CHAT, [part], mcp_server_ids=[])
    short, long = (value_of(each.body.decode()) for each in server.received)
    assert long == short | {"mcp_server_ids": []}


async def test_files_are_uploaded_piece_by_piece(server: ScriptedServer) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"one"
        yield b"two"

    server.begin(*[Reply(201, JSON, f'{{"id":"{CHAT}"}}'.encode())] * 2)
    async with CoderClient(server.url, "token") as coder:
        for data in (io.BytesIO(b"x" * 100_000), pieces()):
            assert (await coder.upload_chat_file(CHAT, "image/png", "a.png", data)).id == CHAT
    assert [len(each.body) for each in server.received] == [100_000, 6]


async def test_a_limit_takes_a_period_by_name(server: ScriptedServer) -> None:
    server.begin(Reply(200, JSON, b'{"spend_limit_micros":null,"period":"week"}'))
    async with CoderClient(server.url, "token") as coder:
        config = await coder.update_chat_usage_limit_config(spend_limit_micros=None, period="week")
    assert config.period is ChatUsageLimitPeriod.WEEK
    assert value_of(server.received[0].body.decode())["spend_limit_micros"] is None


async def test_no_cookie_is_kept(server: ScriptedServer) -> None:
    server.begin(*[Reply(200, JSON | {"Set-Cookie": "coder_session_token=other"}, b"{}")] * 2)
    async with CoderClient(server.url, "token") as coder:
        await coder.get_build_info()
        await coder.get_build_info()
    assert "cookie" not in server.received[1].headers
