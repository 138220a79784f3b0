"""The floor is what can be counted by hand, and no more."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from omni_grpo_core.bench.floor import floor
from omni_grpo_core.bench.measure import Speed
from omni_grpo_core.bench.shapes import SETTINGS
from omni_grpo_core.core.batch import collate
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.types import Batch

SETTING = replace(SETTINGS["tiny"], groups=1, group=4, tokens=11)


def weights(policy: Policy) -> int:
    """Of the text model's layers and the head."""
    parts: Any = policy.text_model.layers, policy.model.lm_head
    return sum(p.numel() for part in parts for p in part.parameters())


def test_each_token_after_the_first_reads_the_weights_once(policy: Policy, mixed: Batch) -> None:
    text = collate(mixed.rows[7:], policy.pad_token_id)
    speed = Speed(bytes=4.0, operations=math.inf)  # one float32 weight a second
    found = floor(policy, text, SETTING, speed, checkpointing=True)
    assert found["decode"] == 10 * weights(policy)
    assert found["prefill"] == found["update"] == 0.0


def test_rows_enough_make_decoding_wait_for_operations(policy: Policy, mixed: Batch) -> None:
    text = collate(mixed.rows[7:], policy.pad_token_id)
    speed = Speed(bytes=math.inf, operations=2.0)  # one multiplication and addition a second
    found = floor(policy, text, SETTING, speed, checkpointing=True)
    assert found["decode"] == 10 * 4 * weights(policy)


def test_an_update_is_three_passes_and_one_more_to_recompute(policy: Policy, mixed: Batch) -> None:
    """Over the prompt once, whatever the size of the group."""
    text = collate(mixed.rows[7:], policy.pad_token_id)
    speed = Speed(bytes=1.0, operations=2.0)
    kept, recomputed = (
        floor(policy, text, SETTING, speed, checkpointing=on) for on in (False, True)
    )
    assert kept["update"] == 3 * kept["scoring"]
    assert recomputed["update"] == 4 * kept["scoring"]
    more = floor(policy, text, replace(SETTING, group=5), speed, checkpointing=False)
    tokens = SETTING.tokens
    own = more["scoring"] - kept["scoring"] - tokens * weights(policy)
    # what is left is attention of eleven tokens to the prompt and to themselves
    config: Any = policy.model.config.get_text_config()
    pairs = tokens * len(text.rows[0].input_ids) + tokens**2 / 2
    width = config.hidden_size * config.num_hidden_layers
    assert math.isclose(own, 2 * width * pairs, rel_tol=1e-6)
