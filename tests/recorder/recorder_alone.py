"""A small torch loop, recorded by ``record`` and by ``attach``, where nothing else can be imported.

A script: ``recorder_alone.py FOLDER REFUSED...``, top-level modules that raise ``ImportError``.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # which the first optimizer imports, and which looks around for packages
from torch import nn

import omni_grpo_core


class Refusal:
    """A finder placed before all others."""

    def __init__(self, refused: set[str]) -> None:
        self.refused = refused

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in self.refused:
            raise ImportError(f"{name} is not part of recording", name=name)


class Model(nn.Module):
    """What the recorder requires of a model: a body, and a head fed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Embedding(8, 4)
        self.lm_head = nn.Linear(4, 8)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.model(input_ids)))


class Tokenizer:
    def __call__(self, text: str) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 8 for letter in text]])}


def length_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [min(len(text), 10) / 10 for text in completions]


class Trainer:
    """A trainer in TRL's style, by the names of its methods."""

    def __init__(self) -> None:
        self.model, self.processing_class = Model(), Tokenizer()
        self.reward_funcs = [length_reward]
        self.args = SimpleNamespace(beta=0.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def _generate_and_score_completions(self, rows: list[dict[str, str]]) -> dict[str, Any]:
        inputs = self.processing_class(rows[0]["prompt"])
        rewards = self.reward_funcs[0](prompts=["what"], completions=["that"])
        ids = inputs["input_ids"]
        return {
            "completion_ids": ids,
            "completion_mask": torch.ones_like(ids),
            "advantages": torch.tensor(rewards),
        }

    def _get_per_token_logps_and_entropies(self, ids: torch.Tensor) -> torch.Tensor:
        logprobs: torch.Tensor = self.model(ids).logits.log_softmax(-1)
        return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        scores = self._get_per_token_logps_and_entropies(inputs["completion_ids"])
        advantages: torch.Tensor = inputs["advantages"]
        return -(scores * advantages[:, None]).mean()

    def train(self) -> None:
        for _ in range(2):
            made = self._generate_and_score_completions([{"prompt": "what"}])
            self._compute_loss(self.model, made).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.optimizer.zero_grad()


if __name__ == "__main__":
    folder, *refused = sys.argv[1:]
    sys.meta_path.insert(0, Refusal(set(refused)))
    by_hand = Trainer()
    with omni_grpo_core.record(
        f"{folder}/record",
        model=by_hand.model,
        processor=by_hand.processing_class,
        reward_funcs=by_hand.reward_funcs,
    ):
        by_hand.train()
    attached = Trainer()
    omni_grpo_core.attach(attached, f"{folder}/attach")
    attached.train()
    print(*sorted({name.partition(".")[0] for name in sys.modules} & set(refused)))
