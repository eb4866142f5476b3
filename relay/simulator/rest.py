"""The chats API but for its administration: chats, messages, queue, archive, stream, watch."""

import re
from typing import Protocol
from uuid import UUID

from aiohttp import web

from relay.simulator import spend
from relay.simulator.calls import Body, Call, Handler, QueryReader, Refused, answer_json, no_content
from relay.simulator.daemon import (
    Daemon,
    NotAUserMessage,
    QueueFull,
    UnknownMessage,
    UnknownQueuedMessage,
    automatic_title,
)
from relay.simulator.dialect import Dialect
from relay.simulator.state import Chat, Database, Part, QueuedMessage
from relay.simulator.wire import NIL_UUID, JsonObject, go_json, parse_bool, parse_int, parse_uuid

DEFAULT_PAGE = 50
LONGEST_PAGE = 200


class Sockets(Protocol):
    """What opens the two kinds of sockets; the server provides it."""

    async def serve_stream(self, request: web.Request, chat: Chat, after_id: int) -> web.StreamResponse: ...

    async def serve_watch(self, request: web.Request, user_id: UUID) -> web.StreamResponse: ...


class ChatsApi:
    """Handlers by route. A path segment in braces is a variable one; `{chat}` has been looked up before."""

    def __init__(self, database: Database, daemon: Daemon, dialect: Dialect, sockets: Sockets) -> None:
        self._database = database
        self._daemon = daemon
        self._dialect = dialect
        self._sockets = sockets
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
        ]

    # Chats

    async def list_chats(self, call: Call) -> web.StreamResponse:
        reader = QueryReader(call.query)
        after_id = reader.uuid("after_id")
        limit, offset = reader.natural("limit", 32), reader.natural("offset", 32)
        reader.refuse_errors()
        archived = _archived_of(call.query.get("q", ""))
        chats = [c for c in self._database.chats.values() if c.owner_id == call.user.id and c.archived == archived]
        chats.sort(key=lambda chat: (chat.updated_at, chat.id), reverse=True)
        if after_id is not None:
            cursor = self._database.chats.get(after_id)
            chats = [c for c in chats if cursor and (c.updated_at, c.id) < (cursor.updated_at, cursor.id)]
        page = chats[offset : offset + (limit or DEFAULT_PAGE)]
        return answer_json([self._dialect.chat(chat, diff_status=True) for chat in page])

    async def create_chat(self, call: Call) -> web.StreamResponse:
        body = await call.body()
        content, words = self._content(body, call)
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
        chat = self._daemon.create_chat(call.user.id, title, content, model_id)
        return answer_json(self._dialect.chat(chat), 201)

    async def get_chat(self, call: Call) -> web.StreamResponse:
        return answer_json(self._dialect.chat(call.chat))

    async def patch_chat(self, call: Call) -> web.StreamResponse:
        """Only `archived` is honoured; a title is taken and ignored."""
        archived = (await call.body()).flag("archived")
        if archived is None:
            return no_content()
        if archived == call.chat.archived:
            raise Refused(400, f"Chat is already {'' if archived else 'not '}archived.")
        self._daemon.set_archived(call.chat, archived)
        return no_content()

    async def interrupt(self, call: Call) -> web.StreamResponse:
        self._daemon.interrupt(call.chat)
        return answer_json(self._dialect.chat(call.chat))

    async def diff(self, call: Call) -> web.StreamResponse:
        return answer_json({"chat_id": str(call.chat.id)})

    # Messages and queue

    async def list_messages(self, call: Call) -> web.StreamResponse:
        reader = QueryReader(call.query)
        before_id = reader.natural("before_id", 64)
        limit = reader.natural("limit", 32) if call.query.get("limit") else DEFAULT_PAGE
        reader.refuse_errors()
        if not 1 <= limit <= LONGEST_PAGE:
            raise Refused(400, "Invalid limit parameter (1-200).")
        rows = [m for m in reversed(call.chat.history()) if not before_id or m.id < before_id]
        queue = [] if before_id else call.chat.queue
        return answer_json(
            {
                "messages": [self._dialect.message(message) for message in rows[:limit]],
                "queued_messages": [self._dialect.queued_message(queued) for queued in queue],
                "has_more": len(rows) > limit,
            }
        )

    async def post_message(self, call: Call) -> web.StreamResponse:
        body = await call.body()
        content, _ = self._content(body, call)
        self._check_mcp_servers(body)
        self._check_limit(call.chat.owner_id)
        model_id = body.uuid("model_config_id")
        if model_id not in (None, NIL_UUID) and model_id not in self._database.model_configs:
            raise Refused(500, "Failed to create chat message.", "pq: violates foreign key constraint")
        try:
            sent = self._daemon.send(call.chat, call.user.id, content, model_id)
        except QueueFull as exc:
            raise Refused(429, "Message queue is full.", "Maximum 20 messages can be queued.") from exc
        if isinstance(sent, QueuedMessage):
            return answer_json({"queued_message": self._dialect.queued_message(sent), "queued": True})
        return answer_json({"message": self._dialect.message(sent), "queued": False})

    async def edit_message(self, call: Call) -> web.StreamResponse:
        try:
            message_id = parse_int(call.names[0])
        except ValueError:
            message_id = 0
        if message_id <= 0:
            raise Refused(400, "Invalid chat message ID.", "Message ID must be a positive integer.")
        content, _ = self._content(await call.body(), call)
        self._check_limit(call.chat.owner_id)
        try:
            message = self._daemon.edit(call.chat, call.user.id, message_id, content)
        except UnknownMessage as exc:
            raise Refused(404, "Chat message not found.", "Message does not belong to this chat.") from exc
        except NotAUserMessage as exc:
            raise Refused(400, "Only user messages can be edited.") from exc
        return answer_json(self._dialect.message(message))

    async def delete_queued(self, call: Call) -> web.StreamResponse:
        self._daemon.delete_queued(call.chat, _queue_id(call))
        return no_content()

    async def promote_queued(self, call: Call) -> web.StreamResponse:
        try:
            message = self._daemon.promote(call.chat, call.user.id, _queue_id(call))
        except UnknownQueuedMessage as exc:
            detail = "execute transaction: queued message not found"
            raise Refused(500, "Failed to promote queued message.", detail) from exc
        return answer_json(self._dialect.message(message))

    # Sockets

    async def stream(self, call: Call) -> web.StreamResponse:
        after_id = 0
        if call.query.get("after_id"):
            try:
                after_id = max(0, parse_int(call.query["after_id"]))
            except ValueError as exc:
                raise Refused(400, "Invalid after_id parameter.", str(exc)) from exc
        _check_upgrade(call.request, "Failed to open chat stream.")
        return await self._sockets.serve_stream(call.request, call.chat, after_id)

    async def watch(self, call: Call) -> web.StreamResponse:
        _check_upgrade(call.request, "Failed to open chat watch stream.")
        return await self._sockets.serve_watch(call.request, call.user.id)

    async def stream_git(self, call: Call) -> web.StreamResponse:
        raise Refused(400, "Chat has no workspace to watch.")

    async def stream_desktop(self, call: Call) -> web.StreamResponse:
        raise Refused(400, "Chat has no workspace.")

    # Checks

    def _content(self, body: Body, call: Call) -> tuple[tuple[Part, ...], list[str]]:
        """The message's parts, and the texts of which a title is made."""
        inputs = body.objects("content")
        if not inputs:
            raise Refused(400, "Content is required.", "Content cannot be empty.")
        parts: list[Part] = []
        words: list[str] = []
        for i, item in enumerate(inputs):
            kind = item.text("type")
            match kind.strip().lower():
                case "text":
                    text = item.text("text").strip()
                    if not text:
                        raise Refused(400, "Invalid input part.", f"content[{i}].text cannot be empty.")
                    parts.append(Part("text", text=text))
                    words.append(text)
                case "file":
                    parts.append(self._file_part(item, i, call))
                case "file-reference":
                    part = _reference_part(item, i)
                    parts.append(part)
                    words.append(f"[file-reference] {part.file_name}:{part.start_line}-{part.end_line} {part.content}")
                case _:
                    detail = f"content[{i}].type {go_json(kind)} is not supported."
                    raise Refused(400, "Invalid input part.", detail)
        return tuple(parts), words

    def _file_part(self, item: Body, i: int, call: Call) -> Part:
        file_id = item.uuid("file_id")
        if file_id is None or file_id == NIL_UUID:
            raise Refused(400, "Invalid input part.", f"content[{i}].file_id is required for file parts.")
        stored = self._database.files.get(file_id)
        if stored is None or not (stored.owner_id == call.user.id or call.user.is_owner):
            detail = f"content[{i}].file_id references a file that does not exist."
            raise Refused(400, "Invalid input part.", detail)
        return Part("file", media_type=stored.media_type, file_id=stored.id)

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


def _reference_part(item: Body, i: int) -> Part:
    name = item.text("file_name").strip()
    if not name:
        raise Refused(400, "Invalid input part.", f"content[{i}].file_name cannot be empty for file-reference.")
    return Part(
        "file-reference",
        file_name=name,
        start_line=item.integer("start_line") or 0,
        end_line=item.integer("end_line") or 0,
        content=item.text("content"),
    )


def _queue_id(call: Call) -> int:
    try:
        return parse_int(call.names[0])
    except ValueError as exc:
        raise Refused(400, "Invalid queued message ID.", str(exc)) from exc


def _archived_of(q: str) -> bool:
    """Whether the search asks for archived chats; the default is those that are not.

    Raises:
        Refused: 400 with one validation, as coderd/searchquery words it.
    """

    def bad(name: str, detail: str) -> Refused:
        return Refused(400, "Invalid chat search query.", validations=[(name, detail)])

    values: dict[str, list[str]] = {}
    loose: list[str] = []
    for token in re.findall(r'(?:[^\s"]|"[^"]*")+', q.lower()):
        if ":" not in re.sub(r'"[^"]*"', "", token):
            loose.append(token.strip('"'))
            continue
        if token.startswith(":") or token.endswith(":"):
            raise bad("q", f"Query element {go_json(token)} cannot start or end with ':'")
        pieces = re.findall(r'(?:[^:"]|"[^"]*")+', token)
        if len(pieces) != 2:
            raise bad("q", f"Query element {go_json(token)} can only contain 1 ':'")
        values.setdefault(pieces[0], []).append(pieces[1].strip('"'))
    if loose:
        raise bad("q", f"unsupported search term: {go_json(' '.join(loose))}")
    for name in values:
        if name != "archived":
            raise bad(name, f'"{name}" is not a valid query param')
    given = values.get("archived", ["false"])
    if len(given) > 1:
        detail = (
            f'Query param "archived" provided more than once, found {len(given)} times. '
            "Only provide 1 instance of this query param."
        )
        raise bad("archived", detail)
    try:
        return parse_bool(given[0])
    except ValueError as exc:
        raise bad("archived", f'Query param "archived" must be a valid boolean: {exc}') from exc


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
