"""The list of metrics, made from those that the modules declare."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from prometheus_client.metrics import MetricWrapperBase

import relay.adapters
import relay.programs

_INTRODUCTION = """\
# Metrics

What `/metrics` on the ops port tells. A process shows all of these, and leaves at 0 what is not its own work: a meter
follows no chats. The Python client library adds some about the process itself (`process_…`, `python_…`). A histogram
comes as `…_bucket`, `…_sum` and `…_count`. No label holds a chat or a user. Label values that are listed are there
with 0 from the start, so that the first rise is seen.

This page is made from the code: `make contract`.

| metric | type | labels | what it says |
|---|---|---|---|
"""


def metrics_page() -> str:
    """Markdown: one row per metric, by name. To be called in a fresh process: label values seen since would show."""
    rows = {name: row for module in _modules() for metric in _declared(module) for name, row in [_row(metric)]}
    return _INTRODUCTION + "".join(rows[name] for name in sorted(rows))


def _modules() -> Iterator[ModuleType]:
    """All modules of the programs and the adapters, which are those that measure. Migrations are scripts."""
    for package in (relay.adapters, relay.programs):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if not module.ispkg:
                yield importlib.import_module(module.name)


def _declared(module: ModuleType) -> Iterator[MetricWrapperBase]:
    return (value for value in vars(module).values() if isinstance(value, MetricWrapperBase))


def _row(metric: MetricWrapperBase) -> tuple[str, str]:
    family = next(iter(metric.describe()))
    name = f"{family.name}_total" if family.type == "counter" else family.name
    samples = next(iter(metric.collect())).samples
    labels = "<br>".join(
        f"`{label}`{_known({sample.labels[label] for sample in samples})}"
        for label in metric._labelnames  # there is no public way to them
    )
    return name, f"| `{name}` | {family.type} | {labels} | {_cell(family.documentation)} |\n"


def _known(values: set[str]) -> str:
    return f": {', '.join(_cell(value) for value in sorted(values))}" if values else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
