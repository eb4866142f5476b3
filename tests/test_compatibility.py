"""docs/compatibility.md is what the recordings show."""

from pathlib import Path

import pytest

from tests.compatibility import FOLDERS, MEASURED, outcome, page

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"


def test_the_page_is_what_the_recordings_show() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), 'make it anew: "make contract"'


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_fold_equals_and_every_turn_is_told(folder: str) -> None:
    total = outcome(folder)
    assert total["chats"] > 30
    assert (total["equal"], total["turns"]) == (total["chats"], total["prompts"])
    assert total["told"] >= total["steps"] - 2
    assert MEASURED
