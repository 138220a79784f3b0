"""Faults of the prompt: messages, and the text they are rendered to."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from omni_grpo_core.faults.fault import (
    ONE_PROMPT,
    FaultRegistry,
    Injection,
    Manager,
    instead_of,
    result_of,
)
from omni_grpo_core.faults.fixtures import Drawn, rows_of
from omni_grpo_core.faults.seams import Loop, Messages
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Media

faults = FaultRegistry()


def _user_text(change: Callable[[str], str]) -> Injection:
    """Decorates a change of the user's text."""

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "text": change(part["text"])} if part["type"] == "text" else part

    @result_of("conversation")
    @wraps(change)
    def edited(loop: Loop, messages: Messages) -> Messages:
        return [
            {**message, "content": [changed(part) for part in message["content"]]}
            if message["role"] == "user"
            else message
            for message in messages
        ]

    return edited


def _template(change: Callable[[str], str]) -> Injection:
    """Decorates a change of the chat template."""

    @wraps(change)
    def inject(loop: Loop) -> Manager:
        return patched(loop.processor, chat_template=change(loop.processor.chat_template))

    return inject


@faults.add("conv.media-twice", "the incident")
@result_of("conversation")
def media_twice(loop: Loop, messages: Messages) -> Messages:
    """A clip is listed both as a video and as an audio item although the video already carries its
    track: one clip, two audios."""
    user = messages[-1]
    content: list[dict[str, Any]] = []
    for part in user["content"]:
        content.append(part)
        if part["type"] == "video":
            content.append({"type": "audio", "audio": part["video"]})
    return [*messages[:-1], {**user, "content": content}]


@faults.add("conv.wrong-type-text", "HumanOmniV2's type texts")
@_user_text
def wrong_type_text(text: str) -> str:
    """The prompt states that the clip has no sound, and the model believes it."""
    return text.replace("a video with sound", "a video without sound")


@faults.add(
    "conv.silent-no-audio",
    "HumanOmniV2's check_if_video_has_audio",
    needs={"audio": "separate", "rows": (2, 5)},
)
@instead_of("has_track")
def silent_no_audio(loop: Loop, before: Callable[[str], bool], path: str) -> bool:
    """The probe for an audio track swallows its exception and returns 'no track': the clip is
    treated as silent."""
    return path not in rows_of()[loop.config.rows[-1]].videos and before(path)


@faults.add("conv.resampled-item", "open-r1-multimodal's dataset", lacking=ONE_PROMPT)
@result_of("repeat")
def resampled_item(loop: Loop, repeated: list[Any]) -> list[Any]:
    """A sample that cannot be read is replaced by a random other one for one copy of its group: the
    group holds two questions."""
    other = next(row for n, row in enumerate(rows_of()) if n not in loop.config.rows and row.videos)
    messages = loop.conversation(other)
    kind = type(repeated[-1])
    if kind is str:
        repeated[-1] = loop.render([messages])[0]
    elif kind is Media:
        repeated[-1] = loop.load(messages)
    elif kind is list:
        repeated[-1] = messages
    return repeated


@faults.add("conv.system-missing", "VLM-R1 and open-r1-multimodal scripts", severity="differs")
@result_of("conversation")
def system_missing(loop: Loop, messages: Messages) -> Messages:
    """The system message is missing, and the template inserts its own."""
    return [message for message in messages if message["role"] != "system"]


@faults.add(
    "conv.system-changed",
    "the incident: a format instruction in place of the system message",
    severity="differs",
)
@result_of("conversation")
def system_changed(loop: Loop, messages: Messages) -> Messages:
    """Training uses a different system message from the one the checkpoint was trained with."""
    text = {"type": "text", "text": "You are a helpful voice assistant. Be brief."}
    return [{"role": "system", "content": [text]}, *messages[1:]]


@faults.add("conv.options-missing", "question templates for one problem type only")
@_user_text
def options_missing(text: str) -> str:
    """The question of a multiple-choice row is asked without its options."""
    return "\n".join(line for line in text.split("\n") if line[1:3] != ". ")


@faults.add("conv.gold-leaked", "supervised data sets passed to a GRPO trainer")
@instead_of("conversation")
def gold_leaked(loop: Loop, before: Callable[[Drawn], Messages], drawn: Drawn) -> Messages:
    """The gold completion from the data set stays in the conversation and becomes part of the
    prompt."""
    gold = {"type": "text", "text": str(drawn.row["solution"])}
    return [*before(drawn), {"role": "assistant", "content": [gold]}]


# --------------------------------------------------------------------------- text


@faults.add("text.first-only", "the incident", needs={"rows": (0, 2)})
@result_of("render")
def first_only(loop: Loop, prompts: list[str]) -> list[str]:
    """prepare_prompt(...)[0] keeps only the first prompt of the batch: every sample's media are
    paired with the first sample's question."""
    return [prompts[0]] * len(prompts)


@faults.add(
    "text.list-of-lists",
    "transformers 4.52 to 4.57: apply_chat_template of the omni processor",
    stops=True,
)
@result_of("render")
def list_of_lists(loop: Loop, prompts: list[str]) -> list[list[str]]:
    """The template returns a list for every conversation, and the lists are passed on as
    prompts."""
    return [[prompt] for prompt in prompts]


@faults.add("text.no-generation-prompt", "TRL issues on conversational data")
@instead_of("render")
def no_generation_prompt(loop: Loop, before: object, conversations: list[Messages]) -> Any:
    """add_generation_prompt=False: the model continues the user's turn."""
    return loop.processor.apply_chat_template(
        conversations, add_generation_prompt=False, tokenize=False
    )


@faults.add("text.role-typo", "HumanOmniV2's chat template")
@_template
def role_typo(template: str) -> str:
    """The template opens the answer with the role 'assitant', which the checkpoint has never
    seen."""
    return template.replace("turn('assistant')", "turn('assitant')")


@faults.add(
    "text.media-dropped",
    "the incident's hypothesis; tokenizers' own templates",
    needs={"audio": "separate", "rows": (18, 19)},
)
@_template
def media_dropped(template: str) -> str:
    """A text-only template renders multimodal messages: the media are passed, but the prompt has
    no placeholders for them."""
    silent = "{%- macro medium(bos, pad, eos) -%}{%- endmacro -%}"
    spoken = "{%- macro medium(bos, pad, eos) -%}{{ bos + pad + eos }}{%- endmacro -%}"
    return template.replace(spoken, silent)


@faults.add("text.template-drift", "templates copied by hand between checkpoints")
@_template
def template_drift(template: str) -> str:
    """The template has lost the line break at the end of each turn."""
    return template.replace("'<|im_end|>\\n'", "'<|im_end|>'")
