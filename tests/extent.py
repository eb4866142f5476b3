"""How much of what takes long is done: little in each run of the suite, all of it with RELAY_TEST_LONG."""

import os

LONG = bool(os.environ.get("RELAY_TEST_LONG"))


def as_many(*, quick: int, long: int) -> int:
    """Of examples, rounds, chats."""
    return long if LONG else quick
