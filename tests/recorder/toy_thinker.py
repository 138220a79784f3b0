"""A model of two matrices with a thinker's structure: quick to import and train in its own
process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH = 16, 4


class Output(NamedTuple):
    logits: Tensor


class ToyText(nn.Module):
    """Takes embeddings and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        mixed: Tensor = self.mix(inputs_embeds + position_ids[0, ..., None])
        return mixed


class ToyThinker(nn.Module):
    """Text model and head; ``generate`` adds two tokens, greedily."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.model = ToyText()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Output:
        where = torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape)
        where = where.to(self.embed.weight.dtype)
        return Output(
            self.lm_head(self.model(inputs_embeds=self.embed(input_ids), position_ids=where))
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor) -> Tensor:
        for _ in range(2):
            best = self(input_ids=input_ids).logits[:, -1].argmax(-1)
            input_ids = torch.cat([input_ids, best[:, None]], 1)
        return input_ids


class ToyProcessor:
    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) % VOCABULARY for letter in one] for one in text]}


def make() -> ToyThinker:
    """The same weights every time."""
    torch.manual_seed(0)
    return ToyThinker()


def step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    prompt: str = "abc",
    gathered: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """Processor, generate on the unwrapped model, scoring forward, backward, optimizer.
    ``gathered``: a context in which a sharded model can generate."""
    ids = torch.tensor(ToyProcessor()(text=[prompt])["input_ids"])
    with gathered(model):
        answer = getattr(model, "module", model).generate(input_ids=ids)
    logprobs = model(input_ids=answer).logits[:, :-1].log_softmax(-1)
    loss = -logprobs.gather(-1, answer[:, 1:, None]).mean()
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())
