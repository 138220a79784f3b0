"""The shipped folder and rows: small, complete, and read alike by every supported library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import Qwen2_5OmniProcessor

from omni_grpo_core import tiny
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.tiny import shipped
from omni_grpo_core.tiny.clips import split_of
from omni_grpo_core.tiny.tokenizer import NAMED_TOKENS, SPECIAL_TOKENS

FOLDER = tiny.checkpoint_dir()


@pytest.fixture(scope="module")
def processor() -> Qwen2_5OmniProcessor:
    return Qwen2_5OmniProcessor.from_pretrained(FOLDER)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000
    assert sum(file.stat().st_size for file in tiny.data_file().parent.iterdir()) <= 1_000_000


def test_it_names_no_folder_of_the_machine_that_built_it() -> None:
    for file in FOLDER.glob("*.json"):
        assert "/root" not in file.read_text(encoding="utf-8")


def test_head_size_and_rope_sections_fit() -> None:
    text = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["hidden_size"] // text["num_attention_heads"] == 32
    for rope in (text["rope_scaling"], text["rope_parameters"]):
        assert sum(rope["mrope_section"]) == 16
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]


def test_every_weight_is_float32_and_belongs_to_the_model(policy: Policy) -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert set(stored) == {published_name(name) for name in policy.model.state_dict()}
    assert set(stored.values()) == {"F32"}


def test_special_tokens_are_one_id_each_after_the_words(processor: Qwen2_5OmniProcessor) -> None:
    tokenizer = processor.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS] == [[i] for i in ids]
    for name, token in NAMED_TOKENS.items():
        assert getattr(tokenizer, name) == token
    assert tokenizer.padding_side == "left"
    assert len(tokenizer) <= 2000


@pytest.mark.parametrize(
    "text",
    ["The bar is red.", "naïve ☃ 你好 1234", " a\n\n\tb ", "<answer>B</answer>", "\x00\x7f"],
)
def test_any_text_survives_the_tokenizer(processor: Qwen2_5OmniProcessor, text: str) -> None:
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_no_merge_joins_a_tag_with_the_answer(processor: Qwen2_5OmniProcessor) -> None:
    tokens = processor.tokenizer.convert_ids_to_tokens(
        processor.tokenizer("<answer>B</answer>")["input_ids"]
    )
    assert tokens == ["<", "answer", ">", "B", "</", "answer", ">"] or tokens == [
        "<answer",
        ">",
        "B",
        "</",
        "answer",
        ">",
    ]


def test_the_chat_template_writes_qwen_omni_s_format(processor: Qwen2_5OmniProcessor) -> None:
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "a.mp4"},
                {"type": "audio", "audio": "a.wav"},
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "What is it?\n"},
                {"type": "text", "text": "A. red"},
            ],
        },
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Sure?"},
    ]
    # a list of conversations: up to 4.57 a single one returns a list too
    (text,) = processor.apply_chat_template(
        [conversation], add_generation_prompt=True, tokenize=False
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "<|vision_bos|><|IMAGE|><|vision_eos|>What is it?\nA. red<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_conversation_without_system_message_gets_the_default_one(
    processor: Qwen2_5OmniProcessor,
) -> None:
    asked = [{"role": "user", "content": "Hi\n"}]
    (text,) = processor.apply_chat_template([asked], add_generation_prompt=False, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi\n<|im_end|>\n"
    )


def test_the_shipped_rows_are_read_and_cover_every_combination_of_media() -> None:
    samples = load_samples(tiny.data_file())
    assert len(samples) >= 16
    carried = {tuple(ref.modality for ref in sample.media) for sample in samples}
    assert carried == {("video",), ("video", "audio"), ("image",), ("audio",), ()}
    files = [Path(ref.path) for sample in samples for ref in sample.media]
    kinds = {suffix: len({f for f in files if f.suffix == suffix}) for suffix in
             (".mp4", ".png", ".wav")}  # fmt: skip
    assert kinds == {".mp4": 12, ".png": 2, ".wav": 2}


def test_the_shipped_clips_were_held_out_of_training() -> None:
    assert {split_of(clip.attributes) for clip in shipped.clips()} == {"held-out"}
    assert len({clip.attributes for clip in shipped.clips()}) == 16


def test_the_shipped_rows_are_what_the_recipe_writes(tmp_path: Path) -> None:
    """Rows exactly, clips by name (another libx264 may write other bytes)."""
    written = shipped.write_data(tmp_path)
    assert written.read_text(encoding="utf-8") == tiny.data_file().read_text(encoding="utf-8")
    assert {f.name for f in tmp_path.iterdir()} == {
        f.name for f in tiny.data_file().parent.iterdir()
    }
