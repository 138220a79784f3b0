"""A trace as a folder: ``trace.json`` for people and ``tensors.safetensors`` for the numbers.

``trace.json`` names its format and version, holds the checksum of the tensors file and one of its
own content, then header and stages. A folder appears whole or not at all. What is not in the
:class:`~omni_grpo_core.types.Trace` (weights, environment variables) is not in the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.atomic import new_folder
from omni_grpo_core.io.bounded import Unreadable, read_bytes
from omni_grpo_core.trace import DTYPES, dtype_name, jsontext
from omni_grpo_core.trace.codec import decode, encode, make_noun
from omni_grpo_core.types import Stage, Trace

T = TypeVar("T")
FORMAT = "omni-grpo trace"
VERSION = 1
_TEXT = "trace.json"
_TENSORS = "tensors.safetensors"
_MOST_BYTES = 1 << 40
"""Of the tensors of ten minutes of video, or of a trace that was told to keep all: gigabytes."""
_AGAIN = "it was cut or altered after it was written: record it again"


def save_trace(trace: Trace, folder: Path) -> None:
    """Store ``trace`` as a new ``folder``.

    Raises :class:`~omni_grpo_core.errors.TraceError` when the folder holds something already,
    cannot be written, or the trace holds what is not a value.
    """
    header, stages = encode(trace.header, "header")[0], []
    tensors = {}
    for number, record in enumerate(trace.stages):
        # the same stage may stand in a trace twice: the number keeps tensor names apart
        data, own = encode(record, f"{number}.{record.stage}")
        stages.append(data)
        tensors.update(own)
    packed = save_tensors(tensors)
    body = {"header": header, "stages": stages}
    text = jsontext.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "tensors_bytes": len(packed),
            "tensors_sha256": hashlib.sha256(packed).hexdigest(),
            "body_sha256": _body_hash(body),
            **body,
        }
    )
    with new_folder(folder) as partial:
        (partial / _TENSORS).write_bytes(packed)
        (partial / _TEXT).write_bytes(f"{text}\n".encode("utf-8", "surrogatepass"))


def load_trace(folder: Path) -> Trace:
    """The trace that :func:`save_trace` stored, tensors on the CPU.

    Raises :class:`~omni_grpo_core.errors.TraceError` naming the file, and the line where it can be
    known, when something is missing, cut, altered, foreign or of a newer format.
    """
    name = str(folder / _TEXT)
    data = jsontext.loads(_read(folder / _TEXT), name)
    _check_format(data, name)
    body = {"header": data.get("header"), "stages": data.get("stages")}
    if data.get("body_sha256") != _body_hash(body):
        raise TraceError(
            name,
            got="content that does not match its own checksum",
            want=f"body_sha256 {_body_hash(body)}",
            fix=_AGAIN,
        )
    tensors = _read_tensors(folder / _TENSORS, data)
    values = {part: decode(told, tensors, f"{name}: {part}") for part, told in body.items()}
    trace: Trace = make_noun(Trace, values, f"{name}: trace")
    return trace


def value_at(trace: Trace, stage: Stage, kind: type[T]) -> T:
    """The value of a stage, which must be of this kind.

    Raises :class:`~omni_grpo_core.errors.TraceError` when the trace has no such stage, or holds
    another kind of value there: a trainer's call, for one.
    """
    found = next((record.value for record in trace.stages if record.stage == stage), None)
    if isinstance(found, kind):
        return found
    raise TraceError(
        stage,
        got=f"a {type(found).__name__}" if found is not None else "nothing",
        want=f"a {kind.__name__}",
        fix="pass a trace that holds it: of a check, or of a trainer's step",
    )


def _body_hash(body: Any) -> str:
    """Of the content, not of its layout: indenting the file anew is no change."""
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except Unreadable as error:
        raise TraceError(
            str(path),
            got=error.got,
            want="a readable file",
            fix="a trace is a folder with trace.json and tensors.safetensors; check the path",
        ) from error


def _check_format(data: Any, name: str) -> None:
    known = isinstance(data, dict) and data.get("format") == FORMAT
    version = data.get("version") if known else None
    if not known or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise TraceError(
            name,
            got=f"format {version}" if known else "JSON of something else",
            want=f"{FORMAT!r}, format 1 to {VERSION}",
            fix="upgrade omni-grpo-core" if known else "check that the path is that of a trace",
        )


def _read_tensors(path: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    packed = _read(path)
    found = hashlib.sha256(packed).hexdigest()
    if found != data.get("tensors_sha256"):
        raise TraceError(
            str(path),
            got=f"{len(packed)} bytes, sha256 {found}",
            want=f"{data.get('tensors_bytes')} bytes, sha256 {data.get('tensors_sha256')}",
            fix=_AGAIN,
        )
    return unpack(packed, str(path), _AGAIN)


def unpack(packed: bytes, name: str, fix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by their names.

    Raises :class:`~omni_grpo_core.errors.TraceError` for other bytes, and for a type that no value
    has here.
    """
    try:
        found = load_tensors(packed)
        strange = {dtype_name(tensor) for tensor in found.values()} - DTYPES.keys()
        got = f"tensors of {', '.join(sorted(strange))}" if strange else ""
    # safetensors' own reader lets through types that torch has not, and sizes that overflow
    except (SafetensorError, LookupError, ValueError, RuntimeError, TypeError, AssertionError) as e:
        found, got = {}, str(e) or type(e).__name__
    if got:
        raise TraceError(name, got=got, want="a safetensors file", fix=fix)
    return found
