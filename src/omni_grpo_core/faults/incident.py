"""The incident, replayed on the tiny checkpoint: garbage, and a reward stuck at 0.10.

As in its script: two completions per prompt, gradient checkpointing on, completions sampled in
train mode, audio in video, the clip listed as video and as audio, and a people-focus reward that
pays 0.10 for anything. In transformers 4.53 to 5.23, checkpointing in train mode drops the
key-value cache inside every block; 4.52.4 and 5.24.0 keep it, and there the same script works.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omni_grpo_core.core.dialect import switch_checkpointing
from omni_grpo_core.doctor.checks.run import in_order
from omni_grpo_core.doctor.diagnose import diagnose, merge
from omni_grpo_core.doctor.evidence import Case, Finding
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.doctor.verdict import Diagnosis
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import cache_is_dropped
from omni_grpo_core.faults.plan import BY_ID
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.faults.rewarding import people_focus_reward
from omni_grpo_core.faults.seams import StepOutcome
from omni_grpo_core.faults.trial import recording, reference
from omni_grpo_core.recorder.record import Recorder
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.degenerate import degenerate
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.types import FinishReason, Stage

INJECTED = ("conv.media-twice", "gen.checkpointing-train")
CONFIG = LoopConfig(
    rows=(0,),
    group_size=2,
    accumulation=2,
    temperature=1.0,
    max_new_tokens=80,
    checkpointing=True,
    learning_rate=1e-4,
)
STEPS = 2


@dataclass(frozen=True, eq=False)
class Replay:
    """What happened. ``outcomes``: one per step. ``good``: the working script: greedy answers of
    the same weights in eval mode; ``right``: whether each is right. ``cases``: the recording, step
    by step. ``raised``: what ended the training in a version that drops the cache and cannot
    continue without it (5.0 to 5.15): no garbage there, but no completions either."""

    outcomes: tuple[StepOutcome, ...]
    good: tuple[str, ...]
    right: tuple[bool, ...]
    cases: tuple[Case, ...]
    raised: str | None = None

    @cached_property
    def verdict(self) -> Diagnosis:
        """The doctor's verdict on the recording."""
        return merge([diagnose(case) for case in in_order(self.cases)])

    @property
    def rewards(self) -> tuple[float, ...]:
        """The sum of rewards of every completion."""
        return tuple(
            round(sum(values), 6) for outcome in self.outcomes for values in outcome.rewards
        )

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for outcome in self.outcomes for text in outcome.texts)

    @property
    def degenerate(self) -> tuple[tuple[str, ...], ...]:
        """The rules of the degeneration gate that each completion's raw ids fail."""
        policy = reference(CONFIG.dtype).policy
        eos = set(policy.eos_token_ids)
        found = []
        for loss in (loss for case in self.cases for loss in case.losses):
            if loss.completion_ids is None or loss.mask is None:
                continue  # the recorder leaves out tensors that are too large; these never are
            for ids, mask in zip(loss.completion_ids, loss.mask.bool(), strict=True):
                own = ids[mask].tolist()
                ended: FinishReason = "stop" if eos & set(own) else "length"
                text = policy.decode(own)
                found.append(degenerate(own, text, finish_reason=ended, eos_ids=eos))
        return tuple(found)

    @property
    def well_formed(self) -> int:
        """Completions of the training that have the requested structure."""
        return sum(values[0] == 1.0 for outcome in self.outcomes for values in outcome.rewards)

    @property
    def garbage(self) -> bool:
        """Whether the reward of every completion is exactly the floor."""
        return set(self.rewards) == {0.1}

    def finding(self, stage: Stage) -> Finding | None:
        return next((f for f in self.verdict.findings if f.stage == stage), None)

    def named(self, cause: str) -> bool:
        """Whether the doctor names this cause for any finding."""
        return any(c.cause == cause for f in self.verdict.findings for c in f.causes)


def replay() -> Replay:
    """Train a few steps as the incident's script did, and record them."""
    # the recorder captures them; the verdict explains them
    with warnings.catch_warnings(action="ignore"):
        return _replayed()


def _replayed() -> Replay:
    loop = ReferenceLoop(reference(CONFIG.dtype).policy, CONFIG)
    loop.reward_funcs = [Format(), Accuracy(), people_focus_reward]
    good = loop.answers()
    columns = loop.columns(loop.draw(0))
    right = [value == 1.0 for value in Accuracy()(good, good, **columns)]
    # re-entrant, as in older versions, which gives the incident's warning
    switch_checkpointing(loop.model, True, reentrant=True)
    faults = [BY_ID[name] for name in INJECTED]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace"
        with recording(
            loop, faults, trace, STEPS, settings={"max_prompt_length": 2048}
        ) as recorder:
            outcomes, raised = _trained(loop, recorder)
            cases = as_cases(read_traces(trace), reference(CONFIG.dtype))
    return Replay(outcomes, tuple(good), tuple(right), cases, raised)


def _trained(loop: ReferenceLoop, recorder: Recorder) -> tuple[tuple[StepOutcome, ...], str | None]:
    outcomes: list[StepOutcome] = []
    try:
        for _ in range(STEPS):
            outcomes.append(loop.step(recorder))
    except Exception as error:
        if not cache_is_dropped():
            raise
        recorder.end_step()
        return tuple(outcomes), f"{type(error).__name__}: {error}"
    return tuple(outcomes), None
