"""What the answers of a Coder server mean: the objects in them, or the error that a refusal stands for."""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from typing import cast
from urllib.parse import urlsplit
from uuid import UUID

from relay.core.errors import ChatGone, ChatRefused, RelayError, Unauthorized, Unavailable
from relay.core.events import JsonObject, parse_json
from relay.ports import Budget, ModelPrice

# The 403 of a server that has chats switched off says so; any other 403 below a chat is about that chat.
EXPERIMENT_OFF = "requires enabling the 'agents' experiment"
# The 404 of a path that the server does not know at all. The chat may well exist.
NO_ROUTE = "Route not found."
# The 404 of a chat that is not there, or not for this account.
NOT_FOUND = "Resource not found or you do not have access to this resource"
_LONGEST_WAIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, to a request or to a WebSocket handshake. `call` is method and path, without the query."""

    call: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def said(self) -> str | None:
        """Message and detail of a Coder error body; None when the body is not one, so that something else answered."""
        # Refused handshakes may have a line of the WebSocket library before the JSON.
        for text in (self.body, self.body.strip().rpartition(b"\n")[2]):
            try:
                error = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(error, dict) and isinstance(error.get("message"), str):
                detail = error.get("detail")
                said = f"{error['message']} ({detail})" if detail and isinstance(detail, str) else error["message"]
                return " ".join(said.split())[:300]
        return None


def refusal(answer: Answer, *, of_chat: bool, now: datetime) -> RelayError:
    """The error that an answer stands for which is not the expected one.

    Args:
        of_chat: The path names a chat, so that a 4xx may concern that chat alone.
        now: Against which a `Retry-After` that is a date is measured.
    """
    status, said = answer.status, answer.said
    text = f"{answer.call}: {status}" + (f": {said}" if said else "")
    if status < 300:
        kind = answer.headers.get("content-type", "untyped").partition(";")[0]
        return Unavailable(f"{text}: the answer is no JSON ({kind}); RELAY_CODER__URL must be a Coder server")
    if status < 400:
        return Unavailable(f"{text}: moved to {_origin(answer)}; RELAY_CODER__URL must be the server's access URL")
    if status == 401 or (status == 403 and (not of_chat or EXPERIMENT_OFF in (said or ""))):
        return Unauthorized(text)
    if status == 404 and of_chat and said and said != NO_ROUTE:
        return ChatGone(text)
    if status == 404:
        # A proxy or an upgraded server. A chat that is forgotten for this reason would be lost.
        return Unavailable(f"{text}: no Coder server with chats answers here, or it was upgraded to another API path")
    if status == 426:
        return Unavailable(f"{text}: a proxy before the server does not let WebSocket upgrades pass")
    if status in (407, 408, 425, 429) or status >= 500 or not of_chat:
        return Unavailable(text, retry_after_seconds(answer.headers.get("retry-after"), now))
    return ChatRefused(text, status)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks for, at most an hour; None when there is none that can be read."""
    if value is None:
        return None
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        seconds = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return min(max(seconds, 0.0), _LONGEST_WAIT_SECONDS)


def _origin(answer: Answer) -> str:
    # Only where to, not the whole URL: a login page's URL can carry secrets.
    try:
        url = urlsplit(answer.headers.get("location", ""))
        return f"{url.scheme}://{url.hostname}" + (f":{url.port}" if url.port else "") if url.hostname else "itself"
    except ValueError:
        return "an unreadable place"


# --- reading answers -----------------------------------------------------------------------------------------------


def decoded(answer: Answer, *, of_chat: bool, exact_fractions: bool = False) -> object:
    """The body of a 200; anything else is raised as the error it stands for.

    Args:
        of_chat: As in `refusal`.
        exact_fractions: Numbers with a fraction become Decimal, not float. Integers are exact always.
    """
    if answer.status == 200:
        with suppress(ValueError):
            text = answer.body.decode()
            return cast(object, json.loads(text, parse_float=Decimal)) if exact_fractions else parse_json(text)
    raise refusal(answer, of_chat=of_chat, now=datetime.now(UTC))


def as_object(answer: Answer, value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise Unavailable(f"{answer.call}: no JSON object where one was expected")
    return value


def as_objects(answer: Answer, value: object, *, null: bool = False) -> list[JsonObject]:
    """A list of objects; with `null`, null is an empty one (Go writes an empty slice as either)."""
    if null and value is None:
        return []
    if not isinstance(value, list):
        raise Unavailable(f"{answer.call}: no JSON list where one was expected")
    return [as_object(answer, row) for row in value]


def chat_rows(answer: Answer) -> list[JsonObject]:
    rows = as_objects(answer, decoded(answer, of_chat=False))
    if not all(isinstance(row.get("id"), str) for row in rows):
        raise Unavailable(f"{answer.call}: a chat without an id")
    return rows


def with_children(rows: Iterable[JsonObject]) -> list[JsonObject]:
    """Each chat, and after it its subagents' chats, as rows of their own, once each; the chat's own row stays whole.

    Servers since 2.33 list only roots, with the others below them in `children`, whatever state those are in.
    """
    found: dict[object, JsonObject] = {}
    waiting = list(rows)[::-1]
    while waiting:
        row = waiting.pop()
        if not isinstance(row.get("id"), str):
            continue  # a child of a shape that we do not know
        found.setdefault(row["id"], row)
        children = row.get("children")
        if isinstance(children, list):
            waiting += [child for child in reversed(children) if isinstance(child, dict)]
    return list(found.values())


def is_missing(answer: Answer) -> bool:
    """Whether Coder itself says that it has no such path. Removed ones fall into that of a chat, which wants a UUID."""
    said = answer.said or ""
    return (answer.status == 404 and said != "") or (answer.status == 400 and said.startswith("Invalid UUID"))


def message_id(answer: Answer, row: JsonObject) -> int:
    if type(row.get("id")) is not int or not isinstance(row.get("role"), str):
        raise Unavailable(f"{answer.call}: a message without an id or a role")
    return cast(int, row["id"])


def model_price(row: JsonObject) -> ModelPrice:
    # Prices stand under model_config.cost; old rows have them beside it, and count where cost has none.
    config = _object(row.get("model_config"))
    places = (_object(config.get("cost")), config, _object(row.get("cost")))

    def price(kind: str) -> Decimal | None:
        key = f"{kind}_price_per_million_tokens"
        return _decimal(next((place[key] for place in places if place.get(key) is not None), None))

    return ModelPrice(
        model=str(row["model"]),
        input=price("input"),
        output=price("output"),
        cache_read=price("cache_read"),
        cache_write=price("cache_write"),
    )


def user_budget(answer: Answer) -> Budget:
    """A user's AI Gateway budget from the answer to `ai/spend`."""
    body = as_object(answer, decoded(answer, of_chat=False))
    allowed = _object(body.get("effective_budget"))
    limit = allowed.get("spend_limit_micros")
    try:
        return Budget(
            user_id=UUID(str(body["user_id"])),
            spent_micros=_micros(body["current_spend_micros"]),
            limit_micros=None if limit is None else _micros(limit),
            source=str(allowed.get("limit_source") or ""),
            period_start=_moment(body["period_start"]),
            period_end=_moment(body["period_end"]),
        )
    except (KeyError, ValueError) as exc:
        raise Unavailable(f"{answer.call}: no budget: {exc}") from exc


def _micros(value: object) -> int:
    if type(value) is not int:
        raise ValueError("an amount that is no whole number of micros")
    return value


def _moment(value: object) -> datetime:
    moment = datetime.fromisoformat(str(value))
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    return moment.astimezone(UTC)


def _object(value: object) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _decimal(value: object) -> Decimal | None:
    if not isinstance(value, str | int | Decimal) or isinstance(value, bool):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 else None
