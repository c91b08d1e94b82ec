"""Which class each picture belongs to: by `dataset.json`, as StyleGAN's tools write it, or by the folder it lies in."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pipelines.dataset import MAX_CLASSES
from pipelines.digests import printable
from pipelines.errors import DataError, one_line

LABEL_FILE = "dataset.json"
_SPLITS = {
    "train": re.compile(r"train(ing)?([ab]|[\W\d_].*)?", re.IGNORECASE | re.DOTALL),
    "validation": re.compile(r"(val|valid|validation|dev)([ab]|[\W\d_].*)?", re.IGNORECASE | re.DOTALL),
    "test": re.compile(r"(test|testing|eval)([ab]|[\W\d_].*)?", re.IGNORECASE | re.DOTALL),
}
_NAMED = 5
log = logging.getLogger("gfmn")


class Classes(NamedTuple):
    """Labels int64 [N], the number of classes that they count, and the classes' names where they have any.

    `folder` is what the class folders share, "" if they lie at the top or if the labels come from a file.
    """

    labels: np.ndarray
    number: int
    names: list[str]
    folder: str = ""


def find_classes(
    where: str, pictures: list[str], others: list[str], read: Callable[[str], bytes], *, advice: Callable[[str], str]
) -> Classes | None:
    """The classes of pictures with these names ("/" between folders), None if they have none.

    A `dataset.json` at the top decides if there is one. Otherwise the folders are classes, numbered in sorted order, at
    the first level where the pictures' paths part, if every picture lies in one of them.

    Args:
        where: the folder or archive, for messages.
        others: names of the files that are no pictures.
        read: a name → the content; may raise `OSError`.
        advice: how to choose a folder such as the one of this name, for messages.

    Raises:
        DataError: the folders look like splits of a data set, or `dataset.json` cannot be used.
    """
    above = [
        folder for folder in posixpath.commonpath([posixpath.dirname(name) for name in pictures]).split("/") if folder
    ]
    for depth in range(len(above) + 1):
        start = "".join(f"{folder}/" for folder in above[:depth])
        if start + LABEL_FILE in others:
            named = _from_json(f"{where}/{start}{LABEL_FILE}", start + LABEL_FILE, read)
            if named is not _NO_LABEL_FILE:
                return _labels_of(f"{where}/{start}{LABEL_FILE}", [name[len(start) :] for name in pictures], named)
    folders = [[*name.split("/")[:-1], ""][len(above)] for name in pictures]
    classes = sorted(set(folders))
    refuse_splits(where, classes, lambda split: advice("/".join([*above, split])))
    if len(classes) < 2:
        return None
    if "" in classes:
        log.warning("%s: holds images beside its class folders, so none of the images has a label", where)
        return None
    numbers = {folder: label for label, folder in enumerate(classes)}
    labels = np.array([numbers[folder] for folder in folders], dtype=np.int64)
    return Classes(labels, len(classes), classes, "/".join(above))


def refuse_splits(where: str, names: Sequence[str], advice: Callable[[str], str]) -> None:
    """Raise `DataError` if some of the names are those of different splits, as train and val: they are no classes.

    Args:
        advice: what to do, given the name of the training split or else of another one.
    """
    found = {split: name for name in names for split, form in _SPLITS.items() if form.fullmatch(name)}
    if len(found) > 1:
        parts = " and ".join(map(printable, sorted(found.values())))
        remedy = advice(found.get("train", found[min(found)]))
        raise DataError(f"{where}: {parts} look like splits of a data set, not like classes; {remedy}", "data")


def class_numbers(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Labels as int64 [count]; DataError unless they are one whole number of a class for each picture."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        shape = list(labels.shape)
        raise DataError(f"{where}: has labels {labels.dtype} {shape}; {count} class numbers from 0 on are needed")
    if labels.max() >= MAX_CLASSES:
        raise DataError(f"{where}: has labels up to {labels.max()}; number the classes from 0 to {MAX_CLASSES - 1}")
    return labels.astype(np.int64)


def say_classes(where: str, pictures: int, classes: Classes | None) -> None:
    """Log how many pictures and classes were found, and the first classes' names."""
    text = "no classes"
    if classes is not None:
        names = ", ".join(map(printable, classes.names[:_NAMED])) + (", …" if len(classes.names) > _NAMED else "")
        text = f"{classes.number:,} class{'es' if classes.number > 1 else ''}{': ' + names if names else ''}"
    log.info("%s: %s picture%s, %s", where, f"{pictures:,}", "s" if pictures > 1 else "", text)


_NO_LABEL_FILE = object()


def _from_json(where: str, name: str, read: Callable[[str], bytes]) -> object:
    """What the file says of labels; `_NO_LABEL_FILE` if it is some other program's `dataset.json`."""
    try:
        content = json.loads(read(name))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable as JSON ({one_line(error)}); repair or remove it") from None
    return content["labels"] if isinstance(content, dict) and "labels" in content else _NO_LABEL_FILE


def _labels_of(where: str, pictures: list[str], named: object) -> Classes | None:
    if named is None:
        return None
    try:
        by_name = {str(name).replace("\\", "/"): label for name, label in named}  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise DataError(f"{where}: 'labels' is no list of [file, label]; repair or remove it") from None
    missing = next((picture for picture in pictures if picture not in by_name), None)
    if missing is not None:
        raise DataError(f"{where}: has no label for {printable(missing)}; add it, or remove the file of labels")
    found = [by_name[picture] for picture in pictures]
    if all(isinstance(label, list) for label in found):
        log.warning("%s: its labels are vectors and not classes, so none of the images has a label", where)
        return None
    if not all(isinstance(label, int) and not isinstance(label, bool) and abs(label) < 2**63 for label in found):
        raise DataError(f"{where}: its labels must be class numbers from 0 on; repair or remove it")
    labels = class_numbers(np.array(found, dtype=np.int64), len(pictures), where)
    return Classes(labels, int(labels.max()) + 1, [])
