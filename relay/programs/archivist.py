"""Keep a verified copy of every finished chat: collect, compare with Coder, render, store, read back, verify, tell,
and only then archive in Coder.

Each step leaves a trace that the next start finds, so that a crash between two of them resumes there. Nothing is
archived in Coder before its copy was written, read back and verified.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast
from urllib.parse import urlsplit
from uuid import UUID

import structlog
import zstandard
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, PositiveFloat, PositiveInt

from relay.core.backoff import backoff
from relay.core.errors import ChatGone, ChatRefused, Unauthorized, Unavailable
from relay.core.events import ArchiveData, ChatRef, Event, JsonObject, Origin, encode_json, event_id, utc
from relay.core.transcript import differences
from relay.ports import IDLE_STATUSES, ArchiveRecord, Archives, Bus, Clock, Collected, ObjectStore, Uncopied, Upstream
from relay.programs.chance import Chance
from relay.programs.deadlines import Deadlines
from relay.programs.inbox import Inbox

log = structlog.get_logger(__name__)

OBJECTS = Counter(
    "relay_archive_objects_total",
    "Transcripts archived. failed: the copy read back was not the one written, nothing was archived in Coder.",
    ["outcome"],
)
BYTES = Counter("relay_archive_bytes_total", "Compressed bytes written.")
DIFFERENCES = Counter(
    "relay_archive_differences_total",
    "Chats whose events did not fold to what Coder has; Coder's was archived. Any rise: events were lost.",
)
SEALED = Counter("relay_archive_sealed_total", "Chats archived in Coder after their copy was verified.")
SECONDS = Histogram(
    "relay_archive_upload_duration_seconds",
    "Time to write and read back one transcript. A rise: the object store is slow.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
DUE = Gauge("relay_archive_due_chats", "Finished chats that wait for their copy.")
for _outcome in ("ok", "failed"):
    OBJECTS.labels(_outcome)

QUEUE = "relay.archivist"
_LEVEL = 10  # of zstd: transcripts are written once and kept for years


class ArchivistSettings(BaseModel, frozen=True, extra="forbid"):
    """When a chat counts as finished, and whether to archive it in Coder once its copy is safe."""

    idle_seconds: PositiveFloat = 300.0  # without an event, after its last turn ended
    look_seconds: PositiveFloat = 10.0  # between two looks for finished chats
    archive_in_coder: bool = False
    prefetch: PositiveInt = 50
    patience: PositiveInt = 3  # looks at a difference between events and Coder before Coder's side is taken
    deadline_days: PositiveInt = 7  # an archived chat without a copy that Coder deletes within so many days comes first
    retention_seconds: PositiveFloat = 3600.0  # after which Coder is asked again when it deletes archived chats


@dataclass(frozen=True, slots=True)
class Rendered:
    """One transcript as it is written, the same bytes for the same chat."""

    body: bytes
    sha256: str
    messages: int
    first_id: int | None
    last_id: int | None


def render(messages: Sequence[JsonObject]) -> Rendered:
    """Messages as JSON lines, ascending by id, compressed."""
    ordered = sorted(messages, key=lambda message: cast(int, message["id"]))
    lines = b"".join(encode_json(message) + b"\n" for message in ordered)
    body = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(lines)
    ids = [cast(int, message["id"]) for message in ordered]
    return Rendered(body, hashlib.sha256(body).hexdigest(), len(ids), min(ids, default=None), max(ids, default=None))


def read_transcript(body: bytes) -> list[JsonObject]:
    """The messages of a transcript, the opposite of `render`. Raises ValueError when it is damaged."""
    try:
        lines = zstandard.ZstdDecompressor().decompressobj().decompress(body)
    except zstandard.ZstdError as exc:
        raise ValueError(f"not a transcript: {exc}") from exc
    return [json.loads(line) for line in lines.split(b"\n") if line]


class Archivist:
    """The consumer of `relay.archivist`, and the look for finished chats."""

    def __init__(
        self,
        *,
        bus: Bus,
        archives: Archives,
        objects: ObjectStore,
        upstream: Upstream,
        clock: Clock,
        settings: ArchivistSettings,
    ) -> None:
        self._bus = bus
        self._archives = archives
        self._objects = objects
        self._upstream = upstream
        self._clock = clock
        self._settings = settings
        self._inbox = Inbox("archivist", QUEUE, bus=bus, clock=clock, prefetch=settings.prefetch)
        self._deadlines = Deadlines(
            upstream, archives, clock, days=settings.deadline_days, retention_seconds=settings.retention_seconds
        )
        self._differed: dict[UUID, int] = {}  # looks at chats whose events were not yet what Coder has
        # Monotonic time at which a chat that could not be copied, or archived in Coder, is tried again.
        self._copy_again: dict[UUID, float] = {}
        self._seal_again: dict[UUID, float] = {}
        self._gone: dict[UUID, Uncopied] = {}  # what was known of chats that Coder does not have any more

    async def run(self, report: Callable[[bool, str], None] = lambda ok, reason: None) -> None:
        """Collect and archive until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._inbox.work_off(self._archives.collect, report), name="collect")
            group.create_task(self._archive_for_ever(), name="archive")

    def status(self) -> dict[str, object]:
        """For `/status`."""
        return self._deadlines.status()

    async def _archive_for_ever(self) -> None:
        delays = backoff(chance=Chance())
        while True:
            try:
                await self.look()
                delays = backoff(chance=Chance())
                wait = self._settings.look_seconds
            except Unavailable as exc:
                log.warning("archiving_interrupted", reason=str(exc))
                wait = max(next(delays), exc.retry_after_seconds or 0.0)
            except Unauthorized as exc:
                log.warning("token_refused", reason=str(exc))
                wait = self._settings.look_seconds
            await self._clock.sleep(wait)

    async def look(self) -> None:
        """Finish what a crash left half done, then archive every chat that is due, first what Coder soon deletes."""
        for record in await self._archives.unfinished_archives(seal=self._settings.archive_in_coder):
            await self._finish(record)
        endangered = await self._deadlines.endangered()
        idle_since = self._clock.now() - timedelta(seconds=self._settings.idle_seconds)
        due = [each for each in await self._archives.due(idle_since=idle_since) if not self._is_gone(each)]
        DUE.set(len(due))
        ahead = {each.chat.chat_id for each in endangered}
        waiting = [*endangered, *(each for each in due if each.chat.chat_id not in ahead)]
        for left, uncopied in enumerate(waiting, 1):
            chat_id = uncopied.chat.chat_id
            if self._clock.monotonic() < self._copy_again.get(chat_id, 0.0):
                continue
            self._copy_again.pop(chat_id, None)
            try:
                await self._archive(uncopied)
            except ChatGone as exc:
                self._deadlines.gone(uncopied)
                self._gone[chat_id] = uncopied
                log.warning("archive_refused", chat_id=str(chat_id), reason=str(exc))
            except ChatRefused as exc:
                self._set_aside(self._copy_again, chat_id)
                log.warning("archive_refused", chat_id=str(chat_id), reason=str(exc))
            DUE.set(min(len(due), len(waiting) - left))

    def _is_gone(self, uncopied: Uncopied) -> bool:
        """Coder said so, and nothing that was heard of the chat since tells otherwise."""
        return self._gone.get(uncopied.chat.chat_id) == uncopied

    def _set_aside(self, again: dict[UUID, float], chat_id: UUID) -> None:
        """Not at once again: the others have to get their turn, and Coder time to change its mind."""
        again[chat_id] = self._clock.monotonic() + self._settings.idle_seconds

    # --- one chat -----------------------------------------------------------------------------------------------------

    async def _archive(self, uncopied: Uncopied) -> None:
        chat = uncopied.chat
        collected = await self._archives.collected(chat.deployment, chat.chat_id)
        if collected is None or collected.changed_at != uncopied.changed_at:
            return  # it goes on: the next look sees whether it is due
        row = await self._upstream.chat(chat.chat_id)
        page = await self._upstream.messages(chat.chat_id, down_to=0)
        if not self._agrees(collected, page.messages):
            return
        rendered = render(page.messages)
        earlier = await self._archives.archives(chat.deployment, chat.chat_id)
        version = 1 + max((record.version for record in earlier), default=0)
        record = await self._store(chat, row, rendered, version)
        if record is None:
            return
        await self._archives.add_archive(record, upto=collected.changed_at)
        self._deadlines.copied(chat.chat_id)
        await self._finish(record)

    def _agrees(self, collected: Collected, truth: Sequence[JsonObject]) -> bool:
        """False while the events may still be on their way to what Coder has."""
        folded = {key: json.loads(body) for key, body in collected.messages.items()}
        lines = differences(folded, {cast(int, message["id"]): message for message in truth})
        chat_id = collected.chat.chat_id
        looks = self._differed.pop(chat_id, 0) + 1
        if not lines:
            return True
        if looks < self._settings.patience:
            self._differed[chat_id] = looks
            self._set_aside(self._copy_again, chat_id)  # each look reads the whole chat
            return False
        DIFFERENCES.inc()
        log.error("archive_differs", chat_id=str(chat_id), differences=lines[:20], count=len(lines))
        return True

    async def _store(self, chat: ChatRef, row: JsonObject, rendered: Rendered, version: int) -> ArchiveRecord | None:
        """Write and read back; None when what came back is not what was written, which is told."""
        folder = f"{_host(chat.deployment)}/{chat.owner_id}/{chat.chat_id}/v{version:04d}"
        transcript, manifest = f"{folder}/transcript.jsonl.zst", f"{folder}/manifest.json"
        record = ArchiveRecord(
            chat=chat,
            version=version,
            url=f"{self._objects.url.rstrip('/')}/{transcript}",
            manifest_url=f"{self._objects.url.rstrip('/')}/{manifest}",
            sha256=rendered.sha256,
            size=len(rendered.body),
            messages=rendered.messages,
            first_id=rendered.first_id,
            last_id=rendered.last_id,
            stored_at=self._clock.now(),
            published=False,
            sealed=False,
        )
        with SECONDS.time():
            await self._objects.put(transcript, rendered.body)
            await self._objects.put(manifest, encode_json(manifest_of(record, row)))
            found = await self._hash_of(transcript)
        if found != rendered.sha256:
            OBJECTS.labels("failed").inc()
            log.error(
                "archive_damaged", chat_id=str(chat.chat_id), url=record.url, expected=rendered.sha256, found=found
            )
            await self._bus.publish([archive_event(record, "failed", reason=f"read back sha256 {found}")])
            return None
        OBJECTS.labels("ok").inc()
        BYTES.inc(len(rendered.body))
        log.info("transcript_stored", chat_id=str(chat.chat_id), version=version, bytes=record.size)
        return record

    async def _hash_of(self, path: str) -> str:
        try:
            return hashlib.sha256(await self._objects.get(path)).hexdigest()
        except FileNotFoundError:
            return "none: it is not there"

    async def _finish(self, record: ArchiveRecord) -> None:
        """Tell that the copy is stored; archive in Coder, if asked to; tell that."""
        if not record.published:
            await self._bus.publish([archive_event(record, "stored")])
            await self._archives.mark_archive(record, published=True)
        if record.sealed or not self._settings.archive_in_coder:
            return
        if self._clock.monotonic() < self._seal_again.get(record.chat.chat_id, 0.0):
            return
        self._seal_again.pop(record.chat.chat_id, None)
        if not await self._may_seal(record):
            return
        if not await self._archived_in_coder(record):
            self._set_aside(self._seal_again, record.chat.chat_id)
            return
        await self._bus.publish([archive_event(record, "sealed")])
        await self._archives.mark_archive(record, sealed=True)
        SEALED.inc()

    async def _may_seal(self, record: ArchiveRecord) -> bool:
        # What went on gets another copy, which seals it. Coder archives a chat together with those of its subagents.
        if not await self._archives.family_copied(record.chat):
            return False
        collected = await self._archives.collected(record.chat.deployment, record.chat.chat_id)
        # One that is at work some servers would stop.
        return collected is None or collected.archived or collected.status in IDLE_STATUSES

    async def _archived_in_coder(self, record: ArchiveRecord) -> bool:
        """Archive the chat in Coder; False when it has to wait."""
        chat_id = record.chat.chat_id
        try:
            await self._upstream.archive_chat(chat_id)
            if record.chat.root_chat_id != chat_id and not (await self._upstream.chat(chat_id)).get("archived"):
                return False  # it goes with its root, and some servers do not archive it alone
        except ChatGone:
            log.info("chat_gone", chat_id=str(chat_id))
        except ChatRefused as exc:
            if exc.status == 409:
                log.info("archive_in_coder_postponed", chat_id=str(chat_id), reason=str(exc))
            else:
                log.warning("archive_in_coder_refused", chat_id=str(chat_id), reason=str(exc))
            return False
        return True


def manifest_of(record: ArchiveRecord, chat: Mapping[str, object]) -> JsonObject:
    """What the copy is: enough to check it and to find its chat again."""
    return {
        "format": "coder-chat-relay/transcript/1",
        "deployment": record.chat.deployment,
        "chat_id": str(record.chat.chat_id),
        "owner_id": str(record.chat.owner_id),
        "root_chat_id": str(record.chat.root_chat_id),
        "version": record.version,
        "stored_at": utc(record.stored_at),
        "transcript": {
            "name": "transcript.jsonl.zst",
            "sha256": record.sha256,
            "bytes": record.size,
            "messages": record.messages,
            "first_id": record.first_id,
            "last_id": record.last_id,
        },
        "chat": dict(chat),
    }


def archive_event(record: ArchiveRecord, event: str, *, reason: str | None = None) -> Event:
    """`archive.stored`, `archive.failed` or `archive.sealed`; one of each per version of a chat's archive."""
    data: ArchiveData = {
        "url": record.url,
        "sha256": record.sha256,
        "bytes": record.size,
        "messages": record.messages,
        "first_id": record.first_id,
        "last_id": record.last_id,
    }
    if reason is not None:
        data["reason"] = reason
    return Event(
        id=event_id(record.chat, f"archive.{event}", record.version, record.sha256),
        family="archive",
        event=event,
        detail="_",
        chat=record.chat,
        content=data,
        time=utc(record.stored_at),
        origin=Origin.RECONCILE,
        session=0,
        position=record.version,
    )


def _host(deployment: str) -> str:
    return urlsplit(deployment).netloc.rpartition("@")[2].replace(":", "_") or "coder"
