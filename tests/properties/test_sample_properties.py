"""Any JSON gives samples or a DataError that names the file; order and content are preserved."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from omni_grpo_core.core.sample import load_samples
from omni_grpo_core.errors import DataError
from omni_grpo_core.types import PROBLEM_TYPES, Sample

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
likely = st.sampled_from(PROBLEM_TYPES) | st.sampled_from(
    (
        *("A", "B", "video", "image", "text", "<answer>A</answer>", "<answer>1</answer>", "0-1"),
        *(["A. x", "B. y"], {"video": "v"}, {"image": "i", "audio": "a"}, 0, 3),
    )
)
keys = st.sampled_from(
    (
        *("problem", "problem_type", "options", "solution", "data_type", "path", "id", "video"),
        *("q", "a0", "a1", "a2", "a3", "answer_idx", "vid_name", "ts", "qid", "problem_id"),
    )
)
rows = st.dictionaries(keys, likely | values, max_size=10)


def load(text: str) -> tuple[Sample, ...] | None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            return load_samples(file)
        except DataError as error:
            return None if str(file) in error.item else ()


@given(st.lists(values | rows, max_size=3))
def test_any_json(data: list[Any]) -> None:
    samples = load(json.dumps(data))
    assert samples is None or len(samples) == len(data) > 0


@given(st.text(max_size=40))
def test_any_text(text: str) -> None:
    assert load(text) is None


words = st.text(st.characters(exclude_characters="<>", exclude_categories=["Cs"])).filter(str.strip)
good_rows = st.fixed_dictionaries(
    {
        "problem": words,
        "problem_type": st.sampled_from(["free-form", "OCR"]),  # any text is an answer
        "solution": words.map("<answer>{}</answer>".format),
        "options": st.lists(words, max_size=3),
    }
)


@given(st.lists(good_rows, min_size=1, max_size=5), st.booleans(), st.booleans(), st.randoms())
def test_permuted_rows_give_permuted_samples(
    data: list[dict[str, Any]], lines: bool, ascii_only: bool, random: Any
) -> None:
    data = [{**row, "id": str(i)} for i, row in enumerate(data)]
    shuffled = random.sample(data, len(data))

    def written(some: list[dict[str, Any]]) -> str:
        if lines:
            return "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in some)
        return json.dumps(some, ensure_ascii=ascii_only, indent=1)

    plain, permuted = load(written(data)), load(written(shuffled))
    assert plain
    assert permuted
    by_id = {sample.sample_id: sample for sample in permuted}
    assert [sample.sample_id for sample in permuted] == [row["id"] for row in shuffled]
    for row, sample in zip(data, plain, strict=True):
        other = by_id[sample.sample_id]
        assert (sample.question, sample.solution) == (row["problem"], row["solution"])
        assert (other.question, other.solution) == (sample.question, sample.solution)
        assert list(sample.options) == list(other.options) == row["options"]
