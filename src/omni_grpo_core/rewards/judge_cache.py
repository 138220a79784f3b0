"""Verdicts on disk: none is paid for twice, even if the process is killed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.rewards.judge_prompt import TOP, JudgeVerdict

_SCHEMA = "CREATE TABLE IF NOT EXISTS verdict (key TEXT PRIMARY KEY, score INTEGER, reason TEXT)"


class VerdictCache:
    """A SQLite file in write-ahead mode, each verdict committed separately.

    A killed process loses no committed verdict and leaves a file that opens; several processes may
    share one. Close it after use.

    Raises :class:`~omni_grpo_core.errors.ConfigError` if the file is not a verdict cache or its
    folder is not writable.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._db = sqlite3.connect(path, timeout=10, isolation_level=None)
        except sqlite3.Error as error:
            raise _bad(path, error) from error
        try:
            columns = [row[1] for row in self._db.execute("PRAGMA table_info(verdict)")]
            if columns not in ([], ["key", "score", "reason"]):
                raise sqlite3.DatabaseError("another program's table of this name")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)
        except sqlite3.Error as error:
            self._db.close()
            raise _bad(path, error) from error

    def close(self) -> None:
        self._db.close()

    def get(self, key: str) -> JudgeVerdict | None:
        row = self._db.execute("SELECT score, reason FROM verdict WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        score, reason = row
        # SQLite stores any value in any column
        fine = type(score) is int and 0 <= score <= TOP and isinstance(reason, str)
        return JudgeVerdict(score, reason) if fine else None

    def put(self, key: str, verdict: JudgeVerdict) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO verdict VALUES (?, ?, ?)", (key, verdict.score, verdict.reason)
        )

    def __len__(self) -> int:
        [count] = self._db.execute("SELECT count(*) FROM verdict").fetchone()
        return int(count)


def _bad(path: str | Path, error: sqlite3.Error) -> ConfigError:
    return ConfigError(
        f"judge cache {path}",
        got=str(error),
        want="a verdict cache, or a new file in a writable folder",
        fix="set another file",
    )
