"""Qwen2.5-Omni's real token ids, without its weights: the folder of its processor.

The public package ``dashscope`` (the extra ``qwen``) contains Qwen's byte-pair ranks as a data
file. From these and from published constants :func:`build_processor` makes, in a folder of the
user's choice, the tokenizer and processor of Qwen2.5-Omni checkpoints. Nothing of that file is part
of this package, and ``dashscope`` itself is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from omni_grpo_core.core.family import QWEN2_5_OMNI
from omni_grpo_core.errors import ConfigError
from omni_grpo_core.io.atomic import new_folder
from omni_grpo_core.tiny.architecture import processor_files
from omni_grpo_core.tiny.realvocab.merges import vocabulary_and_merges
from omni_grpo_core.tiny.realvocab.ranks import ranks_file, read_ranks
from omni_grpo_core.tiny.tokenizer import SPECIAL_TOKENS, qwen2_tokenizer, write_tokenizer

ORDINARY_TOKENS: tuple[str, ...] = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Ids 151657 to 151664: one id each, but text, not markup (``special: false`` in Qwen2.5's
``tokenizer_config.json``): decoding keeps them."""

KNOWN_IDS: Mapping[str, tuple[int, ...]] = {
    "</": (522,),
    ".</": (3918,),
    "think": (26865,),
    "user": (872,),
    "\n": (198,),
    "Hello world": (9707, 1879),
    " Hello world": (21927, 1879),
    **{token: (151_643 + i,) for i, token in enumerate((*SPECIAL_TOKENS, *ORDINARY_TOKENS))},
}
"""Ids from Qwen2.5-Omni's own tokenizer, as stated by its ``added_tokens.json``, its model
configuration, transformers' docstring of ``Qwen2Tokenizer`` and public trainers."""

MIN_PIXELS = 56 * 56
MAX_PIXELS = 3584 * 3584
AUDIO_SECONDS = 300
"""``min_pixels``, ``max_pixels`` and ``chunk_length`` of Qwen2.5-Omni's preprocessing."""


def build_processor(folder: Path) -> Any:
    """A ``Qwen2_5OmniProcessor`` with Qwen's real ids, saved in ``folder``.

    Raises what :func:`write_processor` raises.
    """
    write_processor(folder)
    # takes seconds to import, which writing the folder does not need
    from transformers import Qwen2_5OmniProcessor

    return Qwen2_5OmniProcessor.from_pretrained(folder, local_files_only=True)


def write_processor(folder: Path) -> None:
    """Write the files of the processor into ``folder``, which appears complete or not at all.

    All supported versions of transformers read it alike.

    Raises:
        ConfigError: ``folder`` is not empty, ``dashscope`` or its file is missing, or the resulting
            ids are not Qwen's.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            str(folder), got="a path in use", want="a new or empty folder", fix="name another"
        )
    tokenizer = build_tokenizer(ranks_file())
    files = processor_files(QWEN2_5_OMNI, 14, (MIN_PIXELS, MAX_PIXELS), AUDIO_SECONDS)
    with new_folder(folder) as work:
        write_tokenizer(tokenizer, work)
        for name, content in files.items():
            (work / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def build_tokenizer(file: Path) -> Tokenizer:
    """Qwen2.5-Omni's tokenizer from ranks in tiktoken's format.

    Raises:
        ConfigError: the file is broken, or does not give the known ids of Qwen's tokenizer.
    """
    vocabulary, merges = vocabulary_and_merges(read_ranks(file))
    tokenizer = qwen2_tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ORDINARY_TOKENS])
    for text, wanted in KNOWN_IDS.items():
        found = tuple(tokenizer.encode(text).ids)
        if found != wanted:
            raise ConfigError(
                str(file),
                got=f"{text!r} as {list(found)}",
                want=f"{list(wanted)}, as in Qwen2.5-Omni",
                fix="install the dashscope that constraints.txt pins: this one changed its file",
            )
    return tokenizer
