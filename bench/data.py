"""`python -m bench.data`: images/s of the loaders, and what the statistics pass adds to the extractor.

Three comparisons, each of results that are checked to agree before anything is timed:

- a folder of 178×218 JPEGs → centre crop 160 → 64×64: the DALI path against torchvision and PIL in a `DataLoader`
  with 2 workers;
- 32×32 images in memory, in order and shuffled, through `ImageLoader`;
- the statistics pass over images in memory against the extractor alone on the same images.

With `--device cuda` the images end on the GPU, where the DALI path decodes and resizes them, too, and where the
extractor runs; torchvision's path stays on the CPU.

Repetitions are interleaved, so that what else the machine does hits all alike; medians with 20th and 80th percentiles.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, which takes seconds
    from engine.training.stopping import exit_on_interrupt

    exit_on_interrupt()

import argparse
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.rows import Row, RowFile, environment, percentiles, print_rows, rounds, save_figure, seconds
from bench.scenario import activations_pass
from engine.comparison.reference.statistics_pass import compute_reference
from engine.comparison.reference.target import MomentsKind
from engine.configuration.command import Parser, check_two_files, output_file, run_command
from engine.configuration.inputs import choose_device
from engine.representation.build import build_extractor
from pipelines import ImageDataset, ImageLoader, open_dataset
from pipelines.loading.loader import dali_is_importable

HEIGHT, WIDTH, CROP, SIZE = 218, 178, 160, 64
WORKERS = 2
PASS_BATCH = 128  # twice the usual minibatch, as engine.train's own pass


@dataclass(frozen=True)
class LoadingRow(Row):
    """One way to read images. Times are per repetition: wall clock in images/s, CPU of all processes in µs/image.

    Attributes:
        path: the way that the images take.
        relative_time: median wall time, divided by that of the baseline, the first way.
    """

    op: str
    path: str
    shape: str
    images: int
    repetitions: int
    images_per_second_p20: float
    images_per_second_p50: float
    images_per_second_p80: float
    cpu_us_per_image: float
    relative_time: float

    def cells(self) -> dict[str, object]:
        """Rates with their percentiles, and the time that the CPU spent."""
        p20, p50, p80 = self.images_per_second_p20, self.images_per_second_p50, self.images_per_second_p80
        return {
            "what": f"{self.op}, {self.shape}",
            "way": self.path,
            "images/s, median (p20–p80)": f"{p50:,.0f} ({p20:,.0f}–{p80:,.0f})",
            "CPU µs/image": f"{self.cpu_us_per_image:,.1f}",
            "time / first row's": f"{self.relative_time:.3f}",
        }


@dataclass
class Way:
    """One way to do the same work: `run` returns how many images it has seen."""

    path: str
    run: Callable[[], int]


class _Pictures(Dataset[Tensor]):
    """What most people write: PIL, torchvision's transforms, one file at a time."""

    def __init__(self, folder: Path):
        from torchvision import transforms

        self.paths = sorted(folder.iterdir())
        self.transform = transforms.Compose(
            [
                transforms.CenterCrop(CROP),
                transforms.Resize(SIZE),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as picture:
            return self.transform(picture.convert("RGB"))


def make_folder(folder: Path, count: int) -> None:
    """JPEGs of CelebA's aligned size, cut from the photographs that scikit-learn carries."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    for n in range(count):
        photo = photos[n % len(photos)]
        top, left = 37 * n % (photo.shape[0] - HEIGHT), 53 * n % (photo.shape[1] - WIDTH)
        picture = Image.fromarray(photo[top : top + HEIGHT, left : left + WIDTH])
        picture.save(folder / f"{n:06d}.jpg", quality=90)


def make_arrays(path: Path, count: int, size: int = 32) -> ImageDataset:
    """Pieces of the same photographs as one array file."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    pieces = []
    for n in range(count):
        photo = photos[n % len(photos)]
        top, left = 7 * n % (photo.shape[0] - size), 11 * n % (photo.shape[1] - size)
        pieces.append(photo[top : top + size, left : left + size])
    np.save(path, np.stack(pieces))
    return open_dataset("images", path, image_size=size)


def compare_ways(
    op: str, shape: str, ways: Sequence[Way], repetitions: int, device: str = "cpu"
) -> Iterator[list[LoadingRow]]:
    """Time all ways in turn, `repetitions` times; the first one is the baseline. The rows so far, after every round.

    Raises RuntimeError if they have not seen the same number of images.
    """
    counts = {way.path: way.run() for way in ways}  # warm, and not timed
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"{op}: the ways saw different numbers of images: {counts}")
    images = next(iter(counts.values()))
    calls = {way.path: way.run for way in ways}
    where = environment(device)
    for times in rounds(calls, repetitions, partial(_wall_and_cpu_seconds, device=device)):
        baseline = statistics.median(wall for wall, _ in times[ways[0].path])
        rows = []
        for way in ways:
            p20, p50, p80 = percentiles([wall for wall, _ in times[way.path]])
            rows.append(
                LoadingRow(
                    op=op,
                    path=way.path,
                    shape=shape,
                    images=images,
                    repetitions=len(times[way.path]),
                    images_per_second_p20=images / p80,  # the slowest times are the lowest rates
                    images_per_second_p50=images / p50,
                    images_per_second_p80=images / p20,
                    cpu_us_per_image=statistics.median(cpu for _, cpu in times[way.path]) / images * 1e6,
                    relative_time=p50 / baseline,
                    environment=where,
                )
            )
        yield rows


def bench_jpegs(work: Path, count: int, repetitions: int, device: str) -> Iterator[list[LoadingRow]]:
    """The engine's loaders against torchvision's on one folder."""
    folder = work / "jpegs"
    folder.mkdir()
    make_folder(folder, count)
    dataset = open_dataset("celeba", folder, image_size=SIZE)
    theirs = DataLoader(_Pictures(folder), batch_size=64, num_workers=WORKERS)
    ways = [Way("torchvision DataLoader, PIL, 2 workers", lambda: sum(map(len, theirs)))]
    for backend in ("dali", "torch"):
        if backend == "torch" or dali_is_importable():
            ours = ImageLoader(dataset, 64, backend=backend, device=device)
            check_same(theirs, ours)
            ways.append(Way(f"ImageLoader, {backend}{_to(device)}", partial(_epoch, ours)))
    return compare_ways("JPEG folder", f"{WIDTH}×{HEIGHT} → {CROP} → {SIZE}", ways, repetitions, device)


def bench_arrays(work: Path, count: int, repetitions: int, device: str) -> Iterator[list[LoadingRow]]:
    """Images in memory through `ImageLoader`."""
    dataset = make_arrays(work / "arrays.npy", count)
    loaders = {
        f"ImageLoader, in order{_to(device)}": ImageLoader(dataset, 64, device=device),
        f"ImageLoader, shuffled{_to(device)}": ImageLoader(dataset, 64, shuffle=True, device=device),
    }
    if dali_is_importable():
        loaders[f"ImageLoader, in order, dali{_to(device)}"] = ImageLoader(dataset, 64, backend="dali", device=device)
    pixels = np.load(work / "arrays.npy")
    for loader in loaders.values():
        batch = next(iter(loader))
        expected = pixels[batch.indices.numpy()].transpose(0, 3, 1, 2) / 127.5 - 1
        if np.abs(batch.images.cpu().numpy() - expected).max() > 1e-6:
            raise RuntimeError("arrays: the loader gives other images than the array holds")
    ways = [Way(path, partial(_epoch, loader)) for path, loader in loaders.items()]
    return compare_ways("arrays in memory", "32×32", ways, repetitions, device)


def bench_pass(
    work: Path, count: int, repetitions: int, extractor_name: str, device: str
) -> Iterator[list[LoadingRow]]:
    """The whole statistics pass against the extractor alone, activations included, on the same batches in memory."""
    torch.manual_seed(0)
    dataset = make_arrays(work / "pass.npy", count)
    extractor = build_extractor(extractor_name, image_size=32).to(device)
    activate = activations_pass(extractor)
    batches = [batch.images for batch in ImageLoader(dataset, PASS_BATCH, device=device)]

    def alone() -> int:
        for batch in batches:
            activate(batch)
        return count

    def whole() -> int:
        loader = ImageLoader(dataset, PASS_BATCH, device=device)
        return compute_reference(MomentsKind(), extractor, loader, progress=False).count

    return compare_ways(
        f"statistics pass, {extractor_name}",
        "32×32",
        [Way(f"extractor alone, images in memory{_to(device)}", alone), Way(f"compute_target{_to(device)}", whole)],
        repetitions,
        device,
    )


def _to(device: str) -> str:
    return "" if device == "cpu" else f", {device}"


def _epoch(loader: ImageLoader) -> int:
    return sum(len(batch.images) for batch in loader)


def check_same(theirs: Any, ours: ImageLoader) -> None:
    """RuntimeError if any image differs by more than 0.5 of 255 on average, or the numbers of images differ."""
    reference = torch.cat(list(theirs))
    images = torch.cat([batch.images.cpu() for batch in ours])
    if images.shape != reference.shape:
        raise RuntimeError(f"JPEG folder: {list(images.shape)} instead of {list(reference.shape)}")
    worst = float((images - reference).abs().mean(dim=(1, 2, 3)).max()) * 127.5
    if worst > 0.5:
        raise RuntimeError(f"JPEG folder: an image of {ours.backend} differs by {worst:.2f} of 255 on average")


def _wall_and_cpu_seconds(call: Callable[[], object], device: str) -> tuple[float, float]:
    used = _cpu_seconds()
    wall = seconds(call, device)
    return wall, _cpu_seconds() - used


def _cpu_seconds() -> float:
    """Used so far by this process and by its children that have ended."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def plot(path: Path, rows: Sequence[LoadingRow]) -> None:
    """Draw images/s of all ways, one panel for each comparison, with p20 and p80 as whiskers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row.op for row in rows))
    figure = Figure(figsize=(9, 1.9 * len(ops)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, op in zip(figure.subplots(len(ops), 1, squeeze=False)[:, 0], ops):
        chosen = [row for row in rows if row.op == op]
        middle = np.array([row.images_per_second_p50 for row in chosen])
        below = middle - [row.images_per_second_p20 for row in chosen]
        above = [row.images_per_second_p80 for row in chosen] - middle
        axes.barh([row.path for row in chosen], middle, xerr=[below, above], color="#4c72b0", capsize=3)
        axes.invert_yaxis()
        axes.set_title(f"{op}, {chosen[0].shape}", fontsize=10)
        axes.set_xlabel("images/s")
    save_figure(path, figure, dpi=120)


def parser() -> Parser:
    """The flags of `python -m bench.data`."""
    arguments = Parser(
        prog="python -m bench.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = arguments.add_argument
    add("--json", type=output_file, metavar="FILE", help="write the rows there")
    add("--plot", type=output_file, metavar="FILE", help="draw them there (PNG)")
    add("--jpegs", type=int, default=5000, metavar="N", help="of the folder (default: %(default)s)")
    add("--jpeg-repetitions", type=int, default=7, metavar="N", help="of the folder (default: %(default)s)")
    add("--pass-images", type=int, default=12_800, metavar="N", help="for the statistics pass (default: %(default)s)")
    add(
        "--only", nargs="+", choices=("jpeg", "arrays", "pass"), default=("jpeg", "arrays", "pass"),
        help="of the three comparisons (default: all)",
    )  # fmt: skip
    add("--pass-repetitions", type=int, default=5, metavar="N", help="of the statistics pass (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where the images go (default: %(default)s)")
    add("--quick", action="store_true", help="small inputs, few repetitions: a try, not a measurement")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write what --json and --plot ask for, print the tables."""
    args = parser().parse_args(argv)
    check_two_files(args, "json", "plot")
    choose_device(args.device)  # refuses what is not there
    quick = args.quick
    rows: list[LoadingRow] = []
    with tempfile.TemporaryDirectory() as folder, RowFile(args.json) as file:
        work, device = Path(folder), args.device
        if "jpeg" in args.only:
            count, repetitions = (130, 2) if quick else (args.jpegs, args.jpeg_repetitions)
            rows += file.keep_latest(bench_jpegs(work, count, repetitions, device))
        if "arrays" in args.only:
            rows += file.keep_latest(bench_arrays(work, 1000 if quick else 50_000, 3 if quick else 15, device))
        if "pass" in args.only:
            name = "vgg-small" if quick else "vgg19+resnet18"
            count, repetitions = (64, 2) if quick else (args.pass_images, args.pass_repetitions)
            rows += file.keep_latest(bench_pass(work, count, repetitions, name, device))
    if args.plot is not None:
        plot(args.plot, rows)
    print_rows(rows)


if __name__ == "__main__":
    run_command(main)
