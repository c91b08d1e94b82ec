"""What a loader reads: a data set of images in memory, or of encoded files that are decoded while they are read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from pipelines.decoding.preprocessing import RESIZE_FILTER, Preprocessing
from pipelines.errors import BadImage, DataError

MAX_CLASSES = 2**16
"""A class number beyond is a slip or another kind of number; a classifier would have an output for each."""

_LOOKED_AT = 2048
"""At least so many images of a set, evenly spaced, are asked for colours, or all."""
Fingerprint = dict[str, str | int | float | bool]


class EncodedImages(Protocol):
    """Pictures as files hold them. Reading may fail with `OSError`; everything else is decided by the decoders."""

    def __len__(self) -> int: ...

    def where(self, picture: int) -> str:
        """The file (or the database and key) as a person would look for it."""
        ...

    def read(self, picture: int) -> bytes:
        """The encoded bytes; may raise `OSError`."""
        ...

    def digest(self, *, skip_unreadable: bool) -> str:
        """SHA-256 over everything that `read` returns, and the names. Raises `DataError`."""
        ...


class ImageDataset(ABC):
    """N pictures, seen as images of one size. With `horizontal_flip`, index i + N is the mirror image of index i.

    Attributes:
        name: what it was opened as.
        labels: int64 [len(self)], or None.
        num_classes: classes that the labels count, 0 without labels.
        num_pictures: pictures before the flip doubles them.
        bad_images: what opening the dataset had to leave out (only with `skip_bad_images`).
    """

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        num_pictures: int,
        *,
        labels: np.ndarray | None = None,
        num_classes: int | None = None,
        skip_bad_images: bool = False,
        bad_images: tuple[BadImage, ...] = (),
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.num_pictures = num_pictures
        self.skip_bad_images = skip_bad_images
        self.bad_images = bad_images
        if labels is None:
            self.labels: np.ndarray | None = None
            self.num_classes = 0
        else:
            labels = np.asarray(labels, dtype=np.int64)
            if labels.min(initial=0) < 0 or labels.max(initial=0) >= MAX_CLASSES:
                extremes = f"{labels.min()} to {labels.max()}"
                raise DataError(f"{name}: has labels from {extremes}; number the classes from 0 to {MAX_CLASSES - 1}")
            self.labels = np.concatenate([labels, labels]) if preprocessing.horizontal_flip else labels
            self.num_classes = int(labels.max()) + 1 if num_classes is None else num_classes

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.preprocessing.image_size

    def __len__(self) -> int:
        return self.num_pictures * (2 if self.preprocessing.horizontal_flip else 1)

    def pictures(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices int64 [n] → the pictures that they show, int64 [n], and whether they are mirrored, bool [n]."""
        return indices % self.num_pictures, indices >= self.num_pictures

    def fingerprint(self) -> Fingerprint:
        """Everything that decides the images, flat. Equal fingerprints mean the same images in the same order."""
        labels = "none" if self.labels is None else hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        return {
            "dataset": self.name,
            "content_sha256": self._digest(),
            "labels_sha256": labels,
            "count": len(self),
            "image_size": self.image_size,
            "center_crop": self.preprocessing.center_crop or "none",
            "horizontal_flip": self.preprocessing.horizontal_flip,
            "resize_filter": self._resize_filter(),
            "range": "[-1, 1]",
        }

    def _resize_filter(self) -> str:
        return RESIZE_FILTER

    @abstractmethod
    def _digest(self) -> str:
        """SHA-256 of the content, in hexadecimal."""


class ArrayDataset(ImageDataset):
    """Images in memory, already cropped and resized.

    Args:
        images: uint8 [N, image_size, image_size, 3], C-contiguous.
        resize_filter: which filter made them; "none" if they came in their final size.
    """

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        images: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        num_classes: int | None = None,
        resize_filter: str = "none",
    ) -> None:
        size = preprocessing.image_size
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be uint8 [N, {size}, {size}, 3], not {images.dtype} {list(images.shape)}")
        if len(images) == 0:
            raise DataError(f"dataset {name!r} holds no images")
        super().__init__(name, preprocessing, len(images), labels=labels, num_classes=num_classes)
        self.images = np.ascontiguousarray(images)
        self._filter = resize_filter
        self._sha256: str | None = None

    def is_grey(self) -> bool:
        """Whether no image has a colour: all three channels are equal everywhere. Of many images a share is asked."""
        red, green, blue = np.moveaxis(self.images[:: max(1, len(self.images) // _LOOKED_AT)], 3, 0)
        return bool((red == green).all() and (green == blue).all())

    def _resize_filter(self) -> str:
        return self._filter

    def _digest(self) -> str:
        if self._sha256 is None:
            digest = hashlib.sha256(f"uint8 {list(self.images.shape)}".encode())
            digest.update(self.images.reshape(-1).data)
            self._sha256 = digest.hexdigest()
        return self._sha256


class EncodedDataset(ImageDataset):
    """Pictures in files or a database; the loaders decode, crop and resize them on the way."""

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        files: EncodedImages,
        *,
        labels: np.ndarray | None = None,
        num_classes: int | None = None,
        skip_bad_images: bool = False,
        bad_images: tuple[BadImage, ...] = (),
    ) -> None:
        super().__init__(
            name,
            preprocessing,
            len(files),
            labels=labels,
            num_classes=num_classes,
            skip_bad_images=skip_bad_images,
            bad_images=bad_images,
        )
        self.files = files

    def fingerprint(self) -> Fingerprint:
        """Everything that decides the images, the conventions of decoding included."""
        decoding: Fingerprint = {
            "orientation": "exif or xmp",
            "alpha": "over white",
            "skip_bad_images": self.skip_bad_images,
        }
        return super().fingerprint() | decoding

    def _digest(self) -> str:
        return self.files.digest(skip_unreadable=self.skip_bad_images)
