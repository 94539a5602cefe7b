"""The promises of SECURITY.md, the tests that hold them, and their table there with what was measured."""

import re
from pathlib import Path

from report import Line
from service import ROOT

BEGIN, END = "<!-- measured: written by `run.py --table` -->", "<!-- end of what was measured -->"
# Line, promise, tests: a file of tests/, or one test of it, whose name is a sentence.
PROMISES = [
    (
        "A1",
        "The first start makes a P-256 certificate for every name of this machine, without a line to type",
        ["test_tls: the first run makes a p256 certificate for 825 days and all names of the machine"],
    ),
    (
        "A2",
        "Key 0600; whole or not at all; a valid pair is never overwritten",
        ["test_tls: the key is 0600 and the certificate 0644 under any umask and nothing else is left"],
    ),
    ("A3", "A new pair is taken over without losing a request, a wrong one refused", []),
    (
        "A4",
        "TLS 1.2 and 1.3, forward-secret AEAD suites only",
        ["test_tls: tls 1 2 gets an ecdhe aead cipher and http 1 1 and an older client nothing"],
    ),
    (
        "A5",
        "A silent handshake stops nobody; every connection ends with close_notify",
        ["test_server: plain http gets a readable 400"],
    ),
    ("B6", "One write per answer: fast enough that waiting is no attack", []),
    ("B7", "A head has one reading or none: 400 and the end", ["test_head"]),
    (
        "B8",
        "Heads and bodies have limits that hold before the key is looked at",
        ["test_server: a client that first sends 3 mb can read why they are refused"],
    ),
    (
        "B9",
        "The body of a refused request is never read as a request",
        ["test_server: a refusal says why and its body is never taken for the next request"],
    ),
    (
        "B10",
        "Errors say what was wrong with the request and nothing of the server",
        [
            "test_server: the documented request gets the documented answer and nothing says what runs here",
            "test_server: a broken generation is a 500 that tells nothing and the next request works",
        ],
    ),
    (
        "B11",
        "JSON is read strictly, everything in it has a maximum",
        ["test_protocol: what is no json object is refused and the message says why"],
    ),
    (
        "C12",
        "Slow and silent clients have total deadlines and hold up nobody",
        ["test_server: silent and babbling clients hold up nobody and are no error of ours"],
    ),
    ("C13", "Connections are bounded; more of them hurt none that is there", []),
    ("C14", "A stream that nobody reads is cut", []),
    (
        "C15",
        "A client that goes away takes its generation along",
        ["test_server: a client that leaves a stream cancels it and is no error"],
    ),
    ("C16", "The queue is bounded, and one key has at most half of it", ["test_engine"]),
    (
        "C17",
        "SIGTERM: nothing new, the running requests answered, exit 0",
        ["test_server: stop answers the running request and then returns"],
    ),
    (
        "C18",
        "An error ends its own request only; a dead engine ends the process",
        ["test_server: a broken generation is a 500 that tells nothing and the next request works"],
    ),
    (
        "C19",
        "A wrong start is one line; nothing grows with time",
        ["test_cli: a server that cannot start says why in one line"],
    ),
    (
        "D20",
        "A key has 178 random bits, is shown once and stored as a hash",
        ["test_keys: only a keys hash is stored in files of mode 0600 of which one is the whole backup"],
    ),
    (
        "D21",
        "keys.db survives kill -9 at any moment",
        ["test_keys: every key that a killed process printed is stored in a sound file"],
    ),
    (
        "D22",
        "Unknown, expired and deleted keys look alike; keys share no cache",
        [
            "test_keys: unknown expired and deleted keys are refused with the same words",
            "test_server: what is kept belongs to the key that asked",
        ],
    ),
    (
        "D23",
        "At most N requests of a key in any 60 s, exactly",
        [
            "test_keys: no sequence of requests gets more than n in any 60 s nor less than it may",
            "test_keys: eight threads and four processes hammering one file get exactly n",
        ],
    ),
    (
        "D24",
        "A damaged or locked keys.db lets nobody in, and mends without a restart",
        ["test_keys: a damaged database does not start and while serving lets nobody in until it is mended"],
    ),
    (
        "E25",
        "Pictures come as data; nothing is fetched, no file opened",
        ["test_protocol: a picture that is no strict base64 is refused"],
    ),
    (
        "E26",
        "A picture's size is known, and bounded, before it is decoded",
        ["test_images: a picture is not decoded before its size is known"],
    ),
    (
        "E27",
        "No code from models or clients is run",
        ["test_layers: nothing is evaluated unpickled or run but openssl"],
    ),
    ("E28", "Special tokens in a prompt are text", ["test_tokenizer: a prompt cannot close its turn"]),
    (
        "F29",
        "The log has no key, prompt, answer or picture, and no forged line",
        [
            "test_server: neither key nor prompt nor answer is ever logged",
            "test_server: no request forges a line or steers a terminal",
        ],
    ),
    ("F30", "A foreign Host is refused: no DNS rebinding; no CORS unasked", ["test_server: a foreign host is refused"]),
    ("F31", "The page: comes with it", []),
    (
        "F32",
        "This machine only unless told otherwise; every route but /health needs a key",
        ["test_server: without a key every route but health is 401"],
    ),
]


def write(results: dict) -> None:
    path = ROOT / "SECURITY.md"
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{about(results)}\n\n{rows(results)}{END}{after}")


def about(results: dict) -> str:
    client = "client and server share the cores"
    where = f"{results['machine']}, {results['cores']} cores ({client})"
    return f"Measured {results['date'][:10]}: {where}, Python {results['python']}, {results['openssl']}."


def rows(results: dict) -> str:
    lines = [Line(**line) for part in results["parts"].values() for line in part["lines"]]
    known = {line for line, *_ in PROMISES}
    assert not (lost := {line.line for line in lines} - known), f"no promise for {lost}"
    text = "| | what is promised | measured (target) | held by |\n| --- | --- | --- | --- |\n"
    for name, promise, tests in PROMISES:
        found = [measured(line) for line in lines if line.line == name]
        by = [tested(test) for test in tests] + ["`make guarantees`"] * bool(found)
        text += f"| {name} | {promise} | {'; '.join(found) or '–'} | {'; '.join(by) or '–'} |\n"
    return text


def measured(line: Line) -> str:
    if line.holds is None:
        return f"{line.what}: {line.measured or 'not run'}"
    return f"{line.what}: {line.measured} ({line.target})" + ("" if line.holds else " **does not hold**")


def tested(test: str) -> str:
    """The test as the table names it; one that is not there is named as missing."""
    file, _, sentence = test.partition(": ")
    path = Path(ROOT, "tests", f"{file}.py")
    name = f"def test_{sentence.replace(' ', '_')}(" if sentence else "def test_"
    there = path.exists() and name in path.read_text()
    return f"{file}: {sentence}" * bool(sentence) or f"{file}" if there else f"**missing** {test}"
