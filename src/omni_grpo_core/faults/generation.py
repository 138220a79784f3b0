"""Faults of the rollout: how completions are sampled, cut, decoded and ordered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.faults.fault import CACHE_DROPPED, CACHE_MISSED, FaultRegistry, is_among
from omni_grpo_core.faults.fixtures import Drawn
from omni_grpo_core.faults.reference_loop import ReferenceLoop, Rolled
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Media

shelf = FaultRegistry()
Manager = AbstractContextManager[None]

DRIFTED = {"temperature": 2.0, "seed": 4}
"""So hot that a special token is sampled, and a seed that samples one: the shipped policy, sure of
itself, would have to be trained for a while first."""


def _sampling(loop: ReferenceLoop, **told: Any) -> Manager:
    """Other generation keywords; ``None`` leaves one out."""
    before = loop.generation_keywords

    def keywords() -> dict[str, Any]:
        return {k: v for k, v in {**before(), **told}.items() if v is not None}

    return loop.replaced(generation_keywords=keywords)


@shelf.add(
    "gen.checkpointing-train",
    "Completions are sampled in train mode with gradient checkpointing on: transformers drops the "
    "cache, and from the second token on the model sees one token and nothing else.",
    "the incident, transformers 4.53 to 5.23",
    needs={"checkpointing": True},
    stops=is_among(CACHE_MISSED),
    versions=CACHE_DROPPED,
)
def checkpointing_train(loop: ReferenceLoop) -> Manager:
    @torch.no_grad()
    def generate(inputs: Mapping[str, Tensor]) -> Tensor:
        return loop.call_generate({**inputs, **loop.generation_keywords()})

    return loop.replaced(generate=generate)


@shelf.add(
    "gen.return-sequences",
    "num_return_sequences=G, and a blanket repeat_interleave for scoring: pixel rows are repeated "
    "patch by patch, which scrambles the clip.",
    "trainers made for text, given images and video",
)
def return_sequences(loop: ReferenceLoop) -> Manager:
    size = loop.config.group_size
    repeat, scoring = loop.repeat, loop.scoring_inputs

    def only_rows(values: list[Any]) -> list[Any]:
        return repeat(values) if isinstance(values[0], Drawn) else values

    def blanket(rolled: Rolled) -> dict[str, Any]:
        inputs = {k: v.repeat_interleave(size, dim=0) for k, v in rolled.inputs.items()}
        return scoring(
            Rolled(
                rolled.drawn, inputs, rolled.ids, rolled.mask, rolled.texts, rolled.rewards,
                rolled.advantages, rolled.old, rolled.reference,
            )
        )  # fmt: skip

    def prompts_repeated(prompts: list[str], texts: list[str], drawn: list[Drawn]) -> Tensor:
        return score(repeat(prompts), texts, drawn)

    score = loop.score
    keywords = loop.generation_keywords
    return loop.replaced(
        repeat=only_rows,
        scoring_inputs=blanket,
        score=prompts_repeated,
        generation_keywords=lambda: {**keywords(), "num_return_sequences": size},
    )


def _unsuppressed(loop: ReferenceLoop, allowed: Callable[[int], bool]) -> Manager:
    """Ids that sampling and scoring no longer suppress."""
    return patched(loop, suppressed=[i for i in loop.suppressed if not allowed(i)])


@shelf.add(
    "gen.special-token",
    "No token is suppressed: the policy samples <|im_start|> and the like into its answers.",
    "omni GRPO on tokenizers with many special tokens",
    needs=DRIFTED,
)
def special_token(loop: ReferenceLoop) -> Manager:
    media = _media_ids(loop)
    return _unsuppressed(loop, lambda token: token not in media and token < _size(loop))


@shelf.add(
    "gen.media-token",
    "The policy samples a media token: the scoring forward finds a placeholder without a medium.",
    "seen after about 90 steps on a small model",
    needs={"temperature": 2.2, "audio": "off", "rows": (20, 21)},
)
def media_token(loop: ReferenceLoop) -> Manager:
    media = _media_ids(loop)
    return _unsuppressed(loop, lambda token: token in media)


def _media_ids(loop: ReferenceLoop) -> set[int]:
    processor = loop.processor
    names = (processor.image_token, processor.video_token, processor.audio_token)
    return {int(processor.tokenizer.convert_tokens_to_ids(name)) for name in names}


def _size(loop: ReferenceLoop) -> int:
    return len(loop.processor.tokenizer)


@shelf.add(
    "gen.no-eos",
    "A thinker's generation config has no eos, and nobody passes one: completions run on past the "
    "answer to the cap.",
    "thinker-only checkpoints",
)
@contextmanager
def no_eos(loop: ReferenceLoop) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patched(loop.thinker.generation_config, eos_token_id=None))
        stack.enter_context(patched(loop, eos=[]))
        stack.enter_context(_sampling(loop, eos_token_id=None))
        yield


@shelf.add(
    "gen.single-eos",
    "One of several eos ids is honoured, and not the one with which the model ends its turn.",
    "trainers that pass tokenizer.pad_token_id or the first id of a list",
)
def single_eos(loop: ReferenceLoop) -> Manager:
    return patched(loop, eos=[loop.pad])


@shelf.add(
    "gen.skip-special",
    "Completions are decoded with skip_special_tokens=True before anybody looks: stray special "
    "tokens are hidden from rewards and logs.",
    "TRL and its descendants",
    needs=DRIFTED,
)
@contextmanager
def skip_special(loop: ReferenceLoop) -> Iterator[None]:
    def decode(ids: Tensor, mask: Tensor) -> list[str]:
        kept = [row[counted].tolist() for row, counted in zip(ids, mask, strict=True)]
        texts: list[str] = loop.processor.tokenizer.batch_decode(kept, skip_special_tokens=True)
        return texts

    with special_token(loop), loop.replaced(decode=decode):
        yield


@shelf.add(
    "gen.group-order",
    "Prompts are repeated 1 2 1 2 where everything after assumes 1 1 2 2: rewards meet other "
    "prompts.",
    "tile for repeat_interleave",
)
def group_order(loop: ReferenceLoop) -> Manager:
    before = loop.repeat

    def repeat(values: list[Any]) -> list[Any]:
        if isinstance(values[0], str | Media):
            return values * loop.config.group_size
        return before(values)

    return loop.replaced(repeat=repeat)


@shelf.add(
    "gen.identical",
    "All completions of a group are the same, because decoding is greedy: no group has a signal.",
    "do_sample left at the generation config's False",
)
def identical(loop: ReferenceLoop) -> Manager:
    return _sampling(loop, do_sample=False, temperature=None, top_k=None, top_p=None)


@shelf.add(
    "gen.cap",
    "The cap is shorter than any answer: every completion is cut.",
    "max_completion_length from a text-only recipe",
)
def cap(loop: ReferenceLoop) -> Manager:
    return _sampling(loop, max_new_tokens=16)


@shelf.add(
    "gen.temperature",
    "Completions are sampled at one temperature and scored at 1: the ratio is not 1 on-policy.",
    "open-r1-multimodal's _get_per_token_logps",
)
def temperature(loop: ReferenceLoop) -> Manager:
    def log_softmax(logits: Tensor) -> Tensor:
        scores = logits.float().index_fill(-1, torch.tensor(loop.suppressed), -torch.inf)
        return scores.log_softmax(-1)

    return loop.replaced(log_softmax=log_softmax)


@shelf.add(
    "gen.topk",
    "top_k and top_p cut the distribution that is sampled; the one that is scored is whole.",
    "sampling settings left in generation_config.json",
    # so sure of itself is the shipped policy that at less heat nothing but its favourites is left
    needs={"temperature": 2.3},
)
def topk(loop: ReferenceLoop) -> Manager:
    return _sampling(loop, top_k=40, top_p=0.97)


@shelf.add(
    "gen.repetition-penalty",
    "A repetition penalty shapes what is sampled; scoring knows nothing of it.",
    "the published Qwen generation configs carry one",
)
def repetition_penalty(loop: ReferenceLoop) -> Manager:
    return _sampling(loop, repetition_penalty=1.3)


@shelf.add(
    "gen.weights-stale",
    "The rollout engine was not told of the new weights and answers with old ones.",
    "colocated rollout engines whose weight sync is skipped",
)
def weights_stale(loop: ReferenceLoop) -> Manager:
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
