"""C14 to C19, D21, D23: clients that stall or go away, a full queue, signals, wrong starts, kill -9."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from report import at_most, is_true, none_of
from service import LONG, Probe, Service, phi3v, reset, wait_until

STREAM = LONG | {"stream": True}
SHORT = {"prompt": "What is 3 + 4?", "max_tokens": 1}
# Enough text to fill every buffer between the server and a client that does not read.
MUCH = STREAM | {"prompt": [LONG["prompt"]] * 4, "n": 8, "logprobs": 20}
WRITE, DISCONNECTS, LIMIT = 15, 1000, 60


def slow_reader():
    with Service() as server, contextlib.closing(server.post(MUCH, request_id="slow", receive_buffer=4096)) as client:
        client.recv(1)
        begun = time.perf_counter()
        wait_until(lambda: "request=slow " in server.log(), 40, 0.1)
        took = time.perf_counter() - begun
        line = next((row for row in server.log().splitlines() if "request=slow " in row), "")
        freed = wait_until(lambda: server.sequences() == 0, 5)
    made = int((re.search(r"completion_tokens=(\d+)", line) or [0, 0])[1])
    yield at_most("C14", "a stream that is not read is cut", took, WRITE + 5, "s", "15 s once the buffers are full")
    yield is_true("C14", "its generation is cancelled", line and made < 32_768, f"after {made:,} of 32,768 tokens")
    yield at_most("C14", "its places are free", freed, 1, "s", "after that")


def gone():
    """How long a generation outlives its client; looked at by /metrics."""
    took = {}
    with Service() as server:
        for streamed in (False, True):
            for how, leave in {"closed": socket.socket.close, "reset": reset, "half closed": half_close}.items():
                times = []
                for _ in range(5):
                    client = server.post(LONG | {"stream": streamed})
                    wait_until(lambda: server.sequences() == 1, 5, 0.002)
                    time.sleep(0.05)
                    begun = time.perf_counter()
                    leave(client)
                    wait_until(lambda: server.sequences() == 0, 10, 0.002)
                    times.append((time.perf_counter() - begun) * 1000)
                    client.close()
                took[f"{how}{', streamed' if streamed else ''}"] = max(times)
    note = ", ".join(f"{how} {ms:.0f}" for how, ms in took.items())
    note = f"slowest of 5 each: {note}"
    yield at_most("C15", "a client that goes away ends its generation", max(took.values()), 120, "ms", note)


def half_close(client: socket.socket) -> None:
    socket.socket.shutdown(client, socket.SHUT_WR)  # not the SSLSocket's own, which forgets the TLS state


def disconnects():
    def leave(server: Service) -> None:
        client = server.post(STREAM)
        client.recv(100)
        reset(client)

    with Service() as server, ThreadPoolExecutor(8) as pool:
        sizes = []
        for count in (500, DISCONNECTS, DISCONNECTS, DISCONNECTS):  # the first ones warm up
            list(pool.map(leave, [server] * count))
            wait_until(lambda: server.sequences() == 0, 10)
            time.sleep(1)
            sizes.append((server.ps.memory_info().rss / 2**20, server.ps.num_threads(), server.ps.num_fds()))
        before, after = sizes[0], sizes[-1]
    growth = [after[0] - before[0] for before, after in pairwise(sizes)]  # a leak is in each, a larger heap in one
    note = f"least of 3 times {DISCONNECTS:,}: {', '.join(f'{mb:.2f}' for mb in growth)}"
    yield at_most("C15", f"memory growth over {DISCONNECTS:,} disconnects", min(growth), 5, "MB", note)
    counts = f"{before[1]}→{after[1]} and {before[2]}→{after[2]}"
    yield is_true("C15", "threads and descriptors stay", before[1:] == after[1:], counts)


def full():
    """A queue of 64: the first key fills half, the second the rest, a third one is refused."""
    with Service("--max-queue", "64", "--max-batch", "8") as server, contextlib.ExitStack() as stack:
        keys = [server.key, server.create("second"), server.create("third")]

        def fill(key: str, most: int) -> None:
            for _ in range(4):
                stack.enter_context(server.post(STREAM | {"n": 8}, key))
            wait_until(lambda: server.sequences() >= most, 10)

        fill(keys[0], 32)
        half = server.ask(SHORT, keys[0], 20)
        fill(keys[1], 64)
        times, replies = [], []
        for _ in range(50):
            begun = time.perf_counter()
            replies.append(server.ask(SHORT, keys[2], 20))
            times.append((time.perf_counter() - begun) * 1000)
    wrong = [str(status) for status, headers, _ in replies if status != 503 or "Retry-After" not in headers]
    yield none_of("C16", "answers of a full queue that are not 503 with Retry-After", wrong, f"of {len(replies)}")
    yield at_most("C16", "one of these, a new connection each, p99", sorted(times)[-1], 50, "ms", "slowest of 50")
    yield is_true("C16", "one key fills at most half of the queue", half[0] == 503, f"status {half[0]} beyond")


def generating():
    with Service() as server, contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(server.post(LONG))
        wait_until(lambda: server.sequences() == 8, 5)
        with Probe(server) as probe:
            time.sleep(3)
        running = server.sequences()
    note = f"{probe.note}; {running} still run"
    yield at_most("C16", "/health while 8 long answers are made, p99", probe.p99, 50, "ms", note)


def stopped():
    with Service() as server, ThreadPoolExecutor() as pool:
        kept, answer = server.kept(), pool.submit(server.ask, LONG)
        wait_until(lambda: server.sequences() == 1, 5)
        server.process.send_signal(signal.SIGTERM)
        closed = wait_until(lambda: refuses(server.port), 5, 0.005)
        begun = time.perf_counter()
        kept.settimeout(5)
        with contextlib.suppress(OSError):
            kept.recv(1)
        idle = closed + time.perf_counter() - begun
        status, _, body = answer.result(60)
        code = server.process.wait(60)
        kept.close()
    made = json.loads(body)["usage"]["completion_tokens"] if status == 200 else 0
    yield at_most("C17", "SIGTERM closes the listener", closed, 0.5, "s")
    yield at_most("C17", "and idle connections", idle, 1, "s")
    said = f"{status}, {made} tokens, exit {code}"
    yield is_true("C17", "the request in flight is answered, exit 0", made == 1024 and code == 0, said)
    with Service() as server, contextlib.closing(server.post(LONG)):
        wait_until(lambda: server.sequences() == 1, 5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        alive, begun = server.process.poll() is None, time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
        took = time.perf_counter() - begun
    yield at_most("C17", "a second signal ends it", took, 0.5, "s", "" if alive else "it had ended before")


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return False
    except OSError:
        return True


def wrong_starts():
    with Service() as server, tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "bad.crt").write_text("not a certificate")
        cases = {
            "port in use": ["--port", str(server.port)],
            "bad host": ["--port", "0", "--host", "999.1.2.3"],
            "no such model": ["--port", "0", "--model", "./nothing"],
            "bad certificate": ["--port", "0", "--certfile", "bad.crt", "--keyfile", "bad.crt"],
        }
        wrong = []
        for what, options in cases.items():
            done = phi3v("serve", "--model", "demo", *options, folder=folder)
            said = [row for row in done.stderr.splitlines() if "made the certificate" not in row]
            if done.returncode != 1 or len(said) != 1:
                wrong.append(f"{what}: exit {done.returncode}, {len(said)} lines")
    yield none_of("C19", "wrong starts without one line and exit 1", wrong, f"of {len(cases)}: {', '.join(cases)}")


def killed():
    """kill -9 under load and a second start: at most LIMIT requests of one key were answered in the minute."""
    folder = Path(tempfile.mkdtemp(prefix="phi3v-guarantees-"))
    answered, begun = 0, time.monotonic()

    def hammer(server: Service, key: str, seconds: float) -> int:
        end, count = time.monotonic() + seconds, 0
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server is killed meanwhile
            while time.monotonic() < end:
                count += server.ask(SHORT, key, 5)[0] == 200
        return count

    try:
        with Service(folder=folder) as first, ThreadPoolExecutor(4) as pool:
            key, begun = first.create("limited", LIMIT), time.monotonic()
            jobs = [pool.submit(hammer, first, key, 10) for _ in range(4)]
            wait_until(lambda: first.log().count(" key=") >= 10, 5, 0.001)
            first.process.kill()
            answered += sum(job.result() for job in jobs)
            before = answered
        with contextlib.closing(sqlite3.connect(folder / "keys.db")) as db:
            sound = db.execute("PRAGMA integrity_check").fetchone()[0]
        with Service(folder=folder) as second, ThreadPoolExecutor(4) as pool:
            answered += sum(pool.map(lambda _: hammer(second, key, 5), range(4)))
    finally:
        shutil.rmtree(folder)
    within = time.monotonic() - begun
    yield is_true("D21", "keys.db after kill -9 under load", sound == "ok", sound)
    assert within < 60 and answered > before > 0
    note = f"{before} before, {answered - before} after, in {within:.0f} s"
    yield at_most("D23", f"answered to a key of {LIMIT} a minute across kill -9", answered, LIMIT, "", note)
