"""What a path may return: one row as the processor returns it. All else is refused by name, before
anything is compared; exit code 2, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_grpo_core import tiny
from omni_grpo_core.errors import BatchError
from omni_grpo_core.parity.accepted import accepted

IDS = torch.tensor([[5, 6, 7]])
ITEM = "mine:collate, rows.json:1"


async def coroutine() -> dict[str, Any]:
    return {"input_ids": IDS}


def generator() -> Iterator[dict[str, Any]]:
    yield {"input_ids": IDS}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "found None, wanted what the processor returns for one row"),
        ((IDS, IDS), "found a tuple of Tensor, of length 2"),
        ([{"input_ids": IDS}], "found a list of dict, of length 1"),
        ("<|im_start|>", "found a str"),
        (generator(), "found a generator, wanted what the processor returns"),
        ({}, "found no input_ids among nothing"),
        ({"text": "a", "labels": IDS}, "found no input_ids among labels, text"),
        ({"input_ids": "a"}, "found input_ids that are no array"),
        ({"input_ids": [[1, 2], [3]]}, "found input_ids that are no array"),
        ({"input_ids": IDS.repeat(2, 1)}, "found input_ids of 2 rows, wanted one"),
        ({"input_ids": IDS[None]}, "found input_ids of shape (1, 1, 3), wanted (tokens,) or (1"),
        ({"input_ids": IDS / 2}, "found input_ids that are not whole numbers"),
        ({"input_ids": IDS[:, :0]}, "found no ids, wanted at least one"),
        ({"input_ids": IDS, "attention_mask": 0 * IDS}, "found no ids"),
        ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, "an attention_mask of 2 for 3 ids"),
        ({"input_ids": [-100, 5]}, "found the id -100, wanted ids from 0 to 99"),
        ({"input_ids": [100]}, "found the id 100, wanted ids from 0 to 99"),
        (
            {"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 28, 28)},
            "found pixel_values of shape (1, 3, 28, 28), wanted (patches, values of a patch)",
        ),
        ({"input_ids": IDS, "image_grid_thw": [[1, 2]]}, "image_grid_thw of shape (1, 2)"),
        ({"input_ids": IDS, "video_grid_thw": [[0, 2, 2]]}, "video_grid_thw of [[0, 2, 2]]"),
        (
            {"input_ids": IDS, "input_features": [torch.zeros(2, 8), torch.zeros(2, 9)]},
            "input_features of tensors of shapes (2, 8), (2, 9), wanted one shape",
        ),
        (
            {"input_ids": IDS, "position_ids": torch.zeros(3, 1, 2)},
            "found position_ids of shape (3, 1, 2), wanted (3, 1, 3)",
        ),
    ],
)
def test_what_is_no_row_is_refused(output: Any, said: str) -> None:
    with pytest.raises(BatchError) as caught:
        accepted(output, ITEM, 100)
    assert str(caught.value).startswith(f"batch: {ITEM}: found ")
    assert said in str(caught.value)


def test_a_coroutine_is_refused_and_closed() -> None:
    with pytest.raises(BatchError, match=r"found a coroutine, wanted .*; await it"):
        accepted(coroutine(), ITEM, 100)


@pytest.mark.parametrize(
    "output",
    [
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3)},
        {"input_ids": [5, 6, 7]},
        {"input_ids": np.array([[0, 0, 5, 6, 7]]), "attention_mask": [[0, 0, 1, 1, 1]]},
        {"input_ids": IDS.float(), "labels": None, "prompt": "text"},
    ],
)
def test_the_same_row_in_other_clothes(output: Any) -> None:
    assert accepted(output, ITEM, 100)["input_ids"].tolist() == [5, 6, 7]


def test_positions_lose_the_padding_of_their_ids() -> None:
    """Left padding of two; one row of positions stands for time, height and width."""
    places = torch.tensor([[1, 1, 0, 1, 2]])
    output = {"input_ids": [[0, 0, 5, 6, 7]], "attention_mask": [[0, 0, 1, 1, 1]]}
    for shape in (places, places[0], places.expand(3, 1, 5), places.expand(4, 1, 5)):
        found = accepted({**output, "position_ids": shape}, ITEM, 100)
        assert found["position_ids"].tolist() == [[0, 1, 2]] * 3


def test_a_function_that_raises(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one row of two it is a finding, with the line that raised; at every row nothing can be
    compared."""
    (tmp_path / "raising_paths.py").write_text(
        "def never(messages, processor):\n"
        "    raise ValueError('no such column')\n\n"
        "def sometimes(messages, processor):\n"
        "    if len(messages[-1]['content']) > 1:\n"
        "        return {}['audio']\n"
        "    text = processor.apply_chat_template(messages, add_generation_prompt=True)\n"
        "    return processor.tokenizer([text] if isinstance(text, str) else text)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    every = json.loads(tiny.data_file().read_text(encoding="utf-8"))
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([every[16], every[20]]), encoding="utf-8")  # a picture; text alone
    rows = ("--data", data, "--root", tiny.data_file().parent)
    code, out, err = run_cli("parity", "ours", "raising_paths:never", *rows)
    assert (code, out) == (2, "")
    assert (
        "batch: raising_paths:never: found ValueError: no such column (raising_paths.py:2), and "
        "none of 2 rows without an error, wanted function(messages, processor)"
    ) in err
    code, out, _ = run_cli("parity", "ours", "raising_paths:sometimes", *rows, "--json")
    found = json.loads(out)
    assert (code, found["verdicts"]["failed"], found["verdicts"]["equal"]) == (1, 1, 1)
    assert found["details"][0]["sentence"].endswith("KeyError: 'audio' (raising_paths.py:6)")
