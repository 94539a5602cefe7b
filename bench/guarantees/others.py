"""F29, B7, B11, D, E: what must not be in the log, and what other programs find."""

import base64
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from report import Line, NotRun, at_least, at_most, is_true, none_of
from service import HERE, PYTHON, ROOT, Service

CANARY = "Zaunkoenig7041"
HIDDEN = "phi3v_" + CANARY + "x" * (36 - len(CANARY))  # in the form of a key: those are masked wherever they stand
# What bandit finds and is none: the line of code as it stands, so that a changed one is looked at anew, and why.
ADDRESSES = "text is compared; what is bound is --host"
JUDGED = {
    'everyone = arguments.host in ("0.0.0.0", "::")': ADDRESSES,
    'local = public_name("0.0.0.0")': ADDRESSES,
    'return [n for n in dict.fromkeys(names) if n and n not in ("0.0.0.0", "::", ".local")]': ADDRESSES,
    'if host in ("0.0.0.0", "::"):': ADDRESSES,
    'self._write(f"UPDATE keys SET {columns}id = id WHERE id = ?", *changes.values(), key.id)': "names checked above",
    'found = [Key(*row) for row in self._db.execute(f"SELECT {COLUMNS} FROM keys WHERE {which}", values)]': "constants",
    'db.execute(f"SELECT {COLUMNS} FROM keys WHERE {BY_SECRET}", (b"", 0))': "constants",
}
REQUESTS, HEADS, MUTATED = 300, 100_000, 20_000
SECONDS = 580  # that another program may take


def canary():
    """A word that a client sends in every place it can: not in the log, nor on the terminal."""
    rng, sent = random.Random(1), 0
    with Service() as server:
        kinds = [*well_formed(server.key), *malformed()]
        for _ in range(REQUESTS):
            with contextlib.suppress(OSError), server.connect(timeout=2) as connection:
                connection.sendall(rng.choice(kinds))
                sent += 1
                connection.recv(65536)
        time.sleep(0.5)
        server.process.terminate()
        server.process.wait(40)
        texts = server.log() + server.process.stdout.read() + (server.folder / "stderr").read_text()
    hidden = base64.b64encode(CANARY.encode()).decode()[:16]
    found = [row[:120] for row in texts.splitlines() if CANARY in row or hidden in row]
    note = f"{sent} requests, {len(texts.splitlines())} lines of log"
    yield none_of("F29", "lines with a word of a key, prompt, picture, header or malformed head", found, note)


def well_formed(key: str) -> list[bytes]:
    picture = base64.b64encode(CANARY.encode() * 9).decode()
    body = json.dumps({"prompt": CANARY, "max_tokens": 4, "images": [picture], "stop": [CANARY]}).encode()
    asked = json.dumps({"prompt": f"Say {CANARY}", "max_tokens": 24}).encode()
    wrong = f'{{"prompt": "{CANARY}", '.encode()
    headers = f"Cookie: {CANARY}\r\nUser-Agent: {CANARY}\r\nReferer: {CANARY}\r\nX-{CANARY}: 1\r\n"
    made = []
    for content in (body, asked, wrong):
        for secret in (key, HIDDEN, CANARY):
            for route in ("/v1/completions", "/v1/chat/completions", f"/v1/completions?q={CANARY}", f"/{HIDDEN}"):
                head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
                made.append(f"{head}X-API-Key: {secret}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    return made


def malformed() -> list[bytes]:
    heads = [
        f"GET /{HIDDEN}\x00 HTTP/1.1\r\nHost: localhost",
        f"{CANARY} / HTTP/1.1\r\nHost: localhost",
        f"GET / {CANARY}/1.1\r\nHost: localhost",
        f"GET /health HTTP/1.1\r\nHost: {CANARY}",
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: {CANARY}",
        f"GET /health HTTP/1.1\r\nHost: localhost\r\n{CANARY} : 1",
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nX: 1\r\n {CANARY}",
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {CANARY}",
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: {CANARY}",
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Type: {CANARY}",
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: {CANARY} {CANARY}\x7f",
        f"GET /health HTTP/1.1\r\nHost: localhost\r\nX: {CANARY * 2000}",
        CANARY,
    ]
    return [f"{head}\r\n\r\n".encode() for head in heads]


def heads():
    """The parser of request heads against h11."""
    if not (ROOT / "tests" / "test_head.py").exists():
        raise NotRun("tests/test_head.py is not there")
    done = tested(PYTHON, "tests/test_head.py", PHI3V_HEADS=str(HEADS))
    yield Line("B7", f"{HEADS:,} random heads read as h11 does", "passed", done[0], done[1])


def described():
    """schemathesis: requests that docs/openapi.json allows, and others."""
    python = PYTHON.removesuffix("/bin/python") + "-clients/bin/python"
    if not Path(python).exists():
        raise NotRun("needs the environment of make test-clients")
    done = tested(python, "tests/clients/test_openapi.py")
    yield Line("B11", "the server is as docs/openapi.json describes it (schemathesis)", "passed", done[0], done[1])


def tested(python: str, file: str, **environment: str) -> tuple[str, bool]:
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = os.environ | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    return re.sub(r"=+ ?", "", (done.stdout.strip().splitlines() or ["no output"])[-1]), done.returncode == 0


def bandit():
    program = Path(sys.executable).with_name("bandit")
    if not program.exists():
        raise NotRun("needs bandit")
    done = subprocess.run([program, "-q", "-r", "phi3v", "-f", "json"], cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)["results"]
    bad, judged = [], 0
    for finding in (f for f in found if f["issue_severity"] != "LOW"):
        source = Path(ROOT, finding["filename"]).read_text().splitlines()[finding["line_number"] - 1].strip()
        if source in JUDGED:
            judged += 1
        else:
            bad.append(f"{finding['test_id']} {finding['filename']}:{finding['line_number']}")
    low = sum(f["issue_severity"] == "LOW" for f in found)
    note = f"{judged} more were judged one by one, in others.py; {low} low ones"
    yield none_of("E27", "findings of bandit of medium severity and more", bad, note)


def key_figures():
    it = figures("keys.py")
    accepted, limit = it["accepted_of_limit"]
    yield is_true(
        "D23", "4 processes on one key get exactly its limit", accepted == limit, f"{accepted:,} of {limit:,}"
    )
    yield at_least("D23", "checks of the window, most refused", it["window_checks_per_s"], 2000, "/s")
    yield at_least("D23", "checks of the window, all accepted", it["window_checks_per_s_all_accepted"], 2000, "/s")
    yield at_most("D21", "checks that failed meanwhile", it["failed_checks"], 0)
    times = ", ".join(f"{kind} {us}" for kind, us in it["verify_us"].items())
    yield Line("D22", "time to look a key up, by kind, median", "", f"{times} µs", None)
    yield at_most(
        "D22", "a running request knows that its key was deleted", it["deletion_noticed_ms"]["most"], 1000, "ms"
    )


def picture_figures():
    it = figures("pictures.py", "--count", str(MUTATED))
    many, bombs = f"slowest of {it['largest']}", f"worst of {it['bombs']}"
    yield at_most("E26", "the largest pictures allowed, CPU", it["largest_cpu_s"], 1, "s", many)
    yield at_most("E26", "their memory", it["largest_mb"], 300, "MB")
    yield none_of("E26", "of these refused", it["largest_refused"])
    yield at_most("E26", "bombs, CPU until refused", it["bomb_cpu_ms"], 200, "ms", bombs)
    yield at_most("E26", "their memory", it["bomb_mb"], 100, "MB")
    yield none_of("E26", "of these read", it["bombs_read"])
    note = f"of {it['mutated']:,}, of which {it['mutated_read']:,} could be read"
    yield at_most("E26", "mutated pictures that crash", it["mutated_crashes"], 0, "", note)


def figures(script: str, *options: str) -> dict:
    """What another script of this folder prints; its exit status only says that one of them is over its limit."""
    if not (HERE / script).exists():
        raise NotRun(f"bench/guarantees/{script} is not there")
    command = [PYTHON, str(HERE / script), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    if not done.stdout:
        raise RuntimeError(done.stderr[-300:])
    return json.loads(done.stdout)
