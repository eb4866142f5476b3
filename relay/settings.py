"""All settings, read once: `RELAY_*` variables, and optionally one TOML file that they win over.

A secret can stand in a file of its own: `RELAY_RABBIT__URL_FILE` names the file that holds `RELAY_RABBIT__URL`.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from relay.adapters.archive import ArchiveSettings
from relay.adapters.coder import CoderSettings
from relay.adapters.database import DatabaseSettings
from relay.adapters.logs import LogSettings
from relay.adapters.ops import OpsSettings
from relay.adapters.rabbit import RabbitSettings
from relay.core.errors import WrongSettings
from relay.programs.archivist import ArchivistSettings
from relay.programs.follow import FollowSettings
from relay.programs.meter import MeterSettings
from relay.programs.worker import WorkerSettings

PREFIX = "RELAY_"
CONFIG_FILE = "RELAY_CONFIG_FILE"
_IN_FILES = ("RELAY_RABBIT__URL", "RELAY_DATABASE__URL")  # the token's file has a field of its own: it is read again
_OF_THE_TESTS = "RELAY_TEST_"


# What `Settings` reads instead of the process environment, while `read_settings` runs.
_given: ContextVar[Mapping[str, str]] = ContextVar("given")


class _Given(EnvSettingsSource):
    """Variables from a mapping that holds nothing but known names."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in _given.get({}).items()}


class Settings(BaseSettings):
    """One group per adapter and program, each declared beside its user."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid", hide_input_in_errors=True
    )

    coder: CoderSettings | None = None
    rabbit: RabbitSettings | None = None
    database: DatabaseSettings = DatabaseSettings()
    archive: ArchiveSettings | None = None
    ops: OpsSettings = OpsSettings()
    log: LogSettings = LogSettings()
    worker: WorkerSettings = WorkerSettings()
    follow: FollowSettings = FollowSettings()
    meter: MeterSettings = MeterSettings()
    archivist: ArchivistSettings = ArchivistSettings()

    @property
    def broker(self) -> RabbitSettings:
        """The broker, for what cannot do without it.

        Raises:
            WrongSettings: It is not set.
        """
        if self.rabbit is None:
            raise WrongSettings("not set: RELAY_RABBIT__URL (amqp://user:password@host:5672/vhost)")
        return self.rabbit

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Variables win over what comes as arguments, which is the file's content."""
        return _Given(settings_cls), init_settings


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of this process.

    Args:
        environment: Instead of `os.environ`, for tests; only its `RELAY_*` names are looked at.

    Raises:
        WrongSettings: A name is unknown (the text has the nearest known one), a value is impossible, a file cannot
            be read. The text never holds a value.
    """
    given = dict(os.environ if environment is None else environment)
    _refuse_unknown(given)
    content = _file_content(given)
    secrets = {name: _secret(Path(given[f"{name}_FILE"]), name) for name in _IN_FILES if given.get(f"{name}_FILE")}
    if doubled := next((name for name in secrets if given.get(name)), None):
        raise WrongSettings(f"{doubled} and {doubled}_FILE are both set: leave one of them out")
    passed = set(known_names()) - {CONFIG_FILE, *(f"{name}_FILE" for name in _IN_FILES)}
    known = {name: value for name, value in {**given, **secrets}.items() if name in passed}
    _refuse_broken_json(known)

    reading = _given.set(known)
    try:
        return Settings(**content)
    except ValidationError as exc:
        raise WrongSettings("\n".join(_complaint(dict(error)) for error in exc.errors())) from None
    finally:
        _given.reset(reading)


def known_names() -> Iterator[str]:
    """Every variable that means something."""
    yield CONFIG_FILE
    yield from (f"{name}_FILE" for name in _IN_FILES)
    for name, field in Settings.model_fields.items():
        group = model_in(field.annotation)
        yield from (f"{PREFIX}{name}__{inner}".upper() for inner in (group.model_fields if group else ()))


def model_in(annotation: object) -> type[BaseModel] | None:
    """The group of settings that a field holds, also where it may be None."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _refuse_unknown(given: Mapping[str, str]) -> None:
    known = set(known_names())
    for name in sorted(given):
        if not name.startswith(PREFIX) or name.startswith(_OF_THE_TESTS) or name in known:
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f": did you mean {nearest[0]}?" if nearest else ""
        raise WrongSettings(f"unknown setting {name}{hint}")


def _refuse_broken_json(given: Mapping[str, str]) -> None:
    """Lists and tables are given as JSON. pydantic-settings names the group of a broken one, not the setting."""
    for name in sorted(given):
        group, _, field = name.removeprefix(PREFIX).lower().partition("__")
        model = model_in(Settings.model_fields[group].annotation)
        if model is None or get_origin(model.model_fields[field].annotation) not in (Mapping, Sequence):
            continue
        try:
            json.loads(given[name])
        except ValueError as exc:
            raise WrongSettings(f"{name}: not JSON: {exc}") from None


def _file_content(given: Mapping[str, str]) -> dict[str, Any]:
    path = given.get(CONFIG_FILE)
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise WrongSettings(f"{CONFIG_FILE}: {path} cannot be read: {exc.strerror}") from exc
    except ValueError as exc:
        raise WrongSettings(f"{CONFIG_FILE}: {path} is not TOML: {exc}") from exc


def _secret(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as exc:
        raise WrongSettings(f"{name}_FILE: {path} cannot be read") from exc


def _complaint(error: Mapping[str, Any]) -> str:
    """`RELAY_OPS__PORT: input should be less than or equal to 65535`; the nearest name where the name is wrong."""
    where = [str(part) for part in error["loc"]]
    name = PREFIX + "__".join(where).upper()
    if error["type"] == "extra_forbidden":
        if name in known_names():
            return f"{name} is read from the environment only, not from the file that {CONFIG_FILE} names"
        nearest = difflib.get_close_matches(name, set(known_names()), n=1, cutoff=0.5)
        return f"unknown setting {name}" + (f": did you mean {nearest[0]}?" if nearest else "")
    said = str(error["msg"]).removeprefix("Value error, ")
    if said[1:2].islower():  # not of an abbreviation
        said = said[0].lower() + said[1:]
    return f"{name}: {said}" if error["type"] != "missing" else f"{name} is not set"
