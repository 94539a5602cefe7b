"""What a client did wrong, each with its HTTP status, and what is wrong with the set-up.

Knows nothing of HTTP replies: `server` is the one place that renders these.
"""


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
SlowBody = _kind("SlowBody", 408)
LengthRequired = _kind("LengthRequired", 411)
TooLarge = _kind("TooLarge", 413)
UnsupportedType = _kind("UnsupportedType", 415)
RateLimited = _kind("RateLimited", 429, "rate_limit_error")


class Unavailable(RequestError):
    status, type = 503, "service_unavailable_error"

    def __init__(self, message: str, retry_after: int = 5):
        """`retry_after`: the seconds a client is asked to wait."""
        super().__init__(f"{message}; try again in {retry_after} s", headers={"Retry-After": str(retry_after)})


class SetupError(Exception):
    """The program cannot start or go on as it was asked to: one line for a person, exit status 1."""
