"""Faults of what is said to the model: messages, and the text they are rendered to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from omni_grpo_core.faults.fault import FaultRegistry
from omni_grpo_core.faults.feeding import Messages
from omni_grpo_core.faults.fixtures import Drawn, rows_of
from omni_grpo_core.faults.reference_loop import ReferenceLoop
from omni_grpo_core.recorder.hooks import patched
from omni_grpo_core.types import Media

shelf = FaultRegistry()
Manager = AbstractContextManager[None]


def _edited(loop: ReferenceLoop, edit: Callable[[Messages], Messages]) -> Manager:
    before = loop.conversation
    return loop.replaced(conversation=lambda drawn: edit(before(drawn)))


def _user_text(messages: Messages, change: Callable[[str], str]) -> Messages:
    return [
        message
        if message["role"] != "user"
        else {
            **message,
            "content": [
                {"type": "text", "text": change(part["text"])} if part["type"] == "text" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


@shelf.add(
    "conv.media-twice",
    "A clip is listed as video and as audio item while its track already rides inside the video: "
    "one clip, two audios.",
    "the incident",
)
def media_twice(loop: ReferenceLoop) -> Manager:
    def edit(messages: Messages) -> Messages:
        user = messages[-1]
        content: list[dict[str, Any]] = []
        for part in user["content"]:
            content.append(part)
            if part["type"] == "video":
                content.append({"type": "audio", "audio": part["video"]})
        return [*messages[:-1], {**user, "content": content}]

    return _edited(loop, edit)


@shelf.add(
    "conv.wrong-type-text",
    "The prompt tells the model that the clip has no sound, and the model believes it.",
    "HumanOmniV2's type texts",
)
def wrong_type_text(loop: ReferenceLoop) -> Manager:
    def change(text: str) -> str:
        return text.replace("a video with sound", "a video without sound")

    return _edited(loop, lambda messages: _user_text(messages, change))


@shelf.add(
    "conv.silent-no-audio",
    "The probe for an audio track swallows its exception and answers 'no track': the clip is "
    "treated as mute.",
    "HumanOmniV2's check_if_video_has_audio",
    needs={"audio": "separate", "rows": (2, 5)},
)
def silent_no_audio(loop: ReferenceLoop) -> Manager:
    unlucky = rows_of()[loop.config.rows[-1]].videos
    before = loop.has_track
    return loop.replaced(has_track=lambda path: path not in unlucky and before(path))


@shelf.add(
    "conv.resampled-item",
    "A sample that cannot be read is replaced by a random other one, for one copy of its group: "
    "the group holds two questions.",
    "open-r1-multimodal's dataset",
)
def resampled_item(loop: ReferenceLoop) -> Manager:
    before = loop.repeat
    other = next(row for n, row in enumerate(rows_of()) if n not in loop.config.rows and row.videos)

    def repeat(values: list[Any]) -> list[Any]:
        repeated = before(values)
        kind = type(repeated[-1])
        messages = loop.conversation(other)
        if kind is str:
            repeated[-1] = loop.render([messages])[0]
        elif kind is Media:
            repeated[-1] = loop.load(messages)
        return repeated

    return loop.replaced(repeat=repeat)


@shelf.add(
    "conv.system-missing",
    "The system message is left out, and the template puts its own in.",
    "VLM-R1 and open-r1-multimodal scripts",
)
def system_missing(loop: ReferenceLoop) -> Manager:
    return _edited(loop, lambda messages: [m for m in messages if m["role"] != "system"])


@shelf.add(
    "conv.system-changed",
    "Training asks under another system message than the one the checkpoint knows.",
    "the incident: a format instruction in the place of the system message",
)
def system_changed(loop: ReferenceLoop) -> Manager:
    told = {"type": "text", "text": "You are a helpful voice assistant. Be brief."}
    return _edited(loop, lambda messages: [{"role": "system", "content": [told]}, *messages[1:]])


@shelf.add(
    "conv.options-missing",
    "The question of a multiple-choice row is asked without its options.",
    "question templates that know one problem type only",
)
def options_missing(loop: ReferenceLoop) -> Manager:
    def change(text: str) -> str:
        return "\n".join(line for line in text.split("\n") if line[1:3] != ". ")

    return _edited(loop, lambda messages: _user_text(messages, change))


@shelf.add(
    "conv.gold-leaked",
    "The gold completion stays in the conversation, as the data set had it, and is prompted with.",
    "supervised data sets handed to a GRPO trainer",
)
def gold_leaked(loop: ReferenceLoop) -> Manager:
    before = loop.conversation

    def conversation(drawn: Drawn) -> Messages:
        gold = {"type": "text", "text": str(drawn.row["solution"])}
        return [*before(drawn), {"role": "assistant", "content": [gold]}]

    return loop.replaced(conversation=conversation)


# --------------------------------------------------------------------------- text


@shelf.add(
    "text.first-only",
    "prepare_prompt(...)[0]: only the first prompt of the batch is kept, and every sample's media "
    "meet the first sample's question.",
    "the incident",
    needs={"rows": (0, 2)},
)
def first_only(loop: ReferenceLoop) -> Manager:
    before = loop.render
    return loop.replaced(render=lambda given: [before(given)[0]] * len(given))


@shelf.add(
    "text.list-of-lists",
    "The template answers every conversation with a list, and the lists are handed on as prompts.",
    "transformers 4.52 to 4.57: apply_chat_template of the omni processor",
    stops=True,
)
def list_of_lists(loop: ReferenceLoop) -> Manager:
    before = loop.render
    return loop.replaced(render=lambda given: [[text] for text in before(given)])


@shelf.add(
    "text.no-generation-prompt",
    "add_generation_prompt=False: the model goes on with the user's turn.",
    "TRL issues on conversational data",
)
def no_generation_prompt(loop: ReferenceLoop) -> Manager:
    def render(conversations: list[Messages]) -> Any:
        return loop.processor.apply_chat_template(
            conversations, add_generation_prompt=False, tokenize=False
        )

    return loop.replaced(render=render)


def _template(loop: ReferenceLoop, change: Callable[[str], str]) -> Manager:
    return patched(loop.processor, chat_template=change(loop.processor.chat_template))


@shelf.add(
    "text.role-typo",
    "The template opens the answer with the role 'assitant': prompted with a role that the "
    "checkpoint has never seen.",
    "HumanOmniV2's chat template",
)
def role_typo(loop: ReferenceLoop) -> Manager:
    return _template(loop, lambda text: text.replace("turn('assistant')", "turn('assitant')"))


@shelf.add(
    "text.media-dropped",
    "A text-only template renders multimodal messages: no placeholder stands for the media, which "
    "are passed all the same.",
    "the incident's hypothesis; tokenizers' own templates",
    needs={"audio": "separate", "rows": (18, 19)},
)
def media_dropped(loop: ReferenceLoop) -> Manager:
    silent = "{%- macro medium(bos, pad, eos) -%}{%- endmacro -%}"
    spoken = "{%- macro medium(bos, pad, eos) -%}{{ bos + pad + eos }}{%- endmacro -%}"
    return _template(loop, lambda text: text.replace(spoken, silent))


@shelf.add(
    "text.template-drift",
    "The template has lost the line break after each turn's end.",
    "templates copied by hand between checkpoints",
)
def template_drift(loop: ReferenceLoop) -> Manager:
    return _template(loop, lambda text: text.replace("'<|im_end|>\\n'", "'<|im_end|>'"))
