"""What ``omni-grpo train`` does to every token, read from the gradient at its own logits.

Nothing is handed over but completions and rewards: rollout, scores, advantages, normaliser and
optimizer are the run's own. float32 weights are good to 1e-3, as 1e-4 is added to a deviation of
about 0.1; bfloat16 rounds each logit by up to 2**-9, and the weight of a KL is that of differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from train_runs import short

from omni_grpo_core.losses import LossConfig, RolloutCorrection
from omni_grpo_core.recorder.token_entropy import weights_at_logits
from omni_grpo_core.recorder.token_weights import TokenWeights
from omni_grpo_core.training.config import RewardEntry
from omni_grpo_core.training.loop import StepView, train

LONGEST, GROUP, HOT = 8, 4, 3.0


@dataclass(frozen=True)
class Scored:
    """Logits of completions (N, C, V) and, where they were trained on, what was read of them."""

    logits: Tensor
    read: list[tuple[TokenWeights, tuple[Tensor, ...]]]


@contextmanager
def at_the_head(vocabulary: int) -> Iterator[list[Scored]]:
    """Every forward of a head that scores completions."""
    seen: list[Scored] = []

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if getattr(module, "out_features", 0) != vocabulary or output.dim() != 3:
            return
        one = Scored(output.detach().clone(), [])
        seen.append(one)

        def read(gradient: Tensor) -> None:
            where = gradient.abs().amax(-1).nonzero(as_tuple=True)
            unknown = torch.full_like(where[0], -1)
            given = one.logits, gradient.detach(), where, unknown, (HOT, 1.0)
            one.read.append((weights_at_logits(*given), where))

        if output.requires_grad:
            output.register_hook(read)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def laid(one: Scored, name: str) -> Tensor:
    """(N, C) of what was read."""
    [(found, where)] = one.read
    values = getattr(found, name)
    whole = torch.full(one.logits.shape[:2], -1.0 if name == "tokens" else 0.0).double()
    return whole.index_put(where, values.double())


WEIGHTS = {"toy_rewards:early_letters": RewardEntry(2.0), "toy_rewards:spaces": RewardEntry()}
TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo", "luspo", "vespo")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "-kl": {"beta": 0.04},
    "-accumulated": {"micro_batch_size": 4},
    "-twice": {"iterations": 2},
    "-bf16": {"precision": "bfloat16"},
}
CELLS = {f"{kind}{name}": (kind, how) for kind in TYPES for name, how in VARIANTS.items()} | {
    "dapo-gdpo": ("dapo", {"aggregation": "normalize_then_sum", "rewards": WEIGHTS}),
    # the policy samples itself: neither leaves a token out
    "dapo-off-policy-mask": ("dapo", {"off_policy_mask_threshold": 0.5}),
    "dapo-corrected": ("dapo", {"correction": RolloutCorrection()}),
}


@pytest.fixture(autouse=True)
def _a_run_of_its_own() -> Iterator[None]:
    """Accelerate keeps its precision for as long as a process lives."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_the_loss_of_a_run_is_read_back(name: str, tmp_path: Path) -> None:
    kind, given = CELLS[name]
    changes = dict(given)
    loss = LossConfig(
        loss_type=kind,  # type: ignore[arg-type]
        beta=changes.pop("beta", 0.0),
        off_policy_mask_threshold=changes.pop("off_policy_mask_threshold", None),
        max_completion_length=LONGEST if kind == "dr_grpo" else None,
    )
    config = replace(short(tmp_path / "out", loss=loss, micro_batch_size=8, steps=2), **changes)
    steps: list[tuple[StepView, list[Scored]]] = []
    with at_the_head(vocabulary_of(config.checkpoint)) as seen:

        def on_step(view: StepView) -> None:
            steps.append((view, [*seen]))
            seen.clear()

        train(config, on_step=on_step)
    rounding = 0.02 if config.precision == "bfloat16" else 1e-3
    for number, (view, scored) in enumerate(steps):
        check(view, scored, config, rounding, moved=number > 0)


def vocabulary_of(checkpoint: str) -> int:
    from omni_grpo_core.core.policy import load_policy

    head: nn.Linear = load_policy(Path(checkpoint)).model.lm_head
    return head.out_features


def check(
    view: StepView, scored: list[Scored], config: Any, rounding: float, *, moved: bool
) -> None:
    rows = view.rolled.completions
    if config.aggregation == "normalize_then_sum":
        scores = view.scored.scores
        together = 2 * compared(scores["early_letters"]) + compared(scores["spaces"])
        advantages = (together - together.mean()) / (together.std() + 1e-4)
    else:
        advantages = compared(view.scored.total)
    parts = len(rows) // config.micro_batch_size
    trained = [one for one in scored if one.read][:parts]  # of the first update
    ids, weights, warm = (
        torch.cat([laid(one, key) for one in trained])
        for key in ("tokens", "weights", "temperature")
    )
    lengths = torch.tensor([len(row.token_ids) for row in rows]).double()
    kind, tokens = config.loss.loss_type, float(lengths.sum())
    by = {
        **dict.fromkeys(("grpo", "gspo", "sapo"), len(rows) * lengths),
        "luspo": torch.full_like(lengths, len(rows)),
        "dr_grpo": torch.full_like(lengths, len(rows) * LONGEST),
    }.get(kind, torch.full_like(lengths, tokens))  # fmt: skip
    slopes = torch.zeros_like(weights)
    if config.loss.beta and moved:
        held = [one for one in scored if not one.read and not one.logits.requires_grad][:parts]
        new, reference = (
            torch.cat([logprobs(one, rows, config) for one in given]) for given in (trained, held)
        )
        slopes = 1 - (reference - new).exp()
    for n, row in enumerate(rows):
        length = len(row.token_ids)
        live = bool(advantages[n]) or bool(slopes.any())
        wanted = [float(one) for one in row.token_ids] if live else [-1.0] * length
        assert ids[n, :length].tolist() == wanted
        assert not bool((ids[n, length:] >= 0).any()), "padding is not in the loss"
        if live:
            assert float(warm[n, :length].median()) == pytest.approx(HOT, rel=rounding)
        got = weights[n, :length] * by[n]
        beta = config.loss.beta if moved else 0.0
        wrong = got + advantages[n] - beta * slopes[n, :length]
        assert float(wrong.abs().max()) <= rounding * float(advantages.abs().max())


def compared(scores: Any) -> Tensor:
    groups = torch.tensor([float(one.value or 0.0) for one in scores]).double().view(-1, GROUP)
    away = groups - groups.mean(1, keepdim=True)
    return (away / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def logprobs(one: Scored, rows: Any, config: Any) -> Tensor:
    scores = one.logits.double() / HOT
    ids = torch.zeros(scores.shape[:2], dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row.token_ids)] = torch.tensor(row.token_ids)
    return scores.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
