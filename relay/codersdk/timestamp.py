"""A point in time as Go's `time.Time` carries it through JSON: nanoseconds and the offset are kept."""

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import total_ordering
from typing import Any, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

# As lenient as Go's time.Parse(time.RFC3339, …): one digit of an hour and a comma are let through.
_RFC3339 = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{1,2}):([0-9]{2}):([0-9]{2})"
    r"(?:[.,]([0-9]+))?(?:(Z)|([+-])([0-9]{2}):([0-9]{2}))"
)
_DAY = 86_400
_DAYS_OF_400_YEARS = 146_097
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@total_ordering
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Timestamp:
    """A point in time with nanoseconds and an offset. Go: `time.Time`.

    Two are equal when they are the same moment, whatever their offsets. `str` gives RFC 3339 with as many digits of the
    second as are needed.
    """

    unix_seconds: int  # since 1970-01-01T00:00:00Z, negative before
    nanosecond: int = 0  # 0…999_999_999, always counted forward
    offset_seconds: int = 0  # of the clock it was read from, east of UTC

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read RFC 3339; digits beyond the ninth of a fraction are cut off.

        Raises:
            ValueError: The text is no RFC 3339 time, or names a date or an hour that does not exist.
        """
        match = _RFC3339.fullmatch(text)
        if match is None:
            raise ValueError(f"not an RFC 3339 time: {text[:64]!r}")
        year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
        fraction, _, sign, offset_hours, offset_minutes = match.groups()[6:]
        if not (1 <= month <= 12 and 1 <= day <= _days_of(year, month) and hour < 24 and minute < 60 and second < 60):
            raise ValueError(f"no such date or time of day: {text[:64]!r}")
        offset = 0
        if sign:
            # 24 hours and 60 minutes can be read, as Go reads them; only the first cannot be written again.
            if int(offset_hours) > 24 or int(offset_minutes) > 60:
                raise ValueError(f"no such offset: {text[:64]!r}")
            offset = (int(offset_hours) * 60 + int(offset_minutes)) * 60 * (-1 if sign == "-" else 1)
        local = _days_before(year, month, day) * _DAY + hour * 3600 + minute * 60 + second
        return cls(local - offset, int((fraction or "0")[:9].ljust(9, "0")), offset)

    @classmethod
    def from_datetime(cls, moment: datetime) -> Self:
        """The same moment and offset.

        Raises:
            ValueError: `moment` has no time zone.
        """
        offset = moment.utcoffset()
        if offset is None:
            raise ValueError("a datetime without a time zone is no point in time")
        since = moment - _EPOCH
        seconds = since.days * _DAY + since.seconds
        return cls(seconds, since.microseconds * 1000, round(offset.total_seconds()))

    def to_datetime(self) -> datetime:
        """The same moment and offset, cut to microseconds.

        Raises:
            ValueError: Python knows no such year (0) or no such offset (24 hours and more).
        """
        try:
            moment = _EPOCH + timedelta(seconds=self.unix_seconds, microseconds=self.nanosecond // 1000)
            return moment.astimezone(timezone(timedelta(seconds=self.offset_seconds)))
        except OverflowError as exc:
            raise ValueError("Python's datetime has no such year") from exc

    def is_zero(self) -> bool:
        """Whether it is the first second of the year 1 in UTC, which stands for "not set". Go: `time.Time.IsZero`."""
        return self == ZERO_TIME

    def rfc3339(self) -> str:
        """RFC 3339 in whole seconds, cut and not rounded. Go: `Format(time.RFC3339)`.

        Raises:
            ValueError: The year is outside of 0…9999, or the offset is a day or more.
        """
        return self._date_and_time() + self._zone()

    def __str__(self) -> str:
        fraction = f".{self.nanosecond:09}".rstrip("0") if self.nanosecond else ""
        return self._date_and_time() + fraction + self._zone()

    def __repr__(self) -> str:
        try:
            return f"Timestamp({str(self)!r})"
        except ValueError:  # RFC 3339 has no text for it
            return f"Timestamp({self.unix_seconds}, {self.nanosecond}, {self.offset_seconds})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Timestamp):
            return NotImplemented
        return self.unix_seconds == other.unix_seconds and self.nanosecond == other.nanosecond

    def __lt__(self, other: "Timestamp") -> bool:
        return (self.unix_seconds, self.nanosecond) < (other.unix_seconds, other.nanosecond)

    def __hash__(self) -> int:
        return hash((self.unix_seconds, self.nanosecond))

    def _date_and_time(self) -> str:
        days, seconds = divmod(self.unix_seconds + self.offset_seconds, _DAY)
        # Python's calendar begins with year 1: count within the 400 years after which it repeats.
        cycles, day = divmod(days - _days_before(0, 1, 1), _DAYS_OF_400_YEARS)
        date = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(days=day, seconds=seconds)
        year = date.year - 2000 + cycles * 400
        if not 0 <= year <= 9999:
            raise ValueError(f"the year {year} cannot be written as RFC 3339")
        return f"{year:04}-{date:%m-%dT%H:%M:%S}"

    def _zone(self) -> str:
        if self.offset_seconds == 0:
            return "Z"
        hours, minutes = divmod(abs(self.offset_seconds) // 60, 60)
        if hours > 23:
            raise ValueError(f"an offset of {hours} hours cannot be written as RFC 3339")
        return f"{'-' if self.offset_seconds < 0 else '+'}{hours:02}:{minutes:02}"

    @classmethod
    def _of(cls, value: object) -> "Timestamp":
        if isinstance(value, Timestamp):
            return value
        if isinstance(value, datetime):
            return cls.from_datetime(value)
        if isinstance(value, str):
            return cls.parse(value)
        raise ValueError("expected a Timestamp, a datetime with a time zone or RFC 3339 text")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._of, serialization=core_schema.plain_serializer_function_ser_schema(str, when_used="json")
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "date-time"}


def _days_of(year: int, month: int) -> int:
    return monthrange(2000 + year % 400, month)[1]


def _days_before(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of any year; the calendar repeats every 400 years."""
    cycles, year_of_cycle = divmod(year, 400)
    date = datetime(2000 + year_of_cycle, month, day, tzinfo=UTC)
    return (date - _EPOCH).days + (cycles - 5) * _DAYS_OF_400_YEARS


ZERO_TIME = Timestamp(_days_before(1, 1, 1) * _DAY)
"""0001-01-01T00:00:00Z: a time that was never set."""
