"""A real server for the clients that people have, as a newcomer starts it, and the clients themselves."""

import base64
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
# The environments that `make test-clients` makes stand side by side, the server's own among them.
SERVER_PYTHON = sys.prefix.removesuffix("-clients") + "/bin/python"
OPENAI2_PYTHON = sys.prefix + "-openai2/bin/python"
TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("PHI3V_", "OPENAI_")) and k not in TRUST}
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 80, 220), "orange": (245, 140, 30)}
COLORS |= {"purple": (140, 50, 170), "black": (20, 20, 20)}


class Server:
    """`phi3v serve` in a folder; several may share one, with its certificate and its keys."""

    def __init__(self, folder: Path, name: str, *options: str):
        self.folder, self.certificate, self.log = folder, folder / "server.crt", folder / f"{name}.log"
        command = [SERVER_PYTHON, "-u", "-m", "phi3v", "serve", "--first-key", "--port", "0", "--model", "demo"]
        command += ["--log-file", self.log.name, *options]
        self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        first = self.process.stdout.readline()  # "phi3v … answers at https://localhost:…", once it does
        self.url = re.search(r"https://localhost:\d+", first)[0] + "/v1"

    def phi3v(self, *arguments: str) -> str:
        command = [SERVER_PYTHON, "-m", "phi3v", *arguments]
        return subprocess.check_output(command, cwd=self.folder, env=ENVIRONMENT, text=True).strip()

    def key(self, name: str = "client", rate_limit: int = 1_000_000) -> str:
        return self.phi3v("create", "--name", name, "--rate-limit", str(rate_limit))

    def statuses(self, name: str) -> list[int]:
        """Of the requests with the key of that name, as the log has them."""
        key = next(key for key in json.loads(self.phi3v("list", "--json"))["keys"] if key["name"] == name)
        return [int(status) for status in re.findall(f" key={key['id']} .* status=([0-9]+)", self.log.read_text())]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.close()
        assert self.process.wait(30) == 0
        assert "Traceback" not in self.log.read_text()


class Client:
    """One of clients.py or clients.mjs in a process of its own, which trusts `certificate`, if it is given one."""

    def __init__(self, *command: str, certificate: Path | None = None):
        environment = ENVIRONMENT | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # or it fetches its price list first
        if certificate:
            environment |= {"SSL_CERT_FILE": str(certificate), "NODE_EXTRA_CA_CERTS": str(certificate)}
        self.process = subprocess.Popen(
            command, cwd=HERE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, url: str, key: str, question: str, picture: bytes, **job) -> dict:
        """What came back: `text`, or `error` (its class), `status` and `message`."""
        self.begin(url, key, question, picture, **job)
        return self.end()

    def begin(self, url: str, key: str, question: str, picture: bytes, **job) -> None:
        job = {"stream": False, "retries": 0, "cafile": None} | job
        job |= {"url": url, "key": key, "question": question, "picture": data_url(picture)}
        print(json.dumps(job), file=self.process.stdin, flush=True)

    def end(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(30) == 0


def drawing(color: str, shape: str) -> bytes:
    """A shape in the middle of a white picture, as a PNG; drawn here, so the model has never seen it."""
    image = Image.new("RGB", (336, 336), "white")
    draw, middle, size = ImageDraw.Draw(image), 168, 110
    if shape == "circle":
        draw.circle((middle, middle), size, COLORS[color])
    else:
        sides, turn = {"square": (4, 0), "triangle": (3, 0), "diamond": (4, 45)}[shape]
        draw.regular_polygon((middle, middle, size), sides, turn, COLORS[color])
    return png(image)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="session")
def server(folder):
    running = Server(folder, "server", "--max-chat-content-length", "2MB")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def key(server):
    return server.key()


@pytest.fixture(scope="session")
def context(server):
    return ssl.create_default_context(cafile=server.certificate)


@pytest.fixture(scope="session")
def narrow(server):
    """Another server, beside the first, that takes 32 answers of a key at a time, and lets them be long."""
    running = Server(server.folder, "narrow", "--max-queue", "64", "--max-tokens", "3500")
    yield running
    running.stop()


@pytest.fixture
def busy(narrow, key, context):
    """The URL of a server where all places of the key are taken: by answers that take it long."""
    body = {"prompt": ["?" * 500] * 32, "max_tokens": 3500, "stream": True}
    with httpx.Client(verify=context, headers={"Authorization": f"Bearer {key}"}) as client:
        for _ in range(1000):  # the last such answer ends when the server sees that nobody reads it
            with client.stream("POST", f"{narrow.url}/completions", json=body) as reply:
                if reply.status_code == 200:
                    yield narrow.url
                    return
