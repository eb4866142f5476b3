"""What is written to standard error, whoever logs it."""

import asyncio
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
import structlog
from pydantic import SecretStr, ValidationError

from relay.adapters.logs import LogSettings, configure_logs

Logged = Callable[[], list[dict[str, object]]]

PASSWORD = "correct-horse"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("relay")
    levels = (root.level, ours.level)
    yield
    for handler in [one for one in root.handlers if type(one).__module__ == "relay.adapters.logs"]:
        root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Logged:
    """The events written so far, as JSON; nothing may be on standard output."""
    configure_logs(LogSettings(format="json"))

    def read() -> list[dict[str, object]]:
        out, err = capsys.readouterr()
        assert out == ""
        return [json.loads(line) for line in err.splitlines()]

    return read


log = structlog.get_logger("relay.test")


def test_one_event_is_one_line_of_json(logged: Logged) -> None:
    log.info("stream_opened", after_id=2**63 - 1, chat_id=UUID(int=7), note="two\nlines")
    (event,) = logged()
    stamp = datetime.fromisoformat(str(event.pop("timestamp")))
    assert stamp.tzinfo == UTC
    assert abs((datetime.now(UTC) - stamp).total_seconds()) < 60
    assert event == {
        "event": "stream_opened",
        "level": "info",
        "logger": "relay.test",
        "after_id": 2**63 - 1,
        "chat_id": "00000000-0000-0000-0000-000000000007",
        "note": "two\nlines",
    }


def test_what_is_bound_comes_along(logged: Logged) -> None:
    with structlog.contextvars.bound_contextvars(chat_id="c1"):
        log.info("one")
        logging.getLogger("aio_pika").warning("two")
    log.info("three")
    assert [(event["event"], event.get("chat_id")) for event in logged()] == [
        ("one", "c1"),
        ("two", "c1"),
        ("three", None),
    ]


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except type(error) as exc:
        return exc


LIBRARIES = ["aio_pika", "aiohttp.server", "sqlalchemy.engine", "alembic", "httpx", "websockets.client", "asyncio"]


@pytest.mark.parametrize("name", [*LIBRARIES, "aiohttp.access"])
@pytest.mark.parametrize("level", ["debug", "error"])
def test_libraries_speak_from_warning_on_in_the_same_form(
    name: str, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs(LogSettings.model_validate({"format": "json", "level": level}))
    logging.getLogger(name).info("frame of %s", "someone")
    logging.getLogger(name).warning("lost %d of %s", 2, "three")
    (event,) = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert (event["event"], event["level"], event["logger"]) == ("lost 2 of three", "warning", name)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", ["d", "i", "w", "e"]), ("info", ["i", "w", "e"]), ("warning", ["w", "e"]), ("error", ["e"])],
)
def test_our_own_level(level: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings.model_validate({"format": "json", "level": level}))
    log.debug("d")
    log.info("i")
    log.warning("w")
    log.error("e")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == expected


def test_an_exception_is_in_its_event_with_its_cause(logged: Logged) -> None:
    log.error("failed", exc_info=raised(ValueError("down"), OSError("refused")))
    (event,) = logged()
    assert event["level"] == "error"
    for part in ("OSError: refused", "ValueError: down", "direct cause"):
        assert part in str(event["exception"])


async def test_what_asyncio_complains_of_is_logged(logged: Logged, asyncio_complaints: list[str]) -> None:
    asyncio.get_running_loop().call_exception_handler({"message": "Task was destroyed but it is pending!"})
    assert [event["event"] for event in logged()] == ["Task was destroyed but it is pending!"]
    assert asyncio_complaints.pop().startswith("Task was destroyed")


def test_warnings_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        configure_logs(LogSettings(format="json"))
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    event = json.loads(capsys.readouterr().err)
    assert event["logger"] == "py.warnings"
    assert "DeprecationWarning: old" in str(event["event"])


def test_configured_twice_every_event_is_written_once(logged: Logged) -> None:
    configure_logs(LogSettings(format="json"))
    log.info("once")
    logging.getLogger("httpx").warning("once")
    assert len(logged()) == 2


# --- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"token": PASSWORD}, id="token"),
        pytest.param({"Coder-Session-Token": PASSWORD}, id="header"),
        pytest.param({"rabbit_password": PASSWORD}, id="one word of the key"),
        pytest.param({"api": {"secret": PASSWORD}}, id="nested"),
        pytest.param({"headers": [{"Authorization": f"Bearer {PASSWORD}"}]}, id="in a list"),
        pytest.param({"url": f"amqp://relay:{PASSWORD}@broker/%2f"}, id="URL"),
        pytest.param({"error": f"cannot reach postgresql://r:{PASSWORD}@db:5432/relay."}, id="URL inside a text"),
        pytest.param({"url": f"amqp://relay:p@ss:{PASSWORD}@broker"}, id="an @ in the password"),
        pytest.param({"urls": (f"amqp://:{PASSWORD}@broker",)}, id="no user, in a tuple"),
        pytest.param({"error": OSError(f"amqp://relay:{PASSWORD}@broker")}, id="an exception as a value"),
        pytest.param({"sent": f"GET / HTTP/1.1\r\nCoder-Session-Token: {PASSWORD}\r\n"}, id="header in a text"),
        pytest.param({"headers": f"[('Authorization', 'Bearer {PASSWORD}')]"}, id="headers as Python shows them"),
        pytest.param({"settings": SecretStr(PASSWORD)}, id="SecretStr"),
    ],
)
@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_are_masked(values: dict[str, object], form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings.model_validate({"format": form}))
    log.info("tried", **values)
    written = capsys.readouterr().err
    assert "***" in written
    assert PASSWORD not in written


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_of_libraries_and_exceptions_are_masked(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings.model_validate({"format": form}))
    url = f"amqp://relay:{PASSWORD}@broker"
    logging.getLogger("aio_pika").warning("connecting to %s", url)
    error = raised(OSError(f"no route to {url}"))
    log.error("failed", exc_info=error)
    logging.getLogger("aio_pika").error("failed", exc_info=error)
    written = capsys.readouterr().err
    assert written.count("amqp://***@broker") == 3
    assert PASSWORD not in written


def test_counts_of_tokens_and_plain_urls_are_no_secrets(logged: Logged) -> None:
    values = {
        "input_tokens": 12,
        "tokens": {"output": 3, "cache_read": 0},
        "token": None,
        "url": "https://coder.example.com:8443/api?x=a@b",
        "mail": "to:ann@example.com",
        "ok": True,
        "ratio": 0.5,
    }
    log.info("charged", **values)
    (event,) = logged()
    assert {key: event[key] for key in values} == values


# --- for the eye ---------------------------------------------------------------------------------------------------


class Terminal:
    """Standard error of a person."""

    def __init__(self) -> None:
        self.written = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


@pytest.mark.parametrize("colours", [True, False])
def test_auto_is_for_the_eye_on_a_terminal(colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    configure_logs(LogSettings())
    log.info("stream_opened", after_id=7)
    assert "stream_opened" in terminal.written
    assert not terminal.written.startswith("{")
    assert ("\x1b[" in terminal.written) is colours


def test_auto_is_json_anywhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings())
    log.info("stream_opened")
    assert json.loads(capsys.readouterr().err)["event"] == "stream_opened"


def test_the_eye_sees_an_exception_without_local_variables(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(LogSettings(format="console"))

    def fails(token: str) -> None:
        raise ValueError(f"{len(token)} letters")

    try:
        fails(PASSWORD)
    except ValueError:
        log.exception("failed")
    written = capsys.readouterr().err
    assert "ValueError: 13 letters" in written
    assert PASSWORD not in written


@pytest.mark.parametrize("values", [{"format": "xml"}, {"level": "loud"}, {"colour": True}])
def test_wrong_settings(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LogSettings.model_validate(values)
