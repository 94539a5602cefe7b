"""API keys in sqlite: create, list, update, delete, verify, the exact rate window, usage.

Knows nothing of HTTP or of the model. `keys.db` is durable and all there is to back up; `keys.db-window` holds the
last minute of requests, may be deleted at any time, and is written without waiting for the disk. Usage is added up in
memory first. So no request waits for a durable commit; a kill loses half a second of usage, no more.
"""

import hashlib
import logging
import math
import secrets
import sqlite3
import string
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from .errors import Forbidden, RateLimited, SetupError, Unavailable

VERSION = 1  # PRAGMA user_version of keys.db
WINDOW = 60_000_000  # microseconds: limits are per minute, as documented
BUSY_TIMEOUT = 5  # seconds another process, or another thread, may hold the database before we give up
FLUSH = 0.5  # seconds until usage is written: one durable commit for all requests meanwhile
MAX_RATE_LIMIT = 1_000_000  # requests per minute: far above what one process answers
MAX_NAME = 100  # characters: a name is for a table in a terminal
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
PREFIX = "phi3v_"
log = logging.getLogger("phi3v")

SCHEMA = f"""
CREATE TABLE keys (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, prefix TEXT NOT NULL, hash BLOB NOT NULL UNIQUE,
    rate_limit INTEGER NOT NULL, created REAL NOT NULL, expires REAL, last_used REAL,
    requests INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0, completion_tokens INTEGER NOT NULL DEFAULT 0
) STRICT;
PRAGMA user_version = {VERSION};
"""
ADD_KEY = "INSERT INTO keys (id, name, prefix, hash, rate_limit, created, expires) VALUES (?,?,?,?,?,?,?)"
ADD_USAGE = """
UPDATE keys SET last_used = ?, requests = requests + 1, prompt_tokens = prompt_tokens + ?,
    completion_tokens = completion_tokens + ? WHERE id = ?
"""
WINDOW_SCHEMA = """
CREATE TABLE IF NOT EXISTS hits (key TEXT NOT NULL, at INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS hits_by_key ON hits (key, at);
CREATE INDEX IF NOT EXISTS hits_by_time ON hits (at);
"""


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
        self._usage: deque[tuple] = deque()  # last_used, prompt and completion tokens, id: not written yet
        self._flushing, self._closing = threading.Lock(), threading.Event()
        self.created = create and not self.path.exists()
        if self.created:
            _create(self.path)
        elif not self.path.exists():
            raise SetupError(f"{self.path} does not exist; make a first key: phi3v create --name NAME --db {self.path}")
        self._connect()
        threading.Thread(target=self._keep_flushing, daemon=True).start()

    def close(self) -> None:
        """Write the usage and let go of the files."""
        self._closing.set()
        self._flush()
        self._connections.close()

    def create(self, name: str, rate_limit: int = 100, expires: float | None = None) -> tuple[Key, str]:
        """A new key and its secret, which is not stored and cannot be shown again."""
        _check(name, rate_limit)
        key_id, secret = secrets.token_hex(4), _new_secret()
        row = (key_id, name, secret[:10], _digest(secret), rate_limit, self._clock(), expires)
        with self._transaction() as db:
            db.execute(ADD_KEY, row)
        return self.find(key_id), secret

    def list(self) -> list[Key]:
        self._flush()
        return self._select("ORDER BY created, id")

    def find(self, reference: str) -> Key:
        """The key with this secret or id."""
        self._flush()
        column, value = ("hash", _digest(reference)) if reference.startswith(PREFIX) else ("id", reference)
        if found := self._select(f"WHERE {column} = ?", value):
            return found[0]
        shown = reference if len(reference) <= 10 else reference[:10] + "…"  # never echo a secret, mistyped or not
        raise SetupError(f"no key {shown!r} in {self.path}; `phi3v list` shows the ids")

    def update(self, reference: str, **changes: str | int | float | None) -> Key:
        """Set any of name, rate_limit, expires; in force at once, also in a running server."""
        key = self.find(reference)
        _check(changes.get("name", key.name), changes.get("rate_limit", key.rate_limit))
        for column in changes.keys() - {"name", "rate_limit", "expires"}:
            raise TypeError(f"update() cannot change {column!r}")
        with self._transaction() as db:
            for column, value in changes.items():
                db.execute(f"UPDATE keys SET {column} = ? WHERE id = ?", (value, key.id))
        return self.find(key.id)

    def delete(self, reference: str) -> Key:
        key = self.find(reference)
        with self._transaction() as db:
            db.execute("DELETE FROM keys WHERE id = ?", (key.id,))
        return key

    def verify(self, secret: str) -> Key:
        """The live key with this secret, or Forbidden; unknown and expired take the same path and the same time."""
        for key in self._select("WHERE hash = ?", _digest(secret)):
            if key.expires is None or key.expires > self._clock():
                return key
        raise Forbidden("the API key is unknown, expired or deleted; `phi3v list` shows the keys there are")

    def lives(self, key: Key) -> bool:
        return True

    def take(self, key: Key, count: bool = True) -> Allowance:
        """Count one request, or raise RateLimited: at most `rate_limit` are accepted in any 60 seconds.

        Exact between processes: the whole check is one write transaction, and the time is read inside it. Without
        `count` nothing is counted nor refused: it is the allowance as it stands, `reset` 0 if nothing counts.
        """
        with self._transaction(window=True) as db:
            now, sql = int(self._clock() * 1e6), db.execute
            sql("DELETE FROM hits WHERE at <= ?", (now - WINDOW,))
            # After the clock was set back, later hits would lock the key out until it catches up.
            sql("UPDATE hits SET at = ? WHERE at > ?", (now, now))
            used = sql("SELECT count(*) FROM hits WHERE key = ?", (key.id,)).fetchone()[0]
            left = max(key.rate_limit - used, 0)
            if count and left:
                sql("INSERT INTO hits VALUES (?, ?)", (key.id, now))
            # The hit whose end makes room: the oldest one, or a later one if the limit was lowered meanwhile.
            query = "SELECT at FROM hits WHERE key = ? ORDER BY at LIMIT 1 OFFSET ?"
            oldest = sql(query, (key.id, max(used - key.rate_limit, 0))).fetchone()
        reset = max(1, math.ceil((oldest[0] + WINDOW - now) / 1e6)) if oldest else 0
        allowance = Allowance(key.rate_limit, max(left - count, 0), reset)
        if left or not count:
            return allowance
        message = f"this key's {key.rate_limit} requests per minute are used up; try again in {reset} s"
        # The second is for clients in OpenAI's manner: one takes less than 60 s only, which the first rounds up to.
        retry = {"Retry-After": str(reset), "Retry-After-Ms": str(math.ceil((oldest[0] + WINDOW - now) / 1e3))}
        raise RateLimited(message, headers=retry | allowance.headers())

    def record(self, key: Key, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """Add one request and its tokens to the key's usage: in memory, and within FLUSH to the file."""
        self._usage.append((self._clock(), prompt_tokens, completion_tokens, key.id))

    def _keep_flushing(self) -> None:
        while not self._closing.wait(FLUSH):
            self._flush()

    def _flush(self) -> None:
        """Write the usage there is; what cannot be written now is kept for the next time."""
        with self._flushing:  # whoever reads next must find what another thread is just writing
            usage = [self._usage.popleft() for _ in range(len(self._usage))]
            try:
                if usage:
                    with self._transaction() as db:
                        db.executemany(ADD_USAGE, usage)
            except Unavailable:
                self._usage.extendleft(reversed(usage))

    def _select(self, which: str, *values) -> Sequence[Key]:
        with self._available():
            return [Key(*row) for row in self._db.execute(f"SELECT {COLUMNS} FROM keys {which}", values)]

    @contextmanager
    def _transaction(self, window: bool = False) -> Iterator[sqlite3.Connection]:
        """A write transaction that has the file to itself from its first statement on."""
        with self._available():
            db = self._window if window else self._db
            db.execute("BEGIN IMMEDIATE")
            with db:  # commits, or rolls back after an error
                yield db

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
    return PREFIX + body + "".join(BASE62[crc // 62**i % 62] for i in reversed(range(6)))


def _digest(secret: str) -> bytes:
    # A plain hash is enough: 178 random bits cannot be guessed, so there is nothing for a slow hash to slow down.
    return hashlib.sha256(secret.encode()).digest()


def _check(name: str, rate_limit: int) -> None:
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise SetupError(f"a key's name has 1 to {MAX_NAME} printable characters, not {name[:120]!r}")
    if not 1 <= rate_limit <= MAX_RATE_LIMIT:
        raise SetupError(f"a rate limit is 1 to {MAX_RATE_LIMIT:,} requests per minute, not {rate_limit}")


def _create(path: Path) -> None:
    """Make the database complete under a temporary name, then give it its own: nobody sees a half-made one."""
    try:
        with tempfile.NamedTemporaryFile(prefix=path.name, dir=path.parent) as file:  # mode 0600 under any umask
            with closing(sqlite3.connect(file.name)) as db:
                db.executescript(SCHEMA)
            with suppress(FileExistsError):  # unlike a rename, a link fails when another process was first
                path.hardlink_to(file.name)
    except (OSError, sqlite3.Error) as error:
        raise SetupError(f"cannot create {path}: {getattr(error, 'strerror', None) or error}") from None


def _connection(path: Path, connections: ExitStack) -> sqlite3.Connection:
    # mode=rw: a file that is gone must not come back empty.
    uri, options = f"{path.as_uri()}?mode=rw", {"isolation_level": None, "check_same_thread": False}
    return connections.enter_context(closing(sqlite3.connect(uri, timeout=BUSY_TIMEOUT, uri=True, **options)))


def _open(path: Path, connections: ExitStack) -> sqlite3.Connection:
    try:
        db = _connection(path, connections)
        version, state = db.execute("SELECT * FROM pragma_user_version, pragma_quick_check(1)").fetchone()
        if version > VERSION:
            raise SetupError(f"{path} has version {version}, this phi3v knows up to {VERSION}; use the newer phi3v")
        if version == 0 or state != "ok":
            raise sqlite3.DatabaseError("empty, damaged or not phi3v's")
        db.execute(f"SELECT {COLUMNS}, hash FROM keys LIMIT 1")
        return db
    except sqlite3.DatabaseError as error:
        remedy = "restore it from a backup, or move it away and create new keys"
        raise SetupError(f"{path} cannot be read ({error}); {remedy}") from None


def _open_window(path: Path, connections: ExitStack) -> sqlite3.Connection:
    try:
        path.touch(0o600)  # unlike open and close, keeps the locks that this process may have on it
        db = _connection(path, connections)
        # A killed process loses nothing without the syncs (the system holds the pages), only a power cut does.
        db.executescript(f"PRAGMA journal_mode = PERSIST; PRAGMA synchronous = OFF; {WINDOW_SCHEMA}")
        return db
    except (OSError, sqlite3.DatabaseError) as error:
        raise SetupError(f"{path} cannot be used ({error}); delete it: it holds only the last minute") from None
