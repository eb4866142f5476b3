"""The chats API but for its administration: chats, messages, queue, archive, stream, watch."""

import asyncio
from datetime import datetime
from typing import Protocol
from uuid import UUID

from aiohttp import web

from relay.simulator import spend
from relay.simulator.calls import Body, Call, Handler, QueryReader, Refused, answer_json, no_content, not_found
from relay.simulator.content import read_content
from relay.simulator.dialect import Dialect
from relay.simulator.search import read_labels, read_search
from relay.simulator.state import Chat, Database, QueuedMessage
from relay.simulator.turns import (
    ChatActive,
    NoResultsAwaited,
    NotAllowed,
    NotARoot,
    NotAUserMessage,
    NothingQueued,
    NotInterruptible,
    ParentArchived,
    QueueFull,
    ResultMissing,
    ToolOutput,
    Turns,
    UnknownMessage,
    UnknownQueuedMessage,
    automatic_title,
    state_name,
    text_of,
)
from relay.simulator.wire import NIL_UUID, JsonObject, go_json, parse_int, parse_uuid

DEFAULT_PAGE = 50
LONGEST_PAGE = 200
ROWS_AT_ONCE = 100


class Sockets(Protocol):
    """What opens the two kinds of sockets; the server provides it."""

    async def serve_stream(
        self, request: web.Request, chat: Chat, after_id: int, after_revision: int | None = None
    ) -> web.StreamResponse: ...

    async def serve_watch(self, request: web.Request, user_id: UUID) -> web.StreamResponse: ...


class ChatsApi:
    """Handlers by route. A path segment in braces is a variable one; `{chat}` has been looked up before."""

    def __init__(self, database: Database, daemon: Turns, dialect: Dialect, sockets: Sockets) -> None:
        self._database = database
        self._daemon = daemon
        self._dialect = dialect
        self._sockets = sockets
        self._has = dialect.features
        self._kept: dict[UUID, tuple[object, str]] = {}  # rows of lists
        self.routes: list[tuple[str, str, Handler]] = [
            ("GET", "", self.list_chats),
            ("POST", "", self.create_chat),
            ("GET", "watch", self.watch),
            ("GET", "{chat}", self.get_chat),
            ("PATCH", "{chat}", self.patch_chat),
            ("GET", "{chat}/messages", self.list_messages),
            ("POST", "{chat}/messages", self.post_message),
            ("PATCH", "{chat}/messages/{id}", self.edit_message),
            ("GET", "{chat}/stream", self.stream),
            ("GET", "{chat}/stream/git", self.stream_git),
            ("GET", "{chat}/stream/desktop", self.stream_desktop),
            ("POST", "{chat}/interrupt", self.interrupt),
            ("GET", "{chat}/diff", self.diff),
            ("DELETE", "{chat}/queue/{id}", self.delete_queued),
            ("POST", "{chat}/queue/{id}/promote", self.promote_queued),
            *self._later_routes(),
        ]

    def _later_routes(self) -> list[tuple[str, str, Handler]]:
        """What the seed had not."""
        has = self._dialect.features
        routes: list[tuple[str, str, Handler]] = []
        if has.labels:
            routes.append(("GET", "by-workspace", self.by_workspace))
        if has.debug_runs:
            routes.append(("GET", "{chat}/debug/runs", self.debug_runs))
        if has.actions:
            routes.append(("POST", "{chat}/tool-results", self.submit_results))
        if has.sharing:
            routes += [
                ("GET", "{chat}/prompts", self.prompts),
                ("GET", "{chat}/acl", self.get_readers),
                ("PATCH", "{chat}/acl", self.patch_readers),
            ]
        if has.episodes:
            routes += [
                ("GET", "{chat}/stream/parts", self.stream_parts),
                ("POST", "{chat}/reconcile-invalid", self.reconcile_invalid),
            ]
        return routes

    # Chats

    async def list_chats(self, call: Call) -> web.StreamResponse:
        reader = QueryReader(call.query)
        after_id = reader.uuid("after_id")
        limit, offset = reader.natural("limit", 32), reader.natural("offset", 32)
        reader.refuse_errors()
        labels = read_labels(call.request.query.getall("label", [])) if self._has.labels else {}
        search = read_search(call.query.get("q", ""), self._has)
        chats = [c for c in self._database.chats.values() if self._stands_in_lists(c) and search.finds(c, call.user.id)]
        chats = [chat for chat in chats if labels.items() <= chat.labels.items()]
        chats.sort(key=_place, reverse=True)
        if after_id is not None:
            cursor = self._database.chats.get(after_id)
            chats = [chat for chat in chats if cursor and _place(chat) < _place(cursor)]
        page = chats[offset : offset + (limit or DEFAULT_PAGE)]
        rows = []
        for chat in page:
            rows.append(self._row(chat))
            if len(rows) % ROWS_AT_ONCE == 0:
                await asyncio.sleep(0)  # the list may be long, and others wait for their frames
        body = ("[" + ",".join(rows) + "]\n").encode("utf-8", errors="replace")
        return web.Response(body=body, headers={"Content-Type": "application/json; charset=utf-8"})

    def _row(self, chat: Chat) -> str:
        """The chat in a list, as text. That of one without sub-agents is kept: long lists are asked for again."""
        children = self._children(chat)
        if children:
            return go_json(self._dialect.chat(chat, children=children, in_list=True))
        state = (
            *(chat.title, chat.status, chat.last_error, chat.updated_at, chat.archived, chat.last_model_config_id),
            *(chat.read_up_to, len(chat.messages), chat.pin_order, len(chat.readers), tuple(chat.labels.items())),
            *(chat.last_turn_summary, chat.summary),
        )
        kept = self._kept.get(chat.id)
        if kept is None or kept[0] != state:
            kept = self._kept[chat.id] = (state, go_json(self._dialect.chat(chat, in_list=True)))
        return kept[1]

    def _stands_in_lists(self, chat: Chat) -> bool:
        """Where lists are trees, a sub-agent's chat stands below its root."""
        return chat.parent_id is None or not self._has.tree_list

    def _children(self, chat: Chat) -> list[Chat]:
        """Below a root: its sub-agents that are archived as it is, newest first."""
        children = [child for child in self._database.children(chat) if child.archived == chat.archived]
        return sorted(children, key=lambda child: (child.created_at, child.id), reverse=True)

    async def create_chat(self, call: Call) -> web.StreamResponse:
        body = await call.body()
        if self._has.organizations:
            self._check_organization(body)
        content, words = read_content(body, self._database, call.user)
        if body.uuid("workspace_id") is not None:
            raise Refused(400, "Workspace not found or you do not have access to this resource")
        model_id = self._model_for_new_chat(body, call)
        self._check_mcp_servers(body)
        self._check_limit(call.user.id)
        if model_id not in self._database.model_configs:
            raise Refused(
                400,
                "Invalid model config ID.",
                'insert chat: pq: insert or update on table "chats" violates foreign key constraint '
                '"chats_last_model_config_id_fkey"',
            )
        title = automatic_title(words)
        if "\0" in title:
            detail = 'insert chat: pq: invalid byte sequence for encoding "UTF8": 0x00'
            raise Refused(500, "Failed to create chat.", detail)
        chat = self._daemon.create_chat(
            call.user.id,
            title,
            content,
            model_id,
            dynamic_tools=tuple(tool.text("name") for tool in body.objects("unsafe_dynamic_tools")),
            labels=body.texts("labels"),
        )
        return answer_json(self._dialect.chat(chat), 201)

    async def get_chat(self, call: Call) -> web.StreamResponse:
        children = self._children(call.chat) if self._has.tree_list else []
        return answer_json(self._dialect.chat(call.chat, children=children))

    async def patch_chat(self, call: Call) -> web.StreamResponse:
        """The seed honours `archived` alone; a title is taken and ignored."""
        body = await call.body()
        if self._has.organizations and body.uuid("workspace_id") is not None:
            raise Refused(400, "Workspace not found or you do not have access to this resource")
        archived = body.flag("archived")
        if archived is not None:
            self._set_archived(call.chat, archived)
        if self._has.labels:
            if body.value("labels") is not None:
                call.chat.labels = body.texts("labels")
            pin_order = body.integer("pin_order")
            call.chat.pin_order = call.chat.pin_order if pin_order is None else pin_order
        read = body.flag("read") if self._has.unread_again else None
        if read is not None:
            (call.chat.mark_read if read else call.chat.mark_unread)()
        if self._has.titles_by_hand and body.text("title"):
            self._daemon.set_title(call.chat, body.text("title"))
        return no_content()

    def _set_archived(self, chat: Chat, archived: bool) -> None:
        """
        Raises:
            Refused: 400 or 409.
        """
        if archived == chat.archived:
            raise Refused(400, f"Chat is already {'' if archived else 'not '}archived.")
        try:
            self._daemon.set_archived(chat, archived)
        except ChatActive as exc:
            message = "Cannot archive an active chat. Interrupt or wait for the chat to finish first."
            detail = f"execute transaction: {_not_allowed('SetArchived', exc)}"
            raise Refused(409, message, detail) from exc
        except NotARoot as exc:
            raise Refused(400, "Chat archive state can only be changed on the root chat.") from exc
        except ParentArchived as exc:
            why = "Cannot unarchive a child chat while its parent is archived."
            raise Refused(400, f"{why} Unarchive the parent chat to cascade.") from exc

    async def interrupt(self, call: Call) -> web.StreamResponse:
        try:
            self._daemon.interrupt(call.chat)
        except NotInterruptible as exc:
            detail = _not_allowed("Interrupt", exc)
            raise Refused(409, "Chat is not in an interruptible state.", detail) from exc
        return answer_json(self._dialect.chat(call.chat))

    async def by_workspace(self, call: Call) -> web.StreamResponse:
        """No chat of the simulator has a workspace."""
        return answer_json({})

    async def debug_runs(self, call: Call) -> web.StreamResponse:
        return answer_json([])

    async def prompts(self, call: Call) -> web.StreamResponse:
        """The owner's prompts, newest first."""
        users = [message for message in reversed(call.chat.history()) if message.role == "user"]
        return answer_json({"prompts": [{"id": message.id, "text": text_of(message.content)} for message in users]})

    async def get_readers(self, call: Call) -> web.StreamResponse:
        readers = [user for user in self._database.users.values() if user.id in call.chat.readers]
        users = [{"id": str(user.id), "username": user.username, "role": "read"} for user in readers]
        return answer_json({"users": users, "groups": []})

    async def patch_readers(self, call: Call) -> web.StreamResponse:
        """An empty role takes the user's right away."""
        for text, role in (await call.body()).texts("user_roles").items():
            try:
                user_id = parse_uuid(text)
            except ValueError as exc:
                raise Refused(400, "Invalid user ID.", str(exc)) from exc
            (call.chat.readers.add if role else call.chat.readers.discard)(user_id)
        return no_content()

    async def reconcile_invalid(self, call: Call) -> web.StreamResponse:
        """No chat of the simulator is ever in an invalid state."""
        detail = _not_allowed("ReconcileInvalidState", NotAllowed(state_name(call.chat)))
        detail += ": reconcile is only valid for invalid states"
        raise Refused(409, "Chat is not in an invalid state.", detail)

    async def diff(self, call: Call) -> web.StreamResponse:
        return answer_json({"chat_id": str(call.chat.id)})

    # Messages and queue

    async def list_messages(self, call: Call) -> web.StreamResponse:
        """Newest first; after a message, where servers know that, oldest first."""
        reader = QueryReader(call.query)
        before_id = reader.natural("before_id", 64)
        after_id = reader.natural("after_id", 64) if self._has.ascending_pages else 0
        limit = reader.natural("limit", 32) if call.query.get("limit") else DEFAULT_PAGE
        reader.refuse_errors()
        if not 1 <= limit <= LONGEST_PAGE:
            raise Refused(400, "Invalid limit parameter (1-200).")
        if after_id and before_id and after_id >= before_id:
            raise Refused(400, "after_id must be less than before_id.")
        rows = [m for m in call.chat.history(after_id) if not before_id or m.id < before_id]
        if not after_id:
            rows.reverse()
        queue = [] if before_id or after_id else call.chat.queue
        answer: JsonObject = {
            "messages": [self._dialect.message(message) for message in rows[:limit]],
            "queued_messages": [self._dialect.queued_message(queued) for queued in queue],
            "has_more": len(rows) > limit,
        }
        if self._has.revisions:
            answer["history_version"] = call.chat.history_version
        return answer_json(answer)

    async def post_message(self, call: Call) -> web.StreamResponse:
        self._check_speaker(call, "send")
        body = await call.body()
        content, _ = read_content(body, self._database, call.user)
        if self._has.archive_is_closed and call.chat.archived:
            raise Refused(400, "Cannot send messages to an archived chat.")
        self._check_mcp_servers(body)
        self._check_limit(call.chat.owner_id)
        model_id = body.uuid("model_config_id")
        if model_id not in (None, NIL_UUID) and model_id not in self._database.model_configs:
            raise Refused(500, "Failed to create chat message.", "pq: violates foreign key constraint")
        known = {message.id for message in call.chat.messages}
        interrupting = self._has.labels and body.text("busy_behavior") == "interrupt"
        try:
            sent = self._daemon.send(call.chat, call.user.id, content, model_id, interrupting=interrupting)
        except QueueFull as exc:
            raise Refused(429, "Message queue is full.", "Maximum 20 messages can be queued.") from exc
        inserted = [self._dialect.message(message) for message in call.chat.history() if message.id not in known]
        answer: JsonObject
        if isinstance(sent, QueuedMessage):
            answer = {"queued_message": self._dialect.queued_message(sent), "queued": True}
            answer = ({"messages": inserted} if self._has.message_lists and inserted else {}) | answer
        else:
            answer = {"message": self._dialect.message(sent)}
            if self._has.message_lists:
                answer["messages"] = inserted
            answer["queued"] = False
        return answer_json(answer)

    async def edit_message(self, call: Call) -> web.StreamResponse:
        try:
            message_id = parse_int(call.names[0])
        except ValueError:
            message_id = 0
        if message_id <= 0:
            raise Refused(400, "Invalid chat message ID.", "Message ID must be a positive integer.")
        self._check_speaker(call, "edit")
        content, _ = read_content(await call.body(), self._database, call.user)
        self._check_limit(call.chat.owner_id)
        before = {message.id for message in call.chat.history()}
        try:
            message = self._daemon.edit(call.chat, call.user.id, message_id, content)
        except UnknownMessage as exc:
            raise Refused(404, "Chat message not found.", "Message does not belong to this chat.") from exc
        except NotAUserMessage as exc:
            raise Refused(400, "Only user messages can be edited.") from exc
        edited = self._dialect.message(message)
        if not self._has.wrapped_edits:
            return answer_json(edited)
        answer: JsonObject = {"message": edited}
        if self._has.message_lists:
            now = {row.id: row for row in call.chat.history()}
            answer["messages"] = [self._dialect.message(row) for row in now.values() if row.id not in before]
            answer["deleted_message_ids"] = sorted(before - now.keys())
        return answer_json(answer)

    async def delete_queued(self, call: Call) -> web.StreamResponse:
        try:
            self._daemon.delete_queued(call.chat, _queue_id(call))
        except NothingQueued as exc:
            detail = _not_allowed("DeleteQueuedMessage", exc)
            raise Refused(409, "Chat has no queued messages to delete.", detail) from exc
        return no_content()

    async def promote_queued(self, call: Call) -> web.StreamResponse:
        queue_id = _queue_id(call)
        try:
            message = self._daemon.promote(call.chat, call.user.id, queue_id)
        except NothingQueued as exc:
            detail = _not_allowed("PromoteQueuedMessage", exc)
            raise Refused(409, "Chat has no queued messages to promote.", detail) from exc
        except UnknownQueuedMessage as exc:
            which = f"queued message {queue_id} not found in chat {call.chat.id}"
            detail = which if self._has.accepted_promotes else "queued message not found"
            raise Refused(500, "Failed to promote queued message.", f"execute transaction: {detail}") from exc
        if message is None:
            return answer_json({"message": "Queued message promotion accepted."}, 202)
        return answer_json(self._dialect.message(message))

    async def submit_results(self, call: Call) -> web.StreamResponse:
        body = await call.body()
        results = [
            ToolOutput(result.text("tool_call_id"), result.value("output"), bool(result.flag("is_error")))
            for result in body.objects("results")
        ]
        if not results:
            raise Refused(400, "At least one tool result is required.")
        if call.chat.archived:
            raise Refused(400, "Cannot submit tool results to an archived chat.")
        try:
            self._daemon.submit_results(call.chat, call.user.id, results)
        except NoResultsAwaited as exc:
            detail = f'chat status is "{call.chat.status}", expected "requires_action"'
            raise Refused(409, "Chat is not waiting for tool results.", detail) from exc
        except ResultMissing as exc:
            detail = f"Missing result for tool call {go_json(exc.call_id)}."
            raise Refused(400, "Missing tool result.", detail) from exc
        return no_content()

    # Sockets

    async def stream(self, call: Call) -> web.StreamResponse:
        after_id = self._cursor(call, "after_id") or 0
        after_revision = self._cursor(call, "after_revision") if self._has.revisions else None
        _check_upgrade(call.request, "Failed to open chat stream.")
        if call.user.id != call.chat.owner_id and self._has.owner_speaks:
            return await self._sockets.serve_stream(call.request, call.chat, after_id, after_revision)
        call.chat.mark_read()
        try:
            return await self._sockets.serve_stream(call.request, call.chat, after_id, after_revision)
        finally:
            call.chat.mark_read()

    def _cursor(self, call: Call, name: str) -> int | None:
        if not call.query.get(name):
            return None
        try:
            return max(0, parse_int(call.query[name]))
        except ValueError as exc:
            raise Refused(400, f"Invalid {name} parameter.", str(exc)) from exc

    async def stream_parts(self, call: Call) -> web.StreamResponse:
        """The replicas of a server read parts from each other here; there is but one."""
        _check_upgrade(call.request, "Failed to open chat stream parts.")
        raise Refused(404, "Route not found.")

    async def watch(self, call: Call) -> web.StreamResponse:
        _check_upgrade(call.request, "Failed to open chat watch stream.")
        return await self._sockets.serve_watch(call.request, call.user.id)

    async def stream_git(self, call: Call) -> web.StreamResponse:
        raise Refused(400, "Chat has no workspace to watch.")

    async def stream_desktop(self, call: Call) -> web.StreamResponse:
        raise Refused(400, "Chat has no workspace.")

    # Checks

    def _check_organization(self, body: Body) -> None:
        organization_id = body.uuid("organization_id")
        if organization_id in (None, NIL_UUID):
            raise Refused(400, "organization_id is required.")
        if organization_id != self._database.organization_id:
            raise not_found()

    def _check_speaker(self, call: Call, deed: str) -> None:
        """
        Raises:
            Refused: 403, the caller may change the chat but not speak in it.
        """
        if self._has.owner_speaks and call.user.id != call.chat.owner_id:
            raise Refused(403, f"Only the chat owner may {deed} messages.")

    def _model_for_new_chat(self, body: Body, call: Call) -> UUID:
        model_id = body.uuid("model_config_id")
        if model_id == NIL_UUID:
            raise Refused(400, "Invalid model config ID.")
        if model_id is not None:
            return model_id
        if not call.user.is_owner:
            # The default is looked up with the caller's rights, and a plain member may not read it.
            raise Refused(500, "Failed to resolve chat model config.", "unauthorized: rbac: forbidden")
        default = self._database.default_model()
        if default is None:
            raise Refused(400, "No default chat model config is configured.")
        return default.id

    def _check_mcp_servers(self, body: Body) -> None:
        unknown = body.uuids("mcp_server_ids")
        if unknown:
            ids = ", ".join(map(str, unknown))
            raise Refused(400, "One or more MCP server IDs are invalid.", f"Invalid IDs: {ids}")

    def _check_limit(self, user_id: UUID) -> None:
        body = spend.exceeded(self._database, user_id)
        if body is not None:
            raise Refused(409, "Chat usage limit exceeded.", body=body)


def _place(chat: Chat) -> tuple[bool, int, datetime, UUID]:
    """Where the chat stands in lists: pinned ones first, then what changed last."""
    return chat.pin_order > 0, -chat.pin_order, chat.updated_at, chat.id


def _not_allowed(transition: str, refusal: NotAllowed) -> str:
    return f"execute transaction: chat state transition {transition} not allowed from state {refusal.state}"


def _queue_id(call: Call) -> int:
    try:
        return parse_int(call.names[0])
    except ValueError as exc:
        raise Refused(400, "Invalid queued message ID.", str(exc)) from exc


def _check_upgrade(request: web.Request, message: str) -> None:
    """A request that is no WebSocket handshake gets 426, one from a foreign page 403: the library's line, then ours."""
    upgrade = request.headers.get("Upgrade", "").lower()
    origin = request.headers.get("Origin", "")
    if upgrade != "websocket" or "upgrade" not in request.headers.get("Connection", "").lower():
        shown = request.headers.get("Connection", "")
        line = f"WebSocket protocol violation: Connection header {go_json(shown)} does not contain Upgrade"
        raise web.HTTPUpgradeRequired(text=_library_error(line, message), headers={"Upgrade": "websocket"})
    if origin and origin.split("://", 1)[-1].lower() != request.host.lower():
        line = f"request Origin {go_json(origin)} is not authorized for Host {go_json(request.host)}"
        raise web.HTTPForbidden(text=_library_error(line, message))


def _library_error(line: str, message: str) -> str:
    body: JsonObject = {"message": message, "detail": f"failed to accept WebSocket connection: {line}"}
    return f"{line}\n{go_json(body)}\n"


def parse_chat_id(text: str) -> UUID:
    """
    Raises:
        Refused: 400.
    """
    try:
        return parse_uuid(text)
    except ValueError as exc:
        raise Refused(400, f"Invalid UUID {go_json(text)}.", str(exc)) from exc
