"""Qwen's byte-pair ranks, read from the installed package that carries them."""

from __future__ import annotations

import base64
import binascii
from importlib.util import find_spec
from pathlib import Path

from omni_grpo_core.errors import ConfigError

_INSTALL = "pip install 'omni-grpo-core[qwen]'"


def ranks_file() -> Path:
    """Where the installed ``dashscope`` keeps the ranks.

    Raises:
        ConfigError: it is not installed, or no longer carries the file.
    """
    spec = find_spec("dashscope")  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "Qwen's vocabulary",
            got="no package dashscope",
            want="dashscope, which carries it as resources/qwen.tiktoken",
            fix=_INSTALL,
        )
    file = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    if not file.is_file():
        raise ConfigError(
            str(file),
            got="no such file",
            want="Qwen's byte-pair ranks, as dashscope 1.20 to 2.0 carry them",
            fix="install one of these versions of dashscope",
        )
    return file


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token bytes -> rank, which is also the token's id; in rank order, all ranks from 0 on.

    The format is tiktoken's: a line per token, its bytes in base64, a space, its rank.

    Raises:
        ConfigError: a line of another format, a token or a rank that is missing or told twice, a
            byte that is no token of its own.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise _foreign(f"{file}:{number}", repr(line[:40])) from error
        if len(ranks) != number:
            raise _foreign(f"{file}:{number}", "a token that an earlier line has")
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise _foreign(str(file), f"{len(ranks)} ranks that do not run from 0 on")
    if any(bytes([value]) not in ranks for value in range(256)):
        raise _foreign(str(file), "a byte without a token")
    return ranks


def _foreign(item: str, got: str) -> ConfigError:
    return ConfigError(
        item,
        got=got,
        want="a line per token, base64 and rank, each once",
        fix="dashscope changed or broke its file: install the version that constraints.txt pins",
    )
