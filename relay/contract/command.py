"""`relay contract`: write the documents of the contract, or check those that somebody keeps."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import yaml

from relay.contract.asyncapi import asyncapi
from relay.contract.metrics import metrics_page
from relay.contract.schemas import URN_PREFIX, schemas
from relay.core.events import JsonObject

_EXAMPLES = "examples"  # below the directory: events that AsyncAPI shows


@click.group()
def contract() -> None:
    """The contract of this version as documents: JSON Schemas, AsyncAPI, metrics.

    \b
    Example:
      relay contract check docs/contract
    """


@contract.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def write(directory: Path) -> None:
    """Write schemas and AsyncAPI to DIRECTORY; what else is there stays.

    Events in DIRECTORY/examples (one JSON document each) are shown in AsyncAPI.

    \b
    Example:
      relay contract write docs/contract
    """
    documents = _documents(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in documents.items():
            (directory / name).write_bytes(text.encode())
        for name in _left_over(directory, documents):
            (directory / name).unlink()
    except OSError as exc:
        raise click.ClickException(f"cannot write to {directory}: {exc}") from exc
    click.echo(f"{len(documents)} files in {directory}")


@contract.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False, exists=True))
def check(directory: Path) -> None:
    """Say which files of DIRECTORY are not what this version would write. Exit code 1 if there are any.

    \b
    Example:
      relay contract check docs/contract
    """
    documents = _documents(directory)
    lines = [f"{name} is left over: no such type" for name in _left_over(directory, documents)]
    for name, text in documents.items():
        file = directory / name
        if not file.is_file():
            lines.append(f"{name} is missing")
        elif file.read_bytes() != text.encode():
            lines.append(f"{name} differs")
    for line in lines:
        click.echo(line)
    if lines:
        click.echo(f'to make them anew: "relay contract write {directory}"', err=True)
        sys.exit(1)


@contract.command()
def metrics() -> None:
    """Print the list of metrics as Markdown.

    \b
    Example:
      relay contract metrics > docs/metrics.md
    """
    click.echo(metrics_page(), nl=False)


def _documents(directory: Path) -> dict[str, str]:
    """The text of each document by its file name."""
    texts = {f"{name}.json": _json_text(schema) for name, schema in schemas().items()}
    return {**texts, "asyncapi.yaml": _yaml_text(asyncapi(_examples(directory / _EXAMPLES)))}


def _examples(directory: Path) -> dict[str, JsonObject]:
    found: dict[str, JsonObject] = {}
    for file in sorted(directory.glob("*.json")):
        try:
            event = json.loads(file.read_bytes())
        except ValueError as exc:
            raise click.ClickException(f"{file} is not JSON: {exc}") from exc
        if not isinstance(event, dict):
            raise click.ClickException(f"{file} is not an event: an object is expected")
        found[file.stem] = event
    return found


def _left_over(directory: Path, documents: Mapping[str, str]) -> list[str]:
    """Schemas of types that the contract does not have any more."""
    others = (file for file in directory.glob("*.json") if file.name not in documents)
    return sorted(file.name for file in others if f'"$id": "{URN_PREFIX}'.encode() in file.read_bytes())


def _json_text(document: JsonObject) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


class _Dumper(yaml.SafeDumper):
    """Everything where it stands, without anchors, and text of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.text)


def _yaml_text(document: JsonObject) -> str:
    head = '# Made from the code that keeps the contract: "make contract". Schemas are the files beside this one.\n'
    return head + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
