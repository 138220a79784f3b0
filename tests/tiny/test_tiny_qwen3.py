"""The second family's shipped folder: small, complete, read alike by every library that has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

from omni_grpo_core import tiny
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.tiny.architecture_qwen3 import published_names
from omni_grpo_core.tiny.clips import ALL, Clip, combinations
from omni_grpo_core.tiny.evaluate import answer, prepare
from omni_grpo_core.tiny.examples import make_example, make_row
from omni_grpo_core.tiny.make import MAKES, QWEN3
from omni_grpo_core.tiny.questions import TOPICS, Question
from omni_grpo_core.tiny.tokenizer import QWEN3_WORDING
from omni_grpo_core.tiny.training import patches, pictures

FOLDER = tiny.checkpoint_dir("qwen3")


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 2_500_000


def test_every_family_is_shipped() -> None:
    assert all((tiny.checkpoint_dir(name) / "model.safetensors").is_file() for name in MAKES)


def test_head_size_and_rope_sections_fit() -> None:
    text = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["hidden_size"] // text["num_attention_heads"] == 32
    for rope in (text["rope_scaling"], text["rope_parameters"]):
        assert sum(rope["mrope_section"]) == 16
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]


def test_weights_have_the_published_names(qwen3_policy: Policy) -> None:
    """Separate matrices per expert, as in 4.57's modules and the published files."""
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    experts = [name for name in stored if re.search(r"mlp\.experts\.\d\.\w+_proj\.weight$", name)]
    assert len(experts) == 3 * 4 * 3
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert sum(t.numel() for t in stored.values()) == sum(
        p.numel() for p in qwen3_policy.model.parameters()
    )


def test_experts_are_split_in_the_library_s_order(qwen3_policy: Policy) -> None:
    """Gate before up, expert by expert: what is saved is what is loaded."""
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = qwen3_policy.model.state_dict()
    loaded = {published_name(name): value for name, value in published_names(state).items()}
    assert set(loaded) == set(stored)
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_added_tokens_are_one_id_each_and_think_is_text(qwen3_policy: Policy) -> None:
    tokenizer = qwen3_policy.processor.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(token) for token in QWEN3_WORDING.added]
    assert ids == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert [tokenizer(token)["input_ids"] for token in QWEN3_WORDING.added] == [[i] for i in ids]
    for name, token in QWEN3_WORDING.named.items():
        assert getattr(tokenizer, name) == token
    begin, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>"))
    assert not qwen3_policy.suppressed[[begin, end]].any()
    text = "<think>The colour is red A.</think>"
    found = tokenizer(text)["input_ids"]
    assert (found[0], found[-1]) == (begin, end)
    assert qwen3_policy.decode(found) == text
    assert tokenizer.decode(found, skip_special_tokens=True) == text


def test_the_chat_template_writes_qwen3_omni_s_format(qwen3_policy: Policy) -> None:
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "a.mp4"},
                {"type": "audio", "audio": "a.wav"},
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "What is it?"},
            ],
        },
    ]
    text = qwen3_policy.processor.apply_chat_template(
        [conversation], add_generation_prompt=True, tokenize=False
    )
    assert text == [
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "<|audio_start|><|audio_pad|><|audio_end|><|vision_start|><|image_pad|><|vision_end|>"
        "What is it?<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_pictures_are_the_frames_that_were_processed(qwen3_policy: Policy, tmp_path: Path) -> None:
    """The layout of patches of 16, which shifting frames in training relies on."""
    question = Question(Clip(ALL[0], seed=7), "off", "motion", 0)
    example = make_example(question, tmp_path, QWEN3)
    row = make_row(example, qwen3_policy)
    flat, (grid,) = row.tensors["pixel_values_videos"], row.tensors["video_grid_thw"].tolist()
    shown = pictures(flat, grid)
    assert torch.equal(patches(shown, grid), flat)
    # 1e-4: the processor fuses rescaling and normalising, which rounds differently in float32
    torch.testing.assert_close(
        shown.flatten(0, 1), example.media.videos[0].frames / 127.5 - 1, atol=1e-4, rtol=0
    )


def test_held_out_clips_are_answered_to_the_letter(qwen3_policy: Policy) -> None:
    first = combinations("held-out")[0]
    asked = [Question(Clip(first, 3_000_000), "interleaved", topic, 0) for topic in TOPICS]
    examples = prepare(asked, QWEN3)
    outcomes = answer(qwen3_policy, examples, "as it is")
    assert [o.text for o in outcomes] == [question.completion for question in asked]
