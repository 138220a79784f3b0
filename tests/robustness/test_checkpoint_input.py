"""Checkpoints that are truncated, hostile, or assembled from parts that do not match."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hostile import JSON, NO_FILES, NO_VALUES, Spoil
from packaging.version import Version
from runner import Case, check_case
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.core.family import QWEN3_OMNI
from omni_grpo_core.io.console import quiet_libraries

FamilyName = Literal["qwen2.5", "qwen3"]
Change = Callable[[dict[str, Any]], object]
Weights = dict[str, torch.Tensor]


def spoiled(*spoils: Spoil, family: FamilyName = "qwen2.5") -> Callable[[Path], Sequence[object]]:
    """``check`` on one row of a copy of the shipped checkpoint, spoiled."""

    def arguments(folder: Path) -> Sequence[object]:
        copy = folder / "checkpoint"
        shutil.copytree(tiny.checkpoint_dir(family), copy)
        for spoil in spoils:
            spoil(copy)
        return ["check", "--checkpoint", copy, "--limit", 1]

    return arguments


def in_file(name: str, spoil: Spoil) -> Spoil:
    return lambda folder: spoil(folder / name)


def edit(name: str, change: Change) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return spoil


def put(name: str, value: Any, *keys: str) -> Spoil:
    """``value`` under the last of ``keys`` in the file ``name``."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit(name, change)


def drop(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes | str) -> Spoil:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def weights(change: Callable[[Weights], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return spoil


def only(**tensors: torch.Tensor) -> Spoil:
    return lambda folder: save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def raw_weights(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def header(change: Callable[[Any], Any]) -> Spoil:
    """The weights under a header that was tampered with."""

    def spoil(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        changed = change(json.loads(raw[8 : 8 + length]))
        body = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(body)) + body + raw[8 + length :]

    return raw_weights(spoil)


def case(
    name: str, *spoils: Spoil, words: Sequence[str] = (), family: FamilyName = "qwen2.5"
) -> Case:
    return Case(name, spoiled(*spoils, family=family), words=expected(family, *words))


def expected(family: FamilyName, *words: str) -> tuple[str, ...]:
    """The words of a message; a transformers without Qwen3-Omni reports that instead."""
    if family == "qwen3" and Version(version("transformers")) < Version(QWEN3_OMNI.since):
        return (f"transformers {QWEN3_OMNI.since} or newer",)
    return words


# --------------------------------------------------------------------------- what is parsed

WHOLLY = ("config.json", "preprocessor_config.json", "tokenizer_config.json", "omni_grpo.json")
PARTLY = ("generation_config.json", "tokenizer.json", "video_preprocessor_config.json",
          "vocab.json", "added_tokens.json", "special_tokens_map.json")  # fmt: skip
# settings may be YAML, which has messages of its own
FILES = tuple(
    case(f"{name}: {kind}", in_file(name, spoil), words=() if name == "omni_grpo.json" else (word,))
    for name in (*WHOLLY, *PARTLY)
    for kind, (spoil, word) in JSON.items()
    if name in WHOLLY or kind in {**NO_VALUES, "cut": 0, "a list": 0}
    # a missing processor file has another message
    if name == "config.json" or kind not in NO_FILES
)

# --------------------------------------------------------------------------- what does not agree

SIZES: Mapping[str, Sequence[Any]] = {
    "patch_size": (16, 0, "x", -14, 10**9, 14.5, None),
    "merge_size": (1, 0, "2"),
    "temporal_patch_size": (1, 0),
    "feature_size": (80, 0, 10**7, [128]),
    "sampling_rate": (8000, 0, 48_000),
    "hop_length": (320, 0),
    "n_fft": (512, 10**9),
    "chunk_length": (0, 10**9),
}
PROCESSOR = tuple(
    case(f"{key} {value}", put("preprocessor_config.json", value, key))
    for key, values in SIZES.items()
    for value in values
    if not (key == "patch_size" and value is None)
)
VIDEO = tuple(
    case(f"video {key} {value}", put("video_preprocessor_config.json", value, key))
    for key, value in (("patch_size", 16), ("merge_size", 4), ("temporal_patch_size", 4))
)
PIXELS = tuple(
    case(f"{key} {value} in {name}", put(name, value, key), words=(key,))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json")
    for key, value in (
        *(("image_mean", one) for one in ([0.5], [0.5, 0.5, 0.5], 0.5)),
        *(("image_std", one) for one in ([0.5], [0.5, 0.5, 0.5], [0, 0, 0])),
        *(("rescale_factor", one) for one in (1.0, 0.0078125, 0)),
        *(("do_rescale", False), ("do_normalize", False)),
    )
)
SOUND = tuple(
    case(f"{key} {value}", put("preprocessor_config.json", value, key), words=(key,))
    for key, value in (("dither", 1e9), ("dither", 1e-3), ("padding_value", 7.0))
)
PADDING = (
    case("a pad token of the tokenizer's that stands for videos",
         put("tokenizer_config.json", "<|VIDEO|>", "pad_token"),
         put("special_tokens_map.json", "<|VIDEO|>", "pad_token"), words=("pad", "<|VIDEO|>")),
    *(case(f"pad_token_id {one} of a medium", put("config.json", one, "pad_token_id"),
           words=("pad_token_id",)) for one in (552, 561, 562)),
)  # fmt: skip
TOKENS = tuple(
    # 5.x calls an index an id
    case(f"{key} {value!r}", put("config.json", value, key), words=(key.removesuffix("_index"),))
    for key, value in (
        *(("video_token_index", one) for one in (561, 5, -1, 10**9, "562")),
        *(("image_token_index", one) for one in (562, 563)),
        *(("audio_token_index", one) for one in (551, [552])),
        ("vision_start_token_id", 559),
        ("vision_end_token_id", 558),
        ("audio_start_token_id", 554),
        ("audio_end_token_id", 553),
        ("position_id_per_seconds", 13),
        ("position_id_per_seconds", 0),
        ("position_id_per_seconds", "25"),
        ("seconds_per_chunk", -2),
    )
)
NO_ENDS: Sequence[Any] = ("abc", [551, "x"], {"a": 1}, 10**9, -5, [], [551, -5], 551.5, True)
ENDS = tuple(
    case(f"eos_token_id {value} of {name}", put(name, value, "eos_token_id"),
         words=("eos_token_id",))
    for name in ("generation_config.json", "config.json")
    for value in NO_ENDS
)  # fmt: skip
NUMBERS = tuple(
    case(f"{section} {key} {value}", put("config.json", value, section, key))
    for section, key, value in (
        ("text_config", "num_hidden_layers", 10**7),
        ("text_config", "num_hidden_layers", 4),
        ("text_config", "num_hidden_layers", 0),
        ("text_config", "num_hidden_layers", "3"),
        ("text_config", "hidden_size", 10**6),
        ("text_config", "hidden_size", 2**40),
        ("text_config", "hidden_size", -64),
        ("text_config", "intermediate_size", 10**9),
        ("text_config", "vocab_size", 10**9),
        ("text_config", "vocab_size", 562),
        ("text_config", "num_attention_heads", 3),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_key_value_heads", 2),
        ("text_config", "max_position_embeddings", 100),
        ("text_config", "max_position_embeddings", "4096"),
        ("text_config", "rms_norm_eps", -1),
        ("text_config", "hidden_act", "no such function"),
        ("text_config", "rope_parameters", 7),
        ("vision_config", "depth", 10**8),
        ("vision_config", "depth", None),
        ("vision_config", "hidden_size", 10**7),
        ("vision_config", "num_heads", 5),
        ("vision_config", "patch_size", 16),
        ("vision_config", "spatial_merge_size", 0),
        ("vision_config", "window_size", 1),
        ("vision_config", "window_size", 10**6),
        ("vision_config", "window_size", 100),
        ("vision_config", "fullatt_block_indexes", [2]),
        ("vision_config", "fullatt_block_indexes", [-1]),
        ("vision_config", "fullatt_block_indexes", [1] * 100_000),
        ("vision_config", "fullatt_block_indexes", "1"),
        ("vision_config", "out_hidden_size", 65),
        ("audio_config", "encoder_layers", 10**9),
        ("audio_config", "num_mel_bins", 80),
        ("audio_config", "d_model", 50),
        ("audio_config", "max_source_positions", 10**9),
        ("audio_config", "max_source_positions", 10),
        ("audio_config", "n_window", 0),
        ("audio_config", "encoder_attention_heads", 7),
    )
)
GENERATION = "generation_config.json"
OTHERS_SETTINGS: Mapping[str, Any] = {
    "stop_strings": ["</think>"], "return_dict_in_generate": True, "token_healing": True,
    "guidance_scale": 3.0, "prefill_chunk_size": 2, "penalty_alpha": 0.6, "dola_layers": "low",
    "constraints": "x", "assistant_early_exit": 1, "is_assistant": True, "num_beams": 4,
    "no_repeat_ngram_size": 2, "bad_words_ids": [[27]], "forced_eos_token_id": 5,
    "min_new_tokens": 50, "min_length": 9999, "continuous_batching_config": {"x": 1},
    "repetition_penalty": 1.1, "sequence_bias": [[[27], -3.0]], "suppress_tokens": [27],
    "begin_suppress_tokens": [27], "exponential_decay_length_penalty": [1, 1.5], "max_time": 1e-9,
    "max_length": 1, "max_new_tokens": 1, "use_cache": False, "prompt_lookup_num_tokens": 2,
    "output_scores": True, "remove_invalid_values": True, "custom_key": [1],
}  # fmt: skip
NO_SETTINGS: Mapping[str, Sequence[Any]] = {
    "top_k": ("x", -2, 1.5), "top_p": ("x", 7), "temperature": ("x", -1, [1]),
    "num_beams": ("x", 0), "guidance_scale": ("x",), "repetition_penalty": (0, -1.0, "x"),
    "bad_words_ids": ([[]], "x", [[-1]], [["a"]]), "sequence_bias": ({"x": 1}, [[[27]]]),
    "exponential_decay_length_penalty": ([1, "x"], 1), "max_time": ("x", 0),
    "max_new_tokens": (0, "x"), "num_return_sequences": ("x",), "do_sample": ("x", 1),
    "suppress_tokens": ("x", [10**9]), "stop_strings": (7, [7]), "min_length": (-1,),
    "use_cache": ("no",), "cache_implementation": ("nope", 7), "watermarking_config": ("x",),
}  # fmt: skip
SETTINGS = (
    *(
        Case(f"{key} {value} of another generate", spoiled(put(GENERATION, value, key)), code=0)
        for key, value in OTHERS_SETTINGS.items()
    ),
    *(
        case(f"{key} {value} of no generate", put(GENERATION, value, key), words=(GENERATION, key))
        for key, values in NO_SETTINGS.items()
        for value in values
    ),
    case("a watermark of nothing known", put(GENERATION, {"a": 1}, "watermarking_config"),
         words=(GENERATION, "Watermarking")),
)  # fmt: skip
SECTIONS: Mapping[str, Any] = {
    "a text": "466", "a number": 16, "too few": [16], "too large": [4, 6, 7],
    "negative": [20, -2, -2], "texts": ["4", "6", "6"], "a mapping": {"t": 4},
    "fractions": [4.0, 6.0, 6.0],
}  # fmt: skip


def rope(value: Any) -> Spoil:
    def change(config: dict[str, Any]) -> None:
        for name in ("rope_parameters", "rope_scaling"):
            config["text_config"][name]["mrope_section"] = value

    return edit("config.json", change)


ROPE = tuple(
    case(f"rope sections {name}", rope(value), words=("mrope_section",))
    for name, value in SECTIONS.items()
)
NO_PARTS: Sequence[Any] = (None, [], "x")
PARTS = tuple(
    case(f"{part} {value!r}", put("config.json", value, part), words=(part,))
    for part in ("text_config", "vision_config", "audio_config", "thinker_config")
    for value in NO_PARTS
)
KINDS = tuple(
    case(f"model_type {value!r}", put("config.json", value, "model_type"), words=("model_type",))
    for value in ("llama", "", None, 7, ["qwen2_5_omni"], "qwen3_omni_moe_thinkerx")
)
QUANTISED = tuple(
    case(f"quantised: {value}", put("config.json", value, "quantization_config"),
         words=("quantization_config", "not quantised"))
    for value in (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        *({"quant_method": method, "bits": 4} for method in ("gptq", "awq", "fp8", "nope")),
        {}, "x", 7,
    )
)  # fmt: skip

# --------------------------------------------------------------------------- templates

WITHOUT_END = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
TEMPLATES: Mapping[str, str] = {
    "empty": "",
    "blank": " \n",
    "cut": "{% for message in messages %}{{ message['role'",
    "cut within a block": "{% for message in messages %}x",
    "a range of a billion": "{% for i in range(10**9) %}x{% endfor %}",
    "loops within loops": WITHOUT_END,
    "ten gigabytes": "{{ 'x' * 10**10 }}",
    "a number of 1e9 digits": "{{ 10 ** (10 ** 9) }}",
    "doubling": "{% set n = namespace(x='x') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "a way out": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "refusing": "{{ raise_exception('not for you') }}",
    "an unknown filter": "{{ messages | nonsense }}",
    "a megabyte": "{{ 'x' * 2000000 }}",
    "no media": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "an include": "{% include '/etc/passwd' %}",
    "another where it is tried out": "{% if 'Which colour?' in messages[1]['content'][-1]['text'] "
    f"%}}ok{{% else %}}{WITHOUT_END}{{% endif %}}",
    "another for one medium": "{% if messages[1]['content'] | length > 2 %}ok{% else %}"
    f"{WITHOUT_END}{{% endif %}}",
    "much for no medium": "{% if messages[1]['content'] | length > 1 %}ok{% else %}"
    "{{ 'x' * 10**10 }}{% endif %}",
}
TEMPLATE = tuple(
    case(f"template: {name}", write("chat_template.jinja", text))
    for name, text in TEMPLATES.items()
)

# --------------------------------------------------------------------------- weights

INDEX = "model.safetensors.index.json"


def sharded(places: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))

    return spoil


def first(change: Callable[[Any], Any]) -> Spoil:
    def tampered(entries: dict[str, Any]) -> dict[str, Any]:
        name = next(name for name in entries if name != "__metadata__")
        return {**entries, name: change(entries[name])}

    return header(tampered)


def renamed(prefix: str) -> Callable[[Weights], None]:
    def change(found: Weights) -> None:
        for name in list(found):
            found[prefix + name] = found.pop(name)

    return change


def cast(dtype: torch.dtype) -> Callable[[Weights], object]:
    return lambda found: found.update({NORM: found[NORM].to(dtype)})


NORM = "model.norm.weight"
WEIGHTS = (
    case("no weights", drop("model.safetensors"), words=("no model.safetensors",)),
    case("a pickle", drop("model.safetensors"), write("pytorch_model.bin", b"cos\nsystem\n."),
         words=("a pickle", "convert")),
    case("weights empty", write("model.safetensors", b"")),
    case("weights of 7 bytes", write("model.safetensors", b"1234567")),
    case("weights zeros", write("model.safetensors", bytes(5000))),
    case("weights text", write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n")),
    case("weights cut in the header", raw_weights(lambda raw: raw[:1000])),
    case("weights cut in the tensors", raw_weights(lambda raw: raw[:-1000])),
    case("weights too long", raw_weights(lambda raw: raw + bytes(10))),
    case("a header of 2**63 bytes", raw_weights(lambda raw: b"\xff" * 7 + b"\x7f" + raw[8:])),
    case("a header that is a list", header(lambda content: [content])),
    case("a header without JSON", header(lambda content: b"{" * 100)),
    case("a header 100,000 deep", header(lambda content: b"[" * 100_000 + b"]" * 100_000)),
    case("a tensor without shape", first(lambda entry: {"dtype": "F32"})),
    case("a tensor that is a text", first(lambda entry: "x")),
    case("a negative shape", first(lambda entry: {**entry, "shape": [-1, 4]})),
    case("a shape of 10**18", first(lambda entry: {**entry, "shape": [10**9, 10**9]})),
    case("offsets beyond the end", first(lambda entry: {**entry, "data_offsets": [0, 10**12]})),
    case("offsets the wrong way round", first(lambda entry: {**entry, "data_offsets": [64, 0]})),
    case("an unknown dtype", first(lambda entry: {**entry, "dtype": "F7"})),
    case("a tensor twice",
         header(lambda t: json.dumps(t).replace("{", '{"a": {}, "a": {}, ', 1).encode()),
         words=("duplicate",)),
    case("a weight missing", weights(lambda w: w.pop(NORM)), words=(NORM,)),
    case("another shape", weights(lambda w: w.update({NORM: torch.ones(65)})),
         words=(NORM, "[65]", "[64]")),
    case("NaN", weights(lambda w: w[NORM].fill_(torch.nan)), words=("non-finite", "norm.weight")),
    case("one infinite number", weights(lambda w: w["lm_head.weight"][3].fill_(torch.inf)),
         words=("lm_head.weight",)),
    case("weights of nothing known", only(x=torch.ones(2))),
    case("only a talker", only(**{"talker.x": torch.ones(2)}),
         words=("thinker",)),
    case("a shard that is not there", sharded({NORM: "two.safetensors"}), words=("not there",)),
    case("a shard elsewhere", sharded({NORM: "../one.safetensors"}), words=("same folder",)),
    case("a shard of the system", sharded({NORM: "/etc/passwd"}), words=("same folder",)),
    case("a shard that is a number", sharded({NORM: 7})),
    case("a shard of a long name", sharded({NORM: "x" * 5000}), words=("not there",)),
    *(case(f"weights behind {prefix}", weights(renamed(prefix)),
           words=(f"'{prefix}'",))
      for prefix in ("module.", "_orig_mod.", "base_model.model.", "module.thinker.")),
    *(case(f"a weight of {dtype}", weights(cast(dtype)),
           words=(NORM, "floating"))
      for dtype in (torch.complex64, torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn)),
    case("no shards", sharded({})),
    case("shards that are a list", sharded(["one.safetensors"])),
    case("an index of nothing", drop("model.safetensors"), write(INDEX, "{}")),
)  # fmt: skip

# --------------------------------------------------------------------------- whole folders

QWEN3 = tiny.checkpoint_dir("qwen3")
QWEN25 = tiny.checkpoint_dir()
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json",
             "special_tokens_map.json")  # fmt: skip


def of(source: Path, *names: str) -> Spoil:
    def spoil(folder: Path) -> None:
        for name in names:
            shutil.copy(source / name, folder)

    return spoil


def another_processor(family: FamilyName, source: Path) -> Callable[[Path], Sequence[object]]:
    return lambda folder: [*spoiled(family=family)(folder), "--processor", source]


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-Omni-7B", "r": 8}


def alone(folder: Path) -> None:
    """Only what peft saves."""
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2)},
              folder / "adapter_model.safetensors")  # fmt: skip


ADAPTERS = (
    case("an adapter beside weights", write("adapter_config.json", json.dumps(ADAPTER)),
         words=("LoRA", "Qwen/Qwen2.5-Omni-7B", "merge")),
    case("an adapter alone", alone, words=("LoRA", "Qwen/Qwen2.5-Omni-7B", "merge")),
    *(case(f"an adapter beside weights: {text}", write("adapter_config.json", text),
           words=("LoRA", "merge")) for text in ("{", "[]", '{"base_model_name_or_path": 7}')),
)  # fmt: skip


def full(value: Any, part: str) -> Spoil:
    """A full checkpoint's config around the thinker's."""

    def change(config: dict[str, Any]) -> None:
        thinker = dict(config)
        config.update({"thinker_config": thinker, "talker_config": {}, "token2wav_config": {}})
        config.update({"model_type": "qwen2_5_omni", part: value})

    return edit("config.json", change)


FULL = tuple(
    case(f"{part} {value!r}", full(value, part), words=("config.json", part))
    for part in ("talker_config", "token2wav_config")
    for value in ("x", 7, [1])
)
NAMED = (
    case("an activation of no name", put("config.json", "nope", "text_config", "hidden_act"),
         words=("text_config hidden_act",)),
    case("a rope type of no name",
         put("config.json", {"rope_type": "nope", "mrope_section": [4, 6, 6]},
             "text_config", "rope_scaling"), words=("rope_type",)),
    # spans several lines in most versions of transformers 5
    case("a message of several lines", put("config.json", 7, "id2label"), words=("config.json",)),
)  # fmt: skip
FOLDERS = (
    *FULL[::4], *NAMED,
    *QUANTISED[::3], *ADAPTERS, *PADDING,
    case("experts of a depth that is not there",
         put("config.json", [7, 9], "vision_config", "deepstack_visual_indexes"),
         words=("deepstack_visual_indexes",), family="qwen3"),
    *(case(f"pixels of Qwen2.5-Omni's: {key}",
           put("preprocessor_config.json", [0.48145466, 0.4578275, 0.40821073], key),
           words=(key,), family="qwen3") for key in ("image_mean", "image_std")),
    case("an id far beyond the others",
         edit("tokenizer.json", lambda content: content["model"]["vocab"].update({"zzzz": 10**6})),
         edit("vocab.json", lambda content: content.update({"zzzz": 10**6}))),
    case("no model_type", edit("config.json", lambda content: content.pop("model_type")),
         words=("no model_type",)),
    Case("a processor of Qwen3-Omni", another_processor("qwen2.5", QWEN3),
         words=("Qwen3OmniMoeProcessor",)),
    Case("a processor of Qwen2.5-Omni", another_processor("qwen3", QWEN25),
         words=expected("qwen3", "Qwen2_5OmniProcessor")),
    case("a tokenizer of Qwen3-Omni", of(QWEN3, *TOKENIZER)),
    case("a tokenizer of Qwen2.5-Omni", of(QWEN25, *TOKENIZER), family="qwen3"),
    case("weights of Qwen3-Omni", of(QWEN3, "model.safetensors")),
    case("weights of Qwen2.5-Omni", of(QWEN25, "model.safetensors"), family="qwen3"),
    case("a config of Qwen3-Omni", of(QWEN3, "config.json")),
    case("experts of 10**8", put("config.json", 10**8, "text_config", "num_experts"),
         family="qwen3"),
    case("one more expert", put("config.json", 5, "text_config", "num_experts"), family="qwen3"),
    case("more experts a token than there are",
         put("config.json", 9, "text_config", "num_experts_per_tok"), family="qwen3"),
    case("no preprocessor", drop("preprocessor_config.json"), words=("preprocessor_config.json",)),
    case("no tokenizer", *map(drop, ("tokenizer.json", "vocab.json")), words=("tokenizer",)),
    case("tokens beyond the model",
         edit("tokenizer.json", lambda content: content["added_tokens"].append(
             {**content["added_tokens"][-1], "id": 563, "content": "<|one more|>"})),
         edit("tokenizer_config.json", lambda content: content["added_tokens_decoder"].update(
             {"563": {**content["added_tokens_decoder"]["562"], "content": "<|one more|>"}})),
         words=("564 tokens",)),
    case("no template", drop("chat_template.jinja"), words=("chat template",)),
    Case("no folder", lambda folder: ["check", "--checkpoint", folder / "none"],
         words=("no such file",)),
    Case("a file", lambda folder: ["check", "--checkpoint", QWEN25 / "config.json"]),
    Case("a URL", lambda folder: ["check", "--checkpoint", "https://example.org/model"],
         words=("URL",)),
    Case("an empty name", lambda folder: ["check", "--checkpoint", ""]),
    Case("the device", lambda folder: ["check", "--checkpoint", "/dev/null"]),
    Case("a checkpoint as JSON",
         lambda folder: ["check", "--checkpoint", folder / "none", "--json"]),
)  # fmt: skip

QUICK = (
    *(one for one in FILES if one.name.startswith(WHOLLY[:2])),
    *(one for one in FILES if one.name.endswith(("cut", "3,000 deep"))),
    *PROCESSOR[::3], *VIDEO, *PIXELS[::5], *SOUND[::2], *TOKENS[::2], *ENDS[::3],
    *NUMBERS[::2], *SETTINGS[1::16], *ROPE[::3], *PARTS[::4], *KINDS[::3], *TEMPLATE[::2],
    *WEIGHTS, *FOLDERS,
)  # fmt: skip
CASES = (
    *FILES, *PROCESSOR, *VIDEO, *PIXELS, *SOUND, *QUANTISED[1::3], *QUANTISED[2::3], *FULL[1:4],
    *FULL[5:], *TOKENS, *ENDS, *NUMBERS, *SETTINGS, *ROPE, *PARTS, *KINDS, *TEMPLATE, *WEIGHTS,
    *FOLDERS,
)  # fmt: skip


@pytest.mark.parametrize(
    "one",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in CASES],
    ids=str,
)
def test_ends_as_it_should(
    one: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(one, tmp_path, record_property)


@pytest.mark.slow
def test_an_error_is_not_preceded_by_library_output(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A hundred lines of config came before the message, and two about an unknown verbosity."""
    one = Case(
        "no setter",
        spoiled(put("config.json", False, "use_return_dict")),
        environment={"TRANSFORMERS_VERBOSITY": "nope"},
        fresh=True,
    )
    outcome = check_case(one, tmp_path, record_property)
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(("given", "used"), [("nope", "critical"), ("info", "info")])
def test_transformers_logs_nothing_by_default(
    given: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the variable while it is imported."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", given)
    quiet_libraries(worker=True)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == used
