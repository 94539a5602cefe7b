"""Two real replicas on one keys.db, and a real nginx before them with deploy/nginx.conf, on other ports and paths."""

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from email.message import Message
from pathlib import Path

import pytest

from phi3v import tls

SHIPPED = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text()
NAME = "phi3v.example"  # the server_name in it
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PHI3V_")} | {"PYTHONUNBUFFERED": "1"}
TEMPORARY = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"  # nginx makes a folder for each, used or not
AROUND = """pid {folder}/nginx.pid; worker_processes 2; daemon off; {user}
error_log {folder}/error.log info;
events {{}}
http {{ {temporary} include {folder}/phi3v.conf; }}
"""


class Replica:
    """`phi3v serve` on a port that it keeps when it is started again. Its keys may have 32 sequences on it at once."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.address, self.log = f"127.0.0.1:{self.port}", folder / f"server-{self.port}.log"
        self.trust = ssl.create_default_context(cafile=folder / "server.crt")
        self.start()

    def start(self) -> None:
        options = ["--port", str(self.port), "--log-file", self.log.name, "--allowed-host", NAME]
        options += ["--max-queue", "64", "--max-tokens", "3500"]
        command = [sys.executable, "-m", "phi3v", "serve", "--model", "demo", *options]
        self.process = subprocess.Popen(command, cwd=self.folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert "answers at" in self.process.stdout.readline()  # it does from now on

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def logged(self, request: str) -> str | None:
        """The line of a request that has ended."""
        return next((line for line in self.log.read_text().splitlines() if f"request={request} " in line), None)


class Nginx:
    """The shipped file before these replicas; every `change` is a text of it and what stands there instead."""

    def __init__(self, folder: Path, certificates: Path, replicas: list[int], *changes: tuple[str, str]):
        self.folder, self.port = folder, free_port()
        lines = re.findall(r"    server 127\.0\.0\.1:800[12].*\n", SHIPPED)  # of the two replicas, in both groups
        assert len(lines) == 4
        text = SHIPPED
        for pair in {"".join(lines[:2]), "".join(lines[2:])}:
            text = text.replace(pair, "".join(pair.splitlines(True)[1].replace("8002", str(port)) for port in replicas))
        places = {f"127.0.0.1:{8001 + i}/": f"127.0.0.1:{port}/" for i, port in enumerate(replicas[:2])}
        places |= {" 443 ": f" 127.0.0.1:{self.port} ", "    listen [::]:443 ssl http2;\n": ""}
        places |= {"/etc/nginx/phi3v/": f"{certificates}/", "/var/log/nginx/phi3v.log": f"{folder}/access.log"}
        for old, new in (*reversed(places.items()), *changes):
            assert old in text
            text = text.replace(old, new)
        (folder / "phi3v.conf").write_text(text)
        temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in TEMPORARY)
        user = "" if os.getuid() else "user root root;"  # to reach the folder
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder, user=user, temporary=temporary))
        command = [NGINX, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
        self.process = subprocess.Popen(command)
        self.trust = ssl.create_default_context(cafile=certificates / "public.crt")
        wait_until(self._listens)

    def _listens(self) -> bool:
        assert self.process.poll() is None, (self.folder / "error.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0

    def has_logged(self, request: str) -> str | None:
        """The line of a request that has ended."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return next((line for line in lines if f" request={request} " in line), None)

    def logged(self, request: str) -> dict[str, str]:
        """What the line says; `replica` and `answered` are lists with ", "."""
        wait_until(lambda: self.has_logged(request))
        return dict(re.findall(r"(\w+)=((?:[^ ,]+, )*[^ ,]+)", self.has_logged(request)))


class Stream:
    """An answer of which the first event has come, and no more was read."""

    def __init__(self, site: Replica | Nginx, body: dict, key: str, request: str = "stream"):
        self.request, self.site = request, site
        self.connection = send(site, "/v1/completions", body | {"stream": True}, key, X_Request_Id=request)
        self.reply = self.connection.getresponse()
        assert self.reply.status == 200
        self.first = self.event()

    def event(self) -> bytes:
        """The next event; b"" at the end."""
        return next((line for line in iter(self.reply.readline, b"") if line.startswith(b"data: ")), b"")

    def rest(self) -> bytes:
        """What comes until the end, whole or not."""
        try:
            return self.reply.read()
        except http.client.IncompleteRead as broken:
            return broken.partial

    def close(self) -> None:
        self.reply.close()
        self.connection.close()


def send(site: Replica | Nginx, path: str, body=None, key: str | None = None, **fields) -> http.client.HTTPSConnection:
    """Ask on a new connection, and read nothing yet; `fields` are the head's, with _ for -."""
    connection = http.client.HTTPSConnection("localhost", site.port, context=site.trust, timeout=120)
    head = {"Host": NAME, "Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
    head |= {name.replace("_", "-"): value for name, value in fields.items()}
    payload = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, payload, head)
    return connection


def ask(site: Replica | Nginx, path: str, body=None, key: str | None = None, **fields) -> tuple[int, Message, str]:
    """Status, head and body of an answer."""
    with closing(send(site, path, body, key, **fields)) as connection:
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read().decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(2400):  # two minutes, for a machine that is busy with other things
        if condition():
            return
        time.sleep(0.05)
    raise TimeoutError(condition)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What replicas share, and what nginx shows and trusts."""
    folder = tmp_path_factory.mktemp("shared")
    tls.ensure_certificate(folder / "server.crt", folder / "server.key")
    tls.ensure_certificate(folder / "public.crt", folder / "public.key", NAME)
    shutil.copy(folder / "server.crt", folder / "replicas.crt")
    return folder


@pytest.fixture(scope="session")
def replicas(folder):
    running = [Replica(folder), Replica(folder)]
    yield running
    for replica in running:
        replica.process.terminate()
        assert replica.process.wait(120) == 0
        replica.process.stdout.close()
        assert "Traceback" not in replica.log.read_text()


@pytest.fixture
def start(folder, tmp_path_factory):
    """A function that starts an nginx before replicas on these ports."""
    started = []

    def start(ports: list[int], *changes: tuple[str, str], certificates: Path = folder) -> Nginx:
        started.append(Nginx(tmp_path_factory.mktemp("nginx"), certificates, ports, *changes))
        return started[-1]

    yield start
    for nginx in started:
        nginx.stop()


@pytest.fixture
def nginx(start, replicas):
    return start([replica.port for replica in replicas])


@pytest.fixture
def new_key(folder):
    """A function that makes a key."""

    def new_key(rate_limit: int = 1_000_000) -> str:
        command = [sys.executable, "-m", "phi3v", "create", "--name", "test", "--rate-limit", str(rate_limit)]
        return subprocess.check_output(
            command, cwd=folder, env=ENVIRONMENT, text=True, stderr=subprocess.DEVNULL
        ).strip()

    return new_key


@pytest.fixture
def key(new_key):
    return new_key()
