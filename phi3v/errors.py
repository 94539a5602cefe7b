"""What a client did wrong, each with its HTTP status, the checks that find it, and what is wrong with the set-up.

Knows nothing of HTTP replies: `server` is the one place that renders these.
"""

import json
import math


class RequestError(Exception):
    """The request cannot be answered; `message` says what was wrong, what was given and what is allowed.

    `param` names the field of the body, `headers` are sent with the reply.
    """

    status = 400
    type = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.message, self.param, self.headers = message, param, headers or {}


def _kind(name: str, status: int, type_: str = RequestError.type) -> type[RequestError]:
    return type(name, (RequestError,), {"__module__": __name__, "status": status, "type": type_})


Unauthorized = _kind("Unauthorized", 401, "authentication_error")
Forbidden = _kind("Forbidden", 403, "permission_error")
NotFound = _kind("NotFound", 404, "not_found_error")
ModelNotFound = _kind("ModelNotFound", 404, "model_not_found")
MethodNotAllowed = _kind("MethodNotAllowed", 405)
TooSlow = _kind("TooSlow", 408)
LengthRequired = _kind("LengthRequired", 411)
TooLarge = _kind("TooLarge", 413)
TargetTooLong = _kind("TargetTooLong", 414)
UnsupportedType = _kind("UnsupportedType", 415)
Misdirected = _kind("Misdirected", 421)
RateLimited = _kind("RateLimited", 429, "rate_limit_error")
HeadTooLarge = _kind("HeadTooLarge", 431)
Internal = _kind("Internal", 500, "server_error")
NotImplementedHere = _kind("NotImplementedHere", 501)


class Unavailable(RequestError):
    status, type = 503, "service_unavailable_error"

    def __init__(self, message: str):
        super().__init__(f"{message}; try again in 5 s", headers={"Retry-After": "5"})


class SetupError(Exception):
    """The program cannot start or go on as it was asked to: one line for a person, exit status 1."""


def check(param: str, value: object, good: object, allowed: str) -> None:
    """Refuse a value that is not `good`, which is `allowed` in words."""
    if not good:
        given = f"a list of {len(value)}" if isinstance(value, list | tuple) else json.dumps(value, default=repr)[:40]
        raise RequestError(f"{param} must be {allowed}, not {given}", param)


def check_number(name: str, value: object, low: float, high: float = math.inf, kind: type = int) -> None:
    """Refuse what is no number from `low` to `high`, or no whole one if `kind` is int; True is none here."""
    good = type(value) in (int, kind) and low <= value <= high
    allowed = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    check(name, value, good, f"a {'whole ' if kind is int else ''}number {allowed}")


def check_text(param: str, text: object, longest: int | None = None) -> None:
    """Refuse what is no string, is empty, has over `longest` characters or cannot be written as UTF-8."""
    check(param, text, isinstance(text, str), "a string")
    if not text:
        raise RequestError(f"{param} is empty", param)
    if longest and len(text) > longest:
        raise RequestError(f"{param} has {len(text)} characters, at most {longest} are allowed", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} holds half a surrogate pair (\\ud800 to \\udfff)", param) from None


def check_texts(param: str, texts: object, least: int, most: int, longest: int | None = None) -> None:
    """Refuse what is no list of `least` to `most` strings."""
    good = isinstance(texts, list | tuple) and least <= len(texts) <= most
    check(param, texts, good, f"a string or a list of {least} to {most}")
    for i, text in enumerate(texts):
        check_text(f"{param}[{i}]", text, longest)
