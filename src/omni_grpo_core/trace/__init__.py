"""The values of a pass: saved, loaded, fingerprinted and compared.

``store``        a trace as a folder, by ``codec``, ``pool`` and ``jsontext``; ``fields`` checks
                 what is read
``digest``       content as numbers that are equal where it is
``calls``        the stage values of a recorded trainer
``fingerprint``  a tensor of any size as a few numbers
``compare``      two passes, leaf by leaf: ``leaves``, ``integers`` and ``floats``, ``divergence``

This module has the dtypes that can be stored, by their stored name.
"""

from __future__ import annotations

import torch

FLOATS: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
INTEGERS: dict[str, torch.dtype] = {
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "bool": torch.bool,
}
DTYPES: dict[str, torch.dtype] = {**FLOATS, **INTEGERS}


def dtype_name(tensor: torch.Tensor) -> str:
    """
    >>> dtype_name(torch.zeros(2, dtype=torch.bfloat16))
    'bfloat16'
    """
    return str(tensor.dtype).removeprefix("torch.")


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every element agree; NaN equals NaN, the device is ignored.

    >>> same_tensor(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    True
    >>> same_tensor(torch.tensor([1]), torch.tensor([1.0]))
    False
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    if dtype_name(a) in FLOATS:
        # exact for every float dtype here; float8 has no comparison of its own
        a, b = a.to(torch.float64), b.to(torch.float64)
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)
