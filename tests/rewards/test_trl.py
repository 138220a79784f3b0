"""TRL's ``GRPOTrainer`` accepts each of our rewards unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_server import JudgeServer, judge_server
from small_text_model import text_model

from omni_grpo_core.rewards import Reward
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.compose import Component, Composition, Gate
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.judge import Endpoint, Judge, JudgeReward
from omni_grpo_core.rewards.parse import render
from omni_grpo_core.rewards.people_focus import PeopleFocus

trl = pytest.importorskip("trl")

pytestmark = [
    # TRL and its libraries announce their own changes; we cannot fix them
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("conversational", [False, True])
def test_two_steps_with_all_rewards(
    tmp_path: Path, server: JudgeServer, conversational: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    gold = render("A man smiles.", "He looks calm.", "A")
    rows = [
        {
            "prompt": [{"role": "user", "content": "Calm?"}] if conversational else "Calm?",
            "sample_id": f"clip{i}",
            "problem_type": kind,
            "options": ["A. Calm", "B. Angry"],
            "solution": gold if kind == "multiple choice" else gold.replace("A</", "yes</"),
        }
        for i, kind in enumerate(["multiple choice", "judge"] * 2)
    ]
    judge = Judge(Endpoint(server.url, "judge", cache=tmp_path / "verdicts.db"))
    context, reasoning = JudgeReward("context", judge), JudgeReward("reasoning", judge)
    everything = Composition(
        [
            Component(Format(name="shape")),
            Component(Accuracy(name="right")),
            Component(JudgeReward("context", judge, name="seen")),
            Component(JudgeReward("reasoning", judge, name="thought"), gate=Gate("seen", 0.4)),
        ],
        name="everything",
    )
    rewards: list[Reward | Composition] = [
        Format(),
        Format(graded=True, name="graded"),
        Accuracy(),
        PeopleFocus(),
        context,
        reasoning,
        everything,
    ]
    model, tokenizer = text_model()
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=24,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert trainer.state.global_step == len(logs) == 2
    for entry in logs:
        assert math.isfinite(entry["loss"])
        for reward in rewards:
            # an untrained model writes garbage, which no reward pays for
            assert entry[f"rewards/{reward.__name__}/mean"] == 0.0
    assert judge.usage.requests == 0
