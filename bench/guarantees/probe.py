"""Asks /health every PAUSE seconds on one TLS connection until standard input ends; prints what that took, in ms.

A process of its own, so that the work of the measurement beside it is not in the figures.
"""

import contextlib
import json
import select
import socket
import ssl
import sys
import time

PAUSE = 0.005
REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def connect(port: int, trust: ssl.SSLContext) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", port), timeout=5)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return trust.wrap_socket(raw, server_hostname="localhost")


def main() -> None:
    port, trust = int(sys.argv[1]), ssl.create_default_context(cafile=sys.argv[2])
    times, failed, connection = [], 0, None
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        begun = time.perf_counter()
        try:
            if not connection:
                connection = connect(port, trust)
            begun = time.perf_counter()
            connection.sendall(REQUEST)
            failed += not connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        except OSError:  # what was waited for counts in full
            failed += 1
            with contextlib.suppress(AttributeError):
                connection.close()
            connection = None
        times.append((time.perf_counter() - begun) * 1000)
    times.sort()
    found = [times[len(times) * share // 100] for share in (50, 99)] if times else [0, 0]
    print(json.dumps([*found, max(times, default=0), len(times), failed]))


if __name__ == "__main__":
    main()
