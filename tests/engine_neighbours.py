"""Mistakes near the catalogue's ten between trainer and rollout engine, and what the proof of
agreement says of each: stage, failed check, and whether it is proved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from omni_grpo_core.core import forward as forward_module
from omni_grpo_core.core import rollout as rollout_module
from omni_grpo_core.core.forward import sampling_logprobs
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import choose
from omni_grpo_core.engines.requests import Answer, Drawn, Request, Sampling
from omni_grpo_core.engines.transformers_backend import row_of
from omni_grpo_core.faults.boundary import Boundary, older, sent_otherwise, weights_of, without
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Audio, Batch, Media, Positions, Stage, Video

Plant = Callable[[Boundary], None]


class Neighbour(NamedTuple):
    name: str
    plant: Plant
    stage: Stage
    check: str
    proved: bool = True


# --------------------------------------------------------------------------- what is sent


def sent(change: Callable[[Boundary, Request], Request]) -> Plant:
    return lambda boundary: sent_otherwise(boundary, lambda one: change(boundary, one))


def shown(change: Callable[[Media], Media]) -> Plant:
    return sent(lambda _, one: replace(one, media=change(one.media)))


def of_videos(change: Callable[[Video], Video]) -> Plant:
    return shown(lambda media: replace(media, videos=tuple(map(change, media.videos))))


def of_sounds(change: Callable[[Audio], Audio]) -> Plant:
    return shown(lambda media: replace(media, audios=tuple(map(change, media.audios))))


def without_pictures(boundary: Boundary, one: Request) -> Request:
    text = without(boundary, one, ("image",)).text
    return replace(one, text=text, media=replace(one.media, images=()))


def twice(boundary: Boundary, one: Request) -> Request:
    """Each picture once more."""
    processor = boundary.policy.processor
    mark = processor.vision_bos_token + processor.image_token + processor.vision_eos_token
    text = one.text.replace(mark, 2 * mark)
    return replace(one, text=text, media=replace(one.media, images=2 * one.media.images))


def unmarked(boundary: Boundary, one: Request) -> Request:
    """Sounds do not begin."""
    return replace(one, text=one.text.replace(boundary.policy.processor.audio_bos_token, ""))


def appended(boundary: Boundary, one: Request) -> Request:
    """A clip's track stands behind it instead of inside."""
    if one.audio_in_video != "interleaved":
        return one
    processor = boundary.policy.processor
    track = processor.audio_bos_token + processor.audio_token + processor.audio_eos_token
    text = one.text.replace(processor.vision_eos_token, processor.vision_eos_token + track)
    audios = tuple(replace(audio, from_video=None) for audio in one.media.audios)
    media = replace(one.media, audios=audios)
    return replace(one, text=text, audio_in_video="separate", media=media)


def exchanged(boundary: Boundary) -> None:
    """Sounds that stand by themselves go to the next such row."""
    asked = boundary.generate

    def other(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        changed = list(requests)
        apart = [i for i, one in enumerate(requests) if one.audio_in_video != "interleaved"]
        apart = [i for i in apart if requests[i].media.audios]
        for to, source in zip(apart, [*apart[1:], *apart[:1]], strict=True):
            media = replace(requests[to].media, audios=requests[source].media.audios)
            changed[to] = replace(requests[to], media=media)
        return asked(changed, sampling)

    boundary.generate = other


def lying(boundary: Boundary) -> None:
    """Sounds are dropped; the ids that are reported are those of the whole prompt."""
    asked = boundary.generate

    def other(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        whole = [tuple(row_of(boundary.policy, one).input_ids.tolist()) for one in requests]
        answers = asked([without(boundary, one, ("audio",)) for one in requests], sampling)
        return [replace(one, prompt_ids=ids) for one, ids in zip(answers, whole, strict=True)]

    boundary.generate = other


# --------------------------------------------------------------------------- what is loaded


def one_layer_older(boundary: Boundary) -> None:
    """As where the adapter of one layer is not applied."""
    load = boundary.load

    def other(folder: Path) -> str:
        found = load(folder)
        with weights_of(folder, partial(older, part=".model.layers.1.")):
            load(folder)
        return found

    boundary.load = other


# --------------------------------------------------------------------------- what is sampled


def sampled(change: Callable[[Sampling, Boundary], Sampling]) -> Plant:
    def plant(boundary: Boundary) -> None:
        asked = boundary.generate
        boundary.generate = lambda requests, sampling: asked(requests, change(sampling, boundary))

    return plant


def drawn_from(change: Callable[[Tensor], Tensor], *, told: bool = False) -> Plant:
    """Another distribution, (N, V) logprobs, that the reported ones know of or not."""

    def scored(policy: Policy, logits: Tensor, temperature: float) -> Tensor:
        return change(sampling_logprobs(policy, logits, temperature)).log_softmax(-1)

    def chosen(logprobs: Tensor, uniforms: Tensor | None, instead: int) -> Tensor:
        return choose(change(logprobs).log_softmax(-1), uniforms, instead)

    def plant(boundary: Boundary) -> None:
        asked = boundary.generate

        def other(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
            replaced = {"sampling_logprobs": scored} if told else {"choose": chosen}
            with patched(rollout_module, **replaced):
                return asked(requests, sampling)

        boundary.generate = other

    return plant


def penalised(penalty: float, *, told: bool) -> Plant:
    """A repetition penalty, as transformers and vLLM have it."""

    def plant(boundary: Boundary) -> None:
        asked = boundary.generate

        def one_by_one(request: Request, sampling: Sampling) -> list[Answer]:
            seen: list[Tensor] = []  # (N, V), of the prompt and what was drawn
            lower: list[Tensor] = []
            prompt = row_of(boundary.policy, request).input_ids

            def scored(policy: Policy, logits: Tensor, temperature: float) -> Tensor:
                if not seen or seen[-1].shape != logits.shape:
                    seen[:] = [torch.zeros(logits.shape, dtype=torch.bool)]
                    seen[0][:, prompt] = True
                less = torch.where(logits > 0, logits / penalty, logits * penalty)
                changed = torch.where(seen[0], less, logits)
                lower[:] = [sampling_logprobs(policy, changed, temperature)]
                return lower[0] if told else sampling_logprobs(policy, logits, temperature)

            def chosen(logprobs: Tensor, uniforms: Tensor | None, instead: int) -> Tensor:
                found = choose(lower[0], uniforms, instead)
                seen[0].scatter_(1, found.view(-1, 1), True)
                return found

            with patched(rollout_module, sampling_logprobs=scored, choose=chosen):
                return asked([request], sampling)

        def other(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
            return [answer for one in requests for answer in one_by_one(one, sampling)]

        boundary.generate = other

    return plant


def first(count: int) -> Callable[[Tensor], Tensor]:
    return lambda p: p.masked_fill(p < p.topk(count, -1).values[..., -1:], -torch.inf)


def nucleus(logprobs: Tensor) -> Tensor:
    """The first 0.9 of the probability."""
    ordered, places = logprobs.sort(-1, descending=True)
    beyond = ordered.exp().cumsum(-1) - ordered.exp() > 0.9
    return logprobs.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), -torch.inf)


def not_rare(logprobs: Tensor) -> Tensor:
    """At least a twentieth of the likeliest one's probability: min-p."""
    most = logprobs.amax(-1, keepdim=True)
    return logprobs.masked_fill(logprobs < most - math.log(20), -torch.inf)


# --------------------------------------------------------------------------- what comes back


def counted(boundary: Boundary) -> None:
    """Positions count tokens, whatever they are."""
    asked = boundary.generate

    def where(_: Policy, batch: Batch) -> Positions:
        found = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        return Positions(found, torch.zeros(len(batch.rows), dtype=torch.int64))

    def other(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        with patched(forward_module, positions=where):
            return asked(requests, sampling)

    boundary.generate = other


def told(change: Callable[[Drawn], Drawn]) -> Plant:
    def plant(boundary: Boundary) -> None:
        asked = boundary.generate
        boundary.generate = lambda requests, sampling: [
            replace(answer, drawn=tuple(map(change, answer.drawn)))
            for answer in asked(requests, sampling)
        ]

    return plant


def copied(boundary: Boundary) -> None:
    asked = boundary.generate
    boundary.generate = lambda requests, sampling: [
        replace(answer, drawn=answer.drawn[:1] * len(answer.drawn))
        for answer in asked(requests, sampling)
    ]


def without_eos(one: Drawn) -> Drawn:
    end = -1 if one.finish_reason == "stop" else None
    return replace(one, token_ids=one.token_ids[:end], logprobs=one.logprobs[:end])


def cut_short(one: Drawn) -> Drawn:
    return Drawn(one.token_ids[:5], one.logprobs[:5], "length")


def without_a_number(one: Drawn) -> Drawn:
    return replace(one, logprobs=(*one.logprobs[:-1], math.nan))


_PLACES = "the engine places media as the batch does"
_WHOLE = "the engine samples from the whole distribution"
_DRAWS = "tokens are drawn as their logprobs say"
_TOKENS = "logprobs are those of the drawn tokens"
_ENDS = "completions end where and as they say"
NEIGHBOURS: tuple[Neighbour, ...] = (
    Neighbour("pictures dropped", sent(without_pictures), "media", "image reaches the engine"),
    Neighbour("a picture twice", sent(twice), "media", "media are sent once"),
    Neighbour("sounds exchanged", exchanged, "media", "audio stays with its row"),
    Neighbour("begin marks dropped", sent(unmarked), "text", "the engine reads the batch's text"),
    Neighbour(
        "track appended", sent(appended), "batch", "the engine interleaves as the batch does"
    ),
    Neighbour(
        "two frames fewer",
        of_videos(lambda one: replace(one, frames=one.frames[:-2])),
        "batch",
        "media have the batch's size in the engine",
    ),
    Neighbour(
        "frames reversed",
        of_videos(lambda one: replace(one, frames=one.frames.flip(0))),
        "media",
        "video has the batch's content in the engine",
    ),
    Neighbour(
        "sound at a quarter",
        of_sounds(lambda one: replace(one, samples=one.samples / 4)),
        "media",
        "audio has the batch's content in the engine",
    ),
    # how many frames are a second is not sent: two are assumed
    Neighbour(
        "rate lost", of_videos(lambda one: replace(one, sample_fps=2.0)), "positions", _PLACES
    ),
    Neighbour("positions as in text", counted, "positions", _PLACES),
    Neighbour("sound dropped, ids kept", lying, "media", "audio reaches the engine"),
    # which weights they are, nothing tells
    Neighbour(
        "one layer older", one_layer_older, "policy", "the engine has the trainer's weights", False
    ),
    # a server's default in place of the run's temperature
    Neighbour(
        "colder",
        sampled(lambda one, _: replace(one, temperature=0.7)),
        "completion",
        "logprobs are at the sampling temperature",
    ),
    Neighbour(
        "nothing suppressed",
        sampled(lambda one, at: replace(one, allowed_ids=tuple(range(len(at.policy.suppressed))))),
        "completion",
        "the engine draws from the allowed ids",
    ),
    Neighbour("greedy", drawn_from(first(1)), "completion", _WHOLE),
    Neighbour("top-k 20", drawn_from(first(20)), "completion", _WHOLE),
    Neighbour("top-k told", drawn_from(first(3), told=True), "completion", _WHOLE),
    Neighbour("top-p", drawn_from(nucleus), "completion", _WHOLE),
    Neighbour("top-p told", drawn_from(nucleus, told=True), "completion", _WHOLE),
    Neighbour("min-p", drawn_from(not_rare), "completion", _WHOLE),
    Neighbour("colder untold", drawn_from(lambda p: 1.25 * p), "completion", _DRAWS),
    Neighbour("warmer untold", drawn_from(lambda p: 0.8 * p), "completion", _DRAWS),
    Neighbour("penalty told", penalised(1.2, told=True), "completion", "no token is penalised"),
    Neighbour("penalty untold", penalised(1.2, told=False), "completion", _DRAWS),
    Neighbour("copies", copied, "completion", "a group's completions are drawn apart"),
    Neighbour("eos dropped", told(without_eos), "completion", _ENDS),
    Neighbour("cut short", told(cut_short), "completion", _ENDS),
    Neighbour(
        "the next token's logprobs",
        told(lambda one: replace(one, logprobs=one.logprobs[1:] + one.logprobs[:1])),
        "completion",
        _TOKENS,
    ),
    Neighbour(
        "logarithms to base 10",
        told(lambda one: replace(one, logprobs=tuple(p / math.log(10) for p in one.logprobs))),
        "completion",
        _TOKENS,
    ),
    Neighbour("not a number", told(without_a_number), "logits", "logprobs are finite"),
)
