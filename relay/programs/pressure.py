"""What the followers of one process share: memory for frames that wait, time to work them off, and how many previews
may go out."""

from prometheus_client import Gauge

from relay.ports import Clock

WAITING = Gauge(
    "relay_frames_waiting_characters",
    "Characters of frames that were read from sockets and wait to be worked off. Near the limit: the broker or the "
    "database is slower than Coder, and sockets are not read.",
)

_LEAST_AT_ONCE = 32
_BURST_SECONDS = 1.0  # so much of the allowance may be saved up


class Pressure:
    """Limits over all followers.

    Args:
        characters: Of frames that may wait. Beyond it each follower reads more when all it has read is taken.
        previews_per_second: Of previews, after they were joined.
        frames_at_once: That one follower may work off before the others have their turn.
        frames_in_turn: That all who have some work off, about, until the first has its next turn: in half a
            second, so that the lease is renewed and confirms are read, whoever talks.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        characters: int,
        previews_per_second: float,
        frames_at_once: int = 256,
        frames_in_turn: int = 12_800,
    ) -> None:
        self._clock = clock
        self._characters = characters
        self._waiting = 0
        self._chats = 0  # whose frames wait
        self._at_once = frames_at_once
        self._in_turn = frames_in_turn
        self._rate = previews_per_second
        self._most = max(1.0, previews_per_second * _BURST_SECONDS)
        self._allowance = self._most
        self._counted_at = clock.monotonic()

    @property
    def room(self) -> bool:
        """Whether more frames may wait."""
        return self._waiting < self._characters

    @property
    def share(self) -> int:
        """How many frames a follower may work off now: many, since what is done once for them costs as much as
        several, but fewer where many followers have some."""
        fair = max(_LEAST_AT_ONCE, self._in_turn // max(1, self._chats))
        return min(self._at_once, fair)

    def wait(self, characters: int, chats: int) -> None:
        """Frames of so many characters more wait, and of so many chats that had none; negative: they were taken."""
        self._waiting += characters
        self._chats += chats
        WAITING.set(self._waiting)

    def previews(self, wanted: int) -> int:
        """How many of the previews that stand ready may go out now. They are taken from the allowance."""
        now = self._clock.monotonic()
        self._allowance = min(self._most, self._allowance + (now - self._counted_at) * self._rate)
        self._counted_at = now
        granted = min(wanted, int(self._allowance))
        self._allowance -= granted
        return granted
