"""The memory estimate of an update beside what torch allocates in one, traced operation by
operation on a small model. CPUs allocate what CUDA does but for the attention of packed rows, whose
kernel there needs no scores: a stand-in allocates its results alone."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from omni_grpo_core import tiny
from omni_grpo_core.bench.shapes import Setting, make_batch
from omni_grpo_core.core.family import QWEN2_5_OMNI, published_name
from omni_grpo_core.core.policy import Policy, policy_around
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.training.config import Fast, LoraConfig, TrainConfig, TrainedWeights
from omni_grpo_core.training.memory import estimate
from omni_grpo_core.training.micro_batches import make_micro_batches
from omni_grpo_core.training.prompt_estimate import PromptSize
from omni_grpo_core.training.step import Scorer, SingleProcess, StepPlan, optimize
from omni_grpo_core.training.trainable import choose_trainable
from omni_grpo_core.types import Completion, Rollout

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1376, "num_hidden_layers": 6,
    "max_window_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
"""The proportions of a 7B's layer."""
GROUP, TOKENS, PROMPT = 4, 32, 600


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``peak``: the most bytes that tensors made within held at a time."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live: dict[int, int] = dict.fromkeys(known, 0)
        self._watched: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_flatten(made)[0]:
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self._live:
                self._add(one.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live[key] = size
        self._watched[key] = weakref.ref(storage, lambda _: self._drop(key))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


@pytest.fixture
def small(policy: Policy) -> Policy:
    content = json.loads((tiny.checkpoint_dir() / "config.json").read_text())
    rope = {"rope_type": "default", "type": "default", "mrope_section": [4, 6, 6]}
    own = {"rope_theta": 1e6, "rope_scaling": rope, "rope_parameters": {"rope_theta": 1e6, **rope}}
    content["text_config"] |= SIZES | own
    content["vision_config"]["out_hidden_size"] = content["audio_config"]["output_dim"] = 256
    config = transformers.Qwen2_5OmniThinkerConfig.from_dict(content)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    return policy_around(model, policy.processor, QWEN2_5_OMNI, "small")


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Any, scale: float) -> Any:
    return torch.zeros_like(query), torch.zeros(query.shape[1], query.shape[0]), True


def attend_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Any:
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


class Lasting(torch.optim.SGD):
    """Leaves the weights as they are."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Scored(nn.Module):
    """As Accelerate prepares a scorer."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, *given: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.scorer(*given)


@pytest.mark.parametrize("how", ["float32", "bfloat16_master", "lora"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "kept"])
@pytest.mark.parametrize(("fast", "micro"), [("on", 4), ("off", 4), ("off", 2)])
def test_an_update_holds_what_was_estimated(
    small: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    how: str, checkpointing: bool, fast: Fast, micro: int,
) -> None:  # fmt: skip
    """Within a tenth, which is what the estimate claims; 5 % at most when this was written."""
    monkeypatch.setattr("omni_grpo_core.fast.segments.attend", attend)
    monkeypatch.setattr("omni_grpo_core.fast.segments.attend_backward", attend_backward)
    lora = how == "lora"
    weights: TrainedWeights = "bfloat16_master" if how == "bfloat16_master" else "float32"
    config = TrainConfig(
        checkpoint=str(tmp_path), precision="bfloat16", trained_weights=weights, fast=fast,
        settings=Settings(group_size=GROUP, max_new_tokens=TOKENS), batch_size=GROUP,
        micro_batch_size=micro, gradient_checkpointing=checkpointing, device="cuda",
        lora=LoraConfig(rank=4) if lora else None,
        freeze=() if lora else ("image", "video", "audio"),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"text_config": SIZES}))
    shapes = {published_name(n): tuple(p.shape) for n, p in small.model.named_parameters()}
    choose_trainable(small, config, lambda: torch.autocast("cpu", enabled=False))
    batch = make_batch(small, Setting("tiny", PROMPT, 56, groups=1, group=GROUP, tokens=TOKENS))
    allowed = (~small.suppressed).nonzero()[:, 0][:TOKENS].tolist()
    completions = tuple(
        Completion(batch.rows[0].sample_id, at, tuple(allowed), "", "length", (-5.0,) * TOKENS)
        for at in range(GROUP)
    )
    window = make_micro_batches(
        small, batch, Rollout(completions, GROUP, 1.0, 0),
        torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64),
        torch.ones(GROUP, dtype=torch.bool), micro,
    )  # fmt: skip
    step = FastStep(small) if fast == "on" else None
    scorer = Scored(Scorer(small, 1.0, step.scores if step else None))
    optimizer = Lasting([p for p in small.model.parameters() if p.requires_grad], lr=1.0)
    plan = StepPlan(LossConfig(), None, 1, 1.0, gradient_checkpointing=checkpointing)
    with Trace({p.untyped_storage()._cdata for p in small.model.parameters()}) as trace:
        (update,) = optimize(plan, SingleProcess(), scorer, small.model, optimizer, window)
    assert update.stepped
    found = estimate(config, shapes, PromptSize(text=batch.input_ids.shape[1]), world=1)
    moments = (sum(parts.values()) for name, parts in found.moments.items()
               if name not in ("sampling", "optimizer"))  # fmt: skip
    assert max(moments) == pytest.approx(trace.peak, rel=0.1)
