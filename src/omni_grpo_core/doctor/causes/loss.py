"""Causes between rewards and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable

from omni_grpo_core.doctor.evidence import Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_WAY = {
    "loss.sign": (
        "sign",
        "gradient descent walks away from what earns: rewards fall from the first step",
        "minimise minus the objective: loss = -min(ratio * A, clipped * A)",
    ),
    "loss.kl-sign": (
        "kl-sign",
        "the policy is pushed away from its reference, faster the further it is",
        "add beta * KL to a loss that is minimised, with KL = exp(d) - d - 1 and "
        "d = reference - policy",
    ),
    "loss.normaliser": (
        "normaliser",
        "the loss hangs on how the step is cut into micro-batches and ranks: short completions "
        "weigh more in one cut than in another",
        "divide by the tokens (or rows) of the whole step, over all micro-batches and ranks, once",
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
        harm="a good answer to a hard question loses against an easy question's: the policy is "
        "taught which questions to like",
        fix="form groups by the sample's id, never by row order or view(-1, G): rows are dropped, "
        "sorted and split",
        confirm="every group holds one prompt",
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
        harm="whole groups of hard questions get negative advantages, those of easy ones positive: "
        "which question it was outweighs how well it was answered",
        fix="take mean (and deviation) over the completions of one prompt, not over the batch",
        confirm="the mean advantage of every group is 0",
        when=lambda e: e.values["how"] == "by-batch",
    ),
    Signature(
        cause="loss.sign",
        fact="advantage-differs",
        harm="what earns more is made less likely",
        fix="advantage = reward - mean, not mean - reward",
        confirm="the best completion of a group has the largest advantage",
        when=lambda e: e.values["how"] == "negated",
    ),
    Signature(
        cause="adv.zero-variance",
        fact="no-variance",
        harm="loss and gradient are exactly 0 and nothing is raised: the run goes on for days and "
        "learns nothing",
        fix=FIXES["adv.zero-variance"],
        confirm="some group has two different rewards",
    ),
    Signature(
        cause="adv.zero-variance",
        fact="total-differs",
        harm="what the functions gave does not reach the advantage",
        fix="look at how rewards are weighed and summed: by the functions' own names, one weight "
        "each",
        confirm="a row's total is the weighted sum of its rewards",
        certainty=0.4,
    ),
    Signature(
        cause="adv.partial-unused",
        fact="partial-unused",
        harm="the judge of {name} is paid for and has no effect on any weight",
        fix="add the partial reward's own group advantage on the tokens of its section, and check "
        "that this tensor is the one that the loss gets",
        confirm="set the partial reward to random numbers: the gradient must change",
        certainty=0.9,
    ),
    Signature(
        cause="adv.span-mask",
        fact="span-differs",
        harm="the reward of one section pushes the tokens of another",
        fix="find the section by text offsets of each completion (losses.spans.token_span), not by "
        "hard-coded ids: a tag is spelled by other ids at other places, and argmax of nothing is 0",
        confirm="decode the marked tokens: they spell the section",
    ),
    Signature(
        cause="adv.broadcast",
        fact="advantage-broadcast",
        harm="tokens are pushed by other completions' rewards; with one completion, or in a test "
        "of one, it comes out right",
        fix="write advantages[:, None] (or unsqueeze(1)) before they meet token losses",
        confirm="every token of a completion has one advantage",
    ),
    Signature(
        cause="adv.shape",
        fact="shapes-differ",
        harm="rewards meet other completions' tokens, or broadcasting hides that some have none",
        fix="keep one reward, one group id and one advantage for each completion",
        confirm="all three have the same length",
        certainty=0.6,
    ),
)

_LOSS = (
    Signature(
        cause="loss.shift",
        fact="shifted",
        harm="every token is scored by the scores that already know it: the policy is trained "
        "towards repeating itself",
        fix="score completion tokens by logits[:, -C-1:-1]: a place's scores predict the next",
        confirm="mean logprob of a greedy completion is near 0",
    ),
    Signature(
        cause="loss.prompt-included",
        fact="prompt-in-loss",
        harm="the policy is trained to say (or not to say) the question, whose tokens outnumber "
        "the answer's",
        fix="mask everything before the first sampled token, or slice the last C columns",
        confirm="the mask's sum is the number of sampled tokens",
    ),
    Signature(
        cause="loss.after-eos",
        fact="after-eos",
        harm="padding is trained on, more of it for short answers: the length of answers drifts",
        fix="count tokens up to and with the first eos: (ids == eos).cumsum(1) - (ids == eos) == 0",
        confirm="the mask's sum is the number of sampled tokens",
    ),
    Signature(
        cause="loss.tokens-left-out",
        fact="tokens-left-out",
        harm="tokens that were sampled are not trained; without the eos a policy never learns to "
        "stop",
        fix="count every token up to and with the first eos",
        confirm="the mask's sum is the number of sampled tokens",
        certainty=0.6,
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
        for cause, (way, harm, fix) in _WAY.items()
    ),
    Signature(
        cause="loss.sign",
        fact="advantages-negated",
        harm="what earns more is made less likely",
        fix="hand the advantages to the loss as they were computed",
        confirm="the best completion of a group has the largest advantage in the loss",
    ),
    Signature(
        cause="loss.sign",
        fact="backward-differs",
        harm="what was rewarded is made rarer",
        fix="call backward on the loss as it is",
        confirm="the number that backward is called on is the loss",
        when=lambda e: bool(e.values.get("negated")),
    ),
    Signature(
        cause="loss.hidden-beta",
        fact="loss-differs",
        harm="a KL term of weight {implied_beta:.3g} holds the policy to its reference, though the "
        "settings say there is none",
        fix="pass beta explicitly wherever the loss is made: some inner function has a default",
        confirm="with beta 0 no reference forward is made",
        when=_hidden,
    ),
    Signature(
        cause="loss.hidden-beta",
        fact="reference-unasked",
        harm="a reference forward is paid for at every step, and a KL term may hold the policy "
        "back, though the settings say beta 0",
        fix="pass beta explicitly wherever the loss is made: some inner function has a default",
        confirm="with beta 0 no reference forward is made",
        certainty=0.9,
    ),
    Signature(
        cause="loss.clip-side",
        fact="clip-rate-differs",
        harm="the log says that the clip is at work where it is not, and is silent where it is: "
        "learning rate and epsilon are tuned by a wrong number",
        fix="count ratio < 1 - epsilon where the advantage is negative and ratio > 1 + epsilon "
        "where it is positive",
        confirm="the logged rate is {right:.4g} on these numbers",
    ),
    Signature(
        cause="loss.kl-sign",
        fact="kl-negative",
        harm="a KL below 0 is none: it is subtracted or its difference is the wrong way round",
        fix="KL = exp(d) - d - 1 with d = reference - policy, and add beta * KL",
        confirm="the logged KL is never below 0",
        certainty=0.9,
    ),
    Signature(
        cause="loss.old-recomputed",
        fact="old-recomputed",
        harm="nothing holds later passes to the policy that sampled: the clip is out of force, and "
        "steps grow",
        fix="keep the logprobs of the first pass and hand them to all later ones",
        confirm="ratios of the second pass are not all 1",
    ),
    Signature(
        cause="loss.logprobs",
        fact="logprobs-differ",
        harm="the ratio is not that of the policy",
        fix="gather the logprobs of the sampled ids from the scores before them, in float32, at "
        "the sampling temperature",
        confirm="logprobs of the loss equal generate's own on the first pass",
        certainty=0.5,
    ),
    Signature(
        cause="loss.not-finite",
        fact="not-finite",
        harm="one such loss makes every weight NaN",
        fix=FIXES["loss.not-finite"],
        certainty=0.5,
    ),
)


def _language(evidence: Evidence) -> bool:
    return evidence.values.get("part") in ("text", "head", "adapter")


_STEP = (
    Signature(
        cause="step.reentrant-checkpointing",
        fact="loss-detached",
        harm="re-entrant checkpointing passes a gradient on only where an input of the block "
        "requires one; with frozen embeddings none does, and adapters inside learn nothing",
        fix="gradient_checkpointing_enable({'use_reentrant': False}), or "
        "model.enable_input_require_grads()",
        confirm="the warning 'None of the inputs have requires_grad=True' is gone from training",
        when=lambda e: bool(e.values["at_checkpoints"]),
    ),
    Signature(
        cause="step.detached",
        fact="loss-detached",
        when=lambda e: not e.values["at_checkpoints"],
        harm="backward reaches no weight: the loss is logged, and nothing is learnt",
        fix="look for .detach(), .item(), torch.no_grad() or inference_mode between the forward "
        "and the loss; requires_grad_() on the result only hides it",
        confirm="the gradient norm is above 0",
    ),
    Signature(
        cause="step.detached",
        fact="no-gradient",
        harm="backward reaches no weight: the loss is logged, and nothing is learnt",
        fix="look for .detach(), .item() or torch.no_grad() between the forward and the loss, and "
        "for requires_grad_() that hides it",
        confirm="the gradient norm is above 0",
        certainty=0.9,
    ),
    Signature(
        cause="step.frozen-wrong",
        fact="text-frozen",
        harm="what says the completions does not learn; towers, tuned by a few answers, lose what "
        "they knew",
        fix="freeze by module, not by a prefix of names: model.visual and model.audio_tower off, "
        "the text model and lm_head on",
        confirm="trainable parameters stand in the text part",
    ),
    Signature(
        cause="step.frozen-wrong",
        fact="tower-trained",
        harm="towers, tuned by a few answers, lose what they knew",
        fix="freeze model.visual and model.audio_tower by module, not by a prefix of names",
        confirm="trainable parameters stand in the text part alone",
    ),
    Signature(
        cause="step.frozen-wrong",
        fact="beside-adapter",
        harm="base weights move beside the adapters: memory for all of them, and the model with "
        "adapters off is no reference any more",
        fix="freeze the base model before adapters are added",
        confirm="trainable parameters stand in the adapters alone",
        certainty=0.8,
    ),
    Signature(
        cause="step.not-updated",
        fact="not-held",
        harm="the optimizer moves parameters of another copy of the model: the loss is logged, the "
        "policy never changes",
        fix="make the optimizer after wrapping, moving and adding adapters, from the model that is "
        "called",
        confirm="the same prompt's logprobs change after a step",
        when=_language,
    ),
    Signature(
        cause="step.not-updated",
        fact="not-moved",
        harm="a step was made and the policy is the same",
        fix="make the optimizer after wrapping and moving, from the model that is called; look for "
        "updates that are smaller than the weights' precision",
        confirm="the same prompt's logprobs change after a step",
        certainty=0.9,
    ),
    Signature(
        cause="step.accumulation",
        fact="accumulation-differs",
        harm="the loss is divided for {told} micro-batches and summed over {losses}: the step is "
        "off by their ratio, and so is the learning rate",
        fix="set accumulation in one place; with Accelerate or DeepSpeed their own value wins",
        confirm="as many backward passes a step as the settings say",
    ),
    Signature(
        cause="step.accumulation",
        fact="batch-cuts-groups",
        harm="groups are cut apart at the end of a batch: advantages compare what is left of them",
        fix="make the batch a multiple of the group size",
        certainty=0.9,
    ),
    Signature(
        cause="step.resume",
        fact="began-anew",
        harm="the run sees its first rows again and again with the same random numbers, and the "
        "optimizer's moments begin at 0 each time",
        fix="save and restore optimizer, scheduler, sampler and random state with the weights",
        confirm="the first step after a resume draws new rows",
    ),
    Signature(
        cause="step.resume",
        fact="counter-back",
        harm="schedules and seeds that go by the step begin again",
        fix="restore the trainer's state with the weights",
    ),
    Signature(
        cause="step.nan-gradient",
        fact="gradient-not-finite",
        harm="the next step makes every weight NaN, with a loss that looked well",
        fix=FIXES["step.nan-gradient"],
        confirm="torch.autograd.set_detect_anomaly(True) names the operation",
    ),
    Signature(
        cause="step.detached",
        fact="nothing-trainable",
        harm="nothing is learnt",
        fix="let the text model, or adapters in it, require gradients",
    ),
)

RULES: tuple[Rule, ...] = (
    rule_of("causes_of_advantages", _ADVANTAGE),
    rule_of("causes_of_losses", _LOSS),
    rule_of("causes_of_steps", _STEP),
)
