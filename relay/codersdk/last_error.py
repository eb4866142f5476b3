"""Why a chat failed, as a text or, since 2.34, as an object."""

from typing import Any, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from relay.codersdk.codec import Codec, write_string
from relay.codersdk.enums import ChatErrorKind
from relay.codersdk.errors import InvalidJSON
from relay.codersdk.json_text import end_of_value, found, read_string
from relay.codersdk.model import CoderModel, Int64, Omit, read_json
from relay.codersdk.raw_json import RawJSON


class ChatError(CoderModel):
    """What went wrong in a turn. Since 2.34."""

    message: str = ""
    detail: Omit[str] = ""
    kind: Omit[ChatErrorKind] = ChatErrorKind("")
    provider: Omit[str] = ""
    """Of the model, e.g. `anthropic`."""
    retryable: Omit[bool] = False
    """Whether the same again may work."""
    status_code: Omit[Int64] = 0
    """HTTP status with which the provider refused; 0 when it did not."""


class ChatLastError(str):
    """The text of a chat's last error. Until 2.33 servers send just that; `error` has what later ones add."""

    __slots__ = ("_source",)

    def __new__(cls, text: str = "", source: RawJSON | None = None) -> Self:
        """`source` is the object that the text is the message of; None when there was only the text."""
        made = super().__new__(cls, text)
        made._source = source
        return made

    _source: RawJSON | None

    @classmethod
    def of(cls, error: ChatError) -> Self:
        """As a server since 2.34 sends it."""
        return cls(error.message, RawJSON.unchecked(error.model_dump_json()))

    @property
    def error(self) -> ChatError:
        """The whole error; of a mere text the message, and a `kind` of generic, as servers migrate old ones."""
        if self._source is None:
            return ChatError(message=str(self), kind=ChatErrorKind.GENERIC)
        return read_json(ChatError, self._source)

    @classmethod
    def json_codec(cls) -> Codec:
        return Codec(cls._read, cls._write, cls)

    @classmethod
    def _read(cls, text: str, index: int, current: Self) -> tuple[Self, int]:
        if text[index] == '"':
            message, end = read_string(text, index)
            return cls(message), end
        if text[index] == "{":
            end = end_of_value(text, index)
            source = RawJSON.unchecked(text[index:end])
            return cls(read_json(ChatError, source).message, source), end
        raise InvalidJSON(f"expected a string or an object at character {index}, found {found(text, index)}")

    def _write(self) -> str:
        return write_string(self) if self._source is None else str(self._source)

    @classmethod
    def _of_any(cls, value: object) -> Self:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, ChatError | dict):
            return cls.of(ChatError.model_validate(value))
        raise ValueError("expected a text or an error")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._of_any)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, {"type": "object"}]}
