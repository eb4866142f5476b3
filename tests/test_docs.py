"""What the documents say of names and links is so."""

import re
from pathlib import Path

import pytest

from relay.settings import Settings, known_names, model_in

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = (ROOT / "docs/configuration.md").read_text().partition("## All settings")[2]
SAID = dict(re.findall(r"^\| `(RELAY_\w+)` \|(.*?)\|", TABLE, re.MULTILINE))
GROUPS = {name: group for name, field in Settings.model_fields.items() if (group := model_in(field.annotation))}
# Defaults that are said in words.
IN_WORDS = {
    "RELAY_WORKER__NAME": "host and process id",
    "RELAY_METER__PRICES": "{}",
    "RELAY_RABBIT__HOSTS": "[]",
    "RELAY_CODER__ACCOUNTS": "[]",
    "RELAY_WORKER__MAX_STREAMS_PER_SERVER": "no limit",
    "RELAY_METER__POLICIES": "[]",
    "RELAY_DATABASE__URL": "sqlite+aiosqlite:///relay.db",
}


def test_every_setting_is_explained_and_none_that_is_not_there() -> None:
    assert sorted(SAID) == sorted(known_names())


@pytest.mark.parametrize("name", sorted(SAID))
def test_the_default_is_the_one_that_is_said(name: str) -> None:
    group, _, field = name.removeprefix("RELAY_").lower().partition("__")
    known = GROUPS[group].model_fields.get(field) if group in GROUPS else None
    default = "" if known is None or known.is_required() or known.default is None else str(known.default).lower()
    assert SAID[name].strip(" `") == IN_WORDS.get(name, default.removesuffix(".0"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    broken = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not broken
