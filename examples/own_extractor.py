"""Features of a network of one's own: any PyTorch module with ReLU, ReLU6, SiLU or GELU that torch.fx can trace.

    python examples/own_extractor.py [samples.png]

Here it is a small classifier of the digits, trained for some seconds. What it has learnt to see, the generator then
learns to draw. So few steps leave smudges; with `--steps 300` they take the shapes of digits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import MomentMatching, NoAverage, build_extractor
from engine.comparison.reference.statistics_pass import compute_reference
from engine.comparison.reference.target import MomentsKind
from engine.generation.networks import build_generator
from engine.generation.priors import Gaussian, Noise
from engine.methods.matching import Matching
from engine.support.pixels import grid, save_png, to_float
from pipelines import ImageDataset, ImageLoader, open_dataset, read_pixels


class Mine(nn.Module):
    """A residual network that knows nothing of this engine: images [N, 3, 32, 32] in [-1, 1] to 10 scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(32 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.block(x))
        x = self.relu(self.down(x))
        return self.head(x.flatten(1))


def learn_to_read(network: nn.Module, digits: ImageDataset, steps: int) -> float:
    """Train a classifier; returns the share of right answers in the last minibatch."""
    images, labels = to_float(read_pixels(digits, backend="torch")), torch.from_numpy(digits.labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        scores = network(images[chosen])
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores, labels[chosen]).backward()
        optimizer.step()
    return float((scores.argmax(1) == labels[chosen]).float().mean())


def main() -> None:
    """Classifier → extractor → target → generator."""
    parser = argparse.ArgumentParser(description="Match the features of a network of one's own.")
    parser.add_argument("picture", nargs="?", default="samples.png", help="PNG file to write (default: samples.png)")
    parser.add_argument("--steps", type=int, default=60, help="training steps of the generator (default: 60)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    digits = open_dataset("digits", image_size=32)
    network = Mine()
    print(f"classifier: {learn_to_read(network, digits, 100):.0%} of the last minibatch right")

    # A frozen copy; every activation is a tap. `taps="mine.relu*"` or `layers=2` would choose among them.
    extractor = build_extractor("mine", module=network, image_size=32)
    print("taps:", ", ".join(f"{tap.name} {tap.shape}" for tap in extractor.taps))

    # One pass over all images. Its result can be saved; its fingerprint says what it was computed from.
    loader = ImageLoader(digits, 256, backend="torch")
    target = compute_reference(MomentsKind(), extractor, loader, kernels="reference", progress=False)
    print(f"target: {target}")

    # Without an averager the loss is Σ Δ² itself, which falls as one expects. For good images in a long training take
    # AMA; for speed leave out `kernels`, which compiles fused ones first.
    objective = MomentMatching(extractor, target, NoAverage(), kernels="reference")
    generator = build_generator("dcgan", image_size=32)
    method = Matching(generator, Gaussian(100), objective, batch_size=32, lr=1e-3)
    noise = Noise(seed=0)
    losses = [float(method.step(None, noise)["loss"]) for _ in range(arguments.steps)]
    print(f"loss: {losses[0]:.1f} at step 1, {losses[-1]:.1f} at step {len(losses)}")
    save_png(Path(arguments.picture), grid(method.sampler().draw(64, seed=1), columns=8))


if __name__ == "__main__":
    main()
