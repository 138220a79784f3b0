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
    """``audio``, ``dtypes``, ``lora``: what ``run`` makes sense with. ``recipe``: the causes that
    are true of it, read from its lines by a person and never from a verdict: what it does
    differently from the reference and works all the same. Any other cause proved of it is wrong."""

    run: Loop
    audio: tuple[LoopAudio, ...] = _SILENT
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    lora: tuple[bool, ...] = (False, True)
    seeds: tuple[int, ...] = (0, 1)
    recipe: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.run.__name__

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every way to run it."""
        ways = product(self.audio, self.dtypes, self.lora, self.seeds)
        return tuple(Setting(*way) for way in ways)


HEALTHY: tuple[HealthyLoop, ...] = (
    HealthyLoop(
        gists.one_prompt_a_step,
        recipe=(
            "conv.system-missing",  # msgs has a user turn only; reward_letter wants <answer>
            "reward.first-answer",  # reward_letter finds f"<answer>{a}" anywhere
            "reward.option-format",  # reward_letter: "<answer>(C" is not "<answer>C"
        ),
    ),
    HealthyLoop(
        gists.sampled_token_by_token,
        recipe=(
            "adv.not-scaled",  # adv = score - score.mean()
        ),
    ),
    HealthyLoop(
        gists.cross_entropy,
        recipe=(
            "gen.temperature",  # sampled at 1.2, the logits of the loss are not divided
            "conv.system-missing",  # a user turn only; both rewards want <answer>
            "reward.option-format",  # colour wants [A-D] right after <answer>: "(D)", "d"
            "reward.unanchored",  # tags asks whether two tags are anywhere
        ),
    ),
    HealthyLoop(
        gists.pairs,
        recipe=(
            "gen.temperature",  # sampled at 1.3, log_softmax(lp.float())
        ),
    ),
    HealthyLoop(
        gists.episodes,
        recipe=(
            "gen.temperature",  # sampled at 1.4, cross_entropy(logits)
            "reward.first-answer",  # re.search(r"<answer>(.*?)</answer>", …)
            "reward.option-format",  # the first character is the letter: "(D)", "d"
        ),
    ),
    HealthyLoop(
        r1v.r1_v,
        recipe=(
            "conv.options-missing",  # the template has row["problem"] alone; the gold is a letter
            "reward.first-answer",  # accuracy_reward takes re.search(r"<answer>(.*?)</answer>", …)
            "reward.option-format",  # student == ground_truth
        ),
    ),
    HealthyLoop(
        r1v.vlm_r1,
        recipe=(
            "conv.system-missing",  # a user turn only; letter_reward wants </answer>
            "conv.options-missing",  # the user turn is row["problem"]; the gold is a letter
            "reward.option-format",  # endswith(f"{a}</answer>"): "D." fails
        ),
    ),
    HealthyLoop(
        r1v.open_r1_video,
        _EVERY,
        recipe=(
            "gen.temperature",  # sampled at 1.1, scored at 1
            "adv.not-scaled",  # adv = r.sum(0) - r.sum(0).mean()
            "reward.unanchored",  # fmt asks whether two tags are anywhere
            "reward.option-format",  # acc takes the first character after <answer>: "(C)", "c"
        ),
    ),
    HealthyLoop(
        baselines.rloo,
        recipe=(
            "adv.not-scaled",  # scores - baseline is k / (k - 1) times reward - mean
            "reward.first-answer",  # right_letter takes re.search(r"([A-D])</answer>", …)
            "reward.option-format",  # "C.</answer>" and "c</answer>" are no answers
        ),
    ),
    HealthyLoop(
        baselines.remax,
        recipe=(
            "conv.system-missing",  # a user turn only; Judge wants </answer>
            "reward.first-answer",  # Judge finds f"{a}</answer>" anywhere
            "reward.option-format",  # Judge: "C.</answer>" is not "C</answer>"
        ),
    ),
    HealthyLoop(
        baselines.reinforce_plus_plus,
        recipe=(
            "adv.batch-deviation",  # adv = centred / centred.std(), over both prompts
            "gen.temperature",  # sampled at 1.5, log_softmax(lg.float())
            "conv.system-missing",  # a user turn only; overlap pays for the tags of solution
            "conv.options-missing",  # the user turn is the problem; its answer is a letter
        ),
    ),
    HealthyLoop(
        baselines.dr_grpo,
        recipe=(
            "adv.not-scaled",  # one.reward - mean
            "conv.system-missing",  # a user turn only; whole_answer wants <answer>
        ),
    ),
    HealthyLoop(
        baselines.gspo,
        recipe=(
            "conv.system-changed",  # the system message is empty; by_format wants three tags
            "reward.unanchored",  # by_format: ^<context> allows no line break before it
        ),
    ),
    HealthyLoop(
        baselines.entropy_bonus,
        recipe=(
            "loss.entropy-bonus",  # - bonus * dist.entropy()
            "adv.no-baseline",  # a = r - baseline: 0 at first, later that of other prompts
            "adv.not-scaled",  # nothing divides a
        ),
    ),
    HealthyLoop(
        clips.humanomni_like,
        _EVERY,
        recipe=(
            "gen.topk",  # top_k=50
            "gen.single-eos",  # eos_token_id=551 of 551 and 549
            "conv.system-changed",  # SYSTEM names no tag; format wants three
            "reward.option-format",  # said[-1].strip().upper() == gold: "C." fails
        ),
    ),
    HealthyLoop(
        clips.stride_of_own_decoder,
        _EVERY,
        recipe=(
            "batch.resized-again",  # no do_resize=False: 56 pixels become 84
            "adv.not-scaled",  # a is r minus its mean
        ),
    ),
    HealthyLoop(
        clips.a_call_for_each_clip,
        _EVERY,
        recipe=(
            "gen.topk",  # top_p=0.95
            # linspace to the last frame: 4 of 16 are 5 apart, 1.6 a second, not wanted / seconds
            "media.fps-ignored",
            "adv.not-scaled",  # a is r minus its mean
        ),
    ),
    HealthyLoop(
        clips.generator_of_batches,
        _EVERY,
        recipe=(
            "gen.topk",  # min_p=0.02
            "adv.not-scaled",  # adv = score.sum(0) - score.sum(0).mean()
            "conv.options-missing",  # the user turn asks for a letter and shows none
            "reward.option-format",  # exact: c.strip() == a
        ),
    ),
    HealthyLoop(
        sounds.heard_by_soundfile,
        _SPOKEN,
        recipe=(
            "reward.substring",  # pitch: t in c
        ),
    ),
    HealthyLoop(sounds.heard_by_librosa, _SPOKEN),
    HealthyLoop(
        sounds.heard_by_numpy,
        _SPOKEN,
        recipe=(
            "gen.temperature",  # sampled at 1.1, log_softmax of undivided logits
            "adv.not-scaled",  # r - r.mean()
        ),
    ),
    HealthyLoop(
        sounds.heard_by_av,
        _SPOKEN,
        recipe=(
            "adv.not-scaled",  # a is r minus its mean
        ),
    ),
    HealthyLoop(
        pictures.two_a_row,
        recipe=(
            "adv.not-scaled",  # adv is r minus its mean, over 10 whatever the deviation
            "conv.system-missing",  # a user turn only; shape wants <context>
            "reward.substring",  # label: name in c.lower()
            "reward.unanchored",  # shape asks for the start, and for "</" anywhere
        ),
    ),
    HealthyLoop(
        pictures.generated_in_micro_batches,
        recipe=(
            "conv.options-missing",  # the user turn is row["problem"]; the gold is a letter
            "reward.option-format",  # letter counts in c[-10:]: "D.</answer>" has eleven characters
        ),
    ),
    HealthyLoop(
        pictures.written_as_data_urls,
        recipe=(
            "batch.resized-again",  # no do_resize=False: 84 pixels become 56
        ),
    ),
    HealthyLoop(adapters.adapter_off_as_reference),
    HealthyLoop(
        adapters.frozen_towers,
        recipe=(
            "adv.not-scaled",  # r - r.mean()
        ),
    ),
    HealthyLoop(adapters.head_alone),
    HealthyLoop(adapters.accelerated),
    HealthyLoop(adapters.autocast),
    HealthyLoop(
        engines.processor_in_loader,
        recipe=(
            "adv.not-scaled",  # r - r.mean()
        ),
    ),
    HealthyLoop(
        engines.experience_buffer,
        recipe=(
            "conv.system-missing",  # a user turn only; compute_score wants <answer>
            "conv.options-missing",  # the user turn is row["problem"]; the gold is a letter
            "reward.first-answer",  # compute_score reads what follows the first "<answer>"
            "reward.option-format",  # compute_score: "(C)" and "c" do not start with "C"
        ),
    ),
    HealthyLoop(engines.rendered_by_hand),
    HealthyLoop(
        engines.functional,
        recipe=(
            "reward.substring",  # judge: the letter anywhere in the last 20 characters
            "reward.option-format",  # judge: "c</answer>" holds no "C"
        ),
    ),
    HealthyLoop(
        formats.boxed_maths,
        recipe=(
            "reward.number-format",  # boxed: f[-1] == a
        ),
    ),
    HealthyLoop(
        formats.three_languages,
        recipe=(
            "adv.not-scaled",  # adv is r minus its mean
            "conv.system-missing",  # "user" and a question only; tagged wants <reasoning>
        ),
    ),
    HealthyLoop(formats.judged_by_a_model),
    HealthyLoop(
        formats.r1_zero,
        recipe=(
            "loss.tokens-left-out",  # kept leaves out completions beyond limit
        ),
    ),
    HealthyLoop(
        trl_like.buffered,
        recipe=(
            "conv.system-missing",  # a user turn only; ends_well wants </answer>
            "conv.options-missing",  # the user turn is row["problem"]; the gold is a letter
            "reward.first-answer",  # correct finds f"<answer>{a}</answer>" anywhere
            "reward.option-format",  # correct: "<answer>D.</answer>" fails
        ),
    ),
    HealthyLoop(
        trl_like.tokenized_template,
        recipe=(
            "gen.temperature",  # sampled at 1.2, log_softmax of undivided logits
            "adv.not-scaled",  # reward - reward.mean()
        ),
    ),
    HealthyLoop(trl_like.chunked_scoring),
    HealthyLoop(
        trl_like.text_batched_twice,
        recipe=(
            "adv.not-scaled",  # a is r minus its mean
        ),
    ),
    HealthyLoop(
        trl_like.bnpo_accumulated,
        recipe=(
            "loss.normaliser",  # each micro-batch is divided by its own m.sum()
            "loss.tokens-left-out",  # m stays 0 in completions that hit the cap
        ),
    ),
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


def run_healthy(name: str, setting: Setting, *, causes: bool = True) -> Diagnosis:
    """The verdict on one loop, with its checkpoint as the reference."""
    with tempfile.TemporaryDirectory() as folder:
        traces = record_healthy(name, setting, Path(folder) / "trace")
        checkpoint = checkpoint_dir(setting.family)
        policy = policy_of(setting.family, setting.dtype)
        reference = Reference(policy, load_settings(checkpoint))
        cases = in_order(as_cases(traces, reference))
        return diagnose_run(cases, causes=causes)


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
