"""Reading byte-pair ranks: what is missing or broken is reported, never guessed."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from omni_grpo_core.errors import ConfigError
from omni_grpo_core.tiny.realvocab import (
    build_processor,
    build_tokenizer,
    write_processor,
)
from omni_grpo_core.tiny.realvocab.merges import vocabulary_and_merges
from omni_grpo_core.tiny.realvocab.ranks import ranks_file, read_ranks

BYTES = [bytes([value]) for value in range(256)]


def write_ranks(path: Path, tokens: list[bytes], first: int = 0) -> Path:
    lines = [
        b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens, first)
    ]
    path.write_bytes(b"".join(lines))
    return path


def test_ranks_come_in_rank_order_whatever_the_order_of_lines(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "r", [*BYTES, b"an", b"ban"])
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))
    ranks = read_ranks(path)
    assert list(ranks)[-2:] == [b"an", b"ban"]
    assert list(ranks.values()) == list(range(258))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"IQ==", ":1: found b'IQ=='"),
        (b"IQ== 0\n\nIg== 1", ":2: found b''"),
        (b"IQ== 0\nIg== one", ":2: found b'Ig== one'"),
        (b"I?== 0", ":1: found b'I?== 0'"),
        (b"IQ== 0\nIQ== 1", ":2: found a token that an earlier line has"),
        (b"IQ== 0\nIg== 2", "2 ranks that are not 0 to 1"),
        (b"IQ== 0\nIg== 1", "a byte without a token"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_ranks(path)
    assert message in str(caught.value)
    assert str(path) in caught.value.item


def test_the_pair_is_what_encoding_ends_with() -> None:
    # abc: "bc" was learnt before "ab", so abc is a + bc although ab + c exists too
    ranks = {token: rank for rank, token in enumerate([*BYTES, b"bc", b"ab", b"abc", b"abcab"])}
    assert vocabulary_and_merges(ranks)[1] == [("b", "c"), ("a", "b"), ("a", "bc"), ("abc", "ab")]


def test_a_token_that_is_no_pair_is_refused() -> None:
    ranks = {token: rank for rank, token in enumerate([*BYTES, b"abc", b"ab"])}
    with pytest.raises(ConfigError, match=r"token 256 .*b'abc': found 3 parts"):
        vocabulary_and_merges(ranks)


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "r", [*BYTES, b"</"])
    with pytest.raises(ConfigError, match=r"found '</' as \[256\], wanted \[522\]"):
        build_tokenizer(path)


def test_without_the_package_the_error_shows_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "dashscope", None)
    with pytest.raises(ConfigError, match=r"no package dashscope.*omni-grpo-core\[qwen\]"):
        build_processor(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_no_longer_contains_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dashscope").mkdir()
    # a package that must not be run: only its path is looked up
    (tmp_path / "dashscope" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"qwen\.tiktoken: found no such file"):
        ranks_file()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="a path in use"):
        write_processor(tmp_path)
    with pytest.raises(ConfigError, match="a path in use"):
        write_processor(tmp_path / "notes")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
