"""The built tokenizer and processor compared with what Qwen2.5-Omni publishes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

# sha256 of files of Qwen/Qwen2.5-Omni-3B, from public download manifests; vocab.json and
# merges.txt are the same for every Qwen2.5 and Qwen3
PUBLISHED = {
    "vocab.json": "ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910",
    "merges.txt": "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5",
    "added_tokens.json": "e81a2cc3bd867a1217019eed202d1d8a07e1063ece716f22060dda14f6cc07d8",
    "special_tokens_map.json": "dc241604d085780a33f760f69c47e6622451104c20eee3cd3a12b6e884b43f44",
    "tokenizer.json": "8441917e39ae0244e06d704b95b3124795cec478e297f9afac39ba670d7e9d99",
    "preprocessor_config.json": "b47055ce61463ce143e9aab741d55c0aa520801a0a5d63be73c5b17cecb6bc69",
}
# what our files state besides the published ones: the libraries' own defaults, spelled out
EXPLICIT = {"do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"} | {
    "resample",
    "size",
}


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def as_published(folder: Path, name: str) -> bytes:
    """Our file in the layout of the published one."""
    if name == "merges.txt":
        return (folder / name).read_bytes()
    content = read(folder, name)
    if name == "vocab.json":
        by_id = dict(sorted(content.items(), key=lambda item: item[1]))
        return json.dumps(by_id, ensure_ascii=False, separators=(",", ":")).encode()
    if name == "tokenizer.json":
        # flags about offsets, or that these parts do not use
        unused = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        content["pre_tokenizer"]["pretokenizers"][1] = unused
        content["post_processor"] = content["decoder"] = unused
        content["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
        return json.dumps(content, ensure_ascii=False, indent=2).encode()
    if name == "special_tokens_map.json":
        plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for key in ("eos_token", "pad_token"):
            content[key] = {"content": content[key], **plain}
        return json.dumps(content, ensure_ascii=False, indent=2).encode()
    content = {key: value for key, value in content.items() if key not in EXPLICIT}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_are_byte_identical_to_the_published_ones(qwen_folder: Path, name: str) -> None:
    assert hashlib.sha256(as_published(qwen_folder, name)).hexdigest() == PUBLISHED[name]


def test_what_is_explicit_besides_the_published_constants_is_the_default(qwen: Any) -> None:
    from transformers import Qwen2VLImageProcessor

    # the default upper limit has changed between versions; Qwen publishes its own
    usual = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12845056)
    for name in sorted(EXPLICIT):
        assert getattr(qwen.image_processor, name) == getattr(usual, name), name


def test_the_processor_has_qwens_limits(qwen: Any) -> None:
    # chunk_length 300 s at 16 kHz, a mel frame every 160 samples
    assert (qwen.feature_extractor.n_samples, qwen.feature_extractor.nb_max_frames) == (
        4_800_000,
        30_000,
    )
    assert (qwen.image_processor.merge_size, qwen.video_processor.temporal_patch_size) == (2, 2)
    assert len(qwen.tokenizer) == 151_665
    assert qwen.tokenizer.padding_side == "left"


def test_markup_is_one_id_each_and_tool_tokens_are_text(qwen: Any) -> None:
    tokenizer = qwen.tokenizer
    text = "<|im_start|>user\n<|audio_bos|><|AUDIO|><|audio_eos|><tool_call>a</tool_call><|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == [151644, 872, 198, 151647, 151646, 151648, 151657, 64, 151658, 151645]
    assert tokenizer.decode(ids) == text
    kept = tokenizer.decode(ids, skip_special_tokens=True)
    assert kept == "user\n<tool_call>a</tool_call>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (151645, 151643)
    assert tokenizer.bos_token_id is None


def test_answer_tags_are_text_that_merges_with_its_neighbours(qwen: Any) -> None:
    """Why spans of a completion come from text offsets: ``<think>`` and ``</think>`` are several
    tokens, and the first of ``</think>`` may include the reasoning's last character."""
    ids = qwen.tokenizer("<think>It is red.</think>")["input_ids"]
    pieces = [qwen.tokenizer.decode([token]) for token in ids]
    assert pieces == ["<th", "ink", ">", "It", " is", " red", ".</", "think", ">"]
    assert (ids[6], ids[7]) == (3918, 26865)
    assert qwen.tokenizer("red</think>")["input_ids"][1:3] == [522, 26865]


def test_a_missing_system_message_is_added(qwen: Any) -> None:
    asked = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    text = qwen.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    # 4.52's omni processor returns a list for one conversation
    assert ([text] if isinstance(text, str) else text) == [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|VIDEO|><|vision_eos|><|im_end|>\n"
        "<|im_start|>assistant\n"
    ]
