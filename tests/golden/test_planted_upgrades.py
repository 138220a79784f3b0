"""Twelve upgrades planted one at a time: each is found and attributed to the stage it is in.

An upgrade is planted where it would occur: in the library's processor or model, in the checkpoint,
or in the part of this package that a change would touch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode

from omni_grpo_core.core import batch, frame_sampling, rollout
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.core.rollout import draws
from omni_grpo_core.errors import TraceError
from omni_grpo_core.golden import steps
from omni_grpo_core.golden.checking import check
from omni_grpo_core.golden.pending import record
from omni_grpo_core.golden.results import GoldenReport, Verdict
from omni_grpo_core.golden.suite import load_suite
from omni_grpo_core.pipeline import inputs
from omni_grpo_core.types import Batch

KEY = "cpu-fp32"
Plant = Callable[[pytest.MonkeyPatch, Policy], Policy]


@pytest.fixture(scope="module")
def stored(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goldens of every shipped case, made from the current code."""
    folder = tmp_path_factory.mktemp("golden")
    record(policy, load_suite(folder), folder, KEY)
    return folder


@pytest.fixture
def own(policy: Policy) -> Policy:
    """A policy that a test may change."""
    return replace(policy, model=copy.deepcopy(policy.model))


def template_text(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    template = policy.processor.chat_template
    changed = template.replace("<|im_start|>", "<|im_start|> ", 1)
    assert changed != template
    monkeypatch.setattr(policy.processor, "chat_template", changed)
    return policy


def special_token_id(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """The tokenizer of another release: two special tokens have swapped ids."""
    tokenizer = policy.processor.tokenizer
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    process = batch.process_row

    def swapped(*arguments: Any, **keywords: Any) -> Any:
        row = process(*arguments, **keywords)
        ids = row.input_ids.clone()
        ids[row.input_ids == start], ids[row.input_ids == end] = end, start
        return replace(row, input_ids=ids)

    monkeypatch.setattr(inputs, "process_row", swapped)
    return policy


def padding_side(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    collate = batch.collate

    def right(rows: Any, pad: int) -> Batch:
        left = collate(rows, pad)
        ids, mask = left.input_ids.clone(), left.attention_mask.clone()
        for index, count in enumerate(left.pads):
            ids[index], mask[index] = ids[index].roll(-count), mask[index].roll(-count)
        return replace(left, input_ids=ids, attention_mask=mask)

    monkeypatch.setattr(inputs, "collate", right)
    return policy


def resize_filter(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """Frames resized with another release's filter."""
    bilinear = SimpleNamespace(BICUBIC=InterpolationMode.BILINEAR)
    monkeypatch.setattr(frame_sampling, "InterpolationMode", bilinear)
    return policy


def fps_default(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """The library ignores the rate it is given and uses its own default."""
    call = type(policy.processor).__call__

    def ignoring(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return call(self, *arguments, **{**keywords, **({"fps": 2.0} if "fps" in keywords else {})})

    monkeypatch.setattr(type(policy.processor), "__call__", ignoring)
    return policy


def position_formula(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    index = policy.model.get_rope_index

    def later(*arguments: Any, **keywords: Any) -> Any:
        ids, deltas = index(*arguments, **keywords)
        # positions from 40 on move by one, as when bos is counted
        return ids + (ids >= 40), deltas

    monkeypatch.setattr(policy.model, "get_rope_index", later)
    return policy


def attention_mask(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """The text model attends to padding."""
    text_model = policy.text_model
    inner = text_model.forward

    @functools.wraps(inner)
    def unmasked(*arguments: Any, **keywords: Any) -> Any:
        mask = keywords.get("attention_mask")
        if mask is not None:
            keywords["attention_mask"] = torch.ones_like(mask)
        return inner(*arguments, **keywords)

    monkeypatch.setattr(text_model, "forward", unmasked)
    return policy


def dtype(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    """Weights are loaded in a different dtype than requested."""
    return replace(policy, model=policy.model.to(torch.bfloat16))


def one_layer(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    with torch.no_grad():
        policy.text_model.layers[1].mlp.down_proj.weight.mul_(1.001)
    return policy


def another_checkpoint(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * parameter.std(unbiased=False) * noise)
    return policy


def eos_removed(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    return replace(policy, eos_token_ids=(policy.pad_token_id,))


def loss_normaliser(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> Policy:
    loss = replace(steps.PLAN.loss, loss_type="grpo")
    monkeypatch.setattr(steps, "PLAN", replace(steps.PLAN, loss=loss))
    return policy


ALL = ("interleaved", "padded", "resized", "grpo")
DRIFT: tuple[Verdict, ...] = ("benign-drift", "harmful")
UPGRADES: dict[str, tuple[Plant, str, tuple[Verdict, ...], tuple[str, ...]]] = {
    "template text": (template_text, "text", ("harmful",), ("text", "image")),
    "special token id": (special_token_id, "batch", ("harmful",), ("text", "image")),
    "padding side": (padding_side, "batch", ("harmful",), ("text", "padded")),
    "resize filter": (resize_filter, "media", DRIFT, ("interleaved", "resized")),
    "fps default": (fps_default, "batch", ("harmful",), ("interleaved", "text")),
    "position formula": (position_formula, "positions", ("harmful",), ("text", "audio")),
    "attention mask": (attention_mask, "logits", DRIFT, ("text", "padded")),
    "dtype": (dtype, "embeddings", ("schema",), ("text", "image")),
    "one layer x 1.001": (one_layer, "logits", ("benign-drift",), ("text", "grpo")),
    "another checkpoint": (another_checkpoint, "embeddings", ("harmful",), ("text", "image")),
    "eos removed": (eos_removed, "completion", ("degenerate",), ("text", "image")),
    "loss normaliser": (loss_normaliser, "loss.1", ("harmful",), ("text", "grpo")),
}
"""The upgrade, the stage it is in, the verdicts allowed on a case that shows it, and two cases for
the fast test."""


def checked(policy: Policy, folder: Path, names: Sequence[str]) -> GoldenReport:
    return check(policy, load_suite(folder), folder, KEY, names=names)


def shown(report: GoldenReport) -> str:
    lines = []
    for case in report.cases:
        lines.append(f"{case.case}: {case.verdict}, first {case.first}: {case.reason}")
        lines += [
            f"    {s.stage} {s.verdict} {s.origin}" for s in case.stages if s.origin != "none"
        ]
    return "\n".join(lines)


def assert_attributed(report: GoldenReport, upgrade: str) -> None:
    _, stage, verdicts, _ = UPGRADES[upgrade]
    assert report.first == stage, shown(report)
    cases = [case for case in report.cases if case.first == stage]
    if "harmful" not in verdicts and stage == "logits":
        assert report.verdict == "benign-drift", shown(report)
    assert {case.verdict for case in cases} & set(verdicts), shown(report)
    # report.first already excludes every earlier stage
    added = {s.stage for case in cases for s in case.stages if s.origin == "added"}
    assert stage in added, shown(report)


@pytest.mark.parametrize("upgrade", UPGRADES)
def test_found(upgrade: str, own: Policy, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, _, _, names = UPGRADES[upgrade]
    assert_attributed(checked(plant(monkeypatch, own), stored, names), upgrade)


@pytest.mark.slow
@pytest.mark.parametrize("upgrade", UPGRADES)
def test_found_among_all_cases(
    upgrade: str, own: Policy, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, _, _, _ = UPGRADES[upgrade]
    report = checked(plant(monkeypatch, own), stored, ())
    print(f"\n== {upgrade}\n{shown(report)}")
    assert_attributed(report, upgrade)


def test_a_stage_that_an_upgrade_makes_fail_is_named(
    own: Policy, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise TypeError("unexpected keyword argument 'audio'")

    monkeypatch.setattr(inputs, "process_row", refuse)
    report = checked(own, stored, ("text",))
    (case,) = report.cases
    assert (case.verdict, case.first) == ("harmful", "batch")
    assert "the stage failed: TypeError: unexpected keyword argument 'audio'" in case.reason
    # later stages are computed from the golden's batch, and are unchanged
    assert {s.origin for s in case.stages if s.stage == "embeddings"} == {"inherited"}


@pytest.mark.parametrize("what", ["another stream", "another rule"])
def test_a_changed_sampler_is_not_taken_for_rounding(
    what: str, own: Policy, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampled token may flip where its draw lies at the edge of both tokens' slices. Another
    stream of draws misses the golden's tokens, another choice rule misses its own."""
    if what == "another stream":
        for module in (rollout, steps):
            monkeypatch.setattr(module, "draws", lambda seed, *rest: draws(seed + 1, *rest))
    else:
        choose = rollout.choose

        def other(logprobs: Tensor, draw: Tensor | None, *rest: int) -> Tensor:
            return choose(logprobs, None if draw is None else 1 - draw, *rest)

        monkeypatch.setattr(rollout, "choose", other)
    (case,) = checked(own, stored, ("grpo",)).cases
    assert (case.verdict, case.first) == ("harmful", "completion.1"), case.reason
    sentences = [g.sentence for g in case.generations if g.first is not None]
    assert sentences
    assert all("; the draw lies 0." in sentence for sentence in sentences), sentences


def origins(report: GoldenReport) -> dict[str, str]:
    (case,) = report.cases
    return {s.stage: s.origin for s in case.stages if s.origin != "none"}


def test_a_sidecar_makes_replay_exact(
    own: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames are stored as a fingerprint: without the sidecar it is unknown whether batch and
    embeddings only inherit the new filter's change or add a divergence."""
    suite, aside = load_suite(tmp_path), tmp_path / "aside"
    record(own, suite, tmp_path, KEY, names=["resized"], sidecar=aside)
    policy = resize_filter(monkeypatch, own)
    without = origins(check(policy, suite, tmp_path, KEY, names=["resized"]))
    assert without["media"] == "added"
    assert without["batch"] == without["embeddings"] == "inherited or unknown"
    found = origins(check(policy, suite, tmp_path, KEY, names=["resized"], sidecar=aside))
    assert found.pop("media") == "added"
    assert set(found.values()) == {"inherited"}, found
    file = next(aside.iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    for other in set(aside.iterdir()) - {file}:
        other.write_bytes(b"")
    with pytest.raises(TraceError, match="sha256"):
        check(policy, suite, tmp_path, KEY, names=["resized"], sidecar=aside)


def test_none_on_an_unchanged_tree(policy: Policy, stored: Path) -> None:
    report = checked(policy, stored, ALL)
    assert {case.verdict for case in report.cases} == {"exact"}, shown(report)
    assert report.first is None
