"""MomentMatching against the objective written out in float64 (`oracle.WrittenOut`)."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.marks import slow
from helpers.objectives import (
    AVERAGERS,
    CHUNKS,
    IN_BOTH_BACKENDS,
    MINIBATCH,
    STEPS,
    assert_same_state,
    make_pair,
    real_features,
    run_step,
)
from oracle import WrittenOut, batch_moments, hooked_features, in_float64, relative_error, tapped
from torch import Tensor, nn

from engine.comparison.averagers import AMA
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching


class TestAgainstTheWrittenOutObjective:
    """Five consecutive steps on different images: losses, gradients and the averager's state."""

    @pytest.mark.parametrize("kernels", ["reference", "compiled"])
    @pytest.mark.parametrize("correction", [0, 1])
    @pytest.mark.parametrize("name", AVERAGERS)
    def test_float64_in_any_chunks(self, name, correction, kernels, tiny_extractor, draw_images):
        extractor = in_float64(tiny_extractor)
        make, oracle = make_pair(extractor, draw_images, name, correction=correction, kernels=kernels)
        objectives = {chunk: make(chunk_size=chunk) for chunk in CHUNKS}
        between_chunks = 1e-9 if name.startswith("ama") else 1e-12
        for _ in range(STEPS):
            images = draw_images(MINIBATCH)
            loss, gradient = oracle.gradient(images)
            found = {chunk: run_step(objective, images) for chunk, objective in objectives.items()}
            for chunk, objective in objectives.items():
                found_loss, found_gradient = found[chunk]
                assert relative_error(found_loss, loss) <= 1e-10, f"chunk {chunk}"
                assert relative_error(found_gradient, gradient) <= 1e-10, f"chunk {chunk}"
                assert relative_error(found_gradient, found[None][1]) <= between_chunks, f"chunk {chunk}"
                assert_same_state(objective, oracle, 1e-10)

    @pytest.mark.parametrize("correction", [0, 1])
    @pytest.mark.parametrize(("name", "kernels"), IN_BOTH_BACKENDS)
    def test_float32(self, name, kernels, correction, tiny_extractor, draw_images):
        make, oracle = make_pair(tiny_extractor, draw_images, name, correction=correction, kernels=kernels)
        objectives = {chunk: make(chunk_size=chunk) for chunk in (None, 3)}
        tolerance = 2e-3 if name.startswith("ama") else 5e-5
        for _ in range(STEPS):
            images = draw_images(MINIBATCH, torch.float32)
            loss, gradient = oracle.gradient(images)
            for chunk, objective in objectives.items():
                found_loss, found_gradient = run_step(objective, images)
                assert found_loss.dtype == found_gradient.dtype == torch.float32
                assert relative_error(found_loss, loss) <= tolerance, f"chunk {chunk}"
                assert relative_error(found_gradient, gradient) <= tolerance, f"chunk {chunk}"
                assert_same_state(objective, oracle, tolerance)

    @pytest.mark.parametrize("kernels", ["reference", slow("compiled")])
    def test_a_built_pair_in_float32(self, kernels, built_extractor, draw_images):
        """AMA's first steps are sign-like, so its own oracle state is handed over before each gradient."""
        extractor = built_extractor("vgg-small+resnet18")
        make, oracle = make_pair(extractor, draw_images, "ama", kernels=kernels)
        one, chunked = make().eval(), make(chunk_size=4).eval()
        plain, plain_oracle = make_pair(extractor, draw_images, "none", kernels=kernels)
        without = plain(chunk_size=4)
        for _ in range(2):
            images = draw_images(MINIBATCH, torch.float32)
            _, gradient = oracle.gradient(images)
            for objective in (one, chunked):
                objective.load_state_dict(oracle.state())
                assert relative_error(run_step(objective, images)[1], gradient) <= 5e-5
        _, gradient = plain_oracle.gradient(images)
        assert relative_error(run_step(without, images)[1], gradient) <= 5e-5

    @pytest.mark.parametrize("extractor_name", ["vgg-small", "resnet18"])
    def test_built_extractors_in_float64(self, extractor_name, built_extractor, draw_images):
        extractor = in_float64(built_extractor(extractor_name))
        make, oracle = make_pair(extractor, draw_images, "ama", kernels="reference")
        objectives = [make(chunk_size=chunk) for chunk in (None, 7)]
        for _ in range(2):
            images = draw_images(MINIBATCH)
            loss, gradient = oracle.gradient(images)
            for objective in objectives:
                found_loss, found_gradient = run_step(objective, images)
                assert relative_error(found_loss, loss) <= 1e-10
                assert relative_error(found_gradient, gradient) <= 1e-10
                assert_same_state(objective, oracle, 1e-10)

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_other_activations(self, chunk, draw_images):
        """ReLU6 is masked on both sides; SiLU and GELU stay in the graph, on the second pass too."""
        network = nn.Sequential()
        for channels, activation in ((3, nn.SiLU()), (6, nn.GELU()), (6, nn.ReLU6()), (6, nn.ReLU())):
            network.extend([nn.Conv2d(channels, 6, 3, padding=1), activation])
        network[4].weight.data *= 200
        extractor = in_float64(tapped(network, image_size=8))
        make, oracle = make_pair(extractor, draw_images, "ama", kernels="reference", chunk_size=chunk)
        oracle.features = hooked_features(network, list(network)[1::2])
        images = draw_images(MINIBATCH)
        assert (oracle.features(images) == 6).any()
        assert (oracle.features(images) < 0).any()
        objective = make()
        for _ in range(2):
            loss, gradient = oracle.gradient(images)
            found_loss, found_gradient = run_step(objective, images)
            assert relative_error(found_loss, loss) <= 1e-10
            assert relative_error(found_gradient, gradient) <= 1e-10

    def test_ama_in_float32_from_the_paper_s_rate(self, tiny_extractor, draw_images):
        """lr 1e-5 as in the presets, five steps end to end."""
        real = real_features(tiny_extractor, draw_images)
        objective = MomentMatching(tiny_extractor, Moments.of(real), AMA(), kernels="reference", chunk_size=4)
        oracle = WrittenOut(in_float64(tiny_extractor).features, batch_moments(real, 1), "ama", 1e-5)
        for _ in range(STEPS):
            images = draw_images(MINIBATCH, torch.float32)
            assert relative_error(run_step(objective, images)[1], oracle.gradient(images)[1]) <= 2e-3


class TestUpstream:
    """What comes before and after the objective in the user's graph."""

    @pytest.mark.parametrize("chunk", [None, 3])
    @pytest.mark.parametrize("name", ["ama", "ma-authors"])
    def test_a_scaled_loss_beside_another_term(self, name, chunk, tiny_extractor, draw_images):
        extractor = in_float64(tiny_extractor)
        make, oracle = make_pair(extractor, draw_images, name, kernels="reference", chunk_size=chunk)
        images = draw_images(MINIBATCH).requires_grad_()
        weights = torch.randn(MINIBATCH, 3, 8, 8, dtype=torch.float64)
        (expected,) = torch.autograd.grad(3.7 * oracle(images) + (images * weights).sum(), images)
        (3.7 * make()(images) + (images * weights).sum()).backward()
        assert relative_error(images.grad, expected) <= 1e-10

    @pytest.mark.parametrize("kernels", ["reference", "compiled"])
    @pytest.mark.parametrize("chunk", [None, 1, 3])
    def test_generator_with_batchnorm(self, chunk, kernels, tiny_extractor, draw_images):
        """The generator sees the whole minibatch, so chunks change neither its gradients nor its running statistics."""
        extractor = in_float64(tiny_extractor)
        make, oracle = make_pair(extractor, draw_images, "ama", kernels=kernels, chunk_size=chunk)
        generator = nn.Sequential(
            nn.ConvTranspose2d(6, 5, 4), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 3, 2, stride=2), nn.Tanh()
        ).double()
        twin = copy.deepcopy(generator)
        objective = make()
        for _ in range(2):
            z = torch.randn(MINIBATCH, 6, 1, 1, dtype=torch.float64)
            generator.zero_grad()
            objective(generator(z)).backward()
            twin.zero_grad()
            oracle(twin(z)).backward()
            for (name, ours), theirs in zip(generator.named_parameters(), twin.parameters(), strict=True):
                # The bias ahead of BatchNorm has a gradient of zero up to rounding, so measure against them all.
                scale = float(torch.cat([p.grad.flatten() for p in twin.parameters()]).norm())
                assert float((ours.grad - theirs.grad).norm()) <= 1e-10 * scale, name
            for ours, theirs in zip(generator.buffers(), twin.buffers(), strict=True):
                assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("chunk", [None, 4])
    @pytest.mark.parametrize(
        ("amp_dtype", "most"), [(torch.bfloat16, 0.04), (torch.float16, 0.01)], ids=["bf16", "fp16"]
    )
    def test_low_precision_is_close(self, amp_dtype, most, chunk, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "none", kernels="reference", chunk_size=chunk)
        images = draw_images(MINIBATCH, torch.float32)
        full_loss, full = run_step(make(), images)
        low = make(amp_dtype=amp_dtype)
        images.requires_grad_()
        loss = low(images)
        loss.backward()
        assert loss.dtype == images.grad.dtype == torch.float32
        assert low.accumulation_dtype == low.target.mean.dtype == torch.float32
        assert relative_error(loss.detach(), full_loss) <= most
        assert relative_error(images.grad, full) <= most
        assert relative_error(images.grad, full) >= 1e-5, "the arithmetic was not in the low dtype"

    def test_loss_scale_reaches_the_coefficients_before_float16(self, tiny_extractor, draw_images):
        """With v of 2e-8 every gradient is below float16's smallest number until the loss is scaled."""
        direction = torch.randn(2, tiny_extractor.num_features)
        images = draw_images(MINIBATCH, torch.float32)
        real = real_features(tiny_extractor, draw_images)

        def gradient(amp_dtype: torch.dtype | None, scale: float) -> Tensor:
            objective = MomentMatching(
                tiny_extractor, Moments.of(real), AMA(), kernels="reference", amp_dtype=amp_dtype
            )
            state = objective.state_dict()
            objective.load_state_dict({**state, "averager.v": 2e-8 * direction})
            x = images.clone().requires_grad_()
            (objective.eval()(x) * scale).backward()
            return x.grad.double() / scale

        full = gradient(None, 1.0)
        assert relative_error(gradient(torch.float16, 2.0**20), full) <= 0.03
        assert relative_error(gradient(torch.float16, 1.0), full) >= 0.5

    def test_no_autocast_inside(self, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference", chunk_size=4)
        images = draw_images(MINIBATCH, torch.float32)
        _, expected = run_step(make(), images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, found = run_step(make(), images)
        assert torch.equal(found, expected)


class TestImages:
    """Images as they come."""

    @pytest.mark.parametrize("chunk", [None, 3])
    @pytest.mark.parametrize(
        "arrange",
        [
            pytest.param(lambda x: x.contiguous(memory_format=torch.channels_last), id="channels_last"),
            pytest.param(lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), id="permuted"),
            pytest.param(lambda x: x.repeat(1, 1, 2, 2)[:, :, :8, 8:], id="cut out"),
            pytest.param(lambda x: x.repeat_interleave(2, dim=0)[::2], id="every second"),
            pytest.param(lambda x: x.flip(3).flip(3), id="flipped twice"),
        ],
    )
    def test_strides_do_not_matter(self, arrange, chunk, tiny_extractor, draw_images):
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, "ama", kernels="reference")
        images = draw_images(MINIBATCH)
        _, expected = oracle.gradient(images)
        arranged = arrange(images)
        assert torch.equal(arranged, images)
        assert relative_error(run_step(make(chunk_size=chunk), arranged)[1], expected) <= 1e-10

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_one_image_expanded(self, chunk, tiny_extractor, draw_images):
        """A batch with stride 0: all variances are zero, and the gradients of the copies add up in the one image."""
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, "ma", kernels="reference")
        image = draw_images(1).requires_grad_()
        (expected,) = torch.autograd.grad(oracle(image.expand(5, 3, 8, 8)), image)
        make(chunk_size=chunk)(image.expand(5, 3, 8, 8)).backward()
        assert relative_error(image.grad, expected) <= 1e-10

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_images_are_left_alone(self, chunk, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference", chunk_size=chunk)
        images = draw_images(4, torch.float32).contiguous(memory_format=torch.channels_last)
        before = images.clone()
        run_step(make(), images)
        assert torch.equal(images, before)

    def test_non_leaf(self, tiny_extractor, draw_images):
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, "ama", kernels="reference")
        leaf = draw_images(MINIBATCH).requires_grad_()
        (expected,) = torch.autograd.grad(oracle(leaf.tanh()), leaf)
        images = leaf.tanh()
        images.retain_grad()
        make()(images).backward()
        assert relative_error(leaf.grad, expected) <= 1e-10
        assert relative_error(images.grad * (1 - images.square()), expected) <= 1e-10

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_without_requires_grad_the_averager_steps_all_the_same(self, chunk, tiny_extractor, draw_images):
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, "ama", kernels="reference", chunk_size=chunk)
        images = draw_images(MINIBATCH)
        objective = make()
        loss = objective(images)
        assert not loss.requires_grad
        assert relative_error(loss, oracle.gradient(images)[0]) <= 1e-10
        assert_same_state(objective, oracle, 1e-10)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
    @pytest.mark.parametrize("chunk", [None, 3])
    @pytest.mark.parametrize("kernels", ["reference", "compiled"])
    def test_what_is_not_finite_reaches_the_loss(self, kernels, chunk, value, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels=kernels, chunk_size=chunk)
        images = draw_images(MINIBATCH, torch.float32)
        images[-1, 1, 4, 4] = value
        assert not torch.isfinite(make()(images.requires_grad_()))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.zeros(4, 3, 16, 16), r"images: .*\[N, 3, 8, 8\].*\[4, 3, 16, 16\]"),
            (torch.zeros(4, 1, 8, 8), r"images: .*\[4, 1, 8, 8\]"),
            (torch.zeros(3, 8, 8), r"images: .*\[3, 8, 8\]"),
            (torch.zeros(1, 3, 8, 8), "images: .*minibatch of 1"),
            (torch.zeros(0, 3, 8, 8), "images: "),
            (torch.zeros(4, 3, 8, 8, device="meta"), "images: .*meta.*cpu"),
        ],
        ids=["size", "channels", "dimensions", "one", "none", "device"],
    )
    def test_wrong_images(self, images, message, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference")
        objective = make()
        before = objective.state_dict()
        with pytest.raises(ValueError, match=message):
            objective(images)
        for name, tensor in objective.state_dict().items():
            assert torch.equal(tensor, before[name]), name
