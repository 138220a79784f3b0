"""Causes of what is wrong with processor calls, embeddings, positions and the loaded model."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_LAID = (
    "tokens are laid out for one way of hearing the video and positions for the other: time "
    "positions are off by up to the length of the clip"
)


def _sound_cut(evidence: Evidence) -> bool:
    values = evidence.values
    heard = values.get("modality") == "audio" or "audio" in values.get("placeholders", ())
    return heard and bool(values.get("max_length"))


_BATCH = (
    Signature(
        cause="batch.flag-processor",
        fact="flag-differs",
        harm="sounds and placeholders no longer belong together: the track is computed and never "
        "heard, or the processor finds too few sounds and raises StopIteration",
        fix="pass use_audio_in_video={want} to the processor; " + FIXES["batch.flag-processor"],
        confirm="count the audio tokens of a row: {want} gives one run inside each video",
        when=lambda e: e.values["call"] == "processor",
    ),
    Signature(
        cause="batch.flag-generate",
        fact="flag-differs",
        harm=f"{_LAID}; answers look right while their logits are off by several units",
        fix="pass use_audio_in_video={want} to generate, as to the processor",
        confirm="greedy logits with and without the flag differ",
        when=lambda e: e.values["call"] == "generate",
    ),
    Signature(
        cause="batch.flag-forward",
        fact="flag-differs",
        harm=f"{_LAID}; the ratio to the sampling policy is wrong from the first step",
        fix="pass use_audio_in_video={want} to the scoring forward, as to generate",
        confirm="on-policy ratios become 1 with it",
        when=lambda e: e.values["call"] not in ("processor", "generate"),
    ),
    Signature(
        cause="batch.silent-clip",
        fact="mute-beside-heard",
        harm="the clip without sound gets positions of plain text, and every later clip the grid "
        "and the rate of the one before it; no processor from 5.23 on says a word",
        fix="give clips without a track a call of their own, with audio-in-video off in processor, "
        "generate and forward; or fail on a clip that should have one",
        confirm="positions of each row are those of the row alone",
    ),
    Signature(
        cause="batch.track-owners",
        fact="tracks-unowned",
        harm="the run ends in the processor: from transformers 5.23 on a decoded track that nobody "
        "claims counts as a recording, which the text has no place for",
        fix="pass audio_from_video_indices: for each sound the number of its video in the call, "
        "None for a recording; or hand over paths alone, which takes torchcodec",
        confirm="each row has one run of audio tokens inside its video",
    ),
    Signature(
        cause="batch.audios-kwarg",
        fact="keyword-ignored",
        harm="no sound reaches the processor; it runs out of sounds for its placeholders and "
        "raises an empty StopIteration, or the model hears nothing",
        fix="write audio= for audios=: the keyword changed its name",
        confirm="the processor's output has input_features",
        when=lambda e: e.values["keyword"] == "audios",
    ),
    Signature(
        cause="batch.unknown-kwarg",
        fact="keyword-ignored",
        harm="what was asked for with {keyword}={value} is not in force, and only a log line says "
        "so",
        fix="drop {keyword}=, or use what does it: no part of the processor knows the name",
        confirm="the call gives the same without it",
        when=lambda e: e.values["keyword"] != "audios",
    ),
    Signature(
        cause="batch.truncated-left",
        fact="prompt-cut",
        harm="the system message is gone, and where media tokens were cut the features no longer "
        "fit them",
        fix="raise the prompt limit above {want} tokens, or lower fps or pixels; never cut a "
        "prompt with media in it",
        confirm="the first tokens of the prompt are <|im_start|>system",
        when=lambda e: e.values["side"] == "left",
    ),
    Signature(
        cause="batch.truncated-right",
        fact="prompt-cut",
        harm="the question and the turn of the assistant are gone, and where media tokens were cut "
        "the features no longer fit them",
        fix="raise the prompt limit above {want} tokens, or lower fps or pixels; do not pass "
        "truncation=True",
        confirm="the prompt ends in <|im_start|>assistant",
        when=lambda e: e.values["side"] == "right",
    ),
    Signature(
        cause="batch.padding-side-config",
        fact="padded-right",
        harm="completions start behind {pads} padding tokens: accuracy and format fall to a third",
        fix='set "padding_side": "left" in tokenizer_config.json: it overrides the processor\'s '
        "default",
        confirm="processor.tokenizer.padding_side is 'left'",
        when=lambda e: bool(e.values["config"]),
    ),
    Signature(
        cause="batch.right-padding",
        fact="padded-right",
        harm="completions start behind {pads} padding tokens: accuracy and format fall to a third",
        fix=FIXES["batch.right-padding"],
        confirm="attention_mask[:, -1] is all ones",
        when=lambda e: not e.values["config"],
    ),
    Signature(
        cause="batch.mask-ignored",
        fact="mask-wrong",
        harm="padding is attended to, and positions count it: short rows of a batch answer "
        "otherwise than alone",
        fix="hand the processor's own attention_mask on; make none from shapes",
        confirm="attention_mask.sum(1) is each prompt's own length",
    ),
    Signature(
        cause="batch.double-expansion",
        fact="expanded-twice",
        harm="each of the placeholders asks for a medium of its own: the processor raises, or the "
        "prompt is many times too long",
        fix="send the prompt as the template rendered it, or the ids as they are; do not decode "
        "expanded ids and process them again",
        confirm="the text has one placeholder for each medium",
    ),
    *(
        Signature(
            cause="batch.max-length-leak",
            fact=fact,
            harm="max_length={max_length} reached the audio extractor, which cuts every sound to "
            "that many samples ({max_length} / 16000 s)",
            fix="put the text's limit into text_kwargs={{'max_length': …}}",
            confirm="feature_attention_mask.sum(-1) is 100 a second of sound",
            when=_sound_cut,
        )
        for fact in ("features-differ", "ids-differ")
    ),
    Signature(
        cause="batch.resized-again",
        fact="resized-again",
        harm="{times:.3g} times the tokens for the same picture: slow, out of memory, and a size "
        "that the checkpoint was not set up for",
        fix="pass do_resize=False: the reader has resized already, and the processor's own default "
        "size overrides the checkpoint's",
        confirm="video_grid_thw * 14 is the size of the frames that went in",
    ),
    Signature(
        cause="batch.dtype",
        fact="dtype",
        harm="embedding look-ups and index operations want int64: some raise, others compare "
        "unequal in silence",
        fix="keep {key} in torch.int64; a detour through numpy or a collator narrows it to {dtype}",
        confirm="print {key}.dtype before generate",
    ),
    Signature(
        cause="batch.feature-count",
        fact="features-and-tokens",
        harm="the first {tokens} of {features} features are taken, everything after is shifted: "
        "rows hear other rows' sound, and nothing is raised",
        fix="hand over one {modality} for each placeholder: {items} came",
        confirm="features and placeholders have one number each",
        certainty=0.6,
    ),
    Signature(
        cause="batch.feature-count",
        fact="media-not-for-text",
        harm="the first features are taken, everything after is shifted: rows hear other rows' "
        "sound, and for audio nothing is raised",
        fix="hand over one {modality} for each placeholder: {given} came for {want}; a reader that "
        "takes the track out of every video must not, where sound is listed on its own",
        confirm="as many {modality} items as {modality} placeholders in the texts",
    ),
)

_POLICY = (
    Signature(
        cause="policy.config-mismatch",
        fact="rope-sections-differ",
        harm="time, height and width rotate the wrong parts of every head: all logits are off, and "
        "nothing is raised",
        fix="write rope_parameters and rope_scaling into the checkpoint's text_config with "
        "mrope_section [{want}]: it was saved by another major version of transformers",
        confirm="model.config.get_text_config() shows the sections after loading",
    ),
)

_EMBEDDINGS = (
    Signature(
        cause="embed.not-injected",
        fact="features-not-injected",
        harm="the model sees the placeholder's own embedding: it is blind and deaf, and guesses",
        fix=FIXES["embed.not-injected"],
        confirm="swap the media of two samples: the logits do not move",
    ),
    Signature(
        cause="embed.misordered",
        fact="features-misordered",
        harm="rows get each other's {modality}, or a clip its moments in another order",
        fix="put the features back into the order of the placeholders: undo what sorts by length "
        "in the {modality} tower",
        confirm="with one {modality} in the batch the embeddings are right",
    ),
)

_POSITIONS = (
    Signature(
        cause="pos.flag-scoring",
        fact="flag-missing",
        harm="scoring sees other time positions than sampling did: logprobs are off by up to "
        "several units, and the ratio with them",
        fix="pass use_audio_in_video to the scoring forward too: left out, it means False",
        confirm="on-policy ratios become 1 with it",
    ),
    Signature(
        cause="pos.stale-deltas",
        fact="steps-off",
        harm="the answer's tokens stand at the wrong distance from its prompt",
        fix="set model.rope_deltas to None before each generate, or let generate compute positions "
        "itself",
        confirm="a batch gives the same alone and after another one",
    ),
    Signature(
        cause="pos.stale-deltas",
        fact="tail-shifted",
        harm="the answer's tokens stand {shift} away from where sampling put them",
        fix="set model.rope_deltas to None before each forward that computes positions",
        confirm="a batch gives the same alone and after another one",
        certainty=0.8,
    ),
    Signature(
        cause="pos.collapsed-time",
        fact="time-collapsed",
        harm="all frames of a clip happen at once: motion and order cannot be told",
        fix=FIXES["pos.collapsed-time"],
        confirm="time positions of a clip's frames rise by 25 a second",
    ),
    Signature(
        cause="pos.expanded-wrong",
        fact="another-rows",
        harm="every row but the first has positions of another prompt",
        fix="compute positions row by row, and repeat each row's own G times",
        confirm="rows of other length have other positions",
    ),
    Signature(
        cause="pos.no-mask",
        fact="one-dimensional",
        harm="the model falls back to positions of plain text, without time, height and width: "
        "logits are off by more than ten units",
        fix="pass attention_mask to every forward that is to compute positions",
        confirm="position_ids have three different axes inside a video",
        when=lambda e: not e.values["mask"],
    ),
)

RULES: tuple[Rule, ...] = (
    rule_of("causes_in_batches", _BATCH),
    rule_of("causes_in_the_loaded_model", _POLICY),
    rule_of("causes_in_embeddings", _EMBEDDINGS),
    rule_of("causes_in_positions", _POSITIONS),
)
