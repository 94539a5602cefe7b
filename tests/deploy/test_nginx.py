"""deploy/nginx.conf before two replicas: what reaches whom, what a full, a killed and a false replica do to others."""

import json
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from conftest import Stream, ask, wait_until

from phi3v import tls

ASK = {"prompt": "What is 3 + 4?", "max_tokens": 13}
# The demo answers in a few words. These penalties keep its end token away.
LONG = {"prompt": "What is 3 + 4?", "max_tokens": 3500, "repetition_penalty": 10, "frequency_penalty": -2}
HALF = LONG | {"prompt": [LONG["prompt"]] * 32}  # all that one key may have on a replica


def chat(*texts: str) -> dict:
    """The body that asks for the next turn of a conversation."""
    roles = ("user", "assistant") * len(texts)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], "max_tokens": 13}


def succeeds(nginx, key: str, request: str, stream: bool = False) -> bool:
    """Whether the whole answer came."""
    try:
        status, _, text = ask(nginx, "/v1/completions", ASK | {"stream": stream}, key, X_Request_Id=request)
    except (OSError, HTTPException):
        return False
    return status == 200 and ("data: [DONE]" if stream else "3 + 4 = 7.") in text


def sequences(replica, key: str) -> int:
    """How many run or wait."""
    text = ask(replica, "/metrics", key=key)[2]
    return sum(map(int, re.findall(r"^phi3v_(?:running|waiting)_sequences (\d+)$", text, re.M)))


def test_an_answer_comes_through_with_its_request_id_in_both_logs(nginx, replicas, key):
    status, head, text = ask(nginx, "/v1/completions", ASK, key, X_Request_Id="mine")
    assert (status, head["X-Request-Id"], json.loads(text)["responses"]) == (200, "mine", ["3 + 4 = 7."])
    seen = nginx.logged("mine")
    assert seen["status"] == seen["answered"] == "200"
    replica = next(replica for replica in replicas if replica.address == seen["replica"])
    wait_until(lambda: replica.logged("mine"))
    assert "client=127.0.0.1 " in replica.logged("mine")
    given = ask(nginx, "/health")[1]["X-Request-Id"]
    assert nginx.logged(given)["status"] == "200" and re.fullmatch("[0-9a-f]{32}", given)
    assert key not in (nginx.folder / "access.log").read_text() + (nginx.folder / "error.log").read_text()


def test_a_name_that_replicas_do_not_know_is_refused_by_them(nginx, key):
    status, _, text = ask(nginx, "/v1/completions", ASK, key, Host="foreign.example")
    assert status == 421 and "--allowed-host" in json.loads(text)["error"]["message"]


def test_each_replica_has_metrics_of_its_own(nginx, replicas, key):
    assert ask(nginx, "/metrics", key=key)[0] == 404
    for number, replica in enumerate(replicas, 1):
        ask(nginx, f"/metrics/{number}", key=key, X_Request_Id=f"metrics-{number}")
        assert nginx.logged(f"metrics-{number}") | {"replica": replica.address} == nginx.logged(f"metrics-{number}")
    assert ask(nginx, "/metrics/1")[0] == 401


def test_the_first_event_comes_while_the_answer_is_made_and_leaving_ends_it(nginx, replicas, key):
    stream = Stream(nginx, LONG, key, "left")
    assert json.loads(stream.first.removeprefix(b"data: "))["choices"][0]["finish_reason"] is None
    stream.close()
    replica = next(replica for replica in replicas if replica.address == nginx.logged("left")["replica"])
    wait_until(lambda: replica.logged("left"))
    assert "status=499" in replica.logged("left")
    assert int(re.search(r"completion_tokens=(\d+)", replica.logged("left"))[1]) < LONG["max_tokens"]


@pytest.mark.parametrize("path, size, most", [("", 2 << 20, "1,048,576"), ("chat/", (20 << 20) + 1, "20,971,520")])
def test_what_is_too_large_is_refused_in_the_words_of_phi3v(nginx, key, path, size, most):
    status, _, text = ask(nginx, f"/v1/{path}completions", b"x" * size, key)
    assert status == 413 and f"at most {most} are allowed" in json.loads(text)["error"]["message"]


def test_single_questions_go_to_all_replicas_whose_limit_is_one(nginx, replicas, new_key):
    key = new_key(rate_limit=5)
    answers = [ask(nginx, "/v1/completions", ASK, key, X_Request_Id=f"limit-{i}") for i in range(7)]
    assert [status for status, _, _ in answers] == [200] * 5 + [429] * 2
    assert [head["X-RateLimit-Remaining"] for _, head, _ in answers] == ["4", "3", "2", "1", "0", "0", "0"]
    assert 1 <= int(answers[5][1]["Retry-After"]) <= 60
    assert {nginx.logged(f"limit-{i}")["replica"] for i in range(5)} == {replica.address for replica in replicas}


def test_the_commented_lines_limit_a_key_before_any_replica(start, replicas, key):
    ports = [replica.port for replica in replicas]
    nginx = start(ports, ("#limit_req", "limit_req"), ("rate=100r/m", "rate=1r/m"), ("burst=99", "burst=4"))
    answers = [ask(nginx, "/v1/models", key=key, X_Request_Id=f"nginx-{i}") for i in range(6)]
    assert [status for status, _, _ in answers] == [200] * 5 + [429]
    assert nginx.logged("nginx-4")["replica"] != nginx.logged("nginx-5")["replica"] == "-"
    assert ask(nginx, "/health")[0] == 200  # who has no key is not counted


def test_the_next_turn_of_a_chat_finds_what_was_read(nginx, new_key):
    first = "Remember these words, please: " + "circle square triangle diamond " * 8
    for i in range(3):
        key = new_key()
        reply = json.loads(ask(nginx, "/v1/chat/completions", chat(first), key, X_Request_Id=f"first-{i}")[2])
        body = chat(first, reply["choices"][0]["message"]["content"], "What is 3 + 4?")
        reply = json.loads(ask(nginx, "/v1/chat/completions", body, key, X_Request_Id=f"next-{i}")[2])
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert nginx.logged(f"first-{i}")["replica"] == nginx.logged(f"next-{i}")["replica"]


def test_a_full_replica_spills_over_and_a_busy_key_shuts_out_no_other(nginx, replicas, new_key):
    busy, other = new_key(), new_key()
    ask(nginx, "/v1/chat/completions", chat("Hello!"), busy, X_Request_Id="home")
    home, away = sorted(replicas, key=lambda replica: replica.address != nginx.logged("home")["replica"])
    with closing(Stream(home, HALF, busy)):
        status, _, text = ask(nginx, "/v1/chat/completions", chat("What is 3 + 4?"), busy, X_Request_Id="spilled")
        assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, "3 + 4 = 7.")
        assert nginx.logged("spilled")["replica"] == f"{home.address}, {away.address}"
        assert nginx.logged("spilled")["answered"] == "503, 200"
        with closing(Stream(away, HALF, busy)):
            for i in range(3):
                status, head, text = ask(nginx, "/v1/completions", ASK, busy, X_Request_Id=f"full-{i}")
                assert (status, head["Retry-After"], nginx.logged(f"full-{i}")["answered"]) == (503, "5", "503, 503")
                assert "this key has 32 of its 32 places" in json.loads(text)["error"]["message"]
            assert [ask(nginx, "/v1/completions", ASK, other)[0] for _ in range(4)] == [200] * 4


def test_a_replica_killed_under_load_fails_nothing_but_what_was_in_flight_on_it(nginx, replicas, key):
    """Six clients go on asking, every other time for a stream, while four long streams run. In flight on the killed
    replica is what nginx had sent there and nowhere else, and what that replica did not finish.
    """
    killed, alive = replicas
    with ExitStack() as stack, ThreadPoolExecutor(6) as pool:
        streams = [stack.enter_context(closing(Stream(nginx, LONG, key, f"stream-{i}"))) for i in range(4)]
        wait_until(lambda: [sequences(replica, key) for replica in replicas] == [2, 2])
        one_more, gone = threading.Semaphore(0), threading.Event()

        def go_on(name: int) -> dict[str, bool]:
            outcomes, left = {}, 4
            while left:
                left -= gone.is_set()
                request = f"load-{name}-{len(outcomes)}"
                outcomes[request] = succeeds(nginx, key, request, stream=len(outcomes) % 2 > 0)
                one_more.release()
            return outcomes

        clients = [pool.submit(go_on, name) for name in range(6)]
        for _ in range(24):
            assert one_more.acquire(timeout=120)
        killed.kill()
        gone.set()
        outcomes = {request: good for client in clients for request, good in client.result(120).items()}
        wait_until(lambda: sum(bool(nginx.has_logged(stream.request)) for stream in streams) == 2)
        broken = [stream for stream in streams if nginx.has_logged(stream.request)]
        assert not any(b"[DONE]" in stream.rest() for stream in broken)
        assert all(stream.event() for stream in streams if stream not in broken)

    def in_flight(request: str) -> bool:
        return nginx.logged(request)["replica"] == killed.address and not killed.logged(request)

    assert all(in_flight(stream.request) for stream in broken)
    failed = [request for request, good in outcomes.items() if not good]
    assert [request for request in failed if not in_flight(request)] == []
    # What was not answered yet in any part is asked again: only streams are broken off.
    assert [request for request in failed if int(request.rpartition("-")[2]) % 2 == 0] == []
    passed_on = [
        request for request in outcomes if nginx.logged(request)["replica"] == f"{killed.address}, {alive.address}"
    ]
    assert passed_on and not set(passed_on) & set(failed)
    killed.start()
    for i in range(4):
        assert succeeds(nginx, key, f"back-{i}")
    assert killed.address in {nginx.logged(f"back-{i}")["replica"] for i in range(4)}


def test_a_replica_that_hangs_is_passed_over(nginx, replicas, key):
    replicas[0].process.send_signal(signal.SIGSTOP)
    try:
        assert all(succeeds(nginx, key, f"hangs-{i}") for i in range(2))
    finally:
        replicas[0].process.send_signal(signal.SIGCONT)
    both = f"{replicas[0].address}, {replicas[1].address}"
    assert both in [nginx.logged(f"hangs-{i}")["replica"] for i in range(2)]


@pytest.mark.parametrize("false", ["certificate", "name"])
def test_a_replica_with_a_false_certificate_or_name_is_told_nothing(start, replicas, folder, tmp_path, key, false):
    ports, changes = [replica.port for replica in replicas], []
    if false == "certificate":
        tls.ensure_certificate(tmp_path / "replicas.crt", tmp_path / "replicas.key")
        for name in ("public.crt", "public.key"):
            shutil.copy(folder / name, tmp_path)
    else:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        changes = [("proxy_ssl_name localhost", "proxy_ssl_name other.example")]
    nginx = start(ports, *changes, certificates=tmp_path)
    status, head, text = ask(nginx, "/v1/completions", ASK, key, X_Request_Id=f"false-{false}")
    assert (status, head["Retry-After"], head["X-Request-Id"]) == (502, "5", f"false-{false}")
    assert json.loads(text)["error"] | {"code": "502", "type": "server_error"} == json.loads(text)["error"]
    assert [replica.logged(f"false-{false}") for replica in replicas] == [None, None]
    said = {"certificate": "certificate verify error", "name": "does not match"}[false]
    assert said in (nginx.folder / "error.log").read_text()


class Fragile(BaseHTTPRequestHandler):
    """Keeps its connections, and ends at a question without a word."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.asked.append(self.headers["X-Request-Id"])
        self.close_connection = True

    def log_message(self, *_) -> None:
        pass


def test_a_request_that_ends_its_replica_is_given_to_two_at_most(start, folder, key):
    with ExitStack() as stack:
        servers = [stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Fragile)) for _ in range(3)]
        for server in servers:
            context = tls.server_context(folder / "server.crt", folder / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
        nginx = start([server.server_address[1] for server in servers])
        assert [ask(nginx, "/health")[0] for _ in range(12)] == [200] * 12  # so that there are connections to be kept
        assert ask(nginx, "/v1/completions", ASK, key, X_Request_Id="ends")[0] == 502
    assert Fragile.asked == ["ends"] * 2
