from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import log, short

from omni_grpo_core.core import forward, rollout
from omni_grpo_core.core.dialect import CACHE
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.fault import cache_is_dropped
from omni_grpo_core.rewards import health
from omni_grpo_core.trace.store import load_trace, value_at
from omni_grpo_core.training.config import GuardConfig, RewardEntry
from omni_grpo_core.training.guard import Finding, Guard, StepFacts, watch_generation
from omni_grpo_core.training.loop import TrainResult, train
from omni_grpo_core.training.trainer_callback import GuardStop, OmniGrpoGuard
from omni_grpo_core.types import Batch, Completion, Rollout

GARBAGE = tuple([5, 6] * 40)


def facts(step: int, ids: tuple[int, ...] = (5, 6, 7, 2), **changes: Any) -> StepFacts:
    completions = tuple(
        Completion("g", at, ids, "a b c", "stop" if ids[-1] == 2 else "length", (0.0,) * len(ids))
        for at in (0, 1)
    )
    rewards = health.Step({"accuracy": [0.0, 1.0]}, [0.0, 1.0], ["g", "g"], [False, False])
    return replace(StepFacts(step, completions, rewards, 1e-6, 0.1, 0.5), **changes)


def guard(**settings: Any) -> Guard:
    return Guard(GuardConfig(**settings), eos_ids={2}, special_ids={1, 2})


def names(found: tuple[Finding, ...]) -> list[str]:
    return [finding.name for finding in found]


def test_a_sound_step_has_no_findings() -> None:
    assert guard().inspect(facts(0)) == ()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"ids": GARBAGE}, "garbage"),
        ({"ids": (5, 1, 7, 2)}, "garbage"),
        ({"drift_max": 0.1}, "sampling and scoring disagree"),
        ({"loss": float("nan")}, "not a number"),
        ({"grad_norm": float("inf")}, "not a number"),
    ],
)
def test_what_is_reported_at_once(changes: dict[str, Any], name: str) -> None:
    ids = changes.pop("ids", (5, 6, 7, 2))
    assert names(guard().inspect(facts(0, ids, **changes))) == [name]


def test_a_dead_reward_is_reported_when_patience_runs_out() -> None:
    """The incident: format and accuracy 0, people_focus 0.10 for anything, at every step."""
    dead = health.Step(
        {"format": [0.0, 0.0], "people_focus": [0.1, 0.1]}, [0.1, 0.1], ["g", "g"], [False, False]
    )
    watching = guard(patience=3)
    assert watching.inspect(facts(0, rewards=dead)) == ()
    assert watching.inspect(facts(1, rewards=dead)) == ()
    assert {"pinned", "format-zero", "zero-variance"} <= set(
        names(watching.inspect(facts(2, rewards=dead)))
    )


def test_patience_survives_a_resume() -> None:
    dead = health.Step({"format": [0.0, 0.0]}, [0.0, 0.0], ["g", "g"], [False, False])
    before = guard(patience=2)
    before.inspect(facts(0, rewards=dead))
    after = guard(patience=2)
    after.remember(before.remembered)
    assert "format-zero" in names(after.inspect(facts(1, rewards=dead)))


def test_equal_rewards_near_the_top_are_no_alarm() -> None:
    good = health.Step({"accuracy": [1.0, 1.0]}, [1.0, 1.0], ["g", "g"], [False, False])
    assert guard(patience=1).inspect(facts(0, rewards=good)) == ()


# --------------------------------------------------------------------------- in our own loop


def stopped(out: Path, **changes: Any) -> TrainResult:
    """A run that the guard stops at step 0, with all it promises for such a run."""
    config = short(out, **changes)
    result = train(config)
    assert (result.status, result.step) == ("stopped", 0)
    assert result.bundle is not None
    report = json.loads((result.bundle / "report.json").read_text())
    assert [Finding(**finding) for finding in report["findings"]] == list(result.findings)
    trace = load_trace(result.bundle)
    assert len(value_at(trace, "completion", Rollout).completions) == 8
    named = {check.name for record in trace.stages for check in record.checks}
    assert named <= set(names(result.findings))
    assert not (out / "log.jsonl").exists(), "no step was taken"
    assert not (out / "model").exists()
    return result


def test_the_incident_is_impossible_through_our_api(tmp_path: Path) -> None:
    """Train mode and checkpointing on, as the incident's trainer had it: the rollout is the same,
    because it never runs in that mode."""
    plain, checkpointed = tmp_path / "plain", tmp_path / "checkpointed"
    assert train(short(plain, steps=2)).status == "finished"
    assert train(short(checkpointed, steps=2, gradient_checkpointing=True)).status == "finished"
    for ours, theirs in zip(log(checkpointed), log(plain), strict=True):
        # recomputing gives the same numbers
        assert ours["reward"] == theirs["reward"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
        assert ours["drift_max"] < 1e-5


def raw_rollout(
    policy: Policy,
    batch: Batch,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    first: int,
) -> Rollout:
    """What a trainer written for transformers 4.52 does: ``model.generate`` with the model as it
    is, in train mode with checkpointing on."""
    model = policy.model
    model.train()
    model.gradient_checkpointing_enable()
    torch.manual_seed(seed % 2**31)
    made = []
    for row in batch.rows:
        ids = row.input_ids[None]
        for index in range(group_size):
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **row.tensors,
                    use_audio_in_video=row.audio_in_video == "interleaved",
                    max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_k=0,
                    suppress_tokens=policy.suppressed.nonzero().flatten().tolist(),
                    eos_token_id=list(policy.eos_token_ids), pad_token_id=policy.pad_token_id,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
            sampled = out.sequences[0, ids.shape[1] :]
            logprobs = forward.sampling_logprobs(policy, torch.cat(out.logits), temperature)
            chosen = logprobs.gather(1, sampled[:, None])[:, 0].tolist()
            ended = int(sampled[-1]) in policy.eos_token_ids
            made.append(
                Completion(
                    row.sample_id, index, tuple(sampled.tolist()), policy.decode(sampled.tolist()),
                    "stop" if ended else "length", tuple(chosen),
                )
            )  # fmt: skip
    return Rollout(tuple(made), group_size, temperature, seed)


# torch's word for it, where checkpointing is re-entrant (transformers 4.x): part of the incident
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_the_incident_forced_is_stopped_at_step_0_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omni_grpo_core.training.run.rollout", raw_rollout)
    if not cache_is_dropped():  # transformers 4.52, 5.24: the mode does no harm
        assert train(short(tmp_path / "run", steps=1)).status == "finished"
        return
    try:
        found = names(stopped(tmp_path / "run").findings)
    except IndexError:  # 5.0 to 5.15 fail by themselves: they cannot continue without their cache
        return
    assert "generation in train mode under checkpointing" in found
    assert "sampling and scoring disagree" in found


def test_scoring_without_the_audio_in_video_flag_is_stopped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pos.flag-scoring``: positions of the scoring forward treat the clips as silent."""
    right = forward.completion_logits

    def wrong(policy: Policy, batch: Batch, *rest: Any) -> torch.Tensor:
        rows = tuple(replace(row, audio_in_video="separate") for row in batch.rows)
        return right(policy, replace(batch, rows=rows), *rest)

    monkeypatch.setattr("omni_grpo_core.training.step.completion_logits", wrong)
    assert "sampling and scoring disagree" in names(stopped(tmp_path / "run").findings)


def test_sampling_at_another_temperature_is_stopped_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rollout.rollout

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **options | {"temperature": 1.3})

    monkeypatch.setattr("omni_grpo_core.training.run.rollout", wrong)
    assert "sampling and scoring disagree" in names(stopped(tmp_path / "run").findings)


def test_the_incident_s_reward_stops_the_run_after_patience(tmp_path: Path) -> None:
    config = short(
        tmp_path / "run", rewards={"toy_rewards:nothing": RewardEntry()},
        guard=GuardConfig(preflight=False, patience=2, garbage=1.0),
    )  # fmt: skip
    result = train(config)
    assert (result.status, result.step) == ("stopped", 1)
    assert {"constant", "pinned", "zero-variance"} <= set(names(result.findings))


# --------------------------------------------------------------------------- in other trainers


class Cache:
    """A key-value cache that only counts."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length


class Blocks(torch.nn.Module):
    """A model of one block that checkpoints; with ``drops`` it then gets no cache."""

    def __init__(self, *, drops: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = True
        self.drops = drops

    def forward(self, ids: torch.Tensor, use_cache: bool = False, **keywords: Any) -> Any:
        given = [keywords.get(name) for name in CACHE]
        cache = next((one for one in given if one is not None), Cache() if use_cache else None)
        if cache is not None and not (self.drops and self.training and self.gradient_checkpointing):
            cache.length += ids.shape[1]
        return {"logits": ids, "past_key_values": cache}


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("name", [*CACHE, "use_cache"])
def test_a_cache_that_stays_empty_is_reported_under_any_name(name: str, drops: bool) -> None:
    """The guard knew only the old keyword, and stopped runs whose library keeps the cache."""
    model, found = Blocks(drops=drops), list[Finding]()
    end = watch_generation(model, found.append)
    ids = torch.ones(1, 3, dtype=torch.long)
    model.eval()
    model(ids, **{name: Cache()})
    assert found == []
    model.train()
    model(ids)  # a scoring forward: no cache is requested
    assert found == []
    model(ids, **{name: Cache()})
    assert names(tuple(found)) == ["generation in train mode under checkpointing"] * drops
    end()
    model(ids, **{name: Cache()})
    assert len(found) == drops


# torch's word for it, where checkpointing is re-entrant (transformers 4.x): part of the incident
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_raw_model_in_the_incident_s_mode_is_stopped_while_it_generates(
    policy: Policy, mixed: Batch, tmp_path: Path
) -> None:
    """What a trainer written for transformers 4.52 does: generate in train mode, checkpointing on.
    The callback stops it before the second token."""
    callback = OmniGrpoGuard(tmp_path, processing_class=policy.processor)
    row = next(row for row in mixed.rows if not row.tensors)
    ids = row.input_ids[None]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": policy.pad_token_id}
    state = type("State", (), {"global_step": 0})()
    callback.on_train_begin(None, state, None, model=policy.model)
    callback.on_step_begin(None, state, None)
    fine = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert fine.shape[1] > ids.shape[1]
    policy.model.train()
    policy.model.gradient_checkpointing_enable()
    try:
        if not cache_is_dropped():
            same = policy.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **options
            )
            assert torch.equal(same, fine)
            return
        with pytest.raises(
            GuardStop, match=r"step 0.*train mode.*drops the key-value cache"
        ) as caught:
            policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    finally:
        callback.detach()  # all tests share the policy
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
    assert caught.value.bundle == tmp_path / "step-000000"
    assert (caught.value.bundle / "report.json").is_file()


def test_watched_rewards_stop_on_garbage_with_the_completions_kept(
    policy: Policy, tmp_path: Path
) -> None:
    callback = OmniGrpoGuard(tmp_path, processing_class=policy.processor)

    def accuracy(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    (watched,) = callback.watch([accuracy])
    assert watched.__name__ == "accuracy"
    ids = policy.processor.tokenizer("red " * 60)["input_ids"]
    with pytest.raises(GuardStop, match="completion: garbage: 2 of 2 completions are degenerate"):
        watched(prompts=["q", "q"], completions=["red " * 60] * 2, completion_ids=[ids, ids])
    kept = load_trace(tmp_path / "step-000000")
    assert [completion.text for completion in value_at(kept, "completion", tuple)] == [
        "red " * 60
    ] * 2


def test_watched_rewards_are_unchanged(policy: Policy, tmp_path: Path) -> None:
    callback = OmniGrpoGuard(tmp_path, processing_class=policy.processor)

    def halves(prompts: Any, completions: list[str], **columns: Any) -> list[float | None]:
        return [0.5, None]

    def ones(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [0.0, 1.0]

    first, second = callback.watch([halves, ones])
    given = {"prompts": ["q", "q"], "completions": ["a red one", "no sound at all"]}
    assert first(**given) == [0.5, None]
    assert second(**given) == [0.0, 1.0]
    assert not list(tmp_path.iterdir())
