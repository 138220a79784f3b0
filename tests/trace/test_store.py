"""A stored trace loads equal, or an error names the file and the fault; it is never partial."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from killed import die_before_change
from small_traces import small_trace

from omni_grpo_core.errors import TraceError
from omni_grpo_core.io.atomic import new_folder, write_file
from omni_grpo_core.trace.codec import equal
from omni_grpo_core.trace.store import load_trace, save_trace
from omni_grpo_core.types import StageRecord, Trace


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    folder = tmp_path / "trace"
    save_trace(small_trace(), folder)
    return folder


def test_a_trace_loads_equal(stored: Path) -> None:
    assert equal(load_trace(stored), small_trace())


def test_the_folder_holds_text_and_tensors_only(stored: Path) -> None:
    assert sorted(p.name for p in stored.iterdir()) == ["tensors.safetensors", "trace.json"]
    text = (stored / "trace.json").read_text()
    assert '"summary": "1, 5, 6, 3×8, 4×4, 7, 8, 9, 2, 6"' in text
    assert list(stored.parent.iterdir()) == [stored]


def test_the_text_is_formatted_for_people(stored: Path) -> None:
    lines = (stored / "trace.json").read_text().splitlines()
    assert len(lines) > 50
    span = '{"$type": "Span", "modality": "video", "item": 0, "start": 3, "length": 8},'
    assert span in map(str.strip, lines)


def test_the_environment_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "do-not-store-me")
    save_trace(small_trace(), tmp_path / "t")
    for file in (tmp_path / "t").iterdir():
        assert b"do-not-store-me" not in file.read_bytes()


def test_a_stage_may_occur_twice_in_a_trace(tmp_path: Path) -> None:
    records = (
        StageRecord("logits", torch.tensor([1.0]), (), 0.0),
        StageRecord("logits", torch.tensor([2.0]), (), 0.0),
    )
    save_trace(Trace({}, records), tmp_path / "t")
    assert equal(load_trace(tmp_path / "t"), Trace({}, records))


def test_an_empty_folder_is_filled_and_a_non_empty_one_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    save_trace(small_trace(), folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(TraceError, match="not empty"):
        save_trace(Trace({}, ()), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_trace_that_cannot_be_stored_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = Trace({}, (StageRecord("logits", object(), (), 0.0),))
    with pytest.raises(TraceError, match=r"0.logits.value: found a builtins.object"):
        save_trace(bad, tmp_path / "t")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match="a writable path"):
        save_trace(small_trace(), tmp_path / "file" / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(TraceError, match="not empty"):
        write_file(tmp_path / "folder", b"new")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(TraceError, match="a writable path"):
        write_file(tmp_path / "file" / "x", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("step", ["mkdir", "open", "write", "fsync", "rename", "replace"])
@pytest.mark.parametrize(
    "write", [lambda p: save_trace(small_trace(), p), lambda p: write_file(p, b"x")]
)
def test_a_disk_that_is_full_at_any_step_leaves_nothing(
    step: str, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders above a trace that could not be written stayed behind, and, where the disk was
    full, the message spoke of a folder that is not empty."""

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fails = {
        "mkdir": (Path, "mkdir"),
        "open": (Path, "open"),
        "write": (Path, "write_bytes"),
        "fsync": (os, "fsync"),
        "rename": (Path, "rename"),
        "replace": (Path, "replace"),
    }
    target = tmp_path / "new" / "deep" / "target"
    monkeypatch.setattr(*fails[step], full)
    written = False
    with suppress(TraceError):
        write(target)
        written = True  # this write does not use the step
    assert target.exists() == written
    assert bool(list(tmp_path.iterdir())) == written


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path: Path) -> None:
    name = "ä" * 127
    write_file(tmp_path / name, b"x")
    save_trace(small_trace(), tmp_path / name[::-1].replace("ä", "ö"))
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(TraceError, match="File name too long"):
        write_file(tmp_path / (name + "xx"), b"x")


def test_a_folder_filled_by_another_process_is_left_alone(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "t") as partial:
            (partial / "own").touch()
            (tmp_path / "t").mkdir()
            (tmp_path / "t" / "other").touch()

    with pytest.raises(TraceError, match="not empty"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["t", "other"]


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "trace.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def cut_text(folder: Path) -> None:
    path = folder / "trace.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]))


def cut_tensors(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_tensor_bit(folder: Path) -> None:
    path = folder / "tensors.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def foreign(folder: Path) -> None:
    (folder / "trace.json").write_text('{"traceEvents": []}')


def not_utf8(folder: Path) -> None:
    path = folder / "trace.json"
    path.write_bytes(path.read_bytes().replace(b"which", b"whi\xffh", 1))


@pytest.mark.parametrize(
    ("damage", "file", "named"),
    [
        (cut_text, "trace.json:21", "wanted the JSON as it was written"),
        (cut_tensors, "tensors.safetensors", "bytes, sha256"),
        (flip_tensor_bit, "tensors.safetensors", "bytes, sha256"),
        (foreign, "trace.json", "JSON that is not a trace"),
        (not_utf8, "trace.json:", "0xff that is not UTF-8"),
        (edit('"version": 2', '"version": 3'), "trace.json", "upgrade omni-grpo-core"),
        (edit('"start": 3', '"start": 4'), "trace.json", "does not match its checksum"),
        (
            lambda folder: (folder / "tensors.safetensors").unlink(),
            "tensors.safetensors",
            "no such file",
        ),
        (lambda folder: (folder / "trace.json").unlink(), "trace.json", "no such file"),
    ],
)
def test_damage_is_named_with_its_file(
    stored: Path, damage: Callable[[Path], None], file: str, named: str
) -> None:
    damage(stored)
    with pytest.raises(TraceError) as caught:
        load_trace(stored)
    assert file in caught.value.item
    assert named in str(caught.value)


def test_reformatting_the_text_is_not_damage(stored: Path) -> None:
    path = stored / "trace.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert equal(load_trace(stored), small_trace())


def _write_twice(root: Path, kill: int) -> None:
    data = bytes(1 << 20)
    for number in range(3):
        if number == 1:  # from here on there is something to lose
            changes = die_before_change(kill)
        write_file(root / "file", data)
        with new_folder(root / f"folder{number}") as partial:
            (partial / "a").write_bytes(data)
            (partial / "b").write_bytes(data)
    sys.exit(changes())


def test_a_killed_writer_leaves_only_complete_files_and_folders(tmp_path: Path) -> None:
    for kill in itertools.count():
        root = tmp_path / str(kill)
        writer = multiprocessing.get_context("fork").Process(target=_write_twice, args=(root, kill))
        writer.start()
        writer.join()
        if writer.exitcode == kill:
            break  # it makes this many changes, and was killed before each of them
        assert writer.exitcode == -signal.SIGKILL
        shown = [path for path in root.iterdir() if not path.name.startswith(".")]
        sizes = {
            path.name: [
                file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])
            ]
            for path in shown
        }
        assert sizes.pop("file") == [1 << 20]
        assert sizes
        assert all(found == [1 << 20] * 2 for found in sizes.values())
    assert kill >= 2 * 6, "temporary file and rename; folder, its two files and rename"
