"""What the library costs those who only import it, and what types it gives them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )


def test_importing_it_loads_nothing_of_the_relay_and_no_network() -> None:
    program = "import sys, json; from relay.codersdk import CoderClient; print(json.dumps(sorted(sys.modules)))"
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    assert [name for name in loaded if name.startswith("relay.") and not name.startswith("relay.codersdk")] == []
    heavy = {"aio_pika", "aiohttp", "asyncpg", "httpx", "sqlalchemy", "ssl", "structlog", "websockets"}
    assert heavy & set(loaded) == set()


WRONG = """
from relay.codersdk import ChatMessagePart, CoderClient
ChatMessagePart(text=5)
async def use(coder: CoderClient) -> str:
    await coder.list_chats(limit="10")
    await coder.get_chat("an id")
    return await coder.get_build_info()
"""


def test_it_gives_users_types(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """mypy, as a user of the library runs it: strict, without pydantic's plugin and this project's settings."""
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = true\nexplicit_package_bases = true\nfollow_imports = silent\n")
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("mypy-of-a-user")  # its own: other settings, other results
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    right = ROOT / "tests" / "codersdk" / "typed_example.py"
    options = ["--config-file", str(settings), "--cache-dir", str(cache), "--no-error-summary"]
    checked = run("-m", "mypy", *options, str(right), str(wrong))
    lines = [line.split(": ")[0].rsplit("/", 1)[-1] for line in checked.stdout.splitlines()]
    assert lines == ["wrong.py:3", "wrong.py:5", "wrong.py:6", "wrong.py:7"], checked.stdout + checked.stderr
