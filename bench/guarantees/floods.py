"""C12: hundreds of clients that are silent or slow, all at once, and how soon the server is rid of them."""

import contextlib
import re
import ssl
import time

from load import output, program
from report import at_most, is_true
from service import Probe, Service

BODY = 1000  # bytes announced, of which one comes each second: 10 s and BODY ÷ 64 KB/s are allowed
COUNTS = {
    "silent before the handshake": 300,
    "silent within the handshake": 150,
    "silent after the handshake": 150,
    "slow head": 300,
    "slow body": 100,
}
PATIENCE = 25  # seconds after which those that are still there are given up
MODES = {"H": "slow heads", "B": "slow bodies", "R": "ranges", "X": "slow reading"}


class Slow:
    """One such client, and when it was sent away; it goes on all the same and never closes by itself."""

    def __init__(self, server: Service, kind: str):
        self.kind, self.begun, self.lasted = kind, time.monotonic(), None
        self.socket = server.connect(tls=not kind.endswith(("before the handshake", "within the handshake")))
        if kind == "silent within the handshake":
            self.socket.sendall(b"\x16\x03\x01\x02\x00\x01")  # a record of 512 bytes begins
        elif kind == "slow head":
            self.socket.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        elif kind == "slow body":
            fields = f"Content-Type: application/json\r\nContent-Length: {BODY}\r\nX-API-Key: {server.key}"
            self.socket.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n\r\n".encode())
        self.socket.setblocking(False)

    def drip(self) -> None:
        if self.kind.startswith("slow"):
            with contextlib.suppress(OSError):
                self.socket.send(b" ")

    def look(self) -> None:
        """Note the end of the connection; what the server says before it is read and forgotten."""
        if self.lasted is not None:
            return
        try:
            ended = not self.socket.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            ended = True
        if ended:
            self.lasted = time.monotonic() - self.begun


def silent():
    with Service() as server:
        rest = server.ps.num_fds()
        clients = [Slow(server, kind) for kind, count in COUNTS.items() for _ in range(count)]
        opened, released, turn = time.monotonic(), None, 0
        with Probe(server) as probe:
            while released is None and time.monotonic() < opened + PATIENCE:
                for client in clients:
                    client.look()
                for client in clients[turn % 10 :: 10]:  # each one about once a second
                    client.drip()
                turn += 1
                if server.ps.num_fds() <= rest + 2:  # the probe's, and one to spare
                    released = time.monotonic() - opened
                time.sleep(0.1)
        for client in clients:
            client.socket.close()
    left = sum(client.lasted is None for client in clients)
    longest = {kind: max(c.lasted or PATIENCE for c in clients if c.kind == kind) for kind in COUNTS}
    note = ", ".join(f"{COUNTS[kind]} {kind} {seconds:.1f} s" for kind, seconds in longest.items())
    note = f"{left:,} left; the slowest of each: {note}"
    yield at_most("C12", f"{len(clients):,} silent and slow clients at once, gone", released or PATIENCE, 14, "s", note)
    yield at_most("C12", "/health beside them, p99", probe.p99, 10, "ms", probe.note)


def slowhttptest():
    """Its four attacks with 1,000 connections each."""
    attack, failed = program("slowhttptest"), []
    with Service() as server:
        with Probe(server) as probe:
            for mode, what in MODES.items():
                command = [attack, f"-{mode}", "-c", "1000", "-r", "400", "-l", "14", "-i", "2", "-p", "3"]
                said = output(*command, "-u", f"{server.url}/health")
                states = re.findall(r"service available:\s*(YES|NO)", re.sub(r"\x1b\[[\d;]*\w", "", said))
                if not states or "NO" in states or server.health() != 200:
                    failed.append(f"{what}: not available in {states.count('NO')} of {len(states)} looks")
    note = "; ".join([*failed, f"beside it {probe.note}"])
    yield is_true("C12", "available under slowhttptest -H -B -R -X with 1,000 connections", not failed, note=note)
    yield at_most("C12", "/health on a kept connection meanwhile, p99", probe.p99, 50, "ms", "handshakes included")
