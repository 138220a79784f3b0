"""The trainer's weights as a folder that every engine can load, and their fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy

WEIGHTS = "model.safetensors"


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


def write_weights(named: Mapping[str, Tensor], folder: Path) -> None:
    """The folder's weight file. It becomes a new one: whoever has mapped the last one into memory
    would else find other weights in it, or half of them."""
    new = folder / f".{WEIGHTS}"
    save_file(unshared(named), new, metadata={"format": "pt"})
    new.replace(folder / WEIGHTS)


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
