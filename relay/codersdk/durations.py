"""Durations as Go writes them, for the stored lifetime of chat workspaces."""

import re

from relay.codersdk.json_text import without_surrogates

DEFAULT_CHAT_WORKSPACE_TTL = 0
"""Lifetime of chat workspaces in nanoseconds, 0: their template decides. Go: `codersdk.DefaultChatWorkspaceTTL`."""

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_GROUP = re.compile(r"([0-9]*)(\.[0-9]*)?([^0-9.]*)")
_LIMIT = 1 << 63


def parse_duration(text: str) -> int:
    """Nanoseconds of a Go duration such as `1h30m` or `-1.5s`, cut and not rounded. Go: `time.ParseDuration`.

    Raises:
        ValueError: The text is no Go duration, or does not fit into 64 bits.
    """
    sign, rest = (text[0], text[1:]) if text[:1] in {"+", "-"} else ("", text)
    if rest == "0":
        return 0
    if not rest:
        raise ValueError(f"invalid duration {text[:64]!r}")
    total = position = 0
    while position < len(rest):
        match = _GROUP.match(rest, position)
        assert match is not None  # noqa: S101  # each part of the pattern may be empty
        whole, fraction, unit = match.group(1), (match.group(2) or "")[1:], match.group(3)
        if not whole and not fraction:
            raise ValueError(f"invalid duration {text[:64]!r}")
        if not unit:
            raise ValueError(f"missing unit in duration {text[:64]!r}")
        if unit not in _UNITS:
            raise ValueError(f"unknown unit {without_surrogates(unit)[:16]!r} in duration {text[:64]!r}")
        total += _nanoseconds(whole, fraction, _UNITS[unit])
        if total > _LIMIT:
            raise ValueError(f"invalid duration {text[:64]!r}: it does not fit into 64 bits")
        position = match.end()
    if sign == "-":
        return -total
    if total == _LIMIT:
        raise ValueError(f"invalid duration {text[:64]!r}: it does not fit into 64 bits")
    return total


def _nanoseconds(whole: str, fraction: str, unit: int) -> int:
    whole = whole.lstrip("0")
    if len(whole) > 19 or int(whole or "0") > _LIMIT:
        return _LIMIT + 1
    numerator, scale = 0, 1.0
    for digit in fraction:
        # Go stops taking digits where the next one would overflow; later ones do not count.
        grown = numerator * 10 + int(digit)
        if numerator > (_LIMIT - 1) // 10 or grown > _LIMIT:
            break
        numerator, scale = grown, scale * 10
    # Through a float and cut, as Go does: the last nanosecond may differ from the exact value.
    return int(whole or "0") * unit + (int(float(numerator) * (float(unit) / scale)) if numerator else 0)


def parse_chat_workspace_ttl(text: str) -> int:
    """Nanoseconds of a stored lifetime; no text is the default. Go: `codersdk.ParseChatWorkspaceTTL`.

    Raises:
        ValueError: The text is no Go duration, or a negative one.
    """
    if not text:
        return DEFAULT_CHAT_WORKSPACE_TTL
    nanoseconds = parse_duration(text)
    if nanoseconds < 0:
        raise ValueError("duration must be non-negative")
    return nanoseconds
