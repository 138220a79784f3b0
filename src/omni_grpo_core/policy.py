"""Checkpoint -> Policy, and every forward the project makes with it.

One way in for media (towers, then scattered over the placeholders), one for positions (row by row,
with each row's own audio-in-video decision), so that prefill, decoding and the scoring forward
cannot disagree. ``generating`` is the only mode in which tokens are sampled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.family import Family, family_of
from omni_grpo_core.types import MODALITIES, Batch, Embeddings, Logits, Modality, Positions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FEATURES: Mapping[Modality, tuple[str, tuple[str, ...]]] = {
    "image": ("get_image_features", ("pixel_values", "image_grid_thw")),
    "video": ("get_video_features", ("pixel_values_videos", "video_grid_thw")),
    "audio": ("get_audio_features", ("input_features", "feature_attention_mask")),
}


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A thinker, its processor, and what it may say.

    ``eos_token_ids``: any of them ends a completion. ``suppressed``: bool, (V,): ids that a
    completion never contains: every special token but the eos, and ids the tokenizer has no token
    for. A sampled media token would break the scoring forward.
    """

    model: Any
    processor: Any
    family: Family
    checkpoint: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    suppressed: Tensor

    @property
    def device(self) -> torch.device:
        return self.suppressed.device

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of raw ids, special tokens kept: hidden ones hide a broken policy."""
        text = self.processor.tokenizer.decode(
            list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A prompt's one pass: scores for the next token, float32 (B, V), and the key-value cache."""

    logits: Logits
    positions: Positions
    cache: Any


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
        CheckpointError: no folder, no config, another architecture, no processor, weights that
            are missing or of another shape, no eos, rope sections that do not fit the head size.
    """
    folder = Path(path)
    config = _read_json(folder, "config.json")
    family = family_of(str(config.get("model_type")), str(folder))
    loaded_processor = _load_processor(Path(processor or folder), family)
    model = _load_thinker(folder, family, dtype, attn_implementation).to(device).eval()
    _check_rope_sections(folder, model)
    eos = _eos_token_ids(folder, model, loaded_processor.tokenizer)
    tokenizer = loaded_processor.tokenizer
    pad = tokenizer.pad_token_id
    vocabulary = model.lm_head.weight.shape[0]
    return Policy(
        model=model,
        processor=loaded_processor,
        family=family,
        checkpoint=str(folder),
        eos_token_ids=eos,
        pad_token_id=int(eos[0] if pad is None else pad),
        suppressed=_suppressed(tokenizer, vocabulary, eos).to(device),
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
    keyword = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
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


def _eos_token_ids(folder: Path, model: Any, tokenizer: Any) -> tuple[int, ...]:
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
            str(folder),
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

    In train mode with checkpointing on, transformers >= 4.53 drops the key-value cache inside
    every block while generation goes on feeding one token at a time: from the second token on the
    model sees neither prompt nor history. That was the incident.
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


# --------------------------------------------------------------------------- forwards


def positions(policy: Policy, batch: Batch) -> Positions:
    """Time, height and width position of every token, each row by its own audio-in-video decision.

    transformers computes these with one flag for the whole batch, so rows go one by one.
    Multimodal rotary embedding: Qwen2-VL (arXiv 2409.12191, section 2.1), aligned to real time in
    TMRoPE, Qwen2.5-Omni (arXiv 2503.20215, section 2.1).
    """
    # padding is masked out of attention; 1 is the value transformers gives it
    ids = torch.ones(3, *batch.input_ids.shape, dtype=torch.int64)
    deltas = []
    for index, row in enumerate(batch.rows):
        tensors = {key: value.to(policy.device) for key, value in row.tensors.items()}
        mask = tensors.get("feature_attention_mask")
        row_ids, _ = policy.model.get_rope_index(
            row.input_ids[None].to(policy.device),
            tensors.get("image_grid_thw"),
            tensors.get("video_grid_thw"),
            torch.ones_like(row.input_ids)[None].to(policy.device),
            row.audio_in_video == "interleaved",
            None if mask is None else mask.sum(-1),
            tensors.get("video_second_per_grid"),
        )
        row_ids = row_ids[:, 0].cpu().to(torch.int64)
        length = len(row.input_ids)
        ids[:, index, batch.input_ids.shape[1] - length :] = row_ids
        deltas.append(int(row_ids.max()) + 1 - length)
    return Positions(ids, torch.tensor(deltas, dtype=torch.int64))


def features(policy: Policy, batch: Batch) -> dict[Modality, Tensor]:
    """What each modality's tower gives for the whole batch: (placeholders, H), in token order."""
    result: dict[Modality, Tensor] = {}
    for modality, (method, keys) in _FEATURES.items():
        if keys[0] in batch.tensors:
            inputs = {key: batch.tensors[key].to(policy.device) for key in keys}
            inputs[keys[0]] = inputs[keys[0]].to(policy.model.dtype)
            result[modality] = _feature_tensor(getattr(policy.model, method)(**inputs))
    return result


def _feature_tensor(output: Any) -> Tensor:
    """4.x gives a tensor; 5.x an output whose ``pooler_output`` lists vision items, and whose
    ``last_hidden_state`` holds audio."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        hidden: Tensor = output.last_hidden_state
        return hidden
    return pooled if isinstance(pooled, Tensor) else torch.cat(list(pooled))


def embed(policy: Policy, batch: Batch) -> Embeddings:
    """Token embeddings with the towers' features in the place of the placeholders."""
    ids = batch.input_ids.to(policy.device)
    embeds = policy.model.get_input_embeddings()(ids)
    by_modality = features(policy, batch)
    cursor = dict.fromkeys(MODALITIES, 0)
    rows = []
    for index, (row, pad) in enumerate(zip(batch.rows, batch.pads, strict=True)):
        row_features = []
        for span in row.spans:
            begin = cursor[span.modality]
            part = by_modality[span.modality][begin : begin + span.length].to(embeds.dtype)
            cursor[span.modality] += span.length
            row_features.append(part)
        rows.append(tuple(row_features))
        if row.spans:
            where = torch.cat([torch.arange(s.start, s.start + s.length) for s in row.spans]) + pad
            place = (torch.full_like(where, index).to(ids.device), where.to(ids.device))
            embeds = embeds.index_put(place, torch.cat(row_features))
    return Embeddings(embeds, tuple(rows))


def prefill(policy: Policy, batch: Batch) -> Prefill:
    """The prompts' one pass: next-token scores and the cache that decoding goes on from."""
    where = positions(policy, batch)
    output = policy.model.model(
        inputs_embeds=embed(policy, batch).inputs_embeds,
        attention_mask=batch.attention_mask.to(policy.device),
        position_ids=where.position_ids.to(policy.device),
        use_cache=True,
    )
    logits = policy.model.lm_head(output.last_hidden_state[:, -1]).float()
    return Prefill(Logits(logits), where, output.past_key_values)


def decode_step(
    policy: Policy, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
) -> Tensor:
    """Scores after one more token: ``token_ids`` (N,), ``attention_mask`` (N, so far + 1),
    ``position_ids`` (N,) -> float32 (N, V). The cache grows in place."""
    output = policy.model.model(
        inputs_embeds=policy.model.get_input_embeddings()(token_ids[:, None]),
        attention_mask=attention_mask,
        position_ids=position_ids[None, :, None].expand(3, -1, 1),
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = policy.model.lm_head(output.last_hidden_state[:, -1]).float()
    return logits


def completion_logits(
    policy: Policy, batch: Batch, completion_ids: Tensor, completion_mask: Tensor
) -> Tensor:
    """The scoring forward: scores that *predict* each completion token, (N, C, V).

    ``completion_ids``, ``completion_mask``: int64, (N, C), right-padded, G rows in a row for each
    row of ``batch``. Copies for the G completions are made after the towers, of the embeddings:
    repeating pixel rows would scramble the video patch by patch.
    """
    copies = completion_ids.shape[0] // len(batch.rows)
    completion_ids = completion_ids.to(policy.device)
    where = positions(policy, batch)
    embeds = torch.cat(
        [
            embed(policy, batch).inputs_embeds.repeat_interleave(copies, dim=0),
            policy.model.get_input_embeddings()(completion_ids),
        ],
        dim=1,
    )
    steps = torch.arange(completion_ids.shape[1])
    after = first_positions(batch, where).repeat_interleave(copies)[:, None] + steps
    prompt_ids = where.position_ids.repeat_interleave(copies, dim=1)
    position_ids = torch.cat([prompt_ids, after.expand(3, -1, -1)], dim=2)
    mask = batch.attention_mask.repeat_interleave(copies, dim=0)
    output = policy.model.model(
        inputs_embeds=embeds,
        attention_mask=torch.cat([mask, completion_mask.cpu()], dim=1).to(policy.device),
        position_ids=position_ids.to(policy.device),
        use_cache=False,
    )
    length = completion_ids.shape[1]
    logits: Tensor = policy.model.lm_head(output.last_hidden_state[:, -length - 1 : -1])
    return logits


def first_positions(batch: Batch, where: Positions) -> Tensor:
    """Position of the first completion token of each row: int64, (B,), equal on all three axes."""
    return batch.attention_mask.sum(-1) + where.deltas


def sampling_logprobs(policy: Policy, logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the distribution that is sampled: float32, at ``temperature``, without
    the suppressed ids, over the last axis. Scoring must use the same, or the ratio is not 1."""
    scores = logits.float() / temperature
    return scores.masked_fill(policy.suppressed, -torch.inf).log_softmax(-1)
