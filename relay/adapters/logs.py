"""Logs: one event per line on standard error, ours and the libraries' alike, without secrets."""

import logging
import os
import re
import sys
from typing import Literal, TextIO

import structlog
from pydantic import BaseModel
from structlog.typing import EventDict, Processor, WrappedLogger

MASK = "***"


class LogSettings(BaseModel, frozen=True, extra="forbid"):
    """How the relay logs. `auto` is `console` when standard error is a terminal, else `json`."""

    format: Literal["auto", "json", "console"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"  # of the relay; libraries speak from warning on


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: a test or a command runner may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_logs(settings: LogSettings) -> None:
    """Send structlog and standard logging to standard error in one form. May be called again."""
    console = settings.format == "console" or (settings.format == "auto" and sys.stderr.isatty())
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and "NO_COLOR" not in os.environ,
            exception_formatter=structlog.dev.plain_traceback,
        )
        if console
        else structlog.processors.JSONRenderer()
    )
    for_all: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = _Handler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=for_all,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                # Plain text, also for the eye: prettier forms show local variables, and cannot be masked.
                structlog.processors.format_exc_info,
                mask_secrets,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    # Below warning libraries log every connection and frame, some with their headers.
    root.setLevel(logging.WARNING)
    logging.getLogger("relay").setLevel(settings.level.upper())
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *for_all,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


# --- secrets -------------------------------------------------------------------------------------------------------
# Nobody logs a secret on purpose. This is for the URL in a library's error text.

# Whole words of a key: `session_token` is a secret, `input_tokens` is a count.
_SECRET_WORDS = {"token", "password", "passwd", "secret", "authorization", "cookie", "apikey", "credentials"}
_USERINFO = re.compile(r"(?<=://)[^\s/@:]*:[^\s/]*(?=@)")
_HEADER = re.compile(r"(?i)\b((?:coder-session-token|authorization|cookie)['\"]?\s*[:=,]\s*)[^\r\n]+")


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A structlog processor: replaces what looks like a secret, by its key or its form, at any depth."""
    return {key: _masked(key, value) for key, value in event.items()}


def _masked(key: object, value: object) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    if _SECRET_WORDS.intersection(re.split(r"[^a-z]+", str(key).lower())):
        return MASK
    if isinstance(value, dict):
        return {str(inner): _masked(inner, item) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_masked(None, item) for item in value]
    return _HEADER.sub(rf"\1{MASK}", _USERINFO.sub(MASK, str(value)))
