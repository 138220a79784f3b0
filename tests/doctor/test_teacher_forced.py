"""Replays of a real recording: the clean loop on the shipped checkpoint, and altered copies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_recordings import EVAL, found, stepped

from omni_grpo_core import tiny
from omni_grpo_core.core.family import QWEN3_OMNI
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks import completion as checks_completion
from omni_grpo_core.doctor.checks import degenerate as checks_degenerate
from omni_grpo_core.doctor.checks import gradient as checks_gradient
from omni_grpo_core.doctor.checks import groups as checks_groups
from omni_grpo_core.doctor.checks import logged as checks_logged
from omni_grpo_core.doctor.checks import logits as checks_logits
from omni_grpo_core.doctor.checks import loss as checks_loss
from omni_grpo_core.doctor.checks import partial as checks_partial
from omni_grpo_core.doctor.checks import reward as checks_reward
from omni_grpo_core.doctor.continuity import look_at_edges
from omni_grpo_core.doctor.evidence import Case, Look, Reference, noted_missing
from omni_grpo_core.doctor.experiments import experiments_on, run_experiments
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.doctor.rollouts import joined, losses_of, rollouts
from omni_grpo_core.doctor.teacher_forced import diff, replay_rollout
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import cache_is_dropped
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.recorder.record import record
from omni_grpo_core.recorder.tensors import Described
from omni_grpo_core.trace.calls import ForwardCall, GenerateCall, RewardCall
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.types import StageRecord, Trace

AREAS = (
    checks_logits, checks_completion, checks_degenerate, checks_groups, checks_reward,
    checks_partial, checks_loss, checks_logged,
    checks_gradient,
)  # fmt: skip
ALL: Sequence[Look] = [look for area in AREAS for look in area.LOOKS]


@pytest.fixture(scope="module")
def recording(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step with two clips, two completions each."""
    folder: Path = tmp_path_factory.mktemp("clean") / "trace"
    loop = ReferenceLoop(policy, LoopConfig(group_size=2, max_new_tokens=48))
    with record(
        folder, model=loop.model, processor=loop.processor, reward_funcs=loop.reward_funcs, steps=1
    ) as recorder:
        loop.step(recorder)
    return folder


@pytest.fixture(scope="module")
def clean(policy: Policy, recording: Path) -> Case:
    (case,) = as_cases(read_traces(recording), Reference(policy, Settings()))
    return case


def altered(case: Case, kind: Any, **changes: Any) -> Case:
    """The recording with fields of every value of one kind replaced."""
    stages = tuple(
        replace(r, value=replace(r.value, **changes)) if isinstance(r.value, kind) else r
        for r in case.trace.stages
    )
    return Case(replace(case.trace, stages=stages), case.reference)


def added(case: Case) -> dict[str, str]:
    return {e.fact: e.stage for e in found(ALL, case).values() if e.origin == "added"}


def test_a_clean_step_is_assembled_and_has_no_evidence(clean: Case) -> None:
    (rollout,) = rollouts(clean)
    (one,) = losses_of(clean)
    assert rollout.generated is not None
    assert rollout.advantage is not None
    assert one.rollout is rollout
    assert one.forward is clean.forwards[0]
    assert added(clean) == {}


def test_the_reference_gives_the_recorded_logprobs(clean: Case) -> None:
    (call,) = clean.generated
    known = replay_rollout(clean, call)
    assert known is not None
    assert call.logprobs is not None
    # float32, a different summation order: 1e-5 measured
    assert diff(known.logprobs(1.7), call.logprobs, known.mask)[1] < 1e-4


def test_a_family_with_features_inside_the_text_model_is_not_replayed(clean: Case) -> None:
    """They are not recorded: a sound run of Qwen3-Omni would be blamed for every token."""
    assert clean.reference is not None
    deep = replace(clean.reference.policy, family=QWEN3_OMNI)
    case = Case(clean.trace, replace(clean.reference, policy=deep))
    assert replay_rollout(case, case.generated[0]) is None
    assert "qwen3_omni adds features inside the text model" in noted_missing(case)[0]


def test_logprobs_of_other_weights(clean: Case) -> None:
    (call,) = clean.generated
    assert call.first_logits is not None
    noise = torch.randn(call.first_logits.shape, generator=torch.Generator().manual_seed(0))
    other = altered(clean, GenerateCall, first_logits=call.first_logits + noise)
    assert added(other) == {"other-weights": "completion"}


def test_logprobs_that_differ_after_the_first_token(clean: Case) -> None:
    (call,) = clean.generated
    assert call.logprobs is not None
    later = call.logprobs.clone()
    later[:, 1:] -= 1.0
    assert added(altered(clean, GenerateCall, logprobs=later)) == {"cache-differs": "logits"}
    blind = altered(clean, GenerateCall, logprobs=later, cached=(0,) * len(call.cached))
    assert added(blind) == {
        "tokens-out-of-context": "completion", "history-lost": "completion",
    }  # fmt: skip


def test_a_scoring_forward_that_is_off(clean: Case) -> None:
    (call,) = clean.forwards
    assert call.logprobs is not None
    assert added(altered(clean, ForwardCall, logprobs=call.logprobs - 0.5)) == {
        "scoring-differs": "logits"
    }


@pytest.mark.parametrize(("off", "severity"), [(0.5, "differs"), (3.0, "breaks")])
def test_a_reference_of_other_weights(clean: Case, off: float, severity: str) -> None:
    """What another model scores is no score of the policy's: a KL towards a stranger."""
    (call,) = clean.forwards
    assert call.logprobs is not None
    frozen = replace(call.modes, grad_enabled=False)
    values = [
        replace(record, value=replace(call, own=False, modes=frozen, logprobs=call.logprobs - off))
        for record in clean.trace.stages
        if record.value is call
    ]
    trace = replace(clean.trace, stages=(*clean.trace.stages, *values))
    other = Case(trace, clean.reference)
    [one] = [e for look in checks_logits.LOOKS for e in look(other)]
    assert (one.stage, one.fact, one.severity) == ("loss", "reference-differs", severity)


def test_ids_that_were_changed_before_they_were_scored_and_decoded(clean: Case) -> None:
    """Two findings were shown of one: other ids in scoring, and a text of another tokenizer."""
    assert clean.reference is not None
    tokenizer = clean.reference.policy.processor.tokenizer
    (call,), (forward,) = clean.generated, clean.forwards
    start = call.inputs["input_ids"].shape[1]
    ids = forward.inputs["input_ids"].clone()
    ids[:, start + 2] = 20
    ends = [completion.end for completion in joined(clean).completions]
    rows = zip(ids, ends, strict=True)
    texts = tuple(tokenizer.decode(row[start : start + end]) for row, end in rows)
    odd = altered(clean, ForwardCall, inputs={**forward.inputs, "input_ids": ids})
    odd = altered(odd, RewardCall, completions=texts)
    found_at = {(one.stage, one.fact) for one in look_at_edges(odd)}
    assert found_at == {("completion", "edge-sampled-ids")}


def test_generate_and_scoring_disagree_where_nothing_can_be_replayed(clean: Case) -> None:
    """At temperature 1 both have logprobs of the same tokens, comparable without a checkpoint."""
    (call,), (forward,) = clean.generated, clean.forwards
    assert forward.logprobs is not None
    width = clean.losses[0].logprobs.shape[1]  # type: ignore[union-attr]
    own = forward.logprobs[:, -width:]
    config = {**call.config, "temperature": 1.0}
    for shift, facts in ((0.0, set()), (0.5, {"scoring-disagrees"})):
        changed = altered(clean, GenerateCall, config=config, logprobs=own + shift)
        assert set(found(checks_logits.LOOKS, Case(changed.trace, None))) == facts


def test_garbage_is_added_unless_the_checkpoint_would_sample_it(clean: Case) -> None:
    (call,) = clean.generated
    assert call.sequences is not None
    loop = call.sequences.clone()
    start = call.inputs["input_ids"].shape[1]
    # one token repeated, long enough to be a cycle
    loop = torch.cat([loop[:, :start], loop[:, start : start + 1].expand(-1, 60)], 1)
    garbage = altered(clean, GenerateCall, sequences=loop, logprobs=None)
    assert added(garbage)["degenerate"] == "completion"
    assert added(garbage)["tokens-impossible"] == "completion"


def test_experiments_clear_a_clean_recording(clean: Case) -> None:
    outcomes = {e.cause: e.outcome for e in experiments_on(clean)}
    assert set(outcomes) == {"logits.cache-differs", "gen.checkpointing-train"}
    assert set(outcomes.values()) == {"cleared"}


def test_an_experiment_tries_the_recorded_mode_and_leaves_the_model_as_it_was(
    clean: Case, policy: Policy
) -> None:
    blind = replace(EVAL, training=True, checkpointing=True)
    outcomes = {
        e.cause: e.outcome for e in experiments_on(altered(clean, GenerateCall, modes=blind))
    }
    assert outcomes["gen.checkpointing-train"] == ("proved" if cache_is_dropped() else "cleared")
    assert not policy.model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in policy.model.modules())


def test_without_kept_media_experiments_are_open(clean: Case) -> None:
    (call,) = clean.generated
    inputs = dict(call.inputs)
    pixels = Described.of(inputs.pop("pixel_values_videos")).seen()
    broken = altered(clean, GenerateCall, inputs=inputs, large={"pixel_values_videos": pixels})
    (result,) = experiments_on(broken)
    assert result.outcome == "open"
    assert "max_tensor_bytes" in result.sentence


def test_nothing_to_experiment_on_is_an_error(clean: Case) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        run_experiments([Case(clean.trace, None)])


def test_experiments_on_the_command_line(recording: Path, run_cli: Any) -> None:
    code, out, _ = run_cli(
        "doctor", recording, "--experiments", "--json", "--checkpoint", tiny.checkpoint_dir()
    )
    report = json.loads(out)
    assert (code, report["healthy"]) == (0, True)
    assert {one["outcome"] for one in report["experiments"]} == {"cleared"}


@pytest.mark.parametrize("option", ["--experiments", "--modes"])
def test_experiments_without_a_checkpoint_are_exit_2(
    option: str, tmp_path: Path, run_cli: Any
) -> None:
    """``--modes`` is its name in 0.1."""
    save_trace(Trace({}, (StageRecord("gradient", stepped(), (), 0.0),)), tmp_path / "step-000000")
    code, _, err = run_cli("doctor", tmp_path, option)
    assert code == 2
    assert "--checkpoint" in err
    assert ("--modes is deprecated: use --experiments" in err) == (option == "--modes")
