"""Causes of steps that do not learn."""

from __future__ import annotations

from dataclasses import replace

from omni_grpo_core.doctor.evidence import Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, alone, only_fits, rule_of
from omni_grpo_core.pipeline.hints import FIXES


def _language(evidence: Evidence) -> bool:
    return evidence.values.get("part") in ("text", "head", "adapter")


_REENTRANT = Signature(
    cause="step.reentrant-checkpointing",
    fact="loss-detached",
    harm="re-entrant checkpointing propagates a gradient only where an input of the block "
    "requires one; with frozen embeddings none does, and adapters inside learn nothing",
    fix="call gradient_checkpointing_enable({'use_reentrant': False}), or "
    "model.enable_input_require_grads()",
    confirm="the warning 'None of the inputs have requires_grad=True' is gone from training",
    when=lambda e: bool(e.values["at_checkpoints"]),
)

_STEP = (
    Signature(
        cause="logits.dropout",
        fact="second-forward-differs",
        when=lambda e: e.values["dropout"] > 0 and not e.values["moved"],
        harm="the ratio of policy and old policy is noise of exp({mean:.2g}) where it should be 1",
        fix="set dropout (LoRA's too) to 0, or score old and new logprobs in the same mode",
        confirm="two forwards of one batch give the same logprobs",
    ),
    _REENTRANT,
    Signature(
        cause="step.detached",
        fact="loss-detached",
        when=lambda e: not e.values["at_checkpoints"],
        harm="backward reaches no weight: the loss is logged and nothing is learnt",
        fix="look for .detach(), .item(), torch.no_grad() or inference_mode between the forward "
        "and the loss; requires_grad_() on the result only hides it",
        confirm="the gradient norm is above 0",
    ),
    replace(
        _REENTRANT,
        fact="no-gradient",
        when=lambda e: bool(e.values["at_checkpoints"]) and not e.values["reached"],
    ),
    Signature(
        cause="step.detached",
        fact="no-gradient",
        harm="backward reaches no weight: the loss is logged and nothing is learnt",
        fix="look for .detach(), .item() or torch.no_grad() between the forward and the loss, and "
        "for requires_grad_() that hides it",
        confirm="the gradient norm is above 0",
        when=lambda e: (
            not e.values["at_checkpoints"] and not e.values["reached"] and e.values["backward"] > 0
        ),
    ),
    Signature(
        cause="step.no-backward",
        fact="no-gradient",
        harm="the optimizer steps without a gradient: nothing is learnt",
        fix="look for the condition under which backward is called",
        confirm="backward is called before every optimizer.step()",
        when=lambda e: not e.values["at_checkpoints"] and not e.values["backward"],
    ),
    Signature(
        cause="step.frozen-wrong",
        fact="text-frozen",
        harm="the part that writes completions does not learn; towers, tuned on a few answers, "
        "forget what they knew",
        fix="freeze by module, not by name prefix: model.visual and model.audio_tower frozen, the "
        "text model and lm_head trainable",
        confirm="there are trainable parameters in the text part",
    ),
    Signature(
        cause="step.frozen-wrong",
        fact="tower-trained",
        harm="towers, tuned on a few answers, forget what they knew",
        fix="freeze model.visual and model.audio_tower by module, not by name prefix",
        confirm="all trainable parameters are in the text part",
    ),
    Signature(
        cause="step.frozen-wrong",
        fact="beside-adapter",
        harm="base weights are trained along with the adapters: they cost optimizer memory, and "
        "the model with adapters off is no longer the reference",
        fix="freeze the base model before adding adapters",
        confirm="all trainable parameters are in the adapters",
        prove=only_fits,
    ),
    Signature(
        cause="step.not-updated",
        fact="not-held",
        harm="the optimizer updates another copy of the model, or nothing: the loss is logged, "
        "these weights never change",
        fix="create the optimizer after wrapping, moving and adding adapters, from the model that "
        "is called",
        confirm="the same prompt's logprobs change after a step",
        when=_language,
    ),
    Signature(
        cause="step.not-updated",
        fact="not-moved",
        harm="the optimizer stepped and the policy did not change",
        fix="create the optimizer after wrapping and moving, from the model that is called; look "
        "for updates below the weights' precision",
        confirm="the same prompt's logprobs change after a step",
        prove=only_fits,
    ),
    Signature(
        cause="step.gradient-dropped",
        fact="gradient-dropped",
        harm="completions of {dropped} of {losses} micro-batches are sampled, rewarded and scored, "
        "and teach nothing",
        fix="call zero_grad() once, after the optimizer's step",
        confirm="p.grad is not None before the second backward of a step",
    ),
    Signature(
        cause="step.update-undone",
        fact="update-undone",
        harm="state and logs go on as if the policy learnt, and it is the same after every step",
        fix="look for what writes weights after the step: load_state_dict, an average that is "
        "copied back, a cast to 16 bits in which the update is lost",
        confirm="a weight after the step is the same weight before the next one",
    ),
    Signature(
        cause="step.ranks-apart",
        fact="ranks-apart",
        harm="every rank trains a policy of its own on its own share of the rows, and only one of "
        "them is saved",
        fix="call the wrapped model (DistributedDataParallel, or what accelerate.prepare returned) "
        "in the scoring forward, not the one inside it; or average the gradients of all ranks "
        "before the optimizer's step",
        confirm="after a step the same weight has the same value on all ranks",
        when=lambda e: not e.values["averaged"],
    ),
    Signature(
        cause="step.ranks-unlike",
        fact="ranks-apart",
        harm="every rank trains a policy of its own with a gradient that is the mean of others'",
        fix="load the same weights on every rank, and make adapters from the same seed or "
        "broadcast them from the first",
        confirm="before the first step the same weight has the same value on all ranks",
        when=lambda e: bool(e.values["averaged"]),
    ),
    Signature(
        cause="step.rate-huge",
        fact="weights-thrown",
        harm="what follows is the policy of a random model: garbage, whatever the reward",
        fix="use a learning rate of 1e-6 to 1e-5 for all weights, 1e-5 to 1e-4 for adapters; print "
        "it, and the weight decay, as the optimizer has them",
        confirm="the same prompt's logprobs change by less than 0.1 in a step",
    ),
    Signature(
        cause="step.accumulation",
        fact="accumulation-differs",
        harm="the loss is averaged over {told} micro-batches and summed over {losses}: the "
        "gradient is off by their ratio, and so is the effective learning rate",
        fix="set accumulation in one place; with Accelerate or DeepSpeed their value wins",
        confirm="a step has as many backward passes as the settings say",
        prove=alone,
    ),
    Signature(
        cause="step.accumulation",
        fact="batch-cuts-groups",
        harm="groups are split at the end of a batch: advantages compare only parts of them",
        fix="make the batch a multiple of the group size",
        prove=only_fits,
    ),
    Signature(
        cause="step.resume",
        fact="began-anew",
        harm="the run repeats its first rows with the same random numbers, and the optimizer's "
        "moments restart at 0 each time",
        fix="save and restore optimizer, scheduler, sampler and random state with the weights",
        confirm="the first step after a resume draws new rows",
    ),
    Signature(
        cause="step.resume",
        fact="optimizer-anew",
        harm="every moment of the optimizer starts at 0 again: its steps are as large as at the "
        "start of training, whatever was learnt about the gradient",
        fix="make the optimizer once; after a resume load its state with the weights",
        confirm="its count of updates grows by 1 with every step",
    ),
    Signature(
        cause="step.resume",
        fact="counter-back",
        harm="schedules and seeds that depend on the step start over",
        fix="restore the trainer's state with the weights",
    ),
    Signature(
        cause="step.nan-gradient",
        fact="gradient-not-finite",
        harm="the next step makes every weight NaN, although the loss was finite",
        fix=FIXES["step.nan-gradient"],
        confirm="torch.autograd.set_detect_anomaly(True) names the operation",
    ),
    Signature(
        cause="step.detached",
        fact="nothing-trainable",
        harm="nothing is learnt",
        fix="let the text model, or adapters in it, require gradients",
    ),
    Signature(
        cause="step.gradient-zeroed",
        fact="gradient-zeroed",
        harm="{layers} learn nothing, whatever the loss says",
        fix="look between backward and optimizer.step() for zero_grad(), .grad = None, .zero_() or "
        "a hook on {parameters}",
        confirm="the gradient's norm is the same after backward and before the step",
    ),
    Signature(
        cause="step.gradient-negated",
        fact="gradient-negated",
        harm="{layers} are trained away from what the loss asks for",
        fix="look between backward and optimizer.step() for a sign: .grad.neg_(), mul_(-1), or a "
        "gradient reversal that was meant for another model",
        confirm="the gradient's sign is the same after backward and before the step",
    ),
    Signature(
        cause="step.gradient-negated",
        fact="uphill",
        harm="{layers} are trained away from what the loss asks for: the best completions become "
        "less likely",
        fix="create the optimizer without maximize=True; an objective to be maximized belongs into "
        "the loss with a minus",
        confirm="the loss of one batch is smaller after a step on it",
    ),
    Signature(
        cause="step.gradient-scaled",
        fact="gradient-scaled",
        when=lambda e: e.severity == "breaks",
        harm="{layers} take steps of {times:.4g} times the size",
        fix="look between backward and optimizer.step() for what multiplies {parameters}; another "
        "step size for a layer belongs into its parameter group's learning rate",
        confirm="all gradients have one factor between backward and step",
    ),
    Signature(
        cause="step.gradient-changed",
        fact="gradient-changed",
        when=lambda e: e.severity == "breaks",
        harm="{layers} follow another gradient than that of the loss",
        fix="look between backward and optimizer.step() for what writes {parameters}'s .grad",
        confirm="all gradients have one factor between backward and step",
        prove=only_fits,
    ),
    Signature(
        cause="step.clip-scaled",
        fact="clipped-while-scaled",
        harm="of the gradient 1 / {scale:g} is left: below Adam's epsilon, weights hardly move",
        fix="call scaler.unscale_(optimizer) before clip_grad_norm_",
        confirm="the gradient norm before the step is {limit:g}",
    ),
    Signature(
        cause="step.not-zeroed",
        fact="not-zeroed",
        when=lambda e: e.severity == "breaks",
        harm="every step repeats the gradients of all earlier ones: old rewards go on pushing",
        fix="call optimizer.zero_grad() once per step, after optimizer.step() or before the first "
        "backward",
        confirm="no gradient exists before the first backward",
    ),
    Signature(
        cause="step.never",
        fact="never-stepped",
        when=lambda e: e.severity == "breaks",
        harm="the loss is logged, and no weight changes",
        fix="call optimizer.step() after the last backward of a step: look at the condition it is "
        "under",
        prove=only_fits,
    ),
    Signature(
        cause="step.rate-zero",
        fact="rate-zero",
        when=lambda e: not e.values["warming"],
        harm="gradients are computed, and the optimizer multiplies them by 0",
        fix="look for the scheduler or argument that sets it: a warm-up that never ends, a "
        "schedule that already has, lr=0 in a parameter group",
        confirm="weights change in a step",
    ),
    Signature(
        cause="step.weights-written",
        fact="moved-frozen",
        harm="the model changes by something that the loss does not decide",
        fix="look for what writes the weights in the step: another optimizer, a merge, an average",
        prove=only_fits,
    ),
)

RULES: tuple[Rule, ...] = (rule_of("causes_of_steps", _STEP),)
