"""What SECURITY.md promises, measured against real servers on loopback: `make guarantees`, about 15 minutes.

    python bench/guarantees/run.py [--only NAME,…] [--list]     measure; results.json and results.md beside this file
    python bench/guarantees/run.py --table                      write what was measured into SECURITY.md

Exit 1 if a line does not hold. A line whose program is missing is "not run" and says what it needs.
"""

import argparse
import json
import os
import platform
import resource
import shlex
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime

import certificate
import faults
import floods
import load
import others
from report import Line, NotRun, in_security, lines_of, machine, table
from service import HERE, PYTHON, ROOT

PART_SECONDS = 600  # a part that takes longer is given up, and does not hold
PARTS = {
    "certificate": ("A1", certificate.made),
    "testssl": ("A4", certificate.scanned_by_testssl),
    "sslyze": ("A4", certificate.scanned_by_sslyze),
    "reload": ("A3", certificate.changed),
    "throughput": ("B6", load.kept_alive),
    "handshakes": ("B6", load.new_connections),
    "heads": ("B7", others.heads),
    "openapi": ("B11", others.described),
    "silent": ("C12", floods.silent),
    "slowhttptest": ("C12", floods.slowhttptest),
    "idle": ("C13", load.idle),
    "connections": ("C13", load.too_many),
    "descriptors": ("C13", load.descriptors),
    "slow-reader": ("C14", faults.slow_reader),
    "gone": ("C15", faults.gone),
    "disconnects": ("C15", faults.disconnects),
    "queue": ("C16", faults.full),
    "generating": ("C16", faults.generating),
    "stop": ("C17", faults.stopped),
    "starts": ("C19", faults.wrong_starts),
    "many": ("C19", load.many),
    "killed": ("D23", faults.killed),
    "keys": ("D23", others.key_figures),
    "pictures": ("E26", others.picture_figures),
    "bandit": ("E27", others.bandit),
    "canary": ("F29", others.canary),
}
RESULTS, SECURITY = HERE / "results.json", ROOT / "SECURITY.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(PARTS), metavar="NAME,…")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    if arguments.list:
        print(*PARTS, sep="\n")
        return 0
    if arguments.table:
        SECURITY.write_text(in_security(SECURITY.read_text(), json.loads(RESULTS.read_text())))
        return 0
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192) if hard > 0 else 8192, hard))  # the clients' sockets
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
    kept, holds = found["parts"], []
    facts = about() if arguments.only == list(PARTS) or not kept else found  # a part alone keeps the whole run's head
    for name in (name for name in PARTS if name in arguments.only):
        load, begun, lines = os.getloadavg()[0], time.monotonic(), part(name)
        took = {"date": now(), "seconds": round(time.monotonic() - begun), "load_before": round(load, 1)}
        kept[name] = took | {"lines": [asdict(line) for line in lines]}
        save(facts | {"parts": {name: kept[name] for name in PARTS if name in kept}})
        holds += [line.holds for line in lines if line.holds is not None or not line.measured]
    print(f"\n{holds.count(True)} lines hold, {holds.count(False)} do not, {holds.count(None)} were not run")
    return int(False in holds)


def save(results: dict) -> None:
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    RESULTS.with_suffix(".md").write_text(f"Measured {machine(results)}\n\n{table(lines_of(results))}")


def part(name: str) -> list[Line]:
    """The lines of one part, printed as they come; what goes wrong in it is a line that does not hold."""
    line, measure = PARTS[name]
    lines: list[Line] = []

    def add(found: Line) -> None:
        lines.append(found)
        print(found.row(), flush=True)

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PART_SECONDS)
    try:
        for found in measure():
            add(found)
    except NotRun as reason:
        add(Line(line, name, "", "", None, str(reason)))
    except Exception as error:
        add(Line(line, name, "", "failed", False, f"{type(error).__name__}: {error}"[:300]))
    finally:
        signal.alarm(0)
    return lines


def too_long(*_) -> None:
    raise RuntimeError(f"not done after {PART_SECONDS} s")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def about() -> dict[str, str | int | None]:
    versions = (
        "import platform, ssl, phi3v; print(phi3v.__version__, platform.python_version(), ssl.OPENSSL_VERSION, sep='|')"
    )
    found = subprocess.check_output([PYTHON, "-c", versions], text=True).strip().split("|")
    command = shlex.join(["python", "bench/guarantees/run.py", *sys.argv[1:]])
    server = dict(zip(("phi3v", "python", "openssl"), found, strict=True))
    client = {"client_python": platform.python_version(), "client_openssl": ssl.OPENSSL_VERSION}
    here = {"machine": processor(), "cores": os.cpu_count()}
    return {"command": command, "date": now()} | here | server | client


def processor() -> str:
    """The CPU's name and the system."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((row.partition(":")[2].strip() for row in file if row.startswith("model name")), name)
    except OSError:  # macOS
        name = subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return f"{name}, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    sys.exit(main())
