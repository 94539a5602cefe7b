"""The key store, with real files and real processes: time passes only when a test says so."""

import dataclasses
import hashlib
import json
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v import keys
from phi3v.errors import Forbidden, RateLimited, SetupError, Unavailable
from phi3v.keys import Allowance, Key, KeyStore

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


def start(script: str, *arguments, command: Sequence[str] = ()) -> subprocess.Popen:
    """A process of its own, whose clock stands still."""
    imports = "import os, resource, sqlite3, sys; from contextlib import closing; from phi3v.keys import *"
    script = f"{imports}\nclock = lambda: 1.7e9\n{script}"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([*command, sys.executable, "-c", script, *map(str, arguments)], **pipes, text=True)


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


def forbidden(store, *secrets) -> None:
    for secret in secrets:
        with pytest.raises(Forbidden):
            store.verify(secret)


def test_a_rotated_key_has_a_new_secret_and_is_otherwise_the_same_at_once_in_another_store(store, path, clock):
    key, old = store.create("app", 5, clock.now + 100)
    store.take(key)
    store.record(key, 1, 2)
    with closing(KeyStore(path, create=False, clock=clock)) as other:
        rotated, new = other.rotate(old)
        usage = {"last_used": 1.7e9, "requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        assert new[:10] == rotated.prefix and dataclasses.replace(rotated, **usage) == dataclasses.replace(
            key, prefix=new[:10], **usage
        )
        assert store.verify(new).id == key.id and store.lives(key) and store.take(key).remaining == 3
        forbidden(store, old)
        refused(r"no key 'phi3v_.{4}…' in .*", other.rotate, old)
        clock.now -= 3600  # a clock that is set back revives nothing
        forbidden(store, old)
        assert store.list() == [store.verify(new)] and store.list()[0].requests == 1


def test_the_old_secret_of_a_rotated_key_is_good_for_everything_until_its_grace_ends(store, path, clock):
    key, first = store.create("app")
    other = store.create("other")[0]
    second = store.rotate(key.id, grace=10)[1]
    clock.now += 9.999
    assert store.verify(first) == store.verify(second) == store.find(first)
    assert store.update(first, name="new") == store.verify(second)
    clock.now += 0.001
    forbidden(store, first)
    refused(r"no key .*", store.find, first)
    third = store.rotate(second, grace=10)[1]
    fourth = store.rotate(second, grace=20)[1]  # during the grace: the older of the two ends at once
    forbidden(store, first, second)
    clock.now += 19.999
    assert {store.verify(secret).id for secret in (third, fourth)} == {key.id}
    store.update(fourth, expires=clock.now)
    forbidden(store, third, fourth)
    store.update(third, expires=None)
    assert store.delete(third).id == key.id and store.list() == [other]
    forbidden(store, third, fourth)


def test_a_key_that_is_deleted_while_it_is_rotated_or_changed_stays_deleted(store, monkeypatch):
    key = store.create("app")[0]
    make = keys._new_secret

    def late() -> str:
        store.delete(key.id)
        return make()

    monkeypatch.setattr(keys, "_new_secret", late)
    refused(f"no key '{key.id}' in .*", store.rotate, key.id)
    assert store.list() == []


def test_a_secret_is_looked_up_by_indexes_alone_whether_it_is_current_old_or_unknown(store):
    plan = store._db.execute(f"EXPLAIN QUERY PLAN SELECT id FROM keys WHERE {keys.BY_SECRET}", (b"", 0)).fetchall()
    steps = [row[3] for row in plan]
    assert [step for step in steps if "keys" in step] == [
        "SEARCH keys USING INDEX sqlite_autoindex_keys_2 (hash=?)",
        "SEARCH keys USING INDEX keys_by_old_hash (old_hash=?)",
    ]


def test_a_deleted_or_expired_key_lives_no_longer_whichever_process_saw_to_it(path, clock, monkeypatch):
    monkeypatch.setattr(keys, "FLUSH", 0.01)
    with closing(KeyStore(path, clock=clock)) as store, closing(KeyStore(path, clock=clock)) as other:
        key, ending, late, kept = (store.create(name)[0] for name in ("a", "b", "c", "d"))
        assert all(store.lives(k) for k in (key, ending, late, kept))
        other.delete(key.id)
        until(lambda: not store.lives(key))
        other.update(ending.id, expires=clock.now + 10)
        until(lambda: store._ends[ending.id] == clock.now + 10)
        clock.now += 9.999
        assert store.lives(ending)
        clock.now += 0.001
        assert not store.lives(ending)
        other.update(ending.id, expires=None)
        until(lambda: store.lives(ending))
        store.delete(late.id)
        until(lambda: not store.lives(late))
        assert store.lives(kept)


def test_whether_a_key_lives_never_waits_and_what_was_read_last_holds_while_the_file_cannot_be_read(
    path, clock, monkeypatch, caplog
):
    monkeypatch.setattr(keys, "FLUSH", 0.01)
    monkeypatch.setattr(keys, "BUSY_TIMEOUT", 0.5)
    with closing(KeyStore(path, clock=clock)) as store:
        key, ending = store.create("a")[0], store.create("b", expires=clock.now + 10)[0]
        with store._lock:  # which a thread in the middle of a wait for the file has
            assert store.lives(key) and store.lives(ending)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            other.execute("DELETE FROM keys")
            until(lambda: "cannot be used now" in caplog.text)
            clock.now += 10
            assert store.lives(key) and not store.lives(ending)
            other.execute("COMMIT")
        until(lambda: not store.lives(key))
        until(lambda: not store._stuck)
        key = store.create("c", expires=clock.now + 10)[0]
        good = path.read_bytes()
        overwrite(path, b"garbage" * 999)
        until(lambda: store._stuck)
        assert store.lives(key)
        clock.now += 10
        assert not store.lives(key)
        overwrite(path, good)
        until(lambda: not store._stuck)


def test_a_key_that_was_just_made_lives_while_others_are_read_made_and_deleted(path, clock, monkeypatch):
    monkeypatch.setattr(keys, "FLUSH", 0.0001)
    with closing(KeyStore(path, clock=clock)) as store, closing(KeyStore(path, clock=clock)) as other:

        def use(_) -> None:
            for _ in range(10):
                secret = other.create("app")[1]
                key = store.verify(secret)
                assert all(store.lives(key) for _ in range(500))
                other.delete(key.id)
                until(lambda key=key: not store.lives(key))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(use, range(4)))
        until(lambda: store._ends == {})


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


def test_usage_is_written_later_in_one_go_by_itself_and_when_the_store_is_closed(path, clock, monkeypatch, caplog):
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
        store.close()
    assert usage(path) == [(1.7e9, 3, 3, 6)] and caplog.text == ""  # closed twice is closed
    monkeypatch.setattr(keys, "FLUSH", 0.01)
    with closing(KeyStore(path, clock=clock)) as store:
        for requests in (4, 5):
            store.record(key, 1, 2)
            until(lambda requests=requests: usage(path) == [(1.7e9, requests, requests, 2 * requests)])


def test_usage_that_cannot_be_written_is_kept_and_tried_again_and_until_then_nobody_is_let_in(
    path, clock, monkeypatch, caplog
):
    monkeypatch.setattr(keys, "BUSY_TIMEOUT", 0.5)
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


def test_a_check_costs_the_same_however_many_requests_the_window_holds(store, clock):
    key, steps = store.create("app", 1_000_000)[0], []

    def cost() -> int:
        steps.clear()
        store._window.set_progress_handler(lambda: steps.append(1), 1)  # called for each step of sqlite's machine
        store.take(key)
        store._window.set_progress_handler(None, 1)
        return len(steps)

    store.take(key)
    few = cost()
    with store._window.writing():
        rows = [(key.id, number, int(clock.now * 1e6)) for number in range(3, 50_001)]
        store._window.executemany("INSERT INTO recent VALUES (?, ?, ?)", rows)
    assert 0 < cost() <= few and store.take(key, count=False) == Allowance(1_000_000, 949_999, 60)


def test_a_busy_file_is_tried_again_every_millisecond_so_that_nobody_starves(unhurried, store, path, monkeypatch):
    slept = []
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 300:
                other.execute("COMMIT")

        monkeypatch.setattr(keys.time, "sleep", sleep)
        assert store.create("app")[0].name == "app"
    assert slept == [0.001] * 300


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


COMMANDS = """
import time
from phi3v.__main__ import main
db = sys.argv[1]
def run(*arguments):
    read, write = os.pipe(); kept = os.dup(1); os.dup2(write, 1); os.close(write)
    status = main([*arguments, "--db", db]); sys.stdout.flush(); os.dup2(kept, 1); os.close(kept)
    with os.fdopen(read) as file: assert status == 0, arguments; return file.read().strip()
print("ready", flush=True); input()
for _ in range(8):
    old = run("create", "--name", "app"); run("update", "--key", old, "--rate-limit", "7")
    new = run("rotate", "--key", old, "--grace", "1h"); run("list", "--json"); run("delete", "--key", old)
    assert "no key" not in run("list")
    run("create", "--name", "kept")
"""


def test_four_command_lines_and_a_server_at_once_are_never_told_that_the_file_is_locked(store, path, caplog):
    key, secret = store.create("server", 1_000_000)
    processes = [start(COMMANDS, path) for _ in range(4)]
    assert [p.stdout.readline() for p in processes] == ["ready\n"] * 4
    for p in processes:
        p.stdin.write("\n")
        p.stdin.flush()
    requests = 0
    while any(p.poll() is None for p in processes):
        store.record(store.verify(secret))
        assert store.take(key).limit == 1_000_000 and store.lives(key)
        requests += 1
    told = [p.communicate()[1].splitlines() for p in processes]
    assert [p.returncode for p in processes] == [0] * 4, told
    shown = re.compile(r"phi3v: that is key \w{8} .*, shown only this once(; the one before ends on [0-9: at-]+)?")
    assert [len(lines) for lines in told] == [24] * 4 and all(shown.fullmatch(line) for t in told for line in t)
    assert caplog.text == "" and requests > 0
    found = {k.name: k.requests for k in store.list()}
    assert found == {"server": requests, "kept": 0} and len(store.list()) == 33


KILLED = """
import json, random, signal, time
from phi3v.__main__ import main
def child(db, killed_after):
    read, write = os.pipe(); begun = time.perf_counter()
    if not (process := os.fork()):
        os.dup2(write, 1); os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(["create", "--name", "app", "--db", db]))
    os.close(write)
    if killed_after is not None:
        time.sleep(killed_after); os.kill(process, signal.SIGKILL)
    with os.fdopen(read) as file: shown = file.read()
    os.waitpid(process, 0)
    return shown, time.perf_counter() - begun
folder, shown = sys.argv[1], {}
child(f"{folder}/warm", None)
whole = max(child(f"{folder}/{i}", None)[1] for i in range(3))
for i in range(100):
    db = f"{folder}/{i // 4}.db"  # the first one makes the file
    line, _ = child(db, random.uniform(0, 1.2 * whole))
    shown.setdefault(db, []).extend([line.strip()] * line.endswith("\\n"))
    if os.path.exists(db):
        with closing(sqlite3.connect(db)) as file: sound = file.execute("PRAGMA integrity_check").fetchall()
        assert sound == [("ok",)], (db, sound)
print(json.dumps(shown))
"""


def test_a_create_that_is_killed_at_any_moment_has_stored_every_key_it_showed_in_100_tries(tmp_path):
    with start(KILLED, tmp_path) as process:
        out, err = process.communicate()
    assert err == "" and out.count(".db") == 25
    for db, secrets in json.loads(out).items():
        with closing(KeyStore(db)) as store:  # makes it if no try came so far: that it is not there is sound, too
            assert {store.verify(secret).name for secret in secrets} <= {"app"}
            assert len(secrets) <= len(store.list()) <= 4


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


FULL_DISK = """
import time
from phi3v import keys
keys.FLUSH = 0.01
folder, mounted = sys.argv[1], sys.argv[2] == "mounted"
def fill():
    if not mounted: return resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with open(f"{folder}/rest", "wb", 0) as file:
        try:
            while file.write(bytes(512)): pass
        except OSError as error: assert error.errno == 28, error
def free():
    if not mounted: return resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    os.unlink(f"{folder}/rest")
def told(action, *arguments):
    try: return action(*arguments)
    except (SetupError, Unavailable) as error: return type(error).__name__
def wait(condition):
    end = time.monotonic() + 20
    while not condition(): assert time.monotonic() < end; time.sleep(0.005)
store = KeyStore(f"{folder}/keys.db", clock=clock)
key, secret = store.create("app", 1000000)
many = [store.create(str(i))[0].id for i in range(40)]
fill()
new = [told(store.create, "x" * 100) for _ in range(60)]  # a page that is there already may have room for some
assert new.pop() == "Unavailable", new
print(told(KeyStore, f"{folder}/new.db"), told(store.rotate, key.id), os.path.exists(f"{folder}/new.db"))
store.record(key, 1, 2)
wait(lambda: told(store.verify, secret) == "Unavailable")
print(store.lives(key))
free()
wait(lambda: told(store.verify, secret) != "Unavailable")
with closing(sqlite3.connect(f"{folder}/keys.db")) as db: print(*db.execute("PRAGMA integrity_check").fetchone())
shown = {key.id, *many, *[n[0].id for n in new if n != "Unavailable"]}
print({k.id for k in store.list()} == shown, store.find(key.id).requests)
print(type(store.take(key)).__name__)
store.close()
"""


@pytest.mark.parametrize("disk", ["limited", "mounted"])
def test_a_full_disk_lets_nobody_in_shows_no_key_that_is_not_stored_and_is_over_when_there_is_room(tmp_path, disk):
    arguments, command = (tmp_path, disk), []
    if disk == "mounted":  # a real one, in a mount namespace of its own
        mount = 'mount -t tmpfs -o size=128k none "$0" && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path)]
        if sys.platform != "linux" or subprocess.run([*command, "true"], capture_output=True).returncode:
            pytest.skip("no file system may be mounted here")
    with start(FULL_DISK, *arguments, command=command) as process:
        out, err = process.communicate()
    assert out.split("\n") == ["SetupError Unavailable False", "True", "ok", "True 1", "Allowance", ""], err


@contextmanager
def nobody(folder):
    """Root may write whatever the mode says; nobody may not."""
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_database_that_is_read_only_while_serving_lets_nobody_in_until_it_can_be_written(clock, monkeypatch, what):
    monkeypatch.setattr(keys, "FLUSH", 0.01)
    with tempfile.TemporaryDirectory() as folder, nobody(folder):
        path = Path(folder) / "keys.db"
        with closing(KeyStore(path, clock=clock)) as store:
            key, secret = store.create("app")
            store.take(key)
            if what == "file":  # as a backup that was put in its place may be
                shutil.copy(path, f"{folder}/copy")
                os.chmod(f"{folder}/copy", 0o444)
                os.replace(f"{folder}/copy", path)
            else:
                os.chmod(folder, 0o555)
            store.record(key, 1, 2)
            until(lambda: not lets_in(store, secret))
            unavailable(store.create, "new")
            assert not lets_in(store, secret) and store.lives(key)
            os.chmod(folder, 0o755)
            path.chmod(0o600)
            until(lambda: lets_in(store, secret))
            assert usage(path) == [(1.7e9, 1, 1, 2)]


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


VERSION_1 = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, prefix TEXT NOT NULL, hash BLOB NOT NULL UNIQUE,
    rate_limit INTEGER NOT NULL, created REAL NOT NULL, expires REAL, last_used REAL,
    requests INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0
) STRICT;
PRAGMA user_version = 1;
"""
OLD_KEYS = [
    Key("00000001", "first", "phi3v_AAAA", 5, 1.6e9, None, 1.65e9, 12, 345, 678),
    Key("00000002", "second", "phi3v_BBBB", 7, 1.6e9 + 1, 1.8e9, None, 0, 0, 0),
]


def version_1(path) -> list[str]:
    """Make `path` as the first version did; the secrets of its keys."""
    secrets = [key.prefix + "x" * 32 for key in OLD_KEYS]
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(VERSION_1)
        for key, secret in zip(OLD_KEYS, secrets, strict=True):
            given = vars(key) | {"hash": hashlib.sha256(secret.encode()).digest()}
            db.execute(f"INSERT INTO keys ({', '.join(given)}) VALUES ({', '.join('?' * 11)})", [*given.values()])
    return secrets


def shape(path) -> list[tuple]:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        version = db.execute("PRAGMA user_version").fetchall()
        made = db.execute("SELECT type, name, sql FROM sqlite_schema ORDER BY name").fetchall()
        return version + [(kind, name, " ".join((sql or "").split())) for kind, name, sql in made]


def test_a_database_of_version_1_becomes_one_of_version_2_when_it_is_opened_with_all_that_is_in_it(path, tmp_path):
    secrets = version_1(path)
    with closing(KeyStore(path, create=False, clock=lambda: 1.7e9)) as store:
        assert not store.created and store.list() == OLD_KEYS == [store.verify(secret) for secret in secrets]
        key, new = store.rotate(secrets[0], 10)
        assert key == dataclasses.replace(OLD_KEYS[0], prefix=new[:10]) == store.verify(secrets[0])
    KeyStore(tmp_path / "new.db").close()
    assert shape(path)[0] == (2,) and shape(path) == shape(tmp_path / "new.db")


def test_a_process_of_version_1_works_on_beside_one_of_version_2(path):
    secrets = version_1(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as old:  # with the statements of that version
        columns = ", ".join(f.name for f in dataclasses.fields(Key))
        by_hash = f"SELECT {columns} FROM keys WHERE hash = ?"
        digest = hashlib.sha256(secrets[0].encode()).digest()
        assert Key(*old.execute(by_hash, (digest,)).fetchone()) == OLD_KEYS[0]
        with closing(KeyStore(path, clock=lambda: 1.7e9)) as store:
            assert Key(*old.execute(by_hash, (digest,)).fetchone()) == OLD_KEYS[0]
            made = "INSERT INTO keys (id, name, prefix, hash, rate_limit, created, expires) VALUES (?,?,?,?,?,?,?)"
            old.execute(made, ("00000003", "third", "phi3v_CCCC", b"3", 9, 1.7e9, None))
            old.execute(
                "UPDATE keys SET last_used = ?, requests = requests + 1, prompt_tokens = prompt_tokens + ?,"
                " completion_tokens = completion_tokens + ? WHERE id = ?",
                (1.7e9, 1, 2, "00000001"),
            )
            old.execute("DELETE FROM keys WHERE id = ?", ("00000002",))
            used = dataclasses.replace(
                OLD_KEYS[0], last_used=1.7e9, requests=13, prompt_tokens=346, completion_tokens=680
            )
            assert store.list() == [used, Key("00000003", "third", "phi3v_CCCC", 9, 1.7e9, None, None, 0, 0, 0)]
            new = store.rotate(secrets[0], 10)[1]
            assert old.execute(by_hash, (digest,)).fetchone() is None  # it knows the current secret only
            assert old.execute(by_hash, (hashlib.sha256(new.encode()).digest(),)).fetchone()[0] == "00000001"
    assert shape(path)[0] == (2,)


OPENED = """
for line in sys.stdin:
    s = KeyStore(line.strip(), create=False); print(len(s.list()), flush=True); s.close()
"""


def test_four_processes_and_a_server_that_open_a_database_of_version_1_at_once_migrate_it_once(tmp_path):
    processes = [start(OPENED, tmp_path) for _ in range(4)]
    for i in range(20):
        version_1(tmp_path / f"{i}.db")
        for p in processes:
            p.stdin.write(f"{tmp_path}/{i}.db\n")
            p.stdin.flush()
        with closing(KeyStore(tmp_path / f"{i}.db")) as store:
            assert store.list() == OLD_KEYS
        assert [p.stdout.readline() for p in processes] == ["2\n"] * 4
        assert shape(tmp_path / f"{i}.db")[0] == (2,)
    assert [p.communicate()[1] for p in processes] == [""] * 4


def test_of_two_processes_that_both_find_version_1_the_later_one_leaves_the_file_as_it_is(path, monkeypatch):
    version_1(path)
    writing, others = keys._Connection.writing, []

    def late(self):
        monkeypatch.setattr(keys._Connection, "writing", writing)
        others.append(KeyStore(path))
        return writing(self)

    monkeypatch.setattr(keys._Connection, "writing", late)
    with closing(KeyStore(path)) as store, closing(others[0] if others else store) as other:
        assert other is not store and store.list() == other.list() == OLD_KEYS


def test_a_migration_that_fails_or_is_killed_leaves_version_1_complete(path):
    secrets = version_1(path)
    good = path.read_bytes()
    script = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (len(open(sys.argv[1], 'rb').read()),) * 2); KeyStore(sys.argv[1])"
    )
    error = start(script, path).communicate()[1]
    assert re.search(rf"SetupError: {path} cannot be used \(.+\); {ADVICE}$", error.strip()), error
    script = """
from phi3v import keys
class Killed(keys._Connection):
    def execute(self, statement, *values):
        return super().execute(statement, *values) if statement != "COMMIT" else os.kill(os.getpid(), 9)
keys._Connection = Killed
KeyStore(sys.argv[1])
"""
    with start(script, path) as process:
        assert (process.communicate()[1], process.returncode) == ("", -9)
    assert shape(path)[0] == (1,) and path.read_bytes() == good
    with closing(KeyStore(path, clock=lambda: 1.7e9)) as store:
        assert [store.verify(secret) for secret in secrets] == OLD_KEYS


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


def test_the_log_is_told_once_a_minute_of_a_database_that_cannot_be_used(unhurried, store, path, monkeypatch, caplog):
    secret, good = store.create("app")[1], path.read_bytes()
    now = time.monotonic()
    monkeypatch.setattr(keys.time, "monotonic", lambda: now)
    overwrite(path, b"")
    for seconds, lines in ((0, 1), (59.9, 1), (0.2, 2), (30, 2)):
        now += seconds
        unavailable(store.verify, secret)
        assert caplog.text.count(f"{path} cannot be used now: ") == lines
    overwrite(path, good)
    assert lets_in(store, secret)


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
