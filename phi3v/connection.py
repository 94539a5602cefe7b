"""One client's connection: TLS, heads and bodies in, answers out, each under a total deadline.

Knows nothing of routes, keys or JSON. `parse` is pure and strict: bytes in, one meaning out, or an error. What two
readers could understand in two ways (request smuggling) is refused, and a verdict depends on the bytes alone, not on
how they arrive: lines are judged in their order, each when it is whole, and a limit as soon as it is passed. Its
sources: RFC 9112 (the messages), RFC 9110 (their meaning), RFC 3986 (targets).

A deadline is for the whole of something, not for each of its bytes: who sends or reads a byte now and then is cut off
like one who is silent. Only the connection's own thread touches it, but for `hang_up` and `cut`. Raises ConnectionError
when there is nobody to answer, RequestError when there is.
"""

import contextlib
import math
import re
import select
import socket
import ssl
import time
from dataclasses import dataclass

from .errors import HeadTooLarge, NotImplementedHere, RequestError, TargetTooLong, TooSlow

HANDSHAKE, HEAD, IDLE, WRITE = 5, 10, 60, 15  # seconds; IDLE is between two requests
BODY, BODY_RATE = 10, 64 * 1024  # seconds, and one more for each so many bytes: a slow mobile uplink
# Seconds for what a client still sends to a refusal, one more for so many bytes of it, and the most bytes.
LINGER, LINGER_RATE, MAX_LINGER = 2, 1024 * 1024, 32 * 1024 * 1024
READ = 16_384  # bytes: a TLS record's most
SEND_BUFFER = 256 * 1024  # bytes of answers that the system keeps for a slow reader; on its own it takes 4 MB
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


class Connection:
    """`raw` once the handshake is done; who speaks plain HTTP instead is answered in it. Raises OSError."""

    def __init__(self, raw: socket.socket, context: ssl.SSLContext):
        end = time.monotonic() + HANDSHAKE
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        raw.settimeout(HANDSHAKE)
        self._plain = raw.recv(1, socket.MSG_PEEK) not in (b"", b"\x16")  # 0x16: a TLS handshake record
        raw.settimeout(max(end - time.monotonic(), 0.001))
        self._socket = raw if self._plain else context.wrap_socket(raw, server_side=True)
        self._data, self._used = b"", False  # what came and was not read yet; whether there was a request before
        self._hung_up, self.until = False, math.inf  # until: when what it waits for is over, for `cut`

    def head(self) -> Head | None:
        """The next request's head; None when the client has closed or was idle for too long."""
        if self._plain:
            raise RequestError("this port speaks HTTPS: use https://")
        end = time.monotonic() + (IDLE if self._used and not self._data else HEAD)
        found = parse(self._data)
        while not found:
            try:
                more = self._until(end).recv(READ)
                if self._data and not more:
                    raise RequestError("the connection ended within the head")
            except TimeoutError:
                if self._data:
                    raise TooSlow(f"the head did not arrive within {HEAD} s") from None
                more = b""
            except OSError as error:  # a reset, or what is no TLS
                raise ConnectionAbortedError("the connection broke within the head") from error
            if not more:
                return None
            if self._used and not self._data:
                end = time.monotonic() + HEAD
            self._data += more
            # A line that comes byte by byte is looked at when it is whole or too long: each look costs.
            if b"\n" in more or b"\n" not in self._data[2:] or len(self._data) >= MAX_HEAD:
                found = parse(self._data)
        self._data, self._used, self.until = self._data[found.size :], True, math.inf
        return found

    def body(self, length: int) -> bytearray:
        """The next `length` bytes; TooSlow, or RequestError when the client sends less."""
        end = time.monotonic() + BODY
        body, self._data = bytearray(self._data[:length]), self._data[length:]
        try:
            while (got := len(body)) < length:  # it takes memory, and has time, for what has come and not for what may
                more = self._until(end + got / BODY_RATE).recv(min(READ, length - got))
                if not more:
                    raise RequestError(f"the body ended after {got:,} of {length:,} bytes")
                body += more
        except TimeoutError:
            raise TooSlow(f"of the body {got:,} of {length:,} bytes arrived in time") from None
        except OSError as error:
            raise ConnectionAbortedError("the connection broke within the body") from error
        self.until = math.inf
        return body

    def send(self, data: bytes) -> None:
        """All of it, or ConnectionError."""
        end, view = time.monotonic() + WRITE, memoryview(data)
        try:
            while view:
                view = view[self._until(end).send(view) :]
        except OSError as error:  # a time-out too: it reads too slowly
            raise ConnectionAbortedError("the client does not read") from error
        self.until = math.inf

    def gone(self) -> bool:
        """Whether the client has closed its side: then nobody waits for the answer."""
        if self._hung_up:  # which looks the same
            return False
        if hasattr(select, "POLLRDHUP"):
            poll = select.poll()
            poll.register(self._socket, select.POLLRDHUP)
            return bool(poll.poll(0))
        with contextlib.closing(select.kqueue()) as queue:  # macOS
            events = queue.control([select.kevent(self._socket, select.KQ_FILTER_READ, select.KQ_EV_ADD)], 1, 0)
            return any(event.flags & select.KQ_EV_EOF for event in events)

    def own_address(self) -> str:
        """The address of ours that the client has reached."""
        return self._socket.getsockname()[0].removeprefix("::ffff:")

    def hang_up(self) -> None:
        """Take no more requests; for any thread: TLS is not touched."""
        self._hung_up = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RD)

    def cut(self) -> None:
        """End what is over since a second; for any thread. OpenSSL reads records without data as long as they come."""
        if time.monotonic() > self.until + 1:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """End in order, with TLS's close_notify, and read away what the client still sends: a close before would reset
        the connection, and the last answer could be lost with it."""
        end, left, plain = time.monotonic() + LINGER, MAX_LINGER, socket.socket
        self._until(end).settimeout(0)
        with contextlib.suppress(OSError, ValueError):  # says that it does not wait for the client's own
            if not self._plain:
                self._socket.unwrap()
        with contextlib.suppress(OSError):
            plain.shutdown(self._socket, socket.SHUT_WR)
            while left > 0 and time.monotonic() < end:
                more = len(plain.recv(self._until(end), 65536))  # not to be decrypted any more
                end += more / LINGER_RATE
                left -= more or left
        self._socket.close()

    def _until(self, end: float) -> socket.socket:
        """The socket, which waits no longer."""
        self.until = end
        self._socket.settimeout(max(end - time.monotonic(), 0.001))  # 0 would mean: do not wait
        return self._socket


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
