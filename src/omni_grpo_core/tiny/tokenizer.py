"""A byte-level BPE tokenizer like Qwen-Omni's, small enough for the tiny checkpoint.

Pre-tokenizer, special tokens, named token attributes and chat format are those of the family; only
the merges are learnt, from the tiny model's prompts, so that each of their words is one token.
Every byte has a token: any text can be encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
"""In the order of Qwen2.5-Omni's ids 151643 to 151656; here they follow the BPE tokens."""

NAMED_TOKENS: dict[str, str] = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""Attributes that the processor reads from its tokenizer."""

CHAT_TEMPLATE = """\
{%- macro turn(role) -%}{{ '<|im_start|>' + role + '\\n' }}{%- endmacro -%}
{%- macro medium(bos, pad, eos) -%}{{ bos + pad + eos }}{%- endmacro -%}
{%- if messages[0]['role'] != 'system' -%}
{{ turn('system') + 'You are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ turn(message['role']) }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{{ medium('<|vision_bos|>', '<|IMAGE|>', '<|vision_eos|>') }}
{%- elif part['type'] == 'audio' or 'audio' in part or 'audio_url' in part -%}
{{ medium('<|audio_bos|>', '<|AUDIO|>', '<|audio_eos|>') }}
{%- elif part['type'] == 'video' or 'video' in part -%}
{{ medium('<|vision_bos|>', '<|VIDEO|>', '<|vision_eos|>') }}
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ turn('assistant') }}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Wording:
    """A family's tokens and names. ``special``: tokens that are markup; ``ordinary``: words that
    are one token without a merge; ids follow the BPE tokens in the order of ``added``. ``named``:
    attributes that the processor reads from its tokenizer."""

    processor_class: str
    added: tuple[str, ...]
    ordinary: frozenset[str]
    named: Mapping[str, str]
    chat_template: str

    @property
    def special(self) -> tuple[str, ...]:
        return tuple(token for token in self.added if token not in self.ordinary)


QWEN2_5_WORDING = Wording(
    processor_class="Qwen2_5OmniProcessor",
    added=SPECIAL_TOKENS,
    ordinary=frozenset(),
    named=NAMED_TOKENS,
    chat_template=CHAT_TEMPLATE,
)

_RENAMED = {
    "<|AUDIO|>": "<|audio_pad|>",
    "<|audio_bos|>": "<|audio_start|>",
    "<|audio_eos|>": "<|audio_end|>",
    "<|vision_bos|>": "<|vision_start|>",
    "<|vision_eos|>": "<|vision_end|>",
    "<|IMAGE|>": "<|image_pad|>",
    "<|VIDEO|>": "<|video_pad|>",
}


def _qwen3_template() -> str:
    """Qwen3-Omni's: other markers, and no default system message."""
    head, rest = CHAT_TEMPLATE.split("{%- if messages[0]", 1)
    text = head + rest.split("{%- endif -%}\n", 1)[1]
    for old, new in _RENAMED.items():
        text = text.replace(old, new)
    return text


QWEN3_WORDING = Wording(
    processor_class="Qwen3OmniMoeProcessor",
    # in the order of Qwen3-Omni's ids 151643 to 151675
    added=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<think>",
        "</think>",
        "<|audio_start|>",
        "<|audio_end|>",
        "<|audio_pad|>",
    ),
    # one id each, but text: a completion contains them and decoding keeps them
    ordinary=frozenset({"<think>", "</think>"}),
    named={name: _RENAMED[token] for name, token in NAMED_TOKENS.items()},
    chat_template=_qwen3_template(),
)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    corpus: Iterable[str], *, vocab_size: int = 1024, wording: Wording = QWEN2_5_WORDING
) -> Tokenizer:
    """Learn merges from ``corpus``; at most ``vocab_size`` tokens, special ones included.

    >>> tokenizer = train_tokenizer(["red blue red"], vocab_size=300)
    >>> tokenizer.decode(tokenizer.encode("blue, red, 赤").ids)
    'blue, red, 赤'
    >>> tokenizer.get_vocab_size() <= 300
    True
    """
    tokenizer = qwen2_tokenizer(BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(wording.added),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    for token in wording.added:
        if token in wording.ordinary:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
        else:
            tokenizer.add_special_tokens([AddedToken(token, special=True)])
    return tokenizer


def qwen2_tokenizer(model: BPE) -> Tokenizer:
    """A tokenizer that normalises, splits and decodes as Qwen2's does, around ``model``.

    >>> [word for word, _ in qwen2_tokenizer(BPE()).pre_tokenizer.pre_tokenize_str("It's 12")]
    ['It', "'s", 'Ġ', '1', '2']
    """
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(_WORDS), behavior="isolated"), ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, wording: Wording = QWEN2_5_WORDING) -> None:
    """The tokenizer's files as transformers 4.x writes them: 4.52 to 5.23 all read these alike."""
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for index, token in added.items()
        },
        "additional_special_tokens": list(wording.special[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": dict(wording.named),
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        # "right" here would silently override the processor's default, left
        "padding_side": "left",
        "processor_class": wording.processor_class,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **wording.named,
    }
    special = {
        "additional_special_tokens": list(wording.special[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        **wording.named,
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    for name, content in {
        "vocab.json": model["vocab"],
        "added_tokens.json": {token.content: index for index, token in added.items()},
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(wording.chat_template, encoding="utf-8")
