"""Names that changed between versions of transformers are found in every version."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch

from omni_grpo_core.core.dialect import (
    cache_among,
    cache_keyword,
    modes_restored,
    switch_checkpointing,
    tokens_cached,
)
from omni_grpo_core.core.policy import Policy


class Held:
    """A cache of four tokens."""

    def get_seq_length(self) -> int:
        return 4


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_either_name(name: str) -> None:
    held = Held()
    assert cache_among({name: held}) is held
    assert tokens_cached({name: held, "input_ids": None}) == 4
    # passed as None: the model saw only its input
    assert tokens_cached({name: None}) == 0


def test_a_cache_under_neither_name_is_unknown() -> None:
    """A renamed keyword was read as an empty cache, and every healthy run under 5.24 was diagnosed
    as having lost its history."""
    assert tokens_cached({"input_ids": None}) is None
    assert tokens_cached({"cache_of_another_kind": Held()}) is None
    # a legacy tuple of tensors has no length of its own
    assert tokens_cached({"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}) is None


def test_the_cache_keyword_is_the_one_that_the_forward_has() -> None:
    class Old:
        def forward(self, past_key_values: Any = None) -> None: ...

    class New:
        def forward(self, cache: Any = None, **rest: Any) -> None: ...

    assert (cache_keyword(Old()), cache_keyword(New())) == ("past_key_values", "cache")


def test_the_library_s_cache_is_passed_without_a_warning(
    policy: Policy, caplog: pytest.LogCaptureFixture
) -> None:
    """Warnings are errors in this suite, except transformers' own: here those count as well."""
    model, ids = policy.text_model, torch.tensor([[5, 6]])
    logger = logging.getLogger("transformers")  # its records do not propagate
    logger.addHandler(caplog.handler)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        held = cache_among(model(input_ids=ids, use_cache=True))
        name = cache_keyword(model)
        again = model(input_ids=ids[:, :1], use_cache=True, **{name: held})
        assert cache_among(model(input_ids=ids, use_cache=False)) is None
    logger.removeHandler(caplog.handler)
    assert cache_among(again) is held
    assert tokens_cached({name: held}) == 3
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]


def test_checkpointing_is_switched_without_a_warning(policy: Policy) -> None:
    blocks = [m for m in policy.text_model.modules() if hasattr(m, "gradient_checkpointing")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        switch_checkpointing(policy.model, True)
        assert all(block.gradient_checkpointing for block in blocks)
        switch_checkpointing(policy.model, False)
    assert not any(block.gradient_checkpointing for block in blocks)


def test_checkpointing_leaves_no_hooks(policy: Policy) -> None:
    """transformers 5 made embeddings and towers' inputs require gradients at each switch, which a
    step makes for every micro-batch: ever more hooks, and a graph through frozen towers."""

    def hooks() -> list[int]:
        return [key for module in policy.model.modules() for key in module._forward_hooks]

    before = hooks()
    for _ in range(2):
        switch_checkpointing(policy.model, True)
        assert hooks() == before
        switch_checkpointing(policy.model, False)
    policy.model.enable_input_require_grads()
    own = hooks()
    switch_checkpointing(policy.model, True)
    switch_checkpointing(policy.model, False)
    assert hooks() == own != before
    policy.model.disable_input_require_grads()
    assert hooks() == before


def test_checkpointing_is_restored_as_the_user_had_it(policy: Policy) -> None:
    """Every attribute; reentrant, which a step is not."""
    own: Any = copy.deepcopy(policy.model)
    switch_checkpointing(own, True, reentrant=True)
    own.get_submodule("lm_head").train()
    before = [dict(vars(module)) for module in own.modules()]
    with modes_restored(own):
        own.eval()
        switch_checkpointing(own, True)
    for module, kept in zip(own.modules(), before, strict=True):
        changed = {name for name, value in vars(module).items() if value is not kept.get(name)}
        assert not changed
