"""One client's connection: TLS, heads and bodies in, answers out, each under a total deadline.

Knows nothing of routes, keys or JSON. A deadline is for the whole of something, not for each of its bytes: who sends
or reads a byte now and then is cut off like one who is silent. Only the connection's own thread touches it, but for
`hang_up` and `cut`. Raises ConnectionError when there is nobody to answer, RequestError when there is.
"""

import contextlib
import math
import select
import socket
import ssl
import time

from .errors import RequestError, TooSlow
from .head import MAX_HEAD, Head, parse

HANDSHAKE, HEAD, IDLE, WRITE = 5, 10, 60, 15  # seconds; IDLE is between two requests
BODY, BODY_RATE = 10, 64 * 1024  # seconds, and one more for each so many bytes: a slow mobile uplink
# Seconds for what a client still sends to a refusal, one more for so many bytes of it, and the most bytes.
LINGER, LINGER_RATE, MAX_LINGER = 2, 1024 * 1024, 32 * 1024 * 1024
READ = 16_384  # bytes: a TLS record's most
SEND_BUFFER = 256 * 1024  # bytes of answers that the system keeps for a slow reader; on its own it takes 4 MB


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
