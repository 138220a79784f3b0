"""A third-party project: it installs the wheel and uses goldens, diffs, markers and options.

It runs in separate processes in its own environment, so that the wheel is tested, not the checkout.
Dependencies are those of the environment that runs this test; nothing is fetched.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden_project import git
from safetensors.torch import load_file, save_file

from omni_grpo_core.tiny import checkpoint_dir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

PROCESSOR = '''
"""The project's own code: a conversation and frames -> the model's input."""
import numpy as np
from omni_grpo_core.tiny import checkpoint_dir
from transformers import Qwen2_5OmniProcessor

processor = Qwen2_5OmniProcessor.from_pretrained(checkpoint_dir())

def prepare(question, system="You are a careful listener.", fps=4.0):
    text = f"<|im_start|>system\\n{system}<|im_end|>\\n<|im_start|>user\\n"
    text += f"<|vision_bos|><|VIDEO|><|vision_eos|>{question}<|im_end|>\\n<|im_start|>assistant\\n"
    frames = np.linspace(0, 255, 4 * 3 * 56 * 56).reshape(4, 3, 56, 56).astype("uint8")
    options = {"fps": fps, "do_resize": False, "return_tensors": "pt"}
    return processor(text=[text], videos=[frames], **options)
'''
TEST = """
import prepare
import pytest

@pytest.fixture
def my_processor():
    return prepare.prepare

def test_batch(omni_golden, my_processor):
    omni_golden.check(my_processor("Which colour is the bar?"))

def test_in_words(omni_golden, my_processor):
    batch = my_processor("Which colour is the bar?")
    omni_golden.check(batch, "batch", decode=prepare.processor.tokenizer.decode)
"""
MARKED = """
import pytest

@pytest.mark.gpu
def test_gpu(): pass

@pytest.mark.full
def test_full(omni_checkpoint): assert (omni_checkpoint / "config.json").exists()

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.tiny
def test_tiny(): pass
"""
OWN_OPTION = """
def pytest_addoption(parser):
    parser.addoption("--checkpoint", default="mine")
"""
OWN_TEST = """
def test_own(pytestconfig):
    assert pytestconfig.getoption("checkpoint") == "yours"
"""
SUITE = """
checkpoint: ../model
settings: {max_new_tokens: 32}
cases:
  words: {rows: [20]}
  other: {rows: [21]}
"""
# as strict as a project can be: an unknown marker, or any warning, is an error
INI = """
[tool.pytest.ini_options]
addopts = ["--strict-markers", "--strict-config"]
pythonpath = ["."]
testpaths = ["tests"]
filterwarnings = ["error", "ignore::DeprecationWarning:(av|torch|transformers).*"]
"""


@dataclass(frozen=True)
class Project:
    """A folder with tests, and the Python of the environment that the wheel is installed in."""

    folder: Path
    python: Path

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def pytest(self, *options: str) -> tuple[int, str]:
        return self.run("pytest", *options)

    def run(self, module: str, *options: str) -> tuple[int, str]:
        """Exit code, and stdout with stderr."""
        environment = surroundings()
        # a machine with a GPU must behave like one without
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.python, "-m", module, *options],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


def surroundings() -> dict[str, str]:
    """This process's environment without variables that would put the checkout before the wheel."""
    removed = ("PYTHON", "PYTEST", "COV_", "COVERAGE", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(removed)}


def call(*command: str | Path) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=surroundings(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("third-party")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ".")
    (wheel,) = folder.glob("*.whl")
    call(sys.executable, "-m", "venv", folder / "venv")
    found = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    call(found, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(call(found, "-c", ask).strip())
    (packages / "behind.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    where = call(found, "-c", "import omni_grpo_core; print(omni_grpo_core.__file__)")
    assert packages in Path(where.strip()).parents, "the wheel, not the checkout"
    return found


@pytest.fixture
def project(python: Path, tmp_path: Path) -> Project:
    made = Project(tmp_path / "theirs", python)
    made.folder.mkdir()
    made.write("pyproject.toml", INI)
    return made


def test_a_golden_is_missing_created_compared_and_found_changed(project: Project) -> None:
    project.write("prepare.py", PROCESSOR)
    project.write("tests/test_theirs.py", TEST)
    code, output = project.pytest()
    assert code == 1, output
    assert "golden test_batch/value: no golden yet; create it with --snapshot-update" in output
    assert not (project.folder / "golden").exists(), "a plain run writes nothing"

    code, output = project.pytest("--snapshot-update")
    assert (code, "2 passed" in output) == (0, True), output
    golden = (project.folder / "golden" / "test_in_words" / "batch.txt").read_text("utf-8")
    assert '550 530 198 "<|im_start|>system\\n"' in golden
    assert '562×8 "<|VIDEO|>"' in golden

    code, output = project.pytest()
    assert (code, "2 passed" in output) == (0, True), output

    changed = PROCESSOR.replace("careful", "careless").replace("fps=4.0", "fps=2.0")
    project.write("prepare.py", changed.replace("np.linspace(0, 255", "np.linspace(255, 0"))
    code, output = project.pytest()
    assert code == 1, output
    assert "golden test_in_words/batch differs:" in output
    assert re.search(r'input_ids column 10 is [\d ]+ "less", was [\d ]+ "ful"', output)
    assert "video_second_per_grid[0] is 1, was 0.5" in output
    assert "pixel_values_videos" in output
    assert "Traceback" not in output
    assert (project.folder / "golden" / "test_in_words" / "batch.txt").read_text("utf-8") == golden


def test_markers_and_options(project: Project) -> None:
    project.write("tests/test_marked.py", MARKED)
    code, output = project.pytest("-rs")
    assert (code, "2 passed, 2 skipped" in output) == (0, True), output
    assert "finds no CUDA device" in output
    assert "no --omni-checkpoint was given" in output

    project.write("weights/config.json", "{}")
    code, output = project.pytest("--omni-checkpoint", "weights", "-m", "full or tiny")
    assert (code, "2 passed, 2 deselected" in output) == (0, True), output
    code, output = project.pytest("--omni-checkpoint", "nowhere")
    assert (code, "--omni-checkpoint: nowhere is not a folder" in output) == (4, True), output
    code, output = project.pytest("--omni-require-gpu", "-m", "not gpu")
    assert (code, "--omni-require-gpu: torch" in output) == (4, True), output
    output = project.pytest("--markers")[1]
    assert all(f"@pytest.mark.{name}:" in output for name in ("gpu", "full", "slow", "tiny"))


def test_a_golden_suite_without_a_line_of_python(project: Project) -> None:
    project.write("pyproject.toml", INI.replace('testpaths = ["tests"]', 'testpaths = ["golden"]'))
    project.write("golden/suite.yaml", SUITE)
    project.write(".gitignore", ".pytest_cache\ngolden/.pending\n")
    model = project.folder / "model"
    shutil.copytree(checkpoint_dir(), model)
    git(project.folder, "init", "-q")
    for key, who in {"user.name": "Ann", "user.email": "ann@example.org"}.items():
        git(project.folder, "config", key, who)

    def commit() -> None:
        git(project.folder, "add", "-A")
        git(project.folder, "commit", "-q", "-m", "a commit")

    commit()
    code, output = project.pytest()
    assert (code, "2 failed" in output) == (1, True), output
    assert "other: new: no golden for this platform yet: run `omni-grpo golden regen" in output
    code, output = project.pytest("--snapshot-update", "-n", "2")
    assert (code, "2 passed" in output) == (0, True), output
    assert "2 cases pending: omni-grpo golden review" in output
    accepted = ("accept", "words", "other", "--reason", "first goldens")
    code, output = project.run("omni_grpo_core", "golden", *accepted)
    assert code == 0, output
    commit()
    code, output = project.pytest("-n", "2")
    assert (code, "2 passed" in output) == (0, True), output

    def first_stage_of_words(*checkpoint: str) -> str:
        """The first stage that pytest names, in the words of ``golden diff``."""
        code, output = project.pytest(*(f"--omni-checkpoint={name}" for name in checkpoint))
        assert code == 1, output
        assert "Traceback" not in output
        (told,) = re.findall(r"^words: .*?(?=^do: )", output, re.MULTILINE | re.DOTALL)
        options = [f"--checkpoint={name}" for name in checkpoint]
        code, shown = project.run("omni_grpo_core", "golden", "diff", "words", *options)
        assert (code, told in shown) == (1, True), (told, shown)
        verdict, stage = re.findall(r"words: ([\w-]+): (\w+): ", told)[0]
        return f"{verdict} {stage}"

    project.write("golden/suite.yaml", SUITE.replace("[20]", "[21]"))
    assert first_stage_of_words() == "harmful sample"
    project.write("golden/suite.yaml", SUITE)
    assert first_stage_of_words(str(checkpoint_dir("qwen3"))) == "schema batch"
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    save_file(
        {**weights, name: weights[name] * 1.001}, model / "model.safetensors", {"format": "pt"}
    )
    assert first_stage_of_words() == "benign-drift logits"


@pytest.mark.parametrize("where", ["conftest.py", "theirs.py"], ids=["conftest", "plugin"])
def test_a_project_option_with_the_plugins_old_name(project: Project, where: str) -> None:
    """The plugin defined ``--checkpoint``: pytest failed to start if a project defined it too."""
    project.write(where, OWN_OPTION)
    project.write("prepare.py", PROCESSOR)
    project.write("tests/test_theirs.py", TEST + OWN_TEST)
    options = ["--checkpoint=yours", *(["-p", "theirs"] if where == "theirs.py" else [])]
    code, output = project.pytest("--snapshot-update", *options)
    assert (code, "3 passed" in output) == (0, True), output
    code, output = project.pytest(*options)
    assert (code, "3 passed" in output) == (0, True), output
