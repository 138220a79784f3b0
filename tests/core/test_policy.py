from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.core.agreement import check_agreement
from omni_grpo_core.core.family import FAMILIES, Family
from omni_grpo_core.core.forward import library_keywords, prefill
from omni_grpo_core.core.policy import Policy, library_generate, load_policy
from omni_grpo_core.core.template_trial import template_fault
from omni_grpo_core.errors import CheckpointError
from omni_grpo_core.types import Batch

Change = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint_dir(), copy)
    return copy


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_full_checkpoint_gives_its_thinker(folder: Path, policy: Policy, mixed: Batch) -> None:
    """A full Qwen2.5-Omni folder: the thinker's weights under a prefix beside the talker's."""
    weights = load_file(folder / "model.safetensors")
    full = {f"thinker.{name}": tensor for name, tensor in weights.items()}
    full["talker.model.norm.weight"] = torch.ones(4)
    full["token2wav.code2wav_dit_model.proj.weight"] = torch.ones(4, 4)
    save_file(full, folder / "model.safetensors", {"format": "pt"})
    edit(
        folder / "config.json",
        lambda config: config.update(
            thinker_config=dict(config),
            model_type="qwen2_5_omni",
            architectures=["Qwen2_5OmniForConditionalGeneration"],
        ),
    )
    loaded = load_policy(folder)
    assert not hasattr(loaded.model, "talker")
    assert torch.equal(prefill(loaded, mixed).logits.values, prefill(policy, mixed).logits.values)


def test_a_thinker_whose_processor_lies_elsewhere(
    folder: Path, tmp_path: Path, policy: Policy, mixed: Batch
) -> None:
    """HumanOmniV2's style: a thinker-only save without processor or generation config."""
    weights = tmp_path / "thinker"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, weights)
    loaded = load_policy(weights, processor=folder)
    assert set(loaded.eos_token_ids) <= set(policy.eos_token_ids)
    assert torch.equal(prefill(loaded, mixed).logits.values, prefill(policy, mixed).logits.values)


def test_a_full_config_around_thinker_only_weights(
    folder: Path, policy: Policy, mixed: Batch
) -> None:
    edit(
        folder / "config.json",
        lambda config: config.update(thinker_config=dict(config), model_type="qwen2_5_omni"),
    )
    loaded = load_policy(folder)
    assert torch.equal(prefill(loaded, mixed).logits.values, prefill(policy, mixed).logits.values)


def test_every_eos_ends_a_completion(folder: Path) -> None:
    tokenizer = load_policy(folder).processor.tokenizer
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    edit(folder / "generation_config.json", lambda c: c.update(eos_token_id=[end_of_text]))
    loaded = load_policy(folder)
    assert set(loaded.eos_token_ids) == {end_of_text, end_of_turn}
    assert not loaded.suppressed[list(loaded.eos_token_ids)].any()


def test_no_generation_config_still_stops(folder: Path) -> None:
    """A thinker's config has no eos of its own: completions would run to the length limit."""
    (folder / "generation_config.json").unlink()
    loaded = load_policy(folder)
    end_of_turn = loaded.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn in loaded.eos_token_ids


@pytest.mark.parametrize(
    "asked",
    [
        {"return_dict_in_generate": True},
        {"num_beams": 4},
        {"min_new_tokens": 30},
        {"repetition_penalty": 5.0},
        {"stop_strings": ["a"]},
    ],
    ids=str,
)
def test_the_reference_ignores_the_checkpoint_s_generation_config(
    asked: dict[str, Any], policy: Policy, mixed: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``check`` on a healthy checkpoint exited with 3 or a finding if its generation config asked
    for beams, penalties or a dict: the reference ``generate`` obeyed, the rollout does not."""
    keywords = library_keywords(policy, mixed.rows[-1])
    wanted = library_generate(policy, keywords, max_new_tokens=8)
    own = transformers.GenerationConfig(eos_token_id=list(policy.eos_token_ids), **asked)
    monkeypatch.setattr(policy.model, "generation_config", own)
    assert torch.equal(library_generate(policy, keywords, max_new_tokens=8), wanted)
    assert policy.model.generation_config is own


def test_special_tokens_except_eos_are_suppressed(policy: Policy) -> None:
    tokenizer = policy.processor.tokenizer
    allowed = {tokenizer.decode([i]) for i in policy.eos_token_ids}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        assert bool(policy.suppressed[token_id]) == (token.content not in allowed), token.content
    plain = tokenizer.encode("<context> blue")
    assert not policy.suppressed[plain].any()


def _no_rope(config: dict[str, Any]) -> None:
    text = config["text_config"]
    for name in ("rope_parameters", "rope_scaling"):
        if name in text:
            text[name].pop("mrope_section", None)


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["audio_tower.ln_post.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


BROKEN: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, r"config\.json: found no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: found no such file"),
    "config not JSON": (
        lambda f: _write(f / "config.json", "{"),
        r"config\.json:1: found not JSON",
    ),
    "config a list": (
        lambda f: _write(f / "config.json", "[]"),
        "found list, wanted a JSON object",
    ),
    "another architecture": (
        lambda f: edit(f / "config.json", lambda c: c.update(model_type="llama")),
        "model_type 'llama', wanted one of qwen2_5_omni, qwen2_5_omni_thinker",
    ),
    "no processor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        r"found no preprocessor_config\.json, wanted a processor beside the weights",
    ),
    "broken tokenizer": (
        lambda f: _write(f / "tokenizer.json", "{"),
        r"tokenizer\.json:1: found not JSON",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"weights in .*found no model\.safetensors",
    ),
    "weights cut off": (_truncate, r"weights in .*found a header of \d+ bytes in a file of 1000"),
    "a weight missing": (_drop_weight, "1 weights missing.*ln_post"),
    "rope sections lost": (
        lambda f: edit(f / "config.json", _no_rope),
        "mrope_section None for a head size of 32, wanted three sections that sum to 16",
    ),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_named(name: str, folder: Path) -> None:
    break_it, message = BROKEN[name]
    break_it(folder)
    with pytest.raises(CheckpointError, match=message):
        load_policy(folder)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_processor_may_omit_the_library_s_defaults(family: Family, tmp_path: Path) -> None:
    """As published ones do: no file for videos, no rescaling. The check compares the processor's
    behaviour, not its files."""
    if not hasattr(transformers, family.thinker_class):
        pytest.skip(f"this transformers has no {family.name}")
    copy = tmp_path / "checkpoint"
    kind: Literal["qwen2.5", "qwen3"] = "qwen3" if family.deepstack else "qwen2.5"
    shutil.copytree(tiny.checkpoint_dir(kind), copy)
    (copy / "video_preprocessor_config.json").unlink()

    def published(content: dict[str, Any]) -> None:
        for key in ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "do_convert_rgb"):
            del content[key]

    edit(copy / "preprocessor_config.json", published)
    load_policy(copy)


def test_a_token_id_beyond_the_vocabulary_is_found_after_a_gap(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many tokens as the model has, one of them with an id of a million: the forward failed with
    "index out of range in self"."""
    tokenizer = policy.processor.tokenizer
    far = {**tokenizer.get_vocab(), "a": 10**6}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: far)
    with pytest.raises(CheckpointError, match="a tokenizer of 1000001 tokens, by its largest id"):
        check_agreement(
            policy.processor, policy.model.config, policy.family, len(policy.suppressed), "x"
        )


def test_an_unknown_dtype(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="found float8, wanted float32 or bfloat16"):
        load_policy(folder, dtype="float8")


def test_a_template_is_tried_out_under_any_encoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chat template was refused under ``PYTHONIOENCODING=utf-16``: the trial process read
    utf-16 where utf-8 was written."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    template = (folder / "chat_template.jinja").read_text()
    assert template_fault(template + "{# not tried before #}") == ""
