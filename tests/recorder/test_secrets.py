"""A trace holds no weights, no key, no environment variable and nothing executable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_loop import PlainLoop

from omni_grpo_core import record
from omni_grpo_core.core.policy import Policy
from omni_grpo_core.io.redaction import REDACTED, Redactor
from omni_grpo_core.pipeline.settings import Settings
from omni_grpo_core.recorder.plain import Plain
from omni_grpo_core.trace.calls import SamplesSeen, StepSeen, calls_of
from omni_grpo_core.trace.store import load_trace
from omni_grpo_core.types import Sample

PLANTED = "planted-0123456789-secret"


class Client:
    def __repr__(self) -> str:
        return f"Client(api_key={PLANTED})"


def test_no_planted_secret_and_no_weights_are_in_a_trace(
    tmp_path: Path,
    policy: Policy,
    samples: tuple[Sample, ...],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOMEBODYS_API_KEY", PLANTED)
    monkeypatch.setenv("HARMLESS", "a-value-nobody-should-find")

    def leaky(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        if not columns:
            return [0.0] * len(completions)
        raise ConnectionError(f"401 for https://user:{PLANTED}@judge, key {PLANTED}")

    loop = PlainLoop(policy, samples[0], settings)
    weights = [p.detach().clone() for p in loop.model.parameters() if p.numel() > 64]
    columns = {
        "api_key": [f"{PLANTED}-other"],
        "headers": [{"Authorization": f"Bearer {PLANTED[:12]}", "accept": "text"}],
        "client": [Client()],
        "note": [f"my key is {PLANTED}", "sk-abcdefghijklmnopqrstuvwxyz"],
    }

    def leaky_run() -> None:
        with record(
            tmp_path / "trace",
            model=loop.model,
            processor=loop.processor,
            reward_funcs=loop.rewards,
            settings={"token": f"{PLANTED}-other", "max_new_tokens": 8, "hub_token": None},
        ) as recorder:
            loop.note = recorder.note
            loop.step()
            recorder.note(SamplesSeen((columns,), None))
            loop.processor(text=["hi"], api_token=f"{PLANTED}-other")
            loop.rewards[0](prompts=["q"], completions=["a"], **columns)
            loop.rewards[1](prompts=["q"], completions=["a"], **columns)

    loop.rewards.append(leaky)
    with pytest.raises(ConnectionError):
        leaky_run()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"trace.json", "tensors.safetensors"}
    assert len(files) == 4
    for path in files:
        data = path.read_bytes()
        for secret in (PLANTED, PLANTED[:12], "sk-abcdef", "a-value-nobody-should-find"):
            assert secret.encode() not in data, path
        for weight in weights:
            assert weight.numpy().tobytes()[:256] not in data, path
    (step,) = calls_of(load_trace(tmp_path / "trace" / "step-000000"), StepSeen)
    assert step.settings == {"token": REDACTED, "max_new_tokens": 8, "hub_token": None}
    (first, *_) = calls_of(load_trace(tmp_path / "trace" / "step-000001"), SamplesSeen)
    [noted] = first.rows
    assert noted["headers"] == ({"Authorization": REDACTED, "accept": "text"},)
    assert noted["client"] == ("<Client>",)


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "OPENAI_API_KEY", "token", "hf_token", "hub_token", "access-token"),
        *(
            "password",
            "authorization",
            "Authorization",
            "client_secret",
            "bearer",
            "use_auth_token",
        ),
    ],
)
def test_values_under_secret_names_are_redacted(name: str) -> None:
    assert Plain().mapping({name: "x"}) == {name: REDACTED}


@pytest.mark.parametrize(
    "name",
    [
        *("max_new_tokens", "pad_token_id", "eos_token_id", "eos_token", "mm_token_type_ids"),
        *("tokenize", "key", "keywords", "author", "skip_special_tokens", "num_tokens"),
    ],
)
def test_values_under_similar_names_are_kept(name: str) -> None:
    assert Plain().mapping({name: "x"}) == {name: "x"}


@pytest.mark.parametrize(("value", "shown"), [("ordinary", REDACTED), ("ordinal", "ordinal")])
def test_a_short_value_of_a_variable_is_no_secret(
    value: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two limits shared one name in one module, and the later one, of a judge's key, won: every
    word of four letters that a variable such as ``GIT_AUTH`` held was cut out of a trace."""
    monkeypatch.setenv("SOME_TOKEN", value)
    assert Redactor().text(f"an {value} word") == f"an {shown} word"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.text() | st.integers(), inner)
            | st.tuples(inner, inner)
        ),
        max_leaves=20,
    )
)
def test_any_value_becomes_plain_data(value: Any) -> None:
    plain = Plain().value(value)
    json.dumps(plain, ensure_ascii=True)  # tuples and mappings with text keys, nothing else
    assert "object at 0x" not in repr(plain)


def test_small_tensors_are_written_out_and_large_ones_named() -> None:
    plain = Plain().value({"small": torch.tensor([[1, 2]]), "large": torch.zeros(9, 9)})
    assert plain == {"small": ((1, 2),), "large": "<tensor float32 (9, 9)>"}


def test_an_endless_structure_is_cut() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert "<deeper>" in str(Plain().value(endless))


_KILLED = """
import sys
import torch
import toy_thinker
from omni_grpo_core import record
model = toy_thinker.make()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with record(sys.argv[1], model=model, processor=toy_thinker.ToyProcessor(), steps=10_000):
    while True:
        toy_thinker.step(model, optimizer)
        print("step", flush=True)
"""


def test_a_run_killed_in_the_middle_leaves_its_finished_steps(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    run = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    assert run.stdout is not None
    assert [run.stdout.readline() for _ in range(5)] == ["step\n"] * 5
    run.kill()
    run.wait()
    run.stdout.close()
    steps = sorted(folder.glob("step-*"))
    assert len(steps) >= 5
    for number, step in enumerate(steps):
        trace = load_trace(step)
        assert trace.header["step"] == str(number)
        assert trace.stages[-1].stage == "gradient"
