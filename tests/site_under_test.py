"""The real server over real TLS, with a real key store and a model that does as it is told; and a client for it."""

import json
import logging
import queue
import socket
import ssl
import struct
import threading
from contextlib import suppress
from http.client import parse_headers
from logging.handlers import QueueHandler
from typing import NamedTuple

from phi3v import server, tls
from phi3v.keys import KeyStore
from phi3v.request import Delta

HELLO = b'{"prompt": "hello"}'
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
KINDS |= {500: "server_error", 503: "service_unavailable_error"}
CORK = getattr(socket, "TCP_CORK", 4)  # macOS has it as TCP_NOPUSH, of which Python does not know


class FakeLLM:
    """Answers each prompt with its reverse, the last one first; refuses, breaks or waits as it is told."""

    def __init__(self):
        self.status, self.checkpoint, self.requests = "ok", "fake-1", []
        self.refuses = self.breaks = None  # what `answer` and what its iterator raises
        self.gate, self.started, self.left = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self.silent = self.patience = 0  # so many patiences pass before the first delta, and more until the gate opens

    def answer(self, request, owner, patience, check):
        self.requests.append(request)
        self.owner, self.patience = owner, patience
        if self.refuses:
            raise self.refuses
        return self

    def stats(self):
        return {"running": 3, "waiting": 2, "cache_bytes": 1000}

    def __enter__(self):
        return self._pieces([chat.messages[-1][1][0] for chat in self.requests[-1].chats])

    def __exit__(self, *_):
        self.left.set()

    def _pieces(self, prompts):
        self.started.set()
        yield from [None] * self.silent
        for _ in range(3000):
            if self.gate.wait(0.01):
                break
            yield None
        for i in reversed(range(len(prompts))):
            yield Delta(i, prompts[i][:0:-1], None, len(prompts[i]), 1)
            if self.breaks:
                raise self.breaks
            yield Delta(i, prompts[i][0], "stop", len(prompts[i]), 2)


class Reply(NamedTuple):
    status: int
    headers: dict
    body: bytes

    def refusal(self, status: int, param: str | None = None) -> str:
        """The message of the documented error, after a look at everything else in it."""
        error = json.loads(self.body)["error"]
        message, kind = error.pop("message"), KINDS.get(status, "invalid_request_error")
        assert (self.status, error) == (status, {"code": str(status), "type": kind, "param": param}), message
        assert self.headers["Content-Type"] == "application/json"
        return message


class Client:
    """One connection on which a test says every byte; a reset raises."""

    def __init__(self, port: int, trust: ssl.SSLContext | None):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.sock = trust.wrap_socket(self.sock, server_hostname="localhost") if trust else self.sock
        self.file = self.sock.makefile("rb", buffering=0)  # so that nothing is read ahead

    def send(self, data: bytes) -> "Client":
        self.sock.sendall(data)
        return self

    def say_no_more(self) -> "Client":
        """Send close_notify but go on reading; only while no reply can have come yet."""
        self.sock.settimeout(0)
        self.sock.setsockopt(
            socket.IPPROTO_TCP, CORK, 1
        )  # or a quick reply would come while unwrap still looks for one
        with suppress(ssl.SSLWantReadError):
            self.sock.unwrap()
        self.sock.setsockopt(socket.IPPROTO_TCP, CORK, 0)
        self.sock.settimeout(30)
        return self

    def reply(self, body: bool = True) -> Reply:
        status, headers = int(self.file.readline().split()[1]), parse_headers(self.file)
        data, length = b"", int(headers.get("Content-Length", 0)) if body else 0
        while len(data) < length and (more := self.file.read(length - len(data))):  # a TLS record at a time
            data += more
        return Reply(status, headers, data)

    def ended(self) -> bool:
        """Whether the server ends the connection in order too; any byte that it said more raises."""
        self.sock.unwrap()
        return True

    def close(self, reset: bool = False) -> None:
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.file.close()
        self.sock.close()


class Site:
    """The server with all that belongs to it; `line` gives what was logged, one after the other."""

    def __init__(self, pair, folder, clock):
        self.llm, self.keys = FakeLLM(), KeyStore(folder / "keys.db", clock=clock)
        self.key, self.secret = self.keys.create("test", 1000)
        self.log, self.clients = QueueHandler(queue.SimpleQueue()), []
        self.server = server.Server([("127.0.0.1", 0)], tls.server_context(*pair), self.llm, self.keys)
        self.port, self.trust = self.server.server_address[1], ssl.create_default_context(cafile=pair[0])
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def connect(self, secure: bool = True) -> Client:
        self.clients.append(Client(self.port, self.trust if secure else None))
        return self.clients[-1]

    def http(self, body: bytes = HELLO, request: str = "POST /v1/completions", **headers: str | None) -> bytes:
        """A request as bytes; headers with _ for -, None for one that is to be left out."""
        usual = {"Host": "localhost", "Content_Type": "application/json", "X_API_Key": self.secret}
        usual |= {"Content_Length": str(len(body))} if body else {}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in (usual | headers).items() if value is not None]
        return "\r\n".join([f"{request} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body

    def post(self, *args, **headers: str | None) -> Reply:
        return self.connect().send(self.http(*args, **headers)).reply()

    def line(self) -> str:
        while (record := self.log.queue.get(timeout=30)).levelno < logging.INFO:
            pass
        return record.getMessage()

    def close(self) -> list[logging.LogRecord]:
        """End everything; returns what was logged and not yet looked at."""
        self.llm.gate.set()
        for client in self.clients:
            client.close()
        self.server.stop()
        for thread in [self.thread, *(t for t in threading.enumerate() if "process_request" in t.name)]:
            thread.join(30)
            assert not thread.is_alive()
        self.keys.close()
        return [self.log.queue.get() for _ in range(self.log.queue.qsize())]
