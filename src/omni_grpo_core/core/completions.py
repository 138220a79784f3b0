"""Completions as tensors: ids, mask and logprobs are made together in one function."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.types import Completion


@dataclass(frozen=True, slots=True, eq=False)
class CompletionTensors:
    """Completions, right-padded.

    ``ids``: int64, (N, C). ``mask``: bool, (N, C): True from the first completion token to the
    final eos, so neither the prompt nor anything after eos can enter the loss. ``logprobs``:
    float64, (N, C), as the rollout engine gave them; 0 where ``mask`` is False.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor


def stack_completions(
    completions: Sequence[Completion], *, pad_id: int, eos_ids: Collection[int]
) -> CompletionTensors:
    """Pad completions to the longest. The mask comes from lengths, never from looking for a pad id
    (which may be a real token) in the ids.

    Raises ``TrainError`` for no or empty completions, a wrong number of logprobs, an eos before the
    last token, and an end that contradicts ``finish_reason``.

    >>> a = Completion("g", 0, (5, 6, 2), "ab", "stop", (-0.1, -0.2, -0.3))
    >>> b = Completion("g", 1, (7,), "c", "length", (-0.4,))
    >>> stacked = stack_completions([a, b], pad_id=0, eos_ids={2})
    >>> stacked.ids.tolist(), stacked.mask.tolist()
    ([[5, 6, 2], [7, 0, 0]], [[True, True, True], [True, False, False]])
    """
    if not completions:
        raise TrainError(
            "completions", got="none", want="at least one", fix="skip a step without completions"
        )
    for completion in completions:
        _check(completion, frozenset(eos_ids))
    return pad_completions(completions, pad_id)


def pad_completions(completions: Sequence[Completion], pad_id: int) -> CompletionTensors:
    """The same without the checks of :func:`stack_completions`."""
    width = max(len(completion.token_ids) for completion in completions)
    ids = torch.full((len(completions), width), pad_id, dtype=torch.int64)
    logprobs = torch.zeros((len(completions), width), dtype=torch.float64)
    mask = torch.zeros((len(completions), width), dtype=torch.bool)
    for row, completion in enumerate(completions):
        length = len(completion.token_ids)
        ids[row, :length] = torch.tensor(completion.token_ids, dtype=torch.int64)
        logprobs[row, :length] = torch.tensor(completion.logprobs, dtype=torch.float64)
        mask[row, :length] = True
    return CompletionTensors(ids, mask, logprobs)


def _check(completion: Completion, eos_ids: frozenset[int]) -> None:
    item = f"completion {completion.index} of {completion.group_id}"
    if not completion.token_ids:
        raise TrainError(
            item,
            got="no tokens",
            want="at least the eos",
            fix="keep the final eos in token_ids: it is a sampled token",
        )
    if len(completion.logprobs) != len(completion.token_ids):
        raise TrainError(
            item,
            got=f"{len(completion.logprobs)} logprobs for {len(completion.token_ids)} tokens",
            want="one logprob per token",
            fix="record the logprob of every sampled token, the final eos included",
        )
    inner = [at for at, token in enumerate(completion.token_ids[:-1]) if token in eos_ids]
    if inner:
        raise TrainError(
            item,
            got=f"an eos at token {inner[0]} of {len(completion.token_ids)}",
            want="eos only as the last token",
            fix="cut the completion after its first eos: it ends there",
        )
    ends = completion.token_ids[-1] in eos_ids
    if ends != (completion.finish_reason == "stop"):
        raise TrainError(
            item,
            got=f"finish_reason {completion.finish_reason!r} and a last token that "
            f"{'is' if ends else 'is not'} an eos",
            want="'stop' exactly when the last token is an eos",
            fix="stop at every eos id of the generation config, and keep it in token_ids",
        )
