from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from media_files import numbered, write_media

from omni_grpo_core import tiny
from omni_grpo_core.errors import ConfigError, MissingExtra
from omni_grpo_core.losses import LossConfig
from omni_grpo_core.training.config import OptimizerConfig, TrainConfig, learning_rate
from omni_grpo_core.training.distributed import make_accelerator
from omni_grpo_core.training.foreign_keys import FOREIGN_KEYS
from omni_grpo_core.training.load_config import check_config, load_train_config

GOOD: Mapping[str, Any] = {
    "checkpoint": str(tiny.checkpoint_dir()),
    "data": str(tiny.data_file()),
    "out": "run",
    "rewards": {"format": {}, "accuracy": {"weight": 2, "gate": "format >= 1"}},
    "settings": {"group_size": 4, "max_new_tokens": 24},
    "batch_size": 16,
    "micro_batch_size": 8,
}

JUDGE: dict[str, Any] = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return path


def test_a_good_one_overrides_the_checkpoint_s_own_settings(tmp_path: Path) -> None:
    config, warnings = load_train_config(write(tmp_path, loss={"loss_type": "gspo"}))
    assert warnings == ()
    assert config.loss == LossConfig(loss_type="gspo")
    assert config.prompts == 4
    assert config.out == str(tmp_path / "run"), "paths are relative to the file's folder"
    own = json.loads((tiny.checkpoint_dir() / "omni_grpo.json").read_text())
    assert config.settings.media.fps == own["media"]["fps"]
    assert {part.name for part in config.composition().components} == {"format", "accuracy"}


HALF = {"precision": "bfloat16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bach_size": 16}, "unknown key 'bach_size'.*did you mean 'batch_size'"),
        ({"settings": {"group_size": 1}}, "group_size: found 1, wanted 2 or more"),
        ({"batch_size": 18}, "batch_size: found 18, wanted a multiple of group_size 4"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"micro_batch_size": 3}, "micro_batch_size: found 3, wanted a divisor or a multiple"),
        ({"rewards": {}}, "rewards: found none"),
        ({"rewards": {"acuracy": {}}}, "reward 'acuracy': found an unknown name"),
        ({"rewards": {"accuracy": {"gate": "format >= 1"}}}, "a gate on 'format'"),
        (
            {"rewards": ["accuracy"]},
            "rewards: found .*names to {} or settings of weight",
        ),
        ({"use_cache": False}, "'use_cache'.*transformers 4.53 to 5.23 drops the cache"),
        ({"num_generations": 2}, "'num_generations', wanted settings: group_size"),
        ({"loss": {"beta": 0.1, "kl_estimator": "k1"}}, "expected gradient of 0"),
        ({"loss": {"loss_type": "dr_grpo", "max_completion_length": 9}}, "max_new_tokens, 24"),
        ({"settings": {"group_size": 4, "temperature": 0}}, "temperature: found 0, wanted above 0"),
        ({"checkpoint": "/no/where"}, "checkpoint: found /no/where"),
        ({"data": "/no/where.json"}, "data: found /no/where.json, which does not exist"),
        ({"out": "run.yaml/out"}, "out: found .*wanted a writable folder"),
        ({"steps": 0}, "steps: found 0"),
        ({"optimizer": {"lr": -1e-3}}, "lr: found -0.001"),
        ({"optimizer": {"betas": [0.9]}}, "betas: found"),
        ({"freeze": ["text", "audio", "video", "image"]}, "freeze: found everything"),
        ({"freeze": ["video"]}, "the same tower sees both"),
        ({"freeze": ["audio"], "lora": {"rank": 4}}, "wanted one of the two"),
        ({"lora": {"rank": 0}}, "lora: found rank 0"),
        ({"trained_weights": "bfloat16"}, "trained_weights: found 'bfloat16'"),
        ({"trained_weights": "bfloat16_master"}, "with precision float32.*set precision: bfloat16"),
        ({**HALF, "trained_weights": "bfloat16_stochastic"}, "found adamw .*wanted adamw_8bit"),
        (
            {**HALF, "trained_weights": "bfloat16_master", "optimizer": {"name": "adafactor"}},
            "optimizer: name: found adafactor with trained_weights bfloat16_master, wanted adamw",
        ),
        (
            {**HALF, "trained_weights": "bfloat16_master", "lora": {"rank": 4}},
            "trained_weights: found bfloat16_master with lora, wanted float32",
        ),
        ({"optimizer": {"name": "adam"}}, "optimizer: name: found 'adam'"),
        ({"eval_every": 5}, "eval_every: found 5 without eval_data"),
        ({"precision": "float16"}, "precision: found 'float16'"),
        ({"guard": {"patience": 0}}, "patience: found 0"),
        ({"gradient_checkpointing": True, "use_cache": True}, "'use_cache'.*never"),
        ({"settings": {"group_size": 4, "max_prompt_length": 20}}, "20, and .* of 22 samples have"),
        ({"settings": {"group_size": 4, "max_new_tokens": 10**9}}, "memory: found .*activations"),
        ({"rewards": {"context": {}}}, "reward 'context': found no judge"),
        ({"judge": JUDGE}, "judge: found one that no reward uses"),
        ({"judge": {"model": "m"}}, "judge: found no 'base_url', wanted str"),
        ({"judge": JUDGE | {"timeout": 0}}, "judge timeout: found 0"),
        ({"rewards": {"context": {"span": "context"}}, "judge": JUDGE}, "found only partial ones"),
        (
            {"rewards": {"format": {}, "accuracy": {"span": "answer", "gate": "format >= 1"}}},
            "'accuracy': found a gate and a span",
        ),
        ({"rewards": {"format": {"span": "head"}}}, "span: found 'head', wanted 'context' or"),
        ({"batch_size": 96}, "batch_size: found 24 groups of 22 samples"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_train_config(write(tmp_path, **changes))


ROWS = json.loads(tiny.data_file().read_text(encoding="utf-8"))


def one_row(folder: Path, **changes: Any) -> Path:
    """Data with the first shipped row, a clip with sound, changed."""
    row = {key: value for key, value in {**ROWS[0], **changes}.items() if value is not None}
    path = folder / "rows.json"
    path.write_text(json.dumps([row]))
    return path


TEXT = {"path": None, "data_type": "text"}
PICTURE = {"path": "clip-12.png", "data_type": "image"}
SOUND = {"path": "clip-14.wav", "data_type": "audio"}
SEEN = ["text", "image", "video"]


@pytest.mark.parametrize(
    ("row", "freeze", "sound", "learns"),
    [
        (TEXT, ["text"], "auto", False),
        (TEXT, ["text", "text"], "auto", False),
        (TEXT, ["image", "video", "audio"], "auto", True),
        (PICTURE, ["text", "audio"], "auto", True),
        (PICTURE, SEEN, "auto", False),
        (SOUND, ["text", "audio"], "auto", False),
        (SOUND, SEEN, "auto", True),
        ({}, ["text"], "auto", True),
        ({}, SEEN, "auto", True),
        ({}, SEEN, "off", False),
        ({"path": "silent.mp4"}, SEEN, "auto", False),
    ],
)
def test_something_must_learn_from_every_row(
    tmp_path: Path, row: dict[str, Any], freeze: list[str], sound: str, learns: bool
) -> None:
    """A step on text rows under ``freeze: [text]`` ended in a RuntimeError of torch, "element 0 of
    tensors does not require grad"."""
    for name in ("clip-00.mp4", "clip-12.png", "clip-14.wav"):
        shutil.copy(tiny.data_file().parent / name, tmp_path)
    write_media(tmp_path / "silent.mp4", numbered(8))
    path = write(
        tmp_path,
        data=str(one_row(tmp_path, **row)),
        freeze=freeze,
        settings={"group_size": 4, "max_new_tokens": 24, "audio_in_video": sound},
        batch_size=4,
        micro_batch_size=4,
    )
    if learns:
        load_train_config(path)
        return
    words = r"freeze: found .*text.*learns from 1 of 1 rows, such as .*rows\.json:1"
    with pytest.raises(ConfigError, match=words):
        load_train_config(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_generations": 8}, "key 'num_generations', wanted settings: group_size"),
        ({"deepspeed": "zero3.json"}, "key 'deepspeed', wanted no such key here: its engine"),
        ({"reward_weights": [1, 2]}, "wanted rewards: weight, of each by its name"),
        ({"mask_truncated_completions": True}, "a completion that was cut off counts"),
        ({"stop": ["</answer>"]}, "the checkpoint's own end tokens"),
        ({"stop_strings": "x"}, "the checkpoint's own end tokens"),
        ({"beta": 0.04}, "key 'beta', wanted loss: beta"),
        (
            {"loss": {"epsilon": 0.2}},
            "run.yaml: loss: found key 'epsilon', wanted loss: epsilon_lo",
        ),
        ({"settings": {"num_generations": 8}}, "settings: found key 'num_generations'"),
        ({"actor_rollout_ref": {"rollout": {"n": 8}}}, "rollout.n is settings: group_size"),
        ({"rlhf_type": "grpo"}, "this trainer does GRPO"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "correction: level and mode"),
    ],
)
def test_keys_of_other_trainers_are_explained(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_train_config(write(tmp_path, **changes))


def test_no_key_of_ours_is_called_foreign() -> None:
    assert not {field.name for field in fields(TrainConfig)} & set(FOREIGN_KEYS)


def test_every_setting_of_trl_s_own_has_its_sentence() -> None:
    """A new one fails here until it has one, or a field of ours."""
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    own = {field.name for field in fields(trl.GRPOConfig)}
    own -= {field.name for field in fields(transformers.TrainingArguments)}
    assert not own - set(FOREIGN_KEYS) - {field.name for field in fields(TrainConfig)}


def test_the_incident_s_group_of_two_gives_a_warning(tmp_path: Path) -> None:
    _, warnings = load_train_config(write(tmp_path, settings={"group_size": 2}))
    assert len(warnings) == 1
    assert "every advantage is +1, -1 or 0" in warnings[0]
    _, silent = load_train_config(write(tmp_path, settings={"group_size": 2}, scale="none"))
    assert silent == ()


def test_no_process_may_be_without_a_completion(tmp_path: Path) -> None:
    """Four groups of four: whole ones on four processes, halves on eight, and not on 32."""
    config, _ = load_train_config(write(tmp_path))
    for world in (4, 8):
        check_config(config, world=world)
    with pytest.raises(ConfigError, match=r"4 groups of 4 completions on 32 .*of 8 or more.*128"):
        check_config(config, world=32)


def test_gradients_that_are_sharded_are_not_offloaded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = load_train_config(write(tmp_path, offload_gradients=True))
    with pytest.raises(ConfigError, match=r"offload_gradients: found true on 2 pro.*remove it: FS"):
        check_config(config, world=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="offload_gradients: found true under FSDP"):
        check_config(config, world=1)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*before the guard has seen"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1, wanted fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "fsdp_offload_params: true",
        ),
    ],
)
def test_launchers_that_the_guard_cannot_stop_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        load_train_config(write(tmp_path))
    for name in ("ACCELERATE_USE_DEEPSPEED", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("FSDP_VERSION", "2")
    load_train_config(write(tmp_path))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_RESHARD_AFTER_FORWARD", "FULL_SHARD", r"truth value full_shard.*false, not FULL_SH"),
        ("FSDP_AUTO_WRAP_POLICY", "LAYERS", "Invalid auto wrap policy: LAYERS"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED", "'SHARDED'"),
    ],
)
def test_what_accelerate_cannot_read_is_not_a_bug_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    """A file of version 1 with its version changed has such values: an internal error, code 3."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    config, _ = load_train_config(write(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"accelerate configuration: found .*{message}"):
        make_accelerator(config)


def test_sharded_weights_are_float32_and_have_torch_s_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    path = write(tmp_path, optimizer={"name": "adafactor"})
    with pytest.raises(ConfigError, match=r"optimizer: name: found .* under FSDP, wanted float32"):
        load_train_config(path)


def test_an_optimizer_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtra, match=r"torchao.*omni-grpo-core\[low-memory\]"):
        load_train_config(write(tmp_path, optimizer={"name": "adamw_8bit"}))


def test_the_rate_warms_up_and_falls() -> None:
    cosine = OptimizerConfig(lr=2.0, schedule="cosine", warmup_steps=1, final=0.5)
    assert [learning_rate(cosine, at, 3) for at in (0, 1, 2)] == pytest.approx([2.0, 2.0, 1.5])
    assert learning_rate(replace(cosine, schedule="constant"), 2, 3) == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'"),
        ({"settings": {"group_size": 4, "max_prompt_length": 20}}, "max_prompt_length"),
        ({"settings": {"group_size": 4, "max_new_tokens": 10**9}}, "memory"),
        ({"rewards": {"accuracy": {"gate": "format >= 1"}}}, "a gate on 'format'"),
        ({"data": "run.yaml"}, "run.yaml"),
        ({"rewards": {"format": {}, "context": {}}, "judge": JUDGE, "steps": 0}, "steps"),
    ],
)
def test_a_wrong_one_exits_2_before_torch_is_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Loading torch takes two seconds or more: a typo must not wait for it, nor an error in
    rewards, data or memory."""
    code = (
        "import sys; from omni_grpo_core.__main__ import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers', 'httpx'} & {*sys.modules}))"
    )
    path = write(tmp_path, **changes)
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert message in done.stderr


def test_json_has_the_error_s_fields(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_cli("train", write(tmp_path, steps=0), "--json")
    assert code == 2
    assert json.loads(out)["error"]["item"] == "steps"
    assert err.startswith("error: config: steps")
