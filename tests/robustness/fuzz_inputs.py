"""Files that a command reads, mutated at random.

A subject is a folder of valid files with a command that reads them. An input depends only on seed,
subject and number, so it can be reproduced.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from stored_files import goldens, recording, safetensors, seal_golden, seal_trace

FILES = dict[str, bytes]
WHOLE = -1
"""The number of the unmutated input."""


@dataclass(frozen=True)
class Subject:
    """``files``: the valid files. ``mutated``: pattern of the names to mutate. ``words``: the
    command, run in the folder. ``seal``: corrects checksums. ``links``: files that are only read,
    by name."""

    files: FILES
    mutated: str
    words: tuple[str, ...]
    seal: Callable[[FILES], None] | None = None
    links: Mapping[str, Path] = field(default_factory=dict)


# --------------------------------------------------------------------------- subjects


def _folder(make: Callable[[Path], object]) -> FILES:
    """What ``make`` writes into a new folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        return {
            str(path.relative_to(name)): path.read_bytes()
            for path in sorted(Path(name).rglob("*"))
            if path.is_file()
        }


def _state(folder: Path) -> None:
    import hashlib

    from omni_grpo_core.training.checkpointing import FORMAT
    from omni_grpo_core.training.config import TrainConfig
    from omni_grpo_core.training.fingerprint import fingerprint

    state = folder / "out" / "state" / "000002"
    state.mkdir(parents=True)
    files = {"part-1-of-2.bin": safetensors({}), "part-2-of-2.bin": bytes(100)}
    for name, data in files.items():
        (state / name).write_bytes(data)
    step = {"scores": {"format": [1.0, None]}, "totals": [0.5, 1.0], "group_ids": ["a", "a"]}
    record = {
        "format": FORMAT,
        "step": 2,
        "fingerprint": fingerprint(TrainConfig()),
        "rows": "",
        "guard": [{**step, "capped": [False, True]}],
        "files": {n: [len(d), hashlib.sha256(d).hexdigest()] for n, d in files.items()},
    }
    (state / "run.json").write_text(json.dumps(record))
    log = [json.dumps({"step": n, "loss": 0.5, "reward": 1.0}) for n in range(4)]
    (folder / "out" / "log.jsonl").write_text("\n".join(log) + "\n")


def _many_leaves(folder: Path) -> None:
    """A leaf of every kind, and tolerances."""
    from small_traces import decode, small_trace

    from omni_grpo_core.golden.text import format_golden

    values = {record.stage: record.value for record in small_trace().stages}
    text = format_golden("text", values, {"torch": "2.11", "platform": "cpu-fp32"}, decode)
    tolerances = "cpu-fp32:\n  float: {atol: 1.0e-05, rtol: 0.0001}\n"
    goldens(folder, text, text, {"tolerances.yaml": tolerances})


_RUN = """\
checkpoint: checkpoint
data: rows.json
out: out
steps: 10
batch_size: 8
micro_batch_size: 4
optimizer: {lr: 1.0e-5, schedule: constant, warmup_steps: 0}
loss: {beta: 0.04, epsilon_low: 0.2, epsilon_high: 0.2}
rewards: {format: {}, accuracy: {weight: 0.5, gate: "format >= 1"}}
settings: {group_size: 4, max_new_tokens: 16, temperature: 1.0}
"""


@cache
def subjects() -> dict[str, Subject]:
    from omni_grpo_core import tiny

    checkpoint, data = tiny.checkpoint_dir(), tiny.data_file()
    configs = {
        path.name: path.read_bytes()
        for path in checkpoint.iterdir()
        if path.suffix == ".json" and path.stat().st_size < 1 << 16
    }
    links = {f"checkpoint/{p.name}": p for p in checkpoint.iterdir() if p.name not in configs}
    inside = {f"checkpoint/{name}": content for name, content in configs.items()}
    rows = {"rows.json": data.read_bytes()}
    media = {path.name: path for path in data.parent.iterdir() if path != data}
    recorded = _folder(lambda folder: recording(folder / "run"))
    golden = _folder(_many_leaves)
    return {
        "trace": Subject(recorded, r".*", ("doctor", "run"), seal_trace),
        "trace as JSON": Subject(recorded, r".*", ("doctor", "run", "--json"), seal_trace),
        "golden": Subject(
            golden, r".*\.txt", ("golden", "review", "--golden", ".", "--json"), seal_golden
        ),
        "suite and tolerances": Subject(golden, r".*\.yaml", ("suite", ".")),
        "rows": Subject(rows, r".*", ("rows", "rows.json"), links=media),
        "settings": Subject(inside, r".*/(config|omni_grpo)\.json", ("settings", "checkpoint")),
        "run": Subject(
            {"run.yaml": _RUN.encode(), **rows, **inside},
            r"run\.yaml",
            ("run", "run.yaml"),
            links={**media, **links},
        ),
        "state": Subject(_folder(_state), r".*", ("state", "out")),
        "checkpoint": Subject(inside, r".*\.json", ("policy", "checkpoint"), links=links),
    }


def write(place: Path, subject: Subject, files: FILES) -> None:
    """The folder of one input."""
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    for name, target in subject.links.items():
        (place / name).symlink_to(target)


# --------------------------------------------------------------------------- mutations

_TOKENS: tuple[bytes, ...] = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xed\xb2\x80",
        b"\\ud800",
        b"\x1b[31m",
        b"\r",
        b"\n",
    ),
    *(b"[" * 5000, b"{" * 100, b'{"a":' * 3000, b"9" * 5000, b"-", b"1e999", b"NaN", b"null", b'"'),
    *(
        b'{"$map": [1]}',
        b'{"$type": "Span"}',
        b"../../",
        b"&a *a",
        b"\xc3\x97",
        b".inf",
        b": ",
        b",",
    ),
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        7,
        2**31,
        2**63,
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "../x",
        "\x00",
    ),
    *(
        "é" * 300,
        [],
        {},
        [[]],
        [None],
        {"": 0},
        {"$list": []},
        {"$map": [[1, 2]]},
        {"$float": "nan"},
    ),
    *({"$tensor": "x", "dtype": "int64", "shape": [-1]}, [0] * 1000, "9" * 5000, "1e5", "nan"),
)


def mutated(name: str, seed: int, number: int) -> FILES:
    """The files of one input; unmutated for :data:`WHOLE`."""
    subject = subjects()[name]
    if number == WHOLE:
        return subject.files
    draw = random.Random(f"{seed} {name} {number}")
    files = dict(subject.files)
    names = [file for file in files if re.fullmatch(subject.mutated, file)]
    sealed = subject.seal is not None and draw.random() < 0.7
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        file = draw.choice(names)
        structural = draw.random() < 0.6
        edited = _edited(file, files[file], draw) if structural else None
        files[file] = _scrambled(files[file], draw) if edited is None else edited
    if sealed and subject.seal is not None:
        with suppress(ValueError, LookupError, AttributeError, TypeError, RecursionError):
            subject.seal(files)  # a broken structure has no place for checksums
    return files


def _scrambled(data: bytes, draw: random.Random) -> bytes:
    at, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(6)
    if kind == 0 and data:
        flipped = bytearray(data)
        for _ in range(draw.choice((1, 1, 8))):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + draw.choice(_TOKENS) + data[at:]
    if kind == 3:
        return data[:at] + data[min(end, at + draw.choice((1, 10, 1000))) :]
    if kind == 4:
        return data[:at] + data[at : at + draw.choice((1, 40, 4000))] + data[at:]
    return data[:at] + draw.randbytes(draw.choice((1, 4, 64))) + data[at:]


def _edited(name: str, data: bytes, draw: random.Random) -> bytes | None:
    """A structural edit, or ``None`` for a file without a known structure."""
    try:
        if name.endswith(".txt"):
            return _edited_lines(data.decode().split("\n"), draw)
        if name.endswith(".safetensors"):
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            return safetensors(_edited_tree(header, draw), data[8 + size :])
        if name.endswith(".jsonl"):
            return _edited_lines(data.decode().split("\n"), draw)
        value = yaml.safe_load(data) if name.endswith(".yaml") else json.loads(data)
        return json.dumps(_edited_tree(value, draw)).encode()
    except (ValueError, RecursionError, yaml.YAMLError):
        return None  # an earlier mutation left nothing to edit


def _edited_tree(tree: Any, draw: random.Random) -> Any:
    places = list(_places(tree))
    if not places:
        return draw.choice(_VALUES)
    inner, key = draw.choice(places)
    others, other = draw.choice(places)
    kind = draw.randrange(6)
    if kind < 3:
        inner[key] = draw.choice(_VALUES)
    elif kind == 3:
        del inner[key]
    elif kind == 4:  # a copy, since a tree must not contain itself
        inner[key] = json.loads(json.dumps(others[other]))
    elif isinstance(inner, dict):
        inner[draw.choice(("x", "", "$type", "$map", "shape", f"{key} "))] = inner.pop(key)
    else:
        inner.insert(key, json.loads(json.dumps(inner[key])))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    left = [tree]
    while left:
        inner = left.pop()
        if isinstance(inner, dict | list):
            for key in list(inner) if isinstance(inner, dict) else range(len(inner)):
                yield inner, key
                left.append(inner[key])


def _edited_lines(lines: list[str], draw: random.Random) -> bytes:
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[other])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        words = lines[at].split(" ")
        words[draw.randrange(len(words))] = draw.choice(
            ("-1", "9" * 5000, "7×99999999999", "0..9 step 3", '"x"', "[", "[0, -1]", "nan", "inf",
             "sketch", "spans", "float32", "int64", "[]", "{}", "Rollout", "\\x", "1e999", "")
        )  # fmt: skip
        lines[at] = " ".join(words)
    elif kind == 4:
        _, colon, rest = lines[at].partition(":")
        lines[at] = f"{lines[other].partition(':')[0]}{colon}{rest}"
    else:
        lines[at] = re.sub(r"\d", lambda digit: draw.choice(("0", "9", digit[0])), lines[at])
    return "\n".join(lines).encode()
