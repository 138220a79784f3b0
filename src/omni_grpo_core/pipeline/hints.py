"""What a stage does, what a failure in it means and what to do about it: one text for each failure,
whether ``check``, a training's guard, a golden or the doctor finds it."""

from __future__ import annotations

from collections.abc import Mapping

FIXES: Mapping[str, str] = {
    "text.no-generation-prompt": "pass add_generation_prompt=True to apply_chat_template",
    "text.media-dropped": "render with the omni processor's own chat template, not with the "
    "tokenizer's, and pass content as a list of parts",
    "text.template-drift": "take the chat template of the checkpoint that you train, unchanged",
    "media.blank": "let the decoder's failure be an error; decode with another one (PyAV needs no "
    "hardware)",
    "media.silent": "let the audio reader's failure be an error instead of zeros",
    "batch.right-padding": "pad prompts on the left: padding_side='left' in the processor call",
    "batch.flag-processor": "decide it once a sample and hand the same value to processor, "
    "generate and every forward",
    "embed.not-injected": "let the model merge the towers' features (call it with input_ids and "
    "the media), or scatter them over the placeholders before passing inputs_embeds",
    "pos.collapsed-time": "keep seconds per grid as floats (video_second_per_grid = 2 / fps), not "
    "as integers",
    "logits.batch-differs": "give the attention kernel the padding mask, in generate and in "
    "scoring",
    "gen.checkpointing-train": "call model.eval() and switch gradient checkpointing off around "
    "generate, and restore both after it; use_cache=False helps as well but is slow",
    "gen.no-eos": "pass eos_token_id (all ids that end a turn) and pad_token_id to generate",
    "gen.weights-stale": "hand the new weights to the rollout engine after every step; give the "
    "scoring forward the same media, flags and mask as generate",
    "adv.zero-variance": "look at reward weights (a name that matches no function weighs 0), at "
    "the group size (one completion has no group), and raise the temperature until answers differ",
    "loss.not-finite": "find the token whose logprob is not finite: suppressed ids must be "
    "suppressed in sampling as well",
    "step.nan-gradient": "look for 0 times infinity behind a mask: replace -inf before it is "
    "multiplied, not after (masked_fill before, torch.where on both sides)",
}
"""What to change, by cause of the doctor's catalogue, for failures that others find too. The doctor
adds what a recording knows besides."""


_GARBAGE = (
    "the policy, as it generates, is broken (mode, cache, prompt or weights): "
    f"{FIXES['gen.checkpointing-train']}; where that is so already, see that weights, config and "
    "chat template belong together"
)
_DISAGREE = (
    "sampling and scoring run under another temperature, mask, position, cache or weight: "
    + FIXES["gen.weights-stale"]
)
_FLOOR = (
    "a reward that pays everything the same, whatever is said, has no signal: see what it really "
    "measures (omni-grpo rewards test); a default for anything is no reward"
)
ADVICE: Mapping[tuple[str, str], str] = {
    ("conversation", "media all shown"): "a medium of the sample was left out of its messages: "
    "list each file once, or choose another mode with --audio-in-video",
    ("text", "one placeholder per medium"): "media without a placeholder are not seen or heard: "
    + FIXES["text.media-dropped"],
    ("text", "equals reference rendering"): "the chat template writes something else than the "
    "ChatML that the model was trained on: " + FIXES["text.template-drift"],
    ("text", "generation prompt"): "the prompt does not end in the assistant's turn, so the model "
    "goes on as the user: " + FIXES["text.no-generation-prompt"],
    ("media", "pictures not blank"): "every picture is one colour, because the decoder gives empty "
    "frames or the files hold none but such: " + FIXES["media.blank"],
    ("media", "sounds not silent"): "every sound is silence, because the reader gives zeros or the "
    "files hold nothing else: " + FIXES["media.silent"],
    ("batch", "prompts == samples"): "prompts were dropped or mixed up on the way to the "
    "processor: keep text and media of a sample together until its call",
    ("batch", "placeholders == features"): "the prompt was cut, or media were lost or doubled on "
    "the way to the processor: raise the prompt limit, or lower fps or pixels, and hand over one "
    "medium for each placeholder",
    ("batch", "sampled frame rate passed on"): "the processor was not told the frame rate that was "
    "really sampled, so a video's time positions are wrong: pass it fps, one number, not a list",
    ("batch", "left padding"): "rows are padded on the right, so the model goes on from padding: "
    + FIXES["batch.right-padding"],
    ("batch", "audio-in-video as decided"): "the processor was called with another audio-in-video "
    "flag than the sample's own: " + FIXES["batch.flag-processor"],
    ("embeddings", "placeholders hold tower features"): "the model never sees or hears the media: "
    + FIXES["embed.not-injected"],
    ("embeddings", "equal transformers' forward, row by row"): "features are put in another order, "
    "or in other places, than transformers puts them: put them into that of the placeholders",
    ("positions", "equal transformers' own, row by row"): "positions were made with another "
    "audio-in-video flag, mask, grid or frame rate: pass attention_mask and use_audio_in_video to "
    "every forward that is to compute them",
    ("positions", "video time true to the clip"): "time positions are those of another frame rate: "
    + FIXES["pos.collapsed-time"],
    ("logits", "row in the batch = row alone in transformers"): "padding, mask or positions of a "
    "batch reach its rows: " + FIXES["logits.batch-differs"],
    ("completion", "greedy not degenerate"): _GARBAGE,
    ("completion", "garbage"): _GARBAGE,
    ("completion", "generation in train mode under checkpointing"): "transformers (4.53 to 5.23; "
    "later ones with gradients enabled) drops the key-value cache in every block, so from the "
    "second token on the model sees neither prompt nor history: "
    + FIXES["gen.checkpointing-train"],
    ("completion", "greedy completions end"): "eos is not honoured, or max_new_tokens is too low: "
    + FIXES["gen.no-eos"],
    ("completion", "logprobs: sampling with cache = scoring without"): _DISAGREE,
    ("logits", "sampling and scoring disagree"): _DISAGREE,
    ("reward", "garbage earns nothing"): _FLOOR,
    ("reward", "constant"): _FLOOR,
    ("reward", "pinned"): _FLOOR,
    ("reward", "zero-variance"): "a group whose completions all earn the same teaches nothing: "
    + FIXES["adv.zero-variance"],
    ("reward", "capped"): "no completion reaches its answer: raise max_new_tokens, or "
    + FIXES["gen.no-eos"],
    ("reward", "format-zero"): "no completion has the structure that the system prompt asks for: "
    "use the checkpoint's own system message, and read the completions",
    ("reward", "never-scored"): "a reward that scores nothing changes nothing: see it fail with "
    "omni-grpo rewards test",
    ("reward", "not-a-number"): "one NaN makes the advantages of its whole group NaN: find the "
    "division whose divisor is 0, and return None where there is nothing to score",
    ("loss", "not a number"): "the update would be NaN: " + FIXES["loss.not-finite"],
    ("gradient", "not a number"): "the step would make weights NaN, with a loss that looked well: "
    + FIXES["step.nan-gradient"],
}
"""What a failure means and what to change, by stage and name of a check or of a guard's finding."""


DOES: Mapping[str, str] = {
    "sample": "rows of the data set are read",
    "conversation": "messages are built, and it is decided how a video's sound travels",
    "text": "the checkpoint's chat template writes the prompt",
    "media": "files are decoded into frames and 16 kHz sound",
    "batch": "the processor turns text and media into token ids and features",
    "embeddings": "features of the towers take the place of the placeholder tokens",
    "positions": "every token gets a time, a height and a width",
    "logits": "the model scores the token that follows the prompt",
    "completion": "the model answers, greedily and sampled",
    "parsed": "answers are taken apart into context, think and answer",
    "reward": "answers are scored",
    "advantage": "scores are compared within each group",
    "loss": "advantages and log-probabilities become one number",
    "gradient": "the number says how each weight should move",
}
"""What each stage does."""
_FIRST: Mapping[str, str] = {
    "sample": "fix the rows named: unique ids, files that exist, gold answers in <answer> tags",
    "conversation": "list each file once, or choose another mode with --audio-in-video",
    "text": "training and prompting must render the same text: " + FIXES["text.template-drift"],
    "media": "play the named file, and check frame rate and pixel limits of the settings",
    "batch": "use the processor files that came with the checkpoint and a supported version of "
    "transformers; look at the samples' tokens",
    "embeddings": "check the version of transformers, and that config and weights belong together",
    "positions": "use one audio-in-video mode and the frame rate that was really sampled in every "
    "stage; check the version of transformers",
    "logits": "look at left padding, attention mask and position ids; if scores are not finite, "
    "try float32",
    "completion": "generate in eval mode with checkpointing off, the cache on and eos ids set, on "
    "weights that are trained for this; then read the completions",
    "parsed": "see the place marked in each completion, and whether the completion stage holds",
    "reward": "read the reasons that stand with each sample",
    "advantage": "check that groups are formed by sample id and that rewards vary within them",
    "loss": "check the completion mask, the shift by one token and the logprobs' temperature",
    "gradient": "check which weights are frozen, and that the loss is not detached from the model",
}
"""Where to look first when a stage fails in something that has no :data:`ADVICE` of its own."""
LOST = (
    "the {} is lost between file and text model: follow it through the samples (file, features, "
    "tokens), and check that every stage is handed it"
)
"""Of a modality that does not reach the model."""


def advice(stage: str, failure: str = "") -> str:
    """What a failure means and what to do about it. ``failure``: name of a check or of a guard's
    finding; without one, where to look first.

    >>> advice("text", "generation prompt").partition(": ")[2]
    'pass add_generation_prompt=True to apply_chat_template'
    """
    found = ADVICE.get((stage, failure)) or _FIRST.get(stage)
    return found or "read the failed check: it says what was seen"
