"""What the key store does when it is pressed: four processes that hammer one keys.db, and how soon a deletion is known.

    python bench/guarantees/keys.py [--checks 20000]

Prints one JSON object. The clock of the rate window stands still, so that the count of what was accepted is exact and
does not depend on how long the run took.
"""

import argparse
import json
import platform
import random
import sqlite3
import tempfile
import time
from contextlib import closing, suppress
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from phi3v.errors import Forbidden, RateLimited, Unavailable
from phi3v.keys import KeyStore

PROCESSES = 4
LIMIT = 1000  # requests per minute of the key whose accepted requests are counted
DELETIONS = 20
KEYS = 1000  # in the file while lookups and deletions are measured


def still() -> float:
    return 1.7e9


def hammer(path: Path, secret: str, checks: int, begin, told) -> None:
    """Check until `checks` are made; tell how many were accepted and failed, and the longest time that one took."""
    accepted = failed = 0
    longest = 0.0
    with closing(KeyStore(path, clock=still)) as store:
        key = store.verify(secret)
        begin.wait()
        for _ in range(checks):
            begun = time.perf_counter()
            try:
                store.take(key)
                accepted += 1
            except RateLimited:
                pass
            except Unavailable:
                failed += 1
            longest = max(longest, time.perf_counter() - begun)
    told.put((accepted, failed, longest))


def window(path: Path, limit: int, checks: int) -> dict[str, int]:
    """Four processes check one key; the time is from the first check to the last answer."""
    spawn = get_context("spawn")
    with closing(KeyStore(path, clock=still)) as store:
        secret = store.create("app", limit)[1]
        begin, told = spawn.Barrier(PROCESSES + 1), spawn.Queue()
        arguments = path, secret, checks // PROCESSES, begin, told
        processes = [spawn.Process(target=hammer, args=arguments) for _ in range(PROCESSES)]
        for process in processes:
            process.start()
        begin.wait()
        begun = time.perf_counter()
        answers = [told.get() for _ in processes]
        seconds = time.perf_counter() - begun
        for process in processes:
            process.join()
    accepted, failed, longest = zip(*answers, strict=True)
    speed, wait = round(checks / seconds), round(max(longest) * 1000)
    return {"accepted": sum(accepted), "checks_per_s": speed, "failed": sum(failed), "longest_ms": wait}


def lookups(store: KeyStore) -> dict[str, float]:
    """Median microseconds of `verify`, the five kinds of secrets in random order."""
    live, expired, deleted = store.create("a")[1], store.create("b", expires=1.0)[1], store.create("c")[1]
    old, now = store.create("d")[1], time.perf_counter
    store.rotate(old, 3600)
    store.delete(deleted)
    secrets = {"live": live, "old": old, "unknown": live[:-1] + "_", "expired": expired, "deleted": deleted}
    times: dict[str, list[float]] = {name: [] for name in secrets}
    for name in random.choices([*secrets], k=20_000):
        begun = now()
        with suppress(Forbidden):
            store.verify(secrets[name])
        times[name].append(now() - begun)
    return {name: round(median(took) * 1e6, 1) for name, took in times.items()}


def deleter(path: Path, pipe) -> None:
    with closing(KeyStore(path)) as store:
        while ident := pipe.recv():
            store.delete(ident)
            pipe.send(time.monotonic())  # the same for all processes


def deletions(path: Path, store: KeyStore) -> list[float]:
    """Milliseconds until a running request is told that another process deleted its key."""
    spawn, times = get_context("spawn"), []
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=deleter, args=(path, theirs))
    process.start()
    for _ in range(DELETIONS):
        key = store.create("app")[0]
        time.sleep(random.random())  # anywhere between two looks of the store
        ours.send(key.id)
        at = ours.recv()
        while store.lives(key):
            time.sleep(0.001)
        times.append((time.monotonic() - at) * 1000)
    ours.send(None)
    process.join()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checks", type=int, default=20_000, help="checks of the rate window in each run (20000)")
    checks = parser.parse_args().checks
    with tempfile.TemporaryDirectory() as folder:
        limited, wide = (window(Path(folder) / f"{n}.db", n, checks) for n in (LIMIT, 1_000_000))
        path = Path(folder) / "keys.db"
        with closing(KeyStore(path)) as store:
            key, *_ = (store.create(str(i))[0] for i in range(KEYS))
            begun = time.perf_counter()
            for _ in range(100):
                store._flush()
            look = (time.perf_counter() - begun) / 100
            begun = time.perf_counter()
            for _ in range(100_000):
                store.lives(key)
            lives = (time.perf_counter() - begun) / 100_000
            verified, noticed = lookups(store), deletions(path, store)
    figures = {
        "machine": f"{platform.platform()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "window_processes": PROCESSES,
        "window_checks_per_s": limited["checks_per_s"],
        "accepted_of_limit": [limited["accepted"], LIMIT],
        "window_checks_per_s_all_accepted": wide["checks_per_s"],
        "accepted_of_checks": [wide["accepted"], checks],
        "failed_checks": limited["failed"] + wide["failed"],
        "longest_check_ms": max(limited["longest_ms"], wide["longest_ms"]),
        "verify_us": verified,
        "lives_us": round(lives * 1e6, 2),
        f"look_for_deletions_ms_with_{KEYS}_keys": round(look * 1e3, 2),
        "deletion_noticed_ms": {"median": round(median(noticed)), "most": round(max(noticed))},
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
