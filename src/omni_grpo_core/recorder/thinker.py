"""Finds the thinker inside whatever a trainer has wrapped around it, and reads its state.

A wrapper (PEFT, DDP, FSDP, ``torch.compile``, an engine) forwards calls to the one module that
merges media and holds the text model and the head: watching that module sees every call.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.recorder.tensors import local
from omni_grpo_core.trace.calls import Modes
from omni_grpo_core.types import MODALITIES

_INNER = ("_orig_mod", "_fsdp_wrapped_module", "module", "base_model", "model", "thinker")
"""Attributes under which a wrapper keeps the wrapped module."""
_SAMPLED = 64
"""Weights of a parameter that are compared with another model's."""
_TOWERS = {"visual": "vision", "vision_tower": "vision", "audio_tower": "audio"}


@dataclass(frozen=True, slots=True)
class Found:
    """``thinker``: the module with the head. ``text_model``: takes embeddings and positions.
    ``wrappers``: classes around it, outermost first. ``outer``: the model as passed in.
    ``compiled``: modules around it whose calls do not pass its hooks."""

    outer: nn.Module
    thinker: Any
    text_model: nn.Module
    wrappers: tuple[str, ...]
    compiled: tuple[nn.Module, ...]


def find(model: Any) -> Found:
    """The thinker in ``model``.

    Raises :class:`~omni_grpo_core.errors.ConfigError` where there is none.
    """
    around: list[Any] = []
    module = model
    while not _is_thinker(module):
        inner = _inner(module)
        if inner is None:
            raise ConfigError(
                "model",
                got=f"a {type(model).__name__} without a head that a text model feeds",
                want="a causal language model or Qwen-Omni thinker, wrapped or not",
                fix="pass the model that generates and is trained",
            )
        around.append(module)
        module = inner
    kinds = ["_orig_mod" in one._modules or is_rebound(one, "forward", module) for one in around]
    # those around it too: they may call its method, and not it
    compiled = tuple(one for at, one in enumerate(around) if any(kinds[at:]))
    wrappers = tuple(type(one).__name__ for one in around)
    return Found(model, module, text_model_of(module), wrappers, compiled)


def is_rebound(module: Any, name: str, thinker: Any) -> bool:
    """Whether a module around the thinker has the thinker's method as its own, as ms-swift's
    ``use_submodel_func`` sets it: such a call does not look the method up on the thinker."""
    own, method = vars(module).get(name), getattr(thinker, name, None)
    return own is not None and method is not None and _function(own) is _function(method)


def _function(method: Any) -> Any:
    inner = inspect.unwrap(method)
    return getattr(inner, "__func__", inner)


def text_model_of(thinker: Any) -> nn.Module:
    """The module that takes embeddings and positions."""
    body: nn.Module = thinker.model
    # from transformers 5.23 on it is inside the model that merges the media
    inner = body._modules.get("language_model")
    return body if inner is None else inner


def _is_thinker(module: Any) -> bool:
    """The innermost module with a head and a body: PEFT's and FSDP's classes pass attributes
    through, so only a module's own children count."""
    children = getattr(module, "_modules", {})
    return "lm_head" in children and "model" in children


def _inner(module: Any) -> Any:
    children = getattr(module, "_modules", {})
    for name in _INNER:
        if isinstance(children.get(name), nn.Module):
            return children[name]
    # an engine is not always a module
    inner = getattr(module, "module", None)
    return inner if isinstance(inner, nn.Module) and inner is not module else None


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to, by its dotted name.

    >>> part_of("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    'adapter'
    >>> part_of("visual.blocks.0.attn.qkv.weight"), part_of("lm_head.weight")
    ('vision', 'head')
    """
    pieces = name.split(".")
    if any(map(is_adapter, pieces)):
        return "adapter"
    for piece in pieces:
        if piece in _TOWERS:
            return _TOWERS[piece]
    return "head" if "lm_head" in pieces else "text"


def is_adapter(piece: str) -> bool:
    """Whether a piece of a parameter's name is one that PEFT adds."""
    return piece.startswith(("lora_", "modules_to_save", "ia3_", "prompt_encoder"))


def trainable(module: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) for every parameter, each once."""
    for name, parameter in module.named_parameters():
        yield part_of(name), name, parameter


def weights_apart(one: nn.Module, trained: nn.Module) -> Tensor | None:
    """Share of sampled weights being trained that another model has not, at the lower of their
    precisions: a number on the device of ``trained``. ``None`` where it lacks some, such as an
    adapter that was merged into it."""
    named = dict(one.named_parameters())
    found: list[Tensor] = []
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad or not parameter.numel():
            continue
        held = named.get(name)
        if held is None or held.shape != parameter.shape:
            return None
        step = max(1, parameter.numel() // _SAMPLED)
        here, there = (local(p).flatten()[::step] for p in (parameter, held))
        lower = min(here.dtype, there.dtype, key=lambda dtype: dtype.itemsize)
        found.append(here.to(lower) != there.to(here.device, lower))
    return torch.cat(found).float().mean() if found else None


def half_types(module: nn.Module) -> tuple[torch.dtype, ...]:
    """The 16-bit types in which ``module`` may take its inputs: those of its weights, or else any,
    as under autocast.

    >>> half_types(nn.Linear(1, 1).bfloat16()), len(half_types(nn.Linear(1, 1)))
    ((torch.bfloat16,), 2)
    """
    every = (torch.bfloat16, torch.float16)
    held = {parameter.dtype for parameter in module.parameters()}
    return tuple(kind for kind in every if kind in held) or every


def modes(found: Found, *, grad_enabled: bool) -> Modes:
    """The model's current state; ``grad_enabled`` is passed in, as the recorder disables it."""
    text = towers = training = False
    dropout = 0.0
    of_text = set(found.text_model.modules())
    for module in found.thinker.modules():
        if not module.training:
            continue
        checkpoints = getattr(module, "gradient_checkpointing", None)
        training = training or checkpoints is not None or isinstance(module, nn.Dropout)
        dropout = max(dropout, _dropout(module))
        if checkpoints:
            text, towers = text or module in of_text, towers or module not in of_text
    weight = next((p for p in found.text_model.parameters() if p.is_floating_point()), None)
    return Modes(
        training=training or (found.thinker.training and not of_text),
        checkpointing=text,
        tower_checkpointing=towers,
        grad_enabled=grad_enabled,
        dtype="" if weight is None else str(weight.dtype).removeprefix("torch."),
        autocast=autocast_of(weight),
        adapter=_adapter(found.thinker),
        wrappers=found.wrappers,
        dropout=dropout,
    )


def autocast_of(like: Tensor | None) -> str | None:
    """The dtype to which autocast casts now, on the device of a tensor; ``None`` where it is off.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_of(torch.ones(1))
    'bfloat16'
    """
    kind = like.device.type if like is not None else "cpu"
    if not torch.is_autocast_enabled(kind):
        return None
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")


def _dropout(module: nn.Module) -> float:
    """The probability with which a module in train mode drops values, of its own or of a kernel."""
    given = [getattr(module, name, 0.0) for name in ("attention_dropout", "dropout", "dropout_p")]
    own = getattr(module, "p", 0.0) if isinstance(module, nn.modules.dropout._DropoutNd) else 0.0
    return max(float(p) for p in (*given, own) if isinstance(p, int | float))


def _adapter(thinker: nn.Module) -> str | None:
    layers = [m for m in thinker.modules() if "lora_A" in m._modules]
    if not layers:
        return None
    return "off" if all(getattr(layer, "disable_adapters", False) for layer in layers) else "on"


def rope_sections(text_model: Any) -> str:
    """The sections in force, as text; ``""`` if there are none.

    Modules are read before the configuration: some versions read it only once, at construction.

    >>> from types import SimpleNamespace as Model
    >>> rope_sections(Model(config=Model(rope_parameters={"mrope_section": [16, 24, 24]})))
    '16 24 24'
    """
    for sections in _found(text_model):
        return " ".join(str(int(size)) for size in sections)
    return ""


def placeholders(thinker: Any) -> str:
    """Ids that stand for media in a prompt, and how many patches of a side make one, as text.

    >>> from types import SimpleNamespace as Model
    >>> placeholders(Model(config=Model(image_token_id=7, video_token_index=8)))
    'image=7 video=8'
    """
    config = getattr(thinker, "config", None)
    found: dict[str, int] = {}
    for modality in MODALITIES:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if isinstance(token := getattr(config, name, None), int):
                found.setdefault(modality, token)
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    named = {**found, "merge": merge} if isinstance(merge, int) else found
    return " ".join(f"{name}={value}" for name, value in named.items())


def marks(processor: Any) -> str:
    """What a processor writes before, for and after an item of each modality, as JSON: as it names
    them, or as its template renders an item.

    >>> from types import SimpleNamespace as Processor
    >>> marks(Processor(image_token="<img>"))
    '{"image": ["", "<img>", ""]}'
    """
    found = {}
    for modality in MODALITIES:
        token = getattr(processor, f"{modality}_token", None)
        if not isinstance(token, str):
            continue
        sense = "audio" if modality == "audio" else "vision"
        ends = [getattr(processor, f"{sense}_{end}_token", None) for end in ("bos", "eos")]
        if ends == [None, None]:
            begin, placed, end = _rendered(processor, modality).partition(token)
            ends = [begin, end] if placed else ends
        found[modality] = [ends[0] or "", token, ends[1] or ""]
    return json.dumps(found)


def _rendered(processor: Any, modality: str) -> str:
    """An item between two words, as the processor's template renders it; empty where it cannot."""
    item = {"type": modality, modality: ""}
    parts = [{"type": "text", "text": "before"}, item, {"type": "text", "text": "after"}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    except Exception:  # there is no template, or it is one of another form
        return ""
    text = text if isinstance(text, str) else text[0]
    return str(text).rpartition("before")[2].partition("after")[0]


def _found(text_model: Any) -> Iterator[Any]:
    modules = text_model.modules() if hasattr(text_model, "modules") else ()
    for owner in (*modules, getattr(text_model, "config", None)):
        own = getattr(owner, "mrope_section", None)
        if isinstance(own, list | tuple):
            yield own
        for name in ("rope_parameters", "rope_scaling"):
            rope = getattr(owner, name, None)
            if isinstance(rope, dict) and rope.get("mrope_section"):
                yield rope["mrope_section"]
