"""Critics: what they compute, written out; their derivatives; what they refuse."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.visiting import enliven
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.comparison.games.penalties import PENALTIES
from engine.generation.batch_norm import BatchNorm2d, share_batches
from engine.representation.architectures import ARCHITECTURES
from engine.representation.critics import CRITIC_NORMS, CRITICS, build_critic
from engine.representation.critics.activation import rectified
from engine.representation.critics.convolutional import DownsamplingBlock, PooledConv2d
from engine.representation.critics.critic import MinibatchDiscrimination
from engine.support.errors import InputError
from engine.training.ranks import ALONE

WIDTHS = {"autoencoder": 64, "vgg-small": 128, "vgg19": 512, "resnet18": 512}
RESNET = {32: 128, 64: 1024, 128: 1024}
SMALL = [
    (name, norm) for name, norm in itertools.product(("dcgan", "resnet", "encoder-decoder", "vgg-small"), CRITIC_NORMS)
] + [("autoencoder", "none"), ("resnet18", "none")]


def hidden(name, size):
    if name == "resnet":
        return RESNET[size]
    return WIDTHS.get(name, 16 * {32: 256, 64: 512, 128: 512}[size])


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("name", CRITICS)
def test_shapes(name, size, norm):
    if (name, norm) == ("autoencoder", "batch"):
        pytest.skip("has none")
    outputs = 1 if name == "autoencoder" else 3
    with torch.device("meta"):
        critic = build_critic(name, image_size=size, outputs=outputs, norm=norm)
        images = torch.empty(2, 3, size, size)
        found, features = critic(images), critic.features(images)
        assert found.shape == (2, outputs)
        assert features.shape == (2, hidden(name, size))
        if name in ("autoencoder", "encoder-decoder"):
            codes = features if name == "autoencoder" else found
            assert critic.decode(codes).shape == images.shape
    assert critic.has_batchnorm is (norm == "batch")
    assert critic.per_image is (norm != "batch")


@pytest.mark.parametrize(("name", "norm"), SMALL)
def test_every_weight_learns_and_lies_channels_last(name, norm):
    critic = build_critic(name, image_size=32, outputs=1, norm=norm)
    outputs = critic(torch.rand(4, 3, 32, 32) * 2 - 1)
    assert outputs.std() > 0
    loss = (outputs * torch.randn_like(outputs)).sum()
    if name == "encoder-decoder":
        loss = loss + critic.decode(outputs).square().sum()
    loss.backward()
    for key, weight in critic.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.isfinite().all(), key
        assert weight.grad.abs().sum() > 0 or (norm == "batch" and key.endswith("bias")), key
        assert weight.dim() < 4 or weight.is_contiguous(memory_format=torch.channels_last), key


@pytest.mark.parametrize("name", ["dcgan", "autoencoder", "encoder-decoder"])
def test_what_is_beside_the_outputs_is_not_clipped(name):
    critic = build_critic(name, image_size=32)
    critic(torch.rand(2, 3, 32, 32)).sum().backward()
    depends = {key for key, weight in critic.named_parameters() if weight.grad is not None}
    before = {key: weight.detach().clone() for key, weight in critic.named_parameters()}
    PENALTIES["clip"](limit=1e-3).project_(critic)
    for key, weight in critic.named_parameters():
        assert torch.equal(weight, before[key].clamp(-1e-3, 1e-3) if key in depends else before[key]), key
    beside = {key for key in before if key.startswith("decoder.")} if name == "encoder-decoder" else set()
    assert before.keys() - depends == beside


def test_features_are_what_the_last_layer_sees():
    images = torch.randn(3, 3, 32, 32)
    for name in ("dcgan", "resnet", "vgg-small"):
        critic = build_critic(name, image_size=32, outputs=2)
        torch.testing.assert_close(critic.last(critic.features(images)), critic(images))


def resnet_parameters(widths, kept):
    count = 0
    for channels, width in itertools.pairwise((3, *widths)):
        inner = width if channels == 3 else channels
        count += (9 * channels + 1) * inner + (9 * inner + 1) * width + (channels + 1) * width
    return count + kept * 2 * (9 * widths[-1] + 1) * widths[-1] + widths[-1] + 1


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet", 32, resnet_parameters([128, 128], kept=2)),  # 1,053,825, as in other implementations
        ("resnet", 64, resnet_parameters([64, 128, 256, 512, 1024], kept=0)),
        ("resnet", 128, resnet_parameters([64, 128, 256, 512, 1024], kept=1)),
        ("dcgan", 32, 49 * 64 + 16 * 64 * 128 + 128 + 16 * 128 * 256 + 256 + 16 * 256 + 1),
    ],
)
def test_parameters(name, size, count):
    with torch.device("meta"):
        critic = build_critic(name, image_size=size)
    assert sum(weight.numel() for weight in critic.parameters()) == count


def test_resnet_is_the_published_network(draw_images):
    """Convolutions, then pooling, which are one operation in the engine."""
    critic = build_critic("resnet", image_size=32, outputs=2).double()
    for key, weight in critic.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(weight)
    images = draw_images(2, size=32)
    x = images
    for number, block in enumerate(critic.blocks):
        out = F.conv2d(x if number == 0 else F.relu(x), block.conv1.weight, block.conv1.bias, padding=1)
        out = F.conv2d(F.relu(out), block.conv2.weight, block.conv2.bias, padding=1)
        if number < 2:
            shortcut = F.conv2d(x, block.shortcut.weight, block.shortcut.bias)
            x = F.avg_pool2d(out, 2) + F.avg_pool2d(shortcut, 2)
        else:
            x = out + x
    torch.testing.assert_close(critic(images), F.linear(F.relu(x).sum((2, 3)), critic.last.weight, critic.last.bias))


def test_dcgan_is_the_published_network(draw_images):
    critic = build_critic("dcgan", image_size=32, norm="batch").double()
    first, _, *rest = critic.layers
    images = draw_images(5, size=32)
    x = F.leaky_relu(F.conv2d(images, first.weight, first.bias, stride=2, padding=1), 0.2)
    for conv, norm in zip(rest[::3], rest[1::3]):
        x = F.conv2d(x, conv.weight, stride=2, padding=1)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = centred / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        x = F.leaky_relu(x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1), 0.2)
    torch.testing.assert_close(critic(images), F.linear(x.flatten(1), critic.last.weight, critic.last.bias))


def test_began_loss_is_the_mean_absolute_error_of_its_reproduction(draw_images):
    critic = build_critic("autoencoder", image_size=32).double()
    images = draw_images(3, size=32)
    errors = images - critic.decode(critic.features(images))
    torch.testing.assert_close(critic(images)[:, 0], errors.flatten(1).abs().sum(1) / (3 * 32 * 32))


@pytest.mark.parametrize("side", [1, 3])
def test_pooled_convolution(side):
    pooled = PooledConv2d(3, 5, side).double()
    x = torch.randn(2, 3, 10, 6, dtype=torch.float64)
    plain = F.conv2d(x, pooled.weight, pooled.bias, padding=side // 2)
    torch.testing.assert_close(pooled(x), F.avg_pool2d(plain, 2))


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_rectified(slope):
    """As PyTorch's own, to the second derivative; and a second derivative never goes back into the network before."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: rectified(x, slope), x)
    upstream = torch.randn_like(x).requires_grad_()
    (ours,), (theirs,) = (
        torch.autograd.grad(function(x, slope), x, upstream, create_graph=True)
        for function in (rectified, F.leaky_relu)
    )
    assert torch.equal(rectified(x, slope), F.leaky_relu(x, slope))
    assert torch.equal(ours, theirs)
    second = torch.randn_like(x)
    found = torch.autograd.grad(ours, (upstream, x), second, allow_unused=True)
    assert torch.equal(found[0], torch.autograd.grad(theirs, upstream, second)[0])
    assert found[1] is None


class Backwards(TorchDispatchMode):
    """Counts backward passes through convolutions."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution_backward.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["dcgan", "resnet"])
def test_a_gradient_penalty_goes_back_once_through_every_convolution(name, draw_images):
    """For the images' gradient, and not once more for its derivative."""
    critic = build_critic(name, image_size=32)
    images = draw_images(1, torch.float32, size=32).requires_grad_()
    with Backwards() as backwards:
        (gradient,) = torch.autograd.grad(critic(images).sum(), images, create_graph=True)
        gradient.square().sum().backward()
    assert backwards.count == sum(isinstance(module, nn.Conv2d) for module in critic.modules())


@pytest.mark.parametrize(("halves", "first"), [(True, True), (False, False)])
def test_second_derivatives_of_a_block(halves, first):
    block = DownsamplingBlock(2, 3, halves=halves, first=first, batch_norm=False).double()
    names = [key for key, _ in block.named_parameters()]

    def function(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights)), (x,))

    inputs = (torch.randn(1, 2, 4, 2, dtype=torch.float64, requires_grad=True), *block.parameters())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("dcgan", "none"), ("dcgan", "spectral-scaled"), ("resnet", "spectral"), ("autoencoder", "none"),
     ("encoder-decoder", "none"), ("vgg-small", "none"), ("resnet18", "none")],
)  # fmt: skip
def test_gradient_penalty_by_finite_differences(name, norm, draw_images):
    """Of S = Σ‖∂D/∂x‖², whose gradient with respect to weights is a second derivative; and of Σ D itself."""
    critic = build_critic(name, image_size=32, norm=norm).double().eval()
    images = draw_images(1, size=32).requires_grad_()
    weights = list(critic.parameters())
    directions = [torch.randn_like(weight) * weight.detach().square().mean().sqrt() for weight in weights]

    def sums(create_graph=False):
        outputs = critic(images)
        (gradient,) = torch.autograd.grad(outputs.sum(), images, create_graph=create_graph)
        return torch.stack((gradient.square().sum(), outputs.sum()))

    def moved(step):
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=step)
        found = sums().detach()
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=-step)
        return found

    step = 1e-9  # hardly any ReLU turns on or off on the way
    expected = (moved(step) - moved(-step)) / (2 * step)
    for number, value in enumerate(sums(create_graph=True)):
        gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        found = sum((g * d).sum() for g, d in zip(gradients, directions) if g is not None)
        torch.testing.assert_close(found, expected[number], rtol=1e-5, atol=1e-5 * float(value.detach().abs()))


def test_minibatch_discrimination():
    layer = MinibatchDiscrimination(6, kernels=3, dimensions=2).double()
    features = torch.randn(5, 6, dtype=torch.float64)
    tensor = layer.weight.detach().view(6, 3, 2)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for i, j, b in itertools.product(range(5), range(5), range(3)):
        distance = sum(abs(float((features[i] - features[j]) @ tensor[:, b, c])) for c in range(2))
        expected[i, b] += torch.tensor(-distance, dtype=torch.float64).exp()
    torch.testing.assert_close(layer(features), expected)
    assert torch.autograd.gradgradcheck(layer, features.requires_grad_())


def test_minibatch_discrimination_in_a_critic():
    images = torch.randn(4, 3, 32, 32)
    critic = build_critic("dcgan", image_size=32, minibatch_discrimination=True)
    assert not critic.per_image
    assert critic.features(images).shape == (4, 4096)
    assert critic.last.in_features == 4096 + 100
    alone = torch.cat([critic(image[None]) for image in images])
    assert (critic(images) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vgg-small", "resnet18"])
def test_pretrained_network_with_its_batchnorm_folded(name, tmp_path):
    network = enliven(ARCHITECTURES[name].make(10, 8))
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    images = torch.randn(3, 3, 8, 8)
    critic = build_critic(name, image_size=8, weights=tmp_path / "weights.safetensors")
    network.classifier = nn.Identity()
    torch.testing.assert_close(critic.features(images), network(images), rtol=1e-4, atol=1e-5)
    batch = build_critic(name, image_size=8, norm="batch", weights=tmp_path / "weights.safetensors")
    torch.testing.assert_close(batch.eval().features(images), network(images))
    assert all(weight.requires_grad for weight in (*critic.parameters(), *batch.parameters()))


def test_batchnorm_of_a_critic_can_be_shared_between_ranks():
    critic = build_critic("dcgan", image_size=32, norm="batch")
    images, names = torch.randn(4, 3, 32, 32), list(critic.state_dict())
    expected = critic(images)
    share_batches(critic, ALONE)
    norms = [module for module in critic.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 2
    assert all(isinstance(norm, BatchNorm2d) for norm in norms)
    assert list(critic.state_dict()) == names
    torch.testing.assert_close(critic(images), expected)


def test_one_graph():
    """Nothing in a critic depends on data in Python: one graph, with the buffers that it moves."""
    critic = build_critic("dcgan", image_size=32, norm="spectral-scaled")
    images = torch.randn(3, 3, 32, 32)
    state = {key: value.clone() for key, value in critic.state_dict().items()}
    expected = critic(images)
    moved = {key: value.clone() for key, value in critic.state_dict().items()}
    critic.load_state_dict(state)
    torch.testing.assert_close(torch.compile(critic, backend="eager", fullgraph=True)(images), expected)
    torch.testing.assert_close(critic.state_dict(), moved)


@pytest.mark.parametrize(
    ("arguments", "argument", "words"),
    [
        ({"name": "unet"}, "critic", ["'unet'", "dcgan", "vgg19"]),
        ({"name": "dcgan", "image_size": 48}, "critic", ["dcgan", "32, 64, 128", "48"]),
        ({"name": "vgg19", "image_size": 48}, "critic", ["vgg19", "32", "48", "64"]),
        ({"name": "dcgan", "norm": "layer"}, "critic_norm", ["'layer'", "spectral-scaled"]),
        ({"name": "dcgan", "outputs": 0}, "critic_outputs", ["at least 1", "0"]),
        ({"name": "dcgan", "weights": "imagenet"}, "critic_weights", ["dcgan"]),
        ({"name": "resnet18", "weights": "imagenet"}, "critic_weights", ["resnet18", "file"]),
        ({"name": "resnet18", "weights": "nothing.safetensors"}, "critic_weights", ["nothing.safetensors"]),
        ({"name": "autoencoder", "outputs": 2}, "critic_outputs", ["autoencoder"]),
        ({"name": "autoencoder", "norm": "spectral"}, "critic_norm", ["autoencoder", "spectral"]),
        ({"name": "autoencoder", "minibatch_discrimination": True}, "minibatch_discrimination", ["autoencoder"]),
    ],
)
def test_refused_in_one_line(arguments, argument, words):
    with pytest.raises(InputError) as error:
        build_critic(**{"image_size": 32, **arguments})
    assert error.value.argument == argument
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value
