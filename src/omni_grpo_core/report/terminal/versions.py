"""The matrix as a Markdown table, placed between two markers in a document."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

from omni_grpo_core.errors import ConfigError

_MARKS: Mapping[str, str] = {"qwen2.5": "matrix", "qwen3": "matrix-qwen3"}
_KEYWORDS = {
    "use_audio_in_video": "`use_audio_in_video=True`",
    "load_audio_from_video": "`load_audio_from_video=True`",
    "load_audio_from_video, audio_from_video_indices": "the same with `audio_from_video_indices`",
}
_OUTCOMES = {
    "right": "right",
    "lost": "**ignored**, no placeholder for the sound",
    "other": "**wrong ids**",
}
_DEFAULT = "the default"
_FRAMES = "0 2 5 7 of 8"
"""Frames requested of the shipped clip: ``linspace(0, 7, 4).round()``."""

Cell = Callable[[Mapping[str, Any]], str]


def markdown(matrix: Mapping[str, Any]) -> str:
    """A column for each version, a row for each measurement."""
    versions, default = matrix["versions"], matrix["default"]
    heads = [_head(v["facts"], name == default) for name, v in versions.items()]
    lines = [f"| transformers | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for title, cell in _rows(int(matrix["rows"])):
        cells = [cell(version) for version in versions.values()]
        lines.append(f"| {title} | {' | '.join(map(_plain, cells))} |")
    return "\n".join(lines)


def marks(family: str) -> tuple[str, str]:
    """The lines that enclose a family's table in a document.

    >>> marks("qwen3")
    ('<!-- matrix-qwen3:begin -->', '<!-- matrix-qwen3:end -->')
    """
    return f"<!-- {_MARKS[family]}:begin -->", f"<!-- {_MARKS[family]}:end -->"


def put(document: str, table: str, name: str, family: str = "qwen2.5") -> str:
    """``document`` with ``table`` between the family's markers.

    Raises:
        ConfigError: not exactly one pair of markers.

    >>> put("a\\n<!-- matrix:begin -->\\nold\\n<!-- matrix:end -->\\nb", "new", "README.md")
    'a\\n<!-- matrix:begin -->\\nnew\\n<!-- matrix:end -->\\nb'
    """
    begin, end = marks(family)
    pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    found = pattern.findall(document)
    if len(found) != 1:
        raise ConfigError(
            name,
            got=f"{len(found)} places for the table",
            want=f"one, between the lines {begin} and {end}",
            fix="put the two markers where the table should go",
        )
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", document)


def put_into(path: Path, table: str, family: str) -> bytes:
    """The new content of ``path``. Raises :class:`ConfigError` as :func:`put`, or if unreadable."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            str(path), got=str(error), want="a UTF-8 text file", fix="check the path"
        ) from error
    return put(text, table, str(path), family).encode()


def holds(matrix: Mapping[str, Any]) -> bool:
    """Whether every version gives the default's ids, positions, answers and (within tolerance)
    floats, and fails no check.

    >>> holds({"versions": {"a": {"facts": {"failing": []}}}})
    True
    """
    return not any(
        version["facts"]["failing"]
        or any(
            stage["verdict"] == "differs"
            for stage in version.get("stages", {}).values()
            if isinstance(stage, Mapping)
        )
        for version in matrix["versions"].values()
    )


def announced(matrix: Mapping[str, Any]) -> list[str]:
    """A line for everything that a version of the matrix accepts but announces as going away,
    soonest first, as announced by the newest version."""
    found = {}
    for version in matrix["versions"].values():
        by = version["facts"]["header"]["transformers"]
        for what, notice in version["facts"].get("going", {}).items():
            found[what] = (_number(notice["gone in"]), by)
    return [
        f"{what} {_when(number, by)}"
        for what, (number, by) in sorted(found.items(), key=lambda item: Version(item[1][0]))
    ]


def _when(number: str, by: str) -> str:
    if Version(number) <= Version(by):
        return f"was to be removed in {number}; transformers {by} still takes it"
    return f"will be removed in {number}, according to transformers {by}"


def _number(version: str) -> str:
    """As people write it: 5.29 for 5.29.0, 6 for 6.0.0."""
    return re.sub(r"(\.0)+$", "", version)


def _head(facts: Mapping[str, Any], default: bool) -> str:
    version = facts["header"]["transformers"]
    return f"{version} (default)" if default else str(version)


def _plain(text: str) -> str:
    """``text`` safe in a table cell: a bar would end it, a tag would be markup."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _rows(count: int) -> list[tuple[str, Cell]]:
    return [
        (f"prompt ids, {count} rows", _equal("ids", count)),
        ("positions", _equal("places", count)),
        ("pixels and audio features", _drift("batch")),
        ("embeddings", _drift("embeddings")),
        ("logits", _drift("logits")),
        ("greedy answers, ids", _equal("answers", count)),
        ("checks of `omni-grpo check` that fail", _failing),
        *((f"a clip with its track, {title}", _call(name)) for name, title in _KEYWORDS.items()),
        ("a clip without a track beside one with a track, audio-in-video on", _mute),
        (f"decoder and frames of a clip passed as a path (qwen-omni-utils: {_FRAMES})", _path),
        ("`past_key_values=` / `cache=` of a forward", _cache),
        ("`apply_chat_template` on one conversation", lambda v: f"`{v['facts']['template']}`"),
        *((f"`get_{name}_features`", _feature(name)) for name in ("image", "video", "audio")),
        ("`rope_deltas` after a forward", _deltas),
        ("`generate`, left-padded batch = row alone", _batched),
        ("`generate` in eval mode: accuracy / format", _shares("eval")),
        ("… in train mode with gradient checkpointing", _shares("train, checkpointing")),
        ("… and `use_cache=False`", _shares("train, checkpointing, use_cache=False")),
        ("announced removals, by version", _going),
    ]


def _equal(name: str, count: int) -> Cell:
    def cell(version: Mapping[str, Any]) -> str:
        if "stages" not in version:
            return _DEFAULT
        equal = version["stages"][f"equal {name}"]
        return "equal" if equal == count else f"**{equal} of {count} equal**"

    return cell


def _drift(stage: str) -> Cell:
    def cell(version: Mapping[str, Any]) -> str:
        if "stages" not in version:
            return _DEFAULT
        found = version["stages"][stage]
        if found["verdict"] == "differs":
            return f"**{'; '.join(found['differs'])}**"
        return f"within {found['max_abs']:.2g}" if found["max_abs"] else "bitwise equal"

    return cell


def _failing(version: Mapping[str, Any]) -> str:
    failing = version["facts"]["failing"]
    return f"**{', '.join(failing)}**" if failing else "none"


def _call(name: str) -> Cell:
    def cell(version: Mapping[str, Any]) -> str:
        call = version["facts"]["calls"][name]
        if call["outcome"] == "refused":
            kind, _, message = call["detail"].partition(": ")
            text = f"**refused**: `{kind}`, {message.split('. ')[-1].rstrip('.')}"
        else:
            text = _OUTCOMES[call["outcome"]]
        if call["outcome"] == "lost":
            text += f": {call['detail']}; " + ("a warning is logged" if call["told"] else "silent")
        removed = re.search(r"removed in v?([\d.]*\d)", " ".join(call["told"]))
        return f"{text}; deprecated, removed in {removed[1]}" if removed else text

    return cell


def _refused(error: str) -> str:
    kind, _, message = error.partition(": ")
    return f"**refused**: `{kind}`" + ("" if message == "no message" else f", {message}")


def _mute(version: Mapping[str, Any]) -> str:
    found = version["facts"]["mute clip"]
    if "refused" in found:
        return _refused(found["refused"])
    right = f"positions of {found['positions']} of {found['rows']} rows right"
    text = f"ids of {found['ids']}, {right}; " + (
        "a warning is logged" if found["told"] else "silent"
    )
    return text if found["positions"] == found["rows"] else f"**{text}**"


def _path(version: Mapping[str, Any]) -> str:
    found = version["facts"]["by path"]
    if "refused" in found:
        return _refused(found["refused"])
    frames = " ".join(map(str, found["frames"]))
    return f"`{found['chosen']}`: {frames}; without it " + (
        f"`{found['here']}`" if found["here"].isidentifier() else "refused"
    )


def _cache(version: Mapping[str, Any]) -> str:
    return " / ".join(version["facts"]["cache"].values())


def _going(version: Mapping[str, Any]) -> str:
    removals: dict[str, list[str]] = {}
    for what, notice in version["facts"]["going"].items():
        removals.setdefault(_number(notice["gone in"]), []).append(f"`{what}`")
    order = sorted(removals, key=Version)
    return "; ".join(f"{number}: {', '.join(removals[number])}" for number in order) or "nothing"


def _feature(name: str) -> Cell:
    def cell(version: Mapping[str, Any]) -> str:
        kind, _, field = version["facts"]["features"][name].partition(", ")
        what, _, of = field.partition(" ")
        return f"`{kind}`" + (f", `{what}` a {of}" if field else "")

    return cell


def _deltas(version: Mapping[str, Any]) -> str:
    found = version["facts"]["rope_deltas"]
    return f"{found['value']}, stored on the `{found['place']}`"


def _batched(version: Mapping[str, Any]) -> str:
    found = version["facts"]["batched"]
    if "refused" in found:
        return _refused(found["refused"])
    if found["equal"] == found["rows"]:
        return "equal"
    return f"**{found['equal']} of {found['rows']} rows equal**"


def _shares(mode: str) -> Cell:
    def cell(version: Mapping[str, Any]) -> str:
        shares = version["facts"]["exam"][mode]
        if isinstance(shares, str):
            return _refused(shares)
        text = " / ".join(f"{share:.2f}" for share in shares)
        return text if min(shares) > 0 else f"**{text}**"

    return cell
