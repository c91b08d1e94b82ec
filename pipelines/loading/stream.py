"""`ImageStream`: the batches of a loader without end, for loops that count steps and not epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from pipelines.errors import DataError
from pipelines.loading.loader import Batch, ImageLoader


class ImageStream:
    """Epoch after epoch of a loader, as one endless iterator whose place a checkpoint can hold.

    The place is two numbers: the next batch is number `position` of epoch `epoch`. With the same data set, batch size,
    seed and `drop_last` they mean the same whatever the number of parts, so what W loaders have shared any other number
    of them can go on with.

    Args:
        loader: this stream's alone. The first batch is the first of the loader's next epoch.

    Raises:
        DataError: an epoch has no batch (`drop_last` leaves out the only one). While iterating: as the loader does, or
            no image of a whole epoch can be used (which a loader that shares its batches does not know).
    """

    def __init__(self, loader: ImageLoader) -> None:
        if len(loader) == 0:
            raise DataError(
                f"batch_size is {loader.batch_size}, and {loader.dataset.name} has {len(loader.dataset)} images; give "
                "a smaller batch"
            )
        self.loader = loader
        self._epoch, self._position = loader.epoch, 0
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> ImageStream:
        return self

    def __next__(self) -> Batch:
        while True:
            if self._batches is None:
                self.loader.epoch = self._epoch
                self._batches = self.loader.batches(self._position)
            batch = next(self._batches, None)
            if batch is not None:
                self._position = self.loader.position
                return batch
            if self._position == 0:
                raise DataError(f"no image of {self.loader.dataset.name} can be used: {self.loader.bad_images[0]}")
            self._epoch, self._position, self._batches = self._epoch + 1, 0, None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The place of the next batch: `epoch` and `position`, int64 []."""
        epochs, position = divmod(self._position, len(self.loader))
        return {"epoch": torch.tensor(self._epoch + epochs), "position": torch.tensor(position)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor | int]) -> None:
        """Go on from the place that `state_dict` gave, of a stream of the same batches with any number of parts.

        Raises KeyError if a number is missing, DataError if an epoch has no such batch.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position < len(self.loader):
            raise DataError(f"there is no batch {position} in epoch {epoch}: an epoch has {len(self.loader)} batches")
        self._epoch, self._position, self._batches = epoch, position, None
