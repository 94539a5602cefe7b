"""The server: every answer, refusal, line of the log and order of checks, as a client meets them over TLS."""

import base64
import gc
import hashlib
import json
import re
import subprocess
import threading
from datetime import datetime
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path

import pytest
from site_under_test import HEALTH, HELLO, Client, Reply

from phi3v import connection, server
from phi3v.errors import RequestError, Unavailable
from phi3v.request import Request, SamplingParams, question

MANY = HEALTH * 30_000  # over 1 MB


def test_the_documented_request_gets_the_documented_answer_and_nothing_says_what_runs_here(site):
    reply = site.post(b'{"prompt": "Hello!", "max_tokens": 512}', X_Request_Id="r-1")
    body, headers = json.loads(reply.body), dict(reply.headers)
    assert (body["model"], body["responses"]) == ("phi-3-vision", ["!olleH"])
    assert datetime.fromisoformat(body["timestamp"]).utcoffset().total_seconds() == 0
    assert (body["choices"][0]["text"], body["usage"]["total_tokens"]) == ("!olleH", 8)
    assert body["system_fingerprint"] == "fake-1"
    assert site.llm.requests == [Request([question("Hello!", [])], SamplingParams(max_tokens=512))]
    assert re.fullmatch(r"\w{3}, \d\d \w{3} 20\d\d \d\d:\d\d:\d\d GMT", headers.pop("Date"))
    assert headers.pop("Content-Length") == str(len(reply.body))
    expected = {"Content-Type": "application/json", "X-Request-Id": "r-1", "Cache-Control": "no-store"}
    rate = {"X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "999", "X-RateLimit-Reset": "60"}
    assert headers == expected | rate  # and no Server


def test_several_prompts_are_answered_in_their_order_and_count_as_one_request(site):
    reply = site.post('{"prompt": ["ab", "日本", "ef", "ab"]}'.encode(), Content_Type="application/json; charset=utf-8")
    body = json.loads(reply.body)
    assert body["responses"] == ["ba", "本日", "fe", "ba"] == [choice["text"] for choice in body["choices"]]
    assert (body["usage"]["total_tokens"], reply.headers["X-RateLimit-Remaining"]) == (16, "999")


BAD = [(raw, None) for raw in (b"prompt=a", b"\xff{}", b"[" * 100_000, b'{"prompt": NaN}', b"[]")]
BAD += [(raw, "prompt") for raw in (b"{}", b'{"prompt": 5}', b'{"prompt": []}', b'{"prompt": "a\\ud800"}')]
BAD += [(b'{"prompt": "a", "max_tokens": %s}' % value, "max_tokens") for value in (b"0", b"1025", b'"5"', b"true")]
BAD += [(b'{"prompt": "a", "images": ["\\ud800://a"]}', "images[0]")]


@pytest.mark.parametrize(("body", "param"), BAD, ids=lambda value: repr(value)[:50])
def test_a_bad_body_is_400_and_the_connection_stays_usable(site, body, param):
    client = site.connect()
    client.send(site.http(body)).reply().refusal(400, param)
    assert client.send(site.http()).reply().status == 200
    assert len(site.llm.requests) == 1


TWICE, BOTH = "the head has more than one Content-Length", "Transfer-Encoding goes neither with Content-Length nor with"
NO_LENGTH = "the Content-Length is not one decimal number of at most 15 digits"
LENGTHS = ["", "\xb2", *"-1 +41 0x5 4_1 1".split()]
LENGTHS[-1] *= 16
CHUNKED = {"Transfer_Encoding": "chunked", "Content_Length": None}
UNKNOWN = "the API key is unknown, expired or deleted; `phi3v list` shows the keys there are"
MISSING = "the API key is missing: send it as X-API-Key: KEY or Authorization: Bearer KEY"
MISSING += "; `phi3v create` makes one"
LARGE = "the body has 1,230,000 bytes, at most 1,048,576 are allowed; /v1/chat/completions takes 20,971,520"
TYPES = [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"]
REFUSED = [
    *((400, NO_LENGTH, {"Content_Length": length}) for length in LENGTHS),
    *((400, TWICE, {"Content_Length": length}) for length in ("0\r\nContent-Length: 5", "41\r\nContent-Length: 41")),
    (400, "is not NAME: VALUE, on one line", {"Content_Length": "4\r\n 1"}),
    (400, BOTH, CHUNKED | {"Content_Length": "5", "body": b"0\r\n\r\n" + HEALTH}),
    (401, MISSING, {"X_API_Key": None}),
    (401, MISSING, {"X_API_Key": "", "Authorization": "Basic abc"}),
    (401, MISSING, {"X_API_Key": None, "Authorization": "Bearer"}),
    (403, UNKNOWN, {"X_API_Key": "wrong"}),
    (403, UNKNOWN, {"X_API_Key": "\xff"}),
    *((404, f"there is no {path!r}; the routes are", {"request": f"POST {path}?a"}) for path in ("//", "/../health")),
    *((404, "the routes are", {"request": f"POST {path}"}) for path in ("/v1/completions/", "/v1/complet%69ons")),
    *(
        (405, "takes POST", {"request": f"{m} /v1/completions"})
        for m in "GET PUT PATCH DELETE OPTIONS TRACE QUERY".split()
    ),
    (405, "/health takes GET, not POST", {"request": "POST /health"}),
    (411, "chunked bodies are not taken", CHUNKED | {"body": b"0\r\n\r\n" + HEALTH}),
    (411, "the request needs a Content-Length", {"Content_Length": None}),
    (413, LARGE, {"body": MANY}),
    (413, LARGE, {"body": MANY, "X_API_Key": None}),
    *((415, "the Content-Type must be application/json", {"Content_Type": kind}) for kind in TYPES),
    (429, "this key's 1 requests per minute are used up; try again in 60 s", {}),
    (501, "there is no method 'BREW'", {"request": "BREW /v1/completions"}),
]


@pytest.mark.parametrize(("status", "message", "change"), REFUSED, ids=lambda value: repr(value)[:50])
def test_a_refusal_says_why_and_its_body_is_never_taken_for_the_next_request(site, status, message, change):
    if status == 429:
        site.keys.update(site.key.id, rate_limit=1)
        assert site.post().status == 200
    client = site.connect().send(site.http(**{"body": HEALTH} | change))
    reply = client.reply()
    assert message in reply.refusal(status)
    assert reply.headers["Allow"] == {405: "POST" if "POST" in message[:11] else "GET"}.get(status)
    assert (reply.headers["Connection"], client.ended(), site.llm.requests[1:]) == ("close", True, [])


@pytest.mark.parametrize("change", [{}, CHUNKED], ids=repr)
def test_a_body_that_nobody_wants_is_not_read_as_a_request_either(site, change):
    client = site.connect().send(site.http(HEALTH, "GET /health", **change))
    assert (client.reply().status, client.ended()) == (200, True)


@pytest.mark.parametrize(("status", "change"), [(413, {}), (411, CHUNKED), (400, {"request": "POST / /"})], ids=repr)
def test_a_client_that_first_sends_3_mb_can_read_why_they_are_refused(site, status, change):
    client = site.connect().send(site.http(b"2dc6c0\r\n" + b"x" * 3_000_000, **{"X_API_Key": site.secret} | change))
    client.reply().refusal(status)
    assert client.ended()


def test_a_body_of_exactly_1_mb_is_taken_and_one_byte_more_is_413(site):
    body = HELLO.ljust(1024 * 1024)
    assert (site.post(body).status, site.post(body + b" ").status) == (200, 413)


def test_the_checks_come_in_the_documented_order(site):
    site.keys.update(site.key.id, rate_limit=1)
    assert site.post(b"{}").status == 400  # counted, whatever follows
    wrong = {"request": "GET /nowhere", "body": b"{}", "Content_Length": "-5", "X_API_Key": None, "Content_Type": None}
    for status, mended in (
        (400, {}),
        (404, {"Content_Length": "2000000"}),
        (405, {"request": "GET /v1/completions"}),
        (413, {"request": "POST /v1/completions"}),
        (401, {"Content_Length": None}),
        (403, {"X_API_Key": "wrong"}),
        (415, {"X_API_Key": site.secret}),
        (411, {"Content_Type": "application/json"}),
        (429, {"Content_Length": "2"}),
    ):
        wrong |= mended
        site.post(**wrong).refusal(status)


def test_without_a_key_every_route_but_the_page_and_health_is_401(site):
    assert {"/", "/health", "/v1/completions"} <= server.ROUTES.keys()
    for path, (method, _) in server.ROUTES.items():
        target = f"{path}?key={site.secret}".replace("{id}", "phi-3-vision")
        reply = site.post(request=f"{method} {target}", X_API_Key=None)
        assert (reply.status, path) == (200 if path in ("/", "/health") else 401, path)
        assert not {name for name in reply.headers if name.startswith("X-RateLimit")}


def test_a_key_ends_when_it_expires_or_is_deleted_and_x_api_key_wins_over_bearer(site, clock):
    brief, deleted = (site.keys.create(name, expires=clock() + end) for name, end in (("brief", 10), ("deleted", 99)))
    bearer = {"X_API_Key": None, "Authorization": f"bEaReR {site.secret}"}
    assert [site.post(**h).status for h in ({"X_API_Key": brief[1]}, {"X_API_Key": deleted[1]}, bearer)] == [200] * 3
    site.keys.delete(deleted[0].id)
    clock.now += 10
    for secret in (brief[1], deleted[1], site.secret[:-1]):
        assert site.post(X_API_Key=secret, Authorization=f"Bearer {site.secret}").refusal(403) == UNKNOWN


def test_the_rate_limit_is_429_until_exactly_retry_after_has_passed(site, clock):
    site.keys.update(site.key.id, rate_limit=2)

    def ask(step: float) -> tuple:
        clock.now += step
        reply = site.post()
        names = ("Retry-After", "X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset")
        return reply.status, *(reply.headers[name] for name in names)

    assert ask(0) == (200, None, "2", "1", "60")
    assert ask(10.5) == (200, None, "2", "0", "50")
    assert ask(9.75) == (429, "40", "2", "0", "40")
    assert ask(39) == (429, "1", "2", "0", "1")
    assert ask(1) == (200, None, "2", "0", "11")
    site.keys.update(site.key.id, rate_limit=3)  # in force at once
    assert ask(0) == (200, None, "3", "0", "11")


def test_a_refusal_before_the_window_tells_what_is_left_and_does_not_count(site):
    for change in ({"Content_Type": None}, {"Content_Length": None}):
        assert site.post(**change).headers["X-RateLimit-Remaining"] == "1000"
    assert site.post().headers["X-RateLimit-Remaining"] == "999"


def test_what_the_model_refuses_keeps_its_status_field_and_headers(site):
    site.llm.refuses = RequestError("images[0]: no picture", "images[0]")
    assert site.post().refusal(400, "images[0]") == "images[0]: no picture"
    site.llm.refuses = Unavailable("the model is loading")
    reply = site.post()
    assert reply.refusal(503) == "the model is loading; try again in 5 s"
    assert (reply.headers["Retry-After"], reply.headers["X-RateLimit-Remaining"]) == ("5", "998")


def test_a_broken_generation_is_a_500_that_tells_nothing_and_the_next_request_works(site):
    client, site.llm.breaks = site.connect(), RuntimeError("detail in /home/me at 0x7f00")
    message = client.send(site.http(X_Request_Id="r-5")).reply().refusal(500)
    assert message == "internal error; the server's log has it under request r-5"
    assert site.line().startswith("request r-5 failed\nTraceback")
    assert " status=500 " in site.line() and site.llm.left.is_set()
    site.llm.breaks = None
    assert client.send(site.http()).reply().status == 200


def test_a_refusal_keeps_nothing_of_the_request_in_memory(site):
    gc.collect()
    known = [e for e in gc.get_objects() if isinstance(e, RequestError)]  # other tests' parameters
    gc.disable()  # or it would sooner or later find what keeps itself
    try:
        site.llm.refuses = None
        for data in (site.http(b"{}"), site.http(b'{"prompt": 5, "stream": true}'), b"NONSENSE\r\n\r\n"):
            site.connect().send(data).reply().refusal(400, None if data[:3] == b"NON" else "prompt")
            site.line()
        site.llm.breaks = Unavailable("the model is draining")
        streamed(site.connect().send(site.http(chat(stream=True), CHAT)))
        site.line()
        site.llm.breaks = None
        site.post()  # whose thread comes after theirs have gone on
        assert [e for e in gc.get_objects() if isinstance(e, RequestError) and e not in known] == []
    finally:
        gc.enable()


def test_what_is_kept_belongs_to_the_key_that_asked(site):
    site.post()
    assert site.llm.owner == site.keys.list()[0].id


def test_health_of_a_model_that_was_freed_for_the_time_being_is_good(site):
    site.llm.status = "idle"
    assert site.post(b"", "GET /health", X_API_Key=None).body == b'{"status":"idle"}'


@pytest.mark.parametrize("status", ["loading", "draining", "failed"])
def test_health_is_503_unless_the_model_answers(site, status):
    assert site.post(b"", "GET /health", X_API_Key=None).body == b'{"status":"ok"}'
    site.llm.status = status
    reply = site.post(b"", "GET /health", X_API_Key=None)
    assert (reply.status, json.loads(reply.body), reply.headers["Retry-After"]) == (503, {"status": status}, "5")


def test_requests_may_follow_each_other_on_one_connection_also_at_once(site):
    connection = HTTPSConnection("localhost", site.port, timeout=30, context=site.trust)
    connection.connect()
    used = connection.sock
    for path, status in (("/health", 200), ("/nowhere", 404), ("/health?a=b", 200), ("/v1/completions", 405)):
        connection.request("GET", path)
        reply = connection.getresponse()
        assert (reply.status, len(reply.read()) > 10, connection.sock) == (status, True, used)
    connection.close()
    client = site.connect().send(HEALTH + site.http() + site.http(b"{}") + site.http(b"", Content_Length="0") + HEALTH)
    assert [client.reply().status for _ in range(5)] == [200, 200, 400, 400, 200]
    assert client.send(site.http(Connection="close")).reply().headers["Connection"] == "close"
    assert client.ended()


def test_head_is_answered_without_a_body(site):
    client = site.connect().send(site.http(b"", "HEAD /health") + site.http(b"", "HEAD /v1/completions") + HEALTH)
    assert [client.reply(body=False).status for _ in range(2)] == [200, 405]
    assert client.reply().body == b'{"status":"ok"}'


def test_expect_100_continue_is_answered_only_after_key_and_size_were_checked(site):
    client = site.connect().send(site.http(Expect="100-Continue")[: -len(HELLO)])
    assert (client.reply().status, client.send(HELLO).reply().status) == (100, 200)
    wrong = {401: {"X_API_Key": None}, 413: {"Content_Length": "1048577"}, 415: {"Content_Type": None}}
    for status, change in wrong.items():
        client = site.connect().send(site.http(**{"Expect": "100-continue"} | change)[: -len(HELLO)])
        assert (client.reply().status, client.ended()) == (status, True)


def test_a_client_of_http_1_0_is_not_told_to_continue(site):
    data = site.http(Expect="100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")  # RFC 9110 10.1.1
    client = site.connect().send(data)
    assert (client.reply().status, client.ended()) == (200, True)


def test_a_request_id_is_echoed_if_it_is_sane_and_replaced_if_not(site):
    for given in ("abc-123", "x" * 128, '!"#=~'):
        assert site.post(b"", "GET /nowhere", X_Request_Id=given).headers["X-Request-Id"] == given
        assert site.line().startswith(f"request={given} ")
    for given in (None, "", "x" * 129, "a b", "a\tb", "\xe4", "a\x1b[2J", "a\r\n b"):
        made = [site.post(X_Request_Id=given).headers["X-Request-Id"] for _ in range(2)]
        assert re.fullmatch("[0-9a-f]{32},[0-9a-f]{32}", ",".join(made)) and made[0] != made[1]
        assert {site.line().split()[0], site.line().split()[0]} == {f"request={name}" for name in made}


def test_a_truncated_body_is_400_and_a_slow_one_408(site, monkeypatch):
    client = site.connect().send(site.http(Content_Length="100")).say_no_more()
    assert client.reply().refusal(400) == "the body ended after 19 of 100 bytes"
    monkeypatch.setattr(connection, "BODY", 0.01)
    client = site.connect().send(site.http(Content_Length="100"))
    assert client.reply().refusal(408) == "of the body 19 of 100 bytes arrived in time"
    assert (client.ended(), site.llm.requests) == (True, [])


def test_plain_http_gets_a_readable_400(site):
    connection = HTTPConnection("127.0.0.1", site.port, timeout=30)
    connection.request("POST", "/v1/completions", HELLO, {"X-API-Key": site.secret})
    with connection.getresponse() as reply:
        message = Reply(reply.status, reply.headers, reply.read()).refusal(400)
    connection.close()
    assert message == "this port speaks HTTPS: use https://"
    assert ' path="" status=400 ' in site.line()


def test_silent_and_babbling_clients_hold_up_nobody_and_are_no_error_of_ours(site):
    for data in (b"", b"\x16", b"\x16\x03\x01\x02\0\x01", b"\x16\x03\x01\0\x05hello" * 9, b"\x80.\x01", b"\0" * 99):
        site.connect(secure=False).send(data)
    for data in (b"", b"POST /v1/comp", site.http()[:-1]):
        site.connect().send(data)
    for secure in (False, True):
        site.connect(secure).close(reset=True)
    assert site.post().status == 200


@pytest.mark.parametrize("generating", [True, False])
def test_a_client_that_disappears_leaves_nothing_running_and_is_no_error_of_ours(site, monkeypatch, generating):
    taken, gone, take = threading.Event(), threading.Event(), site.keys.take
    monkeypatch.setattr(site.keys, "take", lambda key, count: (taken.set(), gone.wait(30), take(key, count))[2])
    if generating:
        site.llm.gate.clear()
        gone.set()
        client, waiting = site.connect().send(site.http()), site.llm.started
    else:  # before it was told to send its body
        client, waiting = site.connect().send(site.http(Expect="100-continue")[: -len(HELLO)]), taken
    assert waiting.wait(30)
    client.close(reset=True)
    gone.set()
    line = site.line()  # while the gate is closed: nobody waits for its next token
    site.llm.gate.set()
    assert f" key={site.key.id} " in line and " status=499 " in line
    assert site.llm.left.is_set() == generating
    assert site.post().status == 200


def test_stop_answers_the_running_request_and_then_returns(site, monkeypatch):
    site.llm.gate.clear()
    client = site.connect().send(site.http())
    assert site.llm.started.wait(30)
    closed, close = threading.Event(), site.server.server_close
    monkeypatch.setattr(site.server, "server_close", lambda: (close(), closed.set()))
    stopping = threading.Thread(target=site.server.stop)
    stopping.start()
    assert closed.wait(30)
    with pytest.raises(ConnectionRefusedError):
        site.connect()
    assert stopping.is_alive()
    site.llm.gate.set()
    assert client.reply().status == 200
    stopping.join(30)
    assert not stopping.is_alive()


def test_usage_is_counted_for_what_passed_the_window_and_for_nothing_else(site, clock):
    clock.now += 5
    assert (site.post(b'{"prompt": ["abc", "de"]}').status, site.post(b"{}").status) == (200, 400)
    for change in ({"X_API_Key": "no"}, {"Content_Type": None}, {"request": "GET /health"}, {"request": "GET /"}):
        site.post(**change)
    key = site.keys.find(site.key.id)
    assert (key.requests, key.prompt_tokens, key.completion_tokens, key.last_used) == (2, 5, 4, clock())


def test_every_request_has_one_line_with_its_facts(site):
    key, rest = f" key={site.key.id}", 'method=POST path="/v1/completions"'
    tokens = r" first_ms=\d+ prompt_tokens=5 completion_tokens=4 cached_tokens=0"
    site.post(b'{"prompt": ["abc", "de"]}', "POST /v1/completions?a=b&key=c", X_Request_Id="r-1")
    assert re.fullmatch(rf"request=r-1 client=127.0.0.1{key} {rest} status=200 ms=\d+{tokens}", site.line())
    site.post(b"{}", X_Request_Id="r-2")
    assert re.fullmatch(rf"request=r-2 client=127.0.0.1{key} {rest} status=400 ms=\d+", site.line())
    site.post(X_Request_Id="r-3", X_API_Key="wrong")
    assert re.fullmatch(rf"request=r-3 client=127.0.0.1 {rest} status=403 ms=\d+", site.line())


def test_nothing_of_a_request_is_left_when_the_next_head_is_unreadable(site):
    client = site.connect().send(site.http(b"", "GET /health", X_Request_Id="first"))
    assert client.reply().headers["X-Request-Id"] == "first"
    reply = client.send(b"NONSENSE\r\n\r\n").reply()
    message = "line 1 of the head is not METHOD TARGET HTTP/1.1 with one space between, in plain characters"
    assert (reply.refusal(400), client.ended()) == (message + " and ended by CRLF", True)
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["X-Request-Id"])
    assert site.line().startswith("request=first ")
    assert re.fullmatch(r'request=[0-9a-f]{32} client=127.0.0.1 path="" status=400 ms=\d+', site.line())


def test_no_request_forges_a_line_or_steers_a_terminal(site):
    for request, shown in (
        ("GET /a[2Jb", 'method=GET path="/a[2Jb" status=404'),
        ("GET /" + "a" * 300, f'method=GET path="/{"a" * 199}" status=404'),
        ("GET /a\rstatus=200", 'path="" status=400'),
        ("GET /a\x85status=200", 'path="" status=400'),
        ("GET /a\x1b[2Jb\0\x7f\xff", 'path="" status=400'),
        ('GET /"status=200', 'path="" status=400'),
        ("G\x1b[2JT /health", 'path="" status=400'),
        ("GET" * 99 + " /health", 'path="/health" status=501'),
    ):
        client = site.connect().send(site.http(b"", request))
        assert client.reply().status >= 400
        line = site.line()
        assert re.fullmatch("[ -~]+", line) and f" client=127.0.0.1 {shown} ms=" in line


def test_neither_key_nor_prompt_nor_answer_is_ever_logged(site):
    word = "CANARY" + site.secret
    good = json.dumps({"prompt": word}).encode()
    odd = ["Content_Length", "Content_Type", "Transfer_Encoding", "Host", "X_API_Key", "Authorization", "Expect", word]
    for data in (
        site.http(good, f"POST /v1/completions?key={word}"),
        site.http(good[:-1]),
        site.http(json.dumps({word: word, "prompt": {word: word}}).encode()),
        site.http(json.dumps({"prompt": "a", "images": [word], "max_tokens": word}).encode()),
        *(site.http(good, **{name: word}) for name in odd),
        *(site.http(good, request) for request in (f"{word} /health", f"GET /health {word}")),
        *(f"{line}\r\n\r\n".encode() for line in (f"X-API-Key: {word}", word, f"GET /health {word}")),
        site.http(good, **{f"{word}\r\n{word}": word}),
        site.http(good, Many="a\r\nX-Key: " + f"{word}\r\nX-Key: " * 200),
        word.encode() * 2000,
    ):
        assert site.connect().send(data).reply().status
    site.connect().send(site.http(good, Content_Length="999")).say_no_more().reply().refusal(400)
    site.connect(secure=False).send(site.http(good)).file.read()
    site.llm.refuses = RequestError(f"you said {word}", word)
    site.post(good)
    text = "\n".join(record.getMessage() for record in site.close())
    assert text.count(" status=") == 23
    assert not re.search(f"canary|yranac|{site.secret[6:]}|{site.secret[:5:-1]}", text, re.IGNORECASE)


def test_curl_gets_an_answer_as_documented_and_reads_refusals(site, pair, tmp_path):
    large = tmp_path / "large.json"
    large.write_bytes(HELLO.ljust(3_000_000))
    common = ["curl", "-sS", "--noproxy", "*", "-w", "\n%{http_code}", "-H", "Content-Type: application/json"]
    common += [f"https://localhost:{site.port}/v1/completions"]

    def curl(*arguments: str) -> tuple[int, dict]:
        done = subprocess.run([*common, *arguments], capture_output=True, text=True, timeout=60, check=True)
        body, status = done.stdout.rsplit("\n", 1)
        return int(status), json.loads(body)

    key, upload = ["-H", f"X-API-Key: {site.secret}"], ["--data-binary", f"@{large}"]
    prompt = ["-d", '{"prompt": "Hello, world!", "max_tokens": 512}']
    for trust in (["--cacert", str(pair[0])], ["-k"]):
        status, body = curl(*trust, *key, *prompt)
        assert (status, body["model"], body["responses"]) == (200, "phi-3-vision", ["!dlrow ,olleH"])
    assert curl("-k", *prompt)[0] == 401
    assert curl("-k", *key, *upload)[0] == curl("-k", *key, *upload, "-H", "Expect:")[0] == 413
    assert curl("-k", *key, *prompt, "-H", "Transfer-Encoding: chunked")[0] == 411


def test_a_request_for_which_there_is_no_memory_is_503(site):
    site.llm.refuses = MemoryError("of 12345678 bytes")
    assert site.post().refusal(503) == "there is not enough memory for this request now; try again in 5 s"


def test_the_page_is_for_everybody_and_runs_only_its_own_script_and_style(site):
    page = (Path(server.__file__).parent / "chat.html").read_bytes()
    reply = site.post(b"", "GET /?a=b", X_API_Key=None)
    headers = dict(reply.headers)
    assert (reply.status, reply.body) == (200, page)
    hashes = {}
    for tag in (b"script", b"style"):
        (inside,) = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside).digest()).decode()
    assert {headers.pop(name) for name in ("Date", "X-Request-Id")}
    assert headers == {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Length": str(len(page)),
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; "
        f"style-src 'sha256-{hashes[b'style']}'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    head = site.connect().send(site.http(b"", "HEAD /", X_API_Key=None)).reply(body=False)
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(page)))
    assert "/ takes GET, not POST" in site.post(request="POST /").refusal(405)


def test_the_page_is_small_and_asks_nobody_else_for_anything():
    text = (Path(server.__file__).parent / "chat.html").read_text()
    assert len(text.splitlines()) <= 250 and len(text.encode()) <= 40_000
    assert max(map(len, text.splitlines())) <= 120
    assert not re.search(r"//\w|\bimport\b|url\(|@import|XMLHttpRequest|WebSocket|sendBeacon|localStorage", text)
    assert set(re.findall(r"\b(?:src|href|action)=\"?(\w+)", text)) == {"data"}  # the icon's
    fetched = re.findall(r"(?:fetch|request)\('?([\w/]+)", text)
    assert set(fetched) - {"path"} == {"/v1/models", "/v1/chat/completions"}
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|eval|Function\(| style=| on\w+=\"", text
    )


def test_a_key_that_was_put_into_the_path_is_not_logged(site):
    site.post(request=f"GET /{site.secret}", body=b"").refusal(404)
    assert 'path="/phi3v_…"' in site.line()


def chat(text: str = "Hello", **more) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}]} | more).encode()


CHAT = "POST /v1/chat/completions"


def streamed(client: Client) -> tuple[Reply, list[bytes]]:
    """The head of a reply in chunks, and the chunks."""
    reply, chunks = client.reply(body=False), []
    while size := int(client.file.readline(), 16):
        chunks.append(client.file.read(size))
        assert client.file.readline() == b"\r\n"
    assert client.file.readline() == b"\r\n"
    return reply, chunks


def test_a_chat_is_answered_in_the_shape_of_its_route(site):
    reply = site.post(chat("abc", max_tokens=5000, temperature=0.5), CHAT)
    body = json.loads(reply.body)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "cba", "refusal": None}
    assert (body["object"], body["usage"]["total_tokens"], reply.headers["X-RateLimit-Remaining"]) == (
        "chat.completion",
        5,
        "999",
    )
    (request,) = site.llm.requests
    assert (request.params.max_tokens, request.params.temperature, request.clamp) == (1024, 0.5, True)
    assert (site.llm.owner, site.llm.patience) == (site.key.id, 0.05)


def test_a_stream_comes_event_by_event_and_the_connection_stays_usable(site, monkeypatch):
    monkeypatch.setattr(server, "KEEP_ALIVE", 0)
    client = site.connect()
    for _ in range(2):
        site.llm.silent = 2
        head, chunks = streamed(client.send(site.http(chat("abc", stream=True), CHAT, X_Request_Id="s-1")))
        assert (head.status, head.headers["X-Request-Id"]) == (200, "s-1")
        names = ("Content-Type", "Cache-Control", "X-Accel-Buffering", "Content-Length", "Connection")
        assert [head.headers[name] for name in names] == ["text/event-stream", "no-cache", "no", None, None]
        assert head.headers["X-RateLimit-Limit"] == "1000"
        kinds = [chunk[:6] for chunk in chunks]  # opened, silent twice, two texts, an end
        assert kinds == [b": keep", b"data: ", b": keep", b": keep", *[b"data: "] * 4]
        assert chunks[-1] == b"data: [DONE]\n\n"
        texts = [json.loads(chunk[6:])["choices"][0]["delta"].get("content", "") for chunk in chunks[4:-1]]
        assert "".join(texts) == "cba"
    assert client.send(site.http()).reply().status == 200
    assert " status=200 " in site.line()


def test_the_first_bytes_of_a_stream_come_before_the_first_token(site):
    site.llm.gate.clear()
    client = site.connect().send(site.http(b'{"prompt": "ab", "stream": true}'))
    head = client.reply(body=False)
    assert (head.status, client.file.read(17)) == (200, b"e\r\n: keep-alive\n\n")
    site.llm.gate.set()


def test_usage_comes_at_the_end_of_a_stream_if_it_is_asked_for(site):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    _, chunks = streamed(site.connect().send(site.http(chat("abc", **options), CHAT)))
    last = json.loads(chunks[-2][6:])
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 5)
    _, chunks = streamed(site.connect().send(site.http(json.dumps({"prompt": ["ab", "c"], **options}).encode())))
    assert json.loads(chunks[-2][6:])["usage"]["total_tokens"] == 7
    assert [" status=200 " in site.line() for _ in range(2)] == [True] * 2  # now both are counted, too
    assert site.keys.find(site.key.id).completion_tokens == 2 + 4


@pytest.mark.parametrize(
    ("breaks", "status", "message"),
    [
        (RuntimeError("detail at 0x7f00"), 500, "internal error; the server's log has it under request s-5"),
        (Unavailable("the model is draining"), 503, "the model is draining; try again in 5 s"),
    ],
)
def test_what_fails_after_the_200_is_the_streams_last_event(site, breaks, status, message):
    site.llm.breaks = breaks
    client = site.connect()
    head, chunks = streamed(client.send(site.http(chat(stream=True), CHAT, X_Request_Id="s-5")))
    error = json.loads(chunks[-1].removeprefix(b"data: "))["error"]
    assert (head.status, error["code"], error["message"]) == (200, str(status), message)
    site.llm.breaks = None
    assert client.send(site.http()).reply().status == 200
    if status == 500:
        assert site.line().startswith("request s-5 failed\n")
    assert f" status={status} " in site.line()


def test_what_is_refused_before_the_first_event_is_an_ordinary_error(site):
    for body, param in ((chat(stream=True, temperature=5), "temperature"), (chat(stream=5), "stream")):
        site.post(body, CHAT).refusal(400, param)
    site.llm.refuses = Unavailable("the queue is full")
    site.post(chat(stream=True), CHAT).refusal(503)


def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection(site):
    data = site.http(chat("ab", stream=True), CHAT).replace(b"HTTP/1.1", b"HTTP/1.0")
    client = site.connect().send(data)
    head = client.reply(body=False)
    assert (head.headers["Transfer-Encoding"], head.headers["Connection"]) == (None, "close")
    assert client.file.readall().endswith(b"data: [DONE]\n\n")


def test_a_client_that_leaves_a_stream_cancels_it_and_is_no_error(site):
    site.llm.silent = 10**6  # it would go on for minutes
    client = site.connect().send(site.http(chat(stream=True), CHAT))
    client.reply(body=False)
    client.close(reset=True)
    assert site.llm.left.wait(30) and " status=499 " in site.line()
    site.llm.silent = 0
    assert site.post(chat(), CHAT).status == 200


def test_each_route_has_its_own_largest_body(site):
    large = chat("a" * 3_000_000)
    assert site.post(large, CHAT).status == 200
    site.post(large).refusal(413)
    site.server.max_chat_content_length = 1000
    assert "at most 1,000 are allowed" in site.post(large, CHAT).refusal(413)


def test_the_one_model_is_listed_under_its_documented_name(site):
    listed = json.loads(site.post(b"", "GET /v1/models").body)
    (model,) = listed["data"]
    assert (listed["object"], model["id"], model["object"]) == ("list", "phi-3-vision", "model")
    assert json.loads(site.post(b"", "GET /v1/models/phi-3-vision?x=y").body) == model
    reply = site.post(b"", "GET /v1/models/gpt-4o")
    error = json.loads(reply.body)["error"]
    assert (reply.status, error["code"], error["type"]) == (404, "404", "model_not_found")
    assert reply.headers["X-RateLimit-Remaining"] == "1000"  # what is only looked at does not count
    site.post(b"", "POST /v1/models/phi-3-vision").refusal(405)


def sample_of(text: str, name: str) -> float:
    return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])


def test_metrics_are_totals_that_prometheus_reads_and_name_no_key(site):
    assert (site.post(b'{"prompt": ["abc", "de"]}').status, site.post(b"{}").status) == (200, 400)
    streamed(site.connect().send(site.http(chat("abc", stream=True), CHAT)))
    site.post(request="GET /nowhere", body=b"")
    site.post(X_API_Key="wrong")
    reply = site.post(b"", "GET /metrics")
    text = reply.body.decode()
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for name, value in {
        'requests_total{route="/v1/completions",status="200"}': 1,
        'requests_total{route="/v1/completions",status="400"}': 1,
        'requests_total{route="/v1/chat/completions",status="200"}': 1,
        'requests_total{route="other",status="404"}': 1,
        'refusals_total{type="permission_error"}': 1,
        "prompt_tokens_total": 8,
        "completion_tokens_total": 6,
        "running_sequences": 3,
        "waiting_sequences": 2,
        "cache_bytes": 1000,
        "time_to_first_token_seconds_count": 3,
        'time_to_first_token_seconds_bucket{le="+Inf"}': 3,
        "inter_token_latency_seconds_count": 3,
    }.items():
        assert sample_of(text, "phi3v_" + name) == value
    assert site.key.id not in text and site.secret[:12] not in text and "test" not in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'phi3v_\w+(\{(\w+="[^"\\]*",?)+\})? [0-9.e+-]+', line) for line in lines)
    counts = [float(line.split()[1]) for line in lines if "first_token_seconds_bucket" in line]
    assert counts == sorted(counts)
