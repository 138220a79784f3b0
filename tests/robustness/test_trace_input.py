"""Recordings that are truncated, altered, written by something else, or not files at all.

A checksum says that a file was not altered since it was written, not that it was written correctly:
nearly all of these have correct checksums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from runner import Case, check_case
from stored_files import Change, change_tensors, change_trace, recording, safetensors

Arguments = Callable[[Path], Sequence[object]]


def changed(change: Change, *more: str) -> Arguments:
    return lambda folder: ["doctor", change_trace(recording(folder / "run"), change), *more]


def tensors(packed: bytes) -> Arguments:
    return lambda folder: ["doctor", change_tensors(recording(folder / "run"), packed)]


def rewritten(old: str, new: str) -> Arguments:
    """Text that no JSON writer produces."""

    def make(folder: Path) -> Sequence[object]:
        file = recording(folder / "run") / "trace.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        return ["doctor", folder / "run"]

    return make


def put(*path: str | int, value: object) -> Change:
    def change(data: dict[str, Any]) -> None:
        inner: Any = data
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value

    return change


def named(case: str, arguments: Arguments, *words: str, code: int = 2) -> Case:
    return Case(case, arguments, code, words)


WRONG: tuple[object, ...] = (None, True, 7, "x", [[1]], {"a": 1}, {"$list": [1]}, {"$map": []})
PLACES: dict[tuple[str | int, ...], tuple[object, ...]] = {
    ("header",): tuple(value for value in WRONG if value != {"$map": []}),
    ("header", "step"): tuple(value for value in WRONG if value != "x"),
    ("stages",): WRONG,
    ("stages", 0): WRONG,
    ("stages", 1, "stage"): WRONG,
    ("stages", 1, "checks"): WRONG,
    ("stages", 1, "seconds"): ("x", None, [1], {"$list": []}),
    ("stages", 1, "value"): WRONG,
    ("stages", 1, "value", "inputs"): (None, 7, "x", [1], {"a": 1}, {"$map": [[1, 2]]}),
    ("stages", 1, "value", "modes"): WRONG,
    ("stages", 1, "value", "sequences"): WRONG[1:],
    ("stages", 1, "value", "cached"): ("x", 7, ["x"], {"a": 1}),
    ("stages", 2, "value", "values"): ("x", ["x"], [[1]], {"a": 1}),
    ("stages", 3, "value", "weights"): ({"a": "x"}, {"a": None}, [1], "x"),
    ("stages", 4, "value", "loss"): (None, "x", [1.0], {"$float": "1"}),
    ("stages", 5, "value", "changed"): ({"a": 0.5}, {"a": "x"}, [True]),
}
OTHER_TYPES = tuple(
    named(f"{'.'.join(map(str, place))} = {json.dumps(value)}", changed(put(*place, value=value)))
    for place, values in PLACES.items()
    for value in values
)

VALUE = ("stages", 1, "value", "config", "odd")
MARKS: dict[str, object] = {
    "pairs that are not pairs": {"$map": [1, 2]},
    "pairs of three": {"$map": [[1, 2, 3]]},
    "pairs of text": {"$map": ["ab"]},
    "a map that is no list": {"$map": {"a": 1}},
    "a key that is a mapping": {"$map": [[{"a": 1}, 2]]},
    "a key that is a list": {"$map": [[{"$list": [1]}, 2]]},
    "equal keys in a map": {"$map": [[1, 2], [1, 3]]},
    "an unknown mark": {"$pickle": "gASVAAA="},
    "a mark and more": {"$float": "nan", "x": 1},
    "a float of many": {"$float": "many"},
    "a list that is a number": {"$list": 3},
    "no such tensor": {"$tensor": "nowhere", "dtype": "int64", "shape": [1]},
    "a tensor that is no name": {"$tensor": 3},
    "an unknown class": {"$type": "Popen", "args": ["true"]},
    "a class that is no name": {"$type": ["Span"]},
    "a span of nothing": {"$type": "Span"},
    "a span with more": {
        "$type": "Span",
        "modality": "video",
        "item": 0,
        "start": 0,
        "length": 1,
        "x": 1,
    },
    "a span that smells": {
        "$type": "Span",
        "modality": "smell",
        "item": 0,
        "start": 0,
        "length": 1,
    },
}


def nested(levels: int, opening: str = "[", closing: str = "]") -> Arguments:
    return rewritten('"do_sample": true', f'"do_sample": {opening * levels}1{closing * levels}')


TEXTS = (
    *(named(f"{n} nested lists", nested(n), "deep") for n in (65, 900, 3000, 200_000)),
    named("3000 nested mappings", nested(3000, '{"a":', "}"), "deep"),
    named(
        "a number of 5000 digits",
        rewritten('"temperature": 1.0', f'"temperature": {"7" * 5000}'),
        "digits",
    ),
    named(
        "a number beyond floats", rewritten('"temperature": 1.0', '"temperature": 1e999'), "float"
    ),
    named("NaN", rewritten('"temperature": 1.0', '"temperature": NaN'), "NaN"),
    named(
        "a key twice",
        rewritten('"temperature": 1.0', '"temperature": 1.0, "temperature": 2.0'),
        "duplicate",
    ),
    named("stages twice", rewritten('"stages":', '"stages": [], "stages":'), "duplicate"),
    named("a lone surrogate", rewritten('"do_sample"', '"\\ud800"'), "surrogate"),
    named("no text", rewritten("{", "\x00{"), "trace.json:1"),
    named("cut", rewritten(" ]\n}", " ]"), "trace.json"),
    named("a version of text", changed(put("version", value="1")), "format 1"),
    named("a version of truth", changed(put("version", value=None)), "format 1"),
    named("a checksum of another type", changed(lambda data: data.update(tensors_sha256=[1]))),
)


def of_one(**changes: object) -> bytes:
    entry = {"dtype": "I64", "shape": [2], "data_offsets": [0, 16], **changes}
    return safetensors({"a": entry}, bytes(16))


TENSORS: dict[str, bytes] = {
    "no bytes": b"",
    "a header beyond the file": (1 << 40).to_bytes(8, "little"),
    "a header of nonsense": safetensors(b"{nonsense"),
    "a header that is a list": safetensors([1, 2]),
    "nested 100000 deep": safetensors(b'{"a":' + b"[" * 100_000),
    "a negative size": of_one(shape=[-2]),
    "sizes whose product overflows": of_one(shape=[1 << 62, 1 << 62]),
    "sizes that are not the data's": of_one(shape=[3]),
    "an unknown dtype": of_one(dtype="I7"),
    "a dtype of no value here": of_one(dtype="C64"),
    "offsets beyond the file": of_one(data_offsets=[0, 160], shape=[20]),
    "offsets that cross": of_one(data_offsets=[16, 0]),
    "data that no tensor has": safetensors({}, bytes(16)),
    "none of the tensors": safetensors({}),
}
FILES_OF_TENSORS = tuple(
    named(
        f"tensors: {name}",
        tensors(packed),
        "tensors.safetensors" if packed != safetensors({}) else "no such tensor",
    )
    for name, packed in TENSORS.items()
)


def piped(name: str) -> Arguments:
    def make(folder: Path) -> Sequence[object]:
        file = recording(folder / "run") / name
        file.unlink()
        os.mkfifo(file)
        return ["doctor", folder / "run"]

    return make


def _pipe(folder: Path) -> Sequence[object]:
    os.mkfifo(folder / "run")
    return ["doctor", folder / "run"]


def _circle(folder: Path) -> Sequence[object]:
    for name in ("step-1", "step-2", "rank-1"):
        (folder / name).symlink_to(folder)
    return ["doctor", folder]


def _folder_for_a_file(folder: Path) -> Sequence[object]:
    (folder / "run" / "trace.json").mkdir(parents=True)
    return ["doctor", folder / "run"]


def _dangling(folder: Path) -> Sequence[object]:
    (folder / "step-1").mkdir()
    (folder / "step-1" / "trace.json").symlink_to(folder / "nowhere")
    return ["doctor", folder]


PLACES_ON_DISK = (
    named("a pipe for the text", piped("trace.json"), "a pipe"),
    named("a pipe for the tensors", piped("tensors.safetensors"), "a pipe"),
    named("a pipe for the folder", _pipe, "neither file nor folder"),
    named("a folder for the text", _folder_for_a_file, "a folder"),
    named("links that lead round", _circle, "a folder without any"),
    named("a link to nowhere", _dangling, "a folder without any"),
    named("nothing", lambda folder: ["doctor", folder / "nowhere"], "no such folder"),
    named("a device", lambda folder: ["doctor", "/dev/null"], "neither file nor folder"),
    named("a file", lambda folder: ["doctor", __file__], "a file"),
    named("a name too long", lambda folder: ["doctor", "x" * 5000], "too long"),
)


def _of_another(data: dict[str, Any]) -> None:
    data["stages"][0]["value"], data["stages"][5]["value"] = (
        data["stages"][5]["value"],
        data["stages"][0]["value"],
    )


def _our_own_pass(data: dict[str, Any]) -> None:
    data["stages"] = data["stages"][:1]
    data["stages"][0]["value"] = [{"$type": "Malformed", "what": "x", "where": 0}]


def _odd(value: str, key: str, odd: object) -> Change:
    """Correct types, yet nothing that a check can read."""

    def change(data: dict[str, Any]) -> None:
        kept = [r for r in data["stages"] if r["value"]["$type"] == value]
        kept[0]["value"][key] = odd
        data["stages"] = kept

    return change


def _template(messages: object) -> Change:
    fields = {"messages": messages, "keywords": {}, "texts": ["a"], "nested": False}
    value = {"$type": "TemplateCall", **fields}
    record = {"$type": "StageRecord", "stage": "text", "value": value, "checks": [], "seconds": 0.0}
    return put("stages", value=[record])


NOTHING_JUDGED = (
    named("messages that are numbers", changed(_template([1])), "nothing could be judged"),
    named("the same as JSON", changed(_template([1]), "--json"), "nothing could be judged"),
    named(
        "probes that are numbers",
        changed(_odd("RewardCall", "probe", {"a": 1})),
        "nothing could be judged",
    ),
    named("no stages", changed(put("stages", value=[])), "without any call"),
    named("no stages, as JSON", changed(put("stages", value=[]), "--json"), "without any call"),
    named("values of other stages", changed(_of_another), "a StepSeen under 'sample'"),
    named("a pass of our own pipeline", changed(_our_own_pass), "omni-grpo check"),
)
SURROGATE = put("header", "who", value="\udc80 \x1b[31m")
SOUND = (
    named("a healthy step", changed(lambda data: None), "HEALTHY", code=0),
    named("a file name that is not UTF-8", changed(SURROGATE), code=0),
    named("that name as JSON", changed(SURROGATE, "--json"), code=0),
    named(
        "a call on which a check fails",
        changed(_odd("GenerateCall", "inputs", {})),
        "HEALTHY",
        code=0,
    ),
)
CASES = (
    *OTHER_TYPES,
    *(named(name, changed(put(*VALUE, value=value))) for name, value in MARKS.items()),
    *TEXTS,
    *FILES_OF_TENSORS,
    *PLACES_ON_DISK,
    *NOTHING_JUDGED,
    *SOUND,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recording_is_judged_or_refused(
    case: Case, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_case(case, tmp_path, record_property)
