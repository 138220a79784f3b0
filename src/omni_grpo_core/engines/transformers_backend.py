"""transformers behind the same boundary as a real engine: a policy of its own, loaded from the
folders it is given, that sees requests and never the trainer's batch.

What crosses the boundary is real, so a mistake there shows without vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from omni_grpo_core.core.batch import collate, process_row
from omni_grpo_core.core.family import published_name
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.engines.requests import Answer, Drawn, EngineLost, Request, Sampling
from omni_grpo_core.engines.weights import ADAPTER, ADAPTER_CONFIG, fingerprint, is_adapter
from omni_grpo_core.types import MODALITIES, Conversation, Modality, Prompt, Row


class TransformersBackend:
    """:class:`~omni_grpo_core.engines.requests.Backend` by our own rollout."""

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._base: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        return "transformers, its own copy of the policy"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        policy = self._policy
        if policy is None:
            raise _no_weights(self.name)
        suppressed = policy.suppressed.clone().fill_(True)
        suppressed[list(sampling.allowed_ids)] = False
        policy = replace(policy, suppressed=suppressed, eos_token_ids=sampling.eos_ids)
        answers = []
        for request in requests:
            row = row_of(policy, request)
            rolled = rollout(
                policy,
                collate([row], policy.pad_token_id),
                group_size=sampling.group_size,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=request.seed,
            )
            drawn = tuple(
                Drawn(one.token_ids, one.logprobs, one.finish_reason) for one in rolled.completions
            )
            answers.append(Answer(tuple(row.input_ids.tolist()), drawn))
        return answers

    def load(self, folder: Path) -> str:
        if is_adapter(folder):
            self._add(folder)
        else:
            self._policy = load_policy(folder)
            self._base = {k: v.clone() for k, v in self._policy.model.state_dict().items()}
        return fingerprint(folder)

    @torch.no_grad()
    def _add(self, folder: Path) -> None:
        """The base weights with an adapter folder's on top."""
        if self._policy is None:
            raise _no_weights(self.name)
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        named = load_file(folder / ADAPTER)
        for name, weight in self._policy.model.state_dict().items():
            weight.copy_(self._base[name])
            stem = "base_model.model.thinker." + published_name(name).removesuffix(".weight")
            first, second = (named.get(f"{stem}.lora_{part}.weight") for part in "AB")
            if first is not None and second is not None:
                weight += config["lora_alpha"] / config["r"] * (second @ first)

    def sleep(self) -> None:
        """Holds no memory besides its weights."""

    def wake(self) -> None:
        """Never sleeps."""

    def restart(self) -> None:
        self._policy = None

    def close(self) -> None:
        self._policy = None


def _no_weights(name: str) -> EngineLost:
    return EngineLost(name, got="no weights", want="a loaded checkpoint", fix="load one first")


def row_of(policy: Policy, request: Request) -> Row:
    """The request as a row. As in vLLM, only the first of several adjacent placeholders is
    expanded: a prompt that was expanded already is read with what is left of them behind it."""
    names = {m: str(getattr(policy.processor, f"{m}_token")) for m in MODALITIES}
    pattern = "|".join(f"(?:{re.escape(name)})+" for name in names.values())
    text = re.sub(pattern, lambda found: _first(found[0], names), request.text)
    counts = {m: text.count(name) for m, name in names.items()}
    sample = request.media.sample_id
    row = process_row(
        Prompt(sample, text, counts),
        Conversation(sample, (), request.audio_in_video),
        request.media,
        policy.processor,
        policy.family,
    )
    if text == request.text:
        return row
    left: dict[tuple[str, int], int] = {}
    for found in re.finditer(pattern, request.text):
        modality = next(m for m, name in names.items() if found[0].startswith(name))
        item = sum(kind == modality for kind, _ in left)
        left[modality, item] = found[0].count(names[modality]) - 1
    return _with_left_over(row, left)


def _first(placeholders: str, names: Mapping[Modality, str]) -> str:
    return next(name for name in names.values() if placeholders.startswith(name))


def _with_left_over(row: Row, left: Mapping[tuple[str, int], int]) -> Row:
    """``left``: by modality and item, the unfilled placeholders that stand behind it."""
    last = {(span.modality, span.item): at for at, span in enumerate(row.spans)}
    ids, spans, added = row.input_ids, [], 0
    for at, span in enumerate(row.spans):
        begin = span.start + added
        spans.append(replace(span, start=begin))
        what = (span.modality, span.item)
        if last[what] == at:
            end, count = begin + span.length, left.get(what, 0)
            ids = torch.cat([ids[:end], ids[begin].repeat(count), ids[end:]])
            added += count
    return replace(row, input_ids=ids, spans=tuple(spans))
