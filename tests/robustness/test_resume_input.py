"""Runs that are resumed: damaged saved states, damaged logs, and ends in the middle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runner import Case, Outcome, check_case
from runner import run as run_case
from training_run import with_reward, written

from omni_grpo_core.training.checkpointing import lock, newest, truncate_log
from omni_grpo_core.training.load_config import load_train_config

Damage = Callable[[Path], object]


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


PART = "part-1-of-1.bin"
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
            ("fingerprint", None, "does not hold"), ("rows", None, "does not hold"),
            ("format", None, "does not hold"),
            ("format", "3", "does not hold"), ("files", [], "does not hold"),
            ("files", {PART: 7}, "size and hash"), ("files", {PART: [1, "x"]}, "bytes of 1"),
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
        f"{PART} {how}": (damage(PART), word)
        for how, damage, word in (
            ("cut", cut, "bytes of"), ("empty", emptied, "0 bytes of"),
            ("missing", removed, "missing"), ("with one bit flipped", flipped, "differs from"),
        )
    },
    "the part a folder": (replaced(PART, Path.mkdir), "missing"),
    "the part a pipe": (replaced(PART, os.mkfifo), "missing"),
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
        f"{PART} cut", "a file in its place",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (
            "run.json {}", "an empty folder", f"{PART} with one bit flipped",
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


def own_hash(make: Callable[[Path], object], name: str = PART) -> Damage:
    """A file with other content, and a record that matches it."""

    def damage(state: Path) -> None:
        (state / PART).rename(state / name)
        make(state / name)
        body = (state / name).read_bytes()
        content = json.loads((state / "run.json").read_text())
        content["files"] = {name: [len(body), hashlib.sha256(body).hexdigest()]}
        (state / "run.json").write_text(json.dumps(content))

    return damage


class Evil:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (Path("executed"),))


def changed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """The part with other content."""

    def make(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return own_hash(make)


RIGHT_HASH: Mapping[str, Damage] = {
    "weights of another shape": changed(
        lambda part: part.update(weights={n: w[:1].clone() for n, w in part["weights"].items()})
    ),
    "weights without a tensor": changed(lambda part: part["weights"].popitem()),
    "without weights": changed(lambda part: part.pop("weights")),
    "moments of more weights": changed(lambda part: part["optimizer"]["param_groups"].clear()),
    "noise": own_hash(lambda p: p.write_bytes(b"noise" * 99)),
    "nothing": own_hash(lambda p: p.write_bytes(b"")),
    "a list": own_hash(lambda p: torch.save([1], p)),
    "one of two parts": own_hash(lambda p: None, "part-1-of-2.bin"),
    "what executes": own_hash(lambda p: torch.save(Evil(), p)),
    "what executes, of old": own_hash(lambda p: p.write_bytes(pickle.dumps(Evil()))),
}


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("weights of another shape", "what executes")
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
    "another format": (of_state(record(format=2)), "format 2"),
    "other rows": (of_state(record(rows="f" * 64)), "--data-changed"),
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
    # torch's own words for a full disk are "unexpected pos 928896 vs 928784"
    assert re.search(r"\(\d+ MiB free\), wanted a writable path with room", message)
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
