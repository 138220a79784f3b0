"""A test-first GRPO core for Qwen-Omni models, with goldens that say what an upgrade changed.

The public names are those of ``__all__``. Each is imported when it is asked for: the package itself
loads neither torch nor transformers.

>>> from omni_grpo_core import group_advantages, load_policy, load_samples, rollout
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from omni_grpo_core._version import __version__

if TYPE_CHECKING:
    from omni_grpo_core.core.completions import stack_completions
    from omni_grpo_core.core.policy import Policy, load_policy
    from omni_grpo_core.core.rollout import rollout
    from omni_grpo_core.core.sample import load_samples
    from omni_grpo_core.doctor.diagnose import diagnose
    from omni_grpo_core.errors import (
        BatchError,
        CheckpointError,
        ConfigError,
        ConversationError,
        DataError,
        MediaError,
        OmniGrpoError,
        RewardError,
        TraceError,
        TrainError,
    )
    from omni_grpo_core.losses import LossConfig
    from omni_grpo_core.losses.advantages import group_advantages
    from omni_grpo_core.losses.policy_loss import Totals, policy_loss
    from omni_grpo_core.pipeline.check import check
    from omni_grpo_core.pipeline.inputs import prepare, score
    from omni_grpo_core.pipeline.settings import Settings, load_settings
    from omni_grpo_core.recorder.attach import attach
    from omni_grpo_core.recorder.record import record
    from omni_grpo_core.training.step import Scorer, optimize
    from omni_grpo_core.training.trainer_callback import GuardStop, OmniGrpoGuard

_HOMES = {
    "core.policy": ("Policy", "load_policy"),
    "core.rollout": ("rollout",),
    "core.sample": ("load_samples",),
    "doctor.diagnose": ("diagnose",),
    "errors": (
        "BatchError", "CheckpointError", "ConfigError", "ConversationError", "DataError",
        "MediaError", "OmniGrpoError", "RewardError", "TraceError", "TrainError",
    ),
    "losses.advantages": ("group_advantages",),
    "core.completions": ("stack_completions",),
    "losses.config": ("LossConfig",),
    "losses.policy_loss": ("policy_loss",),
    "losses.totals": ("Totals",),
    "pipeline.check": ("check",),
    "pipeline.inputs": ("prepare", "score"),
    "pipeline.settings": ("Settings", "load_settings"),
    "recorder.attach": ("attach",),
    "recorder.record": ("record",),
    "training.step": ("Scorer", "optimize"),
    "training.trainer_callback": ("GuardStop", "OmniGrpoGuard"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "ConversationError",
    "DataError",
    "GuardStop",
    "LossConfig",
    "MediaError",
    "OmniGrpoError",
    "OmniGrpoGuard",
    "Policy",
    "RewardError",
    "Scorer",
    "Settings",
    "Totals",
    "TraceError",
    "TrainError",
    "__version__",
    "attach",
    "check",
    "diagnose",
    "group_advantages",
    "load_policy",
    "load_samples",
    "load_settings",
    "optimize",
    "policy_loss",
    "prepare",
    "record",
    "rollout",
    "score",
    "stack_completions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
