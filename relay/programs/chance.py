"""Chance, which the core takes as an argument."""

import random
from collections.abc import Iterator


class Chance:
    """Random numbers in [0, 1) for delays."""

    def __iter__(self) -> Iterator[float]:
        return self

    def __next__(self) -> float:
        return random.random()  # noqa: S311  # spreads reconnects; nothing secret hangs on it
