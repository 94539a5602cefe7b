"""API keys in sqlite: create, list, update, rotate, delete, verify, the exact rate window, usage.

Knows nothing of HTTP or of the model. `keys.db` is durable and all there is to back up; `keys.db-window` holds the
last minute of requests, may be deleted at any time, and is written without waiting for the disk. Usage is added up in
memory first; a kill loses half a second of it, no more.
"""

import hashlib
import logging
import math
import os
import secrets
import sqlite3
import string
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import Forbidden, RateLimited, SetupError, Unavailable

VERSION = 2  # PRAGMA user_version of keys.db
WINDOW = 60_000_000  # microseconds: limits are per minute, as documented
BUSY_TIMEOUT = 5  # seconds another process, or another thread, may hold the database before we give up
RETRY = 0.001  # seconds until it is tried again: sqlite's own waits grow to 0.1 s, and beside busy processes it starves
FLUSH = 0.5  # seconds until usage is written, in one commit for all requests meanwhile, and `lives` knows of a change
QUIET = 60  # seconds between two lines about a database that cannot be used: a night of it must not fill the log
MAX_RATE_LIMIT = 1_000_000  # requests per minute: far above what one process answers
MAX_NAME = 100  # characters: a name is for a table in a terminal
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
log = logging.getLogger("phi3v")

SCHEMA = """CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, prefix TEXT NOT NULL, hash BLOB NOT NULL UNIQUE,
    rate_limit INTEGER NOT NULL, created REAL NOT NULL, expires REAL, last_used REAL,
    requests INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0
) STRICT"""
MIGRATION = """ALTER TABLE keys ADD COLUMN old_hash BLOB; ALTER TABLE keys ADD COLUMN old_until REAL;
    CREATE UNIQUE INDEX keys_by_old_hash ON keys (old_hash); PRAGMA user_version = 2"""
WINDOW_SCHEMA = """PRAGMA journal_mode = PERSIST; PRAGMA synchronous = OFF;
    CREATE TABLE IF NOT EXISTS recent (key TEXT, number INTEGER, at INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS recent_by_time ON recent (at)"""
BY_SECRET = "hash = ?1 OR old_hash = ?1 AND old_until > ?2"
ADD_KEY = "INSERT INTO keys (id, name, prefix, hash, rate_limit, created, expires) VALUES (?,?,?,?,?,?,?)"
ROTATE = "UPDATE keys SET old_hash = hash, old_until = ?, hash = ?, prefix = ? WHERE id = ?"
ADD_USAGE = """UPDATE keys SET last_used = ?, requests = requests + 1, prompt_tokens = prompt_tokens + ?,
    completion_tokens = completion_tokens + ? WHERE id = ?"""


@dataclass(frozen=True)
class Key:
    """A key as it may be shown: times are seconds since the epoch, `prefix` its first characters."""

    id: str
    name: str
    prefix: str
    rate_limit: int
    created: float
    expires: float | None
    last_used: float | None
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Allowance:
    """What is left of a key's minute: `reset` is in whole seconds, until the oldest request no longer counts."""

    limit: int
    remaining: int
    reset: int

    def headers(self) -> dict[str, str]:
        return {f"X-RateLimit-{name.capitalize()}": str(value) for name, value in vars(self).items()}


COLUMNS = ", ".join(f.name for f in fields(Key))


class KeyStore:
    """The keys in the file `path`, which is created when `create` is true and it is not there.

    Safe from any thread and with other processes on the same files. `clock` returns seconds since the epoch.
    """

    def __init__(self, path: str | Path, create: bool = True, clock: Callable[[], float] = time.time):
        self.path = Path(path).resolve()  # a link and its target share one window
        self._paths = self.path, self.path.with_name(self.path.name + "-window")
        self._clock = clock
        self._lock, self._connections = threading.Lock(), ExitStack()
        self._usage: list[tuple] = []  # last_used, prompt and completion tokens, id: not written yet
        self._ends: dict[str, float | None] = {}  # id: expires, as last read, whoever read it
        self._closing, self._stuck = threading.Event(), False  # stuck: usage cannot be written now
        self._told = -math.inf  # when the log was told of an error
        self.created = create and not self.path.exists()
        if self.created:
            _create(self.path, f"{SCHEMA}; {MIGRATION}")
        elif not self.path.exists():
            raise SetupError(f"{self.path} does not exist; make a first key: phi3v create --name NAME --db {self.path}")
        self._connect()
        self._thread = threading.Thread(target=self._keep_house, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the usage and let go of the files."""
        self._closing.set()
        self._thread.join()

    def create(self, name: str, rate_limit: int = 100, expires: float | None = None) -> tuple[Key, str]:
        """A new key and its secret, which is not stored and cannot be shown again."""
        _check(name, rate_limit)
        key_id, secret = secrets.token_hex(4), _new_secret()
        self._write(ADD_KEY, key_id, name, secret[:10], _digest(secret), rate_limit, self._clock(), expires)
        return self.find(key_id), secret

    def list(self) -> list[Key]:
        self._flush()
        return self._select("TRUE ORDER BY created, id")

    def find(self, reference: str) -> Key:
        """The key with this id or secret, which may be its old one while that is valid."""
        self._flush()
        if found := self._select(f"{BY_SECRET} OR id = ?3", _digest(reference), self._clock(), reference):
            return found[0]
        shown = reference if len(reference) <= 10 else reference[:10] + "…"  # never echo a secret, mistyped or not
        raise SetupError(f"no key {shown!r} in {self.path}; `phi3v list` shows the ids")

    def update(self, reference: str, **changes: str | int | float | None) -> Key:
        """Set any of name, rate_limit, expires; in force at once, also in a running server."""
        key = self.find(reference)
        _check(changes.get("name", key.name), changes.get("rate_limit", key.rate_limit))
        for column in changes.keys() - {"name", "rate_limit", "expires"}:
            raise TypeError(f"update() cannot change {column!r}")
        columns = "".join(f"{column} = ?, " for column in changes)
        self._write(f"UPDATE keys SET {columns}id = id WHERE id = ?", *changes.values(), key.id)
        return self.find(key.id)

    def rotate(self, reference: str, grace: float = 0) -> tuple[Key, str]:
        """The key with a new secret; the one before it ends at once or in `grace` seconds, any older one at once."""
        key, secret = self.find(reference), _new_secret()
        until = self._clock() + grace if grace else None  # not now: a clock set back would make it valid again
        self._write(ROTATE, until, _digest(secret), secret[:10], key.id)
        return self.find(key.id), secret

    def delete(self, reference: str) -> Key:
        key = self.find(reference)
        self._write("DELETE FROM keys WHERE id = ?", key.id)
        return key

    def verify(self, secret: str) -> Key:
        """The live key with this secret, or Forbidden; unknown and expired take the same path and the same time."""
        if self._stuck:
            raise Unavailable("the key database cannot be used now")
        for key in self._select(BY_SECRET, _digest(secret), self._clock()):
            if self.lives(key):
                return key
        raise Forbidden("the API key is unknown, expired or deleted; `phi3v list` shows the keys there are")

    def lives(self, key: Key) -> bool:
        """Whether a key of this store is neither deleted nor expired, as last read; never waits for the file."""
        expires = self._ends.get(key.id, 0)
        return expires is None or expires > self._clock()

    def take(self, key: Key, count: bool = True) -> Allowance:
        """Count one request, or raise RateLimited: at most `rate_limit` are accepted in any 60 seconds.

        Exact between processes: the whole check is one write transaction, and the time is read inside it. Without
        `count` nothing is counted nor refused: it is the allowance as it stands, `reset` 0 if nothing counts.
        """
        with self._available(), self._window.writing():
            now, sql = int(self._clock() * 1e6), self._window.execute
            sql("DELETE FROM recent WHERE at <= ?", (now - WINDOW,))
            # After the clock was set back, later requests would lock the key out until it catches up.
            sql("UPDATE recent SET at = ? WHERE at > ?", (now, now))
            # Numbered as they came, they need no count(*), which takes the longer the more there are.
            first = sql("SELECT min(number) FROM recent WHERE key = ?", (key.id,)).fetchone()[0] or 1
            last = sql("SELECT max(number) FROM recent WHERE key = ?", (key.id,)).fetchone()[0] or 0
            left = max(key.rate_limit - (last + 1 - first), 0)
            if count and left:
                sql("INSERT INTO recent VALUES (?, ?, ?)", (key.id, last + 1, now))
            # The request whose end makes room: the oldest one, or a later one if the limit was lowered meanwhile.
            number = max(first, last + 1 - key.rate_limit)
            oldest = sql("SELECT at FROM recent WHERE key = ? AND number = ?", (key.id, number)).fetchone()
        wait = oldest[0] + WINDOW - now if oldest else 0  # microseconds
        allowance = Allowance(key.rate_limit, max(left - count, 0), reset := math.ceil(wait / 1e6))
        if left or not count:
            return allowance
        message = f"this key's {key.rate_limit} requests per minute are used up; try again in {reset} s"
        # The second is for clients in OpenAI's manner: one takes less than 60 s only, which the first rounds up to.
        retry = {"Retry-After": str(reset), "Retry-After-Ms": str(math.ceil(wait / 1e3))}
        raise RateLimited(message, headers=retry | allowance.headers())

    def record(self, key: Key, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Add one request and its tokens to the key's usage: in memory, and within FLUSH to the file."""
        self._usage.append((self._clock(), prompt_tokens, completion_tokens, key.id))

    def _keep_house(self) -> None:
        while not self._closing.wait(FLUSH):
            self._flush()
        self._flush()
        self._connections.close()

    def _flush(self) -> None:
        """Read which keys there are and write the usage; until that can be done, `verify` lets nobody in."""
        try:
            with self._available():  # for all of it, so that whoever reads next finds both done
                self._ends = dict(self._db.execute("SELECT id, expires FROM keys"))
                if usage := self._usage[:]:
                    with self._db.writing():
                        self._db.executemany(ADD_USAGE, usage)
                    del self._usage[: len(usage)]
            self._stuck = False
        except Unavailable:
            self._stuck = True

    def _select(self, which: str, *values) -> Sequence[Key]:
        with self._available():
            found = [Key(*row) for row in self._db.execute(f"SELECT {COLUMNS} FROM keys WHERE {which}", values)]
            self._ends |= {key.id: key.expires for key in found}
            return found

    def _write(self, statement: str, *row: object) -> None:
        with self._available(), self._db.writing():
            self._db.execute(statement, row)

    @contextmanager
    def _available(self) -> Iterator[None]:
        """One thread at a time; a database that is locked, damaged or gone lets nobody in until it is mended.

        It is opened anew after an error or when another file took its place: sqlite would stay with the old one.
        """
        if not self._lock.acquire(timeout=BUSY_TIMEOUT):  # or the waits of many threads would add up
            raise Unavailable("the key database is busy")
        try:
            if self._opened != self._inodes():
                self._connect()
            yield
        except (sqlite3.Error, OSError, SetupError) as error:
            self._opened = None
            if (now := time.monotonic()) >= self._told + QUIET:
                self._told = now
                log.error("%s cannot be used now: %s", self.path, error)
            raise Unavailable("the key database cannot be used now") from error
        finally:
            self._lock.release()

    def _connect(self) -> None:
        self._connections.close()
        self._opened = self._inodes()  # before opening: what is replaced meanwhile is opened anew
        with ExitStack() as opened:  # which closes the one if the other fails
            self._db, self._window = _open(self.path, opened), _open_window(self._paths[1], opened)
            self._connections = opened.pop_all()

    def _inodes(self) -> Sequence[int | None]:
        return [path.stat().st_ino if path.exists() else None for path in self._paths]


def _new_secret() -> str:
    """phi3v_ + 30 random base62 characters (178 bits) + CRC32 of them in 6, so that scanners can tell a real key."""
    body = "".join(secrets.choice(BASE62) for _ in range(30))
    crc = zlib.crc32(body.encode())
    return "phi3v_" + body + "".join(BASE62[crc // 62**i % 62] for i in reversed(range(6)))


def _digest(secret: str) -> bytes:
    # A plain hash is enough: 178 random bits cannot be guessed, so there is nothing for a slow hash to slow down.
    return hashlib.sha256(secret.encode()).digest()


def _check(name: str, rate_limit: int) -> None:
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise SetupError(f"a key's name has 1 to {MAX_NAME} printable characters, not {name[:120]!r}")
    if not 1 <= rate_limit <= MAX_RATE_LIMIT:
        raise SetupError(f"a rate limit is 1 to {MAX_RATE_LIMIT:,} requests per minute, not {rate_limit}")


def _create(path: Path, script: str) -> None:
    """Make the database complete under a temporary name, then give it its own: nobody sees a half-made one."""
    try:
        with tempfile.NamedTemporaryFile(prefix=path.name, dir=path.parent) as file:
            os.fchmod(file.fileno(), 0o600)  # under any umask: it would take from 0600, too
            with closing(sqlite3.connect(file.name)) as db:
                db.executescript(script)
            with suppress(FileExistsError):  # unlike a rename, a link fails when another process was first
                path.hardlink_to(file.name)
    except (OSError, sqlite3.Error) as error:
        raise SetupError(f"cannot create {path}: {getattr(error, 'strerror', None) or error}") from None


class _Connection(sqlite3.Connection):
    """To an existing file; waits up to BUSY_TIMEOUT where another process has it."""

    def __init__(self, path: Path):
        uri = f"{path.as_uri()}?mode=rw"  # a file that is gone must not come back empty
        super().__init__(uri, timeout=0, isolation_level=None, check_same_thread=False, uri=True)

    def execute(self, *arguments) -> sqlite3.Cursor:
        end = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                return super().execute(*arguments)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(RETRY)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that has the file to itself from its first statement on, undone by an error."""
        self.execute("BEGIN IMMEDIATE")
        with self:
            yield
            self.execute("COMMIT")


def _open(path: Path, connections: ExitStack) -> _Connection:
    try:
        db = connections.enter_context(closing(_Connection(path)))
        version, state = db.execute("SELECT * FROM pragma_user_version, pragma_quick_check(1)").fetchone()
        if version > VERSION:
            raise SetupError(f"{path} has version {version}, this phi3v knows up to {VERSION}; use the newer phi3v")
        if version == 0 or state != "ok":
            raise sqlite3.DatabaseError("empty, damaged or not phi3v's")
        if version < VERSION:
            with db.writing():
                if db.execute("PRAGMA user_version").fetchone() == (version,):  # or another process was first
                    for statement in MIGRATION.split(";"):
                        db.execute(statement)
        db.execute(f"SELECT {COLUMNS} FROM keys WHERE {BY_SECRET}", (b"", 0))
        return db
    except sqlite3.DatabaseError as error:
        remedy = "if it is damaged, restore it from a backup, or move it away and create new keys"
        raise SetupError(f"{path} cannot be used ({error}); {remedy}") from None


def _open_window(path: Path, connections: ExitStack) -> _Connection:
    try:
        if not path.exists():
            _create(path, "")
        db = connections.enter_context(closing(_Connection(path)))
        for statement in WINDOW_SCHEMA.split(";"):  # a kill loses nothing without the syncs, only a power cut does
            db.execute(statement)
        return db
    except (OSError, sqlite3.DatabaseError) as error:
        raise SetupError(f"{path} cannot be used ({error}); delete it: it holds only the last minute") from None
