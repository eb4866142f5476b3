"""Errors in the words of the vectors."""

from typing import Any

from relay.codersdk import APIError, chat_usage_limit_exceeded_from
from tests.codersdk.vectors import Row, same_json, source, without_unknown


def seen(error: Exception, address: str) -> dict[str, Any]:
    """An error in the words of the vectors."""
    limit = chat_usage_limit_exceeded_from(error)
    found: dict[str, Any] = {
        "is_sdk_error": isinstance(error, APIError),
        "is_usage_limit": limit is not None,
        "usage_limit": limit and without_unknown(limit).model_dump_json(),
    }
    if isinstance(error, APIError):
        found |= {
            "status_code": error.status_code,
            "http_method": error.method,
            "url": error.url.replace(address, "coder.test"),
            "message": error.message,
            "detail": error.detail,
            "validations": [{"field": each.field, "detail": each.detail} for each in error.validations] or None,
            "helper": error.helper,
            "friendly": error.friendly(),
            "error_text": str(error).replace(address, "coder.test"),
        }
    return found


def seen_by_go(row: Row) -> dict[str, Any]:
    """The same of Go's error; a text that is no UTF-8 as bytes."""
    wanted = {key: row[key] for key in ("is_sdk_error", "is_usage_limit", "usage_limit")}
    if row["is_sdk_error"]:
        for key in ("status_code", "http_method", "url", "message", "validations", "helper", "friendly"):
            wanted[key] = row[key]
        wanted["detail"] = source(row, "detail")
        wanted["error_text"] = source(row, "error_text")
    return wanted


def same_error(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    plain = "usage_limit"
    return {**got, plain: None} == {**wanted, plain: None} and same_json(got[plain], wanted[plain])
