"""How well transformers' own ``generate`` does on the rows, by mode."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.dialect import modes_restored, switch_checkpointing
from omni_grpo_core.core.forward import library_keywords
from omni_grpo_core.core.policy import Policy, library_generate
from omni_grpo_core.rewards import columns_of
from omni_grpo_core.rewards.accuracy import Accuracy
from omni_grpo_core.rewards.format import Format
from omni_grpo_core.types import Row, Sample

EVAL = "eval"
TRAIN = "train, checkpointing"
NO_CACHE = "train, checkpointing, use_cache=False"
_TOKENS = 48
"""The shipped answers are shorter; completions that never end are truncated here."""


def exam(policy: Policy, rows: Sequence[Row], samples: Sequence[Sample]) -> dict[str, Any]:
    """Shares of right and of well-formed greedy answers, [accuracy, format], by mode; for a mode in
    which this version raises an exception, that exception."""
    found: dict[str, Any] = {EVAL: _shares(samples, [_answer(policy, row) for row in rows])}
    with modes_restored(policy.model):
        switch_checkpointing(policy.model, True)
        policy.model.train()
        for mode, settings in ((TRAIN, {}), (NO_CACHE, {"use_cache": False})):
            try:
                texts = [_answer(policy, row, **settings) for row in rows]
            except Exception as error:  # whatever this version raises is the fact
                found[mode] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            else:
                found[mode] = _shares(samples, texts)
    return found


def batched(policy: Policy, rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows get the same ids from ``generate`` in a left-padded batch as alone.

    One call takes one audio-in-video flag, so there is a batch for each: ``rows``, ``equal``, and
    if this version cannot do it ``refused``: what it raised.
    """
    equal = 0
    for flag in (True, False):
        alike = [row for row in rows if (row.audio_in_video == "interleaved") == flag]
        if not alike:
            continue
        batch = collate(alike, policy.pad_token_id)
        keywords = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "use_audio_in_video": flag,
            **batch.tensors,
        }
        try:
            together = _generate(policy, keywords)
        except Exception as error:  # whatever this version raises is the fact
            refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return {"rows": len(rows), "equal": equal, "refused": refused}
        alone = [_generate(policy, library_keywords(policy, row))[0] for row in alike]
        equal += sum(a == b for a, b in zip(together, alone, strict=True))
    return {"rows": len(rows), "equal": equal}


def _answer(policy: Policy, row: Row, **settings: Any) -> str:
    (ids,) = _generate(policy, library_keywords(policy, row), **settings)
    return policy.decode(ids)


@torch.no_grad()
def _generate(
    policy: Policy, keywords: Mapping[str, Any], **settings: Any
) -> list[tuple[int, ...]]:
    """New ids of each row, up to the first eos, which is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointing warns of what is measured here
        output = library_generate(policy, keywords, max_new_tokens=_TOKENS, **settings)
    rows = output[:, keywords["input_ids"].shape[1] :].tolist()
    ends = [
        next((i for i, token in enumerate(row) if token in policy.eos_token_ids), len(row))
        for row in rows
    ]
    return [tuple(row[:end]) for row, end in zip(rows, ends, strict=True)]


def _shares(samples: Sequence[Sample], texts: list[str]) -> list[float]:
    columns = columns_of(samples)
    shares = []
    for reward in (Accuracy(), Format()):
        scores = reward.explain([""] * len(texts), texts, **columns)
        shares.append(round(sum(score.value or 0.0 for score in scores) / len(texts), 4))
    return shares
