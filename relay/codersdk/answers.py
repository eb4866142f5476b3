"""What an answer that is no success means."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from relay.codersdk.errors import (
    ChatUsageLimitExceeded,
    CoderError,
    InvalidAnswer,
    InvalidJSON,
    RateLimited,
    class_for,
)
from relay.codersdk.json_text import SPACE, as_text
from relay.codersdk.model import read_json
from relay.codersdk.models_limits import ChatUsageLimitExceededResponse
from relay.codersdk.models_response import Response
from relay.codersdk.urls import is_json, quoted

_SHOWN_TEXT_BYTES = 2048  # of a body that is no JSON
_SHOWN_JSON_BYTES = 1024  # of one that has no message


def refusal(
    status_code: int,
    content_type: str,
    body: bytes,
    *,
    method: str,
    url: str,
    may_be_limit: bool = False,
    retry_after: str | None = None,
) -> CoderError:
    """The error that an answer stands for. Go: `codersdk.ReadBodyAsError`, `codersdk.readBodyAsChatUsageLimitError`.

    Args:
        status_code, content_type, body: The answer.
        method, url: The request; the URL without user and password.
        may_be_limit: Whether the call is one of those that answer 409 when a usage limit is used up.
        retry_after: The header of that name.
    """
    if may_be_limit and status_code == 409 and is_json(content_type):
        try:
            limit = read_json(ChatUsageLimitExceededResponse, body, only_first=True)
        except InvalidJSON:
            pass  # then it is another conflict
        else:
            if limit.message and not limit.resets_at.is_zero():
                return ChatUsageLimitExceeded(limit, method=method, url=url)
    try:
        response = _response(status_code, content_type, body)
    except InvalidJSON as exc:
        error = InvalidAnswer(f"{method} {url}: decode body of status {status_code}: {exc}", status_code)
        error.__cause__ = exc
        return error
    if is_json(content_type) and not body.strip(SPACE.encode()) and not (may_be_limit and status_code == 409):
        method = url = ""  # as the Go SDK has it
    refused = class_for(status_code)(
        status_code,
        response.message,
        detail=response.detail,
        validations=response.validations,
        method=method,
        url=url,
    )
    if isinstance(refused, RateLimited):
        refused.retry_after = _seconds(retry_after)
    return refused


def _response(status_code: int, content_type: str, body: bytes) -> Response:
    if not is_json(content_type):
        shown = _cut(body, _SHOWN_TEXT_BYTES) or "no response body"
        return Response(message=f"unexpected non-JSON response {quoted(content_type)}", detail=shown)
    if not body.strip(SPACE.encode()):
        return Response(message="empty response body")
    response = read_json(Response, body, only_first=True)
    if not response.message:
        response.message = f"unexpected status code {status_code}, response has no message"
        response.detail = _cut(body, _SHOWN_JSON_BYTES)
    return response


def _cut(body: bytes, limit: int) -> str:
    return as_text(body[:limit]) + ("..." if len(body) > limit else "")


def _seconds(retry_after: str | None) -> float | None:
    if retry_after is None:
        return None
    if retry_after.strip().isascii() and retry_after.strip().isdigit():
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
