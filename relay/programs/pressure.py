"""What the followers of one process share: memory for frames that wait, and how many previews may go out."""

from prometheus_client import Gauge

from relay.ports import Clock

WAITING = Gauge(
    "relay_frames_waiting_characters",
    "Characters of frames that were read from sockets and wait to be worked off. Near the limit: the broker or the "
    "database is slower than Coder, and sockets are not read.",
)

_BURST_SECONDS = 1.0  # so much of the allowance may be saved up


class Pressure:
    """Limits over all followers.

    Args:
        characters: Of frames that may wait. Beyond it each follower reads more when all it has read is taken.
        previews_per_second: Of previews, after they were joined.
    """

    def __init__(self, clock: Clock, *, characters: int, previews_per_second: float) -> None:
        self._clock = clock
        self._characters = characters
        self._waiting = 0
        self._rate = previews_per_second
        self._most = max(1.0, previews_per_second * _BURST_SECONDS)
        self._allowance = self._most
        self._counted_at = clock.monotonic()

    @property
    def room(self) -> bool:
        """Whether more frames may wait."""
        return self._waiting < self._characters

    def wait(self, characters: int) -> None:
        """A frame of so many characters waits; negative: was taken."""
        self._waiting += characters
        WAITING.set(self._waiting)

    def previews(self, wanted: int) -> int:
        """How many of the previews that stand ready may go out now. They are taken from the allowance."""
        now = self._clock.monotonic()
        self._allowance = min(self._most, self._allowance + (now - self._counted_at) * self._rate)
        self._counted_at = now
        granted = min(wanted, int(self._allowance))
        self._allowance -= granted
        return granted
