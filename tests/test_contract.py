"""The documents of the contract: made from the code, true of every event, and false of what is none."""

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from relay.adapters.topology import TOPOLOGY, Exchange
from relay.contract import contract
from relay.contract.schemas import type_names
from relay.core.events import CONTRACT, Event, MessageData
from tests.contract_events import (
    archive_events,
    chat_events,
    events_never_recorded,
    examples,
    lifecycle_events,
    text_of,
    usage_events,
)
from tests.core.captures import OURS, each_recording

DOCS = Path(__file__).parent.parent / "docs" / "contract"
URN = "urn:chatrelay:schema:"
PREFIX = "io.chatrelay."
NAMES = [name for name, _, _ in type_names()]
Json = dict[str, Any]


# --- events and their schemas ----------------------------------------------------------------------------------------


def schema_of(name: str) -> Json:
    schema: Json = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    return schema


@functools.cache
def validator(name: str) -> Draft202012Validator:
    schema = schema_of(name)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def faults(document: Json) -> list[str]:
    """What a consumer that checks finds wrong with a message."""
    found = [*validator("envelope.v1").iter_errors(document)]
    name = str(document.get("dataschema")).removeprefix(URN)
    if name in NAMES:
        found += validator(name).iter_errors(document.get("data"))
    else:
        return [*(error.message for error in found), f"no schema {name}"]
    return [f"{error.json_path}: {error.message}" for error in found]


def assert_all_keep_the_contract(events: Iterable[Event]) -> None:
    events = list(events)
    assert events
    for event in events:
        document = json.loads(event.encode())
        assert faults(document) == [], event.routing_key
        assert document["dataschema"] == document["type"].replace(PREFIX, URN)


@each_recording
def test_what_is_told_of_a_recorded_chat_keeps_the_contract(path: Path) -> None:
    if events := chat_events(path):
        assert_all_keep_the_contract(events)


def test_what_no_recording_holds_keeps_the_contract() -> None:
    assert_all_keep_the_contract([*lifecycle_events(), *events_never_recorded()])


def test_what_meter_and_archivist_tell_keeps_the_contract() -> None:
    recorded = [event for path in sorted(OURS.glob("*/*.jsonl")) for event in chat_events(path)]
    messages = [event for event in recorded if event.event == "message"]
    assert_all_keep_the_contract(told for event in messages for told in usage_events(event))
    upstream = [cast(MessageData, event.data)["message"] for event in messages]
    assert_all_keep_the_contract(archive_events(messages[0].chat, upstream))
    assert_all_keep_the_contract(archive_events(messages[0].chat, []))


def test_the_envelope_names_each_attribute_and_no_other() -> None:
    event = next(iter(examples().values()))
    assert list(schema_of("envelope.v1")["properties"]) == list(event.envelope())


def changed(document: Json, path: str, value: object) -> Json:
    """A copy of a document with something else at `path`; `...` takes it away."""
    copy: Json = json.loads(json.dumps(document))
    *way, last = path.split(".")
    place = copy
    for step in way:
        place = place[step]
    assert value is not ... or last in place, f"{path} is not there to take away"
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


@pytest.mark.parametrize(
    ("example", "path", "value"),
    [
        *(
            pytest.param("chat.message.user", name, ..., id=f"no {name}")
            for name in ("specversion", "id", "source", "type", "subject", "time", "session", "position", "data")
        ),
        pytest.param("chat.message.user", "specversion", "0.3", id="another CloudEvents"),
        pytest.param("chat.message.user", "id", "6F6B987E-1C18-5F81-893A-932DDC3CD1C0", id="id in capitals"),
        pytest.param("chat.message.user", "id", "7", id="id is no UUID"),
        pytest.param("chat.message.user", "source", "http://coder.test", id="source without chat"),
        pytest.param("chat.message.user", "type", "com.example.message.v1", id="somebody else's type"),
        pytest.param("chat.message.user", "time", "2026-11-24T12:00:00", id="time without zone"),
        pytest.param("chat.message.user", "time", "2026-11-24T12:00:00+02:00", id="time not in UTC"),
        pytest.param("chat.message.user", "session", "1", id="session as text"),
        pytest.param("chat.message.user", "position", -1, id="position below zero"),
        pytest.param("chat.message.user", "origin", "rumour", id="unknown origin"),
        pytest.param("chat.message.user", "traceparent", "00-0-0-00", id="broken trace"),
        pytest.param("chat.message.user", "dataschema", f"{URN}chat.nothing.v1", id="schema that is not there"),
        pytest.param("chat.message.user", "data", [], id="data is no object"),
        pytest.param("chat.message.user", "data.message", ..., id="message without message"),
        pytest.param("chat.message.user", "data.message", 7, id="message is no object"),
        pytest.param("chat.message.user", "data.text", None, id="text is null"),
        pytest.param("chat.history.replaced", "data.message_ids", ["1"], id="ids as text"),
        pytest.param("chat.history.replaced", "data.message_ids", ..., id="history without ids"),
        pytest.param("chat.history.replaced", "data.reason", "whim", id="unknown reason"),
        pytest.param("chat.status.running", "data.status", None, id="status is null"),
        pytest.param("chat.status.running", "data.previous", ..., id="previous is not said"),
        pytest.param("chat.status.error", "data.last_error", {"kind": "auth"}, id="error without words"),
        pytest.param("chat.turn.completed", "data.outcome", "failed", id="outcome is not the type's"),
        pytest.param("chat.turn.completed", "data.steps", 1.5, id="half a step"),
        pytest.param("chat.turn.completed", "data.usage", {"input_tokens": "7"}, id="tokens as text"),
        pytest.param("chat.turn.failed", "data.error", {}, id="failed without words"),
        pytest.param("chat.error.turn", "data.reason", "dropped_messages", id="a stream's reason for a turn"),
        pytest.param("chat.error.stream", "data.reason", "turn", id="a turn's reason for a stream"),
        pytest.param("chat.retry.scheduled", "data.attempt", ..., id="which attempt"),
        pytest.param("chat.queue.updated", "data.queued_messages", [7], id="queued number"),
        pytest.param("chat.lifecycle.created", "data.chat", None, id="no chat"),
        pytest.param("chat.preview.text", "data.part.type", "reasoning", id="thoughts as text"),
        pytest.param("chat.preview.text", "data.part.type", ..., id="part without type"),
        pytest.param("chat.preview.text", "data.offset", ..., id="preview from anywhere"),
        pytest.param("chat.preview.reset", "data.reason", "edit", id="reset for no reason of its own"),
        pytest.param("usage.charged.chat", "data.cost_micros", "3", id="cost as text"),
        pytest.param("usage.charged.chat", "data.cost_micros", ..., id="no cost said"),
        pytest.param("usage.charged.chat", "data.tokens.cache_read", ..., id="a kind of tokens is missing"),
        pytest.param("usage.charged.chat", "data.price", {"input": 3}, id="price is not exact"),
        pytest.param("usage.exceeded.user", "data.percent", 99.5, id="level is not whole"),
        pytest.param("usage.exceeded.user", "data.scope.id", ..., id="whose limit"),
        pytest.param("usage.exceeded.user", "data.period.end", ..., id="endless period"),
        pytest.param("archive.stored", "data.sha256", ..., id="copy that nobody can check"),
        pytest.param("archive.stored", "data.bytes", None, id="size is null"),
    ],
)
def test_what_breaks_the_contract_is_refused(example: str, path: str, value: object) -> None:
    document = json.loads(examples()[example].encode())
    assert faults(document) == []
    assert faults(changed(document, path, value))


@pytest.mark.parametrize(
    ("example", "path", "value"),
    [
        pytest.param("chat.message.user", "data.message.role", "narrator", id="role"),
        pytest.param("chat.message.user", "data.message.mood", {"calm": True}, id="field of Coder's"),
        pytest.param("chat.message.user", "data.language", "en", id="field of ours"),
        pytest.param("chat.message.user", "sampledrate", 1, id="attribute"),
        pytest.param("chat.status.running", "data.status", "dreaming", id="status"),
        pytest.param("chat.status.error", "data.last_error.kind", "weather", id="kind of error"),
        pytest.param("chat.preview.text", "data.role", "narrator", id="role of a preview"),
        pytest.param("chat.preview.other", "data.part.type", "hologram", id="kind of part"),
        pytest.param("archive.stored", "data.first_id", None, id="transcript without messages"),
        pytest.param("usage.charged.chat", "data.price", ..., id="no price known"),
    ],
)
def test_what_may_come_one_day_passes(example: str, path: str, value: object) -> None:
    document = json.loads(examples()[example].encode())
    assert faults(changed(document, path, value)) == []


# --- the committed files ---------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(contract, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_the_committed_documents_are_what_the_code_makes() -> None:
    assert run("check", DOCS) == (0, ""), 'make them anew: "make contract"'


def test_the_committed_examples_are_what_the_code_tells() -> None:
    committed = {file.stem: file.read_text(encoding="utf-8") for file in (DOCS / "examples").iterdir()}
    assert committed == {name: text_of(event) for name, event in examples().items()}, 'make them anew: "make contract"'


def test_check_says_what_differs(tmp_path: Path) -> None:
    run("write", tmp_path)
    assert run("check", tmp_path) == (0, "")
    (tmp_path / "chat.message.v1.json").write_text("{}\n")
    (tmp_path / "asyncapi.yaml").unlink()
    (tmp_path / "chat.gone.v1.json").write_text('{"$id": "urn:chatrelay:schema:chat.gone.v1"}')
    (tmp_path / "mine.v1.json").write_text('{"$id": "urn:example:mine"}')
    code, output = run("check", tmp_path)
    assert code == 1
    assert output.splitlines()[:-1] == [
        "chat.gone.v1.json is left over: no such type",
        "chat.message.v1.json differs",
        "asyncapi.yaml is missing",
    ]
    run("write", tmp_path)
    assert run("check", tmp_path) == (0, "")
    assert (tmp_path / "mine.v1.json").exists()


def test_an_example_that_is_none_is_a_mistake_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "broken.json").write_text("{")
    code, output = run("write", tmp_path)
    assert code == 1
    assert "broken.json is not JSON" in output
    (tmp_path / "examples" / "broken.json").write_text("[]")
    assert "broken.json is not an event" in run("write", tmp_path)[1]


def test_there_is_a_schema_for_each_type_and_it_bears_its_name() -> None:
    files = {file.name.removesuffix(".json") for file in DOCS.glob("*.json")}
    assert files == {*NAMES, "envelope.v1"}
    for name in files:
        assert schema_of(name)["$id"] == URN + name


def test_there_is_an_example_of_each_type_that_is_told() -> None:
    shown = {event.type.removeprefix(PREFIX) for event in examples().values()}
    nobody_tells = {"chat.action.required.v1"} | {
        f"usage.{event}.v1" for event in ("forecast", "recovered", "enforced")
    }
    assert shown == set(NAMES) - nobody_tells


def test_fields_say_what_the_code_says_of_them() -> None:
    schema = schema_of("chat.history.replaced.v1")
    assert schema["description"].startswith("History was rewritten. A consumer drops every id up to the maximum")
    assert schema["properties"]["message_ids"]["description"] == "the whole history now, ascending"
    assert MessageData.__doc__ == schema_of("chat.message.v1")["description"]


# --- AsyncAPI --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> Json:
    loaded: Json = yaml.safe_load((DOCS / "asyncapi.yaml").read_text(encoding="utf-8"))
    return loaded


def _references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            elif key != "examples":
                yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def _at(document: Json, reference: str) -> Any:
    place: Any = document
    for step in reference.removeprefix("#/").split("/"):
        place = place[step]
    return place


def test_asyncapi_has_what_the_specification_asks_for(document: Json) -> None:
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= document["info"].keys()
    assert {"asyncapi", "info", "defaultContentType", "servers", "channels", "operations", "components"} == set(
        document
    )
    for server in document["servers"].values():
        assert {"host", "protocol"} <= server.keys()
    for channel in document["channels"].values():
        words = [word.strip("{}") for word in channel["address"].split(".")]
        assert words == ["family", "event", "detail", "owner_id", "chat_id"] == list(channel["parameters"])
    for operation in document["operations"].values():
        assert operation["action"] == "send"
        assert _at(document, operation["channel"]["$ref"])


def test_every_reference_of_asyncapi_leads_somewhere(document: Json) -> None:
    references = set(_references(document))
    assert len(references) > len(NAMES)
    for reference in references:
        if reference.startswith("#/"):
            assert _at(document, reference)
        else:
            assert (DOCS / reference).is_file()


def test_every_type_is_a_message_and_is_sent_by_the_operation_of_its_class(document: Json) -> None:
    assert list(document["components"]["messages"]) == NAMES
    assert list(document["channels"]["events"]["messages"]) == NAMES
    sent = {
        name: [reference["$ref"].rpartition("/")[2] for reference in operation["messages"]]
        for name, operation in document["operations"].items()
    }
    transient = [name for name, _, row in type_names() if row.transient]
    assert sent == {"publishEvent": [name for name in NAMES if name not in transient], "publishPreview": transient}
    modes = {name: operation["bindings"]["amqp"]["deliveryMode"] for name, operation in document["operations"].items()}
    assert modes == {"publishEvent": 2, "publishPreview": 1}


def test_asyncapi_names_the_exchange_that_is_declared(document: Json) -> None:
    binding = document["channels"]["events"]["bindings"]["amqp"]
    declared = next(part for part in TOPOLOGY if isinstance(part, Exchange))
    assert binding["is"] == "routingKey"
    assert (binding["exchange"]["name"], binding["exchange"]["type"]) == (declared.name, declared.type)
    assert binding["exchange"]["durable"] is True


def test_parameters_hold_the_words_of_every_routing_key(document: Json) -> None:
    parameters = document["channels"]["events"]["parameters"]
    assert set(parameters["family"]["enum"]) == {row.family for row in CONTRACT}
    assert set(parameters["event"]["enum"]) == {row.event for row in CONTRACT}
    for event in examples().values():
        family, name, detail, *_ = event.routing_key.split(".")
        assert family in parameters["family"]["enum"]
        assert name in parameters["event"]["enum"]
        assert detail in parameters["detail"]["examples"]


def test_an_example_is_of_its_own_message_and_of_no_other(document: Json) -> None:
    base = "https://contract.test/"
    files = ((base + file.name, json.loads(file.read_text())) for file in DOCS.glob("*.json"))
    registry: Registry[Any] = Registry().with_resources(
        (uri, DRAFT202012.create_resource(schema)) for uri, schema in files
    )
    payloads = {
        name: Draft202012Validator({"$id": f"{base}{name}", **message["payload"]}, registry=registry)
        for name, message in document["components"]["messages"].items()
    }
    shown = [
        (name, example["payload"])
        for name, message in document["components"]["messages"].items()
        for example in message.get("examples", [])
    ]
    assert len(shown) == len(examples())
    for name, example in shown:
        assert [other for other, payload in payloads.items() if payload.is_valid(example)] == [name]
        for attribute, prefix in (("type", PREFIX), ("dataschema", URN)):
            assert not payloads[name].is_valid(changed(example, attribute, f"{prefix}chat.another.v1"))
