"""Which weights learn, in which precision, and what scores the reference: freezing towers,
adding low-rank adapters, and switching them off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.errors import ConfigError, one_line
from omni_grpo_core.fast.step import FastStep
from omni_grpo_core.io.extras import extra
from omni_grpo_core.training.config import TOWER_PREFIX, LoraConfig, Tower, TrainConfig
from omni_grpo_core.training.memory import lora_pattern
from omni_grpo_core.training.micro_batches import MicroBatch
from omni_grpo_core.training.sharding import whole
from omni_grpo_core.training.step import Scorer

Reference = Callable[[MicroBatch], Tensor]
"""Logprobs of a micro-batch's completions under the reference, (N, C), without a gradient."""


def choose_trainable(
    policy: Policy,
    config: TrainConfig,
    autocast: Callable[[], AbstractContextManager[Any]],
    fast: FastStep | None = None,
) -> Reference | None:
    """Freeze what must not learn, add adapters, and return the reference: ``None`` at beta 0.

    The reference is the policy as it is now: with adapters, the same weights with the adapter
    off, else a copy. With precision bfloat16, what does not learn is stored in it, the copy too;
    what learns as ``trained_weights`` says, adapters in float32. ``fast``: the fast step of
    ``policy``, if the run has one.
    """
    model = policy.model
    half = config.precision == "bfloat16"
    scored_by = policy
    if config.loss.beta > 0 and config.lora is None:
        scored_by = replace(policy, model=_frozen_copy(model, torch.bfloat16 if half else None))
    if config.lora is None:
        freeze(model, config.freeze)
    else:
        add_lora(model, config.lora, config.seed)
    if half:
        learns = torch.float32 if config.trained_weights == "float32" else torch.bfloat16
        for parameter in model.parameters():
            parameter.data = parameter.data.to(
                learns if parameter.requires_grad else torch.bfloat16
            )
    if config.loss.beta == 0:
        return None
    if fast is not None and scored_by is not policy:
        fast = fast.of_copy(scored_by)
    scores = fast.scores if fast else None
    scorer = Scorer(scored_by, config.settings.temperature, scores, autocast)

    def reference(micro: MicroBatch) -> Tensor:
        plain = nullcontext() if config.lora is None else adapter_off(model)
        with torch.no_grad(), plain:
            logprobs: Tensor = scorer(micro.batch, micro.ids, micro.mask)[0]
        return logprobs.float()

    return reference


def _frozen_copy(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy that does not learn, in eval mode. Its weights are cast as they are copied, so that
    they never exist in the old dtype as well."""
    weights = {
        id(weight): nn.Parameter(
            weight.detach().to(dtype or weight.dtype, copy=True), requires_grad=False
        )
        for weight in model.parameters()
    }
    return copy.deepcopy(model, weights).eval()


def freeze(model: Any, towers: Collection[Tower]) -> None:
    """Make every parameter trainable except those of ``towers``."""
    frozen = tuple(prefix for tower in towers for prefix in TOWER_PREFIX[tower])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not published_name(name).startswith(frozen) if frozen else True)


def add_lora(model: Any, config: LoraConfig, seed: int) -> None:
    """Add adapters to the text model, in place; everything else is frozen. The second factor starts
    at 0, so the policy is unchanged. Raises ``ConfigError`` if no layer has one of the names, or
    one that takes no adapter."""
    with extra("train"):
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

    # the layers alone: given the whole of a mixture, PEFT adapts its fused experts, which no export
    # can merge, and every tower's layer that has one of the names
    layers = getattr(model.model, "language_model", model.model).layers
    settings = PeftConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=lora_pattern(config, layer=r"\d+")
    )
    device = next(model.parameters()).device
    seeded = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    try:
        with seeded:
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, layers)
    except ValueError as error:
        raise ConfigError(
            "lora: target_modules",
            got=f"{', '.join(config.target_modules)} ({one_line(error)})",
            want="names of linear layers of the text model",
            fix="choose from the names that print(model) shows, in a mixture outside its experts",
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_layers(model: Any) -> list[Any]:
    """The layers that carry an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model without its adapters: the reference."""
    layers = lora_layers(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_weights(model: Any, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict of the plain architecture, adapters merged into the weights they act on unless
    they are off, in the machine's memory. With sharded weights every process has to call this;
    without ``keep`` it only gives its part of each weight."""
    adapted = {
        f"{name}.base_layer.weight": layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer") and not layer.disable_adapters
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name:
            continue
        weight = whole(tensor)
        if name in adapted:
            layer = adapted[name]
            first, second = (whole(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
            weight = weight + (layer.scaling["default"] * (second @ first)).to(weight)
        if keep:
            weights[name.replace(".base_layer.", ".")] = weight.cpu().contiguous()
    return weights


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """Both factors of every adapter, by the names of PEFT's files without its prefix."""
    return {
        name.replace(".default.", "."): whole(tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
