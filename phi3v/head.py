"""The head of an HTTP/1.1 request, read strictly: bytes in, one meaning out, or an error.

Pure; knows nothing of sockets or routes. What two readers could understand in two ways (request smuggling) is refused.
Sources: RFC 9112 (the messages), RFC 9110 (their meaning), RFC 3986 (targets). A verdict depends on the bytes alone,
not on how they arrive: lines are judged in their order, each when it is whole, and a limit as soon as it is passed.
"""

import re
from dataclasses import dataclass

from .errors import HeadTooLarge, NotImplementedHere, RequestError, TargetTooLong

MAX_LINE = 4096  # bytes of the request line: our longest target has 30
MAX_HEAD = 16_384  # bytes with all line ends; a browser's cookies are the only large field there is
MAX_FIELDS = 64
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 5.6.2
REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) HTTP/1\.([0-9])" % TOKEN)  # RFC 9112 3
FIELD_LINE = re.compile(rb"(%b):([\t -~\x80-\xff]*)" % TOKEN)  # RFC 9112 5, RFC 9110 5.5
TARGET = re.compile(r"(?:https?://([^/?]*))?(/[\w.~:/?\[\]@!$&'()*+,;=%-]*|\*|)", re.ASCII)  # RFC 9112 3.2
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{0,5})?", re.IGNORECASE)  # RFC 9110 7.2
ONCE = ("host", "content-length")  # of these a second one could be the one that another reader believes


@dataclass(frozen=True, slots=True)
class Head:
    """What a request says before its body.

    `host` is in lower case and without port, "" if HTTP/1.0 names none; `fields` by names in lower case, repeated ones
    joined by ", "; `length` is that of the body, None if none is declared; `size` is the head's own, in bytes.
    """

    method: str
    path: str
    host: str
    minor: int  # of HTTP/1.x
    fields: dict[str, str]
    length: int | None
    chunked: bool
    size: int

    @property
    def persistent(self) -> bool:
        """Whether another request may follow (RFC 9112 9.3)."""
        options = {option.strip().lower() for option in self.fields.get("connection", "").split(",")}
        return "close" not in options and (self.minor > 0 or "keep-alive" in options)


def parse(data: bytes) -> Head | None:
    """The head that `data` begins with, None while it is not whole; raises RequestError or a kind of it."""
    start = at = 2 if data[:2] == b"\r\n" else 0  # an empty line in front is no harm (RFC 9112 2.2)
    lines: list[bytes] = []
    while (end := data.find(b"\n", at, start + MAX_HEAD)) >= 0:
        line, at = data[at:end], end + 1
        if line == b"\r" and lines:
            return _head(lines, at)
        if not line.endswith(b"\r"):
            raise RequestError("a line of the head ends with a bare LF: lines end with CRLF")
        _check_line(line[:-1], len(lines))
        lines.append(line[:-1])
    if not lines and len(data) - start >= MAX_LINE + 2:
        raise _too_long()
    if len(data) - start >= MAX_HEAD:
        raise HeadTooLarge(f"the head has more than {MAX_HEAD:,} bytes")
    return None


def _too_long() -> TargetTooLong:
    return TargetTooLong(f"the request line has more than {MAX_LINE:,} bytes")


def _check_line(line: bytes, number: int) -> None:
    """Refuse a line that is none, as soon as it is there; `number` 0 is the request line."""
    if number == 0 and len(line) > MAX_LINE:
        raise _too_long()
    if number > MAX_FIELDS:
        raise HeadTooLarge(f"the head has more than {MAX_FIELDS} fields")
    if number == 0 and not REQUEST_LINE.fullmatch(line):
        raise RequestError("the request line is not METHOD TARGET HTTP/1.1 with one space between")
    if number and not FIELD_LINE.fullmatch(line):
        raise RequestError(
            f"line {number} of the head's fields is not NAME: VALUE, on one line and of plain characters"
        )


def _head(lines: list[bytes], size: int) -> Head:
    method, target, minor = (part.decode() for part in REQUEST_LINE.fullmatch(lines[0]).groups())
    fields: dict[str, str] = {}
    for line in lines[1:]:
        raw, _, value = line.decode("latin-1").partition(":")
        name, value = raw.lower(), value.strip(" \t")
        if name in fields and name in ONCE:
            raise RequestError(f"the head has more than one {name.title()}")
        if name in ("content_length", "transfer_encoding"):  # which some take for the field with a hyphen
            raise RequestError(f"the head has a {raw}: write it with a hyphen")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    version = int(minor)
    path, host = _target(method, target, fields, version)
    return Head(method, path, host, version, fields, *_framing(fields, version), size)


def _target(method: str, target: str, fields: dict[str, str], minor: int) -> tuple[str, str]:
    """The path without its query, and the host: an absolute target's own (RFC 9112 3.2.2), else the field's."""
    found = TARGET.fullmatch(target)
    if not found or (found[2] == "*") != (target == "*") or (target == "*") > (method == "OPTIONS"):
        raise RequestError("the target is neither a path such as /health nor an https:// URL")
    if "host" not in fields and minor > 0:
        raise RequestError("the head has no Host")
    hosts = [HOST.fullmatch(value) for value in (fields.get("host"), found[1]) if value is not None]
    if None in hosts:
        raise RequestError("the Host is not a name or an address with an optional port")
    return found[2].partition("?")[0] or "/", (hosts[-1][1] or hosts[-1][2]).lower() if hosts else ""


def _framing(fields: dict[str, str], minor: int) -> tuple[int | None, bool]:
    """The body's declared length, and whether it comes in chunks instead (RFC 9112 6)."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if length is not None and not re.fullmatch(r"[0-9]{1,15}", length):
        raise RequestError("the Content-Length is not one decimal number of at most 15 digits")
    if coding is not None:
        codings = [each.strip(" \t").lower() for each in coding.split(",")]
        if length is not None or minor == 0:
            raise RequestError("Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
        if codings[-1] != "chunked" or codings.count("chunked") > 1:
            raise RequestError("the last Transfer-Encoding, and only the last, must be chunked")
        if len(codings) > 1:
            raise NotImplementedHere("of all Transfer-Encodings only chunked is known here")
    return None if length is None else int(length), coding is not None
