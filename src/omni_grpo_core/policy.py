"""Checkpoint -> Policy: weights, processor, what ends a completion and what it never contains.

``generating`` is the only mode in which tokens are sampled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.family import Family, family_of

_LIBRARY = Version(transformers.__version__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A thinker, its processor, and what it may say.

    ``eos_token_ids``: any of them ends a completion. ``suppressed``: bool, (V,): ids that a
    completion never contains: every special token but the eos, and ids the tokenizer has no token
    for. A sampled media token would break the scoring forward.
    """

    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    family: Family
    checkpoint: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    suppressed: Tensor = field(repr=False)

    @property
    def device(self) -> torch.device:
        return self.suppressed.device

    @property
    def patch_size(self) -> int:
        """Pixels a side of one patch of the vision tower."""
        return int(self.processor.image_processor.patch_size)

    @property
    def text_model(self) -> Any:
        """The decoder alone. From 5.23 on it stands inside the model that merges the media."""
        return getattr(self.model.model, "language_model", self.model.model)

    def deepstack_mask(self, visual: Tensor) -> Tensor:
        """Which tokens are of images or videos, (B, L), as the text model takes it: 4.x looks into
        a copy for every hidden element."""
        return visual[..., None] if Version("5") > _LIBRARY else visual

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of raw ids, special tokens kept: hidden ones hide a broken policy."""
        text = self.processor.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


# --------------------------------------------------------------------------- loading


def load_policy(
    path: str | Path,
    *,
    processor: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> Policy:
    """Load a full Qwen-Omni checkpoint (talker left out), a thinker-only one, or one in
    HumanOmniV2's style (thinker weights, processor kept elsewhere: ``processor``).

    Raises:
        CheckpointError: no folder, no config, another architecture or one that the installed
            transformers does not have, no processor, weights that are missing or of another shape,
            no eos, rope sections that do not fit the head size.
    """
    folder = Path(path)
    config = _read_json(folder, "config.json")
    family = family_of(str(config.get("model_type")), str(folder))
    require_library(folder, family)
    loaded_processor = _load_processor(Path(processor or folder), family)
    model = _load_thinker(folder, family, dtype, attn_implementation).to(device).eval()
    if dtype == "float32" and model.device.type == "cuda":
        # cuDNN's convolutions round to ten bits by default: the towers' patches were 6e-5 off
        torch.backends.cudnn.allow_tf32 = False
    _check_rope_sections(folder, model)
    return policy_around(model, loaded_processor, family, str(folder))


def policy_around(model: Any, processor: Any, family: Family, checkpoint: str) -> Policy:
    """A policy of a thinker and a processor that are in memory already; ``checkpoint`` is only a
    name here. Raises ``CheckpointError`` where nothing says what ends a completion."""
    tokenizer = processor.tokenizer
    eos = _eos_token_ids(checkpoint, model, tokenizer)
    pad = tokenizer.pad_token_id
    vocabulary = model.lm_head.weight.shape[0]
    return Policy(
        model=model,
        processor=processor,
        family=family,
        checkpoint=checkpoint,
        eos_token_ids=eos,
        pad_token_id=int(eos[0] if pad is None else pad),
        suppressed=_suppressed(tokenizer, vocabulary, eos).to(model.device),
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(folder / name),
            got="no such file" if isinstance(error, FileNotFoundError) else str(error),
            want="a checkpoint folder as save_pretrained writes it",
            fix="point to the folder that holds config.json, weights and processor files",
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            str(folder / name),
            got=type(content).__name__,
            want="a JSON object",
            fix="restore the file from the checkpoint's source",
        )
    return content


def require_library(folder: Path, family: Family) -> None:
    """Raises CheckpointError if the installed transformers does not have the family."""
    if not hasattr(transformers, family.thinker_class):
        raise CheckpointError(
            str(folder),
            got=f"a {family.name} checkpoint under transformers {transformers.__version__}",
            want=f"transformers {family.since} or newer, which has {family.thinker_class}",
            fix=f"pip install 'transformers>={family.since}'",
        )


def _load_processor(folder: Path, family: Family) -> Any:
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            str(folder),
            got="no preprocessor_config.json",
            want="a processor beside the weights",
            fix="copy the processor files from the base checkpoint, or name their folder",
        )
    try:
        return getattr(transformers, family.processor_class).from_pretrained(
            folder, local_files_only=True
        )
    except Exception as error:  # whatever a broken file makes transformers raise
        raise CheckpointError(
            f"processor in {folder}",
            got=f"{type(error).__name__}: {_first_line(error)}",
            want=f"files of a {family.processor_class}",
            fix="copy the processor files from the base checkpoint",
        ) from error


def _load_thinker(folder: Path, family: Family, dtype: str, attention: str) -> Any:
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"dtype {dtype}", got=dtype, want=" or ".join(_DTYPES), fix="choose one of them"
        )
    keyword = "dtype" if Version("4.56") <= _LIBRARY else "torch_dtype"
    try:
        model, info = getattr(transformers, family.thinker_class).from_pretrained(
            folder,
            local_files_only=True,
            attn_implementation=attention,
            output_loading_info=True,
            **{keyword: _DTYPES[dtype]},
        )
    except Exception as error:  # whatever a broken file makes transformers raise
        raise CheckpointError(
            f"weights in {folder}",
            got=f"{type(error).__name__}: {_first_line(error)}",
            want=f"weights of a {family.thinker_class}",
            fix="check that the download is complete and the config is the checkpoint's own",
        ) from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(
            f"weights in {folder}",
            got=f"{len(wrong)} weights missing or of another shape, first {wrong[0]}",
            want="every weight of the thinker: missing ones would be random",
            fix="use the config that was saved with these weights",
        )
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _check_rope_sections(folder: Path, model: Any) -> None:
    """A checkpoint saved by another major version of transformers can load with its rope sections
    silently defaulted: every position is then wrong and nothing is raised."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    sections = rope.get("mrope_section")
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not sections or 2 * sum(sections) != head:
        raise CheckpointError(
            str(folder / "config.json"),
            got=f"mrope_section {sections} for a head size of {head}",
            want=f"three sections that sum to {head // 2}",
            fix="write rope_parameters and rope_scaling as both library generations read them",
        )


def _eos_token_ids(checkpoint: str, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion. A model config's eos is no fallback in transformers, and
    thinker-only checkpoints come without a generation config: they never stop."""
    found: list[int] = []
    for source in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found += source if isinstance(source, list) else [source]
    found.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    unknown = tokenizer.unk_token_id
    eos = tuple(dict.fromkeys(int(i) for i in found if i is not None and i != unknown))
    if not eos:
        raise CheckpointError(
            checkpoint,
            got="no eos token in generation config or tokenizer",
            want="at least one",
            fix="set eos_token_id in generation_config.json",
        )
    return eos


def _suppressed(tokenizer: Any, vocabulary: int, eos: tuple[int, ...]) -> Tensor:
    suppressed = torch.zeros(vocabulary, dtype=torch.bool)
    suppressed[len(tokenizer) :] = True
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    suppressed[special] = True
    suppressed[list(eos)] = False
    return suppressed


# --------------------------------------------------------------------------- modes


@contextmanager
def generating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradient checkpointing, restored on the way out, even on an error.

    In train mode with checkpointing on, transformers 4.53 to 5.23 drops the key-value cache inside
    every block while generation goes on feeding one token at a time: from the second token on the
    model sees neither prompt nor history. That was the incident. 5.24 and later drop it only where
    gradients are enabled.
    """
    training = {module: module.training for module in model.modules()}
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    model.eval()
    for module in checkpointing:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        for module, mode in training.items():
            module.training = mode
