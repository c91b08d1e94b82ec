"""Columns of pictures in Parquet files, as the Hugging Face hub serves them, through the optional `pyarrow` package."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.dataset import EncodedDataset
from pipelines.decoding.preprocessing import Preprocessing
from pipelines.digests import digest_files, printable
from pipelines.errors import DataError, one_line
from pipelines.sources.labels import Classes, class_numbers, refuse_splits, say_classes
from pipelines.sources.paths import check_memory, unusable

PARQUET_SUFFIX = ".parquet"
_PICTURE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "class")
log = logging.getLogger("gfmn")


class ParquetImages:
    """One column of pictures, held in memory as the files have them: a table cannot be read picture by picture."""

    def __init__(self, root: Path, files: list[str], rows: list[int], column: str, pictures: Any) -> None:
        self.root = root
        self.files = files
        self.column = column
        self._ends = np.cumsum(rows)
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def where(self, picture: int) -> str:
        """The file and the row in it."""
        file = int(np.searchsorted(self._ends, picture, side="right"))
        row = picture - (int(self._ends[file - 1]) if file else 0)
        return f"{printable(self.root / self.files[file])}[{row}]"

    def read(self, picture: int) -> bytes:
        """The bytes in the row; raises `OSError` if it holds none."""
        value = self._pictures[picture].as_py()
        if value is None:
            raise OSError("the row holds no picture")
        return bytes(value)

    def digest(self, *, skip_unreadable: bool) -> str:
        """SHA-256 over the files and the column's name."""
        files = digest_files(self.root, self.files, skip_unreadable=skip_unreadable)
        return hashlib.sha256(f"{files} {self.column}".encode()).hexdigest()


def open_parquet(
    name: str, root: Path, files: list[str], preprocessing: Preprocessing, *, skip_bad_images: bool = False
) -> EncodedDataset:
    """The rows of Parquet files, one after the other: a column of pictures, and one of classes if there is one.

    The pictures' column is the one that the hub's features call an image, or else one of bytes or of structs with
    bytes; among several, one named "image" or "img". The classes' is the hub's ClassLabel, or a column named "label".

    Args:
        name: name of the dataset.
        root: the folder of the files.
        files: their names relative to it, sorted.
        preprocessing: crop and size of the images.
        skip_bad_images: leave out rows that cannot be used instead of stopping.

    Raises:
        DataError: no such column, or more than one; damaged files or files of several splits; not enough memory; no
            `pyarrow` package.
    """
    where = printable(root if len(files) > 1 else root / files[0])
    for level in zip(*(file.split("/") for file in files), strict=False):
        refuse_splits(where, level, lambda _: "put the files of the one that is meant into a folder of their own")
    with _opened(root / files[0]) as first:
        schema = first.schema_arrow
    features = _features(schema)
    column = _picture_column(where, schema, features)
    label = _label_column(where, schema, features)
    columns = [column] if label is None else [column, label]
    found: dict[str, list[Any]] = {name: [] for name in columns}
    size, rows = 0, []
    for file in files:
        with _opened(root / file) as opened:
            _check_columns(root / file, schema, opened.schema_arrow, columns)
            size += _unpacked_bytes(opened.metadata)
            check_memory(size, where)
            rows.append(opened.metadata.num_rows)
            for table in _groups(opened, columns):
                for part, chunks in found.items():
                    chunks.append(table.column(part))
    pictures = _only_bytes(_joined(found[column]))
    if not len(pictures):
        raise DataError(f"{where}: holds no images")
    log.info("%s: the pictures are in column %s", where, printable(column))
    with _explained(where):
        classes = None if label is None else _classes(where, label, _joined(found[label]), features)
    say_classes(where, len(pictures), classes)
    return EncodedDataset(
        name,
        preprocessing,
        ParquetImages(root, files, rows, column, pictures),
        labels=None if classes is None else classes.labels,
        num_classes=None if classes is None else classes.number,
        skip_bad_images=skip_bad_images,
    )


def _groups(opened: Any, columns: list[str]) -> Iterator[Any]:
    """Columns of the file, a group of rows at a time: pyarrow reads no more than 2 GiB of structs at once."""
    if not opened.num_row_groups:
        yield opened.read(columns=columns, use_threads=False)
    for group in range(opened.num_row_groups):
        yield opened.read_row_group(group, columns=columns, use_threads=False)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as pyarrow's `ParquetFile`; its errors, inside as well, become a `DataError` that names the file."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "Parquet files need pyarrow, which is not installed: pip install 'gfmn-engine[parquet]'"
        ) from None
    with _explained(printable(path)), open(path, "rb") as file:  # pyarrow itself takes paths in UTF-8 only
        yield pyarrow.parquet.ParquetFile(file)


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow's own errors, some of them OSErrors without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise unusable(where, error) from None
        raise DataError(f"{where}: damaged Parquet file ({one_line(error)}); copy it again") from None


def _check_columns(path: Path, schema: Any, own: Any, columns: list[str]) -> None:
    for column in columns:
        if column not in own.names or own.field(column).type != schema.field(column).type:
            raise DataError(f"{printable(path)}: column {printable(column)} is not as in the first file; keep one kind")


def _joined(columns: list[Any]) -> Any:
    """Columns of one type after each other, without a copy."""
    import pyarrow

    return pyarrow.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)


def _only_bytes(pictures: Any) -> Any:
    """A column of bytes as it is; of a column of structs, their bytes."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(pictures, "bytes") if pyarrow.types.is_struct(pictures.type) else pictures


def _unpacked_bytes(metadata: Any) -> int:
    """Bytes of all columns when they are unpacked, as the file says.

    Not of one column: for what a damaged file says of a column, pyarrow ends the process.
    """
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the hub says of the columns; empty for files of another making."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _picture_column(where: str, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

    readable = [field.name for field in schema if is_bytes(field.type)]
    candidates = [column for column in readable if features.get(column, {}).get("_type") == "Image"] or readable
    if not candidates:
        found = ", ".join(f"{printable(field.name)} {field.type}" for field in schema)
        raise DataError(f"{where}: no column of encoded pictures (has {found[:150]}); save them as bytes of files")
    named = [column for column in candidates if column.lower() in _PICTURE_NAMES]
    chosen = candidates if len(candidates) == 1 else named
    if len(chosen) != 1:
        found = ", ".join(map(printable, candidates))
        raise DataError(f"{where}: several columns of pictures ({found}); name the one that is meant 'image'")
    return chosen[0]


def _label_column(where: str, schema: Any, features: dict[str, dict[str, Any]]) -> str | None:
    named = [column for column in schema.names if features.get(column, {}).get("_type") == "ClassLabel"]
    named = named or [column for column in schema.names if column.lower() in _LABEL_NAMES]
    if len(named) > 1:
        log.warning("%s: several columns of classes (%s): the first is used", where, ", ".join(map(printable, named)))
    return named[0] if named else None


def _classes(where: str, column: str, values: Any, features: dict[str, dict[str, Any]]) -> Classes | None:
    """The classes of a column of whole numbers or of texts; None, with a warning, if it holds anything else."""
    from pyarrow import types

    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count == 0 and (types.is_string(values.type) or types.is_large_string(values.type)):
        found, numbers = np.unique(np.array(values.to_pylist(), dtype=object), return_inverse=True)
        return Classes(numbers.astype(np.int64), len(found), [str(name) for name in found])
    if values.null_count or not types.is_integer(values.type):
        log.warning("%s: column %s holds no classes, so none of the images has a label", where, printable(column))
        return None
    labels = values.to_numpy()
    if (labels < 0).all():  # how the hub marks a split whose classes are kept back
        return None
    labels = class_numbers(labels, len(labels), where)
    given = features.get(column, {}).get("names")
    names = [str(name) for name in given] if isinstance(given, list) else []
    return Classes(labels, max(int(labels.max()) + 1, len(names)), names)
