"""The stages of a pass: what each is made from, how, and what must hold for it.

One graph with several users: ``omni-grpo check`` makes and checks every stage, a golden compares
the values, and replay substitutes the golden's values where the fresh ones diverged. Each stage
therefore gets its inputs by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

import torch

from omni_grpo_core.core.batch import check_batch
from omni_grpo_core.core.completions import pad_completions
from omni_grpo_core.core.conversation import check_conversation
from omni_grpo_core.core.forward import (
    LibraryForward,
    completion_logits,
    embed,
    library_forward,
    positions,
    prefill,
    sampling_logprobs,
)
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.errors import CheckpointError, one_line
from omni_grpo_core.pipeline.checks import (
    check_completions,
    check_embeddings,
    check_logits,
    check_media,
    check_parsed,
    check_positions,
    check_rewards,
    check_samples,
    check_text,
)
from omni_grpo_core.pipeline.inputs import converse, header, load_all, make_batch, render_all, score
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.rewards.parse import parse
from omni_grpo_core.types import (
    STAGES,
    Batch,
    Check,
    Conversation,
    Embeddings,
    Logits,
    Malformed,
    Media,
    MediaPart,
    Parsed,
    Positions,
    Prompt,
    Rollout,
    Sample,
    Score,
    Stage,
    StageRecord,
    TextPart,
    Trace,
)

TOP = 4
"""Likeliest tokens kept at each step of a completion."""
REWARDS = (Format(), Accuracy())


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a pass runs on. ``steps``: GRPO steps after the pass."""

    policy: Policy
    settings: Settings
    samples: tuple[Sample, ...]
    steps: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The likeliest tokens at each of a completion's C tokens, given the tokens before it.

    ``top_ids``: int64, (C, TOP), likeliest first; ``top_logprobs``: C * TOP, in the same order;
    ``logprobs``: (C), of the completion's own tokens.
    """

    top_ids: torch.Tensor
    top_logprobs: tuple[float, ...]
    logprobs: tuple[float, ...]


class Values(TypedDict, total=False):
    """Values by the name of their stage.

    ``library``: transformers' own forward of each row. ``completion``: greedy; ``sampled``: groups.
    ``to_score``: the completion that ``scoring`` scores, a golden's where there is one.
    """

    sample: tuple[Sample, ...]
    conversation: tuple[Conversation, ...]
    text: tuple[Prompt, ...]
    media: tuple[Media, ...]
    batch: Batch
    library: tuple[LibraryForward, ...]
    embeddings: Embeddings
    positions: Positions
    logits: Logits
    to_score: Rollout
    scoring: tuple[Scored, ...]
    completion: Rollout
    sampled: Rollout
    parsed: tuple[Parsed | Malformed, ...]
    reward: dict[str, tuple[Score, ...]]


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """``needs``: values that ``make`` reads; ``beside``: values that only ``check`` reads."""

    needs: tuple[str, ...]
    make: Callable[[Context, Values], object]
    check: Callable[[Context, Values], tuple[Check, ...]] | None = None
    beside: tuple[str, ...] = ()


def _check_conversations(context: Context, values: Values) -> tuple[Check, ...]:
    pairs = zip(values["sample"], values["conversation"], strict=True)
    return _merged(check_conversation(sample, made) for sample, made in pairs)


def _media(context: Context, values: Values) -> tuple[Media, ...]:
    paths = {s.sample_id: {Path(r.path).name: r.path for r in s.media} for s in context.samples}
    found = [_with_local_paths(c, paths.get(c.sample_id, {})) for c in values["conversation"]]
    return load_all(context.policy, found, context.settings)


def _with_local_paths(conversation: Conversation, paths: Mapping[str, str]) -> Conversation:
    """A golden's conversation has only file names: their paths are this machine's."""

    def part(part: TextPart | MediaPart) -> TextPart | MediaPart:
        if not isinstance(part, MediaPart):
            return part
        path = paths.get(Path(part.ref.path).name, part.ref.path)
        return replace(part, ref=replace(part.ref, path=path))

    messages = tuple(replace(m, parts=tuple(map(part, m.parts))) for m in conversation.messages)
    return replace(conversation, messages=messages)


def _batch(context: Context, values: Values) -> Batch:
    return make_batch(
        context.policy, values["text"], values["conversation"], values["media"], context.settings
    )


def _check_batch(context: Context, values: Values) -> tuple[Check, ...]:
    policy = context.policy
    return check_batch(
        values["batch"], values["conversation"], values["media"], policy.processor, policy.family
    )


def _library(context: Context, values: Values) -> tuple[LibraryForward, ...]:
    """transformers' own forward of each row. It runs before any other forward, so what it raises
    because of a config is the checkpoint's fault."""
    found = []
    for row in values["batch"].rows:
        try:
            found.append(library_forward(context.policy, row))
        except Exception as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise
            raise CheckpointError(
                f"forward of sample {row.sample_id}",
                got=f"{type(error).__name__} in transformers: {one_line(error)}",
                want="a model that accepts its processor's output",
                fix="use the config and processor of the base checkpoint, and a supported version "
                "of transformers",
            ) from error
    return tuple(found)


def _on_device(context: Context, embeddings: Embeddings) -> Embeddings:
    """Moves a golden's embeddings, which come from a file, to the model's device."""
    return replace(embeddings, inputs_embeds=embeddings.inputs_embeds.to(context.policy.device))


def _logits(context: Context, values: Values) -> Logits:
    return prefill(
        context.policy,
        values["batch"],
        where=values["positions"],
        embeddings=_on_device(context, values["embeddings"]),
    ).logits


def greedy(policy: Policy, batch: Batch, settings: Settings) -> Rollout:
    """The likeliest completion of each prompt, token by token."""
    return rollout(
        policy, batch, group_size=1, max_new_tokens=settings.max_new_tokens, temperature=0.0
    )


def _sampled(context: Context, values: Values) -> Rollout:
    settings = context.settings
    return rollout(
        context.policy,
        values["batch"],
        group_size=settings.group_size,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )


def _scoring(context: Context, values: Values) -> tuple[Scored, ...]:
    policy = context.policy
    tokens = pad_completions(values["to_score"].completions, policy.pad_token_id)
    logits = completion_logits(
        policy,
        values["batch"],
        tokens.ids,
        tokens.mask.to(torch.int64),
        where=values["positions"],
        embeddings=_on_device(context, values["embeddings"]),
    )
    logprobs = sampling_logprobs(policy, logits, 1.0).double().cpu()
    scored = []
    for row, own, length in zip(logprobs, tokens.ids, tokens.mask.sum(1).tolist(), strict=True):
        # equal scores in order of id: with topk their order depends on the platform
        order = torch.sort(row[:length], dim=-1, descending=True, stable=True).indices[:, :TOP]
        best = row[:length].gather(1, order)
        chosen = row[:length].gather(1, own[:length, None])[:, 0]
        scored.append(Scored(order, tuple(best.flatten().tolist()), tuple(chosen.tolist())))
    return tuple(scored)


def _parsed(context: Context, values: Values) -> tuple[Parsed | Malformed, ...]:
    return tuple(parse(completion.text) for completion in values["completion"].completions)


GRAPH: Mapping[str, PipelineStage] = {
    "sample": PipelineStage(
        (),
        lambda context, values: context.samples,
        lambda context, values: check_samples(values["sample"]),
    ),
    "conversation": PipelineStage(
        ("sample",),
        lambda context, values: converse(values["sample"], context.settings),
        _check_conversations,
    ),
    "text": PipelineStage(
        ("conversation",),
        lambda context, values: render_all(context.policy, values["conversation"]),
        lambda context, values: check_text(
            values["conversation"], values["text"], context.policy.processor
        ),
    ),
    "media": PipelineStage(
        ("conversation",), _media, lambda context, values: check_media(values["media"])
    ),
    "batch": PipelineStage(("text", "conversation", "media"), _batch, _check_batch),
    "library": PipelineStage(("batch",), _library),
    "embeddings": PipelineStage(
        ("batch",),
        lambda context, values: embed(context.policy, values["batch"]),
        lambda context, values: check_embeddings(
            context.policy, values["batch"], values["embeddings"], values["library"]
        ),
        beside=("library",),
    ),
    "positions": PipelineStage(
        ("batch",),
        lambda context, values: positions(context.policy, values["batch"]),
        lambda context, values: check_positions(
            context.policy, values["batch"], values["positions"], values["library"]
        ),
        beside=("library",),
    ),
    "logits": PipelineStage(
        ("batch", "embeddings", "positions"),
        _logits,
        lambda context, values: check_logits(
            values["logits"], values["library"], context.policy.model.dtype
        ),
        beside=("library",),
    ),
    "scoring": PipelineStage(("batch", "embeddings", "positions", "to_score"), _scoring),
    "sampled": PipelineStage(("batch",), _sampled),
    "completion": PipelineStage(
        ("batch",),
        lambda context, values: greedy(context.policy, values["batch"], context.settings),
        lambda context, values: check_completions(
            context.policy, values["batch"], values["completion"], values["sampled"]
        ),
        beside=("sampled",),
    ),
    "parsed": PipelineStage(
        ("completion",),
        _parsed,
        lambda context, values: check_parsed(values["parsed"], context.settings.min_format),
    ),
    "reward": PipelineStage(
        ("text", "sample", "completion"),
        lambda context, values: score(
            REWARDS, values["text"], values["sample"], values["completion"]
        ),
        lambda context, values: check_rewards(
            values["reward"], REWARDS, values["sample"], context.settings.min_accuracy
        ),
    ),
}
"""Every stage of a pass, in order."""


@torch.no_grad()
def make(context: Context, stage: str, values: Values) -> object:
    """One stage's value from those before it."""
    with generating(context.policy.model):
        return GRAPH[stage].make(context, values)


def put(values: Values, stage: str, value: object) -> None:
    """Store a value from :func:`make` under a name known only at run time."""
    cast(dict[str, object], values)[stage] = value


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """``trace``: the stages and their checks. ``values``: everything that was made, including what
    only a check reads."""

    trace: Trace
    values: Values


@torch.no_grad()
def run(
    policy: Policy,
    samples: Sequence[Sample],
    settings: Settings,
    *,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Pass:
    """Every stage that has a check, on ``samples``.

    ``on_stage`` is called with each stage before it runs (for a progress display).
    """
    context = Context(policy, settings, tuple(samples))
    values: Values = {}
    records: list[StageRecord[object]] = []
    for name in STAGES:
        stage = GRAPH.get(name)
        if stage is None or stage.check is None:
            continue
        on_stage(name)
        begin = time.perf_counter()
        for one in (*stage.beside, name):
            if one not in values:
                put(values, one, make(context, one, values))
        with generating(policy.model):
            checks = stage.check(context, values)
        records.append(StageRecord(name, values.get(name), checks, time.perf_counter() - begin))
    return Pass(Trace(header(policy, settings), tuple(records)), values)


def _merged(rows: Iterable[tuple[Check, ...]]) -> tuple[Check, ...]:
    """Checks of many rows merged by name: failed if any row fails, with the first failure."""
    merged: dict[str, Check] = {}
    count = 0
    for checks in rows:
        count += 1
        for check in checks:
            if merged.get(check.name, check).ok:
                merged[check.name] = check
    return tuple(
        check if not check.ok else Check(check.name, True, f"{count} rows")
        for check in merged.values()
    )
