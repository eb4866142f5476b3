"""One HTTP call as the handlers see it, refusals as values, and the parsers of queries and bodies with Go's texts."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeAlias
from uuid import UUID

from aiohttp import web

from relay.simulator.state import Chat, User
from relay.simulator.wire import JsonObject, go_json, go_text, parse_int, parse_uuid

NOT_FOUND = "Resource not found or you do not have access to this resource"
FORBIDDEN_DETAIL = (
    "You don't have permission to view this content. If you believe this is a mistake, please contact your "
    "administrator or try signing in with different credentials."
)


class Refused(Exception):
    """The server answers with an error; the body is in `body`, as the server would write it."""

    def __init__(
        self,
        status: int,
        message: str,
        detail: str = "",
        *,
        validations: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: JsonObject | None = None,
    ) -> None:
        super().__init__(f"{status} {message}")
        self.status = status
        self.headers = dict(headers or {})
        self.body = body or {"message": message}
        if detail:
            self.body["detail"] = detail
        if validations:
            self.body["validations"] = [{"field": name, "detail": text} for name, text in validations]


def not_found() -> Refused:
    return Refused(404, NOT_FOUND)


def forbidden() -> Refused:
    return Refused(403, "Forbidden.", FORBIDDEN_DETAIL)


@dataclass
class Call:
    """A call that passed authentication. `names` holds the path's variable segments in order."""

    request: web.Request
    user: User
    names: list[str] = field(default_factory=list)
    _chat: Chat | None = None

    @property
    def chat(self) -> Chat:
        """The chat of the path; only handlers below `/{chat}` may ask."""
        if self._chat is None:
            raise LookupError("this path names no chat")
        return self._chat

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    def need_owner(self) -> None:
        """
        Raises:
            Refused: 403, the caller has not the owner role.
        """
        if not self.user.is_owner:
            raise forbidden()

    async def body(self) -> "Body":
        """The first JSON value of the request's body.

        Raises:
            Refused: 400, with a decoder's text.
        """
        raw = await self.request.read()
        text = raw.decode("utf-8", errors="replace").lstrip(" \t\r\n")
        if not text:
            raise _bad_body("EOF")
        try:
            value, _ = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError as exc:
            rest = exc.doc[exc.pos : exc.pos + 1]
            what = f"invalid character {rest!r} looking for beginning of value" if rest else "unexpected EOF"
            raise _bad_body(what) from exc
        except RecursionError as exc:
            raise _bad_body("json: exceeded max depth") from exc
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise _bad_body(f"json: cannot unmarshal {_kind(value)} into Go value")
        return Body({key.lower(): item for key, item in value.items()})


def _bad_body(detail: str) -> Refused:
    return Refused(400, "Request body must be valid JSON.", detail)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


Handler: TypeAlias = Callable[[Call], Awaitable[web.StreamResponse]]


class Body:
    """A decoded request object. Keys match in any case; `null` is as good as absent."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def _of(self, name: str, wanted: type | tuple[type, ...], go_type: str) -> Any:
        value = self._values.get(name)
        if value is None:
            return None
        if (isinstance(value, bool) and wanted is not bool) or not isinstance(value, wanted):
            raise _bad_body(f"json: cannot unmarshal {_kind(value)} into Go struct field .{name} of type {go_type}")
        return value

    def text(self, name: str) -> str:
        return go_text(self._of(name, str, "string") or "")

    def integer(self, name: str) -> int | None:
        value: int | None = self._of(name, int, "int64")
        return value

    def flag(self, name: str) -> bool | None:
        value: bool | None = self._of(name, bool, "bool")
        return value

    def objects(self, name: str) -> list["Body"]:
        values = self._of(name, list, "slice") or []
        if not all(isinstance(value, dict) for value in values):
            raise _bad_body(f"json: cannot unmarshal into Go struct field .{name}")
        return [Body({key.lower(): item for key, item in value.items()}) for value in values]

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts; absent is empty."""
        values = self._of(name, dict, "map[string]string") or {}
        if not all(isinstance(value, str) for value in values.values()):
            raise _bad_body(f"json: cannot unmarshal into Go struct field .{name} of type string")
        return {go_text(key): go_text(value) for key, value in values.items()}

    def value(self, name: str) -> Any:
        """Decoded JSON of any kind; None is absent or null."""
        return self._values.get(name)

    def uuid(self, name: str) -> UUID | None:
        value = self._of(name, str, "uuid.UUID")
        return None if value is None else self._uuid(value)

    def uuids(self, name: str) -> list[UUID] | None:
        values = self._of(name, list, "slice")
        return None if values is None else [self._uuid(str(value)) for value in values]

    @staticmethod
    def _uuid(text: str) -> UUID:
        try:
            return parse_uuid(text)
        except ValueError as exc:
            raise _bad_body(str(exc)) from exc


class QueryReader:
    """Reads query parameters and collects what is wrong with them, as the server does, before it refuses."""

    def __init__(self, query: Mapping[str, str]) -> None:
        self._query = query
        self.errors: list[tuple[str, str]] = []

    def natural(self, name: str, bits: int) -> int:
        """A number from 0; absent or empty is 0."""
        text = self._query.get(name, "")
        if not text:
            return 0
        what = f'Query param "{name}" must be a valid {bits}-bit positive integer: '
        try:
            value = parse_int(text, bits)
        except ValueError as exc:
            self.errors.append((name, what + str(exc)))
            return 0
        if value < 0:
            self.errors.append((name, what + "value is negative"))
            return 0
        return value

    def uuid(self, name: str) -> UUID | None:
        text = self._query.get(name, "")
        if not text:
            return None
        try:
            return parse_uuid(text)
        except ValueError:
            self.errors.append((name, f'Query param "{name}" must be a valid uuid'))
            return None

    def refuse_errors(self) -> None:
        if self.errors:
            raise Refused(400, "Query parameters have invalid values.", validations=self.errors)


def answer_json(value: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=(go_json(value) + "\n").encode("utf-8", errors="replace"),
        headers={"Content-Type": "application/json; charset=utf-8"},
    )


def no_content() -> web.Response:
    return web.Response(status=HTTPStatus.NO_CONTENT)
