"""Checkpoint -> Policy: weights, processor, eos ids, and ids that are never sampled.

Tokens are sampled only under ``generating``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from omni_grpo_core.core.agreement import check_agreement
from omni_grpo_core.core.checkpoint_files import (
    GENERATION,
    check_config,
    check_counts,
    check_generation,
    read_object,
    refuse_adapter,
    wrong_sections,
)
from omni_grpo_core.core.dialect import modes_restored
from omni_grpo_core.core.family import Family, family_of, published_name
from omni_grpo_core.core.processor_files import check_processor_files
from omni_grpo_core.core.template_trial import template_fault
from omni_grpo_core.core.weight_headers import weight_shapes
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.io import is_out_of_memory

_LIBRARY = Version(transformers.__version__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_TABLE = 1 << 28
"""Elements of a buffer that is computed rather than loaded, such as an audio tower's positions."""
_LONGEST_ERROR = 400
"""Characters of a library's error message; torch lists every weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A thinker, its processor, and which tokens it may sample.

    ``eos_token_ids``: any of them ends a completion. ``suppressed``: bool, (V,): ids that a
    completion never contains: every special token except the eos, and ids without a token in the
    tokenizer. A sampled media token would break the scoring forward.
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
        """Side in pixels of one patch of the vision tower."""
        return int(self.processor.image_processor.patch_size)

    @property
    def max_positions(self) -> int:
        """Most tokens that the text model supports, prompt and completion together."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def text_model(self) -> Any:
        """The decoder alone, also of a thinker that PEFT has wrapped. From 5.23 on it is inside the
        model that merges the media."""
        thinker = getattr(self.model, "get_base_model", lambda: self.model)()
        return getattr(thinker.model, "language_model", thinker.model)

    def deepstack_mask(self, visual: Tensor) -> Tensor:
        """Mask of the image and video tokens, (B, L), as the text model takes it: 4.x expects it
        expandable over the hidden size."""
        return visual[..., None] if Version("5") > _LIBRARY else visual

    @property
    def library_joins_pictures(self) -> bool:
        """Whether transformers' own forward takes images and videos in one call: 4.x masks
        deepstack features of the wrong shape, and raises."""
        return not self.family.deepstack or Version("5") <= _LIBRARY

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of raw ids, special tokens kept: skipping them would hide a broken policy."""
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
    HumanOmniV2's style (thinker weights, processor kept elsewhere: ``processor``). Weights are read
    in ``dtype`` and onto ``device`` one by one, if accelerate is installed.

    Raises:
        CheckpointError: no folder, no config, another architecture or one that the installed
            transformers does not have, no processor or one that disagrees with the model, a chat
            template that does not run, weights that are missing, of another shape or not finite,
            no eos, or rope sections that do not fit the head size.
    """
    folder = Path(path)
    files = Path(processor or folder)
    refuse_adapter(folder)
    config = read_object(folder / "config.json")
    family = family_of(config.get("model_type"), str(folder))
    require_library(folder, family)
    check_config(config, folder)
    check_generation(config, folder)
    check_processor_files(files, family)
    shapes = weight_shapes(folder)
    check_counts(config, shapes, folder)
    empty = empty_thinker(folder, family, config)
    _check_shapes(folder, empty, shapes)
    _check_rope_sections(folder, empty)
    loaded = load_processor(files, family)
    check_template(files, loaded)
    check_agreement(loaded, empty.config, family, empty.lm_head.weight.shape[0], str(folder))
    _check_generation_config(folder)
    model = _load_thinker(folder, family, dtype, attn_implementation, device).to(device).eval()
    if dtype == "float32" and model.device.type == "cuda":
        # by default cuDNN's convolutions round to ten bits: the towers' patches were off by 6e-5
        torch.backends.cudnn.allow_tf32 = False
    _check_finite(folder, model)
    return policy_around(model, loaded, family, str(folder))


def policy_around(model: Any, processor: Any, family: Family, checkpoint: str) -> Policy:
    """A policy from a thinker and a processor in memory; ``checkpoint`` is only a name here. Raises
    ``CheckpointError`` if there is no eos token."""
    tokenizer = processor.tokenizer
    vocabulary = model.lm_head.weight.shape[0]
    eos = _eos_token_ids(checkpoint, model, tokenizer)
    pad = tokenizer.pad_token_id
    return Policy(
        model=model,
        processor=processor,
        family=family,
        checkpoint=checkpoint,
        eos_token_ids=eos,
        pad_token_id=int(eos[0] if pad is None else pad),
        suppressed=_suppressed(tokenizer, vocabulary, eos).to(model.device),
    )


def require_library(folder: Path, family: Family) -> None:
    """Raises CheckpointError if the installed transformers does not have the family."""
    if not hasattr(transformers, family.thinker_class):
        raise CheckpointError(
            str(folder),
            got=f"a {family.name} checkpoint under transformers {transformers.__version__}",
            want=f"transformers {family.since} or newer, which has {family.thinker_class}",
            fix=f"pip install 'transformers>={family.since}'",
        )


def load_processor(folder: Path, family: Family) -> Any:
    """A family's processor from its files. Raises ``CheckpointError`` if they do not make one."""
    with _loading(
        f"processor in {folder}",
        want=f"files of a {family.processor_class}",
        fix="copy the processor files from the base checkpoint",
    ):
        return getattr(transformers, family.processor_class).from_pretrained(
            folder, local_files_only=True
        )


def _check_generation_config(folder: Path) -> None:
    """transformers validates it while it loads the weights, and would blame the weights."""
    path = folder / GENERATION
    if path.exists():
        with _loading(str(path), want="settings for generate", fix="correct or remove them"):
            transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)


def check_template(folder: Path, processor: Any) -> None:
    """Raises ``CheckpointError`` if a processor's chat template is missing or does not run."""
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    got = "none" if not isinstance(template, str) else template_fault(template)
    if isinstance(template, str) and not template.strip():
        got = "an empty template"
    if got:
        raise CheckpointError(
            f"chat template in {folder}",
            got=got,
            want="a template that renders text and media",
            fix="restore the chat template that came with the base model",
        )


def empty_thinker(folder: Path, family: Family, content: Mapping[str, Any]) -> Any:
    """The thinker of the config, without memory for its weights."""
    thinker = getattr(transformers, family.thinker_class)
    with _loading(
        str(folder / "config.json"),
        want=f"the config of a {family.thinker_class}",
        fix="use the config that was saved with these weights",
        content=content,
    ):
        if "thinker_config" in content:
            # later steps read the talker's part too, and would blame something else
            transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config = thinker.config_class.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return thinker(config)


def _check_shapes(folder: Path, empty: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``CheckpointError`` if a weight's shape differs from the config's, or if the config
    asks for far more weights than the files have: they would be allocated first."""
    wanted = {published_name(name): tuple(p.shape) for name, p in empty.named_parameters()}
    some = next(iter(wanted))
    before = [n.removesuffix(some) for n in shapes if n.endswith(f".{some}")]
    if some not in shapes and before:
        raise CheckpointError(
            f"weights in {folder}",
            got=f"names with the prefix {before[0]!r}: {before[0]}{some}",
            want=some,
            fix="save the wrapped model, not its wrapper (DataParallel, torch.compile, peft)",
        )
    wrong = [n for n in wanted if n in shapes and shapes[n] != wanted[n]]
    if wrong:
        raise CheckpointError(
            f"weights in {folder}",
            got=f"{wrong[0]} of shape {list(shapes[wrong[0]])}"
            + (f", and {len(wrong) - 1} more of another shape" if len(wrong) > 1 else ""),
            want=f"{list(wanted[wrong[0]])}, as in config.json",
            fix="use the config that was saved with these weights",
        )
    asked, stored = (sum(map(math.prod, found.values())) for found in (wanted, shapes))
    tables = {name: b.numel() for name, b in empty.named_buffers() if b.numel() > _LARGEST_TABLE}
    if asked > 2 * stored or tables:
        raise CheckpointError(
            str(folder / "config.json"),
            got=f"a model of {asked} parameters"
            if not tables
            else f"{next(iter(tables))} of {max(tables.values())} elements",
            want=f"the {stored} parameters of the weight files",
            fix="use the config that was saved with these weights",
        )


def _load_thinker(folder: Path, family: Family, dtype: str, attention: str, device: str) -> Any:
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"dtype {dtype}", got=dtype, want=" or ".join(_DTYPES), fix="choose one of them"
        )
    keyword = "dtype" if Version("4.56") <= _LIBRARY else "torch_dtype"
    with _loading(
        f"weights in {folder}",
        want=f"weights of a {family.thinker_class}",
        fix="check that the download is complete and that the config is the checkpoint's own",
    ):
        model, info = getattr(transformers, family.thinker_class).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention,
            output_loading_info=True,
            # without accelerate transformers refuses it, and the model passes through host memory
            device_map=None if device == "cpu" or find_spec("accelerate") is None else device,
            **{keyword: _DTYPES[dtype]},
        )
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(
            f"weights in {folder}",
            got=f"{len(wrong)} weights missing or of another shape, first {wrong[0]}",
            want="every weight of the thinker: missing ones would be random",
            fix="use the config that was saved with these weights",
        )
    return model


def _check_finite(folder: Path, model: Any) -> None:
    bad = [name for name, weight in model.named_parameters() if not _is_finite(weight)]
    if bad:
        raise CheckpointError(
            f"weights in {folder}",
            got=f"non-finite values in {bad[0]}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else ""),
            want="finite weights",
            fix="go back to an earlier checkpoint whose weights are finite",
        )


def _is_finite(weight: Tensor) -> bool:
    # a sum needs no mask as large as the weights; but a sum of finite values can overflow
    return bool(weight.detach().sum(dtype=torch.float32).isfinite()) or bool(
        weight.detach().isfinite().all()
    )


@contextmanager
def _loading(
    item: str, *, want: str, fix: str, content: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Turns whatever a broken file makes a library raise into a ``CheckpointError`` for ``item``,
    and hides the library's warnings. ``content``: of the file, in which the missing key of a
    ``KeyError``, which names nothing else, is looked up."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split()) or "no message"
        if isinstance(error, KeyError) and error.args:
            text += "".join(f", the value of {key}" for key in _keys_of(error.args[0], content)[:1])
        got = f"{type(error).__name__}: {text[:_LONGEST_ERROR]}"
        raise CheckpointError(item, got=got, want=want, fix=fix) from error


def _keys_of(value: Any, content: Any) -> list[str]:
    """Where a config has a value: ``text_config hidden_act``."""
    if not isinstance(content, Mapping):
        return []
    return [
        key if found == value else f"{key} {place}"
        for key, found in content.items()
        for place in (_keys_of(value, found) or [""])
        if found == value or place
    ]


def _check_rope_sections(folder: Path, model: Any) -> None:
    """A checkpoint saved by another major version of transformers can silently load with default
    rope sections: every position is then wrong and nothing is raised."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    sections = rope.get("mrope_section")
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not sections or 2 * sum(sections) != head:
        raise wrong_sections(folder, sections, head)


def _eos_token_ids(checkpoint: str, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion. transformers does not fall back to a model config's eos, and
    thinker-only checkpoints come without a generation config: they would never stop."""
    found: list[Any] = []
    for source in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found += source if isinstance(source, (list, tuple)) else [source]
    found.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    unknown = tokenizer.unk_token_id
    eos = tuple(dict.fromkeys(i for i in found if i is not None and i != unknown))
    vocabulary = model.lm_head.weight.shape[0]
    strange = [i for i in eos if not isinstance(i, int) or not 0 <= i < vocabulary]
    if strange or not eos:
        raise CheckpointError(
            checkpoint,
            got=f"eos_token_id {strange[0]!r}"
            if strange
            else "no eos token in generation config or tokenizer",
            want=f"at least one, each from 0 to {vocabulary - 1}",
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
    """Eval mode, no gradient checkpointing and no cuDNN attention; all is restored on exit, even
    after an error.

    cuDNN, which torch prefers on recent devices, adds up a long cache in an order that changes from
    run to run: the same prompt got other tokens. The other kernels are as fast.

    In train mode with checkpointing on, transformers 4.53 to 5.23 drops the key-value cache inside
    every block while generation keeps feeding one token at a time: from the second token on the
    model sees neither prompt nor history. That was the incident. 5.24 and later drop it only with
    gradients enabled.
    """
    with modes_restored(model):
        model.eval()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False  # type: ignore[assignment]
        kernels: Any = torch.backends.cuda
        cudnn = kernels.cudnn_sdp_enabled()
        kernels.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            kernels.enable_cudnn_sdp(cudnn)


def library_generate(policy: Policy, inputs: Mapping[str, Any], **settings: Any) -> Tensor:
    """transformers' own ``generate``: int64, (N, prompt + new tokens).

    ``settings``: of a ``GenerationConfig``, greedy without ``do_sample``. The checkpoint's own is
    ignored: its beams, penalties or minimum lengths have no part in a rollout, so completions that
    follow it could not be compared with one.
    """
    model = policy.model
    plain = transformers.GenerationConfig(
        eos_token_id=list(policy.eos_token_ids),
        pad_token_id=policy.pad_token_id,
        **{"do_sample": False, **settings},
    )
    own = model.generation_config
    # generate fills unset values of the config passed to it from the model's
    model.generation_config = plain
    try:
        sequences: Tensor = model.generate(**inputs, generation_config=plain)
    finally:
        model.generation_config = own
    return sequences
