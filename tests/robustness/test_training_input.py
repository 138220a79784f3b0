"""Runs that cannot work, and damaged saved states."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from media_files import trimmed, write_media
from runner import Case, Outcome, check_case
from runner import run as run_case
from safetensors.torch import load_file, save_file

from omni_grpo_core import tiny
from omni_grpo_core.training.checkpointing import lock, newest, truncate_log
from omni_grpo_core.training.load_config import load_train_config

Damage = Callable[[Path], object]

SOUND: Mapping[str, Any] = {
    "checkpoint": str(tiny.checkpoint_dir()),
    "data": str(tiny.data_file()),
    "out": "run",
    "settings": {"group_size": 2, "max_new_tokens": 4, "temperature": 3.0},
    "rewards": {"toy_rewards:early_letters": {}},
    "scale": "none",
    "batch_size": 2,
    "micro_batch_size": 2,
    "steps": 3,
    "optimizer": {"lr": 1e-3},
    "save_every": 1,
    # a policy with a cap of 4 tokens always meets it
    "guard": {"preflight": False, "patience": 99, "garbage": 1.0},
    "trackers": [],
}


def written(folder: Path, **changes: Any) -> Sequence[object]:
    (folder / "run.yaml").write_text(yaml.safe_dump({**SOUND, **changes}))
    return ["train", "run.yaml"]


# --------------------------------------------------------------------------- settings


def config(name: str, words: tuple[str, ...] = (), **changes: Any) -> Case:
    return Case(name, lambda folder: written(folder, **changes), words=words)


def setting(**changes: Any) -> dict[str, Any]:
    return {"settings": {**SOUND["settings"], **changes}}


NAN, INF = float("nan"), float("inf")
JUDGE = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}
NUMBERS = (
    *(config(f"group_size {n}", ("group_size",), **setting(group_size=n), batch_size=n)
      for n in (-4, 0, 1, 10**8)),
    *(config(f"group_size {n!r}", ("group_size",), **setting(group_size=n)) for n in (2.5, "x")),
    *(config(f"batch_size {n}", ("batch_size",), batch_size=n) for n in (-2, 0, 3, 10**8, 46)),
    *(config(f"micro_batch_size {n}", ("micro_batch_size",), batch_size=8, micro_batch_size=n,
             **setting(group_size=4)) for n in (-1, 0, 3, 6)),
    *(config(f"{key} {n}", (key,), **{key: n})
      for key in ("steps", "iterations") for n in (-1, 0, 10**12, True)),
    *(config(f"{key} {n}", (key,), **{key: n}) for key, n in (
        ("save_every", -1), ("keep", 0), ("eval_every", 5), ("seed", -1), ("seed", 10**30))),
    *(config(f"lr {n}", ("optimizer: lr",), optimizer={"lr": n})
      for n in (NAN, INF, -1e-3, 0.0, 2)),
    *(config(f"{key} {n}", (f"optimizer: {key}",), optimizer={"lr": 0.1, key: n}) for key, n in (
        ("weight_decay", INF), ("weight_decay", 10.0), ("max_grad_norm", NAN),
        ("max_grad_norm", 0), ("final", 2.0), ("warmup_steps", -1), ("betas", [0.9, NAN]),
        ("betas", [0.9, 1.0]), ("betas", []))),
    *(config(f"temperature {n}", ("temperature",), **setting(temperature=n))
      for n in (NAN, INF, 0, -1.0, 1e-9, 1e9)),
    *(config(f"max_new_tokens {n}", ("max_new_tokens",), **setting(max_new_tokens=n))
      for n in (0, -5, 10**12)),
    config("max_prompt_length -1", ("max_prompt_length",), **setting(max_prompt_length=-1)),
    *(config(f"loss {key} {n}", (key,), loss={key: n}) for key, n in (
        ("epsilon_low", 1.5), ("epsilon_high", -0.1), ("epsilon_high", INF), ("beta", NAN),
        ("beta", -1.0), ("delta", 1.0), ("loss_type", "ppo"))),
    config("correction bounds reversed", ("low",), correction={"low": 3.0, "high": 0.5}),
    *(config(f"lora {key} {n}", ("lora",), lora={key: n}) for key, n in (
        ("rank", 0), ("rank", -1), ("rank", 10**9), ("rank", 9999), ("alpha", 0),
        ("target_modules", []), ("target_modules", ["no_proj"]))),
    *(config(f"guard {key} {n}", (key,), guard={key: n}) for key, n in (
        ("patience", 0), ("garbage", 0), ("garbage", NAN), ("drift", -1.0), ("drift", INF))),
)  # fmt: skip


def _out_is(make: Callable[[Path], object]) -> Callable[[Path], Sequence[object]]:
    def arguments(folder: Path) -> Sequence[object]:
        make(folder / "run")
        return written(folder)

    return arguments


def _checkpoint_in(place: str) -> Callable[[Path], Sequence[object]]:
    """A checkpoint that the run would write into or overwrite."""

    def arguments(folder: Path) -> Sequence[object]:
        shutil.copytree(tiny.checkpoint_dir(), folder / place)
        return written(folder, checkpoint=place, out="run")

    return arguments


PLACES = (
    *(config(f"{key} is a URL", ("URL",), **{key: "https://example.org/x"})
      for key in ("checkpoint", "data", "out", "processor", "root")),
    config("out is a bucket", ("URL",), out="s3://bucket/run"),
    *(config(f"{key} with a NUL", ("printable",), **{key: "a\0b"})
      for key in ("checkpoint", "data", "out")),
    config("out with an escape code", ("printable",), out="run\x1b[2J"),
    config("out of 300 letters", ("name too long",), out="x" * 300),
    config("out in a file", ("out",), out="run.yaml/x"),
    config("out in the checkpoint", ("outside the checkpoint",),
           out=str(tiny.checkpoint_dir() / "run")),
    config("out is the checkpoint", ("outside the checkpoint",), out=str(tiny.checkpoint_dir())),
    Case("out is a file", _out_is(lambda run: run.write_text("")), words=("out",)),
    Case("out is a pipe", _out_is(os.mkfifo), words=("out",)),
    Case("out is a link to nothing", _out_is(lambda run: run.symlink_to("/no/where/x")),
         words=("out",)),
    *(Case(f"checkpoint is {place}", _checkpoint_in(place), words=("overwrite",))
      for place in ("run/model", "run/state/1")),
    config("no checkpoint", ("checkpoint",), checkpoint=""),
    config("checkpoint that is not there", ("checkpoint",), checkpoint="none"),
)  # fmt: skip

MODULES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "raises at import": ("1 / 0", ("ZeroDivisionError while importing",)),
    "exits at import": ("raise SystemExit(0)", ("SystemExit while importing",)),
    "is not Python": ("def f(:", ("SyntaxError while importing",)),
    "has no such function": ("x = 1", ("nothing named 'f'",)),
    "is a number": ("f = 1", ("int",)),
    "is a class that wants arguments": ("class f:\n def __init__(self, x): ...", ("arguments",)),
    "is a class that raises": ("class f:\n def __init__(self): 1 / 0", ("ZeroDivisionError",)),
    "is a class that exits": ("class f:\n def __init__(self): raise SystemExit", ("SystemExit",)),
    "takes no arguments": ("def f(): return []", ("cannot be called",)),
    "takes no columns": ("def f(prompts, completions): return [1.0]", ("cannot be called",)),
}
"""Found in a reward function before anything is loaded."""

CALLS: Mapping[str, tuple[str, str]] = {
    "raises": ("1 / 0", "ZeroDivisionError"),
    "exits": ("raise SystemExit(0)", "SystemExit"),
    "returns nothing": ("return None", "NoneType"),
    "returns a text": ("return 'ab'", "'a'"),
    "returns too few": ("return [1.0]", "list of 1"),
    "returns texts": ("return ['1'] * len(completions)", "'1'"),
    "returns 7": ("return [7] * len(completions)", "7"),
    "runs out of memory": ("raise MemoryError", "MemoryError"),
}
"""Found in it at the first step."""


def with_reward(source: str) -> Callable[[Path], Sequence[object]]:
    def arguments(folder: Path) -> Sequence[object]:
        (folder / "mine.py").write_text(source)
        return written(folder, rewards={"mine:f": {}})

    return arguments


REWARDS = (
    config("reward unknown", ("unknown name",), rewards={"acuracy": {}}),
    config("reward of no module", ("importing",), rewards={"no_such_module:f": {}}),
    config("reward without a name", ("nothing named",), rewards={"toy_rewards:": {}}),
    config("reward without a module", ("importing",), rewards={":f": {}}),
    config("reward weight 0", ("weight",), rewards={"format": {"weight": 0}}),
    config("reward weight NaN", ("weight",), rewards={"format": {"weight": NAN}}),
    *(config(f"judge {key} {n!r}", (f"judge {key}",), judge={**JUDGE, key: n},
             rewards={"context": {}, "format": {}})
      for key, n in (("base_url", "file:///etc/passwd"), ("timeout", 0), ("model", " "),
                     ("concurrency", 0), ("deadline", -1))),
    config("judge timeout infinite", ("timeout",), judge={**JUDGE, "timeout": INF},
           rewards={"context": {}, "format": {}}),
    *(Case(f"reward {name}", with_reward(source), words=words)
      for name, (source, words) in MODULES.items()),
)  # fmt: skip

LAUNCHED = tuple(
    Case(f"launched with {variables}", written, words=("environment",), environment=variables)
    for variables in (
        {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "2", "RANK": "5"},
    )
)  # fmt: skip


# --------------------------------------------------------------------------- rows

ROW = json.loads(tiny.data_file().read_text(encoding="utf-8"))[0]
TEXT = {**{k: v for k, v in ROW.items() if k != "path"}, "data_type": "text"}
CLIP = tiny.data_file().parent / "clip-00.mp4"
FTYP = struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0)
LAYOUT = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)


def with_rows(*rows: Mapping[str, Any], **changes: Any) -> Callable[[Path], Sequence[object]]:
    """A run on these rows, one of them in each step."""

    def arguments(folder: Path) -> Sequence[object]:
        shutil.copy(CLIP, folder)
        named = [{**row, "id": str(number)} for number, row in enumerate(rows)]
        (folder / "rows.json").write_text(json.dumps(named), encoding="utf-8")
        return written(folder, **{"data": "rows.json", **changes})

    return arguments


def with_medium(
    make: Callable[[Path], object], data_type: str = "video", **changes: Any
) -> Callable[[Path], Sequence[object]]:
    """A run whose only row names a file that ``make`` writes."""
    row = {**ROW, "data_type": data_type, "path": "medium"}

    def arguments(folder: Path) -> Sequence[object]:
        make(folder / "medium")
        return with_rows(row, **changes)(folder)

    return arguments


def body(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def lacks(name: bytes) -> Callable[[Path], object]:
    return body(CLIP.read_bytes().replace(name, b"xxxx"))


def wav(stated: int) -> bytes:
    """Two seconds of sound under a header that states ``stated`` bytes."""
    head = struct.pack("<4sI4s4s", b"RIFF", 0xFFFF_FFFF, b"WAVE", b"fmt ") + LAYOUT
    sound = (1000 * np.sin(np.arange(32_000) / 5)).astype("<i2")
    return head + struct.pack("<4sI", b"data", stated) + sound.tobytes()


def long_clip(path: Path) -> None:
    """Twenty seconds, the last five of which are shown."""
    frames = np.zeros((200, 64, 64, 3), np.uint8)
    whole = write_media(path.with_suffix(".mp4"), frames, fps=10)
    path.write_bytes(trimmed(whole.read_bytes(), 15.0, 5.0))


def apng(path: Path) -> None:
    """An APNG that states 0 pictures."""
    picture(path, "PNG")
    whole, chunk = path.read_bytes(), b"acTL" + bytes(8)
    length, check = (struct.pack(">I", number) for number in (8, zlib.crc32(chunk)))
    path.write_bytes(whole[:33] + length + chunk + check + whole[33:])


def picture(path: Path, kind: str, **options: Any) -> None:
    PIL.Image.new("RGB", (56, 84), "red").save(path, kind, **options)


def square(side: int) -> Callable[[Path], object]:
    return lambda path: PIL.Image.new("1", (side, side), 1).save(path, "PNG")


def measured_on_a_bad_one(folder: Path) -> Sequence[object]:
    (folder / "bad").write_bytes(gzip.compress(CLIP.read_bytes()))
    (folder / "eval.json").write_text(json.dumps([{**ROW, "path": "bad"}]), encoding="utf-8")
    return with_rows(TEXT, eval_data="eval.json", eval_every=1)(folder)


EMF = b"\1\0\0\0" + struct.pack("<I", 108) + bytes(32) + b" EMF" + bytes(100)
NESTED = b"".join(struct.pack(">I4s", 8 * (3000 - depth), b"moov") for depth in range(3000))
EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
BAD_GOLDS = (("numerical", "three"), ("regression", "much"), ("judge", "maybe"), ("emer_ov", ",,"))
ROWS = (
    *(Case(f"an mp4 without {name.decode()}", with_medium(lacks(name)), words=("media: ",))
      for name in (b"moov", b"trak", b"mdhd", b"stsd", b"stsz", b"stts")),
    Case("an mp4 of boxes 3,000 deep", with_medium(body(FTYP + NESTED)), words=("media: ",)),
    Case("an mp4 of boxes alone", with_medium(body(FTYP + b"\0\0\0\x08free" * 20_000)),
         words=("media: ",)),
    Case("an mp4 cut off", with_medium(body(CLIP.read_bytes()[:-4000])), words=("media: ",)),
    Case("an mp4 in gzip", with_medium(body(gzip.compress(CLIP.read_bytes()))), words=("media: ",)),
    Case("an mp4 in gzip, among the rows to measure on", measured_on_a_bad_one,
         words=("media: ",)),
    Case("a text for a picture", with_medium(body(b"no picture"), "image"), words=("media: ",)),
    Case("an EMF of nothing", with_medium(body(EMF), "image"), words=("media: ",)),
    *(Case(f"a picture of {side}² pixels", with_medium(square(side), "image"),
           words=("media: ", "pixels")) for side in (9_500, 14_000)),
    *(Case(f"{gold} for {kind}, third of three rows",
           with_rows(TEXT, TEXT, {**TEXT, "problem_type": kind,
                                  "solution": f"<answer>{gold}</answer>"}),
           words=("rows.json:3", repr(gold), kind)) for kind, gold in BAD_GOLDS),
    *(Case(f"freeze {frozen}, of rows of text", with_rows(TEXT, freeze=frozen),
           words=("freeze", "1 of 1 rows", "rows.json:1"))
      for frozen in (["text"], ["text", "text"], ["text", "audio"])),
    Case("freeze text, of rows some of which are text", with_rows(ROW, TEXT, freeze=["text"]),
         words=("freeze", "1 of 2 rows", "rows.json:2")),
)  # fmt: skip


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_a_run_on_rows_that_cannot_be_used_leaves_nothing_behind(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    outcome = check_case(case, tmp_path, record_property)
    assert "Warning" not in outcome.stderr


# room for 10 of the 20 s, and for the words around them
LIMITED = {**setting(max_prompt_length=350, media={"fps": 10.0, "max_frames": 200}), "steps": 1}
USABLE = (
    *(Case(f"a wav that states {stated:#x} bytes", with_medium(body(wav(stated)), "audio",
                                                               **LIMITED), code=0)
      for stated in (0xFFFF_FFFF, 0x7FFF_FFFF)),
    Case("a clip trimmed by its edit list", with_medium(long_clip, **LIMITED), code=0),
    Case("odd EXIF", with_medium(lambda path: picture(path, "JPEG", exif=EXIF), "image", steps=1),
         code=0),
    Case("an APNG of no picture", with_medium(apng, "image", steps=1), code=0),
)  # fmt: skip


@pytest.mark.parametrize("case", USABLE, ids=str)
def test_a_run_on_odd_media_that_can_be_used(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """``check`` accepted them, but ``train`` refused them by their headers, or let a library print
    to stderr."""
    outcome = check_case(case, tmp_path, record_property)
    assert "Warning" not in outcome.stderr


# --------------------------------------------------------------------------- runs


@pytest.mark.parametrize("case", [*NUMBERS, *PLACES, *REWARDS, *LAUNCHED], ids=str)
def test_a_run_that_cannot_work(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)


@pytest.mark.parametrize(
    "name",
    [n if n in ("raises", "exits") else pytest.param(n, marks=pytest.mark.slow) for n in CALLS],
)
def test_a_reward_that_fails_at_the_first_step(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    body, word = CALLS[name]
    case = Case(f"reward {name}", lambda folder: [], words=("reward", word))
    source = f"def f(prompts, completions, **columns):\n    {body}\n"
    (tmp_path / "given").mkdir()
    outcome = run_case(
        case, [str(w) for w in with_reward(source)(tmp_path / "given")], tmp_path / "given"
    )
    record_property("robustness", outcome.ending)
    assert outcome.code == 2, outcome
    assert outcome.stderr.count("error: ") == 1
    assert word in outcome.stderr
    assert not (tmp_path / "given" / "run").exists()


# --------------------------------------------------------------------------- saved states


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with the states of the last two."""
    folder = tmp_path_factory.mktemp("finished") / "given"
    folder.mkdir()
    case = Case("finished", written)
    outcome = run_case(case, [str(word) for word in written(folder)], folder)
    assert outcome.code == 0, outcome
    assert sorted(path.name for path in (folder / "run" / "state").iterdir()) == [
        "000002",
        "000003",
    ]
    return folder


def cut(name: str) -> Damage:
    return lambda state: os.truncate(state / name, (state / name).stat().st_size // 2)


def emptied(name: str) -> Damage:
    return lambda state: os.truncate(state / name, 0)


def removed(name: str) -> Damage:
    return lambda state: (state / name).unlink()


def flipped(name: str) -> Damage:
    """One bit in the middle."""

    def damage(state: Path) -> None:
        body = bytearray((state / name).read_bytes())
        body[len(body) // 2] ^= 1
        (state / name).write_bytes(body)

    return damage


def text(name: str, content: str) -> Damage:
    return lambda state: (state / name).write_text(content)


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(state: Path) -> None:
        (state / name).unlink()
        make(state / name)

    return damage


def record(**changes: Any) -> Damage:
    def damage(state: Path) -> None:
        content = json.loads((state / "run.json").read_text())
        (state / "run.json").write_text(json.dumps({**content, **changes}))

    return damage


def instead(make: Callable[[Path], object]) -> Damage:
    """Replaces the whole folder."""

    def damage(state: Path) -> None:
        shutil.rmtree(state)
        make(state)

    return damage


WEIGHTS, OPTIMIZER, RANDOM = "model.safetensors", "optimizer.bin", "random_states_0.pkl"
STEP = {"scores": {"a": [1.0]}, "totals": [1.0], "group_ids": ["g"], "capped": [False]}
DAMAGE: Mapping[str, tuple[Damage, str]] = {
    "run.json cut": (cut("run.json"), "not JSON"),
    "run.json empty": (emptied("run.json"), "not JSON"),
    "run.json missing": (removed("run.json"), "no such file"),
    "run.json a folder": (replaced("run.json", Path.mkdir), "a folder"),
    "run.json a pipe": (replaced("run.json", os.mkfifo), "a pipe"),
    "run.json a link to nothing": (replaced("run.json", lambda p: p.symlink_to("x")), "no such"),
    "run.json bytes": (replaced("run.json", lambda p: p.write_bytes(b"\xff\xfe{")), "UTF-8"),
    **{
        f"run.json {content[:12]}": (text("run.json", content), word)
        for content, word in (
            ("{}", "does not hold"), ("[]", "does not hold"), ("null", "does not hold"),
            ("7", "does not hold"), ("nonsense", "not JSON"), ("[" * 3000, "deep"),
            ('{"step": ' + "9" * 5000 + "}", "digits"), ('{"step": NaN}', "NaN"),
            ('{"step": 3, "step": 3}', "duplicate"),
            ('{"step": 3, "fingerprint": "x", "guard": []}', "earlier version"),
        )
    },
    **{
        f"{key} {value!r}"[:40]: (record(**{key: value}), word)
        for key, value, word in (
            ("step", "3", "does not hold"), ("step", True, "does not hold"),
            ("step", 3.0, "does not hold"), ("step", -1, "step -1"), ("step", 99, "from step 99"),
            ("fingerprint", None, "does not hold"), ("format", None, "does not hold"),
            ("format", "2", "does not hold"), ("files", [], "does not hold"),
            ("files", {WEIGHTS: 7}, "size and hash"), ("files", {WEIGHTS: [1, "x"]}, "bytes of 1"),
            ("files", {"../../../x": [1, "x"]}, "missing"), ("files", {"": [1, "x"]}, "missing"),
            ("guard", {}, "does not hold"),
            ("guard", [7], "not a step"), ("guard", [{}], "not a step"),
            ("guard", [{**STEP, "totals": "x"}], "not a step"),
            ("guard", [{**STEP, "totals": ["x"]}], "not a step"),
            ("guard", [{**STEP, "totals": []}], "not a step"),
            ("guard", [{**STEP, "scores": {"a": 1.0}}], "not a step"),
            ("guard", [{**STEP, "capped": [0]}], "not a step"),
            ("guard", [{**STEP, "group_ids": [1]}], "not a step"),
            ("guard", [{**STEP, "more": 1}], "not a step"),
        )
    },
    **{
        f"{name} {how}": (damage(name), word)
        for name in (WEIGHTS, OPTIMIZER, RANDOM)
        for how, damage, word in (
            ("cut", cut, "bytes of"), ("empty", emptied, "0 bytes of"),
            ("missing", removed, "missing"), ("with one bit flipped", flipped, "differs from"),
        )
    },
    "weights a folder": (replaced(WEIGHTS, Path.mkdir), "missing"),
    "optimizer a pipe": (replaced(OPTIMIZER, os.mkfifo), "missing"),
    "a file in its place": (instead(Path.touch), "run.json"),
    "an empty folder": (instead(Path.mkdir), "no such file"),
    "a link to nothing": (instead(lambda p: p.symlink_to("nowhere")), "no such file"),
}  # fmt: skip


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied"


def record_within(name: str) -> bool:
    """Damage within a readable record: tested without the command below."""
    return not name.endswith(
        ("cut", "missing", "{}", "flipped", "empty", "pipe", "place", "folder")
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if record_within(n) else n for n in DAMAGE],
)
def test_without_an_intact_state_nothing_starts_over(
    name: str, copied: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The newest state is damaged and the older one gone: the run says what is wrong, and neither
    starts over nor touches what is there."""
    damage, word = DAMAGE[name]
    shutil.rmtree(copied / "run" / "state" / "000002")
    damage(copied / "run" / "state" / "000003")

    def arguments(folder: Path) -> Sequence[object]:
        folder.rmdir()
        copied.rename(folder)
        return ["train", "run.yaml"]

    case = Case(name, arguments, words=("state 000003 is incomplete", word))
    check_case(case, tmp_path, record_property)


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_intact_state_is_used(name: str, copied: Path) -> None:
    damage, word = DAMAGE[name]
    damage(copied / "run" / "state" / "000003")
    plan, _ = load_train_config(copied / "run.yaml")
    saved = newest(copied / "run", plan)
    assert saved is not None
    assert (saved.step, saved.folder.name, len(saved.guard)) == (2, "000002", 2)
    assert len(saved.skipped) == 1
    assert saved.skipped[0].startswith("state 000003 is incomplete: ")
    assert word in saved.skipped[0]


def logged(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def resumed(folder: Path, name: str, record_property: Callable[[str, object], None]) -> Outcome:
    outcome = run_case(Case(name, written), ["train", "run.yaml"], folder)
    record_property("robustness", outcome.ending)
    assert outcome.stderr.count("Traceback") == 0, outcome.stderr
    return outcome


@pytest.mark.parametrize(
    "name",
    [
        f"{WEIGHTS} cut", "a file in its place",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (
            "run.json {}", "an empty folder", f"{OPTIMIZER} with one bit flipped", f"{RANDOM} cut",
        )),
    ],
)  # fmt: skip
def test_the_run_resumes_from_it_and_says_so(
    name: str, finished: Path, copied: Path, record_property: Callable[[str, object], None]
) -> None:
    """The broken state is not in the way: it is overwritten when its step comes."""
    DAMAGE[name][0](copied / "run" / "state" / "000003")
    (copied / "run" / "state" / "notes.txt").write_text("mine")
    outcome = resumed(copied, name, record_property)
    assert outcome.code == 0, outcome.stderr
    (warning,) = [line for line in outcome.stderr.splitlines() if line.startswith("warning: ")]
    assert "state 000003 is incomplete" in warning
    assert warning.endswith("resuming from state 000002")
    assert logged(copied) == logged(finished)
    plan, _ = load_train_config(copied / "run.yaml")
    saved = newest(copied / "run", plan)
    assert saved is not None
    assert (saved.step, saved.skipped) == (3, ())
    left = {path.name for path in (copied / "run" / "state").iterdir()}
    assert left == {"000002", "000003", "notes.txt"}


def _own_hash(state: Path, name: str, make: Callable[[Path], object]) -> None:
    """A file with other content, and a record that matches it."""
    make(state / name)
    body = (state / name).read_bytes()
    content = json.loads((state / "run.json").read_text())
    content["files"][name] = [len(body), hashlib.sha256(body).hexdigest()]
    (state / "run.json").write_text(json.dumps(content))


class Evil:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (Path("executed"),))


def _of_another_shape(path: Path) -> None:
    save_file({name: w[:1].clone() for name, w in load_file(path).items()}, path)


def _without_a_tensor(path: Path) -> None:
    save_file(dict(list(load_file(path).items())[1:]), path)


RIGHT_HASH: Mapping[str, Damage] = {
    "weights of another shape": lambda s: _own_hash(s, WEIGHTS, _of_another_shape),
    "weights without a tensor": lambda s: _own_hash(s, WEIGHTS, _without_a_tensor),
    "weights of noise": lambda s: _own_hash(s, WEIGHTS, lambda p: p.write_bytes(b"noise" * 99)),
    "optimizer of noise": lambda s: _own_hash(s, OPTIMIZER, lambda p: p.write_bytes(b"noise")),
    "optimizer empty": lambda s: _own_hash(s, OPTIMIZER, lambda p: p.write_bytes(b"")),
    "optimizer of a list": lambda s: _own_hash(s, OPTIMIZER, lambda p: torch.save([1], p)),
    "optimizer of nothing": lambda s: _own_hash(s, OPTIMIZER, lambda p: torch.save({}, p)),
    "optimizer that executes": lambda s: _own_hash(s, OPTIMIZER, lambda p: torch.save(Evil(), p)),
    "optimizer that executes, of old": lambda s: _own_hash(
        s, OPTIMIZER, lambda p: p.write_bytes(pickle.dumps(Evil()))
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("weights of another shape", "optimizer that executes")
        else pytest.param(n, marks=pytest.mark.slow)
        for n in RIGHT_HASH
    ],
)  # fmt: skip
def test_files_of_another_model_are_refused_whatever_their_hash(
    name: str, copied: Path, record_property: Callable[[str, object], None]
) -> None:
    RIGHT_HASH[name](copied / "run" / "state" / "000003")
    outcome = resumed(copied, name, record_property)
    assert outcome.code == 2, outcome
    (message,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "state/000003" in message
    assert "weights and optimizer of this model" in message
    assert not (copied / "executed").exists()


def of_state(damage: Damage) -> Damage:
    return lambda run: damage(run / "state" / "000003")


def state_is(make: Callable[[Path], object]) -> Damage:
    return lambda run: instead(make)(run / "state")


OTHERS: Mapping[str, tuple[Damage, str]] = {
    "another format": (of_state(record(format=3)), "format 3"),
    "other settings": (of_state(record(fingerprint="f" * 64)), "other settings"),
    "state is a file": (state_is(Path.touch), "other than a folder"),
    "state is a link to nothing": (state_is(lambda p: p.symlink_to("x")), "other than a folder"),
    "log is a folder": (replaced("log.jsonl", Path.mkdir), "a folder"),
    "log is a pipe": (replaced("log.jsonl", os.mkfifo), "a pipe"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_run_cannot_resume_from(
    name: str, copied: Path, record_property: Callable[[str, object], None]
) -> None:
    damage, word = OTHERS[name]
    damage(copied / "run")
    outcome = resumed(copied, name, record_property)
    assert outcome.code == 2, outcome
    (message,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert word in message


LOGS: Mapping[str, bytes] = {
    "noise": b"\x00\xff\xfe noise\n" * 3,
    "other values": b'[]\n7\nnull\n{}\n{"step": "1"}\n{"step": true}\n',
    "deep": b"[" * 5000 + b"\n",
    # JSON but for one byte: found by fuzzing
    "a byte within a step": b'{"step": 0, "note": "\xff"}\n',
}


@pytest.mark.parametrize("name", LOGS)
def test_an_unreadable_log_is_kept_beside_the_new_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 0, "loss": NaN}\n' + LOGS[name] + b'{"step": 1}\n{"st')
    whole = path.read_bytes()
    warning = truncate_log(path, 1)
    assert warning is not None
    assert f"{LOGS[name].count(10)} lines of " in warning
    assert path.read_bytes() == b'{"step": 0, "loss": NaN}\n'
    assert (tmp_path / "log.jsonl.unreadable").read_bytes() == whole


def test_a_run_with_such_a_log_says_so_and_resumes(
    copied: Path, record_property: Callable[[str, object], None]
) -> None:
    (copied / "run" / "log.jsonl").write_bytes(b"noise\n")
    outcome = resumed(copied, "log of noise", record_property)
    assert outcome.code == 0
    assert "warning: 1 lines of" in outcome.stderr


def test_a_folder_has_one_run_at_a_time(
    copied: Path, record_property: Callable[[str, object], None]
) -> None:
    handle = lock(copied / "run")
    assert handle is not None
    try:
        outcome = resumed(copied, "two runs", record_property)
    finally:
        os.close(handle)
    assert outcome.code == 2
    assert "a run that is still in progress" in outcome.stderr


# --------------------------------------------------------------------------- while it runs


def with_patch(body: str) -> Callable[[Path], Sequence[object]]:
    """A reward that runs ``body`` at the second step."""
    source = f"""
import os, resource, signal
from toy_rewards import early_letters
calls = []

def f(completions, **columns):
    calls.append(1)
    if len(calls) == 2:
        {body}
    return early_letters(completions)
"""
    return with_reward(source)


FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"


def test_a_full_disk_while_saving_leaves_the_older_state_to_resume_from(
    finished: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """It left half a state, a traceback from the writing library, and exit code 1."""
    folder = tmp_path / "given"
    folder.mkdir()
    words = [str(word) for word in with_patch(FULL)(folder)]
    outcome = run_case(Case("full disk", written), words, folder)
    record_property("robustness", outcome.ending)
    assert outcome.code == 2, outcome
    (message,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert "state/000002" in message
    assert "a writable path" in message
    assert [path.name for path in (folder / "run" / "state").iterdir()] == ["000001"]
    with_patch("pass")(folder)
    again = run_case(Case("room again", written), words, folder)
    assert again.code == 0, again
    assert [line["loss"] for line in logged(folder)] == [line["loss"] for line in logged(finished)]


@pytest.mark.parametrize(
    ("number", "code"), [("SIGINT", 130), pytest.param("SIGTERM", -15, marks=pytest.mark.slow)]
)
def test_a_run_that_is_ended_by_hand_keeps_what_it_saved(
    number: str, code: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    body = f"os.kill(os.getpid(), signal.{number})"
    outcome = run_case(Case(number, written), [str(w) for w in with_patch(body)(folder)], folder)
    assert outcome.code == code, outcome
    if number == "SIGINT":
        record_property("robustness", outcome.ending)
        assert outcome.stderr.splitlines()[-1] == "interrupted"
        assert "Traceback" not in outcome.stderr
    assert [path.name for path in (folder / "run" / "state").iterdir()] == ["000001"]


def test_what_a_reward_prints_stays_out_of_the_json(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    source = "print('imported')\nfrom toy_rewards import early_letters\n"
    source += (
        "def f(completions, **c):\n    print('called')\n    return early_letters(completions)\n"
    )
    (folder / "mine.py").write_text(source)
    words = [*map(str, written(folder, rewards={"mine:f": {}}, steps=1)), "--json"]
    outcome = run_case(Case("a reward that prints", written), words, folder)
    record_property("robustness", outcome.ending)
    assert outcome.code == 0, outcome
    assert json.loads(outcome.stdout)["status"] == "finished"
    assert "imported" in outcome.stderr
    assert "called" in outcome.stderr
