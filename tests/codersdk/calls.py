"""The calls of the vectors, made by name: Go's method and arguments to ours."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

from relay import codersdk
from relay.codersdk import CoderClient, CoderModel, Timestamp, read_json, write_json
from tests.codersdk.vectors import Row, as_bytes, as_str

_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

_REQUESTS: dict[str, type[CoderModel]] = {
    "CreateChat": codersdk.CreateChatRequest,
    "UpdateChat": codersdk.UpdateChatRequest,
    "CreateChatMessage": codersdk.CreateChatMessageRequest,
    "EditChatMessage": codersdk.EditChatMessageRequest,
    "CreateChatProvider": codersdk.CreateChatProviderConfigRequest,
    "UpdateChatProvider": codersdk.UpdateChatProviderConfigRequest,
    "CreateChatModelConfig": codersdk.CreateChatModelConfigRequest,
    "UpdateChatModelConfig": codersdk.UpdateChatModelConfigRequest,
    "UpdateChatSystemPrompt": codersdk.ChatSystemPrompt,
    "UpdateUserChatCustomPrompt": codersdk.UserChatCustomPrompt,
    "UpdateChatDesktopEnabled": codersdk.UpdateChatDesktopEnabledRequest,
    "UpdateChatWorkspaceTTL": codersdk.UpdateChatWorkspaceTTLRequest,
    "UpdateChatUsageLimitConfig": codersdk.ChatUsageLimitConfig,
    "UpsertChatUsageLimitOverride": codersdk.UpsertChatUsageLimitOverrideRequest,
    "UpdateChatUserUsageLimitOverride": codersdk.UpdateChatUsageLimitOverrideRequest,
    "UpsertChatUsageLimitGroupOverride": codersdk.UpsertChatUsageLimitGroupOverrideRequest,
}


def snake(name: str) -> str:
    """`GetChatCostSummary` as `get_chat_cost_summary`."""
    return _WORDS.sub("_", name).lower()


def _request(method: str, value: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that make a request."""
    text = json.dumps(value)
    # What JSON cannot hold is made to fail where a caller would make it.
    for odd in re.findall(r'\{"\$float": "(-?\w+)"\}', text):
        codersdk.ChatModelCallConfig(temperature=float(odd))
    for odd in re.findall(r'\{"\$time": "([^"]+)"\}', text):
        Timestamp.parse(odd)
    request = read_json(_REQUESTS[method], text)
    return {name: getattr(request, name) for name in type(request).model_fields}


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data


def arguments(row: Row) -> dict[str, Any]:
    """Our keyword arguments for the call of a vector."""
    made: dict[str, Any] = {}
    for key, value in row["args"].items():
        name = key.removesuffix("_b64")
        if name == "req":
            made |= _request(row["method"], value)
        elif name == "opts":
            for option in value or {}:
                option_name = option.removesuffix("_b64")
                if option_name.endswith("_date"):
                    made[option_name] = Timestamp.parse(value[option])
                elif option_name == "after_id" and isinstance(value[option], str):
                    made[option_name] = UUID(value[option])
                elif option_name in {"query", "username"}:
                    made[option_name] = as_str(value, option_name)
                else:
                    made[option_name] = value[option]
        elif name == "rd":
            data = None if value is None else as_bytes(value, "data")
            made["data"] = data if data is None or value["sized"] else _pieces(data)
        elif name in {"user", "filename", "contentType"}:
            made[snake(name)] = as_str(row["args"], name)
        elif name.endswith("ID") and name != "messageID":
            made[snake(name)] = UUID(value)
        else:
            made[snake(name)] = value
    if row["method"] == "GetChatCostUsers":
        made.pop("after_id")  # never sent
    return made


async def call(coder: CoderClient, row: Row) -> Any:
    """Make the call of a vector; of a stream all events."""
    if row["method"] == "StreamChat":
        async with coder.stream_chat(**arguments(row)) as events:
            return [event async for event in events]
    return await getattr(coder, snake(row["method"]))(**arguments(row))


def printed(result: Any) -> str:
    """A result as JSON."""
    if isinstance(result, list):
        return f"[{','.join(write_json(each) for each in result)}]"
    return write_json(result)
