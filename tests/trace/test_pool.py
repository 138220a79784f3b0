"""Every unit of content is stored once, and every tensor comes back bit by bit."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from omni_grpo_core.errors import TraceError
from omni_grpo_core.trace import DTYPES, dtype_name
from omni_grpo_core.trace.codec import equal
from omni_grpo_core.trace.pool import pooled, unpooled
from omni_grpo_core.trace.store import load_trace, save_trace
from omni_grpo_core.types import StageRecord, Trace


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return dtype_name(tensor), tuple(tensor.shape), raw


def back(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return unpooled(pooled(tensors), "file", "fix")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return {name: bits(t) for name, t in a.items()} == {name: bits(t) for name, t in b.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 64), (64, 0), (3,), (70,), (2, 3), (2, 3, 65)])
def test_every_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    raw = torch.arange(math.prod(shape) * 8, dtype=torch.int64).to(torch.uint8)
    if dtype == "bool":
        raw = raw % 2
    kind = DTYPES[dtype]
    whole = raw.view(kind)[: math.prod(shape)].reshape(shape)
    given = {"1.x": whole, "2.x": whole.clone(), "3.x.input_features": whole}
    assert same(back(given), given)


def test_nan_payloads_and_negative_zero_are_kept() -> None:
    odd = torch.tensor([0x7FC00001, 0x7FC00002, -0x80000000, 0, 0x7F800001], dtype=torch.int32)
    rows = odd.view(torch.float32).repeat(2, 8)
    rows[1, 3] = 0.0
    given = {"a": rows}
    assert same(back(given), given)


def test_units_that_occur_several_times_are_stored_once() -> None:
    patches = torch.arange(3 * 32.0).view(3, 32)
    given = {"batch": patches[[0, 1, 2, 1]].contiguous(), "forward": patches[[1, 1]].contiguous()}
    stored = pooled(given)
    assert {name: tuple(t.shape) for name, t in stored.items()} == {
        "@float32*32": (3, 32),
        "@float32*32:batch": (4,),
        "@float32*32:forward": (2,),
    }
    assert torch.equal(stored["@float32*32"], patches)
    assert same(back(given), given)


def test_frames_of_silence_are_stored_once() -> None:
    """Sound is padded to thirty seconds."""
    mel = torch.zeros(2, 128, 300)
    mel[0, :, :5] = torch.arange(5.0) + 1
    stored = pooled({"0.batch.value.outputs.input_features": mel})
    assert stored["@float32*128"].shape == (6, 128)
    assert same(back({"x.input_features": mel}), {"x.input_features": mel})


def test_names_of_any_kind() -> None:
    given = {name: torch.zeros(2, 32) for name in ("", "a:b", "a\nb", "1.@float32*32", "a'")}
    assert same(back(given), given)


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ({"@float32*2:a": torch.zeros(3, dtype=torch.int32)}, "no such pool"),
        (
            {"@x*2": torch.zeros(2, 2), "@x*2:a": torch.tensor([2], dtype=torch.int32)},
            "indices outside its 2 rows",
        ),
        (
            {"@x*2": torch.zeros(2, 2), "@x*2:a": torch.tensor([-1], dtype=torch.int32)},
            "indices outside its 2 rows",
        ),
        ({"@x*2": torch.zeros(2, 2), "@x*2:a": torch.zeros(1)}, "1 indices of float32"),
        ({"@x*2": torch.zeros(2), "@x*2:a": torch.zeros(1, dtype=torch.int32)}, "no such pool"),
        (
            {"@x*2": torch.zeros(1, 1 << 20), "@x*2:a": torch.zeros(1 << 20, dtype=torch.int32)},
            "content that unfolds without limit",
        ),
    ],
)
def test_an_altered_index_is_refused(stored: dict[str, Tensor], found: str) -> None:
    with pytest.raises(TraceError, match=f"file: a: found {found}"):
        unpooled(stored, "file", "fix")


def test_a_trace_of_the_first_format_is_read(tmp_path: Path) -> None:
    """Its tensors were stored whole."""
    trace = Trace({}, (StageRecord("logits", torch.arange(64.0).repeat(2, 1), (), 0.0),))
    folder = tmp_path / "t"
    save_trace(trace, folder)
    tensors, text = folder / "tensors.safetensors", folder / "trace.json"
    packed = save({"0.logits.value": trace.stages[0].value})  # type: ignore[dict-item]
    was = json.loads(text.read_text())
    digests = {"tensors_bytes": len(packed), "tensors_sha256": hashlib.sha256(packed).hexdigest()}
    tensors.write_bytes(packed)
    text.write_text(json.dumps({**was, **digests, "version": 1}))
    assert equal(load_trace(folder), trace)
