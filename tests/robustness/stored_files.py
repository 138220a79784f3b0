"""Valid recordings and goldens, and changes to them with correct checksums."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from small_recordings import advantaged, case, generated, lost, rewarded, samples, stepped

from omni_grpo_core.golden.text import _end, format_golden
from omni_grpo_core.trace.store import save_trace
from omni_grpo_core.types import Prompt

Change = Callable[[dict[str, Any]], object]
GOLDEN = format_golden(
    "text", (Prompt("clip", "which colour?\nred or blue", {"video": 1}),), {"torch": "2.11"}
)


def recording(folder: Path) -> Path:
    """A healthy step of a trainer that can be judged without a checkpoint."""
    given = advantaged()
    loss = lost(0.0, advantages=given.advantages)
    whole = case(samples(), generated(), rewarded(), given, loss, stepped())
    save_trace(whole.trace, folder)
    return folder


def change_trace(folder: Path, change: Change) -> Path:
    """``change`` is passed the whole of ``trace.json``."""
    file = folder / "trace.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    _seal_body(data)
    file.write_bytes(json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return folder


def change_tensors(folder: Path, packed: bytes) -> Path:
    """Another tensors file, with a matching text."""
    (folder / "tensors.safetensors").write_bytes(packed)
    return change_trace(folder, lambda data: _seal_tensors(data, packed))


def seal_trace(files: dict[str, bytes]) -> None:
    """Correct the checksums of the recorded step ``run``. May raise anything if the text no
    longer has that form."""
    data = json.loads(files["run/trace.json"])
    _seal_tensors(data, files["run/tensors.safetensors"])
    _seal_body(data)
    files["run/trace.json"] = json.dumps(data).encode()


def seal_golden(files: dict[str, bytes]) -> None:
    """The same for goldens."""
    for name, data in files.items():
        if name.endswith(".txt"):
            lines = data.decode("utf-8", "surrogatepass").split("\n")
            ends = [at for at, line in enumerate(lines) if line.startswith("end: ")]
            files[name] = sealed(*lines[: ends[-1] if ends else None]).encode(
                "utf-8", "surrogatepass"
            )


def _seal_body(data: dict[str, Any]) -> None:
    body = {"header": data.get("header"), "stages": data.get("stages")}
    data["body_sha256"] = hashlib.sha256(json.dumps(body).encode()).hexdigest()


def _seal_tensors(data: dict[str, Any], packed: bytes) -> None:
    data.update(tensors_bytes=len(packed), tensors_sha256=hashlib.sha256(packed).hexdigest())


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any ``header``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def sealed(*lines: str) -> str:
    """Golden text of these lines, with matching checksums."""
    return "\n".join([*lines, *_end(list(lines)), ""])


def leaf(*lines: str, header: Sequence[str] = ()) -> str:
    """Golden text of stage ``text`` with these lines as its value."""
    return sealed("omni-grpo golden 1", 'stage: "text"', *header, "", *lines, "")


def goldens(
    folder: Path,
    pending: str | bytes = GOLDEN,
    accepted: str | bytes = GOLDEN,
    files: Mapping[str, str] | None = None,
) -> Path:
    """A golden folder of one case, ``words``, with a stage pending review."""
    names = {".pending/words/text.txt": pending, "words/text.txt": accepted}
    for name, text in {
        "suite.yaml": "cases: {words: {rows: [20]}}",
        **names,
        **(files or {}),
    }.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        file.write_bytes(raw)
    return folder
