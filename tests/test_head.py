"""The head parser against its table, against h11, and byte by byte. PHI3V_HEADS=100000 asks h11 that many times."""

import os
import subprocess
from contextlib import suppress
from itertools import pairwise
from urllib.parse import urlsplit

import h11
import heads
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from phi3v import connection
from phi3v.errors import RequestError

EXAMPLES = int(os.environ.get("PHI3V_HEADS", "3000"))
BODY = 10_000  # bytes that a body may have for h11 to be given it


def verdict(data: bytes) -> connection.Head | tuple | None:
    """What is made of these bytes, to be compared; any other exception than the parser's own is a failure."""
    try:
        return connection.parse(data)
    except RequestError as error:
        return error.status, error.type, error.message, error.param, error.headers


@pytest.mark.parametrize("case", heads.CASES, ids=str)
def test_every_case_of_the_table_gets_its_verdict_however_it_is_cut(case):
    assert case.is_met_by(heads.read([case.data]))
    whole, known = verdict(case.data), False
    for end in range(len(case.data) + 1):  # a cut is a look at a beginning: none may tell something else
        seen = verdict(case.data[:end])
        assert seen == whole or (seen is None and not known), end
        known = seen is not None
    assert verdict(case.data + heads.NEXT) == whole or whole is None  # nor what comes after


def test_the_table_is_as_long_as_promised_and_each_case_names_its_section():
    different = len({case.data for case in heads.CASES})
    assert different == len(heads.CASES) >= 500
    assert {case.section.split()[0] for case in heads.CASES} == {"9110", "9112", "3986", "6585"}


def test_the_parser_is_right_on_python_3_12_too():
    python = ["python3.12"]
    environment = os.environ | {"PYENV_VERSION": "3.12"}  # where that is pyenv's, it asks this which one is meant
    try:
        subprocess.run([*python, "-c", "import ssl"], env=environment, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no python3.12 here")
    done = subprocess.run([*python, heads.__file__], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(f"{len(heads.CASES)} cases as expected on Python 3.12."), done.stderr


def theirs(data: bytes, found: connection.Head) -> tuple[h11.Connection, h11.Request, int]:
    """What h11 makes of the head that we found, with a body as declared and a request after it: the body's bytes."""
    body = b"0\r\n\r\n" if found.chunked else b"x" * min(found.length or 0, BODY)
    connection, size = h11.Connection(h11.SERVER, max_incomplete_event_size=10**6), 0
    connection.receive_data(data[: found.size].removeprefix(b"\r\n") + body + heads.NEXT)
    request = connection.next_event()
    while isinstance(event := connection.next_event(), h11.Data):
        size += len(event.data)
    assert isinstance(event, h11.EndOfMessage) or (found.length or 0) > BODY
    return connection, request, size


def agree(data: bytes) -> bool:
    """Whether we accept; then h11 must, and read the same, but for what is listed here.

    It takes no empty line in front (RFC 9112 2.2 wants it), writes Transfer-Encoding in lower case, never keeps
    HTTP/1.0 connections open, and takes whoever asks for CONNECT or Upgrade for one who will switch.
    """
    found = verdict(data)
    if not isinstance(found, connection.Head):
        assert found is None or found[0] in (400, 414, 431, 501)
        return False
    reader, request, size = theirs(data, found)
    fields: dict[str, str] = {}
    for name, value in ((name.decode(), value.decode("latin-1")) for name, value in request.headers):
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    ours = {name: value.lower() if name == "transfer-encoding" else value for name, value in found.fields.items()}
    assert (found.method, b"1.%d" % found.minor, ours) == (request.method.decode(), request.http_version, fields)
    target = request.target.decode()
    root = "*" if target == "*" else "/"
    url = target if target[0] not in "/*" else "https://" + fields.get("host", "") + target.removeprefix("*")
    with suppress(ValueError):  # of urlsplit: hosts like [.:1], which are on no server's list
        assert (found.host, found.path) == (urlsplit(url).hostname or "", urlsplit(url).path or root)
    assert found.length == (int(fields["content-length"]) if "content-length" in fields else None)
    if (found.length or 0) > BODY:
        return True
    assert (size, reader.trailing_data[0]) == (found.length or 0, heads.NEXT)
    if found.minor and reader.their_state is not h11.MIGHT_SWITCH_PROTOCOL:
        assert reader.their_state is (h11.DONE if found.persistent else h11.MUST_CLOSE)
    return True


@pytest.mark.parametrize("case", [case for case in heads.CASES if isinstance(case.verdict, dict)], ids=str)
def test_h11_reads_what_the_table_accepts_in_the_same_way(case):
    assert agree(case.data)


FULL = (
    b"POST https://[::1]:80/a?b HTTP/1.1\r\nHost: a.b:1\r\nConnection: close\r\n"
    b"Content-Length: 12\r\nTransfer-Encodinf: chunked\r\n\r\n"
)


def test_of_all_heads_that_differ_in_one_byte_those_that_we_accept_are_read_by_h11_in_the_same_way():
    accepted = 0
    for i in range(len(FULL)):
        for byte in range(256):
            accepted += agree(FULL[:i] + bytes([byte]) + FULL[i + 1 :])
        for more in (b"\0", b"\t", b"\n", b"\r", b"\r\n", b" ", b"\r\n ", b":", b",", b"\x7f", b"\xa0", b"0"):
            accepted += agree(FULL[:i] + more + FULL[i:])
        accepted += agree(FULL[:i] + FULL[i + 1 :])
    assert accepted > 5000


def mostly(usual: list[bytes], odd: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.sampled_from(usual * (1 + 40 * len(odd) // len(usual)) + odd)


SPACE = mostly([b" "], [b"", b"\t", b"  ", b"\v", b"\xa0", b"\r", b"\0"])
END = mostly([b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\r\n ", b"\r\n\r\n"])
METHOD = mostly([b"GET", b"POST", b"OPTIONS"], [b"CONNECT", b"PRI", b"get", b"G(T", b"", b"A" * 4079])
TARGETS = [b"/", b"/v1/completions?a=%20", b"*", b"https://Local.host:80/a?b", b"HTTPS://[::1]", b"https://a?b"]
TARGET = mostly(TARGETS, [b"a", b"//a", b"http://a/", b"https://u@a/", b"/#", b"/%0", b"a:1", b"/" + b"a" * 4080])
VERSION = mostly([b"HTTP/1.1"], [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"HTTP/1.10", b""])
HOSTS = [b"localhost", b"LOCALHOST:8443", b"[::1]:1", b"127.0.0.1"]
PAIRS = {
    b"Host": mostly(HOSTS, [b"", b"a,b", b"[", b"a:b", b"u@a"]),
    b"Content-Length": mostly([b"0", b"5", b"007"], [b"", b"+5", b"5,5", b"5, 6", b"\xb2", b"9" * 15, b"9" * 16]),
    b"Transfer-Encoding": mostly([b"chunked", b"CHUNKED"], [b"gzip, chunked", b"chunked,", b"x", b"chunked\v", b""]),
    b"Connection": st.sampled_from([b"close", b"keep-alive", b"Keep-Alive, CLOSE", b"upgrade", b"", b"x,,close "]),
    b"Expect": st.just(b"100-continue"),
    b"Upgrade": st.just(b"h2c"),
    b"X": st.binary(max_size=9) | st.sampled_from([b"a" * 16_300, b"\xe4", b" a\t"]),
}
SPELLED = {name: [name, name.lower(), name.upper()] for name in PAIRS}
BAD = {name: [name.replace(b"-", b"_"), name + b" ", b" " + name, name + b"\0", name + b"\xa0", b""] for name in PAIRS}


@st.composite
def requests(draw) -> bytes:
    """A head of parts that are good for the most part, in which some bytes may then be changed; at times just bytes."""
    if not draw(st.integers(0, 19)):
        return draw(st.binary(max_size=99))
    names = draw(st.lists(mostly(list(PAIRS), [b"X"]), max_size=5))
    names = [b"Host"] * (draw(st.integers(0, 19)) > 0) + names if b"Host" not in names else names
    if draw(st.integers(0, 9)):  # or Host and framing would be refused nearly always, for being there twice
        names = list(dict.fromkeys(names))
    names *= draw(st.sampled_from([1] * 30 + [20]))
    pieces = [draw(mostly([b""], [b"\r\n", b"\n", b"\r\n\r\n"])), draw(METHOD), draw(SPACE), draw(TARGET), draw(SPACE)]
    pieces += [draw(VERSION), draw(END)]
    for name in names:
        pieces += [draw(mostly(SPELLED[name], BAD[name])), b":", draw(SPACE), draw(PAIRS[name]), draw(END)]
    data = b"".join([*pieces, draw(END), draw(st.sampled_from([b"", b"x", heads.NEXT]))])
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 2))
        data = data[:at] + draw(st.binary(max_size=2) | st.sampled_from([b"\r\n", b" ", b","])) + data[at + cut :]
    return data


QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def test_generated_heads_raise_nothing_but_our_errors_and_what_we_accept_h11_reads_in_the_same_way():
    met = {True: 0, False: 0}

    @settings(max_examples=EXAMPLES, **QUICK)
    @example(b"")
    @given(requests())
    def compare(data):
        met[agree(data)] += 1

    compare()
    assert min(met.values()) > EXAMPLES / 5, met  # or one of the two was hardly tried


@settings(max_examples=max(EXAMPLES // 10, 300), **QUICK)
@given(requests(), st.lists(st.integers(0, 400), max_size=6))
def test_generated_heads_are_read_the_same_in_whatever_pieces_they_come(data, cuts):
    bounds = [0, *sorted(cuts), len(data)]
    made = heads.read(data[a:b] for a, b in pairwise(bounds))
    whole = heads.read([data])
    assert (type(made), str(made)) == (type(whole), str(whole))
