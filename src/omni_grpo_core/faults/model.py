"""Faults inside and around the model: embeddings, positions, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from omni_grpo_core.core.batch import placeholder_ids
from omni_grpo_core.core.dialect import tokens_cached
from omni_grpo_core.faults.batch import PADDED
from omni_grpo_core.faults.fault import (
    ONE_PROMPT,
    FaultRegistry,
    Injection,
    Manager,
    instead_of,
    result_of,
    without,
)
from omni_grpo_core.faults.seams import Loop
from omni_grpo_core.recorder.hooks import patched

faults = FaultRegistry()
Keywords = dict[str, Any]


def text_model(loop: Loop) -> Any:
    """The text model, which some versions of transformers nest one level deeper."""
    return getattr(loop.thinker.model, "language_model", loop.thinker.model)


@contextmanager
def _pre_hook(module: Any, change: Callable[[Keywords], None]) -> Iterator[None]:
    """Apply ``change`` to the keywords of a module's calls, for the duration of the block."""

    def hook(_module: Any, args: Any, keywords: Keywords) -> tuple[Any, Keywords]:
        changed = dict(keywords)
        change(changed)
        return args, changed

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _text_keywords(change: Callable[[Keywords], None]) -> Injection:
    """Decorates a change to the keywords with which the text model is called."""

    @wraps(change)
    def inject(loop: Loop) -> Manager:
        return _pre_hook(text_model(loop), change)

    return inject


def _embeddings(change: Callable[[Loop, Tensor, Tensor], Tensor]) -> Injection:
    """Decorates a change to the text model's input embeddings, (N, L, H), given the ids, (N, L)."""

    @contextmanager
    @wraps(change)
    def inject(loop: Loop) -> Iterator[None]:
        asked: list[Any] = [None]

        def note(keywords: Keywords) -> None:
            asked[0] = keywords.get("input_ids")

        def changed(keywords: Keywords) -> None:
            (ids,), embeds = asked, keywords.get("inputs_embeds")
            if ids is not None and embeds is not None and embeds.shape[:2] == ids.shape:
                keywords["inputs_embeds"] = change(loop, ids, embeds)

        with _pre_hook(loop.thinker, note), _pre_hook(text_model(loop), changed):
            yield

    return inject


# --------------------------------------------------------------------------- embeddings


@faults.add("embed.not-injected", "the incident's hypothesis; forwards on embed_tokens(input_ids)")
@_embeddings
def not_injected(loop: Loop, ids: Tensor, embeds: Tensor) -> Tensor:
    """The towers' features never reach the placeholders, which keep their raw embeddings: swapping
    the media changes nothing."""
    waiting = torch.isin(ids, torch.tensor(list(placeholder_ids(loop.processor).values())))
    own = loop.thinker.get_input_embeddings()(ids)
    return torch.where(waiting[:, :, None], own, embeds)


@faults.add("embed.misordered", "batches sorted by length inside an audio tower")
@_embeddings
def misordered(loop: Loop, ids: Tensor, embeds: Tensor) -> Tensor:
    """Audio features are scattered over the placeholders in a different order from the audios in
    the text."""
    audio = placeholder_ids(loop.processor)["audio"]
    rows, places = (ids == audio).nonzero(as_tuple=True)
    changed = embeds.clone()
    changed[rows, places] = embeds[rows.flip(0), places.flip(0)]
    return changed


# --------------------------------------------------------------------------- positions


@faults.add("pos.stale-deltas", "transformers issues on rope_deltas kept on the model")
@_text_keywords
def stale_deltas(keywords: Keywords) -> None:
    """Decoding uses the rope_deltas of an earlier batch: the answer's positions are off."""
    positions = keywords.get("position_ids")
    if positions is not None and positions.shape[-1] == 1:
        keywords["position_ids"] = positions + 7


@faults.add("pos.collapsed-time", "transformers: second_per_grid_ts in integer arithmetic")
@contextmanager
def collapsed_time(loop: Loop) -> Iterator[None]:
    """The seconds between frames are truncated to 0: all frames of a clip have the same time."""
    # recent versions keep it one level deeper, with an alias above
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


@faults.add(
    "pos.expanded-wrong",
    "trainers that repeat one prompt G times",
    needs=PADDED,
    lacking=ONE_PROMPT,
)
@_text_keywords
def expanded_wrong(keywords: Keywords) -> None:
    """Positions are computed for the first row and expanded to all copies of all prompts."""
    positions = keywords.get("position_ids")
    if positions is not None and positions.shape[-1] > 1:
        keywords["position_ids"] = positions[:, :1].expand_as(positions)


@faults.add("pos.no-mask", "scoring calls of model(input_ids, **multimodal_inputs)")
@result_of("scoring_inputs")
def no_mask(loop: Loop, inputs: Keywords) -> Keywords:
    """The scoring forward gets no attention mask: the model silently uses plain text positions."""
    return without(inputs, "attention_mask")


@faults.add("pos.flag-scoring", "HumanOmniV2's _get_per_token_logps")
@result_of("scoring_inputs")
def flag_scoring(loop: Loop, inputs: Keywords) -> Keywords:
    """use_audio_in_video is not passed to the scoring forward: its time positions differ from those
    of generation."""
    return without(inputs, "use_audio_in_video")


@faults.add("policy.config-mismatch", "transformers 4.x reads rope_scaling, 5.x rope_parameters")
@contextmanager
def config_mismatch(loop: Loop) -> Iterator[None]:
    """The checkpoint was saved by another major version: the rope sections are not found and
    silently default."""
    sections = [16, 0, 0]
    with ExitStack() as stack:
        # in the configuration, and on modules that read it at construction
        for owner in (loop.thinker.config.get_text_config(), *text_model(loop).modules()):
            if isinstance(getattr(owner, "mrope_section", None), list):
                stack.enter_context(patched(owner, mrope_section=sections))
            for name in ("rope_parameters", "rope_scaling"):
                # own attributes only: 5.24 keeps the old name as an alias and warns when it is set
                rope = vars(owner).get(name)
                if isinstance(rope, dict) and rope.get("mrope_section"):
                    changed = {**rope, "mrope_section": sections}
                    stack.enter_context(patched(owner, **{name: changed}))
        yield


# --------------------------------------------------------------------------- logits


@faults.add(
    "logits.batch-differs",
    "FlashAttention set up for packed rows, on left-padded ones",
    needs=PADDED,
    lacking=ONE_PROMPT,
)
@_text_keywords
def batch_differs(keywords: Keywords) -> None:
    """The attention kernel takes no padding mask: a row has different logits in a padded batch than
    alone."""
    mask = keywords.get("attention_mask")
    if isinstance(mask, Tensor):
        keywords["attention_mask"] = torch.ones_like(mask)
    elif isinstance(mask, Mapping):
        keywords["attention_mask"] = None


@faults.add("logits.cache-differs", "cache_implementation and sliding_window settings")
@_text_keywords
def cache_differs(keywords: Keywords) -> None:
    """Generation uses a sliding-window cache, scoring sees everything: the two disagree."""
    embeds, mask = keywords.get("inputs_embeds"), keywords.get("attention_mask")
    held = tokens_cached(keywords)
    if embeds is None or embeds.shape[1] != 1 or not held:
        return
    # from 5.23 on there is no mask where nothing is padded
    whole = torch.ones(len(embeds), int(held) + 1, dtype=torch.int64)
    kept = mask.clone() if isinstance(mask, Tensor) else whole
    kept[:, :-48] = 0
    keywords["attention_mask"] = kept


@faults.add(
    "logits.low-precision",
    "selective_log_softmax on half-precision logits",
    needs={"iterations": 2},
)
@instead_of("log_softmax")
def low_precision(loop: Loop, before: object, logits: Tensor) -> Tensor:
    """The log-softmax is computed in bfloat16: ratios are noise once a rollout is reused."""
    scores = logits.bfloat16() / loop.config.temperature
    scores = scores.index_fill(-1, torch.tensor(loop.suppressed), -torch.inf)
    return scores.log_softmax(-1)
