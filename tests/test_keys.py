"""The key store, with real files and real processes: time passes only when a test says so."""

import dataclasses
import hashlib
import math
import os
import re
import shutil
import sqlite3
import string
import subprocess
import sys
import tempfile
import time
from binascii import crc32
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v import keys
from phi3v.errors import Forbidden, RateLimited, SetupError, Unavailable
from phi3v.keys import Allowance, KeyStore

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
ADVICE = "if it is damaged, restore it from a backup, or move it away and create new keys"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.db"


@pytest.fixture
def unhurried(monkeypatch):
    """A store reads and writes only when it is asked to, so that what a test sees does not depend on the moment."""
    monkeypatch.setattr(keys, "FLUSH", 99)


@pytest.fixture
def store(path, clock):
    with closing(KeyStore(path, clock=clock)) as store:
        yield store


def wait(store, key) -> int:
    """0 for a request that is accepted, otherwise the seconds that Retry-After says."""
    try:
        return 0 * store.take(key).limit
    except RateLimited as error:
        seconds, limit = error.headers["Retry-After"], str(key.rate_limit)
        milliseconds = error.headers["Retry-After-Ms"]
        rest = {"X-RateLimit-Limit": limit, "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": seconds}
        assert error.status == 429 and error.headers == {"Retry-After": seconds, "Retry-After-Ms": milliseconds} | rest
        assert 0 <= int(seconds) * 1000 - int(milliseconds) < 1000
        return int(seconds)


def accepted(store, key, tries: int) -> int:
    return sum(wait(store, key) == 0 for _ in range(tries))


def start(script: str, *arguments) -> subprocess.Popen:
    """A process of its own, whose clock stands still."""
    script = "import os, resource, sys\nfrom phi3v.keys import *\nclock = lambda: 1.7e9\n" + script
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], **pipes, text=True)


def refused(message: str, action, *arguments, **named) -> None:
    with pytest.raises(SetupError) as caught:
        action(*arguments, **named)
    assert re.fullmatch(message, str(caught.value)), str(caught.value)  # in one line: a dot is no line end


def unavailable(action, *arguments) -> None:
    with pytest.raises(Unavailable) as caught:
        action(*arguments)
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "5"})
    assert caught.value.message == "the key database cannot be used now; try again in 5 s"


def lets_in(store, secret) -> bool:
    try:
        return store.verify(secret).name == "app"
    except Unavailable:
        return False


def overwrite(path, data: bytes) -> None:
    with open(path, "r+b") as file:  # the same file: whoever has it open sees it change
        file.truncate(0)
        file.write(data)


def test_a_key_is_its_prefix_30_base62_characters_and_their_crc32_in_6(store):
    made = [store.create("app") for _ in range(60)]
    for key, secret in made:
        body, check = re.fullmatch(r"phi3v_([0-9A-Za-z]{30})([0-9A-Za-z]{6})", secret).groups()
        assert sum(BASE62.index(c) * 62**i for i, c in enumerate(reversed(check))) == crc32(body.encode())
        assert key.prefix == secret[:10] and secret[10:] not in repr(key)
    assert len({key.id for key, _ in made}) == len({secret for _, secret in made}) == 60
    assert set("".join(secret[6:36] for _, secret in made)) == set(BASE62)  # one is missing once in 10¹¹ runs


@pytest.mark.parametrize("mask", [0, 0o777])
def test_only_a_keys_hash_is_stored_in_files_of_mode_0600_of_which_one_is_the_whole_backup(path, clock, mask):
    mask = os.umask(mask)
    try:
        with closing(KeyStore(path, clock=clock)) as store, closing(sqlite3.connect(path)) as other:
            old = store.create("app")[1]
            key, secret = store.rotate(old, 10)
            store.take(store.verify(secret))
            store.record(key, 1, 2)
            other.execute("UPDATE keys SET name = 'in a transaction, so that there is a journal'")
            files = {file.name: file.read_bytes() for file in path.parent.iterdir()}
            assert {oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()} == {"0o600"}
    finally:
        os.umask(mask)
    assert files.keys() == {"keys.db", "keys.db-journal", "keys.db-window", "keys.db-window-journal"}
    for canary in (old, secret):
        assert hashlib.sha256(canary.encode()).digest() in files["keys.db"]
        assert not [name for name, data in files.items() if canary[10:].encode() in data]
    with closing(sqlite3.connect(path)) as db:
        assert [db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("user_version", "journal_mode")] == [2, "delete"]
    copy = shutil.copy(path, path.with_name("copy.db"))
    with closing(KeyStore(copy, create=False, clock=clock)) as store:
        assert store.verify(secret) == dataclasses.replace(
            key, last_used=1.7e9, requests=1, prompt_tokens=1, completion_tokens=2
        )


def test_unknown_expired_and_deleted_keys_are_refused_with_the_same_words(store, clock):
    lasting, expiring, deleted = store.create("a"), store.create("b", expires=clock.now + 10), store.create("c")
    clock.now += 9.999
    assert [store.verify(secret) for _, secret in (lasting, expiring, deleted)] == [lasting[0], expiring[0], deleted[0]]
    clock.now = expiring[0].expires
    assert store.delete(deleted[1]) == deleted[0]
    unknown = [lasting[1][:-1] + "_", lasting[1] + "0", lasting[1].lower(), lasting[0].id, "", "ü", "x" * 9999]
    for secret in [expiring[1], deleted[1], *unknown]:
        with pytest.raises(Forbidden) as caught:
            store.verify(secret)
        words = "the API key is unknown, expired or deleted; `phi3v list` shows the keys there are"
        assert (caught.value.status, caught.value.message) == (403, words)
    assert store.verify(lasting[1]) == lasting[0]


def test_an_update_and_a_delete_are_in_force_at_once_in_another_store(store, path, clock):
    key, secret = store.create("old", 5, clock.now + 9)
    with closing(KeyStore(path, create=False, clock=clock)) as other:
        assert other.update(key.id, rate_limit=6).rate_limit == store.verify(secret).rate_limit == 6
        assert other.update(secret, name="new", expires=None) == store.verify(secret)
        with pytest.raises(TypeError):
            other.update(secret, name="newest", requests=0)
        found = store.find(key.id)
        assert (found.name, found.rate_limit, found.expires, found.requests) == ("new", 6, None, 0)
        other.update(secret, expires=clock.now)
        with pytest.raises(Forbidden):
            store.verify(secret)
        other.update(secret, expires=clock.now + 1)
        assert store.verify(secret).id == other.delete(key.id).id == key.id
        with pytest.raises(Forbidden):
            store.verify(secret)


def test_usage_is_added_up_and_the_list_is_in_order_of_creation(store, clock):
    first = store.create("z", 5)[0]
    clock.now += 1
    second = store.create("a")[0]
    for key, *tokens in ((first, 3, 4), (first, 30, 40), (second,)):
        clock.now += 1
        store.record(key, *tokens)
    usage = [(k.created, k.last_used, k.requests, k.prompt_tokens, k.completion_tokens) for k in store.list()]
    assert usage == [(1.7e9, 1.7e9 + 3, 2, 33, 44), (1.7e9 + 1, 1.7e9 + 4, 1, 0, 0)]


def usage(path) -> list[tuple]:
    """What the file itself says, whatever a store may have in memory."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT last_used, requests, prompt_tokens, completion_tokens FROM keys").fetchall()


def until(condition) -> None:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


def test_usage_is_written_later_in_one_go_by_itself_and_when_the_store_is_closed(path, clock, monkeypatch):
    assert keys.FLUSH == 0.5
    monkeypatch.setattr(keys, "FLUSH", 99)
    with closing(KeyStore(path, clock=clock)) as store:
        key, other = store.create("app")[0], store.create("other")[0]
        for key_ in (key, key, other):
            store.record(key_, 1, 2)
        store.delete(other.id)  # reading writes; and what was recorded for it is gone with it
        assert usage(path) == [(1.7e9, 2, 2, 4)]
        store.record(other, 1, 2)
        store.record(key, 1, 2)
        assert usage(path) == [(1.7e9, 2, 2, 4)]
    assert usage(path) == [(1.7e9, 3, 3, 6)]
    monkeypatch.setattr(keys, "FLUSH", 0.01)
    with closing(KeyStore(path, clock=clock)) as store:
        for requests in (4, 5):
            store.record(key, 1, 2)
            until(lambda requests=requests: usage(path) == [(1.7e9, requests, requests, 2 * requests)])


def test_usage_that_cannot_be_written_is_kept_and_tried_again_and_until_then_nobody_is_let_in(
    path, clock, monkeypatch, caplog
):
    monkeypatch.setattr(keys, "BUSY_TIMEOUT", 0.1)
    monkeypatch.setattr(keys, "FLUSH", 0.01)
    monkeypatch.setattr(keys, "QUIET", 0)
    with closing(KeyStore(path, clock=clock)) as store:
        key, secret = store.create("app")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # it can still be read
            store.record(key, 1, 2)
            until(lambda: caplog.text.count("cannot be used now") >= 2)
            store.record(key, 10, 20)
            assert not lets_in(store, secret) and usage(path) == [(None, 0, 0, 0)]
        until(lambda: lets_in(store, secret))
        assert usage(path) == [(1.7e9, 2, 11, 22)]
        path.unlink()
        store.record(key, 1, 2)
    assert not path.exists()  # closed all the same


def test_no_use_is_lost_or_counted_twice_while_others_record_and_read(path, clock, monkeypatch):
    monkeypatch.setattr(keys, "FLUSH", 0.001)
    with closing(KeyStore(path, clock=clock)) as store, ThreadPoolExecutor(8) as pool:
        key = store.create("app")[0]

        def use(_) -> None:
            for _ in range(200):
                store.record(key, 1, 2)

        working = pool.map(use, range(8))
        seen = [store.list()[0].requests for _ in range(50)]
        list(working)
        assert seen == sorted(seen) and [k.requests for k in store.list()] == [1600]
    assert usage(path) == [(1.7e9, 1600, 1600, 3200)]


def test_names_that_could_spoil_a_table_and_limits_out_of_range_are_refused(store):
    key, secret = store.create("ü" * 100, 1_000_000)
    wrong_name = "a key's name has 1 to 100 printable characters, not '[ -~]*'"
    for name in ("", "a" * 101, "a\nb", "\x1b[31m", "a\x00", "\u202e", "\udcff", "a\u2028b"):
        refused(wrong_name, store.create, name)
        refused(wrong_name, store.update, secret, name=name)
    for limit in (0, -1, 1_000_001):
        refused(f"a rate limit is 1 to 1,000,000 requests per minute, not {limit}", store.create, "b", limit)
        refused(f"a rate limit is .*, not {limit}", store.update, secret, rate_limit=limit)
    assert store.list() == [key]


def test_a_key_that_is_not_found_is_never_repeated_whole(store):
    secret = store.create("app")[1]
    refused(r"no key 'deadbeef' in .*keys\.db; `phi3v list` shows the ids", store.find, "deadbeef")
    for wrong in (secret[:-1] + "_", " " + secret, secret[6:], "X-API-Key: " + secret):
        refused(f"no key {re.escape(repr(wrong[:10] + '…'))} in .*", store.delete, wrong)
    assert len(store.list()) == 1


# Each step: the seconds that pass, the limit, and what Retry-After says then, 0 for an accepted request.
FULL = [(0, 3, 0)] * 3
SCENARIOS = {
    "the_window_slides_over_the_minute_boundary": [
        (39, 3, 0),
        (0, 3, 0),
        (0, 3, 0),
        (0, 3, 60),
        (1, 3, 59),
        (0.5, 3, 59),
        (58.4375, 3, 1),
        (0.0625, 3, 0),
    ],
    "requests_leave_one_by_one": [(0.25, 2, 0), (6.5, 2, 0), (3.75, 2, 50), (50, 2, 0), (0, 2, 7), (7, 2, 0)],
    "a_retry_a_second_before_retry_after_is_refused": [(0.25, 1, 0), (10.5, 1, 50), (49, 1, 1), (1, 1, 0)],
    "refused_requests_do_not_count": [*FULL, *[(0, 3, 60)] * 50, (59, 3, 1), (1, 3, 0), *FULL[1:], (0, 3, 60)],
    "a_lowered_limit_waits_for_all_but_the_last": [*[(1, 5, 0)] * 5, (1, 2, 58), (57, 2, 1), (1, 2, 0), (0, 2, 1)],
    "a_raised_limit_counts_what_was_before": [*FULL, (1, 3, 59), (0, 5, 0), (0, 5, 0), (0, 5, 59)],
    "a_clock_set_back_locks_nobody_out_for_more_than_60_s": [*FULL, (-3600, 3, 60), (59.5, 3, 1), (0.5, 3, 0)],
    "a_clock_set_forward_gives_n_extra_and_no_more_when_set_back": [*FULL, (3600, 3, 0), *FULL[1:], (-3600, 3, 60)],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_rate_window_when(store, clock, scenario):
    key = store.create("app")[0]
    for number, (seconds, limit, expected) in enumerate(SCENARIOS[scenario]):
        clock.now += seconds
        assert wait(store, dataclasses.replace(key, rate_limit=limit)) == expected, f"step {number}"


def test_an_accepted_request_says_what_is_left_and_two_keys_do_not_share(store, clock):
    key, other = store.create("app", 3)[0], store.create("other", 1)[0]
    assert [store.take(key), store.take(key)] == [Allowance(3, 2, 60), Allowance(3, 1, 60)]
    clock.now += 0.5
    assert store.take(key) == Allowance(3, 0, 60) and accepted(store, other, 9) == 1
    clock.now += 59.5
    assert vars(store.take(key)) == {"limit": 3, "remaining": 1, "reset": 1}
    assert Allowance(3, 1, 1).headers() == {
        f"X-RateLimit-{k}": v for k, v in (("Limit", "3"), ("Remaining", "1"), ("Reset", "1"))
    }


def test_an_allowance_may_be_asked_for_without_counting(store, clock):
    key = store.create("app", 2)[0]
    assert store.take(key, count=False) == Allowance(2, 2, 0)
    store.take(key)
    clock.now += 20
    assert store.take(key, count=False) == store.take(key, count=False) == Allowance(2, 1, 40)
    assert store.take(key) == Allowance(2, 0, 40)
    assert store.take(key, count=False) == Allowance(2, 0, 40)
    assert store.take(dataclasses.replace(key, rate_limit=1), count=False) == Allowance(1, 0, 60)
    assert wait(store, key) == 40


def test_a_restart_and_a_kill_keep_the_window_which_may_be_deleted(store, path, clock):
    key, secret = store.create("app", 3)
    store.take(key)
    store.close()
    script = "s = KeyStore(sys.argv[1], clock=clock); s.take(s.verify(sys.argv[2])); os.kill(os.getpid(), 9)"
    with start(script, path, secret) as process:
        assert process.wait() == -9
    clock.now += 20
    with closing(KeyStore(path, clock=clock)) as again:
        assert accepted(again, key, 9) == 1 and wait(again, key) == 40
    path.with_name("keys.db-window").unlink()
    with closing(KeyStore(path, clock=clock)) as again:
        assert accepted(again, key, 9) == 3
        path.with_name("keys.db-window").unlink()  # and even while it is in use
        assert accepted(again, key, 9) == 3


def test_the_time_is_read_while_no_other_process_can_write_the_window(path):
    def clock() -> float:
        with closing(sqlite3.connect(f"{path}-window", timeout=0)) as other:
            if key:
                with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                    other.execute("BEGIN IMMEDIATE")
        return 1.7e9

    key = None
    with closing(KeyStore(path, clock=clock)) as store:
        key = store.create("app")[0]
        assert store.take(key) == Allowance(100, 99, 60)


STEPS = st.lists(st.sampled_from([0, 0, 1, 64, 640, 1279, 1280, 3839, 3840]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(limit=st.integers(1, 4), steps=STEPS)
def test_no_sequence_of_requests_gets_more_than_n_in_any_60_s_nor_less_than_it_may(limit, steps):
    times, now = [], 0  # in 1/64 s, which floats hold exactly: 60 s are 3840
    with tempfile.TemporaryDirectory() as folder, closing(KeyStore(f"{folder}/k", clock=lambda: 1.7e9 + now / 64)) as s:
        key = s.create("app", limit)[0]
        for step in steps:
            now += step
            recent = [at for at in times if at > now - 3840]
            expected = math.ceil((recent[-limit] + 3840 - now) / 64) if len(recent) >= limit else 0
            assert wait(s, key) == expected
            times += [now] * (expected == 0)
    assert all(later - first >= 3840 for first, later in zip(times, times[limit:], strict=False))


HAMMER = """
print("ready", flush=True); input(); n = 0; s = KeyStore(sys.argv[1], clock=clock)
for i in range(60):
    key = s.verify(sys.argv[2])
    try: s.take(key)
    except RateLimited: continue
    s.record(key, 1); n += 1
s.close(); KeyStore(sys.argv[1] + "-new").create("one more"); print(n)
"""


def test_eight_threads_and_four_processes_hammering_one_file_get_exactly_n(store, path):
    key, secret = store.create("app", 50)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: accepted(store, key, 10), range(8))) == 50
    store.update(secret, rate_limit=150)
    path.with_name("keys.db-window").unlink()  # so that the processes make it at the same time, too
    processes = [start(HAMMER, path, secret) for _ in range(4)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 4
    for p in processes:
        p.stdin.write("\n")
        p.stdin.flush()
    printed = [p.communicate() for p in processes]
    assert [error for _, error in printed] == [""] * 4 and sum(int(out) for out, _ in printed) == 150
    assert [(k.requests, k.prompt_tokens) for k in store.list()] == [(150, 150)]
    with closing(KeyStore(f"{path}-new", create=False)) as new:
        assert [k.name for k in new.list()] == ["one more"] * 4


def test_every_key_that_a_killed_process_printed_is_stored_in_a_sound_file(path):
    script = "s = KeyStore(sys.argv[1])\nwhile True: print(s.create('app')[1], flush=True)"
    shown = []
    for keys_before_the_kill in (1, 1, 2, 3, 5, 8, 13, 21):
        with start(script, path) as process:
            shown += [process.stdout.readline() for _ in range(keys_before_the_kill)]
            process.kill()
            shown += process.stdout.readlines()
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with closing(KeyStore(path, create=False)) as store:
        found = {store.verify(line.strip()).id for line in shown if line.endswith("\n")}
        assert len(found) >= 54 and len(store.list()) - len(found) in range(9)


def test_a_missing_file_or_folder_or_a_full_disk_is_told_in_one_line_and_leaves_nothing(path, tmp_path):
    refused(
        r".*keys\.db does not exist; make a first key: phi3v create --name NAME --db .*keys\.db",
        KeyStore,
        path,
        create=False,
    )
    refused(r"cannot create .*/no/keys\.db: No such file or directory", KeyStore, tmp_path / "no" / "keys.db")
    script = "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); KeyStore(sys.argv[1])"
    error = start(script, path).communicate()[1]
    assert re.fullmatch(r"phi3v\.errors\.SetupError: cannot create .*keys\.db: .+", error.splitlines()[-1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda good: b"", lambda good: b"garbage" * 999, lambda good: good[:4096]])
def test_a_damaged_database_does_not_start_and_while_serving_lets_nobody_in_until_it_is_mended(
    unhurried, store, path, damage
):
    key, secret = store.create("app")
    good, bad = path.read_bytes(), damage(path.read_bytes())
    overwrite(path, bad)
    for _ in range(2):
        refused(rf"{path} cannot be used \(.+\); {ADVICE}", KeyStore, path)
        for action, argument in ((store.verify, secret), (store.create, "b"), (store.take, key)):
            unavailable(action, argument)
    assert path.read_bytes() == bad  # left for whoever mends it
    overwrite(path, good)
    store.record(store.verify(secret))
    assert [(k.id, k.requests) for k in store.list()] == [(key.id, 1)]


def test_a_newer_version_another_programs_file_and_a_damaged_page_or_window_are_refused_in_one_line(
    store, path, tmp_path
):
    good = path.read_bytes()
    overwrite(path, good[:-4096] + b"\xff" * 4096)  # an index, which a start would not come across
    refused(rf"{path} cannot be used \(.+\); {ADVICE}", KeyStore, path)
    overwrite(path, good)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 3")
    refused(f"{path} has version 3, this phi3v knows up to 2; use the newer phi3v", KeyStore, path)
    for version in (0, 1, 2):
        with closing(sqlite3.connect(tmp_path / "other.db", isolation_level=None)) as db:
            db.executescript(f"CREATE TABLE IF NOT EXISTS cookies (id); PRAGMA user_version = {version}")
        refused(rf"{tmp_path}/other\.db cannot be used \(.+\); {ADVICE}", KeyStore, tmp_path / "other.db")
    refused(rf"{tmp_path} cannot be used \(.+\); {ADVICE}", KeyStore, tmp_path)
    (tmp_path / "new.db-window").write_text("garbage" * 999)
    refused(r".*new\.db-window cannot be used \(.+\); delete it: .*", KeyStore, tmp_path / "new.db")


def test_a_database_that_is_removed_stays_so_and_a_backup_put_in_its_place_counts_at_once(
    unhurried, store, path, caplog
):
    (_, kept), (_, revoked) = store.create("kept"), store.create("revoked")
    backup = shutil.copy(path, path.with_name("backup"))
    with closing(KeyStore(backup)) as other:
        other.delete(revoked)
    path.unlink()
    unavailable(store.verify, kept)
    assert not path.exists() and f"{path} cannot be used now" in caplog.text and kept[10:] not in caplog.text
    os.replace(backup, path)
    store.record(store.verify(kept))
    with pytest.raises(Forbidden):
        store.verify(revoked)
    assert [(k.name, k.requests) for k in store.list()] == [("kept", 1)]


@pytest.mark.parametrize("side", ["", "-window"])
def test_a_file_that_another_process_has_locked_lets_nobody_in_until_it_is_free(
    unhurried, path, clock, monkeypatch, side
):
    monkeypatch.setattr(keys, "BUSY_TIMEOUT", 0)
    with closing(KeyStore(path, clock=clock)) as store:
        key, secret = store.create("app", 2)
        store.take(key)
        with closing(sqlite3.connect(f"{path}{side}", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            unavailable(*((store.take, key) if side else (store.verify, secret)))
        assert store.verify(secret) == key and accepted(store, key, 9) == 1


def test_a_link_to_the_database_shares_its_window_and_may_come_before_it(path, tmp_path, clock):
    (tmp_path / "link.db").symlink_to(path)
    with closing(KeyStore(tmp_path / "link.db", clock=clock)) as link, closing(KeyStore(path, clock=clock)) as store:
        key = link.create("app", 3)[0]
        assert accepted(link, key, 2) + accepted(store, key, 9) == 3


def test_a_thread_does_not_wait_without_end_for_another_one(unhurried, path, monkeypatch):
    monkeypatch.setattr(keys, "BUSY_TIMEOUT", 0)
    with closing(KeyStore(path)) as store:
        _, secret = store.create("app")
        with store._lock, pytest.raises(Unavailable, match="the key database is busy; try again in 5 s"):
            store.verify(secret)
        assert store.verify(secret).name == "app"
