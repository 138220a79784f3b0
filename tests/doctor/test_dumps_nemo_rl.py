"""NeMo-RL's JSON lines, written by hand as its published code writes them, with known truth."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_dumps import BABBLE, PROMPTS, asked, facts, felt, states

RunCli = Callable[..., tuple[int, str, str]]
REWARDS = (1.0, 0.0, 0.0, 0.5)
# of each row: less the mean of the three others, over their deviation (0: not divided)
LEAVE_ONE_OUT = (5 / 6 / 0.288675, -0.5 / 0.5, -0.5 / 0.5, 1 / 6 / 0.577350)
TEXTS = ("The rose.", "The sea.", "The wide sea.", "A red rose, as I said.")


def nemo_rl(
    folder: Path,
    texts: Sequence[str] = TEXTS,
    advantages: Sequence[float] = LEAVE_ONE_OUT,
    **more: Any,
) -> Path:
    """``train_data_step3.jsonl`` of two prompts with four completions each."""
    folder.mkdir(exist_ok=True)
    with (folder / "train_data_step3.jsonl").open("w") as file:
        for at in range(8):
            length, row = 4 + at % 3, at % 4
            ids = [1, 2, 3 + at // 4, *range(10 + 9 * at, 10 + 9 * at + length)]
            mask = [0, 0, 0, *[1] * length]
            padding = [0] * (9 - len(ids))
            scores = [0.0, 0.0, 0.0, *(-0.1 * ((at + 3 * k) % 7) - 0.05 for k in range(length))]
            held = {
                "content": [PROMPTS[at // 4], texts[row]], "rewards": REWARDS[row],
                "input_lengths": len(ids), "token_ids": ids + padding,
                "token_loss_mask": mask + padding, "sample_loss_mask": 1.0,
                "advantages": [advantages[row]] * 9, "generation_logprobs": scores + padding,
                "prev_logprobs": scores + padding, **more,
            }  # fmt: skip
            file.write(json.dumps({**{k: [v] for k, v in held.items()}, "idx": at}) + "\n")
    return folder


def test_healthy_steps(tmp_path: Path, run_cli: RunCli) -> None:
    (nemo_rl(tmp_path / "exp_001") / "val_data_step3.jsonl").write_text("{}\n")
    (tmp_path / "exp_001" / "console.txt").write_text("no rollout")
    code, report = asked("nemo-rl", tmp_path / "exp_001", run_cli=run_cli)
    assert (code, report["steps"], facts(report), felt(report)) == (0, 1, [], [])
    assert states(report)["completion"] == states(report)["advantage"] == "sound"


def test_what_is_wrong_with_its_rows(tmp_path: Path, run_cli: RunCli) -> None:
    rolled = (*LEAVE_ONE_OUT[1:], LEAVE_ONE_OUT[0])
    code, report = asked("nemo-rl", nemo_rl(tmp_path / "a", advantages=rolled), run_cli=run_cli)
    assert (code, report["headline"]["stage"]) == (1, "advantage")
    texts = [BABBLE + "s" * at for at in range(4)]
    code, report = asked("nemo-rl", nemo_rl(tmp_path / "b", texts), run_cli=run_cli)
    assert (code, felt(report)) == (1, ["garbage"])


def test_a_validation_has_texts_and_rewards(tmp_path: Path, run_cli: RunCli) -> None:
    file = tmp_path / "val_data_step20.jsonl"
    with file.open("w") as out:
        for text in TEXTS:
            said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": text}]
            out.write(json.dumps({"content": [said], "rewards": [0.5], "idx": 0}) + "\n")
    code, report = asked("nemo-rl", file, run_cli=run_cli)
    assert (code, states(report)["completion"]) == (0, "sound")
    assert report["coverage"]["advantage"] == {"state": "unseen", "why": "not in this dump"}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"token_loss_mask": [1]}, "token_loss_mask, found a list, wanted a number per token id"),
        ({"input_lengths": 99}, "input_lengths, found 99, wanted a number up to 9"),
        ({"token_ids": "os.system('…')"}, "token_ids, found a str"),
        ({"advantages": [{}] * 9}, "advantages, found {}, wanted a number"),
    ],
)
def test_a_row_that_it_does_not_write(
    more: dict[str, Any], found: str, tmp_path: Path, run_cli: RunCli
) -> None:
    code, _, err = run_cli("doctor", "--dump", "nemo-rl", nemo_rl(tmp_path / "a", **more))
    assert code == 2
    assert "train_data_step3.jsonl:1" in err
    assert found in " ".join(err.replace(":", ",").split())


@pytest.mark.parametrize("content", ["", "no json", '{"input": "of verl"}', "\x80\x02c"])
def test_a_foreign_file(content: str, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "train_data_step1.jsonl").write_text(content)
    code, _, err = run_cli("doctor", "--dump", "nemo-rl", tmp_path)
    assert code == 2
    assert "train_data_step1.jsonl" in err
