"""What a failed stage check means for a training: its likely cause, in a sentence.

A check says what does not hold; a person whose run was stopped wants to know what does that.
"""

from __future__ import annotations

from collections.abc import Mapping

from omni_grpo_core.types import Stage

CAUSES: Mapping[tuple[Stage, str], str] = {
    ("conversation", "media all shown"): "a medium of the sample was left out of its messages",
    ("text", "equals reference rendering"): "the chat template writes something else than the "
    "ChatML that the model was trained on",
    ("text", "generation prompt"): "the prompt does not end in the assistant's turn "
    "(add_generation_prompt=False): the model goes on as the user",
    ("media", "pictures not blank"): "every picture is one colour: the decoder gives empty frames, "
    "or the files hold none but such",
    ("media", "sounds not silent"): "every sound is silence: the decoder gives zeros, or the files "
    "hold nothing else",
    ("batch", "prompts == samples"): "prompts were dropped or mixed up on the way to the processor",
    ("batch", "placeholders == features"): "the prompt was cut, or media were lost or doubled on "
    "the way to the processor",
    ("batch", "sampled frame rate passed on"): "the processor was not told the frame rate that was "
    "really sampled, so a video's time positions are wrong",
    ("batch", "left padding"): "rows are padded on the right: the model goes on from padding",
    ("batch", "audio-in-video as decided"): "the processor was called with another audio-in-video "
    "flag than the sample's own",
    ("embeddings", "placeholders hold tower features"): "the towers' features are not put in the "
    "place of the placeholders: the model never sees or hears the media",
    ("embeddings", "equal transformers' forward, row by row"): "features are put in another order, "
    "or in other places, than transformers puts them",
    ("positions", "equal transformers' own, row by row"): "positions were made with another "
    "audio-in-video flag, mask, grid or frame rate",
    ("positions", "video time true to the clip"): "time positions are those of another frame rate",
    ("logits", "row in the batch = row alone in transformers"): "padding, mask or positions of a "
    "batch reach its rows",
    ("completion", "greedy not degenerate"): "the policy as it is generated with is broken: mode, "
    "cache, prompt or weights",
    ("completion", "greedy completions end"): "eos is not honoured, or max_new_tokens is too low",
    ("completion", "logprobs: sampling with cache = scoring without"): "sampling and scoring run "
    "under another temperature, mask, position or cache",
}
"""By stage and name of the check."""
