"""Faults inside and around the model: embeddings, positions, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.core.dialect import tokens_cached
from omni_grpo_core.faults.batch import PADDED
from omni_grpo_core.faults.fault import FaultRegistry
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.recorder.hooks import patched

shelf = FaultRegistry()
Manager = AbstractContextManager[None]


def text_model(loop: ReferenceLoop) -> Any:
    """The text model, which some versions of transformers keep one level deeper."""
    return getattr(loop.thinker.model, "language_model", loop.thinker.model)


@contextmanager
def _before_text(loop: ReferenceLoop, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Change the keywords with which the text model is called."""

    def hook(_module: Any, _args: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        changed = dict(keywords)
        change(changed)
        return _args, changed

    handle = text_model(loop).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _embedding(loop: ReferenceLoop, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Change what enters the text model, (N, L, H), by the ids that it stands for."""
    asked: list[Tensor] = []

    def note(_module: Any, _args: Any, keywords: dict[str, Any]) -> None:
        asked[:] = [] if keywords.get("input_ids") is None else [keywords["input_ids"]]

    def changed(keywords: dict[str, Any]) -> None:
        embeds = keywords.get("inputs_embeds")
        if asked and embeds is not None and embeds.shape[:2] == asked[0].shape:
            keywords["inputs_embeds"] = change(asked[0], embeds)

    handle = loop.thinker.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _before_text(loop, changed):
            yield
    finally:
        handle.remove()


def _scoring(loop: ReferenceLoop, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Manager:
    before = loop.scoring_inputs
    return loop.replaced(scoring_inputs=lambda rolled: change(before(rolled)))


# --------------------------------------------------------------------------- embeddings


@shelf.add(
    "embed.not-injected",
    "The towers' features never reach the placeholders, which keep their raw embeddings: swapping "
    "the media changes nothing.",
    "the incident's hypothesis; forwards on embed_tokens(input_ids)",
)
def not_injected(loop: ReferenceLoop) -> Manager:
    media = placeholder_ids(loop.processor)

    def raw(ids: Tensor, embeds: Tensor) -> Tensor:
        waiting = torch.isin(ids, torch.tensor(list(media.values())))
        own = loop.thinker.get_input_embeddings()(ids)
        return torch.where(waiting[:, :, None], own, embeds)

    return _embedding(loop, raw)


@shelf.add(
    "embed.misordered",
    "Audio features are scattered over the placeholders in another order than the audios stand in "
    "the text.",
    "batches sorted by length inside an audio tower",
)
def misordered(loop: ReferenceLoop) -> Manager:
    audio = placeholder_ids(loop.processor)["audio"]

    def backwards(ids: Tensor, embeds: Tensor) -> Tensor:
        rows, places = (ids == audio).nonzero(as_tuple=True)
        changed = embeds.clone()
        changed[rows, places] = embeds[rows.flip(0), places.flip(0)]
        return changed

    return _embedding(loop, backwards)


# --------------------------------------------------------------------------- positions


@shelf.add(
    "pos.stale-deltas",
    "Decoding goes on from the rope_deltas of an earlier batch: the answer's positions are off.",
    "transformers issues on rope_deltas kept on the model",
)
def stale_deltas(loop: ReferenceLoop) -> Manager:
    def shift(keywords: dict[str, Any]) -> None:
        positions = keywords.get("position_ids")
        if positions is not None and positions.shape[-1] == 1:
            keywords["position_ids"] = positions + 7

    return _before_text(loop, shift)


@shelf.add(
    "pos.collapsed-time",
    "The seconds between frames are cut to the integer 0: all frames of a clip have one time.",
    "transformers: second_per_grid_ts in integer arithmetic",
)
@contextmanager
def collapsed_time(loop: ReferenceLoop) -> Iterator[None]:
    # recent versions keep it one level deeper, and a name for it above
    owners = [o for o in (loop.thinker, loop.thinker.model) if hasattr(o, "get_rope_index")]
    before = owners[-1].get_rope_index

    def still(*args: Any, **keywords: Any) -> Any:
        given = list(args)
        if len(given) > 6 and given[6] is not None:
            given[6] = torch.zeros_like(torch.as_tensor(given[6]))
        if keywords.get("second_per_grids") is not None:
            seconds = torch.as_tensor(keywords["second_per_grids"])
            keywords["second_per_grids"] = torch.zeros_like(seconds)
        return before(*given, **keywords)

    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patched(owner, get_rope_index=still))
        yield


@shelf.add(
    "pos.expanded-wrong",
    "Positions are computed for the first row and expanded over all copies of all prompts.",
    "trainers that repeat one prompt G times",
    needs=PADDED,
)
def expanded_wrong(loop: ReferenceLoop) -> Manager:
    def expand(keywords: dict[str, Any]) -> None:
        positions = keywords.get("position_ids")
        if positions is not None and positions.shape[-1] > 1:
            keywords["position_ids"] = positions[:, :1].expand_as(positions)

    return _before_text(loop, expand)


@shelf.add(
    "pos.no-mask",
    "The scoring forward gets no attention mask: the model silently takes positions of plain text.",
    "scoring calls of model(input_ids, **multimodal_inputs)",
)
def no_mask(loop: ReferenceLoop) -> Manager:
    def without(keywords: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in keywords.items() if k != "attention_mask"}

    return _scoring(loop, without)


@shelf.add(
    "pos.flag-scoring",
    "use_audio_in_video is not passed to the scoring forward at all: time positions there differ "
    "from those of generation.",
    "HumanOmniV2's _get_per_token_logps",
)
def flag_scoring(loop: ReferenceLoop) -> Manager:
    def without(keywords: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in keywords.items() if k != "use_audio_in_video"}

    return _scoring(loop, without)


@shelf.add(
    "policy.config-mismatch",
    "The checkpoint was saved by another major version: the rope sections are not found and "
    "silently take a default.",
    "transformers 4.x and 5.x read rope_scaling and rope_parameters",
)
def config_mismatch(loop: ReferenceLoop) -> Manager:
    return _sections(loop, [16, 0, 0])


@contextmanager
def _sections(loop: ReferenceLoop, sections: list[int]) -> Iterator[None]:
    """Other rope sections wherever the loaded model keeps them: in the configuration, and on
    modules that read it once."""
    with ExitStack() as stack:
        for owner in (loop.thinker.config.get_text_config(), *text_model(loop).modules()):
            if isinstance(getattr(owner, "mrope_section", None), list):
                stack.enter_context(patched(owner, mrope_section=sections))
            for name in ("rope_parameters", "rope_scaling"):
                # its own: 5.24 keeps the old name as an alias, and warns of whoever sets it
                told = vars(owner).get(name)
                if isinstance(told, dict) and told.get("mrope_section"):
                    changed = {**told, "mrope_section": sections}
                    stack.enter_context(patched(owner, **{name: changed}))
        yield


# --------------------------------------------------------------------------- logits


@shelf.add(
    "logits.batch-differs",
    "The attention kernel takes no padding mask: a row in a padded batch has other logits than "
    "the row alone.",
    "FlashAttention set up for packed rows, on left-padded ones",
    needs=PADDED,
)
def batch_differs(loop: ReferenceLoop) -> Manager:
    def unmasked(keywords: dict[str, Any]) -> None:
        mask = keywords.get("attention_mask")
        if isinstance(mask, Tensor):
            keywords["attention_mask"] = torch.ones_like(mask)
        elif isinstance(mask, Mapping):
            keywords["attention_mask"] = None

    return _before_text(loop, unmasked)


@shelf.add(
    "logits.cache-differs",
    "Generation keeps a sliding window of its cache, scoring sees everything: the two disagree.",
    "cache_implementation and sliding_window settings",
)
def cache_differs(loop: ReferenceLoop) -> Manager:
    def windowed(keywords: dict[str, Any]) -> None:
        embeds, mask = keywords.get("inputs_embeds"), keywords.get("attention_mask")
        held = tokens_cached(keywords)
        if embeds is None or embeds.shape[1] != 1 or not held:
            return
        # from 5.23 on there is none where nothing is padded
        whole = torch.ones(len(embeds), int(held) + 1, dtype=torch.int64)
        kept = mask.clone() if isinstance(mask, Tensor) else whole
        kept[:, :-48] = 0
        keywords["attention_mask"] = kept

    return _before_text(loop, windowed)


@shelf.add(
    "logits.low-precision",
    "The log-softmax is taken in bfloat16: ratios are noise once a rollout is used several times.",
    "selective_log_softmax on half-precision logits",
    needs={"iterations": 2},
)
def low_precision(loop: ReferenceLoop) -> Manager:
    def log_softmax(logits: Tensor) -> Tensor:
        scores = logits.bfloat16() / loop.config.temperature
        scores = scores.index_fill(-1, torch.tensor(loop.suppressed), -torch.inf)
        return scores.log_softmax(-1)

    return loop.replaced(log_softmax=log_softmax)
