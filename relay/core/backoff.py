"""How long to wait before the next try."""

from collections.abc import Iterator


def backoff(
    *, chance: Iterator[float], first: float = 0.5, factor: float = 2.0, longest: float = 30.0
) -> Iterator[float]:
    """Delays in seconds, each drawn between nothing and its step, which grows to `longest`.

    Full jitter keeps a thousand followers that lost the same server from coming back in the same instant.

    Args:
        chance: Numbers in [0, 1); an endless iterator.

    >>> list(zip(range(4), backoff(chance=iter([0.0, 0.5, 0.999, 0.0]))))
    [(0, 0.0), (1, 0.5), (2, 1.998), (3, 0.0)]
    """
    step = first
    for draw in chance:
        yield step * draw
        step = min(step * factor, longest)
