"""B6, C13, C19: how much the server takes. Throughput is the best of three runs: the machine is shared."""

import contextlib
import re
import shutil
import ssl
import subprocess
import time

from report import NotRun, at_least, at_most, is_true, none_of
from service import HEALTH, Probe, Service, healthy, wait_until

SHARED = "best of 3; client and server share the cores"
UNITS = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}
IDLE, MANY, FEW = 1000, 100_000, 100
PACKAGES = {"ab": "apache2-utils", "h2load": "nghttp2-client", "testssl": "testssl.sh"}  # the others' have their name


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(f"{name}.sh")
    if not found:
        raise NotRun(f"needs the program {name}, of the package {PACKAGES.get(name, name)}")
    return found


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def kept_alive():
    wrk, runs, rates, halves = program("wrk"), [], [], []
    with Service() as server:
        for _ in range(3):
            runs.append(output(wrk, "-t1", "-c16", "-d4s", f"{server.url}/health"))
            rates.append(float(re.search(r"Requests/sec: +([\d.]+)", runs[-1])[1]))
            runs.append(output(wrk, "-t1", "-c1", "-d3s", "--latency", f"{server.url}/health"))
            value, unit = re.search(r"50% +([\d.]+)(us|ms|s|m)", runs[-1]).groups()
            halves.append(float(value) * UNITS[unit])
    yield at_least("B6", "/health on 16 kept connections", max(rates), 8000, "/s", SHARED)
    yield at_most("B6", "/health on one kept connection, p50", min(halves), 0.3, "ms", SHARED)
    wrong = [line.strip() for run in runs for line in run.splitlines() if re.search("Socket errors|Non-2xx", line)]
    yield none_of("B6", "runs of wrk with errors", wrong, f"of {len(runs)}")


def new_connections():
    ab, h2load, rates, failed, bursts, lost = program("ab"), program("h2load"), [], 0, [], 0
    with Service() as server:
        for _ in range(3):
            said = output(ab, "-q", "-n", "2000", "-c", "16", f"{server.url}/health")
            rates.append(float(re.search(r"per second: +([\d.]+)", said)[1]))
            failed += int(re.search(r"Failed requests: +(\d+)", said)[1])
            said = output(h2load, "--h1", "-c", "200", "-n", "200", f"{server.url}/health")
            value, unit = re.search(r"finished in ([\d.]+)(us|ms|s|m)", said).groups()
            bursts.append(float(value) * UNITS[unit])
            lost += 200 - int(re.search(r"(\d+) 2xx", said)[1])
    yield at_least("B6", "new TLS connections, one request each", max(rates), 400, "/s", f"ab -c 16; {SHARED}")
    yield at_most("A5", "requests that ab counts as failed", failed, 0, "", "of 6,000")
    yield at_most("C13", "200 connections at once, the last one answered", min(bursts), 300, "ms", f"h2load; {SHARED}")
    yield at_most("C13", "of these not answered", lost, 0, "", "of 600")


def idle():
    with Service() as server, contextlib.ExitStack() as stack:
        before = server.ps.memory_info().rss
        connections = [stack.enter_context(server.kept()) for _ in range(IDLE)]
        each = (server.ps.memory_info().rss - before) / IDLE / 1024
        with Probe(server) as probe:
            time.sleep(5)
        gone = sum(not healthy(c) for c in connections)
    yield at_most("C13", f"/health beside {IDLE:,} idle TLS connections, p99", probe.p99, 10, "ms", probe.note)
    yield at_most("C13", "memory of each", each, 80, "KB", "resident, before and after")
    yield at_most("C13", "of these that do not answer afterwards", gone + probe.failed, 0)


def too_many():
    with Service("--max-connections", str(FEW)) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(server.kept()) for _ in range(FEW)]
        outcomes = [outcome(server) for _ in range(30)]
        hurt = sum(not healthy(c) for c in held)
        for connection in held[: FEW // 2]:
            connection.close()
        back = wait_until(lambda: server.health() == 200, 5)
    wrong = [what for what in outcomes if what not in ("503", "closed")]
    kinds = ", ".join(f"{outcomes.count(kind)} × {kind}" for kind in dict.fromkeys(outcomes))
    yield none_of("C13", "past --max-connections neither 503 nor closed", wrong, f"of 30: {kinds}")
    yield at_most("C13", "existing connections hurt by these", hurt, 0, "", f"of {FEW}")
    yield at_most("C13", "until new ones are taken again", back, 1, "s")


def outcome(server: Service) -> str:
    """What becomes of one more connection."""
    try:
        with server.connect(timeout=2) as connection:
            connection.sendall(HEALTH)
            return connection.recv(65536)[9:12].decode() or "closed"
    except TimeoutError:
        return "silence"
    except (ConnectionError, ssl.SSLError):
        return "closed"


def descriptors():
    limit = 128
    with Service(files=limit) as server, contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(server.connect(tls=False))
        wait_until(lambda: server.ps.num_fds() >= limit - 8, 3)
        most, begun = server.ps.num_fds(), sum(server.ps.cpu_times()[:2])
        time.sleep(3)
        share = (sum(server.ps.cpu_times()[:2]) - begun) / 3 * 100
        stack.close()
        back = wait_until(lambda: server.health() == 200, 20)
        status = server.ask({"prompt": "What is 3 + 4?", "max_tokens": 8})[0]
    note = f"{most} of {limit} open, 400 clients"
    yield at_most("C13", "CPU while descriptors are exhausted", share, 10, "% of a core", note)
    yield at_most("C13", "until it answers again", back, 2, "s", f"a completion then: {status}")


def many():
    h2load = program("h2load")
    with Service() as server:

        def counts() -> tuple[int, int]:
            return server.ps.num_threads(), server.ps.num_fds()

        time.sleep(0.5)  # until what asked while it started has gone
        before = counts()
        load = h2load, "--h1", "-c", "16", f"{server.url}/health", "-n"
        output(*load, "20000")
        wait_until(lambda: counts() == before, 3)
        rss = server.ps.memory_info().rss
        done = int(re.search(r"(\d+) 2xx", output(*load, str(MANY)))[1])
        wait_until(lambda: counts() == before, 3)
        growth, after = (server.ps.memory_info().rss / rss - 1) * 100, counts()
    yield at_most("C19", f"memory growth over {done:,} requests", growth, 2, "%", "resident, after 20,000 to warm up")
    same = after == before and done == MANY
    yield is_true("C19", "threads and descriptors stay", same, f"{before[0]}→{after[0]} and {before[1]}→{after[1]}")
