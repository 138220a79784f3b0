"""Settings and runs in YAML and JSON that are hostile, of wrong types or make no sense."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hostile import JSON, NO_FILES, NO_VALUES, Spoil
from runner import Case, check_case

from omni_grpo_core import tiny

GOOD = {"group_size": 2, "max_new_tokens": 8}


def settings(spoil: Spoil, name: str = "settings.yaml") -> Callable[[Path], Sequence[object]]:
    def arguments(folder: Path) -> Sequence[object]:
        path = folder / name
        path.write_text(json.dumps(GOOD), encoding="utf-8")
        spoil(path)
        return ["check", "--limit", 1, "--config", path]

    return arguments


def text(content: str | bytes) -> Spoil:
    raw = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(raw)


def run(**changes: Any) -> Callable[[Path], Sequence[object]]:
    """``train`` on the shipped files with ``changes`` in the run."""

    def arguments(folder: Path) -> Sequence[object]:
        plan = {
            "checkpoint": str(tiny.checkpoint_dir()),
            "data": str(tiny.data_file()),
            "out": str(folder / "out"),
            "rewards": {"accuracy": {}},
            "settings": {"group_size": 2, "max_new_tokens": 8},
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": 1,
            "trackers": [],
        }
        path = folder / "run.yaml"
        # non-finite numbers in YAML's spelling
        path.write_text(json.dumps({**plan, **changes}).replace("NaN", ".nan")
                        .replace("Infinity", ".inf"))  # fmt: skip
        return ["train", path]

    return arguments


def trained(spoil: Spoil) -> Callable[[Path], Sequence[object]]:
    def arguments(folder: Path) -> Sequence[object]:
        command = run()(folder)
        spoil(folder / "run.yaml")
        return command

    return arguments


# YAML has messages of its own for bad numbers, and does not know JSON's spelling of NaN
IN_YAML = {**NO_FILES, **{kind: JSON[kind] for kind in (*NO_VALUES, "UTF-16", "Latin-1", "a list",
           "a number", "nothing", "empty", "one bracket", "zeros", "no JSON")}}  # fmt: skip
HOSTILE = (
    *(Case(f"settings: {kind}", settings(spoil)) for kind, (spoil, _) in IN_YAML.items()),
    *(Case(f"a run: {kind}", trained(spoil)) for kind, (spoil, _) in IN_YAML.items()),
    *(
        Case(f"settings that are {name}", settings(lambda path: path.unlink(), name), words=(word,))
        for name, word in (("none.json", "no such file"), ("none.yaml", "no such file"))
    ),
    Case("settings at a URL", lambda folder: ["check", "--config", "https://example.org/a.yaml"],
         words=("URL",)),
    Case("a run that is a folder", lambda folder: ["train", folder], words=("a folder",)),
    Case("a run that is missing, as JSON", lambda folder: ["train", folder / "none", "--json"],
         words=("no such file",)),
)  # fmt: skip

LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML: Mapping[str, str] = {
    "a billion references": LAUGHS,
    "a reference to itself": "&a {group_size: *a}",
    "an object of Python": "!!python/object/apply:os.system ['touch owned']",
    "an unknown tag": "!nonsense {group_size: 2}",
    "two documents": "group_size: 2\n---\ngroup_size: 3\n",
    "a tab": "media:\n\tfps: 2\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is a mapping": "? {a: 1}\n: 1\n",
    "a key that is nothing": "~: 1\n",
    "a key that is a number": "7: 1\n",
    "a key twice": "group_size: 2\ngroup_size: 3\n",
    "a key twice further in": "media:\n  fps: 2\n  fps: 3\n",
    "a date of month 13": "seed: 2026-13-01\n",
    "a base of 60": "seed: 190:20:30:40:50:60:70:80:90:10:10:10:10:10:10:10:10:10:10:10\n",
    "an octal": "group_size: 0o7\n",
    "an unclosed quote": "audio_in_video: 'auto\n",
    "a control character": 'audio_in_video: "\x01"\n',
    "an escape code": 'audio_in_video: "\\e[2J"\n',
    "2 MB": "seed: 1 #" + "x" * (2 << 20) + "\n",
    "1,000 lists in a flow": "seed: " + "[" * 1_000 + "]" * 1_000 + "\n",
    "1,000 levels of a block": "".join(f"{' ' * n}a:\n" for n in range(1_000)),
    "a merge of itself": "a: &a\n  <<: *a\n",
    "billions of merges": "a0: &a0 {k: 1}\n"
    + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "a word as a time": "seed: !!timestamp foo\n",
    "nothing as a number": "seed: !!int ''\n",
    "a word as a boolean": "seed: !!bool foo\n",
    "an octal of YAML 1.1": "max_new_tokens: 010\n",
    "minutes and seconds": "max_new_tokens: 1:04\n",
    "gzip": "\x1f\x8b",
}
VALUES: Mapping[str, Sequence[Any]] = {
    "temperature": (-1, -1e-9, 1e400, "hot", True, None, [1.0]),
    "group_size": (0, -4, 10**8, 10**30, 2.5, "2", True),
    "max_new_tokens": (0, -1, 4097, 10**9, 10**30, 1e3),
    "max_prompt_length": (0, -5, 3, "long"),
    "min_format": (7, -0.1, "half"),
    "min_accuracy": (1.01, -1),
    "seed": (10**30, -(10**19), 0.5, "x"),
    "audio_in_video": ("both", 1, None, ["auto"]),
    "media": (3, "x", [], {"fsp": 2}),
    "no such key": (1,),
}
MEDIA: Mapping[str, Sequence[Any]] = {
    "fps": (0, -2, 1e300, 1e400, "2"),
    "min_frames": (0, 1, 800, -4),
    "max_frames": (0, 3, 10**12, 2.5),
    "min_pixels": (1, -1, 10**15),
    "max_pixels": (1, 783, 10**15),
    "image_min_pixels": (0, 10**15),
    "image_max_pixels": (0, 10**15),
}
SETTINGS = (
    *(Case(f"YAML: {name}", settings(text(content))) for name, content in YAML.items()),
    *(
        Case(f"{key} {value!r}"[:70], settings(text(json.dumps({**GOOD, key: value}))))
        for key, values in VALUES.items()
        for value in values
    ),
    *(
        Case(f"media {key} {value!r}", settings(text(json.dumps({"media": {key: value}}))))
        for key, values in MEDIA.items()
        for value in values
    ),
    Case("temperature .nan", settings(text("temperature: .nan")), words=("finite",)),
    Case("temperature .inf", settings(text("temperature: .inf")), words=("finite",)),
    Case("temperature 1e999", settings(text("temperature: 1e999")), words=("finite",)),
    Case("min_format .nan", settings(text("min_format: .nan"))),
    Case("fps .nan", settings(text("media: {fps: .nan}"))),
    Case("a senseless value, as JSON",
         lambda folder: [*settings(text("min_format: 7"))(folder), "--json"],
         words=("min_format",)),
)  # fmt: skip

NAN, INFINITE = float("nan"), float("inf")
RUNS: Mapping[str, Sequence[Any]] = {
    "steps": (0, -1, 1.5, "many"),
    "batch_size": (0, 3, -4, 10**9),
    "micro_batch_size": (0, 3, -2),
    "iterations": (0, -1),
    "seed": (10**30,),
    "save_every": (-1,),
    "keep": (0,),
    "eval_every": (-1, 5),
    "precision": ("float8", 16),
    "device": ("tpu", 0),
    "scale": ("none at all",),
    "freeze": (["audio", "text", "image", "video"], ["image"], "audio", ["smell"]),
    "trackers": (["nobody"], "tensorboard", [7]),
    "rewards": ({}, [], {"nobody": {}}, {"accuracy": {"weight": NAN}}, {"accuracy": 1}),
    "optimizer": (
        *({"lr": rate} for rate in (0, -1, 2, NAN, INFINITE, "fast")),
        *({"betas": betas} for betas in ([0.9], [0.9, 1], [0.9, NAN], 0.9, ["a", "b"])),
        *({"weight_decay": NAN}, {"weight_decay": -1}, {"weight_decay": INFINITE}),
        *({"max_grad_norm": 0}, {"max_grad_norm": NAN}, {"final": 2}, {"warmup_steps": -1}),
    ),
    "loss": (
        *({"beta": NAN}, {"beta": -1}, {"beta": INFINITE}, {"loss_type": "ppo"}),
        *({"epsilon_low": -1}, {"epsilon_high": NAN}, {"delta": 0}),
    ),
    "lora": ({"rank": 0}, {"rank": -1}, {"target_modules": []}, 8),
    "guard": ({"patience": 0}, {"garbage": 0}, {"garbage": NAN}, {"drift": -1}),
    "settings": (
        *({"group_size": n} for n in (0, 1, 10**8, 10**30)),
        *({"temperature": n} for n in (0, NAN, INFINITE, -1)),
        *({"max_new_tokens": n} for n in (0, 10**9, 10**30)),
    ),
    "checkpoint": ("", "nowhere", 7, "run.yaml", "https://example.org/model"),
    "data": ("", "nowhere", 7, "run.yaml", "/dev/zero", ".", "https://example.org/rows.json"),
    "out": ("", 7, "run.yaml", "/dev/null", "/proc/out"),
    "processor": ("nowhere",),
    "root": ("nowhere",),
    "eval_data": ("nowhere", "run.yaml"),
    "judge": ({"url": 7}, "me"),
    "use_cache": (True,),
}
TRAIN = tuple(
    Case(f"a run: {key} {value!r}"[:80], run(**{key: value}))
    for key, values in RUNS.items()
    for value in values
)

CASES = (*HOSTILE, *SETTINGS, *TRAIN)


@pytest.mark.parametrize("one", CASES, ids=str)
def test_ends_as_it_should(
    one: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(one, tmp_path, record_property)
