"""What each stage does, what a failure in it means and how to fix it: one text for each failure,
shared by ``check``, the training guard, goldens and the doctor."""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.types import MODALITIES

FIXES: Mapping[str, str] = {
    "text.no-generation-prompt": "pass add_generation_prompt=True to apply_chat_template",
    "text.media-dropped": "render with the omni processor's chat template, not the tokenizer's, "
    "and pass content as a list of parts",
    "text.template-drift": "use the chat template of the checkpoint that you train, unchanged",
    "media.blank": "raise an error when decoding fails instead of returning empty frames; use "
    "another decoder (PyAV needs no hardware)",
    "media.silent": "raise an error when reading audio fails instead of returning zeros",
    "batch.right-padding": "pad prompts on the left: padding_side='left' in the processor call",
    "batch.flag-processor": "decide it once per sample and pass the same value to the processor, "
    "generate and every forward",
    "embed.not-injected": "let the model merge the towers' features (call it with input_ids and "
    "the media), or scatter them over the placeholders before passing inputs_embeds",
    "pos.collapsed-time": "keep seconds per grid as floats (video_second_per_grid = 2 / fps), not "
    "as integers",
    "logits.batch-differs": "pass the padding mask to the attention kernel, in generate and in "
    "scoring",
    "gen.checkpointing-train": "call model.eval() and disable gradient checkpointing around "
    "generate, and restore both afterwards; use_cache=False helps too but is slow",
    "gen.no-eos": "pass eos_token_id (all ids that end a turn) and pad_token_id to generate",
    "gen.weights-stale": "send the new weights to the rollout engine after every step; give the "
    "scoring forward the same media, flags and mask as generate",
    "adv.zero-variance": "check the reward weights (a name that matches no function has weight 0) "
    "and the group size (a single completion has nothing to be compared with), and raise the "
    "temperature until completions differ",
    "step.nan-gradient": "look for 0 times infinity behind a mask: replace -inf before the "
    "multiplication, not after it (masked_fill first, torch.where on both sides)",
}
"""What to change, by cause in the doctor's catalogue, for failures that others find too. The doctor
adds what it knows from a recording."""


_SAME_MEDIA = (
    "what the rollout engine is sent or does with it differs from the batch: build its requests "
    "from the same decoded media, with the processor's resizing off and one audio-in-video decision"
)
_OTHER_LOGPROBS = "the trainer would learn from logprobs that are not those of what it scores: "
_OTHER_PROMPTS = (
    "completions would be scored, paid and learned under other prompts than their own: "
)
_GARBAGE = (
    "generation is broken (mode, cache, prompt or weights): "
    f"{FIXES['gen.checkpointing-train']}; if that is done already, check that weights, config and "
    "chat template belong together"
)
_DISAGREE = (
    "sampling and scoring differ in temperature, mask, positions, cache or weights: "
    + FIXES["gen.weights-stale"]
)
_FLOOR = (
    "a reward that pays the same whatever the completion says carries no signal: see what it "
    "measures (omni-grpo rewards test), and pay nothing by default"
)
BY_ENGINE: Mapping[tuple[str, str], str] = {
    **{
        ("media", f"{modality} {what} the engine"): _SAME_MEDIA
        for modality in MODALITIES
        for what in ("reaches", "has the batch's content in")
    },
    **{
        ("media", f"{modality} stays with its row"): "media of one row are sent with another's "
        "text: keep each row's media and text together in its request"
        for modality in MODALITIES
    },
    ("media", "media are sent once"): "the engine is shown more media than the batch has: list "
    "each file once, in the text and in the request",
    ("batch", "media have the batch's size in the engine"): _SAME_MEDIA,
    ("batch", "the engine interleaves as the batch does"): _SAME_MEDIA,
    ("batch", "placeholders are expanded once"): "the engine was sent ids whose placeholders are "
    "expanded already, and expanded them again: send it the rendered text, or its unexpanded ids",
    ("text", "the engine reads the batch's text"): "the engine renders or tokenises by itself: "
    "send it the text that the batch was made from",
    (
        "policy",
        "the engine has the trainer's weights",
    ): "completions would come from another policy "
    "than the one that is updated: " + FIXES["gen.weights-stale"],
    ("policy", "the adapter is applied in the engine"): "the engine samples from the base model: "
    "merge the adapter into the weights that are sent, or send and name the adapter",
    ("positions", "the engine places media as the batch does"): "the engine computes positions by "
    "itself: hand over grids, audio-in-video and the seconds of each clip's temporal patch",
    ("logits", "the engine scores as the trainer does"): "the weights amplify rounding beyond what "
    "is allowed: look for a learning rate that is too high, or adapters that have grown large",
    ("logits", "logprobs are finite"): "no loss can be computed from them: look for weights that "
    "are not finite, or for logits that overflow in the precision of the engine",
    ("completion", "logprobs are at the sampling temperature"): _OTHER_LOGPROBS
    + "take them after temperature and masks",
    ("completion", "the engine draws from the allowed ids"): _OTHER_LOGPROBS
    + "send the allowed ids, and take logprobs after the others are masked",
    ("completion", "the engine samples from the whole distribution"): _OTHER_LOGPROBS
    + "sample without the top-k, top-p, min-p or penalty of a generation config",
    ("completion", "tokens are drawn as their logprobs say"): _OTHER_LOGPROBS
    + "give the engine the run's temperature, and no penalty or logits processor of its own",
    ("completion", "no token is penalised"): _OTHER_LOGPROBS
    + "set repetition, presence and frequency penalties to none",
    ("completion", "logprobs are those of the drawn tokens"): _OTHER_LOGPROBS
    + "take the natural logarithm of each drawn token's probability, in the order of the tokens",
    (
        "completion",
        "a group's completions are drawn apart",
    ): "copies of one completion have nothing "
    "to be compared with: give each of a group's completions random numbers of its own",
    ("completion", "completions end where and as they say"): "what the loss counts would not be "
    "what was sampled: return raw ids with the eos, one logprob for each, and the finish reason",
    ("completion", "answers belong to their prompts"): _OTHER_PROMPTS
    + "keep every answer with its request, in whatever order they finish",
    ("completion", "a group's completions are adjacent"): _OTHER_PROMPTS
    + "flatten prompt by prompt, 1 1 2 2",
}
"""Of the proof that a rollout engine agrees with the trainer."""
ADVICE: Mapping[tuple[str, str], str] = {
    ("conversation", "media all shown"): "a media item of the sample is missing from its messages: "
    "list each file once, or choose another mode with --audio-in-video",
    ("text", "one placeholder per medium"): "media without a placeholder are not seen or heard: "
    + FIXES["text.media-dropped"],
    ("text", "equals reference rendering"): "the chat template does not write the ChatML that the "
    "model was trained on: " + FIXES["text.template-drift"],
    ("text", "generation prompt"): "the prompt does not end in the assistant's turn, so the model "
    "continues as the user: " + FIXES["text.no-generation-prompt"],
    ("media", "pictures not blank"): "every picture is a single colour, because the decoder "
    "returns empty frames or the files hold nothing else: " + FIXES["media.blank"],
    ("media", "sounds not silent"): "every sound is silent, because the reader returns zeros or "
    "the files hold nothing else: " + FIXES["media.silent"],
    ("batch", "prompts == samples"): "prompts were dropped or mixed up on the way to the "
    "processor: keep each sample's text and media together until the processor call",
    ("batch", "placeholders == features"): "the prompt was truncated, or media were lost or "
    "duplicated on the way to the processor: raise the prompt limit, or lower fps or pixels, and "
    "pass one media item for each placeholder",
    ("batch", "sampled frame rate passed on"): "the processor was not given the frame rate that "
    "was actually sampled, so a video's time positions are wrong: pass it as fps, one number, not "
    "a list",
    ("batch", "left padding"): "rows are padded on the right, so the model continues from padding: "
    + FIXES["batch.right-padding"],
    ("batch", "audio-in-video as decided"): "the processor was called with a different "
    "audio-in-video flag from the sample's own: " + FIXES["batch.flag-processor"],
    ("embeddings", "placeholders hold tower features"): "the model never sees or hears the media: "
    + FIXES["embed.not-injected"],
    ("embeddings", "equal transformers' forward, row by row"): "features are in a different order "
    "or at different places from transformers' own: put them in the order of the placeholders",
    ("positions", "equal transformers' own, row by row"): "positions were computed with another "
    "audio-in-video flag, mask, grid or frame rate: pass attention_mask and use_audio_in_video to "
    "every forward that computes them",
    ("positions", "video time true to the clip"): "time positions belong to another frame rate: "
    + FIXES["pos.collapsed-time"],
    ("logits", "row in the batch = row alone in transformers"): "padding, mask or positions of the "
    "batch change its rows: " + FIXES["logits.batch-differs"],
    ("completion", "greedy not degenerate"): _GARBAGE,
    ("completion", "garbage"): _GARBAGE,
    ("completion", "generation in train mode under checkpointing"): "transformers (4.53 to 5.23; "
    "later ones with gradients enabled) drops the key-value cache in every block, so from the "
    "second token on the model sees neither prompt nor history: "
    + FIXES["gen.checkpointing-train"],
    ("completion", "greedy completions end"): "eos is ignored, or max_new_tokens is too low: "
    + FIXES["gen.no-eos"],
    ("completion", "logprobs: sampling with cache = scoring without"): _DISAGREE,
    ("logits", "sampling and scoring disagree"): _DISAGREE,
    **BY_ENGINE,
    ("reward", "garbage earns nothing"): _FLOOR,
    ("reward", "constant"): _FLOOR,
    ("reward", "pinned"): _FLOOR,
    ("reward", "zero-variance"): "a group whose completions all earn the same teaches nothing: "
    + FIXES["adv.zero-variance"],
    ("reward", "capped"): "no completion gets as far as its answer: raise max_new_tokens, or "
    + FIXES["gen.no-eos"],
    ("reward", "format-zero"): "no completion has the structure that the system prompt asks for: "
    "use the checkpoint's own system prompt, and read the completions",
    ("reward", "never-scored"): "a reward that scores nothing changes nothing: reproduce the "
    "failure with omni-grpo rewards test",
    ("reward", "not-a-number"): "one NaN makes the advantages of its whole group NaN: find the "
    "division by zero, and return None where there is nothing to score",
    (
        "loss",
        "not a number",
    ): "the update would be NaN: find the token whose logprob is not finite: "
    "ids suppressed in scoring must be suppressed in sampling too",
    ("gradient", "not a number"): "the step would make weights NaN although the loss looks fine: "
    + FIXES["step.nan-gradient"],
}
"""What a failure means and what to change, by stage and name of a check or a guard finding."""


STAGE_SUMMARY: Mapping[str, str] = {
    "sample": "rows of the data set are read",
    "conversation": "messages are built, and each video's audio is interleaved, separate or off",
    "text": "the checkpoint's chat template renders the prompt",
    "media": "files are decoded into frames and 16 kHz audio",
    "batch": "the processor turns text and media into token ids and features",
    "embeddings": "the towers' features replace the placeholder tokens",
    "positions": "every token gets a time, a height and a width",
    "logits": "the model scores the token that follows the prompt",
    "completion": "the model generates completions, greedy and sampled",
    "parsed": "completions are split into context, think and answer",
    "reward": "completions are scored",
    "advantage": "scores are compared within each group",
    "loss": "advantages and logprobs become one number",
    "gradient": "the loss gives the direction in which each weight should move",
}
"""What each stage does."""
_WHERE_TO_LOOK: Mapping[str, str] = {
    "sample": "fix the rows named: unique ids, files that exist, gold answers in <answer> tags",
    "conversation": "list each file once, or choose another mode with --audio-in-video",
    "text": "render the same text in training and in use: " + FIXES["text.template-drift"],
    "media": "play the file named, and check the frame rate and pixel limits in the settings",
    "batch": "use the processor files that came with the checkpoint and a supported version of "
    "transformers; look at the samples' tokens",
    "embeddings": "check the version of transformers, and that config and weights belong together",
    "positions": "use one audio-in-video mode and the frame rate that was actually sampled in "
    "every stage; check the version of transformers",
    "logits": "check left padding, attention mask and position ids; if scores are not finite, "
    "try float32",
    "completion": "generate in eval mode with gradient checkpointing off, the cache on and eos ids "
    "set, with weights trained for this task; then read the completions",
    "parsed": "look at the place marked in each completion, and check the completion stage",
    "reward": "read the reasons given for each sample",
    "advantage": "check that groups are formed by sample id and that rewards vary within them",
    "loss": "check the completion mask, the shift by one token and the logprobs' temperature",
    "gradient": "check which weights are frozen, and that the loss is not detached from the model",
}
"""Where to look first when a stage fails in something that has no :data:`ADVICE` of its own."""
LOST = (
    "the {} is lost between file and text model: follow it through the samples (file, features, "
    "tokens), and check that every stage receives it"
)
"""For a modality that does not reach the model."""


def advice(stage: str, failure: str = "") -> str:
    """What a failure means and what to do about it. ``failure``: name of a check or a guard
    finding; without one, where to look first.

    >>> advice("text", "generation prompt").partition(": ")[2]
    'pass add_generation_prompt=True to apply_chat_template'
    """
    found = ADVICE.get((stage, failure)) or _WHERE_TO_LOOK.get(stage)
    return found or "read the detail of the failed check"
