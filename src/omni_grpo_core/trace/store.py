"""A trace as a folder: ``trace.json`` for people and ``tensors.safetensors`` for the numbers, each
unit of content once (:mod:`~omni_grpo_core.trace.pool`).

``trace.json`` gives its format and version, the checksums of the tensors file and of its own
content, then header and stages. A folder is written atomically. It holds nothing that is not in
the :class:`~omni_grpo_core.types.Trace` (no weights, no environment variables).
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
from omni_grpo_core.trace.codec import decode, encode, make_value
from omni_grpo_core.trace.pool import pooled, unpooled
from omni_grpo_core.types import Stage, Trace

T = TypeVar("T")
FORMAT = "omni-grpo trace"
VERSION = 2
"""1 stored every tensor whole."""
_TEXT = "trace.json"
_TENSORS = "tensors.safetensors"
_MOST_BYTES = 1 << 40
"""Ten minutes of video, or a trace configured to keep everything, has gigabytes of tensors."""
_AGAIN = "record it again: it was cut or altered after it was written"


def save_trace(trace: Trace, folder: Path, *, durable: bool = True) -> None:
    """Store ``trace`` as a new ``folder``; ``durable`` as of
    :func:`~omni_grpo_core.io.atomic.new_folder`.

    Raises :class:`~omni_grpo_core.errors.TraceError` if the folder is not empty or cannot be
    written, or the trace holds something that is not a value.
    """
    header, stages = encode(trace.header, "header")[0], []
    tensors, known = {}, dict[int, Any]()
    for number, record in enumerate(trace.stages):
        # a stage may occur twice in a trace: the number keeps tensor names distinct
        data, own = encode(record, f"{number}.{record.stage}", known)
        stages.append(data)
        tensors.update(own)
    packed = save_tensors(pooled(tensors))
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
    with new_folder(folder, durable=durable) as partial:
        (partial / _TENSORS).write_bytes(packed)
        (partial / _TEXT).write_bytes(f"{text}\n".encode("utf-8", "surrogatepass"))


def load_trace(folder: Path) -> Trace:
    """The trace that :func:`save_trace` stored, tensors on the CPU.

    Raises :class:`~omni_grpo_core.errors.TraceError` naming the file, and the line where possible,
    if something is missing, cut, altered, not a trace or of a newer format.
    """
    name = str(folder / _TEXT)
    data = jsontext.loads(_read(folder / _TEXT), name)
    _check_format(data, name)
    body = {"header": data.get("header"), "stages": data.get("stages")}
    if data.get("body_sha256") != _body_hash(body):
        raise TraceError(
            name,
            got="content that does not match its checksum",
            want=f"body_sha256 {_body_hash(body)}",
            fix=_AGAIN,
        )
    tensors = _read_tensors(folder / _TENSORS, data)
    values = {part: decode(content, tensors, f"{name}: {part}") for part, content in body.items()}
    trace: Trace = make_value(Trace, values, f"{name}: trace")
    return trace


def value_at(trace: Trace, stage: Stage, kind: type[T]) -> T:
    """The value of a stage, which must be of type ``kind``.

    Raises :class:`~omni_grpo_core.errors.TraceError` if the trace has no such stage, or another
    type of value there, for example a trainer's call.
    """
    found = next((record.value for record in trace.stages if record.stage == stage), None)
    if isinstance(found, kind):
        return found
    raise TraceError(
        stage,
        got=f"a {type(found).__name__}" if found is not None else "nothing",
        want=f"a {kind.__name__}",
        fix="pass a trace that has it: of a check, or of a trainer's step",
    )


def _body_hash(body: Any) -> str:
    """Of the content, not of its layout: the file may be reformatted."""
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, _MOST_BYTES)
    except Unreadable as error:
        raise TraceError(
            str(path),
            got=error.got,
            want="a readable file",
            fix="check the path: a trace is a folder with trace.json and tensors.safetensors",
        ) from error


def _check_format(data: Any, name: str) -> None:
    known = isinstance(data, dict) and data.get("format") == FORMAT
    version = data.get("version") if known else None
    if not known or not isinstance(version, int) or not 1 <= version <= VERSION:
        raise TraceError(
            name,
            got=f"format {version}" if known else "JSON that is not a trace",
            want=f"{FORMAT!r}, format 1 to {VERSION}",
            fix="upgrade omni-grpo-core" if known else "check that the path is a trace's",
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
    return unpooled(unpack(packed, str(path), _AGAIN), str(path), _AGAIN)


def unpack(packed: bytes, name: str, fix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises :class:`~omni_grpo_core.errors.TraceError` for anything else, and for a dtype that cannot
    be stored.
    """
    try:
        found = load_tensors(packed)
        unsupported = {dtype_name(tensor) for tensor in found.values()} - DTYPES.keys()
        got = f"tensors of {', '.join(sorted(unsupported))}" if unsupported else ""
    # safetensors' own reader accepts dtypes that torch lacks, and sizes that overflow
    except (SafetensorError, LookupError, ValueError, RuntimeError, TypeError, AssertionError) as e:
        found, got = {}, str(e) or type(e).__name__
    if got:
        raise TraceError(name, got=got, want="a safetensors file", fix=fix)
    return found
