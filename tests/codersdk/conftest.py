"""One scripted server for the vectors of a file."""

from collections.abc import AsyncIterator

import pytest

from tests.codersdk.scripted_server import ScriptedServer, scripted_server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever proxy the environment names: it is not for the servers of these tests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    async with scripted_server() as opened:
        yield opened
