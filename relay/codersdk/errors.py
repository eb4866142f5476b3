"""Everything that can go wrong, as one family: catch `CoderError`, or the one you have an answer to."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.codersdk.models_limits import ChatUsageLimitExceededResponse
    from relay.codersdk.models_response import ValidationError
    from relay.codersdk.timestamp import Timestamp


class CoderError(Exception):
    """Base class. Never raised itself."""


class InvalidRequest(CoderError, ValueError):
    """The call cannot be made into a request; nothing was sent."""


class InvalidJSON(CoderError, ValueError):
    """A text is no JSON, or not JSON of the wanted type."""


class ConnectionFailed(CoderError):
    """No answer, or only a part of one: not reachable, timed out, cut off. Whether the server acted is not known."""


class InvalidAnswer(CoderError):
    """The server answered with something else than this API: another version, or something in the way."""

    def __init__(self, text: str, status_code: int | None = None) -> None:
        super().__init__(text)
        self.status_code = status_code


class StreamBroken(CoderError):
    """An open stream ended though the server did not say goodbye. Open it again.

    `code` and `reason` are those of the close frame; 1006 and nothing when there was none.
    """

    def __init__(self, text: str, code: int = 1006, reason: str = "") -> None:
        super().__init__(text)
        self.code = code
        self.reason = reason


class APIError(CoderError):
    """The server refused. Go: `codersdk.Error`.

    `message`, `detail` and `validations` are the server's words; `helper` is ours. `method` and `url` are empty when
    the body was (as in the Go SDK); the URL never holds a user or a password.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        detail: str = "",
        validations: "Sequence[ValidationError]" = (),
        method: str = "",
        url: str = "",
    ) -> None:
        self.status_code = status_code
        self.message = message
        self.detail = detail
        self.validations = tuple(validations)
        self.method = method
        self.url = url
        self.helper = "Try logging in using 'coder login'." if status_code == 401 else ""
        super().__init__(status_code, message)

    def __str__(self) -> str:
        """Go: `codersdk.Error.Error`."""
        request = f"{self.method} {self.url}: " if self.method and self.url else ""
        text = f"{request}unexpected status code {self.status_code}: {self.message}"
        if self.helper:
            text += f": {self.helper}"
        if self.detail:
            text += f"\n\tError: {self.detail}"
        return text + "".join(f"\n\t{each.field}: {each.detail}" for each in self.validations)

    def friendly(self) -> str:
        """For people who do not care about requests. Go: `codersdk.Error.Friendly`."""
        text = f"{self.message.removesuffix('.')}. {self.helper}"
        return text + "".join(f"\n- {each.field}: {each.detail}" for each in self.validations)


class Unauthorized(APIError):
    """401: the token is missing, wrong or expired."""


class Forbidden(APIError):
    """403: this user may not do this, or the deployment has the feature off."""


class NotFound(APIError):
    """404: no such thing, or this user may not know of it."""


class Conflict(APIError):
    """409: it contradicts what is there."""


class ChatUsageLimitExceeded(Conflict):
    """409 from creating a chat, sending or editing a message: the user's limit is used up.

    Go: the error that `codersdk.ChatUsageLimitExceededFrom` looks for. All of the answer is in `response`.
    """

    def __init__(self, response: "ChatUsageLimitExceededResponse", *, method: str = "", url: str = "") -> None:
        super().__init__(
            409, response.message, detail=response.detail, validations=response.validations, method=method, url=url
        )
        self.response = response

    @property
    def spent_micros(self) -> int:
        """Spent in the current period, in millionths of a US dollar."""
        return self.response.spent_micros

    @property
    def limit_micros(self) -> int:
        """What may be spent, in millionths of a US dollar."""
        return self.response.limit_micros

    @property
    def resets_at(self) -> "Timestamp":
        """When the next period begins."""
        return self.response.resets_at


class RateLimited(APIError):
    """429: too many requests, or a full queue of messages.

    `retry_after` are the seconds that the server asks to wait, None when it does not say (a full queue).
    """

    retry_after: float | None = None


class ServerError(APIError):
    """5xx: the server, or what stands before it, is in trouble."""


_BY_STATUS: dict[int, type[APIError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
}


def class_for(status_code: int) -> type[APIError]:
    """The class that stands for a status."""
    return _BY_STATUS.get(status_code) or (ServerError if 500 <= status_code <= 599 else APIError)


def chat_usage_limit_exceeded_from(error: BaseException | None) -> "ChatUsageLimitExceededResponse | None":
    """The answer that says how much is spent and when that ends, if the error or one of its causes carries it.

    Go: `codersdk.ChatUsageLimitExceededFrom`.
    """
    while error is not None:
        if isinstance(error, ChatUsageLimitExceeded):
            return error.response
        error = error.__cause__
    return None
