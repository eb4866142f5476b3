"""The promises of the project's own files: which module may import which, why each dependency is here."""

import re
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


def empty_copy(directory: Path) -> None:
    """Put the package there with every module in place and nothing in it."""
    for module in (ROOT / "relay").rglob("*.py"):
        copy = directory / module.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()


WRONG = [
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
]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is said of each broken contract, by its name: all wrong imports in one package, and one run over it."""
    directory = tmp_path_factory.mktemp("wrong")
    empty_copy(directory)
    for module, imports, _ in (case.values for case in WRONG):
        imported = directory / str(imports).replace(".", "/")
        if str(imports).startswith("relay.") and not imported.is_dir():
            imported.with_suffix(".py").touch()
        with (directory / "relay" / str(module)).with_suffix(".py").open("a") as file:
            file.write(f"import {imports}\n")
    checked = check_floors(directory)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    said = checked.stdout.partition("Broken contracts\n")[2]
    titled = re.split(r"^(.+)\n-+$", said, flags=re.MULTILINE)
    return dict(zip(titled[1::2], titled[2::2], strict=True))


@pytest.mark.parametrize(("module", "imports", "contract"), WRONG)
def test_an_import_from_the_wrong_floor_is_found(
    complaints: dict[str, str], module: str, imports: str, contract: str
) -> None:
    found = "".join(text for name, text in complaints.items() if name.startswith(contract))
    assert f"relay.{module.replace('/', '.')} -> {imports} (l." in found, complaints


def test_empty_floors_keep_every_contract(tmp_path: Path) -> None:
    empty_copy(tmp_path)
    checked = check_floors(tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(PROJECT['tool']['importlinter']['contracts'])} kept, 0 broken" in checked.stdout


def test_every_direct_dependency_has_its_reason() -> None:
    groups = PROJECT["dependency-groups"]
    declared = {
        requirement.partition(">=")[0].partition("[")[0]
        for requirement in PROJECT["project"]["dependencies"] + groups["dev"] + groups["bench"] + groups["build"]
    }
    rows = [line for line in (ROOT / "docs" / "dependencies.md").read_text().splitlines() if line.startswith("| ")]
    explained = {name for row in rows for name in row.split("|")[1].strip().split(", ")} - {"package"}
    assert explained == declared
