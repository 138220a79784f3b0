from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from omni_grpo_core.core.completions import stack_completions
from omni_grpo_core.errors import TrainError
from omni_grpo_core.types import Completion

EOS = {2, 3}
DONE = Completion("g", 0, (5, 3), "a", "stop", (-0.5, -0.25))
CUT = Completion("g", 1, (5, 6, 7), "abc", "length", (-1.0, -2.0, -3.0))


def test_mask_comes_from_lengths() -> None:
    """The pad id is an eos here, as it often is: the sampled one is in the mask, padding is not."""
    stacked = stack_completions([DONE, CUT], pad_id=3, eos_ids=EOS)
    assert stacked.ids.tolist() == [[5, 3, 3], [5, 6, 7]]
    assert stacked.ids.dtype == torch.int64
    assert stacked.mask.tolist() == [[True, True, False], [True, True, True]]
    assert stacked.logprobs.tolist() == [[-0.5, -0.25, 0.0], [-1.0, -2.0, -3.0]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"token_ids": (), "logprobs": ()}, "no tokens"),
        ({"logprobs": (-0.5,)}, "1 logprobs for 2 tokens"),
        ({"token_ids": (2, 3)}, "an eos at token 0 of 2"),
        ({"finish_reason": "length"}, "is an eos"),
        ({"token_ids": (5, 5)}, "is not an eos"),
    ],
)
def test_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(TrainError, match=match):
        stack_completions([CUT, replace(DONE, **change)], pad_id=0, eos_ids=EOS)


def test_no_completions() -> None:
    with pytest.raises(TrainError, match="at least one"):
        stack_completions([], pad_id=0, eos_ids=EOS)
