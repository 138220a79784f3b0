"""Causes of what breaks between two calls.

Both ends of an edge were recorded, so that what happened is itself observed; these are the stories
of what does it. A change of values without one is named by what reproduces it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from omni_grpo_core.doctor.evidence import Case, Evidence, Explanation, Rule
from omni_grpo_core.doctor.signatures import Signature, rule_of

_ANOTHER_S = (
    "each question is asked about another row's {modality}, or answered in another row's place: "
    "what is learned from it is noise, and nothing is raised"
)
_KEEP_TOGETHER = (
    "keep all tensors of a row together: index ids, mask, pixels, grids and sounds by the same row "
    "order, pixels by whole grids, or collate rows only once"
)
_CUT = "where media tokens were cut, features no longer match them; the rest is out of context"
_UNMASKED = "pass the attention mask that belongs to these ids to every forward, padding at 0"


def rule_not_passed(case: Case, evidence: Sequence[Evidence]) -> Iterator[Explanation]:
    """One lost modality, or all but images."""
    lost = [e for e in evidence if e.fact == "edge-media-dropped"]
    if not lost:
        return
    kinds = sorted({str(kind) for e in lost for kind in e.values["lost"]})
    calls = sorted({str(e.values["call"]) for e in lost})
    # images that got lost in another way are none that were passed
    images = any(e.values.get("modality") == "image" and e.fact.startswith("edge-media")
                 for e in evidence)  # fmt: skip
    both = {"video", "audio"} <= set(kinds) and not images
    yield Explanation(
        cause="media.images-only" if both else f"media.{lost[0].values['modality']}-dropped",
        stage="media",
        seen=f"{' and '.join(kinds)} made by the processor, not passed to {' and '.join(calls)}",
        harm="its placeholders keep their raw embeddings: the model answers without it, nothing is "
        "raised",
        fix="pass everything that the processor returns to the model, model(**inputs), instead of "
        "a list of names written for images",
        confirm="swap the media of two samples: the logprobs do not move",
        proof=lost[0].sentence,
        explains=tuple(lost),
    )


def _flag_left_out(evidence: Evidence) -> bool:
    generate, forward = evidence.values["flags"]
    return bool(generate) and forward is None


_TABLE = (
    Signature(
        cause="batch.rows-exchanged",
        fact="edge-order",
        harm="completions answer other prompts than those they are rewarded with and grouped by",
        fix=_KEEP_TOGETHER,
        confirm="decode the prompt of each generated row: it is the row's own",
    ),
    *(
        Signature(
            cause=cause,
            fact="edge-media-exchanged",
            harm=_ANOTHER_S,
            fix=_KEEP_TOGETHER,
            confirm="compare each row's pixels with those of the row processed alone",
            when=lambda e, stage=stage: e.stage == stage,  # type: ignore[misc]
        )
        for cause, stage in (
            ("batch.rows-exchanged", "batch"),
            ("media.exchanged-in-scoring", "media"),
        )
    ),
    *(
        Signature(
            cause=cause,
            fact=fact,
            harm="questions of this step are asked about what an earlier one was shown",
            fix="build the inputs of every step from that step's own processor output; a cache or "
            "an attribute keeps {of}'s",
            confirm="the inputs of two steps in a row differ",
            when=lambda e, stage=stage: e.stage == stage,  # type: ignore[misc]
        )
        for fact in ("edge-stale", "edge-media-stale")
        for cause, stage in (("batch.stale", "batch"), ("media.stale-in-scoring", "media"))
    ),
    *(
        Signature(
            cause=cause,
            fact=fact,
            harm=_CUT,
            fix="raise the limit above {want} tokens, or lower fps or pixels; never truncate rows "
            "with media in them",
            confirm="ids keep their number from the processor to the loss",
            when=lambda e, side=side: e.values["side"] == side,  # type: ignore[misc]
        )
        for fact, prefix in (("edge-cut", "batch"), ("edge-scored-cut", "logits"))
        for side in ("left", "right")
        for cause in (f"{prefix}.truncated-{side}",)
    ),
    *(
        Signature(
            cause="batch.seconds",
            fact=fact,
            harm="the clip seems to play at another speed: time positions of all frames are off",
            fix="pass on the processor's own seconds between frames",
            confirm="time positions of a clip's frames rise by its real seconds",
        )
        for fact in ("seconds-changed", "edge-seconds")
    ),
    Signature(
        cause="batch.mask-ignored",
        fact="edge-mask",
        harm="padding is attended to, and positions count it: short rows give a different answer "
        "in a batch than alone",
        fix=_UNMASKED,
        confirm="attention_mask.sum(1) is the length of each prompt",
    ),
    Signature(
        cause="pos.no-mask",
        fact="edge-scored-mask",
        harm="padding is attended to, and positions count it: scores are not those of sampling",
        fix=_UNMASKED,
        confirm="on-policy ratios become 1",
        when=lambda e: e.stage == "positions",
    ),
    Signature(
        cause="logits.mask-ignored",
        fact="edge-scored-mask",
        harm="padding is attended to, and positions count it: scores are not those of sampling",
        fix=_UNMASKED,
        confirm="on-policy ratios become 1",
        when=lambda e: e.stage == "logits",
    ),
    Signature(
        cause="pos.no-mask",
        fact="edge-positions",
        harm="the model falls back to positions of plain text, without time, height and width: "
        "logits are off by more than ten units",
        fix="pass attention_mask to every forward that computes positions",
        confirm="on-policy ratios become 1",
        when=lambda e: not e.values["mask"],
    ),
    Signature(
        cause="pos.flag-scoring",
        fact="edge-positions",
        harm="scoring uses different time positions from sampling: logprobs are off by up to "
        "several units, and so is the ratio",
        fix="pass use_audio_in_video to the scoring forward too: the default is False",
        confirm="on-policy ratios become 1",
        when=_flag_left_out,
    ),
    Signature(
        cause="gen.group-order",
        fact="edge-group-order",
        harm="answers are compared with other prompts' gold, and groups hold several prompts",
        fix="repeat prompts and columns alike: 1 1 2 2 (repeat_interleave), not 1 2 1 2 (repeat)",
        confirm="the gold passed with each completion belongs to its own question",
    ),
    *(
        Signature(
            cause="reward.by-position",
            fact=fact,
            harm="answers are compared with another row's gold: accuracy is at chance, and looks "
            "like a policy that does not learn",
            fix="carry each completion's prompt and columns with it through every sort, filter and "
            "gather; look them up by sample id, not by position",
            confirm="the prompt and gold passed with each completion are its own",
        )
        for fact in ("edge-columns", "edge-arguments")
    ),
    Signature(
        cause="reward.prompt-inside",
        fact="edge-prompt-inside",
        harm="the reward finds its tags, options and examples in the question: it can be earned "
        "without answering",
        fix="pass only what follows the prompt: sequences[:, prompt_length:], decoded",
        confirm="print one argument of {name}: it begins with the answer",
    ),
    Signature(
        cause="reward.stale",
        fact="edge-text-stale",
        harm="completions are rewarded that are not the ones being trained on",
        fix="pass the texts of this rollout; clear the list that collects them",
        confirm="print one argument of {name} beside the decoded completion",
    ),
    Signature(
        cause="gen.text-cut",
        fact="edge-text-cut",
        harm="the reward never sees the end of an answer: whatever comes after {characters} "
        "characters earns nothing",
        fix="pass completions whole to rewards; cut only what is logged",
        confirm="the longest argument is as long as the longest completion",
    ),
    Signature(
        cause="gen.text-cut",
        fact="edge-text-begin",
        harm="a format that must begin with its first tag is never paid, however well the policy "
        "answers",
        fix="decode sequences[:, prompt_length:], no later: the prompt's length is that of "
        "input_ids, padding included",
        confirm="the decoded text begins with the first sampled token",
    ),
    Signature(
        cause="gen.text-unmarked",
        fact="edge-text-unmarked",
        harm="reward {name} looks for what was taken out of its texts: no answer is ever paid",
        fix="pass completions as they were decoded; let each reward find its own part",
        confirm="a right answer in the form that the prompt asks for is paid",
    ),
    Signature(
        cause="gen.text-case",
        fact="edge-text-case",
        harm="tags and golds are in the letters that the data has: what compares them pays nothing",
        fix="pass the completions as they were decoded; a reward may change letters itself",
        confirm="the text that a reward gets equals the tokenizer's decode",
    ),
    Signature(
        cause="gen.other-tokenizer",
        fact="edge-text",
        harm="rewards judge a text that the policy did not write",
        fix="decode with the checkpoint's own tokenizer, the ids that were sampled and no others",
        confirm="processor.tokenizer.decode of the sampled ids is the text that rewards get",
        prove=lambda case, e: e.sentence if e.values["by_another"] else "",
    ),
)

TABLES = (_TABLE,)
RULES: tuple[Rule, ...] = (rule_not_passed, rule_of("causes_between_calls", _TABLE))
