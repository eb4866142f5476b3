"""What `ObjectStore` promises, kept by a directory and by memory."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from relay.adapters.archive import ArchiveSettings, checked, open_objects
from relay.core.errors import Unavailable, WrongSettings
from relay.ports import ObjectStore

PATH = "coder.example/chats/0190-ab/1/transcript.jsonl.zst"


@pytest.fixture(params=["file", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return open_objects(
        ArchiveSettings(url="memory:///" if request.param == "memory" else f"file://{tmp_path}/archive")
    )


# --- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"\x00\xff", os.urandom(12_000_000)], ids=["empty", "binary", "12 MB"])
async def test_what_was_put_is_got(objects: ObjectStore, body: bytes) -> None:
    await objects.put(PATH, body)
    read = await objects.get(PATH)
    assert type(read) is bytes
    assert read == body


async def test_an_object_is_replaced_whole(objects: ObjectStore) -> None:
    await objects.put(PATH, b"the first is longer")
    await objects.put(PATH, b"second")
    assert await objects.get(PATH) == b"second"


@pytest.mark.parametrize("path", [PATH, "coder.example/chats", "coder.example"])
async def test_an_object_that_is_not_there_is_not_found(objects: ObjectStore, path: str) -> None:
    await objects.put("coder.example/chats/other", b"x")
    with pytest.raises(FileNotFoundError):
        await objects.get(path)


async def test_paths_begin_with_the_prefix_and_are_sorted(objects: ObjectStore) -> None:
    for path in ("a/2/x", "a/10/x", "a/1", "ab/1", "b/1"):
        await objects.put(path, b"")
    assert list(await objects.paths("a/1")) == ["a/1", "a/10/x"]
    assert list(await objects.paths("a/")) == ["a/1", "a/10/x", "a/2/x"]
    assert list(await objects.paths("a")) == ["a/1", "a/10/x", "a/2/x", "ab/1"]
    assert list(await objects.paths("")) == ["a/1", "a/10/x", "a/2/x", "ab/1", "b/1"]
    assert list(await objects.paths("nothing/here")) == []


async def test_a_list_of_several_pages_is_whole(objects: ObjectStore) -> None:
    wanted = [f"many/{number:03}" for number in range(120)]
    await asyncio.gather(*(objects.put(path, b"") for path in wanted))
    assert list(await objects.paths("many/")) == wanted


BAD_PATHS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../x",
    "a/./x",
    "a//x",
    "a/",
    "a b",
    "a#1",
    "a%2e",
    "ä",
    "a\\b",
    "a\nb",
    "a\x00",
    "...",
]


@pytest.mark.parametrize("path", BAD_PATHS)
async def test_a_path_that_leads_elsewhere_is_refused(objects: ObjectStore, path: str) -> None:
    with pytest.raises(ValueError, match="not a path of an archive"):
        await objects.put(path, b"x")
    with pytest.raises(ValueError, match="not a path of an archive"):
        await objects.get(path)
    assert list(await objects.paths("")) == []


@given(st.text(alphabet="a./\\~\n#%-", max_size=12))
def test_an_accepted_path_stays_below_the_root(path: str) -> None:
    try:
        below = Path("/root-of-archive", checked(path))
    except ValueError:
        return
    assert os.path.normpath(below) == str(below)
    assert str(below) == f"/root-of-archive/{path}"


# --- the directory -------------------------------------------------------------------------------------------------


async def test_the_directory_is_made_and_outlives_the_process(tmp_path: Path) -> None:
    settings = ArchiveSettings(url=f"file://{tmp_path}/new%20archive/deep/")
    await open_objects(settings).put("a/b.json", b"{}")
    assert (tmp_path / "new archive/deep/a/b.json").read_bytes() == b"{}"
    assert await open_objects(settings).get("a/b.json") == b"{}"
    assert open_objects(settings).url == f"file://{tmp_path}/new%20archive/deep"


async def test_a_reader_never_sees_half_an_object(tmp_path: Path) -> None:
    objects = open_objects(ArchiveSettings(url=f"file://{tmp_path}"))
    await objects.put("x", b"a" * 3_000_000)
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            body = (tmp_path / "x").read_bytes()
            seen.add(body[:1] if body == body[:1] * 3_000_000 else b"half")

    reader = asyncio.create_task(asyncio.to_thread(read))
    for number in range(20):
        await objects.put("x", b"ab"[number % 2 : number % 2 + 1] * 3_000_000)
    done.set()
    await reader
    assert seen <= {b"a", b"b"}


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_file_in_the_way_is_told_at_the_start(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(WrongSettings, match="cannot be opened"):
        open_objects(ArchiveSettings(url=f"file://{tmp_path}/{where}"))


async def test_a_disk_that_fails_is_unavailable(tmp_path: Path) -> None:
    objects = open_objects(ArchiveSettings(url=f"file://{tmp_path}"))
    (tmp_path / "chats").write_text("in the way of a directory")
    with pytest.raises(Unavailable, match="Not a directory") as caught:
        await objects.put("chats/1", b"x")
    assert "\n" not in str(caught.value)


async def test_a_disk_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    objects = open_objects(ArchiveSettings(url=f"file://{tmp_path}", operation_timeout_seconds=0.2))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it waits for a writer
    try:
        with pytest.raises(Unavailable, match="did not answer in time"):
            await asyncio.wait_for(objects.get("pipe"), timeout=10)
    finally:
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("relative/path", "expected file:///directory"),
        ("file://host/path", "three slashes"),
        ("file:relative", "three slashes"),
        ("file:///", "three slashes"),
        ("memory:///x", "memory has no paths"),
        ("gopher://x", "expected file:///directory"),
        ("s3:///prefix", "expected file:///directory"),
        ("s3://key:secret@bucket", "credentials"),
        ("s3://bucket?secret_access_key=secret", "credentials"),
    ],
)
def test_a_url_that_cannot_work_is_told_at_once(url: str, hint: str) -> None:
    with pytest.raises(ValidationError, match=hint) as caught:
        ArchiveSettings(url=url)
    assert "secret" not in str(caught.value)


def test_a_bucket_is_handed_to_obstore() -> None:
    assert open_objects(ArchiveSettings(url="s3://bucket/prefix/")).url == "s3://bucket/prefix"
