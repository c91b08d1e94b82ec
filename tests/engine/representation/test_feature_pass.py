"""The pass over the features, under a criterion that has nothing to do with moments: chunks, memory, ownership.

The in-place rules (`TapSite.owns_input`, `owns_gradient`) are tried on small networks of every shape that could break
them; the oracle is plain autograd through the untraced network, with hooks on its activations.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import Features, hooked_features, in_float64, relative_error, tapped
from torch import Tensor, nn

from engine.representation.build import build_extractor
from engine.representation.extractor import Extractor
from engine.representation.feature_pass import FeaturePass
from kernels.layout import feature_rows

IMAGES = 5


class Cubes:
    """L = Σ w_nd x_nd³, different for every image and feature: no sum over images, so order mistakes show.

    `weights` [N, D] are in the order of `extractor.features`.
    """

    def __init__(self, extractor: Extractor, weights: Tensor):
        self.sites = extractor.sites
        sizes = [tap.num_features for tap in extractor.taps]
        self.weights = [
            part.unflatten(1, tap.shape) for part, tap in zip(weights.split(sizes, dim=1), extractor.taps, strict=True)
        ]
        self.loss = torch.zeros((), dtype=weights.dtype)
        self.collected = [0] * len(self.sites)
        self.returned = [0] * len(self.sites)
        self.calls: list[str] = []

    def activate(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        self.calls.append("activate")
        self._activate(tap, y, residual)

    def _activate(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        # Whoever owns no input must have been given a copy, and every tap is dense: `feature_rows` raises if not.
        feature_rows(y)
        if residual is not None:
            y += residual
        if self.sites[tap].activation != "none":
            y.clamp_(min=0, max=6 if self.sites[tap].activation == "relu6" else None)

    def collect(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
        self.calls.append("collect")
        self._activate(tap, y, residual)
        begin = self.collected[tap]
        self.collected[tap] += len(y)
        self.loss += (self.weights[tap][begin : begin + len(y)] * y**3).sum()

    def finish(self) -> Tensor:
        self.calls.append("finish")
        return self.loss.clone()

    def scale(self, grad_loss: Tensor) -> None:
        self.calls.append("scale")
        self.grad_loss = grad_loss

    def gradient(self, tap: int, grad: Tensor, y: Tensor) -> None:
        self.calls.append("gradient")
        assert grad.stride() == y.stride(), "the kernels read both in one memory order"
        begin = self.returned[tap]
        self.returned[tap] += len(y)
        grad += self.grad_loss * self.weights[tap][begin : begin + len(y)] * 3 * y**2
        if self.sites[tap].activation != "none":
            grad *= (y > 0) & (y < 6) if self.sites[tap].activation == "relu6" else y > 0


def expected_gradient(features: Features, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    images = images.detach().requires_grad_()
    loss = (weights * features(images) ** 3).sum()
    (gradient,) = torch.autograd.grad(loss, images)
    return loss.detach(), gradient


# Networks: each has `.activations`, in the order in which they run.


class Network(nn.Module):
    """Three convolutions to play with, and activations as modules, so that hooks can see them."""

    def __init__(self, activations: int = 3, make: Callable[[], nn.Module] = nn.ReLU):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.acts = nn.ModuleList([make() for _ in range(activations)])

    @property
    def activations(self) -> list[nn.Module]:
        return list(self.acts)


class Chain(Network):
    def forward(self, x):
        return self.acts[2](self.third(self.pool(self.acts[1](self.second(self.acts[0](self.first(x)))))))


class SeveralReaders(Network):
    """One tap read by two convolutions and a pool."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.pool(self.acts[1](self.second(y) + self.third(y)))
        return self.acts[2](z + self.pool(y))


class IdentityShortcut(Network):
    """The shortcut's activation is also read by the convolution that it goes around."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[2](self.third(self.acts[1](self.second(y) + y)))


class ShortcutOnly(Network):
    """A tap that nothing but a shortcut reads: its gradient is the very tensor that the other branch gets."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[2](self.third(self.acts[1](self.first(x) + y)))


class ShortcutFromTheImages(Network):
    def __init__(self):
        super().__init__(activations=2)
        self.back = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[1](self.back(y) + x)


class InputReadTwice(Network):
    """The activation's input is read again afterwards, before and past another convolution."""

    def forward(self, x):
        y = self.first(x)
        z = self.acts[0](y)
        w = self.acts[1](self.second(y) + z)
        return self.acts[2](self.third(w) + y)


class InputIsAnImage(Network):
    """The first activation reads the images themselves, which belong to the caller."""

    def forward(self, x):
        y = self.acts[0](x)
        return self.acts[2](self.second(self.acts[1](self.first(y))))


class ActivationOfAnActivation(Network):
    def __init__(self):
        super().__init__(activations=3)
        self.acts[1] = nn.ReLU6()

    def forward(self, x):
        y = self.acts[0](3 * self.first(x))
        return self.acts[2](self.second(self.acts[1](y)) + y)


class SumOfTaps(Network):
    """Two taps added with nothing else reading them: both get the same gradient tensor."""

    def forward(self, x):
        return self.acts[2](self.third(self.acts[0](self.first(x)) + self.acts[1](self.first(-x))))


class TappedSumOfTaps(Network):
    """The sum is itself a tap's input: its gradient, changed in place, is handed to both terms."""

    def forward(self, x):
        s = self.acts[0](self.first(x)) + self.acts[1](self.first(x.flip(3)))
        return self.acts[2](s)


class SumReadTwice(Network):
    def forward(self, x):
        y = self.acts[0](self.first(x))
        s = self.second(y) + y
        return self.acts[2](self.third(self.acts[1](s)) + s)


class SumOfBothShortcuts(Network):
    """Two convolutions' outputs, each read once: either could be the one that is written over."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        return self.acts[2](self.third(self.acts[1](self.second(y) + self.third(y))))


class TapPlusItself(Network):
    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.second(y + y))
        return self.acts[2](self.third(z) + self.third(z))


class Concatenation(Network):
    def __init__(self):
        super().__init__()
        self.join = nn.Conv2d(12, 6, 1)

    def forward(self, x):
        y, z = self.acts[0](self.first(x)), self.acts[1](self.first(x.flip(2)))
        return self.acts[2](self.join(torch.cat((y, z), dim=1)))


class TappedConcatenation(Network):
    """As in a dense net: the activation reads a concatenation, the next one a longer one."""

    def __init__(self):
        super().__init__()
        self.join = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        y = self.first(x)
        z = self.join(self.acts[0](y))
        both = torch.cat((y, z), dim=1)
        return self.acts[2](self.last(self.acts[1](both)))


class Slices(Network):
    """Taps of views of one tensor, and readers of slices of a tap."""

    def __init__(self):
        super().__init__()
        self.back = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        left, right = self.first(x).chunk(2, dim=1)
        y, z = self.acts[0](left), self.acts[1](right)
        return self.acts[2](self.back(y[:, :, ::2, ::2] + z[:, :, 1::2, 1::2]))


class Broadcasting(Network):
    """Gradients that arrive expanded: a mean over positions, and a sum with a vector of channels."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        gate = y.mean(dim=(2, 3), keepdim=True)
        z = self.acts[1](self.second(y) * gate.sigmoid())
        return self.acts[2](self.third(z) + z.mean(dim=(2, 3), keepdim=True))


class OneByOne(Network):
    """Taps of 1×1 positions, dense in both memory orders, whose expanded gradients have the strides of dense ones."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 6, 8)
        self.point = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.acts[0](self.wide(x))
        z = self.acts[1](self.point(y) + y)
        return self.acts[2](self.point(z) + z.sum(dim=(2, 3), keepdim=True))


class OneChannel(Network):
    def __init__(self):
        super().__init__(activations=2)
        self.narrow = nn.Conv2d(3, 1, 3, padding=1)
        self.widen = nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x):
        y = self.acts[0](self.narrow(x))
        return self.acts[1](self.widen(y) + y)


class Pools(Network):
    """Average pooling, and a max pooling whose windows overlap and share their maxima."""

    def __init__(self):
        super().__init__()
        self.average, self.overlapping = nn.AvgPool2d(2), nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.second(self.overlapping(y)) + y)
        return self.acts[2](self.third(self.average(z)))


class Contiguous(Network):
    """A convolution's output forced into (C, H, W) order before its activation."""

    def forward(self, x):
        y = self.acts[0](self.first(x).contiguous())
        return self.acts[2](self.third(self.acts[1](self.second(y.contiguous()) + y)))


class GradientInTheOtherOrder(Network):
    """Gradients that are summed, so that nobody else holds them, but in (C, H, W) order."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.second(y))
        return self.acts[2](self.pool((y + z).contiguous()) - self.pool((z + y * 0.3).contiguous()) + self.pool(y + z))


class InPlaceModules(Chain):
    """ReLUs that were written in place, as in torchvision's networks."""

    def __init__(self):
        super().__init__(make=lambda: nn.ReLU(inplace=True))


class Relu6Chain(Chain):
    def __init__(self):
        super().__init__(make=nn.ReLU6)

    def forward(self, x):
        return super().forward(8 * x)


class SmoothActivations(IdentityShortcut):
    """Their derivative is no function of their output, so they stay in the graph and the tap comes after them."""

    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.SiLU(), nn.GELU(), nn.ReLU6()])


class AsksForItsShape(Network):
    """Two readers of each tap, of which one wants its size only and sends no gradient back."""

    def forward(self, x):
        y = self.acts[0](self.first(x))
        z = self.acts[1](self.first(x.flip(3)))
        # The order of the sum decides whose gradient comes first; both have to be right.
        s = self.acts[2](y + z)
        return s.reshape(y.size(0), z.shape[1], -1)


NETWORKS = [
    Chain,
    SeveralReaders,
    IdentityShortcut,
    ShortcutOnly,
    ShortcutFromTheImages,
    InputReadTwice,
    InputIsAnImage,
    ActivationOfAnActivation,
    SumOfTaps,
    TappedSumOfTaps,
    SumReadTwice,
    SumOfBothShortcuts,
    TapPlusItself,
    Concatenation,
    TappedConcatenation,
    Slices,
    Broadcasting,
    OneByOne,
    OneChannel,
    Pools,
    Contiguous,
    GradientInTheOtherOrder,
    InPlaceModules,
    Relu6Chain,
    SmoothActivations,
    AsksForItsShape,
]


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

    def test_a_chain_is_done_in_place(self, draw_images):
        """The rules are not simply never used: in a chain every convolution's output becomes its tap."""
        module = Chain()
        extractor = in_float64(tapped(module, image_size=8))
        assert all(site.owns_input and site.owns_gradient for site in extractor.sites)
        before: list[int] = []
        for child in extractor.networks[0].modules():
            if isinstance(child, nn.Conv2d):
                child.register_forward_hook(lambda module, args, output: before.append(output.data_ptr()))

        class Watched(Cubes):
            def collect(self, tap: int, y: Tensor, residual: Tensor | None) -> None:
                seen.append(y.data_ptr())
                super().collect(tap, y, residual)

        seen: list[int] = []
        weights = torch.randn(2, extractor.num_features, dtype=torch.float64)
        FeaturePass(extractor).loss(draw_images(2).requires_grad_(), Watched(extractor, weights))
        assert seen == before


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
    def test_one_chunk_costs_no_second_forward(self, chunk, forwards, extractor, draw_images):
        """…and several cost exactly one more; each is collected once, and gradients come after `scale`."""
        criterion = Cubes(extractor, torch.ones(IMAGES, extractor.num_features, dtype=torch.float64))
        runs: list[int] = []
        hook = extractor.networks[0].register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
        FeaturePass(extractor, chunk_size=chunk).loss(draw_images(IMAGES).requires_grad_(), criterion).backward()
        hook.remove()
        taps = len(extractor.taps)
        assert len(runs) == forwards
        assert max(runs) <= (chunk or IMAGES)
        chunks = 1 if forwards == 1 else forwards // 2
        again = [] if forwards == 1 else ["activate"] * taps
        assert criterion.calls == [
            *["collect"] * (taps * chunks),
            "finish",
            "scale",
            *(again + ["gradient"] * taps) * chunks,
        ]

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
        assert criterion.collected == [IMAGES] * len(extractor.taps)

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
    """What the graph holds between forward and backward."""

    @staticmethod
    def saved_storages(extractor: Extractor, images: Tensor) -> dict[int, int]:
        """Bytes of every storage that autograd saved, once each, by address."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in extractor.parameters()}
        criterion = Cubes(extractor, torch.ones(len(images), extractor.num_features))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = FeaturePass(extractor).loss(images.requires_grad_(), criterion)
        assert loss.requires_grad
        return {address: size for address, size in storages.items() if address not in weights}

    def test_one_tensor_per_tap_where_nothing_pools(self, draw_images):
        """Beside the taps only the images: a frozen convolution needs nothing for its input's gradient."""
        extractor = tapped(IdentityShortcut(), image_size=8)
        images = draw_images(IMAGES, torch.float32)
        saved = self.saved_storages(extractor, images)
        taps = 4 * IMAGES * extractor.num_features
        assert sum(saved.values()) == taps + images.nbytes

    def test_pooling_keeps_its_indices(self, draw_images):
        """Known cost, until the pass stores less: int64 indices of each max pooling."""
        extractor = tapped(Chain(), image_size=8)
        images = draw_images(IMAGES, torch.float32)
        saved = self.saved_storages(extractor, images)
        pooled = IMAGES * 6 * 4 * 4
        assert sum(saved.values()) <= 4 * IMAGES * extractor.num_features + images.nbytes + 8 * pooled
