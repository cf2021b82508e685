"""Answers by the content of their question, in SQLite: killed at any moment and run again, nothing is paid twice.

The key covers what changes an answer (provider, model, parameters, schema, messages) and not what doesn't (address,
key, concurrency). Every reply that came is kept, an unusable one too: the question that follows it is another one with
another key, so a second run walks the same way to the same result.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.commit import make_folder
from common.config import UserError, canonical_json
from llm_parts.wires.base import Reply, WireCall

# Raised when the prompts that the client builds around a caller's messages change.
PROMPT_VERSION = 1

_FORMAT = 1  # of the tables
_APPLICATION_ID = 0x4C4C4D43  # "LLMC": the file is ours
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, step TEXT NOT NULL, text TEXT NOT NULL, finish TEXT NOT NULL,
    tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, seconds REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS capabilities (
    provider TEXT, url TEXT, model TEXT, record TEXT NOT NULL, PRIMARY KEY (provider, url, model)
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class StoredReply:
    """A reply with the tokens and seconds it took; tokens are estimated where the server did not count."""

    reply: Reply
    tokens_in: int
    tokens_out: int
    seconds: float


def cache_key(call: WireCall, *, provider: str, model: str, seed: int | None) -> str:
    """SHA-256 over everything that shapes the answer to a call."""
    content = {
        "version": PROMPT_VERSION,
        "provider": provider,
        "model": model,
        "seed": seed,
        "temperature": call.temperature,
        "top_p": call.top_p,
        "max_tokens": call.max_tokens,
        "schema_name": call.schema_name,
        "schema": call.schema,
        "messages": call.messages,
    }
    return hashlib.sha256(canonical_json(content).encode("utf-8", "surrogatepass")).hexdigest()


class AnswerCache:
    """Replies and capability records in one file, or in memory where `path` is None; safe between threads."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        if path is not None:
            make_folder(path.parent)
        try:
            self._connection = sqlite3.connect(
                str(path or ":memory:"), check_same_thread=False, isolation_level=None, timeout=60
            )
            self._open()
        except sqlite3.Error as problem:
            raise UserError(
                f"llm.cache_path {path} cannot be used as a cache of answers: {problem}; move the file away "
                "(its answers are asked again) or name another"
            ) from None

    def _open(self) -> None:
        (owner,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (n_tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if n_tables and owner != _APPLICATION_ID:
            raise sqlite3.DatabaseError("it is a database of another program")
        if n_tables and version > _FORMAT:
            raise sqlite3.DatabaseError(f"it has format {version}, this program reads {_FORMAT}")
        # A write-ahead log without fsync at each commit: a killed process loses nothing, a power cut the last answers.
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.executescript(_TABLES)
        self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {_FORMAT}")

    def get(self, key: str) -> StoredReply | None:
        """The reply kept under `key`; None where there is none."""
        columns = "text, finish, tokens_in, tokens_out, seconds"
        with self._lock:
            row = self._connection.execute(f"SELECT {columns} FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        text, finish, tokens_in, tokens_out, seconds = row
        return StoredReply(Reply(text, finish), tokens_in, tokens_out, seconds)

    def put(self, key: str, stored: StoredReply, *, step: str) -> None:
        """Keep a reply; on return it survives the death of this process."""
        reply = stored.reply
        # A lone surrogate is no text that a file can hold.
        text = reply.text.encode("utf-8", "replace").decode()
        row = (key, step, text, reply.finish, stored.tokens_in, stored.tokens_out, stored.seconds)
        with self._lock, self._explained():
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def get_capabilities(self, provider: str, url: str, model: str) -> str | None:
        """The record of what a model accepts; None where it was not asked yet."""
        with self._lock:
            row = self._connection.execute(
                "SELECT record FROM capabilities WHERE provider = ? AND url = ? AND model = ?", (provider, url, model)
            ).fetchone()
        return row[0] if row else None

    def put_capabilities(self, provider: str, url: str, model: str, record: str) -> None:
        """Keep the record of what a model accepts."""
        with self._lock, self._explained():
            self._connection.execute(
                "INSERT OR REPLACE INTO capabilities VALUES (?, ?, ?, ?)", (provider, url, model, record)
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as problem:  # disk full, read-only, held by another process
            raise UserError(
                f"llm.cache_path {self.path} cannot be written: {problem}; free space or name another"
            ) from None


@dataclass
class _Flight:
    lock: threading.Lock = field(default_factory=threading.Lock)
    n_waiting: int = 0


class SingleFlight:
    """One at a time per key: of two threads with the same question the second finds the first one's answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    @contextmanager
    def hold(self, key: str) -> Iterator[None]:
        """Hold `key`; waits while another thread does."""
        with self._lock:
            flight = self._flights.setdefault(key, _Flight())
            flight.n_waiting += 1
        try:
            with flight.lock:
                yield
        finally:
            with self._lock:
                flight.n_waiting -= 1
                if not flight.n_waiting:
                    del self._flights[key]
