"""Which engine samples a run's completions, from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from omni_grpo_core.core.policy import Policy
from omni_grpo_core.engines.engine import OwnEngine, RolloutEngine, SeparateEngine
from omni_grpo_core.engines.requests import Backend
from omni_grpo_core.engines.server import ServedBackend, backend_named
from omni_grpo_core.engines.weights import Adapter
from omni_grpo_core.tolerances import ENGINE
from omni_grpo_core.training.config import TrainConfig
from omni_grpo_core.training.trainable import adapter_off, adapter_weights, merged_weights
from omni_grpo_core.types import Rollout


def choose_engine(
    config: TrainConfig,
    policy: Policy,
    sample: Callable[..., Rollout],
    *,
    backend: Backend | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> RolloutEngine:
    """``sample``: the policy's own rollout. ``backend``: an engine in place of the configured one.

    Raises ``MissingExtra`` if its packages are not installed.
    """
    if backend is None and config.rollout == "own":
        return OwnEngine(sample)
    model, lora, adapter = policy.model, config.lora, None
    others: Mapping[str, Callable[[], AbstractContextManager[Any]]] = {}
    weights = partial(merged_weights, model)
    if lora is not None:
        others = {"the adapter is applied in the engine": partial(adapter_off, model)}
    if lora is not None and config.vllm.lora == "adapter":
        adapter = Adapter(
            lora.rank, lora.alpha, lora.target_modules, partial(adapter_weights, model)
        )
        weights = partial(_base_weights, model)
    return SeparateEngine(
        policy,
        backend or _configured(config),
        config.settings,
        ENGINE[config.precision],
        weights,
        adapter=adapter,
        processor=Path(config.processor) if config.processor else None,
        every=config.vllm.prove_every,
        others=others,
        warn=warn,
    )


def _base_weights(model: Any) -> dict[str, Tensor]:
    with adapter_off(model):
        return merged_weights(model)


def _configured(config: TrainConfig) -> Backend:
    values = asdict(config.vllm)
    settings = {key: values[key] for key in ("max_model_len", "max_num_seqs", "memory")}
    settings["dtype"] = config.precision
    if config.lora is not None and config.vllm.lora == "adapter":
        settings["lora_rank"] = config.lora.rank
    if config.vllm.place == "inside":
        return backend_named("vllm", settings)
    return ServedBackend(config.vllm.url, settings=settings, seconds=config.vllm.seconds)
