"""MomentMatching as a module: backward, stepping, state, arguments."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.objectives import (
    AVERAGERS,
    IN_BOTH_BACKENDS,
    MINIBATCH,
    make_pair,
    real_features,
    run_step,
)
from oracle import batch_moments, in_float64, relative_error
from torch import nn

from engine.comparison.averagers import AMA, MovingAverage, NoAverage
from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.comparison.on_features import OnFeatures
from engine.representation.build import build_extractor
from engine.representation.extractor import feature_fingerprint
from engine.support.errors import InputError
from engine.training.ranks import Ranks


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

        objective.feature_pass.kernels = Watched
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
            ({"recompute": "all"}, "recompute: .*'all'"),
            ({"weights": torch.ones(3)}, r"weights: .*\[3\]"),
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

    def test_batch_statistics_and_several_ranks(self):
        """Each rank's would be of its own share, which trains another run than one process does."""
        extractor = build_extractor("resnet18", image_size=8, bn="batch", layers=1)
        ones, two = torch.ones(extractor.num_features), Ranks(0, 2, None)
        for make in (
            lambda: MomentMatching(extractor, Moments(3, ones, ones), NoAverage(), kernels="reference", ranks=two),
            lambda: OnFeatures(extractor, torch.sum, kernels="reference", ranks=two),
        ):
            with pytest.raises(InputError, match="whole minibatch in one process") as refused:
                make()
            assert refused.value.argument == "ranks"

    def test_target_of_one_image(self, tiny_extractor):
        features = tiny_extractor.num_features
        target = Moments(1, torch.zeros(features), torch.zeros(features))
        with pytest.raises(ValueError, match="variance"):
            MomentMatching(tiny_extractor, target, NoAverage(), kernels="reference")

    def test_target_of_another_extractor_or_precision(self, built_extractor):
        extractor = built_extractor("vgg-small")
        zeros = torch.zeros(extractor.num_features)
        own = feature_fingerprint(extractor, None)
        MomentMatching(extractor, Moments(3, zeros, zeros, own), NoAverage(), kernels="reference")
        with pytest.raises(InputError, match="precision was float32, is bfloat16"):
            MomentMatching(extractor, Moments(3, zeros, zeros, own), NoAverage(), amp_dtype=torch.bfloat16)
        foreign = Moments(3, zeros, zeros, {**own, "extractor_weights": "0123"})
        with pytest.raises(InputError, match=r"target: .*the extractor's weights changed"):
            MomentMatching(extractor, foreign, NoAverage())
