"""Fixtures that all test folders share: small extractors with lively features, and images."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.visiting import enliven
from oracle import tapped
from torch import Tensor, nn

from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor

_KERNELS = Path(__file__).parent / "kernels"


def pytest_configure(config: pytest.Config) -> None:
    """Signals as a terminal leaves them, and cores shared between pytest-xdist's processes.

    What starts the tests in the background may have signals ignored; threads that wait for one another cost most of a
    test.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, skip what needs one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("requires_gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is not marked `requires_gpu` sees no CUDA device, in its fixtures and in the commands that it starts.

    So it is the same test on every machine. Those of the kernels choose their device themselves.
    """
    if item.get_closest_marker("requires_gpu") or _KERNELS in item.path.parents:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


class TinyResidual(nn.Module):
    """All that the named extractors have, small: BatchNorm, pooling, an identity shortcut, a shortcut with a
    convolution, a stride; odd channel counts. Images must be 8×8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2, self.bn2 = nn.Conv2d(7, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.conv3, self.bn3 = nn.Conv2d(7, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv4, self.bn4 = nn.Conv2d(7, 10, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(10)
        self.shortcut = nn.Sequential(nn.Conv2d(7, 10, 1, stride=2, bias=False), nn.BatchNorm2d(10))
        self.pool = nn.MaxPool2d(2)
        self.conv5 = nn.Conv2d(10, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        x = F.relu(self.bn4(self.conv4(x)) + self.shortcut(x))
        return F.relu(self.conv5(self.pool(x)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whatever runs before it."""
    torch.manual_seed(20190)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nothing is found in a cache, and nothing is left in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GFMN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_extractor() -> Extractor:
    """`TinyResidual` tapped: 5 taps, D = 1,544, float32, 8×8 images. Not to be changed; copy it."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        # Of a few seeds the one whose gradients cancel least, so that a mistake stands out from low precision.
        return tapped(enliven(TinyResidual(), torch.Generator().manual_seed(13)), image_size=8)


@pytest.fixture(scope="session")
def built_extractor() -> Callable[[str], Extractor]:
    """`build_extractor(name, image_size=8)` with fixed random weights, made once for each name. Not to be changed."""
    made: dict[str, Extractor] = {}

    def build(name: str) -> Extractor:
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(11)
                made[name] = build_extractor(name, image_size=8)
        return made[name]

    return build


@pytest.fixture
def draw_images() -> Callable[..., Tensor]:
    """`draw_images(count, dtype=float64, size=8)`: smooth random images in [-1, 1], different at every call."""

    def draw(count: int, dtype: torch.dtype = torch.float64, size: int = 8) -> Tensor:
        coarse = torch.randn(count, 3, size // 4 or 1, size // 4 or 1, dtype=torch.float64)
        smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
        return torch.tanh(smooth + 0.3 * torch.randn(count, 3, size, size, dtype=torch.float64)).to(dtype)

    return draw
