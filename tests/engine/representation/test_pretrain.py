import itertools
import json

import numpy as np
import pytest
import torch
from helpers.pretraining import interrupt_at, make_array, same, short
from PIL import Image
from safetensors import safe_open

from engine.representation.architectures import ARCHITECTURES
from engine.representation.build import build_extractor
from engine.representation.pretraining import images as sources
from engine.representation.pretraining import pretrain
from engine.representation.pretraining.images import Augmentation, open_images
from engine.representation.pretraining.recipe import one_cycle
from engine.representation.pretraining.shares import Rows
from engine.representation.pretraining.tasks import TASKS, TINTS, Rotate, Tinted
from engine.support.errors import InputError, Interrupted
from engine.support.files import read_safetensors, save_safetensors
from pipelines import open_dataset

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path):
    return open_dataset("images", make_array(tmp_path / "tiny.npz"), image_size=16)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for number in range(43):
        place = root / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 5 * number, dtype=np.uint8)).save(place / f"{number:02}.png")
    return open_dataset("images", root, image_size=16)


@pytest.mark.slow
def test_digits_classifier_reaches_98_percent_of_images_it_never_saw():
    result = pretrain("vgg-small", open_dataset("digits"), epochs=5, progress=False)
    assert result.metric == "accuracy"
    assert result.validation >= 0.98
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4, 5]
    assert json.loads(json.dumps(result.history)) == result.history
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("task", ["classify", "rotate"])
def test_same_seed_same_bits(tiny, task):
    first, again, other = (short(tiny, task=task, seed=seed) for seed in (3, 3, 4))
    assert same(first.state_dict, again.state_dict)
    assert first.history == again.history
    assert not same(first.state_dict, other.state_dict)


def test_callers_random_state_is_left_alone(tiny):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    short(tiny, steps=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("streamed", [False, True], ids=["in-memory", "streamed"])
def test_every_image_is_either_trained_on_or_held_out(folder, streamed, monkeypatch):
    if streamed:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    source = open_images(folder, 8, seed=1, device=CPU, loader="torch")
    epochs = [[shown for _, shown in source.epoch(number, 0)] for number in (0, 1)]
    trained = [torch.cat(epoch).tolist() for epoch in epochs]
    held_out = torch.cat([shown for _, shown in source.held_out()]).tolist()
    assert sorted(trained[0] + held_out) == list(range(43))
    assert sorted(trained[0]) == sorted(trained[1])
    assert trained[0] != trained[1]
    assert len(held_out) == 4
    assert len(epochs[0]) == source.steps_per_epoch
    again = [shown.tolist() for _, shown in source.epoch(1, 2)]
    assert again == [shown.tolist() for shown in epochs[1][2:]]
    for pictures, shown in (*source.epoch(0, 0), *source.held_out()):
        # Picture k of this folder is class (k % 2)'s, in the order of the names: 10·i or 10·i + 5 for the i-th.
        numbers = torch.where(shown < 22, 2 * shown, 2 * (shown - 22) + 1)
        expected = (5 * numbers / 127.5 - 1)[:, None, None, None].expand_as(pictures)
        torch.testing.assert_close(pictures, expected.float(), rtol=0, atol=1e-5)


def test_held_out_images_do_not_depend_on_the_seed(tiny):
    shown = [torch.cat([shown for _, shown in open_images(tiny, 8, seed=s, device=CPU).held_out()]) for s in (1, 2)]
    assert torch.equal(*shown)


def test_both_copies_of_a_mirrored_picture_are_held_out(folder, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    mirrored = open_dataset("images", folder.files.root, image_size=16, horizontal_flip=True)
    source = open_images(mirrored, 8, seed=1, device=CPU, loader="torch")
    trained = {number for _, shown in source.epoch(0, 0) for number in shown.tolist()}
    held_out = {number for _, shown in source.held_out() for number in shown.tolist()}
    assert not trained & held_out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_augmentation_is_a_window_of_the_padded_image(padding, flip):
    images = torch.rand(40, 3, 8, 8)
    result = Augmentation(padding, flip)(images, torch.Generator().manual_seed(0))
    assert result.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    for image, augmented in zip(images, result, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)), constant_values=-1)
        found = {
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in (False, True)
            if np.array_equal(
                padded[:, top : top + 8, left : left + 8][:, :, :: -1 if mirrored else 1], augmented.numpy()
            )
        }
        assert len(found) == 1
        seen |= found
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})
    assert {top for top, _, _ in seen} == set(range(2 * padding + 1))
    assert {left for _, left, _ in seen} == set(range(2 * padding + 1))


class TestTinted:
    """Grey images dyed slightly, so that features answer to hue."""

    def test_tints_are_slight_and_leave_black_alone(self):
        gains = torch.tensor(TINTS)
        assert gains.amax(dim=1).tolist() == [1.0] * len(TINTS)
        assert gains[0].tolist() == [1.0, 1.0, 1.0]
        assert gains[1:].amin() > 0.9
        assert len({tuple(gain.round(decimals=4).tolist()) for gain in gains}) == len(TINTS)

    def test_loss_is_that_of_dyed_images(self, tiny):
        """Written out image by image."""
        task = Tinted(ARCHITECTURES["vgg-small"], tiny)
        task.module.eval()
        images, labels = torch.rand(9, 3, 16, 16) * 2 - 1, torch.arange(9) % 2
        expected = 0.0
        for number, (image, label) in enumerate(zip(images, labels)):
            tint = number % len(TINTS)
            gains = torch.tensor(TINTS[tint]).view(3, 1, 1)
            outputs = task.module(((image / 2 + 0.5) * gains * 2 - 1)[None])[0]
            expected -= outputs[:2].log_softmax(0)[label] + 0.5 * outputs[2:].log_softmax(0)[tint]
        assert task.loss(images, labels, Rows.all_of(images)).item() == pytest.approx(expected.item() / 9, rel=1e-5)
        parts = [Rows(0, 4, 9), Rows(4, 9, 9)]
        shared = sum(task.loss(images[part.start : part.stop], labels[part.start : part.stop], part) for part in parts)
        assert shared.item() == pytest.approx(expected.item() / 9, rel=1e-5)

    def test_weights_make_an_extractor(self, tiny, tmp_path):
        short(tiny, task="tinted").save(tmp_path / "tinted.safetensors")
        assert build_extractor("vgg-small", image_size=16, weights=tmp_path / "tinted.safetensors").num_features

    def test_grey_images_are_known(self, tmp_path):
        images = np.zeros((20, 16, 16, 3), dtype=np.uint8)
        images[7, 3, 3, 1] = 1
        np.save(tmp_path / "coloured.npy", images)
        assert open_dataset("digits").is_grey()
        assert not open_dataset("images", tmp_path / "coloured.npy", image_size=16).is_grey()

    def test_of_many_images_a_share_is_asked(self, tmp_path):
        images = np.zeros((3 * 2048, 8, 8, 3), dtype=np.uint8)
        np.save(tmp_path / "many.npy", images)
        dataset = open_dataset("images", tmp_path / "many.npy", image_size=8)
        dataset.images[4, 0, 0, 1] = 1
        assert dataset.is_grey()
        dataset.images[3, 0, 0, 1] = 1
        assert not dataset.is_grey()


def test_rotate_names_the_quarter_turns():
    images = torch.rand(6, 3, 5, 5)
    turned, classes = Rotate.posed(None, images, None, Rows.all_of(images))
    assert classes.tolist() == [0, 0, 1, 1, 2, 3]
    for image, result, turns in zip(images, turned, classes.tolist(), strict=True):
        np.testing.assert_array_equal(np.rot90(image.numpy(), turns, (1, 2)), result.numpy())


def test_one_cycle_rises_for_a_fifth_and_falls_to_zero():
    rates = [one_cycle(step, 50) for step in range(50)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[9:]))
    assert rates[-1] < 0.01
    assert all(0 < one_cycle(step, 1) <= 1 for step in range(1))


@pytest.mark.parametrize(
    ("task", "architecture", "size"),
    [
        ("classify", "resnet18", 8),
        ("rotate", "vgg-small", 16),
        ("autoencode", "dcgan-encoder", 32),
        ("autoencode", "vgg-small", 32),
    ],
)
def test_result_is_weights_that_build_extractor_takes(tmp_path, task, architecture, size):
    dataset = open_dataset("images", make_array(tmp_path / "tiny.npz", count=24, size=size), image_size=size)
    result = short(dataset, task=task, architecture=architecture, steps=2, batch_size=8)
    result.save(tmp_path / "weights.safetensors")
    trained = build_extractor(architecture, image_size=size, weights=tmp_path / "weights.safetensors")
    assert trained.fingerprint != build_extractor(architecture, image_size=size).fingerprint
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
        for name, tensor in result.state_dict.items():
            assert torch.equal(file.get_tensor(name), tensor)
    assert metadata["task"] == task
    assert metadata["architecture"] == architecture
    assert metadata["dataset_sha256"] == dataset.fingerprint()["content_sha256"]
    assert float(metadata[result.metric]) == pytest.approx(result.validation, rel=1e-5)


def test_autoencoder_learns_and_reports_the_error_of_unseen_pixels():
    digits = open_dataset("digits")
    digits.images, digits.num_pictures = digits.images[:200], 200
    first = short(digits, task="autoencode", architecture="dcgan-encoder", steps=1, batch_size=16)
    last = short(digits, task="autoencode", architecture="dcgan-encoder", steps=24, batch_size=16)
    assert last.metric == "reconstruction_error"
    assert last.validation < 0.5 * first.validation


@pytest.mark.parametrize(
    ("task", "step"), [("classify", 1), ("classify", 3), ("classify", 5), ("autoencode", 4)], ids=str
)
def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, task, step):
    size, architecture = (32, "dcgan-encoder") if task == "autoencode" else (16, "vgg-small")
    dataset = open_dataset("images", make_array(tmp_path / "tiny.npz", size=size), image_size=size)
    options = {"task": task, "architecture": architecture, "steps": 7, "checkpoint": tmp_path / "checkpoint"}
    whole = short(dataset, **options)
    (tmp_path / "checkpoint").unlink(missing_ok=True)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted, match=f"step {step} of 7"):
            short(dataset, **options)
    resumed = short(dataset, **options, resume=True)
    assert same(whole.state_dict, resumed.state_dict)
    assert whole.history == resumed.history


def test_adam_has_no_momentum(tmp_path, monkeypatch):
    """Nobody may give one; checkpoints of old have SGD's among their settings, where it decided nothing."""
    dataset = open_dataset("images", make_array(tmp_path / "tiny.npz", size=32), image_size=32)
    file = tmp_path / "checkpoint"
    options = {"task": "autoencode", "architecture": "dcgan-encoder", "steps": 3, "checkpoint": file}
    with pytest.raises(InputError, match="the task autoencode is trained by Adam, which has none") as error:
        short(dataset, **options, momentum=0.5)
    assert error.value.argument == "momentum"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            short(dataset, **options)
    tensors, found = read_safetensors(file, "gfmn-pretraining-1", "", "")
    assert "momentum" not in json.loads(found["settings"])
    settings = json.dumps(json.loads(found["settings"]) | {"momentum": "0.9"})
    save_safetensors(file, tensors, {**found, "settings": settings})
    assert short(dataset, **options, resume=True).history[-1]["step"] == 3


def test_checkpoint_of_other_settings_or_damaged_is_refused(tiny, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            short(tiny, checkpoint=file)
    with pytest.raises(InputError) as error:
        short(tiny, checkpoint=file, resume=True, lr=0.2)
    assert error.value.argument == "lr"
    assert all(part in error.value.message for part in (str(file), "0.1", "0.2"))
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"{}" * 40):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=str(file)):
            short(tiny, checkpoint=file, resume=True)


def test_a_checkpoint_of_other_images_of_the_same_files_is_refused(folder, tmp_path, monkeypatch):
    file = tmp_path / "checkpoint"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            short(folder, checkpoint=file, loader="torch")
    other = open_dataset("images", tmp_path / "pictures", image_size=16, center_crop=16)
    for dataset, loader, argument in ((other, "torch", "center_crop"), (folder, "dali", "loader")):
        if loader == "dali":
            pytest.importorskip("nvidia.dali")
        with pytest.raises(InputError, match="was written with other settings") as error:
            short(dataset, checkpoint=file, resume=True, loader=loader)
        assert error.value.argument == argument


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_momentum_is_that_of_sgd(tiny, momentum):
    """None is 0.9, as in the paper's supplement."""
    result = short(tiny, steps=2, **({} if momentum is None else {"momentum": momentum}))
    assert result.metadata["momentum"] == str(momentum or 0.9)


@pytest.mark.parametrize(
    ("options", "argument", "named"),
    [
        ({"task": "sort"}, "task", ["sort", *TASKS]),
        ({"task": "autoencode"}, "task", ["autoencode", "32, 64, 128", "16"]),
        ({"architecture": "vgg16"}, "architecture", ["vgg16", "vgg-small"]),
        ({"architecture": "vgg19"}, "architecture", ["vgg19", "32", "16"]),
        ({"architecture": "dcgan-encoder"}, "architecture", ["dcgan-encoder", "32, 64, 128", "16"]),
        ({"image_size": 32}, "image_size", ["32", "16"]),
        ({"steps": 0}, "steps", ["0"]),
        ({"steps": None, "epochs": 0}, "epochs", ["0"]),
        ({"epochs": 1}, "steps", ["epochs"]),
        ({"batch_size": 1}, "batch_size", ["1"]),
        ({"lr": 0.0}, "lr", ["0.0"]),
        ({"lr": float("nan")}, "lr", ["nan"]),
        ({"momentum": float("inf")}, "momentum", ["inf"]),
        ({"weight_decay": -1.0}, "weight_decay", ["-1.0"]),
        ({"crop_padding": -1}, "crop_padding", ["-1"]),
        ({"momentum": 1.0}, "momentum", ["1.0"]),
        ({"lr": 1e300}, "lr", ["1e+300"]),
        ({"weight_decay": 1e300}, "weight_decay", ["1e+300"]),
        ({"crop_padding": 10**8}, "crop_padding", []),
        ({"lr": 1e30}, "lr", ["the loss became"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_about_its_argument(tiny, options, argument, named):
    with pytest.raises(InputError) as error:
        short(tiny, **options)
    assert error.value.argument == argument
    assert all(part in error.value.message for part in named)
    assert "\n" not in str(error.value)


def test_classify_without_labels_says_what_to_do(tmp_path):
    dataset = open_dataset("images", make_array(tmp_path / "tiny.npz", labels=False), image_size=16)
    with pytest.raises(InputError) as error:
        short(dataset)
    assert error.value.argument == "task"
    assert all(part in error.value.message for part in ("no labels", "rotate", "autoencode"))
    assert short(dataset, task="rotate", steps=2).metric == "accuracy"


def test_too_few_images(tmp_path):
    with pytest.raises(InputError) as error:
        short(open_dataset("images", make_array(tmp_path / "tiny.npz", count=19), image_size=16))
    assert error.value.argument == "dataset"
    assert all(part in error.value.message for part in ("20", "19"))
