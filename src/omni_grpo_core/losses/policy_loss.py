"""The policy losses, as pure tensor functions.

Notation: ``N`` completions, ``o_it`` token t of completion i, ``|o_i|`` its tokens in the loss,
``A_it`` its advantage, ``r_it = pi_theta(o_it) / pi_old(o_it)``, ``w_it`` the rollout correction's
weight (:func:`rollout_weights`, else 1), ``K_it`` a KL estimate
(:func:`token_kl`). With ``c(r) = clip(r, 1 - epsilon_low, 1 + epsilon_high)``

    l_it = -w_it min(min(r_it, delta) A_it, c(r_it) A_it) + beta K_it

(PPO's objective, negated to be minimised) and over the whole optimizer step

    grpo      1/N sum_i 1/|o_i| sum_t l_it                    arXiv 2402.03300, eq. 3
    dapo      1/(sum_i |o_i|) sum_i sum_t l_it                arXiv 2503.14476
    bnpo      the same: the token mean of the batch. Elsewhere the batch is a micro-batch, and the
              loss depends on how a step is split; here the batch is the step
    dr_grpo   1/(N max_completion_length) sum_i sum_t l_it    arXiv 2503.20783
    gspo      grpo with s_i = (prod_t r_it)^(1/|o_i|) instead of r_it; arXiv 2507.18071
    luspo     the same without dividing by |o_i|: gspo prefers short right answers and long wrong
              ones                                            arXiv 2602.05261
    cispo     l_it = -w_it sg[c(r_it)] A_it log pi_theta(o_it) + beta K_it, divided like dapo;
              sg[] stops the gradient                         arXiv 2506.13585
    sapo      l_it = -w_it 4/tau sigmoid(tau (r_it - 1)) A_it + beta K_it, divided like grpo;
              tau is sapo_temperature_pos for A > 0, else _neg    arXiv 2511.20347
    vespo     l_it = -sg[phi(W_i)] A_it log pi_theta(o_it) + beta K_it, divided like dapo, with
              W_i = prod_t w_it r_it and phi(W) = W^k exp(lambda (1 - W)); k and lambda are
              vespo_k_pos and vespo_lambda_pos for A >= 0, else _neg  arXiv 2602.10693

With ``off_policy_mask_threshold`` the first summand of a loss is 0 for sequences that the policy
has left behind, see :func:`~omni_grpo_core.losses.objectives.on_policy_enough`.

Two completions of three tokens by hand, with r = [[1, 3/2, 1/2], [1, 1/2, 2]], A = [1, -1],
epsilon 0.2, no KL, and the last token of the first completion outside the mask:

    l = [[-1, -1.2, .], [1, 0.8, 2]]: of 1.5 * 1 only 1.2 counts; 0.5 * -1 counts as 0.8 * -1; and
    2 * -1 counts in full, unless delta bounds it

    grpo     (-2.2 / 2 + 3.8 / 3) / 2 = 1/12
    dapo     (-2.2 + 3.8) / 5         = 0.32
    dr_grpo  (-2.2 + 3.8) / (2 * 4)   = 0.2          for a maximum length of 4
    gspo     s = [sqrt(3/2), 1], so (-1.2 + 1) / 2   = -0.1
    cispo    with log pi = log(1/2) =: h for every token, l = -c(r) A h, so
             (-1 - 1.2 + 1 + 0.8 + 1.2) h / 5 = 0.16 h
    luspo    (-1.2 * 2 + 1 * 3) / 2           = 0.3
    sapo     with both temperatures 2: 4/2 sigmoid(2 (r - 1)) of 1, 3/2, 1/2 and 2 is 1, 2 e/(1+e),
             2/(1+e) and 2/(1+1/e^2), so (-(1 + 2e/(1+e)) / 2 + (1 + 2/(1+e) + 2/(1+1/e^2)) / 3) / 2
    vespo    W = [3/2, 1], phi = [(3/2)^2 exp(3 (1 - 3/2)), 1], so (-2 phi_1 + 3) h / 5

>>> import math
>>> old = torch.log(0.5 / torch.tensor([[1, 1.5, 0.5], [1, 0.5, 2]], dtype=torch.float64))
>>> step = dict(
...     logprobs=torch.full((2, 3), 0.5, dtype=torch.float64).log(), old_logprobs=old,
...     advantages=torch.tensor([1.0, -1.0]),
...     mask=torch.tensor([[True, True, False], [True, True, True]]),
... )
>>> def loss(**settings):
...     totals = Totals(sequences=2, tokens=5)
...     return round(policy_loss(LossConfig(**settings), totals=totals, **step).item(), 9)
>>> loss(loss_type="grpo") == round(1 / 12, 9)
True
>>> loss(loss_type="dapo"), loss(loss_type="bnpo")
(0.32, 0.32)
>>> loss(loss_type="dapo", delta=1.5)  # 2 * -1 now counts as 1.5 * -1
0.22
>>> loss(loss_type="dr_grpo", max_completion_length=4), loss(loss_type="gspo")
(0.2, -0.1)
>>> loss(loss_type="cispo") == round(0.16 * math.log(0.5), 9), loss(loss_type="luspo")
(True, 0.3)
>>> e, phi, h = math.e, 2.25 * math.exp(-1.5), math.log(0.5)
>>> by_hand = (-(1 + 2*e/(1 + e)) / 2 + (1 + 2/(1 + e) + 2/(1 + e**-2)) / 3) / 2
>>> loss(loss_type="sapo", sapo_temperature_pos=2, sapo_temperature_neg=2) == round(by_hand, 9)
True
>>> loss(loss_type="vespo") == round((-2 * phi + 3) * h / 5, 9)
True
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from omni_grpo_core.errors import TrainError
from omni_grpo_core.losses import KlEstimator, LossConfig, RolloutCorrection
from omni_grpo_core.losses.objectives import (
    LOG_RATIO_LIMIT,
    LOSSES,
    TokenTerms,
    on_policy_enough,
)
from omni_grpo_core.losses.shapes import (
    expand_advantages,
    require_finite,
    require_logprobs,
    require_mask,
    require_shape,
)


def policy_loss(
    config: LossConfig,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    totals: Totals,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Tensor:
    """This micro-batch's share of the step's loss, a scalar: the shares of all micro-batches and
    ranks sum to the loss of the step. (Data-parallel wrappers average: multiply by the world size.)

    ``logprobs``: (N, C), with a gradient. ``old_logprobs``: (N, C), the policy's own before the
    first update on this rollout: in that update, ``logprobs.detach()``. ``advantages``: (N,) or
    (N, C). ``mask``: bool, (N, C); values outside it, even NaN, have no effect. ``totals``: of the
    whole step. ``ref_logprobs``: (N, C), required if and only if ``beta > 0``.
    ``rollout_weights``: (N, C), from :func:`rollout_weights`. ``rollout_logprobs``: (N, C), as
    sampled, for ``off_policy_mask_threshold``; by default ``old_logprobs``.

    Raises ``TrainError`` for wrong shapes, dtypes or values, for a missing or unused reference, and
    for totals smaller than this micro-batch.
    """
    per_token = token_losses(
        config,
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        ref_logprobs=ref_logprobs,
        rollout_weights=rollout_weights,
        rollout_logprobs=rollout_logprobs,
    )
    return reduce_loss(config, per_token, mask, totals)


def token_losses(
    config: LossConfig,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None = None,
    rollout_weights: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> Tensor:
    """``l_it`` of the equations above, (N, C), 0 where ``mask`` is False.

    Arguments and errors as in :func:`policy_loss`.
    """
    require_mask("mask", mask)
    require_logprobs("logprobs", logprobs, mask)
    inside = torch.where(mask, logprobs, 0.0)
    ratio = policy_ratio(
        config, logprobs, old_logprobs, mask, token_level_advantages=advantages.ndim == 2
    )
    advantage = expand_advantages(advantages, logprobs)
    require_finite("advantages", advantage, mask)
    advantage = torch.where(mask, advantage, 0.0)
    weights = torch.ones_like(inside)
    if rollout_weights is not None:
        require_finite("rollout weights", rollout_weights, mask)
        weights = torch.where(mask, rollout_weights.detach(), 1.0).to(inside)
    terms = TokenTerms(inside, ratio, advantage, mask, weights)
    objective = LOSSES[config.loss_type].objective(config, terms)
    sampled = old_logprobs if rollout_logprobs is None else rollout_logprobs
    require_shape("rollout logprobs", sampled, tuple(mask.shape))
    if config.off_policy_mask_threshold is not None:
        require_logprobs("rollout logprobs", sampled, mask)
        kept = on_policy_enough(config, logprobs, sampled, advantage, mask)
        objective = torch.where(kept, objective, 0.0)
    losses = -objective
    if (ref_logprobs is not None) != (config.beta > 0):
        raise TrainError(
            "reference logprobs",
            got=f"{'none' if ref_logprobs is None else 'some'} at beta {config.beta}",
            want="reference logprobs if and only if beta is above 0",
            fix="set beta to what you intend: a KL term is never added or left out silently",
        )
    if ref_logprobs is not None:
        require_logprobs("reference logprobs", ref_logprobs, mask)
        kl = token_kl(inside, torch.where(mask, ref_logprobs, 0.0), config.kl_estimator)
        losses = losses + config.beta * (kl * ratio if config.kl_weighted else kl)
    return torch.where(mask, losses, 0.0)


def policy_ratio(
    config: LossConfig,
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    token_level_advantages: bool = False,
) -> Tensor:
    """``r_it``, or for gspo and luspo ``s_i`` in every column of its row: (N, C).

    With token-level advantages gspo's ratio is ``sg[s_i] r_it / sg[r_it]``: its value is ``s_i``,
    and each token has its own gradient (GSPO-token, arXiv 2507.18071). Raises ``TrainError`` for
    shapes that differ, and for invalid old logprobs.

    Log-ratios beyond 20 count as 20, without a gradient: ``exp`` overflows not far above, and 0
    times its infinite derivative would turn a clipped token into NaN.
    """
    shape = require_mask("mask", mask)
    require_shape("logprobs", logprobs, shape)
    require_logprobs("old logprobs", old_logprobs, mask)
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach().to(logprobs), 0.0)
    if config.ratio_level == "sequence":
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        sequence = (log_ratio.sum(-1, keepdim=True) / lengths).expand(mask.shape)
        if token_level_advantages:
            sequence = sequence.detach() + log_ratio - log_ratio.detach()
        log_ratio = sequence
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def reduce_loss(config: LossConfig, per_token: Tensor, mask: Tensor, totals: Totals) -> Tensor:
    """Divide ``per_token`` (N, C), 0 outside ``mask``, by the step's totals: a scalar.

    Raises ``TrainError`` for another shape, and for totals that are empty or smaller than those of
    this micro-batch.
    """
    own = Totals.of(mask)
    require_shape("per-token losses", per_token, tuple(mask.shape))
    if totals.tokens < 1 or totals.tokens < own.tokens or totals.sequences < own.sequences:
        raise TrainError(
            "totals",
            got=f"{totals} for a step that holds a micro-batch of {own}",
            want="the counts of the whole step, over all micro-batches and ranks, and not empty",
            fix="count the masks of the step and sum over ranks; skip a step without tokens",
        )
    return LOSSES[config.loss_type].divided(config, per_token, mask, totals)


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """The estimate for each token, (N, C) from (N, C) and (N, C). k1 is positive where the policy
    gives the token more probability than the reference. ``ref_logprobs`` gets no gradient.

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


def rollout_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, correction: RolloutCorrection
) -> Tensor:
    """pi_old / mu, bounded, (N, C), without a gradient; 1 where ``mask`` is False.

    The correction for a rollout engine whose probabilities differ from the trainer's. The engine
    samples from mu, the trainer assumes pi_old: same weights, other kernels, other precision.
    Weighting the loss by pi_old / mu makes it unbiased again; the weight is truncated, because a
    few tokens would otherwise dominate the step (truncated importance sampling), or tokens beyond
    the bounds are left out (masked importance sampling).

    ``old_logprobs``: the trainer's, before the first update on this rollout; ``rollout_logprobs``:
    the engine's, at the same temperature; both (N, C). A sequence's weight is repeated in all its
    columns. Raises ``TrainError`` for shapes, dtypes or values that cannot be logprobs.

    >>> import math
    >>> old = torch.log(torch.tensor([[0.8, 0.2]], dtype=torch.float64))
    >>> engine = torch.log(torch.tensor([[0.2, 0.4]], dtype=torch.float64))  # ratios 4 and 1/2
    >>> mask = torch.tensor([[True, True]])
    >>> [[round(x, 9) for x in rollout_weights(old, engine, mask, c)[0].tolist()] for c in (
    ...     RolloutCorrection("token", "truncate"), RolloutCorrection("token", "mask"),
    ...     RolloutCorrection("sequence", "truncate"))]
    [[3.0, 0.5], [0.0, 0.5], [2.0, 2.0]]
    """
    require_mask("mask", mask)
    require_logprobs("old logprobs", old_logprobs, mask)
    require_logprobs("rollout logprobs", rollout_logprobs, mask)
    with torch.no_grad():
        log_ratio = torch.where(mask, old_logprobs - rollout_logprobs.to(old_logprobs), 0.0)
        if correction.level == "sequence":
            log_ratio = log_ratio.sum(-1, keepdim=True).expand(mask.shape)
        ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        if correction.mode == "truncate":
            ratio = ratio.clamp(correction.low, correction.high)
        else:
            within = (ratio >= correction.low) & (ratio <= correction.high)
            ratio = torch.where(within, ratio, 0.0)
        return torch.where(mask, ratio, 1.0)


@dataclass(frozen=True, slots=True)
class Totals:
    """Sequences and tokens in the loss of one optimizer step.

    Counted over all micro-batches of all ranks. Divided by them, the losses of the micro-batches
    *sum* to the loss of the step, however it was split. A row without a token in the loss is not
    counted: masking a row out is the same as leaving it out.

    >>> Totals(sequences=2, tokens=5) + Totals(sequences=1, tokens=3)
    Totals(sequences=3, tokens=8)
    """

    sequences: int
    tokens: int

    @classmethod
    def of(cls, mask: Tensor) -> Totals:
        """Count one micro-batch. ``mask``: bool, (N, C). Raises ``TrainError`` for another mask."""
        require_mask("mask", mask)
        return cls(sequences=int(mask.any(-1).sum()), tokens=int(mask.sum()))

    @classmethod
    def sum(cls, parts: Iterable[Totals]) -> Totals:
        """The totals of all parts."""
        total = cls(0, 0)
        for part in parts:
            total += part
        return total

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.sequences + other.sequences, self.tokens + other.tokens)
