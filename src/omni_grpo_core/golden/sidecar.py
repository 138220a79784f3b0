"""Tensors that a golden stores only as fingerprints, in full, in a folder outside version control.

One safetensors file per golden, named by the hash of its content, which the golden's header holds.
With it every stage can be replayed exactly; nothing else depends on it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from omni_grpo_core.errors import TraceError
from omni_grpo_core.golden.leaf_text import summarise
from omni_grpo_core.io.atomic import write_file
from omni_grpo_core.io.bounded import Unreadable, read_bytes
from omni_grpo_core.trace import dtype_name
from omni_grpo_core.trace.fingerprint import Fingerprint
from omni_grpo_core.trace.leaves import Numbers, leaves
from omni_grpo_core.trace.store import unpack

KEY = "sidecar"
"""The header's entry."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 40
_FIX = "delete it: the check then replays fewer stages"


def store(folder: Path, value: object) -> dict[str, str]:
    """Save the tensors of ``value`` that its golden stores as fingerprints; returns the header
    entry, empty if there are none."""
    tensors = {
        f"{path}#{number}": part.contiguous()
        for path, leaf in leaves(value).items()
        if isinstance(leaf, Numbers) and isinstance(summarise(path, leaf), Fingerprint)
        for number, part in enumerate(leaf.parts)
    }
    if not tensors:
        return {}
    # rows and batch may share memory, which safetensors rejects
    packed = save({name: part.clone() for name, part in tensors.items()})
    digest = hashlib.sha256(packed).hexdigest()
    file = _file(folder, digest)
    if not file.is_file():
        write_file(file, packed)
    return {KEY: digest}


def fetch(folder: Path, header: Mapping[str, str]) -> dict[str, Numbers]:
    """The leaves saved for a golden, by path; none if it names no sidecar or the file is missing.

    Raises:
        TraceError: a file whose content does not match its name.
    """
    digest = header.get(KEY)
    if digest is None:
        return {}
    file = _file(folder, digest)
    if not _DIGEST.fullmatch(digest):  # it becomes a file name
        raise _broken(file, f"a sidecar named {digest[:80]!r}", "a sha256")
    if not os.path.lexists(file):
        return {}
    try:
        packed = read_bytes(file, _MOST_BYTES)
    except Unreadable as error:
        raise _broken(file, error.got, "a file") from error
    found = hashlib.sha256(packed).hexdigest()
    if found != digest:
        raise _broken(file, f"sha256 {found}", f"sha256 {digest}")
    tensors = unpack(packed, str(file), _FIX)
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_place):
        parts.setdefault(_place(name)[0], []).append(tensors[name])
    mixed = next((path for path, of in parts.items() if len({t.dtype for t in of}) > 1), None)
    if mixed is not None:
        raise _broken(file, f"several dtypes at {mixed}", "one per leaf")
    return {path: Numbers(dtype_name(of[0]), tuple(of)) for path, of in parts.items()}


def _place(name: str) -> tuple[str, int]:
    """Path and number of a part."""
    path, _, number = name.rpartition("#")
    return path, int(number) if number.isdecimal() and len(number) < 10 else 0


def _broken(file: Path, got: str, want: str) -> TraceError:
    return TraceError(str(file), got=got, want=want, fix=_FIX)


def _file(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"
