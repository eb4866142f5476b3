"""The promises of the project's own files: which module may import which, why each dependency is here."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def check_floors(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the import contracts of this project over `directory/relay`."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", str(ROOT / "pyproject.toml")],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def empty_floors(tmp_path: Path) -> Path:
    """A copy of the package with every module in place and nothing in it."""
    for module in (ROOT / "relay").rglob("*.py"):
        copy = tmp_path / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    return tmp_path


@pytest.mark.parametrize(
    ("module", "imports", "contract"),
    [
        pytest.param("core/tail", "asyncio", "The core is pure", id="core has no loop"),
        pytest.param("core/tail", "time", "The core is pure", id="core has no clock"),
        pytest.param("core/events", "relay.ports", "Floors: a module", id="core knows no port"),
        pytest.param("core/events", "relay.core.tail", "Floors within the core", id="an event knows no tail"),
        pytest.param("adapters/rabbit", "relay.programs.follow", "Floors: a module", id="adapter knows no program"),
        pytest.param("programs/follow", "relay.adapters.rabbit", "Floors: a module", id="program knows no adapter"),
        pytest.param("programs/follow", "relay.programs.worker", "Floors within the programs", id="follower no worker"),
        pytest.param("adapters/coder", "relay.settings", "Floors: a module", id="adapter reads no settings"),
        pytest.param("simulator/server", "relay.core.events", "The simulator shares no rule", id="simulator is apart"),
        pytest.param("codersdk/client", "relay.ports", "Floors: a module", id="SDK stands alone"),
        pytest.param("programs/demo", "relay.simulator", "Floors: a module", id="demo gets it from cli"),
    ],
)
def test_an_import_from_the_wrong_floor_is_found(empty_floors: Path, module: str, imports: str, contract: str) -> None:
    imported = empty_floors / imports.replace(".", "/")
    if imports.startswith("relay.") and not imported.is_dir():
        imported.with_suffix(".py").touch()
    (empty_floors / "relay" / module).with_suffix(".py").write_text(f"import {imports}\n")
    checked = check_floors(empty_floors)
    assert checked.returncode == 1
    broken = [line for line in checked.stdout.splitlines() if line.endswith("BROKEN")]
    assert [line for line in broken if line.startswith(contract)], checked.stdout


def test_empty_floors_keep_every_contract(empty_floors: Path) -> None:
    checked = check_floors(empty_floors)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(PROJECT['tool']['importlinter']['contracts'])} kept, 0 broken" in checked.stdout


def test_every_direct_dependency_has_its_reason() -> None:
    groups = PROJECT["dependency-groups"]
    declared = {
        requirement.partition(">=")[0].partition("[")[0]
        for requirement in PROJECT["project"]["dependencies"] + groups["dev"] + groups["build"]
    }
    rows = [line for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines() if line.startswith("| ")]
    explained = {name for row in rows for name in row.split("|")[1].strip().split(", ")} - {"package"}
    assert explained == declared
