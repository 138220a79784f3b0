"""One version's side of the matrix: ``python -m omni_grpo_core.versions.facts FOLDER FAMILY``.

Runs under the interpreter whose transformers is measured, and writes ``trace`` and ``facts.json``
into a new folder. Uses the family's shipped checkpoint and the shipped rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from omni_grpo_core import tiny
from omni_grpo_core.io.console import quiet_libraries

if TYPE_CHECKING:
    from omni_grpo_core.types import Row


def measure(folder: Path, family: tiny.FamilyName) -> None:
    """Write the facts of the installed transformers into ``folder``."""
    from omni_grpo_core.core.policy import load_policy
    from omni_grpo_core.core.sample import load_samples
    from omni_grpo_core.io.atomic import write_file
    from omni_grpo_core.pipeline.settings import load_settings
    from omni_grpo_core.pipeline.stages import run
    from omni_grpo_core.trace.store import save_trace
    from omni_grpo_core.versions.clips import by_path, mute_clip
    from omni_grpo_core.versions.coming import cache_names, deprecations
    from omni_grpo_core.versions.generating import batched, exam
    from omni_grpo_core.versions.library import (
        audio_in_video_calls,
        feature_types,
        rope_deltas,
        template_type,
    )

    policy = load_policy(tiny.checkpoint_dir(family))
    samples = load_samples(tiny.data_file())
    settings = replace(load_settings(tiny.checkpoint_dir(family)), group_size=1)
    done = run(policy, samples, settings)
    trace, values = done.trace, done.values
    rows = values["batch"].rows
    inside = next(i for i, row in enumerate(rows) if row.audio_in_video == "interleaved")
    prompts, media = values["text"], values["media"]
    pair = [(prompts[n], media[n], rows[n]) for n in mute_and_heard(rows)]
    clip = samples[inside].media[0].path
    facts = {
        "header": {key: trace.header[key] for key in ("transformers", "torch", "python")},
        "rows": len(rows),
        "failing": [
            f"{record.stage}: {check.name}"
            for record in trace.stages
            for check in record.checks
            if not check.ok
        ],
        "calls": audio_in_video_calls(policy, prompts[inside], media[inside], rows[inside]),
        "mute clip": mute_clip(policy, pair),
        "by path": by_path(policy, clip, media[inside].videos[0].sample_fps),
        "cache": cache_names(policy, rows[inside]),
        "going": deprecations(policy, prompts[inside], media[inside], rows[inside]),
        "template": template_type(policy),
        "features": feature_types(policy, rows),
        "rope_deltas": rope_deltas(policy, rows[inside]),
        "exam": exam(policy, rows, samples),
        "batched": batched(policy, rows),
    }
    folder.mkdir()
    save_trace(trace, folder / "trace")
    write_file(folder / "facts.json", json.dumps(facts, indent=1).encode())


def mute_and_heard(rows: Sequence[Row]) -> tuple[int, int]:
    """Indices of a row whose clip has no sound and of an interleaved one with another number of
    frames: with equal numbers, swapped grids would go unnoticed."""

    def grid(row: Row) -> list[int]:
        return row.tensors["video_grid_thw"].flatten().tolist()

    clips = [(n, row) for n, row in enumerate(rows) if "video_grid_thw" in row.tensors]
    mute = next(n for n, row in clips if "input_features" not in row.tensors)
    return mute, next(
        n
        for n, row in clips
        if row.audio_in_video == "interleaved" and grid(row) != grid(rows[mute])
    )


if __name__ == "__main__":
    quiet_libraries(worker=True)
    measure(Path(sys.argv[1]), cast(tiny.FamilyName, sys.argv[2]))
