"""Connections: their deadlines, their number, their ends, and who may ask under which name."""

import errno
import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
from site_under_test import HEALTH, HELLO, Client, Reply

from phi3v import connection, server, tls
from phi3v.connection import MAX_HEAD, MAX_LINE
from phi3v.errors import SetupError


def waits_for(condition) -> bool:
    """Whether it becomes true within half a minute."""
    return any(condition() or time.sleep(0.01) for _ in range(3000))


def trickle(client: Client, data: bytes) -> None:
    """Send byte by byte until the server has had enough of it."""
    with suppress(OSError):
        for i in range(len(data)):
            client.send(data[i : i + 1])
            time.sleep(0.01)


@pytest.mark.parametrize("data", [b"", b"\x16", b"\x16\x03\x01\x02\0\x01\0\x01"], ids=repr)
def test_a_silent_handshake_has_a_deadline(site, monkeypatch, data):
    monkeypatch.setattr(connection, "HANDSHAKE", 0.05)
    client = site.connect(secure=False).send(data)
    assert client.sock.recv(1) == b""


def test_a_handshake_has_a_deadline_in_all(monkeypatch):
    clock, left = iter([0.0]), []
    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: next(clock, 3.0)))
    context = SimpleNamespace(wrap_socket=lambda raw, server_side: left.append(raw.gettimeout()))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        client.send(b"\x16")
        with listener.accept()[0] as raw:
            connection.Connection(raw, context)
    assert left == [connection.HANDSHAKE - 3]  # since three seconds passed before the first byte


def test_a_head_that_comes_byte_by_byte_is_cut_off_at_its_deadline_and_told_so(site, monkeypatch):
    monkeypatch.setattr(connection, "HEAD", 0.2)
    monkeypatch.setattr(connection, "LINGER", 0.1)
    client = site.connect()
    trickle(client, b"GET /health HTTP/1.1\r\nX: " + b"a" * 1000)
    assert client.reply().refusal(408) == "the head did not arrive within 0.2 s"
    assert " status=408 " in site.line()


def test_a_body_that_comes_byte_by_byte_is_cut_off_at_a_deadline_for_its_size(site, monkeypatch):
    monkeypatch.setattr(connection, "BODY", 0.1)
    monkeypatch.setattr(connection, "LINGER", 0.1)
    client = site.connect().send(site.http(b"", Content_Length="1000"))
    trickle(client, b"x" * 1000)
    assert "of 1,000 bytes arrived in time" in client.reply().refusal(408)
    client = site.connect().send(site.http(b"", Content_Length="1000000"))  # silent: nothing came, so no time was won
    assert client.reply().refusal(408) == "of the body 0 of 1,000,000 bytes arrived in time"
    monkeypatch.setattr(connection, "BODY_RATE", 1)  # 0.1 s, and one second more for each byte that came
    client = site.connect().send(site.http(b"", Content_Length=str(len(HELLO))) + HELLO[:15])
    time.sleep(0.15)
    assert client.send(HELLO[15:]).reply().status == 200


def test_records_without_data_that_keep_openssl_busy_end_a_second_after_the_deadline(site, monkeypatch):
    def stubborn(self, end):  # as SSL_read does under a flood of KeyUpdates: it does not come back to its time-out
        self.until = end
        self._socket.settimeout(30)
        return self._socket

    monkeypatch.setattr(connection, "HEAD", 0.1)
    monkeypatch.setattr(connection.Connection, "_until", stubborn)
    client, begun = site.connect(), time.monotonic()
    with suppress(OSError):
        assert client.sock.recv(1) == b""
    assert time.monotonic() - begun < 20


def test_who_says_nothing_is_let_go_without_a_word_after_a_while_and_later_between_requests(site, monkeypatch):
    monkeypatch.setattr(connection, "HEAD", 0.05)
    assert site.connect().ended()
    monkeypatch.setattr(connection, "HEAD", 30)
    monkeypatch.setattr(connection, "IDLE", 0.05)
    client = site.connect()
    time.sleep(0.1)  # before its first request it has HEAD
    assert client.send(HEALTH).reply().status == 200
    assert client.ended()


def test_bytes_that_come_one_by_one_or_split_anywhere_are_the_same_request(site):
    client, data = site.connect(), site.http(X_Request_Id="slow")
    for i in range(len(data)):
        client.send(data[i : i + 1])
    assert client.reply().headers["X-Request-Id"] == "slow"
    for at in range(1, len(data), 7):
        client.send(data[:at])
        client.send(data[at:])
        assert client.reply().status == 200


def test_who_does_not_read_its_answers_is_cut_off_and_its_generation_ends(site, monkeypatch):
    monkeypatch.setattr(connection, "WRITE", 0.1)
    monkeypatch.setattr(connection, "SEND_BUFFER", 65_536)
    monkeypatch.setattr(server, "KEEP_ALIVE", 0)
    site.llm.silent = 10**6  # comments without end, until nobody takes them
    body = json.dumps({"prompt": "ab", "stream": True}).encode()
    client = site.connect().send(site.http(body))
    assert client.reply(body=False).status == 200
    assert site.llm.left.wait(30) and " status=499 " in site.line()


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_a_client_that_leaves_cancels_what_runs_for_it(site, streamed, how):
    site.llm.gate.clear()
    body = json.dumps({"prompt": "ab", "stream": streamed}).encode()
    client = site.connect().send(site.http(body))
    assert site.llm.started.wait(30)
    if how == "half-close":
        client.sock.shutdown(socket.SHUT_WR)
    else:
        client.close(reset=how == "reset")
    assert site.llm.left.wait(30) and " status=499 " in site.line()


@pytest.mark.parametrize("streamed", [True, False])
def test_deleting_a_key_ends_what_runs_for_it_and_says_so(site, monkeypatch, streamed):
    monkeypatch.setattr(server, "KEEP_ALIVE", 60)
    site.llm.gate.clear()
    client = site.connect().send(site.http(json.dumps({"prompt": "ab", "stream": streamed}).encode()))
    assert site.llm.started.wait(30)
    site.keys.delete(site.key.id)
    told = client.file.read(200) if not streamed else b""
    while b'"code":"403"' not in told:
        told += client.file.read(200)
    assert b"the API key was deleted" in told
    assert site.llm.left.wait(30) and " status=403 " in site.line()


def test_both_addresses_of_localhost_are_served_on_one_port(pair, site):
    both = server.Server([("127.0.0.1", 0), ("::1", 0)], tls.server_context(*pair), site.llm, site.keys)
    thread = threading.Thread(target=both.serve_forever, args=(0.01,))
    thread.start()
    try:
        for host in ("127.0.0.1", "::1"):
            sock = socket.create_connection((host, both.server_address[1]), timeout=30)
            with site.trust.wrap_socket(sock, server_hostname=host) as client:
                name = f"[{host}]" if ":" in host else host
                client.sendall(f"GET /health HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    finally:
        both.stop()
        thread.join(30)


def test_a_port_that_another_program_has_on_one_of_the_addresses_is_not_shared_with_it(pair, site):
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with pytest.raises(SetupError, match=f"cannot listen on ::1 port {port}: Address already in use"):
            server.Server([("127.0.0.1", port), ("::1", port)], tls.server_context(*pair), site.llm, site.keys)
    with socket.create_server(("127.0.0.1", port)):
        pass  # the first one was let go of


def test_one_connection_too_many_is_turned_away_and_the_others_do_not_notice(site):
    site.server.max_connections = 3
    clients = [site.connect() for _ in range(3)]
    for _ in range(2):
        with pytest.raises(OSError):
            site.connect()
    assert site.line() == "all 3 connections are taken, others are turned away"  # and once is enough for a while
    assert b"phi3v_turned_away_total 2" in site.server.metrics.render({})
    assert [client.send(HEALTH).reply().status for client in clients] == [200] * 3
    clients[0].close()
    assert waits_for(lambda: len(site.server.handlers) == 2)
    assert site.connect().send(HEALTH).reply().status == 200


def test_without_descriptors_the_server_waits_instead_of_spinning_and_recovers(site, monkeypatch):
    tries, breaths, select = [], [], site.server._selector.select

    class Full:
        def accept(self):
            tries.append(1)
            raise OSError(errno.EMFILE, "Too many open files")

    full = type("Key", (), {"fileobj": Full()})
    monkeypatch.setattr(server.time, "sleep", breaths.append)
    monkeypatch.setattr(site.server._selector, "select", lambda timeout: [(full, 1)])
    sock = socket.create_connection(("127.0.0.1", site.port), timeout=30)
    assert any(len(tries) >= 3 or select(0.01) is None for _ in range(3000))
    monkeypatch.setattr(site.server._selector, "select", select)
    assert breaths[:3] == [server.BREATH] * 3
    with site.trust.wrap_socket(sock, server_hostname="localhost") as client:
        client.sendall(HEALTH)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_stop_ends_idle_connections_in_order_and_at_once(site):
    clients = [site.connect() for _ in range(3)]
    assert [client.send(HEALTH).reply().status for client in clients[:2]] == [200, 200]  # the third said nothing yet
    assert waits_for(lambda: sum(map(bool, site.server.handlers.values())) == 3)
    began = time.monotonic()
    site.server.stop()
    assert [client.sock.recv(1) for client in clients] == [b""] * 3  # close_notify, and no alert
    assert all(client.ended() for client in clients)
    assert time.monotonic() - began < server.STOP_SECONDS


def test_stop_ends_a_stream_that_had_begun_and_its_connection(site):
    site.llm.gate.clear()
    client = site.connect().send(site.http(b'{"prompt": "ab", "stream": true}'))
    assert client.reply(body=False).headers["Connection"] is None  # it was to go on
    stopping = threading.Thread(target=site.server.stop)
    stopping.start()
    assert waits_for(lambda: site.server.stopping)
    site.llm.gate.set()
    data = b""
    while not data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        data += client.file.read(200)
    assert client.ended()
    stopping.join(server.STOP_SECONDS / 2)
    assert not stopping.is_alive() and not site.server.handlers


NAMES = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1"]


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_this_machine_and_the_address_that_was_reached_are_answered(site, name):
    assert site.post(Host=name).status == 200
    assert site.post(Host="evil.example", request=f"POST https://{name}/v1/completions").status == 200  # RFC 9112 3.2.2


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.2", "[::1]", "localhost."])
def test_another_name_is_421_before_anything_else_is_looked_at(site, name):
    message = site.post(Host=name, request="GET /nowhere", X_API_Key=None).refusal(421)
    assert message.startswith(f"this server is not known as '{name.strip('[]')}'")
    site.post(request=f"POST https://{name}/v1/completions").refusal(421)


def test_only_a_real_name_is_remembered_by_browsers_as_https(site):
    site.server.hosts = {"localhost", "vision.example.com", "mac.local", "192.168.1.5", "::1"}
    for name in ("localhost", "mac.local", "192.168.1.5", "[::1]", "127.0.0.1"):
        assert site.post(Host=name).headers["Strict-Transport-Security"] is None
    assert site.post(Host="vision.example.com").headers["Strict-Transport-Security"] == "max-age=31536000"
    assert site.post(Host="other.example.com").headers["Strict-Transport-Security"] is None  # a 421


def test_pages_of_other_origins_read_nothing_unless_they_are_allowed_to(site):
    def cors(reply: Reply) -> dict:
        return {name: value for name, value in reply.headers.items() if name.startswith("Access-Control-")}

    ask = {"Origin": "https://a.example", "Access_Control_Request_Method": "POST"}
    assert cors(site.post(**ask)) == {}
    assert site.post(b"", "OPTIONS /v1/completions", X_API_Key=None, **ask).status == 405
    site.server.origins = ["https://a.example"]
    reply = site.post(b"", "OPTIONS /v1/completions", X_API_Key=None, **ask)
    assert (reply.status, reply.headers["Content-Length"], reply.headers["Content-Type"]) == (204, None, None)
    assert cors(reply)["Access-Control-Allow-Origin"] == "https://a.example"
    assert "X-API-Key" in cors(reply)["Access-Control-Allow-Headers"]
    for reply in (site.post(**ask), site.post(X_API_Key="wrong", **ask)):
        assert (reply.headers["Access-Control-Allow-Origin"], reply.headers["Vary"]) == ("https://a.example", "Origin")
    assert cors(site.post(Origin="https://b.example")) == {}


def test_a_new_certificate_is_for_new_connections_and_the_old_ones_go_on(site, tmp_path):
    old = site.connect()
    assert old.send(HEALTH).reply().status == 200
    certfile, keyfile = tmp_path / "new.crt", tmp_path / "new.key"
    tls.ensure_certificate(certfile, keyfile)
    site.server.context = tls.server_context(certfile, keyfile)
    with pytest.raises(ssl.SSLCertVerificationError):
        site.connect()
    site.trust = ssl.create_default_context(cafile=certfile)
    assert [client.send(HEALTH).reply().status for client in (site.connect(), old)] == [200, 200]


def test_an_http_1_0_client_keeps_its_connection_if_it_asks_to(site):
    client = site.connect()
    for _ in range(2):
        reply = client.send(b"GET /health HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").reply()
        assert (reply.status, reply.headers["Connection"]) == (200, "keep-alive")
    assert client.send(b"GET /health HTTP/1.0\r\n\r\n").reply().headers["Connection"] == "close"
    assert client.ended()


def test_the_plain_answer_to_plain_http_has_an_id_too(site):
    plain = HTTPConnection("127.0.0.1", site.port, timeout=30)
    plain.request("GET", "/health")
    with plain.getresponse() as reply:
        assert (reply.status, len(reply.headers["X-Request-Id"])) == (400, 32)
    plain.close()


def test_who_looks_for_the_limits_of_a_head_finds_them(site):
    line = f"GET /{'a' * (MAX_LINE - len('GET / HTTP/1.1'))} HTTP/1.1\r\nHost: localhost\r\n"
    for data, status in (
        (f"{line}\r\n", 404),
        (line.replace("/a", "/aa") + "\r\n", 414),
        (f"GET /health HTTP/1.1\r\nHost: localhost\r\n{'A: b\r\n' * 63}\r\n", 200),
        (f"GET /health HTTP/1.1\r\nHost: localhost\r\n{'A: b\r\n' * 64}\r\n", 431),
        (f"GET /health HTTP/1.1\r\nHost: localhost\r\nA: {'b' * (MAX_HEAD - 46)}\r\n\r\n", 200),
        (f"GET /health HTTP/1.1\r\nHost: localhost\r\nA: {'b' * (MAX_HEAD - 45)}\r\n\r\n", 431),
        ("GET /" + "a" * MAX_HEAD, 414),
    ):
        assert site.connect().send(data.encode()).reply().status == status, data[:60]
