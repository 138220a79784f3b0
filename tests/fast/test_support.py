"""Which step a run takes, and why."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.fast.support import choose_fast, obstacle

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("4.57"), reason="no attention functions"
)


@pytest.fixture
def config(policy: Policy) -> Iterator[Any]:
    """The text model's, restored."""
    found = policy.text_model.config
    kept = dict(vars(found))
    yield found
    vars(found).update(kept)


def test_nothing_speaks_against_the_shipped_models(policy: Policy, qwen3_policy: Policy) -> None:
    assert obstacle(policy) is None
    assert obstacle(qwen3_policy) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_attn_implementation_internal": "eager"}, "attention 'eager'"),
        ({"use_sliding_window": True}, "layers with a sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers with sliding_attention"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ],
)
def test_what_speaks_against_it_is_named(
    policy: Policy, config: Any, changes: dict[str, Any], reason: str
) -> None:
    for name, value in changes.items():
        setattr(config, name, value)
    assert reason in (obstacle(policy) or "")
    with pytest.raises(ConfigError, match=reason):
        choose_fast("on", policy, warn=pytest.fail)


def test_an_older_library_takes_the_plain_step_and_says_so(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4.52's register of attention functions is never read by its omni models."""
    monkeypatch.setattr(type(policy.text_model), "_supports_attention_backend", False)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), text_model=policy.text_model)
    said: list[str] = []
    assert choose_fast("auto", on_gpu, said.append) is None
    assert "plain step" in said[0]
    assert "takes no attention functions" in said[0]


def test_the_choice(policy: Policy) -> None:
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), text_model=policy.text_model)
    assert isinstance(choose_fast("auto", on_gpu, pytest.fail), FastStep)
    assert isinstance(choose_fast("on", policy, pytest.fail), FastStep)
    assert choose_fast("auto", policy, pytest.fail) is None
    assert choose_fast("off", on_gpu, pytest.fail) is None
