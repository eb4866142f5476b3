"""A JSON value that nobody has looked into."""

import json
from decimal import Decimal
from typing import Any, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from relay.codersdk import json_text


class RawJSON(str):
    """The source text of one JSON value, kept as it came. Go: `json.RawMessage`.

    `RawJSON("")` is no value at all and false; `RawJSON("null")` is the value null. Equal means equal text.

    Raises:
        ValueError: The text is not one JSON value.
    """

    __slots__ = ()

    def __new__(cls, text: str = "") -> Self:
        text = json_text.as_text(text)
        if text:
            json_text.check(text)
        return super().__new__(cls, text)

    @classmethod
    def of(cls, value: object) -> Self:
        """The text of a Python value: None, bool, int, float, str, list, tuple, dict.

        Raises:
            TypeError: JSON has nothing for such a value.
            ValueError: Nor for a float that is not a number or infinite.
        """
        return cls.unchecked(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")))

    @classmethod
    def unchecked(cls, text: str) -> Self:
        """Take a text that is known to be JSON."""
        return str.__new__(cls, text)

    def value(self) -> Any:
        """As Python has it: integers exact, other numbers as float. Raises ValueError when there is no value."""
        return json.loads(self)

    def exact(self) -> Any:
        """As `value`, with every number that is not an integer as `Decimal`."""
        return json.loads(self, parse_float=Decimal)

    def __repr__(self) -> str:
        return f"RawJSON({super().__repr__()})"

    @classmethod
    def _of_any(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if value is None:
            return cls()
        if isinstance(value, str):
            return cls(value)
        try:
            return cls.of(value)
        except TypeError as exc:
            raise ValueError(str(exc)) from exc

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._of_any,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda raw: raw.value() if raw else None, when_used="json"
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {}
