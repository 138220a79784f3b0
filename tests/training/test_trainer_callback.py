"""``OmniGrpoGuard`` in other trainers: TRL's ``GRPOTrainer``, transformers' ``Trainer``."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from small_text_model import text_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.faults.fault import cache_is_dropped
from omni_grpo_core.trace.store import load_trace, value_at
from omni_grpo_core.training.config import GuardConfig
from omni_grpo_core.training.guard import Finding
from omni_grpo_core.training.trainer_callback import GuardStop, OmniGrpoGuard
from omni_grpo_core.types import Batch

pytestmark = [
    # TRL, transformers and torch announce their own changes, which are not ours to fix
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Collapse(TrainerCallback):  # type: ignore[misc]
    """From the second step on the model samples a single token."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def only_one(_module: Any, _given: Any, scores: torch.Tensor) -> torch.Tensor:
            return scores + 1e4 * torch.nn.functional.one_hot(torch.tensor(70), scores.shape[-1])

        if state.global_step == 1:
            kwargs["model"].lm_head.register_forward_hook(only_one)


def letters(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """Share of letters: a policy from scratch earns it in part."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def nothing(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """The incident's reward: a default for anything."""
    return [0.1] * len(completions)


def trl_run(
    out: Path, guard: OmniGrpoGuard, *callbacks: Any, reward: Any = letters, **settings: Any
) -> Any:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    torch.manual_seed(0)
    model, tokenizer = text_model()
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=guard.watch([reward]),
        args=trl.GRPOConfig(
            output_dir=str(out), per_device_train_batch_size=4, num_generations=2,
            max_completion_length=64, max_steps=3, report_to=[], save_strategy="no", use_cpu=True,
            bf16=False, generation_kwargs={"suppress_tokens": [1]}, **settings,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "Calm?"}, {"prompt": "Angry?"}] * 2),
        processing_class=tokenizer,
        callbacks=[guard, *callbacks],
    )  # fmt: skip


def trl_guard(out: Path) -> OmniGrpoGuard:
    return OmniGrpoGuard(out, processing_class=text_model()[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_runs_to_its_end_where_nothing_is_wrong(tmp_path: Path, checkpointing: bool) -> None:
    """TRL itself switches checkpointing off while it generates: no alarm."""
    guard = trl_guard(tmp_path / "guard")
    trainer = trl_run(tmp_path / "run", guard, gradient_checkpointing=checkpointing)
    trainer.train()
    assert trainer.state.global_step == 3
    assert not (tmp_path / "guard").exists()


def test_trl_is_stopped_at_the_step_that_turns_to_garbage(tmp_path: Path) -> None:
    guard = trl_guard(tmp_path / "guard")
    trainer = trl_run(tmp_path / "run", guard, Collapse(), gradient_checkpointing=False)
    with pytest.raises(GuardStop, match=r"step 1: found completion: garbage: 4 of 4") as caught:
        trainer.train()
    assert trainer.state.global_step == 1, "the step's update was not made"
    bundle = caught.value.bundle
    assert bundle == tmp_path / "guard" / "step-000001"
    report = json.loads((bundle / "report.json").read_text())
    assert report["step"] == 1
    assert [finding["name"] for finding in report["findings"]] == ["garbage"]
    trace = load_trace(bundle)
    completions = value_at(trace, "completion", tuple)
    assert [len(set(completion.token_ids)) for completion in completions] == [1] * 4
    assert len(value_at(trace, "reward", dict)["letters"]) == 4


def test_trl_is_stopped_by_a_dead_reward_after_patience(tmp_path: Path) -> None:
    guard = OmniGrpoGuard(
        tmp_path / "guard", processing_class=text_model()[1], config=GuardConfig(patience=2)
    )
    trainer = trl_run(tmp_path / "run", guard, reward=nothing, gradient_checkpointing=False)
    with pytest.raises(GuardStop, match=r"step 1: .*constant.*0\.1 for all 8 completions"):
        trainer.train()


def test_a_stop_names_the_stage_and_can_be_pickled() -> None:
    """It began with "loss:" whatever had failed, and a worker that passed it on crashed."""
    stop = GuardStop(3, [Finding("garbage", "completion", "4 of 4")], Path("out") / "step-000003")
    assert str(stop) == (
        "completion: step 3: found completion: garbage: 4 of 4, wanted a run that can learn; "
        "run omni-grpo doctor out/step-000003"
    )
    again = pickle.loads(pickle.dumps(stop))
    assert (str(again), again.findings, again.bundle) == (str(stop), stop.findings, stop.bundle)


# --------------------------------------------------------------------------- transformers' Trainer


class Old(Trainer):  # type: ignore[misc]
    """Like trainers written for transformers 4.52: generates with the model as it is, that is, in
    train mode, then scores the result."""

    policy: Policy
    batch: Batch
    rewards: list[Any]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        row = self.batch.rows[0]
        ids = row.input_ids[None]
        sampled = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=56, do_sample=False,
            pad_token_id=self.policy.pad_token_id, eos_token_id=list(self.policy.eos_token_ids),
        )  # fmt: skip
        new = sampled[0, ids.shape[1] :].tolist()
        texts = [self.policy.decode(new)]
        for reward in self.rewards:
            reward(prompts=["q"], completions=texts, completion_ids=[new])
        logits = model(input_ids=sampled, attention_mask=torch.ones_like(sampled)).logits
        loss: torch.Tensor = logits.float().log_softmax(-1)[:, -1].max()
        return loss


def old_trainer(
    out: Path, policy: Policy, mixed: Batch, guard: OmniGrpoGuard, *, checkpointing: bool
) -> Old:
    text_rows = tuple(row for row in mixed.rows if not row.tensors)
    trainer = Old(
        model=copy.deepcopy(policy.model).train(),
        args=TrainingArguments(
            output_dir=str(out), max_steps=1, per_device_train_batch_size=1, report_to=[],
            save_strategy="no", use_cpu=True, gradient_checkpointing=checkpointing,
            remove_unused_columns=False,
        ),
        train_dataset=[{"x": torch.zeros(1)}],
        callbacks=[guard],
    )  # fmt: skip
    trainer.policy, trainer.rewards = policy, guard.watch([letters])
    trainer.batch = Batch(text_rows, text_rows[0].input_ids[None], torch.ones(1, 1), {})
    return trainer


def test_a_trainer_in_the_incident_s_mode_is_stopped_at_step_0(
    tmp_path: Path, policy: Policy, mixed: Batch
) -> None:
    """The incident as it was: a Trainer under ``gradient_checkpointing`` that generates in train
    mode. Nothing raises in transformers; the guard stops it before the second token."""
    guard = OmniGrpoGuard(tmp_path / "guard", processing_class=policy.processor)
    trainer = old_trainer(tmp_path / "run", policy, mixed, guard, checkpointing=True)
    if not cache_is_dropped():  # transformers 4.52, 5.24: the mode does no harm
        trainer.train()
        assert trainer.state.global_step == 1
        return
    with pytest.raises(GuardStop, match=r"step 0.*drops the key-value cache") as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    report = json.loads((caught.value.bundle / "report.json").read_text())
    (finding,) = report["findings"]
    assert finding["name"] == "generation in train mode under checkpointing"
    load_trace(caught.value.bundle)


def test_the_same_trainer_without_checkpointing_goes_on(
    tmp_path: Path, policy: Policy, mixed: Batch
) -> None:
    guard = OmniGrpoGuard(tmp_path / "guard", processing_class=policy.processor)
    trainer = old_trainer(tmp_path / "run", policy, mixed, guard, checkpointing=False)
    trainer.train()
    assert trainer.state.global_step == 1
    assert not (tmp_path / "guard").exists()


def test_a_trainer_whose_policy_collapses_is_stopped_with_its_completions(
    tmp_path: Path, policy: Policy, mixed: Batch
) -> None:
    guard = OmniGrpoGuard(tmp_path / "guard", processing_class=policy.processor)
    trainer = old_trainer(tmp_path / "run", policy, mixed, guard, checkpointing=False)
    red = policy.processor.tokenizer("red")["input_ids"][0]
    trainer.model.lm_head.register_forward_hook(
        lambda _module, _given, scores: (
            scores + 1e4 * torch.nn.functional.one_hot(torch.tensor(red), scores.shape[-1])
        )
    )
    with pytest.raises(GuardStop, match="garbage: 1 of 1 completions are degenerate"):
        trainer.train()
    trace = load_trace(tmp_path / "guard" / "step-000000")
    (completion,) = value_at(trace, "completion", tuple)
    assert set(completion.token_ids) == {red}


# --------------------------------------------------------------------------- non-finite values


class Two(torch.nn.Module):
    """Two layers, so that there are four parameters to check."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(2, 1)
        self.b = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.a(x).square().mean() + self.b(x).square().mean()}


QUICK = {("nan", 1.0, 0), ("inf", 0.0, 3), ("nan", 0.0, 4), ("inf", 1.0, 4)}


@pytest.mark.parametrize(
    ("value", "clip", "at"),
    [
        pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow)
        for one in product(("nan", "inf"), (0.0, 1.0), (0, 3, 4))
    ],
)
def test_a_nonfinite_gradient_never_reaches_a_weight(
    tmp_path: Path, policy: Policy, value: str, clip: float, at: int
) -> None:
    """Two micro-batches per update; the bad one is the first of all, the last of the second update,
    the first of the third. Weights and moments stay as the previous update left them."""
    rows = [{"x": torch.tensor([float(n), 1.0])} for n in range(8)]
    rows[at]["x"][0] = float(value)
    before: list[Any] = []
    model = Two()

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments = copy.deepcopy(kwargs["optimizer"].state_dict()["state"])
            before[:] = [copy.deepcopy(model.state_dict()), moments]

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    guard = OmniGrpoGuard(tmp_path / "guard", processing_class=policy.processor)
    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=1,
            gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=True,
            max_grad_norm=clip, learning_rate=0.1, remove_unused_columns=False,
        ),
        train_dataset=rows,
        callbacks=[guard, Watch()],
    )  # fmt: skip
    with pytest.raises(GuardStop, match=r"gradient: not a number: the gradient of a\.") as caught:
        trainer.train()
    assert caught.value.step == at // 2
    weights, moments = before
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())
    found = trainer.optimizer.state_dict()["state"]
    assert found.keys() == moments.keys()
    for key, state in moments.items():
        assert all(torch.equal(found[key][name], value) for name, value in state.items())
