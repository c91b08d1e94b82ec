"""MomentMatching against the objective written out in float64 (`oracle.WrittenOut`), and its manners as a module."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from helpers.objectives import AVERAGERS, MINIBATCH, assert_same_state, make_pair, real_features, run_step
from oracle import WrittenOut, batch_moments, hooked_features, in_float64, relative_error, tapped
from torch import Tensor, nn

from engine.comparison.averagers import AMA, MovingAverage, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching, target_fingerprint
from engine.support.errors import InputError

# Every rule of the averager compiles a kernel of its own for every dtype, in a few seconds each, and the kernels' own
# tests have them all. So here all averagers meet the compiled backend in float64, and these in float32 too.
IN_BOTH_BACKENDS = [
    *((name, "reference") for name in AVERAGERS),
    ("ama", "compiled"),
    ("none", "compiled"),
]
CHUNKS = (None, 1, 2, 3, 7)
STEPS = 5


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

    @pytest.mark.parametrize("kernels", ["reference", "compiled"])
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
        ("amp_dtype", "least"), [(torch.bfloat16, 0.999), (torch.float16, 0.9999)], ids=["bf16", "fp16"]
    )
    def test_low_precision_points_the_same_way(self, amp_dtype, least, chunk, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "none", kernels="reference", chunk_size=chunk)
        images = draw_images(MINIBATCH, torch.float32)
        _, full = run_step(make(), images)
        low = make(amp_dtype=amp_dtype)
        images.requires_grad_()
        loss = low(images)
        loss.backward()
        assert loss.dtype == images.grad.dtype == torch.float32
        assert low.averager.v.dtype == torch.float32
        assert float(torch.cosine_similarity(images.grad.flatten(), full.flatten(), dim=0)) >= least
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


class TestBackward:
    """The one node that a loss is."""

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_twice_raises(self, chunk, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference", chunk_size=chunk)
        loss = make()(draw_images(MINIBATCH, torch.float32).requires_grad_())
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_retained_is_refused_or_right(self, chunk, tiny_extractor, draw_images):
        """Never a wrong gradient: with one chunk the activations are gone, with several they are computed again."""
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, "ama", kernels="reference", chunk_size=chunk)
        images = draw_images(MINIBATCH).requires_grad_()
        _, expected = oracle.gradient(images)
        loss = make()(images)
        loss.backward(retain_graph=True)
        assert relative_error(images.grad, expected) <= 1e-10
        if chunk is None:
            with pytest.raises(RuntimeError, match="second time"):
                loss.backward()
        else:
            (5 * loss).backward()
            assert relative_error(images.grad, 6 * expected) <= 1e-10

    @pytest.mark.parametrize("chunk", [None, 3])
    @pytest.mark.parametrize("name", ["ama", "ma", "ma-authors"])
    def test_two_losses_before_two_backwards(self, name, chunk, tiny_extractor, draw_images):
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, name, kernels="reference", chunk_size=chunk)
        objective = make()
        batches = [draw_images(MINIBATCH).requires_grad_(), draw_images(7).requires_grad_()]
        expected = [oracle.gradient(images)[1] for images in batches]
        losses = [objective(images) for images in batches]
        for loss in reversed(losses):
            loss.backward()
        for images, gradient in zip(batches, expected, strict=True):
            assert relative_error(images.grad, gradient) <= 1e-10

    @pytest.mark.parametrize("kernels", ["reference", "compiled"])
    def test_evaluating_an_average_of_moments_includes_the_batch(self, kernels, tiny_extractor, draw_images):
        """The loss without a step is the one that the next step would have, so it depends on the images."""
        extractor = in_float64(tiny_extractor)
        make, oracle = make_pair(extractor, draw_images, "ma-authors", kernels=kernels)
        objective = make()
        for _ in range(2):
            images = draw_images(MINIBATCH)
            objective.eval()
            shown = images.clone().requires_grad_()
            loss = objective(shown)
            loss.backward()
            objective.train()
            expected, gradient = oracle.gradient(images.requires_grad_())
            assert relative_error(loss, expected) <= 1e-10
            assert relative_error(shown.grad, gradient) <= 1e-10
            objective(images)

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_images_changed_in_between_raise(self, chunk, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference", chunk_size=chunk)
        images = draw_images(MINIBATCH, torch.float32).requires_grad_()
        shown = images * 1
        loss = make()(shown)
        with torch.no_grad():
            shown += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_second_derivatives_raise(self, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "none", kernels="reference")
        images = draw_images(4, torch.float32).requires_grad_()
        (gradient,) = torch.autograd.grad(make()(images), images, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.sum().backward()

    @pytest.mark.parametrize("done", [True, False], ids=["after backward", "dropped"])
    def test_activations_are_freed(self, done, tiny_extractor, draw_images):
        """After backward while the loss is still held, or with the loss; never first by the garbage collector."""
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference")
        objective = make()
        activations: list[weakref.ref[torch.UntypedStorage]] = []
        moments: list[weakref.ref[torch.UntypedStorage]] = []
        collect = objective.kernels.relu_moments

        class Watched:
            averager_step = staticmethod(objective.kernels.averager_step)
            relu_moments_backward = staticmethod(objective.kernels.relu_moments_backward)

            @staticmethod
            def relu_moments(x, mean, *args):
                activations.append(weakref.ref(x.untyped_storage()))
                moments.append(weakref.ref(mean.untyped_storage()))
                collect(x, mean, *args)

        objective.kernels = Watched
        gc.disable()
        try:
            loss = objective(draw_images(4, torch.float32).requires_grad_())
            assert len(activations) == len(tiny_extractor.taps)
            assert all(reference() is not None for reference in activations)
            assert all(reference() is None for reference in moments), "backward needs the coefficients alone"
            if done:
                loss.backward()
            else:
                del loss
            assert all(reference() is None for reference in activations)
        finally:
            gc.enable()


class TestStepping:
    """When the averager steps, and what a resumed run needs."""

    @pytest.mark.parametrize("name", AVERAGERS)
    def test_evaluation_and_no_grad_read_the_state_only(self, name, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, name, kernels="reference")
        objective = make()
        run_step(objective, draw_images(MINIBATCH, torch.float32))
        before = objective.state_dict()
        images = draw_images(MINIBATCH, torch.float32).requires_grad_()
        with torch.no_grad():
            quiet = objective(images)
        with torch.inference_mode():
            objective(images.detach())
        evaluated = objective.eval()(images)
        evaluated.backward()
        assert not quiet.requires_grad
        assert torch.equal(quiet, evaluated.detach())
        for key, tensor in objective.state_dict().items():
            assert torch.equal(tensor, before[key]), key
        objective.train()(images.detach())
        assert int(objective.state_dict()["averager.steps"]) == (0 if name == "none" else 2)

    @pytest.mark.parametrize("name", ["ama", "ama-authors", "ma", "none"])
    def test_evaluation_uses_v_as_it_stands(self, name, tiny_extractor, draw_images):
        """L = Σ v·Δ with the state's v, whatever the images; for `none` the loss itself."""
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, name, kernels="reference")
        objective = make()
        run_step(objective, draw_images(MINIBATCH))
        images = draw_images(MINIBATCH).requires_grad_()
        difference = oracle.target - batch_moments(oracle.features(images), 1)
        v = difference if name == "none" else objective.state_dict()["averager.v"]
        (expected,) = torch.autograd.grad((v * difference).sum(), images)
        loss = objective.eval()(images)
        loss.backward()
        assert relative_error(loss, (v * difference).sum()) <= 1e-10
        assert relative_error(images.grad, expected) <= 1e-10

    @pytest.mark.parametrize("chunk", [None, 3])
    @pytest.mark.parametrize(("name", "kernels"), IN_BOTH_BACKENDS)
    def test_resumed_equals_uninterrupted_bit_for_bit(self, name, kernels, chunk, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, name, kernels=kernels, chunk_size=chunk)
        batches = [draw_images(MINIBATCH, torch.float32) for _ in range(4)]
        uninterrupted, first, second = make(), make(), make()
        expected = [run_step(uninterrupted, images) for images in batches]
        found = [run_step(first, images) for images in batches[:2]]
        second.load_state_dict(first.state_dict())
        found += [run_step(second, images) for images in batches[2:]]
        for (found_loss, found_gradient), (loss, gradient) in zip(found, expected, strict=True):
            assert torch.equal(found_loss, loss)
            assert torch.equal(found_gradient, gradient)
        for key, tensor in second.state_dict().items():
            assert torch.equal(tensor, uninterrupted.state_dict()[key]), key

    def test_state_is_a_copy(self, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference")
        objective = make()
        before = objective.state_dict()
        run_step(objective, draw_images(MINIBATCH, torch.float32))
        assert int(before["averager.steps"]) == 0
        assert not before["averager.v"].any()

    @pytest.mark.parametrize("name", AVERAGERS)
    def test_kernels_and_chunks_share_one_state(self, name, tiny_extractor, draw_images):
        """A run that changes backend and chunks at every step is the run that doesn't."""
        make, oracle = make_pair(in_float64(tiny_extractor), draw_images, name)
        state = None
        for kernels, chunk in (("reference", None), ("compiled", 3), ("reference", 2), ("compiled", None)):
            objective = make(kernels=kernels, chunk_size=chunk)
            if state is not None:
                objective.load_state_dict(state)
            images = draw_images(MINIBATCH)
            loss, gradient = oracle.gradient(images)
            found_loss, found_gradient = run_step(objective, images)
            assert relative_error(found_loss, loss) <= 1e-10
            assert relative_error(found_gradient, gradient) <= 1e-10
            state = objective.state_dict()

    def test_state_is_in_public_order(self, tiny_extractor, draw_images):
        """With α = 1 the averager's v is the difference itself, feature by feature."""
        extractor = in_float64(tiny_extractor)
        real, images = real_features(extractor, draw_images), draw_images(MINIBATCH)
        objective = MomentMatching(extractor, Moments.of(real), MovingAverage(alpha=1), kernels="reference")
        objective(images)
        difference = batch_moments(real, 1) - batch_moments(extractor.features(images), 1)
        assert float((objective.state_dict()["averager.v"] - difference).abs().max()) <= 1e-12

    def test_state_at_the_start_is_in_public_order(self, tiny_extractor, draw_images):
        """The same seed is the same v for every backend, feature by feature."""
        make, _ = make_pair(tiny_extractor, draw_images, "ama-authors", kernels="reference")
        alone = AMA(variant="authors", seed=5)
        alone.reset(tiny_extractor.num_features)
        assert torch.equal(make().state_dict()["averager.v"], alone.v)

    def test_state_inside_another_module(self, tiny_extractor, draw_images):
        """The averager travels in the state of the module that holds the objective; frozen weights do not."""
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference")
        holder, other = (nn.ModuleDict({"generator": nn.Linear(2, 2), "objective": make()}) for _ in range(2))
        run_step(holder["objective"], draw_images(MINIBATCH, torch.float32))
        state = holder.state_dict()
        assert {name for name in state if name.startswith("objective.")} == {
            "objective.averager.v",
            "objective.averager.m",
            "objective.averager.u",
            "objective.averager.steps",
        }
        other.load_state_dict(state)
        images = draw_images(MINIBATCH, torch.float32)
        assert torch.equal(run_step(holder["objective"], images)[1], run_step(other["objective"], images)[1])
        with pytest.raises(RuntimeError, match=r"objective\."):
            other.load_state_dict({name: tensor for name, tensor in state.items() if "objective" not in name})

    def test_state_of_another_averager_or_extractor(self, tiny_extractor, built_extractor, draw_images):
        made = {name: make_pair(tiny_extractor, draw_images, name, kernels="reference")[0]() for name in AVERAGERS}
        elsewhere = make_pair(built_extractor("vgg-small"), draw_images, "ama", kernels="reference")[0]()
        for found in (made["ma"], made["none"], elsewhere):
            before = made["ama"].state_dict()
            with pytest.raises(ValueError, match=r"averager\."):
                made["ama"].load_state_dict(found.state_dict())
            for key, tensor in made["ama"].state_dict().items():
                assert torch.equal(tensor, before[key]), key

    def test_no_parameters_to_train(self, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "ama", kernels="reference")
        assert not list(make().parameters())


class TestArguments:
    """What `MomentMatching` refuses."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"correction": 2}, "correction: .*2"),
            ({"chunk_size": 0}, "chunk_size: .*0"),
            ({"kernels": "cuda"}, "kernels: .*'cuda'"),
            ({"process_group": object()}, "process_group: "),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_options(self, options, message, tiny_extractor):
        features = tiny_extractor.num_features
        target = Moments(3, torch.zeros(features), torch.ones(features))
        with pytest.raises(ValueError, match=message):
            MomentMatching(tiny_extractor, target, NoAverage(), **{"kernels": "reference", **options})

    def test_target_of_another_size(self, tiny_extractor):
        with pytest.raises(ValueError, match=f"target: .*5 features.*{tiny_extractor.num_features}"):
            MomentMatching(tiny_extractor, Moments(3, torch.zeros(5), torch.ones(5)), NoAverage())

    def test_target_of_one_image(self, tiny_extractor):
        features = tiny_extractor.num_features
        target = Moments(1, torch.zeros(features), torch.zeros(features))
        with pytest.raises(ValueError, match="variance"):
            MomentMatching(tiny_extractor, target, NoAverage(), kernels="reference")

    def test_labels_have_their_place(self, tiny_extractor, draw_images):
        make, _ = make_pair(tiny_extractor, draw_images, "none", kernels="reference")
        with pytest.raises(ValueError, match="labels"):
            make()(draw_images(4, torch.float32), labels=torch.zeros(4))

    def test_target_of_another_extractor_or_precision(self, built_extractor):
        extractor = built_extractor("vgg-small")
        zeros = torch.zeros(extractor.num_features)
        own = target_fingerprint(extractor, None)
        MomentMatching(extractor, Moments(3, zeros, zeros, own), NoAverage(), kernels="reference")
        with pytest.raises(InputError, match="precision is float32, expected bfloat16"):
            MomentMatching(extractor, Moments(3, zeros, zeros, own), NoAverage(), amp_dtype=torch.bfloat16)
        foreign = Moments(3, zeros, zeros, {**own, "extractor_weights": "0123"})
        with pytest.raises(InputError, match=r"target: .*extractor_weights is 0123, expected"):
            MomentMatching(extractor, foreign, NoAverage())
