"""How fast something may be done that others have to bear."""


class Pace:
    """So many a second, and after a pause those of one second at once.

    Args:
        per_second: Above 0.
    """

    def __init__(self, per_second: float) -> None:
        self._interval = 1 / per_second
        self._burst = max(0.0, 1.0 - self._interval)
        self._next = float("-inf")  # when the next one would be due if they came evenly

    def wait(self, now: float) -> float:
        """Seconds until the next may be done; 0: now. `now`: seconds of a monotonic clock."""
        return max(0.0, self._next - self._burst - now)

    def take(self, now: float) -> None:
        """One is done."""
        self._next = max(self._next, now) + self._interval
