"""DALI over encoded pictures: threads read the files ahead, DALI decodes what is plain, PIL the rest.

DALI gets bytes instead of file names, so that one bad file costs one line: the headers are read before DALI sees them
(`decoding.pil.size_if_plain`), anything unusual or suspicious goes to PIL in the reading threads, and if DALI still
fails, or paints the end of a JPEG grey, PIL tells which file is bad.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.dataset import EncodedDataset
from pipelines.decoding.pil import load, say_first_frame, size_if_plain
from pipelines.decoding.preprocessing import Geometry
from pipelines.errors import BadImage, DataError, one_line
from pipelines.loading.dali_loader import OutputCollector, normalise, num_threads, pipeline_arguments
from pipelines.loading.torch_loader import normalise as normalise_arrays

CHUNK_IMAGES = 64
"""Most pictures that DALI decodes at once; the user's batches are put together from such chunks."""
CHUNK_PIXELS = 2**26
"""Most decoded pixels in one chunk (192 MiB), so that a folder of large photographs does not fill the memory."""

_MISSING = 128
"""libjpeg's grey in place of missing data: all three colours of a pixel."""

log = logging.getLogger("gfmn")


class Plain(NamedTuple):
    """A picture for DALI: its encoded bytes (uint8 [bytes]), its (height, width), and where its pixels go."""

    encoded: np.ndarray
    shape: tuple[int, int]
    geometry: Geometry

    def place(self, image_size: int, center_crop: int | None) -> tuple[float, float]:
        """DALI's (x, y) of the one crop that is cut: the offset as a share of the room that the crop leaves."""
        if center_crop is None:
            (top, left), (height, width), side = self.geometry.offset, self.geometry.resized, image_size
        else:
            (top, left), (height, width), side = self.geometry.crop[:2], self.shape, center_crop
        return left / max(width - side, 1), top / max(height - side, 1)


@dataclass
class Chunk:
    """Consecutive images of one batch: for each index what DALI decodes, what PIL has decoded, or what is wrong."""

    indices: np.ndarray
    samples: list[Plain | np.ndarray | BadImage]
    ends_batch: bool

    @property
    def plain(self) -> list[Plain]:
        """The samples that DALI decodes."""
        return [sample for sample in self.samples if isinstance(sample, Plain)]


@pipeline_def
def file_pipeline(source: Callable[[], tuple[Any, ...]], size: int, center_crop: int | None, decoder: str) -> Any:
    """Encoded pictures → float32 [n, 3, size, size], and the last decoded pixel of each, uint8 [n, 1, 1, 3].

    Sizes and offsets come from `Preprocessing.geometry`.
    """
    encoded, mirrored, sizes, x, y = fn.external_source(source=source, num_outputs=5, batch=True, no_copy=True)
    options: Any = {"device": decoder, "output_type": types.DALIImageType.RGB, "adjust_orientation": False}
    if decoder == "mixed":
        # As the CPU upsamples colour, and by CUDA alone: the hardware decoder takes a share that depends on the batch.
        options |= {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0}
    resize: Any = {"size": sizes, "interp_type": types.DALIInterpType.INTERP_LINEAR, "antialias": True}
    if center_crop is None:
        pictures = fn.decoders.image(encoded, **options)
        place: Any = {"crop": (size, size), "crop_pos_x": x, "crop_pos_y": y}
    else:
        crop = (center_crop, center_crop)
        pictures = fn.decoders.image_crop(encoded, crop=crop, crop_pos_x=x, crop_pos_y=y, **options)
        place = {}
    last = fn.crop(pictures, crop=(1, 1), crop_pos_x=1.0, crop_pos_y=1.0)
    return normalise(fn.resize(pictures, **resize), mirrored, **place), last


class FileDecoder:
    """One epoch of an `EncodedDataset` through DALI.

    Args:
        dataset: what to read.
        device: where the images go; JPEGs are decoded there if it is a CUDA device.
        workers: threads, for reading and again for decoding; None is one per CPU.
        bad_images: collects what is skipped, by picture.
    """

    def __init__(
        self, dataset: EncodedDataset, device: torch.device, workers: int | None, bad_images: dict[int, BadImage]
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.workers = workers
        self.bad_images = bad_images
        self._upcoming: Chunk | None = None
        self._chunks: Iterator[Chunk] = iter(())
        self._fed: deque[Chunk] = deque()
        self._animations: list[str] = []
        self._pool = ThreadPoolExecutor(num_threads(workers))

    def run(self, batches: list[np.ndarray]) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield (images, indices) for every batch of indices, in order.

        Raises:
            DataError: names the first file that cannot be used, unless the dataset skips bad images.
        """
        try:
            self._chunks = self._read_ahead(batches)
            parts: list[tuple[torch.Tensor, np.ndarray]] = []
            with OutputCollector(self.device) as collect:
                for chunk, output in self._decoded(collect):
                    say_first_frame(self._animations)
                    parts.append(self._assemble(chunk, output))
                    if chunk.ends_batch:
                        images, indices = zip(*parts, strict=True)
                        yield (images[0] if len(images) == 1 else torch.cat(images)), np.concatenate(indices)
                        parts = []
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _read_ahead(self, batches: list[np.ndarray]) -> Iterator[Chunk]:
        """Chunks in order, prepared by the threads a few chunks before they are needed."""
        jobs: deque[tuple[Future[list[Plain | np.ndarray | BadImage]], np.ndarray, bool]] = deque()
        for indices in batches:
            for start in range(0, len(indices), CHUNK_IMAGES):
                part = indices[start : start + CHUNK_IMAGES]
                ends_batch = start + CHUNK_IMAGES >= len(indices)
                jobs.append((self._pool.submit(self._prepare, part), part, ends_batch))
                if len(jobs) > num_threads(self.workers) + 1:
                    yield from _split(*_result(jobs.popleft()))
        while jobs:
            yield from _split(*_result(jobs.popleft()))

    def _prepare(self, indices: np.ndarray) -> list[Plain | np.ndarray | BadImage]:
        """Read the pictures of one chunk, and decode those that DALI should not see."""
        samples: list[Plain | np.ndarray | BadImage] = []
        for picture in self.dataset.pictures(indices)[0].tolist():
            try:
                data = self.dataset.files.read(picture)
                size = size_if_plain(data)
                if size is None:
                    samples.append(self._load(picture, data))
                else:
                    geometry = self.dataset.preprocessing.geometry(*size)
                    samples.append(Plain(np.frombuffer(data, np.uint8), size, geometry))
            except (DataError, OSError) as error:
                samples.append(BadImage(self.dataset.files.where(picture), one_line(error)))
        return samples

    def _decoded(self, collect: OutputCollector) -> Iterator[tuple[Chunk, torch.Tensor | None]]:
        """Every chunk with the images that DALI made of its plain pictures (None if it has none)."""
        size, crop = self.dataset.image_size, self.dataset.preprocessing.center_crop
        decoder = "mixed" if self.device.type == "cuda" else "cpu"
        arguments = pipeline_arguments(self.device, CHUNK_IMAGES, self.workers)
        pipeline = None
        self._upcoming = next(self._chunks, None)
        while self._upcoming is not None or self._fed:
            if not self._fed and self._upcoming is not None and not self._upcoming.plain:
                yield self._advance(), None
                continue
            try:
                pipeline = pipeline or file_pipeline(self._feed, size, crop, decoder, **arguments)
                output, last = pipeline.run()
            except StopIteration:  # all that was fed is out, and what comes next is not for DALI
                if pipeline is not None:
                    pipeline.reset()
            except RuntimeError as error:
                if not self._fed:  # it has seen no picture
                    line = f"NVIDIA DALI does not start here ({one_line(error)}); the loader 'torch' does without it"
                    raise DataError(line, "loader") from None
                pipeline = None
                self._explain(error)
                while self._fed:
                    yield self._fed.popleft(), None
            else:
                chunk = self._fed.popleft()
                yield chunk, self._without_damaged(chunk, collect(output), last.as_cpu().as_array())

    def _advance(self) -> Chunk:
        """The upcoming chunk; the one after it becomes the upcoming one."""
        chunk = self._upcoming
        assert chunk is not None
        self._upcoming = next(self._chunks, None)
        return chunk

    def _feed(self) -> tuple[Any, ...]:
        """DALI calls this for its next chunk; the chunk keeps the bytes alive until its images are out."""
        if self._upcoming is None or not self._upcoming.plain:
            raise StopIteration
        chunk = self._advance()
        self._fed.append(chunk)
        plain = chunk.plain
        positions = [k for k, sample in enumerate(chunk.samples) if isinstance(sample, Plain)]
        mirrored = self.dataset.pictures(chunk.indices[positions])[1].astype(np.int32)
        size, crop = self.dataset.image_size, self.dataset.preprocessing.center_crop
        x, y = np.array([sample.place(size, crop) for sample in plain], dtype=np.float32).T.copy()
        sizes = np.array([sample.geometry.resized for sample in plain], dtype=np.float32)
        return [sample.encoded for sample in plain], mirrored, sizes, x, y

    def _explain(self, error: RuntimeError) -> None:
        """DALI failed on some of its input: let PIL decode all of it and find the bad files."""
        bad = False
        for chunk in self._fed:
            pictures = self.dataset.pictures(chunk.indices)[0].tolist()
            for k, sample in enumerate(chunk.samples):
                if isinstance(sample, Plain):
                    chunk.samples[k] = loaded = self._load(pictures[k], sample.encoded.tobytes())
                    bad = bad or isinstance(loaded, BadImage)
        if not bad:
            log.warning("DALI could not decode what PIL can, so PIL did (%s)", one_line(error))

    def _without_damaged(self, chunk: Chunk, images: torch.Tensor, last: np.ndarray) -> torch.Tensor:
        """DALI's images of a chunk, without those whose data PIL misses too; the chunk's samples say so.

        PIL is asked about a JPEG whose last pixel, uint8 [n, 1, 1, 3], is the grey of missing data.
        """
        if not (last == _MISSING).all((1, 2, 3)).any():
            return images
        pictures = self.dataset.pictures(chunk.indices)[0].tolist()
        plain = [k for k, sample in enumerate(chunk.samples) if isinstance(sample, Plain)]
        doubtful = [k for k, pixel in zip(plain, last, strict=True) if (pixel == _MISSING).all()]
        data = [chunk.samples[k].encoded.tobytes() for k in doubtful]  # type: ignore[union-attr]
        for k, loaded in zip(doubtful, self._pool.map(self._load, [pictures[k] for k in doubtful], data), strict=True):
            if isinstance(loaded, BadImage):
                chunk.samples[k] = loaded
        return images[[isinstance(chunk.samples[k], Plain) for k in plain]]

    def _load(self, picture: int, data: bytes) -> np.ndarray | BadImage:
        return load(self.dataset, picture, data, animations=self._animations)

    def _assemble(self, chunk: Chunk, output: torch.Tensor | None) -> tuple[torch.Tensor, np.ndarray]:
        """DALI's images and PIL's, in the chunk's order, without the bad ones: (images, indices)."""
        pictures, mirrored = self.dataset.pictures(chunk.indices)
        for picture, sample in zip(pictures.tolist(), chunk.samples, strict=True):
            if isinstance(sample, BadImage):
                if not self.dataset.skip_bad_images:
                    raise sample.error()
                self.bad_images[picture] = sample
        if output is not None and len(output) == len(chunk.samples):
            return output, chunk.indices
        good = [k for k, sample in enumerate(chunk.samples) if not isinstance(sample, BadImage)]
        by_pil = {k: sample for k, sample in enumerate(chunk.samples) if isinstance(sample, np.ndarray)}
        size = self.dataset.image_size
        images = torch.empty((len(good), 3, size, size), device=self.device)
        if output is not None:
            images[[place for place, k in enumerate(good) if k not in by_pil]] = output
        if by_pil:
            arrays = torch.from_numpy(np.stack(list(by_pil.values()))).to(self.device)
            images[[place for place, k in enumerate(good) if k in by_pil]] = normalise_arrays(
                arrays, mirrored[list(by_pil)]
            )
        return images, chunk.indices[good]


def _result(
    job: tuple[Future[list[Plain | np.ndarray | BadImage]], np.ndarray, bool],
) -> tuple[np.ndarray, list[Plain | np.ndarray | BadImage], bool]:
    future, indices, ends_batch = job
    return indices, future.result(), ends_batch


def _split(indices: np.ndarray, samples: list[Plain | np.ndarray | BadImage], ends_batch: bool) -> Iterator[Chunk]:
    """One prepared chunk, cut where its decoded pixels would exceed `CHUNK_PIXELS`."""
    start, pixels = 0, 0
    for k, sample in enumerate(samples):
        add = sample.shape[0] * sample.shape[1] if isinstance(sample, Plain) else 0
        if pixels + add > CHUNK_PIXELS and k > start:
            yield Chunk(indices[start:k], samples[start:k], False)
            start, pixels = k, 0
        pixels += add
    yield Chunk(indices[start:], samples[start:], ends_batch)
