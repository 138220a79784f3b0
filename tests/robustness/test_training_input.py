"""Runs that cannot work."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from media_files import trimmed, write_media
from runner import Case, check_case
from runner import run as run_case
from training_run import SOUND, with_reward, written

from omni_grpo_core import tiny

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
BAD_GOLDS = (("numerical", "a few"), ("regression", "much"), ("judge", "maybe"), ("emer_ov", ",,"))
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
