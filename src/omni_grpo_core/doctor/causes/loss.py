"""Causes between rewards and the optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from omni_grpo_core.doctor.evidence import Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, alone, only_fits, rule_of
from omni_grpo_core.pipeline.hints import FIXES
from omni_grpo_core.types import Stage

_SIGNS: tuple[tuple[str, Stage], ...] = (("adv.negated", "advantage"), ("loss.sign", "loss"))


def _at(stage: Stage) -> Callable[[Evidence], bool]:
    return lambda evidence: evidence.stage == stage


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
        when=lambda e: e.values["how"] == "by-row-order",
        prove=alone,
    ),
    Signature(
        cause="adv.batch-scale",
        fact="advantage-differs",
        harm="whole groups of hard questions get negative advantages, of easy ones positive: the "
        "question outweighs the quality of the answer, and learning is noisier than GRPO's",
        fix="take mean (and standard deviation) over the completions of one prompt, not the batch, "
        "if GRPO is meant and not REINFORCE with a baseline",
        confirm="the mean advantage of every group is 0",
        when=lambda e: e.values["how"] == "by-batch",
        prove=alone,
    ),
    Signature(
        cause="adv.clipped",
        fact="advantage-differs",
        harm="nothing is ever made less likely: half of what the rewards say is thrown away, and "
        "the policy narrows to what it already does",
        fix="use reward - mean with its sign; 1 for the better and 0 for all others is how "
        "best-of-n picks its training data",
        confirm="completions below their group's mean have a weight of the other sign",
        when=lambda e: e.values["how"] == "better-only",
        prove=alone,
    ),
    Signature(
        cause="adv.best-of-n",
        fact="advantage-differs",
        harm="none in itself: it is rejection sampling; completions that are not the best of their "
        "prompt teach nothing",
        fix="use reward - mean of the group, if GRPO's advantage is meant",
        when=lambda e: e.values["how"] == "best-of-n",
        prove=alone,
    ),
    Signature(
        cause="adv.no-baseline",
        fact="advantage-differs",
        harm="rewards of one sign push every completion the same way: learning is slow and noisy",
        fix="subtract the mean reward of the prompt's completions",
        confirm="the mean advantage of every group is 0",
        when=lambda e: e.values["how"] == "unnormalised",
        prove=alone,
    ),
    Signature(
        cause="adv.batch-deviation",
        fact="scale-differs",
        harm="groups whose rewards vary little get small advantages",
        fix="divide by the standard deviation of the group's own rewards; if the batch's is meant, "
        "say so in the settings (scale_rewards)",
        when=lambda e: e.values["scale"] == "batch",
        prove=alone,
    ),
    Signature(
        cause="adv.not-scaled",
        fact="scale-differs",
        harm="none in itself: it is Dr. GRPO's advantage; its size follows that of the rewards",
        fix="divide by the standard deviation of the group's rewards, if GRPO's advantage is meant",
        when=lambda e: e.values["scale"] == "none",
        prove=alone,
    ),
    Signature(
        cause="adv.zero-variance",
        fact="no-signal",
        harm="loss and gradient are exactly 0 and nothing is raised: the run can go on for days "
        "and learn nothing",
        fix=FIXES["adv.zero-variance"],
        confirm="some completion has a weight in the loss",
        prove=alone,
    ),
    Signature(
        cause="step.detached",
        fact="no-signal",
        harm="the part of the loss that knows the rewards reaches no weight",
        fix="look for .detach() or torch.no_grad() between the log-probabilities and the ratio",
        confirm="some completion has a weight in the loss",
        when=lambda e: not e.values["alone"],
        prove=only_fits,
    ),
    Signature(
        cause="adv.reward-unused",
        fact="no-signal",
        harm="{only} costs its calls, and nothing is learnt from what it says",
        fix="add it to the rewards that advantages are computed from, or, if it is a partial one, "
        "its own group advantage to the tokens of its section",
        confirm="set it to random numbers: the gradient must change",
        when=lambda e: bool(e.values.get("only")),
        prove=only_fits,
    ),
    Signature(
        cause="adv.partial-repeats",
        fact="partial-repeats",
        harm="{name} costs its judge calls and has no effect on any weight: its section gets the "
        "advantage of the other rewards once more",
        fix="compute the advantage of a partial reward from its own values, not from the total, "
        "before it is added to the tokens of its section",
        confirm="set the partial reward to random numbers: the gradient must change",
    ),
    Signature(
        cause="adv.other-reward",
        fact="weights-against-rewards",
        harm="the policy learns something else than the reward functions measure",
        fix="print rewards and advantages beside the completions they belong to, just before the "
        "loss: one of them is of another row, or of another number",
        confirm="the best completion of a prompt has the largest advantage",
        prove=only_fits,
    ),
    Signature(
        cause="adv.partial-unused",
        fact="partial-unused",
        harm="{name} costs its judge calls and has no effect on any weight",
        fix="add the partial reward's own group advantage to the tokens of its section, and check "
        "that the loss gets this tensor",
        confirm="set the partial reward to random numbers: the gradient must change",
        prove=alone,
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
        cause="loss.rows-left-out",
        fact="rows-left-out",
        harm="completions are sampled and scored, and teach nothing",
        fix="look for a slice, a mask or a break that drops rows between the advantages and the "
        "loss's sum",
        confirm="every completion whose reward is not its group's mean has a weight in the loss",
    ),
    Signature(
        cause="loss.tokens-left-out",
        fact="tokens-left-out",
        harm="sampled tokens are not trained on; without the eos a policy never learns to stop",
        fix="count every token up to and including the first eos",
        confirm="the mask's sum is the number of sampled tokens",
    ),
    *(
        Signature(
            cause=cause,
            fact="advantages-negated",
            harm="higher-rewarded completions are made less likely: rewards fall from the first "
            "step",
            fix="compute advantage = reward - mean, and minimise -min(ratio * A, clipped * A)",
            confirm="the best completion of a group becomes more likely",
            when=_at(stage),
            prove=alone,
        )
        for cause, stage in _SIGNS
    ),
    Signature(
        cause="loss.padded-mean",
        fact="padding-in-divisor",
        harm="padding counts in the mean: one long completion in a batch makes the step of all "
        "others smaller",
        fix="divide by the mask's sum: (loss * mask).sum() / mask.sum(), or by a constant",
        confirm="the weight of a token does not depend on the longest completion of its batch",
        prove=alone,
    ),
    Signature(
        cause="loss.normaliser",
        fact="normaliser-of-parts",
        harm="the loss depends on how the step is split into micro-batches and ranks: the weight "
        "of short completions changes with the split",
        fix="divide once by the tokens (or rows) of the whole step, over all micro-batches and "
        "ranks",
        confirm="another number of micro-batches gives the same gradient",
        prove=alone,
    ),
    Signature(
        cause="step.accumulation",
        fact="accumulation-undivided",
        harm="the gradient is {parts} times that of one batch of the same rows: so is the "
        "effective learning rate, and clipping acts where it should not",
        fix="divide every micro-batch's loss by their number before backward",
        confirm="twice as many micro-batches of half the rows give the same gradient",
        prove=alone,
    ),
    Signature(
        cause="loss.kl-sign",
        fact="kl-subtracted",
        harm="the policy is pushed away from its reference, faster the further it is",
        fix="add beta * KL to a loss that is minimised, with KL = exp(d) - d - 1 and "
        "d = reference - policy",
        confirm="the KL that is logged is never below 0, and stays small",
    ),
    Signature(
        cause="loss.kl-turned",
        fact="kl-turned",
        harm="it still holds the policy, and grows without a bound where the policy is likelier "
        "than its reference: single tokens may outweigh the rewards",
        fix="use d = reference - policy, if GRPO's k3 is meant",
        confirm="the largest weight of a token in the loss is that of an advantage",
    ),
    Signature(
        cause="loss.kl-left-out",
        fact="kl-left-out",
        harm="every step pays for a reference forward, and nothing holds the policy to it",
        fix="add beta * KL to the loss of every token before it is reduced, or save the forward",
        confirm="with another beta the gradient changes",
    ),
    Signature(
        cause="loss.reference-is-policy",
        fact="reference-is-policy",
        harm="the KL is 0 whatever the policy does: nothing holds it",
        fix="copy the weights before training (copy.deepcopy, or load the checkpoint again), or "
        "turn the adapters off for the reference's forward",
        confirm="after an update the reference's log-probabilities differ from the policy's",
    ),
    Signature(
        cause="loss.other-targets",
        fact="other-targets",
        harm="the policy is trained on tokens it did not sample there",
        fix="gather the log-probabilities of the same rows and columns that were scored",
        confirm="the mean log-probability of a greedy completion is near 0",
        prove=only_fits,
    ),
    Signature(
        cause="loss.entropy-bonus",
        fact="entropy-in-loss",
        harm="none if it is meant; it holds the policy towards saying anything at all, more than "
        "the rewards do where they hardly differ",
        fix="set its coefficient to 0, if no settings ask for it",
        confirm="only the weights of sampled tokens are left in the loss",
        when=lambda e: e.values["kind"] == "bonus",
    ),
    Signature(
        cause="loss.another-term",
        fact="another-term",
        harm="none if it is meant, as a KL over the whole vocabulary is",
        fix="look for what is added to the policy's loss",
        prove=only_fits,
    ),
    Signature(
        cause="loss.hidden-beta",
        fact="kl-hidden",
        harm="a KL term of weight {implied_beta:.3g} holds the policy to its reference, although "
        "the settings have none",
        fix="pass beta explicitly wherever the loss is computed: some inner function has a default",
        confirm="with beta 0 no reference forward is made",
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
        cause="loss.ratio",
        fact="ratio-mistaken",
        harm="tokens of one completion are trained as if it were good at some and bad at others: "
        "what they are weighted by has nothing to do with how far the policy has moved",
        fix="compute ratio = exp(new - old) of the same rows and columns, where old is the "
        "log-probability that was kept when the completions were scored first",
        confirm="on the first update every ratio is 1",
    ),
    Signature(
        cause="loss.ratio-to-itself",
        fact="ratio-to-itself",
        harm="the gradients of the new and of the old log-probabilities cancel: the policy's part "
        "of the loss teaches nothing, and nothing is raised",
        fix="detach the old log-probabilities: ratio = exp(new - new.detach()), or keep those of "
        "the first pass without a gradient",
        confirm="some completion has a weight in the loss",
    ),
    Signature(
        cause="loss.clip-side",
        fact="clip-exchanged",
        harm="tokens that have moved the right way are pushed on without a limit, and those that "
        "have moved the wrong way are never pulled back",
        fix="minimise -min(ratio * A, clip(ratio) * A), which is max(-ratio * A, -clip(ratio) * A)",
        confirm="tokens whose ratio is far on the side of their advantage have no weight",
    ),
    Signature(
        cause="loss.clip-range",
        fact="clip-nothing-left",
        harm="after the first update nothing is learnt but from tokens that have moved the wrong "
        "way",
        fix="set epsilon to 0.2, or look for what makes 1 - epsilon and 1 + epsilon equal",
        confirm="few tokens are clipped on the second update",
    ),
    Signature(
        cause="loss.old-recomputed",
        fact="old-recomputed",
        harm="nothing holds later passes to the policy that sampled: clipping has no effect, and "
        "steps grow",
        fix="keep the logprobs of the first pass and use them in all later ones",
        confirm="ratios of the second pass are not all 1",
    ),
)


RULES: tuple[Rule, ...] = (
    rule_of("causes_of_advantages", _ADVANTAGE),
    rule_of("causes_of_losses", _LOSS),
)
TABLES = (_ADVANTAGE, _LOSS)
