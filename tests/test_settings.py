"""Settings as people get them wrong: each mistake is named, with a reason, and no secret is shown."""

from pathlib import Path

import pytest

from relay.core.errors import WrongSettings
from relay.settings import known_names, read_settings

SECRET = "hunter2-do-not-show"
GOOD = {
    "RELAY_CODER__URL": "https://coder.example.com",
    "RELAY_CODER__TOKEN": SECRET,
    "RELAY_RABBIT__URL": f"amqp://relay:{SECRET}@rabbit:5672/%2F",
    "RELAY_DATABASE__URL": f"postgresql://relay:{SECRET}@postgres/relay",
    "RELAY_ARCHIVE__URL": "file:///var/lib/relay/archive",
}


def refused(environment: dict[str, str]) -> str:
    with pytest.raises(WrongSettings) as caught:
        read_settings(environment)
    text = str(caught.value)
    assert SECRET not in text
    return text


def test_good_settings_are_read_and_nothing_shows_a_secret() -> None:
    settings = read_settings({**GOOD, "PATH": "/bin", "RELAY_TEST_RABBIT_URL": "amqp://x", "relay_worker": "x"})
    assert settings.coder is not None
    assert settings.coder.url == "https://coder.example.com"
    assert settings.ops.port == 9464
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.rabbit)


def test_without_any_there_are_defaults() -> None:
    settings = read_settings({})
    assert settings.coder is None
    assert settings.rabbit is None
    assert "sqlite" in settings.database.safe_url


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("RELAY_RABBIT_URL", "RELAY_RABBIT__URL"),
        ("RELAY_CODER__TOKN", "RELAY_CODER__TOKEN"),
        ("RELAY_CODER_TOKEN_FILE", "RELAY_CODER__TOKEN_FILE"),
        ("RELAY_DATABSE__URL", "RELAY_DATABASE__URL"),
        ("RELAY_WORKER__SWEEP_SECOND", "RELAY_WORKER__SWEEP_SECONDS"),
        ("RELAY_OPS__PROT", "RELAY_OPS__PORT"),
        ("RELAY_CONFIG", "RELAY_CONFIG_FILE"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_known_one(name: str, nearest: str) -> None:
    assert refused({**GOOD, name: SECRET}) == f"unknown setting {name}: did you mean {nearest}?"


def test_a_name_like_no_other_is_told_without_a_guess() -> None:
    assert refused({"RELAY_QQQQQQQQ": "1"}).startswith("unknown setting RELAY_QQQQQQQQ")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        pytest.param("RELAY_OPS__PORT", "99999", "65535", id="port too high"),
        pytest.param("RELAY_OPS__PORT", "http", "integer", id="port a word"),
        pytest.param("RELAY_CODER__URL", "coder.example.com", "", id="URL without a scheme"),
        pytest.param(
            "RELAY_CODER__URL", f"https://me:{SECRET}@coder.example.com", "password", id="password in the URL"
        ),
        pytest.param("RELAY_CODER__URL", "https://coder.example.com/?x=1", "query", id="query in the URL"),
        pytest.param("RELAY_RABBIT__URL", f"http://relay:{SECRET}@rabbit", "amqp", id="broker by HTTP"),
        pytest.param("RELAY_RABBIT__URL", SECRET, "", id="broker a word"),
        pytest.param("RELAY_RABBIT__URL", f"amqp://relay:{SECRET}@rabbit:port/", "", id="broker's port a word"),
        pytest.param("RELAY_DATABASE__URL", f"mysql://relay:{SECRET}@host/relay", "", id="another database"),
        pytest.param("RELAY_DATABASE__URL", SECRET, "", id="database a word"),
        pytest.param("RELAY_DATABASE__URL", "", "", id="database empty"),
        pytest.param("RELAY_ARCHIVE__URL", "/var/lib/relay", "file:///", id="archive a path"),
        pytest.param("RELAY_ARCHIVE__URL", f"s3://key:{SECRET}@bucket", "environment", id="credentials in the archive"),
        pytest.param("RELAY_LOG__LEVEL", "loud", "debug", id="unknown level"),
        pytest.param("RELAY_WORKER__LEASE_SECONDS", "-1", "greater than 0", id="negative"),
        pytest.param("RELAY_WORKER__LEASE_SECONDS", "nan", "", id="not a number"),
        pytest.param("RELAY_WORKER__LEASE_SECONDS", "15s", "number", id="a unit"),
        pytest.param("RELAY_METER__POLICIES", "[{", "JSON", id="broken JSON"),
        pytest.param("RELAY_METER__PRICES", "gpt-5=1.25", "JSON", id="no JSON"),
        pytest.param("RELAY_METER__PRICES", '{"gpt-5": {"inptu": "1"}}', "", id="unknown kind of price"),
        pytest.param("RELAY_METER__PRICES", '{"gpt-5": {"input": "-1"}}', "0", id="negative price"),
        pytest.param("RELAY_METER__PRICES", '{"gpt-5": {"input": "NaN"}}', "", id="price that is no number"),
        pytest.param(
            "RELAY_METER__POLICIES", '[{"name": "Daily Limit!", "limit_micros": 1}]', "pattern", id="odd policy name"
        ),
        pytest.param("RELAY_METER__POLICIES", '[{"name": "d"}]', "", id="policy without a limit"),
        pytest.param("RELAY_METER__POLICIES", '[{"name": "d", "limit_micros": 0}]', "0", id="limit of nothing"),
        pytest.param(
            "RELAY_METER__POLICIES", '[{"name": "d", "limit_micros": 9, "period": "year"}]', "month", id="odd period"
        ),
    ],
)
def test_an_impossible_value_is_told_with_its_name_and_a_reason(name: str, value: str, reason: str) -> None:
    text = refused({**GOOD, name: value})
    assert name in text
    assert reason in text
    assert len(text.splitlines()) == 1
    assert "pydantic" not in text


def test_two_policies_of_one_name_are_refused() -> None:
    # Their alerts would have one id: the second policy would never be heard of.
    twice = '[{"name": "d", "limit_micros": 100}, {"name": "d", "limit_micros": 200}]'
    assert "RELAY_METER__POLICIES" in refused({**GOOD, "RELAY_METER__POLICIES": twice})


def test_all_mistakes_are_told_at_once() -> None:
    text = refused({**GOOD, "RELAY_OPS__PORT": "x", "RELAY_LOG__LEVEL": "x"})
    assert len(text.splitlines()) == 2


def test_a_token_and_a_token_file_are_one_too_many(tmp_path: Path) -> None:
    assert "RELAY_CODER__TOKEN and RELAY_CODER__TOKEN_FILE" in refused(
        {**GOOD, "RELAY_CODER__TOKEN_FILE": str(tmp_path / "token")}
    )


@pytest.mark.parametrize("name", ["RELAY_RABBIT__URL", "RELAY_DATABASE__URL"])
def test_a_secret_comes_from_a_file(tmp_path: Path, name: str) -> None:
    given = dict(GOOD)
    (tmp_path / "secret").write_text(given.pop(name) + "\n")
    settings = read_settings({**given, f"{name}_FILE": str(tmp_path / "secret")})
    assert settings == read_settings(GOOD)


@pytest.mark.parametrize("name", ["RELAY_RABBIT__URL", "RELAY_DATABASE__URL"])
def test_a_secret_given_twice_is_refused(tmp_path: Path, name: str) -> None:
    assert f"{name}_FILE" in refused({**GOOD, f"{name}_FILE": str(tmp_path / "secret")})


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b""], ids=["missing", "not text", "empty"])
def test_a_file_of_a_secret_that_is_of_no_use_is_named(tmp_path: Path, content: bytes | None) -> None:
    given = {name: value for name, value in GOOD.items() if name != "RELAY_RABBIT__URL"}
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    assert "RELAY_RABBIT__URL" in refused({**given, "RELAY_RABBIT__URL_FILE": str(tmp_path / "secret")})


def test_a_file_of_settings_that_variables_win_over(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(
        '[coder]\nurl = "https://a.example"\ntoken = "abc"\n[ops]\nport = 1\nhost = "::1"\n'
        '[[meter.policies]]\nname = "daily"\nperiod = "day"\nlimit_micros = 5\n[meter.prices.gpt-5]\ninput = "1.25"\n'
    )
    settings = read_settings({"RELAY_CONFIG_FILE": str(file), "RELAY_OPS__PORT": "2"})
    assert settings.coder is not None
    assert (settings.coder.url, settings.ops.port, settings.ops.host) == ("https://a.example", 2, "::1")
    assert settings.meter.policies[0].limit_micros == 5
    assert str(settings.meter.prices["gpt-5"].input) == "1.25"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param("[coder\n", "is not TOML", id="not TOML"),
        pytest.param("[ops]\nprot = 1\n", "did you mean RELAY_OPS__PORT", id="unknown name"),
        pytest.param("[opps]\nport = 1\n", "unknown setting", id="unknown group"),
        pytest.param('[ops]\nport = "x"\n', "RELAY_OPS__PORT: input should be", id="impossible value"),
        pytest.param('[coder]\nurl = "ftp://x"\ntoken = "t"\n', "RELAY_CODER__URL: URL scheme", id="abbreviation"),
        pytest.param('[rabbit]\nurl_file = "/x"\n', "URL_FILE is read from the environment only", id="variable only"),
        pytest.param("ops = 3\n", "RELAY_OPS", id="a number where a group should be"),
        pytest.param(f'[rabbit]\nurl = "http://u:{SECRET}@h"\n', "RELAY_RABBIT__URL", id="a secret in a wrong value"),
    ],
)
def test_a_file_of_settings_with_mistakes(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(content)
    assert told in refused({"RELAY_CONFIG_FILE": str(file)})


def test_a_file_of_settings_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read" in refused({"RELAY_CONFIG_FILE": str(tmp_path / "none.toml")})


def test_all_names_are_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text()
    assert [name for name in known_names() if name not in text] == []
