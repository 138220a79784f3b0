"""Whether a run can take its completions from a rollout engine. A part of ``load_config.py``."""

from __future__ import annotations

from pathlib import Path

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.extras import require
from omni_grpo_core.training.config import TrainConfig, VllmConfig
from omni_grpo_core.training.memory import thinker_shapes

LARGEST_RANK = 512
"""Of adapters in vLLM 0.32."""


def check_engine(config: TrainConfig, world: int) -> None:
    """Raises ``ConfigError`` for settings that vLLM does not take or that contradict each other,
    ``MissingExtra`` if its packages are not installed."""
    engine = config.vllm
    if config.rollout != "vllm":
        if engine != VllmConfig():
            raise _bad("vllm", f"settings of an engine with rollout: {config.rollout}",
                       "rollout: vllm, which they are of", "set it, or remove them")  # fmt: skip
        return
    require("vllm", *(() if engine.place == "inside" else ("httpx",)),
            *(() if engine.url else ("vllm",)))  # fmt: skip
    if world > 1:
        raise _bad("rollout", f"vllm on {world} processes", "one process",
                   "set it to own, or train on one: the engine serves one trainer")  # fmt: skip
    if engine.url is not None and not engine.url.startswith(
        ("http://127.0.0.1", "http://localhost")
    ):
        raise _bad("vllm: url", engine.url, "an address on this machine (http://127.0.0.1:8000)",
                   "run the engine here: weights go through a folder that both read")  # fmt: skip
    if config.settings.temperature > 2:
        raise _bad("settings: temperature", f"{config.settings.temperature:g} with rollout: vllm",
                   "at most 2: vLLM refuses more", "lower it")  # fmt: skip
    if engine.lora == "adapter":
        _check_adapter(config)
    if engine.url is not None and engine.place == "inside":
        raise _bad("vllm: place", "inside with a url", "one of the two", "remove one")
    for item, got, ok in (
        ("seconds", engine.seconds, engine.seconds > 0),
        ("prove_every", engine.prove_every, engine.prove_every >= 1),
        ("max_model_len", engine.max_model_len, engine.max_model_len >= 1),
        ("max_num_seqs", engine.max_num_seqs, engine.max_num_seqs >= 1),
        ("memory", engine.memory, 0 < engine.memory <= 1),
    ):
        if not ok:
            raise _bad(f"vllm: {item}", f"{got:g}", "a number above 0, memory at most 1",
                       "correct it")  # fmt: skip


def _check_adapter(config: TrainConfig) -> None:
    if config.lora is None:
        raise _bad("vllm: lora", "adapter without lora", "adapters to send",
                   "set lora, or remove vllm: lora")  # fmt: skip
    if config.lora.rank > LARGEST_RANK:
        raise _bad("lora: rank", f"{config.lora.rank} with vllm: lora: adapter",
                   f"at most {LARGEST_RANK}: vLLM has room for no more",
                   "lower it, or set vllm: lora: merged")  # fmt: skip
    if any(".experts." in name for name in thinker_shapes(Path(config.checkpoint))):
        raise _bad("vllm: lora", "adapter with a mixture of experts", "merged",
                   "remove it: there vLLM 0.32 applies adapters by kernels that need a GPU, and "
                   "what they compute has not been compared")  # fmt: skip


def _bad(item: str, got: str, want: str, fix: str) -> ConfigError:
    return ConfigError(item, got=got, want=want, fix=fix)
