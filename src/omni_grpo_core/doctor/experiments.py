"""Experiments on the checkpoint with a recorded rollout's inputs, which prove a cause or clear it.

Looks compare what was recorded, and score it again with the checkpoint. Whether the installed
library does harm in the recorded mode shows only when it generates: greedily in eval mode and in
the recorded one, with the cache and without. Seconds on a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from omni_grpo_core.core.dialect import modes_restored, switch_checkpointing
from omni_grpo_core.core.policy import Policy, generating, library_generate
from omni_grpo_core.doctor.checks.completion import generated_rollouts
from omni_grpo_core.doctor.evidence import Case
from omni_grpo_core.doctor.rollouts import completion_ids, until_end
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.trace.calls import GenerateCall

_MOST_TOKENS = 32
_MEDIA = ("pixel_values", "pixel_values_videos", "input_features")


@dataclass(frozen=True, slots=True)
class Experiment:
    """``cause``: the id of the cause tested. ``outcome``: ``"proved"`` where it does the recorded
    harm, ``"cleared"`` where it does none, ``"open"`` where that is undecided. ``sentence``: what
    was done and the result."""

    cause: str
    outcome: Literal["proved", "cleared", "open"]
    sentence: str
    values: Mapping[str, Any] = field(default_factory=dict)


def experiments_on(case: Case) -> tuple[Experiment, ...]:
    """The experiments on the step's first rollout; none without a reference or a rollout.

    The model's mode is restored.
    """
    call = next((call for _, call in generated_rollouts(case) if call.error is None), None)
    if case.reference is None or call is None or call.sequences is None:
        return ()
    policy = case.reference.policy
    not_kept = sorted(set(_MEDIA) & set(call.large))
    if not_kept:
        why = f"{', '.join(not_kept)} of the rollout were too large to keep: no experiment possible"
        fix = "record one step with a larger max_tensor_bytes"
        return (Experiment("gen.checkpointing-train", "open", f"{why}; {fix}"),)
    return tuple(_modes_of_generate(policy, call))


def run_experiments(cases: Sequence[Case]) -> tuple[Experiment, ...]:
    """The experiments on the first step of a run that has a rollout.

    Raises:
        ConfigError: no checkpoint was given, or no rollout was recorded.
    """
    for case in cases:
        found = experiments_on(case)
        if found:
            return found
    known = any(case.reference is not None for case in cases)
    raise ConfigError(
        "--experiments",
        got="a recording without a whole rollout" if known else "no checkpoint to test causes on",
        want="a recorded rollout and the checkpoint that it was made with",
        fix="record one complete step" if known else "pass the checkpoint with --checkpoint DIR",
    )


def _modes_of_generate(policy: Policy, call: GenerateCall) -> Iterator[Experiment]:
    """Greedily, in eval mode with the cache; without the cache; and in the recorded mode."""
    with generating(policy.model):
        right = _greedy(policy, call, use_cache=True)
        slow = _greedy(policy, call, use_cache=False)
    yield _compared(
        policy, right, slow, "logits.cache-differs",
        "greedily in eval mode, with the cache and without",
        "this version's cache is sound", "decoding with the cache gives different answers",
    )  # fmt: skip
    if not (call.modes.training or call.modes.checkpointing):
        yield Experiment(
            "gen.checkpointing-train",
            "cleared",
            "generate was recorded in eval mode: gradient checkpointing had no effect",
        )
        return
    state = "on" if call.modes.checkpointing else "off"
    how = f"greedily in eval mode and as recorded (train mode, gradient checkpointing {state})"
    with modes_restored(policy.model):
        if call.modes.checkpointing:
            switch_checkpointing(policy.model, True)
        policy.model.train(call.modes.training)
        try:
            recorded = _greedy(policy, call, use_cache=bool(call.config.get("use_cache", True)))
        except Exception as error:  # however this version rejects the mode, that is the result
            text = _quoted(policy, right[0])
            found = f"{how}: the recorded mode alone raises {type(error).__name__}: {error}"
            yield Experiment(
                "gen.checkpointing-train", "proved", f"{found}; eval mode answers {text}",
                {"rows": len(right), "of": len(right), "eval": text, "other": ""},
            )  # fmt: skip
            return
    yield _compared(
        policy, right, recorded, "gen.checkpointing-train", how,
        "the recorded mode does no harm in this version of transformers",
        "the recorded mode alone changes the answers",
    )  # fmt: skip


def _compared(
    policy: Policy, right: Tensor, other: Tensor, cause: str, how: str,
    same: str, differs: str,
) -> Experiment:  # fmt: skip
    width = min(right.shape[1], other.shape[1])
    kept = until_end(right[:, :width], policy.eos_token_ids)
    off = ((right[:, :width] != other[:, :width]) & kept).any(1)
    count, rows = int(off.sum()), len(right)
    if not count:
        return Experiment(cause, "cleared", f"{how}: all {rows} answers are equal; {same}")
    row = int(off.nonzero()[0])
    texts = [_quoted(policy, ids[row]) for ids in (right, other)]
    return Experiment(
        cause,
        "proved",
        f"{how}: {count} of {rows} answers differ; {differs}: {texts[0]} became {texts[1]}",
        {"rows": count, "of": rows, "eval": texts[0], "other": texts[1]},
    )


def _quoted(policy: Policy, ids: Tensor) -> str:
    kept = until_end(ids[None], policy.eos_token_ids)[0]
    text = policy.decode(ids[kept].tolist())
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _greedy(policy: Policy, call: GenerateCall, *, use_cache: bool) -> Tensor:
    """Completion ids, (N, at most 32), with the recorded inputs but greedy decoding."""
    width = 0 if call.sequences is None else _width(call)
    with torch.no_grad():
        sequences = library_generate(
            policy,
            _recorded_inputs(policy, call),
            use_cache=use_cache,
            max_new_tokens=min(_MOST_TOKENS, width),
            suppress_tokens=policy.suppressed.nonzero()[:, 0].tolist(),
        )
    return sequences[:, call.inputs["input_ids"].shape[1] :].cpu()


def _width(call: GenerateCall) -> int:
    ids = completion_ids(call)
    return 0 if ids is None else int(ids.shape[1])


def _recorded_inputs(policy: Policy, call: GenerateCall) -> dict[str, Any]:
    """The recorded inputs as the checkpoint takes them."""
    found: dict[str, Any] = {}
    for name, value in call.inputs.items():
        moved = value.to(policy.device)
        found[name] = moved.to(policy.model.dtype) if name in _MEDIA else moved
    if "use_audio_in_video" in call.keywords:
        found["use_audio_in_video"] = bool(call.keywords["use_audio_in_video"])
    return found
