"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens.

With ``d = log pi_ref(o_t) - log pi_theta(o_t)``, after J. Schulman, "Approximating KL divergence"
(2020):

    k1 = -d               unbiased; may be negative; large variance
    k2 = d^2 / 2          biased, small variance; its gradient is an unbiased one of the KL
    k3 = exp(d) - d - 1   unbiased, never negative; GRPO's (arXiv 2402.03300, eq. 4)
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_grpo_core.losses.config import KlEstimator
from omni_grpo_core.losses.shapes import require_shape

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are cut here before exp: not far above, values and gradients overflow."""


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """The estimate for each token, (N, C) from (N, C) and (N, C). Positive where the policy has
    moved towards its token more than the reference would (k1). ``ref_logprobs`` takes no gradient.

    Raises ``TrainError`` for shapes that differ.

    >>> import math
    >>> p, r = torch.tensor([[0.0]]), torch.tensor([[-math.log(2)]])  # twice as likely as before
    >>> [round(token_kl(p, r, k).item(), 4) for k in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    require_shape("reference logprobs", ref_logprobs, tuple(logprobs.shape))
    d = ref_logprobs.detach().to(logprobs) - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    return torch.exp(d.clamp(max=LOG_RATIO_LIMIT)) - d - 1
