"""Sockets, routes, the order of checks, errors → replies.

Knows nothing of MLX or sqlite: the model and the keys are handed in. One thread per connection, which also does
its TLS handshake, so that a silent client holds up nobody else.
"""

import base64
import bisect
import errno
import hashlib
import json
import logging
import os
import re
import selectors
import socket
import socketserver
import ssl
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from email.utils import formatdate
from functools import lru_cache, partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from . import errors, protocol
from .connection import Connection, Head
from .request import Delta

STOP_SECONDS = 30  # how long running requests may go on after the server was told to stop
BACKLOG = 1024  # with socketserver's 5, a burst of connections waits for retransmissions
BREATH = 0.1  # seconds between two tries to accept while the system has no descriptors left
PATIENCE = 0.05  # seconds without a token after which is looked whether the client is still there
QUIET = 60  # seconds between two lines about connections that are turned away: a flood must not fill the log
KEEP_ALIVE = 10  # seconds of silence in a stream after which a comment keeps proxies from closing it
HSTS = "max-age=31536000"  # a year, as browsers' own lists ask
STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CORS = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-API-Key, X-Request-Id",
    "Access-Control-Expose-Headers": "X-Request-Id, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, "
    "Retry-After, Retry-After-Ms",
    "Access-Control-Max-Age": "600",
    "Vary": "Origin",
}
PAGE = Path(__file__).with_name("chat.html").read_bytes()
# What /metrics shows, as prometheus.io/docs/instrumenting/exposition_formats says: totals only, nothing about any key.
# BOUNDS are upper ones in seconds, from one step of a small model to the wait in a full queue.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS = {
    "requests_total": "Requests answered, by route and HTTP status.",
    "refusals_total": "Requests refused or broken off, by type of error.",
    "turned_away_total": "Connections that were one too many.",
    "prompt_tokens_total": "Tokens of the prompts that were answered.",
    "completion_tokens_total": "Tokens made.",
    "cached_tokens_total": "Tokens of prompts that were not read again.",
    "running_sequences": "Sequences being read or answered now.",
    "waiting_sequences": "Sequences waiting for their turn now.",
    "cache_bytes": "Memory taken by prompts and pictures that were read.",
    "time_to_first_token_seconds": "From a request's head to its first token.",
    "inter_token_latency_seconds": "From one token of an answer to its next.",
}
NO_HEAD = Head("", "", "", 1, {"connection": "close"}, None, False, 0)  # of a request that could not be read

log = logging.getLogger("phi3v")


class Metrics:
    """Counters and histograms by name, as Prometheus text; safe from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._times = {name: [0] * (len(BOUNDS) + 1) for name in METRICS if name.endswith("_seconds")}
        self._sums = dict.fromkeys(self._times, 0.0)

    def add(self, name: str, amount: float = 1, **labels: str | int) -> None:
        # Labels are our own words, never a client's: nothing in them needs escaping.
        key = "{" + ",".join(f'{label}="{value}"' for label, value in labels.items()) + "}" if labels else ""
        with self._lock:
            self._counts[name][key] += amount

    def observe(self, name: str, seconds: float, times: int = 1) -> None:
        """Count a duration that occurred so many `times`."""
        with self._lock:
            self._times[name][bisect.bisect_left(BOUNDS, seconds)] += times
            self._sums[name] += seconds * times

    def render(self, gauges: dict[str, float]) -> bytes:
        """Everything, with `gauges` for what is measured at this moment."""
        lines = []
        with self._lock:
            for name, text in METRICS.items():
                full, total = f"phi3v_{name}", 0
                kind = "histogram" if name in self._times else "gauge" if name in gauges else "counter"
                lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
                for bound, count in zip((*BOUNDS, "+Inf"), self._times.get(name, ()), strict=False):
                    total += count
                    lines.append(f'{full}_bucket{{le="{bound}"}} {total}')
                if name in self._times:
                    lines += [f"{full}_sum {self._sums[name]:.9g}", f"{full}_count {total}"]
                values = {"": gauges[name]} if name in gauges else self._counts[name]
                lines += [f"{full}{labels} {value:.15g}" for labels, value in values.items()]
        return ("\n".join(lines) + "\n").encode()


class Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """HTTPS on the (host, port)s, bound at once and answering from `serve_forever` on.

    The first port may be 0, for any; the others then take the same. `llm` needs `answer`, `status`, `stats` and
    `checkpoint` of LLM; `keys` is a KeyStore or like one. Raises SetupError. The attributes may be set at any time.
    """

    hosts = ("localhost",)  # in lower case: what a request's Host may be besides the address it came to
    origins = ()  # whose pages may read answers
    max_content_length = 1024 * 1024  # as documented
    max_chat_content_length = 20 * 1024 * 1024  # a phone's photograph has 3 to 6 MB, and a third more as base64
    max_tokens = 1024  # as documented
    max_connections = 1024  # a thread and some 70 KB each
    awaited = ()  # the ranks without which the model cannot be loaded
    daemon_threads = True
    block_on_close = False

    def __init__(self, addresses: list[tuple[str, int]], context: ssl.SSLContext, llm, keys):
        self.context, self.llm, self.keys = context, llm, keys
        self.started, self.metrics, self.stopping = int(time.time()), Metrics(), False
        self.handlers: dict[socket.socket, Handler | None] = {}  # by accepted socket; None during the handshake
        self._quiet_until = 0.0
        self._left = threading.Condition()  # notified when there is one less
        self._selector = selectors.DefaultSelector()
        for host, port in addresses:
            self._listen(host, port or (self.server_address[1] if self._selector.get_map() else 0))
        super().__init__(self.server_address, Handler)

    def _listen(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            both = host == "::" and socket.has_dualstack_ipv6()
            listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None) or 0
            if self._selector.get_map() and number in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                return  # a machine without IPv6: its localhost is the first address only
            self.server_close()
            reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or "a port is 0 to 65535"
            reason += f"; is phi3v running already? --port {port + 1} takes another" * (number == errno.EADDRINUSE)
            reason += "; ports below 1024 are the system's: try --port 8443" * (number == errno.EACCES)
            raise errors.SetupError(f"cannot listen on {host} port {port}: {reason}") from None
        listener.setblocking(False)
        if not self._selector.get_map():
            self.server_address = listener.getsockname()
        self._selector.register(listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        return self._selector.fileno()  # readable when one of the listeners is

    def get_request(self) -> tuple[socket.socket, tuple]:
        try:
            return self._selector.select(0)[0][0].fileobj.accept()
        except IndexError:
            raise BlockingIOError("the client has gone") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(BREATH)  # or this would be tried again at once, and for ever
            raise

    def verify_request(self, request: socket.socket, client_address) -> bool:
        """Take a connection unless there are too many; one more thread to tell it so would be one more."""
        if len(self.handlers) < self.max_connections:
            self.handlers[request] = None
            return True
        self.metrics.add("turned_away_total")
        if time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + QUIET
            log.warning("all %d connections are taken, others are turned away", self.max_connections)
        return False

    def finish_request(self, request: socket.socket, client_address) -> None:
        """Handshake and requests of one connection, on its own thread."""
        try:
            super().finish_request(request, client_address)
        except OSError as error:  # ssl.SSLError and time-outs are OSErrors too: the client's doing, not ours
            log.debug("connection of %s ended: %s", client_address[0], error)

    def service_actions(self) -> None:
        for handler in filter(None, list(self.handlers.values())):
            handler.connection.cut()

    def handle_error(self, request, client_address) -> None:
        log.exception("connection of %s failed", client_address[0])

    def shutdown_request(self, request: socket.socket) -> None:
        request.close()
        with self._left:
            self.handlers.pop(request, None)
            self._left.notify_all()

    def server_close(self) -> None:
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            key.fileobj.close()

    def stop(self) -> None:
        """Accept nothing more and return when the running requests are answered, or after STOP_SECONDS."""
        self.shutdown()
        self.server_close()
        self.stopping = True  # from here on nobody waits for a request
        with self._left:
            for handler in filter(None, list(self.handlers.values())):
                if not handler.busy:
                    handler.connection.hang_up()
            idle = lambda: not any(h and h.busy for h in list(self.handlers.values()))  # noqa: E731
            self._left.wait_for(idle, STOP_SECONDS)
            self._left.wait_for(lambda: not any(list(self.handlers.values())), 1)  # their farewells
            self._left.wait_for(idle, STOP_SECONDS)  # who had read a head, and looked idle


class Handler(BaseHTTPRequestHandler):
    """One connection: http.server's loop over its requests; how a head is read and an answer written is our own."""

    busy = False

    def setup(self) -> None:
        self.connection = Connection(self.request, self.server.context)
        self.server.handlers[self.request] = self

    def finish(self) -> None:
        self.connection.close()

    def handle_one_request(self) -> None:
        """Answer one request and log it; every error, whoever raised it, is rendered here or in `_stream`."""
        self.close_connection, unreadable = True, None
        if self.server.stopping:  # it may have looked for idle connections when this was not one
            return
        try:
            head = self.connection.head()
        except errors.RequestError as error:
            head, unreadable = NO_HEAD, error
        if not head:
            return
        self.busy = True
        self._begin(head)
        try:
            try:
                if unreadable:
                    raise unreadable
                self._answer(head)
            except Exception as error:
                self._refuse(error)
        except ConnectionError:
            self._status, self.close_connection = 499, True  # the client has gone; there is nobody to tell
        finally:
            unreadable = None  # with its frames it would keep all of the request until the garbage is collected
            self._log()
            self.busy = False

    def _begin(self, head: Head) -> None:
        self._started, self._head = time.monotonic(), head
        given = head.fields.get("x-request-id", "")
        self._request_id = given if re.fullmatch(r"[!-~]{1,128}", given) else uuid.uuid4().hex
        self._status, self._key, self._facts, self._allowance, self._route = 0, None, {}, {}, "other"
        # What was not read of the body would be taken for the next request: the connection ends after the answer.
        unread = head.chunked or head.length or (head.length is None and head.method == "POST")
        self.close_connection = bool(unread) or not head.persistent

    def _answer(self, head: Head) -> None:
        if head.host and head.host not in self.server.hosts and head.host != self.connection.own_address():
            name = f"{head.host!r:.100}"
            raise errors.Misdirected(f"this server is not known as {name}: --allowed-host {name} would make it so")
        self._route = route = MODEL if head.path.startswith(MODEL[:-4]) else head.path
        if route not in ROUTES:
            self._route = "other"
            raise errors.NotFound(f"there is no {head.path!r:.200}; the routes are {', '.join(ROUTES)}")
        if head.method not in METHODS:
            raise errors.NotImplementedHere(f"there is no method {head.method!r:.50}")
        if head.method == "OPTIONS" and self._cors():
            return self.connection.send(self._head_of(204, {}))
        method, answer = ROUTES[route]
        if head.method != method and (head.method, method) != ("HEAD", "GET"):
            raise errors.MethodNotAllowed(f"{head.path} takes {method}, not {head.method}", headers={"Allow": method})
        most = self.server.max_chat_content_length if "chat" in route else self.server.max_content_length
        if (head.length or 0) > most:
            hint = "" if "chat" in route else f"; {CHAT} takes {self.server.max_chat_content_length:,}"
            raise errors.TooLarge(f"the body has {head.length:,} bytes, at most {most:,} are allowed{hint}")
        answer(self)

    def health(self) -> None:
        status = self.server.llm.status
        good = status in ("ok", "idle")
        body = {"status": status} | ({"ranks_awaited": list(self.server.awaited)} if self.server.awaited else {})
        self._reply(200 if good else 503, body, {} if good else {"Retry-After": "5"})

    def page(self) -> None:
        self._reply(200, PAGE, PAGE_HEADERS)

    def metrics(self) -> None:
        self._authorize()
        stats = self.server.llm.stats()
        gauges = {f"{name}_sequences": stats[name] for name in ("running", "waiting")}
        payload = self.server.metrics.render(gauges | {"cache_bytes": stats["cache_bytes"]})
        self._reply(200, payload, {"Content-Type": METRICS_TYPE})

    def models(self) -> None:
        self._authorize()
        model = {"id": protocol.MODEL, "object": "model", "created": self.server.started, "owned_by": "phi3v"}
        if self._route != MODEL:
            return self._reply(200, {"object": "list", "data": [model]})
        name = self._head.path.removeprefix(MODEL[:-4])
        if name != protocol.MODEL:
            raise errors.ModelNotFound(f"there is no model {name!r:.100}, only {protocol.MODEL}", "model")
        self._reply(200, model)

    def completions(self) -> None:
        fields, length = self._head.fields, self._head.length
        given = fields.get("content-type", "missing")
        is_json = given.partition(";")[0].strip().lower() == "application/json"
        self._authorize(counted=is_json and length is not None)
        if not is_json:
            raise errors.UnsupportedType(f"the Content-Type must be application/json, not {given!r:.100}")
        if length is None:
            raise errors.LengthRequired("the request needs a Content-Length; chunked bodies are not taken")
        answer = None
        try:
            if fields.get("expect", "").lower() == "100-continue" and self._head.minor:
                self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")  # only now: key and size are good
            raw = self.connection.body(length)
            self.close_connection = not self._head.persistent
            body, chat = protocol.parse_json(raw), self._route == CHAT
            request = (protocol.parse_chat if chat else protocol.parse_completion)(body, self.server.max_tokens)
            streamed, include_usage = protocol.streaming(body)
            with self.server.llm.answer(request, self._key.id, PATIENCE, self._check) as deltas:
                answer = protocol.Answer(chat, self.server.llm.checkpoint, len(request.chats), request.params.n)
                if streamed:
                    self._stream(answer.events(self._watched(deltas), include_usage))
                else:
                    reply = answer.whole(self._watched(deltas))
        finally:
            self._count(answer.counts if answer else {})
        if not streamed:
            self._reply(200, reply)

    def _check(self) -> None:
        if self.connection.gone():
            raise ConnectionAbortedError("the client has closed the connection")
        if not self.server.keys.lives(self._key):
            raise errors.Forbidden("the API key was deleted, or has expired, while this was answered")

    def _watched(self, deltas: Iterator[Delta | None]) -> Iterator[Delta | None]:
        """The deltas, timed, and a None for KEEP_ALIVE of silence, while the client is there and its key lives."""
        before: dict[int, tuple[float, int]] = {}
        spoke = self._started
        for delta in deltas:
            now = time.monotonic()
            self._check()
            if not delta and now - spoke < KEEP_ALIVE:
                continue
            if delta and delta.index not in before:
                self._facts.setdefault("first_ms", round((now - self._started) * 1000))
                self.server.metrics.observe("time_to_first_token_seconds", now - self._started)
            elif delta and (made := delta.completion_tokens - before[delta.index][1]):
                pause = (now - before[delta.index][0]) / made
                self.server.metrics.observe("inter_token_latency_seconds", pause, made)
            if delta:
                before[delta.index] = now, delta.completion_tokens
            spoke = now
            yield delta

    def _count(self, counts: dict[str, int]) -> None:
        """What a request that the window let through has used, whatever became of it."""
        self._facts |= counts
        for name, count in counts.items():
            self.server.metrics.add(f"{name}_total", count)
        self.server.keys.record(self._key, *(counts.get(f"{of}_tokens", 0) for of in ("prompt", "completion")))

    def _authorize(self, counted: bool = False) -> None:
        fields = self._head.fields
        scheme, _, token = fields.get("authorization", "").partition(" ")
        secret = (fields.get("x-api-key") or (token if scheme.lower() == "bearer" else "")).strip()
        if not secret:
            hint = "send it as X-API-Key: KEY or Authorization: Bearer KEY; `phi3v create` makes one"
            raise errors.Unauthorized(f"the API key is missing: {hint}")
        self._key = self.server.keys.verify(secret)
        self._allowance = self.server.keys.take(self._key, counted).headers()

    def _stream(self, events: Iterator[bytes]) -> None:
        """Send events as they come; what fails after the 200 is an event, too, and the last one."""
        chunked = self._head.minor > 0
        self.close_connection |= not chunked
        self.connection.send(self._head_of(200, STREAM | ({"Transfer-Encoding": "chunked"} if chunked else {})))

        def tell(event: bytes) -> None:
            self.connection.send(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)

        try:
            for event in events:
                tell(event)
        except Exception as error:
            tell(protocol.sse(protocol.error(self._told(error))))
        if chunked:
            self.connection.send(b"0\r\n\r\n")

    def _told(self, error: Exception) -> errors.RequestError:
        """What a client is told of an error: its own in full, of ours only where to look."""
        if isinstance(error, ConnectionError):
            raise error
        if isinstance(error, MemoryError):
            error = errors.Unavailable("there is not enough memory for this request now")
        if not isinstance(error, errors.RequestError):
            log.exception("request %s failed", self._request_id)
            error = errors.Internal(f"internal error; the server's log has it under request {self._request_id}")
        self.server.metrics.add("refusals_total", type=error.type)
        self._status = error.status  # in the log; of a stream the client has read 200
        return error

    def _refuse(self, error: Exception) -> None:
        told = self._told(error)  # here and not where it was caught: a frame that knows its own error stays
        self._reply(told.status, protocol.error(told), told.headers)

    def _reply(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        payload = body if isinstance(body, bytes) else protocol.render(body)
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(payload)), "Cache-Control": "no-store"}
        head = self._head_of(status, fixed | (headers or {}))
        self.connection.send(head if self._head.method == "HEAD" else head + payload)

    def _head_of(self, status: int, headers: dict[str, str]) -> bytes:
        self._status = status
        self.close_connection |= self.server.stopping
        headers = {"X-Request-Id": self._request_id, "Date": _date(int(time.time()))} | self._allowance | headers
        if self.close_connection:
            headers["Connection"] = "close"
        elif self._head.minor == 0:
            headers["Connection"] = "keep-alive"
        if self._head.host in self.server.hosts and _is_public(self._head.host):
            headers["Strict-Transport-Security"] = HSTS
        fields = "".join(f"{name}: {value}\r\n" for name, value in (headers | self._cors()).items())
        return f"HTTP/1.1 {status} {self.responses[status][0]}\r\n{fields}\r\n".encode("latin-1")

    def _cors(self) -> dict[str, str]:
        origin = self._head.fields.get("origin")
        return CORS | {"Access-Control-Allow-Origin": origin} if origin in self.server.origins else {}

    def _log(self) -> None:
        self.server.metrics.add("requests_total", route=self._route, status=self._status)
        line = {
            "request": self._request_id,
            "client": self.client_address[0],
            "key": self._key.id if self._key else None,
            "method": self._head.method if self._head.method in METHODS else None,
            "path": json.dumps(self._head.path[:200]),
            "status": self._status,
            "ms": round((time.monotonic() - self._started) * 1000),
        } | self._facts
        text = " ".join(f"{k}={v}" for k, v in line.items() if v is not None)
        log.info("%s", re.sub(r"phi3v_\w+", "phi3v_…", text))  # a key that was put into the path


_date = lru_cache(1)(partial(formatdate, usegmt=True))  # 2 µs each


def _is_public(host: str) -> bool:
    """Whether browsers are to remember that this name is HTTPS only: not what is another machine tomorrow."""
    return "." in host and not host.endswith((".local", ".localhost")) and not re.fullmatch(r"[0-9.]+|.*:.*", host)


def _hash(tag: str) -> str:
    """What lets a browser take the page's own script or style, and no other."""
    inside = PAGE.partition(f"<{tag}>".encode())[2].partition(f"</{tag}>".encode())[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"


PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY"))
CHAT, MODEL = "/v1/chat/completions", "/v1/models/{id}"
ROUTES = {
    "/": ("GET", Handler.page),
    "/v1/completions": ("POST", Handler.completions),
    CHAT: ("POST", Handler.completions),
    "/v1/models": ("GET", Handler.models),
    MODEL: ("GET", Handler.models),
    "/health": ("GET", Handler.health),
    "/metrics": ("GET", Handler.metrics),
}
