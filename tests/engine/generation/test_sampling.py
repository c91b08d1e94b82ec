"""Images a batch at a time are the images that are drawn at once."""

from __future__ import annotations

import pytest
import torch

from engine.evaluation.image_set import DrawnImages
from engine.generation.networks import build_generator
from engine.generation.priors import MAX_NZ, Gaussian, Uniform, draw_batches, make_prior
from engine.generation.sampling import Sampler
from engine.support.errors import InputError
from engine.support.pixels import to_uint8


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        generator = build_generator("dcgan", image_size=32, nz=5)
    return Sampler(Gaussian(5), generator)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 161])
@pytest.mark.parametrize("nz", [1, 3, 16, 100])
def test_batches_of_z_are_the_rows_of_one_tensor(nz: int, count: int) -> None:
    def random() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    for prior, expected in (
        (Gaussian(nz), torch.randn(count, nz, generator=random())),
        (Uniform(nz), torch.rand(count, nz, generator=random()) * 2 - 1),
    ):
        batches = list(draw_batches(prior, count, 7, 16))
        assert [len(batch) for batch in batches] == [16] * (count // 16) + [count % 16] * (count % 16 > 0)
        assert torch.equal(torch.cat([torch.empty(0, nz), *batches]), expected)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_batches_of_images_are_the_images_of_one_call(sampler: Sampler, batch_statistics: bool) -> None:
    sampler = Sampler(sampler.prior, sampler.generator, batch_statistics)
    count = sampler.batch_size + 3
    drawn = to_uint8(sampler.draw(count, 4))
    batches = list(sampler.pixel_batches(count, 4))
    assert [len(batch) for batch in batches] == [sampler.batch_size, 3]
    assert torch.equal(torch.cat(batches), drawn)
    pixels = sampler.draw_pixels(count, 4)
    assert torch.equal(pixels, drawn.permute(0, 3, 1, 2))
    assert sampler.indivisible == (sampler.batch_size if batch_statistics else 1)
    for part in (slice(0, sampler.batch_size), slice(sampler.batch_size, count), slice(count, count)):
        assert torch.equal(sampler.draw_pixels(count, 4, part), pixels[part])
    rows = sampler.batch_size // 8 + 2
    paths = list(sampler.path_batches(rows, 8, 4))
    assert len(paths) == 2
    assert torch.equal(torch.cat(paths), to_uint8(sampler.draw_paths(rows, 8, 4)))


def test_an_image_of_a_code_depends_on_no_other(sampler: Sampler) -> None:
    """Of batch statistics, which draw random z, there is nothing in it."""
    sampler = Sampler(sampler.prior, sampler.generator, batch_statistics=True)
    codes = sampler.prior.draw(4, 4)
    expected = Sampler(sampler.prior, sampler.generator).images(codes)
    torch.testing.assert_close(torch.cat([sampler.decode(code) for code in codes.split(1)]), expected)
    assert not torch.allclose(sampler.images(codes), expected, atol=1e-2)


def test_larger_images_come_in_smaller_batches_unless_they_depend_on_each_other() -> None:
    sizes = {}
    for side in (32, 64, 128):
        with torch.device("meta"):
            generator = build_generator("dcgan", image_size=side, nz=1)
        sizes[side] = Sampler(Gaussian(1), generator).batch_size * side**2
        assert Sampler(Gaussian(1), generator, batch_statistics=True).batch_size == 256
    assert len(set(sizes.values())) == 1


def test_drawn_images_may_be_read_again_and_hold_one_batch(sampler: Sampler) -> None:
    images = DrawnImages(lambda: sampler.pixel_batches(600, 4), 600, 32)
    expected = sampler.draw_pixels(600, 4)
    for index in (0, *range(600), 0, 599, 300, 299):
        assert torch.equal(images[index], expected[index])
        assert len(images.batch) <= sampler.batch_size


@pytest.mark.parametrize("nz", [-1, 0, MAX_NZ + 1, 10**30])
def test_z_of_absurd_length_is_refused(nz: int) -> None:
    for make in (lambda: make_prior("gaussian", nz), lambda: build_generator("dcgan", image_size=32, nz=nz)):
        with pytest.raises(InputError) as error:
            make()
        assert error.value.argument == "nz"
