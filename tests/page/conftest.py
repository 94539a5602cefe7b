"""A browser that verifies certificates, and real servers for it: one with the demo, one whose answers find no end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from phi3v import tls

ROOT = Path(__file__).parents[2]
# The environments that `make test-page` makes stand side by side, the server's own among them.
SERVER_PYTHON = sys.prefix.removesuffix("-page") + "/bin/python"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PHI3V_")}
ALLOWED, FOREIGN = "chat.example", "foreign.example"  # a name of the certificate, and one that is not in it


class Server:
    """`phi3v serve` in a folder of its own, with the pair that the browser trusts."""

    def __init__(self, folder: Path, pair: tuple[Path, Path], *options: str):
        self.folder, self.log = folder, folder / "server.log"
        certificate = ["--certfile", str(pair[0]), "--keyfile", str(pair[1]), "--allowed-host", ALLOWED]
        command = [
            SERVER_PYTHON,
            "-u",
            "-m",
            "phi3v",
            "serve",
            "--port",
            "0",
            *certificate,
            *(options or ("--model", "demo")),
        ]
        self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r"https://localhost:(\d+)", self.process.stdout.readline())[1])  # once it answers
        self.url = f"https://localhost:{self.port}"
        self.key = self.phi3v("create", "--name", "page", "--rate-limit", "1000")

    def phi3v(self, *arguments: str) -> str:
        command = [SERVER_PYTHON, "-m", "phi3v", *arguments]
        return subprocess.check_output(command, cwd=self.folder, env=ENVIRONMENT, text=True).strip()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.close()
        assert self.process.wait(60) == 0
        assert "Traceback" not in self.log.read_text()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    tls.ensure_certificate(folder / "server.crt", folder / "server.key", ALLOWED)
    return folder / "server.crt", folder / "server.key"


@pytest.fixture(scope="session")
def demo(tmp_path_factory, pair):
    server = Server(tmp_path_factory.mktemp("demo"), pair)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def endless(tmp_path_factory, pair):
    """Random weights that cannot say any of the tokens that end an answer: it ends with the context, 25,600 tokens."""
    model = shutil.copytree(ROOT / "tests" / "parity" / "tiny-gqa", tmp_path_factory.mktemp("model") / "endless")
    weights = bytearray((model / "model.safetensors").read_bytes())
    first = 8 + int.from_bytes(weights[:8], "little")
    head = json.loads(weights[8:first])["lm_head.weight"]
    (begin, end), rows = head["data_offsets"], head["shape"][0]
    row = (end - begin) // rows
    for token in (2, 448, 455):  # </s>, <|endoftext|>, <|end|>
        place = first + begin + token * row
        weights[place : place + row] = bytes(row)
    (model / "model.safetensors").write_bytes(weights)
    server = Server(tmp_path_factory.mktemp("endless"), pair, "--model", str(model), "--max-tokens", "100000")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser(tmp_path_factory, pair):
    """Debian's Chromium; in a home of its own it trusts that one certificate, and verifies it like any other."""
    home = tmp_path_factory.mktemp("home")
    line = tls.TRUST["Linux, Chromium and Chrome"].format(pair[0])  # the one that `serve` prints
    subprocess.run(line, shell=True, env=ENVIRONMENT | {"HOME": str(home)}, check=True)
    names = ", ".join(f"MAP {name} 127.0.0.1" for name in (tls.public_name("0.0.0.0"), ALLOWED, FOREIGN))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            env=ENVIRONMENT | {"HOME": str(home)},
            args=[f"--host-resolver-rules={names}"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a page in a window of its own; `page.sent` has all requests that pages made."""
    contexts = []

    def open_page(url: str, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1000, "height": 800}} | options))
        page = contexts[-1].new_page()
        page.sent, page.broken = [], []
        page.on("request", lambda request: page.sent.append(request))
        page.on("pageerror", lambda error: page.broken.append(error))
        page.on("console", lambda line: page.broken.append(line.text) if "Content Security" in line.text else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        assert [page.broken for page in context.pages] == [[]] * len(context.pages)
        context.close()
