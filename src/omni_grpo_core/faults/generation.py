"""Faults of the rollout: how completions are sampled, cut, decoded and ordered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.faults.fault import (
    CACHE_DROPPED,
    CACHE_MISSED,
    ONE_PROMPT,
    FaultRegistry,
    Manager,
    instead_of,
    is_among,
    result_of,
    without,
)
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.recorder.hooks import patched

faults = FaultRegistry()
Inputs = dict[str, Any]

DRIFTED = {"temperature": 2.0, "seed": 9}
"""A temperature high enough to sample special tokens, and a seed that does: the shipped policy is
too confident to do so before further training."""


@faults.add(
    "gen.checkpointing-train",
    "the incident, transformers 4.53 to 5.23",
    needs={"checkpointing": True},
    stops=is_among(CACHE_MISSED),
    versions=CACHE_DROPPED,
)
@instead_of("generate")
def checkpointing_train(loop: Loop, before: object, inputs: Inputs) -> Tensor:
    """Completions are sampled in train mode with gradient checkpointing on: transformers drops the
    cache, and from the second token on the model sees only that one token."""
    with torch.no_grad():
        return loop.call_generate({**inputs, **loop.generation_keywords()})


@faults.add("gen.return-sequences", "text trainers given images and video")
def return_sequences(loop: Loop) -> Manager:
    """num_return_sequences=G is combined with repeat_interleave on every tensor for scoring: pixel
    rows are repeated patch by patch, which scrambles the clip."""
    size = loop.config.group_size
    repeat, generate, score = loop.repeat, loop.generate, loop.score
    keywords = loop.generation_keywords

    def only_rows(values: list[Any]) -> list[Any]:
        return repeat(values) if isinstance(values[0], Drawn) else values

    def blanket(inputs: dict[str, Tensor]) -> Tensor:
        sequences = generate(inputs)
        inputs.update({k: v.repeat_interleave(size, dim=0) for k, v in inputs.items()})
        return sequences

    def prompts_repeated(prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        return score(repeat(prompts), texts, drawn)

    return loop.replaced(
        repeat=only_rows,
        expand=lambda inputs: inputs,
        generate=blanket,
        score=prompts_repeated,
        generation_keywords=lambda: {**keywords(), "num_return_sequences": size},
    )


def _unsuppressed(loop: Loop, allowed: Callable[[int], bool]) -> Manager:
    """Ids that sampling and scoring no longer suppress."""
    return patched(loop, suppressed=[i for i in loop.suppressed if not allowed(i)])


@faults.add(
    "gen.special-token",
    "omni GRPO on tokenizers with many special tokens",
    needs=DRIFTED,
    severity="differs",
    also=("gen.skip-special",),
)
def special_token(loop: Loop) -> Manager:
    """No token is suppressed: the policy samples <|im_start|> and the like in its answers."""
    media = _media_ids(loop)
    size = len(loop.processor.tokenizer)
    return _unsuppressed(loop, lambda token: token not in media and token < size)


@faults.add(
    "gen.media-token",
    "seen after about 90 steps on a small model",
    needs={"temperature": 2.2, "audio": "off", "rows": (20, 21)},
    severity="differs",
    also=("gen.skip-special",),
)
def media_token(loop: Loop) -> Manager:
    """The policy samples a media token: the scoring forward finds a placeholder without media."""
    media = _media_ids(loop)
    return _unsuppressed(loop, lambda token: token in media)


def _media_ids(loop: Loop) -> set[int]:
    processor = loop.processor
    names = (processor.image_token, processor.video_token, processor.audio_token)
    return {int(processor.tokenizer.convert_tokens_to_ids(name)) for name in names}


@faults.add("gen.no-eos", "thinker-only checkpoints")
@contextmanager
def no_eos(loop: Loop) -> Iterator[None]:
    """A thinker's generation config has no eos, and none is passed: completions run past the answer
    to the length cap."""
    before = loop.generation_keywords
    with (
        patched(loop.thinker.generation_config, eos_token_id=None),
        patched(loop, eos=[], generation_keywords=lambda: without(before(), "eos_token_id")),
    ):
        yield


@faults.add("gen.single-eos", "trainers that pass tokenizer.pad_token_id or the first id of a list")
def single_eos(loop: Loop) -> Manager:
    """Only one of several eos ids is passed, and not the one with which the model ends its turn."""
    return patched(loop, eos=[loop.pad])


@faults.add(
    "gen.skip-special",
    "TRL and its descendants",
    needs=DRIFTED,
    severity="differs",
    also=("gen.special-token",),
    lacking={"buffered": "decodes so in good health too: no special token is ever sampled"},
)
@contextmanager
def skip_special(loop: Loop) -> Iterator[None]:
    """Completions are decoded with skip_special_tokens=True: stray special tokens are hidden from
    rewards and logs."""

    def decode(ids: Tensor, mask: Tensor) -> list[str]:
        kept = [row[counted].tolist() for row, counted in zip(ids, mask, strict=True)]
        texts: list[str] = loop.processor.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return texts

    with special_token(loop), loop.replaced(decode=decode):
        yield


@faults.add("gen.group-order", "tile instead of repeat_interleave", lacking=ONE_PROMPT)
@instead_of("repeat")
def group_order(
    loop: Loop, before: Callable[[list[Any]], list[Any]], values: list[Any]
) -> list[Any]:
    """Prompts are repeated 1 2 1 2, but later code assumes 1 1 2 2: completions are scored against
    other prompts."""
    asked = not isinstance(values[0], Drawn)
    return values * loop.config.group_size if asked else before(values)


@faults.add("gen.identical", "do_sample left at the generation config's False")
@result_of("generation_keywords")
def identical(loop: Loop, keywords: Inputs) -> Inputs:
    """Decoding is greedy, so all completions of a group are the same: no group has a signal."""
    return {**without(keywords, "temperature", "top_k", "top_p"), "do_sample": False}


@faults.add("gen.cap", "max_completion_length from a text-only recipe")
@result_of("generation_keywords")
def cap(loop: Loop, keywords: Inputs) -> Inputs:
    """The length cap is shorter than any answer: every completion is cut."""
    return {**keywords, "max_new_tokens": 16}


@faults.add("gen.temperature", "open-r1-multimodal's _get_per_token_logps")
@instead_of("log_softmax")
def temperature(loop: Loop, before: object, logits: Tensor) -> Tensor:
    """Completions are sampled at one temperature and scored at 1: the ratio is not 1 on-policy."""
    scores = logits.float().index_fill(-1, torch.tensor(loop.suppressed), -torch.inf)
    return scores.log_softmax(-1)


# the shipped policy is so confident that at lower temperatures only its top tokens are sampled
@faults.add(
    "gen.topk",
    "sampling settings left in generation_config.json",
    needs={"temperature": 2.3},
    severity="differs",
)
@result_of("generation_keywords")
def topk(loop: Loop, keywords: Inputs) -> Inputs:
    """top_k and top_p truncate the distribution for sampling, but not for scoring."""
    return {**keywords, "top_k": 40, "top_p": 0.97}


@faults.add("gen.repetition-penalty", "the published Qwen generation configs carry one")
@result_of("generation_keywords")
def repetition_penalty(loop: Loop, keywords: Inputs) -> Inputs:
    """A repetition penalty is applied in sampling, but not in scoring."""
    return {**keywords, "repetition_penalty": 1.3}


@faults.add("gen.weights-stale", "colocated rollout engines whose weight sync is skipped")
def weights_stale(loop: Loop) -> Manager:
    """The rollout engine did not receive the new weights and samples with old ones."""
    before = loop.call_generate
    stale = copy.deepcopy(loop.thinker.state_dict())
    generator = torch.Generator().manual_seed(loop.config.seed)
    for name, value in stale.items():
        if value.is_floating_point() and ".layers." in name:
            noise = torch.randn(value.shape, generator=generator)
            stale[name] = value + (0.05 * value.float().std() * noise).to(value.dtype)

    def generate(keywords: dict[str, Any]) -> Tensor:
        current = copy.deepcopy(loop.thinker.state_dict())
        loop.thinker.load_state_dict(stale)
        try:
            return before(keywords)
        finally:
            loop.thinker.load_state_dict(current)

    return loop.replaced(call_generate=generate)
