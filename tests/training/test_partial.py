"""A judge's score of one section becomes an advantage on that section's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import JudgeServer, judge_server
from train_runs import log, moments, short

from omni_grpo_core import tiny
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.rewards import health
from omni_grpo_core.rewards.endpoint import Endpoint
from omni_grpo_core.rewards.judge import Judge, JudgeReward
from omni_grpo_core.trace.store import load_trace, value_at
from omni_grpo_core.training.config import RewardEntry, TrainConfig
from omni_grpo_core.training.load_config import load_train_config
from omni_grpo_core.training.loop import train
from omni_grpo_core.training.partial import PartialRewards
from omni_grpo_core.types import Completion

RIGHT = "The bar is red."
GOLD = f"<context>{RIGHT}</context><think>t</think><answer>A</answer>"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


def sampled(policy: Policy, texts: list[str]) -> tuple[Completion, ...]:
    tokenizer = policy.processor.tokenizer
    eos = policy.eos_token_ids[0]
    made = []
    for index, text in enumerate(texts):
        ids = (*tokenizer(text)["input_ids"], eos)
        made.append(Completion("g", index, ids, text, "stop", (-1.0,) * len(ids)))
    return tuple(made)


def test_a_judged_context_by_hand(policy: Policy, server: JudgeServer) -> None:
    """Seven answers to one question; the judge gives 8 of 10 points to the one right context, 1 to
    each of the six wrong ones: the mean is 2, so the advantages are 6 and -1 tenths, on the tokens
    between <context> and </context> and on no other. The eighth answer, in another group, is
    malformed."""
    contexts = [RIGHT, *["The bar is blue."] * 6]
    texts = [f"<context>{c}</context><think>t</think><answer>A</answer>" for c in contexts]
    completions = (*sampled(policy, texts), *sampled(policy, ["<context>The bar"]))
    scores = JudgeReward("context", Judge(Endpoint(server.url, "judge"))).explain(
        ["q"] * 8, [c.text for c in completions], solution=[GOLD] * 8
    )
    assert [score.value for score in scores] == [0.8, *[0.1] * 6, 0.0]
    rewards = health.Step(
        {"context": [score.value for score in scores]}, [1.0] * 8, [*["g"] * 7, "h"], [False] * 8
    )
    partial = PartialRewards({"context": ("context", 2.0)}, "none")
    found = partial.advantages(policy.processor.tokenizer, completions, rewards, torch.arange(8))
    (context,) = found.own
    # weight 2; a float64 mean of tenths
    assert context.values.tolist() == pytest.approx([1.2, *[-0.2] * 6, 0.0], abs=1e-12)
    assert found.usable.tolist() == [True] * 7 + [False]
    assert found.informative.tolist() == [True] * 7 + [False]
    for completion, span in zip(completions[:7], context.spans[:7], strict=True):
        assert span is not None
        inside = policy.decode(completion.token_ids[slice(*span)])
        whole = contexts[completion.index]
        # a token across the border may contain a bracket of the tag
        assert inside.strip("<>/") == whole
    assert context.spans[7] is None


def test_a_process_takes_its_own_rows(policy: Policy) -> None:
    texts = ["<context>a</context><think>t</think><answer>A</answer>"] * 2
    rewards = health.Step({"judged": [0.0, 0.5, 1.0, 0.5]}, [0.0] * 4, list("aabb"), [False] * 4)
    partial = PartialRewards({"judged": ("answer", 1.0)}, "none")
    found = partial.advantages(
        policy.processor.tokenizer, sampled(policy, texts), rewards, torch.tensor([2, 3])
    )
    assert found.own[0].values.tolist() == [0.25, -0.25]
    assert len(found.own[0].spans) == 2
    assert found.usable.tolist() == [True] * 4, "of all processes"


# --------------------------------------------------------------------------- in a training run


def judged(out: Path, server: JudgeServer | None, **changes: Any) -> TrainConfig:
    """One step on a policy that is unsure what it saw; its context is judged, or not."""
    rewards = {"accuracy": RewardEntry()}
    if server is not None:
        rewards["context"] = RewardEntry(span="context")
        changes["judge"] = Endpoint(server.url, "judge", attempts=1, backoff=0.0)
    config = short(out, steps=1, rewards=rewards, **changes)
    return replace(
        config, settings=replace(config.settings, max_new_tokens=56, temperature=1.6, group_size=4)
    )


def gradient(out: Path) -> dict[int, torch.Tensor]:
    return dict(moments(out, 1))


def test_a_key_that_the_judge_repeats_is_in_nothing_that_a_run_keeps(
    tmp_path: Path,
    server: JudgeServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """It was in a reward's reason, and so in the trace of the step."""
    key = "sk-0123456789-abcdefghij"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.verdict = f"asked with {key}, it is right"
    assert train(judged(tmp_path, server), trace_steps=1).status == "finished"
    kept = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"<redacted>, it is right" in data for data in kept)
    printed = "".join(capfd.readouterr()).encode()
    assert not any(b"0123456789-abc" in data for data in [*kept, printed])


def test_the_judge_s_score_changes_the_gradient_and_a_judge_that_is_down_does_not(
    tmp_path: Path, server: JudgeServer
) -> None:
    """``adv.partial-unused``: a partial advantage computed from the total's tensor would be the
    same whatever the judge's score, and would exist without a judge."""
    plain, judging, down = (tmp_path / name for name in ("plain", "judging", "down"))
    assert train(judged(plain, None)).status == "finished"
    result = train(judged(judging, server), trace_steps=1)
    assert result.status == "finished"
    assert server.seen, "the judge was called"
    server.mode = "500"
    assert train(judged(down, server)).status == "finished"
    (without,), (with_judge,), (failed,) = log(plain), log(judging), log(down)
    assert with_judge["reward"] == without["reward"], "the total is the accuracy only"
    assert 0 < with_judge["reward/context"] < 0.8
    assert failed["reward/context"] is None or failed["reward/context"] == 0.0
    kept = value_at(load_trace(judging / "trace" / "step-000000"), "advantage", dict)
    assert kept["context"].abs().max() > 0.1
    ours, theirs, broken = gradient(judging), gradient(plain), gradient(down)
    moved = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
    # AdamW's first moment is a tenth of the gradient, whose norm is clipped to 1
    assert moved > 1e-3
    assert all(torch.equal(broken[key], theirs[key]) for key in theirs)


def test_it_is_configured_in_the_file(tmp_path: Path, server: JudgeServer) -> None:
    run = {
        "checkpoint": str(tiny.checkpoint_dir()), "data": str(tiny.data_file()), "out": "run",
        "rewards": {"accuracy": {}, "context": {"span": "context", "weight": 0.5},
                    "reasoning": {}},
        "judge": {"base_url": server.url, "model": "judge", "cache": "verdicts.db"},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(run))
    config, _ = load_train_config(tmp_path / "run.json")
    assert config.judge is not None
    assert config.judge.cache == str(tmp_path / "verdicts.db")
    assert not (tmp_path / "verdicts.db").exists(), "reading a configuration writes nothing"
    composition = config.composition()
    assert [(part.name, part.partial) for part in composition.components] == [
        ("accuracy", False), ("context", True), ("reasoning", False)
    ]  # fmt: skip
