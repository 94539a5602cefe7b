"""The table of heads on the wire, over TLS and over plain sockets: one answer each, and nothing hidden is answered."""

import json
import logging
import re
import socket
import ssl
from contextlib import suppress

import heads
import pytest
from site_under_test import Client, Site

from phi3v import server, tls

LAST = b"GET /last HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: last\r\nConnection: close\r\n\r\n"
WHOLE = [case for case in heads.CASES if case.verdict is not None]
SHORT = 200  # bytes: what is longer comes in larger pieces than of one byte


class Plain(socket.socket):
    """An accepted socket that passes for TLS, so that the same server is driven without the layer between."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return b"\x16" if flags & socket.MSG_PEEK else super().recv(size, flags)

    def unwrap(self) -> None:
        pass


class PlainServer(server.Server):
    def get_request(self):
        raw, address = super().get_request()
        return Plain(fileno=raw.detach()), address


class NoTLS:
    @staticmethod
    def wrap_socket(raw: socket.socket, server_side: bool) -> socket.socket:
        return raw


@pytest.fixture(scope="module", params=["TLS", "plain"])
def wire(request, pair, tmp_path_factory):
    """One server for the whole table, with a way to connect to it; its log must hold nothing but requests."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(server, "Server", PlainServer)
            patch.setattr(tls, "server_context", lambda *_: NoTLS())
        site = Site(pair, tmp_path_factory.mktemp("wire"), lambda: 0.0)
    log = logging.getLogger("phi3v")
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(site.log)
    site.secure = request.param == "TLS"
    yield site
    left = site.close()
    log.removeHandler(site.log)
    log.setLevel(level)
    assert {record.levelno for record in left} == {logging.INFO} and site.llm.requests == []
    line = r'request=[0-9a-z]+ client=127.0.0.1 (method=[A-Z]+ )?path="[!-~]*" status=\d+ ms=\d+'  # and nothing else
    assert [record.getMessage() for record in left if not re.fullmatch(line, record.getMessage())] == []


def answers(client: Client) -> list[tuple[int, dict, bytes]]:
    """All that the server says until it ends the connection, which it must do in order."""
    if isinstance(client.sock, ssl.SSLSocket):
        client.sock.suppress_ragged_eofs = False  # an end without close_notify raises
    data, found = b"", []
    with suppress(ssl.SSLZeroReturnError):  # close_notify, too, if we have sent ours
        while more := client.file.read(65536):
            data += more
    client.close()
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body, data = rest[: int(headers["Content-Length"])], rest[int(headers["Content-Length"]) :]
        found.append((int(re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z- ]+", status)[1]), headers, body))
    return found


def judge(case: heads.Case, client: Client) -> None:
    found, behind = answers(client), [] if case.ends else ["smuggled", "last"]
    assert [status for status, *_ in found] == [*case.answers, *[404 for _ in behind]]
    named = [headers["X-Request-Id"] for _, headers, _ in found]
    assert [name for name in named if not re.fullmatch("[0-9a-f]{32}", name)] == behind
    *before, last = [headers.get("Connection") for _, headers, _ in found]
    assert last == "close" and before[1:] == [None] * len(before[1:])
    assert before[:1] == ["keep-alive" if b" HTTP/1.0" in case.data else None][: len(before)]
    for status, headers, body in found:
        page = status == 200 and body.startswith(b"<!doctype html>")
        assert headers["Content-Type"] == ("text/html; charset=utf-8" if page else "application/json")
        if status != 200:
            error = json.loads(body)
            assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
            assert (error["error"]["code"], error["error"]["param"]) == (str(status), None)
            assert error["error"]["type"] in ("invalid_request_error", "not_found_error", "authentication_error")


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_every_case_gets_its_answers_and_a_request_behind_it_is_answered_only_where_it_is_one(wire, case):
    judge(case, wire.connect(wire.secure).send(case.data + heads.NEXT + LAST))


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_every_case_gets_the_same_answers_piece_by_piece_and_a_refusal_waits_for_no_more(wire, case):
    client = wire.connect(wire.secure)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    step = 1 if len(case.data) <= SHORT else 1000
    for i in range(0, len(case.data), step):
        client.send(case.data[i : i + step])
    judge(case, client.send(b"" if isinstance(case.verdict, int) else heads.NEXT + LAST))


@pytest.mark.parametrize("case", [case for case in heads.CASES if case.verdict is None], ids=str)
def test_a_head_that_breaks_off_is_400_and_no_head_is_no_error(wire, case):
    client = wire.connect(wire.secure).send(case.data)
    client.say_no_more() if wire.secure else client.sock.shutdown(socket.SHUT_WR)
    assert [status for status, *_ in answers(client)] == [400 for _ in case.data[:1]]
