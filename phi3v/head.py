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
REQUEST_LINE = re.compile(rb"(%b) ([!-~]+) HTTP/1\.([0-9])\r\n" % TOKEN)  # RFC 9112 3
FIELD_LINE = re.compile(rb"(%b):([\t -~\x80-\xff]*)\r\n" % TOKEN)  # RFC 9112 5, RFC 9110 5.5
REST = r"(?:[\w.~:/?@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})*"  # RFC 3986 3.3 and 3.4, and the brackets that browsers send
TARGET = re.compile(rf"(?:(?i:https)://([^/?]+)|(?=/))((?:[/?]{REST})?)", re.ASCII)  # RFC 9112 3.2
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{0,5})?", re.ASCII | re.IGNORECASE)  # RFC 9110 7.2
ONCE = ("host", "content-length")  # of these a second one could be the one that another reader believes


@dataclass(frozen=True, slots=True)
class Head:
    """What a request says before its body.

    `host` is in lower case and without port, "" if HTTP/1.0 names none; `fields` by names in lower case, repeated ones
    joined by ", "; `length` is that of the body, None if none is declared; `size` is the head's own, in bytes, with an
    empty line in front.
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
        options = {option.strip(" \t").lower() for option in self.fields.get("connection", "").split(",")}
        return "close" not in options and (self.minor > 0 or "keep-alive" in options)


def parse(data: bytes) -> Head | None:
    """The head that `data` begins with, None while it is not whole; raises RequestError or a kind of it."""
    start = at = 2 if data[:2] == b"\r\n" else 0  # an empty line in front is no harm (RFC 9112 2.2)
    lines: list[tuple[bytes, ...]] = []  # the parts of the request line, and of each field
    while (end := data.find(b"\n", at, start + (MAX_HEAD if lines else MAX_LINE + 2))) >= 0:
        line, at = data[at : end + 1], end + 1
        if line == b"\r\n" and lines:
            return _head(lines, at)
        if len(lines) > MAX_FIELDS:
            raise HeadTooLarge(f"the head has more than {MAX_FIELDS} fields")
        if not (found := (FIELD_LINE if lines else REQUEST_LINE).fullmatch(line)):
            shape = "NAME: VALUE, on one line" if lines else "METHOD TARGET HTTP/1.1 with one space between"
            raise RequestError(
                f"line {len(lines) + 1} of the head is not {shape}, in plain characters and ended by CRLF"
            )
        lines.append(found.groups())
    if not lines and len(data) - start >= MAX_LINE + 2:
        raise TargetTooLong(f"the request line has more than {MAX_LINE:,} bytes")
    if len(data) - start >= MAX_HEAD:
        raise HeadTooLarge(f"the head has more than {MAX_HEAD:,} bytes")
    return None


def _head(lines: list[tuple[bytes, ...]], size: int) -> Head:
    (method, target, minor), *pairs = [[part.decode("latin-1") for part in line] for line in lines]
    fields: dict[str, str] = {}
    for raw, value in pairs:
        name, value = raw.lower(), value.strip(" \t")
        if name in fields and name in ONCE:
            raise RequestError(f"the head has more than one {name.title()}")
        if name in ("content_length", "transfer_encoding"):  # which some take for the field with a hyphen
            raise RequestError(f"the head has a {raw}: write it with a hyphen")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    path, host = _target(method, target, fields, int(minor))
    return Head(method, path, host, int(minor), fields, *_framing(fields, int(minor)), size)


def _target(method: str, target: str, fields: dict[str, str], minor: int) -> tuple[str, str]:
    """The path without its query, and the host: an absolute target's own (RFC 9112 3.2.2), else the field's."""
    found = TARGET.fullmatch(target)
    if not found and (method, target) != ("OPTIONS", "*"):
        raise RequestError("the target is neither a path such as /health nor an https:// URL")
    if "host" not in fields and minor > 0:
        raise RequestError("the head has no Host")
    hosts = [HOST.fullmatch(given) for given in (fields.get("host"), found and found[1]) if given is not None]
    if None in hosts:
        raise RequestError("the Host is not one name or address with an optional port")
    path = found[2].partition("?")[0] or "/" if found else target
    return path, (hosts[-1][1] or hosts[-1][2]).lower() if hosts else ""


def _framing(fields: dict[str, str], minor: int) -> tuple[int | None, bool]:
    """The body's declared length, and whether it comes in chunks instead (RFC 9112 6)."""
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if length is not None and not re.fullmatch(r"[0-9]{1,15}", length):
        raise RequestError("the Content-Length is not one decimal number of at most 15 digits")
    if coding is None:
        return None if length is None else int(length), False
    *others, last = [each.strip(" \t").lower() for each in coding.split(",")]
    if length is not None or minor == 0:
        raise RequestError("Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
    if last != "chunked" or "chunked" in others:
        raise RequestError("the last Transfer-Encoding, and only the last, must be chunked")
    if others:
        raise NotImplementedHere("of all Transfer-Encodings only chunked is known here")
    return None, True
