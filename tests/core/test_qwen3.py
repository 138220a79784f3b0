"""What differs in the second family: deepstack, experts, fractional time, separate audio calls.

Each row is compared with itself alone, with transformers' own forward, and with its copies.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.core.batch import collate, process_row, render
from omni_grpo_core.core.forward import (
    completion_logits,
    embed,
    library_forward,
    positions,
    prefill,
)
from omni_grpo_core.core.media import load_media
from omni_grpo_core.core.policy import Policy, load_policy
from omni_grpo_core.core.rollout import rollout
from omni_grpo_core.errors import BatchError
from omni_grpo_core.pipeline.checks import scoring_drift
from omni_grpo_core.pipeline.inputs import Inputs
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.types import Batch, DeepstackEmbeddings, Rollout, Row


def sample(policy: Policy, batch: Batch, group_size: int, temperature: float) -> Rollout:
    return rollout(
        policy,
        batch,
        group_size=group_size,
        max_new_tokens=12,
        temperature=temperature,
        seed=7,
    )


def by_modality(batch: Batch, modality: str) -> Row:
    return next(r for r in batch.rows if {s.modality for s in r.spans} == {modality})


def test_a_row_alone_equals_the_row_in_a_mixed_padded_batch(
    qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    together = prefill(qwen3_policy, qwen3_mixed)
    for index, row in enumerate(qwen3_mixed.rows):
        alone = prefill(qwen3_policy, collate([row], qwen3_policy.pad_token_id))
        in_batch = together.positions.position_ids[:, index, qwen3_mixed.pads[index] :]
        assert torch.equal(in_batch, alone.positions.position_ids[:, 0])
        assert together.positions.deltas[index] == alone.positions.deltas[0]
        # float32 sums in another order over a padded width and over experts' tokens: measured 6e-6
        # at logits of up to 14
        torch.testing.assert_close(
            together.logits.values[index], alone.logits.values[0], rtol=1e-5, atol=3e-5
        )


def test_each_row_equals_transformers_own_forward(qwen3_policy: Policy, qwen3_mixed: Batch) -> None:
    together = prefill(qwen3_policy, qwen3_mixed)
    for index, row in enumerate(qwen3_mixed.rows):
        theirs = library_forward(qwen3_policy, row)
        ours = together.positions.position_ids[:, index, qwen3_mixed.pads[index] :]
        assert torch.equal(ours, theirs.position_ids)
        # same reason and margin as above
        torch.testing.assert_close(
            together.logits.values[index], theirs.logits, rtol=1e-5, atol=3e-5
        )


def test_time_positions_are_fractions(qwen3_policy: Policy, qwen3_mixed: Batch) -> None:
    """13 positions a second, a frame pair every half second: 6.5 apart. Truncated to integers, as
    in the first family, every other frame pair would be half a position early."""
    silent = by_modality(qwen3_mixed, "video")
    where = positions(qwen3_policy, collate([silent], 0)).position_ids[0, 0]
    span = silent.spans[0]
    times = where[span.start : span.start + span.length]
    assert where.dtype == torch.float32
    assert sorted(set((times - times[0]).tolist())) == [0.0, 6.5]


def test_a_second_of_sound_has_13_tokens(qwen3_inputs: Inputs) -> None:
    heard = by_modality(qwen3_inputs.batch, "audio")
    assert [span.length for span in heard.spans] == [13]


def test_deepstack_features_are_in_token_order_and_reach_the_logits(
    qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    """Features of another row raise nothing in transformers: they are just added."""
    made = embed(qwen3_policy, qwen3_mixed)
    assert isinstance(made, DeepstackEmbeddings)
    visual = sum(s.length for r in qwen3_mixed.rows for s in r.spans if s.modality != "audio")
    width = made.inputs_embeds.shape[-1]
    assert [tuple(layer.shape) for layer in made.deepstack] == [(visual, width)] * 2
    theirs = [library_forward(qwen3_policy, row).deepstack for row in qwen3_mixed.rows]
    for layer, found in enumerate(made.deepstack):
        # float32, with other rows in the tower's batch: measured 1e-5 at features of up to 25
        whole = torch.cat([layers[layer] for layers in theirs if layers])
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    plain = prefill(qwen3_policy, qwen3_mixed, embeddings=made).logits.values
    without = tuple(torch.zeros_like(layer) for layer in made.deepstack)
    less = prefill(qwen3_policy, qwen3_mixed, embeddings=replace(made, deepstack=without))
    moved = (plain - less.logits.values).abs().amax(-1) > 0.01
    assert moved.tolist() == [any(s.modality != "audio" for s in r.spans) for r in qwen3_mixed.rows]


def test_a_batch_without_pictures_has_no_deepstack(
    qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    text = next(row for row in qwen3_mixed.rows if not row.tensors)
    assert not isinstance(embed(qwen3_policy, collate([text], 0)), DeepstackEmbeddings)


def test_g_expanded_copies_equal_g_separate_ones(qwen3_policy: Policy, qwen3_mixed: Batch) -> None:
    """Deepstack features are per placeholder: one ``repeat_interleave`` over all would mix up the
    copies' features."""
    ids = torch.arange(40, 52).reshape(2, 6).repeat(len(qwen3_mixed.rows), 1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        together = completion_logits(qwen3_policy, qwen3_mixed, ids, mask)
        for index, row in enumerate(qwen3_mixed.rows):
            pair = slice(2 * index, 2 * index + 2)
            twice = collate([row, row], qwen3_policy.pad_token_id)
            alone = completion_logits(qwen3_policy, twice, ids[pair], mask[pair])
            # float32 sums in another order, as above
            torch.testing.assert_close(together[pair], alone, rtol=1e-5, atol=3e-5)


def test_logprobs_with_cache_equal_scoring_without(
    qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    rolled = sample(qwen3_policy, qwen3_mixed, group_size=3, temperature=1.3)
    same, worst = scoring_drift(qwen3_policy, qwen3_mixed, rolled)
    assert same, worst


def test_train_mode_with_checkpointing_gives_what_eval_gives(
    qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    """The incident, in the second family."""
    wanted = sample(qwen3_policy, qwen3_mixed, group_size=1, temperature=0.0)
    qwen3_policy.model.train()
    qwen3_policy.model.gradient_checkpointing_enable()
    try:
        found = sample(qwen3_policy, qwen3_mixed, group_size=1, temperature=0.0)
    finally:
        qwen3_policy.model.gradient_checkpointing_disable()
        qwen3_policy.model.eval()
    assert found == wanted


def test_gradients_reach_towers_experts_and_every_merger(
    qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    logits = completion_logits(
        qwen3_policy, qwen3_mixed, torch.full((5, 2), 40), torch.ones(5, 2, dtype=torch.int64)
    )
    parameters = dict(qwen3_policy.model.named_parameters())
    found = torch.autograd.grad(
        logits.logsumexp(-1).sum(), list(parameters.values()), allow_unused=True
    )
    # an expert without tokens has no gradient; modules that see all tokens have one
    mixing = ("merger", "conv", "proj1", "patch_embed", "q_proj", "gate.weight", "embed_tokens")
    for name, gradient in zip(parameters, found, strict=True):
        if any(part in name for part in mixing):
            assert gradient is not None, name
            assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("seconds", [0.3, 0.55])
def test_a_sound_under_a_second_is_the_same_beside_a_longer_one(
    qwen3_policy: Policy, qwen3_inputs: Inputs, seconds: float
) -> None:
    """In one call the tower pads it to the longer one's chunk, and its convolutions see that; in
    4.57 it would also attend to the other."""
    index, long = next(
        (i, r) for i, r in enumerate(qwen3_inputs.batch.rows)
        if {s.modality for s in r.spans} == {"audio"}
    )  # fmt: skip
    (audio,) = qwen3_inputs.media[index].audios
    cut = replace(audio, samples=audio.samples[: int(seconds * 16_000)])
    short = process_row(
        qwen3_inputs.prompts[index],
        qwen3_inputs.conversations[index],
        replace(qwen3_inputs.media[index], audios=(cut,)),
        qwen3_policy.processor,
        qwen3_policy.family,
    )
    pad = qwen3_policy.pad_token_id
    beside = embed(qwen3_policy, collate([short, long], pad)).features[0][0]
    assert torch.equal(beside, embed(qwen3_policy, collate([short], pad)).features[0][0])


def test_media_for_another_family_s_patches_are_refused(
    qwen3_policy: Policy, qwen3_inputs: Inputs, settings: Settings
) -> None:
    conversation = qwen3_inputs.conversations[0]
    with pytest.raises(BatchError, match="video 0: found 56 x 56 pixels, wanted multiples of 32"):
        process_row(
            render(conversation, qwen3_policy.processor),
            conversation,
            load_media(conversation, settings.media, patch_size=14),
            qwen3_policy.processor,
            qwen3_policy.family,
        )


def test_a_full_checkpoint_gives_its_thinker(
    tmp_path: Path, qwen3_policy: Policy, qwen3_mixed: Batch
) -> None:
    """A full Qwen3-Omni folder: the thinker's weights under a prefix beside the talker's."""
    folder = tmp_path / "full"
    shutil.copytree(tiny.checkpoint_dir("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    full = {f"thinker.{name}": tensor for name, tensor in weights.items()}
    full["talker.model.norm.weight"] = torch.ones(4)
    save_file(full, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    whole = {**config, "thinker_config": config, "model_type": "qwen3_omni_moe"}
    (folder / "config.json").write_text(json.dumps(whole))
    loaded = load_policy(folder)
    assert not hasattr(loaded.model, "talker")
    assert torch.equal(
        prefill(loaded, qwen3_mixed).logits.values, prefill(qwen3_policy, qwen3_mixed).logits.values
    )
