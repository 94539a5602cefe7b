"""The command line: what it prints where, its exit statuses, and one line for whatever is wrong."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from phi3v import __version__, tls
from phi3v.keys import KeyStore
from phi3v.terminal import say_hello

HEAD = ["ID", "NAME", "KEY", "LIMIT/MIN", "CREATED", "EXPIRES", "LAST", "USED", "REQUESTS", "TOKENS"]
DAY = 86400
TEXT = {"capture_output": True, "text": True, "check": True}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("PHI3V_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PHI3V_MODEL", "demo")


@pytest.fixture
def key(run) -> str:
    return run("create", "--name", "app")[1].strip()


@pytest.fixture
def keys(run):
    """What list --json says of the keys."""
    return lambda *options: json.loads(run("list", "--json", *options)[1])["keys"]


def process(*arguments, script: str | None = None, **options) -> subprocess.CompletedProcess:
    start = ["-c", script] if script else ["-m", "phi3v"]
    options = {"capture_output": True, "timeout": 60} | options
    return subprocess.run([sys.executable, *start, *arguments], **options)


def test_create_prints_the_key_alone_on_stdout_and_the_rest_on_stderr(run, tmp_path):
    status, out, err = run("create", "--name", "app")
    assert status == 0 and re.fullmatch(r"phi3v_[0-9A-Za-z]{36}\n", out)
    found = re.fullmatch(
        rf"phi3v: made a new database, {tmp_path}/keys\.db\n"
        rf"phi3v: that is key ([0-9a-f]{{8}}) of {tmp_path}/keys\.db, shown only this once\n",
        err,
    )
    assert found and run("list")[1].split()[11] == found[1]
    status, out, err = run("create", "--name", "second")
    assert status == 0 and len(out) == 43 and "made a new database" not in err and out.strip() not in err


def test_list_shows_a_table_or_json_and_never_a_key(run, key, tmp_path):
    second = run("create", "--name", "München 2", "--rate-limit", "7", "--expires", "90d")[1].strip()
    status, out, err = run("list")
    path, head, *rows = out.splitlines()
    assert (status, err, path, head.split()) == (0, "", f"{tmp_path}/keys.db", HEAD)
    columns = [re.split(r"  +", row) for row in rows]
    today, later = (time.strftime("%Y-%m-%d", time.localtime(time.time() + s)) for s in (0, 90 * DAY))
    assert [c[1:4] for c in columns] == [["app", key[:10] + "…", "100"], ["München 2", second[:10] + "…", "7"]]
    assert [c[6:] for c in columns] == [["–", "0", "0+0"]] * 2
    assert columns[0][4].startswith(today) and columns[0][5] == "–" and columns[1][5].startswith(later)
    status, text, err = run("list", "--json")
    found = json.loads(text)
    assert (status, err, found["db"]) == (0, "", path)
    assert [(k["id"], k["name"], k["rate_limit"]) for k in found["keys"]] == [
        (columns[0][0], "app", 100),
        (columns[1][0], "München 2", 7),
    ]
    assert set(found["keys"][0]) == {
        "id",
        "name",
        "prefix",
        "rate_limit",
        "created",
        "expires",
        "last_used",
        "requests",
        "prompt_tokens",
        "completion_tokens",
    }
    assert key[10:] not in out + text and second[10:] not in out + text


def test_update_and_delete_take_the_key_its_id_or_standard_input(run, key, keys, monkeypatch):
    status, out, err = run("update", "--key", key, "--rate-limit", "200")
    assert (status, err, keys()[0]["rate_limit"], out.splitlines()[1].split()[3]) == (0, "", 200, "200")
    assert key[10:] not in out
    ident = keys()[0]["id"]
    assert run("update", "--key", ident, "--name", "new")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f" {key} \r\nmore".encode())))
    assert run("update", "--key", "-", "--rate-limit", "3")[0] == 0
    assert [(k["id"], k["name"], k["rate_limit"], k["expires"]) for k in keys()] == [(ident, "new", 3, None)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{key}\n".encode())))
    assert run("delete", "--key", "-") == (0, f"deleted {ident} (new)\n", "")
    assert keys() == []
    for reference in (ident, key):
        status, out, err = run("delete", "--key", reference)
        assert (status, out) == (1, "") and re.fullmatch(r"phi3v: no key '.{8,11}' in .*\n", err)


def test_rotate_prints_the_new_key_alone_on_stdout_and_what_becomes_of_the_old_one_on_stderr(
    run, key, keys, monkeypatch
):
    run("update", "--key", key, "--rate-limit", "7")
    before = keys()[0]
    status, new, err = run("rotate", "--key", key, "--grace", "24h")
    words = rf"phi3v: that is key {before['id']} \(app\) now, shown only this once; the one before "
    assert status == 0 and re.fullmatch(r"phi3v_[0-9A-Za-z]{36}\n", new) and new.strip() != key
    assert re.fullmatch(words + r"ends on 20\d\d-\d\d-\d\d at \d\d:\d\d\n", err) and keys() == [
        before | {"prefix": new[:10]}
    ]
    with closing(KeyStore("keys.db")) as store:
        assert store.verify(key) == store.verify(new.strip())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(key.encode())))
    status, newer, err = run("rotate", "--key", "-")  # by the old one, which is still valid
    assert status == 0 and re.fullmatch(words + r"has ended\n", err) and keys() == [before | {"prefix": newer[:10]}]
    for ended in (key, new.strip()):
        status, out, err = run("rotate", "--key", ended)
        assert (status, out) == (1, "") and re.fullmatch(r"phi3v: no key 'phi3v_.{4}…' in .*\n", err)
    assert run("delete", "--key", newer.strip())[0] == 0 and keys() == []


@pytest.mark.parametrize(("given", "seconds"), [("30m", 1800), ("12h", 43200), ("90d", 90 * DAY), ("never", None)])
def test_a_key_expires_when_create_and_update_say_so(run, keys, given, seconds):
    before = time.time()
    secret = run("create", "--name", "app", "--expires", given)[1].strip()
    created = keys()[0]["expires"]
    run("update", "--key", secret, "--expires", "1m")
    assert before + 60 <= keys()[0]["expires"] <= time.time() + 60
    assert run("update", "--key", secret, "--expires", given)[0] == 0
    for expires in (created, keys()[0]["expires"]):
        assert expires is None if seconds is None else before + seconds <= expires <= time.time() + seconds


def test_the_database_is_the_flags_the_environments_or_keys_db(run, keys, monkeypatch, tmp_path):
    monkeypatch.setenv("PHI3V_DB", "variable.db")
    run("create", "--name", "from the variable")
    run("create", "--name", "from the flag", "--db", "flag.db")
    monkeypatch.setenv("PHI3V_DB", "")  # as good as none
    run("create", "--name", "from neither")
    assert {f.name for f in tmp_path.iterdir() if "-" not in f.name} == {"variable.db", "flag.db", "keys.db"}
    assert [k["name"] for k in keys()] == ["from neither"]
    monkeypatch.setenv("PHI3V_DB", "variable.db")
    assert [k["name"] for k in keys()] == ["from the variable"]
    assert [k["name"] for k in keys("--db", "flag.db")] == ["from the flag"]


WRONG_USAGE = [
    "create",
    "create --name",
    "create --name a --rate-limit 0",
    "create --name a --rate-limit -1",
    "create --name a --rate-limit abc",
    "create --name a --rate-limit ٣",
    "create --name a --expires soon",
    "create --name a --expires 0d",
    "create --name a --expires -1d",
    "create --name a --expires 1.5h",
    "update --rate-limit 5",
    "update --key x --rate-limit 0",
    "update --key x --expires 90",
    "rotate --grace 24h",
    "rotate --key x --grace never",
    "rotate --key x --grace 24",
    "delete",
    "list --all",
    "serve --port x",
    "serve --log-level loud",
    "serve --allowed-host a.example:8000",
    "serve --allowed-host https://a.example",
    "serve --allow-origin a.example",
    "serve --allow-origin https://a.example/",
    "serve --max-content-length 1TB",
    "serve --max-tokens 0",
    "generate",
    "generate hello --max-tokens many",
    "generate hello --out answers.jsonl",
    "generate hello --image a.png --each b.png",
    "generate - --image -",
    "chat --port 8000",
    "rename",
    "--verbose",
]


MODELS = r"a model is demo \(embedded\), a checkpoint folder or a hub id"


@pytest.mark.parametrize("line", WRONG_USAGE)
def test_wrong_usage_is_told_on_stderr_with_exit_status_2(run, tmp_path, line):
    status, out, err = run(*line.split())
    assert (status, out) == (2, "") and err.startswith("usage: phi3v") and ": error: " in err.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_what_the_environment_says_is_held_to_the_same_rules(run, monkeypatch):
    monkeypatch.setenv("PHI3V_LOG_LEVEL", "loud")
    status, out, err = run("serve")
    assert (status, out) == (2, "")
    assert err.endswith("error: argument --log-level: 'loud' is not debug, info, warning or error\n")


def test_no_subcommand_prints_the_help_on_stderr_and_version_and_help_go_to_stdout(run):
    status, out, err = run()
    assert (status, out) == (2, "") and all(f"\n    {c} " in err for c in ("serve", "create", "list", "generate"))
    assert run("--help") == (0, err, "") and run("--version") == (0, f"phi3v {__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["create", "--name", ""], r"a key's name has 1 to 100 printable characters, not ''"),
        (["create", "--name", "a\n\x1b[2J"], r"a key's name has .*, not 'a\\n\\x1b\[2J'"),
        (["create", "--name", "a", "--rate-limit", "1000001"], r"a rate limit is 1 to 1,000,000 .*, not 1000001"),
        (["create", "--name", "a", "--db", "no/keys.db"], r"cannot create .*/no/keys\.db: No such file or directory"),
        (["update", "--key", "KEY"], r"nothing to change: give --rate-limit, --name or --expires"),
        (["update", "--key", "KEY", "--name", ""], r"a key's name has .*"),
        (["delete", "--key", "\udcff"], r"no key '.*' in .*/keys\.db; `phi3v list` shows the ids"),
        (["delete", "--key", ""], r"no key '' in .*"),
        (
            ["list", "--db", "none.db"],
            r".*/none\.db does not exist; make a first key: phi3v create --name NAME --db .*/none\.db",
        ),
        (
            ["list", "--db", "text.db"],
            r".*/text\.db cannot be used \(.+\); if it is damaged, restore it from a backup, or .*",
        ),
        (["generate", "hi", "--image", "none.png"], r"there is no picture none\.png"),
        (["generate", "hi", "--max-tokens", "0"], r"max_tokens must be a whole number of at least 1, not 0"),
        (["generate", "hi", "--model", "none"], rf"there is no folder none; {MODELS}"),
        (["generate", "hi", "--model", "./none/x"], rf"there is no folder \./none/x; {MODELS}"),
        (["quantize", "none", "out"], rf"there is no folder none; {MODELS}"),
        (["generate", "hi", "--model", "text.db"], r"text\.db is a file; a model is a folder with config\.json .*"),
        (["generate", "hi", "--model", "empty"], r"empty is no checkpoint folder: cannot read config\.json: .*"),
    ],
)
def test_whatever_is_wrong_is_one_line_on_stderr_with_exit_status_1(run, key, keys, tmp_path, command, message):
    (tmp_path / "text.db").write_text("no database" * 99)
    (tmp_path / "empty").mkdir()
    before = keys()
    status, out, err = run(*[key if word == "KEY" else word for word in command])
    assert (status, out) == (1, "") and re.fullmatch(f"phi3v: {message}\n", err), err
    assert keys() == before


def test_a_generation_that_fails_is_one_line_on_stderr_with_exit_status_1(tmp_path):
    script = """
from phi3v import __main__, model, need_mlx
need_mlx()
model.Phi3V.__call__ = lambda *_: [][0]
raise SystemExit(__main__.main())"""
    for command in (["generate", "hi"], ["bench"]):
        done = process(*command, "--model", "demo", script=script, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "phi3v: generation failed: list index out of range\n"


def test_listing_keys_imports_neither_mlx_nor_any_other_large_package(key):
    large = {"mlx", "mlx_lm", "numpy", "PIL", "tokenizers", "transformers", "huggingface_hub"}
    script = f"import sys; from phi3v.__main__ import main; main(); sys.exit(sorted({large} & set(sys.modules)) or 0)"
    done = process("list", script=script, text=True)
    assert (done.returncode, done.stderr) == (0, "") and key[:10] in done.stdout


def test_a_reader_that_leaves_and_a_key_that_is_no_text_cause_no_traceback(key):
    read, write = os.pipe()
    os.close(read)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = process("list", stdout=write, stderr=subprocess.PIPE, capture_output=False, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")
    for arguments, given in (["delete", "--key", "-"], b"\xff\xfe\n"), (["delete", "--key", b"phi3v_\xff"], b""):
        done = process(*arguments, input=given)
        assert done.returncode == 1 and re.fullmatch(rb"phi3v: no key '.*' in .*\n", done.stderr)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--port", "PORT"],
            r"cannot listen on 127\.0\.0\.1 port \d+: Address already in use; is phi3v running already\? --port .*",
        ),
        (["--port", "70000"], r"cannot listen on 127\.0\.0\.1 port 70000: .*"),
        (["--host", "192.0.2.1"], r"cannot listen on 192\.0\.2\.1 port 8000: Cannot assign requested address"),
        (["--certfile", "server.key"], r"openssl x509 -in .*/server\.key failed: .*"),
        (["--keyfile", "none.key"], r".*/server\.crt has no key beside it: .*"),
        (["--db", "server.crt"], r".*/server\.crt cannot be used \(.*\); .*"),
        (["--model", "none"], rf"there is no folder none; {MODELS}"),
    ],
)
def test_a_server_that_cannot_start_says_why_in_one_line(pair, tmp_path, options, message):
    for file in pair:
        shutil.copy(file, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [str(taken.getsockname()[1]) if o == "PORT" else o for o in options]
        done = process("serve", *options, text=True)
    assert (done.returncode, done.stdout) == (1, "") and re.fullmatch(f"phi3v: {message}\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    "host, here, others",
    [
        ("127.0.0.1", "https://localhost:8443", None),
        ("fd00::2", "https://[fd00::2]:8443", None),
        ("phi.example.org", "https://phi.example.org:8443", None),
        ("0.0.0.0", "https://localhost:8443", f"https://{tls.public_name('0.0.0.0')}:8443"),
    ],
)
def test_serve_says_where_it_is_and_prints_a_curl_line_that_the_shell_can_read(
    pair, tmp_path, monkeypatch, capsys, host, here, others
):
    monkeypatch.setattr(sys, "platform", "linux")
    folder = tmp_path / "a folder"
    folder.mkdir()
    certificate = shutil.copy(pair[0], folder)
    arguments = argparse.Namespace(host=host, certfile=certificate, model="demo", first_key=False)
    limits = {"batch": 8, "queue": 64, "context": 4096, "cache_bytes": 1_500_000_000}
    with closing(KeyStore("keys.db")) as keys:
        say_hello(arguments, SimpleNamespace(checkpoint="demo-1", limits=limits), keys, None, 8443)
    printed = capsys.readouterr().out
    assert f"answers at {here}\n" in printed and "not Phi-3.5-vision" in printed and "log in no file" in printed
    assert "8 sequences at once of 64 taken, 4,096 tokens each, 1.5 GB for what was read" in printed
    assert f"make a first API key: phi3v create --name NAME --db {tmp_path}/keys.db" in printed
    assert (f"others on this network: {others}," in printed) == bool(others)
    shown = subprocess.run(["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"], **TEXT)
    digest = shown.stdout.strip().partition("=")[2]
    assert re.fullmatch("([0-9A-F]{2}:){31}[0-9A-F]{2}", digest)  # as browsers show it
    assert (f"fingerprint is {digest}\n" in printed) == bool(others)
    systems = ["macOS", "Windows", "Linux, Chromium and Chrome", "Linux, Firefox"]
    found = re.findall(r"^  ([^:]+): (.*)$", printed, re.M)
    own = found[: len(found) - len(systems)] if others else found
    assert own == [(s, tls.TRUST[s].format(shlex.quote(certificate))) for s in systems[2:]]  # tried on Linux
    assert found[len(own) :] == ([(s, tls.TRUST[s].format("server.crt")) for s in systems] if others else [])
    words = shlex.split(next(line for line in printed.splitlines() if line.startswith("curl")))
    assert words[:4] == ["curl", "--cacert", certificate, f"{here}/v1/completions"]
    assert json.loads(words[-1])["prompt"] == "What is shown in this image?"
