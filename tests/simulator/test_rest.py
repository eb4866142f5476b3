"""REST answers of the simulator where they are odd, and the rules of costs and limits."""

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from relay.simulator import ModelConfig, spend
from relay.simulator.state import Usage
from tests.simulator.conftest import Start
from tests.simulator.listener import Client

SIGNED_OUT = "You are signed out or your session has expired. Please sign in again to continue."
UNKNOWN = "00000000-0000-4000-8000-000000000001"


async def idle_chat(client: Client, text: str = "[text n=3 ms=1] hello", who: str = "ann") -> UUID:
    chat = await client.owner(who).create(text)
    client.simulator.poll(chat)
    await client.owner(who).wait_idle(chat)
    return chat


@pytest.mark.parametrize(
    ("token", "detail"),
    [
        pytest.param("", 'Cookie "coder_session_token" or query parameter must be provided.', id="none"),
        pytest.param("nope", "Invalid API key format: incorrect amount of API key parts, expected 2 got 1", id="parts"),
        pytest.param("abc-def", "Invalid API key format: invalid API key ID length, expected 10 got 3", id="id"),
        pytest.param(
            "abcdefghij-short", "Invalid API key format: invalid API key secret length, expected 22 got 5", id="secret"
        ),
        pytest.param("abcdefghij-" + "x" * 22, "API key is invalid.", id="unknown"),
        pytest.param("ID-" + "x" * 22, "API key secret is invalid.", id="wrong secret"),
    ],
)
async def test_401_says_what_is_wrong_with_the_token(client: Client, token: str, detail: str) -> None:
    key_id = client.simulator.users["ann"].token.split("-")[0]
    headers = {"Coder-Session-Token": token.replace("ID", key_id)}
    async with client.session.get(client.simulator.url + "/api/experimental/chats", headers=headers) as response:
        assert response.status == 401
        assert await response.json() == {"message": SIGNED_OUT, "detail": detail}
        assert response.headers["WWW-Authenticate"].startswith('Bearer realm="coder", error="invalid_token"')


@pytest.mark.parametrize("place", ["cookie", "query", "header", "bearer", "access_token"])
async def test_a_token_is_found_in_five_places(client: Client, place: str) -> None:
    token = client.simulator.users["ann"].token
    url = client.simulator.url + "/api/v2/users/me"
    headers = {
        "cookie": {"Cookie": f"coder_session_token={token}"},
        "header": {"Coder-Session-Token": token},
        "bearer": {"Authorization": f"bEARER  {token}"},
    }.get(place, {})
    if place in ("query", "access_token"):
        url += f"?{'coder_session_token' if place == 'query' else place}={token}"
    async with client.session.get(url, headers=headers) as response:
        assert (await response.json())["username"] == "ann"


@dataclass(frozen=True)
class Case:
    """A call and how it is refused: status, message, and detail or the one validation."""

    name: str
    method: str
    path: str
    status: int
    message: str
    detail: str = ""
    validation: tuple[str, str] | None = None
    body: Any = None
    who: str = "ann"

    @property
    def answer(self) -> dict[str, Any]:
        answer: dict[str, Any] = {"message": self.message}
        if self.detail:
            answer["detail"] = self.detail
        if self.validation:
            answer["validations"] = [dict(zip(("field", "detail"), self.validation, strict=True))]
        return answer


NIL = "00000000-0000-0000-0000-000000000000"
HELLO = [{"type": "text", "text": "x"}]
NOT_FOUND = "Resource not found or you do not have access to this resource"
TWICE = 'Query param "archived" provided more than once, found 2 times. Only provide 1 instance of this query param.'
BAD_SEARCH = "Invalid chat search query."

REFUSALS = [
    Case("no uuid", "GET", "/nope", 400, 'Invalid UUID "nope".', "invalid UUID length: 4"),
    Case("models is no chat", "POST", "/models", 400, 'Invalid UUID "models".', "invalid UUID length: 6", body={}),
    Case("chat before route", "GET", f"/{UNKNOWN}/whatever", 404, NOT_FOUND),
    Case("no route", "GET", "/config/nothing", 404, "Route not found."),
    Case("empty body", "POST", "", 400, "Request body must be valid JSON.", "EOF"),
    Case(
        "file without id",
        "POST",
        "",
        400,
        "Invalid input part.",
        "content[0].file_id is required for file parts.",
        body={"content": [{"type": "file", "file_id": NIL}]},
    ),
    Case(
        "reference without name",
        "POST",
        "",
        400,
        "Invalid input part.",
        "content[0].file_name cannot be empty for file-reference.",
        body={"content": [{"type": "file-reference"}]},
    ),
    Case("nil model", "POST", "", 400, "Invalid model config ID.", body={"content": HELLO, "model_config_id": NIL}),
    Case(
        "unknown MCP server",
        "POST",
        "",
        400,
        "One or more MCP server IDs are invalid.",
        f"Invalid IDs: {UNKNOWN}",
        body={"content": HELLO, "mcp_server_ids": [UNKNOWN]},
        who="admin",
    ),
    Case(
        "a member must name a model",
        "POST",
        "",
        500,
        "Failed to resolve chat model config.",
        "unauthorized: rbac: forbidden",
        body={"content": HELLO},
    ),
    Case("free text", "GET", "?q=a+b", 400, BAD_SEARCH, validation=("q", 'unsupported search term: "a b"')),
    Case(
        "half a term",
        "GET",
        "?q=x:",
        400,
        BAD_SEARCH,
        validation=("q", "Query element \"x:\" cannot start or end with ':'"),
    ),
    Case(
        "two colons",
        "GET",
        "?q=a:b:c",
        400,
        BAD_SEARCH,
        validation=("q", "Query element \"a:b:c\" can only contain 1 ':'"),
    ),
    Case(
        "a term twice",
        "GET",
        "?q=archived:true+archived:false",
        400,
        BAD_SEARCH,
        validation=("archived", TWICE),
    ),
    Case("404, not 403", "PUT", "/config/system-prompt", 404, NOT_FOUND, body={}),
    Case("another's costs", "GET", "/cost/bob/summary", 404, NOT_FOUND),
    Case(
        "costs reject unknown parameters",
        "GET",
        "/cost/me/summary?coder_session_token=",
        400,
        "Invalid query parameters.",
        validation=("coder_session_token", '"coder_session_token" is not a valid query param'),
    ),
    Case(
        "override of no uuid",
        "PUT",
        "/usage-limits/overrides/x",
        400,
        "Invalid chat usage limit user ID.",
        "invalid UUID length: 1",
        body={},
        who="admin",
    ),
    Case(
        "override of nobody",
        "PUT",
        f"/usage-limits/overrides/{UNKNOWN}",
        404,
        "User not found.",
        body={"spend_limit_micros": 1},
        who="admin",
    ),
    Case("no override", "DELETE", f"/usage-limits/overrides/{UNKNOWN}", 400, "User not found.", who="admin"),
]

# Below a chat with the messages 3 (user) and 4 (assistant).
REFUSALS_OF_A_CHAT = [
    Case("after_id", "GET", "/stream?after_id=x", 400, "Invalid after_id parameter."),
    Case("message id", "PATCH", "/messages/0", 400, "Invalid chat message ID.", body={}),
    Case("an assistant's", "PATCH", "/messages/4", 400, "Only user messages can be edited.", body={"content": HELLO}),
    Case("a hidden one", "PATCH", "/messages/1", 404, "Chat message not found.", body={"content": HELLO}),
    Case("queue id", "DELETE", "/queue/x", 400, "Invalid queued message ID."),
    Case("promote nothing", "POST", "/queue/9/promote", 500, "Failed to promote queued message."),
    Case("git-changes does not exist", "GET", "/git-changes", 404, "Route not found."),
    Case("no workspace", "GET", "/stream/git", 400, "Chat has no workspace to watch."),
    Case("limit 0", "GET", "/messages?limit=0", 400, "Invalid limit parameter (1-200)."),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
async def test_refusals(client: Client, case: Case) -> None:
    given = await client.call(case.method, case.path, case.body, who=case.who)
    assert (given.status, given.json) == (case.status, case.answer)
    assert given.text.endswith("}\n")


@pytest.mark.parametrize("case", REFUSALS_OF_A_CHAT, ids=lambda case: case.name)
async def test_refusals_of_a_chat(client: Client, case: Case) -> None:
    chat = await idle_chat(client)
    given = await client.call(case.method, f"/{chat}{case.path}", case.body)
    assert (given.status, given.json["message"]) == (case.status, case.message)


async def test_paths_are_forgiving_and_methods_are_not(client: Client) -> None:
    chat = await idle_chat(client)
    assert (await client.call("GET", "/")).status == 200
    assert (await client.call("GET", f"//{chat}//messages")).status == 200
    assert (await client.call("GET", f"/{str(chat).upper()}")).status == 200
    refused = await client.call("DELETE", f"/{chat}")
    assert (refused.status, refused.text, refused.headers["Allow"]) == (405, "", "GET, PATCH")
    no_upgrade = await client.call("GET", f"/{chat}/stream")
    assert no_upgrade.status == 426
    assert no_upgrade.text.splitlines()[1].startswith('{"message":"Failed to open chat stream.","detail":')


async def test_every_answer_has_the_servers_headers(client: Client) -> None:
    answer = await client.call("GET", "/nope")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Coder-Build-Version"]
    assert answer.headers["X-Coder-Request-Id"]


async def test_rate_limits_are_per_path(start: Start) -> None:
    client = await start(rate_limit=2, speed=1.0)
    first = await client.call("GET", "/models")
    assert (first.headers["X-RateLimit-Limit"], first.headers["X-RateLimit-Remaining"]) == ("2", "1")
    await client.call("GET", "/models")
    refused = await client.call("GET", "/models")
    assert (refused.status, refused.headers["Retry-After"]) == (429, "60")
    assert refused.json == {"message": "You've been rate limited for sending more than 2 requests in 1m0s."}
    assert (await client.call("GET", "/model-configs")).status == 200
    assert (await client.call("GET", "/models", who="bob")).status == 200


async def test_own_chats_only_but_the_owner_role_reads_by_id(client: Client) -> None:
    chat = await idle_chat(client)
    assert (await client.call("GET", f"/{chat}", who="bob")).status == 404
    assert (await client.call("GET", f"/{chat}", who="admin")).status == 200
    assert (await client.call("GET", "", who="admin")).json == []
    posted = await client.call(
        "POST", f"/{chat}/messages", {"content": [{"type": "text", "text": "[text n=1] x"}]}, who="admin"
    )
    assert posted.json["message"]["created_by"] == str(client.simulator.users["admin"].id)


async def test_a_title_is_taken_and_ignored_and_the_generated_one_comes_by_watch(client: Client) -> None:
    async with client.watch() as seen:
        chat = await idle_chat(client, "[text n=50 ms=10] write a poem")
        await seen.until(lambda s: len(s.events) == 3)
    assert (await client.call("PATCH", f"/{chat}", {"title": "mine"})).status == 204
    assert (await client.call("PATCH", f"/{chat}", {"archived": None})).status == 204
    assert (await client.call("GET", f"/{chat}")).json["title"] == "Write a poem"
    assert [event["kind"] for event in seen.events] == ["created", "title_change", "status_change"]
    told = seen.events[1]["chat"]
    assert (told["status"], told["title"]) == ("running", "Write a poem")
    assert (told["last_model_config_id"], told["mcp_server_ids"]) == ("00000000-0000-0000-0000-000000000000", None)


async def test_watch_pings_first_and_tells_the_owner_alone(client: Client) -> None:
    async with client.watch("bob") as bobs, client.watch("admin") as admins, client.watch() as seen:
        assert seen.frames == ['{"type":"ping","data":null}\n']
        chat = await idle_chat(client)
        await client.call("PATCH", f"/{chat}", {"archived": True}, who="admin")
        await client.call("PATCH", f"/{chat}", {"archived": False}, who="admin")
        await seen.until(lambda s: len(s.events) >= 5)
    assert [event["kind"] for event in seen.events if event["kind"] != "title_change"] == [
        "created", "status_change", "deleted", "created",
    ]  # fmt: skip
    assert not any(event["chat"]["status"] == "running" for event in seen.events if event["kind"] != "title_change")
    assert not any(event["chat"]["archived"] for event in seen.events)
    assert bobs.events == admins.events == []


async def test_archiving_takes_sub_agents_along_and_unarchiving_does_not(client: Client) -> None:
    chat = await idle_chat(client, "[agent n=1] delegate")
    children = [c["id"] for c in (await client.call("GET", "")).json if c.get("parent_chat_id") == str(chat)]
    assert len(children) == 1
    await client.call("PATCH", f"/{chat}", {"archived": True})
    assert (await client.call("PATCH", f"/{chat}", {"archived": True})).json == {"message": "Chat is already archived."}
    assert len((await client.call("GET", "?q=archived:true")).json) == 2
    await client.call("PATCH", f"/{chat}", {"archived": False})
    assert [c["id"] for c in (await client.call("GET", "?q=archived:t")).json] == children


async def test_an_archived_chat_goes_on(client: Client) -> None:
    chat = await idle_chat(client)
    await client.call("PATCH", f"/{chat}", {"archived": True})
    await client.owner().send(chat, "[text n=1] more")
    await client.owner().wait_idle(chat)
    assert len(await client.owner().messages(chat)) == 4


async def test_messages_are_paged_newest_first_and_the_queue_comes_with_the_first_page(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=100000 ms=50] busy")
    await owner.wait_parts(chat, 1)
    await owner.send(chat, "later")
    first = (await client.call("GET", f"/{chat}/messages?limit=1&after_id=99")).json
    assert list(first) == ["messages", "queued_messages", "has_more"]
    assert (len(first["messages"]), len(first["queued_messages"]), first["has_more"]) == (1, 1, False)
    second = (await client.call("GET", f"/{chat}/messages?before_id={first['messages'][0]['id']}")).json
    assert second == {"messages": [], "queued_messages": [], "has_more": False}


async def test_the_21st_prompt_is_refused(client: Client) -> None:
    owner = client.owner()
    chat = await owner.create("[text n=100000 ms=50] busy")
    for _ in range(20):
        await owner.send(chat, "later")
    refused = await client.call("POST", f"/{chat}/messages", {"content": [{"type": "text", "text": "x"}]})
    assert (refused.status, refused.json["detail"]) == (429, "Maximum 20 messages can be queued.")


async def test_the_list_pages_by_the_cursors_current_place(client: Client) -> None:
    chats = [str(await idle_chat(client)) for _ in range(4)][::-1]
    page = (await client.call("GET", "?limit=2")).json
    assert [chat["id"] for chat in page] == chats[:2]
    assert list(page[0]["diff_status"])[:3] == ["chat_id", "pull_request_title", "pull_request_draft"]
    assert [c["id"] for c in (await client.call("GET", f"?limit=2&after_id={chats[1]}")).json] == chats[2:]
    assert [c["id"] for c in (await client.call("GET", "?limit=2&offset=3")).json] == chats[3:]
    assert (await client.call("GET", f"?after_id={UNKNOWN}")).json == []
    assert len((await client.call("GET", "?limit=0")).json) == 4


async def test_users_and_build(client: Client) -> None:
    me = (await client.call("GET", "/users/me", base="/api/v2")).json
    assert me["id"] == str(client.simulator.users["ann"].id)
    assert (await client.call("GET", "/users/bob", base="/api/v2")).status == 404
    by_admin = await client.call("GET", f"/users/{client.simulator.users['bob'].id}", base="/api/v2", who="admin")
    assert by_admin.json["username"] == "bob"
    build = await client.call("GET", "/buildinfo", base="/api/v2", who="")
    assert build.json["version"] == "v0.0.0-devel"


async def test_the_same_seed_gives_the_same_ids_and_tokens(start: Start) -> None:
    first, second, other = await start(seed=1), await start(seed=1), await start(seed=2)
    assert first.simulator.users == second.simulator.users
    assert first.simulator.users["ann"].token != other.simulator.users["ann"].token
    assert await idle_chat(first) == await idle_chat(second)
    assert first.simulator.users["ann"].token not in repr(first.simulator.users)


def priced(input_: str | None, output: str | None, read: str | None, write: str | None) -> ModelConfig:
    prices = [None if price is None else Decimal(price) for price in (input_, output, read, write)]
    return ModelConfig(
        UUID(int=1), input_price=prices[0], output_price=prices[1], cache_read_price=prices[2],
        cache_write_price=prices[3],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("usage", "config", "micros"),
    [
        pytest.param(Usage(input_tokens=1000), priced("3", None, None, None), 3000, id="plain"),
        pytest.param(Usage(input_tokens=1), priced("0.01", None, None, None), 1, id="rounded up"),
        pytest.param(
            Usage(input_tokens=101, output_tokens=201, cache_read_tokens=1005, cache_creation_tokens=33),
            priced("1.23", "4.56", "0.7", "7.89"), 2005, id="rounded once, over the sum",
        ),
        pytest.param(
            Usage(output_tokens=500, reasoning_tokens=200), priced(None, "15", None, None), 7500,
            id="reasoning is part of the output",
        ),
        pytest.param(Usage(output_tokens=5), priced("3", None, None, None), None, id="no category has a price"),
        pytest.param(Usage(input_tokens=5), priced("0", None, None, None), None, id="a cost of zero is unpriced"),
        pytest.param(None, priced("3", "15", None, None), None, id="no usage"),
    ],
)  # fmt: skip
def test_cost(usage: Usage | None, config: ModelConfig, micros: int | None) -> None:
    assert spend.cost_micros(usage, config) == micros


@pytest.mark.parametrize(
    ("period", "now", "start", "end"),
    [
        pytest.param("day", "2026-03-01T01:30+05:00", "2026-02-28", "2026-03-01", id="UTC, not the caller's zone"),
        pytest.param("week", "2026-03-01T23:59Z", "2026-02-23", "2026-03-02", id="Sunday ends its week"),
        pytest.param("month", "2028-02-29T12:00Z", "2028-02-01", "2028-03-01", id="leap day"),
        pytest.param("month", "2026-12-31T23:59Z", "2026-12-01", "2027-01-01", id="end of the year"),
    ],
)
def test_period_bounds(period: str, now: str, start: str, end: str) -> None:
    bounds = spend.period_bounds(period, datetime.fromisoformat(now))
    assert [day.date().isoformat() for day in bounds] == [start, end]


async def test_spending_up_to_the_limit_blocks_new_prompts_until_the_period_ends(start: Start) -> None:
    clock = [datetime(2026, 3, 20, 12, tzinfo=UTC)]
    client = await start(now=lambda: clock[0])
    owner, me = client.owner(), client.simulator.users["ann"].id
    chat = await idle_chat(client)  # 3 words: 1003 in, 37 out, 200 read from cache
    cost = 1003 * 3 + 37 * 15 + 60
    await client.call("PUT", "/usage-limits", {"spend_limit_micros": 10**6, "period": "day"}, who="admin")
    await client.call("PUT", f"/usage-limits/overrides/{me}", {"spend_limit_micros": cost + 1}, who="admin")
    await owner.send(chat, "[text n=3 ms=1] one more")
    await owner.wait_idle(chat)
    refused = await client.call("POST", f"/{chat}/messages", {"content": [{"type": "text", "text": "x"}]})
    assert (refused.status, refused.json) == (
        409,
        {
            "message": "Chat usage limit exceeded.",
            "spent_micros": 2 * cost,
            "limit_micros": cost + 1,
            "resets_at": "2026-03-21T00:00:00Z",
        },
    )
    status = (await client.call("GET", "/usage-limits/status")).json
    assert (status["is_limited"], status["current_spend"]) == (True, 2 * cost)
    assert (await client.call("GET", "/usage-limits/status", who="bob")).json["spend_limit_micros"] == 10**6
    summary = (await client.call("GET", "/cost/me/summary")).json
    assert (summary["total_cost_micros"], summary["priced_message_count"]) == (2 * cost, 2)
    assert summary["usage_limit"] == status
    assert summary["by_chat"][0]["root_chat_id"] == str(chat)
    users = (await client.call("GET", "/cost/users", who="admin")).json
    assert [(u["username"], u["chat_count"]) for u in users["users"]] == [("ann", 1)]
    clock[0] = datetime(2026, 3, 21, tzinfo=UTC)
    await owner.send(chat, "[text n=1] a new day")


async def test_files(client: Client) -> None:
    headers = {"Coder-Session-Token": client.simulator.users["ann"].token}
    url = client.simulator.url + "/api/experimental/chats/files"
    png = b"\x89PNG\r\n\x1a\n" + b"0" * 20
    query = f"?organization={client.simulator.organization_id}"
    upload = headers | {"Content-Type": "image/png", "Content-Disposition": 'attachment; filename="dot.png"'}
    async with client.session.post(url + query, data=png, headers=upload) as response:
        file_id = (await response.json())["id"]
    async with client.session.get(f"{url}/{file_id}", headers=headers) as response:
        assert await response.read() == png
        assert response.headers["Content-Disposition"] == "inline; filename=dot.png"
    assert (await client.call("GET", f"/files/{file_id}", who="bob")).status == 404
    model = str(client.simulator.model_configs[0].id)
    made = await client.call("POST", "", {"content": [{"type": "file", "file_id": file_id}], "model_config_id": model})
    assert made.json["title"] == "New Chat"
