"""The engine on a CUDA device: against float64 on the CPU."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.objectives import AVERAGERS, MINIBATCH, real_features, run_step
from helpers.runs import same_run
from oracle import in_float64, relative_error

from engine.comparison.distances.moments import Moments
from engine.comparison.moment_matching import MomentMatching
from engine.generation.drawn_ahead import CudaLane, DrawnAhead
from engine.generation.networks import build_generator, run_generator
from engine.generation.priors import Gaussian, Noise
from engine.representation.extractor import Extractor
from engine.train import main
from engine.training.graphs import EAGER_STEPS, CudaGraphs
from engine.training.trainer import Trainer
from pipelines import ImageLoader, open_dataset

pytestmark = pytest.mark.requires_gpu


@pytest.fixture
def on_gpu(tiny_extractor: Extractor) -> Extractor:
    return copy.deepcopy(tiny_extractor).cuda()


@pytest.mark.parametrize("recompute", ["none", "stages"])
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("name", AVERAGERS)
def test_gradients(name, chunk, recompute, tiny_extractor, on_gpu, draw_images):
    target = Moments.of(real_features(tiny_extractor, draw_images))
    make_averager, _ = AVERAGERS[name]
    oracle = MomentMatching(in_float64(tiny_extractor), target, make_averager(), kernels="reference")
    objective = MomentMatching(on_gpu, target, make_averager(), chunk_size=chunk, recompute=recompute)
    assert objective.kernels.__name__ == "kernels.triton"
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(3):
            images = draw_images(MINIBATCH, torch.float32)
            loss, gradient = run_step(oracle, images)
            found_loss, found = run_step(objective, images.cuda())
            assert relative_error(found_loss.cpu(), loss) <= 2e-3
            assert relative_error(found.cpu(), gradient) <= (2e-3 if name.startswith("ama") else 5e-5)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.999), (torch.float16, 0.9999)], ids=["bf16", "fp16"])
def test_low_precision(dtype, least, tiny_extractor, on_gpu, draw_images):
    target = Moments.of(real_features(tiny_extractor, draw_images))
    images = draw_images(MINIBATCH, torch.float32)
    make_averager, _ = AVERAGERS["none"]
    _, gradient = run_step(MomentMatching(in_float64(tiny_extractor), target, make_averager()), images)
    _, found = run_step(MomentMatching(on_gpu, target, make_averager(), amp_dtype=dtype), images.cuda())
    assert float(torch.cosine_similarity(found.cpu().double().flatten(), gradient.flatten(), dim=0)) >= least


def test_recomputed_generator():
    plain = build_generator("dcgan", image_size=32, nz=10).cuda()
    twin = copy.deepcopy(plain)
    z = torch.randn(16, 10, device="cuda")
    for generator, recompute in ((plain, False), (twin, True)):
        run_generator(generator, z, recompute=recompute).square().sum().backward()
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(twin.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("flags", [[], ["--amp"], ["--amp", "--amp-dtype", "fp16"]], ids=["float32", "bf16", "fp16"])
def test_training(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    common = ["--device", "cuda", "--weights", "random", "--steps", "5", "--log-every", "1", "--chunk-size", "24"]
    main([*common, "--recompute", "stages", "--recompute-generator", "--out", str(run), *flags])
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 5
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize(
    "flags",
    [["--amp"], ["--amp", "--amp-dtype", "fp16", "--chunk-size", "24"], ["--averager", "ma", "--recompute", "stages"]],
    ids=lambda flags: " ".join(flags).replace("--", ""),
)
def test_a_graphed_run_has_the_same_bits(flags, tmp_path, monkeypatch, caplog):
    """100 steps eager, captured, and captured twice with a resume in between; a replayed step never waits."""
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    captures, capture, train_step = [], CudaGraphs.capture, Trainer.train_step

    def counted(self, step):
        captures.append(step)
        return capture(self, step)

    def without_waiting(self):
        replayed = self.graphed is not None and self.graphed.is_captured
        torch.cuda.set_sync_debug_mode("error" if replayed else "default")
        try:
            return train_step(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(CudaGraphs, "capture", counted)
    monkeypatch.setattr(Trainer, "train_step", without_waiting)
    common = ["--device", "cuda", "--weights", "random", "--log-every", "1", "--generator-ema", "0.9", *flags]
    common += ["--sample-every", "30", "--checkpoint-every", "40"]
    main([*common, "--steps", "100", "--no-cuda-graph", "--out", str(tmp_path / "eager")])
    assert captures == []
    main([*common, "--steps", "100", "--out", str(tmp_path / "graphed")])
    assert len(captures) == 1
    main([*common, "--steps", "50", "--out", str(tmp_path / "parts")])
    main(["--resume", "--steps", "100", "--out", str(tmp_path / "parts")])
    assert len(captures) == 3
    assert "cannot be captured" not in caplog.text
    assert same_run(tmp_path / "eager", tmp_path / "graphed")
    assert same_run(tmp_path / "eager", tmp_path / "parts")


def test_what_waits_is_not_captured_and_training_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GFMN_CACHE", str(tmp_path / "cache"))
    forward = MomentMatching.forward

    def waiting(self, images):
        images.sum().item()
        return forward(self, images)

    monkeypatch.setattr(MomentMatching, "forward", waiting)
    common = ["--device", "cuda", "--weights", "random", "--log-every", "1", "--steps", str(EAGER_STEPS + 5)]
    main([*common, "--no-cuda-graph", "--out", str(tmp_path / "eager")])
    main([*common, "--out", str(tmp_path / "refused")])
    assert caplog.text.count("cannot be captured in a CUDA graph") == 1
    assert same_run(tmp_path / "eager", tmp_path / "refused")


def test_z_drawn_ahead_is_the_stream_s():
    prior, plain, ahead = Gaussian(100), Noise(3), DrawnAhead(3, CudaLane(torch.device("cuda")))
    for _ in range(20):
        ahead.deliver()
        ahead.begin()
        z = ahead.draw(prior, 4096)
        torch.cuda._sleep(10_000_000)  # the device lags behind
        found = z.clone()
        ahead.draw_ahead()
        assert torch.equal(found.cpu(), plain.draw(prior, 4096))


def test_dali_decodes_on_the_device(tmp_path):
    pytest.importorskip("nvidia.dali")
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for n, photo in enumerate(load_sample_images().images):
        Image.fromarray(photo[:218, :178]).save(tmp_path / f"{n}.jpg", quality=95)
    dataset = open_dataset("images", tmp_path, image_size=64, center_crop=160)
    batches = {
        device: torch.cat([batch.images.cpu() for batch in ImageLoader(dataset, 1, device=device, backend="dali")])
        for device in ("cpu", "cuda")
    }
    # nvJPEG and libjpeg-turbo differ by a few levels of 255; images are in [-1, 1].
    assert (batches["cpu"] - batches["cuda"]).abs().mean() <= 2 * 2 / 255
