"""What a stage does, what a failure in it means and what to do about it: one text for each failure,
whether ``check``, a training's guard, a golden or the doctor finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from omni_grpo_core.types import Modality

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


@dataclass(frozen=True, slots=True)
class Advice:
    """``why``: what the failure means. ``fix``: what to change."""

    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.why}: {self.fix}"


_FLOOR = Advice(
    "a reward that pays everything the same, whatever is said, has no signal",
    "see what it really measures; a default for anything is no reward (omni-grpo rewards test)",
)
_GARBAGE = Advice(
    "the policy, as it generates, is broken (mode, cache, prompt or weights)",
    FIXES["gen.checkpointing-train"]
    + "; where that is so already, see that weights, config and chat template belong together",
)
ADVICE: Mapping[tuple[str, str], Advice] = {
    ("conversation", "media all shown"): Advice(
        "a medium of the sample was left out of its messages",
        "list each file once, or choose another mode with --audio-in-video",
    ),
    ("text", "one placeholder per medium"): Advice(
        "media without a placeholder are not seen or heard", FIXES["text.media-dropped"]
    ),
    ("text", "equals reference rendering"): Advice(
        "the chat template writes something else than the ChatML that the model was trained on",
        FIXES["text.template-drift"],
    ),
    ("text", "generation prompt"): Advice(
        "the prompt does not end in the assistant's turn, so the model goes on as the user",
        FIXES["text.no-generation-prompt"],
    ),
    ("media", "pictures not blank"): Advice(
        "every picture is one colour, because the decoder gives empty frames or the files hold "
        "none but such",
        FIXES["media.blank"],
    ),
    ("media", "sounds not silent"): Advice(
        "every sound is silence, because the reader gives zeros or the files hold nothing else",
        FIXES["media.silent"],
    ),
    ("batch", "prompts == samples"): Advice(
        "prompts were dropped or mixed up on the way to the processor",
        "keep text and media of a sample together until the processor call",
    ),
    ("batch", "placeholders == features"): Advice(
        "the prompt was cut, or media were lost or doubled on the way to the processor",
        "raise the prompt limit, or lower fps or pixels, and hand over one medium for each "
        "placeholder; never cut a prompt with media in it",
    ),
    ("batch", "sampled frame rate passed on"): Advice(
        "the processor was not told the frame rate that was really sampled, so a video's time "
        "positions are wrong",
        "pass fps to the processor: one number, not a list",
    ),
    ("batch", "left padding"): Advice(
        "rows are padded on the right, so the model goes on from padding",
        FIXES["batch.right-padding"],
    ),
    ("batch", "audio-in-video as decided"): Advice(
        "the processor was called with another audio-in-video flag than the sample's own",
        FIXES["batch.flag-processor"],
    ),
    ("embeddings", "placeholders hold tower features"): Advice(
        "the model never sees or hears the media", FIXES["embed.not-injected"]
    ),
    ("embeddings", "equal transformers' forward, row by row"): Advice(
        "features are put in another order, or in other places, than transformers puts them",
        "put them back into the order of the placeholders",
    ),
    ("positions", "equal transformers' own, row by row"): Advice(
        "positions were made with another audio-in-video flag, mask, grid or frame rate",
        "pass attention_mask and use_audio_in_video to every forward that is to compute positions",
    ),
    ("positions", "video time true to the clip"): Advice(
        "time positions are those of another frame rate", FIXES["pos.collapsed-time"]
    ),
    ("logits", "row in the batch = row alone in transformers"): Advice(
        "padding, mask or positions of a batch reach its rows", FIXES["logits.batch-differs"]
    ),
    ("completion", "greedy not degenerate"): _GARBAGE,
    ("completion", "garbage"): _GARBAGE,
    ("completion", "generation in train mode under checkpointing"): Advice(
        "transformers (4.53 to 5.23; later ones with gradients enabled) drops the key-value cache "
        "in every block, so from the second token on the model sees neither prompt nor history",
        FIXES["gen.checkpointing-train"],
    ),
    ("completion", "greedy completions end"): Advice(
        "eos is not honoured, or max_new_tokens is too low", FIXES["gen.no-eos"]
    ),
    ("completion", "logprobs: sampling with cache = scoring without"): Advice(
        "sampling and scoring run under another temperature, mask, position, cache or weight",
        FIXES["gen.weights-stale"],
    ),
    ("logits", "sampling and scoring disagree"): Advice(
        "sampling and scoring run under another temperature, mask, position, cache or weight",
        FIXES["gen.weights-stale"],
    ),
    ("reward", "garbage earns nothing"): _FLOOR,
    ("reward", "constant"): _FLOOR,
    ("reward", "pinned"): _FLOOR,
    ("reward", "zero-variance"): Advice(
        "a group whose completions all earn the same teaches nothing", FIXES["adv.zero-variance"]
    ),
    ("reward", "capped"): Advice(
        "no completion reaches its answer", "raise max_new_tokens, or see that eos is honoured"
    ),
    ("reward", "format-zero"): Advice(
        "no completion has the structure that the system prompt asks for",
        "use the checkpoint's own system message, and read the completions",
    ),
    ("reward", "never-scored"): Advice(
        "a reward that scores nothing changes nothing",
        "see it fail with omni-grpo rewards test",
    ),
    ("reward", "not-a-number"): Advice(
        "one NaN makes the advantages of its whole group NaN",
        "find the division whose divisor is 0, and return None where there is nothing to score",
    ),
    ("loss", "not a number"): Advice("the update would be NaN", FIXES["loss.not-finite"]),
    ("gradient", "not a number"): Advice(
        "the step would make weights NaN, with a loss that looked well", FIXES["step.nan-gradient"]
    ),
}
"""By stage and name of a check or of a guard's finding."""


@dataclass(frozen=True, slots=True)
class StageWords:
    """``does``: what the stage does. ``fix``: where to look when a check of it fails that has no
    :data:`ADVICE` of its own."""

    does: str
    fix: str


STAGE_WORDS: Mapping[str, StageWords] = {
    "sample": StageWords(
        "rows of the data set are read",
        "Fix the rows named: unique ids, files that exist, gold answers inside <answer> tags.",
    ),
    "conversation": StageWords(
        "messages are built, and it is decided how a video's sound travels",
        "A row's media and its audio-in-video mode contradict each other: list each file once, or "
        "choose another mode with --audio-in-video.",
    ),
    "text": StageWords(
        "the checkpoint's chat template writes the prompt",
        "Restore the chat template that came with the base model: training and prompting must "
        "render the same text.",
    ),
    "media": StageWords(
        "files are decoded into frames and 16 kHz sound",
        "Look at the frames and sounds of the samples, play the named file, and check the frame "
        "rate and pixel limits of the settings.",
    ),
    "batch": StageWords(
        "the processor turns text and media into token ids and features",
        "Processor and media disagree. Use the processor files that came with the checkpoint and a "
        "supported version of transformers; look at the samples' tokens.",
    ),
    "embeddings": StageWords(
        "features of the towers take the place of the placeholder tokens",
        "What the towers saw is not what the text model gets. Check the version of transformers "
        "and that config and weights belong together.",
    ),
    "positions": StageWords(
        "every token gets a time, a height and a width",
        "Use one audio-in-video mode and the frame rate that was really sampled in every stage; "
        "check the version of transformers.",
    ),
    "logits": StageWords(
        "the model scores the token that follows the prompt",
        "A row in the batch differs from the row alone: look at left padding, attention mask and "
        "position ids; if scores are not finite, try float32.",
    ),
    "completion": StageWords(
        "the model answers, greedily and sampled",
        "Generation is at fault, or the weights are not trained for this. Generate in eval mode "
        "with gradient checkpointing off and the cache on, with eos ids set; then read the "
        "completions.",
    ),
    "parsed": StageWords(
        "answers are taken apart into context, think and answer",
        "Too few completions have the structure that the system prompt asks for: see the place "
        "marked in each, and whether the completion stage holds.",
    ),
    "reward": StageWords(
        "answers are scored",
        "A reward pays for garbage, cannot score a completion, or too few answers are right: the "
        "reasons stand with each sample.",
    ),
    "advantage": StageWords(
        "scores are compared within each group",
        "Check that groups are formed by sample id and that rewards vary within them.",
    ),
    "loss": StageWords(
        "advantages and log-probabilities become one number",
        "Check the completion mask, the shift by one token and the temperature of the logprobs.",
    ),
    "gradient": StageWords(
        "the number says how each weight should move",
        "Check which weights are frozen, and that the loss is not detached from the model.",
    ),
}
_UNKNOWN = StageWords("", "Read the failed check: it says what was seen.")


def stage_words(stage: str) -> StageWords:
    """Words for a stage; a stage that is new here is still shown.

    >>> stage_words("media").does
    'files are decoded into frames and 16 kHz sound'
    """
    return STAGE_WORDS.get(stage, _UNKNOWN)


def advice(stage: str, failure: str) -> str:
    """What a failure means and what to do about it. ``failure``: name of a check or of a guard's
    finding.

    >>> advice("text", "generation prompt").partition(": ")[2]
    'pass add_generation_prompt=True to apply_chat_template'
    """
    found = ADVICE.get((stage, failure))
    return stage_words(stage).fix if found is None else str(found)


def lost(modality: Modality) -> str:
    """What to do where a modality does not reach the model."""
    return (
        f"the {modality} is lost between file and text model: follow it through the samples (file, "
        "features, tokens), and check that every stage is handed it"
    )
