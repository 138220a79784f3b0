"""Causes of what is wrong with conversations and prompts."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Rule
from omni_grpo_core.doctor.signatures import Signature, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_CONVERSATION = (
    Signature(
        cause="conv.media-twice",
        fact="media-twice",
        harm="the track is counted twice: the model hears the clip's sound inside the video and "
        "again after it, as it never did in training, and accuracy and format fall to half",
        fix="drop one: the audio item of {file}, or audio-in-video (use_audio_in_video=False in "
        "every call)",
        confirm="after the change the processor gets 1 sound for each such clip",
    ),
    Signature(
        cause="conv.wrong-type-text",
        fact="sound-denied",
        harm="the model believes the prompt and does not listen to the sound that it is given",
        fix="write the sentence from what is really handed over: leave out {said!r} where there is "
        "sound",
        confirm="questions that only the sound answers come out right again",
    ),
    Signature(
        cause="conv.silent-no-audio",
        fact="track-not-given",
        harm="the question is asked about a clip that the model cannot hear; answers to what is "
        "said or played are guesses that are rewarded by chance",
        fix="let the probe for an audio track raise: an exception swallowed there reads as 'no "
        "track'; {file} has one",
        confirm="ffprobe, or omni_grpo_core.core.media.probe, on {file} shows an audio track",
    ),
    Signature(
        cause="conv.silent-no-audio",
        fact="audio-not-shown",
        harm="the row's sound never reaches the model",
        fix="show the audio item of the row ({file}); a probe that swallows its exception drops it",
        confirm="omni_grpo_core.core.media.probe on {file} shows an audio track",
        certainty=0.7,
    ),
    Signature(
        cause="conv.resampled-item",
        fact="row-foreign",
        harm="a group then holds answers to two questions: their rewards are compared as if they "
        "were answers to one, and the advantage points nowhere",
        fix="let a sample that cannot be read be an error, or leave its whole group out; never put "
        "another sample in its place",
        confirm="search the data set's __getitem__ for random.randint, or a retry, in an except",
        certainty=0.9,
    ),
    Signature(
        cause="conv.resampled-item",
        fact="question-differs",
        harm="the answer is judged by another question's gold",
        fix="keep row and conversation together; never put another sample in the place of one that "
        "cannot be read",
        confirm="compare the row's question {wanted!r} with the prompt",
        certainty=0.7,
    ),
    Signature(
        cause="conv.resampled-item",
        fact="media-foreign",
        harm="the question is answered from another row's media",
        fix="take the media from the row itself: {file} is not its own",
        confirm="compare the row's path with the message's",
        certainty=0.5,
    ),
    Signature(
        cause="conv.system-missing",
        fact="system-missing",
        harm="the policy is not told the format that it is judged by, and the template puts a "
        "system message of its own in: the first rewards are near 0 for want of tags",
        fix="put the system message that the checkpoint was trained with in front of every "
        "conversation",
        confirm="the printed prompt begins with your own system message",
    ),
    Signature(
        cause="conv.system-changed",
        fact="instructions-changed",
        harm="the checkpoint is asked under a system message that it does not know and that says "
        "nothing of the format it is judged by",
        fix="use the checkpoint's own system message in the place of {system!r}",
        confirm="with the right one, completions begin with the tags again",
    ),
    Signature(
        cause="conv.system-changed",
        fact="systems-differ",
        harm="rows of one step are asked in different ways",
        fix="use one system message for all rows",
        certainty=0.6,
    ),
    Signature(
        cause="conv.options-missing",
        fact="options-missing",
        harm="a letter is wanted as the answer to letters that were never shown: what is right is "
        "right by chance",
        fix="append the row's options to the question",
        confirm="the printed prompt shows the options",
    ),
    Signature(
        cause="conv.gold-leaked",
        fact="gold-shown",
        harm="the policy reads the answer in its prompt: rewards are high, nothing is learnt, and "
        "without it the policy fails",
        fix="leave the {role} turn that holds the gold out of the prompt; keep it as a column",
        confirm="the printed prompt ends in the question",
    ),
)

_TEXT = (
    Signature(
        cause="text.first-only",
        fact="prompts-lost",
        harm="the media of all samples meet the question of one: nothing is raised, and accuracy "
        "falls to chance for the others",
        fix="keep the whole list that the template returns: an index [0] on it keeps the first "
        "prompt of the batch only",
        confirm="as many different prompts as different samples reach the processor",
    ),
    Signature(
        cause="text.list-of-lists",
        fact="prompts-nested",
        harm="the processor takes each inner list for one text or raises",
        fix="flatten it: up to transformers 4.57 apply_chat_template answers one conversation with "
        "a list, so take its [0] for a single conversation and not for a batch",
        confirm="type(prompts[0]) is str",
    ),
    Signature(
        cause="text.no-generation-prompt",
        fact="no-generation-prompt",
        harm="the model goes on writing the user's turn; whatever it answers begins with the "
        "header of a turn",
        fix=FIXES["text.no-generation-prompt"],
        confirm="the prompt ends in '<|im_start|>assistant'",
    ),
    Signature(
        cause="text.role-typo",
        fact="role-unknown",
        harm="the policy is asked in a role that it never learnt, and trained on answers in it",
        fix="write 'assistant' (or user, system) for {role!r} in template and messages",
        confirm="grep the chat template for {role!r}",
    ),
    Signature(
        cause="text.media-dropped",
        fact="placeholders-differ",
        harm="no placeholder stands for the media: the features are left over, for audio without "
        "a word, and the question is answered blindly",
        fix=FIXES["text.media-dropped"],
        confirm="the rendered prompt holds one placeholder for each medium",
        when=lambda e: any(e.values["got"][m] < n for m, n in e.values["want"].items()),
    ),
    Signature(
        cause="text.template-drift",
        fact="text-differs",
        harm="the prompt is not the text that the checkpoint was trained on: every answer is a "
        "little off, and nothing is raised",
        fix=FIXES["text.template-drift"] + ": at character {place} it must say {want!r}",
        confirm="the rendered prompt equals omni-grpo check's reference rendering",
    ),
)

RULES: tuple[Rule, ...] = (
    rule_of("causes_in_conversations", _CONVERSATION),
    rule_of("causes_in_prompts", _TEXT),
)
