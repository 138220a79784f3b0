"""Whether prompts fit into the model's positions, from file headers and texts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import BatchError
from omni_grpo_core.training.prompt_estimate import PromptSize, read_config
from omni_grpo_core.types import Dialogue, Sample, TextPart


@dataclass(frozen=True, slots=True)
class Positions:
    """How many tokens a checkpoint's text model takes, and its tokenizer, if it has the file that
    needs no transformers."""

    limit: int
    tokenizer: Any = None

    def text_tokens(self, sample: Sample) -> int:
        """Tokens of the row's own texts; 0 without a tokenizer."""
        if self.tokenizer is None:
            return 0
        return sum(len(self.tokenizer.encode(text).ids) for text in _texts(sample))


def positions_of(checkpoint: Path) -> Positions | None:
    """``None`` for a config that states no limit. Raises ``CheckpointError`` if it is invalid."""
    limit = read_config(checkpoint).get("text_config", {}).get("max_position_embeddings")
    if limit is None:
        return None
    from tokenizers import Tokenizer

    try:
        return Positions(limit, Tokenizer.from_file(str(checkpoint / "tokenizer.json")))
    except Exception:  # no such file, or one that its own check will report
        return Positions(limit)


def too_long(
    sample: Sample, size: PromptSize, new_tokens: int, positions: Positions
) -> BatchError | None:
    """The error of a prompt that, with ``new_tokens``, has more tokens than there are positions,
    with the tokens of each medium."""
    most = size.media + sum(len(text.encode()) for text in _texts(sample))
    if most + new_tokens <= positions.limit:  # a byte is a token at most
        return None
    text = positions.text_tokens(sample)
    if size.media + text + new_tokens <= positions.limit:
        return None
    counted = Counter[str]()
    parts = []
    for modality, tokens in size.items:
        counted[modality] += 1
        parts.append(f"{modality} {counted[modality]}: {tokens}")
    parts.append(f"text: {text}")
    return BatchError(
        f"sample {sample.sample_id} ({sample.origin})",
        got=f"a prompt of at least {size.media + text} tokens ({', '.join(parts)}) and up to "
        f"{new_tokens} new ones",
        want=f"at most {positions.limit} together, the model's positions",
        fix="shorten the text, or lower settings: max_new_tokens, media: fps, max_frames or "
        "max_pixels",
    )


def check_positions(
    samples: Sequence[Sample],
    sizes: Sequence[PromptSize],
    new_tokens: int,
    positions: Positions | None,
) -> None:
    """Raises ``BatchError`` for the first sample that cannot fit into the model's positions."""
    if positions is None:
        return
    for sample, size in zip(samples, sizes, strict=True):
        error = too_long(sample, size, new_tokens, positions)
        if error is not None:
            raise error


def _texts(sample: Sample) -> Iterator[str]:
    for message in sample.history if isinstance(sample, Dialogue) else ():
        yield from (part.text for part in message.parts if isinstance(part, TextPart))
    yield sample.question
    yield from sample.options
