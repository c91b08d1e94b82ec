"""The pass over the features, under a criterion that has nothing to do with moments: chunks, memory, ownership.

The in-place rules (`TapSite.owns_input`, `tape.Arriving`) are tried on small networks of every shape that could break
them; the oracle is plain autograd through the untraced network, with hooks on its activations.
"""

from __future__ import annotations

import pytest
import torch
from helpers.criteria import Weighted
from helpers.pass_networks import NETWORKS, Chain, IdentityShortcut, Relu6Chain, SmoothActivations
from oracle import Features, hooked_features, in_float64, relative_error, tapped
from torch import Tensor
from torch.utils._pytree import tree_leaves

from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import Chunk, FeaturePass
from engine.representation.memory_order import FeatureOrder
from engine.representation.protocols import Affine, PerImage, Ranks, TapInput
from engine.representation.tracing.convolutions import FrozenConv2d
from engine.representation.tracing.tape import Tape
from kernels.layout import feature_rows

IMAGES = 5


class Cubes:
    """L = Σ w_nd x_nd³, different for every image and feature: no sum over images, so order mistakes show.

    `weights` [N, D] are in the order of `extractor.features`.
    """

    def __init__(self, extractor: Extractor, weights: Tensor):
        sizes = [tap.num_features for tap in extractor.taps]
        self.weights = [
            part.unflatten(1, tap.shape) for part, tap in zip(weights.split(sizes, dim=1), extractor.taps, strict=True)
        ]
        self.features = [torch.zeros_like(part) for part in self.weights]
        self.loss = torch.zeros((), dtype=weights.dtype)
        self.calls: list[str] = []

    def collect(self, tap: int, x: TapInput, images: slice) -> None:
        self.calls.append("collect")
        # Whoever owns no input must have been given a copy, and every tap is dense: `feature_rows` raises if not.
        feature_rows(x.x)
        y = x.activate_()
        assert len(y) == len(range(*images.indices(len(self.weights[tap]))))
        self.features[tap][images] = y
        self.loss += (self.weights[tap][images] * y**3).sum()

    def finish(self, ranks: Ranks) -> Tensor:
        self.calls.append("finish")
        return self.loss.clone()

    def gradient(self, tap: int, images: slice) -> PerImage:
        self.calls.append("gradient")
        return PerImage(self.weights[tap][images] * 3 * self.features[tap][images] ** 2)


class Squares(Cubes):
    """L = Σ_nd a_d x_nd + b_d/2 x_nd²: affine in every feature, so the kernels apply the mask."""

    def __init__(self, extractor: Extractor, a: Tensor, b: Tensor, images: int):
        super().__init__(extractor, torch.zeros(images, len(a), dtype=a.dtype))
        order = FeatureOrder(extractor.taps)
        self.a, self.b = (order.slices(order.to_memory(values)) for values in (a, b))

    def finish(self, ranks: Ranks) -> Tensor:
        rows = [features.permute(0, 2, 3, 1).flatten(1) for features in self.features]
        return sum((a * y + b / 2 * y**2).sum() for a, b, y in zip(self.a, self.b, rows, strict=True))

    def gradient(self, tap: int, images: slice) -> Affine:
        return Affine(self.a[tap], self.b[tap])


def expected_gradient(features: Features, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    loss = (weights * features(images) ** 3).sum()
    (gradient,) = torch.autograd.grad(loss, images)
    return loss.detach(), gradient


class TestOwnership:
    """What may be written over, and what may not."""

    @pytest.mark.parametrize("chunk", [None, 2])
    @pytest.mark.parametrize("network", NETWORKS)
    def test_gradient_is_plain_autograd_s(self, network, chunk, draw_images):
        torch.manual_seed(3)
        module = network()
        extractor = in_float64(tapped(module, image_size=8))
        features = hooked_features(module, module.activations)
        images = draw_images(IMAGES)
        kept = images.clone()
        weights = torch.randn(IMAGES, extractor.num_features, dtype=torch.float64)
        loss, gradient = expected_gradient(features, images, weights)
        assert float((gradient != 0).double().mean()) > 0.3, "the network is dead and the test shows nothing"
        assert relative_error(extractor.features(images), features(images)) <= 1e-12

        criterion = Cubes(extractor, weights)
        images.requires_grad_()
        found = FeaturePass(extractor, chunk_size=chunk).loss(images, criterion)
        (3.7 * found).backward()
        assert relative_error(found, loss) <= 1e-12
        assert relative_error(images.grad, 3.7 * gradient) <= 1e-12
        assert torch.equal(images.detach(), kept)

    def test_a_chain_is_done_in_place(self, draw_images, monkeypatch):
        """The rules are not simply never used: in a chain every convolution's output becomes its tap, and every
        gradient that a tap gets its input's gradient."""
        module = Chain()
        extractor = in_float64(tapped(module, image_size=8))
        assert all(site.owns_input for site in extractor.sites)
        watch = {"run": [], "input_gradient": []}
        for name, results in watch.items():
            original = getattr(FrozenConv2d, name)

            def watched(self, *args, original=original, results=results):
                results.append(original(self, *args))
                return results[-1]

            monkeypatch.setattr(FrozenConv2d, name, watched)

        class Watched(Cubes):
            def collect(self, tap: int, x: TapInput, images: slice) -> None:
                taps.append(x.x)
                super().collect(tap, x, images)

        taps: list[Tensor] = []
        made: list[Tensor] = []
        monkeypatch.setattr(torch, "empty_like", lambda x, **options: made.append(x) or torch.zeros_like(x, **options))
        weights = torch.randn(2, extractor.num_features, dtype=torch.float64)
        FeaturePass(extractor).loss(draw_images(2).requires_grad_(), Watched(extractor, weights)).backward()
        assert [x.data_ptr() for x in taps] == [y.data_ptr() for y in watch["run"]]
        assert len(watch["input_gradient"]) == 3
        assert not [x for x in made if x.shape in [tap.shape for tap in taps]], "a gradient was copied"


class TestChunks:
    @pytest.fixture
    def extractor(self, tiny_extractor) -> Extractor:
        return in_float64(tiny_extractor)

    @pytest.mark.parametrize("chunk", [None, 1, 2, 3, 4, 5, 6])
    def test_loss_and_gradient_do_not_depend_on_chunks(self, chunk, extractor, draw_images):
        images = draw_images(IMAGES).requires_grad_()
        weights = torch.randn(IMAGES, extractor.num_features, dtype=torch.float64)
        loss, gradient = expected_gradient(extractor.features, images, weights)
        found = FeaturePass(extractor, chunk_size=chunk).loss(images, Cubes(extractor, weights))
        found.backward()
        assert relative_error(found, loss) <= 1e-12
        assert relative_error(images.grad, gradient) <= 1e-12

    @pytest.mark.parametrize(("chunk", "forwards"), [(None, 1), (5, 1), (3, 4), (1, 10)])
    def test_one_chunk_costs_no_second_forward(self, chunk, forwards, extractor, draw_images, monkeypatch):
        """…and several cost exactly one more; each is collected once, and gradients come after `finish`."""
        criterion = Cubes(extractor, torch.ones(IMAGES, extractor.num_features, dtype=torch.float64))
        runs: list[int] = []
        forward = Tape._forward
        monkeypatch.setattr(Tape, "_forward", lambda self, x, *rest: runs.append(len(x)) or forward(self, x, *rest))
        FeaturePass(extractor, chunk_size=chunk).loss(draw_images(IMAGES).requires_grad_(), criterion).backward()
        taps = len(extractor.taps)
        assert len(runs) == forwards
        assert max(runs) <= (chunk or IMAGES)
        chunks = 1 if forwards == 1 else forwards // 2
        assert criterion.calls == [*["collect"] * (taps * chunks), "finish", *["gradient"] * (taps * chunks)]

    @pytest.mark.parametrize("recompute", ["none", "stages"])
    @pytest.mark.parametrize("chunk", [None, 2])
    @pytest.mark.parametrize("network", [Chain, Relu6Chain, SmoothActivations])
    def test_affine_gradients_are_plain_autograd_s(self, network, chunk, recompute, draw_images):
        torch.manual_seed(3)
        module = network()
        extractor = in_float64(tapped(module, image_size=8))
        features, images = hooked_features(module, module.activations), draw_images(IMAGES).requires_grad_()
        a, b = torch.randn(2, extractor.num_features, dtype=torch.float64)
        x = features(images)
        expected = (a * x + b / 2 * x**2).sum()
        (gradient,) = torch.autograd.grad(expected, images)
        criterion = Squares(extractor, a, b, IMAGES)
        found = FeaturePass(extractor, chunk_size=chunk, recompute=recompute).loss(images, criterion)
        (-1.3 * found).backward()
        assert relative_error(found, expected) <= 1e-12
        assert relative_error(images.grad, -1.3 * gradient) <= 1e-12

    def test_further_chunks_can_be_left_out(self, extractor, draw_images):
        """For models of a step's memory: a minibatch of any size takes the time of a few chunks."""
        images = draw_images(IMAGES)
        weights = torch.randn(IMAGES, extractor.num_features, dtype=torch.float64)
        criterion = Cubes(extractor, weights)
        FeaturePass(extractor, chunk_size=2, max_chunks=2).loss(images.requires_grad_(), criterion).backward()
        assert (
            relative_error(criterion.loss, expected_gradient(extractor.features, images[:4], weights[:4])[0]) <= 1e-12
        )

    def test_without_gradient_only_collects(self, extractor, draw_images):
        criterion = Cubes(extractor, torch.ones(IMAGES, extractor.num_features, dtype=torch.float64))
        loss = FeaturePass(extractor, chunk_size=3).loss(draw_images(IMAGES), criterion)
        assert not loss.requires_grad
        assert set(criterion.calls) == {"collect", "finish"}

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_collect_alone(self, chunk, extractor, draw_images):
        images = draw_images(IMAGES).requires_grad_()
        weights = torch.randn(IMAGES, extractor.num_features, dtype=torch.float64)
        criterion = Cubes(extractor, weights)
        FeaturePass(extractor, chunk_size=chunk).collect(images, criterion)
        assert relative_error(criterion.loss, expected_gradient(extractor.features, images, weights)[0]) <= 1e-12
        assert criterion.calls == ["collect"] * (len(extractor.taps) * (1 if chunk is None else 2))

    def test_collect_of_no_images_does_nothing(self, extractor):
        """Loaders with shards of different lengths hand out zero-size batches."""
        criterion = Cubes(extractor, torch.ones(0, extractor.num_features, dtype=torch.float64))
        FeaturePass(extractor).collect(torch.zeros(0, 3, 8, 8, dtype=torch.float64), criterion)
        assert criterion.calls == []

    @pytest.mark.parametrize("chunk", [0, -1])
    def test_chunk_size_must_be_positive(self, chunk, extractor):
        with pytest.raises(ValueError, match=f"chunk_size: .*{chunk}"):
            FeaturePass(extractor, chunk_size=chunk)

    def test_batch_statistics_refuse_chunks(self):
        extractor = build_extractor("vgg-small", image_size=8, bn="batch")
        with pytest.raises(ValueError, match="chunk_size: batch statistics"):
            FeaturePass(extractor, chunk_size=2)

    def test_batch_statistics_in_one_chunk(self, draw_images):
        """BatchNorm keeps its input for backward, so only its own output may be written over."""
        extractor = in_float64(build_extractor("resnet18", image_size=8, bn="batch", layers=6))
        images = draw_images(IMAGES).requires_grad_()
        weights = torch.randn(IMAGES, extractor.num_features, dtype=torch.float64)
        loss, gradient = expected_gradient(extractor.features, images, weights)
        found = FeaturePass(extractor).loss(images, Cubes(extractor, weights))
        found.backward()
        assert relative_error(found, loss) <= 1e-12
        assert relative_error(images.grad, gradient) <= 1e-11


class TestPrecision:
    def test_copy_in_another_dtype_leaves_the_extractor_alone(self, tiny_extractor):
        feature_pass = FeaturePass(tiny_extractor, dtype=torch.bfloat16)
        assert feature_pass.extractor.dtype == torch.bfloat16
        assert tiny_extractor.dtype == torch.float32
        assert FeaturePass(tiny_extractor, dtype=torch.float32).extractor is tiny_extractor

    @pytest.mark.parametrize("chunk", [None, 2])
    def test_images_of_another_dtype(self, chunk, tiny_extractor, draw_images):
        """The gradient comes back in the images' dtype."""
        images = draw_images(IMAGES).requires_grad_()
        weights = torch.randn(IMAGES, tiny_extractor.num_features)
        _, gradient = expected_gradient(in_float64(tiny_extractor).features, images, weights.double())
        FeaturePass(tiny_extractor, chunk_size=chunk).loss(images, Cubes(tiny_extractor, weights)).backward()
        assert images.grad.dtype == torch.float64
        assert relative_error(images.grad, gradient) <= 1e-5


class TestMemory:
    """What a pass holds between forward and backward."""

    @staticmethod
    def kept_bytes(extractor: Extractor, images: Tensor) -> int:
        """Of every storage that the pass kept, once each; autograd keeps nothing but the images."""
        criterion = Cubes(extractor, torch.ones(len(images), extractor.num_features))
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda x: x):
            FeaturePass(extractor).loss(images.requires_grad_(), criterion)
        assert [tensor.shape for tensor in saved] == [images.shape]
        kept = FeaturePass(extractor).keep(images, Chunk(slice(0, len(images)), criterion))
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage() for x in tree_leaves(kept) if torch.is_tensor(x)
        }
        return sum(storage.nbytes() for storage in storages.values())

    def test_one_tensor_per_tap_where_nothing_pools(self, draw_images):
        """A frozen convolution needs nothing for its input's gradient."""
        extractor = tapped(IdentityShortcut(), image_size=8)
        kept = self.kept_bytes(extractor, draw_images(IMAGES, torch.float32))
        assert kept == 4 * IMAGES * extractor.num_features

    def test_pooling_keeps_its_indices(self, draw_images):
        """Known cost, until the pass stores less: int64 indices of each max pooling."""
        extractor = tapped(Chain(), image_size=8)
        kept = self.kept_bytes(extractor, draw_images(IMAGES, torch.float32))
        pooled = IMAGES * 6 * 4 * 4
        assert kept == 4 * IMAGES * extractor.num_features + 8 * pooled


def test_a_rank_without_images(tiny_extractor) -> None:
    """Its pass has no chunk, and its gradient no row; the others wait for it in `finish`."""
    images = torch.zeros(0, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.zeros(0, tiny_extractor.num_features, dtype=torch.float64)
    FeaturePass(tiny_extractor).loss(images, Weighted(tiny_extractor, weights)).backward()
    assert images.grad.shape == images.shape
