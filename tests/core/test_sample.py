"""Rows in, samples out; every bad row is reported, never skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import DataError
from omni_grpo_core.types import PROBLEM_TYPES, MediaRef, Sample

# As in HumanOmniV2's public training file, its extra columns included.
EMER_ROW: dict[str, Any] = {
    "problem": "What emotions did the doctor initially display?",
    "problem_type": "emer_ov_mc",
    "options": ["A. Urgent", "B. Happy", "C. Relaxed", "D. Calm"],
    "solution": "<context>A doctor frowns.</context><think>Then he smiles.</think>"
    "<answer>B,C</answer>",
    "answer": "B,C",
    "data_type": "video",
    "clean_list": ["Relaxed", "Happy"],
    "video": "MER24/sample_0.mp4",
    "path": "MER24/sample_0.mp4",
}
# As in Video-R1, which HumanOmniV2 trains on too.
NUMBER_ROW: dict[str, Any] = {
    "problem_id": 7,
    "problem": "How many?",
    "data_type": "image",
    "problem_type": "numerical",
    "options": [],
    "solution": "<answer>3.5</answer>",
    "path": "pictures/7.png",
}
SOCIAL_ROW: dict[str, Any] = {
    "qid": "abc_q1_0",
    "q": "How does the man feel?",
    "vid_name": "abc",
    "ts": "0.00-57.158008",
    "ans_corr": "Proud",
    "answer_idx": 3,
    "idx_types": ["rewrite", "matched", "matched", "corr"],
    "a0": "Sad",
    "a1": "Angry",
    "a2": "Tired",
    "a3": "Proud",
}


def write(folder: Path, *rows: Any, name: str = "data.json", media: bool = True) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("l"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows))
    if media:
        for row in rows:
            paths = row.get("path", f"video/{row.get('vid_name')}.mp4")
            for path in paths.values() if isinstance(paths, dict) else [paths]:
                if isinstance(path, str):
                    touch(folder / path)
    return file


def touch(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return file


def read_one(folder: Path, row: Any) -> Sample:
    (sample,) = load_samples(write(folder, row))
    return sample


def refused(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_samples(file)
    message = str(caught.value)
    assert message.startswith(f"sample: {file}")
    assert "\n" not in message
    return message


# --------------------------------------------------------------------------- HumanOmniV2


def test_human_omni_row(tmp_path: Path) -> None:
    file = write(tmp_path, EMER_ROW, NUMBER_ROW)
    assert load_samples(file) == (
        Sample(
            sample_id="data.json:1",
            question="What emotions did the doctor initially display?",
            problem_type="emer_ov_mc",
            options=("A. Urgent", "B. Happy", "C. Relaxed", "D. Calm"),
            solution=EMER_ROW["solution"],
            media=(MediaRef("video", str(tmp_path / "MER24/sample_0.mp4")),),
            origin=f"{file}:1",
        ),
        Sample(
            sample_id="7",
            question="How many?",
            problem_type="numerical",
            options=(),
            solution="<answer>3.5</answer>",
            media=(MediaRef("image", str(tmp_path / "pictures/7.png")),),
            origin=f"{file}:2",
        ),
    )


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("count", [1, 3])
def test_jsonl_under_any_file_name(tmp_path: Path, name: str, count: int) -> None:
    rows = [{**EMER_ROW, "id": f"row {i}"} for i in range(count)]
    lines = write(tmp_path, *rows, name="data.jsonl").read_text()
    file = tmp_path / name
    file.write_text("\ufeff\n" + lines.replace("\n", "\r\n\r\n"), encoding="utf-8")
    samples = load_samples(file)
    assert [s.sample_id for s in samples] == [f"row {i}" for i in range(count)]
    assert samples[0].origin.startswith(f"{file}:")


def test_row_of_a_jsonl_is_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, EMER_ROW, EMER_ROW, name="data.jsonl")
    file.write_text(file.read_text().replace("\n", "\n\n"))
    assert [s.origin for s in load_samples(file)] == [f"{file}:1", f"{file}:3"]


def test_path_of_several_kinds(tmp_path: Path) -> None:
    row = {**EMER_ROW, "path": {"audio": "a.wav", "video": "v.mp4"}}
    assert read_one(tmp_path, row).media == (
        MediaRef("video", str(tmp_path / "v.mp4")),
        MediaRef("audio", str(tmp_path / "a.wav")),
    )
    row = {**row, "data_type": "image_audio", "path": {"image": "i.png", "audio": "a.wav"}}
    assert [ref.modality for ref in read_one(tmp_path, row).media] == ["image", "audio"]


def test_row_of_an_evaluation_file_has_no_path(tmp_path: Path) -> None:
    row = {key: value for key, value in EMER_ROW.items() if key != "path"}
    touch(tmp_path / EMER_ROW["video"])
    (sample,) = load_samples(write(tmp_path, row, media=False))
    assert sample.media == (MediaRef("video", str(tmp_path / EMER_ROW["video"])),)


@pytest.mark.parametrize("extra", [{}, {"data_type": "text"}, {"path": None, "data_type": "text"}])
def test_text_only_row(tmp_path: Path, extra: dict[str, Any]) -> None:
    row = {"problem": "Why?", "problem_type": "free-form", "solution": "<answer>so</answer>"}
    assert read_one(tmp_path, {**row, **extra}).media == ()


def test_root(tmp_path: Path) -> None:
    file = write(tmp_path / "data", EMER_ROW, media=False)
    clip = touch(tmp_path / "videos" / EMER_ROW["path"])
    (sample,) = load_samples(str(file), root=tmp_path / "videos")
    assert sample.media[0].path == str(clip)
    absolute = write(tmp_path / "data", {**EMER_ROW, "path": str(clip)}, media=False)
    assert load_samples(absolute)[0].media[0].path == str(clip)


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_every_problem_type(tmp_path: Path, kind: str) -> None:
    gold = {"numerical": "3", "regression": "0.5", "judge": "Yes"}.get(kind, "B")
    row = {**EMER_ROW, "problem_type": kind, "solution": f"<answer>{gold}</answer>"}
    assert read_one(tmp_path, row).problem_type == kind


@pytest.mark.parametrize(
    ("options", "gold"),
    [
        (["A. red", "B. blue"], " B "),
        (["A. red", "B. blue"], "B. blue"),
        (["(A) red", "(B) blue"], "(B)"),
        (["A) red", "B) blue"], "b"),
        (["A: red", "C: blue"], "C"),
        (["A. same", "B. same"], "A"),
        (["1. red", "2. blue"], "2"),
        (["A. red", "B. blue"], "Blue"),
    ],
)
def test_ways_of_lettering(tmp_path: Path, options: list[str], gold: str) -> None:
    row = {
        **EMER_ROW,
        "problem_type": "multiple choice",
        "options": options,
        "solution": f"<answer>{gold}</answer>",
    }
    assert read_one(tmp_path, row).options == tuple(options)


@pytest.mark.parametrize("gold", ["A", "red", "(a)"])
def test_options_without_letters_get_some(tmp_path: Path, gold: str) -> None:
    row = {**EMER_ROW, "problem_type": "multiple choice", "options": ["red", "blue"]}
    sample = read_one(tmp_path, {**row, "solution": f"<answer>{gold}</answer>"})
    assert sample.options == ("A. red", "B. blue")


@pytest.mark.parametrize("gold", ["B,C", "B/C", "BC", "B and C", "Happy, Relaxed", "['B', 'C']"])
def test_several_right_options_as_the_reward_reads_them(tmp_path: Path, gold: str) -> None:
    row = {**EMER_ROW, "solution": f"<answer>{gold}</answer>"}
    assert read_one(tmp_path, row).solution == row["solution"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"problem": None}, "problem None"),
        ({"problem": " "}, "problem ' '"),
        ({"problem": "half \ud83d"}, "problem 'half \\ud83d'"),
        ({"options": ["A. half \ud83d", "B. whole"]}, "a list of strings"),
        ({"problem_type": "riddle"}, "problem_type 'riddle', wanted one of multiple choice, "),
        ({"problem_type": ["OCR"]}, "problem_type ['OCR']"),
        ({"options": []}, "no options"),
        ({"options": None}, "no options"),
        ({"options": "A. yes"}, "options 'A. yes'"),
        ({"options": ["A. yes", 3]}, "a list of strings"),
        ({"options": ["A. yes", "A. no"]}, "begin with different letters"),
        ({"solution": "<answer>B,E</answer>"}, "gold answer 'B,E'"),
        ({"solution": "<answer>Glad</answer>"}, "wanted labels or texts of the row's options"),
        ({"solution": "B"}, "gold 'B': text outside the tags"),
        ({"solution": "<answer> </answer>"}, "gold '<answer> </answer>': nothing in <answer>"),
        ({"solution": "<answer>A</answer><answer>B</answer>"}, "gold '<answer>A</answer><an"),
        ({"solution": "<think><answer>A</answer></think>"}, "gold '<think><answer>A"),
        ({"solution": "<think> </think><answer>A</answer>"}, "gold '<think> </think>"),
        ({"solution": "It is <answer>A</answer>"}, "gold 'It is <answer>A"),
        ({"data_type": "film"}, "data_type 'film', wanted one of image, video, audio, text"),
        ({"data_type": None}, "data_type None"),
        ({"data_type": "text"}, "data_type 'text' and one path"),
        ({"data_type": "image_audio"}, "data_type 'image_audio' and one path"),
        ({"path": None}, "data_type 'video' and no path"),
        ({"path": ""}, "data_type 'video' and no path"),
        ({"path": ["a.mp4", 3]}, "video 3, wanted a path"),
        ({"path": {"video": 3}}, "video 3, wanted a path"),
        ({"path": {"video": []}}, "path {'video': []}"),
        ({"problem": "<video> or <video>?"}, "2 <video> and 1 video items"),
        ({"path": {"audio": "a.wav"}}, "data_type 'video' and a path for audio"),
        ({"path": {"video": "v.mp4", "smell": "s"}}, "path for smell, video"),
        ({"id": True}, "id True"),
        ({"id": ""}, "id ''"),
        ({"id": "half \ud83d"}, "id 'half \\ud83d'"),
        ({"path": "https://example.org/a.mp4"}, "a URL, wanted a file: URLs are not read"),
        ({"problem_id": [1]}, "problem_id [1]"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    message = refused(write(tmp_path, NUMBER_ROW, {**EMER_ROW, **change}))
    assert message.startswith(f"sample: {tmp_path / 'data.json'}:2: found ")
    assert words in message


@pytest.mark.parametrize(
    ("kind", "gold", "wanted"),
    [
        ("numerical", "a few", "a number"),
        ("numerical", "3 or 4", "a number"),
        ("numerical", "1/0", "a number"),
        ("regression", "about 0.5 or so", "a number"),
        ("judge", "maybe", "yes or no"),
        ("judge", "yes and no", "yes or no"),
        ("emer_ov", ", ,", "words separated by commas"),
    ],
)
def test_a_gold_that_its_problem_type_cannot_read(
    tmp_path: Path, kind: str, gold: str, wanted: str
) -> None:
    """It was only found when the first well-formed completion of its row was scored: in the middle
    of training, as row 0 of a batch, without the file's name."""
    row = {**NUMBER_ROW, "problem_id": 8, "problem_type": kind}
    bad = {**row, "solution": f"<context>c</context><answer>{gold}</answer>"}
    message = refused(write(tmp_path, NUMBER_ROW, bad))
    assert message.startswith(f"sample: {tmp_path / 'data.json'}:2: found gold answer {gold!r}")
    assert f"for problem_type {kind!r}, wanted {wanted}; " in message


@pytest.mark.parametrize(
    ("kind", "gold"),
    [("numerical", r"\frac{1}{2}"), ("numerical", "1,000.5 cm"), ("numerical", r"45^\circ"),
     ("numerical", "5 m²"), ("numerical", "π"), ("numerical", "three"), ("regression", "12%"),
     ("judge", "No, he is not."), ("judge", "True"), ("emer_ov", "joy, surprise"), ("OCR", "?!"),
     ("free-form", "🙂")],
)  # fmt: skip
def test_golds_that_can_be_read(tmp_path: Path, kind: str, gold: str) -> None:
    row = {**NUMBER_ROW, "problem_type": kind, "solution": f"<answer>{gold}</answer>"}
    assert read_one(tmp_path, row).problem_type == kind


@pytest.mark.parametrize("key", ["problem", "problem_type", "solution", "data_type"])
def test_missing_keys(tmp_path: Path, key: str) -> None:
    row = {k: v for k, v in EMER_ROW.items() if k != key}
    assert key in refused(write(tmp_path, row))


def test_ids_used_twice(tmp_path: Path) -> None:
    rows = [{**EMER_ROW, "id": "x"}, {**EMER_ROW, "id": "y"}, {**EMER_ROW, "id": "x"}]
    assert ":3: found id 'x', which row 1 has too" in refused(write(tmp_path, *rows))


def test_missing_files(tmp_path: Path) -> None:
    rows = [{**EMER_ROW, "path": f"{i}.mp4"} for i in range(4)]
    file = write(tmp_path, *rows, media=False)
    touch(tmp_path / "0.mp4")
    message = refused(file)
    assert f":2: found no file {tmp_path / '1.mp4'} (and 2 other rows lack theirs)" in message
    odd = write(
        tmp_path, {**EMER_ROW, "path": "a\0b"}, {**EMER_ROW, "path": "c" * 999}, media=False
    )
    assert ":1: found no file" in refused(odd)


# --------------------------------------------------------------------------- Social-IQ 2.0


@pytest.mark.parametrize("name", ["qa/qa_val.json", "qa/qa_val.jsonl"])
def test_social_iq_in_its_public_layout(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, SOCIAL_ROW, name=name)
    assert load_samples(file) == (
        Sample(
            sample_id="abc_q1_0",
            question="How does the man feel?",
            problem_type="multiple choice",
            options=("A. Sad", "B. Angry", "C. Tired", "D. Proud"),
            solution="<answer>D</answer>",
            media=(MediaRef("video", str(tmp_path / "video/abc.mp4"), 0.0, 57.158008),),
            origin=f"{file}:1",
        ),
    )


def test_social_iq_videos_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path / "qa", SOCIAL_ROW, media=False)
    beside = touch(tmp_path / "clips/abc.mp4")
    assert load_samples(file, root=tmp_path / "clips")[0].media[0].path == str(beside)
    below = touch(tmp_path / "clips/video/abc.mp4")
    assert load_samples(file, root=tmp_path / "clips")[0].media[0].path == str(below)
    assert "no file" in refused(file)


@pytest.mark.parametrize(
    ("ts", "start", "end"),
    [
        ("0.00-60.060000", 0.0, 60.06),
        ("12.5 - 20", 12.5, 20.0),
        # a public clip that states its length from before it was cut to a minute
        ("0.00-116.166992", 0.0, None),
        ("30.00-116.17", 30.0, 116.17),
    ],
)
def test_social_iq_stretches(tmp_path: Path, ts: str, start: float, end: float | None) -> None:
    (ref,) = read_one(tmp_path, {**SOCIAL_ROW, "ts": ts}).media
    assert (ref.start, ref.end) == (start, end)


def test_social_iq_ids_repeat_in_the_public_files(tmp_path: Path) -> None:
    rows = [{**SOCIAL_ROW, "q": f"Question {i}?"} for i in range(3)]
    samples = load_samples(write(tmp_path, *rows))
    assert [s.sample_id for s in samples] == ["abc_q1_0", "abc_q1_0#2", "abc_q1_0#3"]
    assert [s.question for s in samples] == ["Question 0?", "Question 1?", "Question 2?"]
    twice = write(tmp_path, rows[0], rows[1], rows[0])
    assert ":3: found qid 'abc_q1_0', which row 1 has too" in refused(twice)
    twice = write(tmp_path, rows[0], rows[1], rows[1])
    assert ":3: found qid 'abc_q1_0', which row 2 has too" in refused(twice)


def test_social_iq_without_ids(tmp_path: Path) -> None:
    row = {k: v for k, v in SOCIAL_ROW.items() if k != "qid"}
    assert [s.sample_id for s in load_samples(write(tmp_path, row, row))] == [
        "data.json:1",
        "data.json:2",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer_idx": None}, "the public test split has no answers"),
        ({"answer_idx": 4}, "answer_idx 4, wanted 0, 1, 2 or 3"),
        ({"answer_idx": -1}, "answer_idx -1"),
        ({"answer_idx": True}, "answer_idx True"),
        ({"answer_idx": 1.0}, "answer_idx 1.0"),
        ({"answer_idx": "1"}, "answer_idx '1'"),
        ({"a2": ""}, "a2 ''"),
        ({"q": 5}, "q 5"),
        ({"ts": "60.00-0.00"}, "ts '60.00-0.00'"),
        ({"ts": "5-5"}, "ts '5-5'"),
        ({"ts": "0:00-1:00"}, "start and end in seconds"),
        ({"ts": [0, 60]}, "ts [0, 60]"),
        ({"vid_name": None}, "vid_name None"),
    ],
)
def test_bad_social_iq_rows(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    message = refused(write(tmp_path, {**SOCIAL_ROW, **change}))
    assert ":1: found " in message
    assert words in message


@pytest.mark.parametrize("key", ["q", "a0", "a3", "answer_idx", "vid_name", "ts"])
def test_missing_social_iq_keys(tmp_path: Path, key: str) -> None:
    row = {k: v for k, v in SOCIAL_ROW.items() if k != key}
    assert key in refused(write(tmp_path, row))


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "where", "words"),
    [
        (b"", "", "no rows"),
        (b"[]", "", "no rows"),
        (b"\n \n", "", "no rows"),
        (b"hello", ":1", "not JSON (Expecting value in column 1)"),
        (b'{"problem": "a"}\n{"problem": ', ":2", "not JSON"),
        (b'[{"problem": "a"},\n{"problem"]', ":2", "not JSON"),
        (b"[3]", ":1", "found 3, wanted a JSON object"),
        (b'"text"', "", "JSON that is a str"),
        (b'{"data": [{"problem": "a"}]}', "", "JSON that is a dict, wanted a list of rows"),
        (b"\xff\xfe\x00", ":1", "a byte 0xff that is not UTF-8"),
        (b"[" * 100_000, "", "brackets nested more than 64 deep"),
        (b"[" + b"9" * 5_000 + b"]", "", "a number of 5000 digits"),
        (b"{}\n[" + b"9" * 5_000 + b"]", ":2", "a number of 5000 digits"),
        (b'{"id": 1, "id": 2}', ":1", "duplicate key 'id'"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, where: str, words: str) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(content)
    message = refused(file)
    assert message.startswith(f"sample: {file}{where}: found ")
    assert words in message


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.json")
    assert "a folder" in refused(tmp_path)
    assert "a URL, which is not read" in refused(Path("https://example.org/rows.json"))


def test_neither_kind_of_row(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text('[{"question": "Why?"}]')
    message = refused(file)
    assert ":1: found a row of no known format, with question, wanted HumanOmniV2's: 'p" in message
    assert "TRL's: 'prompt'" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"message": [], "images": []}, "'messages', as in ms-swift's, the nearest format"),
        ({"conversation": []}, "'conversations', as in LLaVA's, the nearest format"),
        ({"prompts": "Why?"}, "wanted 'prompt', as in TRL's"),
        ({"problem": "Why?", "answer": "B"}, "found problem_type None, wanted one of"),
        ({"problem": "Why?", "problem_type": "OCR"}, "no 'solution', wanted a non-empty string "
         "under 'solution', as in HumanOmniV2's rows"),
    ],
)  # fmt: skip
def test_the_nearest_format_and_what_is_missing(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    assert words in refused(write(tmp_path, row, media=False))


def test_a_mark_without_a_medium_is_text(tmp_path: Path) -> None:
    row = {**NUMBER_ROW, "problem": "How many <audio> tags are there?"}
    assert read_one(tmp_path, row).question == "How many <audio> tags are there?"


def test_several_files_of_a_modality_and_all_three(tmp_path: Path) -> None:
    """The reader refused lists of files, and image beside video, which the model takes."""
    path = {"video": ["a.mp4", "b.mp4"], "audio": "s.wav", "image": ["p.png"]}
    for name in ("a.mp4", "b.mp4", "s.wav", "p.png"):
        touch(tmp_path / name)
    row = {**EMER_ROW, "path": path, "problem": "Is <image> in <video> or <video>?"}
    (sample,) = load_samples(write(tmp_path, row, media=False))
    assert [(ref.modality, Path(ref.path).name) for ref in sample.media] == [
        ("image", "p.png"), ("video", "a.mp4"), ("video", "b.mp4"), ("audio", "s.wav")
    ]  # fmt: skip
    assert sample.question == "Is <image> in <video> or <video>?"
