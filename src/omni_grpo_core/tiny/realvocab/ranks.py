"""Qwen's byte-pair ranks, read from the installed package that contains them."""

from __future__ import annotations

import base64
import binascii
from functools import partial
from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.extras import require

_invalid = partial(
    ConfigError,
    want="a line per token, base64 and rank, each once",
    fix="install the dashscope that constraints.txt pins: this one's file is changed or broken",
)


def ranks_file() -> Path:
    """Where the installed ``dashscope`` keeps the ranks.

    Raises:
        MissingExtra: it is not installed.
        ConfigError: it no longer contains the file.
    """
    # finds a top-level package without running it
    (package,) = require("qwen", "dashscope")
    file = Path(package.origin or "").parent / "resources" / "qwen.tiktoken"
    if not file.is_file():
        raise ConfigError(
            str(file),
            got="no such file",
            want="Qwen's byte-pair ranks, as in dashscope 1.20 to 2.0",
            fix="install one of these versions of dashscope",
        )
    return file


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes -> rank, which is also the token's id; in rank order, with no rank missing.

    The format is tiktoken's: a line per token, its bytes in base64, a space, its rank.

    Raises:
        ConfigError: a line of another format, a missing or duplicate token or rank, a byte without
            a token of its own.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise _invalid(f"{file}:{number}", got=repr(line[:40])) from error
        if len(ranks) != number:
            raise _invalid(f"{file}:{number}", got="a token that an earlier line has")
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise _invalid(str(file), got=f"{len(ranks)} ranks that are not 0 to {len(ranks) - 1}")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise _invalid(str(file), got="a byte without a token")
    return ranks
