"""Rewards for runs that have to be repeated to the bit: with the module, torch's deterministic
kernels are chosen. Of cuBLAS, ``CUBLAS_WORKSPACE_CONFIG`` has to be set as well."""

from __future__ import annotations

import torch
from toy_rewards import early_letters

__all__ = ["early_letters"]

torch.use_deterministic_algorithms(True, warn_only=True)
