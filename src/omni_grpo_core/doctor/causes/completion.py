"""Causes of wrong scores and wrong rollouts."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Case, Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, reproduced, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_RATIO = "on fresh on-policy samples the ratio is not 1, so the very first update is wrong"


def _right_without_dropout(case: Case, evidence: Evidence) -> str:
    right = bool(evidence.values["right_without"])
    return f"{evidence.sentence}; without it the same weights are right" if right else ""


_LOGITS = (
    Signature(
        cause="logits.dropout",
        fact="scoring-differs",
        harm="scoring twice gives two answers: the ratio of policy and sampler is noise",
        fix="set dropout (LoRA's too) to 0 for training with a policy gradient, or score in eval "
        "mode",
        confirm="two forwards of one batch give the same logprobs",
        when=lambda e: e.values["dropout"] > 0 and not e.values["reproduced"],
        prove=_right_without_dropout,
    ),
    Signature(
        cause="logits.batch-differs",
        fact="scoring-differs",
        harm="a completion's logprobs depend on the other rows of the batch: padding is attended "
        "to, and ratios and rewards of short prompts are wrong",
        fix="give the attention kernel the padding mask: with FlashAttention pass attention_mask "
        "and pad on the left, or score rows one by one",
        confirm="score one of the rows alone: its logprobs change",
        when=reproduced("mask-ignored"),
    ),
    Signature(
        cause="logits.batch-differs",
        fact="prompt-scores-differ",
        harm="the first token is sampled from scores that the row alone would not have",
        fix=FIXES["logits.batch-differs"],
        confirm="generate for one of the rows alone: its first token's scores change",
        when=reproduced("mask-ignored"),
    ),
    Signature(
        cause="logits.cache-differs",
        fact="cache-differs",
        harm=f"the sampled distribution is not the scored one: {_RATIO}",
        fix="generate with a cache that keeps everything: no sliding window, no custom "
        "cache_implementation, no quantised cache",
        confirm="the same rollout with use_cache=False has different logprobs",
    ),
    Signature(
        cause="logits.adapter-off",
        fact="adapter-off",
        harm="the adapter gets no gradient, and the ratio compares the base model with a policy "
        "that it is not",
        fix="end the disable_adapter() block before the forward whose scores enter the loss",
        confirm="the scoring forward's logprobs equal generate's",
    ),
    Signature(
        cause="logits.adapter-off",
        fact="old-without-adapter",
        harm="the ratio compares the policy with its base model: the further the adapter has come, "
        "the more of its own samples are clipped",
        fix="end the disable_adapter() block before the forward that gives the old "
        "log-probabilities",
        confirm="ratios of the first update on a rollout are 1",
    ),
    Signature(
        cause="logits.low-precision",
        fact="coarse-logprobs",
        harm="the ratio of two passes over one rollout is noise as large as the clip range, so "
        "clipping acts on noise",
        fix="take logits.float() before log_softmax (or compute logprobs in float32 chunks)",
        confirm="the logprobs in the loss are no longer multiples of a 16-bit step",
    ),
)


def _checkpointing(evidence: Evidence) -> bool:
    return bool(evidence.values["training"] and evidence.values["checkpointing"])


def _greedy(evidence: Evidence) -> bool:
    return not evidence.values["do_sample"]


def _penalty(evidence: Evidence) -> bool:
    return bool({"repetition_penalty", "no_repeat_ngram_size"} & set(evidence.values))


def _old_weights(case: Case, evidence: Evidence) -> str:
    """Observed where the scoring forward, in equal modes, has the weights that generate lacks."""
    values = evidence.values
    seen = "moved" in values or (values["scoring_agrees"] is True and values["alike"])
    return evidence.sentence if seen else ""


def _below_golds(case: Case, evidence: Evidence) -> str:
    """No right answer fits under the cap."""
    values = evidence.values
    return evidence.sentence if values["shortest"] > values["cap"] else ""


_COMPLETION = (
    Signature(
        cause="gen.checkpointing-train",
        fact="history-lost",
        harm="in transformers 4.53 to 5.23 a block in train mode with gradient checkpointing on "
        "drops the key-value cache, while generate goes on feeding one token at a time: "
        "each token of a completion depends on the one before it alone, and the scoring forward, "
        "which is right, shows nothing unusual",
        fix=FIXES["gen.checkpointing-train"],
        confirm="generate greedily in eval mode: the garbage is gone "
        "(omni-grpo doctor --experiments does it)",
        when=_checkpointing,
    ),
    Signature(
        cause="gen.history-lost",
        fact="history-lost",
        harm="each token depends on the one before it alone: neither prompt nor media are seen",
        fix="keep the cache in generate (use_cache=True, the cache passed on), or feed the whole "
        "sequence at every step",
        confirm="generate greedily in eval mode with a cache, and compare",
        when=lambda e: not _checkpointing(e),
        prove=only_fits,
    ),
    Signature(
        cause="gen.history-twice",
        fact="history-twice",
        harm="a token counts the more often in attention the older it is: completions come from "
        "another distribution than the one that is scored, and the cache grows with the square of "
        "their length",
        fix="set use_cache of the model's config (and of its generation config) to True or False; "
        "None, as from_pretrained(…, use_cache=None) leaves it, does both",
        confirm="the second decoding step sees the prompt once",
    ),
    Signature(
        cause="gen.return-sequences",
        fact="pixels-scrambled",
        harm="{tensor} has one row per patch, not per sample: every copy sees a clip pieced "
        "together from other patches. Nothing is raised, and the format stays right",
        fix="repeat prompts and media G times before the processor (or copy per picture, by its "
        "grid); use num_return_sequences and repeat_interleave only on tensors with one row per "
        "sample",
        confirm="accuracy on questions about motion falls to chance, on those about sound it does "
        "not",
    ),
    Signature(
        cause="gen.media-token",
        fact="media-token",
        harm="the scoring forward takes it for a placeholder without features: it raises, or "
        "shifts every later feature by one",
        fix="pass suppress_tokens with every special id but the eos, and score with the same ids "
        "at -inf",
        confirm="the sampled ids contain no placeholder id",
    ),
    Signature(
        cause="gen.special-token",
        fact="special-token",
        harm="the policy learns to write the template's turns and tags; a later scoring forward "
        "or the next template call breaks on them",
        fix="pass suppress_tokens with every special id but the eos, and score with the same ids "
        "at -inf",
        confirm="the sampled ids contain no special id but the final eos",
    ),
    Signature(
        cause="gen.skip-special",
        fact="specials-stripped",
        harm="a completion whose structure is broken by special tokens looks intact to rewards "
        "and in logs, and is rewarded",
        fix="decode with skip_special_tokens=False and remove the final eos by its id",
        confirm="the texts passed to rewards spell the sampled ids",
    ),
    Signature(
        cause="gen.no-eos",
        fact="eos-unset",
        harm="every completion runs on past its answer to the cap: wasted time, and rewards for "
        "text that nobody asked for. A thinker's config has no eos, and the model config's is not "
        "used as a fallback",
        fix=FIXES["gen.no-eos"],
        confirm="completions end before the cap",
    ),
    Signature(
        cause="gen.no-eos",
        fact="end-ignored",
        harm="what is written after the end of an answer is rewarded and trained with it",
        fix="stop a row at the first end token, or cut it there before it is decoded and scored",
        confirm="nothing but padding follows an end token",
    ),
    Signature(
        cause="gen.rollout-unused",
        fact="rollout-unused",
        harm="the policy goes on learning from what an older one sampled; the time of every later "
        "rollout is lost, and its rewards are only logged",
        fix="empty the buffer before each rollout, and train on what it returned",
        confirm="the ids in the loss are those that generate has just returned",
    ),
    Signature(
        cause="gen.single-eos",
        fact="eos-left-out",
        harm="a completion that ends with {left_out} runs on past its end, to the cap",
        fix="pass all end tokens: eos_token_id=[…, {left_out}]",
        confirm="no id is sampled after the first end token",
    ),
    Signature(
        cause="gen.group-order",
        fact="group-order",
        harm="each completion is rewarded for another row's question: accuracy is at chance, and "
        "groups mix questions",
        fix="repeat each prompt G times in a row (repeat_interleave, 1 1 2 2), not the whole list "
        "(tile, 1 2 1 2), or reorder completions before scoring",
        confirm="score the greedy completions: accuracy rises above chance",
    ),
    Signature(
        cause="gen.identical",
        fact="identical",
        harm="a group of equal completions has no variance: advantages, loss and gradient are 0",
        fix="pass do_sample=True and a temperature above 0: the generation config is greedy",
        confirm="completions of a group differ",
        when=_greedy,
    ),
    Signature(
        cause="gen.identical",
        fact="identical",
        harm="a group of equal completions has no variance: advantages, loss and gradient are 0",
        fix="give each completion of a group its own random stream: something sets the seed before "
        "each of them",
        confirm="completions of a group differ",
        when=lambda e: not _greedy(e),
    ),
    Signature(
        cause="gen.cap",
        fact="all-capped",
        harm="no completion reaches its answer: format and accuracy earn nothing, whatever the "
        "policy does",
        fix="raise the cap above {cap} tokens, to the length of a good policy's completions",
        confirm="some completions end with an eos",
        when=lambda e: not e.values["bent"],
        prove=_below_golds,
    ),
    Signature(
        cause="gen.end-banned",
        fact="end-banned",
        harm="no completion can end: what follows an answer is filled up to the cap, is trained "
        "on, and breaks a format that must end with its last tag",
        fix="let generate end: {why}",
        confirm="some completions end with an eos",
    ),
    Signature(
        cause="gen.temperature",
        fact="temperature-differs",
        harm=f"{_RATIO}, and the entropy trained on is not that of the sampled distribution",
        fix="divide the logits by the sampling temperature ({sampled:g}) before the log-softmax of "
        "the loss",
        confirm="the loss's logprobs equal generate's",
    ),
    Signature(
        cause="gen.repetition-penalty",
        fact="truncated-sampling",
        harm=f"tokens seen before were made less likely in sampling only: {_RATIO}",
        fix="pass repetition_penalty=1.0 to generate; published generation configs set one",
        confirm="the loss's logprobs equal those of the sampled distribution",
        when=_penalty,
    ),
    Signature(
        cause="gen.topk",
        fact="truncated-sampling",
        harm=f"the sampled distribution is cut and renormalised, the scored one is not: {_RATIO}",
        fix="pass top_k=0, top_p=1.0 (and no min_p) to generate: its defaults, and the "
        "checkpoint's generation config, set others",
        confirm="the loss's logprobs equal those of the sampled distribution",
        when=lambda e: not _penalty(e),
    ),
    Signature(
        cause="gen.adapter-off",
        fact="sampled-without-adapter",
        harm="completions come from the base model: what the adapter learns is never tried, and "
        "the loss treats another policy's samples as its own",
        fix="end the disable_adapter() block before generate, or load the adapter into the rollout "
        "engine",
        confirm="generate's logprobs equal the scoring forward's",
    ),
    Signature(
        cause="gen.weights-stale",
        fact="other-weights",
        harm="completions come from a different policy from the one being trained: the loss treats "
        "them as on-policy, and learning drifts or stops",
        fix="pass the new weights to the rollout engine after every optimizer step, and check one "
        "logprob",
        confirm="generate's logprobs equal the scoring forward's",
        prove=_old_weights,
    ),
    Signature(
        cause="gen.weights-stale",
        fact="scoring-disagrees",
        harm="the loss treats completions of a different policy, or for a different input, as "
        "on-policy: the ratio is not 1 even on fresh samples",
        fix=FIXES["gen.weights-stale"],
        confirm="the same tokens have the same logprobs in generate and in the scoring forward",
        when=lambda e: bool(e.values["history"]),
        prove=only_fits,
    ),
    Signature(
        cause="gen.weights-stale",
        fact="tokens-impossible",
        harm="the sampled distribution is not the scored one: the loss treats off-policy "
        "completions as on-policy",
        fix="make sure that generate uses the trained weights, its cache and its whole prompt",
        confirm="the sampled tokens are among the likely ones of the scoring forward",
        prove=only_fits,
    ),
    Signature(
        cause="gen.raised",
        fact="generate-raised",
        harm="there is no rollout",
        fix="fix its input or, if no earlier stage is at fault, this error: {error}",
        prove=only_fits,
    ),
)

TABLES = (_LOGITS, _COMPLETION)
RULES: tuple[Rule, ...] = (
    rule_of("causes_of_scores", _LOGITS),
    rule_of("causes_of_rollouts", _COMPLETION),
)
