"""Causes between rewards and the optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from omni_grpo_core.doctor.evidence import Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_MISTAKES = {
    "loss.sign": (
        "sign",
        "gradient descent moves away from what is rewarded: rewards fall from the first step",
        "minimise the negative objective: loss = -min(ratio * A, clipped * A)",
    ),
    "loss.kl-sign": (
        "kl-sign",
        "the policy is pushed away from its reference, faster the further it is",
        "add beta * KL to a loss that is minimised, with KL = exp(d) - d - 1 and "
        "d = reference - policy",
    ),
    "loss.normaliser": (
        "normaliser",
        "the loss depends on how the step is split into micro-batches and ranks: the weight of "
        "short completions changes with the split",
        "divide once by the tokens (or rows) of the whole step, over all micro-batches and ranks",
    ),
}


def _hidden(evidence: Evidence) -> bool:
    values = evidence.values
    implied = values.get("implied_beta")
    return not values.get("beta") and implied is not None and implied > 1e-6


def _shown_by(way: str) -> Callable[[Evidence], bool]:
    return lambda evidence: evidence.values.get("way") == way and not _hidden(evidence)


_ADVANTAGE = (
    Signature(
        cause="adv.group-mixed",
        fact="groups-mixed",
        harm="a good answer to a hard question loses to an answer to an easy one: the advantage "
        "measures the question, not the answer",
        fix="form groups by the sample's id, never by row order or view(-1, G): rows are dropped, "
        "sorted and split",
        confirm="every group has one prompt",
    ),
    Signature(
        cause="adv.group-mixed",
        fact="advantage-differs",
        harm="advantages compare answers to different questions",
        fix="form groups by the sample's id, never by row order or view(-1, G)",
        confirm="the mean advantage of every group is 0",
        when=lambda e: e.values["how"] in ("by-row-order", "by-interleaving"),
    ),
    Signature(
        cause="adv.batch-scale",
        fact="advantage-differs",
        harm="whole groups of hard questions get negative advantages, of easy ones positive: the "
        "question outweighs the quality of the answer",
        fix="take mean (and standard deviation) over the completions of one prompt, not the batch",
        confirm="the mean advantage of every group is 0",
        when=lambda e: e.values["how"] == "by-batch",
    ),
    Signature(
        cause="loss.sign",
        fact="advantage-differs",
        harm="higher-rewarded completions are made less likely",
        fix="compute advantage = reward - mean, not mean - reward",
        confirm="the best completion of a group has the largest advantage",
        when=lambda e: e.values["how"] == "negated",
    ),
    Signature(
        cause="adv.zero-variance",
        fact="no-variance",
        harm="loss and gradient are exactly 0 and nothing is raised: the run can go on for days "
        "and learn nothing",
        fix=FIXES["adv.zero-variance"],
        confirm="some group has two different rewards",
    ),
    Signature(
        cause="adv.zero-variance",
        fact="total-differs",
        harm="the functions' rewards do not reach the advantage",
        fix="check how rewards are weighted and summed: by function name, one weight each",
        confirm="a row's total is the weighted sum of its rewards",
        prove=only_fits,
    ),
    Signature(
        cause="adv.partial-unused",
        fact="partial-unused",
        harm="{name} costs its judge calls and has no effect on any weight",
        fix="add the partial reward's own group advantage to the tokens of its section, and check "
        "that the loss gets this tensor",
        confirm="set the partial reward to random numbers: the gradient must change",
        prove=only_fits,
    ),
    Signature(
        cause="adv.span-mask",
        fact="span-differs",
        harm="the reward of one section acts on the tokens of another",
        fix="find the section by text offsets of each completion (losses.spans.token_span), not by "
        "hard-coded ids: a tag's ids depend on its context, and argmax without a match is 0",
        confirm="decode the marked tokens: they spell the section",
    ),
    Signature(
        cause="adv.broadcast",
        fact="advantage-broadcast",
        harm="tokens get other completions' advantages; with a single completion, as in a unit "
        "test, the result is right",
        fix="write advantages[:, None] (or unsqueeze(1)) before multiplying with token losses",
        confirm="every token of a completion has one advantage",
    ),
    Signature(
        cause="adv.shape",
        fact="shapes-differ",
        harm="rewards act on other completions' tokens, or broadcasting hides that some have none",
        fix="keep one reward, one group id and one advantage per completion",
        confirm="all three have the same length",
        prove=only_fits,
    ),
)

_LOSS = (
    Signature(
        cause="loss.shift",
        fact="shifted",
        harm="every token is scored by logits computed with it as input: the policy is trained to "
        "repeat itself",
        fix="score completion tokens with logits[:, -C-1:-1]: a position's logits predict the next",
        confirm="the mean logprob of a greedy completion is near 0",
    ),
    Signature(
        cause="loss.prompt-included",
        fact="prompt-in-loss",
        harm="the policy is trained towards (or away from) the question, whose tokens outnumber "
        "the answer's",
        fix="mask everything before the first sampled token, or slice the last C columns",
        confirm="the mask's sum is the number of sampled tokens",
    ),
    Signature(
        cause="loss.after-eos",
        fact="after-eos",
        harm="padding is trained on, more of it for short completions: their length drifts",
        fix="count up to and including the first eos: (ids == eos).cumsum(1) - (ids == eos) == 0",
        confirm="the mask's sum is the number of sampled tokens",
    ),
    Signature(
        cause="loss.tokens-left-out",
        fact="tokens-left-out",
        harm="sampled tokens are not trained on; without the eos a policy never learns to stop",
        fix="count every token up to and including the first eos",
        confirm="the mask's sum is the number of sampled tokens",
        prove=only_fits,
    ),
    *(
        Signature(
            cause=cause,
            fact="loss-differs",
            harm=harm,
            fix=fix,
            confirm="the loss is {wanted:.6g} on these numbers",
            when=_shown_by(way),
        )
        for cause, (way, harm, fix) in _MISTAKES.items()
    ),
    Signature(
        cause="loss.sign",
        fact="advantages-negated",
        harm="higher-rewarded completions are made less likely",
        fix="pass the advantages to the loss as they were computed",
        confirm="the best completion of a group has the largest advantage in the loss",
    ),
    Signature(
        cause="loss.sign",
        fact="backward-differs",
        harm="higher-rewarded completions are made less likely",
        fix="call backward on the loss itself, not on its negative",
        confirm="the number that backward is called on is the loss",
        when=lambda e: bool(e.values.get("negated")),
    ),
    Signature(
        cause="loss.hidden-beta",
        fact="loss-differs",
        harm="a KL term of weight {implied_beta:.3g} holds the policy to its reference, although "
        "the settings have none",
        fix="pass beta explicitly wherever the loss is computed: some inner function has a default",
        confirm="with beta 0 no reference forward is made",
        when=_hidden,
    ),
    Signature(
        cause="loss.hidden-beta",
        fact="reference-unasked",
        harm="every step pays for a reference forward, and a KL term may hold the policy back, "
        "although beta is 0 in the settings",
        fix="pass beta explicitly wherever the loss is computed: some inner function has a default",
        confirm="with beta 0 no reference forward is made",
        prove=only_fits,
    ),
    Signature(
        cause="loss.clip-side",
        fact="clip-rate-differs",
        harm="the log counts clipping where there is none and misses it where there is: learning "
        "rate and epsilon are tuned by a wrong number",
        fix="count ratio < 1 - epsilon where the advantage is negative and ratio > 1 + epsilon "
        "where it is positive",
        confirm="the logged rate is {right:.4g} on these numbers",
    ),
    Signature(
        cause="loss.kl-sign",
        fact="kl-negative",
        harm="a KL cannot be negative: it is subtracted, or its difference has the wrong sign",
        fix="compute KL = exp(d) - d - 1 with d = reference - policy, and add beta * KL",
        confirm="the logged KL is never below 0",
        prove=only_fits,
    ),
    Signature(
        cause="loss.old-recomputed",
        fact="old-recomputed",
        harm="nothing holds later passes to the policy that sampled: clipping has no effect, and "
        "steps grow",
        fix="keep the logprobs of the first pass and use them in all later ones",
        confirm="ratios of the second pass are not all 1",
    ),
    Signature(
        cause="loss.logprobs",
        fact="logprobs-differ",
        harm="the ratio is not the policy's",
        fix="gather the logprobs of the sampled ids from the preceding positions' logits, in "
        "float32, at the sampling temperature",
        confirm="on the first pass the loss's logprobs equal generate's",
        prove=only_fits,
    ),
    Signature(
        cause="loss.not-finite",
        fact="not-finite",
        harm="a single non-finite loss makes every weight NaN",
        fix=FIXES["loss.not-finite"],
        prove=only_fits,
    ),
)


RULES: tuple[Rule, ...] = (
    rule_of("causes_of_advantages", _ADVANTAGE),
    rule_of("causes_of_losses", _LOSS),
)
