"""What a person meets at a terminal: `generate`, `--each`, the chat page's private server, what is printed where."""

import io
import json
import os
import pty
import re
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from phi3v import errors, terminal, tls
from phi3v.__main__ import main
from phi3v.keys import KeyStore
from phi3v.request import Delta, SamplingParams

ROOT = Path(__file__).parent.parent
CIRCLE = ROOT / "phi3v" / "demo" / "red-circle.png"
QUESTION = "What is shown in this image?"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a copy of the red circle."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("PHI3V_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PHI3V_MODEL", "demo")
    shutil.copy(CIRCLE, "circle.png")
    return tmp_path


@pytest.fixture
def stdin(monkeypatch):
    """Give these bytes to standard input."""
    return lambda given: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def squares(count: int) -> list[str]:
    """The names of so many pictures, no two the same."""
    names = [f"{i:02}.png" for i in range(count)]
    for i, name in enumerate(names):
        Image.new("RGB", (40 + i, 40), "green").save(name)
    return names


class Output(io.TextIOWrapper):
    """Knows what had been written whenever it was flushed."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self.seen = []

    def flush(self):
        super().flush()
        self.seen.append(self.buffer.getvalue().decode())


def test_an_answer_is_printed_as_it_is_made(monkeypatch):
    with Output() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["generate", "Hello, world!"]) == 0
        *grown, whole = sorted({text for text in output.seen if text}, key=len)
    assert whole.startswith("Hello! I am the small demo model of phi3v.") and whole.endswith(".\n")
    assert len(grown) >= 5 and all(whole.startswith(text) for text in grown)


def test_json_is_one_object_with_the_answer_and_what_it_took(run):
    status, out, err = run("generate", QUESTION, "--image", "circle.png", "--json")
    answer = json.loads(out)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert list(answer) == ["text", "finish_reason", "usage", "model", "seconds"]
    assert (answer["text"], answer["finish_reason"]) == ("A red circle.", "stop")
    assert answer["model"].startswith("demo-") and 0 < answer["seconds"] < 60
    usage = answer["usage"]
    assert usage["prompt_tokens"] > 144 and usage["total_tokens"] == sum(usage.values()) / 2
    short = json.loads(run("generate", "Hello, world!", "--json", "--max-tokens", "2")[1])
    assert short["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 2


def test_the_prompt_or_one_picture_comes_from_standard_input(run, stdin):
    stdin(b"What is 3 + 4?\n")
    assert run("generate", "-") == (0, "3 + 4 = 7.\n", "")
    stdin(CIRCLE.read_bytes())
    assert run("generate", QUESTION, "--image", "-") == (0, "A red circle.\n", "")
    stdin(b"no picture")
    status, out, err = run("generate", QUESTION, "--image", "-")
    assert (status, out) == (1, "") and err.startswith("phi3v: standard input: the picture is none of PNG, ")
    stdin(b" \n")
    assert run("generate", "-") == (1, "", "phi3v: the prompt is empty\n")


def test_a_folder_for_a_file_is_named_as_it_was_given(run):
    assert run("generate", QUESTION, "--image", ".") == (1, "", "phi3v: .: Is a directory\n")
    assert run("generate", QUESTION, "--each", "circle.png", "--out", ".") == (1, "", "phi3v: .: Is a directory\n")


def test_each_picture_gets_the_answer_it_gets_alone_and_one_that_fails_ends_nothing(run):
    Path("text.png").write_text("no picture")
    odd = "é\udcff.png" if sys.platform == "linux" else "é.png"  # no UTF-8, where a name need not be
    Path(odd).write_bytes(CIRCLE.read_bytes())
    names = ["text.png", "none.png", *squares(5), odd, ".", "circle.png", "circle.png"]
    status, out, err = run("generate", QUESTION, "--each", *names)
    assert (status, err) == (1, "phi3v: 3 of 10 pictures were not answered; their lines say why\n")
    lines = {line.pop("file"): line for line in map(json.loads, out.splitlines())}
    assert lines.keys() == set(names) and len(out.splitlines()) == 10
    same = {"prompt": QUESTION, "model": lines["."]["model"]}
    assert lines["none.png"] == {"error": "No such file or directory"} | same
    assert lines["."] == {"error": "Is a directory"} | same
    assert lines["text.png"]["error"].startswith("the picture is none of PNG, ")
    red = {"text": "A red circle.", "finish_reason": "stop"} | same
    assert lines["circle.png"] == lines[odd] == red
    assert lines["00.png"]["text"] + "\n" == run("generate", QUESTION, "--image", "00.png")[1]


def test_a_run_that_was_broken_goes_on_where_it_ended(run, monkeypatch):
    names, each = squares(4), ["generate", QUESTION, "--num-crops", "1", "--out", "out.jsonl", "--each"]
    Path("late.png").write_text("not yet")
    status, out, err = run(*each, "late.png", *names[:2])
    assert (status, out) == (1, "") and "1 of 3 pictures were not answered" in err
    before = Path("out.jsonl").read_text()
    shutil.copy(CIRCLE, "late.png")
    with open("out.jsonl", "a") as file:
        file.write('{"file": "02.png", "text": "A gre')  # where a kill -9 cut it off
    asked, ask = [], terminal._ask
    monkeypatch.setattr(
        terminal,
        "_ask",
        lambda llm, prompt, pictures, *r: asked.append(pictures[0].param) or ask(llm, prompt, pictures, *r),
    )
    assert run(*each, "late.png", *names) == (0, "", "")
    assert sorted(asked) == ["02.png", "03.png", "late.png"] and Path("out.jsonl").read_text().startswith(before)
    assert sorted(line["file"] for line in read("out.jsonl") if "text" in line) == [*names, "late.png"]
    assert run(*each, "late.png", *names) == (0, "", "") and len(asked) == 3 and len(read("out.jsonl")) == 6


def test_what_fails_again_is_told_once(run):
    Path("text.png").write_text("no picture")
    odd = "none\udcff.png" if sys.platform == "linux" else "none.png"
    each = ["generate", QUESTION, "--num-crops", "1", "--out", "out.jsonl", "--each", "text.png", odd]
    for _ in range(2):
        assert run(*each)[::2] == (1, "phi3v: 2 of 2 pictures were not answered; their lines say why\n")
        assert len(read("out.jsonl")) == 2
    Path(odd).mkdir()  # which is another error
    assert run(*each)[0] == 1
    *before, last = read("out.jsonl")
    assert len(before) == 2 and (last["file"], last["error"]) == (odd, "Is a directory")


def test_lines_of_another_prompt_or_of_another_program_stay_as_they_are(run):
    each = ["--out", "out.jsonl", "--each", "circle.png"]
    assert run("generate", QUESTION, *each)[0] == 0
    (line,) = read("out.jsonl")
    status, out, err = run("generate", "What colour is it?", *each)
    assert (status, out) == (1, "")
    assert err == f"phi3v: out.jsonl was made with the prompt {QUESTION!r}: ask the same, or name another --out\n"
    Path("out.jsonl").write_text(json.dumps(line | {"model": "another"}) + "\n")
    assert "made with the model 'another'" in run("generate", QUESTION, *each)[2]
    foreign = [b"text", b"\xff\xd8\xff\xe0", b"\n", b"[1]\n", b'{"name": "photo"}\n', b'{"file": "a.png"}\n', b"\0\0"]
    for content in foreign:
        Path("out.jsonl").write_bytes(content)
        status, out, err = run("generate", QUESTION, *each)
        assert (status, out) == (1, "") and err.startswith("phi3v: out.jsonl has lines that --each did not write: ")
        assert Path("out.jsonl").read_bytes() == content


def test_after_kill_and_ctrl_c_every_picture_is_answered_once(run):
    names = squares(12)
    each = ["generate", QUESTION, "--num-crops", "1", "--out", "out.jsonl", "--each", *names]
    for number, status in (signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130):
        Path("out.jsonl").touch()
        before = len(Path("out.jsonl").read_text().splitlines())
        process = subprocess.Popen([sys.executable, "-m", "phi3v", *each], stderr=subprocess.PIPE)
        with process:
            while len(Path("out.jsonl").read_text().splitlines()) <= before:
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(number)
            assert process.wait(30) == status and process.stderr.read() == b""
    assert run(*each) == (0, "", "")
    assert sorted(line["file"] for line in read("out.jsonl")) == names


class Deltas(list):
    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731


class Model:
    """Answers at once with the file's name; `most` is how many pictures were on their way at the same time."""

    checkpoint, limits, status = "fake", {"batch": 8}, "ok"

    def __init__(self, fails=()):
        self.fails, self.asked, self.lock = fails, [], threading.Lock()

    def answer(self, request):
        (picture,) = request.chats[0].pictures
        with self.lock:
            self.asked.append(picture.param)
        if picture.param in self.fails:
            raise self.fails[picture.param]
        return Deltas([Delta(0, picture.param, "stop")])


def test_of_ten_thousand_pictures_no_more_are_on_their_way_than_the_engine_runs():
    model, names = Model(), [f"{i}.png" for i in range(10_000)]
    with closing(terminal._answers(model, QUESTION, SamplingParams(), names)) as answers:
        for done, answer in zip(range(1, 101), answers, strict=False):
            assert answer["text"] == answer["file"] and len(model.asked) <= done + 2 * 8
    assert len(model.asked) < 130  # and none of the others is begun
    assert len(list(terminal._answers(model, QUESTION, SamplingParams(), names))) == 10_000


def test_a_generation_that_fails_is_one_line_and_an_engine_that_has_failed_ends_the_run():
    model = Model({"bad": RuntimeError("generation failed"), "slow": errors.Unavailable("the queue is full")})
    answers = terminal._answers(model, QUESTION, SamplingParams(), ["bad", "slow", "good"])
    assert sorted(answers, key=lambda answer: answer["file"]) == [
        {"file": "bad", "error": "the model has failed with it"},
        {"file": "good", "text": "good", "finish_reason": "stop"},
        {"file": "slow", "error": "the queue is full; try again in 5 s"},
    ]
    model.status = "failed"
    with pytest.raises(errors.SetupError, match="the engine has failed"):
        list(terminal._answers(model, QUESTION, SamplingParams(), ["bad"]))


def test_progress_is_shown_on_a_terminal_only(run, monkeypatch, capsys):
    each = ["generate", QUESTION, "--each", "circle.png", "none.png", "--out"]
    assert run(*each, "a.jsonl")[2] == "phi3v: 1 of 2 pictures were not answered; their lines say why\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    err = run(*each, "b.jsonl")[2]
    assert re.search(r"\r2 of 2 · [0-9.]+ pictures/s · 0:00 left · 1 failed\x1b\[K", err)
    assert err.endswith("\r\x1b[Kphi3v: 1 of 2 pictures were not answered; their lines say why\n")


def test_whoever_reads_only_the_beginning_gets_no_traceback():
    squares(3)
    generate = f"{sys.executable} -m phi3v generate '{QUESTION}' --num-crops 1 --each *.png"
    command = f"{generate} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    line, status = done.stdout.splitlines()
    assert json.loads(line)["file"].endswith(".png") and (status, done.stderr) == ("1", "")


def test_what_a_stranger_wrote_does_not_steer_the_terminal(run, monkeypatch, capsys):
    said = "\x1b]52;c;aGk=\x07a\u009b2J\r\té\n"
    monkeypatch.setattr(terminal, "_ask", lambda llm, prompt, pictures, params, show: show(said) or {"text": said})
    assert run("generate", "Hi")[1] == said + "\n"  # a program gets what was said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run("generate", "Hi")[1] == r"\u001b]52;c;aGk=\u0007a\u009b2J\u000d" + "\té\n\n"
    out = run("generate", "Hi", "--json")[1]
    assert json.loads(out) == {"text": said} and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out)
    assert run("generate", "Hi", "--image", "\x1b[2J")[2] == "phi3v: there is no picture \\u001b[2J\n"


def test_what_is_no_file_or_has_no_end_costs_its_own_line_only(run, monkeypatch):
    os.mkfifo("pipe.png")
    Path("endless.png").symlink_to("/dev/zero")
    with open("large.png", "wb") as large:
        large.truncate(256_000_001)
    status, out, _ = run("generate", QUESTION, "--each", "pipe.png", "endless.png", "large.png", "circle.png")
    lines = {line["file"]: line.get("text") or line["error"] for line in map(json.loads, out.splitlines())}
    none = "it is no file"
    large = "the file has over 256,000,000 bytes"
    assert status == 1
    assert lines == {"pipe.png": none, "endless.png": none, "large.png": large, "circle.png": "A red circle."}


BROWSER = """#!/bin/sh
echo "$@" > {folder}/given
cp -p "${{1#file://}}" {folder}/page.html
"""


@contextmanager
def at_a_terminal(*arguments: str, **environment: str):
    """A process whose input and output are a terminal, and what it shows there until it waits."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "phi3v", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | environment)
    os.close(theirs)
    shown = ""
    while "Ctrl-C" not in shown:
        shown += os.read(ours, 4096).decode()
    yield process, shown
    process.kill()
    process.wait()
    os.close(ours)


def test_phi3v_alone_at_a_terminal_opens_the_page_with_a_key_that_is_gone_with_it(folder):
    browser = folder / "browser"
    browser.write_text(BROWSER.format(folder=folder))
    browser.chmod(0o755)
    with at_a_terminal(BROWSER=f"{browser} %s", DISPLAY="") as (process, shown):
        url, port, key = re.search(r"(https://localhost:(\d+)/#key=(phi3v_\w{36}))\r\n", shown).groups()
        while not (folder / "page.html").exists():  # what the browser was told to open
            assert process.poll() is None
            time.sleep(0.01)
        context = ssl.create_default_context(cafile="server.crt")

        def ask(path: str, key: str = "") -> int:
            request = urllib.request.Request(f"https://localhost:{port}{path}", headers={"X-API-Key": key})
            try:
                with urllib.request.urlopen(request, context=context) as reply:
                    return reply.status
            except urllib.error.HTTPError as error:
                with error:
                    return error.code

        assert (ask("/health"), ask("/v1/models"), ask("/v1/models", key)) == (200, 401, 200)
        (private,) = folder.glob("phi3v-chat-*")
        assert stat.S_IMODE(private.stat().st_mode) == 0o700
        assert stat.S_IMODE((private / "open.html").stat().st_mode) == 0o600
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert (folder / "given").read_text().strip() == (private / "open.html").as_uri()  # all users may read that
    assert f'content="0; url={url}"' in (folder / "page.html").read_text()
    assert "/v1/models" in Path("server.log").read_text() and key[6:] not in Path("server.log").read_text()
    made = {"server.crt", "server.key", "server.log"}
    assert {path.name for path in folder.iterdir()} == made | {"circle.png", "browser", "given", "page.html"}


@pytest.mark.parametrize("screen, no_browser, opened", [(":0", False, 1), ("", False, 0), (":0", True, 0)])
def test_without_a_screen_or_with_no_browser_the_address_is_only_printed(
    pair, monkeypatch, capsys, screen, no_browser, opened
):
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in {"DISPLAY": screen, "WAYLAND_DISPLAY": "", "BROWSER": ""}.items():
        monkeypatch.setenv(name, value)
    given = []
    monkeypatch.setattr("webbrowser.open", lambda url: given.append(url))
    arguments = SimpleNamespace(certfile=pair[0], model="demo", no_browser=no_browser)
    with closing(KeyStore("keys.db")) as keys:
        terminal.open_page(arguments, SimpleNamespace(checkpoint="demo-1"), keys, None, 8443)
        out, err = capsys.readouterr()
        key = re.search(r"^https://localhost:8443/#key=(phi3v_\w{36})$", out, re.M)[1]
        assert (
            keys.verify(key).name == "chat"
            and "not Phi-3.5-vision" in out
            and "\n".join(tls.trust_lines(pair[0])) in out
        )
    assert len(given) == opened and ("no browser was found" in err) == bool(opened)


def test_serve_for_the_network_prints_what_lets_a_colleague_in_without_turning_verification_off(folder):
    command = [sys.executable, "-m", "phi3v", "serve", "--host", "0.0.0.0", "--port", "0"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        printed = ""
        while "curl" not in printed:
            line = server.stdout.readline()
            assert line, server.stderr.read()
            printed += line
        name, port = re.search(r"others on this network: https://([^:]+\.local):(\d+),", printed).groups()
        digest = re.search(r"SHA-256 fingerprint is ([0-9A-F:]{95})\n", printed)[1]
        fetched = ssl.get_server_certificate(("127.0.0.1", int(port)))  # as a colleague who has no copy does
        Path("copy.crt").write_text(fetched)
        assert tls.fingerprint("copy.crt") == digest == tls.fingerprint("server.crt")
        asked = ["curl", "-sS", "--cacert", "copy.crt", "--resolve", f"{name}:{port}:127.0.0.1"]
        done = subprocess.run([*asked, f"https://{name}:{port}/health"], capture_output=True, text=True, timeout=30)
        assert (done.stdout, done.stderr) == ('{"status":"ok"}', "")
        server.terminate()
        assert server.wait(30) == 0
