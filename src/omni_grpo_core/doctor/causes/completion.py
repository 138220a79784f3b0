"""Causes of wrong scores and of wrong rollouts."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_RATIO = "on the policy's own fresh samples the ratio is not 1, so the first update is off already"

_LOGITS = (
    Signature(
        cause="logits.batch-differs",
        fact="scoring-differs",
        harm="a completion's logprobs hang on which rows stand beside it: padding is attended to, "
        "and ratios and rewards of short prompts are wrong",
        fix="give the attention kernel the padding mask: with FlashAttention pass attention_mask "
        "and left padding, or score rows one by one",
        confirm="score one of the rows alone: its logprobs change",
    ),
    Signature(
        cause="logits.batch-differs",
        fact="prompt-scores-differ",
        harm="the first token is drawn from other scores than the row alone would have",
        fix=FIXES["logits.batch-differs"],
        confirm="generate for one of the rows alone: its first token's scores change",
        certainty=0.8,
    ),
    Signature(
        cause="logits.cache-differs",
        fact="cache-differs",
        harm=f"what is sampled is not what is scored: {_RATIO}",
        fix="generate with a cache that keeps everything: no sliding window, no "
        "cache_implementation of its own, no quantised cache",
        confirm="the same rollout with use_cache=False has other logprobs",
    ),
    Signature(
        cause="logits.low-precision",
        fact="coarse-logprobs",
        harm="the ratio of two passes over one rollout is noise of the size of a clip range, and "
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


_COMPLETION = (
    Signature(
        cause="gen.checkpointing-train",
        fact="history-lost",
        harm="in transformers 4.53 to 5.23 a block in train mode with gradient checkpointing on "
        "drops the key-value cache, while generate goes on feeding one token at a time: "
        "completions are a chain in which each token follows from the last one alone, and the "
        "scoring forward, which is right, gives nothing away",
        fix=FIXES["gen.checkpointing-train"],
        confirm="generate greedily in eval mode: the garbage is gone "
        "(omni-grpo doctor --experiments does it)",
        when=_checkpointing,
    ),
    Signature(
        cause="gen.history-lost",
        fact="history-lost",
        harm="each token follows from the last one alone: neither prompt nor media are seen",
        fix="keep the cache in generate (use_cache=True, the cache handed on), or feed the "
        "whole sequence at every step",
        confirm="generate greedily in eval mode with a cache, and compare",
        when=lambda e: not _checkpointing(e),
        certainty=0.9,
    ),
    Signature(
        cause="gen.return-sequences",
        fact="pixels-scrambled",
        harm="{tensor} has one row a patch, not one a sample: every copy sees a clip pieced "
        "together from other patches. Nothing is raised, and the format stays right",
        fix="repeat prompts and media G times before the processor (or copy per picture, by its "
        "grid), and leave num_return_sequences and repeat_interleave to tensors with one row a "
        "sample",
        confirm="answers to questions about motion fall to chance, those about sound do not",
    ),
    Signature(
        cause="gen.media-token",
        fact="media-token",
        harm="the scoring forward takes it for a placeholder that has no features: it raises, or "
        "shifts every feature after it by one",
        fix="pass suppress_tokens with every special id but the eos, and score with the same ids "
        "at -inf",
        confirm="no id of a placeholder is left among sampled ids",
    ),
    Signature(
        cause="gen.special-token",
        fact="special-token",
        harm="the policy learns to write turns and tags of the template; a later scoring forward "
        "or the next template call breaks on them",
        fix="pass suppress_tokens with every special id but the eos, and score with the same ids "
        "at -inf",
        confirm="no special id but the final eos is left among sampled ids",
        certainty=0.9,
    ),
    Signature(
        cause="gen.skip-special",
        fact="specials-stripped",
        harm="a completion that broke its structure with special tokens looks whole to rewards "
        "and in logs, and is rewarded",
        fix="decode with skip_special_tokens=False and cut the final eos by its id",
        confirm="texts handed to rewards spell the sampled ids",
    ),
    Signature(
        cause="gen.no-eos",
        fact="eos-unset",
        harm="every completion runs to the cap, behind the answer as well: time, and rewards for "
        "text that nobody asked for. A thinker's own config has no eos, and the model config's is "
        "no fallback",
        fix=FIXES["gen.no-eos"],
        confirm="completions end before the cap",
    ),
    Signature(
        cause="gen.single-eos",
        fact="eos-left-out",
        harm="a completion that ends with {left_out} goes on after its end, to the cap",
        fix="pass all of them: eos_token_id=[…, {left_out}]",
        confirm="no sampled id behind the first of them",
    ),
    Signature(
        cause="gen.group-order",
        fact="group-order",
        harm="each answer earns the reward for somebody else's question: accuracy is at chance, "
        "and groups mix questions",
        fix="repeat each prompt G times in a row (repeat_interleave, 1 1 2 2), not the whole list "
        "(tile, 1 2 1 2), or order completions back before scoring",
        confirm="reward the greedy answers: accuracy rises from chance",
    ),
    Signature(
        cause="gen.identical",
        fact="identical",
        harm="a group with one answer has no variance: advantages, loss and gradient are 0",
        fix="pass do_sample=True, and a temperature above 0: the checkpoint's generation config "
        "says otherwise",
        confirm="completions of a group differ",
        when=_greedy,
    ),
    Signature(
        cause="gen.identical",
        fact="identical",
        harm="a group with one answer has no variance: advantages, loss and gradient are 0",
        fix="give each completion of a group a random stream of its own: something seeds before "
        "every one of them",
        confirm="completions of a group differ",
        when=lambda e: not _greedy(e),
    ),
    Signature(
        cause="gen.cap",
        fact="all-capped",
        harm="no completion reaches its answer: structure and accuracy earn nothing, whatever the "
        "policy does",
        fix="raise the cap above {cap} tokens; whole answers of a good policy say how far",
        confirm="some completions end with an eos",
        certainty=0.7,
    ),
    Signature(
        cause="gen.temperature",
        fact="temperature-differs",
        harm=f"{_RATIO}, and the entropy that is pushed is not that of what is sampled",
        fix="divide the logits by the sampling temperature ({sampled:g}) before the log-softmax of "
        "the loss",
        confirm="logprobs of the loss equal generate's own",
    ),
    Signature(
        cause="gen.repetition-penalty",
        fact="truncated-sampling",
        harm=f"what was said already was made less likely in sampling only: {_RATIO}",
        fix="pass repetition_penalty=1.0 to generate; published generation configs carry one",
        confirm="logprobs of the loss equal those of the distribution that was sampled",
        when=_penalty,
    ),
    Signature(
        cause="gen.topk",
        fact="truncated-sampling",
        harm=f"the sampled distribution is cut and renormalised, the scored one is whole: {_RATIO}",
        fix="pass top_k=0, top_p=1.0 (and no min_p) to generate: its defaults, and the "
        "checkpoint's generation config, set others",
        confirm="logprobs of the loss equal those of the distribution that was sampled",
        when=lambda e: not _penalty(e),
    ),
    Signature(
        cause="gen.weights-stale",
        fact="other-weights",
        harm="answers come from another policy than the one that is trained: the loss takes them "
        "for its own, and learning drifts or stops",
        fix="hand the new weights to the rollout engine after every optimizer step, and check one "
        "logprob",
        confirm="generate's logprobs equal the scoring forward's",
    ),
    Signature(
        cause="gen.weights-stale",
        fact="scoring-disagrees",
        harm="the loss takes the answers of another policy, or of another input, for its own: the "
        "ratio is off on fresh samples already",
        fix=FIXES["gen.weights-stale"],
        confirm="omni-grpo doctor --experiments with the checkpoint shows which is wrong",
        when=lambda e: not e.values["blind"],
        certainty=0.5,
    ),
    Signature(
        cause="gen.weights-stale",
        fact="tokens-impossible",
        harm="what is sampled is not what is scored: the loss takes others' answers for its own",
        fix="see that generate runs on the weights that are trained, with its cache and its prompt",
        confirm="omni-grpo doctor --experiments scores the completions with and without their "
        "history",
        certainty=0.5,
    ),
    Signature(
        cause="gen.raised",
        fact="generate-raised",
        harm="there is no rollout",
        fix="mend what its input lacks; if nothing before is wrong: {error}",
        certainty=0.2,
    ),
)

RULES: tuple[Rule, ...] = (
    rule_of("causes_of_scores", _LOGITS),
    rule_of("causes_of_rollouts", _COMPLETION),
)
