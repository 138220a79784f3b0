"""The loss of TRL's own trainer, whose fused head makes no logits, read at the head's input.

Numbers in float32 are good to 1e-3, as TRL adds 1e-4 to a deviation of 0.3, and to 1e-4 where none
is in; bfloat16 rounds each gradient by up to 2**-9, and the head's input that it is projected from.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.doctor.checks.loss import LOOKS
from omni_grpo_core.doctor.checks.policies import beta_read
from omni_grpo_core.doctor.checks.run import in_order
from omni_grpo_core.doctor.checks.weights import sound_reading
from omni_grpo_core.doctor.load import as_cases, read_traces
from omni_grpo_core.doctor.loss_reading import reading
from omni_grpo_core.doctor.loss_rows import trained_rows

GSPO = {"importance_sampling_level": "sequence"}
ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


def letters(
    prompts: list[object], completions: list[list[dict[str, str]]], **_: object
) -> list[float]:
    return [sum(map(ord, one[0]["content"])) % 97 / 97 for one in completions]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "beta", "divisor", "by", "more"),
    [
        ("dapo", 0.0, "uniform", 128, {}),
        ("grpo", 0.04, "sequence", 8, {}),
        ("bnpo", 0.0, "uniform", 128, {}),
        ("dr_grpo", 0.0, "uniform", 128, {}),
        ("grpo", 0.0, "sequence", 8, ACCUMULATED),
        ("dapo", 0.04, "uniform", 128, ACCUMULATED),
        # its bound of the ratio itself, by default below 1
        ("cispo", 0.0, "uniform", 128, {"epsilon_high": 5.0}),
        ("grpo", 0.0, "sequence", 8, {"num_iterations": 2}),
        ("grpo", 0.04, "sequence", 8, GSPO),
        ("grpo", 0.0, "sequence", 8, {**GSPO, "num_iterations": 2}),
        ("cispo", 0.0, "uniform", 128, {"epsilon_high": 5.0, "num_iterations": 2}),
        ("dapo", 0.0, "uniform", 128, {"entropy_coef": 0.01}),
        ("grpo", 0.0, "sequence", 8, {"entropy_coef": 0.01}),
        ("dr_grpo", 0.04, "uniform", 128, {"entropy_coef": 0.01}),
        ("dapo", 0.0, "uniform", 128, {"bf16": True}),
        ("grpo", 0.04, "sequence", 8, {"bf16": True}),
        ("grpo", 0.0, "sequence", 8, {**GSPO, "bf16": True}),
    ],
)
def test_trl(
    kind: str, beta: float, divisor: str, by: int, more: dict[str, Any], policy: Policy,
    tmp_path: Path,
) -> None:  # fmt: skip
    trl = pytest.importorskip("trl", minversion="1.16", reason="its head is fused from 1.16 on")
    data = pytest.importorskip("datasets")
    questions = ("What is it?", "Who are you? Tell me.", "Where?", "Why so?")
    trainer = trl.GRPOTrainer(
        model=copy.deepcopy(policy.model),
        reward_funcs=[letters],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"), num_generations=4,
            max_completion_length=16, max_steps=2, use_cpu=True, report_to=[],
            temperature=1.6, learning_rate=1e-4, save_strategy="no", loss_type=kind, beta=beta,
            **{"per_device_train_batch_size": 8, "bf16": False, **more},
        ),
        processing_class=policy.processor,
        train_dataset=data.Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": question}] for question in questions]}
        ),
    )  # fmt: skip
    with record(
        tmp_path / "trace", model=trainer.model, processor=policy.processor,
        reward_funcs=trainer.reward_funcs, probe_rewards=False,
    ):  # fmt: skip
        trainer.train()
    for step, case in enumerate(in_order(as_cases(read_traces(tmp_path / "trace")))):
        assert {seen.at for seen in case.gradients} == {"hidden"}
        rows, known = trained_rows(case), reading(case)
        assert known is not None
        told = torch.cat([row.temperature[row.tokens >= 0] for row in rows])
        rounding = 0.02 if more.get("bf16") else 1e-3
        assert float(told.median()) == pytest.approx(1.6, rel=rounding / 10)
        found = [(a.divisor, 1 / a.factor) for a in sound_reading(case, known)[1]]
        assert any(d == divisor and n == pytest.approx(by, rel=rounding) for d, n in found), found
        if beta and step:
            assert beta_read(case, known.term) == pytest.approx(beta, rel=rounding)
        seen = {e.fact: e for look in LOOKS for e in look(case)}
        bonus = seen.pop("entropy-in-loss", None)
        assert not seen
        assert (bonus is not None) == ("entropy_coef" in more)
        if bonus is not None:
            # over all tokens of the batch, whatever the loss's own mean is over
            every = torch.cat([row.entropy[row.entropy != 0] for row in rows])
            assert float(every.median()) == pytest.approx(-0.01 / len(every), rel=1e-3)
