"""The DALI backend: decoding, crop, antialiased resize, normalisation and layout in one DALI pipeline.

The order of the images, the batches and the shards are decided by `ImageLoader`; DALI is fed through
`external_source` in batch mode, whose last short batch is kept (in sample mode it would be dropped).
A pipeline lives for one epoch: building one takes milliseconds, and an abandoned epoch leaves nothing behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.dataset import ArrayDataset, EncodedDataset, ImageDataset
from pipelines.device import usable_cpus
from pipelines.errors import BadImage
from pipelines.loading.torch_loader import is_range
from pipelines.pixels import HALF

BLOCK_BYTES = 2**21
"""Bytes of in-memory pictures per DALI run."""
PREFETCH = 2
"""Batches that are prepared ahead of the one in use."""


def run(
    dataset: ImageDataset,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int | None,
    bad_images: dict[int, BadImage],
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Yield (images, indices) for every batch of indices; `bad_images` collects what is skipped, by picture."""
    if isinstance(dataset, ArrayDataset):
        yield from _arrays(dataset, batches, device, workers)
    elif isinstance(dataset, EncodedDataset):
        from pipelines.loading.dali_files import FileDecoder

        yield from FileDecoder(dataset, device, workers, bad_images).run(batches)
    else:
        raise TypeError(f"unknown kind of dataset: {type(dataset).__name__}")


def pipeline_arguments(device: torch.device, batch_size: int, workers: int | None) -> dict[str, Any]:
    """Arguments of a pipeline for this device; without a driver, only `device_id=None` can be built."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return {
        "batch_size": batch_size,
        "num_threads": num_threads(workers),
        "device_id": device_id,
        "prefetch_queue_depth": PREFETCH,
    }


def num_threads(workers: int | None) -> int:
    """Decoding threads: what the caller asks for, or one per CPU that this process may use."""
    return workers or usable_cpus()


def normalise(images: Any, mirrored: Any, layout: str = "CHW", **crop: Any) -> Any:
    """DALI nodes: uint8 HWC → float32 CHW in [-1, 1], mirrored where int32 `mirrored` is 1."""
    scale: Any = {"mean": [HALF] * 3, "std": [HALF] * 3, "dtype": types.DALIDataType.FLOAT}
    return fn.crop_mirror_normalize(images, mirror=mirrored, output_layout=layout, **scale, **crop)


@pipeline_def
def array_pipeline(source: Callable[[], tuple[np.ndarray, np.ndarray]], on_gpu: bool) -> Any:
    """uint8 [n, H, W, 3] and int32 [n] → float32 [n, 3, H, W]; the arrays are read where they lie."""
    images, mirrored = fn.external_source(source=source, num_outputs=2, batch=True, no_copy=True, layout=["HWC", ""])
    return normalise(images.gpu() if on_gpu else images, mirrored)


@pipeline_def
def sequence_pipeline(source: Callable[[], np.ndarray], on_gpu: bool) -> Any:
    """uint8 [1, n, H, W, 3] → float32 [1, n, 3, H, W]: as one video, which costs DALI one task and not n."""
    images = fn.external_source(source=source, batch=True, no_copy=True, layout="FHWC")
    return normalise(images.gpu() if on_gpu else images, 0, layout="FCHW")


def _arrays(
    dataset: ArrayDataset, batches: list[np.ndarray], device: torch.device, workers: int | None
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Several batches go through DALI at a time: a run of a pipeline costs as much as a batch of small images."""
    per_batch = max(map(len, batches))
    together = max(1, BLOCK_BYTES // (per_batch * max(dataset.images[0].nbytes, 1)))
    blocks = [np.concatenate(batches[first : first + together]) for first in range(0, len(batches), together)]
    feed = (_array_block(dataset, indices) for indices in blocks)
    on_gpu = device.type == "cuda"
    if dataset.preprocessing.horizontal_flip:
        arguments = pipeline_arguments(device, max(map(len, blocks)), workers)
        pipeline = array_pipeline(lambda: next(feed), on_gpu, **arguments)
    else:
        arguments = pipeline_arguments(device, 1, workers)
        pipeline = sequence_pipeline(lambda: next(feed)[0][np.newaxis], on_gpu, **arguments)
    remaining = iter(batches)
    with OutputCollector(device) as collect:
        for block in blocks:
            (output,) = pipeline.run()
            images = collect(output).view(len(block), 3, *dataset.images.shape[1:3])
            start = 0
            while start < len(block):
                indices = next(remaining)
                yield images[start : start + len(indices)], indices
                start += len(indices)


def _array_block(dataset: ArrayDataset, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pictures, mirrored = dataset.pictures(indices)
    chosen = slice(pictures[0], pictures[-1] + 1) if is_range(pictures) else pictures
    return dataset.images[chosen], mirrored.astype(np.int32)


class OutputCollector:
    """Turns DALI's outputs into tensors that stay valid for as long as the caller keeps them.

    On a CPU the tensor shares (and owns) DALI's memory. On CUDA it is copied on the current stream, and DALI's buffer
    is held until that copy is known to be over, which is no wait after `PREFETCH` more outputs. Used in a `with` block:
    at its end all copies are over, before the next pipeline gets the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()

    def __enter__(self) -> OutputCollector:
        return self

    def __exit__(self, *_: object) -> None:
        self._release(0)

    def _release(self, keep: int) -> None:
        while len(self._held) > keep:
            self._held.popleft()[0].synchronize()

    def __call__(self, output: Any) -> torch.Tensor:
        """TensorList of n images → float32 [n, 3, H, W] on the device."""
        shared = torch.from_dlpack(output.as_tensor())
        if self.device.type != "cuda":
            return shared
        images = shared.clone()
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(shared.device))  # which cloned it
        self._held.append((event, output))
        self._release(PREFETCH)
        return images
