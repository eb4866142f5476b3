"""The JSON Schemas of the contract, made from the types that encode the events.

One schema for the `data` of each event type, and one for the envelope around it. All objects are open: a field that a
schema does not name may come with any version of Coder or of the relay, and is not an error.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from relay.core.events import CONTRACT, ErrorData, EventType, JsonObject, Origin, PreviewData, TurnData

TYPE_PREFIX = "io.chatrelay."
URN_PREFIX = "urn:chatrelay:schema:"
ENVELOPE = "envelope.v1"

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_NAME = r"[a-z]+\.[a-z]+(\.[a-z-]+)?\.v1"
_FIELD = re.compile(r"    (\w+): [^#\n]*# (.+)")  # a field of a class with what is said of it on the same line


def type_names() -> Iterator[tuple[str, str | None, EventType]]:
    """Each type of the contract: its name without `io.chatrelay.`, the detail it stands for, and its row.

    The detail is None where one type holds several: a role, a status, a scope.
    """
    for row in CONTRACT:
        if row.detail_in_type:
            yield from ((f"{row.family}.{row.event}.{detail}.v1", detail, row) for detail in row.details)
        else:
            yield f"{row.family}.{row.event}.v1", None, row


def schemas() -> dict[str, JsonObject]:
    """Every schema by its name: `envelope.v1`, then the types in the order of the contract."""
    found = {ENVELOPE: _envelope()}
    for name, detail, row in type_names():
        schema = TypeAdapter[Any](row.data).json_schema(schema_generator=_FromTypedDict)
        _narrow(schema["properties"], row, detail)
        head = {"$schema": _DIALECT, "$id": URN_PREFIX + name, "title": name}
        order = ("description", "type", "properties", "required", "$defs")
        found[name] = {**head, **{key: schema[key] for key in order if key in schema}}
    return found


class _FromTypedDict(GenerateJsonSchema):
    """Fields are described by the comments beside them, and not called by their own names once more."""

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        made = super().typed_dict_schema(schema)
        for name, comment in _comments(schema["cls"]).items():
            made["properties"][name]["description"] = comment
        return made

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


def _comments(cls: type) -> dict[str, str]:
    inherited = [_comments(base) for base in getattr(cls, "__orig_bases__", ()) if isinstance(base, type)]
    own = dict(_FIELD.findall(inspect.getsource(cls)))
    return {name: comment for each in (*inherited, own) for name, comment in each.items()}


def _narrow(properties: dict[str, Any], row: EventType, detail: str | None) -> None:
    """Where a detail is part of the type, the field that repeats it can have no other value."""
    if row.data is TurnData:
        properties["outcome"] = {"const": detail}
    elif row.data is ErrorData:
        reasons = [reason for reason in properties["reason"]["enum"] if (reason == "turn") == (detail == "turn")]
        properties["reason"] = {"enum": reasons}
    elif row.data is PreviewData and detail != "other":
        properties["part"] |= {"required": ["type"], "properties": {"type": {"const": detail}}}


def _envelope() -> JsonObject:
    """`Event.envelope`, attribute by attribute."""
    properties: Mapping[str, JsonObject] = {
        "specversion": {"const": "1.0"},
        "id": _uuid("Which fact this is: the same from any replica and after any restart. Drop copies by it."),
        "source": {
            "type": "string",
            "format": "uri",
            "pattern": f"/chats/{_UUID}$",
            "description": "`<deployment url>/chats/<chat_id>`; the chat is all zeros where a limit belongs to none.",
        },
        "type": {
            "type": "string",
            "pattern": f"^{re.escape(TYPE_PREFIX)}{_NAME}$",
            "description": "What happened. Pass over types you do not know: new ones may come.",
        },
        "subject": {
            "type": "string",
            "minLength": 1,
            "description": "The chat's id; of usage events the user's, of a limit of the deployment its URL.",
        },
        "time": {
            "type": "string",
            "format": "date-time",
            "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$",
            "description": "When it happened, in UTC, up to nanoseconds. Copies may differ: never compare it.",
        },
        "datacontenttype": {"const": "application/json"},
        "dataschema": {
            "type": "string",
            "pattern": f"^{re.escape(URN_PREFIX)}{_NAME}$",
            "description": "`$id` of the schema of `data`.",
        },
        "session": {
            "type": "integer",
            "minimum": 0,
            "description": "High half of the order within a chat: grows with every new follower of it.",
        },
        "position": {
            "type": "integer",
            "minimum": 0,
            "description": "Low half of the order within a chat: grows within a session, with gaps.",
        },
        "origin": {
            "enum": [origin.value for origin in Origin],
            "description": "How the relay learned of it: as history when it connected, as it happened, "
            "from the REST API, or from an archive.",
        },
        "ownerid": _uuid("Whose chat it is; all zeros for a limit of the deployment."),
        "rootchatid": _uuid("The chat that a subagent's chat belongs to; any other chat's own id."),
        "traceparent": {
            "type": "string",
            "pattern": "^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$",
            "description": "W3C Trace Context: a trace of its own for each fact, to join spans to.",
        },
        "data": {"type": "object", "description": "By type: see `dataschema`."},
    }
    return {
        "$schema": _DIALECT,
        "$id": URN_PREFIX + ENVELOPE,
        "title": ENVELOPE,
        "description": "A CloudEvents 1.0 document in structured mode, the body of every message.",
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }


def _uuid(description: str) -> JsonObject:
    return {"type": "string", "format": "uuid", "pattern": f"^{_UUID}$", "description": description}
