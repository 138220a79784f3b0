"""One pass of a case, stage by stage, each stage a function of the values before it.

That a stage is handed its inputs by name is what makes replay possible: the golden's values go in
where the fresh ones diverged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from omni_grpo_core.core.batch import render
from omni_grpo_core.core.forward import (
    completion_logits,
    embed,
    positions,
    prefill,
    sampling_logprobs,
)
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.pipeline.checks import completion_tensors
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import converse, load_all, make_batch, score
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import (
    Batch,
    Conversation,
    Embeddings,
    MediaPart,
    Rollout,
    Sample,
    Score,
)

Values = Mapping[str, Any]
"""Values of stages by the stage's name."""
TOP = 4
"""Tokens kept of each step of a completion."""
REWARDS = (Format(), Accuracy())


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a pass runs on. ``steps``: GRPO steps that follow it."""

    policy: Policy
    settings: Settings
    samples: tuple[Sample, ...]
    steps: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The likeliest tokens at each token of a completion (C), given the tokens before it.

    ``top_ids``: int64, (C, TOP), likeliest first; ``top_logprobs``: C * TOP, in the same order;
    ``logprobs``: (C), of the completion's own tokens.
    """

    top_ids: torch.Tensor
    top_logprobs: tuple[float, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PassStage:
    """``needs``: the stages whose values ``make`` reads."""

    needs: tuple[str, ...]
    make: Callable[[Context, Values], Any]


def _conversation(context: Context, values: Values) -> tuple[Conversation, ...]:
    return converse(values["sample"], context.settings)


def _media(context: Context, values: Values) -> Any:
    where = {Path(ref.path).name: ref.path for s in context.samples for ref in s.media}
    told = [_at(conversation, where) for conversation in values["conversation"]]
    return load_all(context.policy, told, context.settings)


def _at(conversation: Conversation, where: Mapping[str, str]) -> Conversation:
    """A golden's conversation knows its files by name only: where they lie is this machine's."""

    def part(part: Any) -> Any:
        if not isinstance(part, MediaPart):
            return part
        path = where.get(Path(part.ref.path).name, part.ref.path)
        return replace(part, ref=replace(part.ref, path=path))

    messages = tuple(replace(m, parts=tuple(map(part, m.parts))) for m in conversation.messages)
    return replace(conversation, messages=messages)


def _batch(context: Context, values: Values) -> Batch:
    return make_batch(
        context.policy, values["text"], values["conversation"], values["media"], context.settings
    )


def _here(context: Context, embeddings: Embeddings) -> Embeddings:
    """A golden's embeddings come from a file, to wherever the model runs."""
    return replace(embeddings, inputs_embeds=embeddings.inputs_embeds.to(context.policy.device))


def _logits(context: Context, values: Values) -> Any:
    return prefill(
        context.policy,
        values["batch"],
        where=values["positions"],
        embeddings=_here(context, values["embeddings"]),
    ).logits


def _completion(context: Context, values: Values) -> Rollout:
    return rollout(
        context.policy,
        values["batch"],
        group_size=1,
        max_new_tokens=context.settings.max_new_tokens,
        temperature=0.0,
    )


def _scoring(context: Context, values: Values) -> tuple[Scored, ...]:
    """``said`` is the golden's completion, where there is a golden, else the fresh one."""
    policy = context.policy
    ids, mask = completion_tensors(values["said"].completions, policy.pad_token_id)
    logits = completion_logits(
        policy,
        values["batch"],
        ids,
        mask,
        where=values["positions"],
        embeddings=_here(context, values["embeddings"]),
    )
    logprobs = sampling_logprobs(policy, logits, 1.0).double().cpu()
    scored = []
    for row, own, length in zip(logprobs, ids, mask.sum(1).tolist(), strict=True):
        # equal scores stand in order of id: topk leaves their order to the platform
        order = torch.sort(row[:length], dim=-1, descending=True, stable=True).indices[:, :TOP]
        best = row[:length].gather(1, order)
        chosen = row[:length].gather(1, own[:length, None])[:, 0]
        scored.append(Scored(order, tuple(best.flatten().tolist()), tuple(chosen.tolist())))
    return tuple(scored)


def _parsed(context: Context, values: Values) -> Any:
    return tuple(parse(completion.text) for completion in values["completion"].completions)


def _reward(context: Context, values: Values) -> dict[str, tuple[Score, ...]]:
    return score(REWARDS, values["text"], values["sample"], values["completion"])


STAGES: Mapping[str, PassStage] = {
    "sample": PassStage((), lambda context, values: context.samples),
    "conversation": PassStage(("sample",), _conversation),
    "text": PassStage(
        ("conversation",),
        lambda context, values: tuple(
            render(c, context.policy.processor) for c in values["conversation"]
        ),
    ),
    "media": PassStage(("conversation",), _media),
    "batch": PassStage(("text", "conversation", "media"), _batch),
    "embeddings": PassStage(
        ("batch",), lambda context, values: embed(context.policy, values["batch"])
    ),
    "positions": PassStage(
        ("batch",), lambda context, values: positions(context.policy, values["batch"])
    ),
    "logits": PassStage(("batch", "embeddings", "positions"), _logits),
    "scoring": PassStage(("batch", "embeddings", "positions", "said"), _scoring),
    "completion": PassStage(("batch",), _completion),
    "parsed": PassStage(("completion",), _parsed),
    "reward": PassStage(("text", "sample", "completion"), _reward),
}
"""Every stage of a pass, in order. ``scoring`` reads the completion that the golden holds."""

SAID = frozenset({"scoring", "completion", "parsed", "reward"})
"""Stages about what is said; a case with GRPO steps has those of its steps instead."""


def stages_of(steps: int) -> tuple[str, ...]:
    """Names of the pass's stages for a case with so many GRPO steps."""
    return tuple(name for name in STAGES if not (steps and name in SAID))


@torch.no_grad()
def make(context: Context, stage: str, values: Values) -> Any:
    """One stage's value from those before it."""
    with generating(context.policy.model):
        return STAGES[stage].make(context, values)
