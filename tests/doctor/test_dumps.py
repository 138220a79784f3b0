"""Dumps of other trainers, written by hand as their published code writes them, with known truth.

Two prompts with two completions each; the rewards 1, 0 and 2, 0 give advantages of plus and minus
0.7071 (unbiased deviations 1 / sqrt 2 and sqrt 2).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

RunCli = Callable[..., tuple[int, str, str]]

PROMPTS = ("What is red?", "What is blue?")
TEXTS = ("The rose.", "The sea.", "The sea is blue.", "No idea at all.")
REWARDS = (1.0, 0.0, 2.0, 0.0)
ADVANTAGES = (0.7071, -0.7071, 0.7071, -0.7071)
BABBLE = "system" * 100


def asked(*given: object, run_cli: RunCli) -> tuple[int, dict[str, Any]]:
    code, out, _ = run_cli("doctor", "--dump", *given, "--json")
    return code, json.loads(out)


def states(report: Mapping[str, Any]) -> dict[str, str]:
    return {stage: held["state"] for stage, held in report["coverage"].items()}


def facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f["stage"], e["fact"]) for f in report["findings"] for e in f["evidence"]]


def felt(report: Mapping[str, Any]) -> list[str]:
    return [symptom["name"] for symptom in report["symptoms"]]


# --------------------------------------------------------------------------- verl


def verl(
    folder: Path, texts: Sequence[str] = TEXTS, scores: Sequence[float] = REWARDS, step: int = 1
) -> Path:
    """``{step}.jsonl``: keys in verl's order, the extra values of a reward function last."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "input": f"system\nYou answer.\nuser\n{PROMPTS[2 * at // len(texts)]}\nassistant\n",
            "output": text, "gts": "rose", "score": score, "step": step, "acc": score > 0,
            "uid": f"{2 * at // len(texts)}_{at % 2}_0",
        }
        for at, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]  # fmt: skip
    lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    (folder / f"{step}.jsonl").write_text(lines)
    return folder


def test_a_healthy_verl_dump_says_what_it_cannot_show(tmp_path: Path, run_cli: RunCli) -> None:
    for step in (2, 10):
        verl(tmp_path / "rollout", step=step)
    code, report = asked("verl", tmp_path / "rollout", run_cli=run_cli)
    assert (code, report["steps"], report["symptoms"]) == (0, 2, [])
    assert states(report)["completion"] == "sound"
    assert report["coverage"]["reward"]["why"].endswith("a dump has its values, not the function")
    for stage in ("conversation", "batch", "embeddings", "logits", "advantage", "loss", "gradient"):
        assert report["coverage"][stage] == {"state": "unseen", "why": "not in this dump"}


def test_garbage_of_a_rollout_engine_is_named_from_its_text(
    tmp_path: Path, run_cli: RunCli
) -> None:
    texts = [BABBLE, TEXTS[1], BABBLE + "s", BABBLE + "sy"]
    code, report = asked("verl", verl(tmp_path / "rollout", texts), run_cli=run_cli)
    assert code == 1
    assert felt(report) == ["garbage"]
    assert (
        "3 of 4 completions are degenerate; completion 0: zlib ratio"
        in report["headline"]["sentence"]
    )


def test_a_reward_that_is_stuck_at_a_tenth_is_the_verdict(tmp_path: Path, run_cli: RunCli) -> None:
    texts = [f"{text} Take {at}." for at in range(2) for text in TEXTS]
    code, report = asked("verl", verl(tmp_path / "out", texts, (0.1,) * 8), run_cli=run_cli)
    assert code == 1
    assert felt(report) == ["rewards-stuck"]
    assert "score pays 0.1 for each of 8 completions" in report["headline"]["sentence"]


def test_generated_pictures_are_no_text(tmp_path: Path, run_cli: RunCli) -> None:
    """verl-omni's diffusion trainer writes paths; nothing of a verl dump judges a picture."""
    paths = [f"/out/1/{at}.jpg" for at in range(4)]
    code, _, err = run_cli("doctor", "--dump", "verl-omni", verl(tmp_path / "out", paths))
    assert code == 2
    assert "nothing could be judged" in err


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"input": "a", "output": ', "not JSON"),
        ("[1, 2]", "a list"),
        ('{"input": "a", "output": "b", "step": 1}', "no gts or score"),
        ('{"input": "a", "output": 3, "gts": "", "score": 1, "step": 1}', "found a int, wanted a "),
        ('{"input": "a", "output": "b", "gts": "", "score": "x", "step": 1}', "wanted a number"),
        ("[" * 100, "nested more than"),
    ],
)
def test_a_malformed_line_is_exit_2_with_its_place(
    line: str, found: str, tmp_path: Path, run_cli: RunCli
) -> None:
    file = verl(tmp_path / "rollout") / "1.jsonl"
    file.write_text(file.read_text() + line)
    code, _, err = run_cli("doctor", "--dump", "verl", file)
    assert code == 2
    assert f"{file}:5" in err
    assert found in err
    assert "delete a last line that a killed run cut off" in err


@pytest.mark.parametrize(("name", "want"), [("verll", "verl, verl-omni"), ("verl", "no such file")])
def test_no_such_format_or_folder(name: str, want: str, tmp_path: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("doctor", "--dump", name, tmp_path / "nowhere")
    assert code == 2
    assert want in err


def test_a_dump_and_a_recording_are_two_things(tmp_path: Path, run_cli: RunCli) -> None:
    code, _, err = run_cli("doctor", tmp_path, "--dump", "verl", tmp_path)
    assert code == 2
    assert "found TRACE and --dump" in err


# --------------------------------------------------------------------------- ms-swift


def swift(
    folder: Path,
    advantages: Sequence[float] = ADVANTAGES,
    rewards: Mapping[str, Sequence[float]] | None = None,
    prompts: Sequence[str] | None = None,
    texts: Sequence[str] = TEXTS,
) -> Path:
    """One line of lists, as ``JsonlWriter`` appends a table."""
    count = len(texts)
    table = {
        "step": ["1"] * count,
        "prompt": prompts or [f"<|im_start|>{PROMPTS[2 * at // count]}" for at in range(count)],
        "completion": list(texts),
        **({"Answer": list(REWARDS)} if rewards is None else rewards),
        "advantages": list(advantages),
        "solution": ["rose"] * count,
    }
    folder.mkdir(exist_ok=True)
    (folder / "completions.jsonl").write_text(json.dumps(table, ensure_ascii=False) + "\n")
    return folder


def test_advantages_are_made_again_from_their_rewards(tmp_path: Path, run_cli: RunCli) -> None:
    code, report = asked("swift", swift(tmp_path / "out"), run_cli=run_cli)
    assert code == 0
    assert states(report)["advantage"] == "sound"


@pytest.mark.parametrize(
    ("advantages", "fact", "cause"),
    [
        ((0.0,) * 4, "no-signal", "adv.zero-variance"),
        ((-0.7071, 0.7071, -0.7071, 0.7071), "advantages-negated", "adv.negated"),
        ((0.3, 0.1, -0.9, 0.5), "weights-against-rewards", "adv.other-reward"),
    ],
)
def test_advantages_that_are_not_those_of_the_rewards(
    advantages: Sequence[float], fact: str, cause: str, tmp_path: Path, run_cli: RunCli
) -> None:
    code, report = asked("swift", swift(tmp_path / "out", advantages), run_cli=run_cli)
    assert code == 1
    assert facts(report) == [("advantage", fact)]
    assert report["findings"][0]["causes"][0]["cause"] == cause


@pytest.mark.parametrize(
    ("rewards", "advantages", "proved"),
    [
        # 1 -1 0, and 1.06 -0.13 -0.93: of 720 orders five are tried
        ((3, 1, 2, 6, 3, 1), (-0.9272, 1, -1, 0, 1.0596, -0.1325), True),
        # 1 -1 0, and 1 0 -1: in 90 orders five fit by chance too often
        ((3, 1, 2, 6, 3, 0), (-1, 1, -1, 0, 1, 0), False),
    ],
)
def test_advantages_rolled_by_one_row(
    rewards: Sequence[float], advantages: Sequence[float], proved: bool,
    tmp_path: Path, run_cli: RunCli,
) -> None:  # fmt: skip
    """An order was "proved" that a few equal numbers have by chance."""
    given = {"Answer": tuple(map(float, rewards))}
    folder = swift(tmp_path / "out", advantages, given, texts=(*TEXTS, "e", "f"))
    code, report = asked("swift", folder, run_cli=run_cli)
    assert code == 1
    wanted = "advantages-of-other-rows" if proved else "weights-against-rewards"
    assert facts(report) == [("advantage", wanted)]
    assert ("rolled by 1 rows" in report["headline"]["sentence"]) is proved
    assert report["findings"][0]["causes"][0]["proved"] is proved


def test_advantages_against_the_mean_of_the_batch_are_another_recipe(
    tmp_path: Path, run_cli: RunCli
) -> None:
    """REINFORCE++, which keeps the order within every group: nothing was said of it."""
    rewards = (3.0, 1.0, 2.0, 6.0, 4.0, 2.0)
    given = [reward - 3 for reward in rewards]
    folder = swift(tmp_path / "out", given, {"Answer": rewards}, texts=(*TEXTS, "e", "f"))
    code, report = asked("swift", folder, run_cli=run_cli)
    assert (code, facts(report)) == (0, [("advantage", "advantage-differs")])
    [cause] = report["findings"][0]["causes"]
    assert (cause["cause"], cause["proved"]) == ("adv.batch-scale", True)


def test_weighted_rewards_are_sound_and_a_missing_score_is_none(
    tmp_path: Path, run_cli: RunCli
) -> None:
    """2 * Answer + Format, one prompt asked twice; a function that could not score left NaN."""
    answer, form = (1.0, 0.0, 0.5, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 0.0, 1.0, float("nan"))
    totals = [2 * a + (f if f == f else 0) for a, f in zip(answer, form, strict=True)]
    means = [sum(totals[:3]) / 3] * 3 + [sum(totals[3:]) / 3] * 3
    advantages = [total - mean for total, mean in zip(totals, means, strict=True)]
    folder = swift(
        tmp_path / "out", advantages, {"Answer": answer, "Format": form},
        ["Which?"] * 6, (*TEXTS, "e", "f"),
    )  # fmt: skip
    code, report = asked("swift", folder, run_cli=run_cli)
    assert code == 0
    assert states(report)["advantage"] == "sound"


def test_other_weights_of_rewards_are_no_opposite_sign(tmp_path: Path, run_cli: RunCli) -> None:
    """Format counts a tenth: in groups of two every advantage is plus or minus 0.7071, and those of
    the plain sum have the opposite signs."""
    rewards = {"Answer": (1.0, 0.0, 1.0, 0.0), "Format": (0.0, 2.0, 0.0, 3.0)}
    code, report = asked("swift", swift(tmp_path / "out", rewards=rewards), run_cli=run_cli)
    assert (code, facts(report)) == (0, [])
    both = {"Answer": (1.0, 0.0, 1.0, 0.0), "Format": (2.0, 0.0, 3.0, 0.0)}
    against = [-value for value in ADVANTAGES]
    code, report = asked("swift", swift(tmp_path / "out", against, both), run_cli=run_cli)
    assert (code, facts(report)) == (1, [("advantage", "advantages-negated")])


def test_two_pictures_with_one_question_are_two_groups(tmp_path: Path, run_cli: RunCli) -> None:
    """A dump has no pictures: the better answer about the second one has the lower advantage."""
    rewards = {"Answer": (4.0, 3.0, 2.0, 1.0)}
    folder = swift(tmp_path / "out", (0.5, -0.5, 0.5, -0.5), rewards, ["Which?"] * 4)
    code, report = asked("swift", folder, run_cli=run_cli)
    assert (code, facts(report)) == (0, [])
    assert states(report)["advantage"] == "sound"
    # a scale of one's own: not known, and no contradiction
    folder = swift(tmp_path / "out", (0.5, -0.4, 0.9, -0.1), rewards, ["Which?"] * 4)
    code, report = asked("swift", folder, run_cli=run_cli)
    assert (code, facts(report)) == (0, [])
    assert "could not be told" in report["coverage"]["advantage"]["why"]


def test_a_column_of_another_length_is_exit_2(tmp_path: Path, run_cli: RunCli) -> None:
    folder = swift(tmp_path / "out", ADVANTAGES[:3])
    code, _, err = run_cli("doctor", "--dump", "swift", folder)
    assert code == 2
    assert "completions.jsonl:1: advantages: found 3, wanted a list of 4" in err


# --------------------------------------------------------------------------- TRL


def trl(folder: Path, advantages: Sequence[float] = ADVANTAGES, chat: bool = True) -> Path:
    """As ``pandas.DataFrame.to_parquet`` writes TRL's table."""
    pyarrow = pytest.importorskip("pyarrow", reason="parquet")
    from pyarrow import parquet

    def said(role: str, text: str) -> object:
        return [{"role": role, "content": text}] if chat else text

    table = {
        "step": [7] * 4,
        "prompt": [said("user", PROMPTS[at // 2]) for at in range(4)],
        "completion": [said("assistant", text) for text in TEXTS],
        "accuracy": list(REWARDS),
        "solution": ["rose"] * 4,
        "advantage": list(advantages),
    }
    inside = folder / "completions"
    inside.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(table), inside / "completions_00007.parquet")
    return folder


@pytest.mark.parametrize("chat", [True, False])
def test_a_completion_table_of_trl(chat: bool, tmp_path: Path, run_cli: RunCli) -> None:
    code, report = asked("trl", trl(tmp_path / "out", chat=chat), run_cli=run_cli)
    assert code == 0
    assert states(report)["advantage"] == states(report)["completion"] == "sound"
    against = trl(tmp_path / "out", [-value for value in ADVANTAGES], chat)
    code, report = asked("trl", against / "completions", run_cli=run_cli)
    assert (code, facts(report)) == (1, [("advantage", "advantages-negated")])


def test_a_table_that_is_none(tmp_path: Path, run_cli: RunCli) -> None:
    pytest.importorskip("pyarrow", reason="parquet")
    (tmp_path / "completions_1.parquet").write_bytes(b"PAR1 and then nothing")
    code, _, err = run_cli("doctor", "--dump", "trl", tmp_path)
    assert code == 2
    assert "completions_1.parquet: found no parquet file" in err


# --------------------------------------------------------------------------- slime and miles

IDS = tuple(tuple(range(10 + 20 * at, 18 + 20 * at)) for at in range(4))
LOGPROBS = tuple(tuple(-0.1 * ((at + 3 * k) % 7) - 0.05 for k in range(8)) for at in range(4))


def sample(at: int, **more: Any) -> dict[str, Any]:
    """``Sample.to_dict()``."""
    return {
        "group_index": at // 2, "index": at, "rollout_id": None, "prompt": PROMPTS[at // 2],
        "tokens": [1, 2, 3 + at // 2, *IDS[at]], "multimodal_inputs": None,
        "multimodal_train_inputs": None, "response": TEXTS[at], "response_length": 8,
        "label": "rose", "reward": REWARDS[at], "loss_mask": [1] * 8, "weight_versions": ["3"],
        "rollout_log_probs": list(LOGPROBS[at]), "rollout_routed_experts": None,
        "remove_sample": False, "teacher_log_probs": None, "status": "completed", "metadata": {},
        "train_metadata": None, "spec_info": {"spec_verify_ct": 0},
        "prefix_cache_info": {"cached_tokens": 0}, **more,
    }  # fmt: skip


def trained(
    at: int, advantages: Sequence[float] = ADVANTAGES, scored: Sequence[float] | None = None
) -> dict[str, Any]:
    """One sample of a train dump: a value per token of the response."""
    return {
        "tokens": torch.tensor([1, 2, 3 + at // 2, *IDS[at]]), "total_lengths": 11,
        "response_lengths": 8, "loss_masks": torch.ones(8, dtype=torch.int),
        "rewards": advantages[at], "advantages": torch.full((8,), advantages[at]),
        "rollout_log_probs": torch.tensor(LOGPROBS[at]),
        "log_probs": torch.tensor(LOGPROBS[at] if scored is None else scored),
    }  # fmt: skip


def slime(folder: Path, *trains: Mapping[str, Any], **more: Any) -> Path:
    """What ``--dump-details`` writes for rollout 5."""
    for inner in ("rollout_data", "train_data"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    samples = [sample(at, **more) for at in range(4)]
    torch.save({"rollout_id": 5, "samples": samples}, folder / "rollout_data" / "5.pt")
    held = [
        {"data_parallel_rank": 0, "sample_index": at, "rollout_position": at, **dict(one)}
        for at, one in enumerate(trains or map(trained, range(4)))
    ]
    whole = {
        "format_version": 2, "rollout_id": 5, "rank": 0, "samples": held,
        "dp_shards": [{"rank": 0, "partition": [0, 1, 2, 3]}], "raw_reward": list(REWARDS),
    }  # fmt: skip
    torch.save(whole, folder / "train_data" / "5.pt")
    return folder


def miles(folder: Path, ranks: int = 2) -> Path:
    """The same by miles: a train file per rank, its columns as lists."""
    for inner in ("rollout_data", "train_data"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    held = {"rollout_id": 5, "metadata": {}, "samples": [sample(at) for at in range(4)]}
    torch.save(held, folder / "rollout_data" / "5.pt")
    for rank in range(ranks):
        own = list(range(rank, 4, ranks))
        columns = {name: [trained(at)[name] for at in own] for name in trained(0)}
        columns |= {"sample_indices": own, "raw_reward": list(REWARDS)}
        pack = {"rollout_id": 5, "rank": rank, "rollout_data": columns, "cp_rank": 0, "cp_size": 1}
        torch.save({**pack, "qkv_format": "thd"}, folder / "train_data" / f"5_{rank}.pt")
    return folder


@pytest.mark.parametrize(("name", "write"), [("slime", slime), ("miles", miles)])
def test_healthy_details_of_slime_and_miles(
    name: str, write: Callable[[Path], Path], tmp_path: Path, run_cli: RunCli
) -> None:
    code, report = asked(name, write(tmp_path / "details"), run_cli=run_cli)
    assert (code, report["steps"], facts(report), felt(report)) == (0, 1, [], [])
    assert states(report)["completion"] == states(report)["advantage"] == "sound"
    assert states(report)["reward"] == "unjudged", "text and reward's argument are one value here"


def test_a_rollout_file_alone_is_read(tmp_path: Path, run_cli: RunCli) -> None:
    file = slime(tmp_path / "details") / "rollout_data" / "5.pt"
    code, report = asked("slime", file, run_cli=run_cli)
    assert code == 0
    assert report["coverage"]["advantage"] == {"state": "unseen", "why": "not in this dump"}


def test_a_train_file_alone_has_no_text(tmp_path: Path, run_cli: RunCli) -> None:
    file = slime(tmp_path / "details") / "train_data" / "5.pt"
    code, report = asked("slime", file, run_cli=run_cli)
    assert (code, facts(report)) == (0, [])
    assert states(report)["advantage"] == "sound", "prompts are told apart by their ids"


def test_garbage_is_named_from_its_ids(tmp_path: Path, run_cli: RunCli) -> None:
    """'system' 60 times: too short for the rules on text."""
    tokens = {"tokens": [1, 2, 3, *[8948] * 60], "response_length": 60, "loss_mask": None}
    folder = slime(
        tmp_path / "out", response="system" * 60, rollout_log_probs=None, **tokens
    )  # fmt: skip
    code, report = asked("slime", folder / "rollout_data", run_cli=run_cli)
    assert code == 1
    assert (
        "4 of 4 completions are degenerate; completion 0: tail cycle: 1 tokens"
        in (report["headline"]["sentence"])
    )


@pytest.mark.parametrize("by", [0, 1])
def test_the_ratio_of_engine_and_trainer(by: int, tmp_path: Path, run_cli: RunCli) -> None:
    """Half a nat off everywhere; and the engine's numbers, one column late."""
    scored = [
        (*line[1:], -0.3) if by else tuple(value - 0.5 for value in line) for line in LOGPROBS
    ]
    folder = slime(tmp_path / "out", *(trained(at, scored=scored[at]) for at in range(4)))
    code, report = asked("slime", folder, run_cli=run_cli)
    assert code == 1
    assert facts(report) == [("completion", "ratio-differs")]
    sentence = report["headline"]["sentence"]
    assert ("the same numbers 1 token later" if by else "differ by 0.5 nats") in sentence


def test_advantages_of_slime_against_their_rewards(tmp_path: Path, run_cli: RunCli) -> None:
    against = [-value for value in ADVANTAGES]
    folder = slime(tmp_path / "out", *(trained(at, against) for at in range(4)))
    code, report = asked("slime", folder, run_cli=run_cli)
    assert (code, facts(report)) == (1, [("advantage", "advantages-negated")])


def test_pictures_and_arrays_beside_the_values_are_not_built(
    tmp_path: Path, run_cli: RunCli
) -> None:
    from PIL import Image

    media = {"images": [Image.new("RGB", (2, 2))]}
    experts = np.zeros((10, 2, 2), dtype=np.int32)
    folder = slime(tmp_path / "out", multimodal_inputs=media, rollout_routed_experts=experts)
    code, report = asked("slime", folder, run_cli=run_cli)
    assert (code, facts(report)) == (0, [])


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("how", ["torch.save", "legacy", "pickle"])
def test_a_hostile_file_is_exit_2_and_nothing_is_executed(
    how: str, tmp_path: Path, run_cli: RunCli
) -> None:
    file, proof = tmp_path / "5.pt", tmp_path / "proof"
    held = {"rollout_id": 5, "samples": [sample(0, metadata={"a": Hostile(proof)})]}
    if how == "pickle":
        file.write_bytes(pickle.dumps(held))
    else:
        torch.save(held, file, _use_new_zipfile_serialization=how == "torch.save")
    for name in ("slime", "miles"):
        code, _, err = run_cli("doctor", "--dump", name, file)
        assert code == 2
        assert "not executed" in err or "a foreign pickle" in err
    assert not proof.exists()


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"rollout_log_probs": [-0.5] * 7}, "found 7 numbers, wanted 8, one per token"),
        ({"response_length": 80}, "found 80, wanted a number up to 11"),
        ({"tokens": ["a"]}, "found a list, wanted a list of numbers"),
        ({"reward": "good"}, "wanted a number"),
    ],
)
def test_a_sample_that_no_trainer_writes(
    more: dict[str, Any], found: str, tmp_path: Path, run_cli: RunCli
) -> None:
    torch.save({"rollout_id": 5, "samples": [sample(0, **more)]}, tmp_path / "5.pt")
    code, _, err = run_cli("doctor", "--dump", "slime", tmp_path / "5.pt")
    assert code == 2
    assert "5.pt: sample 0" in err
    assert found in err


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 and nothing more"])
def test_a_file_that_torch_did_not_write(content: bytes, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "5.pt").write_bytes(content)
    code, _, err = run_cli("doctor", "--dump", "miles", tmp_path / "5.pt")
    assert code == 2
    assert "5.pt" in err
