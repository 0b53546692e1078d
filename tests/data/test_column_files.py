"""Columns of parquet files, of folders that `datasets` saved and of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.text_files import TEXTS, read, write_parquet

from megatron_mea.errors import RunError, UserError


def test_parquet_with_several_row_groups(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(1000)]
    write_parquet(tmp_path / "corpus.parquet", texts)
    assert pyarrow.parquet.ParquetFile(tmp_path / "corpus.parquet").num_row_groups == 100
    assert list(read(tmp_path / "corpus.parquet")) == texts


@pytest.mark.parametrize("kind_of_string", ["large_string", "dictionary", "string_view"])
def test_parquet_with_other_kinds_of_strings(kind_of_string: str, tmp_path: Path) -> None:
    column = pyarrow.array(TEXTS)
    if kind_of_string == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pyarrow, kind_of_string)())

    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "corpus.parquet")
    assert list(read(tmp_path / "corpus.parquet")) == TEXTS


def test_datasets_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS}).save_to_disk(tmp_path / "one")
    assert list(read(tmp_path / "one")) == TEXTS


def test_datasets_folder_with_splits(tmp_path: Path) -> None:
    parts = {"train": TEXTS[:4], "validation": TEXTS[4:]}
    folder = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": part}) for name, part in parts.items()})
    folder.save_to_disk(tmp_path / "two")
    assert list(read(tmp_path / "two")) == TEXTS[:4]
    assert list(read(tmp_path / "two", split="validation")) == TEXTS[4:]
    with pytest.raises(UserError, match="train, validation"):
        list(read(tmp_path / "two", split="test"))


def test_parquet_is_read_in_constant_memory(tmp_path: Path) -> None:
    texts = ["x" * 10_000] * 3000
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "large.parquet", 30, use_dictionary=False, compression="none")
    size, peak = (tmp_path / "large.parquet").stat().st_size, 0
    del table
    already = pyarrow.total_allocated_bytes()
    for _ in read(tmp_path / "large.parquet"):
        peak = max(peak, pyarrow.total_allocated_bytes() - already)

    assert size > 25_000_000
    assert 0 < peak < size / 3


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """In place of the hub: streams three records; the calls are noted."""
    calls: list[tuple[tuple, dict]] = []

    def records() -> Iterator[dict]:
        for i in range(3):
            yield {"text": f"{calls[-1][0][0]} {i}", "picture": b"large"}
        if "cut" in calls[-1][0][0]:
            raise ConnectionError("the line is dead\nand more")

    def load_dataset(*names: str | None, **options: object) -> datasets.IterableDataset:
        calls.append((names, options))
        if "missing" in str(names[0]):
            raise FileNotFoundError("no such dataset")
        return datasets.IterableDataset.from_generator(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_name_on_the_hub_is_streamed(hub: list[tuple[tuple, dict]]) -> None:
    assert list(read("owner/name", "wikitext:raw-v1", split="test")) == [
        *("owner/name 0", "owner/name 1", "owner/name 2"),
        *("wikitext 0", "wikitext 1", "wikitext 2"),
    ]

    options = {"split": "test", "streaming": True}
    assert hub == [(("owner/name", None), options), (("wikitext", "raw-v1"), options)]
    with pytest.raises(UserError, match=r"columns text, picture\n.*'body'\n.*--text-key"):
        list(read("owner/name", text_key="body"))


def test_a_name_that_the_hub_has_not_is_the_users_mistake(hub: list[tuple[tuple, dict]]) -> None:
    with pytest.raises(UserError, match=r"owner/missing\n.*FileNotFoundError: no such dataset"):
        list(read("owner/missing"))


def test_a_stream_that_breaks_off_is_nobodys_corpus(hub: list[tuple[tuple, dict]]) -> None:
    with pytest.raises(RunError, match=r"owner/cut broke off after 3 rows: ConnectionError: the line is dead$"):
        list(read("owner/cut"))
