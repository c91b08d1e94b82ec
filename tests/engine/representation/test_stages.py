"""Checkpoints: the stages of an extractor and of a generator give the same as the whole, and keep less."""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
from helpers.marks import slow
from helpers.objectives import AVERAGERS, MINIBATCH, make_pair, run_step
from oracle import in_float64, relative_error, tapped
from torch import nn

from engine.generation.networks import build_generator, run_generator
from engine.representation.build import build_extractor
from engine.representation.feature_pass import Activate, Chunk, FeaturePass
from engine.representation.tracing.stages import best_cuts


def visited(networks: list[list[nn.Module]], images: torch.Tensor) -> list[torch.Tensor]:
    found = []

    def visit(index, x, residual):
        found.append(torch.relu(x if residual is None else x + residual))
        return found[-1]

    with torch.no_grad():
        for stages in networks:
            x = images
            for stage in stages:
                x = stage(x, visit)
    return found


@pytest.mark.parametrize("name", ["vgg19+resnet18", "torchvision:resnet18", "dcgan-encoder"])
def test_stages_visit_the_same_taps(name):
    extractor = build_extractor(name, image_size=32)
    images = torch.rand(2, 3, 32, 32)
    stages = extractor.stages()
    assert any(len(network) > 1 for network in stages)
    whole = visited([[network] for network in extractor.networks], images)
    parts = visited(stages, images)
    assert len(parts) == len(extractor.taps)
    assert all(torch.equal(part, tap) for part, tap in zip(parts, whole, strict=True))
    own = {id(parameter) for parameter in extractor.parameters()}
    assert all(id(parameter) in own for network in stages for stage in network for parameter in stage.parameters())


@pytest.mark.parametrize(
    ("sizes", "possible", "cuts"),
    [
        ([4, 4, 4, 4], [0, 1, 2], [1]),  # 4 + 8 kept, against 16 for one stage and 8 + … for more
        ([8, 1, 1, 1], [0, 1, 2], [1]),  # the large tap need not be kept behind the cut
        ([3, 3], [], []),
    ],
)
def test_cuts_need_the_least_memory(sizes, possible, cuts):
    found = best_cuts(sizes, possible)

    def peak(chosen):
        bounds = [-1, *chosen, len(sizes) - 1]
        kept = 0
        peaks = []
        for first, stop in itertools.pairwise(bounds):
            kept += sizes[first] if first >= 0 else 0
            peaks.append(kept + sum(sizes[first + 1 : stop + 1]))
        return max(peaks)

    subsets = [[p for bit, p in enumerate(possible) if mask >> bit & 1] for mask in range(2 ** len(possible))]
    assert peak(found) == min(map(peak, subsets)) == peak(cuts)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("kernels", ["reference", "compiled"])
@pytest.mark.parametrize("name", AVERAGERS)
def test_stages_against_the_written_out_objective(name, kernels, chunk, tiny_extractor, draw_images):
    extractor = in_float64(tiny_extractor)
    make, oracle = make_pair(extractor, draw_images, name, kernels=kernels, chunk_size=chunk)
    objective, plain = make(recompute="stages"), make()
    assert [len(network) for network in objective.feature_pass.tapes] != [1]
    for _ in range(2):
        images = draw_images(MINIBATCH)
        loss, gradient = oracle.gradient(images)
        found_loss, found = run_step(objective, images)
        assert relative_error(found_loss, loss) <= 1e-10
        assert relative_error(found, gradient) <= 1e-10
        assert torch.equal(found, run_step(plain, images)[1]), "bit for bit as without stages"


def test_stages_of_a_pair_add_both_gradients(built_extractor, draw_images):
    extractor = in_float64(built_extractor("vgg-small+resnet18"))
    make, oracle = make_pair(extractor, draw_images, "none", kernels="reference", recompute="stages")
    images = draw_images(MINIBATCH)
    assert relative_error(run_step(make(), images)[1], oracle.gradient(images)[1]) <= 1e-10


def test_other_activations_and_batch_statistics(draw_images):
    """SiLU stays in the graph of a stage; batch statistics come out the same the second time."""
    network = nn.Sequential()
    for channels, activation in ((3, nn.SiLU()), (6, nn.GELU()), (6, nn.ReLU6()), (6, nn.ReLU())):
        network.extend([nn.Conv2d(channels, 6, 3, padding=1), activation])
    extractor = in_float64(tapped(network, image_size=8))
    make, oracle = make_pair(extractor, draw_images, "none", kernels="reference", recompute="stages")
    images = draw_images(MINIBATCH)
    assert relative_error(run_step(make(), images)[1], oracle.gradient(images)[1]) <= 1e-10
    batch = in_float64(build_extractor("vgg-small", image_size=8, bn="batch"))
    make, oracle = make_pair(batch, draw_images, "none", kernels="reference", recompute="stages")
    assert relative_error(run_step(make(), images)[1], oracle.gradient(images)[1]) <= 1e-10


def test_backward_twice_raises(tiny_extractor, draw_images):
    make, _ = make_pair(tiny_extractor, draw_images, "none", kernels="reference", recompute="stages")
    loss = make()(draw_images(MINIBATCH, torch.float32).requires_grad_())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_unknown_recompute(tiny_extractor):
    with pytest.raises(ValueError, match="recompute: 'all' is not one of none, stages"):
        FeaturePass(tiny_extractor, recompute="all")


def test_stages_keep_at_most_two_thirds():
    """Numbers kept between forward and backward, the inputs of stages; `best_cuts` has its own test of the rest."""
    extractor = build_extractor("vgg19+resnet18", image_size=32)
    feature_pass = FeaturePass(extractor, recompute="stages")
    kept = feature_pass.keep(torch.rand(2, 3, 32, 32), Chunk(slice(0, 2), Activate()))
    numbers = sum(x.numel() for network in kept for x in network) / 2
    assert numbers <= 0.65 * extractor.num_features


@pytest.mark.parametrize(
    ("name", "autocast"),
    [("dcgan", False), ("dcgan", True), ("resnet", False), slow("resnet", True)],
    ids=lambda value: {False: "float32", True: "bf16"}.get(value, value),
)
def test_recomputed_generator(name, autocast):
    """Images, gradients and BatchNorm's running statistics, bit for bit."""
    plain = build_generator(name, image_size=32, nz=10)
    twin = copy.deepcopy(plain)
    for _ in range(2):
        z = torch.randn(6, 10)
        results = []
        for generator, recompute in ((plain, False), (twin, True)):
            generator.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                images = run_generator(generator, z, recompute=recompute)
            images.float().square().sum().backward()
            results.append(images)
        assert torch.equal(*results)
        for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        for (key, ours), theirs in zip(twin.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs), key
    assert int(twin.state_dict()["layers.0.num_batches_tracked" if name == "dcgan" else "bn.num_batches_tracked"]) == 2


def numbers_alive() -> int:
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor)


@pytest.mark.parametrize("name", ["dcgan", "resnet"])
def test_recomputed_generator_keeps_z_alone(name):
    generator = build_generator(name, image_size=32, nz=10)
    z = torch.randn(6, 10)
    before = numbers_alive()
    images = run_generator(generator, z, recompute=True)
    assert numbers_alive() - before <= 2 * images.numel()  # its gradient's function may hold them too
