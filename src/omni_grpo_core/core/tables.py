"""Parquet and arrow files and ``datasets`` folders → rows. Half of ``rows.py``.

Media inside a table stay the bytes that they are: columns are read as stored, never decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omni_grpo_core.errors import DataError, one_line
from omni_grpo_core.io.bounded import MAX_BYTES, Unreadable, plain_file
from omni_grpo_core.io.extras import extra

HUB = "hub:"
"""Before the name of a data set on the Hugging Face Hub."""
_PARQUET, _ARROW, _STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_SAVED = ("state.json", "dataset_dict.json")
"""One of them is in a folder that ``datasets`` saved."""
_DATA = (".parquet", ".arrow", ".json", ".jsonl", ".csv")
_ROWS = 256
"""Read at a time."""


def table_rows(source: str, split: str | None) -> Iterator[Mapping[str, Any]] | None:
    """The rows of a table, or ``None`` for a file of another kind. ``source``: a file, a folder or
    ``hub:NAME``; ``split``: of a data set that has several.

    Raises:
        DataError: broken, too large, no such split.
        MissingExtra: its packages are not installed.
    """
    path = Path(source)
    if source.startswith(HUB):
        return _of_datasets(source, _from_hub, split)
    if path.is_dir():
        if not any(one.suffix in _DATA for level in ("*", "*/*") for one in path.glob(level)):
            raise _bad(source, "a folder without data files", f"{', '.join(_DATA)} in it",
                       "pass the file of the rows")  # fmt: skip
        return _of_datasets(source, _from_folder, split)
    try:
        with plain_file(path) as (file, size):
            head = file.read(6)
    except Unreadable:
        return None  # the reader of text says why
    if head[:4] not in (_PARQUET, _ARROW[:4], _STREAM):
        return None
    if size > MAX_BYTES:
        raise _bad(source, f"{size} bytes", f"at most {MAX_BYTES}", "split the file")
    return _of_file(path, head)


def _of_file(path: Path, head: bytes) -> Iterator[Mapping[str, Any]]:
    with extra("data"):
        import pyarrow
        from pyarrow import ipc, parquet

    try:
        with pyarrow.memory_map(str(path)) as source:
            if head[:4] == _PARQUET:
                file = parquet.ParquetFile(source)
                groups = range(file.metadata.num_row_groups)
                size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
                if size > MAX_BYTES:
                    raise _bad(str(path), f"{size} bytes unpacked", f"at most {MAX_BYTES}",
                               "split the file")  # fmt: skip
                batches = file.iter_batches(_ROWS)
            elif head == _ARROW:
                reader = ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                batches = ipc.open_stream(source)
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _bad(str(path), one_line(error, 200), "a whole parquet or arrow file",
                   "copy or write it again") from error  # fmt: skip


def _of_datasets(source: str, load: Any, split: str | None) -> Iterator[Mapping[str, Any]]:
    with extra("data"):
        import datasets

    datasets.disable_progress_bars()
    try:
        loaded = load(datasets, source)
        if isinstance(loaded, Mapping):
            names = sorted(map(str, loaded))
            chosen = split or ("train" if "train" in names else names[0] if len(names) == 1 else "")
            if chosen not in names:
                raise _bad(source, f"the splits {', '.join(names)}", "the name of one",
                           f"add it after a colon: {source}:{names[0]}")  # fmt: skip
            loaded = loaded[chosen]
        elif split is not None:
            raise _bad(source, f"no split {split!r}: it has none", "its rows", "leave it out")
        for table in loaded.with_format("arrow").iter(batch_size=_ROWS):
            yield from table.to_pylist()
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its file systems and scripts raise
        kind = "a name" if source.startswith(HUB) else "a folder"
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        raise _bad(source, f"{kind}, for which `datasets` says {said}",
                   "a data set that it loads", "check its name and files") from error  # fmt: skip


def _from_hub(datasets: Any, source: str) -> Any:
    return datasets.load_dataset(source.removeprefix(HUB), streaming=True)


def _from_folder(datasets: Any, source: str) -> Any:
    if any((Path(source) / name).is_file() for name in _SAVED):
        return datasets.load_from_disk(source)
    return datasets.load_dataset(source, streaming=True)


def _bad(source: str, got: str, want: str, fix: str) -> DataError:
    return DataError(source, got=got, want=want, fix=fix)
