# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""Rows of tables: parquet and Arrow files, and datasets of the library `datasets`."""

import copy
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchao_masquant.data.columns import ANSWERS

__all__ = [
    "TABLES",
    "is_saved_dataset",
    "rows_of_dataset",
    "rows_of_saved",
    "rows_of_table",
]

#: Extensions of files that hold a table, to what `datasets` calls them.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow"}

# What datasets.save_to_disk leaves in a folder.
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote this folder."""
    return any((folder / name).exists() for name in _SAVED)


def rows_of_table(path: Path) -> Iterator[tuple[Any, str]]:
    """Each row of a parquet or an Arrow file, and where it is.

    Raises:
        ImportError: there is no library `datasets`.
        ValueError: it is damaged.
    """
    datasets = _datasets(path, "a table")
    kind = TABLES[path.suffix.lower()]
    try:
        # As a stream nothing is copied into a cache.
        table = datasets.load_dataset(
            kind, data_files=str(path), split="train", streaming=True
        )
        for index, row in enumerate(rows_of_dataset(table)):
            yield row, f"{path.name}, row {index}"
    # Errors of Arrow are errors of values or of input; of pickled extensions, of any kind.
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{str(path)!r} is no {kind} file: {reason}.") from error


def rows_of_saved(path: Path) -> Iterator[tuple[Any, str]]:
    """Each row of a dataset that ``save_to_disk`` wrote, and where it is.

    Raises:
        ImportError: there is no library `datasets`.
        ValueError: the folder holds several splits.
    """
    datasets = _datasets(path, "a saved dataset")
    found = datasets.load_from_disk(str(path))
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(
            f"{str(path)!r} has the splits {', '.join(found)}: give the folder of one."
        )
    for index, row in enumerate(rows_of_dataset(found)):
        yield row, f"{path.name}, row {index}"


def rows_of_dataset(rows: Iterable[Any]) -> Iterator[Any]:
    """Rows; of a dataset of `datasets` with media as files' bytes and paths.

    Nothing is decoded, which would need torchcodec for sounds, and would keep pixels in
    memory. An answer that is the number of a class becomes the name of the class.
    """
    features = getattr(rows, "features", None)
    cast = getattr(rows, "cast_column", None)
    if features is None or cast is None:
        yield from rows
        return
    table: Any = rows
    if hasattr(table, "with_format"):
        table = table.with_format(None)
    for name, feature in features.items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            table = table.cast_column(name, undecoded)
    classes = {
        name: feature
        for name, feature in features.items()
        if name.lower() in ANSWERS and hasattr(feature, "int2str")
    }
    for row in table:
        for name, feature in classes.items():
            if row[name] is not None and row[name] >= 0:
                row[name] = feature.int2str(row[name])
        yield row


def _undecoded(feature: Any) -> Any:
    """The same feature of a dataset, whose media are not decoded."""
    if isinstance(feature, dict):
        return {name: _undecoded(value) for name, value in feature.items()}
    if isinstance(feature, (list, tuple)):
        return [_undecoded(value) for value in feature]
    changed = copy.copy(feature)
    if getattr(feature, "decode", False) is True:
        changed.decode = False
    if hasattr(feature, "feature"):
        changed.feature = _undecoded(feature.feature)
    return changed


def _datasets(path: Path, what: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"{str(path)!r} is {what}, which is read with the library datasets: pip "
            "install datasets."
        )
    import datasets

    return datasets
