"""Causes of faults in conversations and prompts."""

from __future__ import annotations

from omni_grpo_core.doctor.evidence import Case, Evidence, Rule
from omni_grpo_core.doctor.signatures import Signature, only_fits, rule_of
from omni_grpo_core.pipeline.hints import FIXES

_CONVERSATION = (
    Signature(
        cause="conv.media-twice",
        fact="media-twice",
        harm="the track counts twice: the model hears the clip's sound inside the video and again "
        "after it, which it never did in training, and accuracy and format fall by half",
        fix="drop one: the audio item of {file}, or audio-in-video (use_audio_in_video=False in "
        "every call)",
        confirm="the processor then gets 1 sound for each such clip",
    ),
    Signature(
        cause="conv.wrong-type-text",
        fact="sound-denied",
        harm="the model believes the prompt and ignores the sound that it is given",
        fix="write the sentence to match what is passed: leave out {said!r} where there is sound",
        confirm="questions that only the sound can answer are answered correctly again",
    ),
    Signature(
        cause="conv.silent-no-audio",
        fact="track-not-given",
        harm="the question is asked about a clip that the model cannot hear; answers about what "
        "is said or played are guesses, rewarded by chance",
        fix="let the probe for an audio track raise: an exception swallowed there is taken for 'no "
        "track'; {file} has one",
        confirm="ffprobe, or omni_grpo_core.core.media.probe, on {file} shows an audio track",
    ),
    Signature(
        cause="conv.silent-no-audio",
        fact="audio-not-shown",
        harm="the row's sound never reaches the model",
        fix="pass the row's audio item ({file}); a probe that swallows its exception drops it",
        confirm="omni_grpo_core.core.media.probe on {file} shows an audio track",
        prove=only_fits,
    ),
    Signature(
        cause="conv.resampled-item",
        fact="row-foreign",
        harm="a group then holds answers to two questions: their rewards are compared as if they "
        "answered the same one, and the advantage is meaningless",
        fix="raise an error for a sample that cannot be read, or leave its whole group out; never "
        "substitute another sample",
        confirm="search the data set's __getitem__ for random.randint or a retry in an except",
    ),
    Signature(
        cause="conv.resampled-item",
        fact="question-differs",
        harm="the answer is scored against another question's gold",
        fix="keep row and conversation together; never substitute another sample for one that "
        "cannot be read",
        confirm="compare the row's question {wanted!r} with the prompt",
        prove=only_fits,
    ),
    Signature(
        cause="conv.resampled-item",
        fact="media-foreign",
        harm="the question is answered from another row's media",
        fix="take the media from the row itself: {file} belongs to another",
        confirm="compare the row's path with the one in the message",
        prove=only_fits,
    ),
    Signature(
        cause="conv.system-missing",
        fact="system-missing",
        harm="the prompt does not state the format that is rewarded, and the template adds its own "
        "system message: the first rewards are near 0 because tags are missing",
        fix="start every conversation with the system message that the checkpoint was trained with",
        confirm="the printed prompt begins with your own system message",
    ),
    Signature(
        cause="conv.system-changed",
        fact="instructions-changed",
        harm="the checkpoint gets a system message that it was not trained with and that does not "
        "state the format that is rewarded",
        fix="use the checkpoint's own system message instead of {system!r}",
        confirm="with the right one, completions begin with the tags again",
    ),
    Signature(
        cause="conv.options-missing",
        fact="options-missing",
        harm="the answer should be the letter of an option that was never shown: it is right only "
        "by chance",
        fix="append the row's options to the question",
        confirm="the printed prompt shows the options",
    ),
    Signature(
        cause="conv.question-missing",
        fact="question-missing",
        harm="the model chooses among options without knowing what is asked: it is right only by "
        "chance",
        fix="put the row's question into the conversation, from the column that has it",
        confirm="the printed prompt asks the question",
    ),
    Signature(
        cause="conv.options-permuted",
        fact="options-permuted",
        harm="an answer that is right by its words is paid as wrong, and a wrong one as right",
        fix="permute options, their letters and the gold together, or not at all",
        confirm="the printed prompt has the row's options, letter by letter",
    ),
    Signature(
        cause="conv.gold-leaked",
        fact="gold-shown",
        harm="the policy reads the answer in its prompt: rewards are high, nothing is learnt, and "
        "without it the policy fails",
        fix="leave the {role} turn with the gold out of the prompt; keep it as a column",
        confirm="the printed prompt ends with the question",
    ),
)


def _rewritten(case: Case, evidence: Evidence) -> str:
    """One replacement makes the recorded text of the reference's."""
    return evidence.sentence if evidence.values.get("edit") else ""


_TEXT = (
    Signature(
        cause="text.first-only",
        fact="prompts-lost",
        harm="one sample's question is asked about all samples' media: nothing is raised, and "
        "accuracy falls to chance for the others",
        fix="keep the whole list that the template returns: indexing it with [0] keeps only the "
        "first prompt of the batch",
        confirm="as many different prompts as different samples reach the processor",
    ),
    Signature(
        cause="text.list-of-lists",
        fact="prompts-nested",
        harm="the processor takes each inner list for one text, or raises",
        fix="flatten it: up to transformers 4.57 apply_chat_template returns a list even for one "
        "conversation, so take its [0] for a single conversation but not for a batch",
        confirm="type(prompts[0]) is str",
    ),
    Signature(
        cause="text.no-generation-prompt",
        fact="no-generation-prompt",
        harm="the model continues the user's turn; its completion begins with a turn header",
        fix=FIXES["text.no-generation-prompt"],
        confirm="the prompt ends with '<|im_start|>assistant'",
    ),
    Signature(
        cause="text.rendered-twice",
        fact="rendered-twice",
        harm="the model reads a whole prompt, system message and assistant's header included, as "
        "the {role}'s words",
        fix="pass messages to apply_chat_template, and its result to the processor and nowhere "
        "else",
        confirm="the prompt has one system turn, and '<|im_start|>' once per message",
    ),
    Signature(
        cause="text.template-dropped",
        fact="template-dropped",
        harm="the model continues a bare question: no instruction, no turn and no end that it was "
        "trained on",
        fix="pass to the processor what apply_chat_template returned",
        confirm="the processor's text begins with '<|im_start|>'",
    ),
    Signature(
        cause="text.role-typo",
        fact="role-unknown",
        harm="the policy is prompted, and trained, in a role that it never learnt",
        fix="use 'assistant' (or user, system) instead of {role!r} in template and messages",
        confirm="grep the chat template for {role!r}",
    ),
    Signature(
        cause="text.media-dropped",
        fact="placeholders-differ",
        harm="the media have no placeholder: their features are unused, silently for audio, and "
        "the question is answered without them",
        fix=FIXES["text.media-dropped"],
        confirm="the rendered prompt has one placeholder per media item",
        when=lambda e: any(e.values["got"][m] < n for m, n in e.values["want"].items()),
    ),
    Signature(
        cause="text.marks-lost",
        fact="placeholder-unmarked",
        harm="positions of media are counted from {first}: without it they are those of plain text",
        fix="write {first}{mark}{last} for each item, or let apply_chat_template render the "
        "messages",
        confirm="the prompt has {first} before each {mark}",
    ),
    Signature(
        cause="text.template-drift",
        fact="text-differs",
        harm="the prompt is not the text that the checkpoint was trained on: every answer is a "
        "little off, and nothing is raised",
        fix=FIXES["text.template-drift"] + ": at character {place} the prompt must have {want!r}",
        confirm="the rendered prompt equals omni-grpo check's reference rendering",
        prove=_rewritten,
        when=lambda e: e.values["how"] == "rendered",
    ),
)

RULES: tuple[Rule, ...] = (
    rule_of("causes_in_conversations", _CONVERSATION),
    rule_of("causes_in_prompts", _TEXT),
)
