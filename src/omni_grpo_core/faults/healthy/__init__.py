"""Healthy GRPO loops, written as differently as people write them: whatever breaks is our error.

They share nothing but :class:`~omni_grpo_core.faults.healthy.world.World`, deliberately: a doctor
that knows one loop's order of calls, names and settings takes another's for faults.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from omni_grpo_core.doctor.checks.run import in_order
from omni_grpo_core.doctor.diagnose import diagnose_run
from omni_grpo_core.doctor.evidence import Reference
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.doctor.verdict import Diagnosis
from omni_grpo_core.faults.config import LoopAudio
from omni_grpo_core.faults.healthy import (
    adapters,
    baselines,
    clips,
    engines,
    formats,
    gists,
    pictures,
    r1v,
    sounds,
    trl_like,
)
from omni_grpo_core.faults.healthy.world import Dtype, Loop, Setting, policy_of, world_of
from omni_grpo_core.pipeline.settings import load_settings
from omni_grpo_core.tiny import checkpoint_dir
from omni_grpo_core.types import Trace

_SILENT: tuple[LoopAudio, ...] = ("off",)
_SPOKEN: tuple[LoopAudio, ...] = ("separate",)
_EVERY: tuple[LoopAudio, ...] = ("interleaved", "separate", "off")


@dataclass(frozen=True, slots=True)
class HealthyLoop:
    """``audio``, ``dtypes``, ``lora``: what ``run`` makes sense with."""

    run: Loop
    audio: tuple[LoopAudio, ...] = _SILENT
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    lora: tuple[bool, ...] = (False, True)
    seeds: tuple[int, ...] = (0, 1)

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every way to run it."""
        ways = product(self.audio, self.dtypes, self.lora, self.seeds)
        return tuple(Setting(*way) for way in ways)


HEALTHY: tuple[HealthyLoop, ...] = (
    HealthyLoop(gists.one_prompt_a_step),
    HealthyLoop(gists.sampled_token_by_token),
    HealthyLoop(gists.cross_entropy),
    HealthyLoop(gists.pairs),
    HealthyLoop(gists.episodes),
    HealthyLoop(r1v.r1_v),
    HealthyLoop(r1v.vlm_r1),
    HealthyLoop(r1v.open_r1_video, _EVERY),
    HealthyLoop(baselines.rloo),
    HealthyLoop(baselines.remax),
    HealthyLoop(baselines.reinforce_plus_plus),
    HealthyLoop(baselines.dr_grpo),
    HealthyLoop(baselines.gspo),
    HealthyLoop(baselines.entropy_bonus),
    HealthyLoop(clips.humanomni_like, _EVERY),
    HealthyLoop(clips.stride_of_own_decoder, _EVERY),
    HealthyLoop(clips.a_call_for_each_clip, _EVERY),
    HealthyLoop(clips.generator_of_batches, _EVERY),
    HealthyLoop(sounds.heard_by_soundfile, _SPOKEN),
    HealthyLoop(sounds.heard_by_librosa, _SPOKEN),
    HealthyLoop(sounds.heard_by_numpy, _SPOKEN),
    HealthyLoop(sounds.heard_by_av, _SPOKEN),
    HealthyLoop(pictures.two_a_row),
    HealthyLoop(pictures.generated_in_micro_batches),
    HealthyLoop(pictures.written_as_data_urls),
    HealthyLoop(adapters.adapter_off_as_reference),
    HealthyLoop(adapters.frozen_towers),
    HealthyLoop(adapters.head_alone),
    HealthyLoop(adapters.accelerated),
    HealthyLoop(adapters.autocast),
    HealthyLoop(engines.processor_in_loader),
    HealthyLoop(engines.experience_buffer),
    HealthyLoop(engines.rendered_by_hand),
    HealthyLoop(engines.functional),
    HealthyLoop(formats.boxed_maths),
    HealthyLoop(formats.three_languages),
    HealthyLoop(formats.judged_by_a_model),
    HealthyLoop(formats.r1_zero),
    HealthyLoop(trl_like.buffered),
    HealthyLoop(trl_like.tokenized_template),
    HealthyLoop(trl_like.chunked_scoring),
    HealthyLoop(trl_like.text_batched_twice),
    HealthyLoop(trl_like.bnpo_accumulated),
)
BY_NAME = {loop.name: loop for loop in HEALTHY}


def healthy_tasks() -> Iterator[tuple[str, Setting]]:
    """Every loop in every setting."""
    for loop in HEALTHY:
        for setting in loop.settings:
            yield loop.name, setting


def record_healthy(name: str, setting: Setting, folder: Path) -> list[tuple[str, Trace]]:
    """The recorded steps of one loop. Whatever it raises propagates: it would not be healthy."""
    # the recorder captures them; on a terminal they would be noise
    with warnings.catch_warnings(action="ignore"):
        BY_NAME[name].run(world_of(setting, folder))
    return read_traces(folder)


def run_healthy(name: str, setting: Setting) -> Diagnosis:
    """The verdict on one loop, with its checkpoint as the reference."""
    with tempfile.TemporaryDirectory() as folder:
        traces = record_healthy(name, setting, Path(folder) / "trace")
        checkpoint = checkpoint_dir(setting.family)
        policy = policy_of(setting.family, setting.dtype)
        reference = Reference(policy, load_settings(checkpoint))
        cases = in_order(as_cases(traces, reference))
        return diagnose_run(cases)


def breaking(verdict: Diagnosis) -> list[str]:
    """What a verdict says is broken: an exception, stage, fact and sentence of each finding,
    symptoms that nothing explains."""
    found = [
        f"{finding.stage}: {item.fact}: {item.sentence}"
        for finding in verdict.findings
        for item in finding.evidence
        if item.severity == "breaks"
    ]
    found += [f"symptom: {felt.name}: {felt.sentence}" for felt in verdict.unexplained]
    return [verdict.raised.error, *found] if verdict.raised else found
