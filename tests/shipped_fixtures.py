"""The shipped tiny checkpoint and clips, loaded once per worker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from omni_grpo_core.core.policy import Policy
    from omni_grpo_core.pipeline.inputs import Inputs
    from omni_grpo_core.pipeline.settings import Settings
    from omni_grpo_core.types import Batch, Sample


@pytest.fixture(scope="session")
def policy() -> Policy:
    """Shared: a test that changes the model's modes must restore them."""
    from omni_grpo_core import tiny
    from omni_grpo_core.core.policy import load_policy

    return load_policy(tiny.checkpoint_dir())


@pytest.fixture(scope="session")
def settings() -> Settings:
    from omni_grpo_core import tiny
    from omni_grpo_core.pipeline.settings import load_settings

    return replace(load_settings(tiny.checkpoint_dir()), max_new_tokens=24)


@pytest.fixture(scope="session")
def samples() -> tuple[Sample, ...]:
    from omni_grpo_core import tiny
    from omni_grpo_core.core.sample import load_samples

    return load_samples(tiny.data_file())


@pytest.fixture(scope="session")
def inputs(policy: Policy, samples: tuple[Sample, ...], settings: Settings) -> Inputs:
    """Everything up to the batch of all shipped samples: every audio mode and modality mix."""
    from omni_grpo_core.pipeline.inputs import prepare

    return prepare(policy, samples, settings)


@pytest.fixture(scope="session")
def mixed(policy: Policy, inputs: Inputs) -> Batch:
    """A padded batch of 8: two each of interleaved, separate and silent clips, then one image and
    one text-only row."""
    from omni_grpo_core.core.batch import collate

    rows = inputs.batch.rows
    with_video = [row for row in rows if "pixel_values_videos" in row.tensors]
    chosen = [
        row
        for mode in ("interleaved", "separate", "off")
        for row in [row for row in with_video if row.audio_in_video == mode][-2:]
    ]
    chosen.append(next(row for row in rows if "pixel_values" in row.tensors))
    chosen.append(next(row for row in rows if not row.tensors))
    return collate(chosen, policy.pad_token_id)


@pytest.fixture
def run_cli() -> Callable[..., tuple[int, str, str]]:
    """Run ``omni-grpo ARGS`` in this process -> exit code, stdout, stderr. A bug (exit code 3)
    fails the test with its traceback."""
    from omni_grpo_core.cli.main import app
    from omni_grpo_core.io.exits import run

    def run_here(*args: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(lambda: app, [str(arg) for arg in args])
        if code == 3:
            file = err.getvalue().rsplit(" ", 1)[-1].strip()
            pytest.fail(Path(file).read_text(encoding="utf-8"))
        return code, out.getvalue(), err.getvalue()

    return run_here
