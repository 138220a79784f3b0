"""What ``generate`` returned, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def decoded(
    tokenizer: Any, prompt: Tensor | None, sequences: Tensor, config: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
    """The completions in ``sequences`` (N, L + C), or (N, C) where ``generate`` was given no
    ``prompt`` ids (n, L), up to and without the first end of text: with special tokens
    (``"kept"``) and without (``"skipped"``). Empty without a tokenizer.

    ``config``: the generation settings in force, with ``eos_token_id`` and ``pad_token_id``.
    """
    if not hasattr(tokenizer, "batch_decode"):
        return {}
    eos, pad = _ids(config.get("eos_token_id")), _ids(config.get("pad_token_id"))
    start = _prompt_length(prompt, sequences)
    rows = [_ended(row[start:].tolist(), eos, pad) for row in sequences]
    return {
        name: tuple(tokenizer.batch_decode(rows, skip_special_tokens=skip))
        for name, skip in (("kept", False), ("skipped", True))
    }


def _ids(given: Any) -> tuple[int, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


def _prompt_length(prompt: Tensor | None, sequences: Tensor) -> int:
    """Columns of ``sequences`` that repeat the prompt: none where its embeddings were passed."""
    if prompt is None or prompt.dim() != 2 or not len(prompt):
        return 0
    each = prompt.repeat_interleave(len(sequences) // len(prompt), 0)
    length = each.shape[1]
    return length if each.equal(sequences[:, :length]) else 0


def _ended(ids: list[int], eos: tuple[int, ...], pad: tuple[int, ...]) -> list[int]:
    """
    >>> _ended([5, 7, 9, 0], (9,), (0,)), _ended([5, 0, 7, 0, 0], (9,), (0,))
    ([5, 7], [5, 0, 7])
    """
    end = next((place for place, token in enumerate(ids) if token in eos), None)
    if end is not None:
        return ids[:end]
    # ended by a stop string, or by another criterion than a token
    last = len(ids)
    while last and ids[last - 1] in pad:
        last -= 1
    return ids[:last]
