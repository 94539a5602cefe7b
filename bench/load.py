"""Latency against offered load: the demo behind nginx, one replica and two, asked by h2load as Poisson arrivals.

    python bench/load.py [--rates 1 2 4 …] [--seconds 12] [--out bench/results]

Open loop: h2load (nghttp2) sends every request at its time in a script, on one HTTP/2 connection, whether or not others
were answered, so that a slow server is not asked less. One key, one question, ANSWER tokens each; only the first has to
read it, the others find it in the prefix cache. Throughput is measured apart, with AT_ONCE requests at all times.
Client, nginx and replicas share the machine. Needs nginx and h2load (`apt install nginx-light nghttp2-client`). Writes
DIR/load.json and .svg.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from plot import load_plot

from phi3v import __version__, tls

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (ROOT / "deploy" / "nginx.conf").read_text()
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("PHI3V_")} | {"PYTHONUNBUFFERED": "1"}
FRONT, FIRST = 8443, 8001  # ports: nginx's, and the first replica's, as in the shipped file
RATES = (2, 4, 8, 16, 20, 24, 28, 32, 36)  # requests a second
ANSWER = 64  # tokens: the penalties below keep the demo's end token away
BODY = {"prompt": "What is 3 + 4?", "max_tokens": ANSWER, "repetition_penalty": 10, "frequency_penalty": -2}
AT_ONCE, IN_ALL = 32, 320  # requests, for the throughput
STREAMS = 2048  # that may be open at once: more than any run sends, or the loop would close


class Site:
    """So many replicas on one keys.db, behind the shipped nginx.conf on other ports."""

    def __init__(self, folder: Path, count: int, stack: ExitStack):
        self.folder, self.key = folder, phi3v(folder, "create", "--name", "load", "--rate-limit", "1000000")
        tls.ensure_certificate(folder / "server.crt", folder / "server.key")
        for copy in ("replicas.crt", "public.crt"):
            shutil.copy(folder / "server.crt", folder / copy)
        shutil.copy(folder / "server.key", folder / "public.key")
        (folder / "body.json").write_text(json.dumps(BODY))
        for port in range(FIRST, FIRST + count):
            stack.enter_context(replica(folder, port))
        text = SHIPPED.replace("    listen [::]:443 ssl http2;\n", "").replace(" 443 ", f" 127.0.0.1:{FRONT} ")
        text = text.replace("/etc/nginx/phi3v/", f"{folder}/").replace("/var/log/nginx/", f"{folder}/")
        if count == 1:
            text = re.sub(rf"    server 127.0.0.1:{FIRST + 1} .*\n", "", text)
        (folder / "phi3v.conf").write_text(text)
        user = "" if os.getuid() else "user root root; "
        http = f"http2_max_concurrent_streams {STREAMS}; keepalive_requests 100000; include {folder}/phi3v.conf;"
        around = f"daemon off; {user}pid {folder}/nginx.pid; events {{ worker_connections 8192; }} http {{ {http} }}"
        (folder / "nginx.conf").write_text(around)
        nginx = subprocess.Popen([NGINX, "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"])
        stack.callback(lambda: (nginx.terminate(), nginx.wait()))
        time.sleep(1)  # until it listens
        self.ask("-n", "16", "-m", "16")  # warm up, and the question is read

    def ask(self, *options: str) -> list[tuple[float, int, float]]:
        """Of each request when it began, its status, and its seconds, as h2load logs them."""
        log = self.folder / "h2load.log"
        log.unlink(missing_ok=True)
        fields = ["Content-Type: application/json", f"X-API-Key: {self.key}"]
        command = ["h2load", "-c", "1", "-d", str(self.folder / "body.json"), "--log-file", str(log), *options]
        command += [part for field in fields for part in ("-H", field)]
        subprocess.run([*command, f"https://localhost:{FRONT}/v1/completions"], check=True, stdout=subprocess.DEVNULL)
        rows = [line.split("\t") for line in log.read_text().splitlines()]
        return [(int(begun) / 1e6, int(status), int(us) / 1e6) for begun, status, us in rows]

    def offered(self, rate: float, seconds: float) -> dict:
        """Latencies at `rate` a second for so long, and until the last is answered."""
        rng, at, script = random.Random(rate), 0.0, self.folder / "script"
        times = []
        while (at := at + rng.expovariate(rate)) < seconds:
            times.append(at)
        uri = f"https://localhost:{FRONT}/v1/completions"
        script.write_text("".join(f"{1000 * at:.3f}\t{uri}\n" for at in times))
        rows = self.ask("-n", str(len(times)), "-m", str(STREAMS), "--timing-script-file", str(script))
        taken = [seconds for _, _, seconds in rows]
        p50, p95, p99 = (statistics.quantiles(taken, n=100)[p - 1] for p in (50, 95, 99))
        failed = len(times) - sum(status == 200 for _, status, _ in rows)
        return {"rate": rate, "requests": len(times), "failed": failed, "p50": p50, "p95": p95, "p99": p99}

    def throughput(self) -> float:
        """Answers a second, with AT_ONCE of them always on their way."""
        rows = self.ask("-n", str(IN_ALL), "-m", str(AT_ONCE))
        assert all(status == 200 for _, status, _ in rows)
        return len(rows) / (max(at + taken for at, _, taken in rows) - min(at for at, _, _ in rows))


@contextmanager
def replica(folder: Path, port: int):
    options = ["--port", str(port), "--log-file", f"server-{port}.log", "--max-queue", str(2 * STREAMS)]
    command = [sys.executable, "-m", "phi3v", "serve", "--model", "demo", *options]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert "answers at" in process.stdout.readline()
        yield
        process.terminate()


def phi3v(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "phi3v", *arguments]
    return subprocess.check_output(command, cwd=folder, env=ENVIRONMENT, text=True, stderr=subprocess.DEVNULL).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sides = []
    for count in (1, 2):
        with ExitStack() as stack:
            site = Site(Path(stack.enter_context(tempfile.TemporaryDirectory())), count, stack)
            side = {"replicas": count, "throughput": [site.throughput() for _ in range(3)], "points": []}
            print(f"{count} replicas: {statistics.median(side['throughput']):.1f} answers/s", flush=True)
            for rate in options.rates:
                side["points"].append(point := site.offered(rate, options.seconds))
                print(", ".join(f"{name} {value:.4g}" for name, value in point.items()), flush=True)
            sides.append(side)
    nginx = subprocess.run([NGINX, "-v"], capture_output=True, text=True).stderr.split("/")[-1].strip()
    h2load = subprocess.check_output(["h2load", "--version"], text=True).split("/")[-1].strip()
    versions = {"phi3v": __version__, "python": platform.python_version(), "nginx": nginx, "h2load": h2load}
    result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "system": platform.platform()}
    result |= {"cores": os.cpu_count(), "versions": versions, "answer": ANSWER, "sides": sides}
    path = options.out / "load.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    load_plot(path)


if __name__ == "__main__":
    main()
