"""What the server adds to the engine: HTTP, TLS, JSON, keys and tokenizing, for one short prompt at a time.

    python bench/overhead.py [--rounds 300] [--save bench/results/overhead.json]

The engine is given the same token ids directly, the module the same text, and a client in a process of its own asks the
real server over TLS; they take turns, so that whatever slows the machine slows all of them. Medians. The client's own
work and its TLS are in those times; what they are alone is measured against a socket that sleeps and sends fixed bytes.
"""

import argparse
import json
import platform
import random
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from http.client import HTTPSConnection
from pathlib import Path
from statistics import median, quantiles

PROMPT, TOKENS = "What is 3 + 4?", 5
NAP = 0.015  # about as long as the engine takes
BODIES = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": TOKENS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS},
    "/v1/chat/completions, streamed": {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": TOKENS,
        "stream": True,
    },
}


def client(port: int, certificate: str, key: str) -> None:
    """Ask when a line comes, and say how long it took; "new" in front of a route: with a connection of its own."""
    trust = ssl.create_default_context(cafile=certificate)
    kept = HTTPSConnection("localhost", port, context=trust)
    headers = {"Content-Type": "application/json", "X-API-Key": key}
    for line in sys.stdin:
        case = line.strip()
        route = case.removeprefix("new ")
        body = json.dumps(BODIES[route])
        begun = time.perf_counter()
        connection = HTTPSConnection("localhost", port, context=trust) if case.startswith("new ") else kept
        connection.request("POST", route.partition(",")[0], body, headers)
        reply = connection.getresponse()
        assert reply.status == 200 and b"7" in reply.read()
        print(time.perf_counter() - begun, flush=True)


def bare(listener: socket.socket, trust: ssl.SSLContext) -> None:
    """The least that can answer: nothing is parsed, and the reply is the same bytes, after NAP seconds."""
    body = b'{"choices": [{"text": "3 + 4 = 7."}]}'
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    with trust.wrap_socket(listener.accept()[0], server_side=True) as connection:
        while data := connection.recv(65536):
            while not data.endswith(b"}"):
                data = connection.recv(65536)
            time.sleep(NAP)
            connection.sendall(reply)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    import phi3v

    phi3v.fast_blas()  # before the first import of MLX
    from phi3v import keys, server, tls
    from phi3v.request import SamplingParams, question
    from phi3v.sequences import Prompt

    folder = Path(tempfile.mkdtemp())
    certificate, private = folder / "server.crt", folder / "server.key"
    tls.ensure_certificate(certificate, private)
    with phi3v.load("demo") as llm:
        store = keys.KeyStore(folder / "keys.db")
        _, secret = store.create("bench", 1_000_000)
        site = server.Server([("127.0.0.1", 0)], tls.server_context(certificate, private), llm, store)
        threading.Thread(target=site.serve_forever, daemon=True).start()
        listener = socket.create_server(("127.0.0.1", 0))
        trust = tls.server_context(certificate, private)
        threading.Thread(target=bare, args=(listener, trust), daemon=True).start()

        def asking(port: int) -> subprocess.Popen:
            command = [sys.executable, __file__, "--client", str(port), str(certificate), secret]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

        others = asking(site.server_address[1]), asking(listener.getsockname()[1])

        def over_tls(case: str, other: subprocess.Popen) -> float:
            other.stdin.write(case + "\n")
            return float(other.stdout.readline())

        def timed(work) -> float:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun

        ids = llm.tokenizer.encode(llm.tokenizer.chat(question(PROMPT, []).messages), [], 4096)
        prompt = Prompt(ids, [], TOKENS, llm._end_ids, params=SamplingParams(max_tokens=TOKENS))
        cases = {
            "engine": lambda: timed(lambda: list(llm._engine.submit([prompt]))),
            "module": lambda: timed(lambda: llm.generate(PROMPT, max_tokens=TOKENS)),
            **{
                f"{new}{route}": lambda case=f"{new}{route}": over_tls(case, others[0])
                for route in BODIES
                for new in ("", "new ")
            },
        }
        cases["the client and a bare TLS socket"] = lambda: over_tls("/v1/completions", others[1]) - NAP
        order = random.Random(1)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for k in range(arguments.rounds + 20):
            for name in order.sample(list(cases), len(cases)):  # whoever follows a sleep finds cold caches
                seconds = cases[name]()
                if k >= 20:  # the first ones warm up
                    times[name].append(seconds * 1000)
        for other in others:
            other.stdin.close()
            other.wait()
        site.stop()
        store.close()
    rows = {name: {"median_ms": median(each), "p90_ms": quantiles(each, n=10)[-1]} for name, each in times.items()}
    for row in rows.values():
        row["added_ms"] = row["median_ms"] - rows["engine"]["median_ms"]
    print(f"{'':40} {'median':>9} {'p90':>9} {'added':>9}   ms")
    for name, row in rows.items():
        print(f"{name:40} {row['median_ms']:9.2f} {row['p90_ms']:9.2f} {row['added_ms']:9.2f}")
    if arguments.save:
        about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.platform()}
        about |= {"rounds": arguments.rounds, "phi3v": phi3v.__version__, "python": platform.python_version()}
        arguments.save.write_text(json.dumps(about | {"cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        client(int(sys.argv[2]), *sys.argv[3:5])
    else:
        main()
