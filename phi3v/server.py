"""Sockets, routes, the order of checks, errors → replies.

Knows nothing of MLX or sqlite: the model and the keys are handed in. One thread per connection, which also does
its TLS handshake, so that a silent client holds up nobody else.
"""

import contextlib
import json
import logging
import re
import socket
import socketserver
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

from . import errors, protocol
from .metrics import CONTENT_TYPE, Metrics

TIMEOUT = 30  # seconds a client may be silent, in the handshake, in a request or between two
MAX_DRAIN = 32 * 1024 * 1024  # bytes of a refused body that are read so that the client sees the reply
DRAIN_SECONDS = 5  # and how long that may take
STOP_SECONDS = 30  # how long running requests may go on after the server was told to stop
MAX_CONTENT_LENGTH = 1024 * 1024  # as documented
MAX_CHAT_CONTENT_LENGTH = 20 * 1024 * 1024  # a phone's photograph has 3 to 6 MB, and a third more as base64
MAX_TOKENS = 1024  # as documented
KEEP_ALIVE = 10  # seconds of silence in a stream after which a comment keeps proxies from closing it
STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

log = logging.getLogger("phi3v")


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """HTTPS on (host, port), bound at once and answering from `serve_forever` on.

    Not http.server.HTTPServer: its server_bind asks DNS for our own name, which can take seconds. `llm` needs
    `answer`, `status`, `stats` and `checkpoint` of LLM; `keys` is a KeyStore or like one.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # with the default of 5, a burst of connections waits for retransmissions

    def __init__(
        self,
        address: tuple[str, int],
        context: ssl.SSLContext,
        llm,
        keys,
        max_content_length: int = MAX_CONTENT_LENGTH,
        max_tokens: int = MAX_TOKENS,
        max_chat_content_length: int = MAX_CHAT_CONTENT_LENGTH,
    ):
        self.context, self.llm, self.keys = context, llm, keys
        self.max_content_length, self.max_chat_content_length = max_content_length, max_chat_content_length
        self.max_tokens, self.started, self.metrics = max_tokens, int(time.time()), Metrics()
        self._running, self._changed = 0, threading.Condition()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def finish_request(self, request: socket.socket, client_address) -> None:
        """Handshake and requests of one connection, on its own thread."""
        request.settimeout(TIMEOUT)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        try:
            if request.recv(1, socket.MSG_PEEK) not in (b"", b"\x16"):  # 0x16: a TLS handshake record
                request.sendall(PLAIN_HTTP)
                request.recv(65536)  # as in Handler._drain
                return
            with self.context.wrap_socket(request, server_side=True) as tls:
                super().finish_request(tls, client_address)
                tls.settimeout(1)
                tls.unwrap()  # close_notify, so that the client knows that nothing was cut off
        except OSError as error:  # ssl.SSLError and time-outs are OSErrors too: the client's doing, not ours
            log.debug("connection of %s ended: %s", client_address[0], error)

    def handle_error(self, request, client_address) -> None:
        log.exception("connection of %s failed", client_address[0])

    def enter(self, change: int) -> None:
        """Count a request that begins (+1) or ends (−1)."""
        with self._changed:
            self._running += change
            self._changed.notify_all()

    def stop(self) -> None:
        """Accept nothing more and return when the running requests are answered, or after STOP_SECONDS."""
        self.shutdown()
        self.server_close()
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, STOP_SECONDS)


class Handler(BaseHTTPRequestHandler):
    """One connection; http.server reads the heads, everything after that is here."""

    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT
    wbufsize = -1  # head and body leave in one write, when handle_one_request flushes

    def _dispatch(self) -> None:
        """Answer one request and log it; every RequestError, whoever raised it, is rendered here."""
        self.server.enter(+1)
        self._begin()
        try:
            self._answer()
        except errors.RequestError as error:
            self.server.metrics.add("refusals_total", type=error.type)
            body = protocol.error(error.status, error.message, error.type, error.param)
            self._reply(error.status, body, error.headers)
        except Exception:
            self._reply(500, self._internal_error())
        finally:
            self._log()
            self.server.enter(-1)

    do_GET = do_POST = do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_QUERY = _dispatch

    def _begin(self) -> None:
        self._started = time.monotonic()
        given = self.headers.get("X-Request-Id", "") if getattr(self, "headers", None) else ""
        self._request_id = given if re.fullmatch(r"[!-~]{1,128}", given) else uuid.uuid4().hex
        self._status, self._key, self._facts, self._unread, self._allowance = 0, None, {}, 0, {}
        self._route = "other"

    def _answer(self) -> None:
        length = self._declared_length()
        path = self.path.partition("?")[0]
        self._route = route = MODEL if path.startswith(MODEL[:-4]) else path
        methods = ROUTES.get(route)
        if methods is None:
            self._route = "other"
            raise errors.NotFound(f"there is no {path!r:.200}; the routes are {', '.join(ROUTES)}")
        method = "GET" if self.command == "HEAD" else self.command
        if method not in methods:
            allowed = ", ".join(methods)
            raise errors.MethodNotAllowed(f"{path} takes {allowed}, not {self.command}", headers={"Allow": allowed})
        chat = "chat" in route
        most = self.server.max_chat_content_length if chat else self.server.max_content_length
        if length is not None and length > most:
            raise errors.TooLarge(f"the body has {length:,} bytes, at most {most:,} are allowed")
        methods[method](self, length)

    def health(self, length: int | None) -> None:
        status = self.server.llm.status
        good = status in ("ok", "idle")
        self._reply(200 if good else 503, {"status": status}, {} if good else {"Retry-After": "5"})

    def metrics(self, length: int | None) -> None:
        self._authorize()
        stats = self.server.llm.stats()
        gauges = {f"{name}_sequences": stats[name] for name in ("running", "waiting")}
        payload = self.server.metrics.render(gauges | {"cache_bytes": stats["cache_bytes"]})
        self._reply(200, payload, {"Content-Type": CONTENT_TYPE})

    def models(self, length: int | None) -> None:
        self._authorize()
        model = {"id": protocol.MODEL, "object": "model", "created": self.server.started, "owned_by": "phi3v"}
        if self._route != MODEL:
            return self._reply(200, {"object": "list", "data": [model]})
        name = self.path.partition("?")[0].removeprefix(MODEL[:-4])
        if name != protocol.MODEL:
            raise errors.ModelNotFound(f"there is no model {name!r:.100}, only {protocol.MODEL}", "model")
        self._reply(200, model)

    def completions(self, length: int | None) -> None:
        is_json = self.headers.get_content_type() == "application/json"
        self._authorize(counted=is_json and length is not None)
        if not is_json:
            given = self.headers.get("Content-Type", "missing")
            raise errors.UnsupportedType(f"the Content-Type must be application/json, not {given!r:.100}")
        if length is None:
            raise errors.LengthRequired("the request needs a Content-Length; chunked bodies are not taken")
        answer = None
        try:
            body, chat = protocol.parse_json(self._read(length)), self._route == CHAT
            request = (protocol.parse_chat if chat else protocol.parse_completion)(body, self.server.max_tokens)
            streamed, include_usage = protocol.streaming(body)
            with self.server.llm.answer(request, self._key.id, KEEP_ALIVE if streamed else None) as deltas:
                answer = protocol.Answer(chat, self.server.llm.checkpoint, len(request.chats), request.params.n)
                if streamed:
                    self._stream(answer.events(self._watched(deltas), include_usage))
                else:
                    reply = answer.whole(self._watched(deltas))
        finally:
            self._count(answer.counts if answer else {})
        if not streamed:
            self._reply(200, reply)

    def _watched(self, deltas):
        """The deltas, noting how long the first token and those after it took."""
        before: dict[int, tuple[float, int]] = {}
        for delta in deltas:
            now = time.monotonic()
            if delta and delta.index not in before:
                self._facts.setdefault("first_ms", round((now - self._started) * 1000))
                self.server.metrics.observe("time_to_first_token_seconds", now - self._started)
            elif delta and (made := delta.completion_tokens - before[delta.index][1]):
                pause = (now - before[delta.index][0]) / made
                self.server.metrics.observe("inter_token_latency_seconds", pause, made)
            if delta:
                before[delta.index] = now, delta.completion_tokens
            yield delta

    def _count(self, counts: dict[str, int]) -> None:
        """What a request that the window let through has used, whatever became of it."""
        self._facts |= counts
        for name, count in counts.items():
            self.server.metrics.add(f"{name}_total", count)
        with contextlib.suppress(errors.RequestError):  # logged by the store; the answer is not worth less for it
            self.server.keys.record(self._key, *(counts.get(f"{of}_tokens", 0) for of in ("prompt", "completion")))

    def _authorize(self, counted: bool = False) -> None:
        self._key = self.server.keys.verify(self._secret())
        self._allowance = self.server.keys.take(self._key, counted).headers()

    def _stream(self, events: Iterator[bytes]) -> None:
        """Send events as they come; what fails after the 200 is an event, too, and the last one."""
        self._status, chunked = 200, self.request_version != "HTTP/1.0"
        self.close_connection |= not chunked
        self._write_head(200, STREAM | ({"Transfer-Encoding": "chunked"} if chunked else {}))
        try:
            for event in self._told(events):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n" if chunked else b"")
            self.wfile.flush()
        except OSError:
            self._status, self.close_connection = 499, True  # the client went away

    def _told(self, events: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from events
        except errors.RequestError as error:
            self._status = error.status  # in the log; the client has read 200
            yield protocol.sse(protocol.error(error.status, error.message, error.type, error.param))
        except Exception:
            self._status = 500
            yield protocol.sse(self._internal_error())

    def _internal_error(self) -> dict:
        log.exception("request %s failed", self._request_id)
        message = f"internal error; the server's log has it under request {self._request_id}"
        return protocol.error(500, message, "server_error")

    def _secret(self) -> str:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        secret = (self.headers.get("X-API-Key") or (token if scheme.lower() == "bearer" else "")).strip()
        if not secret:
            raise errors.Unauthorized("the API key is missing: send it as X-API-Key: KEY or Authorization: Bearer KEY")
        return secret

    def _declared_length(self) -> int | None:
        """Content-Length, None if there is none; anything by which two readers could differ closes the connection."""
        given = [value.strip(" \t") for value in self.headers.get_all("Content-Length", [])]
        chunked = self.headers.get("Transfer-Encoding") is not None
        if chunked or given or self.command == "POST":
            self._unread = MAX_DRAIN  # where its body ends, and the next request begins, is not known yet
        if len(given) > 1 or (given and (chunked or not re.fullmatch(r"[0-9]{1,15}", given[0]))):
            raise errors.RequestError("Content-Length must be one decimal number, without Transfer-Encoding")
        if given:
            self._unread = int(given[0])
        return self._unread if given else None

    def _read(self, length: int) -> bytes:
        try:
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                self.wfile.flush()
            raw = self.rfile.read(length)
        except OSError:  # timed out, reset, or a broken TLS record: in the latter two nobody reads the reply
            raise errors.TooSlow(f"the body of {length:,} bytes did not arrive in time") from None
        self._unread -= len(raw)
        if len(raw) < length:
            raise errors.RequestError(f"the body ended after {len(raw):,} of {length:,} bytes")
        return raw

    def handle_expect_100(self) -> bool:
        return True  # answered by _read, after the key and the size were checked

    def _reply(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        self._status = status
        payload = body if isinstance(body, bytes) else protocol.render(body)
        if self._unread:
            self.close_connection = True  # or the rest of the body would be read as the next request
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(payload)), "Cache-Control": "no-store"}
        self._write_head(status, fixed | (headers or {}))
        try:
            if self.command != "HEAD":
                self.wfile.write(payload)
            self.wfile.flush()
            self._drain()
        except OSError:
            self._status, self.close_connection = 499, True  # the client went away; there is nobody to tell

    def _write_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        fixed = {"X-Request-Id": self._request_id, "Date": self.date_time_string()}
        for name, value in (fixed | self._allowance | headers).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _drain(self) -> None:
        """Read what is left of a refused body: closing on unread data resets the connection, and the reply is lost."""
        end, left = time.monotonic() + DRAIN_SECONDS, min(self._unread, MAX_DRAIN)
        self.connection.settimeout(1)
        try:
            while left > 0 and time.monotonic() < end:
                data = self.rfile.read1(min(left, 65536))
                left -= len(data) or left
        except OSError:
            pass  # the client stopped sending: it has read the reply, or never will
        self.connection.settimeout(TIMEOUT)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server's own reading of a head finds wrong, in our form."""
        self._begin()
        self._unread = MAX_DRAIN
        self.command = self.command or ""
        self.request_version = "HTTP/1.1"  # or nothing but the body would be sent to a client that claimed 0.9
        self._reply(code, protocol.error(code, str(message or self.responses[code][0]), "invalid_request_error"))
        self._log()

    def _log(self) -> None:
        self.server.metrics.add("requests_total", route=self._route, status=self._status)
        line = {
            "request": self._request_id,
            "client": self.client_address[0],
            "key": self._key.id if self._key else None,
            "method": self.command if hasattr(self, f"do_{self.command}") else None,  # any other may hold anything
            "path": getattr(self, "path", "").partition("?")[0][:200],
            "status": self._status,
            "ms": round((time.monotonic() - self._started) * 1000),
            **{k: v for k, v in self._facts.items() if isinstance(v, int)},
        }
        text = " ".join(f"{k}={json.dumps(v) if k == 'path' else v}" for k, v in line.items() if v is not None)
        log.info("%s", re.sub(r"phi3v_\w+", "phi3v_…", text))  # a key that was put into the path
        self.path, self.headers = "", None  # or an unreadable next head would be answered and logged with these

    def log_message(self, *_) -> None:
        pass  # http.server's own lines would go to stderr; ours is `_log`


CHAT, MODEL = "/v1/chat/completions", "/v1/models/{id}"
ROUTES = {
    "/v1/completions": {"POST": Handler.completions},
    CHAT: {"POST": Handler.completions},
    "/v1/models": {"GET": Handler.models},
    MODEL: {"GET": Handler.models},
    "/health": {"GET": Handler.health},
    "/metrics": {"GET": Handler.metrics},
}

PLAIN_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    + protocol.render(protocol.error(400, "this port speaks HTTPS: use https://", "invalid_request_error"))
)
