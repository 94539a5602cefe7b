"""A hub id becomes a folder: whole, cut, refused, damaged and hostile downloads from a hub of our own on loopback."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, snapshot_download
from test_model import forbid

import phi3v
from phi3v import hub, model
from phi3v.errors import SetupError

DEMO = Path(phi3v.__file__).parent / "demo"
NAME, COMMIT = "owner/phi", "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Hub(ThreadingHTTPServer):
    """What huggingface.co answers for one repository, with the faults that a test asks for."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.sent = files, [], 0
        self.info: dict = {}  # what the API is to say otherwise
        self.status, self.headers = 200, {}  # of every answer
        self.body = None  # of the API, instead of JSON
        self.cuts: list[int] = []  # after so many bytes of a large file the connection ends, each once
        self.hushes = False  # with a cut it falls silent
        self.flips = ""  # the file of which a byte is wrong
        self.ranges = True
        self.file_status = 200  # of the weights
        self.silent = threading.Event()
        self.silent.set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *_) -> None:
        pass  # a client that was killed

    def siblings(self) -> list[dict]:
        found = []
        for name, data in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            found.append({"rfilename": name, "size": len(data), "blobId": git})
            if name.endswith(".safetensors"):
                large = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                found[-1]["lfs"] = large
        return found


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        self.server.silent.wait(30)
        path = self.path.partition("?")[0]
        if self.server.status != 200:
            return self.answer(self.server.status, b'{"error": "no"}')
        if path == f"/api/models/{NAME}/revision/main":
            config = {"model_type": "phi3_v"}
            info = {"id": NAME, "sha": COMMIT, "siblings": self.server.siblings(), "config": config} | self.server.info
            return self.answer(200, self.server.body or json.dumps(info).encode())
        file = path.rpartition("/")[2]
        if file == WEIGHTS and self.server.file_status != 200:
            return self.answer(self.server.file_status, b"no")
        if path == f"/{NAME}/resolve/{COMMIT}/{file}" and file.endswith(".safetensors"):
            return self.answer(302, b"", Location=f"http://localhost:{self.server.server_port}/cdn/{file}")
        if path in (f"/cdn/{file}", f"/{NAME}/resolve/{COMMIT}/{file}") and file in self.server.files:
            return self.send_file(file)
        self.answer(404, b"")

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | self.server.headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, file: str) -> None:
        data, start = bytearray(self.server.files[file]), 0
        if file == self.server.flips:
            data[-1] ^= 1
        if (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and self.server.ranges:
            start = int(asked[1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = len(data)
        if file == WEIGHTS and self.server.cuts:
            if self.server.hushes:
                self.server.silent.clear()
            end = start + self.server.cuts.pop(0)
        self.server.sent += len(data[start:end])
        self.wfile.write(data[start:end])
        self.close_connection = True


FILES = {
    "config.json": b'{"model_type": "phi3_v"}',
    "tokenizer.json": b"{}" * 999,
    "preprocessor_config.json": b"{}",
    WEIGHTS: bytes(range(256)) * 4000,
    "README.md": b"not needed",
    "modeling_phi3_v.py": b"raise SystemExit('code')",
    "pytorch_model.bin": b"a pickle",
    "training/optimizer.safetensors": b"not of the top folder",
}
NEEDED = ["config.json", WEIGHTS, "preprocessor_config.json", "tokenizer.json"]
SIZE = sum(len(FILES[file]) for file in NEEDED)


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A hub that has NAME, and an empty cache."""
    site = Hub(dict(FILES))
    site.cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(site.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    monkeypatch.setattr(hub, "PAUSES", ())
    yield site
    site.silent.set()
    site.shutdown()
    site.server_close()


def refusal() -> str:
    with pytest.raises(SetupError) as caught:
        hub.find(NAME)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(
        (NAME, "http://127", "cannot write", WEIGHTS, "config", "another")
    )
    return message


def parts(site: Hub) -> list[Path]:
    return list(site.cache.rglob("*.incomplete"))


def test_a_hub_id_is_fetched_once_without_code_and_then_used_without_the_hub(site, capsys):
    folder = hub.find(NAME)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {file: FILES[file] for file in NEEDED}
    assert site.sent == SIZE and not parts(site) and folder.name == COMMIT
    line = rf"phi3v: downloading {NAME}: 0\.00 GB, into {site.cache}, \d+ GB free; after Ctrl-C the same .*\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    asked = len(site.asked)
    assert hub.find(NAME) == folder and len(site.asked) == asked and capsys.readouterr().err == ""


def test_the_cache_is_laid_out_as_huggingface_hub_does_it(site):
    folder = hub.find(NAME)
    assert snapshot_download(NAME, cache_dir=site.cache, local_files_only=True) == str(folder)
    (folder / WEIGHTS).unlink()  # as a download of huggingface_hub's own that was cut leaves it
    sent = site.sent
    assert hub.find(NAME) == folder and (folder / WEIGHTS).read_bytes() == FILES[WEIGHTS] and site.sent == sent


def test_what_a_user_throws_away_because_it_is_damaged_comes_again(site):
    weights = hub.find(NAME) / WEIGHTS
    weights.write_bytes(b"damaged")  # through the link
    weights.unlink()
    assert (hub.find(NAME) / WEIGHTS).read_bytes() == FILES[WEIGHTS]


def test_a_cut_download_goes_on_where_it_was_cut_by_itself(site, monkeypatch):
    monkeypatch.setattr(hub, "PAUSES", (0,))
    site.cuts = [1000, 300_000, 5]
    assert (hub.find(NAME) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    asked = [bytes_ for path, bytes_, _ in site.asked if path.startswith("/cdn/")]
    assert asked == ["bytes=0-", "bytes=1000-", "bytes=301000-", "bytes=301005-"] and site.sent == SIZE


def test_a_cut_download_goes_on_when_it_is_started_again(site, capsys):
    site.cuts = [700_000]
    message = refusal()
    assert "does not answer (RemoteProtocolError): what has come is kept" in message and "--model demo" in message
    assert [part.stat().st_size for part in parts(site)] == [700_000]
    capsys.readouterr()
    assert (hub.find(NAME) / WEIGHTS).read_bytes() == FILES[WEIGHTS] and site.sent == SIZE
    assert "0.00 GB of it are here" in capsys.readouterr().err


def test_a_hub_that_sends_all_of_it_again_is_listened_to_from_the_start(site):
    site.cuts, site.ranges = [700_000], False
    refusal()
    assert (hub.find(NAME) / WEIGHTS).read_bytes() == FILES[WEIGHTS] and site.sent == SIZE + 700_000


@pytest.mark.parametrize("file", [WEIGHTS, "config.json"])
def test_a_file_with_another_checksum_is_told_and_removed(site, file):
    site.flips = file
    assert refusal().startswith(f"{file} of {NAME} did not arrive with the hub's checksum: it was removed; start again")
    assert not parts(site)
    site.flips = ""
    assert (hub.find(NAME) / file).read_bytes() == FILES[file]


def test_what_does_not_fit_on_the_disk_is_told_before_anything_comes(site, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=hub.SPARE + SIZE - 1))
    assert re.match(rf"{NAME} has 0\.00 GB to download and 0\.10 GB are free in {site.cache}: make room,", refusal())
    assert site.sent == 0 and not site.cache.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=hub.SPARE + SIZE))
    hub.find(NAME)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a disk that is full whenever one writes is Linux's")
def test_a_disk_that_fills_up_meanwhile_is_told(site):
    blobs = site.cache / "models--owner--phi" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}.phi3v.incomplete").symlink_to("/dev/full")
    message = refusal()
    assert message.startswith(f"cannot write {NAME} into {site.cache}: No space left on device; make room and start")


def test_a_cache_that_may_not_be_written_is_told(site, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", forbid)
    assert f"cannot write {NAME} into {site.cache}: Permission denied; let HF_HOME" in refusal()


def test_a_cache_that_is_no_folder_is_told(site):
    site.cache.write_text("a file")
    assert f"cannot write {NAME} into {site.cache}: Not a directory; let HF_HOME" in refusal()


def test_offline_it_is_told_what_to_do_unless_the_model_is_here(site, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = f"{NAME} is not whole on this machine, and HF_HUB_OFFLINE is set: unset it, or try --model demo"
    assert refusal().startswith(message) and site.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = hub.find(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.find(NAME) == folder
    (folder / WEIGHTS).unlink()
    assert refusal().startswith(message)


REFUSALS = {
    "unknown": ({"status": 404}, rf"there is no {NAME} at http.* check the name, and HF_TOKEN if it is private"),
    "unknown to strangers": ({"status": 401}, rf"there is no {NAME} at http.* or your token has ended"),
    "gated": (
        {"status": 401, "headers": {"X-Error-Code": "GatedRepo"}},
        r"granted access: ask at .*, then set HF_TOKEN",
    ),
    "forbidden": ({"status": 403}, rf"granted access: ask at http://127.0.0.1:\d+/{NAME}, then set HF_TOKEN"),
    "in trouble": ({"status": 500}, r"has trouble with owner/phi \(status 500\): try again later, .*--model demo"),
    "busy": ({"status": 429}, r"has trouble with owner/phi \(status 429\): try again later"),
    "another model": (
        {"info": {"config": {"model_type": "llama"}}},
        r"has model_type 'llama'; phi3v runs 'phi3_v' only",
    ),
    "no hub": (
        {"body": b"<html>Log in to the hotel's network"},
        r"does not answer as the hub does \(JSONDecodeError\)",
    ),
    "nothing but brackets": ({"body": b"[" * 200_000}, r"does not answer as the hub does \(RecursionError\)"),
    "a list": ({"body": b"[]"}, r"does not answer as the hub does .* is HF_ENDPOINT right\?"),
    "no sizes": ({"info": {"siblings": [{"rfilename": file} for file in NEEDED]}}, r"does not answer as the hub does"),
    "a path for a commit": ({"info": {"sha": "../../../../tmp"}}, r"does not answer as the hub does"),
}


@pytest.mark.parametrize("fault, message", REFUSALS.values(), ids=REFUSALS)
def test_a_hub_that_refuses_is_told_in_one_line_that_says_what_to_do(site, fault, message):
    vars(site).update(fault)
    with pytest.raises(SetupError) as caught:
        hub.find(NAME)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)
    assert site.sent == 0 and not site.cache.exists()


@pytest.mark.parametrize(
    "lacking, message",
    [
        ([WEIGHTS], "has no .safetensors file on the hub, only pytorch_model.bin: phi3v reads no other format"),
        (["config.json"], "has no config.json on the hub: it is no checkpoint that phi3v can run"),
        (["tokenizer.json"], "has no tokenizer.json on the hub"),
    ],
)
def test_a_repository_without_what_is_needed_is_told_before_anything_comes(site, lacking, message):
    for file in lacking:
        del site.files[file]
    assert message in refusal() and site.sent == 0


def test_a_hub_that_goes_silent_or_away_is_told(site, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    site.silent.clear()
    assert f"{site.url} does not answer (ReadTimeout): what has come is kept" in refusal()
    site.silent.set()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "is not here, and http://127.0.0.1:9 does not answer (ConnectError)" in refusal()


def test_a_file_that_ends_early_and_brings_nothing_more_ends_the_download(site, monkeypatch):
    monkeypatch.setattr(hub, "PAUSES", (0, 0))
    site.cuts = [10, 0, 0]
    refusal()
    assert site.cuts == [] and [part.stat().st_size for part in parts(site)] == [10]


@pytest.mark.parametrize("status, message", [(404, "there is no"), (403, "granted access"), (503, "(status 503)")])
def test_a_file_that_is_refused_is_told_and_what_came_before_it_is_kept(site, status, message):
    site.file_status = status
    with pytest.raises(SetupError, match=re.escape(message)):
        hub.find(NAME)
    site.file_status, sent = 200, site.sent
    assert sent == SIZE - len(FILES[WEIGHTS]) and hub.find(NAME) and site.sent == SIZE


def test_the_token_does_not_go_through_a_network_in_clear(site, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub, "LOOPBACK", ())
    hub.find(NAME)
    assert {token for _, _, token in site.asked} == {None}
    shutil.rmtree(site.cache)
    for site.status in (401, 403, 404):
        assert f"does not show {NAME} to strangers, and over plain http HF_TOKEN is not sent: use https" in refusal()


def test_the_token_goes_to_the_hub_and_not_to_where_it_sends_us(site, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.find(NAME)
    tokens = {path.startswith("/cdn/"): token for path, _, token in site.asked}
    assert tokens == {False: "Bearer hf_secret", True: None}


def test_two_processes_do_not_write_one_file(site):
    blobs = site.cache / "models--owner--phi" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(FILES[WEIGHTS]).hexdigest()}.phi3v.incomplete"
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is downloading model.safetensors of owner/phi: wait for it" in refusal()
    assert hub.find(NAME).exists()


def test_names_and_hashes_cannot_leave_the_cache(site):
    site.files |= {"../../../evil.safetensors": b"x", "/tmp/evil.safetensors": b"x"}
    assert sorted(file.name for file in hub.find(NAME).iterdir()) == sorted(NEEDED)
    shutil.rmtree(site.cache)
    named = site.siblings()
    for evil in ("../../../evil", "../" + "0" * 64):
        named[3]["lfs"]["sha256"] = evil
        site.info = {"siblings": named}
        assert "does not answer as the hub does" in refusal() and not site.cache.exists()


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PHI3V_", "HF_"))}
    command = [sys.executable, "-m", "phi3v", "generate", "What is 3 + 4?", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=kept | environment, **pipes)


def test_ctrl_c_in_a_download_is_clean_and_the_same_command_goes_on(tmp_path):
    """As a user does it, with the variables of the environment; the embedded model plays the real one."""
    site = Hub({file.name: file.read_bytes() for file in DEMO.iterdir()})
    size = len(site.files[WEIGHTS])
    site.cuts, site.hushes, home = [size // 2], True, str(tmp_path / "home")
    site.files["notes.safetensors.txt"] = b"not needed"
    variables = {"HF_ENDPOINT": site.url, "HF_HOME": home, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    first = run(tmp_path, "--model", NAME, **variables)
    while site.cuts or not (found := list(Path(home).rglob("*.incomplete"))) or not found[0].stat().st_size:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)  # until half of it has been sent; to what it asks then there is no answer
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=30)
    assert (first.returncode, out, len(err.splitlines())) == (130, "", 1) and "Traceback" not in err
    site.silent.set()
    second = run(tmp_path, "--model", NAME, **variables)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, "3 + 4 = 7.\n") and " GB of it are here" in err
    assert [r for path, r, _ in site.asked if path == f"/cdn/{WEIGHTS}"][-1] != "bytes=0-"
    site.shutdown()
    site.server_close()
    third = run(tmp_path, "--model", NAME, **variables)
    assert third.communicate(timeout=60) == ("3 + 4 = 7.\n", "")


def test_the_default_model_offline_and_absent_is_one_line_that_names_the_demo(tmp_path):
    done = run(tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    out, err = done.communicate(timeout=60)
    expected = r"phi3v: mlx-community/Phi-3\.5-vision-instruct-4bit is not whole .*HF_HUB_OFFLINE.*--model demo.*\n"
    assert (done.returncode, out) == (1, "") and re.fullmatch(expected, err)
    assert list(tmp_path.iterdir()) == []


def test_what_is_a_path_has_no_business_with_the_hub(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "owner" / "phi")
    script = "import sys, phi3v; phi3v.load('owner/phi').close(); sys.exit('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"HF_ENDPOINT": "http://["})
    assert done.returncode == 0 and folder.exists()


def test_a_refusal_is_not_read_to_its_end(site, monkeypatch):
    sent = []

    def send_file(handler, file):
        handler.send_response(403)
        handler.end_headers()
        with suppress(OSError):
            for _ in range(100):
                handler.wfile.write(bytes(1_000_000))
                sent.append(1)

    monkeypatch.setattr(Handler, "send_file", send_file)
    assert "granted access" in refusal() and len(sent) < 50  # what fits between the two sides, some 6 of them


class Terminal:
    def __init__(self, is_one: bool):
        self.text, self.isatty = "", lambda: is_one

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_is_shown_on_a_terminal_only_and_leaves_nothing_behind(monkeypatch, clock):
    monkeypatch.setattr(model.time, "monotonic", clock)
    shown = {}
    for is_one in (True, False):
        terminal = Terminal(is_one)
        monkeypatch.setattr(sys, "stderr", terminal)
        with model.progress("downloading it", 4_000_000_000, 1_000_000_000) as advance:
            advance(0)
            clock.now += 10
            advance(1_000_000_000)
            clock.now += 0.1
            advance(10)
        shown[is_one] = terminal.text
    line = "\rdownloading it: 2.00 of 4.00 GB, 100 MB/s, 20 s left\x1b[K"
    assert shown == {True: f"{line}\r\x1b[K", False: ""}
