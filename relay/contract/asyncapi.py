"""The AsyncAPI document: where the events are, under which routing keys, and what each of them looks like."""

import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import metadata

from relay.adapters.topology import TOPOLOGY, Exchange
from relay.contract.schemas import ENVELOPE, TYPE_PREFIX, URN_PREFIX, type_names
from relay.core.events import CONTENT_TYPE, CONTRACT, EventType, JsonObject

_CONTRACT_VERSION = "1.0.0"
_AMQP = {"bindingVersion": "0.3.0"}
_CHANNEL = "events"
_DESCRIPTION = """\
Every chat of a Coder Agents deployment as one ordered, de-duplicated event stream.

Each message is one CloudEvents 1.0 document. AMQP properties repeat what a broker or a person wants to see without
opening it: `message_id` is `id`, `type` is `type`, `timestamp` is `time` in whole seconds, `app_id` is
`coder-chat-relay`. Durable events come at least once, previews may be left out. How to write a consumer that counts
nothing twice is told in `docs/consumers.md`."""


def asyncapi(examples: Mapping[str, JsonObject]) -> JsonObject:
    """The document, whose schemas are files beside it.

    Args:
        examples: Whole events by name. Those of a type that is not in the contract are not shown.
    """
    rows = {name: row for name, _, row in type_names()}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Coder Chat Relay",
            "version": _CONTRACT_VERSION,
            "description": _DESCRIPTION,
            "license": {"name": metadata("coder-chat-relay")["License-Expression"]},
        },
        "defaultContentType": CONTENT_TYPE,
        "servers": {"rabbitmq": _server()},
        "channels": {_CHANNEL: _channel(rows)},
        "operations": {
            "publishEvent": _operation("The relay tells what happened.", rows, transient=False),
            "publishPreview": _operation("The relay shows text while it is being written.", rows, transient=True),
        },
        "components": {
            "securitySchemes": {"password": {"type": "userPassword"}},
            "messages": {name: _message(name, row, examples) for name, row in rows.items()},
        },
    }


def _server() -> JsonObject:
    return {
        "host": "rabbitmq.example.com:5672",
        "pathname": "/{vhost}",
        "protocol": "amqp",
        "protocolVersion": "0.9.1",
        "description": "RabbitMQ 3.10 or later.",
        "variables": {"vhost": {"default": "%2F", "description": "The virtual host that the relay publishes in."}},
        "security": [{"$ref": "#/components/securitySchemes/password"}],
    }


def _channel(rows: Iterable[str]) -> JsonObject:
    exchange = next(part for part in TOPOLOGY if isinstance(part, Exchange))
    families = sorted({row.family for row in CONTRACT})
    events = sorted({row.event for row in CONTRACT})
    details = sorted({detail for row in CONTRACT for detail in row.details} - {"*"})
    return {
        "address": "{family}.{event}.{detail}.{owner_id}.{chat_id}",
        "title": f"Exchange {exchange.name}",
        "description": "The routing key has always these five words, in lower case. Bind a queue of your own with `*` "
        "for one word and `#` for any number of them.",
        "servers": [{"$ref": "#/servers/rabbitmq"}],
        "parameters": {
            "family": {"enum": families, "description": "Who tells it: the chat itself, the meter, the archivist."},
            "event": {"enum": events, "description": "What happened."},
            "detail": {
                "examples": details,
                "description": "More of it: a role, a status, an outcome, a scope. Roles and statuses that Coder adds "
                "later pass through. `_` where there is nothing to say.",
            },
            "owner_id": {
                "examples": ["07259a4a-6dcb-4fc0-98eb-4ee18df0a1c1", "_"],
                "description": "UUID of the user whose chat it is; `_` for a limit of the deployment.",
            },
            "chat_id": {
                "examples": ["5b7d4f4c-4a3e-4d53-9c5c-8f1f6d0c7f21", "_"],
                "description": "UUID of the chat; `_` for a limit, which belongs to no chat.",
            },
        },
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in rows},
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {
                    "name": exchange.name,
                    "type": exchange.type,
                    "durable": True,
                    "autoDelete": False,
                    "vhost": "/",
                },
                **_AMQP,
            }
        },
    }


def _operation(summary: str, rows: Mapping[str, EventType], *, transient: bool) -> JsonObject:
    names = [name for name, row in rows.items() if row.transient == transient]
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{_CHANNEL}"},
        "summary": summary,
        "messages": [{"$ref": f"#/channels/{_CHANNEL}/messages/{name}"} for name in names],
        "bindings": {
            "amqp": {"deliveryMode": 1 if transient else 2, "mandatory": not transient, "timestamp": True, **_AMQP}
        },
    }


def _message(name: str, row: EventType, examples: Mapping[str, JsonObject]) -> JsonObject:
    of_type: JsonObject = {
        "type": "object",
        "properties": {
            "type": {"const": TYPE_PREFIX + name},
            "dataschema": {"const": URN_PREFIX + name},
            "data": {"$ref": f"./{name}.json"},
        },
    }
    message: JsonObject = {
        "name": TYPE_PREFIX + name,
        "title": name.removesuffix(".v1"),
        "summary": inspect.getdoc(row.data),
        "contentType": CONTENT_TYPE,
        "tags": [{"name": "transient" if row.transient else "durable"}],
        "payload": {"allOf": [{"$ref": f"./{ENVELOPE}.json"}, of_type]},
        "bindings": {"amqp": {"messageType": TYPE_PREFIX + name, **_AMQP}},
    }
    shown = [
        {"name": title, "payload": example}
        for title, example in examples.items()
        if example.get("type") == TYPE_PREFIX + name
    ]
    return {**message, "examples": shown} if shown else message
