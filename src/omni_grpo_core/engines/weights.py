"""The trainer's weights as folders that every engine can load, and their fingerprint: a checkpoint,
adapters merged or left out, and adapters by themselves, in PEFT's format."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapters (LoRA) that are sent by themselves. ``weights``: as they are now, by PEFT's names
    without its prefix."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    weights: Callable[[], Mapping[str, Tensor]]


def write_checkpoint(
    policy: Policy, weights: Mapping[str, Any], folder: Path, *, processor: Path | None = None
) -> str:
    """``weights`` (plain names, adapters merged) as a full checkpoint without a talker: the form
    that vLLM reads, which has no class for a thinker alone. Returns the fingerprint.

    ``processor``: the folder of the processor's files, by default the policy's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(policy.checkpoint)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "thinker_config" not in config:
        thinker = {**config, "architectures": [policy.family.thinker_class]}
        config = {
            "architectures": [policy.family.full_class],
            "model_type": policy.family.model_types[0],
            "torch_dtype": config.get("torch_dtype", "float32"),
            "enable_audio_output": False,
            "thinker_config": thinker,
        }
    _complete(config["thinker_config"].get("vision_config", {}))
    for place in dict.fromkeys((source, processor or source)):
        for file in (*place.glob("*.json"), *place.glob("*.txt"), *place.glob("*.jinja")):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    named = {f"thinker.{published_name(name)}": tensor for name, tensor in weights.items()}
    write_weights(named, folder)
    return fingerprint(folder)


def write_adapter(adapter: Adapter, folder: Path) -> str:
    """``adapter`` as a folder of PEFT's, for the checkpoints of :func:`write_checkpoint`. Returns
    the fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": list(adapter.target_modules),
        "bias": "none",
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    prefix = "base_model.model.thinker."
    named = {f"{prefix}{published_name(name)}": one for name, one in adapter.weights().items()}
    write_weights(named, folder, ADAPTER)
    return fingerprint(folder)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is one of :func:`write_adapter`."""
    return (folder / ADAPTER_CONFIG).is_file()


def write_weights(named: Mapping[str, Tensor], folder: Path, name: str = WEIGHTS) -> None:
    """The folder's weight file. It becomes a new one: whoever has mapped the last one into memory
    would else find other weights in it, or half of them."""
    new = folder / f".{name}"
    save_file(unshared(named), new, metadata={"format": "pt"})
    new.replace(folder / name)


def _complete(vision: dict[str, Any]) -> None:
    """What vLLM reads of Qwen3-Omni's learned positions and published configs state, where one that
    transformers wrote has only their number."""
    positions = vision.get("num_position_embeddings")
    if positions:
        vision.setdefault("image_size", math.isqrt(positions) * vision["patch_size"])
        vision.setdefault("apply_vit_abs_pos_embed", True)


def unshared(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what shares memory, such as tied weights, which safetensors refuses to write.

    >>> import torch
    >>> both = torch.zeros(2)
    >>> one, other = unshared({"a": both, "b": both}).values()
    >>> one.data_ptr() == other.data_ptr()
    False
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in named.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def fingerprint(folder: Path) -> str:
    """SHA-256 of the weight files, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
