"""The list of faults that the tests must notice fits the code. To run them is another matter: `make mutants`."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "mutants"


def mutants(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


def test_each_stands_once_in_the_code_and_names_tests_that_are_there() -> None:
    done = mutants("--check")
    assert done.returncode == 0, done.stderr


def test_there_are_many_and_they_are_listed() -> None:
    listed = mutants("--list").stdout.splitlines()
    written = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    assert [line.split()[0] for line in listed] == [each["name"] for each in written]
    assert len(listed) >= 60


def test_a_name_that_is_not_there_is_told() -> None:
    done = mutants("--only", "no-such-fault")
    assert done.returncode == 2
    assert "no-such-fault" in done.stderr
    assert "Traceback" not in done.stderr
