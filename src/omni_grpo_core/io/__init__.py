"""Everything outside the program: files, settings, the terminal. Here: memory of this machine
and its devices, and the tested versions of transformers."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path


def device_memory(device: str) -> int | None:
    """Free bytes on the device, ``None`` if unknown. CPU: what the machine and its control group
    have; CUDA: on the fullest visible device."""
    if device == "cpu":
        return min(filter(None, (_machine(), _control_group(Path("/sys/fs/cgroup")))), default=None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        output = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits",
             *([f"--id={visible}"] if visible else [])],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
        return min(int(line) for line in output.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory, whatever the class of ``error``.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory.")), is_out_of_memory(RuntimeError("no"))
    (True, False)
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and any(words in text for words in _NO_MEMORY)
    )


def _machine() -> int | None:
    """What new processes can use without swapping, by Linux' estimate."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else None


def _control_group(folder: Path) -> int | None:
    """Its limit minus what is in use, not counting cached files, which can be evicted."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        cached = re.findall(
            r"^(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.M
        )
    except (OSError, ValueError):  # "max" means no limit
        return None
    return max(1, limit - used + sum(map(int, cached)))


TRANSFORMERS = ("4.52.4", "4.57.6", "5.14.1", "5.17.0", "5.23.0", "5.24.0")
"""Oldest first."""
DEFAULT = "5.17.0"
"""What ``constraints.txt`` pins."""
NEWEST = TRANSFORMERS[-1]


def newer_than_tested(installed: str) -> str | None:
    """One line if the installed transformers is newer than every tested one, else ``None``.

    >>> newer_than_tested("5.24.0")
    >>> newer_than_tested("5.26.0")
    'transformers 5.26.0 is newer than 5.24.0, the newest that was tested; omni-grpo golden ...
    """
    from packaging.version import InvalidVersion, Version

    try:
        newer = Version(installed) > Version(NEWEST)
    except InvalidVersion:  # a custom build of unknown age
        return None
    if not newer:
        return None
    return (
        f"transformers {installed} is newer than {NEWEST}, the newest that was tested; "
        "omni-grpo golden check shows what it changes"
    )
