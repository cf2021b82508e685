"""What can go wrong between us and a server, sorted by what is to be done about it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

# Tried again after a wait: the server is busy, broken for the moment or was not heard.
RETRYABLE_KINDS = frozenset(("rate_limited", "server_error", "timeout", "dropped", "bad_reply"))

_RETRYABLE_STATUS = {408: "timeout", 409: "server_error", 429: "rate_limited"}
# Words by which providers say that no wait will help: the account has no money or no quota left.
_NO_QUOTA = ("insufficient_quota", "billing_not_active", "billing_hard_limit", "credit balance is too low")
_REFUSED_BY_FILTER = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")


class WireError(Exception):
    """A call that brought no reply.

    Kinds: those of RETRYABLE_KINDS; unreachable (nobody listens there); rejected (400: something we sent is not taken);
    auth, not_found, quota (the user must act); refusal (this prompt alone was refused by a filter).
    """

    def __init__(self, kind: str, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = " ".join(message.split())[:600]
        self.status = status
        self.retry_after = retry_after  # seconds that the server asks us to wait

    @property
    def retryable(self) -> bool:
        """Whether the same call may go well later."""
        return self.kind in RETRYABLE_KINDS


def status_error(status: int, body: Any, headers: Mapping[str, str]) -> WireError:
    """The error that an HTTP status and its body stand for; `body` is text or decoded JSON."""
    message, code = _message_and_code(body)
    said = f"{code} {message}".lower()
    wait = retry_after_seconds(headers)
    if status == 402 or any(word in said for word in _NO_QUOTA):
        kind = "quota"
    elif any(word in said for word in _REFUSED_BY_FILTER):
        kind = "refusal"
    elif status in _RETRYABLE_STATUS:
        kind = _RETRYABLE_STATUS[status]
    elif status >= 500:
        kind = "server_error"
    else:
        kind = {401: "auth", 403: "auth", 404: "not_found"}.get(status, "rejected")
    return WireError(kind, f"HTTP {status}: {message or 'no message'}", status=status, retry_after=wait)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Seconds of a `retry-after-ms` or `Retry-After` header, which is a number or a date; None where neither is."""
    lowered = {name.lower(): value for name, value in headers.items()}
    try:
        if "retry-after-ms" in lowered:
            return max(0.0, float(lowered["retry-after-ms"]) / 1000)
        value = lowered.get("retry-after")
        if value is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d*)?\s*", value):
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def error_in_reply(error: Any) -> WireError:
    """The error that stands inside a reply with status 200, as gateways send it: {"message", "code"}."""
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    return status_error(status, {"error": error}, {})


def connection_error(error: BaseException) -> WireError:
    """A connection that could not be made (nobody listens) or that broke under way, told by what caused it."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            break
        if type(cause).__name__ in ("ConnectError", "ConnectTimeout") or isinstance(cause, ConnectionRefusedError):
            return WireError("unreachable", str(cause) or type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return WireError("dropped", f"the connection broke: {error.__cause__ or error}")


def timeout_error(error: BaseException, *, timeout_s: float) -> WireError:
    """A server that was silent for too long, or, where not even a connection was made, one that is not there."""
    broken = connection_error(error)
    if broken.kind == "unreachable":
        return broken
    return WireError("timeout", f"no answer within llm.timeout_s={timeout_s:g}")


def _message_and_code(body: Any) -> tuple[str, str]:
    """Message and code of the error bodies of all providers: {"error": text | {message, type, code}} or plain text."""
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            code = f"{error.get('code') or ''} {error.get('type') or ''} {error.get('param') or ''}".strip()
            return str(error.get("message") or error), code
        return str(error), ""
    text = str(body or "")
    if text.lstrip()[:1] == "<":  # the HTML page of a proxy
        text = re.sub(r"<[^>]*>", " ", text[:5000])
    return " ".join(text.split())[:500], ""
