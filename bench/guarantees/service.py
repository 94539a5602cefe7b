"""A server of its own in a temporary folder, started as a person starts it, and what is asked of it here."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# `make guarantees` makes the environments side by side: the server's own has no suffix.
PYTHON = sys.prefix.removesuffix("-guarantees") + "/bin/python"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PHI3V_")} | {"PYTHONUNBUFFERED": "1"}
START_SECONDS = 60  # to import MLX and load the demo on a busy machine
UNLIMITED = 1_000_000  # requests per minute, the most a key may have
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
# The demo answers in a few words. These penalties keep its end token away: it goes on to the last of 1,024 tokens.
LONG = {"prompt": "What is 3 + 4?", "max_tokens": 1024, "repetition_penalty": 10, "frequency_penalty": -2}


class Service:
    """`phi3v serve --model demo`; `files` bounds its descriptors, a `folder` that is given is kept."""

    def __init__(self, *options: str, folder: Path | None = None, files: int | None = None):
        self._own = folder is None
        self.folder = folder or Path(tempfile.mkdtemp(prefix="phi3v-guarantees-"))
        new = not (self.folder / "keys.db").exists()
        self.key = self.create("bench") if new else None
        command = [PYTHON, "-m", "phi3v", "serve", "--model", "demo", "--port", "0", *options]
        if files:
            command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
        with open(self.folder / "stderr", "a") as errors:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        first = self.process.stdout.readline()  # "phi3v … answers at https://localhost:…", once it does
        if not first:
            self.close()
            raise RuntimeError(f"the server did not start: {self.said[-300:]!r}")
        self.port = int(re.search(r"https://localhost:(\d+)", first)[1])
        self.url = f"https://localhost:{self.port}"
        self.ps = psutil.Process(self.process.pid)
        self.certificate = self.folder / "server.crt"
        self.trust = ssl.create_default_context(cafile=self.certificate)
        self._metrics = self.https()
        wait_until(lambda: self.health() == 200, START_SECONDS)

    def __enter__(self) -> "Service":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        if hasattr(self, "_metrics"):
            self._metrics.close()
        self.said = (self.folder / "stderr").read_text()
        if self._own:
            shutil.rmtree(self.folder, ignore_errors=True)

    def create(self, name: str, limit: int = UNLIMITED) -> str:
        return phi3v("create", "--name", name, "--rate-limit", str(limit), folder=self.folder).stdout.strip()

    def connect(self, tls: bool = True, timeout: float = 10, receive_buffer: int | None = None) -> socket.socket:
        raw = socket.socket()
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(timeout)
        try:
            raw.connect(("127.0.0.1", self.port))
            return self.trust.wrap_socket(raw, server_hostname="localhost") if tls else raw
        except OSError:
            raw.close()
            raise

    def kept(self) -> socket.socket:
        """A connection that has asked once and stays."""
        connection = self.connect()
        assert healthy(connection)
        return connection

    def health(self) -> int:
        """The status of /health on a new connection, 0 if there was no answer."""
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(self.https(5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status
        return 0

    def ask(self, body: dict, key: str | None = None, timeout: float = 60) -> tuple[int, dict, bytes]:
        """Status, headers and body of one completion on a connection of its own."""
        with contextlib.closing(self.https(timeout)) as connection:
            connection.request("POST", "/v1/completions", json.dumps(body), self._headers(key))
            reply = connection.getresponse()
            return reply.status, dict(reply.headers), reply.read()

    def post(self, body: dict, key: str | None = None, request_id: str = "bench", **options) -> socket.socket:
        """Send a completion's request and leave its answer unread."""
        text = json.dumps(body).encode()
        headers = {"Host": "localhost", "Content-Length": len(text), "X-Request-Id": request_id} | self._headers(key)
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection = self.connect(**options)
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + text)
        return connection

    def _headers(self, key: str | None) -> dict[str, str]:
        return {"Content-Type": "application/json", "X-API-Key": key or self.key}

    def https(self, timeout: float = 10) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("localhost", self.port, context=self.trust, timeout=timeout)

    def sequences(self) -> int:
        """How many run or wait now; asked on a connection of its own, which stays."""
        self._metrics.request("GET", "/metrics", headers={"X-API-Key": self.key})
        text = self._metrics.getresponse().read().decode()
        return sum(int(float(n)) for n in re.findall(r"^phi3v_(?:running|waiting)_sequences (\S+)", text, re.M))

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("server.log*")))


def phi3v(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [PYTHON, "-m", "phi3v", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=START_SECONDS)


def healthy(connection: socket.socket) -> bool:
    """Whether a connection that was kept still answers."""
    try:
        connection.sendall(HEALTH)
        return connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its close sends RST
    connection.close()


def wait_until(condition, seconds: float, pause: float = 0.02) -> float:
    """How long it took until the condition held, `seconds` if it never did."""
    begun = time.perf_counter()
    while not condition():
        if time.perf_counter() - begun > seconds:
            return seconds
        time.sleep(pause)
    return time.perf_counter() - begun


class Probe:
    """A process that asks /health every few milliseconds on a connection it keeps, until the `with` is left."""

    def __init__(self, server: Service):
        command = [sys.executable, str(HERE / "probe.py"), str(server.port), str(server.certificate)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdout.readline()

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_) -> None:
        """Reads p50, p99 and max in ms, how many were asked, and how many failed."""
        found = json.loads(self._process.communicate(timeout=30)[0])
        self.p50, self.p99, self.max, self.count, self.failed = found
        self.note = f"{self.count:,} requests, p50 {self.p50:.2f}, slowest {self.max:.1f} ms, {self.failed} failed"
