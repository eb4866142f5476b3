"""One error class per reaction. An adapter translates its library's errors at the edge; a program catches the
class and does what the class says."""


class RelayError(Exception):
    """Base class. Never raised itself."""


class Unavailable(RelayError):
    """Upstream, broker, database or object store did not answer. React: wait, then the same again.

    `retry_after_seconds` is what the other side asked for (HTTP `Retry-After`), None when it said nothing.
    """

    def __init__(self, what: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(what)
        self.retry_after_seconds = retry_after_seconds


class StreamEnded(Unavailable):
    """A stream ended, as streams do. React: as `Unavailable`, and count why.

    `reason` is one of `server_close`, `ping_timeout`, `network_error`, `protocol_error`, `too_slow`.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what)
        self.reason = reason


class Unroutable(Unavailable):
    """The broker has no queue for a durable event. React: as `Unavailable`, and loudly: somebody removed a binding.

    It is `Unavailable` because the event is not lost: nothing is saved, and the same event goes out again
    once a queue is bound.
    """


class ChatRefused(RelayError):
    """Upstream answered 4xx for one chat. React: set this chat aside, keep the others."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(what)
        self.status = status


class ChatGone(RelayError):
    """The chat does not exist (any more) or is not ours to read: 404. React: say so once, forget the chat."""


class LostClaim(RelayError):
    """Another worker follows this chat now. React: stop following at once, save nothing."""


class BadFrame(RelayError):
    """Upstream sent what we cannot read. React: count it, keep the raw frame, reconnect.

    `reason` is one of `bad_json`, `schema`, `too_large`; `raw` the frame as received (empty for `too_large`).
    """

    def __init__(self, what: str, reason: str, raw: str = "") -> None:
        super().__init__(what)
        self.reason = reason
        self.raw = raw


class BadEvent(RelayError):
    """A message in one of our own queues cannot be understood. React: dead-letter it, go on with the next."""


class Unauthorized(RelayError):
    """Upstream does not accept the token: 401 or 403 on the account itself. React: stop this account, alarm."""


class CorruptState(RelayError):
    """Our own stored state is impossible. React: crash; going on could lose events."""


class WrongSettings(RelayError):
    """The user gave settings that cannot work. React: say which and what to do, exit with 2."""


class TooLarge(RelayError):
    """The broker's limit is below the size of one message. React: set this chat aside and tell; again is no use.

    It goes through once the limit is raised (`max_message_size` in rabbitmq.conf). `size` and `limit` in bytes.
    """

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(what)
        self.size = size
        self.limit = limit
