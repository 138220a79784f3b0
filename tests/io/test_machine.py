from __future__ import annotations

import os
from pathlib import Path

import pytest

from omni_grpo_core.io import _control_group, device_memory


def test_the_memory_of_this_machine_is_known() -> None:
    found = device_memory("cpu")
    assert found is not None
    assert 2**20 < found < 2**50


def test_a_control_group_limits_free_memory(tmp_path: Path) -> None:
    for name, text in {
        "memory.max": "1000\n", "memory.current": "600\n",
        "memory.stat": "anon 450\ninactive_file 100\nactive_file 50\nworkingset_file 7\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    assert _control_group(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert _control_group(tmp_path) is None
    assert _control_group(tmp_path / "none") is None


def test_only_visible_devices_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$*" in *--id=1*) echo 90;; *) echo 90; echo 7;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_memory("cuda") == 7 * 2**20
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert device_memory("cuda") == 90 * 2**20
    program.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert device_memory("cuda") is None
