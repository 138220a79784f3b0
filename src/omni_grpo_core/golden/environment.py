"""The environment in which a golden was made, for its header, and the platform's key."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from omni_grpo_core.pipeline.settings import Settings

PACKAGES = (
    "omni-grpo-core",
    "torch",
    "torchvision",
    "transformers",
    "qwen-omni-utils",
    "av",
    "numpy",
)
_HASHED_WHOLE, _END = 1 << 26, 1 << 20
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""torch's names by those in a platform's key."""
_SHORT = {name: short for short, name in DTYPES.items()}


def environment() -> dict[str, str]:
    """Versions of Python and of every library that can change a value, and the type of machine.

    >>> environment()["python"] == platform.python_version()
    True
    """
    found = {"python": platform.python_version(), "machine": f"{sys.platform} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def platform_key(device: torch.device | str, dtype: str) -> str:
    """What determines floats besides the versions: the type of device and its compute dtype.

    ``dtype`` is torch's name of the *requested* dtype.

    >>> platform_key("cpu", "float32")
    'cpu-fp32'
    """
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        kind = f"cuda-sm{major}{minor}"
    return f"{kind}-{_SHORT.get(dtype, dtype)}"


def file_hash(path: Path) -> str:
    """Identifies a file's content: its sha256; above 64 MB, the sha256 of its length and its first
    and last megabyte."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= _HASHED_WHOLE:
            return f"sha256 {hashlib.sha256(file.read()).hexdigest()[:16]}"
        ends = hashlib.sha256(str(size).encode() + file.read(_END))
        file.seek(size - _END)
        ends.update(file.read())
    return f"{size} bytes, sha256 of both ends {ends.hexdigest()[:16]}"


def weights_hash(checkpoint: Path) -> str:
    """One hash over the weight files of a checkpoint folder.

    >>> from omni_grpo_core import tiny
    >>> weights_hash(tiny.checkpoint_dir()).startswith("sha256 ")
    True
    """
    files = sorted((*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.bin")))
    hashes = "\n".join(f"{path.name} {file_hash(path)}" for path in files)
    return f"sha256 {hashlib.sha256(hashes.encode()).hexdigest()[:16]}"


def changed_settings(settings: Settings) -> str:
    """Settings that differ from their defaults, on one line.

    >>> from omni_grpo_core.pipeline.settings import Settings
    >>> changed_settings(Settings(seed=3))
    'seed=3'
    """
    return ", ".join(_changed(settings, type(settings)(), ""))


def _changed(value: object, default: object, path: str) -> list[str]:
    if dataclasses.is_dataclass(value) and type(value) is type(default):
        return [
            text
            for entry in dataclasses.fields(value)
            for text in _changed(
                getattr(value, entry.name),
                getattr(default, entry.name),
                f"{path}.{entry.name}" if path else entry.name,
            )
        ]
    return [] if value == default else [f"{path}={value!r}"]
