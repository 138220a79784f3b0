"""A place in a batch, in words."""

from __future__ import annotations

import re

# prefixes of a path and their names; the first match applies
_HEADS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"{pattern}(?:\.|$)"), words)
    for pattern, words in (
        (r"rows\[(\d+)\]", "row {}"),
        (r"top\[(\d+)\]", "row {}"),
        # the parsed stage is a tuple of completions; traces of 0.1 also have one of rollouts
        (r"\[(\d+)\]\.completions\[(\d+)\]", "rollout {}, completion {}"),
        (r"completions\[(\d+)\]", "completion {}"),
        (r"\[(\d+)\](?=\.(?:context|think|answer|what|where)\b)", "completion {}"),
        (r"\[(\d+)\](?=\.(?:group_size|temperature|seed)$)", "rollout {}"),
        (r"\[(\d+)\](?=\.)", "row {}"),
    )
)
_ROPE_AXES = ("time", "height", "width")
_IDS = re.compile(r"(?:^|\.)(?:input_ids|token_ids)$")


def holds_ids(path: str) -> bool:
    """Whether the integers at ``path`` are token ids.

    >>> holds_ids("rows[0].input_ids"), holds_ids("attention_mask")
    (True, False)
    """
    return bool(_IDS.search(path))


def _head(path: str) -> tuple[str, str]:
    for pattern, words in _HEADS:
        if match := pattern.match(path):
            return words.format(*match.groups()), path[match.end() :]
    return "", path


def row_of(path: str) -> int | None:
    """
    >>> row_of("rows[2].spans"), row_of("[1].videos[0].frames"), row_of("input_ids")
    (2, 1, None)
    """
    head, _ = _head(path)
    return int(head.removeprefix("row ")) if head.startswith("row ") else None


def name(path: str) -> str:
    """A path as the beginning of a sentence.

    >>> name("rows[2].audio_in_video"), name("completions[3].text"), name("tensors.pixel_values")
    ('row 2: audio_in_video', 'completion 3: text', 'tensors.pixel_values')
    """
    head, rest = _head(path)
    return f"{head}: {rest}" if head and rest else head or path


def element(path: str, index: tuple[int, ...]) -> tuple[str, int | None]:
    """One element of a tensor in words, and the batch row it belongs to.

    >>> element("rows[2].input_ids", (17,))
    ('row 2: token 17', 2)
    >>> element("input_ids", (1, 5))
    ('row 1: input_ids column 5', 1)
    >>> element("position_ids", (0, 3, 17))
    ('row 3: time position of column 17', 3)
    >>> element("tensors.video_grid_thw", (0, 1))
    ('tensors.video_grid_thw[0, 1]', None)
    """
    row = row_of(path)
    if path in ("input_ids", "attention_mask") and len(index) == 2:
        return f"row {index[0]}: {path} column {index[1]}", index[0]
    if path == "position_ids" and len(index) == 3 and index[0] < len(_ROPE_AXES):
        axis = _ROPE_AXES[index[0]]
        return f"row {index[1]}: {axis} position of column {index[2]}", index[1]
    if path in ("deltas", "values") and index:
        rest = f"{list(index[1:])}" if index[1:] else ""
        return f"row {index[0]}: {path}{rest}", index[0]
    if holds_ids(path) and len(index) == 1:
        head, _ = _head(path)
        return f"{head}: token {index[0]}" if head else f"token {index[0]}", row
    return f"{name(path)}{list(index)}" if index else name(path), row
