"""The API documentation is made from docstrings: every public field has one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import omni_grpo_core

ROOT = Path(omni_grpo_core.__file__).parent
FILES = (
    "types.py",
    "core/media_config.py",
    "losses/__init__.py",
    "pipeline/settings.py",
    "rewards/endpoint.py",
    "training/config.py",
)


def undocumented(path: Path) -> list[str]:
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and not documented:
                found.append(f"{node.name}.{ast.unparse(field.target)}")
    return found


@pytest.mark.parametrize("file", FILES)
def test_every_field_has_a_docstring(file: str) -> None:
    assert undocumented(ROOT / file) == []


def test_a_field_without_one_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('class A:\n    b: int\n    "Documented."\n    c: int = 0\n')
    assert undocumented(tmp_path / "a.py") == ["A.c"]
