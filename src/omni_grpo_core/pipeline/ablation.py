"""Does a modality reach the model? Remove it and swap it: does the answer change?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import torch

from omni_grpo_core.core.completions import pad_completions
from omni_grpo_core.core.forward import token_logprobs
from omni_grpo_core.core.policy import Policy, generating
from omni_grpo_core.pipeline.inputs import make_batch, score
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.pipeline.stages import Values, greedy
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.tolerances import LEAST_SHIFT
from omni_grpo_core.types import (
    Batch,
    Media,
    Modality,
    Rollout,
)

_COLUMNS = 16
"""Columns of padding: a vector register's width in float32, so that sums run in another order."""


_CONTENT: Mapping[Modality, tuple[str, str]] = {
    "image": ("images", "pixels"),
    "video": ("videos", "frames"),
    "audio": ("audios", "samples"),
}
"""By modality: the field of ``Media``, and the field of each item that the model is given."""
Judgement = Literal["reaches", "lost", "not judged"]


@dataclass(frozen=True, slots=True)
class ModalityProof:
    """Does a modality reach the model? Over the ``rows`` that have it, greedy.

    ``accuracy``: unchanged; ``without``: frames black or audio silent; ``swapped``: each row with
    another row's. ``moved``: share of completions that swapping changes.

    ``shift``: mean absolute change of the completion's logprobs, nats per token, when the medium is
    black or silent, inverted, or another row's of the same shape, whichever is largest. Its
    threshold is measured, since an answer about something else may hardly change: ``again`` is the
    change between two passes over the same input (0 on a CPU), ``rounding`` the change under more
    columns of padding, which only affect rounding.
    """

    modality: Modality
    rows: int
    accuracy: float
    without: float
    swapped: float
    moved: float
    shift: float
    again: float = 0.0
    rounding: float = 0.0

    @property
    def judgement(self) -> Judgement:
        """``lost``: other content changes no logprob. ``not judged``: it changes them, but no more
        than rounding does or a medium that the questions are not about."""
        if self.shift <= self.again:
            return "lost"
        return "reaches" if self.shift > max(self.rounding, LEAST_SHIFT) else "not judged"

    @property
    def ok(self) -> bool:
        """Whether there is no evidence that the modality is lost."""
        return self.judgement != "lost"


@torch.no_grad()
def prove(
    policy: Policy, values: Values, modality: Modality, settings: Settings
) -> ModalityProof | None:
    """Blank, invert and swap a modality, and compare completions and logprobs; ``None`` if no row
    has it."""
    media = values["media"]
    present = [index for index, clip in enumerate(media) if _content(clip, modality)]
    if not present:
        return None
    as_is = values["completion"]
    kept = replace(as_is, completions=tuple(as_is.completions[i] for i in present))
    true = {i: media[i] for i in present}
    swap = {i: swapped(media[i], donor(media, present, i, modality), modality) for i in present}
    black = {i: blanked(media[i], modality) for i in present}
    inverted = {i: negative(media[i], modality) for i in present}
    with generating(policy.model):
        batches = [_rebuilt(policy, values, m, settings) for m in (true, black, inverted, swap)]
        true_batch, blank_batch, _, swapped_batch = batches
        swapped_run = greedy(policy, swapped_batch, settings)
        blank_run = greedy(policy, blank_batch, settings)
        was = _logprobs(policy, true_batch, kept)

        def change(batch: Batch) -> float:
            return float((_logprobs(policy, batch, kept) - was).abs().mean())

        # another number of media tokens moves what follows, even if the media are not seen
        alike = [b for b in batches[1:] if torch.equal(b.input_ids, true_batch.input_ids)]
        shift = max(map(change, alike))
        again, rounding = change(true_batch), change(_padded(true_batch, policy.pad_token_id))
    changed = [
        a.text != b.text for a, b in zip(kept.completions, swapped_run.completions, strict=True)
    ]
    return ModalityProof(
        modality=modality,
        rows=len(present),
        accuracy=_accuracy(values, kept),
        without=_accuracy(values, blank_run),
        swapped=_accuracy(values, swapped_run),
        moved=fmean(changed),
        shift=shift,
        again=again,
        rounding=rounding,
    )


def blanked(media: Media, modality: Modality) -> Media:
    """The same media with one modality's content removed: black pictures, silence."""
    return _with_content(
        media, modality, [torch.zeros_like(one) for one in _content(media, modality)]
    )


def swapped(media: Media, other: Media, modality: Modality) -> Media:
    """``media`` with one modality's content from ``other``; audio keeps its link to its video."""
    if modality == "image":
        return replace(media, images=other.images)
    if modality == "video":
        return replace(media, videos=other.videos)
    return _with_content(media, modality, _content(other, modality))


def donor(media: Sequence[Media], present: Sequence[int], index: int, modality: Modality) -> Media:
    """The next row with as many items of the modality and different content, else the row itself
    inverted: a single row must be swapped with something."""
    place = present.index(index)
    own = _content(media[index], modality)
    for other in (*present[place + 1 :], *present[:place]):
        found = _content(media[other], modality)
        if len(found) == len(own) and not all(map(torch.equal, found, own)):
            return media[other]
    return negative(media[index], modality)


def negative(media: Media, modality: Modality) -> Media:
    """The same media with one modality inverted: dark for bright, audio reversed in time."""
    own = _content(media, modality)
    return _with_content(
        media, modality, [s.flip(0) if modality == "audio" else 255 - s for s in own]
    )


def _content(media: Media, modality: Modality) -> list[torch.Tensor]:
    items, content = _CONTENT[modality]
    return [getattr(item, content) for item in getattr(media, items)]


def _with_content(media: Media, modality: Modality, new: Sequence[torch.Tensor]) -> Media:
    items, content = _CONTENT[modality]
    pairs = zip(getattr(media, items), new, strict=True)
    changed: dict[str, Any] = {items: tuple(replace(one, **{content: x}) for one, x in pairs)}
    return replace(media, **changed)


def _rebuilt(policy: Policy, values: Values, media: dict[int, Media], settings: Settings) -> Batch:
    prompts, conversations = values["text"], values["conversation"]
    return make_batch(
        policy,
        [prompts[i] for i in media],
        [conversations[i] for i in media],
        list(media.values()),
        settings,
    )


def _padded(batch: Batch, pad_token_id: int) -> Batch:
    """The batch with more padding on its left."""
    ids, mask = batch.input_ids, batch.attention_mask
    return replace(
        batch,
        input_ids=torch.nn.functional.pad(ids, (_COLUMNS, 0), value=pad_token_id),
        attention_mask=torch.nn.functional.pad(mask, (_COLUMNS, 0)),
    )


def _accuracy(values: Values, rolled: Rollout) -> float:
    rows = score((Accuracy(),), values["text"], values["sample"], rolled)["accuracy"]
    return fmean(row.value or 0.0 for row in rows)


def _logprobs(policy: Policy, batch: Batch, rolled: Rollout) -> torch.Tensor:
    """Logprobs of every token of the completions, concatenated: float32, (tokens,)."""
    tokens = pad_completions(rolled.completions, policy.pad_token_id)
    return token_logprobs(policy, batch, tokens, 1.0)[tokens.mask]
