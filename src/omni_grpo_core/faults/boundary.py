"""Faults of the boundary between trainer and rollout engine: what is sent, what the engine does
with it, and what comes back.

Each is planted into a :class:`~omni_grpo_core.engines.requests.Backend`, whichever it is, and must
be found by the proof of agreement before the first update.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from omni_grpo_core.core import rollout as rollout_module
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.forward import sampling_logprobs
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import choose
from omni_grpo_core.engines.requests import Answer, Backend, Request, Sampling
from omni_grpo_core.engines.vllm_backend import VllmBackend
from omni_grpo_core.engines.weights import WEIGHTS, write_weights
from omni_grpo_core.faults.config import LoopConfig
from omni_grpo_core.faults.fault import Fault
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Media, Modality, Stage

PLACES = ("engine", "parity")
"""What a fault is held against: the proof before a run on an engine, whose bundle the doctor reads,
and the comparison of two input paths. See :mod:`~omni_grpo_core.faults.boundary_trial`."""
CONFIG = LoopConfig(rows=(0, 3, 17, 19, 21), group_size=2, max_new_tokens=24, temperature=1.5)
"""Sound inside a clip and beside one, a picture, a sound, text alone."""

Generate = Callable[[Sequence[Request], Sampling], list[Answer]]
Plant = Callable[["Boundary"], None]


@dataclass
class Boundary:
    """A backend between whose calls a fault can put itself."""

    backend: Backend
    policy: Policy = field(repr=False)
    """The trainer's: for what a faulty sender would know."""

    def __post_init__(self) -> None:
        self.generate: Generate = self.backend.generate
        self.load: Callable[[Path], str] = self.backend.load
        self.restart, self.close = self.backend.restart, self.backend.close
        self.sleep, self.wake = self.backend.sleep, self.backend.wake

    @property
    def name(self) -> str:
        return self.backend.name


@dataclass(frozen=True, slots=True)
class BoundaryFault(Fault):
    """``inject`` takes a :class:`Boundary`, which is used up. ``found``: the checks of the proof
    that fail."""

    found: tuple[str, ...] = ()

    @property
    def of_input(self) -> bool:
        """Whether the two sides' inputs differ already, without a forward."""
        return any(cause.startswith("parity.") for cause in self.also)


_TEXT_TOO: Mapping[Stage, str] = {"text": "the client takes the placeholders out of the text, too"}
BOUNDARY: list[BoundaryFault] = []
"""All, in the order of the pipeline."""


def _fault(
    id: str,
    stage: Stage,
    found: str,
    source: str,
    *,
    parity: str = "",
    also: tuple[str, ...] = (),
    **more: Any,
) -> Callable[[Plant], Plant]:
    """``parity``: the causes by its names that are true of the fault; empty for one that is not of
    input."""

    def put(plant: Plant) -> Plant:
        def inject(boundary: Boundary) -> AbstractContextManager[None]:
            plant(boundary)
            return nullcontext()

        story = " ".join((plant.__doc__ or "").split())
        true = (*also, *(f"parity.{cause}" for cause in parity.split()))
        checks = tuple(found.split("; "))
        fault = BoundaryFault(id, stage, story, source, inject, also=true, found=checks, **more)
        BOUNDARY.append(fault)
        return plant

    return put


# --------------------------------------------------------------------------- what is sent


@_fault(
    "engine.images-only",
    "media",
    "video reaches the engine; audio reaches the engine",
    "the incident's second trainer: images were passed on, videos and audios not",
    also=("engine.video-dropped", "engine.audio-dropped"),
    parity="text dropped video-missing audio-missing features-missing",
    accepted=_TEXT_TOO,
)
def images_only(boundary: Boundary) -> None:
    """A client that knows images only: videos and sounds leave the request, and their placeholders
    the text."""
    sent_otherwise(boundary, lambda request: without(boundary, request, ("video", "audio")))


@_fault(
    "engine.audio-dropped",
    "media",
    "audio reaches the engine",
    "rollout clients with a multi_modal_data of images and videos",
    parity="text dropped flag-lost audio-missing features-missing",
    accepted=_TEXT_TOO,
)
def audio_dropped(boundary: Boundary) -> None:
    """Sounds are not sent, and a clip's own track is not interleaved."""
    sent_otherwise(boundary, lambda request: without(boundary, request, ("audio",)))


@_fault(
    "engine.expanded-twice",
    "batch",
    "placeholders are expanded once",
    "engines that are given the trainer's expanded ids, and expand them",
    parity="expanded-twice",
)
def expanded_twice(boundary: Boundary) -> None:
    """The prompt is sent with the placeholders of the batch, and the engine expands the first of
    each medium again."""

    def expanded(request: Request) -> Request:
        policy, media, text = boundary.policy, request.media, request.text
        side = policy.patch_size * policy.processor.image_processor.merge_size
        sound = [] if request.audio_in_video == "interleaved" else media.audios
        for modality, counts in (
            ("image", [one.pixels[0].numel() // side**2 for one in media.images]),
            ("video", [one.frames[::2, 0].numel() // side**2 for one in media.videos]),
            ("audio", [policy.family.audio_tokens(-(-len(one.samples) // 160)) for one in sound]),
        ):
            name = getattr(policy.processor, f"{modality}_token")
            before, *after = text.split(name)
            pieces = [name * count + rest for count, rest in zip(counts, after, strict=False)]
            text = "".join([before, *pieces]) if counts else text
        return replace(request, text=text)

    sent_otherwise(boundary, expanded)


@_fault(
    "engine.resized",
    "batch",
    "media have the batch's size in the engine",
    "engines whose processor resizes by limits of its own",
    also=("engine.media-size",),
    parity="image-resized video-resized",
    accepted={"media": "the frames are other ones before they are tokens"},
)
def resized(boundary: Boundary) -> None:
    """Pictures and frames are enlarged to the engine's own least size."""
    sent_otherwise(boundary, lambda request: replace(request, media=_scaled(request.media, 2.0)))


# --------------------------------------------------------------------------- what is loaded


@_fault(
    "engine.weights-stale",
    "policy",
    "the engine has the trainer's weights",
    "weight syncs that are skipped or fail without a word",
)
def weights_stale(boundary: Boundary) -> None:
    """The engine says that it has loaded the new weights, and computes with others."""
    load = boundary.load

    def stale(folder: Path) -> str:
        found = load(folder)
        with weights_of(folder, older):
            load(folder)
        return found

    boundary.load = stale


@_fault(
    "engine.adapter-off",
    "policy",
    "the adapter is applied in the engine",
    "LoRA runs whose engine serves the base model",
    needs={"lora": True},
)
def adapter_off(boundary: Boundary) -> None:
    """The engine has the base weights: the adapter was neither merged nor sent."""
    load = boundary.load
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in boundary.policy.model.state_dict().items()
        if "lora_" not in name
    }

    def plain(folder: Path) -> str:
        found = load(folder)
        with weights_of(folder, lambda held: _in_place_of(held, base)):
            load(folder)
        return found

    boundary.load = plain


# --------------------------------------------------------------------------- what is sampled


@_fault(
    "engine.top-k",
    "completion",
    "the engine samples from the whole distribution",
    "engines that take top-k and top-p from the checkpoint's generation config",
)
def top_k(boundary: Boundary) -> None:
    """Tokens are drawn from the first few of the distribution; the logprobs do not know of it."""
    backend = boundary.backend
    if isinstance(backend, VllmBackend):
        backend.more = {"top_k": KEPT}
    else:
        _within(boundary, lambda sampling: {"choose": _choose_among_few})


@_fault(
    "engine.temperature",
    "completion",
    "logprobs are at the sampling temperature",
    "vLLM's default, raw_logprobs: before the temperature",
)
def temperature(boundary: Boundary) -> None:
    """Completions are drawn at the run's temperature, their logprobs reported at 1."""
    backend = boundary.backend
    if isinstance(backend, VllmBackend):
        backend.llm.collective_rpc(report, args=("raw_logprobs",))
    else:
        _within(boundary, _scored_at_one)


# --------------------------------------------------------------------------- what comes back


@_fault(
    "engine.requests-reordered",
    "completion",
    "answers belong to their prompts",
    "answers collected as they finish",
)
def requests_reordered(boundary: Boundary) -> None:
    """Answers come in the order in which they finished."""
    generate = boundary.generate
    boundary.generate = lambda requests, sampling: generate(requests, sampling)[::-1]


@_fault(
    "engine.n-reordered",
    "completion",
    "a group's completions are adjacent",
    "completions flattened over prompts first",
)
def n_reordered(boundary: Boundary) -> None:
    """Completions come 1 2 1 2 where 1 1 2 2 is assumed."""
    generate = boundary.generate

    def turned(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        answers = generate(requests, sampling)
        flat = [
            drawn for of_one in zip(*(a.drawn for a in answers), strict=True) for drawn in of_one
        ]
        size = sampling.group_size
        return [
            replace(answer, drawn=tuple(flat[at * size : (at + 1) * size]))
            for at, answer in enumerate(answers)
        ]

    boundary.generate = turned


# --------------------------------------------------------------------------- how

KEPT = 3
"""Tokens of the distribution that the planted top-k draws from."""


def sent_otherwise(boundary: Boundary, change: Callable[[Request], Request]) -> None:
    """Every request is changed on its way."""
    generate = boundary.generate
    boundary.generate = lambda requests, sampling: generate(list(map(change, requests)), sampling)


def without(boundary: Boundary, request: Request, lost: Sequence[Modality]) -> Request:
    """The request of a client that does not know some modalities."""
    processor, text, media = boundary.policy.processor, request.text, request.media
    for modality in lost:
        name = re.escape(getattr(processor, f"{modality}_token"))
        mark = "audio" if modality == "audio" else "vision"
        begin, end = (
            re.escape(getattr(processor, f"{mark}_{side}_token")) for side in ("bos", "eos")
        )
        text = re.sub(f"{begin}{name}{end}", "", text)
    if "video" in lost:
        media = replace(media, videos=())
    media = replace(media, audios=())
    return replace(request, text=text, media=media, audio_in_video="off")


def _scaled(media: Media, factor: float) -> Media:
    def scale(pixels: Tensor) -> Tensor:
        flat = pixels.reshape(-1, *pixels.shape[-3:]).float()
        new = torch.nn.functional.interpolate(flat, scale_factor=factor, mode="bilinear")
        return new.reshape(*pixels.shape[:-2], *new.shape[-2:]).to(pixels.dtype)

    images = tuple(replace(one, pixels=scale(one.pixels)) for one in media.images)
    videos = tuple(replace(one, frames=scale(one.frames)) for one in media.videos)
    return replace(media, images=images, videos=videos)


@contextmanager
def weights_of(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Iterator[None]:
    """Other weights in a checkpoint folder, for a while."""
    true = load((folder / WEIGHTS).read_bytes())
    write_weights(change(true), folder)
    try:
        yield
    finally:
        write_weights(true, folder)


def older(weights: dict[str, Tensor], part: str = ".layers.") -> dict[str, Tensor]:
    """As some updates ago, in the layers whose names contain ``part``."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value + 0.05 * value.std() * torch.randn(value.shape, generator=generator)
        if part in name and value.dim() > 1
        else value
        for name, value in weights.items()
    }


def _in_place_of(held: dict[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {f"thinker.{published_name(name)}": value for name, value in base.items()}
    return {name: own.get(name, value).contiguous() for name, value in held.items()}


def _within(boundary: Boundary, replaced: Callable[[Sampling], dict[str, Any]]) -> None:
    """Names of our rollout's module that are others while the engine generates."""
    generate = boundary.generate

    def other(requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        with patched(rollout_module, **replaced(sampling)):
            return generate(requests, sampling)

    boundary.generate = other


def _choose_among_few(logprobs: Tensor, uniforms: Tensor | None, instead: int) -> Tensor:
    least = logprobs.topk(KEPT, -1).values[..., -1:]
    return choose(logprobs.masked_fill(logprobs < least, -torch.inf), uniforms, instead)


def _scored_at_one(sampling: Sampling) -> dict[str, Any]:
    def at_one(policy: Policy, logits: Tensor, temperature: float) -> Tensor:
        return sampling_logprobs(policy, logits, 1.0)

    def at_temperature(logprobs: Tensor, uniforms: Tensor | None, instead: int) -> Tensor:
        return choose(logprobs / (sampling.temperature or 1.0), uniforms, instead)

    return {"sampling_logprobs": at_one, "choose": at_temperature}


def report(worker: Any, mode: str) -> None:
    """Have a vLLM worker report other logprobs."""
    sampler = worker.model_runner.sampler
    # the second has a mode of its own, and what it returns takes the place of the first's
    for part in (sampler, sampler.topk_topp_sampler):
        part.logprobs_mode = mode
