"""Where archives go: a directory, an object store of a cloud, or memory, all through obstore."""

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import LocalStore, MemoryStore, from_url
from obstore.store import ObjectStore as Backend
from pydantic import BaseModel, PositiveFloat, field_validator

from relay.core.errors import Unavailable, WrongSettings

_REFUSALS = (
    PermissionDeniedError,
    UnauthenticatedError,
    InvalidPathError,
    NotSupportedError,
    UnknownConfigurationKeyError,
)
_CLOUDS = ("s3", "gs", "az")
_SEGMENT = re.compile(r"[A-Za-z0-9_=@.-]*[A-Za-z0-9_=@-][A-Za-z0-9_=@.-]*", re.ASCII)  # not all dots


class ArchiveSettings(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """Where archives go.

    `url` is `file:///directory` (made when it is missing) or `memory:///` (gone with the process). `s3://bucket/prefix`,
    `gs://…` and `az://…` are handed to obstore, with credentials from the environment as its documentation says; no
    test of ours has seen them work.
    """

    url: str
    operation_timeout_seconds: PositiveFloat = 60.0  # of one object; of one page of a list

    @field_validator("url")
    @classmethod
    def _known(cls, value: str) -> str:
        url = urlsplit(value)
        if "@" in url.netloc or url.query or url.fragment:
            raise ValueError("leave credentials and options out of the archive's URL: they come from the environment")
        if url.scheme == "file":
            if url.netloc not in ("", "localhost") or not url.path.startswith("/") or not url.path.strip("/"):
                raise ValueError("a directory needs three slashes and a whole path: file:///var/lib/relay/archive")
        elif url.scheme == "memory":
            if url.netloc or url.path not in ("", "/"):
                raise ValueError("memory has no paths: memory:///")
        elif url.scheme not in _CLOUDS or not url.netloc:
            raise ValueError("expected file:///directory, memory:///, s3://bucket, gs://bucket or az://container")
        return value.rstrip("/") if url.scheme != "memory" else "memory:///"


class ObstoreObjects:
    """Keeps the promise of `ObjectStore`. A file appears whole or not at all: it is renamed into its place.

    Paths are one or more segments of ASCII letters, digits and `_=@.-` with `/` between them, none of only dots;
    that is what every store takes as it is. Anything else is a `ValueError`.
    """

    def __init__(self, backend: Backend, settings: ArchiveSettings, directory: Path | None = None) -> None:
        self._backend = backend
        self._settings = settings
        self._directory = directory  # of a backend of files

    @property
    def url(self) -> str:
        return self._settings.url

    async def put(self, path: str, body: bytes) -> None:
        async with self._errors():
            await obstore.put_async(self._backend, checked(path), body)
            if self._directory is not None:
                # obstore leaves it to the system when a file gets to the disk. A copy that a power cut can take away
                # is no reason to archive the chat in Coder.
                await asyncio.to_thread(_to_disk, self._directory / path)

    async def get(self, path: str) -> bytes:
        async with self._errors():
            found = await obstore.get_async(self._backend, checked(path))
            return bytes(await found.bytes_async())

    async def paths(self, prefix: str) -> Iterable[str]:
        # Stores list by whole segments.
        directory, slash, _ = prefix.rpartition("/")
        if slash:
            checked(directory)
        pages = aiter(obstore.list(self._backend, directory or None))
        found: list[str] = []
        while True:
            async with self._errors():
                page = await anext(pages, None)
            if page is None:
                return sorted(path for path in found if path.startswith(prefix))
            found += (entry["path"] for entry in page)

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """The operation's deadline, and what an error of the store means."""
        try:
            async with asyncio.timeout(self._settings.operation_timeout_seconds):
                yield
        except FileNotFoundError:
            raise
        except TimeoutError as exc:
            raise Unavailable(f"archive {self.url} did not answer in time") from exc
        except _REFUSALS as exc:
            raise WrongSettings(
                f"archive {self.url} refuses us: {_first_line(exc)}; check credentials and rights"
            ) from exc
        except (BaseError, OSError) as exc:
            raise Unavailable(f"archive {self.url}: {_first_line(exc)}") from exc


def open_objects(settings: ArchiveSettings) -> ObstoreObjects:
    """The object store of a URL. A cloud is not asked for anything yet.

    Raises:
        WrongSettings: The directory cannot be made or written to, or obstore lacks an option.
    """
    url = urlsplit(settings.url)
    try:
        if url.scheme == "memory":
            return ObstoreObjects(MemoryStore(), settings)
        if url.scheme == "file":
            directory = Path(unquote(url.path))
            return ObstoreObjects(_local(directory), settings, directory)
        return ObstoreObjects(from_url(settings.url), settings)
    except (BaseError, OSError, ValueError) as exc:
        raise WrongSettings(f"archive {settings.url} cannot be opened: {_first_line(exc)}") from exc


def _local(directory: Path) -> LocalStore:
    directory.mkdir(parents=True, exist_ok=True)
    # Better told now than with the first archive.
    probe = directory / ".relay-write-test"
    probe.touch()
    probe.unlink()
    return LocalStore(directory)


def _to_disk(file: Path) -> None:
    for path in (file, file.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checked(path: str) -> str:
    """The path, if every store takes it as it is; `ValueError` otherwise."""
    if not all(_SEGMENT.fullmatch(segment) for segment in path.split("/")):
        raise ValueError(f"not a path of an archive: {path!r}")
    return path


def _first_line(exc: Exception) -> str:
    """obstore adds a dump of its insides."""
    return str(exc).partition("\n")[0] or type(exc).__name__
