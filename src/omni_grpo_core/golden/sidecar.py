"""What a golden keeps only as a sketch, in full, in a folder outside version control.

One safetensors file per golden, named by the hash of its content, which stands in the golden's
header. With it every stage can be replayed exactly; without it nothing else is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from omni_grpo_core.errors import TraceError
from omni_grpo_core.golden.leaf_text import summarise
from omni_grpo_core.trace.atomic import write_file
from omni_grpo_core.trace.dtypes import dtype_name
from omni_grpo_core.trace.leaves import Numbers, leaves
from omni_grpo_core.trace.sketch import Sketch

KEY = "sidecar"
"""The header's entry."""


def store(folder: Path, value: object) -> dict[str, str]:
    """Keep the tensors of ``value`` that its golden sketches; returns the header's entry, empty
    if there are none."""
    tensors = {
        f"{path}#{number}": part.contiguous()
        for path, leaf in leaves(value).items()
        if isinstance(leaf, Numbers) and isinstance(summarise(path, leaf), Sketch)
        for number, part in enumerate(leaf.parts)
    }
    if not tensors:
        return {}
    # rows and batch may share memory, which safetensors refuses
    packed = save({name: part.clone() for name, part in tensors.items()})
    digest = hashlib.sha256(packed).hexdigest()
    file = _file(folder, digest)
    if not file.is_file():
        write_file(file, packed)
    return {KEY: digest}


def fetch(folder: Path, header: Mapping[str, str]) -> dict[str, Numbers]:
    """The leaves kept for a golden, by path; none if it names no sidecar or the folder has it not.

    Raises:
        TraceError: a file that is not what its name says.
    """
    digest = header.get(KEY)
    if digest is None or not _file(folder, digest).is_file():
        return {}
    packed = _file(folder, digest).read_bytes()
    found = hashlib.sha256(packed).hexdigest()
    if found != digest:
        raise TraceError(
            str(_file(folder, digest)),
            got=f"sha256 {found}",
            want=f"sha256 {digest}",
            fix="delete it; without it the check only knows less",
        )
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in load(packed).items():
        path, _, number = name.rpartition("#")
        parts.setdefault(path, {})[int(number)] = tensor
    return {
        path: Numbers(dtype_name(numbered[0]), tuple(numbered[n] for n in sorted(numbered)))
        for path, numbered in parts.items()
    }


def _file(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"
