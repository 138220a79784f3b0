"""What lies outside the program: files, settings, the terminal; here the memory that is free on
this machine and its devices, and the versions that are tested."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path


def device_memory(device: str) -> int | None:
    """Bytes that are free on the device, ``None`` where they cannot be told: of the CPU what the
    machine has and the control group lets us have, of CUDA the fullest of the visible devices."""
    if device == "cpu":
        return min(filter(None, (_machine(), _control_group(Path("/sys/fs/cgroup")))), default=None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits",
             *([f"--id={visible}"] if visible else [])],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout  # fmt: skip
        return min(int(line) for line in told.split()) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _machine() -> int | None:
    """What new processes can have without swapping, as Linux reckons it."""
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else None


def _control_group(folder: Path) -> int | None:
    """Its limit less what is in use; cached files give way."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        cached = re.findall(
            r"^(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.M
        )
    except (OSError, ValueError):  # "max" is no limit
        return None
    return max(1, limit - used + sum(map(int, cached)))


TRANSFORMERS = ("4.52.4", "4.57.6", "5.14.1", "5.17.0", "5.23.0", "5.24.0")
"""Oldest first."""
DEFAULT = "5.17.0"
"""What ``constraints.txt`` pins."""
NEWEST = TRANSFORMERS[-1]


def newer_than_tested(installed: str) -> str | None:
    """One line about a transformers that is newer than every tested one, else ``None``.

    >>> newer_than_tested("5.24.0")
    >>> newer_than_tested("5.26.0")
    'transformers 5.26.0 is newer than 5.24.0, the newest that was tested; omni-grpo golden ...
    """
    from packaging.version import InvalidVersion, Version

    try:
        newer = Version(installed) > Version(NEWEST)
    except InvalidVersion:  # a build of somebody's own: nothing is known of its age
        return None
    if not newer:
        return None
    return (
        f"transformers {installed} is newer than {NEWEST}, the newest that was tested; "
        "omni-grpo golden check says what it moves"
    )
