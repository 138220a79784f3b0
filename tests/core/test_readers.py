"""One question in every row format, as the projects publish them, is the same sample.

Shapes from HumanOmniV2's and Social-IQ 2.0's files, TRL's *Dataset formats*, ms-swift's *Custom
dataset*, LLaVA's *Finetune on custom datasets*, OpenAI's and Qwen's messages and verl's
``data_preprocess/geo3k.py``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from omni_grpo_core.core.sample import FORMATS, load_samples, read_samples
from omni_grpo_core.errors import ConfigError, DataError
from omni_grpo_core.types import Dialogue, MediaPart, MediaRef, Message, Sample, TextPart

Row = dict[str, Any]
ASKED = "Which is longer?\nA. the first\nB. the second"
TWO = ["a.mp4", "b.mp4"]


def part(kind: str, value: Any) -> Row:
    return {"type": kind, kind: value}


HUMAN_OMNI: Row = {
    "problem": "Which is longer?",
    "problem_type": "multiple choice",
    "options": ["A. the first", "B. the second"],
    "solution": "<answer>B</answer>",
    "data_type": "video",
    "path": {"video": TWO},
}
ROWS: dict[str, tuple[str, Row]] = {
    "HumanOmniV2": ("humanomni", HUMAN_OMNI),
    "TRL, marks and columns": (
        "trl",
        {
            "prompt": [{"role": "user", "content": f"<video><video>{ASKED}"}],
            "videos": TWO,
            "solution": "<answer>B</answer>",
        },
    ),
    "TRL, parts and columns": (
        "trl",
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [{"type": "video"}, {"type": "video"}, part("text", ASKED)],
                }
            ],
            "videos": TWO,
            "solution": "B",
        },
    ),
    "TRL, text": ("trl", {"prompt": ASKED, "videos": TWO, "completion": "B"}),
    "TRL, prompt and completion": (
        "trl",
        {
            "prompt": [{"role": "user", "content": ASKED}],
            "completion": [{"role": "assistant", "content": "<think>Seen.</think>\n\nB"}],
            "videos": TWO,
        },
    ),
    "ms-swift": (
        "swift",
        {
            "messages": [{"role": "user", "content": f"<video><video>{ASKED}"}],
            "videos": TWO,
            "solution": "<answer>B</answer>",
        },
    ),
    "ms-swift, answered": (
        "swift",
        {
            "messages": [
                {"role": "user", "content": f"<video>\n<video>\n{ASKED}"},
                {"role": "assistant", "content": "B"},
            ],
            "videos": TWO,
        },
    ),
    "LLaVA": (
        "llava",
        {
            "video": TWO,
            "conversations": [
                {"from": "human", "value": f"<video>\n<video>\n{ASKED}"},
                {"from": "gpt", "value": "B"},
            ],
        },
    ),
    "OpenAI, parts": (
        "openai",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": "file:///FOLDER/a.mp4"}},
                        part("video", "b.mp4"),
                        part("text", ASKED),
                    ],
                }
            ],
            "answer": "B",
        },
    ),
    "verl": (
        "verl",
        {
            "data_source": "someone/clips",
            "prompt": [{"role": "user", "content": f"<video><video>{ASKED}"}],
            "videos": [part("video", "a.mp4"), part("video", "b.mp4")],
            "ability": "vision",
            "reward_model": {"style": "rule", "ground_truth": "B"},
            "extra_info": {"split": "train", "index": 0},
        },
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4", "p.png"):
        (tmp_path / name).write_bytes(b"-")
    return tmp_path


def as_json(file: Path, rows: list[Row]) -> Path:
    file.write_text(json.dumps(rows))
    return file


def as_lines(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def as_parquet(file: Path, rows: list[Row]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def as_arrow(file: Path, rows: list[Row]) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    with ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    return file


def as_arrow_stream(file: Path, rows: list[Row]) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    with ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    return file


WRITERS = (as_json, as_lines, as_parquet, as_arrow, as_arrow_stream)


def read_one(folder: Path, row: Row, **options: Any) -> Sample:
    (sample,) = load_samples(as_lines(folder / "rows.jsonl", [{"id": "r", **row}]), **options)
    return sample


@pytest.mark.parametrize("write", WRITERS)
def test_a_row_of_each_format_is_the_same_sample(
    folder: Path, write: Callable[[Path, list[Row]], Path]
) -> None:
    for title, (name, row) in ROWS.items():
        text = json.dumps({"id": "r", **row}).replace("/FOLDER", str(folder))
        file = write(folder / "rows.data", [json.loads(text)])
        (read,) = read_samples(file)
        assert read.format is not None
        assert (title, read.format.name) == (title, name)
        assert (title, read.sample) == (
            title,
            Sample(
                sample_id="r",
                question="Which is longer?",
                problem_type="multiple choice",
                options=("A. the first", "B. the second"),
                solution="<answer>B</answer>",
                media=tuple(MediaRef("video", str(folder / name)) for name in TWO),
                origin=f"{file}:1",
            ),
        )
        # the same if the format is named, and the files are there
        assert load_samples(file, format=name) == (read.sample,)


def test_every_format_has_a_row_here() -> None:
    names = {name for name, _ in ROWS.values()}
    # Social-IQ's rows have one video and four options
    assert names | {"social-iq"} == {one.name for one in FORMATS}


def test_a_format_that_there_is_not(folder: Path) -> None:
    with pytest.raises(ConfigError, match="found sharegpt, wanted one of humanomni, social-iq, ve"):
        read_one(folder, HUMAN_OMNI, format="sharegpt")


def test_a_named_format_is_not_guessed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no 'problem', wanted .* as in HumanOmniV2's rows"):
        read_one(folder, ROWS["TRL, text"][1], format="humanomni")


def test_turns_with_media_in_the_places_of_their_marks(folder: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "<video>What is it?"},
            {"role": "assistant", "content": "A box."},
            {"role": "user", "content": "And is <image> in <video>?"},
        ],
        "images": ["p.png"],
        "videos": TWO,
        "solution": "Yes",
    }
    a, b, p = (
        MediaRef("video", str(folder / "a.mp4")),
        MediaRef("video", str(folder / "b.mp4")),
        MediaRef("image", str(folder / "p.png")),
    )
    assert read_one(folder, row) == Dialogue(
        sample_id="r",
        question="And is <image> in <video>?",
        problem_type="judge",
        options=(),
        solution="<answer>Yes</answer>",
        media=(a, p, b),
        origin=f"{folder / 'rows.jsonl'}:1",
        history=(
            Message("system", (TextPart("Be brief."),)),
            Message("user", (MediaPart(a), TextPart("What is it?"))),
            Message("assistant", (TextPart("A box."),)),
        ),
    )


@pytest.mark.parametrize(
    ("gold", "kind", "solution"),
    [
        ("B", "free-form", "<answer>B</answer>"),
        ("42", "numerical", "<answer>42</answer>"),
        (42, "numerical", "<answer>42</answer>"),
        ("\\boxed{\\frac{1}{2}}", "numerical", "<answer>\\boxed{\\frac{1}{2}}</answer>"),
        ("<think>Hm.</think><answer>no</answer>", "judge", "<think>Hm.</think><answer>no</answer>"),
        ("<think>Hm.</think>\n\nno", "judge", "<answer>no</answer>"),
        ("a dog on a mat", "free-form", "<answer>a dog on a mat</answer>"),
    ],
)
def test_golds_as_other_trainers_have_them(
    folder: Path, gold: Any, kind: str, solution: str
) -> None:
    row = {"prompt": [{"role": "user", "content": "Well?"}], "solution": gold}
    sample = read_one(folder, row)
    assert (sample.problem_type, sample.solution) == (kind, solution)


def test_a_row_s_own_problem_type_and_options_win(folder: Path) -> None:
    row = {"prompt": "Which?", "answer": "A, C", "problem_type": "emer_ov_mc",
           "options": ["joy", "fear", "awe"]}  # fmt: skip
    sample = read_one(folder, row)
    assert (sample.problem_type, sample.options) == ("emer_ov_mc", ("A. joy", "B. fear", "C. awe"))


def test_bytes_in_a_table_become_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` stores images, with the keys that arrow adds to every struct."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    png = b"\x89PNG\r\n\x1a\n and the rest"
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    rows = [
        {"prompt": "<image>Why?", "images": [{"bytes": png, "path": None}], "solution": "so"},
        {"prompt": "<image>Why?", "images": [{"bytes": None, "path": "p.png"}], "solution": "so"},
    ]
    first, second = load_samples(as_parquet(folder / "rows.parquet", rows))
    part_row = {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}]}],
        "solution": "so"}  # fmt: skip
    third = read_one(folder, part_row)
    assert Path(first.media[0].path).read_bytes() == png
    assert first.media == third.media
    assert second.media == (MediaRef("image", str(folder / "p.png")),)
    assert first.question == "Why?"


@pytest.mark.parametrize(("key", "format"), [("prompt", "trl"), ("messages", "swift")])
def test_messages_as_json_text(folder: Path, key: str, format: str) -> None:
    row = {key: json.dumps([{"role": "user", "content": "Why?"}]), "solution": "so"}
    (read,) = read_samples(as_parquet(folder / "rows.parquet", [row]))
    assert isinstance(read.sample, Sample)
    assert (read.format and read.format.name, read.sample.question) == (format, "Why?")


def test_columns_that_other_rows_of_a_table_fill(folder: Path) -> None:
    """Arrow gives every row every column, and every struct every key."""
    rows: list[Row] = [
        {"prompt": "<image>Why?", "image": "p.png", "images": None, "videos": [],
         "reward_model": None, "messages": None, "solution": "so"},
        {"prompt": "<video>Why?", "image": None, "images": [], "videos": ["a.mp4"],
         "reward_model": None, "messages": None, "solution": "so"},
    ]  # fmt: skip
    first, second = load_samples(as_parquet(folder / "rows.parquet", rows))
    assert first.media == (MediaRef("image", str(folder / "p.png")),)
    assert second.media == (MediaRef("video", str(folder / "a.mp4")),)


def test_a_stretch_in_a_part(folder: Path) -> None:
    row = {"messages": [{"role": "user", "content": [
        {"type": "video", "video": "a.mp4", "video_start": 1, "video_end": 2.5},
        {"type": "text", "text": "Why?"}]}], "solution": "so"}  # fmt: skip
    assert read_one(folder, row).media == (MediaRef("video", str(folder / "a.mp4"), 1.0, 2.5),)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Why?"}, "no gold answer, wanted one under solution"),
        ({"prompt": [], "solution": "x"}, "prompt \\[\\], wanted a list of messages with role"),
        ({"prompt": [{"role": "user"}], "solution": "x"}, "wanted a list of messages with role"),
        ({"messages": [{"role": "tool", "content": "x"}], "solution": "y"}, "a message of 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message of the user that asks"),
        (
            {"messages": [{"role": "user", "content": "x"}] * 2, "solution": "y"},
            "messages of user, user, wanted perhaps one of the system",
        ),
        ({"prompt": "<video>Why?", "solution": "x"}, "more <video> than the 0 video items"),
        (
            {"prompt": "<video>Why?", "videos": TWO, "solution": "x"},
            "1 <video> and 2 video items, wanted a mark for each",
        ),
        ({"prompt": "<video>", "videos": ["a.mp4"], "solution": "x"}, "a question without text"),
        ({"prompt": [{"role": "user", "content": 7}], "solution": "x"}, "content 7, wanted text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "smell"}]}], "solution": "x"},
            "a part .*smell.*, wanted a part of type text, image, video or audio",
        ),
        ({"prompt": "Why?", "images": [{}], "solution": "x"}, "image None, wanted a path"),
        ({"prompt": "Why?", "videos": ["https://a.org/b"], "solution": "x"}, "URLs are not read"),
        ({"prompt": "Why?", "images": ["data:image/png,x"], "solution": "x"}, "base64"),
        ({"prompt": "Why?", "solution": "x", "problem_type": "riddle"}, "problem_type 'riddle'"),
        ({"prompt": "Why?", "solution": ""}, "gold '', wanted the right answer"),
        ({"conversations": "x"}, "conversations 'x', wanted a list of messages with 'from'"),
        (
            {"prompt": [{"role": "user", "content": "x"}], "reward_model": {"style": "rule"}},
            "reward_model .*, wanted a mapping with 'ground_truth'",
        ),
    ],
)
def test_rows_that_cannot_be_used(folder: Path, row: Row, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_one(folder, row)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1 and no more", "a whole parquet or arrow file"),
        (b"ARROW1\0\0 and no more", "a whole parquet or arrow file"),
        (b"\xff\xff\xff\xff and no more", "a whole parquet or arrow file"),
    ],
)
def test_broken_tables(folder: Path, content: bytes, words: str) -> None:
    file = folder / "rows.parquet"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        load_samples(file)


@pytest.mark.slow  # `datasets` takes two seconds to be imported
def test_folders_of_datasets(folder: Path) -> None:
    import datasets

    rows = [{"prompt": f"Why {i}?", "solution": "so", "videos": ["a.mp4"]} for i in range(3)]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(folder / "saved"))
    both = datasets.DatasetDict({"train": made, "test": made.select([2])})
    both.save_to_disk(str(folder / "splits"))
    datasets.DatasetDict({"x": made, "y": made}).save_to_disk(str(folder / "unclear"))
    (folder / "files").mkdir()
    as_parquet(folder / "files" / "train-0.parquet", rows)
    for where, wanted in (
        ("saved", [0, 1, 2]),
        ("splits", [0, 1, 2]),
        ("splits:test", [2]),
        ("files", [0, 1, 2]),
    ):
        samples = load_samples(folder / where, root=folder)
        assert [s.question for s in samples] == [f"Why {i}?" for i in wanted]
    with pytest.raises(DataError, match="the splits x, y, wanted the name of one"):
        load_samples(folder / "unclear")
    with pytest.raises(DataError, match="no split 'x'"):
        load_samples(f"{folder / 'saved'}:x")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without data files"):
        load_samples(folder / "empty")
    # nothing is fetched: the library is told to stay offline
    with pytest.raises(DataError, match=r"hub:org/name: found a name, for which `datasets` says"):
        load_samples("hub:org/name")
