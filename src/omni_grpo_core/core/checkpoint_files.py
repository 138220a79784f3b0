"""Checks the configs of a checkpoint folder before a library loads it; no torch.

A library allocates what a config asks for before it compares it with the weights, and a template or
a processor can ask for more memory than there is. So JSON is bounded, and sizes are compared with
the :mod:`~omni_grpo_core.core.weight_headers`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.io.bounded import Unreadable, json_value, mapping_in

ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
FOREIGN = ("talker.", "token2wav.", "code2wav.")

_COUNTS: Mapping[str, tuple[str, ...]] = {
    "text_config": ("num_hidden_layers", "num_experts"),
    "vision_config": ("depth",),
    "audio_config": ("encoder_layers",),
}
"""Counts of repeated parts: each part has at least one tensor in the weights."""
_SIZES: Mapping[str, tuple[str, ...]] = {
    "": ("position_id_per_seconds", "seconds_per_chunk"),
    "text_config": (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts_per_tok"),
        *("moe_intermediate_size", "decoder_sparse_step", "rms_norm_eps", "rope_theta"),
    ),
    "vision_config": (
        *("hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size"),
        *("temporal_patch_size", "out_hidden_size", "in_channels", "window_size"),
        *("tokens_per_second", "num_position_embeddings"),
    ),
    "audio_config": (
        *("num_mel_bins", "d_model", "encoder_attention_heads", "encoder_ffn_dim"),
        *("max_source_positions", "n_window", "n_window_infer", "output_dim"),
        "downsample_hidden_size",
    ),
}
_REAL = frozenset({"rms_norm_eps", "rope_theta", "position_id_per_seconds", "seconds_per_chunk"})
_LARGEST = 1 << 31
_HEADS = (
    ("text_config", "num_attention_heads", "num_key_value_heads"),
    ("text_config", "num_experts", "num_experts_per_tok"),
    ("vision_config", "hidden_size", "num_heads"),
    ("audio_config", "d_model", "encoder_attention_heads"),
)
"""Section, a number, and a number that divides it or, for experts, is at most as large."""
_BLOCKS = ("fullatt_block_indexes", "deepstack_visual_indexes")
_LARGEST_WINDOW = 3584
"""Side in pixels of the largest square image that a published processor makes (12,845,056 pixels in
all). The tower pads every frame to whole windows: a window of a million takes 10 GB."""


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_ids(value: Any, most: int) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < most for one in value)


def _are_words(value: Any, most: int) -> bool:
    """Words are non-empty lists of ids."""
    return isinstance(value, list) and all(word and _are_ids(word, most) for word in value)


def _are_biases(value: Any, most: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and _are_words(pair[:1], most)
        and _is_real(pair[1])
        for pair in value
    )


_GENERATION: tuple[tuple[Callable[[Any, int], bool], str, tuple[str, ...]], ...] = (
    (
        lambda value, most: type(value) is bool,
        "true or false",
        (
            *("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"),
            *("token_healing", "return_dict_in_generate", "output_scores", "output_logits"),
            *("output_attentions", "output_hidden_states", "is_assistant"),
        ),
    ),
    (
        lambda value, most: type(value) is int and value > 0,
        "a whole number above 0",
        (
            *("max_length", "max_new_tokens", "num_beams", "num_beam_groups"),
            *("num_return_sequences", "prefill_chunk_size", "prompt_lookup_num_tokens"),
        ),
    ),
    (
        lambda value, most: type(value) is int and value >= 0,
        "a whole number",
        ("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    ),
    # -1 is vLLM's "all of them"
    (lambda value, most: type(value) is int and value >= -1, "a whole number", ("top_k",)),
    (
        lambda value, most: _is_real(value) and 0 <= value <= 1,
        "a number from 0 to 1",
        ("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    ),
    (
        lambda value, most: _is_real(value) and value >= 0,
        "a number, 0 or more",
        ("temperature", "penalty_alpha", "diversity_penalty"),
    ),
    (
        lambda value, most: _is_real(value) and value > 0,
        "a number above 0",
        ("repetition_penalty", "encoder_repetition_penalty", "max_time"),
    ),
    (lambda value, most: _is_real(value), "a number", ("length_penalty", "guidance_scale")),
    (_are_ids, "a list of token ids", ("suppress_tokens", "begin_suppress_tokens")),
    (_are_words, "non-empty lists of token ids", ("bad_words_ids",)),
    (_are_biases, "pairs of a list of token ids and a number", ("sequence_bias",)),
    (
        lambda value, most: (
            isinstance(value, list)
            and len(value) == 2
            and type(value[0]) is int
            and _is_real(value[1])
        ),
        "a whole number and a number",
        ("exponential_decay_length_penalty",),
    ),
    (
        lambda value, most: (
            isinstance(value, str)
            or (isinstance(value, list) and all(isinstance(one, str) for one in value))
        ),
        "a string or a list of strings",
        ("stop_strings",),
    ),
    (lambda value, most: isinstance(value, dict), "an object", ("watermarking_config",)),
)
"""The values that ``generation_config.json`` may have besides null: whether a value fits, given the
vocabulary size, what would fit, and the keys. A rollout uses only the eos, but a value that no
``generate`` can use means a damaged file."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file. Raises ``CheckpointError`` if there is none."""
    try:
        return mapping_in(path, json_value)
    except Unreadable as error:
        raise CheckpointError(
            error.place(path),
            got=error.got,
            want="a JSON object, as save_pretrained writes it",
            fix="pass the folder that holds config.json, weights and processor files"
            if error.got == "no such file"
            else "restore the file from the checkpoint's source",
        ) from None


def thinker_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The thinker's part of a full config, or a thinker's own; its sections are objects.

    Raises ``CheckpointError`` for a part that is not an object. The talker's and the vocoder's
    parts are not used, but transformers reads them too, and some versions do not say which failed.
    """
    thinker = config.get("thinker_config", config)
    unused = (f"{prefix[:-1]}_config" for prefix in FOREIGN)
    others = [(name, config[name]) for name in unused if config.get(name) is not None]
    for name, part in [("thinker_config", thinker), *_sections(thinker), *others]:
        if not isinstance(part, dict):
            _bad_config(folder, f"{name} {shown(part)}", "an object")
    return dict(thinker)


def refuse_adapter(folder: Path) -> None:
    """Raises ``CheckpointError`` for a PEFT adapter's folder: transformers would put the adapter on
    whatever weights are beside it."""
    path = folder / ADAPTER
    if not os.path.lexists(path):
        return
    try:
        base = read_object(path).get("base_model_name_or_path")
    except CheckpointError:  # broken, but still an adapter
        base = None
    of = shown(base) if isinstance(base, str) else "a base checkpoint"
    raise CheckpointError(
        str(folder),
        got=f"{ADAPTER}: a LoRA adapter of {of}",
        want="a whole checkpoint",
        fix=f"merge it into its base (merge_and_unload, save_pretrained), or remove {ADAPTER} "
        "if the weights beside it are already merged",
    )


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ``CheckpointError`` for an invalid number in the thinker's config, heads that do not
    divide their layer, rope sections that do not fit, or ids outside the vocabulary."""
    thinker = thinker_of(config, folder)
    for part in (config, thinker, thinker.get("text_config", {})):
        if part.get("quantization_config") is not None:
            raise CheckpointError(
                str(folder),
                got=f"a quantization_config, {shown(part['quantization_config'])}",
                want="weights that are not quantised",
                fix="use the checkpoint that it was made from, or dequantize() it and save it",
            )
    for section, names in (*_SIZES.items(), *_COUNTS.items()):
        part = thinker.get(section, {}) if section else thinker
        for name in names:
            value = part.get(name)
            if value is not None and not is_size(value, real=name in _REAL):
                _bad_config(folder, f"{_join(section, name)} {shown(value)}", "a number above 0")
    for section, name, by in _HEADS:
        whole, part = (thinker.get(section, {}).get(key) for key in (name, by))
        if whole and part and (whole < part if name == "num_experts" else whole % part):
            _bad_config(
                folder, f"{section} {name} {whole} and {by} {part}",
                f"{by} no more than {name}" if name == "num_experts" else f"a multiple of {by}",
            )  # fmt: skip
    _check_vision(thinker.get("vision_config", {}), folder)
    text = thinker.get("text_config", {})
    _check_rope(text, folder)
    _check_ids(thinker, text.get("vocab_size"), folder / "config.json")


def _check_vision(vision: Mapping[str, Any], folder: Path) -> None:
    window = vision.get("window_size")
    side = (vision.get("patch_size") or 1) * (vision.get("spatial_merge_size") or 1)
    if window is not None and (window > _LARGEST_WINDOW or window % side):
        _bad_config(
            folder, f"vision_config window_size {window}",
            f"a multiple of {side}, a token's side in pixels, up to {_LARGEST_WINDOW}",
        )  # fmt: skip
    depth = vision.get("depth")
    for name in _BLOCKS:
        blocks = vision.get(name)
        if blocks is not None and not (
            _are_ids(blocks, depth or _LARGEST) and len(set(blocks)) == len(blocks)
        ):
            _bad_config(
                folder, f"vision_config {name} {shown(blocks)}",
                f"distinct blocks from 0 to {(depth or _LARGEST) - 1}",
            )  # fmt: skip


def _check_rope(text: Mapping[str, Any], folder: Path) -> None:
    head = text.get("head_dim")
    if head is None and text.get("hidden_size") and text.get("num_attention_heads"):
        head = text["hidden_size"] // text["num_attention_heads"]
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            _bad_config(folder, f"text_config {name} {shown(rope)}", "an object")
        sections = rope.get("mrope_section")
        whole = isinstance(sections, list) and all(type(n) is int and n > 0 for n in sections)
        if (
            sections is not None
            and head
            and not (whole and len(sections) == 3 and 2 * sum(sections) == head)
        ):
            raise wrong_sections(folder, sections, head)
        theta = rope.get("rope_theta")
        if theta is not None and not is_size(theta, real=True):
            _bad_config(folder, f"rope_theta {shown(theta)}", "a number above 0")


def wrong_sections(folder: Path, sections: object, head: int) -> CheckpointError:
    """The error for rope sections that are not halves of the head size ``head``."""
    return CheckpointError(
        str(folder / "config.json"),
        got=f"mrope_section {shown(sections)} for a head size of {head}",
        want=f"three sections that sum to {head // 2}",
        fix="write both rope_parameters and rope_scaling, for either major version of transformers",
    )


def _check_ids(content: Mapping[str, Any], vocabulary: Any, path: Path) -> None:
    """Checks the token ids of a config: -5 would index from the end of the vocabulary."""
    for name, value in content.items():
        if not name.endswith(("_token_id", "_token_index")) or value is None:
            continue
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        most = vocabulary if isinstance(vocabulary, int) else _LARGEST
        if not ids or not all(type(one) is int and 0 <= one < most for one in ids):
            raise CheckpointError(
                str(path),
                got=f"{name} {shown(value)}",
                want=f"a token id, 0 to {most - 1}",
                fix="restore it from the checkpoint's source",
            )


def check_generation(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ``CheckpointError`` for a ``generation_config.json`` that is not a JSON object, has
    ids outside the vocabulary, or values that no ``generate`` could use. It may be absent."""
    path = folder / GENERATION
    if not path.exists():
        return
    content = read_object(path)
    vocabulary = thinker_of(config, folder).get("text_config", {}).get("vocab_size")
    _check_ids(content, vocabulary, path)
    most = vocabulary if isinstance(vocabulary, int) else _LARGEST
    for fits, want, names in _GENERATION:
        for name in names:
            value = content.get(name)
            if value is not None and not fits(value, most):
                raise CheckpointError(
                    str(path), got=f"{name} {shown(value)}", want=want,
                    fix=f"correct it, or remove {name}",
                )  # fmt: skip


def check_counts(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
                 folder: Path) -> None:  # fmt: skip
    """Raises ``CheckpointError`` for a config of more layers or experts than the weights have: each
    would be allocated before its weights were missed."""
    numbers = [int(n) for name in shapes for n in re.findall(r"\.(\d{1,6})\.", name)]
    routed = [shape[0] for name, shape in shapes.items() if ".mlp.gate." in name and shape]
    most = max([0, *(n + 1 for n in numbers), *routed])
    thinker = thinker_of(config, folder)
    for section, names in _COUNTS.items():
        for name in names:
            value = thinker.get(section, {}).get(name)
            if value is not None and value > most:
                want = f"at most {most}, from the names of the weights"
                _bad_config(folder, f"{section} {name} {value}", want)


def _bad_config(folder: Path, got: str, want: str) -> NoReturn:
    raise CheckpointError(
        str(folder / "config.json"), got=got, want=want,
        fix="use the config that was saved with these weights",
    )  # fmt: skip


def _sections(thinker: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(thinker, dict):
        for name in ("text_config", "vision_config", "audio_config"):
            yield name, thinker.get(name, {})


def is_size(value: Any, *, real: bool = False) -> bool:
    """Whether it is a number above 0 and below 2**31, whole unless ``real``."""
    kinds = (int, float) if real else (int,)
    return type(value) in kinds and 0 < value < _LARGEST


def _join(section: str, name: str) -> str:
    return f"{section} {name}".strip()


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
