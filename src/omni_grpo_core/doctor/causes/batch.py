"""Causes of faults in processor calls, embeddings, positions and the loaded model."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Case, Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_LAYOUT = (
    "tokens are laid out with the video's sound inside it and positions without, or the reverse: "
    "time positions are off by up to the length of the clip"
)


def _sound_cut(evidence: Evidence) -> bool:
    values = evidence.values
    heard = values.get("modality") == "audio" or "audio" in values.get("placeholders", ())
    return heard and bool(values.get("max_length"))


def _against_the_processor(case: Case, evidence: Evidence) -> str:
    """A flag is wrong where the processor's, which laid out the tokens, is known to be right."""
    return evidence.sentence if evidence.origin == "added" else ""


_BATCH = (
    Signature(
        cause="batch.flag-processor",
        fact="flag-differs",
        harm="sounds and placeholders no longer match: the track is computed and never heard, or "
        "the processor finds too few sounds and raises StopIteration",
        fix="pass use_audio_in_video={want} to the processor; " + FIXES["batch.flag-processor"],
        confirm="count the audio tokens of a row: {want} gives one run inside each video",
        when=lambda e: e.values["call"] == "processor",
    ),
    Signature(
        cause="batch.flag-generate",
        fact="flag-differs",
        harm=f"{_LAYOUT}; completions look right while their logits are off by several units",
        fix="pass use_audio_in_video={want} to generate, the same value as to the processor",
        confirm="greedy logits with and without the flag differ",
        when=lambda e: e.values["call"] == "generate",
        prove=_against_the_processor,
    ),
    Signature(
        cause="batch.flag-forward",
        fact="flag-differs",
        harm=f"{_LAYOUT}; the ratio to the sampling policy is wrong from the first step",
        fix="pass use_audio_in_video={want} to the scoring forward, the same value as to generate",
        confirm="on-policy ratios become 1",
        when=lambda e: e.values["call"] not in ("processor", "generate"),
        prove=_against_the_processor,
    ),
    Signature(
        cause="batch.silent-clip",
        fact="mute-beside-heard",
        harm="the clip without sound gets positions of plain text, and every later clip the grid "
        "and the rate of the one before it; from transformers 5.23 on no processor warns",
        fix="process clips without a track in a separate call, with audio-in-video off in "
        "processor, generate and forward; or fail on a clip that should have a track",
        confirm="positions of each row equal those of the row alone",
    ),
    Signature(
        cause="batch.track-owners",
        fact="tracks-unowned",
        harm="the processor raises: from transformers 5.23 on, a decoded track that no video "
        "claims counts as a separate recording, for which the text has no placeholder",
        fix="pass audio_from_video_indices: for each sound the index of its video in the call, "
        "None for a recording; or pass paths only, which needs torchcodec",
        confirm="each row has one run of audio tokens inside its video",
    ),
    Signature(
        cause="batch.audios-kwarg",
        fact="keyword-ignored",
        harm="no sound reaches the processor; it runs out of sounds for its placeholders and "
        "raises an empty StopIteration, or the model hears nothing",
        fix="pass audio= instead of audios=: the keyword was renamed",
        confirm="the processor's output has input_features",
        when=lambda e: e.values["keyword"] == "audios",
    ),
    Signature(
        cause="batch.unknown-kwarg",
        fact="keyword-ignored",
        harm="{keyword}={value} has no effect, and only a log line says so",
        fix="drop {keyword}=, or use the keyword that does it: the processor has none of this name",
        confirm="the call returns the same without it",
        when=lambda e: e.values["keyword"] != "audios",
    ),
    Signature(
        cause="batch.truncated-left",
        fact="prompt-cut",
        harm="the system message is gone, and where media tokens were cut, features no longer "
        "match them",
        fix="raise the prompt limit above {want} tokens, or lower fps or pixels; never truncate a "
        "prompt with media in it",
        confirm="the first tokens of the prompt are <|im_start|>system",
        when=lambda e: e.values["side"] == "left",
    ),
    Signature(
        cause="batch.truncated-right",
        fact="prompt-cut",
        harm="the question and the assistant's turn are gone, and where media tokens were cut, "
        "features no longer match them",
        fix="raise the prompt limit above {want} tokens, or lower fps or pixels; do not pass "
        "truncation=True",
        confirm="the prompt ends in <|im_start|>assistant",
        when=lambda e: e.values["side"] == "right",
    ),
    Signature(
        cause="batch.padding-side-config",
        fact="padded-right",
        harm="completions start after {pads} padding tokens: accuracy and format fall to a third",
        fix='set "padding_side": "left" in tokenizer_config.json: it overrides the processor\'s '
        "default",
        confirm="processor.tokenizer.padding_side is 'left'",
        when=lambda e: bool(e.values["config"]),
    ),
    Signature(
        cause="batch.right-padding",
        fact="padded-right",
        harm="completions start after {pads} padding tokens: accuracy and format fall to a third",
        fix=FIXES["batch.right-padding"],
        confirm="attention_mask[:, -1] is all ones",
        when=lambda e: not e.values["config"],
    ),
    Signature(
        cause="batch.mask-ignored",
        fact="mask-wrong",
        harm="padding is attended to, and positions count it: short rows give a different answer "
        "in a batch than alone",
        fix="pass on the processor's own attention_mask; do not rebuild it from shapes",
        confirm="attention_mask.sum(1) is the length of each prompt",
    ),
    Signature(
        cause="batch.double-expansion",
        fact="expanded-twice",
        harm="each expanded placeholder is taken for a media item: the processor raises, or the "
        "prompt is many times too long",
        fix="pass the prompt as the template rendered it, or the ids as they are; do not decode "
        "expanded ids and process them again",
        confirm="the text has one placeholder per media item",
    ),
    *(
        Signature(
            cause="batch.max-length-leak",
            fact=fact,
            harm="max_length={max_length} reached the audio extractor, which cuts every sound to "
            "that many samples ({max_length} / 16000 s)",
            fix="pass the text's limit as text_kwargs={{'max_length': …}}",
            confirm="feature_attention_mask.sum(-1) is 100 per second of sound",
            when=_sound_cut,
        )
        for fact in ("features-differ", "ids-differ")
    ),
    Signature(
        cause="batch.resized-again",
        fact="resized-again",
        harm="{times:.3g} times the tokens for the same picture: slow, out of memory, and a size "
        "that the checkpoint was not configured for",
        fix="pass do_resize=False: the reader has already resized, and the processor's default "
        "size overrides the checkpoint's",
        confirm="video_grid_thw * 14 is the size of the input frames",
    ),
    Signature(
        cause="batch.dtype",
        fact="dtype",
        harm="embedding look-ups and index operations need int64: some raise, others silently "
        "compare unequal",
        fix="keep {key} in torch.int64; a round trip through numpy or a collator made it {dtype}",
        confirm="print {key}.dtype before generate",
    ),
    Signature(
        cause="batch.grids-exchanged",
        fact="grids-exchanged",
        harm="patches of one item are cut as those of another: both are scrambled, and rows get "
        "parts of other rows' media",
        fix="keep {grid} and {pixels} of a row together through every sort, collate and split",
        confirm="{grid} of {call} is the processor's, in its order",
    ),
    Signature(
        cause="batch.feature-count",
        fact="features-and-tokens",
        harm="the first {tokens} of {features} features are used and all later ones shifted: rows "
        "get other rows' media, and nothing is raised",
        fix="pass one {modality} item per placeholder: {items} were passed",
        confirm="there are as many features as placeholder tokens",
        prove=only_fits,
    ),
    Signature(
        cause="batch.feature-count",
        fact="media-not-for-text",
        harm="the first features are used and all later ones shifted: rows hear other rows' "
        "sound, and for audio nothing is raised",
        fix="pass one {modality} item per placeholder: {given} were passed for {want}; do not let "
        "the reader extract the track of every video where sound is listed separately",
        confirm="the texts have as many {modality} placeholders as there are {modality} items",
    ),
)

_POLICY = (
    Signature(
        cause="policy.config-mismatch",
        fact="rope-sections-differ",
        harm="time, height and width rotate the wrong parts of every head: all logits are off, and "
        "nothing is raised",
        fix="set rope_parameters and rope_scaling in the checkpoint's text_config with "
        "mrope_section [{want}]: it was saved by another major version of transformers",
        confirm="after loading, model.config.get_text_config() has these sections",
    ),
)

_EMBEDDINGS = (
    Signature(
        cause="embed.not-injected",
        fact="features-not-injected",
        harm="the model gets the placeholder's own embedding: it sees and hears nothing",
        fix=FIXES["embed.not-injected"],
        confirm="swap the media of two samples: the logits do not move",
    ),
    Signature(
        cause="embed.misordered",
        fact="features-misordered",
        harm="rows get each other's {modality}, or a clip's moments are out of order",
        fix="put the features back in the order of the placeholders: undo the sort by length in "
        "the {modality} tower",
        confirm="with one {modality} item in the batch the embeddings are right",
    ),
)

_POSITIONS = (
    Signature(
        cause="pos.flag-scoring",
        fact="flag-missing",
        harm="scoring uses different time positions from sampling: logprobs are off by up to "
        "several units, and so is the ratio",
        fix="pass use_audio_in_video to the scoring forward too: the default is False",
        confirm="on-policy ratios become 1",
    ),
    Signature(
        cause="pos.stale-deltas",
        fact="steps-off",
        harm="completion tokens have positions at the wrong distance from their prompt",
        fix="set model.rope_deltas to None before each generate, or let generate compute positions "
        "itself",
        confirm="a batch gives the same output alone and after another batch",
    ),
    Signature(
        cause="pos.stale-deltas",
        fact="tail-shifted",
        harm="completion tokens have positions {shift} off from those used in sampling",
        fix="set model.rope_deltas to None before each forward that computes positions",
        confirm="a batch gives the same output alone and after another batch",
        prove=only_fits,
    ),
    Signature(
        cause="pos.collapsed-time",
        fact="time-collapsed",
        harm="all frames of a clip have the same time: motion and order are lost",
        fix=FIXES["pos.collapsed-time"],
        confirm="time positions of a clip's frames rise by 25 per second",
    ),
    Signature(
        cause="pos.expanded-wrong",
        fact="another-rows",
        harm="every row but the first has positions of another prompt",
        fix="compute positions row by row, and repeat each row's positions G times",
        confirm="rows of different length have different positions",
    ),
    Signature(
        cause="pos.no-mask",
        fact="one-dimensional",
        harm="the model falls back to positions of plain text, without time, height and width: "
        "logits are off by more than ten units",
        fix="pass attention_mask to every forward that computes positions",
        confirm="the three axes of position_ids differ inside a video",
        when=lambda e: not e.values["mask"],
    ),
)

TABLES = (_BATCH, _EMBEDDINGS, _POSITIONS)
RULES: tuple[Rule, ...] = (
    rule_of("causes_in_batches", _BATCH),
    rule_of("causes_in_the_loaded_model", _POLICY),
    rule_of("causes_in_embeddings", _EMBEDDINGS),
    rule_of("causes_in_positions", _POSITIONS),
)
