"""Checks a checkpoint's processor and tokenizer files before a library loads them; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.core.checkpoint_files import is_size, read_object, shown
from omni_grpo_core.core.family import Family
from omni_grpo_core.errors import CheckpointError

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))

_PROCESSOR_SIZES: Mapping[str, int] = {
    "patch_size": 256,
    "temporal_patch_size": 64,
    "merge_size": 64,
    "feature_size": 4096,
    "sampling_rate": 1_000_000,
    "hop_length": 100_000,
    "n_fft": 100_000,
    "chunk_length": 3600,
}
"""The largest values accepted: arrays of these sizes are allocated at once, and each audio is
padded to ``chunk_length`` seconds (published: 300)."""


def check_processor_files(folder: Path, family: Family) -> None:
    """Raises ``CheckpointError`` for a folder without a processor or with another family's, a file
    that is not a JSON object, or a size that no processor has."""
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES[:2]):
        raise CheckpointError(
            str(folder),
            got="no preprocessor_config.json",
            want="a processor beside the weights",
            fix="copy the processor files from the base checkpoint, or pass their folder",
        )
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise CheckpointError(
            str(folder),
            got="no tokenizer.json, and not both vocab.json and merges.txt",
            want="a tokenizer beside the processor",
            fix="copy the tokenizer files from the base checkpoint",
        )
    for name in _PROCESSOR_FILES:
        path = folder / name
        if not path.exists():
            continue
        content = read_object(path)
        for key, value in _values(content):
            most = _PROCESSOR_SIZES.get(key)
            if most and value is not None and not (is_size(value) and value <= most):
                raise CheckpointError(
                    str(path), got=f"{key} {shown(value)}", want=f"a number from 1 to {most}",
                    fix="copy the processor files from the base checkpoint",
                )  # fmt: skip
        named = content.get("processor_class")
        if isinstance(named, str) and "Omni" in named and named != family.processor_class:
            raise CheckpointError(
                str(path),
                got=f"files of a {named}",
                want=f"those of a {family.processor_class}, to match the weights",
                fix="copy the processor files from the base checkpoint of the weights",
            )


def _values(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a processor's file and of its parts: newer versions of transformers write
    one file for all of them."""
    for key, value in content.items():
        yield key, value
        if isinstance(value, dict) and key.endswith(("processor", "extractor")):
            yield from value.items()
