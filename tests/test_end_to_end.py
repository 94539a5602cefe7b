"""From outside: `serve` as its own process in an empty folder, asked by curl, by the examples and by Python's ssl."""

import base64
import hashlib
import io
import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from phi3v.tls import ensure_certificate

ROOT = Path(__file__).parent.parent
CIRCLE = ROOT / "phi3v" / "demo" / "red-circle.png"
PYTHON, PICTURE, EXAMPLES = (shlex.quote(str(path)) for path in (sys.executable, CIRCLE, ROOT / "examples"))
DOCUMENT = """curl -X POST https://localhost:{port}/v1/completions \\
  -H "Content-Type: application/json" \\
  -H "X-API-Key: {key}" \\
  -k \\
  -d '{{
    "prompt": {prompt},
    "max_tokens": 50
  }}'"""


class Running:
    """A server as a newcomer starts it, and what it printed."""

    def __init__(self, folder: Path, *program: str):
        self.folder = folder
        command = [
            sys.executable,
            *(program or ("-m", "phi3v")),
            "serve",
            "--first-key",
            "--port",
            "0",
            "--model",
            "demo",
        ]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PHI3V_")} | {"PYTHONUNBUFFERED": "1"}
        self.stderr = open(folder / "stderr", "w+")
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.stderr, text=True
        )
        self.printed = ""
        while not self.printed.endswith("\n\n") or "curl" not in self.printed:
            line = self.process.stdout.readline()
            assert line, self.printed + (folder / "stderr").read_text()
            self.printed += line
        self.port = int(re.search(r"https://localhost:(\d+)", self.printed)[1])
        self.key = (re.findall(r"^phi3v_\w{36}$", self.printed, re.M) or [None])[0]
        self.curl = re.search(r"^curl .*$", self.printed, re.M)[0]

    def shell(self, command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        self.process.stdout.close()
        self.stderr.close()
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("serve"))
    yield running
    assert running.stop() == 0
    log = (running.folder / "server.log").read_text()
    assert "Traceback" not in log and running.key not in log
    assert "red circle" not in log and "Guten" not in log


def test_the_printed_curl_answers_a_red_circle(server):
    assert "-k" not in shlex.split(server.curl)
    assert json.loads(server.shell(server.curl))["responses"] == ["A red circle."]


@pytest.mark.parametrize(
    "prompt, starts",
    [('"Hello, world!"', ["Hello! I am"]), ('["Hello, world!", "Guten tag!"]', ["Hello! I am", "Guten Tag! I am"])],
)
def test_the_documents_curl_examples_work_unchanged(server, prompt, starts):
    reply = json.loads(server.shell(DOCUMENT.format(port=server.port, key=server.key, prompt=prompt)))
    assert reply["model"] == "phi-3-vision" and "T" in reply["timestamp"]
    assert [text[: len(start)] for text, start in zip(reply["responses"], starts, strict=True)] == starts


def test_the_examples_answer(server):
    environment = {"PHI3V_KEY": server.key, "PHI3V_URL": f"https://localhost:{server.port}"}
    question = "What is shown in this image?"
    assert server.shell(f'{PYTHON} {EXAMPLES}/ask.py "{question}" {PICTURE}', **environment) == "A red circle.\n"
    reply = server.shell(f'{EXAMPLES}/ask.sh "{question}" {PICTURE}', **environment)
    assert json.loads(reply)["responses"] == ["A red circle."]


def test_the_example_that_needs_a_package_says_which(tmp_path):
    (tmp_path / "openai.py").write_text("raise ImportError")  # as where it is not installed
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "chat.py", "Hi"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "chat.py needs the openai package: pip install openai\n")


def test_the_certificate_verifies_for_every_name_of_this_machine(server):
    context = ssl.create_default_context(cafile=server.folder / "server.crt")
    machine = socket.gethostname().split(".")[0].lower()
    for name in ("localhost", "127.0.0.1", "::1", machine, f"{machine}.local"):
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            with context.wrap_socket(raw, server_hostname=name) as tls:
                assert tls.version() == "TLSv1.3"
    with socket.create_connection(("127.0.0.1", server.port)) as raw, pytest.raises(ssl.SSLCertVerificationError):
        context.wrap_socket(raw, server_hostname="example.org")
    reply = server.shell(
        f"curl -s --cacert server.crt --resolve {machine}.local:{server.port}:127.0.0.1"
        f" https://{machine}.local:{server.port}/health"
    )
    assert json.loads(reply) == {"status": "ok"}


def test_keys_made_and_deleted_beside_a_running_server_are_in_force_at_once(server):
    phi3v = f"{PYTHON} -m phi3v"
    key = server.shell(f"{phi3v} create --name second --rate-limit 1").strip()
    assert status(server, key) == 200
    assert status(server, key) == 429
    server.shell(f"{phi3v} update --key {key} --rate-limit 2")
    assert status(server, key) == 200
    server.shell(f"{phi3v} delete --key {key}")
    assert status(server, key) == 403
    listed = json.loads(server.shell(f"{phi3v} list --json"))
    assert [k["name"] for k in listed["keys"]] == ["first"] and server.key not in json.dumps(listed)


HOOK = """
import os, sys
told = os.open({path!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def hook(event, arguments):
    if event.startswith(("open", "os.", "socket.", "subprocess.", "ctypes.dlopen", "urllib.", "shutil.", "pty.")):
        os.write(told, ascii((event, *map(str, arguments))).encode() + b"\\n")

sys.addaudithook(hook)
"""


def hostile(folder: Path, port: int) -> dict[str, str]:
    """Pictures that name a file, which is there and could be read, or an address, where somebody listens."""
    path = folder / "canary.png"
    path.write_bytes(CIRCLE.read_bytes())
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{path.as_uri()}"/><image href="http://127.0.0.1:{port}/canary"/></svg>'
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({path}) run (touch canary) system showpage\n"
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    names = [str(path), path.name, path.as_uri(), f"file:{path}", f"//{path}", f"http://127.0.0.1:{port}/canary"]
    names += [
        f"https://localhost:{port}/canary",
        f"ftp://127.0.0.1:{port}/canary",
        f"data:{path}",
        f"data:image/png,{path}",
    ]
    data = {
        name: base64.b64encode(text if isinstance(text, bytes) else text.encode()).decode()
        for name, text in {"SVG": svg, "EPS": eps, "HEIC": heic, "path": str(path), "URL": path.as_uri()}.items()
    }
    return {name: name for name in names} | data | {f"data: {k}": f"data:image/png;base64,{v}" for k, v in data.items()}


def test_no_picture_makes_the_server_open_a_file_or_a_connection(tmp_path, monkeypatch):
    """Told by an audit hook inside the server itself."""
    audit, folder = tmp_path / "audit", tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK.format(path=str(audit)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", str(ROOT))]))
    server = Running(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        assert ask(server, CIRCLE.read_bytes()) == (200, ["A red circle."])
        began = len(audit.read_text())
        assert "canary" not in audit.read_text()
        assert all(seen in audit.read_text() for seen in ("socket.bind", "tokenizer.json", "subprocess.Popen"))
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
            buffer = io.BytesIO()
            Image.open(CIRCLE).convert("RGB").save(buffer, kind)
            assert ask(server, buffer.getvalue())[0] == 200
        for name, picture in hostile(tmp_path, listener.getsockname()[1]).items():
            code, message = ask(server, picture)
            assert code == 400 and ("JPEG" in message or "HEIC" not in name) and str(tmp_path) not in message
        with pytest.raises(BlockingIOError):
            listener.accept()
    events = audit.read_text()[began:].splitlines()
    assert server.stop() == 0
    assert len(events) > 20 and not [event for event in events if "canary" in event]
    kinds = {event.split("'")[1] for event in events}
    assert kinds <= {"open", "os.listdir", "socket.__new__"}  # Pillow's own modules; each connection that came in
    named = {event.split("'")[3] for event in events if event.startswith("('open'")}
    assert all(name.endswith((".py", ".pyc", ".so", ".log")) for name in named)
    assert sorted(path.name for path in tmp_path.iterdir() if "canary" in path.name) == ["canary.png"]


def ask(server: Running, picture: str | bytes) -> tuple[int, list[str] | str]:
    """The status, and the answers or the error's message."""
    image = picture if isinstance(picture, str) else base64.b64encode(picture).decode()
    body = {"prompt": "What is shown in this image?", "images": [image], "max_tokens": 9}
    return post(server, server.key, json.dumps(body).encode())


def status(server: Running, key: str) -> int:
    code, answer = post(server, key, b'{"prompt": "What is 3 + 4?"}')
    assert code != 200 or answer == ["3 + 4 = 7."]
    return code


def post(server: Running, key: str, body: bytes) -> tuple[int, list[str] | str]:
    request = urllib.request.Request(
        f"https://localhost:{server.port}/v1/completions",
        data=body,
        headers={"Content-Type": "application/json", "X-API-Key": key},
    )
    context = ssl.create_default_context(cafile=server.folder / "server.crt")
    try:
        with urllib.request.urlopen(request, context=context) as reply:
            return reply.status, json.load(reply)["responses"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]["message"]


def test_a_second_start_shows_no_key_and_keeps_the_certificate(tmp_path):
    first = Running(tmp_path)
    certificate = (tmp_path / "server.crt").read_bytes()
    assert first.stop() == 0
    done = subprocess.run(
        [sys.executable, "-m", "phi3v", "list"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "first" in done.stdout and first.key not in done.stdout
    second = Running(tmp_path)
    assert second.stop() == 0
    assert second.key is None and "YOUR_API_KEY" in second.curl
    assert (tmp_path / "server.crt").read_bytes() == certificate


def test_generate_answers_without_a_server_and_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "phi3v", "generate", "What is shown in this image?", "--image", str(CIRCLE)]
    command += ["--model", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("A red circle.\n", "", 0)
    assert not list(tmp_path.iterdir())


def eventually(condition) -> bool:
    """Whether it becomes true within half a minute."""
    return any(condition() or time.sleep(0.05) for _ in range(600))


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def make_pairs(folder: Path) -> list[Path]:
    """Two folders with a pair of ours each."""
    folders = [folder / name for name in "ab"]
    for each in folders:
        each.mkdir()
        ensure_certificate(each / "server.crt", each / "server.key")
    return folders


def fingerprint_of(certfile: Path) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certfile.read_text())).hexdigest()


def fingerprint_on(port: int) -> str:
    """Of the certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("localhost", port)) as raw, context.wrap_socket(raw) as tls:
        return hashlib.sha256(tls.getpeercert(True)).hexdigest()


def test_a_changed_certificate_is_taken_without_a_restart_and_one_without_its_key_is_not(tmp_path):
    running, other = Running(tmp_path), tmp_path / "other"
    other.mkdir()
    pairs = [[(folder / name).read_bytes() for name in ("server.crt", "server.key")] for folder in make_pairs(other)]
    log, shown = tmp_path / "server.log", fingerprint_on(running.port)

    def put(name: str, content: bytes) -> None:
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").replace(tmp_path / name)

    put("server.crt", pairs[0][0])
    assert eventually(lambda: "the certificate in use stays" in log.read_text())
    assert fingerprint_on(running.port) == shown
    put("server.key", pairs[0][1])
    assert eventually(lambda: fingerprint_on(running.port) != shown)
    assert status(running, running.key) == 200  # and it verifies
    for name, content in zip(("server.crt", "server.key"), pairs[1], strict=True):
        put(name, content)
    running.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: fingerprint_on(running.port) == fingerprint_of(tmp_path / "server.crt"))
    assert status(running, running.key) == 200
    assert running.stop() == 0


@pytest.mark.parametrize("again", [False, True])
def test_a_first_signal_lets_what_runs_be_answered_and_a_second_ends_at_once(tmp_path, again):
    running, body = Running(tmp_path), b'{"prompt": "What is 3 + 4?"}'
    context = ssl.create_default_context(cafile=tmp_path / "server.crt")
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        with context.wrap_socket(raw, server_hostname="localhost") as tls:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {running.key}\r\n"
            head += "Content-Type: application/json\r\nContent-Length: 28\r\nExpect: 100-continue\r\n\r\n"
            tls.sendall(head.encode())
            assert tls.recv(100).startswith(b"HTTP/1.1 100 ")  # it is being answered now
            running.process.send_signal(signal.SIGTERM)
            assert eventually(lambda: refused(running.port))
            if again:
                running.process.send_signal(signal.SIGINT)
            else:
                tls.sendall(body)
                assert b"3 + 4 = 7." in tls.recv(2000)
            assert running.process.wait(10) == (-signal.SIGINT if again else 0)
    running.stop()


BREAKING = """
import sys
from phi3v.__main__ import main
from phi3v.engine import Engine
turn = Engine._turn
def breaks(engine):
    if engine._arrived or engine._waiting:
        raise SystemError("the engine's own fault")
    turn(engine)
Engine._turn = breaks
sys.exit(main())
"""


HANGING_UP = """
import os, signal, sys
from phi3v import model
from phi3v.__main__ import main
load = model.load
def loads(*arguments, **options):
    os.kill(os.getpid(), signal.SIGHUP)
    return load(*arguments, **options)
model.load = loads
sys.exit(main())
"""


def test_a_sighup_while_the_model_loads_does_not_end_the_server(tmp_path):
    running = Running(tmp_path, "-c", HANGING_UP)
    assert status(running, running.key) == 200
    assert running.stop() == 0


def test_a_server_whose_engine_has_died_says_so_and_exits_with_1(tmp_path):
    running = Running(tmp_path, "-c", BREAKING)
    assert status(running, running.key) in (500, 503)
    assert running.process.wait(30) == 1
    assert "phi3v: the engine has failed" in (tmp_path / "stderr").read_text()
    running.stop()
